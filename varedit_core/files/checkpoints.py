"""What a weight file is, and how its keys become ours.

One canonical key style, the one our modules have. Published files differ from it: transformer blocks sit in
chunks, query and value biases are loose parameters, learned vectors have extra axes; newer VAE files
wrap every convolution and norm. `part_of` names a file; `canonical` gives its tensors under our keys.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..defaults import EDIT, KINDS, PUBLISHED_TRANSFORMERS, PUBLISHED_VAES, TEXT_TO_IMAGE
from ..model.transformer import Transformer
from ..runtime.fp8 import LINEARS, EightBitLinear, check_linears, prepare, quantise_weight
from ..runtime.kernels import has_triton
from ..runtime.layers import Operations
from ..runtime.unfilled import Unfilled
from ..runtime.warm_up import warm_up
from ..tokenizer.vae import Autoencoder
from ..wording import with_article
from .places import told as place_told
from .quantised import BESIDE, SCALE, has_numbers, quantised, store
from .reading import printable
from .shapes import autoencoder_config, transformer_config
from .token_header import FORMAT as TOKENS
from .weights import WeightError, Weights, check_finite, open_weights, under

logger = logging.getLogger(__name__)

TRANSFORMER, TOKENIZER, TEXT_ENCODER = "VAREdit transformer", "VAREdit VAE", "T5 text encoder"
EXPECTED = {
    TRANSFORMER: f"a VAREdit transformer such as {' or '.join(PUBLISHED_TRANSFORMERS[::2])}",
    TOKENIZER: f"a VAE such as {PUBLISHED_VAES['8B']} (8B) or {PUBLISHED_VAES['2B']} (2B)",
    TEXT_ENCODER: "a T5 encoder such as the flan-t5-xl folder",
}
_MARKERS = {
    TRANSFORMER: r"word_embed\.weight",
    TOKENIZER: r"encoder\.conv_in(\.conv)?\.weight",
    TEXT_ENCODER: r"(encoder\.)?block\.0\.layer\.0\.SelfAttention\.q\.weight",
}
_OTHERS = {
    "a Stable Diffusion or SDXL model": r"input_blocks\.0\.0\.weight",
    "a Flux model": r"double_blocks\.0\.img_attn\.qkv\.weight",
    "a diffusion transformer": r"(joint_blocks|transformer_blocks)\.0\..*",
    "a CLIP text encoder": r"text_model\.embeddings\.token_embedding\.weight",
    "a language model": r"layers\.0\.self_attn\.q_proj\.weight",
    "a LoRA": r".*\.lora_(A|B|up|down)\.weight",
    "the state of an optimiser, without weights": r"(exp_avg(_sq)?|momentum_buffer)(\..*)?",
}
# Beside encoder and decoder a VAE's file may hold the quantiser's constants and what only training needs.
_IGNORED_IN_TOKENIZER = re.compile(
    r"(quantizer?|quantize|image_disc|video_disc|image_discriminator|video_discriminator|perceptual_model|loss)\."
)
KIND = "varedit.kind"
"""Where a transformer's file says what it was trained for."""
OF_TEXT_ALONE = "varedit.text_to_image"
"""A tensor that says the same as that metadata, of a program that writes tensors alone."""
# Buffers of older Infinity checkpoints, which its own loader leaves out too.
_IGNORED_IN_TRANSFORMER = {
    "lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen", OF_TEXT_ALONE,
}  # fmt: skip
# Loose parameters of the published files that are embeddings here, and their rows (None: as many as there are).
_VECTORS = {"scale_mul_1H11": 1, "ada_gss": 6, "pos_start": 1, "mat_q": 1, "cfg_uncond": None}


