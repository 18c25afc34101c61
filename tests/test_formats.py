"""Weights in fewer bits: each format against its numbers, its files, and edits with them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import GOLDEN

from varedit_core import load_transformer
from varedit_core.files.convert import FORMS, PRECISIONS, convert
from varedit_core.files.lora import apply_lora
from varedit_core.files.quantised import formats_of
from varedit_core.files.weights import WeightError, open_weights
from varedit_core.runtime import formats
from varedit_core.runtime.formats import FORMATS, Float8, Int8, Nvfp4, read
from varedit_core.runtime.fp8 import EightBitLinear, eight_bit
from varedit_core.runtime.kernels import plain, rotate
from varedit_core.runtime.layers import StoredLinear

RECORD = GOLDEN / "patchify_256.safetensors"
KINDS = [kind() for kind in FORMATS.values()] + [Int8(256), Int8(16)]
# Of random numbers: how far they are off, relative to their size.
ERRORS = {"float8_e4m3fn": 0.03, "int8_tensorwise": 0.012, "nvfp4": 0.09}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture(scope="module")
def matrix():
    made = torch.randn(288, 512, generator=torch.Generator().manual_seed(0))
    made[3] = 0
    return made


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_format_keeps_a_matrix(kind, matrix):
    parts = kind.round(matrix)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == kind.kinds(tuple(matrix.shape))
    back = kind.matrix(parts, torch.float32)
    assert 0 < relative(back, matrix) < ERRORS[kind.name] and not back[3].any()
    assert all(torch.equal(one, again) for one, again in zip(parts.values(), kind.round(back.clone()).values())) or (
        relative(kind.matrix(kind.round(back), torch.float32), back) < ERRORS[kind.name] / 2
    ), "rounded again it hardly moves"
    half = kind.matrix(parts, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and relative(half.float(), back) < 0.004


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_a_file_says_is_read_again(kind):
    assert read(json.loads(json.dumps(kind.settings))) == kind
    assert (
        read({"format": kind.name, "params": {key: x for key, x in kind.settings.items() if key != "format"}}) == kind
    )


def test_steps_of_four_bits(monkeypatch):
    """Every code there is; between two steps the even one; and the larger scale where 4 is nearer than 6."""
    block = torch.tensor([[0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0]])
    parts = Nvfp4().round(block.repeat(16, 1))
    assert torch.equal(Nvfp4().matrix(parts, torch.float32), block.repeat(16, 1))
    fives = torch.tensor([[5.0, 3.75, 2.5, 1.25] + [0.0] * 12])  # 4, 3, 2 and 1 times a step; of 6 they lie between
    codes, scales = plain.nvfp4_codes(fives, torch.tensor(1.0))
    assert scales.float().item() == 1.25 and codes[0, :2].tolist() == [0x65, 0x42]
    monkeypatch.setattr(plain, "_NVFP4_TOPS", (6.0,))
    ties = torch.tensor([[6.0, 0.25, 0.75, 1.25, -1.75, 2.5, 3.5, 5, 0, 0, 0, 0, 0, 0, 0, 0]])
    codes, scales = plain.nvfp4_codes(ties, torch.tensor(1.0))
    assert scales.float().item() == 1 and codes[0, :4].tolist() == [0x70, 0x22, 0xC4, 0x66]


def test_scales_of_four_bits_lie_in_tiles():
    """A row's scale is where the tensor cores look for it."""
    matrix = torch.zeros(144, 80)
    matrix[:16, :16] = 1
    matrix[130, 64:] = 6 * 448
    scales = Nvfp4().round(matrix)["weight_scale"].view(torch.uint8)
    assert scales.shape == (256, 8)
    (row, column), *_ = (scales == scales.max()).nonzero().tolist()
    tile, row_in, block = 1 * 2 + 1, 130 % 128, 4
    assert row * 8 + column == tile * 512 + (row_in % 32) * 16 + row_in // 32 * 4 + block % 4


