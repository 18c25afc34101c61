"""What each control does, on ShapeEdit with the demo model.

    python benchmarks/controls.py --count 200 --seed 77 --save benchmarks/controls.json

One section a control (--only names some); a table each, then one JSON line, which --save also writes. Families with a
region of their own (all but background, style and keep) are called local. Pictures are judged as ShapeEdit judges them,
before 8 bits.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import few, finish, parsed, parser
from varedit_core import Editor, SamplingSettings
from varedit_core.cli.common import hardware
from varedit_core.controls.auto_mask import AUTO_MASK, changed
from varedit_core.controls.best_of import SCORES
from varedit_core.controls.curves import PRESETS
from varedit_core.controls.registry import NEUTRAL, Controls
from varedit_core.demo import GUIDANCE, SIZE, demo_files
from varedit_core.pictures.images import SourceImage
from varedit_core.sampling.batch import EditBatch
from varedit_core.sampling.driver import run
from varedit_core.shapeedit.edits import FAMILIES, Sample, _distractors, _instruction
from varedit_core.shapeedit.evaluate import draw, picture
from varedit_core.shapeedit.metrics import distance, psnr, regions, succeeds
from varedit_core.shapeedit.render import render
from varedit_core.shapeedit.scenes import draw_scene
from varedit_core.tokenizer.quantizer import encode, latent_grids
from varedit_core.tokenizer.schedule import schedule_for

LOCAL = ("add", "remove", "replace", "recolour", "texture", "move", "resize")
SETTINGS = SamplingSettings(guidance=GUIDANCE)
SCHEDULE = schedule_for(SIZE)
GRIDS = latent_grids(SCHEDULE, 2)
CHAINS = (
    "tokens", "tokens, auto mask", "tokens, auto mask, composited", "tokens, true masks",
    "tokens, true masks, composited", "tokens, painted masks", "tokens, painted masks, composited",
    "encoded again", "encoded again, auto mask, composited", "encoded again, true masks",
    "encoded again, painted masks",
)  # fmt: skip
CHAIN = ("recolour", "add", "texture", "remove", "resize", "replace", "recolour", "add")


class Tasks:
    """Samples with their pictures [N, 3, 256, 256], regions [N, 256, 256] and encoded sources."""

    def __init__(self, editor: Editor, samples: Sequence[Sample]) -> None:
        self.editor, self.samples = editor, samples
        device = editor.device
        self.source, self.target = (render([getattr(s, n) for s in samples], device) for n in ("source", "target"))
        self.region = regions(self.source, self.target, [s.family for s in samples])
        self.features = rows(editor.autoencoder.encode, self.source)
        self.texts = editor.encode_text([s.instruction for s in samples])
        self.base = encode(self.features, GRIDS)[1]
        self.plain = rows(editor.decode_pixels, self.base).clamp(-1, 1)
        self.others = [render(list(s.distractors), device) if s.distractors else self.source[:0] for s in samples]

    def edit(
        self, batch: int, settings: SamplingSettings = SETTINGS, mask: Tensor | None = None, **more
    ) -> tuple[Tensor, list]:
        """Sums [N, d, H, W] of all samples, and of each batch its last scale."""
        sums, ends = [], []
        for begin in range(0, len(self.samples), batch):
            part = slice(begin, begin + batch)
            own = replace(settings, seed=settings.seed + begin)
            kept = mask if mask is None else mask[part]
            result = run(
                EditBatch.of(self.features[part], self.texts[part], SCHEDULE, own, mask=kept, **more),
                self.editor.memory,
            )
            result.check()
            sums.append(result.total)
            ends += result.last
        return torch.cat(sums), ends

    def judged(self, pictures: Tensor) -> dict:
        """Means of success, S and background PSNR, and the success of every family (see `shapeedit.metrics`)."""
        done = self.success(pictures).float()
        before, after = (distance(x, self.target, self.region) for x in (self.source, pictures))
        some = self.region.any(2).any(1)
        kept = ~self.region[:, None]
        quiet = psnr(pictures * kept, self.source * kept)[(~self.region).any(2).any(1)]
        names = [s.family for s in self.samples]
        families = {n: done[[i for i, m in enumerate(names) if m == n]].mean().item() for n in dict.fromkeys(names)}
        closer = (1 - after / before.clamp_min(1e-9)).clamp(0, 1)[some]
        return {
            "success": done.mean().item(),
            "s": closer.mean().item(),
            "psnr": quiet.mean().item(),
            "families": families,
        }

    def success(self, pictures: Tensor) -> Tensor:
        return succeeds(pictures, self.source, self.target, self.region, self.others, self.plain)


@torch.no_grad()
def rows(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([network(row[None]).float() for row in x])


def seam(pictures: Tensor, region: Tensor) -> Tensor:
    """Mean step of brightness between neighbouring pixels across the edges of regions [B, y, x], of each row."""
    grey, total, count = pictures.mean(1), 0.0, 0.0
    for axis in (1, 2):
        crosses = region.narrow(axis, 1, region.shape[axis] - 1) != region.narrow(axis, 0, region.shape[axis] - 1)
        steps = grey.diff(dim=axis).abs()
        total, count = total + (steps * crosses).sum((1, 2)), count + crosses.sum((1, 2))
    return total / count.clamp_min(1)


def quiet(pictures: Tensor, source: Tensor, touched: Tensor) -> float:
    """PSNR in dB of one picture's pixels that are not touched."""
    error = ((pictures - source) / 2).square().mean(1)[~touched].mean()
    return -10 * error.clamp_min(1e-10).log10().item()


