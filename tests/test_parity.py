"""Number for number like the published model."""

import pytest
import torch
from support import recordings

from varedit_core import parity
from varedit_core.files.weights import WeightError
from varedit_core.parity import Record, compare
from varedit_core.pictures.images import to_uint8


@pytest.mark.parametrize("path", recordings(), ids=lambda path: path.stem)
def test_recorded_run(path):
    result = compare(path)
    assert not result.failures
    assert max(row.logit_error or 0 for row in result.scales) < 2e-5, "an order of magnitude above what was measured"
    assert result.free_bits == 1.0


@pytest.mark.parametrize(
    "key",
    [
        "blocks.2.sa.scale_mul.weight",
        "blocks.0.sa.mat_qkv.bias",
        "lvl_embed.weight",
        "blocks.3.ada_gss.weight",
        "text_proj_for_sos.ca.mat_q.weight",
    ],
)
def test_a_wrong_weight_is_noticed(patchify, monkeypatch, key):
    parameter = patchify.transformer.state_dict()[key]
    saved = parameter.clone()
    monkeypatch.setattr(Record, "open", lambda *args, **kw: patchify)
    try:
        parameter.mul_(1.05)
        assert compare("changed").failures
    finally:
        parameter.copy_(saved)


def test_rounding_in_place_of_truncation_is_noticed(monkeypatch):
    monkeypatch.setattr(parity, "to_uint8", lambda pixels: to_uint8(pixels, "nearest"))
    (failure,) = compare(recordings()[0]).failures
    assert failure.startswith("edited_image_unequal is off by 0.")


def test_bf16_is_reported_not_judged():
    result = compare(recordings()[0], torch.bfloat16)
    assert not result.failures
    assert result.scales[-1].forced > 0.99
    assert result.scales[-1].logit_error > parity.LOGITS


def test_a_weight_file_is_no_record(published_file):
    with pytest.raises(WeightError, match="not a recorded run"):
        compare(published_file)
