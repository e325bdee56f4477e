"""Products with weight matrices where no gradient is asked for: sampling, and log-probs that bring their own backward pass.

On a CPU, oneDNN multiplies few rows by a large float32 matrix up to twice as fast as the BLAS that
``torch.nn.functional.linear`` calls (``python -m bench.rollout`` measures both), on the same tensors, nothing packed or copied.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

_LARGE = 1 << 16  # elements; below, oneDNN's fixed cost of some 20 microseconds outweighs what it saves


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``rows @ weight.T + bias``, without gradient; ``rows [..., in]``, ``weight [out, in]``."""
    if (
        weight.device.type == "cpu"
        and weight.dtype == rows.dtype == torch.float32
        and weight.numel() >= _LARGE
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    ):
        fast: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return fast
    return torch.nn.functional.linear(rows, weight, bias)


class Linear(torch.nn.Linear):
    """A linear layer that uses `product` where no gradient is asked for."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if torch.is_grad_enabled() else product(input, self.weight, self.bias)


def speed_up(model: PreTrainedModel) -> None:
    """Makes every plain linear layer of ``model`` a `Linear`, in place; weights, names and results stay what they are."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear
