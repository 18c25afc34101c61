"""Text features: a T5 encoder and its tokenizer (flan-t5-xl for the published models).

Prompts in, one [tokens, channels] feature tensor a prompt out; padding is never made. The network is in `t5`; here
are its files: a Hugging Face folder, or one file with the tokenizer beside it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..defaults import TEXT_TOKENS
from ..files.checkpoints import TEXT_ENCODER, check, expected, select
from ..files.weights import WeightError, Weights, open_weights
from ..runtime.graphs import Recorder
from ..runtime.layers import Operations
from ..runtime.unfilled import Unfilled
from .t5 import T5Config, T5Encoder

logger = logging.getLogger(__name__)

END = 1
"""T5's end token."""
RECORDED_STEP = 16
"""Prompts are recorded in lengths that are multiples of it (CUDA only)."""
_TABLE = "encoder.embed_tokens.weight"  # where some files have shared.weight


class TextEncoder:
    """A T5 encoder with its tokenizer. tokenize: prompt -> token ids, the end token included."""

    def __init__(
        self, model: T5Encoder, tokenize: Callable[[str], list[int]], device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.tokenize, self.device = model, tokenize, torch.device(device)
        self._recorded = Recorder(model, lambda ids, real: model(ids, real).float())

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, cut to 512 with the end token kept; a cut is logged as a warning."""
        ids, count = cut_ids(self.tokenize(prompt))
        if count > TEXT_TOKENS:
            logger.warning("the instruction has %d tokens; only the first %d are used", count, TEXT_TOKENS)
        return ids

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Last hidden state [L_i, channels] (fp32) of every prompt, each run alone on its real tokens.

        ValueError for an empty prompt.
        """
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("the instruction is empty; say what to change in the picture")
        return [self._encode(self.ids(prompt)) for prompt in prompts]

    def _encode(self, ids: list[int]) -> Tensor:
        if self.device.type != "cuda":
            return self.model(torch.tensor([ids], device=self.device))[0].float()
        # Its many small kernels wait for their launches: recorded, with lengths rounded up so that few are recorded.
        more = -len(ids) % RECORDED_STEP
        given = torch.tensor([ids + [0] * more, [1] * len(ids) + [0] * more], pin_memory=True)
        return self._recorded(*given.to(self.device, non_blocking=True).split(1))[0, : len(ids)]

    def forget(self) -> None:
        """Give back what recorded passes hold."""
        self._recorded.forget()


def cut_ids(ids: list[int]) -> tuple[list[int], int]:
    """Token ids, cut to 512 with the end token kept, and how many there were."""
    return (ids if len(ids) <= TEXT_TOKENS else [*ids[: TEXT_TOKENS - 1], ids[-1]]), len(ids)


def load_text_encoder(
    path: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device="cpu",
    operations=Operations,
) -> TextEncoder:
    """Load a T5 encoder from a Hugging Face folder or a single file.

    tokenizer: folder or file with `tokenizer.json` or `spiece.model`; by default it is looked for with the
    weights. Raises WeightError; never loads a part.
    """
    weights = encoder_weights(open_weights(path))
    tokenize = load_tokenizer(tokenizer or path)
    with Unfilled():
        model = T5Encoder(encoder_config(Path(path), weights), operations, dtype, device="meta")
    wanted = expected(model)
    check_encoder(weights, wanted)
    state = {key: _read(weights, key).to(device, tensor.dtype) for key, tensor in wanted.items()}
    model.load_state_dict(state, assign=True)
    return TextEncoder(model.eval().requires_grad_(False), tokenize, device)


def encoder_weights(weights: Weights) -> Weights:
    """A T5 encoder's tensors under our keys. WeightError where the file is something else."""
    weights = select(weights, TEXT_ENCODER)
    if "block.0.layer.0.SelfAttention.q.weight" in weights:
        weights = weights.renamed({(key if key == "shared.weight" else f"encoder.{key}"): key for key in weights})
    if "shared.weight" not in weights and _TABLE in weights:
        weights = weights.renamed({("shared.weight" if key == _TABLE else key): key for key in weights})
    return weights


def check_encoder(weights: Weights, wanted: dict[str, Tensor]) -> None:
    """Raise WeightError unless the file has what an encoder wants.

    A whole T5 has a decoder too, and the table of its tokens a second time.
    """
    check(weights.renamed({key: key for key in wanted if key in weights}), {key: t.shape for key, t in wanted.items()})


def _read(weights: Weights, key: str) -> Tensor:
    """A tensor, brought back from 8 bits where it has a scale."""
    scale = f"{key}_scale"
    return weights[key].float() * weights[scale] if scale in weights else weights[key]


def load_tokenizer(path: str | Path) -> Callable[[str], list[int]]:
    """Prompt -> ids from `tokenizer.json` or `spiece.model` (the file itself, its folder, or beside a file)."""
    path = Path(path)
    if not path.exists():
        raise WeightError(f"there is no tokenizer at {path}; check the path")
    folder = path if path.is_dir() else path.parent
    for file in (path, folder / "tokenizer.json", folder / "spiece.model"):
        if file.is_file() and file.name.endswith("tokenizer.json"):
            from tokenizers import Tokenizer

            try:
                tokenizer = Tokenizer.from_file(str(file))
            except Exception as error:  # tokenizers raises nothing narrower
                raise WeightError(f"{file} is not a readable tokenizer; download it again") from error
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return lambda prompt: tokenizer.encode(prompt).ids
        if file.is_file() and file.suffix == ".model":
            from sentencepiece import SentencePieceProcessor

            try:
                pieces = SentencePieceProcessor(model_file=str(file))
            except RuntimeError as error:
                raise WeightError(f"{file} is not a readable tokenizer; download it again") from error
            return lambda prompt: [*pieces.encode(prompt), END]
    raise WeightError(
        f"no tokenizer.json or spiece.model in {folder}; copy one from the text encoder's repository or name it with "
        "the tokenizer option"
    )


def encoder_config(path: Path, weights: Weights) -> T5Config:
    """The configuration of a folder of one model, else what the shapes say."""
    file = path / "config.json"
    if file.is_file():
        try:
            return T5Config.from_json(json.loads(file.read_text()))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise WeightError(f"{file} is not a readable T5 configuration: {reason}; download it again") from error
    try:
        return T5Config.from_shapes(weights.shapes)
    except (KeyError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"is not usable: {error}"
        raise WeightError(f"{weights.path} {reason}; it is incomplete, so nothing was loaded") from error
