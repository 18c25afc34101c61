"""Holds the fast engine to the plain one, on any device: `python benchmarks/engines.py [RECORD...] [--device cuda]`.

For every recorded network and every kind of batch both engines draw the same edit, the fast one three times in memory
that stays, so that on a GPU its passes are recorded and replayed. In fp32 every bit must be equal; the largest
difference of a logit is shown. Exits with 1 where a bit differs whose draw was not within `MARGIN` of its probability.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, few, finish, parsed, parser
from varedit_core import Controls, SamplingSettings
from varedit_core.model.engine import PlainEngine
from varedit_core.parity import Record
from varedit_core.runtime.session import Session
from varedit_core.runtime.workspace import Workspace
from varedit_core.sampling.batch import EditBatch
from varedit_core.sampling.loop import sample

MARGIN = 1e-5
"""A draw so near to its probability may fall on the other side: float arithmetic in another order."""
SETTINGS = SamplingSettings(temperature=0.7, seed=5)
RECORDS = sorted((ROOT / "tests" / "golden").glob("*.safetensors"))


@dataclass
class Row:
    """One record and kind of batch. bits: how many; different: how many of them, of all repetitions; beyond: of these,
    how many were not close calls. logits: the largest difference."""

    record: str
    batch: str
    bits: int = 0
    different: int = 0
    beyond: int = 0
    logits: float = 0.0


def batches(record: Record) -> Iterator[tuple[str, EditBatch]]:
    """Kinds of batches over one recorded picture and text."""
    features, texts = record["ref.vae_features"].float().to(record.device), record.texts("text")
    mask = torch.zeros(1, 16, 16)
    mask[:, 3:11, 5:14] = 1

    def made(settings: SamplingSettings = SETTINGS, **more) -> EditBatch:
        return EditBatch.of(features, texts, record.schedule, settings, **more)

    count = len(record.schedule)
    yield "plain", made()
    yield "no guidance", made(replace(SETTINGS, guidance=1.0))
    yield "guidance that ends", made(replace(SETTINGS, guidance=(3.0,) * (count - 2) + (1.0, 1.0)))
    yield "guidance that comes back", made(replace(SETTINGS, guidance=(3.0, 1.0) * (count // 2) + (3.0,) * (count % 2)))
    yield "variations", made(variations=3)
    yield "mask", made(mask=mask)
    yield "half the source's attention", made(controls=Controls(source_attention=0.5))
    yield "strength", made(controls=Controls(strength=0.6))


@torch.no_grad()
def compare(record: Record, name: str, kind: str, batch: EditBatch, repeats: int = 3) -> Row:
    """Both engines on one batch; the fast one is given the plain one's bits, so that each scale counts alone."""
    row = Row(name, kind)
    plain = list(sample(PlainEngine(record.transformer), batch))
    session = Session(record.transformer, Workspace())
    for _ in range(repeats):
        for fast, wanted in zip(sample(session, replace(batch)), plain, strict=True):
            row.logits = max(row.logits, (fast.logits - wanted.logits).abs().max().item())
            different = fast.bits != wanted.bits
            close = (wanted.probability - _drawn(wanted)).abs() < MARGIN
            row.bits += different.numel()
            row.different += int(different.sum())
            row.beyond += int((different & ~close).sum())
            fast.bits = wanted.bits
    return row


def _drawn(scale) -> Tensor:
    return scale.log_odds.new_full((), 0.5) if scale.uniform is None else scale.uniform


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("records", nargs="*", type=Path, default=RECORDS)
    options.add_argument("--device", default="cpu")
    options.add_argument("--repeats", type=int, default=3)
    given = parsed(options, arguments, records=RECORDS[:1], repeats=1)
    rows = []
    for path in given.records:
        record = Record.open(path, torch.float32, given.device)
        for kind, batch in few(list(batches(record)), given):
            rows.append(compare(record, path.stem, kind, batch, given.repeats))
            row = rows[-1]
            print(
                f"{row.record:28} {row.batch:28} {row.bits:8} bits, {row.different} differ, {row.beyond} beyond the "
                f"margin; logits {row.logits:.1e}",
                flush=True,
            )
    finish({"device": given.device, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}, given.save)
    return 1 if any(row.beyond for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
