"""Gradients and moments cut over the ranks by DeepSpeed: ZeRO stages 1 and 2 (arXiv 1910.02054), by DeepSpeed's own config.

Weights stay whole on every rank, as a rollout needs them. Stage 1 cuts the optimiser's moments, stage 2 the gradients as well;
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
        settings: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
        zero = dict(settings["zero_optimization"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"train.deepspeed = {file!r}: {first_line(error)}",
                        'give a JSON file with {"zero_optimization": {"stage": 2}}') from error  # fmt: skip
    if zero.get("stage") not in _STAGES:
        raise UserError(f"train.deepspeed = {file!r}: stage {zero.get('stage')}",
                        "use stage 1 or 2; train.shard = true cuts the weights as well")  # fmt: skip
    for half in ("fp16", "bf16"):
        if settings.get(half, {}).get("enabled"):
            raise UserError(f"train.deepspeed = {file!r}: {half}", "leave it out: models.dtype says how precise weights are")
    fixed = {
        "train_batch_size": None, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    return {key: value for key, value in (settings | fixed).items() if value is not None}


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
                raise UserError("train.deepspeed: DeepSpeed is not installed",
                                "pip install --no-build-isolation deepspeed") from error  # fmt: skip
            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            backend = torch.distributed.get_backend()
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
            try:
                self.engine, *_ = deepspeed.initialize(
                    model=model, optimizer=optimizer, config=settings, dist_init_required=False
                )  # fmt: skip
            except (ValueError, AssertionError) as error:  # pydantic's, of unknown keys, is a ValueError
                raise UserError(
                    f"train.deepspeed = {file!r}: {first_line(error)}", "see DeepSpeed's own documentation"
                ) from error

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradient; ``last``: of an optimiser step. Gradients are sums over the ranks, not means: the
        loss's denominators count the whole batch already."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size)

    def step(self, learning_rate: float, grad_clip: float) -> float:
        """One optimiser step with the gradient of all ranks; returns its norm before clipping."""
        self.engine.optimizer.clip_grad = grad_clip
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def state(self) -> list[dict[str, Any]]:
        """Every rank's piece of the moments; all ranks must come here."""
        return self.world.all_gather([self.engine.optimizer.optimizer.state_dict()])

    def load_state(self, pieces: list[dict[str, Any]]) -> None:
        """Raises `UserError` where there are not as many ranks as pieces."""
        if len(pieces) != self.world.size:
            raise UserError(f"the checkpoint's optimiser was cut into {len(pieces)} pieces by DeepSpeed",
                            f"go on with {len(pieces)} processes")  # fmt: skip
        self.engine.optimizer.optimizer.load_state_dict(pieces[self.world.rank])
