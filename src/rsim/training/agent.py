"""One trainable policy: forward over recorded actions, optimiser, optional reference model and value head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import GradientCheckpointingLayer, PreTrainedModel

from rsim.distributed.deepspeed import Zero
from rsim.distributed.shards import ShardedModel, clip_gradients, full_state_dict, shard, shard_like
from rsim.distributed.world import ALONE, World
from rsim.engine import packed
from rsim.engine.prepare import prepare
from rsim.errors import UserError
from rsim.models.device import precise
from rsim.models.shape import first_range
from rsim.objective.joint import Evaluated
from rsim.objective.logprobs import token_logprobs
from rsim.policies.reasoner import Reasoner
from rsim.training.batch import ActionBatch
from rsim.training.packing import Stream, pack


@dataclass(frozen=True)
class AgentSettings:
    """How an agent is trained."""

    temperature: float  # it was sampled at
    learning_rate: float
    weight_decay: float = 0.0
    with_values: bool = False  # a value head, for PPO
    value_learning_rate: float = 0.0  # of that head; 0: the policy's
    checkpointing: bool = False  # activations are made again in the backward pass
    shard: bool = False  # each rank holds a shard of the layers
    deepspeed: str = ""  # the file with the config of `Zero`


class Agent:
    """Planner or reasoner, as training sees it: a model without its head, and a head that gives logits."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        head: Callable[[torch.Tensor], torch.Tensor],
        settings: AgentSettings,
        *,
        head_weight: torch.Tensor | None = None,
        world: World = ALONE,
    ) -> None:
        """``head_weight`` ``[V, hidden]``: what ``head`` multiplies by, if it does nothing else; log-probs
        then take little memory, and entropies carry no gradient. The ranks of ``world`` hold the same
        agent."""
        self.name, self.model, self.head, self.head_weight, self.world = name, model, head, head_weight, world
        self.temperature, self.learning_rate = settings.temperature, settings.learning_rate
        self.deepspeed = settings.deepspeed
        prepare(model)
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.checkpointed = layers if settings.checkpointing else []
        if settings.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.sharded: ShardedModel | None = shard(model, world) if settings.shard else None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.value_head = _value_head(model, self.precision) if settings.with_values else None
        self.optimizer = self._optimizer(layers, settings)
        self.rates = [1.0] * len(self.optimizer.param_groups)  # of each group, relative to the policy's
        if settings.value_learning_rate and settings.learning_rate and self.value_head:
            self.rates[-1] = settings.value_learning_rate / settings.learning_rate
        self.passes_left = 0  # of this rank's turns
        self.reference: Reasoner | None = None

    def _optimizer(self, layers: list[torch.nn.Module], settings: AgentSettings) -> torch.optim.AdamW:
        """An optimiser cannot mix sharded and other parameters in one group."""
        in_layers = {p for layer in layers for p in layer.parameters()}
        inside = [p for p in self.parameters if p in in_layers]
        outside = [p for p in self.parameters if p not in in_layers]
        groups: list[dict[str, Any]] = [
            {"params": part, "weight_decay": settings.weight_decay} for part in (inside, outside) if part
        ]
        if self.value_head:
            groups.append({"params": list(self.value_head.parameters()), "weight_decay": 0.0})
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95), fused=True)

    @property
    def precision(self) -> torch.dtype:
        """Of log-probs, advantages and values: float32, or the weights' own float64."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @cached_property
    def zero(self) -> Zero | None:
        """Made when it is first asked for, by all ranks: from then on every backward pass through the model
        is one of its own, and the cold start's, before that, is not."""
        if not self.deepspeed:
            return None
        trained = [self.model, self.value_head] if self.value_head else [self.model]
        return Zero(torch.nn.ModuleList(trained), self.optimizer, self.deepspeed, self.world)

    def set_reference(self, reference: Reasoner) -> None:
        """Keeps ``reference``, frozen, for the KL term."""
        prepare(reference.model.requires_grad_(False))
        self.reference = reference

    def evaluate(self, batch: ActionBatch, *, with_reference: bool = False) -> Evaluated:
        """Log-probs (at the sampling temperature), entropies and values of a batch's actions, each ``[B,
        K]``."""
        stream = pack(batch, first_range(self.model.config))
        chosen = batch.mask.bool()
        actions = batch.actions[chosen]
        hidden = self._hidden(self.model, stream, chosen)
        logprobs, entropy = self._score(self.head, hidden, actions, self.head_weight)
        values = None
        if self.value_head is not None:
            rows = hidden.detach()  # the policy's trunk is not trained on values
            values = _fill(batch.mask, self.value_head(rows.to(self.value_head.weight.dtype))[:, 0])
        reference = None
        if with_reference and self.reference is not None:
            with torch.no_grad():
                frozen = self._hidden(self.reference.model, stream, chosen)
                scored = self._score(self.reference.logits, frozen, actions, self.reference.head_weight)
                reference = _fill(batch.mask, scored[0])
        return Evaluated(_fill(batch.mask, logprobs), _fill(batch.mask, entropy), values, reference)

    def _hidden(self, model: PreTrainedModel, stream: Stream, chosen: torch.Tensor) -> torch.Tensor:
        """Final hidden states at the positions of the actions, ``[N, hidden]``."""
        # transformers checkpoints layers in training mode; dropout stays off inside them. Checkpointing asks
        # for the RNG's state, which a recorded pass of a rollout may not.
        for layer in self.checkpointed:
            layer.training = torch.is_grad_enabled()
        hidden = packed.forward(model, stream.ids, stream.positions, stream.layout, stream.long)
        for layer in self.checkpointed:
            layer.training = False
        return hidden.index_select(0, stream.index[chosen])

    def _score(
        self,
        head: Callable[[torch.Tensor], torch.Tensor],
        hidden: torch.Tensor,
        actions: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies ``[N]``."""
        if weight is not None:
            return token_logprobs(hidden, weight, actions, self.temperature)
        logprobs = torch.log_softmax(precise(head(hidden)) / self.temperature, -1)
        return logprobs.gather(-1, actions[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)

    def turns(self, batch: ActionBatch, max_tokens: int) -> list[tuple[torch.Tensor, bool]]:
        """This rank's micro-batches of at most ``max_tokens``, as row numbers, and whether they count.

        Where layers or gradients are sharded, all ranks must do as many passes: a rank that has one less does
        one more that counts for nothing.
        """
        micro = batch.micro_rows(max_tokens, self.world.size)
        mine = [(rows, True) for rows in self.world.share(micro)]
        if self.sharded or self.zero:
            most = -(-len(micro) // self.world.size)
            mine += [(micro[0], False)] * (most - len(mine))
        self.passes_left = len(mine)
        return mine

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one of the `turns`, each of which must come here."""
        self.passes_left -= 1
        if self.zero:
            self.zero.backward(loss, last=self.passes_left == 0)
        else:
            torch.autograd.backward(loss)

    def step(self, learning_rate: float, grad_clip: float) -> float:
        """One optimiser step with the gradient of all ranks; returns its norm before clipping."""
        if self.zero:
            return self.zero.step([learning_rate * rate for rate in self.rates], grad_clip)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.world.size > 1:
            for parameter in trained:
                if parameter.grad is None:  # this rank had no share of the batch
                    parameter.grad = torch.zeros_like(parameter)
            # Those of shards are summed already.
            self.world.all_reduce([p.grad for p in trained if not isinstance(p, DTensor)])
        if self.sharded:
            norm = clip_gradients(trained, grad_clip, self.world)
        else:
            norm = float(torch.nn.utils.clip_grad_norm_(trained, grad_clip))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = learning_rate * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights, unsharded on the main rank; for all ranks to call."""
        moments = {"pieces": self.zero.state()} if self.zero else self.optimizer.state_dict()
        if self.sharded:
            moments = full_state_dict(moments, keep=self.world.is_main)
        return {"optimizer": moments, "value_head": self.value_head.state_dict() if self.value_head else None}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from `state`.

        Raises:
            UserError: it is of another ``parallel.deepspeed``, or of an earlier version.
        """
        saved = state["optimizer"]
        if self.value_head is not None:
            self.value_head.load_state_dict(state["value_head"])
        whose = f"the checkpoint's optimiser of the {self.name}"
        if bool(self.zero) != ("pieces" in saved):
            raise UserError(f"{whose} was saved with another parallel.deepspeed", "go on with the one it had")
        if self.zero:
            self.zero.load_state(saved["pieces"])
            return
        groups = self.optimizer.param_groups
        decays = [group["weight_decay"] for group in groups]
        if len(saved["param_groups"]) != len(decays):
            raise UserError(f"{whose} is of an earlier version", "start the run again")
        self.optimizer.load_state_dict(shard_like(saved, [p for group in groups for p in group["params"]]))
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay  # as configured now


def _value_head(model: PreTrainedModel, precision: torch.dtype) -> torch.nn.Linear:
    head = torch.nn.Linear(model.config.get_text_config().hidden_size, 1, dtype=precision).to(model.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def _fill(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``values [N]`` back at the places of the mask, zero elsewhere, ``[B, K]``."""
    return torch.zeros_like(mask).masked_scatter(mask.bool(), values)