def composite(pictures: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight[:, None], pictures, source)


def numbers(row: dict) -> dict:
    return {name: round(row[name], 4) for name in ("success", "s", "psnr")}


def masks(editor: Editor, options) -> dict:
    """Unlocked, locked and composited edits of local families with their true regions: colour inside, edges."""
    tasks = Tasks(editor, draw(options.seed, options.count, LOCAL))
    where, found = tasks.region.float(), {}
    runs = {
        "unlocked": {},
        **{f"locked, feather {n}": {"mask": where, "controls": Controls(feather=n)} for n in (0, 1, 2)},
    }
    wanted = seam(tasks.target, tasks.region)
    for name, more in few(runs.items(), options):
        pictures = rows(editor.decode_pixels, tasks.edit(options.batch, **more)[0]).clamp(-1, 1)
        for kind, shown in ((name, pictures), (f"{name}, composited", composite(pictures, tasks.source, tasks.region))):
            drift = ((shown - tasks.target) * tasks.region[:, None]).sum((2, 3)) / tasks.region.sum((1, 2))[:, None]
            found[kind] = numbers(tasks.judged(shown)) | {
                "seam_of_targets": round((seam(shown, tasks.region) / wanted).median().item(), 3),
                "colour_drift_levels": round(drift.abs().mean().item() * 127.5, 2),
            }
    return found


