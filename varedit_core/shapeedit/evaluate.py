"""ShapeEdit's evaluation: draws the test samples, runs an editor's networks on them, and sums up.

Everything is decided by seeds: the samples by theirs, the draws of bits by that of the settings. Judged are the
decoder's pictures in floating point, before they are written with 8 bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor

from ..controls.registry import NO_SHORTCUTS, Shortcuts
from ..editor import Editor
from ..files.safe_write import check_empty, make_folder, write_text
from ..pictures.images import save_image, to_uint8
from ..sampling.settings import DEFAULT_SETTINGS, SamplingSettings
from ..tokenizer.quantizer import encode, latent_grids
from ..tokenizer.schedule import TOKEN_PIXELS, Schedule, schedule_for
from ..tokenizer.vae import Autoencoder
from .edits import FAMILIES, Sample, draw_sample
from .metrics import Score, background, judge, regions, succeeds
from .render import render
from .scenes import STYLES

AREA = "0.06M"
"""The size every picture of ShapeEdit has, 256 x 256 pixels."""
BATCH, MAX_COUNT = 8, 1_000_000
KINDS, METADATA = ("source", "target", "mask"), "metadata.jsonl"


@dataclass(frozen=True)
class Record:
    """One sample's figures. index: its number in the list that was evaluated.

    ceiling_*: what the VAE alone allows: whether the target's reconstruction is a success, and background PSNR
    and SSIM of the source's reconstruction. new_pair: see `Sample`.
    """

    index: int
    family: str
    instruction: str
    score: Score
    ceiling_success: bool
    ceiling_psnr: float | None
    ceiling_ssim: float | None
    new_pair: bool

    def figures(self) -> dict[str, float | None]:
        """All figures by name, None for those of a background that is not there."""
        score = self.score
        return {
            "success": float(score.success),
            "s": score.s,
            "o": score.o,
            "balance": score.balance,
            "psnr": score.psnr,
            "ssim": score.ssim,
            "ceiling_success": float(self.ceiling_success),
            "ceiling_psnr": self.ceiling_psnr,
            "ceiling_ssim": self.ceiling_ssim,
        }


@dataclass(frozen=True)
class Report:
    """Figures of all samples. settings: what the edits were drawn with."""

    records: tuple[Record, ...]
    settings: dict = field(default_factory=dict)

    def table(self) -> list[dict]:
        """A row a family, in the order of FAMILIES, and one for all: `family`, `count` and the means of the samples'
        figures; None for a background that no sample of the row has."""
        groups = {name: [r for r in self.records if r.family == name] for name in FAMILIES}
        groups["all"] = list(self.records)
        return [{"family": name, "count": len(group), **_means(group)} for name, group in groups.items() if group]

    def to_json(self, samples: bool = False) -> dict:
        """The table and the settings as plain values; samples: with every sample's figures."""
        facts = {"benchmark": "ShapeEdit", "settings": self.settings, "families": self.table()}
        if samples:
            facts["samples"] = [
                {**{name: getattr(r, name) for name in ("index", "family", "instruction", "new_pair")}, **r.figures()}
                for r in self.records
            ]
        return facts


@dataclass(frozen=True)
class Batch:
    """Samples that have just been judged, with their pictures [B, 3, 256, 256] in [-1, 1]."""

    samples: Sequence[Sample]
    records: Sequence[Record]
    source: Tensor
    edited: Tensor
    target: Tensor


OnBatch = Callable[[Batch], None]


def draw(
    seed: int, count: int, families: Sequence[str] | None = None, style: str = "", split: str = "test"
) -> list[Sample]:
    """Samples of a split. Sample i depends on the seed, i and its family alone; families come in turn.

    families: of FAMILIES, all by default; each gets equally many where `count` is a multiple of their number. style:
    only that style, of the style family alone. Raises ValueError for what is unknown.
    """
    names = list(families or (["style"] if style else FAMILIES))
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise ValueError(f"unknown family {unknown[0]!r}; choose from {', '.join(FAMILIES)}")
    if not 1 <= count <= MAX_COUNT:
        raise ValueError(f"the number of samples must be from 1 to {MAX_COUNT}, got {count}")
    if style:
        _check_style(style, names)
    return [draw_sample(Random(f"{seed}/{i}"), split, names[i % len(names)], style=style) for i in range(count)]


