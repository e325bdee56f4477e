"""Training with a progress bar, and with Ctrl-C that loses nothing."""

from __future__ import annotations

import signal
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rsim.config import Config
from rsim.models import quiet_models
from rsim.training.trainer import Trainer


def train_with_progress(config: Config, *, resume: bool, quiet: bool) -> dict[str, Any]:
    """Runs `Trainer` under a bar. The first Ctrl-C lets the step end and saves; the second stops at once."""
    quiet_models()
    console = Console(stderr=True, quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(),
               TextColumn("{task.fields[shown]}"), TextColumn("ETA"), TimeRemainingColumn(compact=True))  # fmt: skip
    trainer = Trainer(config, resume=resume)
    introduction = [trainer.place.reason]
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(config.name, total=trainer.total_steps, completed=trainer.step, shown="")

        def on_metrics(record: dict[str, Any]) -> None:
            if introduction:
                console.print(introduction.pop(), highlight=False)
            if "eval/accuracy" in record:
                console.print(f"step {record['step']:>4}  held-out accuracy {record['eval/accuracy']:.1%} "
                              f"[{record['eval/accuracy_low']:.1%}, {record['eval/accuracy_high']:.1%}]")  # fmt: skip
            elif "accuracy" in record:
                progress.update(task, completed=record["step"], description=record["stage"], shown=_line(record))
                if not console.is_terminal:  # a log file gets lines in the place of a bar
                    console.print(f"step {record['step']:>4}  {record['stage']}  {_line(record)}", highlight=False)
            elif record.get("stage") == "cold_start":
                kept, sampled = record["cold_start/kept"], record["cold_start/sampled"]
                formatted = f"{record['cold_start/format_rate']:.0%} well formatted"
                console.print(f"cold start: {kept:.0f} of {sampled:.0f} episodes kept, {formatted}", highlight=False)

        trainer.on_metrics = on_metrics

        def on_interrupt(*_: object) -> None:
            if trainer.stop_requested:
                raise KeyboardInterrupt
            trainer.stop_requested = True
            console.print("finishing this step, then saving; press Ctrl-C again to stop at once")

        previous = signal.signal(signal.SIGINT, on_interrupt)
        try:
            return trainer.run()
        finally:
            signal.signal(signal.SIGINT, previous)


def _line(record: dict[str, Any]) -> str:
    reward = record.get("reasoner/return", record.get("planner/return", 0.0))
    parts = [f"reward {reward:.2f}", f"acc {record['accuracy']:.2f}", f"λ {record['lambda']:.1f}",
             f"{record['tokens_per_second']:,.0f} tok/s"]  # fmt: skip
    if "planner/entropy" in record:
        parts.append(f"planner H {record['planner/entropy']:.2f}")
    return "  ".join(parts)