def random_masks(editor: Editor, options) -> dict:
    """Of random masks (boxes, ellipses, noise; hard and soft; several sizes): latents and 8-bit pixels outside."""
    rng, tasks = Random(options.seed), Tasks(editor, draw(options.seed, min(20, options.masks), LOCAL))
    latents = pixels = checked = 0
    for number in range(options.masks):
        row = number % len(tasks.samples)
        size = rng.choice([(256, 256), (64, 64), (100, 100), (512, 500)])
        mask = Image.new("L", size)
        for _ in range(rng.randint(1, 4)):
            x, y = (rng.randrange(side) for side in size)
            box = (x, y, x + 1 + rng.randrange(size[0] // 2), y + 1 + rng.randrange(size[1] // 2))
            rng.choice([ImageDraw.Draw(mask).rectangle, ImageDraw.Draw(mask).ellipse])(box, fill=rng.choice([255, 128]))
        if rng.random() < 0.3:
            mask = mask.filter(ImageFilter.GaussianBlur(3))
        if mask.getbbox() is None:
            mask.putpixel((0, 0), 255)
        source = SourceImage(picture(tasks.source[row]))
        result = editor.run(source, tasks.texts[row], size=SIZE, settings=replace(SETTINGS, seed=number), mask=mask)
        if result.tokens.free is not None:
            kept = ~result.tokens.free.expand_as(result.tokens.total())
            plain = encode(editor.encode_source([editor.fit(source, SIZE)]), GRIDS)[1]
            latents += int((result.tokens.total()[kept] != plain[kept]).sum())
            checked += int(kept.sum())
        black = np.asarray(mask.resize((256, 256), Image.Resampling.BILINEAR)) == 0
        pixels += int((np.asarray(result.pictures[0]) != np.asarray(source.rgb))[black].sum())
    return {
        "all": {
            "masks": options.masks,
            "latents_outside": checked,
            "latents_changed": latents,
            "pixels_changed": pixels,
        }
    }


def dial(name: str, values: Sequence[float]) -> Callable:
    def measure(editor: Editor, options) -> dict:
        tasks, found = Tasks(editor, draw(options.seed, options.count)), {}
        free = tasks.edit(options.batch)[0]
        for value in few(values, options):
            sums, _ = tasks.edit(options.batch, controls=Controls(**{name: value}))
            pictures = rows(editor.decode_pixels, sums).clamp(-1, 1)
            everywhere = torch.ones_like(tasks.region)
            judged = tasks.judged(pictures)
            others = [done for family, done in judged["families"].items() if family != "keep"]
            found[str(value)] = numbers(judged) | {
                "success_without_keep": round(sum(others) / len(others), 4),
                "distance": round(distance(pictures, tasks.source, everywhere).mean().item() * 127.5, 3),
                "is_free": torch.equal(sums, free),
                "is_source": torch.equal(sums, tasks.base),
            }
        return found

    return measure


def auto(editor: Editor, options) -> dict:
    """Local families: how well the mask that an edit finds covers the true region, and what locking by it does."""
    tasks, found = Tasks(editor, draw(options.seed, options.count, LOCAL)), {}
    found["free"] = numbers(tasks.judged(rows(editor.decode_pixels, tasks.edit(options.batch)[0]).clamp(-1, 1)))
    for amount in few((0.25, 0.35, 0.5, 0.7, 1.0), options):
        sums, ends = tasks.edit(options.batch, controls=Controls(auto_mask=amount))
        pictures = rows(editor.decode_pixels, sums).clamp(-1, 1)
        region = F.interpolate(torch.cat([end.edited for end in ends]).float(), 256)[:, 0] > 0
        mask = (changed(pictures, tasks.plain, amount) >= 1) & region
        judged = tasks.judged(composite(pictures, tasks.source, mask))
        iou = [overlap(*pair) for pair in zip(mask, tasks.region)]
        families = {
            name: round(sum(x for x, s in zip(iou, tasks.samples) if s.family == name) * len(LOCAL) / len(iou), 3)
            for name in LOCAL
        }
        found[str(amount)] = numbers(judged) | {
            "latents_only_psnr": numbers(tasks.judged(pictures))["psnr"],
            "iou": round(sum(iou) / len(iou), 4),
            "locked": round(1 - region.float().mean().item(), 3),
            "missed_by_lock": round((tasks.region & ~region).sum().item() / tasks.region.sum().item(), 4),
            **families,
        }
    return found


def overlap(a: Tensor, b: Tensor) -> float:
    return ((a & b).sum() / (a | b).sum().clamp_min(1)).item()


def chains(editor: Editor, options) -> dict:
    """Eight edits (`options.steps`), one after the other, of what the last one left: PSNR against the first picture in
    all pixels that no edit's region has touched yet (regions grown by 16 pixels for painted masks), and how many edits
    were done.

    plain: what the VAE alone gives of the same pixels. true, painted masks: every edit has its region, or that with 16
    pixels around it, as its mask. composited: pixels outside the mask (which an auto mask finds itself) are those of
    the picture before. Pictures that are encoded again are of 8 bits.
    """
    begun = [draw_chain(Random(f"{options.seed}/{number}"))[: options.steps + 1] for number in range(options.chains)]
    scenes = [[render([scene], editor.device) for scene, _, _ in chain] for chain in begun]
    found, last = {}, options.steps
    for name in few(CHAINS[2:] if options.tiny else CHAINS, options):
        figures = [_chain(editor, name, number, *pair) for number, pair in enumerate(zip(begun, scenes))]
        psnrs, plains, done = (torch.tensor(rows).mean(0).tolist() for rows in zip(*figures))
        found[name] = {f"after {k}": round(psnrs[k - 1], 2) for k in (1, 2, 4, 8) if k <= last}
        found[name] |= {f"plain {k}": round(plains[k - 1], 2) for k in (1, last)} | {
            "done": round(sum(done) / len(done), 3)
        }
    return found


def _chain(editor: Editor, name: str, number: int, chain: list[tuple], pictures: list[Tensor]):
    first = shown = pictures[0]
    features, known = editor.autoencoder.encode(first), None
    plain = editor.decode_pixels(encode(features, GRIDS)[1]).clamp(-1, 1)
    touched = torch.zeros(1, 256, 256, dtype=torch.bool, device=editor.device)
    controls, psnrs, plains, done = Controls(auto_mask=AUTO_MASK * ("auto" in name)), [], [], []
    for step, (_, family, words) in enumerate(chain[1:]):
        before, after = pictures[step : step + 2]
        region = regions(before, after, [family])
        drawn = F.max_pool2d(region[:, None].float(), 33, 1, 16)[:, 0] > 0 if "painted" in name else region
        more = dict(mask=drawn.float() if "masks" in name else None, controls=controls, source_total=known)
        texts, settings = editor.encode_text([words]), replace(SETTINGS, seed=number * 100 + step)
        for scale in editor.sample(features, texts, SCHEDULE, settings, **more):
            total = scale.running_sum
        edited = editor.decode_pixels(total).clamp(-1, 1)
        where = drawn
        if "auto" in name:
            free = F.interpolate(scale.edited.float(), 256)[:, 0] > 0
            where = (changed(edited, editor.decode_pixels(scale.source.total).clamp(-1, 1)) >= 1) & free
        shown = composite(edited, shown, where) if "composited" in name else edited
        if "tokens" in name:
            features = known = total
        else:
            features = editor.autoencoder.encode(((shown + 1) * 127.5).round() / 127.5 - 1)
        touched |= drawn
        psnrs.append(quiet(shown, first, touched))
        plains.append(quiet(plain, first, touched))
        done.append((distance(edited, after, region) < 0.5 * distance(before, after, region)).float().item())
    return psnrs, plains, done


def sources(editor: Editor, options) -> dict:
    """One edit, with the source read as its features (as trained) and as the sum of its tokens, as a chain reads it."""
    tasks, found = Tasks(editor, draw(options.seed, options.count)), {}
    features = tasks.features
    read_again = rows(editor.autoencoder.encode, tasks.plain)
    kinds = ("features", features), ("sum of tokens", tasks.base), ("features of the decoded sum", read_again)
    for name, given in few(kinds, options):
        tasks.features = given
        pictures = rows(editor.decode_pixels, tasks.edit(options.batch)[0]).clamp(-1, 1)
        found[name] = numbers(tasks.judged(pictures))
    return found


def draw_chain(rng: Random) -> list[tuple]:
    """A scene, and scenes that each an edit of a local family leads to: (scene, family, instruction)."""
    while True:
        chain = [(draw_scene(rng, True), "", "")]
        for family in CHAIN:
            proposed = [edit for _ in range(40) if (edit := FAMILIES[family][0](rng, chain[-1][0]))]
            if not proposed:
                break
            wording = rng.randrange(len(FAMILIES[family][1]))
            chain.append((proposed[0].target, family, _instruction(family, wording, proposed[0])))
        if len(chain) == len(CHAIN) + 1:
            return chain


def two(editor: Editor, options) -> dict:
    """Two edits of one scene in regions that do not meet: both at once, and each alone with its own mask."""
    pairs = [draw_pair(Random(f"{options.seed}/{number}")) for number in range(options.count)]
    tasks = [Tasks(editor, [pair[i] for pair in pairs]) for i in (0, 1)]
    free = [(~(a & b)) for a, b in [(dilated(tasks[0].region), dilated(tasks[1].region))]][0].all(2).all(1)
    keep = free.nonzero().flatten().tolist()
    alone = []
    for task in tasks:
        pictures = rows(editor.decode_pixels, task.edit(options.batch, mask=task.region.float())[0]).clamp(-1, 1)
        alone.append(task.success(pictures)[free])
    together = []
    for begin in range(0, len(pairs), options.batch):
        part = slice(begin, begin + options.batch)
        areas = torch.stack([task.region[part].float() for task in tasks], 1)
        texts = [list(pair) for pair in zip(tasks[0].texts[part], tasks[1].texts[part])]
        own, where = replace(SETTINGS, seed=begin), dict(mask=areas.amax(1), areas=areas)
        result = run(EditBatch.of(tasks[0].features[part], texts, SCHEDULE, own, **where), editor.memory)
        result.check()
        together.append(result.total)
    pictures = rows(editor.decode_pixels, torch.cat(together)).clamp(-1, 1)
    both = []
    for task, other in (tasks, tasks[::-1]):
        both.append(task.success(composite(pictures, task.source, ~other.region))[free])
    rates = [x.float().mean().item() for x in (*alone, *both)]
    return {
        "all": {
            "pairs": len(keep), "alone": [round(x, 4) for x in rates[:2]], "together": [round(x, 4) for x in rates[2:]],
            "ratio": [round(b / a, 4) for a, b in zip(rates[:2], rates[2:])],
            "both_done": round((both[0] & both[1]).float().mean().item(), 4),
            "both_done_alone": round((alone[0] & alone[1]).float().mean().item(), 4),
        }
    }  # fmt: skip


def dilated(region: Tensor) -> Tensor:
    return F.max_pool2d(region[:, None].float(), 17, 1, 8)[:, 0] > 0


def draw_pair(rng: Random) -> tuple[Sample, Sample]:
    while True:
        scene, found = draw_scene(rng, True), []
        for family in rng.sample(LOCAL, 2):
            edits = [edit for _ in range(20) if (edit := FAMILIES[family][0](rng, scene))]
            if edits:
                wording = rng.randrange(len(FAMILIES[family][1]))
                target = edits[0].target
                others = _distractors(rng, scene, target, family)
                found.append(Sample(family, _instruction(family, wording, edits[0]), scene, target, others))
        if len(found) == 2:
            a, b = regions(
                render([scene]).expand(2, -1, -1, -1), render([s.target for s in found]), [s.family for s in found]
            )
            if a.any() and b.any() and not (dilated(a[None]) & dilated(b[None])).any():
                return tuple(found)


def presets(editor: Editor, options) -> dict:
    tasks = Tasks(editor, draw(options.seed, options.count))
    found = {}
    for name in few(PRESETS, options, 1):
        settings = [replace(SETTINGS, seed=seed).preset(name) for seed in (0, 5000)]
        pictures = [rows(editor.decode_pixels, tasks.edit(options.batch, one)[0]).clamp(-1, 1) for one in settings]
        spread = distance(*pictures, torch.ones_like(tasks.region)).mean().item() * 127.5
        found[name] = numbers(tasks.judged(pictures[0])) | {"between_seeds": round(spread, 3)}
    return found


def best(editor: Editor, options) -> dict:
    """At a high temperature, where candidates differ: the best of 8 after 4 of 7 scales, against the first."""
    tasks, warm = Tasks(editor, draw(options.seed, options.count)), replace(SETTINGS, temperature=1.0)
    found = {}
    for name in few(("one", *SCORES), options):
        controls = NEUTRAL if name == "one" else Controls(best_of=8, best_at=4, score=name)
        pictures = rows(editor.decode_pixels, tasks.edit(options.batch, warm, controls=controls)[0]).clamp(-1, 1)
        found[name] = numbers(tasks.judged(pictures))
    return found


def branches(editor: Editor, options) -> dict:
    """Seconds of four branches from a scale on, against four runs of the loop and four whole edits; medians of
    `options.repeats`, after a first one that does not count."""
    tasks, found = Tasks(editor, draw(options.seed, 1, ["recolour"])), {}
    settings = replace(SETTINGS, temperature=0.5)

    def timed(function: Callable[[], None]) -> float:
        times = []
        for _ in range(options.repeats + 1):
            editor.workspace.forget()
            begin = time.perf_counter()
            function()
            if editor.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])

    def loop(**more) -> list:
        return [s.bits for s in editor.sample(tasks.features, tasks.texts, SCHEDULE, settings, **more)]

    source, words = SourceImage(picture(tasks.source[0])), tasks.samples[0].instruction

    def whole(**more):
        return editor.run(source, words, size=SIZE, settings=settings, **more)

    bits, tokens = loop(), whole().tokens
    one, edit = timed(loop), timed(whole)
    for kept in few((3, 4, 5), options, 1):
        four = timed(partial(loop, variations=4, prefix=bits[:kept]))
        all4 = timed(partial(whole, variations=4, given=tokens.first(kept)))
        found[f"from scale {kept + 1}"] = {
            "loop": round(one, 4), "four": round(four, 4), "of_four_loops": round(four / 4 / one, 3),
            "edit": round(edit, 4), "of_four_edits": round(all4 / 4 / edit, 3),
        }  # fmt: skip
    return found


