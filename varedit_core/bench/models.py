"""Editors of the published sizes, made of random weights on the device: nothing is read, downloaded or learned.

The scales of the weights keep activations finite and bits near coin flips, so that an edit takes the time and memory
of a real one; its picture is noise.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..editor import Editor
from ..files.published import AUTOENCODERS, TRANSFORMERS
from ..model.config import AutoencoderConfig, TransformerConfig
from ..model.transformer import Transformer
from ..runtime.fp8 import LINEARS, eight_bit
from ..runtime.kernels import has_triton
from ..runtime.layers import Operations
from ..runtime.unfilled import Unfilled
from ..text.encoder import TextEncoder
from ..text.t5 import FLAN_T5_XL, T5Config, T5Encoder
from ..text.tokenizers import END
from ..tokenizer.vae import Autoencoder

TOKENS = 20
"""Text tokens of the instruction, the end token included."""
_VECTOR = 0.02  # of biases
_NORM = re.compile(r"norm\w*(\.norm)?\.weight$")
_HEAD_GAIN = 2.5


@dataclass(frozen=True)
class Sizes:
    """The three networks of an editor."""

    transformer: TransformerConfig
    autoencoder: AutoencoderConfig
    text: T5Config


MODELS = {
    "8B": Sizes(TRANSFORMERS["8B"], AUTOENCODERS["8B"], FLAN_T5_XL),
    "2B": Sizes(TRANSFORMERS["2B"], AUTOENCODERS["2B"], FLAN_T5_XL),
    "tiny": Sizes(
        TransformerConfig(2, 128, 2, 56, 128, 512, 512, 15),
        AutoencoderConfig(14, 32, (32, 32, 64, 64), (32, 32, 64, 64), 1, 2, 8),
        T5Config(64, 128, 32, 256, 2, 4, gated=True),
    ),
}
"""The published models, and one that a CPU runs in a moment."""


def build(name: str, device: torch.device, linears: str = LINEARS[0]) -> Editor:
    """An editor of random weights, in the types that `Editor.load` chooses for the device.

    name: a key of MODELS. On CUDA: blocks and decoder bf16, text encoder fp16, the rest fp32. linears: see `fp8`.
    """
    sizes, cuda = MODELS[name], device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    transformer = random_transformer(sizes.transformer, device)
    if linears != LINEARS[0]:
        eight_bit(transformer)
    with Unfilled():
        autoencoder = Autoencoder(sizes.autoencoder, Operations, device=device, decode_dtype=dtype)
        encoder = T5Encoder(sizes.text, Operations, torch.float16 if cuda else torch.float32, device)
    generator = torch.Generator(device).manual_seed(1)
    for network in (autoencoder, encoder):
        fill(network, generator)
    if cuda and has_triton():  # as `load_autoencoder` does
        autoencoder.to(memory_format=torch.channels_last)
    return Editor(transformer, autoencoder, TextEncoder(encoder, stand_in_tokens, device), device)


def random_transformer(sizes: TransformerConfig, device: torch.device) -> Transformer:
    """A transformer of random weights; its blocks are bf16 on CUDA, else fp32."""
    with Unfilled():
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        transformer = Transformer(sizes, Operations, dtype, device)
    fill(transformer, torch.Generator(device).manual_seed(0))
    return transformer


def stand_in_tokens(prompt: str) -> list[int]:
    """As many ids for any prompt as a sentence has, in place of a text tokenizer's, which would have to be read."""
    return [*range(3, 2 + TOKENS), END]


@torch.no_grad()
def fill(network: nn.Module, generator: torch.Generator) -> None:
    """Fill a network's weights with random numbers in place and freeze it; ours or one with the published names."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and tensor.ndim:
            _fill(name, tensor, generator)
    network.eval().requires_grad_(False)


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if name.endswith("zero_k_bias"):
        tensor.zero_()
    elif "scale_mul" in name:
        tensor.fill_(math.log(4))
    elif _NORM.search(name):
        tensor.fill_(1)
    elif "ada_gss" in name:  # gamma1, gamma2, scale1, scale2, shift1, shift2
        gains = torch.tensor([0.5, 0.5, 0, 0, 0, 0], device=tensor.device)[:, None]
        tensor.normal_(0, 0.1, generator=generator).add_(gains)
    elif tensor.ndim == 1:
        tensor.normal_(0, _VECTOR, generator=generator)
    else:
        fan_in = math.prod(tensor.shape[1:]) if tensor.ndim == 4 else tensor.shape[-1]
        gain = _HEAD_GAIN if name == "head.weight" else 1.0
        tensor.normal_(0, gain * fan_in**-0.5, generator=generator)


def nbytes(editor: Editor) -> int:
    """Bytes of all weights."""
    networks = (editor.transformer, editor.autoencoder, editor.text.model)
    return sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())
