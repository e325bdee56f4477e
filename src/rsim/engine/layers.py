"""Faster layers where no gradient is asked for: sampling, and log-probs that bring their own backward pass.

On a CPU, oneDNN multiplies few rows by a large float32 matrix faster than the BLAS that ``torch.nn.functional.linear``
calls (``python -m studies rollout``: 393 tokens/s in the products alone, against 278), on the same tensors: nothing is copied.
While sequences are sampled a copy of the weights in oneDNN's own layout (`pack`) is read.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, silu
from transformers import PreTrainedModel

_MKLDNN: Any = torch.backends.mkldnn  # torch does not type it
_LARGE = 1 << 16  # elements; below, oneDNN's fixed cost of some 20 microseconds outweighs what it saves
PACKED_BYTES = 2 << 30  # of weights, at most, that are held twice while sequences are sampled
_ROWS = 32  # that a packed weight is laid out for
# transformers' classes that compute weight * x / rms(x), and down(silu(gate(x)) * up(x))
_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``rows @ weight.T + bias``, without gradient; ``rows [..., in]``, ``weight [out, in]``."""
    if _worth_it(rows, weight):
        fast: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return fast
    return linear(rows, weight, bias)


def gated(rows: torch.Tensor, gate: torch.nn.Linear, up: torch.nn.Linear, down: torch.nn.Linear) -> torch.Tensor:
    """``down(silu(gate(rows)) * up(rows))``, without gradient; the two elementwise steps ride on the products."""
    if not _worth_it(rows, gate.weight):
        inner = silu(linear(rows, gate.weight, gate.bias)) * linear(rows, up.weight, up.bias)
        return product(inner, down.weight, down.bias)
    opened = torch.ops.mkldnn._linear_pointwise(rows, _fast(gate), gate.bias, "swish", [], "")
    inner = torch.ops.mkldnn._linear_pointwise.binary(rows, opened, _fast(up), up.bias, "mul")
    return product(inner, _fast(down), down.bias)


def _worth_it(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == rows.dtype == torch.float32
        and weight.numel() >= _LARGE
        and bool(_MKLDNN.is_available())
    )


class Linear(torch.nn.Linear):
    """A linear layer that uses `product` where no gradient is asked for."""

    packed: torch.Tensor | None = None  # the weight, between `pack` and `unpack`
    version = 0  # of the weight that was packed

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if torch.is_grad_enabled() else product(input, _fast(self), self.bias)


def _fast(layer: Any) -> torch.Tensor:
    """The packed weight, unless the weight has changed since: a wrapped model may be trained between two answers."""
    stale = layer.packed is None or layer.version != layer.weight._version
    weight: torch.Tensor = layer.weight if stale else layer.packed
    return weight


def pack(model: PreTrainedModel) -> None:
    """Copies the large weights of a prepared ``model`` on a CPU into oneDNN's layout, for passes without gradient until
    `unpack`; one that is changed meanwhile is read itself again. Those of models above 2 GiB stay as they are."""
    layers = [m for m in model.modules() if type(m) is Linear and _worth_it(m.weight, m.weight)]
    if sum(layer.weight.nbytes for layer in layers) <= PACKED_BYTES:
        for layer in layers:
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
            layer.version = layer.weight._version


def unpack(model: PreTrainedModel) -> None:
    """Drops what `pack` has made."""
    for layer in model.modules():
        if type(layer) is Linear:
            layer.packed = None


@cache
def _faster_norm(kind: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor) -> Any:
        exact = hidden_states.dtype == torch.float64  # transformers' own norms would round to float32
        if not exact and (torch.is_grad_enabled() or hidden_states.dtype != torch.float32):
            return kind.forward(self, hidden_states)
        return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    return type(kind.__name__, (kind,), {"forward": forward})


@cache
def _faster_mlp(kind: Any) -> Any:
    def forward(self: Any, x: torch.Tensor) -> Any:
        parts = (self.gate_proj, self.up_proj, self.down_proj)
        if torch.is_grad_enabled() or not all(type(part) is Linear for part in parts):  # adapters have more to do
            return kind.forward(self, x)
        return gated(x, *parts)

    return type(kind.__name__, (kind,), {"forward": forward})


def speed_up(model: PreTrainedModel) -> None:
    """Gives the plain linear layers, norms and gated MLPs of ``model`` a faster forward pass where no gradient is asked for, in
    place; weights, names, gradients and results stay what they are."""
    for module in model.modules():
        kind: Any = type(module)
        if kind is torch.nn.Linear:
            module.__class__ = Linear
        elif kind.__name__ in _NORMS and kind.__module__.startswith("transformers."):
            module.__class__ = _faster_norm(kind)
        elif kind.__name__ in _MLPS and kind.__module__.startswith("transformers.") and model.config.hidden_act == "silu":
            module.__class__ = _faster_mlp(kind)
