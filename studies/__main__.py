"""``python -m studies NAME [options]`` repeats a study and prints its rows; without a name, it lists them.

Two flags go with every study. ``--record`` writes the rows to ``results/NAME.json`` and the pages that are made from them.
``--supersede`` is for a study whose own settings were changed after its results were known: older rows stay, marked so.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from rsim.cli.options import Set
from rsim.errors import UserError
from studies import ledger


def main(arguments: list[str]) -> None:
    """
    Raises:
        UserError: there is no such study.
    """
    said = ledger.titles()
    if not arguments:
        print("\n".join(f"{name:<16} {what}" for name, what in said.items()))
        return
    name, *rest = arguments
    if name not in said:
        raise UserError(f"no study {name!r}", f"use one of {', '.join(said)}")
    options = [a for a in rest if a not in ledger.FLAGS]
    command_line(name, *(flag in rest for flag in ledger.FLAGS))(options, prog_name=f"python -m studies {name}")


def command_line(name: str, recorded: bool = False, changed: bool = False) -> typer.Typer:
    """A study's ``run`` as a command, with its arguments as options."""
    module = importlib.import_module(f"studies.{name}")
    run: Callable[..., Iterable[ledger.Row]] = module.run
    if "page" in inspect.signature(run).parameters:
        run = _on_a_bench(name, module, recorded)

    @functools.wraps(run)
    def command(**options: Any) -> None:
        measured = set()
        for row in run(**options):
            measured.add(row.what)
            met = "" if row.met is None else "met" if row.met else "MISSED"
            print(f"{row.what:<78} {row.shown:<16} {row.between:<18} {row.goal:<14} {met}".rstrip(), flush=True)
            if recorded:
                ledger.record(name, module.ISSUE, [row], changed=changed)
        if recorded:
            ledger.retire(name, measured)
            ledger.write_pages()

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=module.__doc__)(command)
    return app


def _on_a_bench(name: str, module: ModuleType, recorded: bool) -> Callable[..., Iterable[ledger.Row]]:
    """A study of trainings and evaluations: it fills a page."""

    def run(
        seeds: Annotated[int, typer.Option(help="Runs of everything that is trained.", min=1)] = 3,
        first_seed: Annotated[int, typer.Option(help="Of these runs; the others follow it.", min=0)] = 0,
        questions: Annotated[int, typer.Option(help="Unseen problems in every evaluation.", min=10)] = 1000,
        test_seed: Annotated[int, typer.Option(help="Which problems these are.")] = 4000,
        jobs: Annotated[int, typer.Option(help="Processes side by side.", min=1)] = 2,
        out: Annotated[Path, typer.Option(help="All runs and evaluations; what is there is not done again.")] = Path(
            "runs/studies"
        ),
        overrides: Set = None,
    ) -> Iterable[ledger.Row]:
        from rsim.policies.loading import quiet_models
        from studies.page import Page
        from studies.workbench import Workbench

        quiet_models()
        runs = tuple(range(first_seed, first_seed + seeds))
        bench = Workbench(out.resolve(), runs, questions, test_seed, jobs, tuple(overrides or []))
        page = Page(name, bench)
        module.run(bench, page)
        if recorded:
            page.write(ledger.titles()[name], module.LIMITS)
        return page.rows

    return run


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
