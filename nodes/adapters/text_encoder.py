"""A T5 encoder as ComfyUI's CLIP: the stock CLIPTextEncode, LoRA and device nodes take it.

ComfyUI's own loader takes flan-t5-xl for another model of that size, with another tokenizer; hence this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import comfy.model_management as mm
import comfy.sd
import comfy.text_encoders
import folder_paths
import torch
from torch import Tensor, nn

from ...varedit_core.files.checkpoints import has_encoder
from ...varedit_core.files.safe_write import write_bytes
from ...varedit_core.files.shards import parts_of
from ...varedit_core.files.weights import PICKLED, SAFETENSORS, WeightError, Weights
from ...varedit_core.runtime.unfilled import Unfilled
from ...varedit_core.text.cache import FeatureFolder, fingerprint, identity, key_of
from ...varedit_core.text.encoder import (
    check_encoder,
    check_letters,
    cut_ids,
    encoder_config,
    encoder_weights,
    load_tokenizer,
    unread,
)  # fmt: skip
from ...varedit_core.text.t5 import T5Config, T5Encoder
from .foreign import Asked, Missing
from .state import Layers, fill, is_quantised, open_file, parameters, plain

KEY = "varedit_t5"
MARK = "varedit_text"
"""In a conditioning's facts: its features as they came from here, by which a change of them is noticed."""
FOLDER = "varedit/text_features"
"""Of kept features, in ComfyUI's folder for the user."""
FLAN_VOCABULARY = 32128
FILES = ("config.json", "tokenizer.json", "spiece.model")
"""What belongs to an encoder beside its weights."""
FILE = "file."
"""Before the names of `FILES` among the tensors of an encoder that a node saved: it has no other place for them."""


def of_text(name: str) -> Missing:
    return Missing(f"VAREdit's text encoder only reads instructions and has no {name}; use VAREdit Text Encode")


class Ids(dict):
    """Tokens by the text encoder that they are for."""

    def __missing__(self, name: str):
        raise ValueError(
            f"this node encodes for another text encoder ({name}), and VAREdit's is a T5 alone; use VAREdit Text Encode"
        )


class Tokenizer:
    """What a CLIP asks of its tokenizer: text -> ids of one prompt, without weights or padding."""

    def __init__(
        self,
        tokenize: Callable[[str], list[int]],
        files: Mapping[str, bytes],
        embedding_directory=None,
        tokenizer_data=None,
    ) -> None:
        self.tokenize, self.files = tokenize, files

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kw) -> dict:
        given = [value for name, value in kw.items() if name.startswith("image")]
        if any(isinstance(value, Sequence | Tensor) and len(value) for value in given):
            raise ValueError("VAREdit's text encoder reads text alone; connect the picture to VAREdit Source Encode")
        ids, _ = cut_ids(self.tokenize(text))
        return Ids({KEY: [[(number, 1.0, 0) if return_word_ids else (number, 1.0) for number in ids]]})

    def untokenize(self, tokens):
        return [(token, str(token[0])) for token in tokens]

    def state_dict(self) -> dict:
        """What nodes that save text encoders write beside the weights."""
        return {FILE + name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in self.files.items()}


class TextModel(Asked, nn.Module):
    """What a CLIP's patcher wraps."""

    lacking = staticmethod(of_text)

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
        self.execution_device, self.computed = None, computed
        self.file: Path | None = None
        self._print = ""

    def set_clip_options(self, options: dict) -> None:
        if options.get("layer") not in (None, -1):
            raise ValueError("VAREdit's text encoder is read after its last layer; take out CLIP Set Last Layer")
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self) -> None:
        self.execution_device = None

    def memory_estimation_function(self, tokens: dict, device=None) -> int:
        """Bytes for one prompt, if there is one: a few copies of its features and scores in fp32."""
        config, count = self.transformer.config, len(tokens[KEY][0]) if tokens else 0
        return 4 * count * (config.heads * count * 3 + config.hidden * 4 + config.width * 8)

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, None, dict]:
        """Features [1, L, C] in fp32 on the device between nodes, no pooled ones, and where they come from."""
        if KEY not in tokens:
            raise ValueError("these tokens are not of VAREdit's text encoder; encode the text with the same clip")
        ids = torch.tensor([[token[0] for token in tokens[KEY][0]]], device=self.execution_device)
        features = self.transformer(ids).float().to(mm.intermediate_device())
        return features, None, {MARK: features}

    def fingerprint(self) -> str:
        """Of the weights in the file, read once."""
        self._print = self._print or fingerprint(encoder_weights(open_file(self.file)))
        return self._print

    def load_sd(self, weights: Weights) -> tuple[list, list]:
        """Called by CLIP, after it has set the flag that says whether ComfyUI streams weights."""
        fill(self.transformer, weights, self.stored, self.can_assign_sd)
        return [], []


