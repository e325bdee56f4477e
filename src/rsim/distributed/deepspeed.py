"""Gradients and moments sharded over the ranks by DeepSpeed: ZeRO stages 1 and 2 (arXiv 1910.02054), by its own config.

Every rank keeps all weights, as a rollout needs them. Stage 1 shards the optimiser's moments, stage 2 the gradients as well;
either may keep them in the CPU's memory (``offload_optimizer``). What stage 3 adds, `rsim.distributed.shards` does.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from rsim.distributed.world import World
from rsim.errors import UserError, first_line

_STAGES = 1, 2


def read_settings(file: str) -> dict[str, Any]:
    """DeepSpeed's config, with what rsim decides itself filled in: an update's micro-batches and its clipping.

    Raises:
        UserError: the file is missing or not JSON, or asks for another stage.
    """
    try:
        settings: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8-sig"))
        zero = dict(settings["zero_optimization"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = 'give a JSON file with {"zero_optimization": {"stage": 2}}'
        raise UserError(f"parallel.deepspeed = {file!r}: {first_line(error)}", remedy) from error
    if zero.get("stage") not in _STAGES:
        remedy = "use stage 1 or 2; parallel.shard = true shards the weights as well"
        raise UserError(f"parallel.deepspeed = {file!r}: stage {zero.get('stage')}", remedy)
    for half in ("fp16", "bf16"):
        if settings.get(half, {}).get("enabled"):
            raise UserError(f"parallel.deepspeed = {file!r}: {half}", "leave it out: models.dtype says how precise weights are")
    settings.pop("train_batch_size", None)
    return settings | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class Zero:
    """DeepSpeed's engine around one agent's model and optimiser; every rank must do the same passes."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, file: str, world: World) -> None:
        """``model``: whatever the optimiser trains.

        Raises:
            UserError: DeepSpeed is not installed, or does not take the config ``file``.
        """
        self.world = world
        settings = read_settings(file)
        with redirect_stdout(sys.stderr):  # DeepSpeed talks to stdout, its logger for ever to what that is now
            try:
                deepspeed: Any = importlib.import_module("deepspeed")
            except ImportError as error:
                remedy = "pip install --no-build-isolation deepspeed"
                raise UserError("parallel.deepspeed: DeepSpeed is not installed", remedy) from error
            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            backend = torch.distributed.get_backend()
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
            try:
                told = {"model": model, "optimizer": optimizer, "config": settings, "dist_init_required": False}
                self.engine, *_ = deepspeed.initialize(**told)
            except (ValueError, AssertionError) as error:  # pydantic's, of unknown keys, is a ValueError
                problem = f"parallel.deepspeed = {file!r}: {first_line(error)}"
                raise UserError(problem, "see DeepSpeed's own documentation") from error

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradient; ``last``: of an optimiser step. Gradients are sums over the ranks, not means: the
        loss's denominators count the whole batch already."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size)

    def step(self, learning_rates: list[float], grad_clip: float) -> float:
        """One optimiser step with the gradient of all ranks, at a rate for each of the optimiser's groups; returns its norm
        before clipping."""
        self.engine.optimizer.clip_grad = grad_clip
        for group, rate in zip(self.engine.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def state(self) -> list[dict[str, Any]]:
        """Every rank's shard of the moments; all ranks must come here."""
        return self.world.all_gather([self.engine.optimizer.optimizer.state_dict()])

    def load_state(self, shards: list[dict[str, Any]]) -> None:
        """Raises `UserError` where there are not as many ranks as shards."""
        count = len(shards)
        if count != self.world.size:
            raise UserError(f"DeepSpeed made {count} shards of the checkpoint's optimiser", f"go on with {count} processes")
        self.engine.optimizer.optimizer.load_state_dict(shards[self.world.rank])
