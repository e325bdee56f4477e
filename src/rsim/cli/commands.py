"""What ``rsim train --dry-run`` and ``--launcher``, ``export``, ``eval``, ``compare`` and ``solve`` do."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rsim.config import Config, load_config
from rsim.distributed.ray_cluster import connect, export, served
from rsim.distributed.ray_launcher import parse_workers, train_with_ray
from rsim.errors import UserError
from rsim.evaluation.compare import compare
from rsim.evaluation.evaluate import episode_record, evaluate
from rsim.evaluation.loading import EvalSettings, load_game
from rsim.evaluation.saved import evaluate_into
from rsim.evaluation.upstream import ServedModel
from rsim.game.episode import Episode
from rsim.game.problem import Problem
from rsim.policies.loading import quiet_models
from rsim.report.report import build_report
from rsim.runs.locate import locate
from rsim.training import estimate, plan
from rsim.training.trainer import train_quietly


def run_dry(config: Config, *, as_json: bool) -> None:
    """Prints what a run will need. Raises `UserError` if this machine cannot hold it."""
    quiet_models()
    if config.train.shard or config.train.deepspeed:
        raise UserError(
            "--dry-run with train.shard or train.deepspeed",
            "what a process needs depends on their number: rsim plan --workers N",
        )
    found = estimate.estimate(config)
    print(json.dumps(estimate.to_json(found)) if as_json else "\n".join(estimate.describe(found)))
    estimate.check_fits(found)


def run_plan(
    source: str, device: str, workers: list[int], tokens: int, question: int, network: float, overrides: list[str], *,
    as_json: bool,
) -> None:  # fmt: skip
    """Prints what a run would cost elsewhere, one row for each number of processes."""
    quiet_models()
    config = load_config(source, overrides)
    for count in workers:
        if count < 1:
            raise UserError(f"--workers {count}", "must be at least 1")
    plans = []
    for count in workers:
        with plan.find_device(device, count) as on:
            plans.append(plan.plan(config, on, count, tokens=tokens, question=question, network=network * 1e9 / 8))
    if as_json:
        print(json.dumps([asdict(p) for p in plans]))
        return
    print("\n".join(plan.describe(plans, on.name)))


def run_on_cluster(config: Config, launcher: str, workers: str, *, resume: bool, force: bool) -> dict[str, Any]:
    """Trains under Ray; the run's folder tells how it goes."""
    if launcher != "ray":
        raise UserError(f"--launcher {launcher}", "use ray, or start the command by torchrun or accelerate launch")
    return train_with_ray(train_quietly, config, parse_workers(workers), resume=resume, force=force)


def run_export(source: str, folder: str) -> Path:
    """Writes a reasoner as a folder that a vLLM server can serve and be trained through; ``source`` is a run or a model.

    Raises:
        UserError: the folder exists already.
    """
    quiet_models()
    target = Path(folder)
    if target.exists():
        raise UserError(f"{folder} exists already", "name a new folder")
    if Path(source).is_dir() and not (Path(source) / "tokenizer_config.json").is_file():
        config, checkpoint = locate(source, [])
        trained = checkpoint / "reasoner" if checkpoint else None
        source = str(trained) if trained and trained.is_dir() else config.models.reasoner
    export(source, target)
    return target


def run_eval(
    settings: EvalSettings, *, upstream: dict[str, Any] | None, out: str, match_tokens: str, overwrite: bool, workers: int = 0
) -> tuple[dict[str, Any], Path]:  # fmt: skip
    """`evaluate_into` a folder, and a report beside it. Returns the summary and the page."""
    quiet_models()
    folder = Path(out) if out else (Path(settings.run) / "eval" if Path(settings.run).is_dir() else Path("runs/eval"))
    with _servers(settings, folder, workers) if workers and not upstream else nullcontext():
        result = evaluate_into(
            folder, settings, served=ServedModel(**upstream) if upstream else None, match_tokens=match_tokens,
            overwrite=overwrite, workers=workers,
        )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    record = {"step": 0, "eval/accuracy": result.accuracy, "eval/accuracy_low": result.low, "eval/accuracy_high": result.high}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    title = f"{summary['data']} {settings.split}, {result.questions} questions"
    (folder / "table.json").write_text(json.dumps({"title": title, "rows": [result.to_json()]}) + "\n")
    return summary, build_report(folder)


def _servers(settings: EvalSettings, folder: Path, workers: int) -> AbstractContextManager[None]:
    """The vLLM servers that the evaluation asks Ray for."""
    config, _ = locate(settings.run, list(settings.overrides))
    connect()
    return served(config, folder / "replicas", others=workers)


def run_compare(first: str, second: str) -> dict[str, Any]:
    return asdict(compare(Path(first), Path(second)))


def run_solve(question: str, run: str, planner: str, overrides: list[str], *, live: bool) -> dict[str, Any]:
    """Answers ``question`` greedily; ``live`` prints every step as soon as it is complete."""
    if not question.strip():
        raise UserError("the question is empty", 'e.g. rsim solve "12+7*13=?"')
    quiet_models()
    config, checkpoint = locate(run, overrides)
    problem = Problem(question, "")
    game = load_game(config, checkpoint, planner, "", [problem], overrides=overrides)
    names = game.planner.strategies.names if game.planner else ()

    def on_step(index: int, episode: Episode) -> None:
        from rich.console import Console
        from rich.text import Text

        step = episode.steps[-1]
        label = names[step.strategy] if step.strategy >= 0 else "reasoner"
        sure = "" if step.forced or not episode.decisions else f" {max(episode.decisions[-1].probabilities):.0%}"
        Console().print(Text(f"{label}{sure:<5}".ljust(22), style="bold cyan") + Text(step.answer.strip()))

    _, episodes, scores = evaluate("solve", game, [problem], config.rewards, seed=0, on_step=on_step if live else None)
    return episode_record(episodes[0], scores[0], names)
