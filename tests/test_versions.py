"""The floors that pyproject.toml declares: what newer versions of torch brought is used only where it is guarded."""

import ast
import re

import pytest
from support import ROOT

NEWER = {
    # What torch has since when, as it stands in code: a dotted name's end, a keyword, or a call's keyword.
    "enable_gqa=": (2, 5),
    "flex_attention": (2, 5),
    "torch._scaled_mm": (2, 5),  # in this way of calling
    "torch.OutOfMemoryError": (2, 5),
    "torch.nn.Buffer": (2, 5),
    "torch.xpu": (2, 5),
    "torch.accelerator": (2, 6),
    "torch.compiler.set_stance": (2, 6),
    "torch.library.triton_op": (2, 6),
    "set_priority=": (2, 6),
    "config.recompile_limit": (2, 7),
    "config.allow_unspec_int_on_nn_module": (2, 7),
    "torch.float8_e8m0fnu": (2, 7),
    "torch.compiler.nested_compile_region": (2, 8),
    "torch.AcceleratorError": (2, 8),
    "torch.bmm(out_dtype=": (2, 8),
    "torch.mm(out_dtype=": (2, 8),
    "torch.matmul(out_dtype=": (2, 8),
    "torch.baddbmm(out_dtype=": (2, 8),
    "torch.float4_e2m1fn_x2": (2, 8),
}
GUARDED = {
    # Where each may stand, as something asks first whether it is there, or a case of its absence goes before.
    ("varedit_core/runtime/kernels/__init__.py", "torch.bmm(out_dtype="),  # `_widens`
    ("varedit_core/runtime/kernels/__init__.py", "torch._scaled_mm"),  # `multiplies_eight_bit`
    ("varedit_core/bench/ceilings.py", "torch._scaled_mm"),  # in a try
}
FILES = sorted([*ROOT.glob("varedit_core/**/*.py"), *ROOT.glob("nodes/**/*.py")])


def floor(extra: str) -> tuple[int, ...]:
    """The oldest torch that an extra of pyproject.toml allows."""
    block = re.search(rf"^{extra} = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    return tuple(map(int, re.search(r'"torch>=([\d.]+)"', block)[1].split(".")))


def uses(source: str) -> set[str]:
    """What of NEWER a file uses."""
    found, names = set(), [name for name in NEWER if not name.endswith("=")]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            for keyword in filter(None, (k.arg for k in node.keywords)):
                found |= {f"{function}({keyword}=", f"{keyword}="} & set(NEWER)
        elif isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            found |= {name for name in names if whole == name or whole.endswith(f".{name}")}
        elif isinstance(node, ast.Name):
            found |= {node.id} & set(names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found |= {name for name in names if whole == name or whole.endswith(f".{name}")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_newer_than_the_floor_is_used_unasked(path):
    where = path.relative_to(ROOT).as_posix()
    oldest = floor("train" if where.startswith("varedit_core/training/") else "core")
    found = {name for name in uses(path.read_text()) if NEWER[name] > oldest}
    assert found == {name for file, name in GUARDED if file == where}


def test_uses_are_found():
    source = "import torch\nfrom torch.nn.attention.flex_attention import flex_attention\n"
    source += "torch.bmm(x, y, out_dtype=z)\ntorch._dynamo.config.recompile_limit = 3\nf(x, enable_gqa=True)\n"
    wanted = {"flex_attention", "torch.bmm(out_dtype=", "config.recompile_limit", "enable_gqa="}
    assert uses(source) == wanted and not uses("import torch\ntorch.bmm(x, y)\nlimit = recompile_limit\n")


def test_the_table_of_versions_has_the_floors():
    table = (ROOT / "docs" / "VERSIONS.md").read_text()
    for extra in ("core", "train"):
        assert re.search(rf"\|.*\b{'.'.join(map(str, floor(extra)))}\.\d", table), extra
