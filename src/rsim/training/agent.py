"""One trainable policy: forward over recorded actions, optimiser, optional reference model and value head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rsim.objective.joint import Evaluated
from rsim.training.batch import ActionBatch

_CHUNK_LOGITS = 1 << 25  # logits that are alive at once in a forward pass


class Agent:
    """Planner or reasoner, as training sees it: a model without its head, and a head from hidden states to logits."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        head: Callable[[torch.Tensor], torch.Tensor],
        *,
        temperature: float,
        learning_rate: float,
        weight_decay: float,
        with_values: bool = False,
    ) -> None:
        self.name, self.model, self.head = name, model, head
        self.temperature, self.learning_rate = temperature, learning_rate
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.value_head: torch.nn.Linear | None = None
        groups: list[dict[str, Any]] = [{"params": self.parameters, "weight_decay": weight_decay}]
        if with_values:
            hidden = model.config.get_text_config().hidden_size
            self.value_head = torch.nn.Linear(hidden, 1).to(model.device)
            torch.nn.init.zeros_(self.value_head.weight)
            torch.nn.init.zeros_(self.value_head.bias)
            groups.append({"params": list(self.value_head.parameters()), "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
        self.reference: PreTrainedModel | None = None

    def set_reference(self, model: PreTrainedModel) -> None:
        """Keeps a frozen copy of ``model`` for the KL term."""
        self.reference = copy.deepcopy(model).requires_grad_(False)

    def evaluate(self, batch: ActionBatch, *, with_reference: bool = False) -> Evaluated:
        """Log-probs (at the sampling temperature), entropies and values of a batch's actions, each ``[B, K]``."""
        hidden = self._hidden(self.model, batch)
        chosen = batch.mask.bool()
        logprobs, entropy = self._score(self.head, hidden[chosen], batch.actions[chosen])
        values = None
        if self.value_head is not None:
            values = self.value_head(hidden.detach())[..., 0] * batch.mask  # the policy's trunk is not trained on values
        reference = None
        if with_reference and self.reference is not None:
            with torch.no_grad():
                frozen = self._hidden(self.reference, batch)[chosen]
                reference = _fill(batch.mask, self._score(self._reference_head, frozen, batch.actions[chosen])[0])
        return Evaluated(_fill(batch.mask, logprobs), _fill(batch.mask, entropy), values, reference)

    def _reference_head(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.reference is not None
        logits: torch.Tensor = self.reference.get_output_embeddings()(hidden)
        return logits

    def _hidden(self, model: PreTrainedModel, batch: ActionBatch) -> torch.Tensor:
        """Final hidden states at the positions of the actions, ``[B, K, hidden]``; right padding needs no mask."""
        hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
        rows = torch.arange(len(batch), device=batch.ids.device)[:, None]
        picked: torch.Tensor = hidden[rows, batch.positions]
        return picked

    def _score(
        self, head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies ``[N]``; never more than a chunk of logits at once, recomputed in the backward pass."""

        def one(part: torch.Tensor, taken: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logprobs = torch.log_softmax(head(part).float() / self.temperature, -1)
            return logprobs.gather(-1, taken[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)

        if len(hidden) == 0:
            return hidden.new_zeros(0), hidden.new_zeros(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        rows = max(1, _CHUNK_LOGITS // vocabulary)
        if len(hidden) <= rows:
            return one(hidden, actions)
        parts = [
            checkpoint(one, h, a, use_reentrant=False)
            for h, a in zip(torch.split(hidden, rows), torch.split(actions, rows), strict=True)
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def step(self, learning_rate: float, grad_clip: float) -> float:
        """One optimiser step; returns the gradient norm before clipping."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "value_head": self.value_head.state_dict() if self.value_head else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.value_head is not None:
            self.value_head.load_state_dict(state["value_head"])


def _fill(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``values [N]`` back at the places of the mask, zero elsewhere, ``[B, K]``."""
    return torch.zeros_like(mask).masked_scatter(mask.bool(), values)
