"""Room for an edit on a device: what is free, how the edit then runs, and networks that make way meanwhile.

`plan` knows what each way takes; here are the devices, the networks and the workspace.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from traceback import clear_frames
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..model.engine import Engine
from ..model.layers import Attention, sdpa
from ..model.transformer import Transformer
from ..sampling.drafting import Drafting
from .eight_bit_cache import exact_heads, query_scales
from .graphs import State
from .plan import STORES, Job, Plan, described, gigabytes, plan, plans, too_large
from .session import Session
from .tiling import free_memory
from .workspace import FOLDED, RECORDED_TOKENS, Shape, Workspace

logger = logging.getLogger(__name__)

SPARE = 512 << 20
"""Bytes of a device that plans leave alone: for what kernels take to work in, and pieces that are too small."""
_HOST_SHARE = 0.8  # of the free host memory, which others want too


T = TypeVar("T")


class Memory(Protocol):
    """Where the memory of edits comes from, and the engine that works in it.

    networks: the one that edits, and a drafter or none. movable: bytes of other networks that may go to host memory
    meanwhile. exact: whether the KV cache must never be in 8 bits.
    """

    networks: Sequence[Transformer]
    movable: int
    exact: bool

    def free(self, job: Job) -> float:
        """Bytes of the device that a job may take."""

    def host(self) -> float:
        """Bytes of host memory that a job may take."""

    def counted(self, job: Job) -> Job:
        """A job that does not fit at once, its bytes counted more exactly where that takes time."""

    def within(self, plan: Plan, drafts: bool, loop: Callable[[Engine], T]) -> T:
        """The result of a loop that runs as planned, with its engine. drafts: whether the drafter is to be in it."""

    def ran_out(self, error: Exception) -> bool:
        """Whether an error says that the device's memory ran out."""

    def recover(self) -> None:
        """Give back what an attempt that ran out of memory has left."""

    def tell(self, text: str) -> None:
        """A sentence for the user."""


def as_it_fits(job: Job, memory: Memory, attempt: Callable[[Plan], T], least: int = 1) -> T:
    """Run a job in the best way that fits into free memory, or in the next one for which memory lasts.

    least: rows that can only run together. ValueError where nothing is left to try.
    """
    host, budget = memory.host(), memory.free(job)
    if not Plan(job).fits(budget, host):
        job = memory.counted(job)
    way = plan(job, budget, host, memory.movable, memory.exact)
    if way.job.images < least:
        raise ValueError(f"memory lasts for {way.job.images} of {least} rows of regions; use fewer")
    if way.reasons:
        memory.tell(f"{'; '.join(way.reasons)}; running {described(way)} instead")
    ways = plans(job, memory.movable, memory.exact)
    left = [way, *ways[ways.index(replace(way, reasons=())) + 1 :]]
    left = [other for other in left if other.needed_on_host <= host and other.job.images >= least]
    while True:
        way, *left = left
        try:
            return attempt(way)
        except Exception as error:
            if not memory.ran_out(error):
                raise
        memory.recover()  # outside the handler: until its end the exception holds what the loop had made
        # Of fewer pictures at a time not the next number, but one that takes clearly less.
        clearly = 0.75 * way.needed
        left = [other for other in left if other.needed < (way.needed if other.job.images == 1 else clearly)]
        if not left:
            budget, advice = memory.free(job), f"; fewer than {least} regions take less, too" if least > 1 else ""
            if way.fits(budget, host):  # by its numbers there is room
                raise ValueError(
                    f"memory ran out {described(way)}, which takes least; free memory or use a smaller model or size"
                    + advice
                )
            raise ValueError(too_large(job, budget, host, memory.movable, memory.exact) + advice)
        memory.tell(f"memory ran out {described(way)}; running {described(left[0])} instead")


