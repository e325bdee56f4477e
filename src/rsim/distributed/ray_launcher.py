"""The training loop under Ray Train: processes on a cluster, restarted from the last checkpoint when one of them dies.

A run does not depend on the number of its processes (`rsim.distributed.world`), so a restart may have fewer or more of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rsim.config import Config, from_table
from rsim.errors import UserError, first_line
from rsim.runs.folder import RunFolder, records
from rsim.settings import to_table

Train = Callable[[Config, bool, bool], None]  # (config, resume, force): what each process of a run does


def parse_workers(text: str) -> tuple[int, int]:
    """``4``, or ``2:8`` for whatever number between them the cluster has room for.

    >>> parse_workers("4"), parse_workers("2:8")
    ((4, 4), (2, 8))

    Raises:
        UserError: anything else.
    """
    low, _, high = text.partition(":")
    if not (low.isdigit() and (high.isdigit() or not high) and 1 <= int(low) <= int(high or low)):
        raise UserError(f"--workers {text}", "write a number, or MIN:MAX")
    return int(low), int(high or low)


def train_with_ray(
    train: Train, config: Config, workers: tuple[int, int], *, resume: bool = False, force: bool = False, restarts: int = 3
) -> dict[str, Any]:
    """Runs ``train`` in every worker, on the cluster that ``RAY_ADDRESS`` names, or on this machine alone.

    Every worker gets a GPU where the cluster has some, else a CPU. All of them must see the run's folder under the same path.

    Returns:
        the last held-out evaluation's record.

    Raises:
        UserError: Ray is not installed; the run's folder cannot be begun or gone on with; training failed time after time.
    """
    RunFolder.open(config, resume=resume, force=force)
    try:
        import ray
    except ImportError as error:
        raise UserError("--launcher ray needs the package ray", "pip install 'ray[train]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    low, high = workers
    has_gpus = ray.cluster_resources().get("GPU", 0) >= low
    failures = FailureConfig(max_failures=restarts)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"train": train, "config": to_table(config), "force": force, "folder": str(Path.cwd())},
        scaling_config=ScalingConfig(num_workers=low if low == high else workers, use_gpu=has_gpus),
        run_config=RunConfig(name="ray", storage_path=str(config.folder.resolve()), failure_config=failures),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        causes = list(error.worker_failures.values())
        told = next((e for e in causes if isinstance(e, UserError)), causes[0])
        raise UserError(f"training failed {restarts + 1} times, at last with: {first_line(told)}") from error
    return next((r for r in reversed(records(config.folder)) if "eval/accuracy" in r), {})


def _work(settings: dict[str, Any]) -> None:
    """What each worker does. A checkpoint that is there was made by this run, or was asked to be gone on with."""
    os.chdir(settings["folder"])
    config: Config = from_table(Config, settings["config"], "")
    resume = RunFolder(config.folder, config).checkpoints.latest() is not None
    settings["train"](config, resume, settings["force"])
