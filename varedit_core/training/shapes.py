"""ShapeEdit as training data: drawn on the CPU ahead of time, rendered where the networks train.

Every batch is a pure function of the seed and its number, so that a training resumed at any step sees what an
unbroken one would.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shapeedit.edits import FAMILIES, PICTURE_FAMILIES, Sample, draw_sample
from ..shapeedit.metrics import changed
from ..shapeedit.render import Drawing, draw, draw_leaves, leaf_noise, pack, render
from ..shapeedit.scenes import SIDE, STYLES, Scene, draw_scene
from .ending import follow_parent
from .settings import Data

logger = logging.getLogger(__name__)

CHUNK = 64
AHEAD = 8
"""Batches of scenes drawn in advance."""


def draw_scenes(seed: int, batch: int, count: int, pictures: float) -> list[Scene]:
    """Scenes for the VAE: sources and targets of training samples, and a share of cluttered pictures."""
    rng, scenes = Random(f"scenes {seed} {batch}"), []
    for _ in range(count):
        if rng.random() < pictures:
            scenes.append(draw_scene(rng, False, picture=True))
        else:
            sample = draw_sample(rng, "train")
            scenes.append(rng.choice((sample.source, sample.target)))
    return scenes


def draw_pairs(data: Data, seed: int, block: int, part: int, count: int) -> list[Sample]:
    """`count` training samples of a block; families and pictures as frequent as `data` says."""
    rng = Random(f"pairs {seed} {block} {part}")
    names, weights = list(FAMILIES), [data.families.get(name, 1.0) for name in FAMILIES]
    styles, shares = STYLES[1:], [data.styles.get(name, float(name != "duotone")) for name in STYLES[1:]]
    samples = []
    for _ in range(count):
        family = rng.choices(names, weights)[0]
        style = rng.choices(styles, shares)[0] if family == "style" else ""
        share = data.pictures * {"style": 1.0, "keep": 1.0, "add": 0.3}.get(family, 0.0)
        picture = family in PICTURE_FAMILIES and rng.random() < share
        samples.append(draw_sample(rng, "train", family, picture, style))
    return samples


class Renderer:
    """`render` for one device; on CUDA as captured graphs, since thousands of small kernels are bound by launches."""

    LEAVES = 16

    def __init__(self, device) -> None:
        self.device = torch.device(device)
        self.graphs: dict[str, tuple] = {}

    @torch.no_grad()
    def __call__(self, scenes: list[Scene]) -> Tensor:
        """Pictures [B, 3, 256, 256] in [-1, 1]."""
        if self.device.type != "cuda":
            return render(scenes, self.device)
        return torch.cat([self._chunk(scenes[i : i + CHUNK]) for i in range(0, len(scenes), CHUNK)])

    def _chunk(self, scenes: list[Scene]) -> Tensor:
        filled = scenes + [scenes[0]] * (CHUNK - len(scenes))
        packed = pack(filled)
        inputs = [getattr(packed, field.name) for field in dataclasses.fields(packed)]
        leaves = torch.zeros(CHUNK, 3, SIDE, SIDE, device=self.device)
        chosen = [i for i, scene in enumerate(filled) if scene.background.pattern == "picture"]
        for begin in range(0, len(chosen), self.LEAVES):
            rows = chosen[begin : begin + self.LEAVES]
            seeds = [filled[i].background.seed for i in rows]
            noise = leaf_noise(seeds + seeds[:1] * (self.LEAVES - len(rows)), self.device)
            leaves[rows] = self._run("leaves", draw_leaves, noise)[: len(rows)]
        drawn = self._run("scenes", lambda *fields: draw(Drawing(*fields[:-1]), fields[-1]), (*inputs, leaves))
        return drawn[: len(scenes)].clone()

    def _run(self, name: str, function, inputs) -> Tensor:
        """The function through a graph captured at its first call. Its result is overwritten by the next."""
        if name not in self.graphs:
            self.graphs[name] = _captured(function, [tensor.to(self.device) for tensor in inputs])
        graph, held, output = self.graphs[name]
        if graph is None:
            return function(*(tensor.to(self.device) for tensor in inputs))
        for place, tensor in zip(held, inputs):
            place.copy_(tensor if tensor.is_cuda else tensor.pin_memory(), non_blocking=True)
        graph.replay()
        return output


def _captured(function, held: list[Tensor]) -> tuple:
    """(graph, its inputs, its output); (None, ...) where this driver or PyTorch cannot capture the function."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(*held)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = function(*held)
    except RuntimeError as error:
        logger.warning("ShapeEdit is drawn without a captured graph, which is slower: %s", error)
        return None, held, None
    return graph, held, output


