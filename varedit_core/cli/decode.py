"""`varedit decode`: the tokens of edits in, pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from PIL import Image
from torch import Tensor

from ..demo import demo_files
from ..files.checkpoints import load_autoencoder
from ..files.reading import printable
from ..files.safe_write import together
from ..hub.finding import vae_of
from ..pictures.composite import found_mask, masked
from ..pictures.images import FittedImage, SourceImage, load_image, save_image, to_uint8, unfit
from ..runtime.devices import device_of
from ..sampling.tokens import Tokens
from . import common as options
from .common import carried, check_strip, console, numbered, tell_lost
from .results import check_results
from .results import picture as picture_at


def decode(
    tokens: Annotated[Path, typer.Argument(help="Tokens of an edit, as varedit edit --save-tokens writes them.")],
    vae: Annotated[
        Optional[Path], typer.Option(help="VAE of the model that made them; by default the demo model's.")
    ] = None,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Result; by default NAME.png beside it.")
    ] = None,
    scales: Annotated[int, typer.Option(min=0, help="Only so many first scales; 0: all.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the output files if they exist.")] = False,
    device: options.Device = None,
    image: Annotated[
        Optional[Path],
        typer.Option(
            help="Picture that was edited: what an auto mask left out stays exactly as it is there, and its alpha."
        ),
    ] = None,
    strip: options.Strip = False,
    weights: options.Weights = None,
) -> None:
    """Decode the tokens of edits to pictures again, or of their first scales to drafts."""
    if weights and vae:
        raise ValueError("--weights has a VAE of its own; leave --vae out")
    vae = vae_of(weights) if weights else vae
    target, found = output or tokens.with_suffix(".png"), Tokens.load(tokens)
    found = found.first(scales) if scales else found
    source, targets = _source(image, found), numbered(target, found.images)
    check_strip(source, strip)
    transparent = source is not None and not source.opaque
    check_results([picture_at(path, transparent=transparent) for path in targets], [tokens, image, vae], overwrite)
    place = device_of(device)
    network = load_autoencoder(vae or demo_files()[1], device=place)
    advice = "; name the VAE of the model that made them with --vae"
    found.check_vae(network.config.bits, network.config.stride, f"the tokens of {tokens.name}", advice)
    if found.auto_mask and source is None:
        console.print(
            "the edit has found its own mask; name the picture that was edited with --image, and all outside of it "
            "stays as it was",
            soft_wrap=True,
        )

    if source is None:
        tell_lost(found, "name it with --image")

    @torch.no_grad()
    def levels(total: Tensor) -> Tensor:
        return to_uint8(network.decode(total[None])[0])

    pictures = []
    for number in range(found.images):
        one = found.of([number]).to(place)
        shown = levels(one.total()[0])
        picture = unfit(shown, one.shown, source and source.rgb)
        if source is not None:
            mask = found_mask(one, shown, levels) if one.auto_mask else Image.new("L", picture.size, 255)
            picture = masked(picture, FittedImage(torch.empty(0), one.shown, source), mask)
        pictures.append(picture)
    with together() as write:
        for picture, path in zip(pictures, targets):
            save_image(picture, path, overwrite, *carried(source, strip), write)
    size = "{}x{}".format(*found.shown.size)
    console.print(f"{', '.join(printable(str(path)) for path in targets)} ({size})", soft_wrap=True, highlight=False)


def _source(image: Path | None, tokens: Tokens) -> SourceImage | None:
    """The picture that was edited. ValueError for one of another size, and where nothing of it would show."""
    if image is None:
        return None
    source = load_image(image)
    if source.size != tokens.shown.size:
        sizes = ["{}x{}".format(*size) for size in (source.size, tokens.shown.size)]
        raise ValueError(
            f"{image} is {sizes[0]} but the edit is of a picture of {sizes[1]}; name the one that was edited"
        )
    if not tokens.auto_mask and not tokens.without and source.opaque:
        raise ValueError("these tokens tell of no auto mask, so nothing of --image would show; leave it out")
    return source