def _check_style(style: str, families: Sequence[str]) -> None:
    if style not in STYLES[1:]:
        raise ValueError(f"unknown style {style!r}; choose one of {', '.join(STYLES[1:])}")
    if set(families) != {"style"}:
        raise ValueError("a style belongs to the style family alone; leave out the other families")


def evaluate(
    editor: Editor,
    samples: Sequence[Sample],
    settings: SamplingSettings = DEFAULT_SETTINGS,
    batch: int = BATCH,
    on_batch: OnBatch | None = None,
    shortcuts: Shortcuts = NO_SHORTCUTS,
    masked: bool = False,
) -> Report:
    """Edit and judge every sample, `batch` at a time.

    shortcuts: work to leave out; `inside` leaves out what no mask of a batch covers, so give it batches of one. masked:
    give every edit its true region as a mask. Samples run in the order of their text's length, which is fastest; the
    n-th in that order draws from the settings' seed + n, whatever the batch. on_batch: called with every `Batch`; raise
    in it to cancel. ValueError where the editor has no text encoder or cannot edit 256 x 256 pixels, and where
    scikit-image is missing.
    """
    texts = editor.encode_text([s.instruction for s in samples])
    schedule = schedule_for(AREA)

    def edit(features: Tensor, numbers: list[int], begin: int, region: Tensor) -> Tensor:
        own = replace(settings, seed=(settings.seed + begin) % 2**64)
        args = (features, [texts[n] for n in numbers], schedule, own)
        # Where no sample of a batch has anything to edit there is no mask, and nothing to leave out by it.
        kept = dict(shortcuts=shortcuts, mask=region.float()) if masked and region.any() else {}
        for scale in editor.sample(*args, **(kept or dict(shortcuts=replace(shortcuts, inside=0)))):
            total = scale.running_sum
        return _rows(editor.autoencoder.decode, total)

    order = sorted(range(len(samples)), key=lambda n: len(texts[n]))
    judged = _judged(editor.autoencoder, editor.device, samples, order, batch, edit)
    return Report(_collected(judged, on_batch), asdict(settings))


def evaluate_reconstruction(
    autoencoder: Autoencoder,
    samples: Sequence[Sample],
    batch: int = BATCH,
    on_batch: OnBatch | None = None,
) -> Report:
    """Judge the VAE's reconstruction of every target: what no edit through this VAE can be expected to
    exceed, and what one that predicts every bit right reaches."""
    device = next(autoencoder.parameters()).device
    return Report(_collected(_judged(autoencoder, device, samples, range(len(samples)), batch), on_batch))


def evaluate_pictures(
    autoencoder: Autoencoder, samples: Sequence[Sample], edited: Tensor, batch: int = BATCH
) -> Report:
    """Judge edits [B, 3, 256, 256] of the samples that were made elsewhere, pixels in [-1, 1]."""
    device = next(autoencoder.parameters()).device

    def edit(_: Tensor, numbers: list[int], begin: int, region: Tensor) -> Tensor:
        return edited[numbers].to(device)

    return Report(_collected(_judged(autoencoder, device, samples, range(len(samples)), batch, edit), None))


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, pixels: Tensor, schedule: Schedule | None = None) -> Tensor:
    """Pixels [B, 3, y, x] through the VAE and back, with a schedule's scales (by default those of 256 pixels)."""
    return _restored(autoencoder, _rows(autoencoder.encode, pixels), schedule or schedule_for(AREA))