def scene_batches(data: Data, seed: int, batch: int, start: int, rank: int, device) -> Iterator[Tensor]:
    """Pixels [batch, 3, 256, 256] for the VAE, from batch number `start` on, without end."""
    renderer, number, pool = Renderer(device), start, workers()

    def ahead(n: int) -> Future:
        return pool.submit(draw_scenes, seed, n * 1000 + rank, batch, data.pictures)

    try:
        waiting = [ahead(number + i) for i in range(AHEAD)]
        while True:
            yield renderer(waiting.pop(0).result())
            number += 1
            waiting.append(ahead(number + AHEAD - 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def workers() -> Executor:
    """Processes that draw samples while the device trains."""
    count = max(1, min(8, (os.cpu_count() or 2) - 1))
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=follow_parent)


class PairBlocks:
    """Blocks of encoded ShapeEdit pairs on the device, and batches out of them.

    encode(pixels [B, 3, 256, 256]) -> features. tokenise(instructions) -> (ids [B, L], real [B, L]).
    """

    def __init__(self, data: Data, seed: int, batch: int, rank: int, world: int, device, encode, tokenise) -> None:
        self.data, self.seed, self.batch, self.device = data, seed * world + rank, batch, device
        self.encode, self.tokenise = encode, tokenise
        self.steps = data.block * data.reuse // batch
        self.render = Renderer(device)

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        """Batches from step `start` on: source and target features, region [B, 32, 32], ids and real tokens."""
        step, pool = start, workers()
        try:
            drawn = self._draw(pool, step // self.steps)
            while True:
                block = step // self.steps
                samples, drawn = drawn, self._draw(pool, block + 1)
                held = self._encoded([sample for future in samples for sample in future.result()])
                begin = step % self.steps
                for position in range(begin, self.steps):
                    epoch, index = divmod(position * self.batch, self.data.block)
                    if index == 0 or position == begin:
                        order = self._order(block, epoch).to(self.device)
                    chosen = order[index : index + self.batch]
                    yield {name: tensor[chosen] for name, tensor in held.items()}
                    step += 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _draw(self, pool: Executor, block: int) -> list[Future]:
        sizes = [min(512, self.data.block - begin) for begin in range(0, self.data.block, 512)]
        return [pool.submit(draw_pairs, self.data, self.seed, block, part, n) for part, n in enumerate(sizes)]

    def _order(self, block: int, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + block) * 1009 + epoch)
        return torch.randperm(self.data.block, generator=generator)

    @torch.no_grad()
    def _encoded(self, samples: list[Sample]) -> dict[str, Tensor]:
        ids, real = self.tokenise([sample.instruction for sample in samples])
        parts: dict[str, list[Tensor]] = {"source": [], "target": [], "region": []}
        for begin in range(0, len(samples), CHUNK):
            chunk = samples[begin : begin + CHUNK]
            source = self.render([sample.source for sample in chunk])
            target = self.render([sample.target for sample in chunk])
            parts["source"].append(self.encode(source))
            parts["target"].append(self.encode(target))
            parts["region"].append(F.adaptive_max_pool2d(changed(source, target).float()[:, None], 32)[:, 0] > 0)
        joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
        return joined | {"ids": ids.to(self.device), "real": real.to(self.device)}