@dataclass(frozen=True)
class Recipe:
    """How one canonical tensor is made from tensors of the file."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor


def part_of(weights: Weights) -> tuple[str | None, Weights]:
    """(TRANSFORMER, TOKENIZER, TEXT_ENCODER or None, the part's tensors without their common prefix)."""
    for part, marker in _MARKERS.items():
        found = under(weights, marker)
        if found is not None and (part != TRANSFORMER or "lvl_embed.weight" in found):
            return part, found
    return None, weights


def select(weights: Weights, part: str) -> Weights:
    """The tensors of `part`. Raises WeightError naming the file, what it is and what was expected."""
    found = under(weights, _MARKERS[part])
    if found is None or (part == TRANSFORMER and "lvl_embed.weight" not in found):
        raise WeightError(f"{weights.path} is {describe(weights)}, not {EXPECTED[part]}; choose the right file")
    return found


def has_encoder(keys: Iterable[str]) -> bool:
    """Whether the first files of a T5 hold all of its encoder, so that the decoder's are not needed: they are filled in
    the order of the network or of the names, and in both the encoder ends with its norm."""
    return any(re.search(r"(^|\.)encoder\.final_layer_norm\.weight$", key) for key in keys)


def holds(weights: Weights, part: str) -> bool:
    """Whether the file has tensors of that part."""
    return under(weights, _MARKERS[part]) is not None


def describe(weights: Weights) -> str:
    """What the file is, in a few words."""
    part, _ = part_of(weights)
    if part:
        return with_article(part)
    if weights.metadata.get("format") == TOKENS:
        return "tokens of an edit, not weights"
    for name, marker in _OTHERS.items():
        if any(re.search(rf"(^|\.){marker}$", key) for key in weights):
            return name
    return f"an unknown model with keys such as {', '.join(sorted(weights)[:2])}"


def told_kind(weights: Weights) -> str | None:
    """Whether a transformer edits or makes pictures of text alone: EDIT, TEXT_TO_IMAGE, or None where nothing tells.

    The two families share every key and shape: only metadata can tell, or a name like those of Infinity's own files.
    """
    kind = weights.metadata.get(KIND)
    if kind in (EDIT, TEXT_TO_IMAGE):
        return kind
    return TEXT_TO_IMAGE if re.match(r"infinity[_-]", weights.path.name.lower()) else None


def checked_kind(kind: str) -> str | None:
    """A name of KINDS, None for auto. ValueError for others."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    return None if kind == KINDS[0] else kind


def transformer_recipes(weights: Weights) -> dict[str, Recipe]:
    """Canonical key -> recipe for a transformer, published or canonical."""
    chunks = {int(m[1]) for m in map(re.compile(r"block_chunks\.([0-9]{1,9})\.").match, weights) if m}
    per_chunk = 1 + max(
        (int(m[1]) for m in map(re.compile(r"block_chunks\.0\.module\.([0-9]{1,9})\.").match, weights) if m), default=0
    )
    if chunks and chunks != set(range(len(chunks))):
        raise WeightError(f"{weights.path} is incomplete: its block chunks are {sorted(chunks)}; download it again")
    recipes: dict[str, Recipe] = {}
    for key in (key for key in weights if key not in _IGNORED_IN_TRANSFORMER):
        name = re.sub(
            r"^block_chunks\.([0-9]{1,9})\.module\.([0-9]{1,9})\.",
            lambda m: f"blocks.{int(m[1]) * per_chunk + int(m[2])}.",
            key,
        )
        for new, recipe in _transformer_recipe(weights, key, name).items():
            _add(recipes, new, recipe, weights)
    return recipes


def _add(recipes: dict[str, Recipe], key: str, recipe: Recipe, weights: Weights) -> None:
    if key in recipes:
        raise WeightError(
            f"{weights.path} has {key} twice, as {recipes[key].sources[0]} and {recipe.sources[0]}; download it again"
        )
    recipes[key] = recipe


def _transformer_recipe(weights: Weights, key: str, name: str) -> dict[str, Recipe]:
    stem, _, leaf = name.rpartition(".")
    folder = key.rpartition(".")[0]
    if leaf in ("q_bias", "zero_k_bias"):
        return {}
    if leaf == "v_bias":
        names = [name for name in ("q_bias", "zero_k_bias", "v_bias") if f"{folder}.{name}" in weights]
        layer = "mat_qkv" if "q_bias" in names else "mat_kv"
        sources = tuple(f"{folder}.{name}" for name in names)
        return {f"{stem}.{layer}.bias": Recipe(sources, lambda *parts: _joined_bias(dict(zip(names, parts))))}
    if leaf in _VECTORS:
        count = _VECTORS[leaf]
        name = f"{stem}.scale_mul.weight" if leaf == "scale_mul_1H11" else f"{name}.weight"
        return {name: Recipe((key,), lambda tensor: tensor.reshape(count or len(tensor), -1))}
    return {name: Recipe((key,))}


def _joined_bias(parts: dict[str, Tensor]) -> Tensor:
    """The bias of a fused projection: query (in self-attention), key (zeros where the file has none), value."""
    if not all(part.is_floating_point() for part in parts.values()):
        raise TypeError("a bias of another type")
    value = parts["v_bias"].float()
    query = [parts["q_bias"].float()] if "q_bias" in parts else []
    return torch.cat([*query, parts.get("zero_k_bias", torch.zeros_like(value)).float(), value])


def tokenizer_recipes(weights: Weights) -> dict[str, Recipe]:
    """Canonical key -> recipe for a VAE's file, with or without the inner `.conv` / `.norm`."""
    wrapped = "encoder.conv_in.conv.weight" in weights
    kept = [key for key in weights if not _IGNORED_IN_TOKENIZER.match(key)]
    logger.debug("%s: %d tensors beside the networks ignored", weights.path, len(weights) - len(kept))
    recipes: dict[str, Recipe] = {}
    for key in kept:
        name = re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", key) if wrapped else key
        _add(recipes, name, Recipe((key,)), weights)
    return recipes


_RECIPES = {TRANSFORMER: transformer_recipes, TOKENIZER: tokenizer_recipes}


def canonical(weights: Weights, part: str) -> Weights:
    """The tensors of a transformer or VAE under canonical keys, made when they are read."""
    selected = select(weights, part)
    recipes = _RECIPES[part](selected)
    meta = {}
    for key, recipe in recipes.items():
        try:
            meta[key] = recipe.make(*(selected.meta[s] for s in recipe.sources))
        except (RuntimeError, TypeError) as error:
            raise WeightError(
                f"{weights.path} has {' and '.join(recipe.sources)} of shapes or types that no {part} has; download it "
                "again"
            ) from error

    def read(key: str) -> Tensor:
        return recipes[key].make(*(selected[s] for s in recipes[key].sources))

    told = {KIND: TEXT_TO_IMAGE} if OF_TEXT_ALONE in selected else {}
    return Weights(weights.path, meta, read, told | weights.metadata).of(selected.place, selected.others)


def tell_taken(weights: Weights, part: str) -> None:
    """Warn where a file holds several copies of a network: which one is taken, and how to take another."""
    if weights.others:
        taken, other = weights.place or "the one without a name", weights.others[0]
        logger.warning(
            "%s holds several copies of a %s: %s is taken; name %s:%s, to `varedit convert` say, to take that one",
            weights.path, part, *map(printable, (taken, weights.path.name, other)),
        )  # fmt: skip


def where_taken(weights: Weights) -> str:
    """Where in its file a network lies, in a few words; nothing where the file is the network."""
    words = place_told(weights.place)
    if not weights.others:
        return words
    words = words or f"where {weights.place or 'the copy without a name'} is taken"
    return f"{words}; {weights.path.name}:{weights.others[0]} takes another"


def load_transformer(
    path: str | Path,
    operations=Operations,
    dtype: torch.dtype = torch.float32,
    device="cpu",
    linears: str = LINEARS[0],
    kind: str = KINDS[0],
    warm: bool = False,
) -> Transformer:
    """Load a transformer of any size; its sizes are read off the file.

    dtype: of the blocks (everything else is fp32). linears: "exact", or "8-bit" (see `eight_bit`): every matrix is
    rounded as it comes. kind: "edit" or "text-to-image"; auto does as the file says (see `told_kind`), and edits
    where it says nothing. warm: whether kernels are compiled meanwhile (see `warm_up`). Tensors go to `device` one by
    one, so that the peak there is the network plus one tensor.

    Raises WeightError, and ValueError for unknown linears or kinds; never loads a part.
    """
    check_linears(linears)
    chosen = checked_kind(kind)
    weights = canonical(open_weights(path), TRANSFORMER)
    network = blank(weights, TRANSFORMER, operations, dtype, kind=chosen)
    store(network, weights)
    if linears == "8-bit":
        prepare(network)
    if warm:
        warm_up(network, device, linears)
    return _filled(network, weights, device)


def load_autoencoder(
    path: str | Path,
    operations=Operations,
    dtype: torch.dtype = torch.float32,
    device="cpu",
    decode_dtype: torch.dtype | None = None,
    warm: bool = False,
) -> Autoencoder:
    """Load a VAE; its sizes are read off the file. Raises WeightError; never loads a part.

    dtype: of the weights, of the decoder's only where decode_dtype names no other. warm: see `load_transformer`.
    """
    weights = canonical(open_weights(path), TOKENIZER)
    network = blank(weights, TOKENIZER, operations, dtype, decode_dtype=decode_dtype)
    if warm:
        warm_up(network, device)
    store(network, weights)
    network = _filled(network, weights, device)
    if operations is Operations and torch.device(device).type == "cuda" and has_triton():
        network.to(memory_format=torch.channels_last)  # as pictures lie there, or every call would do it
    return network


def blank(
    weights: Weights,
    part: str,
    operations=Operations,
    dtype: torch.dtype = torch.float32,
    *,
    kind: str | None = None,
    **more,
) -> Transformer | Autoencoder:
    """The network that canonical weights belong to, on the meta device.

    kind: of a transformer, where not as the file says. more: further arguments of the network. Raises WeightError where
    the weights are not exactly those of one.
    """
    kinds = {TRANSFORMER: (transformer_config, Transformer), TOKENIZER: (autoencoder_config, Autoencoder)}
    read_sizes, network = kinds[part]
    try:
        config = read_sizes(weights.shapes)
        if part == TRANSFORMER:
            config = replace(config, source=(kind or told_kind(weights)) != TEXT_TO_IMAGE)
        with Unfilled():
            empty = network(config, operations, dtype, device="meta", **more)
    except (KeyError, IndexError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise WeightError(f"{weights.path} is not a complete {part}: {reason}; download or convert it again") from error
    wanted = empty.state_dict() if operations is Operations else expected(empty)
    check(weights, {key: tuple(tensor.shape) for key, tensor in wanted.items()})
    return empty


def expected(network: nn.Module) -> dict[str, Tensor]:
    """The network's state with torch's own layers: injected ones may own no weight before they are loaded."""
    dtypes = {name: getattr(network, name) for name in ("dtype", "decode_dtype") if hasattr(network, name)}
    with Unfilled():
        return type(network)(network.config, device="meta", **dtypes).state_dict()


def _filled(network: Transformer | Autoencoder, weights: Weights, device) -> Transformer | Autoencoder:
    tell_taken(weights, TRANSFORMER if isinstance(network, Transformer) else TOKENIZER)
    rounded = {f"{name}.weight" for name, m in network.named_modules() if isinstance(m, EightBitLinear)}
    network.load_state_dict(dict(placed(expected(network), weights, device, rounded)), assign=True)
    return network.eval().requires_grad_(False)


def placed(
    wanted: dict[str, Tensor], weights: Weights, device, rounded: Set[str] = frozenset()
) -> Iterator[tuple[str, Tensor]]:
    """A network's state: the tensors of checked weights one by one on a device, in the types that are wanted; what is
    stored in fewer bits as it is. rounded: keys of weights to be stored in 8 bits."""
    stored = quantised(weights)
    for key in weights:
        if key in wanted or key.endswith(SCALE):
            tensor = weights[key].to(device)
            kept = key in stored or key not in wanted
            tensor = tensor if kept or key in rounded else tensor.to(wanted[key].dtype)
            check_finite(weights, key, tensor)
            if key in rounded and not kept:
                codes, scales = quantise_weight(tensor)
                yield key, codes
                yield f"{key}_scale", scales
            else:
                yield key, tensor


def check(weights: Weights, wanted: dict[str, Sequence[int]]) -> None:
    """Raise WeightError unless the file has exactly the wanted keys and shapes, and weights for them.

    Scales may stand beside quantised matrices, and 4-bit ones hold two numbers a byte.
    """
    missing = sorted(wanted.keys() - weights.keys())
    scaled = quantised(weights)
    unknown = sorted(
        key
        for key in weights.keys() - wanted.keys()
        if not (key.endswith(BESIDE) and f"{key.rpartition('.')[0]}.weight" in scaled & wanted.keys())
    )
    if missing or unknown:
        problem = (
            f"lacks {len(missing)} tensors such as {missing[0]}"
            if missing
            else f"has {len(unknown)} unknown tensors such as {unknown[0]}"
        )
        raise WeightError(
            f"{weights.path} {problem}; it is incomplete or of another architecture, so nothing was loaded"
        )
    for key, shape in wanted.items():
        packed = key in scaled and weights.meta[key].dtype in (torch.uint8, torch.int8)
        if weights.meta[key].shape[: 1 if packed else None] != torch.Size(shape)[: 1 if packed else None]:
            raise WeightError(
                f"{weights.path} has {key} of shape {list(weights.meta[key].shape)} where {list(shape)} was expected; "
                "nothing was loaded"
            )
        if not packed and not has_numbers(weights.meta[key]):
            kind = str(weights.meta[key].dtype).removeprefix("torch.")
            raise WeightError(
                f"{weights.path} has {key} as {kind} where floating-point numbers were expected; use the original file"
            )
