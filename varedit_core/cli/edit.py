"""`varedit edit`: pictures, or the tokens of an edit, in; pictures, tokens and maps out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from PIL import Image, ImageOps

from ..controls.base import Known
from ..defaults import FILL, FILLS, FIT
from ..demo import NOTICE
from ..editor import Editor
from ..files.checkpoints import load_transformer
from ..files.reading import printable
from ..files.safe_write import together
from ..files.tokens import SUFFIX, save_tokens
from ..files.weights import open_weights
from ..fitting import Fitting, fitting_for
from ..pictures.canvas import Crop, crop, crop_around, extend, sides_from, stitch
from ..pictures.composite import Region, check_masks, check_regions
from ..pictures.contact_sheet import contact_sheet
from ..pictures.edited import Edited
from ..pictures.images import SourceImage, load_image, load_mask, save_image
from ..sampling.tokens import Tokens
from ..tokenizer.schedule import Schedule
from . import common as options
from .common import (
    Begun,
    Canvas,
    ControlOptions,
    Draw,
    Files,
    ShortcutOptions,
    Words,
    carried,
    check_scales,
    check_strip,
    check_words,
    checked_loras,
    command,
    complain,
    console,
    numbered,
    progress,
    region_masks,
    region_of,
    tell_lost,
)  # fmt: skip
from .results import check_results, picture
from .results import tokens as saved_tokens
from .watcher import Watcher, previews


@dataclass(frozen=True)
class Place:
    """Where a picture may change, and how it is cut or grown for that."""

    mask: options.Mask = None
    protect: Annotated[
        Optional[Path],
        typer.Option(
            help="The opposite of --mask: a picture that is white where nothing may change; or the picture itself with "
            "the part to edit erased."
        ),
    ] = None
    region: options.Regions = None
    crop: Annotated[
        Optional[float],
        typer.Option(
            help="Edit only what --mask marks, at the full working size, with so much around it (a share of its longer "
            "side, such as 0.25), and put it back."
        ),
    ] = None
    extend: Annotated[
        Optional[str],
        typer.Option(
            help="Outpaint: LEFT,TOP,RIGHT,BOTTOM of new picture, in pixels, or shares such as 25%; one number: all "
            "sides. 16 pixels of the old picture beside it may change, too."
        ),
    ] = None
    fill: Annotated[
        Optional[str],
        typer.Option(help=f"What the model sees in the new part: {', '.join(FILLS)}.", show_default=FILL),
    ] = None
    seam: options.Seam = 0

    def read(self) -> list[Path | None]:
        """The files that are read."""
        return [self.mask, self.protect, *region_masks(self.region)]

    def check(self, instructed: bool) -> None:
        """Raise ValueError for options that do not go together, or would do nothing."""
        if self.mask and self.protect:
            raise ValueError("--mask and --protect are opposites; give one of them")
        if self.region and instructed:
            raise ValueError("give an instruction or --region, not both; a --region without a mask is for everywhere")
        if self.extend and (self.mask or self.protect):
            raise ValueError("--extend makes a mask of its own; leave out --mask and --protect")
        if self.crop is not None and not (self.mask or self.protect or self.extend):
            raise ValueError("--crop needs to know what to crop; give a --mask")
        if self.region and (self.crop is not None or self.extend):
            raise ValueError("--region does not go with --crop or --extend, whose pictures its masks do not fit")
        if self.fill and not self.extend:
            raise ValueError("--fill is for the new part of a picture; add --extend, or leave it out")


@dataclass(frozen=True)
class Networks(Files):
    """The model, and a second one that drafts."""

    drafter: Annotated[
        Optional[Path],
        typer.Option(help="A second, larger transformer of the same VAE, which draws the first --drafted scales."),
    ] = None

    def read(self, paths: Sequence[Path | None]) -> list[Path | None]:
        return [self.drafter, *super().read(paths)]

    def load(self, paths: Sequence[Path | None], loras: Sequence[tuple[Path, float]]) -> Editor:
        """The editor, with its drafter."""
        editor = super().load(paths, loras)
        if self.drafter:
            editor.drafter = load_transformer(self.drafter, dtype=editor.transformer.dtype, device=editor.device)
        return editor


@dataclass(frozen=True)
class Asked(Words):
    """What to change."""

    instruction: Annotated[str, typer.Argument(help="What to change, in words.")] = ""
    features: Annotated[
        Optional[str], typer.Option(help="FILE:KEY with text features to use in place of an instruction.")
    ] = None

    def check(self, regions: Sequence[str]) -> None:
        """Raise ValueError where nothing is asked for, or twice."""
        if not (self.instruction or self.features or regions):
            raise ValueError("say what to change: give an instruction, --region, or --features FILE:KEY")
        if self.instruction:
            check_words(self.instruction)
        if self.features and (self.instruction or regions):
            raise ValueError("give an instruction or --features, not both")

    def read(self) -> list[Path]:
        """The files that are read."""
        return [Path(_file_and_key(self.features)[0])] if self.features else []

    def prompt(self) -> str | torch.Tensor:
        return _features(self.features) if self.features else self.instruction


@dataclass(frozen=True)
class Outputs:
    """What is written."""

    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="Result; by default beside the picture, as NAME-edited.png."),
    ] = None
    overwrite: Annotated[bool, typer.Option(help="Replace the output files if they exist.")] = False
    variations: options.Variations = 1
    save_tokens: options.SaveTokens = None
    maps: Annotated[
        Optional[Path],
        typer.Option(
            help="Write two pictures of each result into this folder: what changed, and how sure the model was."
        ),
    ] = None
    preview_dir: Annotated[Optional[Path], typer.Option(help="Write every scale's picture into this folder.")] = None
    sheet: Annotated[
        Optional[Path], typer.Option("--contact-sheet", help="Write source, every scale and result as one picture.")
    ] = None
    strip: options.Strip = False
    report: options.JsonReport = False

    def targets(self, image: Path) -> list[Path]:
        """The results' files."""
        return numbered(self.output or image.with_name(f"{image.stem}-edited.png"), self.variations)

    def beside(self, targets: Sequence[Path]) -> list[Path]:
        """Files beside the pictures: of each result its maps, and the tokens of all."""
        kinds = ("changed", "certainty") if self.maps else ()
        names = [self.maps / f"{path.stem}-{kind}.png" for path in targets for kind in kinds]
        return names + ([self.save_tokens] if self.save_tokens else [])

    def previews(self, image: Path, schedule: Schedule) -> list[Path]:
        """The files of every scale's picture."""
        return previews(self.preview_dir, self.targets(image)[0].stem, schedule) if self.preview_dir else []

    def check(self, image: Path, task: Task, read: Sequence[Path | None]) -> None:
        """Raise what writing would, before the edit. read: files that may not be replaced."""
        check_strip(task.source, self.strip)
        targets = self.targets(image)
        files = [picture(path, transparent=not task.opaque) for path in targets]
        files += [picture(path, "preview") for path in self.previews(image, task.fitting.schedule)]
        files += [picture(self.sheet, "contact sheet")] if self.sheet else []
        for path in self.beside(targets):
            files.append(saved_tokens(path) if path == self.save_tokens else picture(path, "map"))
        check_results(files, read, self.overwrite)

    def write(
        self, results: Sequence[Image.Image], edited: Edited, image: Path, source: SourceImage | None,
        sheet: Image.Image | None, write: Callable[[Path, bytes, bool], None],
    ) -> list[Path]:  # fmt: skip
        """Write pictures, maps, tokens and the contact sheet; the files but the sheet."""
        targets = self.targets(image)
        beside = self.beside(targets)
        # Of changes only what counts as one, so that the picture serves as a mask.
        changed = [change.point(lambda level: 255 * (level == 255)) for change in edited.changes or ()]
        maps = [one for pair in zip(changed, edited.certainty or ()) for one in pair]
        for result, path in zip(results, targets):
            save_image(result, path, self.overwrite, *carried(source, self.strip), write)
        for one, path in zip(maps, beside):
            save_image(one, path, self.overwrite, write=write)
        if sheet:
            save_image(sheet, self.sheet, self.overwrite, write=write)
        if self.save_tokens:
            save_tokens(edited.tokens, self.save_tokens, self.overwrite, write)
        return [*targets, *beside]


