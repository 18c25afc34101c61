"""The pack's nodes inside ComfyUI's modules; run as a script by ComfyUI's own Python.

Prints what came of it as JSON. `test_in_comfyui.py` judges it.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import tempfile
import traceback
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from support import GOLDEN, ROOT

DEMO = ROOT / "demo"
CAT, SCENE = ROOT / "samples" / "cat.jpg", ROOT / "samples" / "scene.png"
FORMATS = {
    "float8_e4m3fn": "TensorCoreFP8E4M3Layout", "int8_tensorwise": "TensorWiseINT8Layout",
    "nvfp4": "TensorCoreNVFP4Layout", "mxfp8": "TensorCoreMXFP8Layout",
}  # fmt: skip


class Probe:
    """The pack's nodes by name, the demo model's parts, and an edit by them."""

    def __init__(self, scratch: Path) -> None:
        from benchmarks.comfyui import start_comfyui

        self.scratch, self.nodes = scratch, start_comfyui(scratch, Path.cwd())
        sys.path.append(str(ROOT))  # the library, as it is used without ComfyUI
        import torch

        import nodes as core

        torch.set_num_threads(2)
        self.core, self.torch, self.pack = core, torch, sys.modules["varedit_pack"]
        self.running = self.module("nodes.adapters.running")
        self.memory = self.module("varedit_core.runtime.memory")
        self.model = self.run("ModelLoader", "varedit_demo.safetensors", "auto")
        self.clip = self.run("TextEncoderLoader", "varedit_demo_t5.safetensors")
        self.vae = self.run("VAELoader", "varedit_demo_tokenizer.safetensors")
        self.cat = self.image(CAT)
        self.source = self.run("SourceEncode", self.vae, self.cat, "256", "square")
        self.text = self.run("TextEncode", self.clip, "make it sepia")
        self.sepia = self.sample()

    @staticmethod
    def module(name: str):
        """A module of the pack."""
        return import_module(f"varedit_pack.{name}")

    def run(self, name: str, *arguments, **kw):
        """A node's first output."""
        return self.nodes[f"VAREdit{name}"].execute(*arguments, **kw).result[0]

    def sample(self, model=None, source=None, text=None, seed=0, guidance=2.0, temperature=0.1, **kw):
        """The summed codes of an edit."""
        latent = self.run(
            "Sampler", model or self.model, source or self.source, text or self.text, seed, guidance, temperature, **kw
        )
        return latent["samples"]

    def image(self, path):
        import numpy as np
        from PIL import Image

        return self.torch.from_numpy(np.array(Image.open(path).convert("RGB"), dtype=np.float32) / 255)[None]

    @contextmanager
    def decoding_once(self):
        """The VAE decodes the same latent only once: for parts that make many pictures of one edit."""
        known, decode = [], self.vae.decode

        def remembered(latent):
            if not any(self.torch.equal(latent, one) for one, _ in known):
                known.append((latent.clone(), decode(latent)))
            return next(pixels.clone() for one, pixels in known if self.torch.equal(latent, one))

        self.vae.decode = remembered
        try:
            yield
        finally:
            del self.vae.decode

    def error(self, function, *arguments, **kw) -> str:
        """The error of a call, as ComfyUI shows it; "" for none."""
        try:
            function(*arguments, **kw)
        except Exception as error:
            return f"{type(error).__module__}.{type(error).__name__}: {error}"
        return ""

    def same_as_the_library(self) -> dict:
        """Largest difference in 8-bit levels between the pack's picture and the library's, by instruction."""
        import numpy as np

        from varedit_core import Editor, SamplingSettings
        from varedit_core.demo import demo_files

        editor, found = Editor.load(*demo_files(), device="cpu"), {}
        for path, words, seed in ((CAT, "make it sepia", 0), (SCENE, "make the background cyan", 7)):
            source = self.run("SourceEncode", self.vae, self.image(path), "256", "square")
            text = self.run("TextEncode", self.clip, words)
            latent = self.run("Sampler", self.model, source, text, seed, 2.0, 0.1)
            picture = self.run("Decode", self.vae, latent)[0]
            (expected,) = editor.edit(path, words, size="0.06M", settings=SamplingSettings(2.0, seed=seed))
            saved = np.clip(255.0 * picture.numpy(), 0, 255).astype(np.uint8)  # as SaveImage does
            found[words] = int(np.abs(saved.astype(int) - np.asarray(expected).astype(int)).max())
        return found

    def stock_nodes(self) -> dict:
        """ComfyUI's own nodes on our types."""
        core, torch = self.core, self.torch
        text = core.CLIPTextEncode().encode(self.clip, "make it sepia")[0]
        latent = {"samples": self.sample(text=text)}
        decoded = core.VAEDecode().decode(self.vae, latent)[0]
        tiled = core.VAEDecodeTiled().decode(self.vae, latent, 128, 32)[0]
        square = torch.rand(1, 256, 256, 3)
        encoded = core.VAEEncode().encode(self.vae, square)[0]
        from_stock = self.run("Decode", self.vae, {"samples": self.sample(source=encoded)})
        odd = core.VAEEncode().encode(self.vae, torch.rand(1, 100, 60, 3))[0]
        loader = core.LoraLoaderModelOnly()
        duotone = loader.load_lora_model_only(self.model, "varedit_demo_duotone.safetensors", 1.0)[0]
        instruction = self.run("TextEncode", self.clip, "make it a duotone")
        plain, styled = self.sample(text=instruction), self.sample(duotone, text=instruction)
        return {
            "text": torch.equal(latent["samples"], self.sepia),
            "decoded": list(decoded.shape), "tiled": (tiled - decoded).abs().mean().item(),
            "encoded": list(encoded["samples"].shape), "from stock": list(from_stock.shape),
            "odd": self.error(self.sample, source=odd),
            "lora changes": (plain != styled).float().mean().item(),
            "lora as the library": (styled == self._library_lora()).float().mean().item(),
            "after lora": torch.equal(self.sample(), self.sepia),
        }  # fmt: skip

    def _library_lora(self):
        """The sums of the same edit by the library, its LoRA merged into fp32 weights."""
        from varedit_core import SamplingSettings, load_transformer, sample, schedule_for
        from varedit_core.files.lora import apply_lora

        transformer = load_transformer(DEMO / "diffusion_models" / "varedit_demo.safetensors")
        apply_lora(transformer, DEMO / "loras" / "varedit_demo_duotone.safetensors")
        text = self.run("TextEncode", self.clip, "make it a duotone")[0][0]
        features, settings = self.source["samples"], SamplingSettings(2.0)
        *_, last = sample(transformer, features, list(text), schedule_for("0.06M"), settings)
        return last.running_sum

    def wrappers(self) -> dict:
        """Stock nodes that work through a model's options: compilation, attention overrides, another device."""
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        calls = []

        def override(function, *args, **kw):
            calls.append(args[0].shape)
            return function(*args, **kw)

        attending = self.model.clone()
        attending.model_options["transformer_options"]["optimized_attention_override"] = override
        graphs = []

        def backend(graph, inputs):
            graphs.append(len(graph.graph.nodes))
            return graph.forward

        compiled = self.model.clone(disable_dynamic=True)
        set_torch_compile_wrapper(compiled, backend=backend)
        results = [self.sample(model) for model in (attending, compiled, self._on_device("cpu"))]

        def deaf(function, *args, scale=None, **kw):
            return function(*args, **kw)  # takes the usual scale, whatever it is told

        unscaled = self.model.clone()
        unscaled.model_options["transformer_options"]["optimized_attention_override"] = deaf
        another = self.model.cached_patcher_init[0](*self.model.cached_patcher_init[1], disable_dynamic=True)
        return {
            "equal": [self.torch.equal(result, self.sepia) for result in results],
            "attention calls": len(calls),
            "graphs": len(graphs),
            "nodes": max(graphs, default=0),
            "without scale": (self.sample(unscaled) - self.sepia).abs().mean().item(),
            "restored": type(self.model.model.diffusion_model).__name__,
            "again": self.torch.equal(self.sample(another), self.sepia) and another.model is not self.model.model,
        }

    def _on_device(self, device: str):
        """The model as the stock node for devices gives it; the model itself where ComfyUI has no such node."""
        try:
            from comfy_extras.nodes_multigpu import SelectModelDeviceNode
        except ImportError:
            return self.model
        return SelectModelDeviceNode.execute(self.model, device).result[0]

    def pictures(self) -> dict:
        """Batches, odd sizes, alpha, grey, masks of all kinds."""
        torch = self.torch
        torch.manual_seed(1)
        images = torch.rand(2, 37, 61, 4)
        before = images.clone()
        source = self.run("SourceEncode", self.vae, images, "256", "square")
        latent = self.run("Sampler", self.model, source, self.text, 3, 2.0, 0.1)
        singles = []
        for i in range(2):
            one = self.run("SourceEncode", self.vae, images[i : i + 1], "256", "square")
            singles.append(self.sample(source=one, seed=3 + i)[0])
        decode = self.nodes["VAREditDecode"].execute
        with_alpha = decode(self.vae, latent, images).result[0]
        mask = torch.zeros(11, 13)
        mask[:5] = 1
        masked = decode(self.vae, latent, images, mask).result[0]
        inverse = decode(self.vae, latent, images, 1 - mask).result[0]
        noise_mask = decode(self.vae, {**latent, "noise_mask": mask[None]}, images).result[0]
        grey = torch.rand(1, 20, 20, 1)
        grey_source = self.run("SourceEncode", self.vae, grey, "256", "square")
        grey_latent = {"samples": self.sample(source=grey_source), "varedit": grey_source["varedit"]}
        wide = self.run("SourceEncode", self.vae, torch.rand(1, 90, 250, 3), "256", "aspect")
        return {
            "plain": list(decode(self.vae, latent).result[0].shape),
            "alpha": [list(with_alpha.shape), torch.equal(with_alpha[..., 3], images[..., 3])],
            "rows": [(a == b).float().mean().item() for a, b in zip(singles, latent["samples"])],
            "kept below": torch.equal(masked[:, 20:, :, :3], images[:, 20:, :, :3]),
            "edited above": torch.equal(masked[:, :14], with_alpha[:, :14]),
            "inverse": torch.equal(inverse[:, :14, :, :3], images[:, :14, :, :3]),
            "noise mask": torch.equal(noise_mask, masked),
            "empty mask": torch.equal(decode(self.vae, latent, images, torch.zeros(1, 64, 64)).result[0], with_alpha),
            "grey": list(decode(self.vae, grey_latent, grey, torch.ones(4, 4)).result[0].shape),
            "aspect": list(wide["samples"].shape),
            "crop": self._crop(images[:1]),
            "untouched": torch.equal(images, before),
            "errors": {
                "mask without image": self.error(decode, self.vae, latent, None, mask),
                "three masks": self.error(decode, self.vae, latent, images, torch.ones(3, 8, 8)),
                "other image": self.error(decode, self.vae, latent, self.cat),
                "nan image": self.error(self.run, "SourceEncode", self.vae, images * float("nan"), "256", "square"),
                "resized latent": self.error(decode, self.vae, {**latent, "samples": latent["samples"][..., :8, :8]}),
            },
        }  # fmt: skip

    def _crop(self, image) -> dict:
        """The fit that edits the middle alone, with the picture and without."""
        torch, decode = self.torch, self.nodes["VAREditDecode"].execute
        told, warned = [], []
        sys.modules["varedit_pack.nodes.encode"].tell = lambda node, text: told.append(text)
        sys.modules["varedit_pack.nodes.decode"].tell = lambda node, text: warned.append(text)
        source = self.run("SourceEncode", self.vae, image, "256", "crop")
        latent = self.run("Sampler", self.model, source, self.text, 3, 2.0, 0.1)
        shown, weight = decode(self.vae, latent, image).result
        alone, _ = decode(self.vae, latent).result
        beside = weight[0] == 0
        return {
            "beside": beside.sum().item(), "told": told[:], "warned": warned[:],
            "kept": torch.equal(shown[0][beside], image[0][beside]),
            "edited": torch.equal(shown[0][~beside][:, :3], alone[0][~beside][:, :3]),
            "white": alone[0][beside].min().item(),
        }  # fmt: skip

    def scales(self) -> dict:
        """The sampler's second output, and its pictures."""
        _, scales, *_ = self.nodes["VAREditSampler"].execute(self.model, self.source, self.text, 0, 2.0, 0.1).result
        module = self.module("nodes.adapters.pictures")
        found = {"sums": list(scales["samples"].shape), "last": self.torch.equal(scales["samples"][-1:], self.sepia)}
        for method in ("full", "own", "fast"):
            images, sheet = module.scale_pictures(self.vae, scales, method)
            found[method] = [[list(image.shape) for image in images], list(sheet.shape)]
        found["wrong"] = self.error(module.scale_pictures, self.vae, {"samples": self.sepia}, "full")
        return found

    def previews(self) -> dict:
        """What the progress bar is told, by choice of preview and by ComfyUI's setting."""
        import comfy.utils
        from comfy.cli_args import LatentPreviewMethod, args

        found = {}
        for setting in (LatentPreviewMethod.NoPreviews, LatentPreviewMethod.Latent2RGB):
            for choice in (
                ("auto", "fast", "decoded", "off") if setting == LatentPreviewMethod.NoPreviews else ("auto",)
            ):
                calls = []
                args.preview_method = setting
                comfy.utils.PROGRESS_BAR_HOOK = lambda value, total, preview, node_id=None, calls=calls: calls.append(
                    [value, total, list(preview[1].size) if preview else None]
                )
                same = self.torch.equal(self.sample(preview=choice, vae=self.vae), self.sepia)
                found[f"{choice}, {setting.value}"] = {"calls": calls, "same": same}
        comfy.utils.PROGRESS_BAR_HOOK = None
        args.preview_method = LatentPreviewMethod.NoPreviews
        given = self.model, self.source, self.text, self.vae, 0, 2.0, 0.0, "guidance", "1, 2, 2", "none", ""
        found["sweep"] = self._progress(lambda: self.nodes["VAREditSweep"].execute(*given))
        found["no vae"] = self.error(self.sample, preview="decoded")
        return found

    def bad_input(self) -> dict:
        """Errors of inputs that do not belong."""
        torch, core = self.torch, self.core
        load = {name: self.module(f"nodes.adapters.{name}") for name in ("model", "vae", "text_encoder")}
        transformer, tokenizer = (
            DEMO / "diffusion_models" / "varedit_demo.safetensors",
            DEMO / "vae" / "varedit_demo_tokenizer.safetensors",
        )
        broken = load["model"].load_model(transformer)
        broken.model.diffusion_model.blocks[3].ffn.fc1.weight.data[:] = float("nan")
        spoiled = load["vae"].load_vae(tokenizer)
        spoiled.first_stage_model.decoder.conv_out.bias.data[:] = float("nan")
        latent = {"samples": torch.zeros(1, 16, 32, 32)}
        foreign = [[torch.zeros(1, 77, 2048), {"pooled_output": torch.zeros(1, 1280)}]]
        (empty,) = core.CLIPTextEncode().encode(self.clip, "")
        large = self.run("SourceEncode", self.vae, self.cat, "512", "square")
        return {
            "ksampler": self.error(
                core.KSampler().sample, self.model, 0, 2, 8.0, "euler", "normal", self.text, self.text, latent
            ),
            "empty text": self.error(self.run, "TextEncode", self.clip, " \n"),
            "empty stock text": self.error(self.sample, text=empty),
            "empty negative": self.torch.equal(self.sample(negative=empty), self.sepia),
            "two texts": self.error(self.sample, text=self.text * 2),
            "foreign text": self.error(self.sample, text=foreign),
            "foreign latent": self.error(self.sample, source={"samples": torch.zeros(1, 4, 64, 64)}),
            "large": self.error(self.sample, source=large),
            "vae as model": self.error(self.sample, model=self.vae),
            "model as vae": self.error(self.run, "SourceEncode", self.model, self.cat, "256", "square"),
            "vae as clip": self.error(self.run, "TextEncode", self.vae, "x"),
            "vae file as model": self.error(load["model"].load_model, tokenizer),
            "model file as vae": self.error(load["vae"].load_vae, transformer),
            "model file as clip": self.error(load["text_encoder"].load_clip, transformer),
            "nan weights": self.error(self.sample, model=broken),
            "nan vae": self.error(self.run, "Decode", spoiled, {"samples": self.sepia}),
            "missing": self.error(self.run, "ModelLoader", "8B-1024.safetensors", "auto"),
        }  # fmt: skip

    def wrong_pairs(self) -> dict:
        """Errors wherever a published size's layout meets the other's VAE, latent or model; the size of a picture by
        parts that belong together."""
        load = {name: self.module(f"nodes.adapters.{name}") for name in ("model", "vae", "token_latents")}
        files = {"8B": GOLDEN / "patchify_256.safetensors", "2B": GOLDEN / "plain_256.safetensors"}
        models = {size: self._converted(file, f"{size}-transformer.safetensors") for size, file in files.items()}
        vaes = {size: load["vae"].load_vae(file) for size, file in files.items()}
        features, edits, found = self.torch.ones(1, 3, 256), {}, {}
        text = [[features, {self.module("nodes.adapters.text_encoder").MARK: features}]]
        sources = {size: self.run("SourceEncode", vae, self.cat, "256", "square") for size, vae in vaes.items()}
        for size in files:
            given = models[size], sources[size], text, 0, 1.0, 0.0
            edits[size] = self.nodes["VAREditSampler"].execute(*given, vae=vaes[size]).result
            load["token_latents"].save_tokens(edits[size][0], self.scratch / f"{size}.safetensors", {})
        drafted = self.run("Shortcuts", 0, 0, 0.0, 0, 2)
        for size, other in (("8B", "2B"), ("2B", "8B")):
            model, vae, source, wrong = models[size], vaes[size], sources[size], vaes[other]
            latent, scales, *_ = edits[size]
            given = model, source, text, wrong, 0, 1.0, 0.0, "guidance", "1", "none", ""
            error, tokens = self.error, self.scratch / f"{size}.safetensors"
            found[size] = {
                "source": error(self.sample, model, sources[other], text),
                "latent of a stock node": error(self.sample, model, {"samples": sources[other]["samples"]}, text),
                "vae of the sampler": error(self.sample, model, source, text, vae=wrong),
                "begun": error(self.sample, model, source, text, begun=edits[other][0]),
                "drafter": error(self.sample, model, source, text, drafter=models[other], shortcuts=drafted),
                "sweep": error(self.run, "Sweep", *given),
                "decode": error(self.run, "Decode", wrong, latent),
                "stock decode": error(self.core.VAEDecode().decode, wrong, latent),
                "scale preview": error(self.run, "ScalePreview", wrong, scales, "full"),
                "tokens": error(load["token_latents"].load_tokens, tokens, wrong),
            }
            found[size]["right"] = list(self.run("Decode", vae, latent).shape)
        return found

    def _converted(self, file: Path, name: str):
        """The transformer of a recording, whose numbers lie there in 8 bits."""
        self.module("varedit_core.files.convert").convert(file, self.scratch / name, "fp32", overwrite=True)
        return self.module("nodes.adapters.model").load_model(self.scratch / name)

    def text_cache(self) -> dict:
        """Features kept in files: the same, and no text encoder is loaded for them."""
        import comfy.model_management as mm
        import folder_paths

        before, loads, said = folder_paths.get_user_directory(), [], []
        encode, load = self.module("nodes.adapters.text_encoder").encode, mm.load_models_gpu
        sys.modules["varedit_pack.nodes.encode"].tell = lambda node, text: said.append(text)
        plain = encode(self.clip, "make it sepia")[0]
        mm.load_models_gpu = lambda *given, **more: (loads.append(1), load(*given, **more))[1]
        with tempfile.TemporaryDirectory() as folder:
            folder_paths.set_user_directory(folder)
            try:
                made = self.run("TextEncode", self.clip, "make it sepia", "on")
                first = len(loads)
                kept = self.run("TextEncode", self.clip, "make it sepia", "on")
                files = [path for path in Path(folder).rglob("*") if path.is_file()]
                patched = self.clip.clone()
                patched.patcher.patches = {"x": []}
                self.run("TextEncode", patched, "make it sepia", "on")
                return {
                    "equal": [self.torch.equal(one[0][0], plain[0][0]) for one in (made, kept)],
                    "facts": [sorted(one[0][1]) for one in (plain, made, kept)],
                    "marked": kept[0][1]["varedit_text"] is kept[0][0], "loads": [first, len(loads)],
                    "files": [path.name for path in files], "words": [b"sepia" in path.read_bytes() for path in files],
                    "said": said,
                }  # fmt: skip
            finally:
                folder_paths.set_user_directory(before)
                mm.load_models_gpu = load

    def long_text(self) -> dict:
        """A text of more than 512 tokens."""
        said = []
        sys.modules["varedit_pack.nodes.encode"].tell = lambda node, text: said.append(text)
        conditioning = self.run("TextEncode", self.clip, "make it sepia " * 300)
        found = {"said": said[:], "tokens": conditioning[0][0].shape[1]}
        said.clear()
        self.run("TextEncode", self.clip, "把背景变成蓝色")
        return {**found, "chinese": said[:]}

    def ladder(self) -> dict:
        """Every way to run, as if it were planned, by a pretended budget, and by memory that runs out while running."""
        import comfy.model_management as mm
        from varedit_pack.varedit_core.runtime.plan import plans

        two = self.torch.cat([self.cat, self.cat])
        source = self.run("SourceEncode", self.vae, two, "256", "square")
        expected = self.sample(source=source)
        job = self._job(source, 2)
        comfy_memory, found = self.running.ComfyMemory, {}
        real, within, plan = self.running.free_memory, comfy_memory.within, self.memory.plan
        sampler = sys.modules["varedit_pack.nodes.sampler"]
        for index, way in enumerate(plans(job)):
            said = found[f"said of {name(way)}"] = []
            sampler.tell = lambda node, text, said=said: said.append(text)
            if index < 2:  # chosen by what is free
                self.running.free_memory = lambda model, need=way.needed: need
            else:
                self.running.free_memory, self.memory.plan = real, lambda *_, way=way: way
            found[name(way)] = (self.sample(source=source) == expected).float().mean().item()
        self.memory.plan = plan
        self.running.free_memory = lambda model: 1000
        found["nothing fits"] = self.error(self.sample, source=source)
        self.running.free_memory = real
        tried, held, attention_of = [], [], self.running.attention_of

        def noting(memory, plan, *arguments):
            tried.append(name(plan))
            held.append(self._stored())
            return within(memory, plan, *arguments)

        def scarce(*arguments):
            """Attention that runs out of memory in the middle of the first two attempts."""
            attend, calls = attention_of(*arguments), []

            def counted(*args, **kw):
                calls.append(1)
                if len(tried) < 3 and len(calls) > 60:
                    raise self.torch.OutOfMemoryError("not enough")
                return attend(*args, **kw)

            return counted

        said = []
        sampler.tell = lambda node, text: said.append(text)
        mm.unload_all_models()
        comfy_memory.within, self.running.attention_of = noting, scarce
        self.sample(source=source)
        self.running.attention_of = attention_of
        comfy_memory.within = lambda *_: (_ for _ in ()).throw(self.torch.OutOfMemoryError("never enough"))
        found["never enough"] = self.error(self.sample, source=source)
        comfy_memory.within = within
        return {**found, "tried": tried, "held": held, "said": said}

    @staticmethod
    def _stored() -> int:
        """Tensors that stores still hold; without a collection, which ComfyUI makes only now and then."""
        from varedit_pack.varedit_core.runtime.kv_caches import DeviceCache

        # By type: an instance check would ask weak references to what is gone.
        return sum(len(store.keys) for store in gc.get_objects() if issubclass(type(store), DeviceCache))

    def _apart(self, model, transformer) -> float:
        """The largest difference of what ComfyUI and the library read of a file's matrices, relative to the largest
        number of each."""
        torch, worst = self.torch, 0.0
        for name, module in model.model.diffusion_model.named_modules():
            if hasattr(getattr(module, "weight", None), "_qdata"):
                theirs, ours = module.weight.dequantize().float(), transformer.get_submodule(name).matrix(torch.float32)
                worst = max(worst, ((theirs - ours).abs().max() / theirs.abs().max()).item())
        return worst

    def _unknown(self, load, file: Path) -> list[str]:
        """What a ComfyUI says that knows no rotation, and one that does not know the format."""
        from types import SimpleNamespace

        import comfy.quant_ops as ops

        real, said = dict(ops.QUANT_ALGOS), []
        kind, older = ops.get_layout_class, SimpleNamespace(Params=SimpleNamespace(__dataclass_fields__={}))
        ops.get_layout_class = lambda name: older
        said.append(self.error(load, file))
        ops.get_layout_class = kind
        del ops.QUANT_ALGOS["int8_tensorwise"]
        said.append(self.error(load, file))
        ops.QUANT_ALGOS.update(real)
        return said

    def forms(self) -> dict:
        """Whether the loaders take networks out of a training's checkpoint and of several files as they take the bare
        ones."""
        from safetensors.torch import load_file, save_file

        load = {name: self.module(f"nodes.adapters.{name}") for name in ("model", "vae")}
        bare = (
            DEMO / "diffusion_models" / "varedit_demo.safetensors",
            DEMO / "vae" / "varedit_demo_tokenizer.safetensors",
        )
        net, vae = map(load_file, bare)
        average = {key: t + 1 for key, t in net.items()}
        trainer = {"vae_local": vae, "gpt_fsdp": {f"_orig_mod.{key}": t for key, t in net.items()}}
        trainer |= {"gpt_ema_fsdp": average, "gpt_fsdp_opt": {"state": {key: {"exp_avg": t} for key, t in net.items()}}}
        whole = self.scratch / "trainer.pth"
        self.torch.save({"trainer": trainer, "epoch": 1, "args": {"tlen": 512}}, whole)
        flat = self.scratch / "trainer.safetensors"
        parts = {"trainer.vae_local": vae, "trainer.gpt_fsdp": net, "trainer.gpt_ema_fsdp": average}
        save_file({f"{name}.{key}": t for name, part in parts.items() for key, t in part.items()}, flat)
        shards = [self.scratch / f"net-{n:05}-of-00002.safetensors" for n in (1, 2)]
        for n, shard in enumerate(shards):
            save_file({key: net[key] for key in sorted(net)[n::2]}, shard)

        def state(network):
            return {key: t.cpu() for key, t in network.state_dict().items()}

        def model(path):
            return state(load["model"].load_model(path).model.diffusion_model)

        def tokenizer(path):
            return state(load["vae"].load_vae(path).first_stage_model)

        ways = [(model, bare[0], (whole, flat, *shards)), (tokenizer, bare[1], (whole, flat))]
        found = {}
        for take, plain, others in ways:
            wanted = take(plain)
            for path in others:
                ours = take(path)
                equal = ours.keys() == wanted.keys() and all(self.torch.equal(ours[key], wanted[key]) for key in wanted)
                found[f"{take.__name__} of {path.name}"] = equal
        shards[0].unlink()
        return found | {"lacking": self.error(load["model"].load_model, shards[1])}

    def formats(self) -> dict:
        """The transformer's file in ComfyUI's quantised formats: layers, and share of bits that stay."""
        from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
        from safetensors.torch import load_file, save_file

        from varedit_core import load_transformer
        from varedit_core.files.convert import FORMS, convert

        load = sys.modules["varedit_pack.nodes.adapters.model"].load_model
        file = DEMO / "diffusion_models" / "varedit_demo.safetensors"
        state = load_file(file)
        matrices = [
            key
            for key, t in state.items()
            if key.startswith("blocks.") and t.ndim == 2 and "ada_gss" not in key and "scale_mul" not in key
        ]
        found = {"matrices": len(matrices)}
        files = {}
        for name, layout in FORMATS.items():
            if name not in QUANT_ALGOS:
                continue
            coded = {key: t for key, t in state.items() if key not in matrices}
            for key in matrices:
                coded.update(QuantizedTensor.from_float(state[key].bfloat16(), layout).state_dict(key))
                note = json.dumps({"format": name}).encode()
                coded[key.replace(".weight", ".comfy_quant")] = self.torch.tensor(list(note), dtype=self.torch.uint8)
            files[name] = self.scratch / f"{name}.safetensors"
            save_file({key: t.contiguous() for key, t in coded.items()}, files[name])
        for precision in FORMS:
            files[f"our {precision}"] = self.scratch / f"our {precision}.safetensors"
            convert(file, files[f"our {precision}"], precision)
        files["plain fp8"] = self.scratch / "plain.safetensors"
        save_file(
            {key: t.to(self.torch.float8_e4m3fn) if key in matrices else t for key, t in state.items()},
            files["plain fp8"],
        )
        files["fp32"] = self.scratch / "fp32.safetensors"
        save_file({key: t.float() for key, t in state.items()}, files["fp32"])
        for name, path in files.items():
            model = load(path)
            coded = sum(getattr(m, "quant_format", None) is not None for m in model.model.modules())
            found[name] = {"coded": coded, "psnr": self._psnr(self.sample(model)), "bytes": model.model_size()}
            if name in FORMATS and name != "mxfp8" or name.startswith("our "):
                found[name]["apart"] = self._apart(model, load_transformer(path))
        found["other instruction"] = {
            "psnr": self._psnr(self.sample(text=self.run("TextEncode", self.clip, "invert the colours")))
        }
        found["library"] = self.error(load_transformer, files["mxfp8"])
        found["unknown"] = self._unknown(load, files["our int8"])
        cut = dict(state)
        del cut["head.bias"]
        save_file(cut, self.scratch / "cut.safetensors")
        found["not whole"] = self.error(load, self.scratch / "cut.safetensors")
        return found

    def _psnr(self, samples) -> float:
        """How near a decoded edit is to the sepia one, in dB."""
        a, b = (self.core.VAEDecode().decode(self.vae, {"samples": x})[0] for x in (samples, self.sepia))
        return -10 * (a - b).square().mean().clamp_min(1e-12).log10().item()

    def partial(self) -> dict:
        """The loaders' networks of which a part is loaded, `meta` playing the GPU."""
        from drop_in import loaded_in_part
        from varedit_pack.varedit_core import sample, schedule_for

        load = {name: self.module(f"nodes.adapters.{name}") for name in ("model", "vae", "text_encoder")}
        file = DEMO / "diffusion_models" / "varedit_demo.safetensors"
        vae, clip = (DEMO / name for name in ("vae/varedit_demo_tokenizer", "text_encoders/varedit_demo_t5"))
        vae, clip = vae.with_suffix(".safetensors"), clip.with_suffix(".safetensors")
        features = self.source["samples"].to("meta")

        def edit(network):
            for _ in sample(network.diffusion_model, features, [self.text[0][0][0].to("meta")], schedule_for("0.06M")):
                pass

        def tokenize(network):
            network.decode(network.encode(self.torch.zeros(1, 3, 64, 64, device="meta")))

        def read(network):
            network.transformer(self.torch.zeros(1, 5, dtype=self.torch.long, device="meta"))

        return {
            "model": loaded_in_part(lambda: load["model"].load_model(file).model, edit),
            "vae": loaded_in_part(lambda: load["vae"].load_vae(vae).first_stage_model, tokenize),
            "clip": loaded_in_part(lambda: load["text_encoder"].load_clip(clip).cond_stage_model, read),
        }  # fmt: skip

    def leftovers(self) -> dict:
        """Stores that are still alive after an error and a cancellation of what may not stay, and the next edit."""
        import comfy.model_management as mm

        mm.unload_all_models()
        may_stay, self.running.may_stay = self.running.may_stay, lambda *_: False
        self.sample()
        found = {"success": self._stored()}
        kept, seen = self.running.attention_of, []

        def stop_after(calls: int, error: BaseException):
            def attention_of(*arguments):
                attend = kept(*arguments)

                def counted(*args, **kw):
                    seen.append(1)
                    if len(seen) > calls:
                        raise error
                    return attend(*args, **kw)

                return counted

            return attention_of

        for name, error in (("error", RuntimeError("x")), ("cancel", mm.InterruptProcessingException())):
            seen.clear()
            self.running.attention_of = stop_after(60, error)
            try:
                self.sample()
            except BaseException as caught:
                found[name] = [type(caught).__name__, self._stored(), len(seen)]
        self.running.attention_of, self.running.may_stay = kept, may_stay
        mm.interrupt_current_processing(True)
        try:
            self.sample()
            found["flag"] = "ignored"
        except mm.InterruptProcessingException:
            found["flag"] = "obeyed"
        found["next"] = self.torch.equal(self.sample(), self.sepia)
        return found

    def keeping(self) -> dict:
        """What stays between runs: passes over the source by what was changed before a run, and how it is let go of."""
        import comfy.model_management as mm
        from varedit_pack.varedit_core.model.transformer import Transformer

        torch, read, count, found = self.torch, Transformer.read_source, [], {"read": {}}
        mask = torch.zeros(1, 50, 70)
        mask[:, :20] = 1
        lora = self.core.LoraLoaderModelOnly().load_lora_model_only
        strengths = [lora(self.model, "varedit_demo_duotone.safetensors", s)[0] for s in (1.0, 0.5)]
        overridden = self.model.clone()
        options = overridden.model_options["transformer_options"]
        options["optimized_attention_override"] = lambda function, *args, **kw: function(*args, **kw)
        other = self.run("TextEncode", self.clip, "make it a duotone")
        runs = {
            "first": {}, "again": {}, "seed": {"seed": 5}, "guidance": {"guidance": 3.0}, "mask": {"mask": mask},
            "temperature": {"temperature": 0.7}, "text": {"text": other}, "text again": {"text": other},
            "variations": {"variations": 2}, "variations again": {"variations": 2, "seed": 9},
            "lora": {"model": strengths[0]}, "lora again": {"model": strengths[0], "seed": 1},
            "lora strength": {"model": strengths[1]}, "override": {"model": overridden}, "after override": {},
        }  # fmt: skip

        def counted(*args, **kw):
            count.append(1)
            return read(*args, **kw)

        def keepers() -> list:
            return [one for one in mm.loaded_models() if type(one).__name__ == "Keeper"]

        mm.unload_all_models()
        Transformer.read_source = counted
        results = {}
        for name, change in runs.items():
            count.clear()
            results[name] = self.sample(**change)
            found["read"][name] = len(count)
        Transformer.read_source = read
        fresh = self.model.cached_patcher_init[0](*self.model.cached_patcher_init[1])
        named = ("again", "seed", "guidance", "mask", "temperature", "text again", "after override")
        again = {name: self.sample(**{"model": fresh, **runs[name]}) for name in named}
        found["equal"] = {name: torch.equal(again[name], results[name]) for name in named}
        del again
        found["listed"] = [len(keepers()), min(keeper.loaded_size() for keeper in keepers())]
        free, taken = mm.get_free_memory, keepers()[0].loaded_size()
        device = self.model.load_device
        mm.get_free_memory = lambda *args, **kw: free(*args, **kw) if kw else 0
        mm.free_memory(taken // 2, device)  # less than it has: it goes, the weights stay
        mm.get_free_memory = free
        found["pushed out"] = [sum(keeper.loaded_size() == 0 for keeper in keepers()), self.model.loaded_size() > 0]
        self.sample()
        mm.unload_all_models()
        found["unloaded"] = [len(keepers()), self._stored()]
        found["after"] = torch.equal(self.sample(), self.sepia) and len(keepers()) == 1
        said, info = [], logging.info
        self.sample(fresh)
        network, store = weakref.ref(fresh.model), weakref.ref(fresh.model._keeper.work.store)
        logging.info = logging.warning = lambda text, *args: said.append(text)
        del fresh
        mm.cleanup_models_gc()
        logging.info = logging.warning = info
        found["gone"] = [network() is None, store() is None, len(keepers()), [t for t in said if "leak" in t]]
        real, self.running.free_memory = self.running.free_memory, lambda model: model.model_size() + 2 * taken
        self.sample(seed=3)
        found["scarce"] = self._stored()
        self.running.free_memory = real
        return found

    def variations(self) -> dict:
        """Several results of each picture: single runs, ways to run them, and their pictures."""
        torch, decode = self.torch, self.nodes["VAREditDecode"].execute
        two = torch.cat([self.cat, self.cat.flip(2)])
        source = self.run("SourceEncode", self.vae, two, "256", "square")
        noisy = {"seed": 2**64 - 2, "temperature": 1.0}
        latent, scales, *_ = self._edit(source, variations=2, **noisy)
        module = self.module("nodes.adapters.pictures")
        images, _ = module.scale_pictures(self.vae, scales, "fast")
        singles = []
        for image in range(2):
            one = self.run("SourceEncode", self.vae, two[image : image + 1], "256", "square")
            for copy in range(2):
                singles.append(self.sample(source=one, **{**noisy, "seed": (noisy["seed"] + 2 * image + copy) % 2**64}))
        equal = [(a == b).float().mean().item() for a, b in zip(singles, latent["samples"])]
        ways, plan = {}, self.memory.plan
        for way in self.module("varedit_core.runtime.plan").plans(self._job(source, 4)):
            if way.store == "8-bit" or way.job.images == 2:  # two at once are the batches of three: a whole picture's
                continue
            self.memory.plan = lambda *_, way=way: way
            found = self._edit(source, variations=2, **noisy)[0]["samples"]
            ways[name(way)] = (found == latent["samples"]).float().mean().item()
        self.memory.plan = plan
        mask = torch.zeros(2, 30, 45)
        mask[0, :, 20:], mask[1, :, :20] = 1, 1
        masked = decode(self.vae, latent, two, mask).result[0]
        rows = [two[0], two[0], two[1], two[1]]
        kept = [slice(0, 180), slice(0, 180), slice(220, None), slice(220, None)]
        calls = self._progress(variations=3)
        return {
            "equal": equal, "different": (latent["samples"][0] != latent["samples"][1]).any().item(),
            "ways": ways, "sums": list(scales["samples"].shape), "pictures": [list(image.shape) for image in images],
            "batches": [self._batches(*sizes) == wanted for sizes, wanted in (
                ((2, 3, 6), [([0, 1], 0, 3)]), ((3, 2, 5), [([0, 1], 0, 2), ([2], 4, 2)]),
                ((2, 3, 2), [([0], 0, 2), ([0], 2, 1), ([1], 3, 2), ([1], 5, 1)]),
            )],
            "decoded": list(masked.shape),
            "kept": [torch.equal(x[:, part], y[:, part]) for x, y, part in zip(masked, rows, kept)],
            "three images": self.error(decode, self.vae, latent, torch.cat([two, self.cat])),
            "progress": [calls[-1][0], sum(size is not None for *_, size in calls)],
        }  # fmt: skip

    def _batches(self, pictures: int, copies: int, at_once: int) -> list:
        """What the driver runs together of a batch: pictures, the first result's number, and results of each."""
        driver, batch = self.module("varedit_core.sampling.driver"), self.module("varedit_core.sampling.batch")
        part, joined, found = driver._Task._part, driver._joined, []
        text, features = self.text[0][0][0], self.source["samples"].expand(pictures, -1, -1, -1)
        schedule = self.source["varedit"].fitting.schedule
        asked = batch.EditBatch.of(features, [text] * pictures, schedule, variations=copies)

        def noted(task, engine, part, roomy, results, numbers):
            found.append((list(numbers), results[0], part.copies))
            assert len(results) == part.copies * len(numbers)

        driver._Task._part, driver._joined = noted, list
        driver._Task(asked, None, (), None, driver.Wanted()).run(None, at_once)
        driver._Task._part, driver._joined = part, joined
        return found

    def shortcuts(self) -> dict:
        """Work left out and masks: as the library does it, and what does not belong together."""
        from PIL import Image

        from varedit_core import SamplingSettings, load_transformer, sample, schedule_for
        from varedit_core.controls.registry import Shortcuts
        from varedit_core.pictures.images import fit_mask
        from varedit_core.runtime.memory import engine_of
        from varedit_core.sampling import loop
        from varedit_core.sampling.batch import EditBatch

        torch, files = self.torch, DEMO / "diffusion_models"
        mask = torch.zeros(40, 60)
        mask[:, 35:] = 1
        fitting = self.source["varedit"].fitting
        fitted = fit_mask(Image.fromarray((mask * 255).to(torch.uint8).numpy()), fitting)
        made = {name: load_transformer(files / f"varedit_demo{name}.safetensors") for name in ("", "_refiner")}
        args = (self.source["samples"], list(self.text[0][0]), schedule_for("0.06M"))
        settings, refiner = SamplingSettings(2.0), self.run("ModelLoader", "varedit_demo_refiner.safetensors", "auto")
        drafting = engine_of([made["_refiner"], made[""]], [None, None])
        wanted = {
            "unguided": (dict(unguided=3), {}), "window": (dict(window=0.125), {}), "stop": (dict(stop=4), {}),
            "inside": (dict(inside=3), dict(mask=mask)), "mask": ({}, dict(mask=mask[None])),
            "drafted": (dict(drafted=5), dict(model=refiner, drafter=self.model)),
        }  # fmt: skip
        found = {}
        for name, (values, more) in wanted.items():
            values = {"unguided": 0, "inside": 0, "window": 0.0, "stop": 0, "drafted": 0} | values
            chosen = self.run("Shortcuts", **values)
            result = self.sample(shortcuts=chosen, **more)
            kind, held = Shortcuts(**values), fitted if "mask" in more else None
            run = loop.sample(drafting, EditBatch.of(*args, settings, shortcuts=kind)) if kind.drafted else sample(
                made[""], *args, settings, shortcuts=kind, mask=held)  # fmt: skip
            *_, last = run
            found[name] = [(result == last.running_sum).float().mean().item(), not torch.equal(result, self.sepia)]
        inside, stop, drafted = (
            self.run("Shortcuts", 0, a, 0.0, b, c) for a, b, c in ((3, 0, 0), (0, 1, 0), (0, 0, 5))
        )
        hidden = {**self.source, "noise_mask": mask[None, None]}
        found["noise mask"] = [
            torch.equal(self.sample(source=hidden, shortcuts=inside), self.sample(mask=mask, shortcuts=inside)),
            torch.equal(self.sample(source=hidden), self.sample(mask=mask)),
        ]
        found["empty mask"] = torch.equal(self.sample(mask=torch.zeros(1, 64, 64)), self.sepia)
        latent, scales, *_ = self._edit(self.source, shortcuts=stop)
        module = self.module("nodes.adapters.pictures")
        images, _ = module.scale_pictures(self.vae, scales, "own")
        found["stopped"] = [len(images), list(scales["samples"].shape), [v for v, *_ in self._progress(shortcuts=stop)]]
        two = self.run("SourceEncode", self.vae, torch.cat([self.cat, self.cat]), "256", "square")
        pair = torch.stack([mask, 1 - mask])
        masked = self.sample(source=two, mask=pair, variations=2)
        singles = [self.sample(mask=pair[i], seed=2 * i)[0] for i in range(2)]
        found["masks"] = [(masked[2 * i] == singles[i]).float().mean().item() for i in range(2)]
        nine = self.run("Shortcuts", 0, 0, 0.0, 0, 9)
        lora = self.core.LoraLoaderModelOnly().load_lora_model_only(
            self.model, "varedit_demo_duotone.safetensors", 1.0
        )[0]
        found["errors"] = {
            "inside without mask": self.error(self.sample, shortcuts=inside),
            "inside with an empty mask": self.error(self.sample, shortcuts=inside, mask=mask * 0),
            "three masks": self.error(self.sample, source=two, mask=torch.ones(3, 8, 8)),
            "no drafter": self.error(self.sample, shortcuts=drafted),
            "drafter of one loaded model": self.error(self.sample, shortcuts=drafted, drafter=lora),
            "idle drafter": self.error(self.sample, drafter=refiner),
            "drafted too many": self.error(self.sample, shortcuts=nine, drafter=refiner),
            "inside and window": self.error(self.run, "Shortcuts", 0, 2, 0.1, 0, 0),
            "latent as scales": self.error(module.scale_pictures, self.vae, latent, "fast"),
        }  # fmt: skip
        return found

    def controls(self) -> dict:
        """Controls, curves, regions, first scales and chains: largest differences in 8-bit levels from the library's
        pictures, and what does not belong together."""
        import numpy as np
        from PIL import Image

        from varedit_core import Editor, SamplingSettings
        from varedit_core.controls.curves import bent
        from varedit_core.controls.registry import NEUTRAL, Controls
        from varedit_core.demo import demo_files
        from varedit_core.pictures.composite import Region
        from varedit_core.sampling.settings import Curve

        torch, editor = self.torch, Editor.load(*demo_files(), device="cpu")
        execute, decode = (self.nodes[f"VAREdit{name}"].execute for name in ("Sampler", "Decode"))
        settings, scene = SamplingSettings(2.0, 0.5, seed=5), self.image(SCENE)
        words = "recolour the black star in purple", "in the bottom centre, add a pink square"
        texts = [self.run("TextEncode", self.clip, one) for one in words]
        flat = self.run("SourceEncode", self.vae, scene, "256", "square")
        neutral = vars(NEUTRAL)

        def edit(source, text, more=None, **kw):
            made = {"controls": self.run("Controls", **{**neutral, **more})} if more else {}
            return execute(self.model, source, text, 5, 2.0, 0.5, **made, **kw).result[0]

        def off(pictures, wanted) -> list[int]:
            saved = np.clip(255.0 * pictures.numpy(), 0, 255).astype(np.uint8)  # as SaveImage does
            pairs = zip(saved, wanted, strict=True)
            return [int(np.abs(a.astype(int) - np.asarray(b.convert("RGB")).astype(int)).max()) for a, b in pairs]

        def library(images, *prompts, **kw):
            return editor.run(images, *prompts, size="0.06M", **{"settings": settings, **kw})

        def white(box, size) -> Image.Image:
            mask = Image.new("L", size)
            mask.paste(255, box)
            return mask

        def as_mask(mask):
            return torch.from_numpy(np.array(mask, dtype=np.float32) / 255)[None]

        found = {"off": {}, "changed": {}}
        plain = edit(self.source, self.text)
        for name, values in (
            ("strength", dict(strength=0.7)), ("preserve", dict(preserve=0.4)),
            ("attention", dict(source_attention=0.3)), ("best", dict(best_of=3, best_at=2, score="instruction")),
        ):  # fmt: skip
            latent = edit(self.source, self.text, values)
            wanted = library(CAT, "make it sepia", controls=Controls(**values))
            found["off"][name] = off(decode(self.vae, latent).result[0], wanted.pictures)
            found["changed"][name] = not torch.equal(latent["samples"], plain["samples"])
        found["neutral"] = torch.equal(edit(self.source, self.text, neutral)["samples"], plain["samples"])
        bends = {"creative": lambda s: s.preset("creative"), "own": lambda s: bent(s, Curve(0.5, 1.5), Curve(2.0, 0.0))}
        for name, preset in (("preset", ("creative", 9.0, 9.0, 9.0, 9.0)), ("own", ("own", 0.5, 1.5, 2.0, 0.0))):
            bend = bends[preset[0]]
            latent = edit(self.source, self.text, curves=self.run("Curves", *preset))
            wanted = library(CAT, "make it sepia", settings=bend(settings))
            found["off"][name] = off(decode(self.vae, latent).result[0], wanted.pictures)
            found["changed"][name] = not torch.equal(latent["samples"], plain["samples"])
        balanced = edit(self.source, self.text, curves=self.run("Curves", "balanced", 0.0, 0.0, 9.0, 9.0))
        found["balanced"] = torch.equal(balanced["samples"], plain["samples"])

        small = (
            Image.open(SCENE).convert("RGB").resize((300, 230))
        )  # not the model's size, so that masks have soft edges
        picture = as_mask(small)
        auto = edit(
            self.run("SourceEncode", self.vae, picture, "256", "square"), texts[1], dict(auto_mask=0.5), variations=2
        )
        for seam in (0, 6):
            pictures, shown = decode(self.vae, auto, picture, seam=seam).result
            wanted = library(small, words[1], controls=Controls(auto_mask=0.5), variations=2, seam=seam)
            found["off"][f"auto, seam {seam}"] = off(pictures, wanted.pictures)
            outside = shown == 0
            original = picture.expand(2, -1, -1, -1)
            found[f"auto kept {seam}"] = [
                torch.equal(pictures[outside], original[outside]),
                outside.float().mean().item(),
            ]
            found[f"auto soft {seam}"] = ((shown > 0) & (shown < 1)).sum().item()
            if not seam:
                masks = torch.cat([as_mask(mask) for mask in wanted.masks])
                found["auto mask"] = torch.equal(masks, shown)
        said, decoding = [], sys.modules["varedit_pack.nodes.decode"]
        before, decoding.tell = decoding.tell, lambda node, text, said=said: said.append(text)
        whole, ones = decode(self.vae, auto).result
        decode(self.vae, {**auto, "samples": auto["samples"] + 1}, picture)
        own = as_mask(white((0, 0, 150, 230), small.size))
        by_mask, used = decode(self.vae, auto, picture, own).result
        unmasked = replace(auto["varedit"], tokens=replace(auto["varedit"].tokens, auto_mask=0.0))
        ignored = decode(self.vae, {**auto, "varedit": unmasked}, picture, own).result[0]
        decoding.tell = before
        found["auto told"] = [*said, bool((ones == 1).all()), list(ones.shape)]
        found["own mask"] = [torch.equal(by_mask, ignored), torch.equal(used, own.expand(2, -1, -1))]

        part = white((150, 140, 430, 300), (451, 300))  # down to where the padding begins
        night = self.run("TextEncode", self.clip, "make the picture a night scene")
        above = self.run("Region", night, as_mask(part))
        latent = edit(self.source, self.text, regions=above)
        wanted = library(CAT, regions=[Region("make it sepia"), Region("make the picture a night scene", part)])
        found["off"]["region on top"] = off(decode(self.vae, latent).result[0], wanted.pictures)
        halves = white((0, 0, 256, 130), (256, 256)), white((40, 150, 216, 256), (256, 256))
        above = self.run("Region", texts[1], as_mask(halves[1]))
        latent = edit(flat, texts[0], regions=above, mask=as_mask(halves[0]))
        union = as_mask(halves[0]) + as_mask(halves[1])
        wanted = library(SCENE, regions=[Region(*pair) for pair in zip(words, halves)])
        found["off"]["two regions"] = off(decode(self.vae, latent, scene, union).result[0], wanted.pictures)
        wanted = library(SCENE, regions=[Region(*pair) for pair in zip(words, halves)], seam=9)
        found["off"]["seam"] = off(decode(self.vae, latent, scene, union, 9).result[0], wanted.pictures)
        third = self.run("Region", texts[0], torch.ones(1, 4, 4), self.run("Region", texts[1], torch.ones(1, 4, 4)))
        topmost = edit(flat, texts[1], regions=third)
        found["later on top"] = (topmost["samples"] == edit(flat, texts[0])["samples"]).float().mean().item()
        empty_own = edit(flat, texts[0], regions=above, mask=torch.zeros(1, 64, 64))
        found["empty own"] = torch.equal(empty_own["samples"], edit(flat, texts[0], regions=above)["samples"])

        first = library(SCENE, words[1])
        begun = edit(flat, texts[1])
        begun = self.run("FirstScales", begun, 3)
        latent = execute(self.model, flat, texts[1], 9, 2.0, 1.0, variations=2, begun=begun).result[0]
        more = dict(settings=SamplingSettings(2.0, 1.0, seed=9), variations=2, given=first.tokens.first(3))
        wanted = library(SCENE, words[1], **more)
        found["off"]["begun"] = off(decode(self.vae, latent).result[0], wanted.pictures)
        bits = latent["varedit"].tokens.bits
        found["branches"] = [all(torch.equal(b[0], b[1]) for b in bits[:3]), not torch.equal(bits[6][0], bits[6][1])]
        sampler, said = sys.modules["varedit_pack.nodes.sampler"], []
        told, sampler.tell = sampler.tell, lambda node, text: said.append(text)
        again = edit(flat, texts[1])
        same = edit(flat, texts[0], begun=again)
        sampler.tell = told
        found["all begun"] = [torch.equal(same["samples"], again["samples"]), said]

        second = edit(again, texts[0])
        chained = library(first, words[0])
        found["off"]["chain"] = off(decode(self.vae, second).result[0], chained.pictures)
        inside = self.run("Shortcuts", 0, 2, 0.0, 0, 0)
        kept = edit(flat, texts[0], regions=above, mask=as_mask(halves[0]), shortcuts=inside)
        found["inside regions"] = not torch.equal(kept["samples"], latent["samples"][:1])
        two = self.run("SourceEncode", self.vae, torch.cat([scene, scene]), "256", "square")
        three, blank = torch.ones(3, 8, 8), self.run("EmptySource", self.vae, "256", "1:1", 1)
        maker = self.run("ModelLoader", "varedit_demo.safetensors", "fp32", "text-to-image")
        window, half = self.run("Shortcuts", 0, 0, 0.2, 0, 0), dict(source_attention=0.5)
        wide = self.run("SourceEncode", self.vae, self.cat, "256", "aspect")
        strong, halved, judging = (
            self.run("Controls", **{**neutral, **values})
            for values in (dict(strength=0.5), half, dict(best_of=2, score="instruction"))
        )
        found["errors"] = {
            "three masks": self.error(edit, two, texts[0], regions=self.run("Region", texts[1], three)),
            "empty region": self.error(self.run, "Region", texts[0], torch.zeros(1, 64, 64)),
            "inside": self.error(edit, flat, texts[0], regions=above, shortcuts=inside),
            "window": self.error(edit, flat, texts[0], half, shortcuts=window),
            "no source": self.error(self.sample, maker, blank, controls=strong),
            "regions of nothing": self.error(self.sample, maker, blank, regions=above, mask=as_mask(halves[0])),
            "attention of a picture maker": self.error(self.sample, maker, flat, controls=halved),
            "begun elsewhere": self.error(edit, wide, texts[0], begun=begun),
            "begun of two": self.error(edit, flat, texts[0], begun=latent),
            "begun without tokens": self.error(edit, flat, texts[0], begun=flat),
            "no guidance": self.error(execute, self.model, flat, texts[0], 0, 1.0, 0.1, controls=judging),
        }  # fmt: skip
        return found

    def text_to_image(self) -> dict:
        """The demo model taken for one of Infinity's: against the library, repainted in a mask, and what is told."""
        import numpy as np

        from varedit_core import Editor
        from varedit_core.demo import demo_files
        from varedit_core.sampling.settings import TEXT_SETTINGS

        torch, said, sampler = self.torch, [], sys.modules["varedit_pack.nodes.sampler"]
        model = self.run("ModelLoader", "varedit_demo.safetensors", "fp32", "text-to-image")
        empty, told = self.run("EmptySource", self.vae, "256", "2:3", 2), sampler.tell
        sampler.tell = lambda node, text: said.append(text)
        try:
            drawn = dict(temperature=TEXT_SETTINGS.temperature, guidance=TEXT_SETTINGS.guidance)
            execute = self.nodes["VAREditSampler"].execute
            latent, scales, *_ = execute(model, empty, self.text, 3, drawn["guidance"], drawn["temperature"]).result
            picture = self.run("Decode", self.vae, latent)
            mask = torch.zeros(1, 60, 90)
            mask[:, 20:40, 30:60] = 1
            wide = self.run("SourceEncode", self.vae, self.cat, "256", "aspect")
            masked = self.sample(model, wide, mask=mask, **drawn)
            by_latent = self.sample(model, {**wide, "noise_mask": mask}, **drawn)
            quiet = list(said)
            unread = self.sample(model, wide, **drawn)
            other = self.run("SourceEncode", self.vae, self.cat.flip(2), "256", "aspect")
            shown = self.run("Decode", self.vae, {**wide, "samples": masked}, self.cat, mask)
            restored = sampler.VAREditSampler.execute(model, empty, self.text, 3, 1.0, 0.0).result[0]["samples"].shape
        finally:
            sampler.tell = told
        editor = Editor.load(*demo_files(), device="cpu", kind="text-to-image")
        made = editor.generate(["make it sepia"] * 2, "0.06M", 1.5, TEXT_SETTINGS.__class__(**drawn, seed=3))
        saved = np.clip(255.0 * picture.numpy(), 0, 255).astype(np.uint8)
        off = [int(np.abs(a.astype(int) - np.asarray(b).astype(int)).max()) for a, b in zip(saved, made)]
        outside = torch.nn.functional.interpolate(mask[None], shown.shape[1:3], mode="bilinear")[0, 0] == 0
        again = self.run("ModelLoader", "varedit_demo.safetensors", "fp32")
        reloaded = model.cached_patcher_init[0](*model.cached_patcher_init[1])
        return {
            "library": off, "size": list(picture.shape), "told": said, "told before": quiet,
            "greedy": list(restored), "chained": not latent["varedit"].empty,
            "kept": torch.equal(shown[0][outside], self.cat[0][outside]), "by latent": torch.equal(masked, by_latent),
            "masked differs": not torch.equal(masked, unread),
            "not read": torch.equal(unread, self.sample(model, other, **drawn)),
            "delegate": not reloaded.model.diffusion_model.config.source,
            "errors": {
                "edit model": self.error(self.sample, again, empty),
                "mask": self.error(self.sample, model, empty, mask=mask),
            },
        }  # fmt: skip

    def layers(self) -> dict:
        """What our casting layers add to ComfyUI's."""
        from varedit_pack.nodes.adapters.layers import Casting
        from varedit_pack.varedit_core.runtime.folded_text import matrix

        torch = self.torch
        torch.manual_seed(0)
        layer = Casting.Linear(8, 6, dtype=torch.bfloat16)
        torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
        x, run = torch.randn(2, 3, 8), {}
        expected = torch.nn.functional.gelu(layer(x), approximate="tanh")
        run["gelu"] = torch.equal(layer.gelu(x), expected)
        fused = sys.modules["varedit_pack.nodes.adapters.layers"]
        real = fused.fuses_gelu, fused.linear_gelu
        fused.fuses_gelu = lambda *_: True
        fused.linear_gelu = lambda x, w, b: torch.nn.functional.gelu(
            torch.nn.functional.linear(x, w, b), approximate="tanh"
        )
        run["fused"] = torch.equal(layer.gelu(x), expected)
        layer.weight_function = [lambda weight: weight * 2]
        run["patched"] = torch.equal(layer.gelu(x), torch.nn.functional.gelu(layer(x), approximate="tanh"))
        fused.fuses_gelu, fused.linear_gelu = real
        shown = [matrix(layer, torch.bfloat16)]
        layer.weight_function = []
        shown += [matrix(layer, torch.bfloat16), matrix(layer, torch.float32)]
        layer.prev_comfy_cast_weights = False  # as ComfyUI marks a layer that it moves at every call
        shown.append(matrix(layer, torch.bfloat16))
        run["matrix"] = [m is layer.weight for m in shown]
        linears = [m for m in self.model.model.modules() if isinstance(m, torch.nn.Linear)]
        run["ours"] = all(isinstance(m, Casting.Linear) for m in linears) and len(linears) > 56
        return run

    def held(self) -> dict:
        """Layers with weights in hand against ComfyUI's own way, by class: whether the numbers are equal."""

        from varedit_pack.nodes.adapters import layers
        from varedit_pack.nodes.adapters.layers import Casting, quantised

        torch = self.torch
        torch.manual_seed(0)
        made = {
            "Linear": (Casting.Linear(8, 6, dtype=torch.float32), torch.randn(2, 3, 8), ("__call__", "gelu")),
            "Conv2d": (Casting.Conv2d(3, 4, 3, dtype=torch.float32), torch.randn(2, 3, 9, 9), ("__call__", "apart")),
            "GroupNorm": (Casting.GroupNorm(2, 8, dtype=torch.float32), torch.randn(2, 8, 5, 5), ("__call__", "silu")),
            "LayerNorm": (Casting.LayerNorm(8, dtype=torch.float32), torch.randn(2, 3, 8), ("__call__",)),
            "RMSNorm": (Casting.RMSNorm(8, dtype=torch.float32), torch.randn(2, 3, 8), ("__call__",)),
            "Embedding": (Casting.Embedding(5, 8, dtype=torch.float32), torch.tensor([0, 3]), ("__call__",)),
        }
        found = {}
        for name, (layer, x, calls) in made.items():
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter)
            expected = [getattr(layer, call)(x) for call in calls]
            own = layer.weight, getattr(layer, "bias", None)
            layer.held = layer.take(*own, None)
            layer.weight_function = [lambda weight: weight * 0]  # what ComfyUI's own way would do now
            results = [getattr(layer, call)(x) for call in calls]
            pairs = [(a[0], b[0]) if isinstance(a, tuple) else (a, b) for a, b in zip(expected, results)]
            found[name] = all(torch.equal(a, b) for a, b in pairs)
        layer, x, _ = made["Linear"]
        found["matrix"] = layer.matrix(torch.float32) is layer.weight and layer.offset() is layer.bias
        layer.weight_function = []
        found["another type"] = layer.fits(x.bfloat16()) or layer(x.bfloat16()).dtype != torch.bfloat16
        missing = sorted(set(vars(Casting)) - set(found) - {"__module__", "__doc__", "__qualname__", "__firstlineno__"})
        found["classes without a case"] = [name for name in missing if isinstance(getattr(Casting, name), type)]

        eight = quantised(self.core_ops().mixed_precision_ops({"mixed_ops": True}, torch.float32, False)).Linear(16, 6)
        codes = torch.randn(6, 16).to(torch.float8_e4m3fn)
        weight = SimpleNamespace(_qdata=codes, _params=SimpleNamespace(scale=torch.tensor(0.25)), device=codes.device)
        eight.quant_format, eight.bias = "float8_e4m3fn", torch.nn.Parameter(torch.randn(6), requires_grad=False)
        x, kept = torch.randn(2, 3, 16), {}

        def keep(layer, name, shape, dtype):
            return kept.setdefault(name, torch.empty(shape, dtype=dtype))

        found["8 bits elsewhere"] = eight.take(weight, eight.bias, keep)
        real, layers.multiplies_eight_bit = layers.multiplies_eight_bit, lambda device: True
        eight.held = eight.take(weight, eight.bias, keep)
        exact = torch.nn.functional.linear(x, codes.float() * 0.25, eight.bias)
        gelu = torch.nn.functional.linear(
            torch.nn.functional.gelu(x, approximate="tanh"), codes.float() * 0.25, eight.bias
        )
        found["8 bits"] = [
            (found_ - wanted).abs().max().item() / wanted.abs().max().item()
            for found_, wanted in ((eight(x), exact), (eight.after_gelu(x), gelu))
        ]
        found["reads rounded"] = [eight.reads_rounded]
        found["hooked"] = self._hooked(torch, layer, eight, codes)
        found["given back"] = self._given_back(layers, torch)
        found["copied"] = self._copied()
        found["fewer bits"] = self._fewer_bits(torch, layers, keep)
        eight.input_scale = torch.ones(())
        found["reads rounded"] += [eight.reads_rounded, eight.take(weight, eight.bias, keep)]
        layers.multiplies_eight_bit = real
        return found

    def _fewer_bits(self, torch, layers, keep) -> dict:
        """Layers in int8 and in 4 bits with their weights in hand and without: how far they are off, and what they
        take."""
        from varedit_pack.varedit_core.runtime.formats import Int8, Nvfp4

        ops, real, found = self.core_ops(), (layers.multiplies_whole, layers.unpacks), {}
        layers.multiplies_whole = layers.unpacks = lambda device: True
        x = torch.randn(2, 3, 64)
        x[..., 5] *= 30
        gelu = torch.nn.functional.gelu(x, approximate="tanh")
        for name, form in (("int8", Int8()), ("int8, rotated", Int8(64)), ("nvfp4", Nvfp4())):
            exact = isinstance(form, Nvfp4)  # as ComfyUI marks what the device does not multiply
            layer = layers.quantised(ops.mixed_precision_ops({"mixed_ops": True}, torch.float32, exact)).Linear(64, 32)
            parts, bias = form.round(torch.randn(32, 64)), torch.nn.Parameter(torch.randn(32), requires_grad=False)
            note = torch.tensor(list(json.dumps(form.settings).encode()), dtype=torch.uint8)
            layer.load_state_dict({**parts, "comfy_quant": note, "bias": bias})
            wanted = [torch.nn.functional.linear(y, form.matrix(parts, torch.float32), bias) for y in (x, gelu)]
            results = [layer(x), layer.after_gelu(x)]
            layer.held = layer.take(layer.weight, layer.bias, lambda *given: torch.empty(given[2], dtype=given[3]))
            results += [layer(x), layer.after_gelu(x)]
            off = [((y - z).norm() / z.norm()).item() for y, z in zip(results, 2 * wanted)]
            found[name] = {"off": off, "held": len(layer.held), "reads rounded": layer.reads_rounded}
        layers.multiplies_whole, layers.unpacks = real
        return found

    def _hooked(self, torch, layer, eight, codes) -> dict:
        """Layers whose call a node has replaced by one that adds to it."""
        from varedit_pack.nodes.adapters import layers

        gelu, found = torch.nn.functional.gelu, {}
        x = torch.randn(2, 3, 8)
        plain, real = layer(x), (layers.fuses_gelu, layer.forward)
        layers.fuses_gelu, layer.forward = lambda *_: True, lambda x: real[1](x) + 1
        found["gelu"] = torch.equal(layer.gelu(x), gelu(plain + 1, approximate="tanh"))
        found["matrix"] = layer.matrix(torch.float32)
        layers.fuses_gelu = real[0]
        x, own = torch.randn(2, 3, 16), eight.forward
        eight.forward = lambda x, **more: own(x, **more) + x.sum()
        read = gelu(x, approximate="tanh")
        wanted = torch.nn.functional.linear(read, codes.float() * 0.25, eight.bias) + read.sum()
        found["after gelu"] = ((eight.after_gelu(x) - wanted).abs().max() / wanted.abs().max()).item()
        found["reads rounded"] = eight.reads_rounded
        del eight.forward, layer.forward
        return found

    def _given_back(self, layers, torch) -> list[int]:
        """How often weights were fetched and given back by a layer that fails."""
        ops, counts = layers.comfy.ops, [0, 0]
        real = ops.cast_bias_weight, ops.uncast_bias_weight

        def counted(place, function):
            def call(*arguments, **options):
                counts[place] += 1
                return function(*arguments, **options)

            return call

        layer = layers.Casting.GroupNorm(2, 8, dtype=torch.float32)
        ops.cast_bias_weight, ops.uncast_bias_weight = (counted(n, function) for n, function in enumerate(real))
        try:
            layer.silu(torch.randn(1, 6, 4, 4))  # another number of channels
        except RuntimeError:
            pass
        finally:
            ops.cast_bias_weight, ops.uncast_bias_weight = real
        return counts

    def _copied(self) -> list[bool]:
        """A VAE copied with another network: whether its recordings, and not the first one's, are of that, and whether
        the network knows the copy's patcher."""
        import copy

        other = self.run("VAELoader", "varedit_demo_tokenizer.safetensors")
        copied = copy.copy(self.vae)
        copied.first_stage_model, copied.patcher = other.first_stage_model, other.patcher
        copied.encode(self.torch.rand(1, 32, 32, 3))
        network = copied.recorded.encode.network
        known = copied.first_stage_model.patcher() is copied.patcher
        return [network is other.first_stage_model.encoder, self.vae.recorded is copied.recorded, known]

    def listing(self) -> list:
        """A workspace that ComfyUI does not know: how often others were asked for memory to list it, how often it is
        listed, and whether it is as large as it is."""
        import comfy.model_management as mm

        self.sample()
        keeper, real, asked = self.model.model.keeper(self.model.load_device), mm.free_memory, []
        mm.current_loaded_models[:] = [known for known in mm.current_loaded_models if known.model is not keeper]
        mm.free_memory = lambda *arguments, **options: asked.append(arguments) or real(*arguments, **options)
        try:
            keeper.list(), keeper.list()
        finally:
            mm.free_memory = real
        listed = [known for known in mm.current_loaded_models if known.model is keeper]
        return [len(asked), len(listed), listed[0].model_loaded_memory() == keeper.work.nbytes > 0]

    def way(self) -> dict:
        """What makes way for another streamed model, by ComfyUI's own order: streamed weights, which go as memory is
        taken, or the workspace beside them. How often each was asked to go."""
        import comfy.memory_management
        import comfy.model_management as mm

        class Other:
            """Weights of 100 bytes as one of ComfyUI's loaded models."""

            currently_used, device = False, self.model.load_device

            def __init__(self):
                self.model, self.asked = SimpleNamespace(is_dynamic=lambda: True, loaded_size=lambda: 100), []

            is_dead = staticmethod(lambda: False)
            model_offloaded_memory = staticmethod(lambda: 0)
            model_memory = staticmethod(lambda: 100)

            def model_unload(self, count):
                self.asked.append(count)

        found, known, free = {}, list(mm.current_loaded_models), mm.get_free_memory
        streams = getattr(comfy.memory_management, "aimdo_enabled", False)
        for needed in (50, 150):
            work = SimpleNamespace(nbytes=60, busy=False, asked=[], forget=lambda: None)
            work.forget = lambda work=work: work.asked.append(True)
            listed, other = self.module("nodes.adapters.keeping").Listed(self.model.load_device, work), Other()
            try:
                comfy.memory_management.aimdo_enabled = True
                mm.current_loaded_models[:] = []
                listed.list()
                mm.current_loaded_models.append(other)
                mm.get_free_memory = lambda *args, **kw: free(*args, **kw) if kw else 0
                mm.free_memory(needed, self.model.load_device, for_dynamic=True)
            finally:
                mm.current_loaded_models[:], mm.get_free_memory = known, free
                comfy.memory_management.aimdo_enabled = streams
            found[needed] = [len(other.asked), len(work.asked)]
        return found

    def without_triton(self) -> dict:
        """What is said where Triton is missing, by platform, card and whether it is there."""
        from varedit_pack.nodes.adapters import advice

        torch = self.torch
        saved = advice.platform.system, advice.find_spec, torch.cuda.get_device_capability
        found, gpu = {}, torch.device("cuda")
        try:
            for name, system, spec, card in (
                ("Windows", "Windows", None, (8, 6)), ("Linux", "Linux", None, (9, 0)),
                ("old", "Windows", None, (7, 5)), ("there", "Windows", object(), (8, 6)),
            ):  # fmt: skip
                advice._told.clear()
                advice.platform.system, advice.find_spec = lambda system=system: system, lambda _, spec=spec: spec
                torch.cuda.get_device_capability = lambda device, card=card: card
                found[name] = [advice.without_triton(gpu) for _ in range(2)]
            found["CPU"] = [advice.without_triton(torch.device("cpu"))]
        finally:
            advice.platform.system, advice.find_spec, torch.cuda.get_device_capability = saved
            advice._told.clear()
        return found

    def core_ops(self):
        import comfy.ops

        return comfy.ops

    def streaming(self) -> dict:
        """Weights that stand still where ComfyUI streams them, with stand-ins for its pages: what is pinned, filled,
        handed out and given back."""
        from streaming import Streaming
        from varedit_pack.nodes.adapters import holding
        from varedit_pack.nodes.adapters.layers import Casting

        return Streaming(self.torch, holding, Casting).found()

    def recording(self) -> dict:
        """When passes may be recorded, and an edit in the form that it has then, only that nothing is recorded here."""
        from varedit_pack.nodes.adapters.model import load_model, unchanged
        from varedit_pack.varedit_core.runtime.folded_text import FoldedText
        from varedit_pack.varedit_core.runtime.workspace import Workspace

        def still(model) -> bool:
            with self.running.holder(model).hold(model, float("inf")) as hold:
                return hold.whole

        torch, file = self.torch, DEMO / "diffusion_models" / "varedit_demo.safetensors"
        self.sample()
        found = {"still": [still(self.model)]}
        for share in (1.0, 0.5):
            model = load_model(file)
            model.load_device = torch.device("meta")
            model.patch_model(
                model.load_device, lowvram_model_memory=int(model.model_size() * share) if share < 1 else 0
            )
            found["still"].append(still(model))
        wrapped, injected, overridden, plain = (self.model.clone() for _ in range(4))
        wrapped.add_wrapper_with_key("apply_model", "x", lambda executor, *args: executor(*args))
        injected.set_injections("x", [])
        overridden.model_options["transformer_options"]["optimized_attention_override"] = None
        found["unchanged"] = [unchanged(model) for model in (wrapped, injected, overridden, plain)]
        narrow = self.run("ModelLoader", file.name, "bf16")
        expected, recording, run = self.sample(narrow), Workspace._recording, Workspace._run
        narrow.model.keeper(narrow.load_device).work.forget()
        Workspace._recording = property(lambda work: work.kept and work.record)
        Workspace._run = lambda work, name, step, function, *inputs: function(*inputs)
        result = self.sample(narrow)
        work = narrow.model.keeper(narrow.load_device).work
        found["folded"] = isinstance(work.static.blocks[0].text, FoldedText)
        found["again"] = torch.equal(self.sample(narrow), result)
        several = self.sample(narrow, variations=2)
        Workspace._recording, Workspace._run = recording, run
        found["equal"] = [(x == expected[0]).float().mean().item() for x in (result[0], several[0])]
        return found

    def told(self) -> dict:
        """Knobs that would do nothing, and ones beyond the scales: what is said of each, and whether the edit is as
        without it, or as with all scales."""
        registry, said, found = self.module("varedit_core.controls.registry"), [], {}
        sampler = sys.modules["varedit_pack.nodes.sampler"]
        mask, scales = self.torch.ones(1, 20, 30), 7
        mask[:, :, 12:] = 0
        before, sampler.tell = sampler.tell, lambda node, text: said.append(text)

        def set_to(knob):
            """Another value than its default, and little work."""
            step = 1 if isinstance(knob.default, int) else knob.step
            up = knob.choices or knob.high is None or knob.default + step <= knob.high
            return knob.choices[-1] if knob.choices else knob.default + (step if up else -step)

        def edited(group: str, neutral, values: dict, masked: bool):
            said.clear()
            made = self.run(group.capitalize(), **{**vars(neutral), **values})
            return self.sample(**{group: made}, **({"mask": mask} if masked else {}))

        for group, neutral in (("controls", registry.NEUTRAL), ("shortcuts", registry.NO_SHORTCUTS)):
            knobs = registry.knobs(group)
            for knob in knobs:
                needs = knob.needs.split()
                other = {one.name: set_to(one) for one in knobs if one.name in needs}
                if (other or "mask" in needs) and knob.name != "inside":  # which is an error of the sampler's
                    same = self.torch.equal(edited(group, neutral, {knob.name: set_to(knob)}, False), self.sepia)
                    found[f"{knob.name} alone"] = [same, said[:]]
                if knob.scales and knob.name != "drafted":  # which is an error, too
                    masked = "mask" in needs
                    whole = edited(group, neutral, {**other, knob.name: scales}, masked)
                    quiet = said[:]
                    same = self.torch.equal(edited(group, neutral, {**other, knob.name: knob.high}, masked), whole)
                    found[f"{knob.name} beyond"] = [same and not quiet, said[:]]
        said.clear()
        self.sample(guidance=3.0, controls=None)
        found["guidance of other models"] = [True, said[:]]
        sampler.tell = before
        edit = self.nodes["VAREditSampler"].execute(self.model, self.source, self.text, 0, 2.0, 0.1).result[0]
        other = self.run("SourceEncode", self.vae, self.cat[:, :, :300], "256", "square")
        begun = self.run("FirstScales", edit, 3)
        error = self.error(self.sample, source=other, begun=begun).removeprefix("builtins.ValueError: ")
        found["begun of another picture"] = [True, [error]]
        return found

    def stray_masks(self) -> dict:
        """What each way in says of a mask that is empty, and of one that has another shape than its picture; an error
        is what is said, too. A list of the nodes that take a mask, by their schemas."""
        height, width = self.cat.shape[1:3]
        upright = self.torch.zeros(1, width, height)
        upright[:, : width // 2] = 1
        masks, said, found = {"empty": self.torch.zeros(1, height, width), "upright": upright}, [], {}
        modules = [
            sys.modules[f"varedit_pack.nodes.{name}"] for name in ("sampler", "sweep", "decode", "canvas", "controls")
        ]
        before = [module.tell for module in modules]
        latent = {"samples": self.sepia}
        latent = self.nodes["VAREditSampler"].execute(self.model, self.source, self.text, 0, 2.0, 0.1).result[0]
        noise = self.core.SetLatentNoiseMask().set_mask
        ways = {
            "VAREditSampler": lambda mask: self.sample(mask=mask),
            "VAREditDecode": lambda mask: self.run("Decode", self.vae, latent, self.cat, mask),
            "VAREditSweep": lambda mask: self.run(
                "Sweep", self.model, self.source, self.text, self.vae, 0, 2.0, 0.1, "strength", "1", "none", "",
                image=self.cat, mask=mask,
            ),
            "VAREditCropRegion": lambda mask: self.run("CropRegion", self.cat, mask, 0.2, "square"),
            "VAREditRegion": lambda mask: self.sample(
                regions=self.run("Region", self.text, mask), text=self.text
            ),
            "SetLatentNoiseMask": lambda mask: self.sample(source=noise(self.source, mask)[0]),
        }  # fmt: skip
        for module in modules:
            module.tell = lambda node, text: said.append(text)
        try:
            for name, way in ways.items():
                for kind, mask in masks.items():
                    said.clear()
                    error = self.error(way, mask)
                    found[f"{name} {kind}"] = [error] if error else said[:]
        finally:
            for module, tell in zip(modules, before):
                module.tell = tell
        takes = {
            node_id for node_id, node in self.nodes.items()
            if any(entry.io_type == "MASK" for entry in node.GET_SCHEMA().inputs)
        }  # fmt: skip
        return {"said": found, "nodes": sorted(takes)}

    def says(self) -> dict:
        """What is said of a batch's mask with an empty row, and of one with a row that vanishes; of graphs that cannot
        go into a file of tokens, and which names do; of sweeps whose values do nothing."""
        torch, said = self.torch, []
        given, pictures = self.module("nodes.adapters.given"), self.module("nodes.adapters.pictures")
        rows = torch.zeros(2, 3000, 4500)
        rows[0, :, 2000:] = 1
        given.tell_of_mask(rows, (451, 300), said.append)
        rows[1, 1500, 1500] = 1 / 255
        found = {"rows": [*said, self.error(pictures.fitted_mask, rows, self.source["varedit"].fitting, 2)]}
        graph_of = self.module("nodes.adapters.token_latents").graph_of
        for name, more in {
            "workflow": {"workflow": {"nodes": []}}, "list": [1], "text": "x", "surrogate": {"\ud800": 1},
            "long name": {"x" * 5_000_000: 1}, "long": {"workflow": "x" * 5_000_000}, "bytes": {"a": b"x"},
            "numbers": {1: 1}, "nothing": None,
        }.items():  # fmt: skip
            said.clear()
            graph = graph_of(SimpleNamespace(prompt={"1": {}}, extra_pnginfo=more), said.append)
            found[name] = [sorted(graph), said[:]]
        sweep, module = self.nodes["VAREditSweep"], sys.modules["varedit_pack.nodes.sweep"]
        before, module.tell = module.tell, lambda node, text: said.append(text)
        for x, values in {"seed": "1, 2", "top_p": "0.9, 0.95", "preset": "creative, faithful"}.items():
            said.clear()
            sweep.execute(self.model, self.source, self.text, self.vae, 0, 1.0, 0.0, x, values, "none", "")
            found[f"sweep {x}"] = said[:]
        module.tell = before
        return found

    def asked_back(self) -> dict:
        """ComfyUI wants the memory of an edit while that is at work, before every scale: what it gets, whether the
        cache stays, and what is left at the end."""
        import comfy.model_management as mm

        keeper, watcher = self.model.model.keeper(self.model.load_device), self.running.Watcher
        show, device = watcher.__call__, self.model.load_device

        def by_comfyui() -> int:
            free, taken = mm.get_free_memory, keeper.loaded_size()
            mm.get_free_memory = lambda *args, **kw: free(*args, **kw) if kw else 0
            mm.free_memory(taken // 2, device)
            mm.get_free_memory = free
            return 0

        ways = {
            "partially_unload": lambda: keeper.partially_unload(device, 2**60),
            "detach": lambda: keeper.detach() and 0,
            "free_memory": by_comfyui,
            "unload_all_models": lambda: mm.unload_all_models() or 0,
        }
        found = {}
        for name, ask in ways.items():
            freed, held = [], []

            def asking(own, *arguments, ask=ask, freed=freed, held=held):
                freed.append(ask())
                held.append(keeper.work.nbytes)
                return show(own, *arguments)

            mm.unload_all_models()
            watcher.__call__ = asking
            same = self.torch.equal(self.sample(preview="decoded", vae=self.vae), self.sepia)
            watcher.__call__ = show
            left = [keeper.work.nbytes, keeper.work.shape is None, self._stored()]
            again = self.torch.equal(self.sample(), self.sepia) and keeper in mm.loaded_models()
            found[name] = {"same": same, "freed": freed, "held": held, "left": left, "again": again}
        return found

    def colours(self) -> dict:
        """Encodes that are made for the colours of previews, and whether before the loop, by choice and by setting."""
        from comfy.cli_args import LatentPreviewMethod, args

        events, memory, found = [], self.running.ComfyMemory, {}
        within, setting = memory.within, args.preview_method

        def noted(*arguments):
            events.append("loop")
            return within(*arguments)

        memory.within = noted
        for live in (LatentPreviewMethod.NoPreviews, LatentPreviewMethod.Latent2RGB):
            for choice in ("auto", "fast", "decoded", "off"):
                vae = self.run("VAELoader", "varedit_demo_tokenizer.safetensors")
                source = self.run("SourceEncode", vae, self.cat, "256", "square")
                encode, args.preview_method = vae.encode, live
                vae.encode = lambda pixels, encode=encode: events.append("encode") or encode(pixels)
                events.clear()
                same = self.torch.equal(self.sample(source=source, preview=choice, vae=vae), self.sepia)
                first = events[:]
                events.clear()
                self.sample(source=source, preview=choice, vae=vae, seed=1)
                found[f"{choice}, {live.value}"] = {"same": same, "first": first, "second": events[:]}
        memory.within, args.preview_method = within, setting
        return found

    def same_job(self) -> dict:
        """Jobs of all kinds by nodes and by the library: whether tokens and sums are the same, bit for bit, and what
        was planned for each."""
        from dataclasses import asdict

        import numpy as np
        from PIL import Image

        from varedit_core import Editor, SamplingSettings, load_transformer
        from varedit_core.controls.registry import Controls, Shortcuts
        from varedit_core.demo import demo_files
        from varedit_core.pictures.composite import Region
        from varedit_core.sampling import driver

        torch, (transformer, *rest) = self.torch, demo_files()
        editor, found = Editor.load(transformer, *rest, device="cpu"), {}
        small = Editor.load(transformer.with_name("varedit_demo_refiner.safetensors"), *rest, device="cpu")
        small.drafter = load_transformer(transformer)
        refiner = self.run("ModelLoader", "varedit_demo_refiner.safetensors", "auto")
        settings, planned = SamplingSettings(2.0, 0.7, seed=11), []
        for module in (driver, self.module("varedit_core.sampling.driver")):

            def noted(job, *arguments, fits=module.as_it_fits):
                planned.append({**asdict(job), "dtype": str(job.dtype), "rows": job.rows})
                return fits(job, *arguments)

            module.as_it_fits = noted
        words = "recolour the black star in purple", "recolour the red hexagon in orange"
        ones = [self.run("TextEncode", self.clip, one) for one in words]
        both = [[torch.cat([one[0][0] for one in ones]), ones[0][0][1]]]
        scene = self.image(SCENE)
        pictures = [
            Image.fromarray((255 * one).round().numpy().astype(np.uint8)) for one in (scene[0], scene[0].flip(1))
        ]
        source = self.run("SourceEncode", self.vae, scene, "256", "square")
        pair = self.run("SourceEncode", self.vae, torch.cat([scene, scene.flip(2)]), "256", "square")
        drawn = Image.new("L", (256, 256))
        drawn.paste(255, (100, 0, 256, 140))
        mask = torch.from_numpy(np.array(drawn, dtype=np.float32) / 255)[None]
        whole = editor.run(pictures[0], words[0], size="0.06M", settings=settings)
        begun = self.nodes["VAREditSampler"].execute(self.model, source, ones[0], 11, 2.0, 0.7).result[0]
        begun = self.run("FirstScales", begun, 3)
        above = self.run("Region", ones[1], mask)
        held, best = dict(auto_mask=0.5), dict(best_of=3, best_at=2)
        layers = dict(regions=[Region(words[0]), Region(words[1], drawn)])
        two = dict(source=pair, text=both)
        jobs = {
            "plain": ({}, {}),
            "variations": (dict(variations=3), dict(variations=3)),
            "two pictures, two instructions": (two, {}),
            "two pictures, variations": (dict(**two, variations=2), dict(variations=2)),
            "best of": (dict(controls=best), {}),
            "best of, variations": (dict(controls=best, variations=2), dict(variations=2)),
            "best of, two pictures, variations": (dict(**two, controls=best, variations=2), dict(variations=2)),
            "mask": (dict(mask=mask), dict(mask=drawn)),
            "mask, margin": (dict(mask=mask, controls=dict(feather=3)), dict(mask=drawn)),
            "regions": (dict(regions=above), layers),
            "regions, variations": (dict(regions=above, variations=2), dict(**layers, variations=2)),
            "regions, best of": (dict(regions=above, controls=best), layers),
            "auto mask": (dict(controls=held), {}),
            "auto mask, variations": (dict(controls=held, variations=2), dict(variations=2)),
            "begun": (dict(begun=begun), dict(given=whole.tokens.first(3))),
            "begun, variations": (dict(begun=begun, variations=2), dict(given=whole.tokens.first(3), variations=2)),
            "drafted": (dict(model=refiner, drafter=self.model, shortcuts=dict(drafted=5)), {}),
            "unguided, strength": (dict(shortcuts=dict(unguided=3), controls=dict(strength=0.6)), {}),
        }  # fmt: skip
        for name, (given, options) in jobs.items():
            given, planned[:] = dict(given), []
            controls, shortcuts = (
                kind(**given.pop(part, {})) for part, kind in (("controls", Controls), ("shortcuts", Shortcuts))
            )
            nodes = {
                "controls": self.run("Controls", **vars(controls)),
                "shortcuts": self.run("Shortcuts", **vars(shortcuts)),
            }
            model, text = given.pop("model", self.model), given.pop("text", ones[0])
            latent = (
                self.nodes["VAREditSampler"]
                .execute(model, given.pop("source", source), text, 11, 2.0, 0.7, **nodes, **given)
                .result[0]
            )
            images, prompts = (pictures, list(words)) if text is both else (pictures[0], words[0])
            result = (small if shortcuts.drafted else editor).run(
                images, () if "regions" in options else prompts, size="0.06M", settings=settings, controls=controls,
                shortcuts=shortcuts, **options,
            )  # fmt: skip
            bits = zip(latent["varedit"].tokens.bits, result.tokens.bits, strict=True)
            found[name] = {
                "bits": all(torch.equal(*pair) for pair in bits),
                "sums": torch.equal(latent["samples"], result.tokens.total()),
                "results": len(latent["samples"]), "job": planned[0] == planned[1] and len(planned) == 2,
                "images": planned[0]["images"], "text": planned[0]["text_tokens"],
            }  # fmt: skip
        return found

    def _edit(self, source, seed=0, temperature=0.1, **kw):
        """Both outputs of the sampler."""
        return self.nodes["VAREditSampler"].execute(self.model, source, self.text, seed, 2.0, temperature, **kw).result

    def _job(self, source, results: int):
        config, schedule = self.model.model.diffusion_model.config, source["varedit"].fitting.schedule
        return self.module("varedit_core.runtime.plan").Job(
            config, schedule, results, True, self.torch.float32, self.text[0][0].shape[1]
        )

    def _progress(self, node=None, **kw) -> list:
        """What the progress bar is told of an edit, or of another node's run: value, total, size of the picture."""
        import comfy.utils

        calls = []
        comfy.utils.PROGRESS_BAR_HOOK = lambda value, total, preview, node_id=None: calls.append(
            [value, total, list(preview[1].size) if preview else None]
        )
        node() if node else self.sample(preview="fast", **kw)
        comfy.utils.PROGRESS_BAR_HOOK = None
        return calls

    def given(self) -> dict:
        """The error of every node for every bad value of each of its inputs of a type that is judged; and what comes
        out for values that are unusual and right."""
        torch, found = self.torch, {}
        judged = self.module("nodes.inputs").JUDGED
        picture, sound = self.cat[:, :256, :256], self._sound()
        for name, node in self.nodes.items():
            inputs = node.define_schema().inputs
            values = {one.id: sound.get(one.get_io_type(), getattr(one, "default", None)) for one in inputs}
            for one in inputs:
                for bad, value in self._bad(one.get_io_type()).items() if one.get_io_type() in judged else ():
                    if not (value is None and one.optional):
                        found[f"{name}.{one.id}: {bad}"] = self.error(node.execute, **{**values, one.id: value})
        right = {
            "half": picture.half(), "double": picture.double(), "bf16": picture.bfloat16(), "grey": picture[..., :1],
            "alpha": torch.cat([picture, picture[..., :1]], -1), "strided": picture.transpose(1, 2),
            "a little beyond": picture * 1.8 - 0.4,
        }  # fmt: skip
        extended = {name: self.run("ExtendCanvas", x, 9, 0, 0, 20, "pixels", "blur", 16) for name, x in right.items()}
        ends = {name: [float(end) for end in x.aminmax()] for name, x in extended.items()}
        masks = {"bool": torch.ones(1, 9, 9) > 0, "flat": torch.ones(9, 9), "whole": torch.ones(1, 9, 9).int()}
        cropped = {name: self.error(self.run, "CropRegion", picture, x, 0.25, "square") for name, x in masks.items()}
        return {"errors": found, "ends": ends, "masks": cropped}

    def _sound(self) -> dict:
        """A value for every type of input that is not a widget's."""
        picture = self.cat[:, :256, :256]
        mask = self.torch.zeros(1, 256, 256)
        mask[:, 50:90, 50:90] = 1
        return {
            "MODEL": self.model, "CLIP": self.clip, "VAE": self.vae, "CONDITIONING": self.text, "LATENT": self.source,
            "IMAGE": picture, "MASK": mask,
        }  # fmt: skip

    def _bad(self, kind: str) -> dict:
        """Values of a type that no node may take, by what is wrong with them."""
        torch, sound = self.torch, self._sound()[kind]
        bad = {"none": None, "text": "x", "number": 3, "list": [sound] if kind != "CONDITIONING" else [3], "dict": {}}
        if kind == "CONDITIONING":
            return {**bad, "half a pair": [[sound[0][0]]], "features of none": [[None, {}]]}
        x = sound["samples"] if kind == "LATENT" else sound
        tensors = {
            "undefined": x.clone().index_fill_(0, torch.tensor([0]), float("nan")), "rows of none": x[:0],
            "one undefined": x.clone().view(-1).index_fill(0, torch.tensor([7]), float("nan")).view(x.shape),
            "infinite": x.clone().view(-1).index_fill(0, torch.tensor([7]), -float("inf")).view(x.shape),
            "no columns": x[:, :, :0], "sparse": x.to_sparse(), "nowhere": x.to("meta"), "complex": x + 0j,
        }  # fmt: skip
        if kind != "MASK":
            tensors |= {"whole": x.int(), "bool": x > 0, "8 bits": x.to(torch.float8_e4m3fn)}
        if kind == "LATENT":
            tensors = {name: {**sound, "samples": value} for name, value in tensors.items()}
            masks = {f"mask: {name}": {**sound, "noise_mask": value} for name, value in self._bad("MASK").items()}
            del masks["mask: none"]
            return {**bad, **tensors, **masks, "numbered by text": {**sound, "batch_index": ["x"]}}
        far = {"levels": (x * 255).byte(), "far beyond": x * 5 + 4, "negative": x - 4}
        if kind == "IMAGE":
            far |= {"one of a batch": x[0], "video": x[None], "two channels": x[..., :2], "five channels": x.repeat(
                1, 1, 1, 2)[..., :5]}  # fmt: skip
        else:
            far |= {"a line": x[0, 0]}
        return {**bad, **tensors, **far}

    def plan(self) -> str:
        return self.run("MemoryPlan", self.model, "256", 2, True)


def name(way) -> str:
    """A way to run in a few letters."""
    return f"{way.job.images} {way.store}" + (" apart" if way.rows_at_once else "")


PARTS = (
    "same_as_the_library", "stock_nodes", "wrappers", "pictures", "scales", "previews", "bad_input", "long_text",
    "ladder", "forms", "formats", "partial", "leftovers", "keeping", "variations", "shortcuts", "controls",
    "text_to_image", "layers", "held", "streaming", "without_triton", "listing", "way", "recording", "told",
    "asked_back", "colours", "same_job", "plan", "stray_masks", "given", "says", "wrong_pairs", "text_cache",
)  # fmt: skip
ONE_EDIT = ("pictures", "formats", "variations")  # parts that decode one edit again and again


def probe(scratch: Path, names=PARTS) -> dict:
    from comfy.cli_args import args

    args.cpu = True
    import torch

    found = {}
    with torch.inference_mode():
        run = Probe(scratch)
        for name in names:
            try:
                with run.decoding_once() if name in ONE_EDIT else nullcontext():
                    found[name] = getattr(run, name)()
            except Exception:
                found[name] = {"failed": traceback.format_exc()}
    return found


if __name__ == "__main__":
    sys.path[:] = [os.getcwd(), *sys.path, str(ROOT)]
    print(json.dumps(probe(Path(sys.argv[1]), sys.argv[2:] or PARTS)))