class TorchMemory:
    """Memory that torch hands out: on a CUDA device what is free there, elsewhere without a limit.

    network: the one that edits. A workspace stays from edit to edit where there is room for it. `use` sets another one,
    in which all edits run, whatever is free.
    """

    def __init__(self, network: Transformer, device: torch.device) -> None:
        self.network, self.device = network, device
        self.others: Sequence[nn.Module] = ()
        """Networks that may make way meanwhile."""
        self.drafter: Transformer | None = None
        self.exact = False
        self.workspace = self._planned = Workspace()
        self.drafts, self.elsewhere = Workspace(), Elsewhere()
        self.recordings: Sequence = ()
        """What keeps recorded work of other networks, to be forgotten when these move."""

    @property
    def networks(self) -> list[Transformer]:
        return [self.network, *([self.drafter] if self.drafter else [])]

    @property
    def movable(self) -> int:
        return sum(map(nbytes, self.others)) if self.device.type == "cuda" and not self.fixed else 0

    def use(self, workspace: Workspace) -> None:
        """Run all in a workspace of the caller's, until it is given the former one back."""
        self.workspace = workspace

    @property
    def fixed(self) -> bool:
        """Whether the workspace is the caller's."""
        return self.workspace is not self._planned

    def free(self, job: Job) -> float:
        if self.device.type != "cuda" or self.fixed:
            return math.inf
        here = free_memory(self.device) - SPARE
        if holds(self.workspace, job) and job.activations() <= here:
            return math.inf
        self.workspace.forget(host=False)
        return free_memory(self.device) - SPARE

    def host(self) -> float:
        return free_host_memory() if self.device.type == "cuda" else math.inf

    def counted(self, job: Job) -> Job:
        return replace(job, exact_keys=sum(map(len, exact_heads(query_scales(self.network, self.device)))))

    def within(self, plan: Plan, drafts: bool, loop: Callable[[Engine], T]) -> T:
        if not self.fixed:
            self.workspace = self._planned = self._workspace(plan)
        others = self.others if plan.movable else ()
        for kept in self.recordings if others else ():
            kept.forget()
        with self.elsewhere(others, self.device):
            return loop(engine_of(self.networks[: 1 + drafts], [self.workspace, self.drafts]))

    def _workspace(self, way: Plan) -> Workspace:
        """The present one where it is of the way's kind, else a new one; it stays where there is room for it."""
        stays = way.store == "exact" and not (way.rows_at_once or way.movable or way.reasons)
        if stays and self.device.type == "cuda" and not holds(self.workspace, way.job):
            stays = way.needed + kept_bytes(way.job) <= free_memory(self.device) - SPARE
        wanted = (STORES[way.store], stays, way.rows_at_once)
        present = self.workspace
        return present if (present.kind, present.kept, present.rows_at_once) == wanted else Workspace(*wanted)

    def ran_out(self, error: Exception) -> bool:
        return isinstance(error, torch.cuda.OutOfMemoryError)

    def recover(self) -> None:
        for kept in (self.workspace, self.drafts, *self.recordings):
            kept.forget()
        torch.cuda.empty_cache()

    def tell(self, text: str) -> None:
        logger.warning(text)

    def forget(self) -> None:
        """Give back all that stays between edits."""
        for kept in (self.workspace, self.drafts, self.elsewhere):
            kept.forget()


def engine_of(
    networks: Sequence[Transformer], workspaces: Sequence[Workspace | None], attention: Attention = sdpa
) -> Engine:
    """The engine of a network, or of two of which the second drafts."""
    sessions = [Session(network, work, attention) for network, work in zip(networks, workspaces)]
    if len(sessions) == 1:
        return sessions[0]
    refiner, drafter = networks
    return Drafting(sessions[1], sessions[0], (drafter.config, refiner.config))


def holds(workspace: Workspace, job: Job) -> bool:
    """Whether a workspace has all that it keeps for such a job, from the edit before."""
    shape = workspace.shape
    if workspace.busy or shape is None or workspace.kind is not STORES["exact"] or workspace.rows_at_once:
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


def with_room(device: torch.device | str, needed: int, name: str) -> torch.device:
    """A device where it has room for a network of so many bytes, else the CPU, which is told."""
    device = torch.device(device)
    free = free_memory(device) - SPARE
    if needed <= free:
        return device
    logger.warning(
        "%s takes %s and %s are free on the GPU, so that it runs on the processor", name, gigabytes(needed),
        gigabytes(max(0, free)),
    )  # fmt: skip
    return torch.device("cpu")


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
