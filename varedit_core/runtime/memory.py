"""Room for an edit on a device: what is free, the way an edit then runs, and networks that make way meanwhile.

`planning` knows what each way takes; here are the devices, the networks and the workspace.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from traceback import clear_frames

import torch
from torch import Tensor, nn

from ..model.transformer import Transformer
from .graphs import State
from .plan import STORES, Job, Plan, described, plan
from .stores import exact_heads, query_scales
from .tiling import free_memory
from .workspace import FOLDED, RECORDED_TOKENS, Shape, Workspace

logger = logging.getLogger(__name__)

SPARE = 512 << 20
"""Bytes of a device that plans leave alone: for what kernels take to work in, and pieces that are too small."""
_HOST_SHARE = 0.8  # of the free host memory, which others want too


def planned(
    job: Job, transformer: Transformer, device: torch.device, workspace: Workspace, others: Sequence[nn.Module] = (),
    exact: bool = False,
) -> tuple[Plan, Workspace]:  # fmt: skip
    """The best way to run a job within what is free on a CUDA device, and the workspace for it; elsewhere, where nobody
    tells what is free, all at once.

    workspace: the present one. What it has ready for such a job is used, else its memory is given back. others:
    networks that may be moved to host memory while the loop runs. exact: not in 8 bits. Logs a line where not all runs
    at once.
    Raises ValueError where nothing fits.
    """
    best = Plan(job)
    if device.type != "cuda":
        return best, workspace
    if holds(workspace, job) and job.activations() <= free_memory(device) - SPARE:
        return best, workspace
    workspace.forget(host=False)
    budget = free_memory(device) - SPARE
    if best.fits(budget, math.inf):
        return best, workspace_for(best, workspace, kept=best.needed + kept_bytes(job) <= budget)
    job = replace(job, exact_keys=sum(map(len, exact_heads(query_scales(transformer, device)))))
    way = plan(job, budget, free_host_memory(), sum(map(nbytes, others)), exact)
    logger.warning("%s; running %s instead", "; ".join(way.reasons), described(way))
    return way, workspace_for(way, workspace, kept=False)


def holds(workspace: Workspace, job: Job) -> bool:
    """Whether a workspace has all that it keeps for such a job, from the edit before."""
    shape = workspace.shape
    if shape is None or workspace.kind is not STORES["exact"] or workspace.rows_at_once:
        return False
    wanted = Shape.of(job.schedule, [range(job.text_tokens)] * job.rows, 1, job.dtype, shape.device)
    return replace(shape, copies=1) == wanted


def kept_bytes(job: Job) -> int:
    """What a workspace that stays takes beside what the job needs: texts folded in, and what recorded passes make."""
    config, size = job.config, job.dtype.itemsize
    room = next((length for length in FOLDED if job.text_tokens <= length), 0)
    folded = 2 * config.depth * job.rows * config.heads * room * config.width * size
    recorded = Job.pass_bytes(config, job.dtype, RECORDED_TOKENS)
    return folded + recorded


def workspace_for(way: Plan, present: Workspace, kept: bool) -> Workspace:
    """The workspace of a way: the present one where it is of its kind. kept: whether it may stay after the edit."""
    wanted = (STORES[way.store], kept, way.rows_at_once)
    return present if (present.kind, present.kept, present.rows_at_once) == wanted else Workspace(*wanted)


def make_room(workspace: Workspace, device: torch.device, needed: float) -> None:
    """Forget what a workspace keeps between edits where a device has not so many bytes free."""
    if workspace.shape is not None and free_memory(device) < needed:
        workspace.forget(host=False)


class Elsewhere:
    """Networks that make way for a while. Their weights stay in host memory as well from then on, locked in place, so
    that making way costs nothing and coming back one fast copy."""

    def __init__(self) -> None:
        self.copies: dict[nn.Module, tuple[Hashable, list[Tensor]]] = {}
        self.state = State()

    @contextmanager
    def __call__(self, networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
        """Networks in host memory within; they come back to `device` however it ends.

        One that cannot come back, for want of memory, stays in host memory. An error from within is raised as it is,
        and the log names the network; where all went well within, an error names it (torch.cuda.OutOfMemoryError).
        """
        moved: dict[nn.Module, list[Tensor]] = {}
        try:
            for network in networks:
                copies = self._copies(network)
                moved[network] = copies
                self._put(network, copies)
            yield
        except BaseException as error:
            try:
                self._come_back(moved, device, error)
            except RuntimeError as left:
                logger.error("%s", left)
            raise
        self._come_back(moved, device)

    def _come_back(
        self, moved: dict[nn.Module, list[Tensor]], device: torch.device, within: BaseException | None = None
    ) -> None:
        """Bring networks to a device; an error names those for which it has no room. within: an error whose frames may
        hold memory."""
        failed = self._returned(moved, device)
        if failed:
            clear_frames(within and within.__traceback__)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            failed = self._returned({network: moved[network] for network in failed}, device)
        if failed:
            names, reason = ", ".join(type(network).__name__ for network in failed), [*failed.values()][-1]
            kind = torch.cuda.OutOfMemoryError if isinstance(reason, torch.cuda.OutOfMemoryError) else RuntimeError
            advice = f"free memory on {device}, then load the model again"
            raise kind(f"{names} could not come back from host memory; {advice}") from reason

    def _returned(self, moved: dict[nn.Module, list[Tensor]], device: torch.device) -> dict[nn.Module, Exception]:
        """Put each network on a device. Returns those that stayed in host memory, whole, and why."""
        failed = {}
        for network, copies in moved.items():
            try:
                self._put(network, [copy.to(device, non_blocking=True) for copy in copies])
            except Exception as error:
                self._put(network, copies)
                failed[network] = error.with_traceback(None)
            self.copies[network] = self.state(network), copies
        return failed

    def forget(self) -> None:
        """Give host memory back."""
        self.copies = {}

    def _copies(self, network: nn.Module) -> list[Tensor]:
        state = self.state(network)
        if self.copies.get(network, (None,))[0] != state:
            locked = torch.cuda.is_available()
            copies = [t.detach().to("cpu") for t in _weights(network)]
            self.copies[network] = state, [t.pin_memory() if locked else t for t in copies]
        return self.copies[network][1]

    @staticmethod
    def _put(network: nn.Module, tensors: Sequence[Tensor]) -> None:
        for weight, tensor in zip(_weights(network), tensors, strict=True):
            weight.data = tensor


def _weights(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def nbytes(network: nn.Module) -> int:
    """Bytes of a network's weights."""
    return sum(tensor.nbytes for tensor in _weights(network))


def free_host_memory() -> float:
    """Bytes of host memory that an edit may take; infinite where the system does not tell (other than Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
    return _HOST_SHARE * min(free, _left_in_container())


def _left_in_container() -> float:
    """What a container's own limit leaves, counting what it keeps of files as free; infinite without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        files = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        used = int((folder / "memory.current").read_text()) - int(files[1])
        return int((folder / "memory.max").read_text()) - used
    except (OSError, ValueError, TypeError):  # "max" is no number
        return math.inf
