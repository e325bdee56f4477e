"""A preallocated KV cache whose rows have different lengths."""

from __future__ import annotations

import torch
from transformers import Cache, PreTrainedConfig


class RaggedCache(Cache):  # type: ignore[misc]
    """Keys and values of ``rows`` sequences, written in place; row ``i`` holds ``lengths[i]`` tokens.

    ``capacity`` is the longest row that fits; it doubles when a row outgrows it.

    A forward pass works on the first ``n`` rows (the caller keeps its active rows there, see `swap`) and appends a
    right-padded chunk to each: nothing is copied, the attention reads a view. What padding writes lies beyond a row's
    length, is never visible, and is overwritten by the row's next chunk.
    """

    def __init__(self, config: PreTrainedConfig, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        shape = (text.num_hidden_layers, rows, heads, capacity, size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.capacity = capacity
        self._positions = torch.empty(0, dtype=torch.long, device=device)
        self._upto = 0

    def begin(self, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepares one forward pass over a chunk of ``width`` for the first ``rows`` rows.

        Returns:
            ``position_ids`` ``[rows, width]`` and the boolean mask ``[rows, 1, width, upto]``: query ``i`` of a row
            sees key ``j`` iff ``j <= length + i``.
        """
        device = self.lengths.device
        self._positions = self.lengths[:rows, None] + torch.arange(width, device=device)
        self._upto = int(self._positions.max()) + 1
        if self._upto > self.capacity:
            self._grow(max(self._upto, 2 * self.capacity))
        mask = torch.arange(self._upto, device=device) <= self._positions[:, :, None]
        return self._positions, mask[:, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = key_states.shape[0]
        keys, values = self.keys[layer_idx, :rows], self.values[layer_idx, :rows]
        row = torch.arange(rows, device=keys.device)[:, None]
        keys[row, :, self._positions] = key_states.transpose(1, 2)
        values[row, :, self._positions] = value_states.transpose(1, 2)
        return keys[:, :, : self._upto], values[:, :, : self._upto]

    def advance(self, lengths: torch.Tensor) -> None:
        """Counts the true tokens ``[rows]`` of the chunk that was just appended."""
        self.lengths[: len(lengths)] += lengths

    def swap(self, a: int, b: int) -> None:
        pair, swapped = [a, b], [b, a]
        upto = int(self.lengths[pair].max())
        self.keys[:, pair, :, :upto] = self.keys[:, swapped, :, :upto]
        self.values[:, pair, :, :upto] = self.values[:, swapped, :, :upto]
        self.lengths[pair] = self.lengths[swapped]

    def copy(self, source: int, targets: list[int]) -> None:
        """Makes the rows ``targets`` hold what row ``source`` holds."""
        length = int(self.lengths[source])
        self.keys[:, targets, :, :length] = self.keys[:, source : source + 1, :, :length]
        self.values[:, targets, :, :length] = self.values[:, source : source + 1, :, :length]
        self.lengths[targets] = length

    def _grow(self, capacity: int) -> None:
        extra = (0, 0, 0, capacity - self.capacity)  # pads the token dimension at its end
        self.keys = torch.nn.functional.pad(self.keys, extra)
        self.values = torch.nn.functional.pad(self.values, extra)
        self.capacity = capacity

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.lengths.max())
