"""Every node of ComfyUI's own that takes LATENTs and gives one, before our sampler and behind it; run as a script by
ComfyUI's own Python.

Prints what came of it as JSON. `test_core_latents.py` judges it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from core_nodes import Handed, Taken, Walk
from support import ROOT

SIZE = (300, 200)
TRIED = {
    "LatentMultiply": [{"multiplier": 0.5}, {"multiplier": 1.0}],
    "LatentCrop": [{"width": 128, "height": 128, "x": 64}],
    "LatentCut": [{"dim": "x", "amount": 8}, {"dim": "y", "amount": 8}, {"dim": "t", "amount": 3}],
    "LatentComposite": [{"x": 64, "y": 32}],
    "LatentCompositeMasked": [{"x": 64, "y": 32}],
    "RepeatLatentBatch": [{"amount": 3}],
    "LatentBlend": [{"blend_factor": 0.5}],
    "LatentInterpolate": [{"ratio": 0.5}],
    "TrimVideoLatent": [{"trim_amount": 1}, {"trim_amount": 16}],
    "SaveLatent": [{"filename_prefix": "walk"}],
}
"""Values at which a node does something, beside each choice of its lists."""


def _alone(latent: dict) -> dict:
    """A LATENT as Load Latent gives it."""
    return {"samples": latent["samples"]}


class Latents(Walk):
    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        image = self.torch.nn.functional.interpolate(self.cat.movedim(-1, 1), SIZE[::-1], mode="area").movedim(1, -1)
        self.padded = self.run("SourceEncode", self.vae, image, "256", "square")
        self.edited = self.nodes["VAREditSampler"].execute(self.model, self.padded, self.text, 0, 2.0, 0.1).result[0]
        self.shown = self.run("Decode", self.vae, self.edited)

    def names(self) -> list[str]:
        """The nodes with a LATENT on both sides."""
        found = []
        for name, kind in sorted(self.core.NODE_CLASS_MAPPINGS.items()):
            types = kind.INPUT_TYPES()
            sorts = [one[0] for part in ("required", "optional") for one in types.get(part, {}).values()]
            if "LATENT" in sorts and "LATENT" in kind.RETURN_TYPES and kind not in (Handed, Taken):
                found.append(name)
        return [name for name in found if name not in self.nodes]

    def settings(self, name: str) -> Iterator[dict]:
        """What to try a node with."""
        yield {}
        yield from TRIED.get(name, ())
        types = self.core.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
        for key, (sort, *more) in types.get("required", {}).items():
            choices = sort if isinstance(sort, list) else (more[0] if more else {}).get("options", ())
            if sort == "COMBO" or isinstance(sort, list):
                yield from ({key: choice} for choice in choices[:4])

    def through(self, name: str, given: dict, latent: dict) -> tuple[list, list | None]:
        """The LATENTs that a node makes of one; its own error."""
        Handed.objects["LATENT"] = latent
        kind, graph = self.core.NODE_CLASS_MAPPINGS[name], {}
        inputs = {**self.inputs(kind), **given}
        for key, value in inputs.items():
            if isinstance(value, Handed):
                graph[value.name] = {"class_type": "Handed", "inputs": {"name": value.name}}
                inputs[key] = [value.name, 0]
        graph["node"] = {"class_type": name, "inputs": inputs}
        for n, sort in enumerate(kind.RETURN_TYPES):
            if sort == "LATENT":
                graph[f"take {n}"] = {"class_type": "Taken", "inputs": {"value": ["node", n], "number": n}}
        found, error = self.prompt(graph)
        return list((found or {}).values()), error

    def decoded(self, latent: dict) -> dict:
        """What our nodes make of a LATENT: an error, or pictures."""
        self.said.clear()
        try:
            pictures = self.run("Decode", self.vae, latent)
        except Exception as error:
            return self._failed(error)
        known = [any(self.torch.equal(one, row) for row in self.shown) for one in pictures]
        return {"size": list(pictures.shape[2:0:-1]), "same": all(known), "said": self.said[:]}

    def sampled(self, latent: dict) -> dict:
        self.said.clear()
        try:
            edited = self.nodes["VAREditSampler"].execute(self.model, latent, self.text, 0, 2.0, 0.1).result[0]
        except Exception as error:
            return self._failed(error)
        said, found = self.said[:], self.decoded(edited)
        return {**found, "said": [*said, *found["said"]]}

    def kept(self, latent: dict) -> dict:
        try:
            self.run("SaveTokens", latent, "walk")
        except Exception as error:
            return self._failed(error)
        return {"saved": self.module("nodes.adapters.latents").tokens_in(latent).images}

    def _failed(self, error: Exception) -> dict:
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        ours = ROOT in Path(frame.tb_frame.f_code.co_filename).resolve().parents
        return {"error": [type(error).__name__, str(error), ours], "said": self.said[:]}

    def passed(self, name: str, latent: dict, **given) -> dict:
        """The LATENT of a core node that runs in an executor's place: the last one, of a list."""
        (found, *_), error = self.through(name, given, latent)
        assert not error, error
        return found

    def edit(self, source: dict, **more) -> dict:
        return self.nodes["VAREditSampler"].execute(self.model, source, self.text, 5, 2.0, 0.7, **more).result[0]

    def graphs(self) -> dict:
        """Graphs of core nodes and ours, as users build them."""
        alone = {"numbers alone": [self.sampled(_alone(self.padded)), self.decoded(_alone(self.edited))]}
        parts = (self._batches, self._sizes, self._masks, self._drafts)
        return alone | {part.__name__.removeprefix("_"): part() for part in parts}

    def _batches(self) -> dict:
        """Rows that are repeated, picked and numbered."""
        torch, same = self.torch, lambda a, b: (a == b).float().mean().item()
        four = self.passed("RepeatLatentBatch", self.source, amount=4)
        edited = self.edit(four)
        third = self.passed("LatentFromBatch", four, batch_index=2, length=1)
        fixed = self.edit(self.passed("LatentBatchSeedBehavior", four, seed_behavior="fixed"))["samples"]
        random = self.edit(self.passed("LatentBatchSeedBehavior", third, seed_behavior="random"))["samples"]
        again = self.passed(
            "LatentFromBatch", self.passed("RepeatLatentBatch", third, amount=3), batch_index=1, length=1
        )
        picked = self.passed("LatentFromBatch", edited, batch_index=1, length=2)
        wanted = edited["varedit"].tokens.of([1, 2])
        tokens = self.module("nodes.adapters.latents").tokens_in(picked)
        twice = self.edit(third, variations=2)["samples"]
        six = self.edit(self.source, variations=6)["samples"]
        return {
            "third": same(self.edit(third)["samples"], edited["samples"][2:3]),
            "not the first": same(self.edit(third)["samples"], edited["samples"][:1]),
            "fixed": [same(fixed[0], row) for row in fixed[1:]], "random": same(random, edited["samples"][:1]),
            "numbered on": same(self.edit(again)["samples"], edited["samples"][3:4]),
            "a row's tokens": all(map(torch.equal, tokens.bits, wanted.bits)) and tokens.fitting == wanted.fitting,
            "a row's draft": list(self.run("FirstScales", picked, 4)["samples"].shape),
            "saved": self.kept(picked)["saved"],
            "variations": [same(*pair) for pair in zip(six[4:], twice)],
            "lengths": self.error(self.edit, {**four, "batch_index": [0, 1]}),
        }  # fmt: skip

    def _sizes(self) -> dict:
        """Pictures of two sizes that have one size as latents."""
        wide, high = (
            self.run("SourceEncode", self.vae, self.torch.rand(1, *size, 3), "256", "square")
            for size in ((200, 300), (300, 200))
        )
        core, found = self.core.NODE_CLASS_MAPPINGS, {}
        for name, ones in (("sources", (wide, high)), ("edits", (self.edit(wide), self.edit(high)))):
            batch = core["LatentBatch"].execute(*ones).result[0]
            last = self.passed("LatentFromBatch", batch, batch_index=1, length=1)
            apart = core["RebatchLatents"].execute(list(ones), [1]).result[0]
            found[name] = {
                "sampled": self.error(self.edit, batch), "decoded": self.error(self.run, "Decode", self.vae, batch),
                "saved": self.error(self.run, "SaveTokens", batch, "walk") if name == "edits" else "",
                "picked": list(self.run("Decode", self.vae, last).shape),
                "apart": [list(self.run("Decode", self.vae, one).shape) for one in apart],
            }  # fmt: skip
        return found

    def _masks(self) -> dict:
        """Masks of core nodes, and the sampler's own: the edit keeps the source outside of both."""
        torch, mask, other = self.torch, self.torch.zeros(1, 256, 256), self.torch.zeros(1, 256, 256)
        mask[:, :, :128] = other[:, :128] = 1
        far = torch.zeros(1, 256, 256)
        far[:, :, 192:] = 1
        by_node = self.passed("SetLatentNoiseMask", self.source)  # with the walk's mask, of the left half
        made = {"SetLatentNoiseMask": by_node}
        for name in ("VAEEncodeForInpaint", "InpaintModelConditioning"):
            kind = self.core.NODE_CLASS_MAPPINGS[name]()
            grown = {"grow_mask_by": 0} if name == "VAEEncodeForInpaint" else {}
            text = {} if grown else {"positive": self.text, "negative": self.text}
            made[name] = kind.encode(pixels=self.cat_square(), vae=self.vae, mask=mask, **text, **grown)[-1]
        found = {}
        for name, source in made.items():
            bare = {key: value for key, value in source.items() if key != "noise_mask"}
            edited, wanted = self.edit(source)["samples"], self.edit(bare, mask=mask)["samples"]
            found[name] = [torch.equal(edited, wanted), torch.equal(edited, self.edit(bare)["samples"])]
        both = self.edit(self.passed("SetLatentNoiseMask", self.source), mask=other)["samples"]
        found["both"] = torch.equal(both, self.edit(self.source, mask=mask * other)["samples"])
        found["nothing in common"] = self.error(self.edit, by_node, mask=far)
        pair = self.passed("RepeatLatentBatch", self.source, amount=2)
        pair["noise_mask"] = torch.stack([mask, other])
        found["of variations"] = list(self.edit(pair, variations=2)["noise_mask"].flatten(1).sum(1).tolist())
        return found

    def cat_square(self):
        return self.torch.nn.functional.interpolate(self.cat.movedim(-1, 1), (256, 256), mode="area").movedim(1, -1)

    def _drafts(self) -> dict:
        draft = self.run("FirstScales", self.edit(self.source), 4)
        return {
            "source": self.error(self.edit, draft),
            "begun": list(self.edit(self.source, begun=draft)["samples"].shape),
        }

    def everything(self, names) -> dict:
        found = {}
        for name in names or self.names():
            ways = {}
            for given in self.settings(name):
                if ways and all(way["error"] for way in ways.values()) and name not in TRIED:
                    break  # made for other latents than ours
                for place, latent in (("before", self.padded), ("behind", self.edited)):
                    latents, error = self.through(name, given, latent)
                    way = ways[f"{given} {place}"] = {"error": error} if error else {"error": None, "made": []}
                    for one in latents:
                        seen = [self.sampled(one)] if place == "before" else [self.decoded(one), self.kept(one)]
                        way["made"] += seen
            found[name] = ways
            print(name, json.dumps(ways)[:1500], file=sys.stderr, flush=True)
        return found


if __name__ == "__main__":
    sys.path[:] = [os.getcwd(), *sys.path, str(ROOT)]
    from comfy.cli_args import args

    args.cpu = True
    logging.disable(logging.ERROR)
    import torch

    with torch.inference_mode():
        run = Latents(Path(sys.argv[1]))
        with run.decoding_once():
            print(json.dumps({"graphs": run.graphs(), "walk": run.everything(sys.argv[2:])}))
