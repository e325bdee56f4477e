"""The main job end to end on the nano lab: train, train the control, compare on unseen problems, report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rsim.cli.progress import train_with_progress
from rsim.config import Config, load_config
from rsim.data.load import load_problems
from rsim.evaluation.evaluate import Evaluation, evaluate
from rsim.evaluation.planners import planner_from
from rsim.evaluation.search import best_fixed
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.lab.oracle import state_blind
from rsim.policies.loading import load_planner, load_reasoner, quiet_models
from rsim.policies.protocol import AnyPlanner
from rsim.policies.reasoner import Reasoner
from rsim.policies.strategies import load_strategies
from rsim.reporting.report import build_report
from rsim.runs.checkpoints import identity
from rsim.runs.folder import sampled_tokens

_DEV_QUESTIONS = 100  # on which the best fixed strategy is picked


def run_demo(out: Path, seed: int, questions: int, overrides: list[str], *, quiet: bool) -> dict[str, Any]:
    """Runs the demo and returns its table; also written to ``table.json`` in the run's folder and shown in the report.

    Every number in the table depends on ``seed`` and the overrides alone.
    """
    began = time.perf_counter()
    console = Console(stderr=True, quiet=quiet)
    quiet_models()
    common = [f"seed={seed}", *overrides]
    config = load_config("nano", [f'out="{out / "nano"}"', *common])
    console.print("[bold]1/3[/bold] rSIM: planner and reasoner together, both stages")
    train_with_progress(config, quiet=quiet)
    budget = sampled_tokens(config.folder)
    console.print(f"[bold]2/3[/bold] GRPO alone on the same reasoner, at the same {budget:,} sampled tokens")
    control = load_config("nano-grpo", [f'out="{out / "nano-grpo"}"', *common, f"train.token_budget={budget}"])
    train_with_progress(control, quiet=quiet)
    console.print(f"[bold]3/3[/bold] comparison on {questions} unseen problems")
    rows = _compare(config, control, questions)
    table = {
        "title": f"nano lab, {questions} unseen problems, greedy, seed {seed}, best checkpoints",
        **identity(config.folder / "checkpoints" / "best"),
        "rows": [row.to_json() for row in rows],
        "reasoner_tokens": {"rsim": budget, "grpo": sampled_tokens(control.folder)},
    }
    (config.folder / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    page = build_report(config.folder)
    if not quiet:
        _print(rows, str(table["title"]))
        print(f"report: {page}   ({time.perf_counter() - began:.0f} s)")
        print(f"ask it yourself: rsim solve '85-(12+5)+26=?' --run {config.folder}/checkpoints/best")
    return table | {"report": str(page)}


def _compare(config: Config, control: Config, questions: int) -> list[Evaluation]:
    """Both runs are represented by their best checkpoint on held-out dev problems; the test problems decide nothing."""
    strategies = load_strategies(config.models.strategies)
    test = load_problems("lab", "test", limit=questions, seed=config.seed)
    dev = load_problems("lab", "dev", limit=_DEV_QUESTIONS, seed=config.seed + 1)
    base = load_reasoner(config.models.reasoner)
    best, best_alone = (c.folder / "checkpoints" / "best" for c in (config, control))
    trained, alone = load_reasoner(str(best / "reasoner")), load_reasoner(str(best_alone / "reasoner"))
    planner = load_planner(str(best / "planner"), strategies, seed=0)

    def measure(name: str, reasoner: Reasoner, chosen: AnyPlanner | None, problems: list[Problem] = test) -> Evaluation:
        return evaluate(name, Game(reasoner, chosen, config.rollout), problems, config.rewards, seed=config.seed)[0]

    fixed = best_fixed(strategies.names, lambda spec: measure(spec, trained, planner_from(spec, strategies, dev), dev).accuracy)
    blind = {name: planner_from(f"sequence:{','.join(names)}", strategies, test) for name, names in state_blind().items()}
    return [
        measure("base, CoT", base, None),
        measure("base + random planner", base, planner_from("random", strategies, test)),
        measure("base + oracle planner", base, planner_from("oracle", strategies, test)),
        measure("base + best sequence", base, blind["sequence"]),
        measure("base + trained planner", base, planner),
        measure("GRPO alone at equal tokens, CoT", alone, None),
        measure("trained, CoT", trained, None),
        measure("trained + random planner", trained, planner_from("random", strategies, test)),
        measure(f"trained + best {fixed}", trained, planner_from(fixed, strategies, test)),
        measure("trained + best sequence", trained, blind["sequence"]),
        measure("trained + blind planner", trained, blind["blind"]),
        measure("trained + trained planner (rSIM)", trained, planner),
        measure("trained + oracle planner", trained, planner_from("oracle", strategies, test)),
    ]


def _print(rows: list[Evaluation], title: str) -> None:
    table = Table(title=title)
    for name in ("", "accuracy", "95% interval", "tokens / question"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        interval = f"{row.low:.1%} to {row.high:.1%}"
        table.add_row(row.name, f"{row.accuracy:.1%}", interval, f"{row.tokens_per_question:.1f}")
    Console().print(table)