def _restored(autoencoder: Autoencoder, features: Tensor, schedule: Schedule) -> Tensor:
    grids = latent_grids(schedule, TOKEN_PIXELS // autoencoder.config.stride)
    return _rows(autoencoder.decode, encode(features, grids)[1])


def _rows(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A convolutional network on a batch; on the CPU picture by picture, as larger tensors do not fit its caches."""
    return network(x) if x.is_cuda else torch.cat([network(row) for row in x.split(1)])


def _collected(batches: Iterator[Batch], on_batch: OnBatch | None) -> tuple[Record, ...]:
    records = []
    for batch in batches:
        records += batch.records
        if on_batch:
            on_batch(batch)
    return tuple(sorted(records, key=lambda record: record.index))


@torch.no_grad()
def _judged(autoencoder: Autoencoder, device, samples, order: Sequence[int], batch: int, edit=None) -> Iterator[Batch]:
    """Batches in that order. edit(source features, sample numbers, how many came before, regions) -> pictures; without
    it, the targets' reconstructions are judged."""
    if batch < 1:
        raise ValueError(f"the batch must be at least 1, got {batch}")
    for begin in range(0, len(order), batch):
        numbers = list(order[begin : begin + batch])
        chosen = [samples[n] for n in numbers]
        source, target = (render([getattr(s, name) for s in chosen], device) for name in ("source", "target"))
        features = _rows(autoencoder.encode, torch.cat([source, target]))
        source_restored, target_restored = _restored(autoencoder, features, schedule_for(AREA)).clamp(-1, 1).chunk(2)
        region = regions(source, target, [s.family for s in chosen])
        edited = edit(features[: len(source)], numbers, begin, region).clamp(-1, 1) if edit else target_restored
        task = source, target, region, _distractors(chosen, device), source_restored
        rows = zip(
            numbers,
            chosen,
            judge(edited, *task),
            succeeds(target_restored, *task).tolist(),
            background(source_restored, source, region),
        )
        records = [
            Record(n, s.family, s.instruction, score, best, *kept, s.new_pair) for n, s, score, best, kept in rows
        ]
        yield Batch(chosen, records, source, edited, target)


def _distractors(samples: Sequence[Sample], device) -> list[Tensor]:
    """Every sample's distractors [n, 3, 256, 256]."""
    scenes = [scene for s in samples for scene in s.distractors]
    pictures = render(scenes, device) if scenes else torch.zeros(0, 3, 1, 1, device=device)
    return list(pictures.split([len(s.distractors) for s in samples]))


def _means(records: Sequence[Record]) -> dict[str, float | None]:
    columns: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.figures().items():
            columns.setdefault(name, []).extend([] if value is None else [value])
    return {name: sum(values) / len(values) if values else None for name, values in columns.items()}


def make(folder: str | Path, seed: int, count: int, split: str = "test", batch: int = 64) -> Path:
    """Write samples as pictures: source/, target/ and mask/ (white where the edit is) and metadata.jsonl, a line a
    sample with source, target, mask, instruction and family: pairs that the training reads.

    Returns the folder; after any error it is as it was. Raises FileExistsError where it is not empty, ValueError for an
    unknown split and for a folder that cannot be read or made.
    """
    samples, lines = draw(seed, count, split=split), []
    folder = Path(folder)
    check_empty(folder)
    made = not folder.exists()
    make_folder(folder)
    try:
        for begin in range(0, count, batch):
            chosen = samples[begin : begin + batch]
            source, target = (render([getattr(s, name) for s in chosen]) for name in ("source", "target"))
            mask = regions(source, target, [s.family for s in chosen]).float()[:, None].expand_as(source) * 2 - 1
            for i, sample in enumerate(chosen):
                names = {kind: f"{kind}/{begin + i:05d}.png" for kind in KINDS}
                for kind, pixels in zip(KINDS, (source[i], target[i], mask[i])):
                    image = picture(pixels)
                    save_image(image.convert("L") if kind == "mask" else image, folder / names[kind])
                lines.append(json.dumps({**names, "instruction": sample.instruction, "family": sample.family}) + "\n")
        write_text(folder / METADATA, "".join(lines))
    except BaseException:
        for kind in KINDS:
            shutil.rmtree(folder / kind, ignore_errors=True)
        (folder / METADATA).unlink(missing_ok=True)
        if made:
            folder.rmdir()
        raise
    return folder


def picture(pixels: Tensor) -> Image.Image:
    """Pixels [3, H, W] in [-1, 1] as an RGB image."""
    return Image.fromarray(to_uint8(pixels, "nearest").permute(1, 2, 0).cpu().contiguous().numpy())
