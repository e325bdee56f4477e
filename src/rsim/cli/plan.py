"""``rsim plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rsim.cli.options import Json, Set, Source, tell
from rsim.errors import UserError

if TYPE_CHECKING:
    from rsim.config import Config
    from rsim.training import cost


def command(
    source: Source,
    device: Annotated[str, typer.Option(help="h100, h200, a100, l40s or rtx4090.")] = "h100",
    workers: Annotated[list[int] | None, typer.Option("--workers", help="Processes, one a device; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(help="Sampled tokens of an episode (default: as many as it may have).", min=0)] = 0,
    question: Annotated[int, typer.Option(help="Tokens of a question with its prompt.", min=1)] = 128,
    price: Annotated[float, typer.Option(help="Dollars for an hour of one device.", min=0)] = 0.0,
    network: Annotated[float, typer.Option(help="Gbit/s that a machine sends to others.", min=0.1)] = 400.0,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Foretell time, memory and traffic of a run on other machines, one row for each number of processes.

    Where no row fits, settings are proposed that would; exit code 2 where nothing does.
    """
    from rsim.config import load_config
    from rsim.policies.loading import quiet_models
    from rsim.training import cost, fitting

    quiet_models()
    config = load_config(source, overrides or [])
    if config.upstream.url:
        raise UserError("rsim plan", "is of machines; what an upstream costs says rsim train --dry-run")
    counts = workers or [1, 8, 64]
    for count in counts:
        if count < 1:
            raise UserError(f"--workers {count}", "must be at least 1")
    if device not in cost.DEVICES:
        raise UserError(f"--device {device}", f"use one of {', '.join(cost.DEVICES)}; of this machine, rsim train --dry-run")
    on, speed = cost.DEVICES[device], network * 1e9 / 8

    def cost_of(changed: Config, count: int) -> cost.Cost:
        return cost.plan(changed, on, count, tokens=tokens, question=question, network=speed, shapes=shapes)

    shapes = {name: cost.shape_of(source) for name, source in cost.sources(config).items()}
    plans = [cost_of(config, count) for count in counts]
    dollars = [round(p.hours * p.job.workers * price, 2) for p in plans]
    lines = fitting.describe_plans(plans)
    lines += [f"dollars, a row each: {', '.join(f'{d:,.2f}' for d in dollars)}"] * bool(price)
    would, none_fits = [], all(p.why for p in plans)
    if none_fits:
        would = fitting.proposals(config, cost_of, most=config.train.questions)
        lines += fitting.describe_proposals(would)
    more = {"proposals": [one.to_json() for one in would]}
    tell([p.to_json() | {"dollars": d} | more for p, d in zip(plans, dollars, strict=True)], "\n".join(lines), as_json)
    if none_fits and not would:
        raise UserError(f"{source} on {device}", f"nothing that was tried fits: {fitting.NOTHING}")
