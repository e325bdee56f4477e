"""Models too large for one device: the weights of each layer, their gradients and moments are sharded over the ranks (FSDP2).

The layers are those of transformers; embeddings, the last norm, output heads and trained adapters are not sharded, and their
gradients neither, which `Agent.step` sums. (ZeRO stage 3, arXiv 1910.02054, as PyTorch's ``fully_shard`` does it.)

In training a layer's weights are put together for its own forward and backward pass alone. Sampling would do so for every
token: while a rollout lasts, no layer is sharded (`unsharded`), so a rank must hold the weights of both models once, but never
their gradients and moments. Simplified: no offloading, no tensor parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GradientCheckpointingLayer, PreTrainedModel

from rsim.distributed.world import World


@dataclass(frozen=True)
class ShardedModel:
    """A model's sharded layers, and the module around them, which prefetches the next layer."""

    layers: list[FSDPModule]
    root: FSDPModule


def shard(model: PreTrainedModel, world: World) -> ShardedModel:
    """Shards the layers of ``model`` over the ranks, in place; layers that are sharded already stay as they are.

    Where adapters are trained only what is frozen is sharded. Gradients of the shards come out summed over the ranks.
    """
    mesh = init_device_mesh(model.device.type, (world.size,))
    parameters = list(model.parameters())
    adapted = any(not p.requires_grad for p in parameters)
    kept = {p for p in parameters if adapted and p.requires_grad}
    layers = [m for m in model.base_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        if not isinstance(layer, FSDPModule):
            _add_up(fully_shard(layer, mesh=mesh, ignored_params=kept))
    if not isinstance(model.base_model, FSDPModule):
        inside = {p for layer in layers for p in layer.parameters()}
        _add_up(fully_shard(model.base_model, mesh=mesh, ignored_params=set(model.parameters()) - inside))
    return ShardedModel([layer for layer in layers if isinstance(layer, FSDPModule)], cast(FSDPModule, model.base_model))


def _add_up(module: FSDPModule) -> None:
    """Gradients are sums over the ranks, not means: the loss's denominators count the whole batch already."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply beforehand


@contextmanager
def unsharded(models: Iterable[ShardedModel]) -> Iterator[None]:
    """Keeps the layers' weights together while it lasts: for sampling, without gradients. All ranks must come here, and each
    must do a forward pass of each model."""
    models = list(models)
    for layer in (layer for model in models for layer in model.layers):
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for model in models:
            for layer in model.layers:
                layer.reshard()
                layer.set_reshard_after_forward(True)
            model.root.reset_iter_state()  # else it remembers each forward pass of the rollout until the next backward pass


def full_state_dict(value: Any, *, keep: bool) -> Any:
    """A state dict, however nested, with every sharded tensor gathered into the CPU's memory; all ranks must come here.

    Args:
        keep: False: this rank takes part, and gets something without the sharded tensors.
    """
    if isinstance(value, DTensor):
        together = value.full_tensor()
        return together.cpu() if keep else None
    if isinstance(value, dict):
        return {key: full_state_dict(v, keep=keep) for key, v in value.items()}
    if isinstance(value, list):
        return [full_state_dict(v, keep=keep) for v in value]
    return value


def shard_like(state: dict[str, Any], parameters: list[torch.Tensor]) -> dict[str, Any]:
    """An optimiser's state dict with its tensors sharded as the parameters are that they belong to."""

    def moments(parameter: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(parameter, DTensor):
            return values
        where = parameter.device_mesh, parameter.placements
        return {n: distribute_tensor(v, *where) if v.shape == parameter.shape else v for n, v in values.items()}

    return state | {"state": {i: moments(parameters[i], values) for i, values in state["state"].items()}}


def clip_gradients(parameters: list[torch.Tensor], limit: float, world: World) -> float:
    """As ``torch.nn.utils.clip_grad_norm_``, for gradients of which some are sharded; returns the norm before clipping."""
    squares = torch.zeros(2, dtype=torch.float64)
    gradients = [p.grad for p in parameters if p.grad is not None]
    mine = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    for gradient, local in zip(gradients, mine, strict=True):
        squares[int(isinstance(gradient, DTensor))] += float(local.square().sum())
    ours = squares[1:].to(parameters[0].device)
    world.all_reduce([ours])
    norm = math.sqrt(float(squares[0] + ours.cpu()[0]))
    for gradient in mine:
        gradient.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm
