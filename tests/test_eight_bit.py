"""8 bits: the kernels against their plain forms, linear layers and their files, the stores of keys and values.

Run as a script it prints what the kernels do as JSON; without a GPU under Triton's interpreter, which has to be chosen
before they are imported.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import GOLDEN, ROOT
from typer.testing import CliRunner

from varedit_core import Editor, SamplingSettings, load_transformer, sample, schedule_for
from varedit_core.cli.app import app
from varedit_core.cli.common import Files
from varedit_core.files.convert import convert
from varedit_core.files.lora import apply_lora
from varedit_core.model.config import TransformerConfig
from varedit_core.model.layers import sdpa
from varedit_core.runtime import eight_bit_cache, memory
from varedit_core.runtime.eight_bit_cache import EightBitCache, exact_heads, query_scales
from varedit_core.runtime.formats import Nvfp4
from varedit_core.runtime.fp8 import EightBitLinear, eight_bit, names, quantise_weight
from varedit_core.runtime.host_cache import HostCache
from varedit_core.runtime.kernels import linear_eight_bit, plain
from varedit_core.runtime.kv_caches import DeviceCache
from varedit_core.runtime.plan import STORES, Job, Plan
from varedit_core.runtime.workspace import Workspace
from varedit_core.sampling import driver

RECORD = GOLDEN / "patchify_256.safetensors"
SCHEDULE = schedule_for("0.06M")
HEADS, SIZE, DEPTH = 4, 32, 3
SIZES = TransformerConfig(DEPTH, HEADS * SIZE, HEADS, 56, 128, 512, 256, 15)
LARGE = [[4.0] * HEADS, [4.0, 90.0, 4.0, 60.0], [4.0] * HEADS]


def kernels() -> dict[str, float]:
    """Largest differences between kernels and plain forms."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fused, found = import_module("varedit_core.runtime.kernels.eight_bit"), {}
    generator = torch.Generator().manual_seed(0)
    for kind in [torch.float32] + [torch.bfloat16] * (device == "cuda"):
        for exact in ([], [1, 3], [0, 1, 2, 3]):
            results = {form: _packing(form, exact, kind, device) for form in (fused, plain)}
            for name in results[plain]:
                difference = (results[fused][name].float() - results[plain][name].float()).abs().max()
                found[f"{name} {len(exact)} {kind}"] = difference.item()
        x = torch.randn(5, 100, generator=generator).to(device, kind)
        x[2] = 0
        for part, made in zip(("codes", "scales"), zip(*(f.quantise_rows(x, kind=torch.int8) for f in (fused, plain)))):
            found[f"whole {part} {kind}"] = (made[0].float() - made[1].float()).abs().max().item()
        (codes, scales), (wanted, wanted_scales) = fused.quantise_rows(x), plain.quantise_rows(x)
        # The interpreter forgets the carry of a number that is rounded up to a power of two.
        carried = wanted.float().abs().log2().frac() == 0 if device == "cpu" else torch.zeros_like(x, dtype=torch.bool)
        found[f"row codes {kind}"] = (codes.float() - wanted.float()).masked_fill(carried, 0).abs().max().item()
        found[f"row scales {kind}"] = (scales - wanted_scales).abs().max().item()
        bias = torch.randn(48, generator=generator).to(device, kind)
        numbers = [torch.randn(rows, 300, generator=generator).to(device, kind) for rows in (20, 48)]
        for codes_kind in (torch.float8_e4m3fn, torch.int8):
            pair, weight = (plain.quantise_rows(rows, kind=codes_kind) for rows in numbers)
            exact = torch.nn.functional.linear(*(plain.dequantise_rows(*f, torch.float64) for f in (pair, weight)))
            for count in (3, 20):
                y = fused.few_rows(pair[0][:count], pair[1][:count], *weight, bias, kind)
                found[f"few rows, {count} {kind} {codes_kind}"] = beyond(y, exact[:count] + bias.double())
        sums = ((pair[0].cpu().int() @ weight[0].cpu().int().t()).to(device), pair[1], weight[1])
        y = fused.scale_products(*sums, bias, kind)
        found[f"scaled {kind}"] = beyond(y, exact + bias.double())
        found[f"scaled, plain {kind}"] = beyond(plain.scale_products(*sums, bias, kind), exact + bias.double())
        four = Nvfp4().round(torch.randn(272, 96, generator=generator).to(device, kind))
        made = [f.nvfp4_matrix(*four.values(), kind) for f in (fused, plain)]
        found[f"4 bits {kind}"] = (made[0].float() - made[1].float()).abs().max().item()
        back, wanted_back = (f.dequantise_rows(wanted, scales, kind) for f in (fused, plain))
        found[f"rows {kind}"] = (back.float() - wanted_back.float()).abs().max().item()
    return found


