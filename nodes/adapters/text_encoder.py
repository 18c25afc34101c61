"""A T5 encoder as ComfyUI's CLIP: the stock CLIPTextEncode, LoRA and device nodes take it.

ComfyUI's own loader takes flan-t5-xl for another model of that size, with another tokenizer; hence this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import comfy.model_management as mm
import comfy.sd
import comfy.text_encoders
import torch
from torch import Tensor, nn

from ...varedit_core.defaults import TEXT_TOKENS
from ...varedit_core.files.weights import PICKLED, SAFETENSORS, WeightError, Weights
from ...varedit_core.runtime.unfilled import Unfilled
from ...varedit_core.text.encoder import check_encoder, cut_ids, encoder_config, encoder_weights, load_tokenizer
from ...varedit_core.text.t5 import T5Config, T5Encoder
from .state import Layers, fill, is_quantised, open_file, parameters, parts_of, plain

KEY = "varedit_t5"
MARK = "varedit_text"
"""In a conditioning's settings: the channels of features that come from here."""
FLAN_VOCABULARY = 32128
UNKNOWN = 2
"""T5's token for what its vocabulary lacks, such as Chinese."""


class Tokenizer:
    """What a CLIP asks of its tokenizer: text -> ids of one prompt, without weights or padding."""

    def __init__(self, tokenize: Callable[[str], list[int]], embedding_directory=None, tokenizer_data=None) -> None:
        self.tokenize = tokenize

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kw) -> dict:
        ids, _ = cut_ids(self.tokenize(text))
        return {KEY: [[(number, 1.0, 0) if return_word_ids else (number, 1.0) for number in ids]]}

    def untokenize(self, tokens):
        return [(token, str(token[0])) for token in tokens]

    def state_dict(self) -> dict:
        return {}


class TextModel(nn.Module):
    """What a CLIP's patcher wraps."""

    def __init__(
        self, config: T5Config, special: bool, dtype: torch.dtype, device, model_options: dict | None = None
    ) -> None:
        super().__init__()
        self.stored, self.dtypes = dtype, {dtype}
        load_device = mm.text_encoder_device()
        computed = dtype if dtype == torch.bfloat16 else torch.float16
        if mm.is_device_cpu(load_device) or dtype == torch.float32:
            computed = torch.float32
        layers = Layers(dtype, computed, load_device, special)
        self.transformer = T5Encoder(config, layers, computed, device)
        self.execution_device = None

    def set_clip_options(self, options: dict) -> None:
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self) -> None:
        self.execution_device = None

    def memory_estimation_function(self, tokens: dict, device=None) -> int:
        """Bytes for one prompt: a few copies of its features and scores in fp32."""
        config, count = self.transformer.config, len(tokens[KEY][0])
        return 4 * count * (config.heads * count * 3 + config.hidden * 4 + config.width * 8)

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, None, dict]:
        """Features [1, L, C] in fp32 on the device between nodes, no pooled ones, and where they come from."""
        if KEY not in tokens:
            raise ValueError("these tokens are not of VAREdit's text encoder; encode the text with the same clip")
        ids = torch.tensor([[token[0] for token in tokens[KEY][0]]], device=self.execution_device)
        features = self.transformer(ids).float().to(mm.intermediate_device())
        return features, None, {MARK: features.shape[-1]}

    def load_sd(self, weights: Weights) -> tuple[list, list]:
        """Called by CLIP, after it has set the flag that says whether ComfyUI streams weights."""
        fill(self.transformer, weights, self.stored, self.can_assign_sd)
        return [], []


def load_clip(path: Path, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """A T5 encoder's file as a CLIP. Raises ValueError for a file that is none or is not whole."""
    try:
        weights = encoder_weights(open_file(path))
        config = encoder_config(path.parent, weights) if _alone(path) else T5Config.from_shapes(weights.shapes)
        with Unfilled():
            kept = T5Encoder(config, device="meta").state_dict()
        check_encoder(weights, kept)
        tokenize = _tokenizer(path, config)
    except (WeightError, KeyError) as error:
        raise plain(error) from error
    beside = {key for key in weights if key not in kept and key.rpartition(".")[0] + ".weight" in kept}
    weights = weights.renamed({key: key for key in weights if key in kept or key in beside})

    class Target:
        params = {"config": config, "special": is_quantised(weights)}
        clip = TextModel
        tokenizer = partial(Tokenizer, tokenize)

    clip = comfy.sd.CLIP(Target, parameters=parameters(weights), state_dict=[weights], disable_dynamic=disable_dynamic)
    clip.patcher.cached_patcher_init = (_patcher, (path,))
    return clip


def _patcher(path: Path, disable_dynamic: bool = False):
    return load_clip(path, disable_dynamic).patcher


def _alone(path: Path) -> bool:
    """Whether a folder holds this model alone, so that its config.json and tokenizer are the model's."""
    files = {file.name for file in path.parent.iterdir() if file.suffix in SAFETENSORS | PICKLED}
    return files == {path.name} or files <= parts_of(path)


def _tokenizer(path: Path, config: T5Config) -> Callable[[str], list[int]]:
    """The tokenizer beside the file where the file is alone in its folder, else ComfyUI's T5 tokenizer."""
    if _alone(path) and any((path.parent / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        return load_tokenizer(path)
    if config.vocabulary != FLAN_VOCABULARY:
        raise WeightError(
            f"{path} has a vocabulary of {config.vocabulary} where flan-t5-xl has {FLAN_VOCABULARY}; put it into a "
            "folder of its own with its tokenizer.json"
        )
    return load_tokenizer(Path(comfy.text_encoders.__path__[0]) / "t5_tokenizer" / "tokenizer.json")


def checked_clip(clip) -> comfy.sd.CLIP:
    """A CLIP of ours. ValueError where it is another text encoder's."""
    network = getattr(clip, "cond_stage_model", None)
    if not isinstance(network, TextModel):
        raise ValueError(
            f"this clip is a {type(network).__name__}, not a T5 encoder of VAREdit; connect one from VAREdit Text "
            "Encoder Loader"
        )
    return clip


def encode(clip: comfy.sd.CLIP, text: str) -> tuple[list, str | None]:
    """Conditioning of a text, and a sentence where it had to be cut or is not understood. ValueError for an empty
    one."""
    if not text.strip():
        raise ValueError(
            "the text is empty; say what to change, or leave the sampler's negative unconnected for no negative prompt"
        )
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    ids = clip.tokenizer.tokenize(text)
    unknown = ids.count(UNKNOWN)
    if len(ids) > TEXT_TOKENS:
        return conditioning, f"the text has {len(ids)} tokens; only the first {TEXT_TOKENS} are used"
    if unknown and 3 * unknown >= len(ids) - 1:
        return (
            conditioning,
            f"{unknown} of the text's {len(ids) - 1} tokens are unknown to the text encoder; write English",
        )
    return conditioning, None


@dataclass(frozen=True, eq=False)
class Texts:
    """Features [L, T] of the instructions and negative prompts; a negative is None for the model's own."""

    positive: list[Tensor]
    negative: list[Tensor | None]

    @classmethod
    def read(cls, positive: list, negative: list | None) -> Texts:
        """From CONDITIONING. ValueError where it is empty or of another text encoder."""
        wanted = _features(positive, "positive")
        if any(_says_nothing(text) for text in wanted):
            raise ValueError("the instruction is empty; say what to change in the picture")
        unwanted = _features(negative, "negative") if negative is not None else [None]
        return cls(wanted, [None if text is None or _says_nothing(text) else text for text in unwanted])

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(text) for text in (*self.positive, *self.negative) if text is not None)

    def of(self, image: int) -> tuple[Tensor, Tensor | None]:
        """The pair of picture `image` of a batch; fewer texts than pictures start over."""
        return self.positive[image % len(self.positive)], self.negative[image % len(self.negative)]


def _says_nothing(text: Tensor) -> bool:
    """Whether features are those of the end token alone, or what ConditioningZeroOut leaves."""
    return len(text) < 2 or not text.any()


def _features(conditioning: list, name: str) -> list[Tensor]:
    if not conditioning:
        raise ValueError(f"the {name} conditioning is empty; connect VAREdit Text Encode")
    if len(conditioning) > 1:
        raise ValueError(
            f"the {name} conditioning combines {len(conditioning)} texts, which this model cannot; write one "
            "instruction"
        )
    features, facts = conditioning[0]
    if MARK not in facts:
        raise ValueError(
            f"the {name} conditioning is not of VAREdit's text encoder; use a clip from VAREdit Text Encoder Loader"
        )
    if not features.isfinite().all():
        raise ValueError(f"the {name} conditioning holds undefined numbers; check the text encoder's weights")
    return list(features)
