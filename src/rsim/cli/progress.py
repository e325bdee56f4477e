"""Training with a progress bar."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rsim.config import Config
from rsim.training.run import first_process, step_line, told, train


def train_with_progress(config: Config, *, quiet: bool, **how: Any) -> dict[str, Any]:
    """`rsim.training.run.train` under a bar; a log file gets lines in the place of it."""
    console = Console(stderr=True, quiet=quiet or not first_process())
    bar = BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[shown]}")
    left = TextColumn("ETA"), TimeRemainingColumn(compact=True)
    with Progress(TextColumn("{task.description}"), *bar, *left, console=console, transient=True) as progress:
        task = progress.add_task(config.name, total=config.total_steps, shown="")

        def say(line: str) -> None:
            console.print(line, highlight=False, soft_wrap=True)

        def on_record(record: dict[str, Any]) -> None:
            step = "accuracy" in record
            progress.update(task, completed=record["step"])
            if step:
                progress.update(task, description=record["stage"], shown=step_line(record))
            for line in [] if step and console.is_terminal else told(record):
                say(line)

        return train(config, on_record=on_record, say=say, **how)
