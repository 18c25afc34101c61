"""What a training says of itself: lines on the log, metrics.jsonl, TensorBoard, a picture of the loss."""

from __future__ import annotations

import json
import logging
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ..files.reading import check_file
from ..files.safe_write import make_folder, on_disk, write_bytes, write_text
from ..pictures.images import load_image
from .settings import Stage

logger = logging.getLogger(__name__)

METRICS, EVENTS = "metrics.jsonl", "events.*"


class Report:
    """Collects figures of one stage. Only the main process writes; a resumed training keeps what was before it."""

    def __init__(self, folder: Path, stage: Stage, start: int, main: bool) -> None:
        self.folder, self.stage, self.main = folder, stage, main
        self.seconds, self.since = 0.0, start
        self.board = None
        if main:
            make_folder(folder)
            self._keep_before(start)
            self.file = open(folder / METRICS, "a")
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder), purge_step=start)
            except ImportError:
                logger.info("tensorboard is not installed; figures go to %s only", METRICS)

    def due(self, step: int) -> bool:
        """Whether a step is one whose figures are read."""
        return not (step + 1) % self.stage.log_every or step + 1 == self.stage.steps

    def note(self, step: int, loss: Tensor, figures: dict[str, Tensor], samples: int, seconds: float) -> None:
        """One step. Figures are read off the device only at every `log_every`th: reading makes it wait."""
        if not self.due(step):
            return
        values = {"loss": float(loss)} | {name: value.float().tolist() for name, value in figures.items()}
        spent = seconds - self.seconds
        rate = (step + 1 - self.since) * samples * self.stage.optimisation.accumulate / max(spent, 1e-9)
        left = (self.stage.steps - step - 1) * spent / max(step + 1 - self.since, 1)
        self.seconds, self.since = seconds, step + 1
        if self.main:
            values |= {"samples_per_second": round(rate, 3), "seconds": round(seconds, 2)}
            if torch.cuda.is_available():
                values["gpu_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            self.figures(step + 1, values)
            right = f"  bits right {values['bit_accuracy']:.1f}%" if "bit_accuracy" in values else ""
            logger.info(
                "%s step %d of %d  loss %.4f%s  %.*f samples/s  %d s left",
                *(
                    self.stage.name,
                    step + 1,
                    self.stage.steps,
                    values["loss"],
                    right,
                    0 if rate >= 10 else 2,
                    rate,
                    left,
                ),
            )

    def figures(self, step: int, values: dict) -> None:
        """Write named figures of a step."""
        if not values or not self.main:
            return
        with on_disk(self.folder / METRICS):
            self.file.write(json.dumps({"step": step} | values) + "\n")
            self.file.flush()
        for name, value in values.items() if self.board else ():
            with on_disk(self.folder / EVENTS):
                for i, one in enumerate(value if isinstance(value, list) else [value]):
                    self.board.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, one, step)

    def close(self) -> None:
        if self.main:
            with on_disk(self.folder / METRICS):
                self.file.close()
            self._draw()
            if self.board:
                with on_disk(self.folder / EVENTS):
                    self._show_samples()
                    self.board.close()

    def _keep_before(self, start: int) -> None:
        """Drop lines of steps that the resumed training will run again."""
        path = self.folder / METRICS
        if path.exists():
            lines, damaged = whole_lines(path)
            if damaged:
                logger.info("%s: %d lines that were no figures are left out", path, damaged)
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start))

    def _show_samples(self) -> None:
        import numpy as np

        newest = max((self.folder / "samples").glob("*.png"), default=None, key=lambda p: p.stat().st_mtime)
        if not newest:
            return
        try:
            picture = load_image(newest).rgb
        except ValueError as error:  # of an earlier run, damaged since: no reason to lose what was trained
            logger.warning("TensorBoard shows no samples: %s", error)
            return
        self.board.add_image("samples", np.asarray(picture), self.since, dataformats="HWC")

    def _draw(self) -> None:
        lines, _ = whole_lines(self.folder / METRICS)
        points = [(line["step"], line["loss"]) for line in lines if isinstance(line.get("loss"), int | float)]
        try:
            from matplotlib.figure import Figure
        except ImportError:
            logger.info("matplotlib is not installed; no picture of the loss is drawn")
            return
        if len(points) > 1:
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            axes = figure.add_subplot()
            axes.plot(*zip(*points), linewidth=1)
            axes.set(xlabel="step", ylabel="loss", title=self.stage.name)
            axes.grid(alpha=0.3)
            drawn = BytesIO()
            figure.savefig(drawn, dpi=100, format="png")
            write_bytes(self.folder / "loss.png", drawn.getvalue())


def whole_lines(path: Path) -> tuple[list[dict], int]:
    """Figures of a file by step, and how many lines hold none: half of one, say, which a killed training may leave."""
    lines, damaged = [], 0
    with open(check_file(path, "file of figures"), "rb") as file:
        for text in file:
            try:
                line = json.loads(text)
                whole = isinstance(line, dict) and isinstance(line.get("step"), int)
            except (ValueError, RecursionError):
                whole = False
            if whole:
                lines.append(line)
            damaged += not whole
    return lines, damaged
