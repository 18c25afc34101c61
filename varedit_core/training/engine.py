"""The training loop: steps, checkpoints, logs. Devices, mixed precision and sharding are accelerate's.

Knows optimisers and files of a training; what is trained and on what is the task's. Everything that a step does
follows from the seed and the step's number, so a training that was killed goes on to the same losses.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..files.reading import read_json
from ..files.safe_write import write_json
from ..runtime.fp8 import LINEARS
from .muon import Muon
from .report import Report
from .settings import Optimisation, Stage
from .sharded import keep_exact, local
from .states import Progress, Trained, load_state, save_state

logger = logging.getLogger(__name__)

DONE = "finished.json"
TABLES = ("ada_gss", "scale_mul", "pos_start", "lvl_embed", "cfg_uncond", "text_proj_for_sos.ca.mat_q")


class Task(Protocol):
    """What a stage trains. model: its trainable parameters are trained, all of them saved in checkpoints."""

    model: nn.Module

    def batches(self, start: int) -> Iterator[Any]: ...

    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and figures to log (detached tensors of one number each, or vectors)."""

    def look(self, folder: Path, step: int) -> dict[str, float]:
        """Write pictures for the eye into `folder`; returns figures to log."""

    def export(self, folder: Path) -> list[Path]:
        """Write the result's files."""


class Average:
    """Moving average of the trained parameters; `applied` swaps it into the model for a while."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self.live] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.decay:
            # Early averages would otherwise remember the random start.
            decay = min(self.decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(self.values, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        for value, parameter in zip(self.values, self.live):
            held = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(held)

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *error) -> None:
        self.swap()

    def state(self) -> dict[str, Tensor]:
        """The average's own tensors, by number."""
        return {str(i): value for i, value in enumerate(self.values)}


class Sound:
    """Watches that a training computes with numbers: nothing that is undefined or infinite may be written."""

    def __init__(self, stage: Stage, model: nn.Module, average: Average) -> None:
        self.name = stage.name
        self.trained = [*(p for p in model.parameters() if p.requires_grad), *average.values]
        self.steps: list[tuple[int, Tensor, Tensor]] = []

    def note(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """A step's loss, and the norm of its gradient."""
        self.steps.append((step, loss.isfinite(), local(norm).isfinite()))

    def check(self, accelerator, weights: bool) -> None:
        """ValueError where a loss or gradient since the last check is no number, in any process, or, where asked for, a
        trained weight or its average. Makes the device wait."""
        steps, *figures = zip(*self.steps)
        for what, fine in zip(("loss", "gradient"), figures):
            bad = [step for step, one in zip(steps, torch.stack(fine).tolist()) if not one]
            self._stop(what, bad[:1], accelerator)
        self.steps.clear()
        if weights:
            found = all(bool(local(p).isfinite().all()) for p in self.trained)
            self._stop("weights", [] if found else steps[-1:], accelerator)

    def _stop(self, what: str, steps: Sequence[int], accelerator) -> None:
        here = torch.tensor([*steps, 2**62][:1], device=accelerator.device)
        first = int(accelerator.gather(here).min())  # all stop, or none: the others would wait for ever
        if first < 2**62:
            raise ValueError(f"stage {self.name}: the {what} became undefined at step {first}; lower the learning rate")


def optimizers(model: nn.Module, settings: Optimisation) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon on the blocks' matrices and AdamW on the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("nothing is to be trained; choose LoRA targets or a task that trains a network")
    muon = [p for name, p in named if settings.optimizer == "muon" and p.ndim == 2 and _in_block(name)]
    chosen = {id(p) for p in muon}
    matrices = [p for name, p in named if id(p) not in chosen and p.ndim >= 2 and not _is_table(name)]
    others = [p for name, p in named if id(p) not in chosen and (p.ndim < 2 or _is_table(name))]
    groups = [{"params": matrices, "weight_decay": settings.decay}, {"params": others, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    on_cuda = named[0][1].is_cuda
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=settings.rate, betas=(settings.beta1, settings.beta2), fused=on_cuda)
    ]
    if muon:
        made.append(Muon(muon, settings.muon_rate, settings.decay))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def _in_block(name: str) -> bool:
    return "blocks." in name and name.endswith(".weight") and not _is_table(name)


def _is_table(name: str) -> bool:
    """Learned vectors that are kept as embeddings: no matrix multiplies by them, so nothing pulls them to zero."""
    return any(part in name for part in TABLES)


def rate_factor(step: int, steps: int, settings: Optimisation) -> float:
    """Share of the highest learning rate at a step: a linear rise, then a cosine to `final`."""
    rise = max(1, round(settings.warmup * steps))
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, steps - rise)
    return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * progress))


def never() -> bool:
    """No reason to stop."""
    return False


