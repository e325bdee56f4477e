"""``rsim solve``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from rsim.cli.options import Json, Set, tell
from rsim.errors import UserError

if TYPE_CHECKING:
    from rsim.game.episode import Episode


def command(
    question: Annotated[str, typer.Argument()],
    run: Annotated[str, typer.Option(help="A run folder or checkpoint.")] = "runs/nano",
    planner: Annotated[str, typer.Option(help="As in eval; default: the run's.")] = "",
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Answer one question greedily, printing each step with its strategy as it is made."""
    if not question.strip():
        raise UserError("the question is empty", 'e.g. rsim solve "12+71-26=?"')
    from rsim.evaluation.evaluate import episode_record, evaluate
    from rsim.evaluation.loading import load_game
    from rsim.game.problem import Problem
    from rsim.game.record import shown
    from rsim.policies.loading import quiet_models
    from rsim.runs.locate import locate

    quiet_models()
    config, checkpoint = locate(run, overrides or [])
    problem = Problem(question, "")
    game = load_game(config, checkpoint, planner, "", [problem], overrides=overrides or [])

    def on_step(index: int, episode: Episode) -> None:
        step = episode.steps[-1]
        label = game.names[step.strategy] if step.strategy >= 0 else "reasoner"
        sure = "" if step.forced or not episode.decisions else f" {max(episode.decisions[-1].probabilities):.0%}"
        Console().print(Text(f"{label}{sure:<5}".ljust(22), style="bold cyan") + Text(shown(step).strip()))

    watch = None if as_json else on_step
    _, episodes, scores = evaluate("solve", game, [problem], config.rewards, seed=0, on_step=watch)
    record = episode_record(episodes[0], scores[0], game.names)
    record = {key: value for key, value in record.items() if key not in ("answer", "correct", "rewards")}  # there is no gold
    tell(record, f"answer: {record['predicted']}", as_json)
