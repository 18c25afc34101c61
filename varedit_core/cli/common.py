"""What the commands share: their common options, the helpers that read these, the console and the progress bar.

Options of several commands are fields of a dataclass, those of controls come from the registry. A command takes such a
dataclass as one parameter (`command`). Knows no command, so that every module of commands can import it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..controls.base import Knob, Known
from ..controls.curves import PRESET
from ..controls.registry import Controls, Shortcuts, check, knob, knobs, problems
from ..defaults import FIT, KINDS, MOST_FEATHER, MOST_VARIATIONS, NEGATIVE_PROMPT, SIZE
from ..defaults import SIZES as SIDES
from ..demo import GUIDANCE as DEMO_GUIDANCE
from ..demo import demo_files
from ..editor import Editor
from ..files.checkpoints import TRANSFORMER, canonical
from ..files.convert import PRECISIONS
from ..files.lora import apply_lora, check_lora
from ..files.weights import open_weights
from ..fitting import FITS, FITS_HELP
from ..hub import find
from ..hub.catalogue import PRECISION, SETS
from ..made_for import MadeFor
from ..pictures.composite import Region
from ..pictures.images import SourceImage, load_mask
from ..pictures.reading import NO_DETAILS, SUFFIXES, Details
from ..runtime.fp8 import LINEARS, check_linears, eight_bit
from ..sampling import checks
from ..sampling.settings import DEFAULT_SETTINGS, Curve, SamplingSettings
from ..sampling.tokens import Tokens
from ..tokenizer.schedule import AREAS

console = Console(stderr=True, markup=False, highlight=False)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SIZES = SIDES | {area: area for area in AREAS}
"""Names of sizes on the command line."""

Regions = Annotated[
    Optional[list[str]],
    typer.Option(
        help="INSTRUCTION@MASK, in place of an instruction: what to change where; may be given several times, later "
        "ones lie on top; without @MASK it is for everywhere.",
        show_default=False,
    ),
]
Variations = Annotated[
    int, typer.Option(min=1, max=MOST_VARIATIONS, help="Results of so many seeds, from one pass over the picture.")
]
Seam = Annotated[
    int,
    typer.Option(
        min=0, max=MOST_FEATHER, help="The feather: pixels from a mask's edge inwards over which the edit fades in."
    ),
]
SaveTokens = Annotated[
    Optional[Path],
    typer.Option(
        help="Write the edit's tokens, some kilobytes, as .safetensors: to decode, finish, branch or edit again."
    ),
]
Device = Annotated[Optional[str], typer.Option(help="cuda, cpu, mps; by default cuda where there is one.")]
Dtype = Annotated[Optional[str], typer.Option(help=f"Of the transformer's blocks: {', '.join(DTYPES)}.")]
Kind = Annotated[
    str, typer.Option(help=f"What the transformer was trained for: {', '.join(KINDS)} (as its file says, else edit).")
]
Mask = Annotated[
    Optional[Path],
    typer.Option(
        help="Picture that is white where the edit may change something; elsewhere nothing changes. Of any size, but "
        "of the picture's shape. Transparent parts count as black; where all that is opaque has one colour, it is the "
        "mask."
    ),
]
Strip = Annotated[
    bool, typer.Option(help="Leave out what the picture carries (EXIF, dpi, texts); its colour profile is kept.")
]
JsonReport = Annotated[bool, typer.Option("--json", help="Print a JSON report on standard output.")]
NEGATIVE = "Negative prompt, in place of the learned unconditional features."
PER_SCALE = "one number, one a scale (3,3,2,1), or from the first to the last (3:1)."


Weights = Annotated[
    Optional[str],
    typer.Option(
        help=f"Published weights that varedit get put here, in place of naming files: {', '.join(SETS)}.",
    ),
]
Precision = Annotated[
    Optional[str],
    typer.Option(
        help=f"Which of the --weights that are here: {', '.join(PRECISIONS)}.",
        show_default=f"{PRECISION}, else the one with most bits",
    ),
]
TextPrecision = Annotated[
    Optional[str],
    typer.Option(
        help="The same of their text encoder.", show_default=f"{PRECISION}, or what varedit get took beside them"
    ),
]


@dataclass(frozen=True)
class Files:
    """The model of a command, and how it is loaded."""

    model: Annotated[
        Optional[Path],
        typer.Option(help="Transformer: .safetensors, .pth or a sharded folder; by default the demo model."),
    ] = None
    vae: Annotated[Optional[Path], typer.Option(help="VAE; by default the model file, where it holds both.")] = None
    text_encoder: Annotated[Optional[Path], typer.Option(help="T5 encoder: a Hugging Face folder or one file.")] = None
    kind: Kind = KINDS[0]
    lora: Annotated[
        Optional[list[str]], typer.Option(help="FILE[:STRENGTH], a LoRA to apply; may be given several times.")
    ] = None
    tokenizer: Annotated[
        Optional[Path], typer.Option(help="Folder or file of the text encoder's tokenizer, if not with its weights.")
    ] = None
    device: Device = None
    dtype: Dtype = None
    linears: Annotated[
        str,
        typer.Option(help="Of the transformer's blocks: exact, or 8-bit (half the memory, faster, an approximation)."),
    ] = LINEARS[0]
    weights: Weights = None
    precision: Precision = None
    text_precision: TextPrecision = None
    text_cache: Annotated[
        Optional[Path],
        typer.Option(
            help="Folder that keeps text features: of a text that was encoded before, the text encoder is not loaded."
        ),
    ] = None

    def checked(self, demo: bool = True) -> Files:
        """The same, with the files of --weights named. ValueError where options do not belong together, are unknown, or
        name weights that are not here; before anything is loaded. demo: whether the demo model is taken whole or not at
        all."""
        if self.weights is None and (self.precision or self.text_precision):
            raise ValueError(
                "--precision and --text-precision choose among files of --weights; add that, or leave them out"
            )
        if self.weights is None:
            self._check(demo)
            return self
        if any((self.model, self.vae, self.text_encoder, self.tokenizer)):
            raise ValueError(
                "--weights names all files of a model; leave out --model, --vae, --text-encoder and --tokenizer"
            )
        self._check(False)
        model, vae, text_encoder = find(self.weights, self.precision, self.text_precision)
        return replace(self, model=model, vae=vae, text_encoder=text_encoder)

    def _check(self, demo: bool) -> None:
        """Raise where options that name files do not belong together, and for unknown choices."""
        if demo and self.model is None and any((self.vae, self.text_encoder, self.tokenizer)):
            raise ValueError("--vae, --text-encoder and --tokenizer belong to a model of yours; name it with --model")
        if self.tokenizer and not self.text_encoder:
            raise ValueError("--tokenizer is that of a --text-encoder; name that too, or leave --tokenizer out")
        if self.dtype:
            choice(self.dtype, DTYPES, "dtype")
        check_linears(self.linears)
        if self.text_cache and self.text_cache.exists() and not self.text_cache.is_dir():
            raise ValueError(f"--text-cache {self.text_cache} is a file; name a folder, which may be new")

    def paths(self, words: str = "an instruction") -> tuple[Path, Path, Path | None]:
        """Transformer, VAE and text encoder, the demo model's without a model. words: what there is to encode, empty
        for nothing. ValueError where a text encoder is missing, or has nothing to do."""
        if self.text_cache and not words:
            raise ValueError("--text-cache has no text to keep the features of; leave it out")
        if self.model is None:
            return demo_files()
        if words and self.text_encoder is None:
            raise ValueError(f"{words} needs --text-encoder")
        if self.text_encoder and not (words or self.weights):
            raise ValueError("--text-encoder has nothing to read beside --features; leave it out")
        return self.model, self.vae or self.model, self.text_encoder if words else None

    def read(self, paths: Sequence[Path | None]) -> list[Path | None]:
        """All files that are read, and that no result may replace. paths: of `paths`."""
        return [*paths, self.tokenizer, *(lora_and_strength(text)[0] for text in self.lora or ())]

    def load(self, paths: Sequence[Path | None], loras: Sequence[tuple[Path, float]]) -> Editor:
        """The editor, LoRAs applied before linear layers are rounded to 8 bits."""
        number = DTYPES[self.dtype] if self.dtype else None
        linears = LINEARS[0] if loras else self.linears
        editor = Editor.load(*paths, self.tokenizer, self.device, number, linears, self.kind, self.text_cache)
        for file, strength in loras:
            changed = apply_lora(editor.transformer, file, strength)
            console.print(f"{file}: {changed} layers changed at a strength of {strength:g}", soft_wrap=True)
        if self.linears == "8-bit":
            eight_bit(editor.transformer)
        return editor


@dataclass(frozen=True)
class Draw:
    """How the bits are drawn."""

    guidance: Annotated[
        Optional[str],
        typer.Option(
            help=f"Classifier-free guidance; {PER_SCALE}",
            show_default=f"{DEFAULT_SETTINGS.guidance:g}; {DEMO_GUIDANCE:g} for the demo model",
        ),
    ] = None
    temperature: Annotated[str, typer.Option(help=f"Temperature; 0 is greedy; {PER_SCALE}")] = (
        f"{DEFAULT_SETTINGS.temperature:g}"
    )
    top_p: Annotated[str, typer.Option(help="Drop bit values of probability <= 1 - top_p.")] = (
        f"{DEFAULT_SETTINGS.top_p:g}"
    )
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = DEFAULT_SETTINGS.seed

    def settings(self, model: Path | None) -> SamplingSettings:
        """As the library takes them. model: None for the demo model, which has a default guidance of its own."""
        guidance = (
            MadeFor.of(model).settings.guidance if self.guidance is None else per_scale(self.guidance, "guidance")
        )
        warmth, top_p = per_scale(self.temperature, "temperature"), per_scale(self.top_p, "top_p")
        return SamplingSettings(guidance, warmth, top_p, self.seed)

    def set(self, name: str) -> bool:
        """Whether an option is not at its default."""
        return getattr(self, name) != getattr(type(self), name)

    def check(self, settings: SamplingSettings, scales: int) -> None:
        """Raise ValueError where a list has not one number a scale, and for a --top-p that does nothing."""
        if self.set("top_p") and not any(temperature for _, temperature, _ in settings.per_scale(scales)):
            raise ValueError(
                "--top-p counts only where temperature is above 0; raise --temperature, or leave --top-p out"
            )
        settings.per_scale(scales)


@dataclass(frozen=True)
class Words:
    """What the bits are drawn of, beside the instruction."""

    negative: Annotated[str, typer.Option(help=NEGATIVE)] = NEGATIVE_PROMPT
    preset: Annotated[str, typer.Option(help=knob("curves", "preset").option)] = PRESET

    def bent(self, settings: SamplingSettings, scales: int) -> SamplingSettings:
        """The settings with the preset's curves over them. ValueError where it has nothing to bend."""
        bent = settings.preset(self.preset)
        if self.preset != PRESET and bent.per_scale(scales) == settings.per_scale(scales):
            raise ValueError(
                f"--preset {self.preset} bends guidance above 1 and temperature above 0, and here is neither; raise "
                "one of them, or leave --preset out"
            )
        return bent


