"""Training of one run in several processes: process groups, agreement on decisions, and distribution of the model.

    environment of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) → World

Each process takes its rows of every global batch (data/sampler.py), and gradients are averaged. By default
DistributedDataParallel does so, and each process holds the whole model. With `train.parallel = fsdp` it is FSDP2: weights,
gradients and moments are sharded, and weights are gathered block by block.

The processes agree on every decision (to stop, to fail, where to start) over a gloo group, so that none waits for one that has
left. Only rank 0 writes the run folder; the others have a `NullRunWriter`. In a single process every function here is trivial.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import RunConfig
from ..errors import QuestError, RankLost, RunFailed
from ..store import Run, RunWriter
from ..system import cpu_count
from .preflight import check_shared

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # long, because a slow validation or a large checkpoint is not a failure
MEET_S = 300.0  # for the processes to meet, unless $QUESTCTL_RENDEZVOUS_S says otherwise


@dataclass(frozen=True)
class World:
    """The processes of one run, from the point of view of one of them. The groups are gloo groups of all processes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    agreeing: Any = None  # the group for decisions; None in a single process
    saving: Any = None  # a group of its own for checkpoints, because they are written while training continues

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        if self.size == 1:
            return flag
        votes = torch.tensor([int(flag)])
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.agreeing)
        return bool(votes)

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 only, and return its value, or raise its error, in every process."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as e:
                outcome[1] = type(e)(str(e)) if isinstance(e, QuestError) else RunFailed(f"rank 0: {e}")
                dist.broadcast_object_list(outcome, src=0, group=self.agreeing)
                raise
        dist.broadcast_object_list(outcome, src=0, group=self.agreeing)
        if outcome[1] is not None:
            raise outcome[1]
        value: T = outcome[0]
        return value

    def all(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.agreeing)
        return values

    def from_rank0(self, x: torch.Tensor) -> torch.Tensor:
        """Replace `x` by that of rank 0 in every process, in place; returns it."""
        if self.size > 1:
            dist.broadcast(x, src=0)
        return x

    @property
    def in_background(self) -> World:
        """The same processes with the group `saving`, for background threads that agree among themselves."""
        return replace(self, agreeing=self.saving)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the processes, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x


SINGLE_PROCESS = World()


@contextmanager
def world(config: RunConfig) -> Iterator[World]:
    """The World that torchrun's environment variables describe; a single process without them.

    Raises UsageError if the number of processes does not fit the run, RunFailed if they do not meet in time, and RankLost if
    another process ends before this one.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE_PROCESS
        return
    check_shared(config, size)
    on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
    _meet("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        groups = [dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2)]
        yield World(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")), *groups)
    except RuntimeError as e:
        if not of_lost_rank(e):
            raise
        reason = str(e).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        raise RankLost(
            f"another process of this run has ended ({reason}); repeat the command to resume from the checkpoint."
        ) from e
    finally:
        with suppress(Exception):  # raised if another process has ended already
            dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Join the other processes at MASTER_ADDR. Raises RunFailed if not all are there in time."""
    seconds, begin = float(os.environ.get("QUESTCTL_RENDEZVOUS_S") or MEET_S), time.monotonic()
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        store.set_timeout(TIMEOUT)
    except RuntimeError as e:
        if not of_lost_rank(e):
            raise
        if time.monotonic() - begin < seconds:
            raise RankLost(f"another process of this run has ended before all had met ({str(e).splitlines()[0]}).") from e
        size, place = os.environ["WORLD_SIZE"], f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunFailed(
            f"rendezvous: the {size} processes of this run did not meet at {place} within {seconds:g} s; check that every node "
            "reaches that address, or set QUESTCTL_RENDEZVOUS_S to more seconds."
        ) from e


def of_lost_rank(e: Exception) -> bool:
    """Whether an error only says that another process is gone."""
    return isinstance(e, RuntimeError) and not isinstance(e, QuestError) and (isinstance(e, dist.DistError) or "gloo" in str(e))


def threads_each() -> int:
    """CPU threads for this process: torch's number or, if fewer, that of usable CPUs, divided by the processes here.

    A container may use fewer CPUs than it sees. Threads beyond its quota wait for each other, and a step takes many times as
    long. If `OMP_NUM_THREADS` is set, torch's number is kept.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(torch.get_num_threads(), cpu_count()) // local)


class NullRunWriter(RunWriter):
    """A RunWriter that writes nothing, for all processes except rank 0."""

    def __init__(self, run: Run, config: RunConfig) -> None:
        self.run, self.config, self.status = run, config, run.status()

    def _nothing(self, *_: Any, **__: Any) -> None:
        """Do nothing, because rank 0 writes."""

    check = begin = record = set_state = log = sync = write_model = write_average = finish = _nothing


def replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap the model in DistributedDataParallel, which averages gradients during the backward pass."""
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """Shard the model with FSDP2, in place.

    Each block gathers its weights before its forward and its backward pass; the weights outside the blocks are one more unit.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gather the sharded ones of `tensors`; all processes must call it."""
    return {name: gathered(t) for name, t in tensors.items()}


def is_sharded(x: torch.Tensor) -> bool:
    """Whether this process has only a part of `x`: a shard, or some terms of a sum."""
    return hasattr(x, "to_local")


def gathered(x: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, or of a sum whose terms the processes hold; all processes must call it."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def local(x: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, or another tensor itself. Memory is shared, not copied."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def like(part: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The tensor that is sharded like `x` and of which `part` is this process's part; `part` itself if `x` is not sharded."""
    if not is_sharded(x):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(x, DTensor)
    return DTensor.from_local(part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def share(whole: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """This process's part of `whole`, which all processes have, if it is sharded like `x`; else `whole` itself."""
    if not is_sharded(x):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(x, DTensor)
    return local(distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None))
