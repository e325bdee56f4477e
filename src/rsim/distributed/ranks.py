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
class Ranks:
    """This process is number ``index`` of ``count``, and number ``local`` on its machine."""

    index: int = 0
    count: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.index == 0

    def share(self, items: list[T]) -> list[T]:
        """Every ``count``-th item: those that this rank does."""
        return items[self.index :: self.count]

    def block(self, size: int) -> range:
        """The numbers below ``size`` that this rank does, in one piece; the ranks' pieces follow each other.

        >>> [list(Ranks(i, 2).block(5)) for i in range(2)]
        [[0, 1, 2], [3, 4]]
        """
        each, more = divmod(size, self.count)
        first = self.index * each + min(self.index, more)
        return range(first, first + each + (self.index < more))

    def gather(self, items: list[T]) -> list[T]:
        """The items of all ranks, rank by rank."""
        if self.count == 1:
            return items
        gathered: list[T] = gather_object(items)
        return gathered

    def add(self, tensors: list[torch.Tensor]) -> None:
        """Sums each tensor over the ranks, in place."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def add_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Sums each number over the ranks; all ranks must have the same keys, or none (a rank that had nothing to do)."""
        if self.count == 1:
            return dict(numbers)
        summed: dict[str, float] = {}
        for part in self.gather([dict(numbers)]):
            for name, value in part.items():
                summed[name] = summed.get(name, 0.0) + value
        return summed

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return any(self.gather([flag]))

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.count > 1:
            distributed.barrier()


ALONE = Ranks()
_PATIENCE = timedelta(hours=3)  # that ranks wait for each other: for one that writes a checkpoint or plays longer episodes


def join(*, cpu: bool) -> Ranks:
    """The ranks that the environment names (``RANK``, ``WORLD_SIZE``, ...); alone where it names none.

    Raises:
        UserError: accelerate's config asks for DeepSpeed or for FSDP, which are asked for in rsim's config.
    """
    for engine, remedy in (("DEEPSPEED", "train.deepspeed = FILE takes DeepSpeed's config"),
                           ("FSDP", "train.shard = true cuts the layers")):  # fmt: skip
        if os.environ.get(f"ACCELERATE_USE_{engine}") == "true":
            raise UserError(f"accelerate launch was told to use {engine}", f"launch without it; {remedy}")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    state: Any = PartialState(cpu=cpu, timeout=_PATIENCE)
    return Ranks(state.process_index, state.num_processes, state.local_process_index)
