"""What the commands share: their common options, the helpers that read these, the console and the progress bar.

Knows no command, so that every module of commands can import it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..defaults import AUTO_MASK, DEFAULT_SETTINGS, FILLS, KINDS, MOST_FEATHER, PRESETS, SCORES, SIZE, Curve
from ..defaults import SIZES as SIDES
from ..demo import GUIDANCE as DEMO_GUIDANCE
from ..demo import SIZE as DEMO_SIZE
from ..editor import Editor
from ..files.lora import apply_lora, check_lora
from ..runtime.fp8 import LINEARS, check_linears, eight_bit
from ..tokenizer.schedule import AREAS

console = Console(stderr=True, markup=False, highlight=False)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SIZES = SIDES | {area: area for area in AREAS}
"""Names of sizes on the command line."""

Model = Annotated[
    Optional[Path], typer.Option(help="Transformer: .safetensors, .pth or a sharded folder; by default the demo model.")
]
Vae = Annotated[
    Optional[Path], typer.Option(help="Tokenizer file; by default the model file, where it holds both.")
]
TextEncoder = Annotated[Optional[Path], typer.Option(help="T5 encoder: a Hugging Face folder or one file.")]
Tokenizer = Annotated[
    Optional[Path], typer.Option(help="Folder or file of the text encoder's tokenizer, if not with its weights.")
]
Size = Annotated[
    Optional[str],
    typer.Option(help=f"Working size: {', '.join(SIZES)}.", show_default=f"{SIZE}; {DEMO_SIZE} for the demo model"),
]
Fit = Annotated[str, typer.Option(help="square (as published) or aspect (experimental).")]
Seed = Annotated[int, typer.Option(help="Seed of the draw.")]
Negative = Annotated[str, typer.Option(help="Negative prompt, in place of the learned unconditional features.")]
Lora = Annotated[
    Optional[list[str]], typer.Option(help="FILE[:STRENGTH], a LoRA to apply; may be given several times.")
]
Guidance = Annotated[
    Optional[str],
    typer.Option(
        help="Classifier-free guidance; one number, one a scale (3,3,2,1), or from the first to the last (3:1).",
        show_default=f"{DEFAULT_SETTINGS.guidance:g}; {DEMO_GUIDANCE:g} for the demo model",
    ),
]
Temperature = Annotated[str, typer.Option(help="Temperature; 0 is greedy; one number, one a scale (3,3,2,1), or from the first to the last (3:1).")]
TopP = Annotated[str, typer.Option(help="Drop bit values of probability <= 1 - top_p.")]
Device = Annotated[Optional[str], typer.Option(help="cuda, cpu, mps; by default cuda where there is one.")]
Dtype = Annotated[Optional[str], typer.Option(help=f"Of the transformer's blocks: {', '.join(DTYPES)}.")]
Linears = Annotated[
    str, typer.Option(help="Of the transformer's blocks: exact, or 8-bit (half the memory, faster, an approximation).")
]
Kind = Annotated[
    str, typer.Option(help=f"What the transformer was trained for: {', '.join(KINDS)} (as its file says, else edit).")
]
Variations = Annotated[int, typer.Option(min=1, help="Results of so many seeds, from one pass over the picture.")]
Mask = Annotated[
    Optional[Path],
    typer.Option(help="Picture that is white (or, with alpha, opaque) where the edit may change something; elsewhere nothing "
        "changes. Of any size: it is stretched over the picture."),
]
Protect = Annotated[
    Optional[Path], typer.Option(help="The opposite of --mask: a picture that is white where nothing may change."),
]
Regions = Annotated[
    Optional[list[str]],
    typer.Option(help="INSTRUCTION@MASK, in place of an instruction: what to change where; may be given several times, later "
        "ones lie on top; without @MASK it is for everywhere.", show_default=False),
]
Crop = Annotated[
    Optional[float],
    typer.Option(help="Edit only what --mask marks, at the full working size, with so much around it (a share of its longer "
        "side, such as 0.25), and put it back."),
]
Extend = Annotated[
    Optional[str],
    typer.Option(help="Outpaint: LEFT,TOP,RIGHT,BOTTOM of new picture, in pixels, or shares such as 25%; one number: all sides. 16 pixels of the old picture beside it may change, too."),
]
Fill = Annotated[str, typer.Option(help=f"What the model sees in the new part: {', '.join(FILLS)}.")]
Seam = Annotated[int, typer.Option(min=0, help="Pixels from a mask's edge inwards over which the edit fades in.")]
Strength = Annotated[
    float, typer.Option(help="1 is the free edit; less holds more scales, coarse ones first, to the picture; 0: the picture itself.")
]
Preserve = Annotated[float, typer.Option(help="Pulls every bit towards the picture's, 0 to 1: 0 not at all, 1 all the way.")]
SourceAttention = Annotated[float, typer.Option(help="What the picture weighs in self-attention: 1 as trained, 0 it is not seen.")]
Feather = Annotated[int, typer.Option(help=f"Tokens around a mask that are drawn with it, and latents that stay so, 0 to {MOST_FEATHER}.")]
AutoMask = Annotated[
    float,
    typer.Option(help=f"0 to 1; above 0 the edit finds what it changes, and all else stays as it is: {AUTO_MASK:g} is a good one, more lets more in."),
]
BestOf = Annotated[int, typer.Option(help="Begin so many candidates and go on with the best one.")]
BestAt = Annotated[int, typer.Option(help="Scales after which the best candidate is chosen.")]
Score = Annotated[str, typer.Option(help=f"What chooses it: {', '.join(SCORES)}.")]
Begun = Annotated[
    Optional[Path], typer.Option(help="Tokens of the first scales of this edit, to finish it; with --variations, to branch off.")
]
FromScale = Annotated[int, typer.Option(min=0, help="Draw from this scale on; of --begun only the earlier ones are kept.")]
SaveTokens = Annotated[
    Optional[Path], typer.Option(help="Write the edit's tokens, some kilobytes, as .safetensors: to decode, finish, branch or edit again.")
]
Maps = Annotated[
    Optional[Path], typer.Option(help="Write two pictures of each result into this folder: what changed, and how sure the model was.")
]
Preset = Annotated[str, typer.Option(help=f"Curves of guidance and temperature over the scales: {', '.join(PRESETS)}.")]
Unguided = Annotated[int, typer.Option(min=0, help="Shortcut: so many last scales without guidance; more than there are means all.")]
Inside = Annotated[int, typer.Option(min=0, help="Shortcut: compute the last N scales inside the mask only. A wide mask loses less.")]
Window = Annotated[
    float, typer.Option(help="Shortcut: the last three scales see rows within this share of the height (grids of more than 16 rows only); 0: all.")
]
Stop = Annotated[int, typer.Option(min=0, help="Shortcut: a draft after so many scales; 0: all.")]
Drafter = Annotated[
    Optional[Path], typer.Option(help="A second, larger transformer of the same tokenizer, which draws the first --drafted scales.")
]
Drafted = Annotated[int, typer.Option(min=0, help="Shortcut: scales that --drafter draws.")]
JsonReport = Annotated[bool, typer.Option("--json", help="Print a JSON report on standard output.")]

# Texts, as one number and one a scale are the same option.
TEMPERATURE = f"{DEFAULT_SETTINGS.temperature:g}"
TOP_P = f"{DEFAULT_SETTINGS.top_p:g}"


def per_scale(text: str) -> list[float] | Curve:
    """One number, several with commas between them, or two with a colon, from the first to the last scale. BadParameter
    for anything else."""
    try:
        first, colon, last = text.partition(":")
        return Curve(float(first), float(last)) if colon else [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a number, nor one a scale (3,3,2,1), nor the first and the last scale's (3:1)"
        ) from None


def check_parts(model: Path | None, *parts: Path | None) -> None:
    """ValueError where files are named that belong to a model, and no model is. parts: all but the model."""
    if model is None and any(parts):
        raise ValueError("--vae, --text-encoder and --tokenizer belong to a model of yours; name it with --model")


def size_or_default(text: str | None, model: Path | None) -> str:
    """--size as one of AREAS, or the default of the model named or (None) of the demo model."""
    return choice(text or (SIZE if model else DEMO_SIZE), SIZES, "size")


def numbered(path: Path, count: int) -> list[Path]:
    """Names of so many results: the path itself for one, STEM-1 and so on for several."""
    return [path.with_stem(f"{path.stem}-{n + 1}") for n in range(count)] if count > 1 else [path]


def guidance_or_default(text: str | None, model: Path | None) -> float | list[float]:
    """--guidance, or the default of the model named or (None) of the demo model."""
    if text is not None:
        return per_scale(text)
    return DEFAULT_SETTINGS.guidance if model else DEMO_GUIDANCE


def choice(text: str, table: dict[str, Any], name: str) -> Any:
    """The table's entry of that name. BadParameter, with the known names, where there is none."""
    if text not in table:
        raise typer.BadParameter(f"unknown {name} {text!r}; choose one of {', '.join(table)}")
    return table[text]


