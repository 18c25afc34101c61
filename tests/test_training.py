"""Training: settings, the objective, resuming, and what comes out of it. On the CPU, with networks of a few neurons."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from support import ROOT

accelerate = pytest.importorskip("accelerate")

from varedit_core import Editor  # noqa: E402
from varedit_core.model.config import AutoencoderConfig  # noqa: E402
from varedit_core.pictures.images import fit as fitted  # noqa: E402
from varedit_core.pictures.images import load_image  # noqa: E402
from varedit_core.runtime.fp8 import EightBitLinear, quantise_weight  # noqa: E402
from varedit_core.sampling.settings import SamplingSettings  # noqa: E402
from varedit_core.tokenizer.quantizer import encode, latent_grids, to_tokens  # noqa: E402
from varedit_core.tokenizer.schedule import schedule_for  # noqa: E402
from varedit_core.tokenizer.vae import Autoencoder  # noqa: E402
from varedit_core.training import engine, pairs, settings, states, tasks  # noqa: E402
from varedit_core.training.data import Pair, PairError  # noqa: E402
from varedit_core.training.eight_bit_base import FrozenLinear  # noqa: E402
from varedit_core.training.objective import bit_accuracy, draw_flips, teach, token_weights  # noqa: E402
from varedit_core.training.parallel import BlockCausal, parallel_logits  # noqa: E402
from varedit_core.training.run import _check, run  # noqa: E402
from varedit_core.training.settings import NewText, NewTransformer, load_stages  # noqa: E402
from varedit_core.training.sharded import keep_exact  # noqa: E402
from varedit_core.training.words import make_vocabulary, new_text_encoder  # noqa: E402

PAIRS = 6
SCHEDULE = schedule_for("0.06M")
BITS = 14


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A folder with tokenizer.safetensors, transformer.safetensors and text_encoder, all random, and pairs."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = AutoencoderConfig(BITS, 32, (32,) * 4, (32,) * 4, 1, 1, 8)
    save_file(Autoencoder(config).state_dict(), folder / "tokenizer.safetensors")
    network = tasks.new_transformer(NewTransformer(2, 64, 1, 128, 7), config, 128, 64, 0)
    save_file(network.state_dict(), folder / "transformer.safetensors")
    make_vocabulary(folder / "text_encoder" / "tokenizer.json", 300)
    tasks.save_text(folder / "text_encoder", new_text_encoder(NewText(128, 1, 2, 64), 300), folder / "text_encoder")
    make_pairs(folder / "pairs")
    return folder


def published_pairs(folder: Path) -> Path:
    """The same pairs as the published training reads them, targets of twice the size among them: a list and shards."""
    pytest.importorskip("webdataset")
    path = folder / "pairs" / "list.txt"
    with tarfile.open(path.with_name("wds_x_0000.tar"), "w") as tar:
        for index in range(PAIRS):
            target = Image.open(folder / "pairs" / f"t{index}.png")
            parts = {"src.jpg": Image.open(folder / "pairs" / f"s{index}.png"), "tgt.jpg": target.resize((96, 80))}
            for suffix, part in {**parts, "txt": f"add circle number {index}".encode()}.items():
                data = BytesIO(part if isinstance(part, bytes) else b"")
                if not isinstance(part, bytes):
                    part.save(data, "JPEG")
                info = tarfile.TarInfo(f"{index:04}.{suffix}")
                info.size = len(data.getvalue())
                tar.addfile(info, BytesIO(data.getvalue()))
    path.write_text(f"x\t{PAIRS}\t1\n")
    return path


def make_pairs(folder: Path) -> None:
    folder.mkdir()
    rows = []
    for index in range(PAIRS):
        picture = Image.new("RGB", (48, 40), (40 * index, 90, 200 - 30 * index))
        picture.save(folder / f"s{index}.png")
        ImageDraw.Draw(picture).ellipse((10, 8, 30, 28), fill=(250, 20 * index, 10))
        picture.save(folder / f"t{index}.png")
        rows.append({"source": f"s{index}.png", "target": f"t{index}.png", "instruction": f"add circle number {index}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


HEAD = '[[stage]]\nname = "a"\nprecision = "fp32"\nseed = 3\nlog_every = 1\nsample_every = 0\n'
TOKENIZER = (
    HEAD
    + """task = "tokenizer"
