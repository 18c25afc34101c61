"""Text features: a T5 encoder and its tokenizer (flan-t5-xl for the published models).

Prompts in, one [tokens, channels] feature tensor a prompt out; padding is never made. The network is in `t5`; here
are its files: a Hugging Face folder, or one file with the tokenizer beside it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..defaults import TEXT_TOKENS
from ..files.checkpoints import TEXT_ENCODER, check, expected, has_encoder, placed, select
from ..files.quantised import store
from ..files.reading import read_json
from ..files.shapes import checked
from ..files.weights import WeightError, Weights, open_weights
from ..runtime.graphs import Recorder
from ..runtime.layers import Operations
from ..runtime.memory import nbytes, with_room
from ..runtime.unfilled import Unfilled
from .t5 import T5Config, T5Encoder, layers_of
from .tokenizers import load_tokenizer

logger = logging.getLogger(__name__)

UNKNOWN = 2
"""T5's token for what its vocabulary lacks, such as Chinese."""
RECORDED_STEP = 16
"""Prompts are recorded in lengths that are multiples of it (CUDA only)."""
_ORDER = re.compile(
    r"\([^()]*:\s*[0-9.]+\)|<(?:lora|lyco|hypernet):[^>]*>|\bembedding:\S+|\{[^{}]*\|[^{}]*\}|__\w+__|\bBREAK\b"
)
_TABLE = "encoder.embed_tokens.weight"  # where some files have shared.weight
_BLOCKS = "encoder.block."


@dataclass(frozen=True)
class Prompts:
    """How prompts become token ids. tokenize: prompt -> token ids, the end token included. vocabulary: how many the
    encoder knows."""

    tokenize: Callable[[str], list[int]]
    vocabulary: int

    def ids(self, prompt: str, most: int = TEXT_TOKENS) -> list[int]:
        """Token ids of a prompt, cut to 512 with the end token kept; a cut, and text that is not understood, are logged
        as warnings. most: what the transformer takes. ValueError where it takes less."""
        ids, count = cut_ids(self.tokenize(prompt))
        if not ids or max(ids) >= self.vocabulary:
            raise ValueError(
                f"the tokenizer makes {max(ids, default='no tokens')} of the text where the text encoder knows the "
                f"tokens 0 to {self.vocabulary - 1}; choose the tokenizer of this text encoder"
            )
        if count > most and most < TEXT_TOKENS:
            raise ValueError(f"the instruction has {count} text tokens but the model takes {most}; shorten it")
        for sentence in unread(prompt, ids, count):
            logger.warning(sentence)
        return ids

    def read(self, prompts: Sequence[str], most: int = TEXT_TOKENS) -> list[list[int]]:
        """The ids of every prompt. ValueError for an empty prompt, one that cannot be a text, and as `ids`."""
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("the instruction is empty; say what to change in the picture")
            check_letters(prompt)
        return [self.ids(prompt, most) for prompt in prompts]


