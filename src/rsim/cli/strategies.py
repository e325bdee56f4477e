"""``rsim strategies show | adapt | grow``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsim.cli.options import Json, Set, tell
from rsim.errors import UserError
from rsim.policies.strategies import load_strategies

command = typer.Typer(no_args_is_help=True)


@command.command()
def show(
    source: Annotated[str, typer.Argument(metavar="[SET]", help="default, code, lab or a TOML file.")] = "default",
    as_json: Json = False,
) -> None:
    """Print a strategy set."""
    strategies = load_strategies(source).strategies
    text = "\n".join(f"{s.name:<16} {s.description}\n{'':<16} {s.prompts[0]}" for s in strategies)
    tell([vars(s) for s in strategies], text, as_json)


@command.command()
def adapt(
    planner: Annotated[str, typer.Argument(metavar="PLANNER", help="A trained planner's folder.")],
    source: Annotated[str, typer.Argument(metavar="SET", help="The whole new set: default, code, lab or a TOML file.")],
    out: Annotated[str, typer.Option(metavar="FOLDER")],
    as_json: Json = False,
) -> None:
    """Write a planner for another strategy set: known strategies keep their rows, new ones begin, others are dropped."""
    from rsim.discovery.adapt import adapted, load
    from rsim.policies.loading import quiet_models

    quiet_models()
    if Path(out).exists():
        raise UserError(f"{out} exists already", "name a new folder")
    strategies, old = load_strategies(source), load(planner)
    known = old.strategies.names
    adapted(old, strategies).save_pretrained(out)
    changes = {
        "added": [n for n in strategies.names if n not in known],
        "dropped": [n for n in known if n not in strategies.names],
    }
    added, dropped = (", ".join(changes[key]) or "none" for key in ("added", "dropped"))
    tell(changes | {"folder": out}, f"added {added}; dropped {dropped}; wrote {out}", as_json)


@command.command()
def grow(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run whose planner grows.")],
    source: Annotated[str, typer.Argument(metavar="SET", help="A TOML file with new strategies.")],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the trials go.")],
    steps: Annotated[int, typer.Option(help="Training steps of a trial.", min=1)] = 20,
    questions: Annotated[int, typer.Option(help="Dev questions of the paired test.", min=1)] = 500,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Train each new strategy beside the set as it is; keep those that win a paired test, drop the others."""
    from rsim.discovery.grow import Trial, grow
    from rsim.policies.loading import quiet_models

    quiet_models()

    def on_trial(trial: Trial) -> None:
        r = trial.result
        gain = f"{100 * r.difference:+.1f} points [{100 * r.low:+.1f}, {100 * r.high:+.1f}]"
        end = "kept" if trial.kept else "dropped"
        if not as_json:
            print(f"{trial.strategy}: {gain}, {100 * trial.used:.1f}% of the steps, {end}", flush=True)

    grown, best, trials = grow(
        run,
        load_strategies(source),
        Path(out),
        steps=steps,
        questions=questions,
        changes=tuple(set_ or ()),
        on_trial=on_trial,
    )
    results = [{"strategy": t.strategy, "kept": t.kept, "used": t.used} | vars(t.result) for t in trials]
    text = f"{len(grown)} strategies in {out}/strategies.toml; their planner: {best}/checkpoints/best/planner"
    tell({"trials": results, "strategies": grown.names, "run": str(best)}, text, as_json)