steps = 3
batch = 2
[stage.new_tokenizer]
encoder_blocks = 1
decoder_blocks = 1
[stage.data]
pictures = 0.2
"""
)
EDITS = """task = "{task}"
steps = {steps}
batch = {batch}
autoencoder = "tokenizer.safetensors"
text_encoder = "text_encoder"
"""
NEW = "[stage.new_transformer]\ndepth = 2\nwidth = 64\nheads = 1\nhidden = 128\n"
OWN = '[stage.data]\nsource = "pairs"\nworkers = 0\n'


def stages_of(folder: Path, text: str, *changes: str):
    (folder / "training.toml").write_text(text)
    return load_stages(folder / "training.toml", changes)


def edits(parts: Path, *changes: str, task: str = "transformer", steps: int = 3, batch: int = 2, more: str = NEW + OWN):
    text = HEAD + EDITS.format(task=task, steps=steps, batch=batch)
    return stages_of(
        parts, text + ('transformer = "transformer.safetensors"\n' if task == "lora" else "") + more, *changes
    )


def figures(folder: Path, name: str) -> list:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def losses(folder: Path) -> list[float]:
    return figures(folder, "loss")


class Killed(Exception):
    pass


def killed_after(monkeypatch, steps: int):
    """Make the loop die in the step after `steps`, as if by a signal: without a checkpoint of its own."""
    true, made = engine._step, []

    def step(*arguments):
        if len(made) == steps:
            raise Killed
        made.append(1)
        return true(*arguments)

    monkeypatch.setattr(engine, "_step", step)


# Settings


def test_paths_start_from_the_files_folder(parts, monkeypatch):
    monkeypatch.chdir(parts.parent)
    (stage,) = edits(Path(parts.name))
    assert stage.autoencoder == str(parts / "tokenizer.safetensors") and stage.data.source == str(parts / "pairs")
    (stage,) = edits(parts, "a.data.source=hf:owner/name", "a.autoencoder=@first", "a.text_encoder=/x/t5")
    assert (stage.data.source, stage.autoencoder, stage.text_encoder) == ("hf:owner/name", "@first", "/x/t5")


def test_settings_on_the_command_line(parts):
    (stage,) = edits(parts, "a.steps=7", 'a.data.size="0.25M"', "a.new_transformer.depth = 1", "a.lora.targets=mlp")
    assert (stage.steps, stage.data.size, stage.new_transformer.depth, stage.lora.targets) == (7, "0.25M", 1, "mlp")
    assert stage.new_transformer.width == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a.stepps=3", "stage 1: unknown setting 'stepps' (did you mean steps?); known are name, task, steps"),
        ("a.data.sorce=x", "stage 1, data: unknown setting 'sorce'"),
        ("a.steps=many", "stage 1, steps: expected int, got 'many'"),
        ("a.steps=true", "stage 1, steps: expected int, got True"),
        ("a.steps=0", "stage a: steps must be from 1 to 1000000000, got 0"),
        ("a.log_every=0", "log_every must be from 1 to 1000000000, got 0"),
        ("a.optimisation.accumulate=0", "optimisation.accumulate must be from 1 to 65536, got 0"),
        ("a.task=paint", "task must be one of tokenizer, transformer, lora, got 'paint'"),
        ("a.data.size=3M", "data.size must be one of 0.06M"),
        ("a.data.columns.source=3", "columns, source: expected str, got 3"),
        ("a.name=x/y", "must be letters, digits"),
        ("b.steps=1", "there is no stage 'b'; choose one of a"),
        ("steps=1", "write STAGE.NAME=VALUE, such as a.steps=10"),
        ("a.steps", "write STAGE.NAME=VALUE"),
    ],
)
def test_mistakes_in_settings_are_named(parts, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        edits(parts, change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[stage]]\nname=", "is not valid TOML"),
        ("x = 1", r"must hold tables named \[\[stage\]\] and nothing else"),
        ('[[stage]]\nname = "a"\n', "stage 1: missing .* 'task'"),
        (TOKENIZER + TOKENIZER, "names two stages alike"),
        (TOKENIZER + "encoder_widths = [32]\n", "unknown setting 'encoder_widths'"),
        (TOKENIZER.replace("encoder_blocks = 1", "encoder_widths = [9]"), "encoder_widths must be from 64"),
        (HEAD + EDITS.format(task="lora", steps=1, batch=1), "name the transformer that the LoRA is for"),
    ],
)
def test_files_that_are_no_training_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        stages_of(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file of settings at .*none.toml; check the path"):
        load_stages(tmp_path / "none.toml")


@pytest.mark.parametrize("path", sorted((ROOT / "samples" / "training").glob("*.toml")), ids=lambda path: path.stem)
def test_examples_load(path):
    assert load_stages(path)


def test_the_manual_names_every_setting():
    from varedit_core.training import settings

    text = (ROOT / "docs" / "TRAINING.md").read_text()
    tables = dict(re.findall(r"^### `([\w.\[\]]+)`.*?\n((?:.*\n)*?)(?=^#|\Z)", text, flags=re.MULTILINE))
    kinds = {
        "[[stage]]": settings.Stage, "stage.data": settings.Data, "stage.optimisation": settings.Optimisation,
        "stage.objective": settings.Objective, "stage.reconstruction": settings.Reconstruction,
        "stage.lora": settings.Lora,
        "stage.new_transformer": NewTransformer,
        "stage.new_tokenizer": settings.NewTokenizer, "stage.new_text": NewText,
    }  # fmt: skip
    assert set(tables) == set(kinds)
    for name, kind in kinds.items():
        rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", tables[name], flags=re.MULTILINE))
        fields = {f.name: f for f in kind.__dataclass_fields__.values()}
        plain = {
            n
            for n in fields
            if n not in ("data", "optimisation", "objective", "reconstruction", "lora") and not n.startswith("new_")
        }
        assert set(rows) == plain, name
        for row, shown in rows.items():
            default = fields[row].default
            if fields[row].default_factory is dict:
                default = {}
            kept = "required" if type(default).__name__ == "_MISSING_TYPE" else f"`{as_toml(default)}`"
            assert shown == kept, (name, row)


def as_toml(value) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value).replace("null", "none")


# The objective


def features(count: int = 2) -> torch.Tensor:
    return torch.randn(count, BITS, 32, 32, generator=torch.Generator().manual_seed(0))


def test_labels_without_flips_are_the_quantisers_bits():
    x = features()
    taught = teach(x, SCHEDULE, 2)
    bits, _ = encode(x, latent_grids(SCHEDULE, 2))
    for label, bit in zip(taught.labels, bits, strict=True):
        assert torch.equal(label, to_tokens(bit.float(), 2) > 0.5)
    assert [tuple(i.shape[1:]) for i in taught.inputs] == [(n, 4 * BITS) for n in SCHEDULE.tokens[1:]]


def test_bit_accuracy_counts_every_bit_once():
    labels = [
        torch.tensor([[[True, False]]]),
        torch.tensor([[[True, True], [True, False], [False, False], [True, True]]]),
    ]
    logits = [torch.stack([torch.zeros(label.shape), label.float() - 0.5], -1) for label in labels]
    assert [float(x) for x in bit_accuracy(logits, labels)[1]] == [100, 100]
    logits[1][0, 0, 0] = torch.tensor([3.0, 2.0])  # one of eight
    whole, scales = bit_accuracy(logits, labels)
    assert scales.tolist() == [100, 87.5] and float(whole) == pytest.approx(90)


def test_flips_change_later_labels_only():
    x = features()
    plain = teach(x, SCHEDULE, 2)
    flips = draw_flips(x.shape, SCHEDULE, 2, torch.tensor([0.0, 0.3]), torch.Generator().manual_seed(1))
    flipped = teach(x, SCHEDULE, 2, flips)
    assert torch.equal(plain.labels[0], flipped.labels[0])
    for before, after in zip(plain.labels[1:], flipped.labels[1:]):
        assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@torch.no_grad()
def test_blocks_compile_twice_a_text_length_whatever_the_depth():
    """Beyond the number of variants that torch keeps, FlexAttention would run without its kernel."""
    config, graphs = AutoencoderConfig(BITS, 32, (32,) * 4, (32,) * 4, 1, 1, 8), []
    network = tasks.new_transformer(NewTransformer(5, 64, 2, 128, 7), config, 128, 64, 0)
    tasks._compile([])
    torch._dynamo.reset()

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in network.blocks:
        block.compile(dynamic=False, fullgraph=True, backend=count)
    store = BlockCausal(SCHEDULE, 32, "cpu")
    source, *inputs = (torch.randn(2, n, 4 * BITS) for n in (256, *SCHEDULE.tokens[1:]))
    for length, expected in ((8, 2), (16, 4), (8, 4)):
        texts, real = torch.randn(2, length, 128), torch.ones(2, length, dtype=torch.bool)
        parallel_logits(network, source, inputs, texts, store, real=real)
        assert len(graphs) == expected


def test_token_weights_sum_to_one():
    region = torch.zeros(2, 32, 32, dtype=torch.bool)
    region[1, 3, 4] = True
    for given in (None, region):
        weights = token_weights(SCHEDULE, given, 4.0, -0.5)
        total = torch.cat([w.expand(2, -1) for w in weights], dim=1).sum(1)
        torch.testing.assert_close(total, torch.ones(2))
    assert (weights[-1][1] / weights[-1][1].min()).max().item() == pytest.approx(4.0)
    assert weights[-1][0].std() == 0


def task_of(parts: Path, *changes: str, **options):
    (stage,) = edits(parts, *changes, **options)
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(mixed_precision="no", cpu=True, project_dir=str(parts / "project"))
    return tasks.TASKS[stage.task](stage, accelerator)


def test_dropped_texts_are_the_learned_ones(parts):
    task = task_of(parts)
    batch = next(pairs.pair_batches(task, 0))
    texts = task.model._texts(batch, torch.tensor([True, False]))
    learned = task.transformer.unconditional(texts.shape[1], "cpu")
    assert torch.equal(texts[0], learned) and torch.equal(texts[1], batch["features"][1])


def test_checkpointing_gives_the_same_gradients(parts):
    gradients = []
    for setting in ("false", "true"):
        task = task_of(parts, f"a.checkpointing={setting}")
        batch = next(pairs.pair_batches(task, 0))
        loss, _ = task.loss(task.model, batch, torch.Generator().manual_seed(0))
        loss.backward()
        gradients.append({n: p.grad for n, p in task.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


# Pairs


def test_pairs_are_fitted_as_for_editing():
    source = Image.new("RGB", (48, 24), "black")
    target = source.copy()
    target.paste((255, 0, 0), (0, 0, 12, 24))
    a, b, region, text = pairs.fitted(Pair("x", source, target, "redden"), "0.06M")
    assert a.shape == b.shape == (3, 256, 256) and text == "redden"
    # A pixel of 48 is more than five of 256, and Lanczos looks three pixels far. The picture goes on for two tokens
    # below its last row before the white begins.
    assert (a[:, :110] == -1).all() and (a[:, 176:] == 1).all(), "white below"
    assert region[:110, :46].all() and not region[:, 82:].any() and not region[166:].any()
    mask = Image.new("L", (48, 24))
    mask.paste(255, (36, 0, 48, 24))
    *_, region, _ = pairs.fitted(Pair("x", source, target, "redden", mask), "0.06M")
    assert region[:110, 210:].all() and not region[:, :174].any() and not region[166:].any()


@pytest.mark.parametrize("fit", settings.square_fits())
def test_pairs_are_fitted_by_the_name_that_editing_knows(parts, fit):
    """Whatever fit editing gets, training has it too, if its canvas is a square."""
    (stage,) = edits(parts, f"a.data.fit={fit}")
    whole = load_image(parts / "pairs" / "s0.png")
    wanted = fitted(whole, "0.06M", fit).pixels[0]
    assert any(torch.equal(source, wanted) for source in pairs.first_pairs(stage, PAIRS)[0])


def test_fits_of_several_shapes_are_refused(parts):
    with pytest.raises(ValueError, match="data.fit must be one of square, .*, got 'aspect'"):
        edits(parts, "a.data.fit=aspect")


class Share:
    """What `pairs` needs of an accelerator."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.process_index, self.num_processes, self.device = rank, world, torch.device("cpu")


