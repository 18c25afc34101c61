"""What each fit does to pictures that are not square, with the demo model.

    python benchmarks/fits.py --count 60 --save benchmarks/fits.json

Scenes of ShapeEdit are cut to 3:2, every other one upright, and edited by their own instructions. Judged is what the
cut leaves of them: success, also of the edits that lie within the middle square alone; the background's PSNR; and how
far what should stay is off, in levels, beside the border where padding or the cut begins and farther in. Photographs,
dark, as they are and bright, are made greyscale, and compared with that. Prints a table, then one JSON line; --save
also writes it, --pictures keeps the edits of the photographs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import ROOT, few, finish, parsed, parser
from varedit_core import Editor, SamplingSettings
from varedit_core.cli.common import hardware
from varedit_core.demo import GUIDANCE, SIZE, demo_files
from varedit_core.fitting import CROP, FITS, Fitting, fitting_for
from varedit_core.shapeedit.evaluate import AREA, draw, picture, reconstruct
from varedit_core.shapeedit.metrics import background, regions, succeeds
from varedit_core.shapeedit.render import render, restyle

RECORD = ROOT / "benchmarks" / "fits.json"
SIDE, SHORT, BATCH = 256, 171, 6
STRIP = 4
"""Pixels beside a border that count as beside it."""
EXPOSURES = {"dark": (0.1, 0.0), "plain": (1.0, 0.0), "bright": (0.3, 178.5)}
"""Factor and levels added, of a photograph's levels."""
GREYSCALE = "make the image black and white"


@dataclass(frozen=True)
class Task:
    """An edit with its answer: pixels [3, y, x] in [-1, 1], and where it changes them [y, x]. near: other answers that
    the edit must not be closer to [n, 3, y, x]."""

    words: str
    source: Tensor
    target: Tensor
    region: Tensor
    near: Tensor
    local: bool

    @property
    def size(self) -> tuple[int, int]:
        return self.source.shape[2], self.source.shape[1]

    @property
    def in_the_middle(self) -> bool:
        """Whether the fit that cuts could do the edit."""
        left, top, right, bottom = fitting_for(self.size, AREA, CROP).box
        return self.local and (self.region[top:bottom, left:right].sum() == self.region.sum()).item()


def cut(pixels: Tensor, upright: bool) -> Tensor:
    """The middle of square pixels [..., 256, 256], 3:2 or 2:3."""
    first = (SIDE - SHORT) // 2
    return pixels.narrow(-1 if upright else -2, first, SHORT).contiguous()


def scenes(count: int, seed: int) -> Iterator[Task]:
    """Samples whose edit lies within what the cut leaves."""
    for number, sample in enumerate(draw(seed, count)):
        upright = bool(number % 2)
        source, target, *near = render([sample.source, sample.target, *sample.distractors])
        whole = regions(source[None], target[None], [sample.family])[0]
        local = sample.family not in ("style", "background", "keep")
        if local and cut(whole, upright).sum() < whole.sum():
            continue
        parts = [cut(one, upright) for one in (source, target, *near)]
        yield Task(
            sample.instruction, parts[0], parts[1], cut(whole, upright),
            torch.stack(parts[2:]) if near else torch.zeros(0, *parts[0].shape), local,
        )  # fmt: skip


def photographs() -> dict[str, Task]:
    """Greyscale is asked of pictures of several brightnesses."""
    made = {}
    for name in ("cat.jpg", "scene.png"):
        whole = Image.open(ROOT / "samples" / name).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        for exposure, (factor, more) in EXPOSURES.items():
            levels = (
                torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3).permute(2, 0, 1)
            )
            pixels = cut((levels * factor + more).round() / 127.5 - 1, name == "scene.png")
            grey, everywhere = restyle(pixels[None], "greyscale")[0], torch.zeros_like(pixels[0], dtype=torch.bool)
            made[f"{name}, {exposure}"] = Task(
                GREYSCALE, pixels, grey, everywhere, torch.zeros(0, *pixels.shape), False
            )
    return made


def pixels_of(image: Image.Image) -> Tensor:
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size[::-1], 3)
    return levels.permute(2, 0, 1) / 127.5 - 1


