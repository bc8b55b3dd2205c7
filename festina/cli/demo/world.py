"""One process or several: each process's rows of the batch, and the reductions over processes."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """`size` processes that split the rows of every batch; this one is number `rank`. A single process sends nothing."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """True in the process that prints and writes."""
        return self.rank == 0

    def own(self, rows: Tensor) -> Tensor:
        """This process's share of a tensor `[*, B, ...]`."""
        return rows.chunk(self.size, 1)[self.rank].contiguous()

    def gather(self, own: Tensor) -> Tensor:
        """All rows, gathered from the shares of all processes."""
        if self.size == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts, 1)

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over the processes."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared)
        return [float(value) for value in shared / self.size]

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, with gradients averaged over the processes in backward."""
        return module if self.size == 1 else DistributedDataParallel(module)


@contextmanager
def join() -> Iterator[World]:
    """The world that torchrun set up, or a world of one process.

    Nothing that was made in it may be held when it ends. A parallel module holds on to the process group: one that outlives
    `destroy_process_group` ends with the interpreter, and its threads may abort the process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
        gc.collect()
        dist.barrier()  # no process leaves while another one still writes
    finally:
        dist.destroy_process_group()
