"""`varedit edit`: pictures, or the tokens of an edit, in; pictures, tokens and maps out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from PIL import Image, ImageOps

from ..controls.registry import NEUTRAL, NO_SHORTCUTS, Controls, Shortcuts
from ..defaults import FILL, FIT, FITS, KINDS, NEGATIVE_PROMPT
from ..demo import NOTICE, demo_files
from ..editor import Edited, Region
from ..files.checkpoints import load_transformer
from ..files.tokens import SUFFIX
from ..files.tokens import check_target as check_tokens
from ..files.weights import open_weights
from ..pictures.canvas import Region as Crop
from ..pictures.canvas import crop, extend, region_of, sides_from, stitch
from ..pictures.composite import Region
from ..pictures.contact_sheet import contact_sheet
from ..pictures.images import Fitting, SourceImage, check_target, load_image, load_mask, save_image
from ..pictures.images import fit as fit_image
from ..runtime.fp8 import LINEARS
from ..tokenizer.tokens import Tokens
from . import common as options
from .common import (
    DTYPES,
    check_parts,
    checked_loras,
    choice,
    console,
    guidance_or_default,
    load_editor,
    numbered,
    per_scale,
    progress,
    size_or_default,
)  # fmt: skip
from .demo import Watcher


def edit(
    image: Annotated[Path, typer.Argument(help="Picture to edit, or the tokens of an edit to go on from.")],
    instruction: Annotated[str, typer.Argument(help="What to change, in words.")] = "",
    model: options.Model = None,
    vae: options.Vae = None,
    text_encoder: options.TextEncoder = None,
    kind: options.Kind = KINDS[0],
    lora: options.Lora = None,
    tokenizer: options.Tokenizer = None,
    features: Annotated[
        Optional[str], typer.Option(help="FILE:KEY with text features to use in place of an instruction.")
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="Result; by default beside the picture, as NAME-edited.png."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output files if they exist.")] = False,
    size: options.Size = None,
    fit: options.Fit = FIT,
    guidance: options.Guidance = None,
    temperature: options.Temperature = options.TEMPERATURE,
    top_p: options.TopP = options.TOP_P,
    preset: options.Preset = PRESET,
    seed: options.Seed = DEFAULT_SETTINGS.seed,
    negative: options.Negative = NEGATIVE_PROMPT,
    device: options.Device = None,
    dtype: options.Dtype = None,
    linears: options.Linears = LINEARS[0],
    variations: options.Variations = 1,
    mask: options.Mask = None,
    protect: options.Protect = None,
    region: options.Regions = None,
    crop: options.Crop = None,
    extend: options.Extend = None,
    fill: options.Fill = FILL,
    seam: options.Seam = 0,
    strength: options.Strength = NEUTRAL.strength,
    preserve: options.Preserve = NEUTRAL.preserve,
    source_attention: options.SourceAttention = NEUTRAL.source_attention,
    feather: options.Feather = NEUTRAL.feather,
    auto_mask: options.AutoMask = NEUTRAL.auto_mask,
    best_of: options.BestOf = NEUTRAL.best_of,
    best_at: options.BestAt = NEUTRAL.best_at,
    score: options.Score = NEUTRAL.score,
    begun: options.Begun = None,
    from_scale: options.FromScale = 0,
    save_tokens: options.SaveTokens = None,
    maps: options.Maps = None,
    unguided: options.Unguided = NO_SHORTCUTS.unguided,
    inside: options.Inside = NO_SHORTCUTS.inside,
    window: options.Window = NO_SHORTCUTS.window,
    stop: options.Stop = NO_SHORTCUTS.stop,
    drafter: options.Drafter = None,
    drafted: options.Drafted = NO_SHORTCUTS.drafted,
    preview_dir: Annotated[Optional[Path], typer.Option(help="Write every scale's picture into this folder.")] = None,
    sheet: Annotated[
        Optional[Path], typer.Option("--contact-sheet", help="Write source, every scale and result as one picture.")
    ] = None,
    report: options.JsonReport = False,
) -> None:
    """Edit a picture by an instruction; the result has exactly its size.

    Shortcuts save time and are not exact; README and docs/LOG.md say what each costs. Controls are neutral by default.
    """
    check_parts(model, vae, text_encoder, tokenizer)
    guided = guidance_or_default(guidance, model)
    settings = SamplingSettings(guided, per_scale(temperature), per_scale(top_p), seed).preset(preset)
    shortcuts = Shortcuts(unguided, inside, window, stop, drafted)
    controls = Controls(strength, preserve, source_attention, feather, auto_mask, best_of, best_at, score)
    if bool(drafter) != bool(drafted):
        raise ValueError("--drafter and --drafted go together: a second transformer, and how many scales it draws")
    area = size_or_default(size, model)
    choice(fit, dict.fromkeys(FITS), "fit")
    number = choice(dtype, DTYPES, "dtype") if dtype else None
    files = _files(model, vae, text_encoder, instruction or bool(region), features, negative)
    task = Task.read(image, area, fit, mask, protect, crop, extend, fill, region or (), bool(instruction or features))
    settings.per_scale(len(task.fitting.schedule))
    given = _begun(begun, from_scale)
    target = output or image.with_name(f"{image.stem}-edited.png")
    targets = numbered(target, variations)
    written = _written(targets, save_tokens, maps)
    for path in targets:
        _check_targets(image, path, not task.opaque, sheet, preview_dir, overwrite)
    for path in written:
        check_tokens(path, overwrite) if path == save_tokens else check_target(path, False, overwrite)
    prompt = [] if region else [_features(features) if features else instruction]
    loras = checked_loras(files[0], lora)

    if model is None:
        console.print(NOTICE, soft_wrap=True)
    begin = time.perf_counter()
    editor = load_editor(files, loras, linears, tokenizer, device, number, kind=kind)
    if drafter:
        editor.drafter = load_transformer(drafter, dtype=editor.transformer.dtype, device=editor.device)
    loaded = time.perf_counter()
    with progress() as bar:
        watcher = Watcher(editor, bar, sheet is not None, preview_dir, target.stem)
        edited = editor.run(
            [task.given], prompt, [negative], area, fit, settings, watcher, variations=variations, shortcuts=shortcuts,
            mask=task.mask, controls=controls, regions=task.regions, given=given, seam=0 if task.crop else seam,
            explain=maps is not None,
        )  # fmt: skip
        watcher.take(edited.pictures[0])
    seconds = time.perf_counter() - loaded
    results = [task.whole(picture, seam) for picture in edited.pictures]
    for result, path in zip(results, targets):
        save_image(result, path, overwrite, task.source and task.source.icc_profile)
    for path, picture in zip(written, _pictures(edited, written, maps)):
        edited.tokens.save(path, overwrite) if picture is None else save_image(picture, path, overwrite)
    if sheet:
        row = watcher.row(instruction or features or "; ".join(region or ()), task.shown(edited))
        save_image(contact_sheet([row], watcher.columns), sheet, overwrite)
    console.print(
        f"{', '.join(map(str, [*targets, *written]))} ({results[0].width}x{results[0].height}) in {seconds:.1f} s after "
        f"{loaded - begin:.1f} s of loading",
        soft_wrap=True,
        highlight=False,
    )
    if report:
        facts = {
            "output": str(targets[0]), "outputs": [str(path) for path in targets], "written": [str(path) for path in written],
            "size": list(results[0].size), "pixels": list(task.fitting.schedule.pixels), "fit": fit,
            "contact_sheet": str(sheet) if sheet else None,
            "loras": [{"file": str(file), "strength": strength} for file, strength in loras],
            **asdict(settings), "linears": linears, "shortcuts": asdict(shortcuts), "controls": asdict(controls),
        }  # fmt: skip
        times = {"load_seconds": round(loaded - begin, 4), "edit_seconds": round(seconds, 4)}
        print(json.dumps({**facts, **times, "device": str(editor.device), "scales": watcher.scales}))


@dataclass(frozen=True, eq=False)
class Task:
    """What an edit works on. given: the picture, or the crop of it, or the tokens to go on from. source: the whole picture,
    None for tokens. fitting: of what is given."""

    given: SourceImage | Tokens
    source: SourceImage | None
    fitting: Fitting
    mask: Image.Image | None = None
    regions: Sequence[Region] = ()
    crop: Crop | None = None

    @classmethod
    def read(
        cls, image: Path, area: str, fit: str, mask: Path | None, protect: Path | None, margin: float | None,
        sides: str | None, fill: str, regions: Sequence[str], instructed: bool,
    ) -> Task:  # fmt: skip
        """The files that options name, put together. ValueError for options that do not go together."""
        if mask and protect:
            raise ValueError("--mask and --protect are opposites; give one of them")
        if regions and instructed:
            raise ValueError("give an instruction or --region, not both; a --region without a mask is for everywhere")
        if sides and (mask or protect):
            raise ValueError("--extend makes a mask of its own; leave out --mask and --protect")
        if margin is not None and not (mask or protect or sides):
            raise ValueError("--crop needs to know what to crop; give a --mask")
        if regions and (margin is not None or sides):
            raise ValueError("--region does not go with --crop or --extend, whose pictures its masks do not fit")
        shown = load_mask(mask or protect) if mask or protect else None
        shown = ImageOps.invert(shown) if protect else shown
        parts = [_region(text) for text in regions]
        if image.suffix == SUFFIX:
            if sides or margin is not None:
                raise ValueError("tokens have the size they were made with; --crop and --extend want a picture")
            tokens = Tokens.load(image)
            return cls(tokens, None, tokens.shown, shown, parts)
        source = load_image(image)
        if sides:
            source, shown = extend(source, sides_from(sides), fill=fill)
        if margin is None:
            return cls(source, source, fit_image(source, area, fit).fitting, shown, parts)
        place = region_of(source.size, shown, margin, fit)
        part, inner = crop(source, place)
        return cls(part, source, fit_image(part, area, fit).fitting, inner, parts, place)

    @property
    def opaque(self) -> bool:
        return self.source is None or self.source.opaque

    def whole(self, picture: Image.Image, seam: int) -> Image.Image:
        """A result with the rest of the picture around it."""
        return picture if self.crop is None else stitch(self.source, picture, self.crop, seam)

    def shown(self, edited: Edited) -> SourceImage:
        """What a contact sheet shows as the source."""
        return self.given if isinstance(self.given, SourceImage) else load_image(edited.pictures[0])


def _region(text: str) -> Region:
    words, at, file = text.rpartition("@")
    if not at:
        return Region(text)
    if not words.strip():
        raise ValueError(f"the region {text!r} has no instruction; write INSTRUCTION@MASK, what to change and where")
    return Region(words.strip(), load_mask(file))


def _begun(file: Path | None, scale: int) -> Tokens | None:
    """The scales before `scale` of a file of tokens, all by default. ValueError where the options do not go together."""
    if file is None:
        if scale:
            raise ValueError("--from-scale counts scales of an edit that was begun; name its tokens with --begun")
        return None
    tokens = Tokens.load(file)
    last = min(len(tokens) + 1, len(tokens.schedule))
    if (scale or len(tokens) + 1) not in range(2, last + 1):
        was = f"--from-scale {scale}" if scale else "the whole edit"
        raise ValueError(f"{file} has tokens of {len(tokens)} scales: give --from-scale from 2 to {last}, not {was}")
    return tokens.first(scale - 1) if scale else tokens


def _written(targets: Sequence[Path], tokens: Path | None, maps: Path | None) -> list[Path]:
    """Files beside the pictures: of each result its maps, and the tokens of all."""
    names = [maps / f"{path.stem}-{kind}.png" for path in targets for kind in ("changed", "certainty")] if maps else []
    return names + ([tokens] if tokens else [])


def _pictures(edited: Edited, written: Sequence[Path], maps: Path | None) -> list[Image.Image | None]:
    """What goes into the files of `_written`, None for tokens."""
    # Of changes only what counts as one, so that the picture serves as a mask.
    changed = [change.point(lambda level: 255 * (level == 255)) for change in edited.changes or ()]
    found = [picture for pair in zip(changed, edited.certainty) for picture in pair] if maps else []
    return found + [None] * (len(written) - len(found))


def _files(
    model: Path | None,
    vae: Path | None,
    text_encoder: Path | None,
    instruction: str | bool,
    features: str | None,
    negative: str,
) -> tuple[Path, Path, Path | None]:
    """Transformer, tokenizer and text encoder, the demo model's without a model. ValueError where words lack one."""
    if not (instruction or features):
        raise ValueError("say what to change: give an instruction, --region, or --features FILE:KEY")
    if instruction and features:
        raise ValueError("give an instruction or --features, not both")
    if model is None:
        return demo_files()
    if (instruction or negative) and not text_encoder:
        raise ValueError("an instruction or a negative prompt needs --text-encoder")
    return model, vae or model, text_encoder


def _check_targets(
    image: Path, target: Path, transparent: bool, sheet: Path | None, previews: Path | None, overwrite: bool
) -> None:
    """Raise what writing an edit's files would, before the edit. ValueError where a sheet would replace a picture."""
    if sheet and sheet.resolve() in (image.resolve(), target.resolve()):
        raise ValueError(f"the contact sheet {sheet} would replace a picture of the edit; choose another name for it")
    check_target(target, transparent, overwrite)
    if previews:
        check_target(previews / "scale.png", False, overwrite=True)
    if sheet:
        check_target(sheet, False, overwrite)


def _features(name: str) -> torch.Tensor:
    path, _, key = name.rpartition(":")
    if not (path and key):
        raise ValueError(f"--features takes FILE:KEY, got {name}; name the tensor behind a colon")
    weights = open_weights(path)
    if key not in weights:
        raise ValueError(
            f"{path} has no tensor {key}; it has {', '.join(sorted(k for k in weights if len(weights.shapes[k]) == 2)[:3])}, ..."
        )
    return weights[key].float()
