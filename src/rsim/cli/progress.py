"""Training with a progress bar, and with Ctrl-C that loses nothing."""

from __future__ import annotations

import os
import signal
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rsim.config import Config
from rsim.policies.loading import quiet_models
from rsim.training.trainer import Stopped, Trainer


def train_with_progress(
    config: Config, *, resume: bool, resume_from: str = "", force: bool = False, quiet: bool
) -> dict[str, Any]:  # fmt: skip
    """Runs `Trainer` under a bar. The first Ctrl-C or SIGTERM lets the step end and saves; a second Ctrl-C stops at once.

    After a SIGTERM, which schedulers send to machines that they take back, the process ends with exit code 0.
    """
    quiet_models()
    console = Console(stderr=True, quiet=quiet or not first_process())
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(),
               TextColumn("{task.fields[shown]}"), TextColumn("ETA"), TimeRemainingColumn(compact=True))  # fmt: skip
    trainer = Trainer(config, resume=resume, resume_from=resume_from, force=force)
    introduction = [trainer.device.reason]
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
            elif record.get("stage") == "data":
                left_out = f"{record['data/left_out']} are longer than data.max_question_tokens and left out"
                console.print(f"{record['data/questions']} questions to train on; {left_out}", highlight=False)
            elif record.get("stage") == "cold_start":
                kept, sampled = record["cold_start/kept"], record["cold_start/sampled"]
                formatted = f"{record['cold_start/format_rate']:.0%} well formatted"
                console.print(f"cold start: {kept:.0f} of {sampled:.0f} episodes kept, {formatted}", highlight=False)
                before, after = record["cold_start/format_rate_before"], record["cold_start/format_rate_after"]
                console.print(
                    f"well formatted without worked examples: {before:.0%} before, {after:.0%} after", highlight=False
                )

        trainer.on_metrics = on_metrics

        def on_interrupt(*_: object) -> None:
            if trainer.stop_requested:
                raise KeyboardInterrupt
            trainer.stop_requested = True
            console.print("finishing this step, then saving; press Ctrl-C again to stop at once")

        def on_terminate(*_: object) -> None:
            trainer.stop_requested = trainer.terminated = True
            console.print("terminated: finishing this step, then saving")

        previous = {number: signal.signal(number, handler)
                    for number, handler in ((signal.SIGINT, on_interrupt), (signal.SIGTERM, on_terminate))}  # fmt: skip
        try:
            return trainer.run()
        except Stopped as stopped:
            if stopped.terminated:
                raise SystemExit(0) from None
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def first_process() -> bool:
    """Whether this is the process, of those that torchrun or ``accelerate launch`` started, that talks to people."""
    return os.environ.get("RANK", "0") == "0"


def _line(record: dict[str, Any]) -> str:
    reward = record.get("reasoner/return", record.get("planner/return", 0.0))
    parts = [f"reward {reward:.2f}", f"acc {record['accuracy']:.2f}", f"λ {record['lambda']:.1f}",
             f"{record['tokens_per_second']:,.0f} tok/s"]  # fmt: skip
    if "planner/entropy" in record:
        parts.append(f"planner H {record['planner/entropy']:.2f}")
    return "  ".join(parts)