def checked_loras(model: Path, texts: list[str] | None) -> list[tuple[Path, float]]:
    """The LoRAs of --lora with their strengths, known to fit the transformer's file."""
    loras = [lora_and_strength(text) for text in texts or []]
    for file, _ in loras:
        check_lora(model, file)
    return loras


def lora_and_strength(text: str) -> tuple[Path, float]:
    """FILE[:STRENGTH]; a colon may be part of the file's name."""
    file, _, strength = text.rpartition(":")
    try:
        return (Path(text), 1.0) if not file or Path(text).exists() else (Path(file), float(strength))
    except ValueError:
        if Path(file).is_file():
            raise typer.BadParameter(f"the strength {strength!r} of {file} is no number; 1 is as trained") from None
        return Path(text), 1.0


def load_editor(
    files: Sequence[Path | None], loras: Sequence[tuple[Path, float]], linears: str, *more, **named
) -> Editor:
    """`Editor.load` with LoRAs applied, before linear layers are rounded to 8 bits. ValueError for unknown linears."""
    check_linears(linears)
    editor = Editor.load(*files, *more, **named, linears=LINEARS[0] if loras else linears)
    for file, strength in loras:
        apply_lora(editor.transformer, file, strength)
    if linears == "8-bit":
        eight_bit(editor.transformer)
    return editor


def hardware(editor: Editor) -> dict[str, str]:
    """What reports say of where an edit ran: the device (a GPU by its model) and the type of the blocks' weights."""
    name = torch.cuda.get_device_name(editor.device) if editor.device.type == "cuda" else editor.device.type
    return {"device": name, "dtype": str(editor.transformer.dtype).removeprefix("torch.")}


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on the console, gone at the end; nothing where the console is a file."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar if console.is_terminal else nullcontext():  # rich before 14.3 ends a disabled one with an empty line
        yield bar