@pytest.mark.parametrize("source", ["pairs", "plain"])
def test_pictures_of_pairs_and_of_plain_folders(parts, source):
    """Steps, processes and accumulated batches share the stream without gaps, wherever a training begins."""
    plain = parts / "plain" / "inner"
    if not plain.exists():
        plain.mkdir(parents=True)
        for index in range(PAIRS):
            (plain / f"{index}.png").write_bytes((parts / "pairs" / f"s{index}.png").read_bytes())
    (stage,) = stages_of(parts, TOKENIZER + f'source = "{source}"\nworkers = 0\n', "a.optimisation.accumulate=2")
    stream = pairs.picture_batches(stage, 0, Share())
    whole = torch.stack([next(stream) for _ in range(8)]).flatten(0, 1)  # 4 steps of 2 batches of 2
    assert whole.shape == (16, 3, 256, 256)
    later = pairs.picture_batches(stage, 2, Share())
    assert torch.equal(torch.cat([next(later) for _ in range(2)]), whole[8:12])
    shares = [pairs.picture_batches(replace(stage, batch=1), 1, Share(rank, 2)) for rank in range(2)]
    together = torch.cat([next(share) for _ in range(4) for share in shares])
    assert torch.equal(together, whole[4:12])
    kinds = {tuple(picture[:, 100, 100].tolist()) for picture in whole}
    assert len(kinds) == PAIRS if source == "plain" else len(kinds) > PAIRS


def test_first_pairs(parts):
    (stage,) = edits(parts)
    source, target, instructions = pairs.first_pairs(stage, 3)
    assert source.shape == target.shape == (3, 3, 256, 256) and instructions[0].startswith("add circle number")


def test_a_bad_pair_stops_before_the_networks_load_or_is_left_out(parts, tmp_path, caplog):
    make_pairs(tmp_path / "pairs")
    (tmp_path / "pairs" / "t2.png").unlink()
    with open(tmp_path / "pairs" / "metadata.jsonl", "a") as file:
        file.write("{\n")
    (stage,) = edits(parts, f"a.data.source={tmp_path / 'pairs'}")
    with pytest.raises(PairError, match=r"metadata.jsonl line 7 is not JSON"):
        run([replace(stage, autoencoder="none")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    skipping = replace(stage, data=replace(stage.data, on_error="skip"), batch=PAIRS)
    samples = pairs._samples(skipping, 0, Share())
    with caplog.at_level(logging.WARNING):
        texts = {next(samples)[-1] for _ in range(2 * PAIRS)}
    assert texts == {f"add circle number {index}" for index in (0, 1, 3, 4, 5)}
    assert any("t2.png" in message and message.startswith("skipped") for message in caplog.messages)


# The loop


def test_rates_rise_and_fall():
    (settings,) = (engine.Optimisation(warmup=0.1, final=0.1),)
    rates = [engine.rate_factor(step, 100, settings) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[100] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)


def test_the_average_swaps_in_and_out():
    model = torch.nn.Linear(3, 3)
    average = engine.Average(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1)
    average.update(5)
    live, mean = model.weight.detach().clone(), average.values[0].clone()
    assert not torch.equal(live, mean)
    with average:
        assert torch.equal(model.weight, mean)
    assert torch.equal(model.weight, live) and torch.equal(average.values[0], mean)


CASES = {
    "tokenizer": lambda parts: stages_of(parts, TOKENIZER, "a.batch=1", "a.steps=2"),
    "transformer": lambda parts: edits(parts, "a.data.block=4", "a.data.reuse=2", "a.data.workers=0", more=NEW),
    "pairs": lambda parts: edits(parts, "a.optimisation.accumulate=2", "a.data.workers=1"),
    "lora": lambda parts: edits(parts, "a.lora.base=8-bit", "a.sample_every=3", task="lora", more=OWN),
    "published data": lambda parts: edits(
        parts, f"a.data.source={published_pairs(parts)}", "a.data.fit=published", "a.data.resize_targets=true"
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_goes_on_to_the_same_losses(parts, tmp_path, monkeypatch, case):
    """Unbroken, and killed in its last step (the LoRA before its first checkpoint): the same to the last bit."""
    (stage,) = (replace(stage, save_every=1) for stage in CASES[case](parts))
    assert run([stage], tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        killed_after(patch, stage.steps - 1)
        with pytest.raises(Killed):
            run([replace(stage, save_every=3 if case == "lora" else 1)], tmp_path / "broken")
    assert not (tmp_path / "broken" / "a" / "finished.json").exists()
    assert run([stage], tmp_path / "broken", resume=True)
    first, second = (tmp_path / name / "a" for name in ("unbroken", "broken"))
    assert losses(first) == losses(second) and len(losses(first)) == stage.steps
    for name in ["bit_accuracy", "bit_accuracy_by_scale"] if case != "tokenizer" else []:
        right = figures(first, name)
        assert right == figures(second, name) and all(0 < one < 100 for one in torch.tensor(right).flatten())
    files = json.loads((first / "finished.json").read_text())["files"]
    for file in (name for name in files if name.endswith(".safetensors")):
        one, other = load_file(first / file), load_file(second / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert run([stage], tmp_path / "broken", resume=True), "a finished stage has nothing to do"


def test_a_frozen_matrix_of_8_bits_passes_gradients_on_and_is_kept_by_nobody():
    torch.manual_seed(0)
    codes = EightBitLinear(96, 64, True)
    codes.weight, codes.weight_scale = map_codes(torch.randn(64, 96))
    codes.bias = torch.nn.Parameter(torch.randn(64))
    layer, matrix, kept = FrozenLinear(codes, torch.float32), codes.matrix(torch.float32), []
    x = torch.randn(2, 5, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert not kept, "neither the matrix nor what came in"
    assert torch.allclose(y, torch.nn.functional.linear(x, matrix, codes.bias), atol=1e-6)
    y.square().sum().backward()
    assert torch.allclose(x.grad, (2 * y.detach()) @ matrix, atol=1e-4) and layer.weight.grad is None


def map_codes(weight: torch.Tensor):
    codes, scales = quantise_weight(weight)
    return torch.nn.Parameter(codes, requires_grad=False), scales


def test_a_base_of_8_bits_trains_nearly_as_the_exact_one(parts, tmp_path):
    """What is trained alone is in a checkpoint; those of earlier releases, with frozen weights in them and
    fewer settings, go on."""
    alike = ("a.objective.flips=0", "a.objective.text_dropout=0", "a.save_every=2")
    for base in ("exact", "8-bit"):
        (stage,) = edits(parts, f"a.lora.base={base}", *alike, task="lora", more=OWN)
        run([stage], tmp_path / base, stop_after=0)
    exact, rounded = (losses(tmp_path / base / "a") for base in ("exact", "8-bit"))
    assert exact[0] != rounded[0] and exact == pytest.approx(rounded, rel=0.01)
    state = tmp_path / "exact" / "a" / "state-1"
    held, base = load_file(state / "model.safetensors"), load_file(parts / "transformer.safetensors")
    assert held and all("lora_" in name for name in held)
    save_file(
        held | {"transformer.blocks.0.ada_gss.weight": base["blocks.0.ada_gss.weight"]}, state / "model.safetensors"
    )
    facts = json.loads((state / "state.json").read_text())
    facts["files"] |= states._sums(state, ["model.safetensors"])
    (state / "state.json").write_text(json.dumps(facts))
    settings_file = state.with_name("settings.json")
    known = json.loads(settings_file.read_text())
    del known["lora"]["base"], known["data"]["fit"]
    settings_file.write_text(json.dumps(known))
    (stage,) = edits(parts, *alike, task="lora", more=OWN)
    assert run([stage], tmp_path / "exact", resume=True)
    assert len(losses(tmp_path / "exact" / "a")) == stage.steps


def test_accumulated_batches_equal_a_large_one(parts, tmp_path):
    exact = ("a.objective.flips=0", "a.objective.text_dropout=0", "a.steps=2")
    assert run(edits(parts, *exact, "a.batch=4"), tmp_path / "large")
    assert run(edits(parts, *exact, "a.optimisation.accumulate=2"), tmp_path / "small")
    large, small = (load_file(tmp_path / name / "a" / "transformer.safetensors") for name in ("large", "small"))
    assert losses(tmp_path / "large" / "a") == pytest.approx(losses(tmp_path / "small" / "a"), rel=1e-5)
    differing = sum(int((large[key] != small[key]).sum()) for key in large)
    assert differing < 0.01 * sum(tensor.numel() for tensor in large.values())


def test_recomputation_may_change_only_without_compilation(parts, tmp_path):
    """Compiled blocks attend by another kernel where they are not recomputed."""
    for compiled in (False, True):
        (before,) = edits(parts, f"a.compile={str(compiled).lower()}")
        after = dataclasses.replace(before, checkpointing=True)
        folder = tmp_path / str(compiled)
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(before)))
        if compiled:
            with pytest.raises(ValueError, match="settings.json has checkpointing = False, not True; restore it"):
                _check(folder, after, resume=True)
        else:
            _check(folder, after, resume=True)


def test_results_load_and_edit(parts, tmp_path):
    """A text encoder trained along with the transformer, stopped at once, gone on with, then used."""
    stages = edits(parts, "a.text_encoder=", "a.new_text.vocabulary=300", "a.new_text.layers=1", "a.steps=2")
    assert not run(stages, tmp_path / "out", stop_after=0)
    folder = tmp_path / "out" / "a"
    assert [path.name for path in folder.glob("state-*")] == ["state-1"] and not (folder / "finished.json").exists()
    with pytest.raises(ValueError, match="out/a exists; go on with it by --resume, or choose another --output"):
        run(stages, tmp_path / "out")
    with pytest.raises(ValueError, match=r"settings.json has optimisation.rate = 0.001, not 0.1; restore it or choose"):
        run([replace(stages[0], optimisation=replace(stages[0].optimisation, rate=0.1))], tmp_path / "out", resume=True)
    assert run([replace(stages[0], log_every=9)], tmp_path / "out", resume=True)
    editor = Editor.load(folder / "transformer.safetensors", parts / "tokenizer.safetensors", folder / "text_encoder")
    picture = Image.open(parts / "pairs" / "s0.png")
    (edited,) = editor.edit(picture, "add a circle", size="0.06M", settings=SamplingSettings(temperature=0.0))
    assert edited.size == picture.size
    assert (folder / "loss.png").exists() and len(list(folder.glob("events.*"))) == 2


BROKEN = {
    "undefined": lambda loss: loss * torch.nan,
    "infinite": lambda loss: loss * torch.inf,
    "infinite, beside the weights": lambda loss: loss + torch.inf,
}


def broken_from(monkeypatch, begin: int, broken) -> None:
    """Make the loss of every step from `begin` on no number."""
    true, made = tasks.bit_loss, []

    def bit_loss(*arguments):
        made.append(1)
        loss, scales = true(*arguments)
        return (loss if len(made) < begin else broken(loss)), scales

    monkeypatch.setattr(tasks, "bit_loss", bit_loss)


def files_of(folder: Path) -> dict[str, bytes]:
    """Checkpoints and results of a stage, and what is in them."""
    kept = [p for p in folder.rglob("*") if p.is_file() and (p.suffix == ".safetensors" or "state-" in str(p))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.mark.parametrize(("broken", "log_every"), [*zip(BROKEN, (1, 99, 99))])
def test_an_undefined_loss_stops_before_it_is_written(parts, tmp_path, monkeypatch, broken, log_every):
    """Between two saved steps, of figures that are read or not: checkpoint and result stay those of the step before."""
    (stage,) = edits(parts, f"a.log_every={log_every}", "a.save_every=2", "a.steps=4")
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(Killed):
            run([stage], tmp_path / "out")
    good = files_of(tmp_path / "out" / "a")
    assert any(name.startswith("state-2/") for name in good) and "transformer.safetensors" in good
    broken_from(monkeypatch, 1, BROKEN[broken])
    with pytest.raises(ValueError, match="^stage a: the loss became undefined at step 3; lower the learning rate$"):
        run([stage], tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out" / "a") == good
    assert not (tmp_path / "out" / "a" / "finished.json").exists()
    assert all(map(math.isfinite, losses(tmp_path / "out" / "a")))
    monkeypatch.undo()
    assert run([stage], tmp_path / "out", resume=True), "whole, so that a training goes on from it"


def test_undefined_weights_stop_before_they_are_written(parts, tmp_path, monkeypatch):
    """A loss may be a number and its gradient none."""
    (stage,) = edits(parts, "a.save_every=1")
    true = engine._step

    def step(task, model, *more):
        done = true(task, model, *more)
        next(p for p in model.parameters() if p.requires_grad).data.flatten()[0] = torch.nan
        return done

    monkeypatch.setattr(engine, "_step", step)
    with pytest.raises(ValueError, match="^stage a: the weights became undefined at step 1; lower the learning rate$"):
        run([stage], tmp_path / "out")
    assert not files_of(tmp_path / "out" / "a")


class Alone:
    """What saving asks of an accelerator: one process."""

    is_main_process, num_processes, process_index = True, 1, 0

    def wait_for_everyone(self) -> None:
        pass


def trained_at(step: int) -> states.Trained:
    """A network, its optimiser and its average, all of whose numbers are the step."""
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    return states.Trained(
        model, [torch.optim.AdamW(model.parameters())], engine.Average(model, 0.9), states.Progress(step)
    )


def step_of(folder: Path) -> int:
    """The step of the newest checkpoint, which must be whole."""
    state = states.newest(folder, trained_at(0))
    values = load_file(state / "model.safetensors") | load_file(state / "average.safetensors")
    (step,) = {value for tensor in values.values() for value in tensor.flatten().tolist()}
    assert state.name == f"state-{step:.0f}"
    return int(step)


CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.unlink", "shutil.rmtree")


def save(folder: Path, step: int) -> None:
    states.save_state(folder, trained_at(step), Alone())


def killed_at(moment: int, work, *arguments) -> bool:
    """Do something in a process that dies, without any clean-up, before its change number `moment` of the disk; whether
    it died."""
    child = os.fork()
    if not child:
        seen = []

        def hook(event, arguments):
            if event in CHANGES and not (event == "open" and arguments[1] in ("r", "rb", None)):
                seen.append(event)
                if len(seen) > moment:
                    os._exit(9)

        sys.addaudithook(hook)
        work(*arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a kill is that of a forked process")
def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path):
    found = []
    for moment in range(100):
        folder = tmp_path / str(moment)
        folder.mkdir()
        save(folder, 5)
        died = killed_at(moment, save, folder, 10)
        found.append(step_of(folder))
        killed_at(moment, save, folder, found[-1] + 5)  # a training that goes on is killed again
        assert step_of(folder) in (found[-1], found[-1] + 5)
        save(folder, 20)
        assert [path.name for path in folder.iterdir()] == ["state-20"], "nothing of the killed ones is left"
        if not died:
            break
    assert found == sorted(found) and found[0] == 5 and found[-1] == 10 and found.count(5) > 4 < found.count(10)


def test_a_failed_checkpoint_leaves_nothing_behind(tmp_path, monkeypatch):
    save(tmp_path, 5)

    with monkeypatch.context() as patch:
        patch.setattr(states, "random_state", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["state-5"] and step_of(tmp_path) == 5


@pytest.mark.parametrize("published", [False, True])
def test_a_training_killed_while_it_saves_goes_on(parts, tmp_path, monkeypatch, published):
    """Before its first checkpoint has its name and after its second one has: to the same losses."""
    (stage,) = (replace(stage, save_every=1) for stage in CASES["tokenizer"](parts))
    assert run([stage], tmp_path / "unbroken")

    def kill(*arguments, **more):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(states.shutil, "rmtree", kill if published else lambda *a, **more: None)  # nothing is cleaned up
        if not published:
            patch.setattr(Path, "rename", kill)
        with pytest.raises(Killed):
            run([stage], tmp_path / "broken")
    folder = tmp_path / "broken" / "a"
    names = {path.name for path in folder.glob("state-*")}
    assert names == ({"state-1.old.partial", "state-2"} if published else {"state-1.partial"})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # a line that the kill cut off
    assert run([stage], tmp_path / "broken", resume=True)
    assert losses(tmp_path / "unbroken" / "a") == losses(folder)
    assert not list(folder.glob("*.partial"))


def test_stages_of_different_precisions_follow_each_other(parts, tmp_path, monkeypatch):
    """accelerate keeps its state for a whole process."""
    seen = []
    monkeypatch.setattr("varedit_core.training.run.TASKS", {"transformer": lambda s, a: seen.append(a.mixed_precision)})
    monkeypatch.setattr("varedit_core.training.run.train", lambda *a: True)
    (stage,) = edits(parts)
    assert run([stage, replace(stage, name="b", precision="bf16")], tmp_path / "out") and seen == ["no", "bf16"]


# The command


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(*arguments, launcher=("-m", "varedit_core")):
    command = [sys.executable, *launcher, "train", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def test_the_command_checks_data(parts, tmp_path):
    edits(parts)
    done = command(parts / "training.toml", "--check-data")
    assert done.returncode == 0 and f"a: {PAIRS} of {PAIRS} samples of {parts / 'pairs'} are good" in done.stdout
    make_pairs(tmp_path / "pairs")
    (tmp_path / "pairs" / "t2.png").write_bytes(b"none")
    done = command(parts / "training.toml", "--check-data", "--set", f"a.data.source={tmp_path / 'pairs'}")
    assert done.returncode == 1 and "line 3, target: cannot read" in done.stdout and "5 of 6" in done.stdout


def test_the_command_trains_in_two_processes(parts, tmp_path):
    """Data-parallel training on the CPU writes one result and one log."""
    edits(parts, batch=1, steps=2)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "varedit_core")
    arguments = (parts / "training.toml", "--output", tmp_path / "out")
    done = command(*arguments, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("a step 2 of 2") == 1 and "Saving" not in done.stderr
    folder = tmp_path / "out" / "a"
    assert len(losses(folder)) == 2 and json.loads((folder / "finished.json").read_text())["steps"] == 2
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "transformer.safetensors").values())


# accelerate shards on GPUs only: here torch shards the modules that the configuration names, for the same loop.
_SHARDED = """
import sys
from pathlib import Path
import yaml
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from varedit_core.training import engine
from varedit_core.training.settings import load_stages
from varedit_core.training.tasks import TASKS

if __name__ == "__main__":
    settings, configuration, output = map(Path, sys.argv[1:4])
    (stage,) = load_stages(settings, sys.argv[4:])
    accelerator = Accelerator(cpu=True, project_dir=str(output))
    named = yaml.safe_load(configuration.read_text())["fsdp_config"]

    def sharded(model, *others):
        mesh = init_device_mesh("cpu", (2,))
        for module in model.modules():
            if type(module).__name__ == named["fsdp_transformer_layer_cls_to_wrap"]:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, *engine.optimizers(model, stage.optimisation)

    accelerator.prepare, folder = sharded, output / stage.name
    if engine.train(TASKS[stage.task](stage, accelerator), stage, folder, accelerator, False, lambda: True):
        raise SystemExit("it was to stop after its first step")
    engine.train(TASKS[stage.task](stage, accelerator), stage, folder, accelerator, True)
"""


def test_sharded_training_is_the_same(parts, tmp_path):
    """Every weight is read by calling its layer, as FSDP needs, and results are gathered from all processes. It stops
    after one step and goes on from a checkpoint of which each process wrote its part."""
    changes = ("a.train_text=true", "a.optimisation.average=0.0", "a.checkpointing=true")
    edits(parts, batch=1, steps=2, more=NEW + OWN)
    (tmp_path / "sharded.py").write_text(_SHARDED)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    toml = parts / "training.toml"
    sets = [part for change in changes for part in ("--set", change)]
    plain = command(toml, "--output", tmp_path / "plain", *sets, launcher=(*launcher, "-m", "varedit_core"))
    assert plain.returncode == 0, plain.stderr[-3000:]
    arguments = [toml, ROOT / "samples/training/fsdp.yaml", tmp_path / "sharded", *changes]
    script = [sys.executable, *launcher, tmp_path / "sharded.py", *arguments]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, script)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "sharded" / "a") == pytest.approx(losses(tmp_path / "plain" / "a"), rel=1e-5)
    for file in ("transformer.safetensors", "text_encoder/model.safetensors"):
        ours, theirs = (load_file(tmp_path / name / "a" / file) for name in ("sharded", "plain"))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key].float(), theirs[key].float(), rtol=1e-2, atol=1e-4) for key in ours)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["a.optimisation.average=0.9"], "moving average"),
        (["a.optimisation.optimizer=muon"], "muon"),
        (["a.task=lora", "a.transformer=transformer.safetensors", "a.lora.base=8-bit"], "8-bit base cannot be sharded"),
    ],
)
def test_what_sharding_cannot_do_is_refused(parts, changes, message):
    (stage,) = edits(parts, "a.optimisation.average=0.0", *changes)
    sharding = SimpleNamespace(distributed_type="FSDP")
    with pytest.raises(ValueError, match=message):
        engine.train(None, stage, parts, sharding, False)


def test_sharding_multiplies_in_bf16_and_rounds_nothing_else():
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy="accelerate's")
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no")
    keep_exact(accelerator)
    assert plugin.mixed_precision_policy == "accelerate's"
    accelerator.mixed_precision = "bf16"
    keep_exact(accelerator)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)


def test_an_8_bit_base_is_not_compiled(parts):
    with pytest.raises(ValueError, match='an 8-bit base is not compiled; set compile = false or lora.base = "exact"'):
        edits(parts, "a.lora.base=8-bit", "a.compile=true", task="lora", more=OWN)


def test_editing_does_not_import_training():
    heavy = "{'accelerate', 'peft', 'datasets', 'varedit_core.training.run'}"
    code = f"import sys, varedit_core.cli.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