def beside(fitting: Fitting) -> Tensor:
    """[y, x]: the strip beside the border where padding begins, or within the borders of the cut."""
    (width, height), strip = fitting.size, torch.zeros(fitting.size[::-1], dtype=torch.bool)
    wide = width > height
    if fitting.box is None:
        strip[(slice(-STRIP, None), slice(None)) if wide else (slice(None), slice(-STRIP, None))] = True
        return strip
    for end in (fitting.box[0], fitting.box[2] - STRIP) if wide else (fitting.box[1], fitting.box[3] - STRIP):
        strip[(slice(None), slice(end, end + STRIP)) if wide else (slice(end, end + STRIP), slice(None))] = True
    return strip


def judged(editor: Editor, task: Task, edited: Tensor, method: str) -> dict[str, float | None]:
    """Figures of one edit; None for one that does not count."""
    fitting = fitting_for(task.size, AREA, method)
    off, strip, seen = (edited - task.target).abs().mean(0) * 127.5, beside(fitting), torch.zeros_like(task.region)
    left, top, right, bottom = fitting.box or (0, 0, *fitting.size)
    seen[top:bottom, left:right] = True
    kept = seen & (~task.region if task.words != GREYSCALE else seen)
    parts = {"border": off[strip & kept], "inner": off[~strip & kept]}
    found = {name: part.mean().item() if len(part) else None for name, part in parts.items()}
    if task.words == GREYSCALE:
        return found
    restored = task.source if task.region.any() else reconstructed(editor, task.source)
    one = (edited[None], task.source[None], task.target[None], task.region[None])
    success = succeeds(*one, [task.near], restored[None]).item()
    (decibels, _), *_ = background(edited[None], task.source[None], task.region[None])
    return {
        **found, "success": float(success), "in the middle": float(success) if task.in_the_middle else None,
        "psnr": decibels if task.local else None,
    }  # fmt: skip


def reconstructed(editor: Editor, source: Tensor) -> Tensor:
    """A picture of any size through the VAE, padded by its edges to whole tokens."""
    height, width = source.shape[1:]
    padded = torch.nn.functional.pad(source[None], (0, SIDE - width, 0, SIDE - height), mode="replicate")
    return reconstruct(editor.autoencoder, padded)[0, :, :height, :width].clamp(-1, 1)


def edits(editor: Editor, tasks: Sequence[Task], method: str, settings: SamplingSettings) -> list[Tensor]:
    """The edited pictures; those of one size run together."""
    made: dict[int, Tensor] = {}
    for size in dict.fromkeys(task.size for task in tasks):
        alike = [n for n, task in enumerate(tasks) if task.size == size]
        for some in (alike[n : n + BATCH] for n in range(0, len(alike), BATCH)):
            given = [picture(tasks[n].source) for n in some], [tasks[n].words for n in some]
            made |= dict(zip(some, map(pixels_of, editor.edit(*given, None, SIZE, method, settings))))
    return [made[n] for n in range(len(tasks))]


def means(rows: Sequence[dict[str, float | None]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {name: round(fmean(values), 3) if values else None for name, values in found.items()}


def main() -> None:
    known = parser(__doc__, save=RECORD)
    known.add_argument("--count", type=int, default=60, help="samples, of which those count that the cut leaves whole")
    known.add_argument("--seed", type=int, default=77)
    known.add_argument("--pictures", type=Path, help="folder for the edits of the photographs")
    options = parsed(known, count=1)
    editor, settings = Editor.load(*demo_files()), SamplingSettings(guidance=GUIDANCE, seed=options.seed)
    tasks, runs = list(scenes(options.count, options.seed)), {}
    shown = dict(few(photographs().items(), options, 1))
    for method in few(FITS, options) if options.tiny else FITS:
        drawn = zip(tasks, edits(editor, tasks, method, settings))
        photos = dict(zip(shown, edits(editor, [*shown.values()], method, settings)))
        for name, one in photos.items() if options.pictures else ():
            picture(one).save(options.pictures / f"{name.replace(', ', '-')}-{method}.png")
        grey = means([judged(editor, task, photos[name], method) for name, task in shown.items()])
        runs[method] = means([judged(editor, *pair, method) for pair in drawn])
        runs[method] |= {f"grey {name}": grey[name] for name in ("border", "inner")}
        print(f"{method:10s}", *(f"{name} {value}" for name, value in runs[method].items()), flush=True)
    facts = {
        "count": len(tasks), "in the middle": sum(task.in_the_middle for task in tasks), "photographs": len(shown),
        "seed": options.seed, **hardware(editor),
    }  # fmt: skip
    finish({"benchmark": "fits", **facts, "runs": runs}, options.save)


if __name__ == "__main__":
    main()