def beyond(found: torch.Tensor, exact: torch.Tensor) -> float:
    """By how much numbers are further off, relatively, than their type's steps."""
    allowed = 1e-5 if found.dtype == torch.float32 else 0.01
    return max(0.0, ((found - exact).abs() / (1 + exact.abs())).max().item() - allowed)


def _packing(form, exact: list[int], kind: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """What a form makes of random numbers of two of three rows: packed at some tokens, unpacked with those before."""
    heads, length, size, rows = 4, 100, 16, slice(1, 3)
    coded = [head for head in range(heads) if head not in exact]
    places = len(coded) + heads
    packed = plain.PackedHeads(
        torch.full((3, places, length, size), 7, dtype=torch.int8, device=device),
        torch.full((3, places, length), 0.5, device=device),
        torch.ones(3, len(exact), length, size, dtype=kind, device=device),
        torch.tensor(coded + exact, dtype=torch.int32, device=device),
    )
    generator = torch.Generator().manual_seed(1)
    staged = torch.randn(2, 2, heads, 130, size, generator=generator).to(device, kind)
    staged[1, 0, 0, 25] = 0
    form.pack_heads(staged, packed, rows, 20, 95)
    after = torch.zeros_like(staged)
    form.unpack_heads(packed, rows, 90, after)
    named = {"codes": packed.codes, "scales": packed.scales, "unpacked": after}
    return named | ({"exact": packed.exact} if exact else {})


def test_kernels_are_their_plain_forms():
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed here")
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = {**os.environ, **interpreted, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found and max(found.values()) <= (2e-6 if torch.cuda.is_available() else 0), found


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 64)
    with torch.no_grad():
        layer.weight[3] *= 1000
    return layer


def rounded(layer) -> EightBitLinear:
    result = EightBitLinear(layer.in_features, layer.out_features, True)
    codes, scales = quantise_weight(layer.weight.detach())
    result.weight, result.weight_scale = torch.nn.Parameter(codes, requires_grad=False), scales
    result.bias = layer.bias
    return result


@torch.no_grad()
def test_an_eight_bit_layer_is_close(layer):
    x = torch.randn(2, 5, 96)
    wanted, found = layer(x), rounded(layer)(x)
    ordinary = [row for row in range(64) if row != 3]  # a large channel has a scale of its own
    assert found.shape == wanted.shape and 0 < relative(found[..., ordinary], wanted[..., ordinary]) < 0.05
    given = plain.Rounded(*plain.quantise_rows(x), torch.float32)
    assert torch.equal(rounded(layer)(given), found), "rounded before or in the layer"
    one = linear_eight_bit(x[0, :1], *quantise_weight(layer.weight), layer.bias)
    torch.testing.assert_close(one, found[0, :1], msg="a token's numbers depend on no other's")


def logits(record, transformer, forced=None, **more):
    features = record.autoencoder.encode(record["in.image_u8"].float() / 127.5 - 1)
    settings, found = SamplingSettings(3.0, temperature=0.0), []
    for scale in sample(transformer, features, record.texts("text"), record.schedule, settings, **more):
        if forced:
            scale.bits = forced[scale.index][1]
        found.append((scale.logits, scale.bits))
    return found


@pytest.fixture(scope="module")
def network():
    return load_transformer(RECORD, linears="8-bit")


def test_which_layers_are_eight_bit(patchify, network):
    layers = {name for name, module in network.named_modules() if isinstance(module, EightBitLinear)}
    assert layers == set(names(patchify.transformer)) and len(layers) == 6 * patchify.transformer.config.depth
    assert not any("mat_kv" in name or "head" in name for name in layers)
    kept = {n for n, t in network.state_dict().items() if t.dtype == torch.float8_e4m3fn}
    assert kept == {f"{name}.weight" for name in layers}
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_edits_with_eight_bit_layers_are_close(patchify, network):
    exact = logits(patchify, patchify.transformer)
    for (found, _), (wanted, _) in zip(logits(patchify, network, exact), exact, strict=True):
        assert 0 < (found - wanted).abs().mean() < 0.1 * wanted.std()


def test_loading_and_converting_are_the_same(patchify, network):
    converted = deepcopy(patchify.transformer)
    eight_bit(converted)
    eight_bit(converted)
    loaded = network.state_dict()
    assert loaded.keys() == converted.state_dict().keys()
    for key, tensor in converted.state_dict().items():
        assert torch.equal(tensor.float(), loaded[key].float()), key


def test_an_fp8_file_keeps_its_numbers(tmp_path):
    file = tmp_path / "fp8.safetensors"
    convert(RECORD, file, "fp8")
    exact, loaded = load_transformer(file), load_transformer(file, linears="8-bit")
    again = deepcopy(exact)
    eight_bit(again)
    for name in names(exact):
        first, *others = (network.get_submodule(name) for network in (exact, loaded, again))
        for other in others:
            assert torch.equal(other.matrix(torch.float32), first.matrix(torch.float32))
    assert type(exact.blocks[0].ca.mat_kv) is type(loaded.blocks[0].ca.mat_kv)


def test_what_loading_refuses(network, tmp_path):
    with pytest.raises(ValueError, match="unknown linear layers '4-bit'; choose one of exact, 8-bit"):
        load_transformer(RECORD, linears="4-bit")
    lora, width = tmp_path / "lora.safetensors", network.config.width
    parts = {"A": torch.randn(2, width), "B": torch.randn(width, 2)}
    save_file({f"diffusion_model.blocks.0.sa.proj.lora_{part}.weight": x for part, x in parts.items()}, lora)
    with pytest.raises(ValueError, match="apply it first, then call `eight_bit`"):
        apply_lora(network, lora)
    before = load_transformer(RECORD)
    apply_lora(before, lora)
    eight_bit(before)
    assert not torch.equal(before.blocks[0].sa.proj.weight.float(), network.blocks[0].sa.proj.weight.float())
    editor = Files(linears="8-bit", device="cpu").load((RECORD, RECORD, None), [(lora, 1.0)])
    for key, tensor in editor.transformer.state_dict().items():
        assert torch.equal(tensor.float(), before.state_dict()[key].float())


def test_the_command_takes_them(tmp_path):
    cat, out = str(ROOT / "samples" / "cat.jpg"), str(tmp_path / "out.png")
    arguments = ["edit", cat, "make it sepia", "--device", "cpu", "--output", out, "--json", "--linears"]
    done = CliRunner().invoke(app, [*arguments, "8-bit"])
    assert done.exit_code == 0 and json.loads(done.stdout.splitlines()[-1])["linears"] == "8-bit", done.output
    refused = CliRunner().invoke(app, [*arguments, "4-bit", "--overwrite"])
    assert "unknown linear layers '4-bit'" in str(refused.exception)


class Run:
    """An edit's passes through stores, with random q, k and v: the same for every store."""

    def __init__(self, make, scales=LARGE) -> None:
        self.store, self.scales = make(SIZES, SCHEDULE, 2, torch.float32, "cpu"), torch.tensor(scales)
        self.passes = self.store.passes("cpu")

    def one(self, step, rows=slice(0, 2), stop: int = DEPTH) -> torch.Tensor:
        """Attention [blocks, r, n, H * D] of one pass of some rows; the source's last block is only kept."""
        step, found = replace(step, rows=rows), []
        for block in range(stop):
            generator = torch.Generator().manual_seed(100 * step.index + block)
            qkv = torch.randn(2, step.end - step.begin, 3 * HEADS * SIZE, generator=generator)[rows]
            if step.index < 0 and block == DEPTH - 1:
                self.store.keep(block, False, qkv, self.scales[block], step)
            else:
                found.append(self.store.attend(block, not block, qkv, self.scales[block], step, sdpa))
        return torch.stack(found)

    def all(self, rows=(slice(0, 2),)) -> list[torch.Tensor]:
        return [torch.cat([self.one(step, part) for part in rows], dim=1) for step in self.passes]


@pytest.fixture(scope="module")
def exact_run():
    return Run(DeviceCache).all()


def test_heads_with_large_scales_keep_their_keys(exact_run):
    def chosen(*sizes):
        return EightBitCache(*sizes, query_scales=LARGE)

    def error(make) -> torch.Tensor:
        """A head and block; where nothing is stored yet there is none."""
        apart = [(a - b)[:, 0].unflatten(-1, (HEADS, SIZE)) for a, b in zip(Run(make).all()[1:], exact_run[1:])]
        return torch.stack([x.square().mean((1, 3)) for x in apart]).mean(0).sqrt()

    with_choice, without = error(chosen), error(EightBitCache)
    assert exact_heads(LARGE) == [[], [1, 3], []] and not with_choice[0].any(), "the first block is exact"
    for head in range(HEADS):
        bound = 0.5 if head in (1, 3) else 1.01
        assert 0 < with_choice[1, head] < bound * without[1, head]
    assert torch.equal(with_choice[2], without[2]) and with_choice.max() < 0.02


@pytest.mark.parametrize("make", STORES.values())
@pytest.mark.parametrize("at_once", [None, 1])
def test_rows_one_after_the_other_change_nothing(make, at_once):
    more = {"at_once": at_once} if at_once and make is not DeviceCache else {}
    apart = Run(lambda *sizes: make(*sizes, **more)).all([slice(0, 1), slice(1, 2)])
    for found, wanted in zip(apart, Run(make).all(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", STORES.values())
def test_so_do_whole_edits(patchify, make, monkeypatch):
    monkeypatch.setattr(eight_bit_cache, "EXACT_FROM", 4.5)  # some heads of the recorded network
    together, apart = (
        logits(patchify, patchify.transformer, workspace=Workspace(make, rows_at_once=rows)) for rows in (None, 1)
    )
    for (found, bits), (wanted, wanted_bits) in zip(apart, together, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert torch.equal(bits, wanted_bits)


def test_the_host_store_is_exact_and_says_what_it_moves(exact_run):
    run = Run(HostCache)
    assert all(torch.equal(a, b) for a, b in zip(run.all(), exact_run, strict=True))
    token = 2 * 2 * HEADS * SIZE * 4 * (DEPTH - 1)  # keys and values of two rows in the blocks but the first
    assert run.store.moved == {
        "to device": token * sum(step.begin for step in run.passes), "to host": token * run.passes[-1].begin
    }  # fmt: skip


def test_a_pass_that_was_left_in_its_middle_does_no_harm(exact_run):
    run = Run(HostCache)
    for step in run.passes[:4]:
        run.one(step)
    run.one(run.passes[4], stop=2)
    assert all(torch.equal(a, b) for a, b in zip(run.all(), exact_run, strict=True))


class Planned(memory.TorchMemory):
    """Memory of a GPU that is not there: nothing is moved. moved: what would have been, of every attempt."""

    def __init__(self, network, device="cuda") -> None:
        super().__init__(network, torch.device(device))
        self.moved = []
        self.elsewhere = lambda networks, device: nullcontext(self.moved.append(list(networks)))

    def way(self, job) -> tuple[Plan, Workspace]:
        """How a job would run, and where."""

        def attempt(plan: Plan) -> Plan:
            return self.within(plan, False, lambda engine: plan)

        return memory.as_it_fits(job, self, attempt), self.workspace


def test_a_plan_knows_what_may_make_way(patchify, monkeypatch, caplog):
    transformer = patchify.transformer
    monkeypatch.setattr(memory, "query_scales", lambda transformer, device: query_scales(transformer, "cpu"))
    job = Job(transformer.config, patchify.schedule, 2, True, torch.float32, 10)
    other = torch.nn.Linear(10, 10)
    room = Planned(transformer)
    room.others, work = [other], room.workspace

    def way(free):
        monkeypatch.setattr(memory, "free_memory", lambda device: free + memory.SPARE)
        return room.way(job)

    best = Plan(job)
    assert way(best.needed + memory.kept_bytes(job)) == (best, work) and work.kept
    found, workspace = way(best.needed)
    assert found == best and not workspace.kept and workspace.kind is DeviceCache and not caplog.records
    assert not any(room.moved)
    one = Plan(replace(job, images=1), rows_at_once=1)
    found, workspace = way(one.needed - memory.nbytes(other))
    assert found.movable == memory.nbytes(other) == 440 and workspace.rows_at_once == 1
    assert room.moved[-1] == [other]
    assert "other networks in host memory meanwhile instead" in caplog.messages[0]
    monkeypatch.setattr(memory, "free_host_memory", lambda: 0)
    coded = Plan(replace(job, images=1, exact_keys=0), "8-bit", 1)
    found, workspace = way(coded.needed)
    assert coded.needed < one.needed and found.store == "8-bit" and workspace.kind is EightBitCache
    room.exact = True
    with pytest.raises(ValueError, match="free memory or use a smaller model"):
        way(coded.needed)
    elsewhere = Planned(transformer, "cpu")
    work = elsewhere.workspace
    assert elsewhere.way(job) == (best, work), "where nobody tells what is free, all at once"


def test_what_a_workspace_has_ready_is_used(patchify, monkeypatch):
    transformer, texts = patchify.transformer, patchify.texts("text")
    room = Planned(transformer)
    work = room.workspace
    for _ in sample(transformer, patchify["ref.vae_features"].float(), texts, patchify.schedule, workspace=work):
        pass
    job = Job(transformer.config, patchify.schedule, 1, True, torch.float32, len(texts[0]))
    monkeypatch.setattr(memory, "free_memory", lambda device: job.activations() + memory.SPARE)
    for other in (replace(job, images=2), replace(job, guided=False), replace(job, text_tokens=100)):
        assert not memory.holds(work, other)
    assert room.way(job) == (Plan(job), work) and work.store
    memory.make_room(work, torch.device("cuda"), job.activations())
    assert work.store
    memory.make_room(work, torch.device("cuda"), 1e18)
    assert work.store is None


def test_an_editor_follows_its_plan(patchify, monkeypatch):
    text, pictures = patchify["in.text.0"], [Image.new("RGB", (64, 64), colour) for colour in ("blue", "red")]
    editor, settings = Editor.load(RECORD, RECORD, device="cpu"), SamplingSettings(temperature=0.5, seed=3)
    features = patchify["ref.vae_features"].float()
    monkeypatch.setattr(editor, "encode_source", lambda images: torch.cat([features, features.flip(-1)])[: len(images)])

    def edited(pictures, texts, **more):
        made = editor.run(pictures, texts, size="0.06M", settings=settings, **more)
        return made.tokens.total(), [picture.tobytes() for picture in made.pictures]

    wanted = edited(pictures, [text, text])
    seen = []

    def one_by_one(job, room, attempt, least):
        seen.append(job)
        return attempt(Plan(replace(job, images=1), "host", movable=1))

    masks = [Image.new("L", (64, 64)) for _ in pictures]
    masks[0].paste(255, (0, 0, 64, 32))
    masks[1].paste(255, (40, 0, 64, 64))
    asked = dict(variations=2, mask=masks)
    masked = edited(pictures, [text, text], **asked)
    assert not torch.equal(*masked[0].chunk(2)), "each with its own mask"

    with monkeypatch.context() as patch:
        patch.setattr(driver, "as_it_fits", one_by_one)
        again = edited(pictures, [text, text], **asked)
        assert torch.equal(again[0], masked[0]) and again[1] == masked[1]
        seen.clear()
        found = edited(pictures, [text, text])
    assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]
    assert seen[0].images == 2 and seen[0].text_tokens == len(text) and editor.workspace.kind is HostCache
    editor.memory.device = torch.device("cuda")
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    monkeypatch.setattr(memory, "query_scales", lambda transformer, device: query_scales(transformer, "cpu"))
    with pytest.raises(ValueError, match="free memory or use a smaller model"):
        edited(pictures[0], text)
    editor.workspace = Workspace(EightBitCache)
    edited(pictures[0], text)
    assert editor.workspace.kind is EightBitCache, "a workspace of one's own is not planned"


if __name__ == "__main__":
    print(json.dumps(kernels()))
