"""The networks of `varedit_core` built from ComfyUI's layers; run as a script by ComfyUI's own Python.

Prints what came of it as JSON. `test_comfyui.py` judges it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from support import GOLDEN, ROOT

RECORD = GOLDEN / "patchify_256.safetensors"


def drop_in(scratch: Path) -> dict:
    """Networks of `varedit_core` built from ComfyUI's layers, compared with the plain ones.

    Numbers are the largest absolute differences of all scales' logits of the recorded run, if not said otherwise.
    """
    from comfy.cli_args import args

    args.cpu = True
    import comfy.ops
    import torch

    torch.set_num_threads(1)  # the networks are too small for more
    with torch.no_grad():
        run = Run()
        kinds = {name: getattr(comfy.ops, name) for name in ("disable_weight_init", "manual_cast")}
        return {
            "layers": {name: run.with_layers(layers) for name, layers in kinds.items()},
            "bf16 file": run.bf16_file(scratch),
            "8-bit": run.eight_bit(scratch),
            "weights after construction": run.dynamic(),
            "partial": run.partial(scratch),
        }


class Run:
    """The recorded run, its networks, and the same run with other networks."""

    def __init__(self) -> None:
        from varedit_core.parity import Record

        self.record = Record.open(RECORD)
        self.pixels = self.record["in.image_u8"].float() / 127.5 - 1
        self.features = self.record.autoencoder.encode(self.pixels)
        self.latents = self.record["ref.tokenizer_features"]
        self.expected = self.logits(self.record.transformer, plain=True)

    def logits(self, transformer, plain: bool = False, device: str = "cpu") -> list:
        """Logits of every scale given the recorded bits; by torch's attention (plain) or by ComfyUI's."""
        from varedit_core import sample
        from varedit_core.model.layers import sdpa

        record, found = self.record, []
        texts = [text.to(device) for text in record.texts("text")]
        attention = sdpa if plain else comfy_attention
        for scale in sample(
            transformer, self.features.to(device), texts, record.schedule, record.settings(), attention=attention
        ):
            found.append(scale.logits)
            scale.bits = record.bits("bits", scale.index, scale.log_odds.shape)
        return found

    def with_layers(self, layers) -> dict[str, float]:
        from varedit_core import load_autoencoder, load_transformer

        autoencoder = load_autoencoder(RECORD, layers)
        return {
            "logits": furthest(self.expected, self.logits(load_transformer(RECORD, layers))),
            "features": furthest([self.features], [autoencoder.encode(self.pixels)]),
            "pixels": furthest([self.record.autoencoder.decode(self.latents)], [autoencoder.decode(self.latents)]),
        }

    def bf16_file(self, scratch: Path) -> dict:
        """Blocks stored in bf16 and computed in fp32: the layers cast at use."""
        import comfy.ops
        import comfy.utils

        from varedit_core import load_transformer
        from varedit_core.files.convert import convert
        from varedit_core.model.transformer import Transformer

        file = scratch / "bf16.safetensors"
        convert(RECORD, file, "bf16")
        network = Transformer(self.record.transformer.config, comfy.ops.manual_cast, device="cpu")
        network.load_state_dict(comfy.utils.load_torch_file(str(file)), assign=True)
        plain = self.logits(load_transformer(file), plain=True)
        return {"stored": str(network.blocks[0].ffn.fc1.weight.dtype), "logits": furthest(plain, self.logits(network))}

    def eight_bit(self, scratch: Path) -> dict:
        from varedit_core import load_transformer

        network, missing = self.eight_bit_network(scratch)
        plain = self.logits(load_transformer(scratch / "fp8.safetensors"), plain=True)
        quantised = [
            name for name, module in network.named_modules() if getattr(module, "quant_format", None) == "float8_e4m3fn"
        ]
        found = self.logits(network)
        return {
            "missing": missing,
            "quantised": len(quantised),
            "logits": furthest(plain, found),
            "loss": furthest(self.expected, found),
        }

    def eight_bit_network(self, scratch: Path):
        """A converted file loaded the way ComfyUI loads its own 8-bit files."""
        import comfy.model_management as mm
        import comfy.ops
        import comfy.utils
        import torch

        from varedit_core.files.convert import convert
        from varedit_core.files.shapes import transformer_config
        from varedit_core.model.transformer import Transformer

        file = scratch / "fp8.safetensors"
        if not file.exists():
            convert(RECORD, file, "fp8")
        state, metadata = comfy.utils.load_torch_file(str(file), return_metadata=True)
        config = transformer_config({key: tuple(tensor.shape) for key, tensor in state.items()})
        state, metadata = comfy.utils.convert_old_quants(state, "", metadata=metadata)

        class Settings:
            quant_config = comfy.utils.detect_layer_quantization(state, "")

        device, types = mm.get_torch_device(), [torch.bfloat16, torch.float32]
        stored = mm.unet_dtype(
            device=device, model_params=comfy.utils.calculate_parameters(state), supported_dtypes=types
        )
        computed = mm.unet_manual_cast(None, device, types)
        layers = comfy.ops.pick_operations(stored, computed, load_device=device, model_config=Settings)
        network = Transformer(config, layers, dtype=computed or stored, device="cpu")
        result = network.load_state_dict(state, strict=False)
        return network.eval(), [*result.missing_keys, *result.unexpected_keys]

    def dynamic(self) -> float:
        """Layers that own no weight before the load, as where ComfyUI streams weights."""
        import comfy.memory_management
        import comfy.ops

        from varedit_core import load_transformer
        from varedit_core.model.transformer import Transformer

        before, comfy.memory_management.aimdo_enabled = comfy.memory_management.aimdo_enabled, True
        try:
            layers = comfy.ops.disable_weight_init
            empty = Transformer(self.record.transformer.config, layers, device="cpu")
            assert empty.head.weight is None, "this ComfyUI makes weights at construction"
            return furthest(self.expected, self.logits(load_transformer(RECORD, layers)))
        finally:
            comfy.memory_management.aimdo_enabled = before

    def partial(self, scratch: Path) -> dict[str, dict]:
        """Networks of which a part is loaded, `meta` playing the GPU, and run there."""
        import torch
        from comfy.ops import disable_weight_init as layers

        from varedit_core import load_autoencoder, load_transformer

        def control():
            network = load_transformer(RECORD, layers)
            network.blocks[0].register_parameter("gain", torch.nn.Parameter(torch.ones(128)))
            network.register_buffer("offset", torch.ones(1))
            return network

        def edit(network):
            self.logits(network, plain=True, device="meta")

        def tokenize(network):
            network.decode(network.encode(self.pixels.to("meta")))

        return {
            "transformer": loaded_in_part(lambda: load_transformer(RECORD, layers), edit),
            "autoencoder": loaded_in_part(lambda: load_autoencoder(RECORD, layers), tokenize),
            "8-bit transformer": loaded_in_part(lambda: self.eight_bit_network(scratch)[0], edit),
            "control": loaded_in_part(control, lambda network: network.offset + self.pixels.to("meta")),
        }


def comfy_attention(q, k, v, *, scale: float, mask=None):
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(q, k, v, q.shape[1], mask=mask, skip_reshape=True, scale=scale)


def furthest(expected: list, found: list) -> float:
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(expected, found, strict=True))


def loaded_in_part(make, forward) -> dict:
    """homeless: tensors that no ComfyUI layer owns. Of half a load and of next to none: how many tensors moved to
    the device and how many stayed behind, which of the latter no layer fetches, and how a forward there ended."""
    import comfy.model_patcher
    import torch

    result = {
        "homeless": [
            name for name, layer in owners(make()) if not hasattr(layer, "comfy_cast_weights") or list(layer.children())
        ]
    }
    for share in (0.5, 0.0):
        network = make()
        patcher = comfy.model_patcher.ModelPatcher(network, torch.device("meta"), torch.device("cpu"))
        patcher.patch_model(torch.device("meta"), lowvram_model_memory=int(share * patcher.model_size()) or 1)
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        behind = [(name, layer) for name, layer in owners(network) if tensors[name].device.type == "cpu"]
        stuck = [name for name, layer in behind if not getattr(layer, "comfy_cast_weights", False)]
        try:
            forward(network)
            end = "ran"
        except RuntimeError as error:
            end = str(error)
        result[str(share)] = {"moved": len(tensors) - len(behind), "behind": len(behind), "stuck": stuck, "end": end}
    return result


def owners(network):
    """(name, module) of every parameter and buffer."""
    for prefix, module in network.named_modules():
        for name in (*module._parameters, *module._buffers):
            if getattr(module, name) is not None:
                yield f"{prefix}.{name}".lstrip("."), module


if __name__ == "__main__":
    # ComfyUI's folder first: `import nodes` and the like must mean its modules, not this repository's folders.
    sys.path[:] = [os.getcwd(), *sys.path, str(ROOT)]
    print(json.dumps(drop_in(Path(sys.argv[1]))))
