"""`varedit generate`: pictures of a text alone, and parts of pictures repainted, by Infinity checkpoints."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..controls.registry import NO_SHORTCUTS, Shortcuts
from ..defaults import KINDS, NEGATIVE_PROMPT, RATIO, RATIOS, SIZE
from ..pictures.images import check_target, load_image, load_mask, save_image
from ..runtime.fp8 import LINEARS
from ..sampling.settings import TEXT_SETTINGS, SamplingSettings
from . import common as options
from .common import DTYPES, SIZES, checked_loras, choice, console, load_editor, numbered, per_scale, progress
from .demo import Watcher


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows, in words.")],
    model: Annotated[Path, typer.Option(help="Infinity transformer: .safetensors, .pth or a sharded folder.")],
    text_encoder: Annotated[Path, typer.Option(help="T5 encoder: a Hugging Face folder or one file.")],
    vae: options.Vae = None,
    kind: options.Kind = KINDS[0],
    lora: options.Lora = None,
    tokenizer: options.Tokenizer = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Result.")] = Path("generated.png"),
    overwrite: Annotated[bool, typer.Option(help="Replace the output file if it exists.")] = False,
    size: Annotated[str, typer.Option(help=f"Size: {', '.join(SIZES)}.")] = SIZE,
    ratio: Annotated[
        str, typer.Option(help=f"Height / width, or one of {', '.join(RATIOS)} (width:height); the nearest table counts.")
    ] = RATIO,
    image: Annotated[Optional[Path], typer.Option(help="Picture to repaint inside --mask, in its own shape.")] = None,
    mask: options.Mask = None,
    guidance: Annotated[
        str, typer.Option(help="Classifier-free guidance; one number, or one a scale.")
    ] = f"{TEXT_SETTINGS.guidance:g}",
    temperature: Annotated[
        str, typer.Option(help="Temperature; Infinity's own scripts take 0.5 for 2B and 1 for 8B; 0 is greedy.")
    ] = f"{TEXT_SETTINGS.temperature:g}",
    top_p: options.TopP = f"{TEXT_SETTINGS.top_p:g}",
    seed: options.Seed = TEXT_SETTINGS.seed,
    negative: options.Negative = NEGATIVE_PROMPT,
    device: options.Device = None,
    dtype: options.Dtype = None,
    linears: options.Linears = LINEARS[0],
    variations: Annotated[int, typer.Option(min=1, help="Results of so many seeds.")] = 1,
    unguided: options.Unguided = NO_SHORTCUTS.unguided,
    inside: options.Inside = NO_SHORTCUTS.inside,
    window: options.Window = NO_SHORTCUTS.window,
    stop: options.Stop = NO_SHORTCUTS.stop,
    report: options.JsonReport = False,
) -> None:
    """Make a picture of a text, or repaint a part of one, with an Infinity text-to-image checkpoint."""
    settings = SamplingSettings(per_scale(guidance), per_scale(temperature), per_scale(top_p), seed)
    if bool(image) != bool(mask):
        raise ValueError("--image and --mask go together: a picture, and where it is repainted")
    area, shape = choice(size, SIZES, "size"), _ratio(ratio)
    number = choice(dtype, DTYPES, "dtype") if dtype else None
    source = load_image(image) if image else None
    targets = numbered(output, variations)
    for path in targets:
        check_target(path, source is not None and not source.opaque, overwrite)
    more = dict(variations=variations, shortcuts=Shortcuts(unguided, inside, window, stop))
    more |= dict(picture=source, mask=load_mask(mask)) if mask else {}
    loras = checked_loras(model, lora)

    begin = time.perf_counter()
    editor = load_editor((model, vae or model, text_encoder), loras, linears, tokenizer, device, number, kind=kind)
    loaded = time.perf_counter()
    with progress() as bar:
        watcher = Watcher(editor, bar)
        bar.update(watcher.task, description="reading the text")
        results = editor.generate([prompt], area, shape, settings, [negative], on_scale=watcher, **more)
    done = time.perf_counter()
    for result, path in zip(results, targets):
        save_image(result, path, overwrite, source.icc_profile if source else None)
    console.print(
        f"{', '.join(map(str, targets))} ({result.width}x{result.height}) in {done - loaded:.1f} s after {loaded - begin:.1f} s of loading",
        soft_wrap=True,
        highlight=False,
    )
    if report:
        facts = {"outputs": [str(path) for path in targets], "size": [result.width, result.height], "scales": watcher.scales}
        times = {"load_seconds": round(loaded - begin, 4), "generate_seconds": round(done - loaded, 4)}
        print(json.dumps({**facts, **asdict(settings), **times, "device": str(editor.device), "linears": linears}))


def _ratio(text: str) -> float:
    """Height / width of a name of RATIOS or a number. BadParameter for anything else."""
    if text in RATIOS:
        return RATIOS[text]
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"the ratio {text!r} is neither a number nor one of {', '.join(RATIOS)}") from None
