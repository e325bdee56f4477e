"""``rsim strategies show | discover | adapt | grow``."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from rsim.cli.options import Json, Set, tell
from rsim.errors import UserError
from rsim.policies.strategies import StrategySet, from_table, load_strategies, to_toml

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
def discover(
    evaluation: Annotated[str, typer.Argument(metavar="EVAL", help="A folder that rsim eval wrote, with a planner.")],
    out: Annotated[str, typer.Option(metavar="FILE.toml", help="Where the new set goes.")] = "",
    count: Annotated[int, typer.Option(help="New strategies, one for each of the largest clusters.", min=1)] = 1,
    upstream: Annotated[str, typer.Option(metavar="URL", help="An OpenAI-compatible server whose model writes them.")] = "",
    model: Annotated[str, typer.Option(help="Its name there.")] = "",
    as_json: Json = False,
) -> None:
    """Gather failed episodes by what went wrong; with --upstream, have an LLM write strategies against it."""
    from rsim.discovery.failures import as_text, failures
    from rsim.discovery.propose import propose

    if bool(upstream) != bool(out) or bool(upstream) != bool(model):
        raise UserError("--upstream, --model and --out belong together", "give all three, or none to see the clusters alone")
    if out and Path(out).exists():
        raise UserError(f"{out} exists already", "name a new file")
    clusters, total = failures(Path(evaluation))
    told: dict[str, Any] = {"episodes": total, "clusters": [{"title": c.title, "count": c.count} for c in clusters]}
    if not as_json:
        print("\n".join(f"{c.count} of {total}: {c.title}" for c in clusters) or "no episode failed")
        if clusters:
            print(f"\nFor example:\n\n{as_text(clusters[0].examples[0])}")
    if upstream and not clusters:
        raise UserError("no episode failed", "there is nothing that a new strategy could help against")
    if upstream:
        settings = json.loads((Path(evaluation) / "settings.json").read_text())
        strategies = from_table(tomllib.loads(settings["means"]["strategies"]), Path(evaluation))
        told["proposed"] = []
        for cluster in clusters[:count]:
            found = propose(strategies, cluster, total, url=upstream, model=model)
            strategies = StrategySet((*strategies.strategies, found))
            Path(out).write_text(to_toml(strategies), encoding="utf-8")  # what there is, should the next one fail
            told["proposed"].append(vars(found) | {"against": cluster.title})
            if not as_json:
                print(f"\nagainst {cluster.title}: {found.name}: {found.description}\n  {found.prompts[0]}")
    if as_json:
        print(json.dumps(told))


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
    source: Annotated[str, typer.Argument(metavar="SET", help="A TOML file with new strategies, as discover writes it.")],
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
