"""Every node of ComfyUI's own with one of our types before or behind it; run as a script by ComfyUI's own Python.

Prints what came of it as JSON. `test_core_nodes.py` judges it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

from in_comfyui import DEMO, Probe

TYPES = ("MODEL", "CLIP", "VAE", "CONDITIONING")
SMALL = {"width": 256, "height": 256, "length": 1, "batch_size": 1, "frames_number": 9}
"""Sizes of pictures and videos, in place of the schema's."""


class Handed:
    """A node that hands an object on, whatever it is."""

    RETURN_TYPES, FUNCTION, objects = ("*",), "run", {}

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"name": ("STRING",)}}

    def run(self, name: str):
        return (self.objects[name],)


class Taken:
    """An output node that keeps what comes in."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE, found = (), "run", True, {}

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": ("*",), "number": ("INT",)}}

    def run(self, value, number: int) -> dict:
        self.found[number] = value
        return {}


class Quiet:
    """A server without a page."""

    client_id = last_node_id = None
    sockets_metadata: dict = {}

    def send_sync(self, *arguments, **kw) -> None:
        pass

    def send_progress_text(self, *arguments, **kw) -> None:
        pass


class Walk(Probe):
    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        import comfy_extras  # noqa: F401
        import execution

        asyncio.run(self.core.init_builtin_extra_nodes())
        self.execution, torch = execution, self.torch
        self.core.NODE_CLASS_MAPPINGS.update(Handed=Handed, Taken=Taken, **self.nodes)
        self.said: list[str] = []
        for name in ("sampler", "encode", "decode", "_api"):
            module = self.module(f"nodes.{name}")
            module.tell = lambda node, text: self.said.append(text)
        mask = torch.zeros(1, 256, 256)
        mask[:, :, :128] = 1
        noise, sigmas = SimpleNamespace(seed=0, generate_noise=lambda latent: latent["samples"]), torch.tensor([1.0, 0])
        self.given = {
            "MODEL": self.model, "CLIP": self.clip, "VAE": self.vae, "CONDITIONING": self.text, "LATENT": self.source,
            "IMAGE": torch.rand(1, 256, 256, 3), "MASK": mask, "NOISE": noise, "SIGMAS": sigmas,
            "SAMPLER": SimpleNamespace(), "TIMESTEPS_RANGE": (0.2, 0.8), "HOOKS": self._hooks(),
            "CONTROL_NET": self._control(),
            "STYLE_MODEL": SimpleNamespace(get_cond=lambda output: torch.ones(1, 4, 128)),
            "CLIP_VISION": SimpleNamespace(encode_image=lambda *a, **kw: self._seen(), get_sd=dict),
            "CLIP_VISION_OUTPUT": self._seen(),
            "GLIGEN": SimpleNamespace(), "LORA_MODEL": {}, "LATENT_OPERATION": lambda latent, **kw: latent,
            "AUDIO": {"waveform": torch.zeros(1, 2, 44100), "sample_rate": 44100},
            "MODEL_PATCH": SimpleNamespace(), "AUDIO_ENCODER_OUTPUT": SimpleNamespace(), "LATENT_UPSCALE_MODEL": None,
            "BOUNDING_BOX": {"x": 0, "y": 0, "width": 128, "height": 128},
        }  # fmt: skip
        Handed.objects.update(self.given)

    def _seen(self):
        """What a vision model makes of a picture."""
        torch = self.torch
        return SimpleNamespace(
            last_hidden_state=torch.zeros(1, 257, 1280), penultimate_hidden_states=torch.zeros(1, 257, 1280),
            image_embeds=torch.zeros(1, 1024), mm_projected=None, all_hidden_states=torch.zeros(1, 27, 729, 1152),
        )  # fmt: skip

    def _hooks(self):
        return self.node("CreateHookLora", "varedit_demo_duotone.safetensors", 1.0, 1.0)

    def _control(self):
        import comfy.controlnet

        class Control(comfy.controlnet.ControlBase):
            def copy(self):
                copied = Control()
                self.copy_to(copied)
                return copied

        return Control()

    def prompt(self, graph: dict):
        """What the graph's `Taken` nodes took; the error of ComfyUI's, (type, message, last files), where it failed."""
        cache = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        executor = self.execution.PromptExecutor(Quiet(), self.execution.CacheType.NONE, cache)
        Taken.found.clear()
        outputs = [name for name, node in graph.items() if node["class_type"] == "Taken" or name == "end"]
        executor.execute(graph, "walk", {}, outputs)
        for event, data in executor.status_messages:
            if event == "execution_error":
                frames = [line.strip().split('"')[1] for line in data["traceback"] if '"' in line]
                return None, [data["exception_type"], data["exception_message"].strip(), data["node_type"], frames[-1]]
        return dict(Taken.found), None

    def walked(self, name: str) -> dict:
        """What a node does with our types: an error of its own, or what comes of each of its outputs of such a type."""
        graph = {"node": {"class_type": name, "inputs": {}}}
        kind = self.core.NODE_CLASS_MAPPINGS[name]
        for key, value in self.inputs(kind).items():
            if isinstance(value, Handed):
                graph[value.name] = {"class_type": "Handed", "inputs": {"name": value.name}}
                value = [value.name, 0]
            graph["node"]["inputs"][key] = value
        returned = [str(getattr(one, "value", one)) for one in kind.RETURN_TYPES]
        ends = [n for n, one in enumerate(returned) if one in TYPES or one in ("LATENT", "IMAGE", "GUIDER")]
        for n in ends:
            graph[f"take {n}"] = {"class_type": "Taken", "inputs": {"value": ["node", n], "number": n}}
        if not ends:
            graph["end"] = graph.pop("node")
        self.said.clear()
        found, error = self.prompt(graph)
        if error:
            return {"error": error, "said": self.said[:]}
        results = {}
        for n in ends:
            if returned[n] in TYPES:
                results[f"{n} {returned[n]}"] = self.behind(returned[n], found[n])
        return {"outputs": results, "said": self.said[:]}

    def behind(self, kind: str, value) -> dict:
        """What our nodes make of an object: the error, or whether the picture is the one without the node."""
        self.said.clear()
        try:
            if kind == "CLIP":
                value, kind = self.run("TextEncode", value, "make it sepia"), "CONDITIONING"
            if kind == "VAE":
                source = self.run("SourceEncode", value, self.cat, "256", "square")
                edited = self.run("Decode", value, {**self.source, "samples": self.sepia})
                same = self.torch.equal(source["samples"], self.source["samples"])
                return {"same": same and self.torch.equal(edited, self.picture), "said": self.said[:]}
            if kind == "CONDITIONING":
                return {**self.instructed(value), "said": self.said[:]}
            return {"same": self.torch.equal(self.draft(model=value), self.expected), "said": self.said[:]}
        except Exception as error:
            frame = error.__traceback__
            while frame.tb_next:
                frame = frame.tb_next
            return {
                "error": [type(error).__name__, str(error), frame.tb_frame.f_code.co_filename],
                "said": self.said[:],
            }

    def instructed(self, conditioning) -> dict:
        """What the sampler reads of a conditioning: whether it is the instruction, everywhere; what it is as a negative
        prompt."""
        read, text = self.module("nodes.adapters.conditioning").Instructions.read, self.text[0][0][0]

        def told(sentence: str) -> None:
            self.said.append(sentence)

        found = read(conditioning, None, None, (), told)
        as_negative = read(self.text, conditioning, None, (), lambda sentence: None).texts.negative[0]
        same = not found.regions and self.torch.equal(found.texts.positive[0], text)
        if not same:
            self.draft(text=conditioning)
        negative = "none" if as_negative is None else "same" if self.torch.equal(as_negative, text) else "changed"
        return {"same": same, "negative": negative}

    def draft(self, **inputs):
        """The first scales of an edit: what a node changes shows in them, too."""
        return self.sample(shortcuts=self.short, guidance=1.0, **inputs)

    def inputs(self, kind) -> dict:
        """A value for every input of a node: ours, a stand-in, or the schema's default."""
        found, types = {}, kind.INPUT_TYPES()
        for part in ("required", "optional"):
            for key, (sort, *more) in types.get(part, {}).items():
                options = more[0] if more else {}
                if isinstance(sort, list):
                    sort, options = "COMBO", {"options": sort, **options}
                names = [one for one in str(sort).split(",") if one in self.given]
                if names:
                    handed = Handed()
                    handed.name = names[0]
                    found[key] = handed
                elif sort == "COMBO":
                    choices = options.get("options") or []
                    found[key] = options.get("default", choices[0] if choices else "none")
                elif sort == "COMFY_DYNAMICCOMBO_V3":
                    first = options["options"][0]
                    found[key] = first["key"]
                    inner = SimpleNamespace(INPUT_TYPES=lambda first=first: first["inputs"])
                    found.update({f"{key}.{name}": value for name, value in self.inputs(inner).items()})
                elif sort == "INT" and key in SMALL:
                    found[key] = SMALL[key]
                elif "default" in options:
                    found[key] = options["default"]
                elif sort == "STRING":
                    found[key] = "make it sepia"
                elif sort in ("INT", "FLOAT"):
                    found[key] = options.get("min", 1)
                elif sort == "BOOLEAN":
                    found[key] = False
        return found

    def prepare(self) -> None:
        neutral = self.module("varedit_core.controls.registry").NO_SHORTCUTS
        self.short = self.run("Shortcuts", **{**vars(neutral), "stop": 3})
        self.expected = self.draft()
        self.picture = self.run("Decode", self.vae, {**self.source, "samples": self.sepia})

    def everything(self, names) -> dict:
        """Every node of ComfyUI's that takes one of our types, or of some names."""
        found = {}
        for name, kind in sorted(self.core.NODE_CLASS_MAPPINGS.items()):
            if kind in (Handed, Taken) or name in self.nodes or (names and name not in names):
                continue
            types = kind.INPUT_TYPES()
            sorts = [str(one[0]) for part in ("required", "optional") for one in types.get(part, {}).values()]
            if any(one in TYPES for sort in sorts for one in sort.split(",")):
                found[name] = self.walked(name)
                print(name, json.dumps(found[name])[:600], file=sys.stderr, flush=True)
        return found

    def node(self, name: str, *arguments, **kw):
        """The first output of a node of ComfyUI's."""
        kind = self.core.NODE_CLASS_MAPPINGS[name]
        if hasattr(kind, "GET_SCHEMA"):
            return kind.execute(*arguments, **kw).result[0]
        return getattr(kind(), kind.FUNCTION)(*arguments, **kw)[0]

    def conditioning(self) -> dict:
        """What masks, areas and strengths of ComfyUI's nodes do, beside what the pack's own regions do."""
        torch, text, found = self.torch, self.text, {}
        other = self.run("TextEncode", self.clip, "make the background cyan")
        mask = torch.zeros(1, 300, 451)
        mask[:, :150] = 1
        region = self.run("Region", other, mask)

        def same(a, b) -> bool:
            return torch.equal(self.draft(**a), self.draft(**b))

        masked = self.node("ConditioningSetMask", other, mask, "default", 1.0)
        both = self.node("ConditioningCombine", text, masked)
        area = self.node(
            "ConditioningCombine", text, self.node("ConditioningSetAreaPercentage", other, 1, 0.5, 0, 0, 1)
        )
        pixels = self.node("ConditioningSetArea", other, 456, 152, 0, 0, 1.0)
        box = torch.zeros(1, 300, 451)
        box[:, :152] = 1
        alone = self.draft(text=masked)
        found["mask"] = same({"text": both}, {"regions": region}) and not same({"text": both}, {})
        found["default"] = same({"text": self.node("ConditioningSetDefaultCombine", masked, text)}, {"regions": region})
        found["area in shares"] = same({"text": area}, {"regions": region})
        found["area in pixels"] = torch.equal(
            self.draft(text=pixels), self.draft(text=self.node("ConditioningSetMask", other, box, "default", 1.0))
        )
        found["alone"] = torch.equal(alone, self.draft(text=other, mask=mask))
        off = self.node("ConditioningSetMask", other, mask, "default", 0.0)
        found["strength 0"] = same({"text": self.node("ConditioningCombine", text, off)}, {})
        found["all of strength 0"] = self.error(self.draft, text=off)
        zero = self.node("ConditioningZeroOut", text)
        found["zero as negative"] = torch.equal(self.guided(negative=zero), self.guided())
        found["region of a region"] = torch.equal(
            self.draft(regions=self.run("Region", masked, torch.ones(1, 8, 8))), self.draft(regions=region)
        )
        for name, made in {
            "concat": self.node("ConditioningConcat", text, other),
            "average": self.node("ConditioningAverage", text, other, 0.5),
            "multiply": self.node("ConditioningMultiply", text, 1.5) if self.has("ConditioningMultiply") else text,
            "combine": self.node("ConditioningCombine", text, other),
        }.items():
            found[name] = [self.error(self.draft, text=made), self.error(self.draft, negative=made)]
        found["average of 1"] = torch.equal(
            self.draft(text=self.node("ConditioningAverage", text, other, 1.0)), self.expected
        )
        self.said.clear()
        half = self.draft(text=self.node("ConditioningSetAreaStrength", text, 0.5))
        found["half"] = [torch.equal(half, self.expected), self.said[:]]
        self.said.clear()
        whole = self.draft(text=self.node("ConditioningSetTimestepRange", text, 0.0, 1.0))
        found["whole range"] = [torch.equal(whole, self.expected), self.said[:]]
        unknown = [[text[0][0], {**text[0][1], "of_tomorrow": 1}]]
        self.said.clear()
        found["unknown"] = [torch.equal(self.draft(text=unknown), self.expected), self.said[:]]
        return found

    def guided(self, **inputs):
        return self.sample(shortcuts=self.short, guidance=2.0, **inputs)

    def has(self, name: str) -> bool:
        return name in self.core.NODE_CLASS_MAPPINGS

    def saves(self) -> dict:
        """What the nodes that save models write, read by the pack's loaders, a LoRA merged; whether edits are equal."""
        torch, found, folder = self.torch, {}, self.scratch / "saved"
        import folder_paths

        folder_paths.set_output_directory(str(folder))
        load = {name: self.module(f"nodes.adapters.{name}") for name in ("model", "vae", "text_encoder")}

        def saved(name: str, **inputs) -> Path:
            kind = self.core.NODE_CLASS_MAPPINGS[name]
            before = set(folder.rglob("*.safetensors"))
            getattr(kind(), kind.FUNCTION)(filename_prefix=f"{name}/x", **inputs)
            (path,) = set(folder.rglob("*.safetensors")) - before
            return path

        duotone = self.node("LoraLoaderModelOnly", self.model, "varedit_demo_duotone.safetensors", 1.0)
        wanted = self.draft(model=duotone)
        merged = self.node("ModelMergeSimple", duotone, self.model, 0.5)
        found["lora"] = not torch.equal(wanted, self.expected)
        read = load["model"].load_model
        model = read(saved("ModelSave", model=duotone))
        found["model"] = torch.equal(self.draft(model=model), wanted)
        half = read(saved("ModelSave", model=merged))
        found["merged"] = torch.equal(self.draft(model=half), self.draft(model=merged))
        infinity = read(DEMO / "diffusion_models" / "varedit_demo.safetensors", kind="text-to-image")
        found["kind"] = not read(saved("ModelSave", model=infinity)).model.diffusion_model.config.source
        path = saved("CheckpointSave", model=duotone, clip=self.clip, vae=self.vae)
        found["checkpoint"] = torch.equal(self.draft(model=read(path)), wanted)
        for clip_path in (saved("CLIPSave", clip=self.clip), path):
            clip = load["text_encoder"].load_clip(clip_path)
            text = self.run("TextEncode", clip, "make it sepia")
            found[f"clip {clip_path.parent.name}"] = torch.equal(text[0][0], self.text[0][0])
        for vae_path in (saved("VAESave", vae=self.vae), path):
            vae = load["vae"].load_vae(vae_path)
            picture = self.run("Decode", vae, {**self.source, "samples": self.sepia})
            found[f"vae {vae_path.parent.name}"] = torch.equal(picture, self.picture)
        found["untouched"] = torch.equal(self.draft(), self.expected)
        return found

    def loras(self) -> dict:
        """Edits at strengths one after the other, the models unloaded between: which are equal."""
        import comfy.model_management as mm

        torch, made, found = self.torch, [], {}
        name = "varedit_demo_duotone.safetensors"
        strengths = (1.0, 0.5, 1.0, 0.0, -0.5, 1.0, None, 1.0)
        for bypass in (False, True):
            loader = "LoraLoaderBypassModelOnly" if bypass else "LoraLoaderModelOnly"
            if not self.has(loader):
                continue
            made = []
            for number, strength in enumerate(strengths):
                model = self.model if strength is None else self.node(loader, self.model, name, strength)
                made.append(self.draft(model=model))
                if number % 3 == 2:
                    mm.unload_all_models()
                    mm.soft_empty_cache()
            found[loader] = [[torch.equal(a, b) for b in made] for a in made]
            found[f"{loader} first"] = made[0]
        if "LoraLoaderBypassModelOnly first" in found:
            pair = found["LoraLoaderModelOnly first"], found["LoraLoaderBypassModelOnly first"]
            found["bypass"] = (pair[0] == pair[1]).float().mean().item()
        return {key: value for key, value in found.items() if not key.endswith("first")}

    def guiders(self) -> dict:
        """The family of SamplerCustomAdvanced with our model: the errors."""
        found = {}
        latent = {"samples": self.torch.zeros(1, 16, 32, 32)}
        sampler = self.node("KSamplerSelect", "euler")
        for name, arguments in {
            "BasicGuider": (self.model, self.text), "CFGGuider": (self.model, self.text, self.text, 2.0),
            "DualCFGGuider": (self.model, self.text, self.text, self.text, 2.0, 2.0, "regular"),
        }.items():  # fmt: skip
            guider = self.node(name, *arguments)
            run = self.core.NODE_CLASS_MAPPINGS["SamplerCustomAdvanced"].execute
            noise, sigmas = self.node("RandomNoise", 0), self.torch.tensor([1.0, 0.0])
            found[name] = self.error(run, noise, guider, sampler, sigmas, latent)
        return found

    def models(self) -> dict:
        """Models that do not belong together."""
        refiner = self.run("ModelLoader", "varedit_demo_refiner.safetensors", "auto")
        unlike = self.node("ModelMergeSimple", self.model, refiner, 0.5)
        return {"unlike": self.error(self.draft, model=unlike), "after": self.torch.equal(self.draft(), self.expected)}

    def caches(self) -> dict:
        """Edits with each of ComfyUI's caches, one seed after the other: whether the first one's picture comes back."""
        found, keys = {}, {"model": "MODEL", "source": "LATENT", "positive": "CONDITIONING"}
        Handed.objects["shortcuts"] = self.short
        for kind in self.execution.CacheType:
            cache = {"lru": 2, "ram": 0.1, "ram_inactive": 0.1}
            executor, edits = self.execution.PromptExecutor(Quiet(), kind, cache), []
            for seed in (0, 1, 0):
                given = {key: {"class_type": "Handed", "inputs": {"name": name}} for key, name in keys.items()}
                given["shortcuts"] = {"class_type": "Handed", "inputs": {"name": "shortcuts"}}
                inputs = {**{key: [key, 0] for key in given}, "seed": seed, "guidance": 1.0, "temperature": 0.5}
                sampler = {"class_type": "VAREditSampler", "inputs": inputs}
                end = {"class_type": "Taken", "inputs": {"value": ["edit", 0], "number": len(edits) + 10 * kind.value}}
                executor.execute({**given, "edit": sampler, "end": end}, f"{kind} {len(edits)}", {}, ["end"])
                edits.append(Taken.found.get(end["inputs"]["number"], {}).get("samples"))
            first, second, again = edits
            found[kind.name] = (
                first is not None and self.torch.equal(first, again) and not self.torch.equal(first, second)
            )
            found.setdefault("same", []).append(first.double().sum().item())
        return found

    def wrong(self) -> dict:
        """Inputs that no page would let through, and such of other nodes."""
        torch, nan = self.torch, float("nan")
        images = {
            "no frame": torch.zeros(0, 64, 64, 3), "two channels": torch.zeros(1, 64, 64, 2),
            "undefined": torch.full((1, 64, 64, 3), nan), "flat": torch.zeros(64, 64, 3),
        }  # fmt: skip
        masks = {"undefined": torch.full((1, 8, 8), nan), "no height": torch.zeros(1, 0, 0), "flat": torch.ones(8)}
        encode = self.nodes["VAREditSourceEncode"].execute
        found = {f"image {name}": self.error(encode, self.vae, one, "256", "square") for name, one in images.items()}
        for name, one in masks.items():
            found[f"mask {name}"] = self.error(self.draft, mask=one)
            found[f"region {name}"] = self.error(self.run, "Region", self.text, one)
        found["preview"] = self.error(self.draft, preview="junk")
        found["precision"] = self.error(self.run, "ModelLoader", "varedit_demo.safetensors", "junk")
        found["kind"] = self.error(self.run, "ModelLoader", "varedit_demo.safetensors", "auto", "junk")
        found["size"] = self.error(encode, self.vae, self.cat, "junk", "square")
        found["fit"] = self.error(encode, self.vae, self.cat, "256", "junk")
        found["ratio"] = self.error(self.run, "EmptySource", self.vae, "256", "junk", 1)
        found["pictures"] = self.error(self.run, "ScalePreview", self.vae, self.source, "junk")
        found["beyond"] = torch.equal(
            encode(self.vae, self.cat * 3 - 1, "256", "square").result[0]["samples"],
            encode(self.vae, (self.cat * 3 - 1).clamp(0, 1), "256", "square").result[0]["samples"],
        )
        return found


PARTS = ("everything", "conditioning", "saves", "loras", "guiders", "models", "caches", "wrong")


def walk(scratch: Path, names) -> dict:
    found, walker = {}, Walk(scratch)
    walker.prepare()
    for part in [name for name in names if name in PARTS] or PARTS:
        arguments = [[name for name in names if name not in PARTS]] if part == "everything" else []
        try:
            found[part] = getattr(walker, part)(*arguments)
        except Exception:
            found[part] = {"failed": traceback.format_exc()}
    return found


if __name__ == "__main__":
    sys.path[:] = [os.getcwd(), *sys.path, str(Path(__file__).parents[1])]
    from comfy.cli_args import args

    args.cpu = True
    logging.disable(logging.ERROR)
    import torch

    with torch.inference_mode():
        print(json.dumps(walk(Path(sys.argv[1]), sys.argv[2:])))
