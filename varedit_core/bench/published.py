"""The published implementation, timed beside ours: an installed copy that the user names, with random weights.

None of its code is here; its classes and functions are called by their names, as its own `infer.py` calls them. What
it is given: random weights in its own types (blocks bf16, text encoder fp16), 20 text tokens padded to 512, a picture
as a tensor, the published settings, and stand-ins for packages that are not installed (see `stand_ins`). Not timed,
as with ours: reading and writing pictures; and not done: emptying torch's memory before every edit.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from ..defaults import TEXT_TOKENS
from ..runtime.unfilled import Unfilled
from ..sampling.checks import patch_size
from .cases import Case
from .clock import Timed, timed
from .measure import PROMPT, REPEATS, WARMUPS, picture
from .models import MODELS, Sizes, fill, stand_in_tokens
from .stand_ins import stand_ins

RUN, TRANSFORMER, TOKENIZER = "tools.run_infinity", "infinity.models.infinity", "infinity.models.bsq_vae.vae"
_PACKAGES = ("infinity", "tools")


def check_clone(folder: Path) -> None:
    """ValueError for a folder that is no copy of the published code."""
    for name in (RUN, TRANSFORMER, TOKENIZER):
        file = Path(*name.split(".")).with_suffix(".py")
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}; name a clone of HiDream-ai/VAREdit")


@contextmanager
def published_code(folder: Path) -> Iterator[None]:
    """Make FOLDER's packages importable for a while, and silent. ValueError where it is no copy of the code."""
    check_clone(folder)
    # Before the stand-ins: transformers would take these for the packages themselves.
    from transformers import AutoTokenizer, T5EncoderModel, T5TokenizerFast  # noqa: F401

    path, limit = list(sys.path), torch._dynamo.config.cache_size_limit
    with stand_ins(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for name in _PACKAGES:
                _put(name, folder.resolve() / name)
            yield
        finally:
            sys.path[:], torch._dynamo.config.cache_size_limit = path, limit
            for name in [name for name in sys.modules if name.split(".")[0] in _PACKAGES]:
                del sys.modules[name]


def _put(name: str, folder: Path) -> None:
    """A package without a file of its own. Found on sys.path instead, any installed one of its name would win."""
    sys.modules[name] = package = ModuleType(name)
    package.__path__ = [str(folder)]
    package.__spec__ = ModuleSpec(name, None, is_package=True)


def measure_published(
    folder: Path, cases: Sequence[Case], device: torch.device, repeats: int = REPEATS, warmups: int = WARMUPS
) -> Iterator[tuple[Case, Timed]]:
    """Time whole edits of the cases, all of one model, one after the other.

    Raises whatever a copy of unknown state raises, at the case that it fails at.
    """
    with published_code(folder):
        editor = PublishedEditor(MODELS[cases[0].model], device)
        for case in cases:
            edit = partial(editor.edit, case, picture(case).pixels[0])
            yield case, timed(edit, device, repeats, warmups)


class PublishedEditor:
    """The published networks of random weights on a device; to be made and used within `published_code`."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.run = import_module(RUN)
        self.patch = patch_size(sizes.transformer, sizes.autoencoder)
        self.bits = sizes.autoencoder.bits
        generator = torch.Generator(device).manual_seed(0)
        self.vae = _vae(sizes).to(device)
        self.transformer = _transformer(sizes, self.vae, self.patch, device)
        self.text = _text(sizes, device)
        for network in (self.vae, self.transformer, self.text):
            fill(network, generator)

    def edit(self, case: Case, pixels: Tensor, seed: int = 0) -> Tensor:
        """The edited picture [y, x, 3], 8 bits, on the device. pixels: [3, y, x] in [-1, 1] in host memory."""
        guidance, temperature, _ = zip(*case.settings.per_scale(len(case.schedule)))
        return self.run.gen_one_img(
            self.transformer, self.vae, _padded_tokens, self.text, PROMPT, pixels, g_seed=seed, gt_leak=0,
            gt_ls_Bl=None, cfg_list=list(guidance), tau_list=list(temperature),
            scale_schedule=[(1, h, w) for h, w in case.schedule.grids], cfg_insertion_layer=[0], vae_type=self.bits,
            sampling_per_bits=1, enable_positive_prompt=0, apply_spatial_patchify=int(self.patch == 2),
        )  # fmt: skip


def _vae(sizes: Sizes) -> nn.Module:
    config = sizes.autoencoder
    multiples = [[width // config.stem for width in ws] for ws in (config.encoder_widths, config.decoder_widths)]
    return import_module(TOKENIZER).vae_model(
        None, "dynamic", config.bits, 2**config.bits, patch_size=config.stride,
        encoder_ch_mult=multiples[0], decoder_ch_mult=multiples[1], test_mode=True,
    )  # fmt: skip


def _transformer(sizes: Sizes, vae: nn.Module, patch: int, device: torch.device) -> nn.Module:
    """Made in host memory that is never written to, as its constructor draws there, then moved without a copy."""
    config = sizes.transformer
    with Unfilled(), torch.no_grad():
        network = import_module(TRANSFORMER).Infinity(
            vae_local=vae, text_channels=config.text_width, text_maxlen=config.text_length, shared_aln=True,
            raw_scale_schedule=None, checkpointing="full-block", customized_flash_attn=False, fused_norm=True,
            pad_to_multiplier=128, use_flex_attn=0, add_lvl_embeding_only_first_block=1, use_bit_label=1,
            rope2d_each_sa_layer=1, rope2d_normalized_by_hw=2, pn="1M", apply_spatial_patchify=int(patch == 2),
            inference_mode=True, train_h_div_w_list=[1.0], depth=config.depth, embed_dim=config.width,
            num_heads=config.heads, drop_path_rate=0.1, mlp_ratio=config.hidden // config.width,
            block_chunks=8 if config.depth % 8 == 0 else config.depth,
        )  # fmt: skip
    network.to_empty(device=device)
    if device.type == "cuda":  # elsewhere its autocast does nothing, and the types would not fit
        for block in network.unregistered_blocks:
            block.bfloat16()
    network.rng = torch.Generator(device)
    return network


def _text(sizes: Sizes, device: torch.device) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    with torch.device(device):
        network = T5EncoderModel(T5Config(**sizes.text.to_json()))
    if device.type == "cuda":
        network.half()
        for name, module in network.named_modules():
            if name.endswith(".wo"):  # as transformers loads a T5 in fp16
                module.float()
    return network


def _padded_tokens(text: Sequence[str], **_: object) -> SimpleNamespace:
    """What a T5 tokenizer gives for prompts padded to 512: ids and mask, [rows, 512]."""
    rows = [stand_in_tokens(prompt) for prompt in text]
    ids = torch.tensor([row + [0] * (TEXT_TOKENS - len(row)) for row in rows])
    return SimpleNamespace(input_ids=ids, attention_mask=(ids != 0).long())
