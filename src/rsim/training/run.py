"""A run as people start it: what it says, their rewards and callbacks, and Ctrl-C, which loses nothing."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsim.config import Config
from rsim.policies.loading import quiet_models
from rsim.rewards.custom import Reward
from rsim.runs.folder import check_trackers
from rsim.training import hosted
from rsim.training.questions import leaked
from rsim.training.trainer import Stopped, Trainer

OnRecord = Callable[[dict[str, Any]], object]  # returns True to stop the run
OnSave = Callable[[Path], object]  # as well
Say = Callable[[str], None]


def silent(line: str) -> None:
    """Says nothing."""


def train(
    config: Config,
    *,
    resume: bool = False,
    resume_from: str = "",
    force: bool = False,
    rewards: Sequence[Reward] = (),
    on_record: OnRecord = lambda record: None,
    on_save: OnSave = lambda folder: None,
    say: Say = silent,
) -> dict[str, Any]:
    """Runs `Trainer`. The first Ctrl-C or SIGTERM lets the step end and saves; a second Ctrl-C stops at once.

    After a SIGTERM, which schedulers send to machines that they take back, the process ends with exit code 0.

    Args:
        on_record: gets every record of ``metrics.jsonl``; on the first process alone, as do the following.
        on_save: gets the folder of each checkpoint.
        say: gets what people should know before and at the end: the device, an upstream's cost, where a stop
            leaves the run.

    Returns:
        the last held-out evaluation; empty where a callback stopped the run before there was one.
    """
    quiet_models()
    check_trackers(config.train.trackers)  # before anything is written
    own = [reward.spec for reward in rewards if reward.spec not in config.rewards.custom]
    config = replace(config, rewards=replace(config.rewards, custom=(*config.rewards.custom, *own)))
    trainer = Trainer(config, resume=resume, resume_from=resume_from, force=force, rewards=rewards)
    if not first_process():
        say = silent
    if config.upstream.url and trainer.strategies:
        asked, due = (trainer.train_set, trainer.eval_set), trainer.unevaluated
        cost = hosted.most(trainer.config, trainer.strategies, *asked, trainer.step, unevaluated=due)
        say(hosted.describe(trainer.config, cost))
    introduction = [*leaked(config, trainer.train_set, trainer.eval_set), trainer.device.reason]
    enough = False

    def stop_if(answer: object) -> None:
        nonlocal enough
        enough = enough or answer is True
        trainer.stop_requested = trainer.stop_requested or enough

    def watch(record: dict[str, Any]) -> None:
        while introduction:
            say(introduction.pop())
        stop_if(on_record(record))

    trainer.on_metrics = watch
    trainer.saver.on_save = lambda folder: stop_if(on_save(folder))
    with _signals(trainer, say):
        try:
            return trainer.run()
        except Stopped as stopped:
            if stopped.terminated:
                raise SystemExit(0) from None
            if enough:
                return stopped.result
            say(_where(trainer))
            raise
        except KeyboardInterrupt:
            say(_where(trainer))
            raise


@contextmanager
def _signals(trainer: Trainer, say: Say) -> Iterator[None]:
    """Ctrl-C and SIGTERM, where this is the main thread, which alone gets them."""

    def on_interrupt(*_: object) -> None:
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True
        if trainer.checkpoints.latest():
            say("finishing this step, then saving; press Ctrl-C again to stop at once")
        else:
            say("no checkpoint yet: stopping at the first; Ctrl-C again stops at once, with nothing kept")

    def on_terminate(*_: object) -> None:
        trainer.stop_requested = trainer.terminated = True
        say("terminated: finishing this step, then saving")

    main = threading.current_thread() is threading.main_thread()
    handlers = {signal.SIGINT: on_interrupt, signal.SIGTERM: on_terminate} if main else {}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _where(trainer: Trainer) -> str:
    saved = trainer.checkpoints.latest()
    if saved is None:
        return "stopped before the first checkpoint: nothing is kept; start it again without --resume"
    return f"stopped; --resume goes on from {saved.name}"


def first_process() -> bool:
    """Whether this process, of those that torchrun or ``accelerate launch`` started, talks to people."""
    return os.environ.get("RANK", "0") == "0"


def told(record: dict[str, Any]) -> list[str]:
    """What a record of ``metrics.jsonl`` says to people, in lines."""
    if "eval/accuracy" in record:
        interval = f"[{record['eval/accuracy_low']:.1%}, {record['eval/accuracy_high']:.1%}]"
        return [f"step {record['step']:>4}  held-out accuracy {record['eval/accuracy']:.1%} {interval}"]
    if "accuracy" in record:
        return [f"step {record['step']:>4}  {record['stage']}  {step_line(record)}"]
    if record.get("stage") == "data":
        left_out = f"{record['data/left_out']} are longer than data.max_question_tokens and left out"
        return [f"{record['data/questions']} questions to train on; {left_out}"]
    if record.get("stage") == "cold_start":
        kept, sampled, rate = (record[f"cold_start/{key}"] for key in ("kept", "sampled", "format_rate"))
        return [f"cold start: {kept:.0f} of {sampled:.0f} episodes kept, {rate:.0%} well formatted"]
    return []


def step_line(record: dict[str, Any], *, short: bool = False) -> str:
    """``short``: for a bar, whose stage says lambda."""
    reward = record.get("reasoner/return", record.get("planner/return", 0.0))
    speed = f"{record['tokens_per_second']:,.0f} tok/s"
    parts = [f"reward {reward:.2f}", f"acc {record['accuracy']:.2f}", f"λ {record['lambda']:.1f}", speed]
    if "planner/entropy" in record:
        parts.append(f"{'' if short else 'planner '}H {record['planner/entropy']:.2f}")
    return " ".join([*parts[:2], *parts[3:]]) if short else "  ".join(parts)


def train_quietly(config: Config, resume: bool, force: bool) -> None:
    """What each process of a run does that others watch over (`rsim.distributed.ray_launcher`)."""
    quiet_models()
    Trainer(config, resume=resume, force=force).run()
