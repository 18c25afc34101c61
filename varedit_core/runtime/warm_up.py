"""Kernels compiled and libraries loaded in a thread, while weights are read.

The first edit of a process would wait for that: for the compiler seconds, for cuBLAS and cuDNN one. A hollow network,
which has the real sizes but few blocks and one piece of memory for all weights, edits a picture of zeros twice: first
kernels are compiled only, side by side where Triton can, then all runs once. It changes no number of any edit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..model.config import AutoencoderConfig, TransformerConfig
from ..model.transformer import Transformer
from ..sampling.batch import EditBatch
from ..sampling.loop import sample
from ..tokenizer.schedule import schedule_for
from ..tokenizer.vae import Autoencoder
from .fp8 import LINEARS, prepare
from .kernels import compile_only, has_triton
from .layers import Operations
from .session import Session
from .unfilled import Unfilled
from .workspace import Workspace

logger = logging.getLogger(__name__)

_BLOCKS = 2  # the first attends to its source in another way than those behind it
_AREA, _TOKENS = "0.25M", 20  # of the picture, and of the instruction
_SIDE = 128  # pixels of the VAE's picture
_LEAST_FREE = 4 << 30
"""Bytes that must be free: a device that is full has others to serve."""
_begun: set[tuple] = set()
_asking = threading.Lock()


def warm_up(network: Transformer | Autoencoder, device: torch.device | str, linears: str = LINEARS[0]) -> None:
    """Begin, for networks like this one on a CUDA device with Triton; once a process for each kind. Returns at once.

    linears: "8-bit" where a transformer's layers multiply in 8 bits.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    config, dtype = network.config, getattr(network, "decode_dtype", network.dtype)
    if isinstance(config, TransformerConfig):
        kind = replace(config, depth=_BLOCKS), dtype, device, linears
        work = partial(_edit, *kind)
    else:
        kind = config, dtype, device
        work = partial(_pictures, *kind)
    with _asking:
        if kind in _begun:
            return
        _begun.add(kind)
    try:
        threading.Thread(target=_warmed, args=(kind, work, device), name="VAREdit warm-up").start()
    except RuntimeError as error:  # no more threads
        _begun.discard(kind)
        logger.debug("nothing is warmed up: %s", error)


@torch.no_grad()
def _warmed(kind: tuple, work: Callable[[], None], device: torch.device) -> None:
    """Both runs of work. Where they fail or there is no room, the next network like it tries again."""
    done = False
    try:
        with torch.cuda.device(device):
            with _asking:
                able = has_triton(device)
            if able:
                with compile_only():
                    done = _run(work, device)
                done = done and threading.main_thread().is_alive() and _run(work, device)
    except Exception as error:  # the first edit does it all, then, and says what is wrong
        logger.debug("nothing was warmed up: %r", error)
        done = False
    if not done:
        _begun.discard(kind)


def _run(work: Callable[[], None], device: torch.device) -> bool:
    """Do work where there is room for it; whether there was."""
    room = torch.cuda.mem_get_info(device)[0] >= _LEAST_FREE
    if room:
        work()
    return room


def _edit(config: TransformerConfig, dtype: torch.dtype, device: torch.device, linears: str) -> None:
    with Unfilled():
        network = Transformer(config, Operations, dtype, device="meta")
        if linears == "8-bit":
            prepare(network)
    schedule = schedule_for(_AREA)
    features = torch.zeros(1, config.token_bits, *schedule.grids[-1], device=device)
    text = torch.zeros(_TOKENS, config.text_width, device=device)
    engine = Session(hollow(network, device), Workspace())
    for _ in sample(engine, EditBatch.of(features, [text], schedule)):
        pass


def _pictures(config: AutoencoderConfig, dtype: torch.dtype, device: torch.device) -> None:
    with Unfilled():
        network = Autoencoder(config, Operations, device="meta", decode_dtype=dtype)
    network = hollow(network, device)
    network.encode(torch.zeros(1, 3, _SIDE, _SIDE, device=device))
    side = _SIDE // config.stride
    network.decode(torch.zeros(1, config.bits, side, side, device=device))


def hollow(network: nn.Module, device: torch.device) -> nn.Module:
    """A network without weights, in place: all of them are the same piece of zeros on a device."""
    parts = [part for m in network.modules() for part in (m._parameters, m._buffers)]
    own = [(part, name, x) for part in parts for name, x in part.items() if x is not None]
    memory = torch.zeros(max((x.nbytes for _, _, x in own), default=0), dtype=torch.uint8, device=device)
    for part, name, x in own:
        part[name] = _laid(memory[: x.nbytes].view(x.dtype), x)
    return network


def _laid(flat: Tensor, like: Tensor) -> Tensor:
    """Numbers in the shape of a weight; those of convolutions channels-last, as networks are loaded."""
    if like.ndim != 4:
        return flat.view(like.shape)
    out, width, *sides = like.shape
    return flat.view(out, *sides, width).movedim(-1, 1)
