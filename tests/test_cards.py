"""Which precision a card takes: the bytes of files, and what is chosen for how much memory."""

import pytest
import torch
from support import GOLDEN

from varedit_core import cards, load_text_encoder
from varedit_core.cards import Card, beside, choose
from varedit_core.demo import demo_files
from varedit_core.files.checkpoints import TRANSFORMER
from varedit_core.files.convert import PRECISIONS, convert, planned
from varedit_core.files.shapes import transformer_config
from varedit_core.files.weights import open_weights
from varedit_core.model.transformer import Transformer
from varedit_core.runtime import memory

CHOICES = {
    (6, "2B", "0.25M"): ("fp8", "exact", False), (8, "2B", "0.25M"): ("bf16", "exact", False),
    (6, "8B", "0.25M"): None, (8, "8B", "0.25M"): ("nvfp4", "host", True), (8, "8B", "1M"): None,
    (12, "8B", "0.25M"): ("fp8", "host", False), (12, "8B", "1M"): ("nvfp4", "host", False),
    (16, "8B", "0.25M"): ("fp8", "exact", False), (16, "8B", "1M"): ("fp8", "host", False),
    (24, "8B", "0.25M"): ("bf16", "exact", False), (24, "8B", "1M"): ("fp8", "exact", False),
    (48, "8B", "1M"): ("bf16", "exact", False),
}  # fmt: skip
"""What docs/MEMORY.md says, by GB that are free."""


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_what_a_card_takes(case):
    gigabytes, model, area = case
    found = choose(model, area, gigabytes * 1e9)
    assert (found and (found.precision, found.plan.store, found.text_on_host)) == CHOICES[case]
    assert found is None or found.needed <= gigabytes * 1e9
    older = choose(model, area, gigabytes * 1e9, eight="int8")
    assert (older and older.precision) == (found and {"fp8": "int8"}.get(found.precision, found.precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_are_those_of_the_file(tmp_path, precision):
    convert(GOLDEN / "patchify_256.safetensors", target := tmp_path / "a.safetensors", precision)
    weights = open_weights(target)
    with torch.device("meta"):
        state = Transformer(transformer_config(weights.shapes)).state_dict()
    held = sum(tensor.nbytes for tensor in weights.meta.values())
    assert sum(entry.nbytes for entry in planned(state, TRANSFORMER, precision).values()) == held
    header = 8 + int.from_bytes(target.read_bytes()[:8], "little")
    assert target.stat().st_size == header + held


def test_what_is_said_of_a_card():
    assert beside("bf16") == "bf16" and beside("fp8") == beside("nvfp4") == "int8" and beside("fp32") == "fp32"
    precision, why = Card("a card", 11.4e9, "int8").advice([("8B", "0.25M"), ("2B", "0.25M")])
    assert precision == "int8"
    assert why.startswith("a card has 12 GB: ") and precision in why
    assert Card("a card", 4e9, "fp8").advice([("8B", "1M")])[1].endswith("ComfyUI has to stream the weights")
    assert cards.share(TRANSFORMER, "nvfp4") < 0.2 < cards.share(TRANSFORMER, "int8") < 0.3


def test_a_text_encoder_without_room_runs_on_the_processor(monkeypatch, caplog):
    monkeypatch.setattr(memory, "free_memory", lambda device: memory.SPARE + 1000.0)
    text = load_text_encoder(demo_files()[2], dtype=torch.float16, device="cuda")
    assert text.device.type == "cpu" and "the text encoder takes" in caplog.text and "0.00 GB are free" in caplog.text
    exact = load_text_encoder(demo_files()[2])
    assert torch.equal(text.encode(["make it sepia"])[0], exact.encode(["make it sepia"])[0])
