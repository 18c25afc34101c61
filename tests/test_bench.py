"""`varedit bench` on the CPU with the tiny model: the command, its arithmetic, and what surrounds others' code."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from benchmarks import render
from varedit_core.bench import cli, measure
from varedit_core.bench.cases import choose, work
from varedit_core.bench.clock import Spread, Timed
from varedit_core.bench.measure import Runs
from varedit_core.bench.models import TOKENS, build, fill
from varedit_core.bench.published import measure_published
from varedit_core.bench.stand_ins import attention, packed_attention, rearrange, stand_ins
from varedit_core.cli.app import app
from varedit_core.files.published import TRANSFORMERS

CPU = torch.device("cpu")
TINY = ["bench", "--models", "tiny", "--sizes", "256", "--repeats", "1", "--device", "cpu"]


def invoke(*arguments):
    result = CliRunner().invoke(app, [*TINY, *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command's output for three kinds of case, and the file it saved, beside a published copy of 4 seconds."""
    folder = tmp_path_factory.mktemp("benchmarks")
    timing = Timed(Spread(4.0, 3.5, 4.5), 1.0, 24.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "FOLDER", folder)
        patch.setattr(cli, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
        patch.setattr(cli, "check_clone", lambda folder: None)
        patch.setattr(cli, "measure_published", lambda folder, cases, *_: [(case, timing) for case in cases])
        result = invoke("--cases", "edit,reroll,unguided-2", "--published", folder, "--save")
    return result, folder / "h100.json"


@pytest.fixture(scope="module")
def cases(run):
    return json.loads(run[1].read_text())["cases"]


def test_the_command_prints_tables_and_json_last(run):
    result, file = run
    *tables, last = result.stdout.strip().splitlines()
    assert json.loads(last) == json.loads(file.read_text())
    text = "\n".join(tables)
    assert all(words in text for words in ("source, 1x1", "16x16", "phases, seconds", "the machine", "tiny 256 reroll"))
    assert "tiny 256, published: 4.000 s" in result.stderr


def test_every_case_has_its_phases_scales_and_share(cases):
    assert [case["name"] for case in cases] == ["tiny 256", "tiny 256 reroll", "tiny 256 unguided-2"]
    for case in cases:
        phases, seconds = case["phases"], case["seconds"]
        assert tuple(phases) == measure.PHASES[2 if case["kind"] == "reroll" else 0 :]
        assert seconds["min"] <= seconds["median"] <= seconds["max"] and case["share"] > 0
        assert [scale["grid"] for scale in case["scales"]] == [[side, side] for side in (1, 2, 4, 6, 8, 12, 16)]
        assert all(scale["seconds"] > 0 and scale["floor_seconds"] > 0 for scale in case["scales"])
        assert case["floor_seconds"] > 0 and case["peak_gib"] is None


def test_kept_and_unguided_passes_are_less_work(cases):
    edit, reroll, unguided = ([scale["tflop"] for scale in case["scales"]] for case in cases)
    assert edit[1:] == reroll[1:] and edit[0] > 100 * reroll[0]
    assert edit[:5] == unguided[:5] and edit[5:] == [pytest.approx(2 * part, rel=1e-3) for part in unguided[5:]]


@pytest.mark.parametrize(
    ("model", "size", "products", "attention", "read"),
    [
        ("8B", "1024", 421, 147, 201),
        ("8B", "512", 102, 9, 158),
        ("2B", "1024", 110, None, None),
        ("2B", "512", 27, None, None),
    ],
)
def test_arithmetic(model, size, products, attention, read):
    """TFLOP, and GB of weights read in bf16, counted by hand: source and targets, guidance on."""
    (case,) = choose([model], [size], ["edit"])
    passes = [w for group in work(TRANSFORMERS[model], case) for w in group]
    assert len(passes) == len(case.schedule) + 1
    assert round(sum(w.products for w in passes) / 1e12) == products
    if attention:
        assert round(sum(w.attention for w in passes) / 1e12) == attention
        assert round(sum(w.weights for w in passes) * 2 / 1e9) == read


def test_variations_share_the_source():
    edit, four = choose(["8B"], ["1024"], ["edit", "variations"])
    (one_source, *one), (four_source, *more) = (
        [w.flop for group in work(TRANSFORMERS["8B"], case) for w in group] for case in (edit, four)
    )
    assert four_source == one_source and more == [4 * flop for flop in one] and four.variations == 4


def test_names_that_are_unknown_and_models_too_large(monkeypatch):
    with pytest.raises(ValueError, match="no case 'slow' to measure; choose of edit"):
        choose(["8B"], ["512"], ["slow"])
    with pytest.raises(ValueError, match="need a GPU; use --models tiny"):
        CliRunner().invoke(app, ["bench", "--device", "cpu"], catch_exceptions=False)
    with pytest.raises(ValueError, match="there is no folder"):
        CliRunner().invoke(app, [*TINY, "--json", "/nowhere/facts.json"], catch_exceptions=False)
    monkeypatch.setattr(cli, "device_of", lambda name: torch.device("mps"))
    with pytest.raises(ValueError, match="measures CUDA devices and CPUs, not mps"):
        CliRunner().invoke(app, TINY, catch_exceptions=False)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100_sxm4"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("cpu", "cpu"),
    ],
)
def test_file_names(device, name):
    assert cli.short_name(device) == name