@dataclass(frozen=True)
class Begun:
    """The first scales of an edit that was begun before."""

    begun: Annotated[
        Optional[Path],
        typer.Option(help="Tokens of the first scales of this edit, to finish it; with --variations, to branch off."),
    ] = None
    from_scale: Annotated[
        int, typer.Option(min=0, help="Draw from this scale on; of --begun only the earlier ones are kept.")
    ] = 0

    def tokens(self) -> Tokens | None:
        """Those before `from_scale`, all by default. ValueError where the options do not go together."""
        file, scale = self.begun, self.from_scale
        if file is None:
            if scale:
                raise ValueError("--from-scale counts scales of an edit that was begun; name its tokens with --begun")
            return None
        tokens = Tokens.load(file)
        last = min(len(tokens) + 1, len(tokens.schedule))
        if (scale or len(tokens) + 1) not in range(2, last + 1):
            was = f"--from-scale {scale}" if scale else "the whole edit"
            raise ValueError(
                f"{file} has tokens of {len(tokens)} scales: give --from-scale from 2 to {last}, not {was}"
            )
        return tokens.first(scale - 1) if scale else tokens


@dataclass(frozen=True)
class Canvas:
    """The size at which the model works."""

    size: Annotated[
        Optional[str],
        typer.Option(help=f"Working size: {', '.join(SIZES)}.", show_default=f"the weights' own, else {SIZE}"),
    ] = None
    fit: Annotated[
        Optional[str],
        typer.Option(help=f"{FITS_HELP[0].upper()}{FITS_HELP[1:]}.", show_default=FIT),
    ] = None

    def area(self, model: Path | None) -> str:
        """The size as one of AREAS. model: None for the demo model."""
        return area_of(self.size, model)

    @property
    def method(self) -> str:
        return choice(self.fit or FIT, {fit: fit for fit in FITS}, "fit")


