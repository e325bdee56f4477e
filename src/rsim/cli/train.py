"""``rsim train``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rsim.cli.options import DataDir, Json, Quiet, Rewards, Set, Source, Strategies, merged, tell
from rsim.errors import UserError

if TYPE_CHECKING:
    from rsim.config import Config


def command(
    source: Source,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="The run's folder (default: runs/NAME).")] = "",
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn.")] = None,
    overrides: Set = None,
    strategies: Strategies = "",
    reward: Rewards = None,
    data_dir: DataDir = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run's folder.")] = False,
    resume_from: Annotated[
        str, typer.Option(metavar="CHECKPOINT", help="Go on from this one of the run's, e.g. step-000010.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Resume although the config has changed.")] = False,
    upstream: Annotated[
        str, typer.Option(metavar="URL", help="Train the planner alone, for a model behind this OpenAI-compatible server.")
    ] = "",
    upstream_model: Annotated[str, typer.Option(metavar="NAME", help="Its name there (default: the first listed).")] = "",
    max_requests: Annotated[
        int,
        typer.Option(help="Stop, and keep the run, when as many requests are sent to it, resumed or not; 0: no limit.", min=0),
    ] = 0,
    price_in: Annotated[float, typer.Option(help="Dollars for a million tokens that it reads.", min=0)] = 0.0,
    price_out: Annotated[float, typer.Option(help="Dollars for a million tokens that it writes.", min=0)] = 0.0,
    launcher: Annotated[str, typer.Option(help="ray: train on a Ray cluster (docs/scaling.md).")] = "",
    workers: Annotated[str, typer.Option(metavar="N|MIN:MAX", help="Processes there (default: 1).")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check what it needs, and estimate memory and time, or an upstream's cost.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a planner and a reasoner together, stage by stage."""
    from rsim.config import load_config

    there: dict[str, str | float] = {"url": upstream, "model": upstream_model, "max_requests": max_requests}
    there |= {"price_in": price_in, "price_out": price_out}
    options = merged(overrides, out=out, seed=seed, strategies=strategies, rewards=reward, data_dir=data_dir, upstream=there)
    config = load_config(source, options)
    if force and not (resume or resume_from):
        raise UserError("--force", "it is for --resume, with a config that has changed: name both")
    if launcher and config.upstream.url:
        raise UserError("--launcher with --upstream", "one process asks the server: leave the launcher out")
    if launcher and resume_from:
        raise UserError("--resume-from with --launcher", "the cluster goes on from the newest checkpoint: use --resume")
    if launcher not in ("", "ray"):
        raise UserError(f"--launcher {launcher}", "use ray, or start the command by torchrun or accelerate launch")
    if workers and not launcher:
        raise UserError(f"--workers {workers}", "they are --launcher ray's; other processes are started by torchrun")
    if dry_run:
        _estimate(config, as_json, resume=resume, resume_from=resume_from, force=force)
        return
    if launcher:
        from rsim.distributed.ray_launcher import parse_workers, train_with_ray
        from rsim.training.run import train_quietly

        result = train_with_ray(train_quietly, config, parse_workers(workers or "1"), resume=resume, force=force)
    else:
        from rsim.cli.progress import train_with_progress
        from rsim.training.run import first_process

        result = train_with_progress(config, resume=resume, resume_from=resume_from, force=force, quiet=quiet or as_json)
        if not first_process():
            return
    tell(result, f"run folder: {config.folder}", as_json)


def _estimate(config: Config, as_json: bool, *, resume: bool, resume_from: str, force: bool) -> None:
    """Prints what a run will need. Raises `UserError` where it would not begin, or this machine cannot hold it."""
    from rsim.policies.loading import quiet_models
    from rsim.training import cost, fitting
    from rsim.training.setup import check_inputs

    quiet_models()
    check_inputs(config, resume=resume, resume_from=resume_from, force=force)
    if config.upstream.url:
        from rsim.training import hosted

        tell(*hosted.check(config), as_json)
        return
    if config.parallel.shard or config.parallel.deepspeed:
        raise UserError(
            "--dry-run with parallel.shard or parallel.deepspeed",
            "what a process needs depends on their number: rsim plan --workers N",
        )
    found = cost.estimate(config)
    would, lines = [], fitting.describe_estimate(found)
    if found.why:
        would = fitting.proposals(config, lambda changed, n: cost.plan(changed, found.job.hardware, n, shapes=found.job.shapes))
        lines += fitting.describe_proposals(would)
    tell(found.to_json() | {"proposals": [one.to_json() for one in would]}, "\n".join(lines), as_json)
    fitting.check_fits(found, would)