SECTIONS = {
    "masks": masks, "random_masks": random_masks,
    "strength": dial("strength", (0.0, 0.25, 0.5, 0.75, 1.0)),
    "preserve": dial("preserve", (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)),
    "source_attention": dial("source_attention", (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)),
    "auto": auto, "sources": sources, "chains": chains, "two": two, "presets": presets, "best": best,
    "branches": branches,
}  # fmt: skip


def main() -> None:
    known = parser(__doc__)
    known.add_argument("--count", type=int, default=200)
    known.add_argument("--chains", type=int, default=20)
    known.add_argument("--steps", type=int, default=len(CHAIN), help="edits of a chain")
    known.add_argument("--masks", type=int, default=200)
    known.add_argument("--repeats", type=int, default=9, help="of what is timed")
    known.add_argument("--seed", type=int, default=77)
    known.add_argument("--batch", type=int, default=20)
    known.add_argument("--only", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    known.add_argument("--device")
    options = parsed(known, count=1, chains=1, steps=1, masks=1, repeats=1)
    dtype = torch.float32  # the demo model's own; in bf16 a few bits differ
    editor = Editor.load(*demo_files(), device=options.device, dtype=dtype)
    sections = {}
    for name in options.only:
        begin = time.perf_counter()
        sections[name] = SECTIONS[name](editor, options)
        print(f"\n{name} ({time.perf_counter() - begin:.0f} s)", flush=True)
        for row, figures in sections[name].items():
            print(f"  {row:34s}", *(f"{column} {value}" for column, value in figures.items()), flush=True)
    facts = {
        "benchmark": "controls",
        "count": options.count,
        "seed": options.seed,
        "chains": options.chains,
        **hardware(editor),
    }
    before = json.loads(options.save.read_text())["sections"] if options.save and options.save.exists() else {}
    finish({**facts, "sections": before | sections}, options.save)


if __name__ == "__main__":
    main()