@command
def edit(
    image: Annotated[Path, typer.Argument(help="Picture to edit, or the tokens of an edit to go on from.")],
    asked: Asked,
    files: Networks,
    canvas: Canvas,
    draw: Draw,
    place: Place,
    controls: ControlOptions,
    begun: Begun,
    shortcuts: ShortcutOptions,
    outputs: Outputs,
) -> None:
    """Edit a picture by an instruction; the result has exactly its size.

    Shortcuts save time and are not exact; docs/SPEED.md says what each costs. Controls are neutral by default.
    """
    files = files.checked()
    named, saved = controls.values(), shortcuts.values()
    if bool(files.drafter) != bool(saved.drafted):
        raise ValueError("--drafter and --drafted go together: a second transformer, and how many scales it draws")
    asked.check(place.region or ())
    place.check(bool(asked.instruction or asked.features))
    words = asked.instruction or place.region or asked.negative
    paths = files.paths("an instruction or a negative prompt" if words else "")
    task, given = Task.read(image, canvas, place, files.model), begun.tokens()
    schedule, settings = task.fitting.schedule, draw.settings(files.model)
    draw.check(settings, len(schedule))
    settings = asked.bent(settings, len(schedule))
    complain(Known(
        schedule, settings, named, saved, task.masked, len(given or ()), outputs.variations, place.seam,
        bool(asked.negative),
    ))  # fmt: skip
    each, outputs = outputs.variations, replace(outputs, variations=outputs.variations * task.pictures)
    outputs.check(image, task, [image, begun.begun, *asked.read(), *place.read(), *files.read(paths)])
    check_scales(paths[0], len(schedule))
    prompt, loras = () if place.region else asked.prompt(), checked_loras(paths[0], files.lora)

    if files.model is None:
        console.print(NOTICE, soft_wrap=True)
    begin = time.perf_counter()
    editor = files.load(paths, loras)
    loaded = time.perf_counter()
    with together() as write:
        show = partial(save_image, overwrite=outputs.overwrite, write=write)
        with progress() as bar:
            watcher = Watcher(editor, bar, outputs.sheet is not None, outputs.previews(image, schedule), show)
            edited = editor.run(
                [task.given], prompt, asked.negative, *task.size, settings, watcher,
                variations=each, shortcuts=saved, mask=task.mask, controls=named, regions=task.regions,
                given=given, seam=0 if task.crop else place.seam, explain=outputs.maps is not None,
            )  # fmt: skip
            watcher.take(edited.pictures[0])
        seconds = time.perf_counter() - loaded
        results = [task.whole(picture, place.seam) for picture in edited.pictures]
        label = asked.instruction or asked.features or "; ".join(place.region or ())
        sheet = contact_sheet([watcher.row(label, task.shown(edited))], watcher.columns) if outputs.sheet else None
        written = outputs.write(results, edited, image, task.source, sheet, write)
    report_edit(written, results[0].size, seconds, loaded - begin)
    if outputs.report:
        targets = written[: outputs.variations]
        facts = {
            "output": str(targets[0]), "outputs": [str(path) for path in targets],
            "written": [str(path) for path in written[outputs.variations :]], "size": list(results[0].size),
            "pixels": list(task.fitting.schedule.pixels), "fit": canvas.method,
            "contact_sheet": str(outputs.sheet) if outputs.sheet else None,
            "loras": [{"file": str(file), "strength": strength} for file, strength in loras],
            **asdict(settings), "linears": files.linears, "shortcuts": asdict(saved), "controls": asdict(named),
        }  # fmt: skip
        times = {"load_seconds": round(loaded - begin, 4), "edit_seconds": round(seconds, 4)}
        print(json.dumps({**facts, **times, "device": str(editor.device), "scales": watcher.scales}))


