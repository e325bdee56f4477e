"""Training with a progress bar, and with Ctrl-C that loses nothing."""

from __future__ import annotations

import os
import signal
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rsim.config import Config
from rsim.policies.loading import quiet_models
from rsim.training import hosted
from rsim.training.trainer import Stopped, Trainer


def train_with_progress(
    config: Config, *, resume: bool, quiet: bool, resume_from: str = "", force: bool = False
) -> dict[str, Any]:
    """Runs `Trainer` under a bar. The first Ctrl-C or SIGTERM lets the step end and saves; a second Ctrl-C stops at once.

    After a SIGTERM, which schedulers send to machines that they take back, the process ends with exit code 0.
    """
    quiet_models()
    console = Console(stderr=True, quiet=quiet or not first_process())
    trainer = Trainer(config, resume=resume, resume_from=resume_from, force=force)
    if config.upstream.url and trainer.strategies:
        cost = hosted.most(trainer.config, trainer.strategies, trainer.train_set, trainer.eval_set, trainer.step)
        console.print(hosted.describe(trainer.config, cost), highlight=False, soft_wrap=True)
    introduction = [trainer.device.reason]
    bar = BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[shown]}")
    left = TextColumn("ETA"), TimeRemainingColumn(compact=True)
    with Progress(TextColumn("{task.description}"), *bar, *left, console=console, transient=True) as progress:
        task = progress.add_task(config.name, total=config.total_steps, completed=trainer.step, shown="")

        def on_metrics(record: dict[str, Any]) -> None:
            if introduction:
                console.print(introduction.pop(), highlight=False)
            if "accuracy" in record and "eval/accuracy" not in record:
                progress.update(task, completed=record["step"], description=record["stage"], shown=_line(record))
                if console.is_terminal:  # a log file gets lines in the place of a bar
                    return
            for line in _told(record):
                console.print(line, highlight=False)

        trainer.on_metrics = on_metrics

        def on_interrupt(*_: object) -> None:
            if trainer.stop_requested:
                raise KeyboardInterrupt
            trainer.stop_requested = True
            console.print("finishing this step, then saving; press Ctrl-C again to stop at once")

        def on_terminate(*_: object) -> None:
            trainer.stop_requested = trainer.terminated = True
            console.print("terminated: finishing this step, then saving")

        handlers = {signal.SIGINT: on_interrupt, signal.SIGTERM: on_terminate}
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
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


def _told(record: dict[str, Any]) -> list[str]:
    """What a record of ``metrics.jsonl`` says to people, in lines."""
    if "eval/accuracy" in record:
        interval = f"[{record['eval/accuracy_low']:.1%}, {record['eval/accuracy_high']:.1%}]"
        return [f"step {record['step']:>4}  held-out accuracy {record['eval/accuracy']:.1%} {interval}"]
    if "accuracy" in record:
        return [f"step {record['step']:>4}  {record['stage']}  {_line(record)}"]
    if record.get("stage") == "data":
        left_out = f"{record['data/left_out']} are longer than data.max_question_tokens and left out"
        return [f"{record['data/questions']} questions to train on; {left_out}"]
    if record.get("stage") == "cold_start":
        kept, sampled, rate = (record[f"cold_start/{key}"] for key in ("kept", "sampled", "format_rate"))
        return [f"cold start: {kept:.0f} of {sampled:.0f} episodes kept, {rate:.0%} well formatted"]
    return []


def _line(record: dict[str, Any]) -> str:
    reward = record.get("reasoner/return", record.get("planner/return", 0.0))
    speed = f"{record['tokens_per_second']:,.0f} tok/s"
    parts = [f"reward {reward:.2f}", f"acc {record['accuracy']:.2f}", f"λ {record['lambda']:.1f}", speed]
    if "planner/entropy" in record:
        parts.append(f"planner H {record['planner/entropy']:.2f}")
    return "  ".join(parts)
