"""The sets of published weights that `varedit get` knows: what their parts are, and where each is published.

It holds names only. Sizes, checksums, revisions and licences are asked of the hub (see `remote`).
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ..cards import share
from ..defaults import EDIT, PUBLISHED_VAES, TEXT_TO_IMAGE
from ..files.checkpoints import TEXT_ENCODER, TOKENIZER, TRANSFORMER
from ..files.convert import PRECISIONS

PRECISION = "bf16"
FOLDERS = {TRANSFORMER: "diffusion_models", TOKENIZER: "vae", TEXT_ENCODER: "text_encoders"}
"""Where ComfyUI looks for each part, below its folder `models`."""


@dataclass(frozen=True)
class Part:
    """A published transformer, VAE or text encoder.

    name: what our files begin with. what: a key of FOLDERS. repo: OWNER/NAME at the hub. source: the file in it, a
    folder, or "" for the whole repository. patterns: of the files that are fetched; each has to match one. beside:
    those of them that stay beside the converted weights. kept: the share of the numbers that a conversion keeps. kind:
    what a transformer was trained for. sizes: its size and area, as `cards.choose` takes them.
    """

    name: str
    what: str
    repo: str
    source: str
    patterns: tuple[str, ...]
    beside: tuple[str, ...] = ()
    kept: float = 1.0
    kind: str = "auto"
    sizes: tuple[str, str] | None = None

    def wanted(self, files: list[str]) -> tuple[list[str], list[str]]:
        """Of a repository's files those that are fetched, and the patterns that none matches."""
        matches = {one: [name for name in files if _matches(name, one)] for one in self.patterns}
        found = {name for names in matches.values() for name in names}
        return [name for name in files if name in found], [one for one, names in matches.items() if not names]

    def precision(self, asked: str) -> str:
        """In which precision it is kept: a VAE always in fp32."""
        return PRECISIONS[0] if self.what == TOKENIZER else asked

    def stem(self, precision: str) -> str:
        """The name of its converted file, without its ending."""
        return f"{self.name}-{precision}"

    def estimate(self, original: int, precision: str) -> int:
        """About how many bytes it takes in a precision. original: bytes as published."""
        return round(original * self.kept * share(self.what, precision))


def _matches(name: str, pattern: str) -> bool:
    """Whether a file of a repository is meant: one of the pattern's folder, not of folders in it."""
    return fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")


def _file(name: str, what: str, repo: str, source: str, kind: str = "auto", sizes: tuple | None = None) -> Part:
    return Part(name, what, repo, source, (source,), kind=kind, sizes=sizes)


_VAREDIT, _INFINITY = "HiDream-ai/VAREdit", "FoundationVision/infinity"
_VAE_8B, _VAE_2B = (
    _file(file.removesuffix(".pth"), TOKENIZER, _INFINITY, file) for file in map(PUBLISHED_VAES.get, ("8B", "2B"))
)
_WORDS = ("config.json", "tokenizer.json", "spiece.model")
_TEXT = Part(
    "flan-t5-xl", TEXT_ENCODER, "google/flan-t5-xl", "",
    ("model*.safetensors", "model.safetensors.index.json", *_WORDS), _WORDS, kept=0.5,  # without its decoder
)  # fmt: skip
_INFINITY_8B = Part(
    "infinity_8b",
    TRANSFORMER,
    _INFINITY,
    "infinity_8b_weights",
    ("infinity_8b_weights/*",),
    kind=TEXT_TO_IMAGE,
    sizes=("8B", "1M"),
)

SETS: dict[str, tuple[Part, Part, Part]] = {
    "8B-512": (_file("8B-512", TRANSFORMER, _VAREDIT, "8B-512.pth", EDIT, ("8B", "0.25M")), _VAE_8B, _TEXT),
    "8B-1024": (_file("8B-1024", TRANSFORMER, _VAREDIT, "8B-1024.pth", EDIT, ("8B", "1M")), _VAE_8B, _TEXT),
    "2B-512": (_file("2B-512", TRANSFORMER, _VAREDIT, "2B-512.pth", EDIT, ("2B", "0.25M")), _VAE_2B, _TEXT),
    "infinity-2b": (
        _file("infinity_2b_reg", TRANSFORMER, _INFINITY, "infinity_2b_reg.pth", TEXT_TO_IMAGE, ("2B", "1M")), _VAE_2B,
        _TEXT,
    ),
    "infinity-8b": (_INFINITY_8B, _VAE_8B, _TEXT),
}  # fmt: skip
"""Name -> transformer, VAE and text encoder."""


def parts_of(name: str) -> tuple[Part, Part, Part]:
    """Transformer, VAE and text encoder of a set. ValueError, with a name that is like it, where there is no such
    set."""
    if name in SETS:
        return SETS[name]
    lower = {known.lower(): known for known in SETS}
    near = get_close_matches(name.lower(), lower, 1)
    guess = f"write {lower[near[0]]}" if near else "choose another"
    raise ValueError(f"there are no weights {name!r}, but {', '.join(SETS)}; {guess}")


def check_precision(precision: str | None) -> None:
    """ValueError for a name that is none of PRECISIONS."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