class TextEncoder:
    """A T5 encoder with its tokenizer. tokenize: see `Prompts`."""

    def __init__(
        self, model: T5Encoder, tokenize: Callable[[str], list[int]], device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.tokenize, self.device = model, tokenize, torch.device(device)
        self._recorded = Recorder(model, lambda ids, real: model(ids, real).float())

    @property
    def networks(self) -> tuple[T5Encoder, ...]:
        """What lies on the device."""
        return (self.model,)

    @property
    def prompts(self) -> Prompts:
        return Prompts(self.tokenize, self.model.config.vocabulary)

    def ids(self, prompt: str, most: int = TEXT_TOKENS) -> list[int]:
        """See `Prompts.ids`."""
        return self.prompts.ids(prompt, most)

    def encode(self, prompts: Sequence[str], most: int = TEXT_TOKENS) -> list[Tensor]:
        """Last hidden state [L_i, channels] (fp32) of every prompt, each run alone on its real tokens. ValueError as
        `Prompts.read`."""
        return [self.of_ids(ids) for ids in self.prompts.read(prompts, most)]

    @torch.no_grad()
    def of_ids(self, ids: list[int]) -> Tensor:
        """The same of token ids."""
        if self.device.type != "cuda":
            return self.model(torch.tensor([ids], device=self.device))[0].float()
        # Its many small kernels wait for their launches: recorded, with lengths rounded up so that few are recorded.
        more = -len(ids) % RECORDED_STEP
        given = torch.tensor([ids + [0] * more, [1] * len(ids) + [0] * more], pin_memory=True)
        return self._recorded(*given.to(self.device, non_blocking=True).split(1))[0, : len(ids)]

    def forget(self) -> None:
        """Give back what recorded passes hold."""
        self._recorded.forget()


def check_letters(prompt: str) -> None:
    """ValueError for what can be no text."""
    if not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError("the instruction has letters that are no text (half of a pair); type it again")


def cut_ids(ids: list[int]) -> tuple[list[int], int]:
    """Token ids, cut to 512 with the end token kept, and how many there were."""
    return (ids if len(ids) <= TEXT_TOKENS else [*ids[: TEXT_TOKENS - 1], ids[-1]]), len(ids)


def unread(text: str, ids: Sequence[int], count: int) -> list[str]:
    """Sentences for what is not read of a text: ids behind the most, where a third or more are unknown, and signs that
    other programs take as orders. ids: cut; count: how many there were."""
    found, unknown = [], sum(number == UNKNOWN for number in ids)
    if count > TEXT_TOKENS:
        found.append(f"the text has {count} tokens; at most the first {TEXT_TOKENS} are used")
    if unknown and 3 * unknown >= len(ids) - 1:
        found.append(f"{unknown} of the text's {len(ids) - 1} tokens are unknown to the text encoder; write English")
    if order := _ORDER.search(text):
        found.append(
            f"{order[0]!r} is read as plain words; weights, choices, LoRAs and embeddings do nothing in a text"
        )
    return found


def load_text_encoder(
    path: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device="cpu",
    operations=Operations,
) -> TextEncoder:
    """Load a T5 encoder from a Hugging Face folder or a single file.

    tokenizer: folder or file with `tokenizer.json` or `spiece.model`; by default it is looked for with the
    weights. It goes to the CPU, in fp32, where a CUDA device has no room for it. Raises WeightError; never loads a
    part.
    """
    weights = encoder_weights(open_weights(path, has_encoder))
    tokenize = load_tokenizer(tokenizer or path)
    model = blank_encoder(Path(path), weights, operations, dtype)
    if (here := with_room(device, nbytes(model), "the text encoder")) != torch.device(device):
        device, model = here, blank_encoder(Path(path), weights, operations)  # its own type there
    model.load_state_dict(dict(placed(expected(model), _own(weights, expected(model)), device)), assign=True)
    return TextEncoder(model.eval().requires_grad_(False), tokenize, device)


def encoder_weights(weights: Weights) -> Weights:
    """A T5 encoder's tensors under our keys. WeightError where the file is something else."""
    weights = select(weights, TEXT_ENCODER)
    if "block.0.layer.0.SelfAttention.q.weight" in weights:
        weights = weights.renamed({(key if key == "shared.weight" else f"encoder.{key}"): key for key in weights})
    if "shared.weight" not in weights and _TABLE in weights:
        weights = weights.renamed({("shared.weight" if key == _TABLE else key): key for key in weights})
    return weights


def blank_encoder(path: Path, weights: Weights, operations=Operations, dtype: torch.dtype = torch.float32) -> T5Encoder:
    """The encoder that a file's weights belong to, on the meta device. WeightError where they are not those of one."""
    with Unfilled():
        model = T5Encoder(encoder_config(path, weights), operations, dtype, device="meta")
    check_encoder(weights, expected(model))
    store(model, _own(weights, expected(model)))
    return model


def check_encoder(weights: Weights, wanted: dict[str, Tensor]) -> None:
    """Raise WeightError unless the file has what an encoder wants, and no more layers.

    A whole T5 has a decoder too, and the table of its tokens a second time.
    """
    layers = layers_of(wanted)
    if layers_of(weights) > layers:
        raise WeightError(
            f"{weights.path} has {layers_of(weights)} layers where its configuration names {layers}; correct or "
            "download the configuration again"
        )
    check(_own(weights, wanted), {key: tensor.shape for key, tensor in wanted.items()})


def _own(weights: Weights, wanted: dict[str, Tensor]) -> Weights:
    """The tensors of an encoder, and what stands beside them."""
    return weights.renamed({key: key for key in weights if key in wanted or key.startswith(_BLOCKS)})


def encoder_config(path: Path, weights: Weights) -> T5Config:
    """The configuration of a folder of one model, else what the shapes say."""
    file = path / "config.json"
    if file.exists():
        values = read_json(file, "T5 configuration", WeightError)
        try:
            if not isinstance(values, dict):
                raise ValueError("it is no list of settings")
            config = T5Config.from_json(values)
            checked(vars(config))
            return config
        except (KeyError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise WeightError(f"{file} is not a readable T5 configuration: {reason}; download it again") from error
    try:
        config = T5Config.from_shapes(weights.shapes)
        checked(vars(config))
        return config
    except (KeyError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"is not usable: {error}"
        raise WeightError(f"{weights.path} {reason}; it is incomplete, so nothing was loaded") from error