def area_of(size: str | None, model: Path | None) -> str:
    """A size as one of AREAS; by default the one that a model was made for."""
    return choice(size or MadeFor.of(model).size, SIZES, "size")


def per_scale(text: str, name: str) -> list[float] | Curve:
    """One number, several with commas between them, or two with a colon, from the first to the last scale. BadParameter
    for anything else. name: of the setting."""
    try:
        first, colon, last = text.partition(":")
        return Curve(float(first), float(last)) if colon else [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{spelled(name)} {text!r} is neither a number, nor one a scale (3,3,2,1), nor the first and the last "
            "scale's (3:1)"
        ) from None


def check_strip(source: SourceImage | None, strip: bool) -> None:
    """ValueError where there is nothing that could be left out. source: None for tokens and for texts alone."""
    if strip and source is None:
        raise ValueError("--strip leaves out what a picture carries, and here is none; leave it out")


def carried(source: SourceImage | None, strip: bool) -> tuple[bytes | None, Details]:
    """What results carry of their picture: its colour profile and, unless stripped, its details."""
    return source and source.icc_profile, NO_DETAILS if source is None or strip else source.details


def tell_lost(tokens: Tokens, advice: str) -> None:
    """Say what tokens do not hold of their picture. advice: how to have it again."""
    if tokens.without:
        console.print(
            f"the picture had more than its tokens hold ({', '.join(tokens.without)}), and the result is without it; "
            f"{advice}",
            soft_wrap=True,
        )


