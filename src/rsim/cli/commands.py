"""What ``rsim eval`` and ``rsim solve`` do."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rsim.cli.progress import quiet_models
from rsim.config import Config, load_config, presets
from rsim.data.load import load_problems
from rsim.data.problem import Problem
from rsim.errors import UserError
from rsim.evaluation.evaluate import evaluate
from rsim.evaluation.planners import planner_from
from rsim.models import load_planner, load_reasoner
from rsim.planner.planner import AnyPlanner
from rsim.report.report import build_report
from rsim.rollout.episode import Episode
from rsim.rollout.game import Game
from rsim.rollout.vllm import save_untied
from rsim.strategies import load_strategies
from rsim.training.trainer import episode_record


def locate(run: str, overrides: list[str]) -> tuple[Config, Path | None]:
    """The config and checkpoint that a run folder, a checkpoint folder or a preset names.

    A run folder means its final checkpoint, or the newest one while it is still training.
    """
    path = Path(run)
    if (path / "config.toml").is_file():
        final = path / "checkpoints" / "final"
        found = sorted((path / "checkpoints").glob("step-*"))
        checkpoint = final if final.is_dir() else found[-1] if found else None
        if checkpoint is None:
            raise UserError(f"{run} has no checkpoint yet", "train it first")
        return load_config(str(path / "config.toml"), overrides), checkpoint
    if ((path / "reasoner").is_dir() or (path / "planner").is_dir()) and (path.parent.parent / "config.toml").is_file():
        return load_config(str(path.parent.parent / "config.toml"), overrides), path
    if run in presets() or path.suffix == ".toml":
        return load_config(run, overrides), None
    raise UserError(f"no run, checkpoint or preset {run!r}", f"train one first, or use a preset: {', '.join(presets())}")


def load_game(config: Config, checkpoint: Path | None, planner: str, reasoner: str, problems: list[Problem]) -> Game:
    quiet_models()
    models = config.models
    trained = checkpoint / "reasoner" if checkpoint else None  # there is none where only the planner was trained
    source = reasoner or (str(trained) if trained and trained.is_dir() else models.reasoner)
    strategies = load_strategies(models.strategies)
    chosen: AnyPlanner | None = None
    if planner:
        chosen = planner_from(planner, strategies, problems)
    elif checkpoint and (checkpoint / "planner").is_dir():
        chosen = load_planner(str(checkpoint / "planner"), strategies, device=models.device, dtype=models.dtype, seed=0)
    served = config.rollout.engine == "vllm"
    handed_over = served and (bool(reasoner) or source != models.reasoner)  # else the server has the model that is meant
    loaded = load_reasoner(
        source, device=models.device, dtype=models.dtype, system_prompt=models.system_prompt,
        weights=not served or handed_over,
    )  # fmt: skip
    game = Game(loaded, chosen, config.rollout)
    if game.server is not None and handed_over:
        with tempfile.TemporaryDirectory() as folder:
            game.server.check_updates(loaded.model, Path(folder) / "reasoner")
    return game


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
    reasoner = load_reasoner(source, device="cpu")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_untied(reasoner.model, target)
    reasoner.tokenizer.save_pretrained(target)
    return target


def run_eval(
    run: str, *, planner: str, reasoner: str, data: str, split: str, limit: int, seed: int, greedy: bool, out: str,
    overrides: list[str],
) -> tuple[dict[str, Any], Path]:  # fmt: skip
    """Evaluates and writes ``summary.json``, ``episodes.jsonl`` and ``report.html``; returns the summary and the page."""
    config, checkpoint = locate(run, overrides)
    settings = config.data
    problems = load_problems(
        data or settings.eval, split, data_dir=settings.data_dir, limit=limit, seed=seed, columns=settings.columns
    )
    game = load_game(config, checkpoint, planner, reasoner, problems)
    name = planner or ("trained planner" if game.planner else "no planner")
    result, episodes, scores = evaluate(name, game, problems, config.rewards, seed=seed, greedy=greedy)
    folder = Path(out) if out else (Path(run) / "eval" if Path(run).is_dir() else Path("runs/eval"))
    folder.mkdir(parents=True, exist_ok=True)
    names = game.planner.strategies.names if game.planner else ()
    summary = result.to_json() | {"run": run, "data": data or config.data.eval, "split": split, "seed": seed, "greedy": greedy}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (folder / "episodes.jsonl").open("w", encoding="utf-8") as file:
        for episode, scored in zip(episodes, scores, strict=True):
            file.write(json.dumps({"step": 0} | episode_record(episode, scored, names)) + "\n")
    record = {"step": 0, "eval/accuracy": result.accuracy, "eval/accuracy_low": result.low, "eval/accuracy_high": result.high}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    title = f"{summary['data']} {split}, {len(problems)} questions"
    (folder / "table.json").write_text(json.dumps({"title": title, "rows": [result.to_json()]}) + "\n")
    return summary, build_report(folder)


def run_solve(question: str, run: str, planner: str, overrides: list[str], *, live: bool) -> dict[str, Any]:
    """Answers ``question`` greedily; ``live`` prints every step as soon as it is complete."""
    if not question.strip():
        raise UserError("the question is empty", 'e.g. rsim solve "12+7*13=?"')
    config, checkpoint = locate(run, overrides)
    problem = Problem(question, "")
    game = load_game(config, checkpoint, planner, "", [problem])
    names = game.planner.strategies.names if game.planner else ()

    def on_step(index: int, episode: Episode) -> None:
        from rich.console import Console
        from rich.text import Text

        step = episode.steps[-1]
        label = names[step.strategy] if step.strategy >= 0 else "reasoner"
        sure = "" if step.forced or not episode.decisions else f" {max(episode.decisions[-1].probabilities):.0%}"
        Console().print(Text(f"{label}{sure:<5}".ljust(22), style="bold cyan") + Text(step.text.strip()))

    _, episodes, scores = evaluate("solve", game, [problem], config.rewards, seed=0, on_step=on_step if live else None)
    return episode_record(episodes[0], scores[0], names)
