"""One new token of every sequence, by a forward pass that is captured once as a CUDA graph and replayed.

A forward pass starts many small kernels, and starting them can take the CPU longer than the GPU needs to run them. A CUDA
graph starts them all at once, but it is bound to the shapes and the addresses that it was captured with. So it computes a
token of every slot up to a fixed one, those at rest included, and looks at the cache up to a fixed position; a mask that is
made inside the graph, from the sequences' lengths, hides the rest. Both are powers of two (or all there is), of which a rollout
meets a few.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from rsim.engine import packed
from rsim.engine.cache import SlotCache
from rsim.engine.packed import Scores, grouped_attention
from rsim.errors import UserError, first_line

_CUDA: Any = torch.cuda  # torch does not type its streams
_ONE_AT_A_TIME = threading.Lock()  # PyTorch's capturing is the process's, not the thread's
_FEWEST = 256  # positions of the cache that a graph looks at

Pass = Callable[[], torch.Tensor]


class OneEach:
    """Layout of one new token in each of the first ``N`` slots (`rsim.engine.packed.Layout`), of tensors of fixed shapes alone.

    Args:
        positions: ``[N]``, where each slot's token goes: behind its sequence. At a slot that rests, something is written there
            that nobody sees and the sequence's next token replaces.
        upto: positions of the cache that are looked at; all of ``positions`` lie below.
    """

    def __init__(self, cache: SlotCache, positions: torch.Tensor, upto: int) -> None:
        self.cache, self.positions, self.upto = cache, positions, upto
        self.slots = torch.arange(len(positions), device=cache.device)
        self.distance = positions[:, None, None] - torch.arange(upto, device=cache.device)
        self.masks: dict[tuple[int | None, int], torch.Tensor] = {}

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores) -> torch.Tensor:
        keys, values = self.cache.write(layer, self.slots, self.positions, key, value)
        kind = scores.window, len(query) // len(key)
        if kind not in self.masks:
            self.masks[kind] = self.cache.mask(self.distance, *kind)
        seen = keys[: len(self.slots), :, : self.upto], values[: len(self.slots), :, : self.upto]
        return grouped_attention(query.transpose(0, 1)[:, :, None], *seen, self.masks[kind], scores)[:, 0]


class CudaGraphPasses:
    """The CUDA graphs of one model over one cache.

    Weights may change in place between them, but not move (``model.to``) or be joined by others (a new adapter): those would
    not be seen.
    """

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        self.model, self.cache = model, cache
        self.ids = torch.zeros(len(cache.lengths), dtype=torch.long, device=cache.device)
        self.positions = torch.zeros_like(self.ids)
        self._forget()

    def _forget(self) -> None:
        """The cache lies elsewhere now. A pool of memory goes with its last pass, so there must be a new one."""
        self.passes: dict[tuple[int, int], Pass] = {}
        self.capture = _Capture(self.cache.device)
        self.moves = self.cache.moves

    def read(self, slots: list[int], tokens: list[int]) -> torch.Tensor:
        """Appends one token to each of ``slots``; returns their hidden states ``[n, hidden]``.

        Raises:
            UserError: a pass cannot be captured.
        """
        lengths = self.cache.lengths
        used = min(_power_of_two(max(slots) + 1), len(lengths))
        if max(lengths[:used]) >= self.cache.capacity:
            self.passes = {}  # their memory is free while the cache is copied
        self.cache.make_room(max(lengths[:used]) + 1)
        if self.cache.moves != self.moves:
            self._forget()
        upto = min(max(_power_of_two(max(lengths[:used]) + 1), _FEWEST), self.cache.capacity)
        at = torch.tensor(slots, device=self.cache.device)
        self.positions[:used] = torch.tensor(lengths[:used], device=self.cache.device)
        self.ids.index_copy_(0, at, torch.tensor(tokens, device=self.cache.device))
        if (used, upto) not in self.passes:
            self.passes[used, upto] = self.capture(lambda: self._forward(used, upto))
        hidden = self.passes[used, upto]()[at]
        for slot in slots:
            lengths[slot] += 1
        return hidden

    def _forward(self, used: int, upto: int) -> torch.Tensor:
        positions = self.positions[:used]
        return packed.forward(self.model, self.ids[:used], positions, OneEach(self.cache, positions, upto))


def can_capture(model: PreTrainedModel) -> bool:
    """Whether passes of ``model`` may be captured: on a GPU, where no other rank takes part in them, and with rotary embeddings
    that do not look at how long the sequences are."""
    rotary = str(getattr(model.config.get_text_config(), "rope_parameters", ""))
    return (
        model.device.type == "cuda"
        and not isinstance(model.base_model, FSDPModule)
        and not any(kind in rotary for kind in ("dynamic", "longrope"))
    )


class _Capture:
    """Captures passes that share one pool of memory: what one of them returns lasts until the next is replayed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Pass) -> Pass:
        try:
            with _ONE_AT_A_TIME, torch.cuda.device(self.device):
                graph, hidden = self._captured(forward)
        except RuntimeError as error:
            raise UserError(
                f"a forward pass cannot be captured as a CUDA graph ({first_line(error)})", "set rollout.cuda_graphs = false"
            ) from error

        def replay() -> torch.Tensor:
            with torch.cuda.device(self.device):
                graph.replay()
            return hidden

        return replay

    def _captured(self, forward: Pass) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        aside = _CUDA.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # once uncaptured: libraries set themselves up
            forward()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            hidden = forward()
        return graph, hidden


def _power_of_two(number: int) -> int:
    """The smallest one that is not below ``number``."""
    return 1 << (number - 1).bit_length()