def numbered(path: Path, count: int) -> list[Path]:
    """Names of so many results: the path itself for one, STEM-1 and so on for several."""
    return [path.with_stem(f"{path.stem}-{n + 1}") for n in range(count)] if count > 1 else [path]


def knob_options(kind: type, group: str, but: Callable[[Knob], bool] = lambda knob: False) -> type:
    """A class of options with a field for each knob of a group; `values` makes `kind` of them. but: knobs to leave
    out."""
    own = [knob for knob in knobs(group) if not but(knob)]
    made = [
        (
            knob.name,
            Annotated[type(knob.default), typer.Option(help=knob.option or knob.help)],
            field(default=knob.default),
        )
        for knob in own
    ]
    values = {"values": lambda self: kind(**vars(self)), "__module__": __name__}
    return make_dataclass(f"{kind.__name__}Options", made, frozen=True, namespace=values)


ControlOptions = knob_options(Controls, "controls")
ShortcutOptions = knob_options(Shortcuts, "shortcuts")


def command(function: Callable) -> Callable:
    """A command of which every parameter that is a dataclass of options becomes these options."""
    hints, parts, made = get_type_hints(function, include_extras=True), {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if not is_dataclass(kind):
            made.append(parameter.replace(annotation=kind))
            continue
        own = get_type_hints(kind, include_extras=True)
        parts[name] = kind, [field.name for field in fields(kind)]
        made += [
            parameter.replace(name=field.name, default=field.default, annotation=own[field.name])
            for field in fields(kind)
        ]

    @wraps(function)
    def run(**given) -> None:
        for name, (kind, names) in parts.items():
            given[name] = kind(**{field: given.pop(field) for field in names})
        return function(**given)

    run.__signature__ = inspect.Signature(made)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in made}
    return run


