"""The processes of a data-parallel run, as torchrun or ``accelerate launch`` starts them; one process alone is the common case.

Questions are played by one rank each. Episodes are then gathered, so that every rank knows the whole batch: advantages,
denominators, metrics and the micro-batches are those of a single process, whatever the number of ranks. A rank computes the
gradient of its share of the micro-batches; gradients are summed, and every rank takes the same optimiser step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import distributed

from rsim.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process is ``rank`` of ``size``, and ``local_rank`` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """Every ``size``-th item: those that this rank does."""
        return items[self.rank :: self.size]

    def block(self, length: int) -> range:
        """The numbers below ``length`` that this rank does: a contiguous block, after that of the rank before.

        >>> [list(World(i, 2).block(5)) for i in range(2)]
        [[0, 1, 2], [3, 4]]
        """
        each, more = divmod(length, self.size)
        first = self.rank * each + min(self.rank, more)
        return range(first, first + each + (self.rank < more))

    def all_gather(self, items: list[T]) -> list[T]:
        """The items of all ranks, rank by rank."""
        if self.size == 1:
            return items
        gathered: list[T] = gather_object(items)
        return gathered

    def all_reduce(self, tensors: list[torch.Tensor]) -> None:
        """Sums each tensor over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def all_reduce_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Sums each number over the ranks; all ranks must have the same keys, or none (a rank that had nothing to do)."""
        if self.size == 1:
            return dict(numbers)
        summed: dict[str, float] = {}
        for part in self.all_gather([dict(numbers)]):
            for name, value in part.items():
                summed[name] = summed.get(name, 0.0) + value
        return summed

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return any(self.all_gather([flag]))

    def barrier(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            distributed.barrier()


ALONE = World()
_PATIENCE = timedelta(hours=3)  # that ranks wait for each other: for one that writes a checkpoint or plays longer episodes


def join(*, cpu: bool) -> World:
    """The ranks that the environment names (``RANK``, ``WORLD_SIZE``, ...); alone where it names none.

    Raises:
        UserError: accelerate's config asks for DeepSpeed or for FSDP, which are asked for in rsim's config.
    """
    instead = {"DEEPSPEED": "parallel.deepspeed = FILE takes its config", "FSDP": "parallel.shard = true shards the layers"}
    for engine, remedy in instead.items():
        if os.environ.get(f"ACCELERATE_USE_{engine}") == "true":
            raise UserError(f"accelerate launch was told to use {engine}", f"launch without it; {remedy}")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    state: Any = PartialState(cpu=cpu, timeout=_PATIENCE)
    return World(state.process_index, state.num_processes, state.local_process_index)
