"""How the processes of a run exchange values and agree to stop; a run of one process needs none."""

import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist

from runtime.devices import pick_device
from runtime.workers import end_with_launcher, rank_info

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Of the exchanges of a step, and of others. In a step all ranks do the same; else they may wait for
# one that loads, hashes, draws or writes alone, and that is what ``DistContext.wait`` is for.
STEP_TIMEOUT, TIMEOUT = timedelta(minutes=10), timedelta(hours=2)
# NCCL ends the process when its own time is over. The vote of a step runs on the CPU, and can say
# what is wrong: it comes first.
NCCL_GRACE = timedelta(minutes=5)
T = TypeVar("T")


@dataclass(frozen=True)
class DistContext:
    """This process among ``size``, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1
    patient: Any = None  # a group of all ranks on the CPU, for exchanges that may wait for long

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` summed over all ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, items: list[T], group: Any = None) -> list[T]:
        """The lists of all ranks, joined; every rank must call it, in the same ``group`` if one is
        given. It may wait for long, as ``wait`` may."""
        if self.size == 1:
            return items
        gathered: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, items, group=group or self.patient)
        return [item for each in gathered for item in each]

    def share(self, name: str) -> str:
        """The main rank's ``name``, on all ranks; every rank must call it."""
        return self.gather([name])[0]

    def new_group(self) -> Any:
        """Another group of all ranks, for exchanges on the CPU beside those of the steps; None for
        a single process."""
        if self.size == 1:
            return None
        return dist.new_group(backend="gloo", timeout=TIMEOUT)

    def wait(self) -> None:
        """Wait until every rank has called this: after what one of them does alone, so that the
        others do not wait for it in a step."""
        if self.size > 1:
            dist.barrier(group=self.patient)


# torch's modules for sharding take a second to import, and a single process shards nothing: no
# object can be of a class whose module is not loaded.


def is_dtensor(tensor: Any) -> "TypeGuard[DTensor]":
    """Whether a tensor is sharded over ranks."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_fsdp(module: Any) -> bool:
    """Whether the parameters of a module are sharded over ranks."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


class StopVote:
    """Whether any rank wants something, asked at every step without waiting for the device.

    Ranks exchange their flags on the CPU while the step runs, and know the answer one step later,
    all in the same one.
    """

    def __init__(self, world: DistContext) -> None:
        self._alone = world.size == 1
        self._group: Any = (
            None if self._alone else dist.new_group(timeout=STEP_TIMEOUT, backend="gloo")
        )
        self._pending: tuple[Any, torch.Tensor] | None = None

    def any(self, flag: bool) -> bool:
        """Whether any rank raised its flag in the previous call; in a single process, this call's
        ``flag``. Every rank must call it."""
        if self._alone:
            return flag
        answer = self.close()
        votes = torch.tensor([int(flag)])
        self._pending = dist.all_reduce(votes, group=self._group, async_op=True), votes
        return answer

    def close(self) -> bool:
        """Wait for the last exchange; return whether any rank raised its flag in it."""
        if self._pending is None:
            return False
        (work, votes), self._pending = self._pending, None
        work.wait()
        return bool(votes.item())


def start_world(device: str) -> DistContext:
    """Join the process group that torchrun's environment names, if it does."""
    info = rank_info()
    if info.size == 1:
        alone = DistContext(pick_device(device))
        if alone.device.index is not None:
            torch.cuda.set_device(alone.device)
        return alone
    end_with_launcher()
    picked = pick_device(device)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    backend = "nccl" if picked.type == "cuda" else "gloo"
    timeout = STEP_TIMEOUT + (NCCL_GRACE if backend == "nccl" else timedelta())
    dist.init_process_group(backend, timeout=timeout)
    patient = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return DistContext(picked, info.rank, info.size, patient)


def is_lost(error: RuntimeError, world: DistContext) -> bool:
    """Whether an exchange among ranks failed, as it does when one of them is gone."""
    error_types = (dist.DistBackendError, dist.DistNetworkError)  # NCCL's; gloo has no own type
    return world.size > 1 and (isinstance(error, error_types) or "gloo/transport" in str(error))


def stop_world(world: DistContext) -> None:
    """Leave the group, when the run is over. Not after a failure: others may be in an exchange, and
    notice it by the end of this process."""
    if world.size > 1:
        dist.destroy_process_group()