def test_the_published_seconds_and_the_rendered_table(run, cases):
    edit, reroll, _ = cases
    assert edit["published"]["ratio"] == pytest.approx(4 / edit["seconds"]["median"], abs=0.01)
    assert "published" not in reroll
    head, _, first, second = render.speed(run[1]).splitlines()  # shortcuts have a table of their own
    assert head.startswith("| NVIDIA H100 80GB HBM3 | whole edit | loop |")
    assert "| 4.00 (3.50-4.50) s |" in first and first.startswith("| tiny 256 |")
    assert second.endswith("| - | 1 | - | - | - |") and first.count("|") == head.count("|") == second.count("|")


def test_a_published_copy_that_fails_costs_one_sentence(tmp_path, capsys):
    assert cli._published(tmp_path, choose(["tiny"], ["256"], ["edit"]), CPU, 1) == {}
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("the published implementation did not run: ValueError:") and "run_infinity.py" in said


def test_a_case_without_room_is_left_out(monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(cli, "measure", full)
    result = invoke()
    assert json.loads(result.stdout.splitlines()[-1])["cases"] == []
    assert "tiny 256: the device has too little memory" in result.stderr


def test_bits_are_near_coin_flips_and_every_edit_is_another():
    (case,) = choose(["tiny"], ["256"], ["edit"])
    runs = Runs(editor := build("tiny", CPU), case)
    assert [len(text) for text in editor.encode_text(["a", "some other words"])] == [TOKENS, TOKENS]
    scales = list(editor.sample(*editor.encode([runs.pictures[0]], ["a"]), case.schedule))
    assert all(0.4 < scale.bits.float().mean() < 0.6 for scale in scales[2:])
    first, second = (runs.edit()[0] for _ in range(2))
    assert first.shape == (1, 3, 256, 256) and first.isfinite().all() and not torch.equal(first, second)
    assert first.std() > 0.01


def test_weights_are_filled_by_their_names():
    network = nn.Module()
    for name, shape in {"norm1": (4,), "text_norm": (4,), "mat_qkv": (64, 4096)}.items():
        setattr(network, name, nn.Module())
        getattr(network, name).weight = nn.Parameter(torch.full(shape, torch.nan))
    network.scale_mul_1H11 = nn.Parameter(torch.full((1, 2, 1, 1), torch.nan))
    network.register_buffer("zero_k_bias", torch.full((4,), torch.nan))
    network.register_buffer("mask", torch.arange(3))
    fill(network, torch.Generator().manual_seed(0))
    assert network.norm1.weight.eq(1).all() and network.zero_k_bias.eq(0).all() and network.mask[2] == 2
    assert network.mat_qkv.weight.std() == pytest.approx(1 / 64, rel=0.02)
    assert network.scale_mul_1H11.exp().allclose(torch.tensor(4.0)) and not network.mat_qkv.weight.requires_grad


@pytest.mark.parametrize("lengths", [(3, 3), (2, 4)])
def test_attention_to_packed_rows(lengths):
    q, kv = torch.randn(10, 2, 8), torch.randn(sum(lengths), 2, 2, 8)
    ends = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    found = packed_attention(q, kv, torch.tensor([0, 5, 10]), ends, 5, max(lengths), softmax_scale=0.3)
    for row, (queries, part) in enumerate(zip(q.split(5), kv.split(list(lengths)))):
        k, v = part.unbind(1)
        weights = torch.einsum("nhd,mhd->hnm", queries, k).mul(0.3).softmax(-1)
        expected = torch.einsum("hnm,mhd->nhd", weights, v)
        torch.testing.assert_close(found[5 * row : 5 * row + 5], expected)


def test_stand_ins_come_and_go():
    assert "no_such_package" not in sys.modules
    table = {"no_such_package": {}, "no_such_package.part": {"name": attention}, "json": {"loads": None}}
    with stand_ins(table) as put:
        from no_such_package.part import name

        assert name is attention and put == ["no_such_package", "no_such_package.part"]
    assert "no_such_package" not in sys.modules and "json" in sys.modules
    x = torch.randn(2, 3, 4, 1, 5)
    assert torch.equal(rearrange(x, "... c d -> ... (c d)"), x[..., 0, :])
    assert rearrange(x, "b ... d -> b d ...").shape == (2, 5, 3, 4, 1)
    with pytest.raises(NotImplementedError, match="install einops"):
        rearrange(x, "a b -> b a")


class OnCpu(TorchFunctionMode):
    """Takes what is meant for CUDA to the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "cuda":
            return args[0]
        return function(*("cpu" if isinstance(a, str) and a == "cuda" else a for a in args), **(kwargs or {}))


@pytest.mark.skipif(
    "VAREDIT_PUBLISHED" not in os.environ, reason="VAREDIT_PUBLISHED names no copy of HiDream-ai/VAREdit"
)
def test_the_published_code_runs():
    before, path = set(sys.modules), list(sys.path)
    with OnCpu():
        cases = choose(["tiny"], ["256"], ["edit"])
        ((case, timing),) = measure_published(Path(os.environ["VAREDIT_PUBLISHED"]), cases, CPU, repeats=1, warmups=0)
    assert case == cases[0] and timing.seconds.median > 0 and sys.path == path
    left = {name.split(".")[0] for name in set(sys.modules) - before}
    assert not left & {"infinity", "tools", "flash_attn", "timm"}


def test_a_file_keeps_the_cases_that_were_not_measured_again(tmp_path):
    file, facts = (
        tmp_path / "h100.json",
        {"benchmark": "b", "device": "d", "torch": "2", "cases": [{"name": "x", "n": 1}]},
    )
    assert cli.merged(file, facts) == facts
    file.write_text(json.dumps(facts | {"cases": [{"name": "x", "n": 0}, {"name": "y"}]}))
    assert cli.merged(file, facts)["cases"] == [{"name": "y"}, {"name": "x", "n": 1}]
    assert cli.merged(file, facts | {"torch": "3"})["cases"] == facts["cases"]
