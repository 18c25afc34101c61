"""Training of a LoRA (arXiv 2106.09685) for the transformer: low-rank layers beside its frozen linear layers.

The layers are peft's, injected in place: `Transformer.condition`, `embed`, `forward` and `logits` work as before,
since they only ever call modules. The files are those that `varedit_core.files.lora` and ComfyUI's LoRA loader read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files.convert import check_result
from ..files.lora import PREFIX, linear_layers, read_lora
from ..files.safe_write import make_folder
from ..files.tensor_files import write_tensors
from ..files.weights import WeightError
from ..model.transformer import Transformer
from .sharded import whole

ATTENTION = r"blocks\.\d+\.(sa\.(mat_qkv|proj)|ca\.(mat_q|mat_kv|proj))"
MLP = r"blocks\.\d+\.ffn\.fc[12]"
AROUND = r"text_proj_for_ca\.\d+|word_embed|head|shared_ada_lin\.\d+|head_nm\.ada_lin\.\d+"
GROUPS = {"attention": ATTENTION, "mlp": MLP, "all": f"{ATTENTION}|{MLP}|{AROUND}"}
ADAPTER = "default"


def add_lora(
    transformer: Transformer,
    rank: int,
    alpha: float | None = None,
    targets: str | Sequence[str] = ("attention", "mlp"),
) -> list[str]:
    """Put trainable low-rank layers beside linear layers and freeze all else; returns those layers' names.

    alpha: the update is alpha / rank * up @ down; the rank by default. targets: names of `GROUPS`, or regular
    expressions for the end of a layer's name, such as "ffn.fc1" or "blocks.0.ca.proj". The new parameters, down
    [rank, inputs] (random) and up [outputs, rank] (zero), are fp32, whatever the layer's type; at first the network
    computes what it did. ValueError for a bad choice, ImportError without peft; nothing has changed then.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA must be at least 1, got {rank}")
    _check_plain(transformer)
    names = _selected(linear_layers(transformer), [targets] if isinstance(targets, str) else targets)
    _inject(transformer, names, rank, rank if alpha is None else alpha)
    return names


def lora_state(transformer: Transformer) -> dict[str, Tensor]:
    """The low-rank layers as ComfyUI names them: `diffusion_model.<layer>.lora_A.weight` [rank, inputs],
    `.lora_B.weight` [outputs, rank] and `.alpha` []; copies on the CPU, in fp32. ValueError where there are none."""
    state: dict[str, Tensor] = {}
    for name, layer in lora_layers(transformer):
        for part, matrix in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            state[f"{PREFIX}{name}.{part}.weight"] = whole(matrix[ADAPTER].weight).float().cpu().clone()
        state[f"{PREFIX}{name}.alpha"] = torch.tensor(float(layer.lora_alpha[ADAPTER]))
    if not state:
        raise ValueError("the transformer has no LoRA; add one with add_lora")
    return state


def save_lora(
    path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, overwrite: bool = False
) -> None:
    """Write low-rank layers (see `lora_state`) to a safetensors file, which appears whole or not at all.

    Raises ValueError for another suffix, FileExistsError where the file exists.
    """
    path = Path(path)
    check_result(path, overwrite)
    make_folder(path.parent)
    write_tensors(path, state, {"format": "pt", "varedit.architecture": "varedit-lora", **(metadata or {})}, overwrite)


def load_lora_for_training(transformer: Transformer, path: str | Path) -> dict[str, str]:
    """Add the low-rank layers of a file, to go on training them; returns the file's metadata.

    Raises WeightError where the file is no LoRA for this transformer or mixes ranks or alphas, ImportError without
    peft; nothing has changed then.
    """
    _check_plain(transformer)
    file = read_lora(path)
    updates = file.matched(transformer)
    summary = file.summary()
    if len(summary["rank"]) > 1 or len(summary["alpha"]) > 1:
        raise WeightError(
            f"{path} has the ranks {summary['rank']} and alphas {summary['alpha']}; go on with a file that has one of "
            "each"
        )
    _inject(transformer, list(updates), summary["rank"][0], summary["alpha"][0])
    with torch.no_grad():
        for name, layer in lora_layers(transformer):
            layer.lora_A[ADAPTER].weight.copy_(file.weights[updates[name].down])
            layer.lora_B[ADAPTER].weight.copy_(file.weights[updates[name].up])
    return file.weights.metadata


def lora_layers(transformer: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer that has a low-rank layer beside it."""
    return ((name, layer) for name, layer in transformer.named_modules() if ADAPTER in getattr(layer, "lora_A", ()))


def _check_plain(transformer: Transformer) -> None:
    if any(True for _ in lora_layers(transformer)):
        raise ValueError("the transformer has a LoRA already; load the transformer anew to begin another")


def _selected(layers: Mapping[str, nn.Linear], targets: Sequence[str]) -> list[str]:
    found: set[str] = set()
    for target in targets:
        try:
            pattern = re.compile(GROUPS[target] if target in GROUPS else rf"(.*\.)?({target})")
        except re.error as error:
            raise ValueError(f"the target {target!r} is no regular expression ({error}); mend it") from None
        named = {name for name in layers if pattern.fullmatch(name)}
        if not named:
            raise ValueError(
                f"no linear layer of the transformer is named {target!r}; use {', '.join(GROUPS)} or a name such as "
                f"{next(iter(layers))}"
            )
        found |= named
    if not found:
        raise ValueError(f"there is nothing to train; name targets, such as {', '.join(GROUPS)}")
    return [name for name in layers if name in found]


def _inject(transformer: Transformer, names: Sequence[str], rank: int, alpha: float) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("training a LoRA needs peft; install it with pip install peft") from None
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="|".join(map(re.escape, names)))
    inject_adapter_in_model(config, transformer, ADAPTER)
    for _, layer in lora_layers(transformer):
        # Made in the type of the layer's weight, whose steps are too coarse for small updates (bf16) or zero (8-bit).
        layer.lora_A[ADAPTER].float()
        layer.lora_B[ADAPTER].float()
        layer.reset_lora_parameters(ADAPTER, True)