@dataclass(frozen=True, eq=False)
class Task:
    """What an edit works on. given: the picture, or the crop of it, or the tokens to go on from. source: the whole
    picture, None for tokens. fitting: of what is given. size: named size and fit, which tokens have of their own."""

    given: SourceImage | Tokens
    source: SourceImage | None
    fitting: Fitting
    mask: Image.Image | None = None
    regions: Sequence[Region] = ()
    crop: Crop | None = None
    size: tuple[str | None, str] = (None, FIT)

    @classmethod
    def read(cls, image: Path, canvas: Canvas, place: Place, model: Path | None) -> Task:
        """The files that options name, put together. model: None for the demo model. ValueError for options that do not
        go with what the files hold."""
        drawn = place.mask or place.protect
        shown = load_mask(drawn, erased=place.protect is not None) if drawn else None
        shown = ImageOps.invert(shown) if place.protect else shown
        parts = [region_of(text) for text in place.region or ()]
        check_regions(parts)
        if image.suffix == SUFFIX:
            if place.extend or place.crop is not None:
                raise ValueError("tokens have the size they were made with; --crop and --extend want a picture")
            if canvas.size or canvas.fit:
                raise ValueError("tokens have the size and fit they were made with; leave out --size and --fit")
            tokens = Tokens.load(image)
            tell_lost(tokens, "give --save-tokens, and decode them with varedit decode --image PICTURE")
            check_masks([shown] if shown else [], parts, [tokens.shown.size])
            return cls(tokens, None, tokens.shown, shown, parts)
        area, fit = canvas.area(model), canvas.method
        source = load_image(image)
        check_masks([shown] if shown else [], parts, [source.size])
        if place.extend:
            source, shown = extend(source, sides_from(place.extend), fill=place.fill or FILL)
        if place.crop is None:
            return cls(source, source, fitting_for(source.size, area, fit), shown, parts, size=(area, fit))
        around = crop_around(source.size, shown, place.crop, fit)
        part, inner = crop(source, around)
        return cls(part, source, fitting_for(part.size, area, fit), inner, parts, around, (area, fit))

    @property
    def masked(self) -> bool:
        """Whether it can change in a part only."""
        return self.mask is not None or (bool(self.regions) and all(region.mask for region in self.regions))

    @property
    def pictures(self) -> int:
        return self.given.images if isinstance(self.given, Tokens) else 1

    @property
    def opaque(self) -> bool:
        return self.source is None or self.source.opaque

    def whole(self, picture: Image.Image, seam: int) -> Image.Image:
        """A result with the rest of the picture around it."""
        return picture if self.crop is None else stitch(self.source, picture, self.crop, seam)

    def shown(self, edited: Edited) -> SourceImage:
        """What a contact sheet shows as the source."""
        return self.given if isinstance(self.given, SourceImage) else load_image(edited.pictures[0])


def report_edit(written: Sequence[Path], size: tuple[int, int], seconds: float, loading: float) -> None:
    """Say what was written."""
    names = ", ".join(printable(str(path)) for path in written)
    console.print(
        f"{names} ({size[0]}x{size[1]}) in {seconds:.1f} s after {loading:.1f} s of loading",
        soft_wrap=True,
        highlight=False,
    )


def _file_and_key(name: str) -> tuple[str, str]:
    path, _, key = name.rpartition(":")
    if not (path and key):
        raise ValueError(f"--features takes FILE:KEY, got {name}; name the tensor behind a colon")
    return path, key


def _features(name: str) -> torch.Tensor:
    path, key = _file_and_key(name)
    weights = open_weights(path)
    if key not in weights:
        near = ", ".join(sorted(k for k in weights if len(weights.shapes[k]) == 2)[:3])
        raise ValueError(f"{path} has no tensor {key}; it has {near}, ...")
    return weights[key].float()
