"""One run in several processes: who they are, how they agree, how they share a model. Alone, everything here does nothing.

    environment of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) → World

Each process takes its rows of every global batch (data/sampler.py), and gradients are averaged: by DistributedDataParallel,
where each holds the whole model, or under `train.parallel = fsdp` by FSDP2, where weights, gradients and moments are sharded
and weights are gathered block by block. What decides (stop, errors, what to begin from) is agreed over a gloo group, so that
no process waits for another that has left. Only rank 0 writes the run folder; the others have a `NullRunWriter`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..config import RunConfig
from ..errors import QuestError, RunFailed
from ..store import Run, RunWriter
from .preflight import check_shared

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)  # with a process that says nothing: a slow validation or a large checkpoint is no failure


@dataclass(frozen=True)
class World:
    """The processes of one run, as one of them sees them. `agreeing` and `saving` are gloo groups of all; None where alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    agreeing: Any = None
    saving: Any = None  # one for checkpoints, which are written while the others train

    def any(self, flag: bool) -> bool:
        """Does any process say so?"""
        if self.size == 1:
            return flag
        votes = torch.tensor([int(flag)])
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.agreeing)
        return bool(votes)

    def on_rank0(self, work: Callable[[], T]) -> T:
        """`work()` of rank 0, its value or its error for all."""
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
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.agreeing)
        return values

    @property
    def in_background(self) -> World:
        """The same processes, for a thread of each that agrees with those of the others."""
        return replace(self, agreeing=self.saving)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """x, summed over the processes in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x


SINGLE_PROCESS = World()


@contextmanager
def world(config: RunConfig) -> Iterator[World]:
    """The World that the environment describes; alone without one.

    Raises UsageError where it does not fit the run, and RunFailed for what the others' end does to this process.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE_PROCESS
        return
    check_shared(config, size)
    on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        groups = [dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2)]
        yield World(dist.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")), *groups)
    except RuntimeError as e:
        if isinstance(e, QuestError) or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        reason = str(e).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        raise RunFailed(f"another process of this run is gone ({reason}); the same command goes on from its checkpoint.") from e
    finally:
        with suppress(Exception):  # a peer that is gone already
            dist.destroy_process_group()


def threads_each() -> int:
    """CPU threads of one process: torch's choice, or its share where nobody has divided the cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, torch.get_num_threads() // (1 if "OMP_NUM_THREADS" in os.environ else local))


class NullRunWriter(RunWriter):
    """The writer of a process that writes nothing."""

    def __init__(self, run: Run, config: RunConfig) -> None:
        self.run, self.config, self.status = run, config, run.status()

    def _nothing(self, *_: Any, **__: Any) -> None:
        """Rank 0 does it."""

    check = begin = set_state = log = sync = write_model = finish = _nothing


def replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The model behind DistributedDataParallel, which averages gradients while the backward pass goes on."""
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """FSDP2 in place: each block gathers its weights before its forward and its backward pass; the rest is one more unit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name, the sharded ones gathered; all processes must call it."""
    return {name: gathered(t) for name, t in tensors.items()}


def gathered(x: torch.Tensor) -> torch.Tensor:
    """A sharded tensor, or a sum of which each process has a part, whole; all processes must call it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local(x: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, or all of another, sharing its memory."""
    return x.to_local() if hasattr(x, "to_local") else x


def like(part: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`part` as this process's part of a tensor that is sharded as `x` is; itself where x is not."""
    if not hasattr(x, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(x, DTensor)
    return DTensor.from_local(part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())
