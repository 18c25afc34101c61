"""`varedit generate`: pictures of text alone, by an Infinity checkpoint."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..controls.base import Known
from ..controls.registry import Controls, Shortcuts
from ..defaults import RATIO, RATIOS, SIZE
from ..files.safe_write import together
from ..files.tokens import save_tokens
from ..fitting import ASPECT, fitting_for, nearest_ratio
from ..pictures.composite import Region, check_masks, check_regions, check_rest
from ..pictures.images import load_image, load_mask, save_image
from ..sampling.settings import TEXT_SETTINGS
from ..tokenizer.schedule import schedule_for
from . import common as options
from .common import (
    SIZES,
    Begun,
    Draw,
    Files,
    Words,
    area_of,
    carried,
    check_scales,
    check_strip,
    check_words,
    checked_loras,
    command,
    complain,
    knob_options,
    numbered,
    progress,
    region_masks,
    region_of,
)  # fmt: skip
from .edit import report_edit
from .results import check_results, picture
from .results import tokens as saved_tokens
from .watcher import Watcher

ControlOptions = knob_options(Controls, "controls", but=lambda knob: "source" in knob.needs.split())
"""Controls that need no source."""
ShortcutOptions = knob_options(Shortcuts, "shortcuts", but=lambda knob: knob.name == "drafted")


@dataclass(frozen=True)
class TextDraw(Draw):
    """How the bits are drawn, by Infinity's defaults."""

    guidance: Annotated[str, typer.Option(help=f"Classifier-free guidance; {options.PER_SCALE}")] = (
        f"{TEXT_SETTINGS.guidance:g}"
    )
    temperature: Annotated[
        str, typer.Option(help="Temperature; Infinity's own scripts take 0.5 for 2B and 1 for 8B; 0 is greedy.")
    ] = f"{TEXT_SETTINGS.temperature:g}"


@dataclass(frozen=True)
class Shape:
    """What is made: its size, or the part of a picture that is repainted."""

    size: Annotated[Optional[str], typer.Option(help=f"Size: {', '.join(SIZES)}.", show_default=SIZE)] = None
    ratio: Annotated[
        str,
        typer.Option(help=f"Height / width, or one of {', '.join(RATIOS)} (width:height); the nearest table counts."),
    ] = RATIO
    image: Annotated[
        Optional[Path],
        typer.Option(
            help="Picture to repaint a part of, with --mask: it is read only outside the mask, and gives size and "
            "shape."
        ),
    ] = None
    mask: options.Mask = None
    region: options.Regions = None

    def check(self, prompt: str, controls: Controls) -> None:
        """Raise ValueError for options that do not go together."""
        if not (prompt or self.region):
            raise ValueError("say what the picture shows: give a prompt, or --region")
        if prompt:
            check_words(prompt, "prompt")
        if prompt and self.region:
            raise ValueError("give a prompt or --region, not both; a --region without a mask is for everywhere")
        if bool(self.image) != bool(self.mask):
            raise ValueError("--image and --mask go together: a picture, and where it is repainted")
        if not self.image:
            controls.check_source()
        if self.image and self.ratio != RATIO:
            raise ValueError("--image gives the shape; leave out --ratio")

    def regions(self) -> list[Region]:
        """Those of --region. ValueError where they do not belong together."""
        regions = [region_of(text) for text in self.region or ()]
        check_regions(regions)
        if not self.image:
            check_rest(regions)
        return regions


@dataclass(frozen=True)
class Outputs:
    """What is written."""

    output: Annotated[Path, typer.Option("--output", "-o", help="Result.")] = Path("generated.png")
    overwrite: Annotated[bool, typer.Option(help="Replace the output files if they exist.")] = False
    variations: options.Variations = 1
    save_tokens: options.SaveTokens = None
    seam: options.Seam = 0
    strip: options.Strip = False
    report: options.JsonReport = False


@command
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows, in words; empty with --region.")],
    files: Files,
    shape: Shape,
    draw: TextDraw,
    words: Words,
    controls: ControlOptions,
    begun: Begun,
    shortcuts: ShortcutOptions,
    outputs: Outputs,
) -> None:
    """Make a picture of a text alone, with an Infinity checkpoint, or repaint a part of a picture.

    Shortcuts save time and are not exact; docs/SPEED.md says what each costs.
    """
    files = files.checked()
    if files.model is None:
        raise ValueError("name an Infinity transformer with --model; the demo model edits pictures")
    named, saved = controls.values(), shortcuts.values()
    shape.check(prompt, named)
    area, ratio, regions = area_of(shape.size, files.model), _ratio(shape.ratio), shape.regions()
    source, mask = (read(file) if file else None for read, file in ((load_image, shape.image), (load_mask, shape.mask)))
    if source:
        check_masks([mask], regions, [source.size])
    schedule, settings = schedule_for(area, nearest_ratio(ratio)), draw.settings(files.model)
    if source:
        schedule = fitting_for(source.size, area, ASPECT).schedule
    draw.check(settings, len(schedule))
    settings, given = words.bent(settings, len(schedule)), begun.tokens()
    complain(Known(
        schedule, settings, named, saved, bool(shape.mask), len(given or ()), outputs.variations, outputs.seam,
        bool(words.negative),
    ))  # fmt: skip
    targets = numbered(outputs.output, outputs.variations)
    paths = files.paths()
    check_strip(source, outputs.strip)
    results = [picture(path, transparent=source is not None and not source.opaque) for path in targets]
    results += [saved_tokens(outputs.save_tokens)] if outputs.save_tokens else []
    read = [shape.image, shape.mask, begun.begun, *region_masks(shape.region), *files.read(paths)]
    check_results(results, read, outputs.overwrite)
    check_scales(paths[0], len(schedule))
    loras = checked_loras(paths[0], files.lora)

    begin = time.perf_counter()
    editor = files.load(paths, loras)
    loaded = time.perf_counter()
    with progress() as bar:
        watcher = Watcher(editor, bar)
        bar.update(watcher.task, description="reading the text")
        made = editor.make(
            [prompt] if prompt else (), area, ratio, settings, words.negative, source, watcher,
            variations=outputs.variations, shortcuts=saved, mask=mask,
            controls=named, regions=regions, given=given, seam=outputs.seam,
        )  # fmt: skip
    done = time.perf_counter()
    with together() as write:
        for result, path in zip(made.pictures, targets):
            save_image(result, path, outputs.overwrite, *carried(source, outputs.strip), write)
        if outputs.save_tokens:
            save_tokens(made.tokens, outputs.save_tokens, outputs.overwrite, write)
    written = [*targets, *([outputs.save_tokens] if outputs.save_tokens else [])]
    size = made.pictures[0].size
    report_edit(written, size, done - loaded, loaded - begin)
    if outputs.report:
        facts = {"outputs": [str(path) for path in targets], "size": list(size), "scales": watcher.scales}
        times = {"load_seconds": round(loaded - begin, 4), "generate_seconds": round(done - loaded, 4)}
        named = {"controls": asdict(named), "shortcuts": asdict(saved), "linears": files.linears}
        print(json.dumps({**facts, **asdict(settings), **times, "device": str(editor.device), **named}))


def _ratio(text: str) -> float:
    """Height / width of a name of RATIOS or a number. BadParameter for anything else."""
    if text in RATIOS:
        return RATIOS[text]
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"the ratio {text!r} is neither a number nor one of {', '.join(RATIOS)}") from None
