"""Log-probs of chosen tokens straight from hidden states, without ever holding all their logits."""

from __future__ import annotations

from typing import Any

import torch

from rsim.engine.layers import product
from rsim.models.device import precise

_CHUNK = 1 << 23  # logits that are alive at once (32 MiB in float32)


def token_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of ``tokens`` and entropies of their distributions, both ``[N]`` (nats), in float32 or
    in the float64 of ``hidden``.

    Equal to ``log_softmax(hidden @ weight.T / temperature)`` gathered at ``tokens``. The logits are made a
    chunk of rows at a time and made again in the backward pass, so that memory does not grow with ``N * V``.

    Args:
        hidden: ``[N, h]`` final hidden states.
        weight: ``[V, h]``, the output head.
        tokens: ``[N]`` indices into the vocabulary.
        temperature: divides the logits.

    The gradient flows through the log-probs only; the entropies are for the record.

    >>> token_logprobs(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]), 1.0)[0]
    tensor([-0.3133, -0.6931])
    """
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, tokens, temperature)  # type: ignore[no-untyped-call]
    return logprobs, entropies


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        totals, logprobs, entropies = (precise(hidden.new_empty(len(hidden))) for _ in range(3))
        for part in _parts(hidden, weight):
            logits = _logits(hidden[part], weight, temperature)
            totals[part] = logits.logsumexp(-1)
            logits -= totals[part, None]
            logprobs[part] = logits.gather(-1, tokens[part, None])[:, 0]
            entropies[part] = -torch.einsum("nv,nv->n", logits.exp(), logits)
        ctx.save_for_backward(hidden, weight, tokens, totals)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden, weight, tokens, totals = ctx.saved_tensors
        scaled = gradients[0] / ctx.temperature
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for part in _parts(hidden, weight):
            # d logprob / d logits = onehot - softmax
            change = _logits(hidden[part], weight, ctx.temperature).sub_(totals[part, None]).exp_()
            change.mul_(-scaled[part, None]).scatter_add_(1, tokens[part, None], scaled[part, None])
            change = change.to(weight.dtype)
            if to_hidden is not None:
                to_hidden[part] = change @ weight
            if to_weight is not None:
                to_weight.addmm_(change.T, hidden[part])
        return to_hidden, to_weight, None, None


def _parts(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    rows = max(1, _CHUNK // len(weight))
    return [slice(first, first + rows) for first in range(0, len(hidden), rows)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    return precise(product(hidden, weight)).div_(temperature)