def load_clip(path: Path, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """A T5 encoder's file as a CLIP. Raises ValueError for a file that is none or is not whole."""
    try:
        weights = encoder_weights(open_file(path, has_encoder))
        with _beside(path, weights) as folder:
            config = encoder_config(folder, weights) if folder else T5Config.from_shapes(weights.shapes)
            with Unfilled():
                kept = T5Encoder(config, device="meta").state_dict()
            check_encoder(weights, kept)
            tokenize = _tokenizer(path, folder, config)
            files = {name: (folder / name).read_bytes() for name in FILES if folder and (folder / name).is_file()}
    except (WeightError, KeyError) as error:
        raise plain(error) from error
    beside = {key for key in weights if key not in kept and key.rpartition(".")[0] + ".weight" in kept}
    weights = weights.renamed({key: key for key in weights if key in kept or key in beside})

    class Target:
        params = {"config": config, "special": is_quantised(weights)}
        clip = TextModel
        tokenizer = partial(Tokenizer, tokenize, files)

    clip = comfy.sd.CLIP(Target, parameters=parameters(weights), state_dict=[weights], disable_dynamic=disable_dynamic)
    clip.patcher.cached_patcher_init, clip.cond_stage_model.file = (_patcher, (path,)), path
    return clip


def _patcher(path: Path, disable_dynamic: bool = False):
    return load_clip(path, disable_dynamic).patcher


def _alone(path: Path) -> bool:
    """Whether a folder holds this model alone, so that its config.json and tokenizer are the model's."""
    files = {file.name for file in path.parent.iterdir() if file.suffix in SAFETENSORS | PICKLED}
    return files <= parts_of(path)


@contextmanager
def _beside(path: Path, weights: Weights) -> Iterator[Path | None]:
    """The folder of an encoder's configuration and tokenizer: of those in a file that a node saved, or its own folder
    where it is alone there; None where they are not known."""
    saved = [name for name in FILES if FILE + name in weights]
    if not saved:
        yield path.parent if _alone(path) else None
        return
    with TemporaryDirectory() as folder:
        for name in saved:
            write_bytes(Path(folder) / name, weights[FILE + name].cpu().numpy().tobytes())
        yield Path(folder)


def _tokenizer(path: Path, folder: Path | None, config: T5Config) -> Callable[[str], list[int]]:
    """The tokenizer in a folder, else ComfyUI's T5 tokenizer."""
    if folder and any((folder / name).is_file() for name in FILES[1:]):
        return load_tokenizer(folder)
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


def encode(clip: comfy.sd.CLIP, text: str, cache: bool = False) -> tuple[list, str | None]:
    """Conditioning of a text, and a sentence where it had to be cut or is not understood. cache: whether features are
    kept in files, and taken from there. ValueError for an empty text."""
    if not text.strip():
        raise ValueError(
            "the text is empty; say what to change, or leave the sampler's negative unconnected for no negative prompt"
        )
    check_letters(text)
    ids = clip.tokenizer.tokenize(text)
    said = unread(text, ids, len(ids))
    reason = _changed(clip) if cache else ""
    if reason:
        said.append(f"{reason}, so that its features are not kept; set cache to off")
    conditioning = _kept(clip, text) if cache and not reason else _made(clip, text)
    return conditioning, "; ".join(said) or None


def _made(clip: comfy.sd.CLIP, text: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def _kept(clip: comfy.sd.CLIP, text: str) -> list:
    """The same, its features taken from a file where there is one; the weights then stay where they are."""
    network, ids = clip.cond_stage_model, [number for number, *_ in clip.tokenize(text)[KEY][0]]
    config, computed = network.transformer.config, f"{network.computed} of {network.stored}"
    key = key_of(identity(network.fingerprint(), config, computed, clip.patcher.load_device), ids)
    folder = FeatureFolder(Path(folder_paths.get_user_directory()) / FOLDER)
    found = folder.get(key)
    if found is None:
        conditioning = _made(clip, text)
        folder.put(key, conditioning[0][0][0])
        return conditioning
    features = found[None].to(mm.intermediate_device())
    return [[features, {"pooled_output": None, MARK: features}]]


def _changed(clip: comfy.sd.CLIP) -> str:
    """Why a text encoder's features are not those of its file; "" where they are."""
    if clip.patcher.patches or clip.patcher.forced_hooks:
        return "a LoRA or a hook changes this text encoder"
    if clip.layer_idx is not None or clip.cond_stage_model.file is None:
        return "another node changes how this text encoder is read"
    return ""