def train(
    task: Task, stage: Stage, folder: Path, accelerator, resume: bool, enough: Callable[[], bool] = never
) -> bool:
    """Run a stage to its end, or until `enough` says that the step made was the last one; whether it is finished.

    Writes checkpoints, logs and the result into `folder`. With `resume` it goes on from the last checkpoint.
    """
    if accelerator.distributed_type == "FSDP":
        _check_sharded(stage)
        keep_exact(accelerator)
    model, *prepared = accelerator.prepare(task.model, *optimizers(task.model, stage.optimisation))
    bare, progress = accelerator.unwrap_model(model), Progress()
    average = Average(bare, stage.optimisation.average)
    place = accelerator.process_index, accelerator.num_processes
    trained = Trained(bare, prepared, average, progress, *place)
    if resume:
        load_state(folder, trained, accelerator)
    report = Report(folder, stage, progress.step, accelerator.is_main_process)
    generator = torch.Generator(accelerator.device)
    begun, first = time.monotonic() - progress.seconds, progress.step
    batches = task.batches(progress.step)
    sound, stopped, written = Sound(stage, model, average), False, []
    try:
        while progress.step < stage.steps and not stopped:
            step = progress.step
            _set_rates(prepared, rate_factor(step, stage.steps, stage.optimisation))
            generator.manual_seed(((stage.seed * 1_000_003 + step) * 1009 + accelerator.process_index) % 2**63)
            loss, norm, figures = _step(task, model, prepared, batches, generator, accelerator, stage)
            average.update(step)
            progress.step, progress.seconds = step + 1, time.monotonic() - begun
            sound.note(progress.step, loss, norm)
            last = progress.step == stage.steps
            stopped = _agreed(enough(), accelerator, step)
            saved = last or stopped or progress.step % stage.save_every == 0
            if saved or report.due(step):
                sound.check(accelerator, weights=saved)
            report.note(step, loss, figures, stage.batch * accelerator.num_processes, progress.seconds)
            if saved:
                save_state(folder, trained, accelerator)
                with average:  # the result so far can be used at any time
                    written = task.export(folder)
            if stage.sample_every and (last or progress.step % stage.sample_every == 0):
                if accelerator.is_main_process and accelerator.distributed_type != "FSDP":
                    with average:
                        report.figures(progress.step, task.look(folder / "samples", progress.step))
    finally:
        batches.close()
        report.close()
    if progress.step < stage.steps:
        return False
    if not written:  # killed after its last step
        with average:
            written = task.export(folder)
    if accelerator.is_main_process:
        summary = {"steps": progress.step, "seconds": round(progress.seconds, 1), "files": [p.name for p in written]}
        write_json(folder / DONE, summary, indent=2)
    logger.info("%s: %d steps, %d of them now", stage.name, progress.step, progress.step - first)
    return True


def _check_sharded(stage: Stage) -> None:
    if stage.optimisation.average:
        raise ValueError(f"stage {stage.name}: a moving average of sharded weights cannot be kept; set average = 0")
    if stage.task == "lora" and stage.lora.base != LINEARS[0]:
        raise ValueError(f'stage {stage.name}: an 8-bit base cannot be sharded; set lora.base = "exact"')
    if stage.optimisation.optimizer == "muon":
        raise ValueError(f'stage {stage.name}: muon needs whole matrices, not sharded ones; set optimizer = "adamw"')


def _set_rates(prepared: Sequence[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in prepared:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def _step(
    task, model, prepared, batches, generator, accelerator, stage: Stage
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One step: its loss, the norm of its gradient before it is clipped, and figures."""
    total, figures = 0.0, {}
    for _ in range(stage.optimisation.accumulate):
        batch = next(batches)  # outside the mixed precision: pictures and features are exact
        with accelerator.autocast():
            loss, figures = task.loss(model, batch, generator)
        accelerator.backward(loss / stage.optimisation.accumulate)
        total = total + loss.detach() / stage.optimisation.accumulate
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = accelerator.clip_grad_norm_(trained, stage.optimisation.clip)
    for optimizer in prepared:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm, figures


def _agreed(stop: bool, accelerator, step: int) -> bool:
    """Whether the first process wants to stop; asked now and then only, as asking makes the others wait."""
    if accelerator.num_processes == 1:
        return stop
    if step % 20:
        return False
    from accelerate.utils import broadcast

    return bool(broadcast(torch.tensor(int(stop), device=accelerator.device)))


def finished(folder: Path) -> bool:
    """Whether a stage's folder holds its result. ValueError where the list of its files is damaged or one is gone."""
    path = folder / DONE
    if not os.path.lexists(path):
        return False
    cure = "remove it, and --resume writes the result again from the last checkpoint"
    facts = read_json(path, "list of a stage's results", cure=cure)
    files = facts.get("files") if isinstance(facts, dict) else None
    if not isinstance(files, list) or not files or not all(isinstance(name, str) for name in files):
        raise ValueError(f"{path} does not list a stage's results; {cure}")
    gone = [name for name in files if not (folder / Path(name).name).exists()]
    if gone:
        raise ValueError(f"{path} lists {gone[0]}, which is gone; {cure}")
    return True