def spelled(name: str) -> str:
    """A knob's name as an option."""
    return "--" + name.replace("_", "-")


def complain(edit: Known) -> None:
    """Raise ValueError, in one sentence each, for options that do not go together, and then for ones that would do
    nothing or more than there is."""
    named = replace(edit, spelled=spelled)
    check(named)
    if found := problems(named):
        raise ValueError("; ".join(found))


def choice(text: str, table: dict[str, Any], name: str) -> Any:
    """The table's entry of that name. BadParameter, with the known names, where there is none."""
    if text not in table:
        raise typer.BadParameter(f"unknown {name} {text!r}; choose one of {', '.join(table)}")
    return table[text]


def mask_in(text: str) -> int | None:
    """Where the @ before the mask of a region stands: the first behind which a file is named."""
    places = (place for place, letter in enumerate(text) if letter == "@")
    return next((place for place in places if _exists(text[place + 1 :])), None)


def region_masks(texts: Sequence[str] | None) -> list[Path]:
    """The files that regions name."""
    return [Path(text[cut + 1 :]) for text in texts or () if (cut := mask_in(text)) is not None]


def region_of(text: str) -> Region:
    """INSTRUCTION@MASK of --region. Either may have an @: the longest file that exists behind one is the mask.
    ValueError where there is none, but what is behind the last @ looks like the name of one."""
    cut, last = mask_in(text), text.rpartition("@")[2] if "@" in text else ""
    if cut is None and Path(last).suffix.lower() in SUFFIXES:
        raise ValueError(
            f"there is no mask at {last}; write INSTRUCTION@MASK, what to change and the file that says where"
        )
    words = text if cut is None else text[:cut]
    if not words.strip():
        raise ValueError(f"the region {text!r} has no instruction; write INSTRUCTION@MASK, what to change and where")
    return Region(words.strip(), None if cut is None else load_mask(text[cut + 1 :]))


def _exists(name: str) -> bool:
    """Whether there is something of a name; not where it can be no name."""
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):
        return False


def check_words(text: str, what: str = "instruction") -> None:
    """Raise ValueError for words that are blank, or the name of a file: a second picture that was taken for one."""
    if not text.strip():
        raise ValueError(f"the {what} is empty; say what to change in the picture")
    if _exists(text) and Path(text).is_file():
        raise ValueError(
            f"the {what} {text!r} is the name of a file; give one picture, then what to change, in words (in quotes)"
        )


def check_scales(model: Path, scales: int) -> None:
    """Raise ValueError, before anything is loaded, for a file that is no transformer, or not for so many scales."""
    if not model.exists():  # which loading says
        return
    levels = canonical(open_weights(model), TRANSFORMER).shapes.get("lvl_embed.weight")
    if levels:
        checks.check_scales(scales, levels[0])


def checked_loras(model: Path, texts: list[str] | None) -> list[tuple[Path, float]]:
    """The LoRAs of --lora with their strengths, known to fit the transformer's file."""
    loras = [lora_and_strength(text) for text in texts or []]
    for file, strength in loras:
        check_lora(model, file, strength)
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


@contextmanager
def watching() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar as a function of what is done, how much of it, and how much there is."""
    with progress() as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
