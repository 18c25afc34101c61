"""The kernels of 8 and 4 bits compile for a GPU, on any machine: Triton's interpreter takes more than
its compiler does. Run as a script it compiles them and prints what failed as JSON."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from support import ROOT

CAPABILITIES = (80,)  # Ampere, which knows no float8
TYPES = {"codes": "*i8", "weight": "*i8", "sums": "*i32", "x": "*bf16", "out": "*bf16", "bias": "*bf16"}
OPTIONS = {
    "BIAS": True, "ROWS": 16, "COLUMNS": 32, "STEP": 256, "GELU": True, "MOST": 127.0, "LEAST": 1e-12, "BLOCK": 2048,
    "GROUP": 16,
}  # fmt: skip
KERNELS = ("_quantise_rows", "_dequantise_rows", "_few_rows", "_scale_products", "_nvfp4_matrix")


def compiled() -> dict[str, str]:
    """What the compiler says of each kernel and GPU that fails."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from varedit_core.runtime.kernels import eight_bit

    failed = {}
    for name in KERNELS:
        function = getattr(eight_bit, name).function
        types, options = {}, {**OPTIONS, "SUMS": tl.int32}
        for argument in function.arg_names:
            stem = argument.removesuffix("_ptr")
            pointer = TYPES.get(stem, "*fp32") if argument.endswith("_ptr") else "i32"
            types[argument] = "constexpr" if argument in options else pointer
        if name == "_nvfp4_matrix":
            types |= {"codes_ptr": "*u8", "scales_ptr": "*u8"}
        constants = {(n,): options[a] for n, a in enumerate(function.arg_names) if a in options}
        for capability in CAPABILITIES:
            try:
                triton.compile(ASTSource(function, types, constexprs=constants), GPUTarget("cuda", capability, 32))
            except Exception as error:
                failed[f"{name} sm_{capability}"] = str(error)[-500:]
    return failed


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")
def test_kernels_compile_without_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert not found, found


if __name__ == "__main__":
    print(json.dumps(compiled()))
