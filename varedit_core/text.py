"""Text features: a T5 encoder and its tokenizer (flan-t5-xl for the published models).

Prompts in, one [tokens, channels] feature tensor a prompt out; padding is never made. The encoder itself is
transformers'; here are its files: a Hugging Face folder, or one file with the tokenizer beside it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints import TEXT_ENCODER, check, select
from .defaults import TEXT_TOKENS
from .weights import WeightError, Weights, open_weights

logger = logging.getLogger(__name__)

END = 1
"""T5's end token."""


class TextEncoder:
    """A T5 encoder with its tokenizer. tokenize: prompt -> token ids, the end token included."""

    def __init__(
        self, model: nn.Module, tokenize: Callable[[str], list[int]], device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.tokenize, self.device = model, tokenize, torch.device(device)

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, cut to 512 with the end token kept; a cut is logged as a warning."""
        ids = self.tokenize(prompt)
        if len(ids) > TEXT_TOKENS:
            logger.warning("the instruction has %d tokens; only the first %d are used", len(ids), TEXT_TOKENS)
            ids = [*ids[: TEXT_TOKENS - 1], ids[-1]]
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
        return self.model(input_ids=torch.tensor([ids], device=self.device)).last_hidden_state[0].float()


def load_text_encoder(
    path: str | Path, tokenizer: str | Path | None = None, dtype: torch.dtype = torch.float32, device="cpu"
) -> TextEncoder:
    """Load a T5 encoder from a Hugging Face folder or a single file.

    tokenizer: folder or file with `tokenizer.json` or `spiece.model`; by default it is looked for with the
    weights. Raises WeightError; never loads a part.
    """
    from transformers import T5EncoderModel

    weights = select(open_weights(path), TEXT_ENCODER)
    if "block.0.layer.0.SelfAttention.q.weight" in weights:
        weights = weights.renamed({(key if key == "shared.weight" else f"encoder.{key}"): key for key in weights})
    tokenize = load_tokenizer(tokenizer or path)
    with torch.device("meta"):
        model = T5EncoderModel(_t5_config(Path(path), weights))
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    table = next((key for key in ("shared.weight", "encoder.embed_tokens.weight") if key in weights), "shared.weight")
    sources = {key: table if key.endswith(("shared.weight", "embed_tokens.weight")) else key for key in wanted}
    known = weights.renamed({new: old for new, old in sources.items() if old in weights})
    check(known, wanted)
    # In half precision T5's feed-forward output overflows; transformers keeps it in fp32 too.
    kinds = {key: torch.float32 if key.endswith(".wo.weight") and dtype == torch.float16 else dtype for key in wanted}
    model.load_state_dict(
        {key: _read(weights, sources[key]).to(device, kind) for key, kind in kinds.items()}, assign=True
    )
    model.tie_weights()
    return TextEncoder(model.eval().requires_grad_(False), tokenize, device)


def _read(weights: Weights, key: str) -> Tensor:
    """A tensor, brought back from 8 bits where it has a scale: transformers' layers know none."""
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
        f"no tokenizer.json or spiece.model in {folder}; copy one from the text encoder's repository or name it with the tokenizer option"
    )


def _t5_config(path: Path, weights: Weights):
    """transformers' configuration: the folder's own, else read off the shapes (T5 v1.1: gated GELU)."""
    from transformers import T5Config

    file = path / "config.json"
    if file.is_file():
        try:
            return T5Config(**json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise WeightError(f"{file} is not a readable T5 configuration; download it again") from error
    shapes = weights.shapes
    query, gated = (
        shapes["encoder.block.0.layer.0.SelfAttention.q.weight"],
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in shapes,
    )
    heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][1]
    wide = shapes[f"encoder.block.0.layer.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"][0]
    layers = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.block."))
    table = shapes.get("shared.weight") or shapes.get("encoder.embed_tokens.weight", (0,))
    return T5Config(
        vocab_size=table[0], d_model=query[1], d_kv=query[0] // heads, d_ff=wide, num_layers=layers, num_heads=heads,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip
