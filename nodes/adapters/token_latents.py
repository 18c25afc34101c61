"""LATENTs that are known by their tokens: saved and loaded, cut after a scale, and compared with their sources."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import torch
import torch.nn.functional as F
from comfy.cli_args import args
from torch import Tensor

from ...varedit_core.controls.auto_mask import changed
from ...varedit_core.files.token_header import MAX_HEADER
from ...varedit_core.sampling.tokens import Tokens
from ...varedit_core.tokenizer.quantizer import encode, latent_grids
from .latents import Origin, made, numbers_of, origin_in, tokens_in
from .pictures import origin_of, unfitted_mask
from .vae import VAREditVAE, checked_vae


def checked_tokens(latent: dict) -> Tokens:
    """The tokens of a LATENT. ValueError where it has none, or is not as it came."""
    tokens = tokens_in(latent)
    if tokens is None:
        raise ValueError(
            "this latent holds no tokens; connect the latent of VAREdit Sampler, Load Tokens or First Scales, as it "
            "came"
        )
    return tokens


def save_tokens(latent: dict, path: Path, graph: Mapping[str, str]) -> str:
    """Write a LATENT's tokens, and beside them the graph that made them (`graph_of`); what they are, in words."""
    tokens = checked_tokens(latent)
    tokens.save(path, notes=graph)
    height, width = tokens.schedule.pixels
    return f"edits: {tokens.images}, scales: {len(tokens)} of {len(tokens.schedule)}, {width}x{height}"


def graph_of(hidden, tell: Callable[[str], None]) -> dict[str, str]:
    """The running graph as ComfyUI's page opens it from a file's metadata: JSON by its names. Empty where ComfyUI was
    started to keep graphs out of files, and for a graph that is too long, which is told."""
    if args.disable_metadata or hidden is None:
        return {}
    more = hidden.extra_pnginfo if isinstance(hidden.extra_pnginfo, Mapping) else {}
    try:
        graph = {str(name): json.dumps(one) for name, one in {"prompt": hidden.prompt, **more}.items() if one}
        length = len(json.dumps(graph, ensure_ascii=False).encode())  # as it stands in the file
    except (TypeError, ValueError, RecursionError) as error:
        tell(f"the graph cannot be written ({error}) and is left out of the file")
        return {}
    if length > MAX_HEADER // 2:
        tell(f"the graph has {length / 1e6:.1f} MB, more than a file of tokens takes, and is left out of it")
        return {}
    return graph


def load_tokens(path: Path, vae=None) -> dict:
    """The LATENT of a file of tokens. ValueError for another file, and for tokens of another model than the VAE's."""
    vae = checked_vae(vae) if vae is not None else None
    try:
        tokens = Tokens.load(path).to(mm.intermediate_device())
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    if vae is not None:
        tokens.check_vae(vae.latent_channels, vae.stride, f"the tokens of {path.name}")
    tokens = replace(tokens, fitting=tokens.shown)
    return made(tokens.total(), Origin(tokens.shown, vae and vae.colours, tokens=tokens))


def first_scales(latent: dict, count: int) -> dict:
    """The LATENT after some of its scales. ValueError where there are not so many, and as `checked_tokens`."""
    tokens = checked_tokens(latent).first(count)
    origin = replace(origin_in(latent), tokens=tokens)
    return made(**{**latent, "samples": tokens.total()}, origin=origin, numbers=numbers_of(latent))


def change_map(vae, latent: dict, source: dict, amount: float) -> tuple[Tensor, Tensor]:
    """Where edits changed their sources, [B, y, x] of the pictures' size: 0 or 1, and soft.

    source: of each edit, or of several edits that follow each other. An edit that was held to its source somewhere has
    changed nowhere else, whatever its decoder makes of the edges. ValueError where the two do not belong together.
    """
    vae = checked_vae(vae)
    edits, before = latent["samples"], _source_total(vae, source)
    fitting = origin_of(latent, edits, vae).fitting
    other = origin_of(source, before, vae).fitting
    if fitting != other:
        raise ValueError(
            f"the edit is of a picture of {fitting} but the source of one of {other}; connect the source "
            "that was edited"
        )
    if not len(before) or len(edits) % len(before):
        raise ValueError(
            f"there are {len(before)} sources for {len(edits)} edits; connect the sources that were edited"
        )
    tokens, each = tokens_in(latent), len(edits) // len(before)
    held = tokens.free if tokens else None
    amounts, shown = [], None
    for n, edit in enumerate(edits):
        if not n % each:
            shown = _pixels(vae, before[n // each])
        soft = changed(_pixels(vae, edit), shown, amount)
        if held is not None:
            free = held[n if len(held) > 1 else 0].any(0)[None, None].float().to(soft.device)
            soft = soft * F.interpolate(free, soft.shape[-2:])[0]
        amounts.append(soft.cpu())
    soft = torch.cat(amounts)
    hard = (unfitted_mask((soft >= 1).float(), fitting) >= 0.5).float()
    return hard.to(mm.intermediate_device()), unfitted_mask(soft, fitting).to(mm.intermediate_device())


def _source_total(vae: VAREditVAE, source: dict) -> Tensor:
    """What the VAE makes of sources, as running sums; those of edits are their own."""
    samples, origin = source["samples"], origin_in(source)
    if origin is not None and origin.empty:
        raise ValueError("the source is empty, so that nothing was changed; connect VAREdit Source Encode")
    if tokens_in(source) is not None:
        return samples
    fitting = origin_of(source, samples, vae).fitting
    patch = samples.shape[-2] // fitting.schedule.grids[-1][0]
    return encode(samples, latent_grids(fitting.schedule, patch))[1]


def _pixels(vae: VAREditVAE, latent_dHW: Tensor) -> Tensor:
    """Pixels [1, 3, y, x] in [-1, 1]."""
    return vae.decode(latent_dHW[None]).movedim(-1, 1) * 2 - 1