@pytest.mark.parametrize("group", formats.GROUPS)
def test_a_rotation_is_its_own_inverse(group):
    x = torch.randn(3, 2, 512, dtype=torch.float64)
    turned = rotate(x, group)
    assert relative(rotate(turned, group), x) < 1e-6 and abs(turned.norm() / x.norm() - 1) < 1e-6
    assert relative(turned, x) > 1 and relative(plain.rotate(x, group), turned) < 1e-6
    one = torch.zeros(group)
    one[5] = 1
    assert rotate(one, group).abs().max() == pytest.approx(group**-0.5), "an outlier is spread over its group"


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_layer_multiplies_with_the_numbers(kind, matrix):
    layer = StoredLinear(512, 288, device="meta")
    layer.bias = torch.nn.Parameter(torch.randn(288))
    layer.store(kind, matrix)
    x = torch.randn(2, 5, 512)
    wanted = torch.nn.functional.linear(x, layer.matrix(torch.float32), layer.bias)
    assert relative(layer(x), wanted) < 1e-5 and layer(x.bfloat16()).dtype == torch.bfloat16
    other = StoredLinear(512, 288, device="meta")
    other.store(kind)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(x), layer(x))
    other.store(None, matrix)
    assert torch.equal(other.matrix(torch.float32), matrix) and "weight_scale" not in other.state_dict()


@torch.no_grad()
@pytest.mark.parametrize("group", [0, 256])
def test_whole_numbers_are_multiplied_as_such(group, matrix):
    layer, x = torch.nn.Sequential(StoredLinear(512, 288, device="meta")), torch.randn(2, 5, 512)
    layer[0].bias = torch.nn.Parameter(torch.randn(288))
    layer[0].store(Int8(group), matrix)
    x[..., 7] *= 50
    codes, scales = layer[0].weight, layer[0].weight_scale[:, 0]
    whole = EightBitLinear(512, 288, True, torch.int8, group)
    whole.weight, whole.weight_scale, whole.bias = torch.nn.Parameter(codes, False), scales, layer[0].bias
    error = relative(whole(x), layer(x))
    assert 0 < error < (0.02 if group else 0.2) and not whole.reads_rounded
    gelu = torch.nn.functional.gelu(x, approximate="tanh")
    assert relative(whole.after_gelu(x), layer(gelu)) < (0.02 if group else 0.2)
    assert torch.equal(whole.matrix(torch.float32), layer[0].matrix(torch.float32))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    made = {precision: folder / f"{precision}.safetensors" for precision in PRECISIONS}
    for precision, file in made.items():
        convert(RECORD, file, precision)
    return made


@pytest.mark.parametrize("precision", FORMS)
def test_a_file_holds_what_it_says(files, precision):
    exact, network = load_transformer(files["fp32"]), load_transformer(files[precision])
    stored = formats_of(open_weights(files[precision]))
    assert len(stored) == 7 * exact.config.depth and set(stored) == {
        name for name, layer in network.named_modules() if getattr(layer, "stored", None)
    }
    for name, kind in stored.items():
        wanted, layer = exact.get_submodule(name).weight, network.get_submodule(name)
        assert layer.stored == kind and relative(layer.matrix(torch.float32), wanted) < ERRORS[kind.name]
        down = name.endswith("fc2")
        assert isinstance(kind, {"fp8": Float8, "int8": Int8, "nvfp4": Float8 if down else Nvfp4}[precision])
        assert bool(kind.group) == (precision == "int8" and down)
    assert files[precision].stat().st_size < files["bf16"].stat().st_size
    again = load_transformer(files[precision], linears="8-bit")
    eight_bit(network)
    for (name, one), other in zip(network.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one.float(), other.float()), name
    kept = {name for name, layer in again.named_modules() if isinstance(getattr(layer, "stored", None), Nvfp4)}
    assert {name for name in kept if "mat_kv" not in name} == (
        {name for name, kind in stored.items() if isinstance(kind, Nvfp4) and "mat_kv" not in name}
    ), "4 bits are not rounded again"


@pytest.mark.parametrize("precision", FORMS)
def test_loras_are_merged_into_the_numbers(files, tmp_path, precision):
    network = load_transformer(files[precision])
    before, width = network.blocks[0].sa.proj.matrix(torch.float32), network.config.width
    parts = {"A": torch.randn(2, width), "B": torch.randn(width, 2)}
    file = tmp_path / "lora.safetensors"
    save_file({f"diffusion_model.blocks.0.sa.proj.lora_{part}.weight": x for part, x in parts.items()}, file)
    apply_lora(network, file)
    wanted = before + parts["B"] @ parts["A"]
    assert relative(network.blocks[0].sa.proj.weight.float(), wanted) < 1e-5


LAYER = "blocks.1.sa.proj"
WRONG = {
    "int8: no scale": ("int8", {f"{LAYER}.weight_scale": None}, "where floating-point numbers were expected"),
    "int8: a scale of another length": (
        "int8", {f"{LAYER}.weight_scale": torch.ones(3, 1)}, "where int8_tensorwise has"),
    "nvfp4: scales of another shape": (
        "nvfp4", {f"{LAYER}.weight_scale": torch.ones(4, 4).to(torch.float8_e4m3fn)}, "where nvfp4 has"),
    "nvfp4: no second scale": ("nvfp4", {f"{LAYER}.weight_scale_2": None}, "lacks blocks.1.sa.proj.weight_scale_2"),
    "nvfp4: a weight of another width": (
        "nvfp4", {f"{LAYER}.weight": torch.zeros(128, 3, dtype=torch.uint8)}, "where nvfp4 has|was expected"),
    "smoothed inputs": ("int8", {f"{LAYER}.pre_quant_scale": torch.ones(128)}, "only ComfyUI runs"),
    "an unknown format": ("int8", {}, "the format mxfp8, which only ComfyUI runs"),
    "no format": ("int8", {}, "does not say in which format"),
    "no JSON": ("int8", {}, "says nothing readable"),
    "groups that are none": ("int8", {}, "groups of 48 channels"),
    "groups that do not fit": ("int8", {}, "which its shape does not take"),
}  # fmt: skip
SAID = {
    "an unknown format": {"format": "mxfp8"}, "groups that are none": {
        "format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 48},
    "groups that do not fit": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4096},
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_parts_that_are_none_are_told(files, tmp_path, case):
    precision, changes, sentence = WRONG[case]
    opened = open_weights(files[precision])
    state = {k: x for k, x in (load_file(files[precision]) | changes).items() if x is not None}
    metadata = dict(opened.metadata)
    if case == "no format":
        del metadata["_quantization_metadata"]
    elif case == "no JSON":
        metadata["_quantization_metadata"] = "{"
    elif case in SAID:
        said = json.loads(metadata["_quantization_metadata"])
        said["layers"][LAYER] = SAID[case]
        metadata["_quantization_metadata"] = json.dumps(said)
    save_file(state, tmp_path / "wrong.safetensors", metadata)
    for linears in ("exact", "8-bit"):
        with pytest.raises(WeightError, match=sentence):
            load_transformer(tmp_path / "wrong.safetensors", linears=linears)


def test_what_a_tensor_says_counts_too(files, tmp_path):
    """ComfyUI saves what it says of a layer beside its weight; with a prefix where other parts are in the file."""
    said = json.loads(open_weights(files["int8"]).metadata["_quantization_metadata"])["layers"]
    notes = {f"{n}.comfy_quant": torch.tensor(list(json.dumps(s).encode()), dtype=torch.uint8) for n, s in said.items()}
    state = {f"model.diffusion_model.{key}": x for key, x in (load_file(files["int8"]) | notes).items()}
    save_file(state, tmp_path / "saved.safetensors")
    one, other = load_transformer(files["int8"]), load_transformer(tmp_path / "saved.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert one.blocks[1].ffn.fc2.stored == other.blocks[1].ffn.fc2.stored
