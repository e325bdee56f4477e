"""Progress bars with an ETA, in 80 columns; a log file gets lines in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def _bar(console: Console) -> Progress:
    columns = BarColumn(bar_width=6), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"), TextColumn("ETA")
    name, left = TextColumn("{task.description}"), TimeRemainingColumn()
    hidden = not console.is_terminal  # a log would get an empty line of it
    return Progress(name, *columns, left, console=console, transient=True, disable=hidden)


@contextmanager
def shown(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Shows ``(done, of)`` as often as it is told: a bar, or a line for each tenth."""
    console, tenths = Console(stderr=True, quiet=quiet), [0]

    def line(done: int, of: int) -> None:
        if 10 * done // of > tenths[-1]:
            tenths.append(10 * done // of)
            console.print(f"{what}: {done} of {of}", highlight=False)

    if not console.is_terminal:
        yield line
        return
    with _bar(console) as progress:
        task = progress.add_task(what, total=None, shown="")
        yield lambda done, of: progress.update(task, completed=done, total=of)


def train_with_progress(config: Any, *, quiet: bool, **how: Any) -> dict[str, Any]:
    """`rsim.training.run.train` under two bars: its steps, and the episodes that are played together."""
    from rsim.game.progress import heard_by
    from rsim.training.run import first_process, step_line, told, train

    console = Console(stderr=True, quiet=quiet or not first_process())
    with _bar(console) as progress:
        steps = progress.add_task("start", total=config.total_steps, shown="")
        episodes = progress.add_task("episodes", total=None, shown="")
        last = [0]

        def on_episode(done: int, of: int) -> None:
            if done < last[-1]:
                progress.reset(episodes)
            last[:] = [done]
            progress.update(episodes, completed=done, total=of)

        def say(line: str) -> None:
            console.print(line, highlight=False, soft_wrap=True)

        def on_record(record: dict[str, Any]) -> None:
            step = "accuracy" in record
            progress.update(steps, completed=record["step"])
            if step:
                progress.update(steps, description=record["stage"], shown=step_line(record, short=True))
            for line in [] if step and console.is_terminal else told(record):
                say(line)

        with heard_by(on_episode):
            return train(config, on_record=on_record, say=say, **how)
