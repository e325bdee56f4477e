"""Training jobs with a time limit, and the accuracies before and after them, each command in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsim.evaluation.compare import compare
from studies.ledger import row

_SHORT = "rollout.max_tokens=448"  # a batch lasts as long as its longest episode
_PLANNER = ("models.planner_lora=32", "train.planner_lr=3e-4", "stages.planner.steps=1000", "rollout.temperature=0.7")
_BOTH = ("stages.stage2.steps=1000", _SHORT)
_ADAPTERS = (
    *_PLANNER, "models.reasoner_lora=16", "train.reasoner_lr=5e-5", "train.gradient_checkpointing=true",
    "stages.planner.train_reasoner=true",
)  # fmt: skip
_ALONE = "models.planner=none"
_BASE = {"CoT": "none", "random planner": "random"}


@dataclass(frozen=True)
class Job:
    """``minutes`` of training. ``arms`` are measured of the trained run; ``after``: the job whose planner it begins with."""

    preset: str
    changes: tuple[str, ...]
    data: str
    minutes: float
    arms: tuple[tuple[str, str], ...] = (("trained planner", ""),)
    after: str = ""


_ARMS = (("both trained", ""), ("trained reasoner, random planner", "random"), ("trained reasoner, CoT", "none"))
JOBS = {
    "planner on GSM8K": Job("plugin-qwen2.5-coder", (*_PLANNER, _SHORT), "gsm8k", 3.5),
    "both on GSM8K": Job("qwen2.5-coder-1.5b-gsm8k", _BOTH, "gsm8k", 3.5, _ARMS),
    "GRPO alone on GSM8K": Job("qwen2.5-coder-1.5b-gsm8k", (*_BOTH, _ALONE), "gsm8k", 3.5, (("GRPO alone", ""),)),
    "both on TAT-QA": Job("plugin-tatqa", _ADAPTERS, "tatqa", 3.5, _ARMS),
    "planner, from GSM8K on to MBPP": Job(
        "plugin-mbpp", (*_PLANNER, "train.entropy_reset=1.5"), "humaneval", 3.5, after="planner on GSM8K"
    ),
}


@dataclass(frozen=True)
class Bench:
    """``changes`` come on top of every job's; ``questions`` are asked in each evaluation."""

    out: Path
    reasoner: str
    planner: str
    questions: int
    changes: tuple[str, ...]
    scale: float = 1.0  # of the jobs' minutes

    def run(self, name: str) -> list[dict[str, Any]]:
        """Evaluates, trains and evaluates again."""
        job, folder, changes = JOBS[name], self._folder(name), self._changes(name)
        before = {arm: self._evaluate(job, folder, job.preset, spec, changes) for arm, spec in _BASE.items()}
        if job.after:
            before["planner as it came"] = self._evaluate(job, folder, job.preset, self.planner_of(job.after), changes)
        self._train(job, folder / "run", changes)
        after = {arm: self._evaluate(job, folder, str(folder / "run"), spec, []) for arm, spec in job.arms}
        return [*_steps(f"training: {name}", folder / "run"), *_accuracies(name, before, after)]

    def steps(self, name: str) -> list[dict[str, Any]]:
        """A few steps of training; the first warms up."""
        run = self._folder(name) / "steps"
        if not (run / "checkpoints" / "final").is_dir():
            _train(JOBS[name].preset, run, [*self._changes(name), "train.steps=4"], seconds=None)
        return _steps(f"steps: {name}", run)

    def _folder(self, name: str) -> Path:
        return self.out / name.replace(" ", "-").replace(",", "")

    def _changes(self, name: str) -> list[str]:
        job = JOBS[name]
        models = [f"models.reasoner={json.dumps(self.reasoner)}"]
        if _ALONE not in job.changes:
            models.append(f"models.planner={json.dumps(self.planner_of(job.after) if job.after else self.planner)}")
        return [*job.changes, *models, *self.changes]

    def planner_of(self, name: str) -> str:
        """The planner of a finished job's last checkpoint."""
        newest = sorted((self._folder(name) / "run" / "checkpoints").glob("step-*"))
        if not newest:
            raise SystemExit(f"the job {name!r} has to be trained first")
        return str(newest[-1] / "planner")

    def _train(self, job: Job, run: Path, changes: list[str]) -> None:
        """Until its time is up."""
        if not (run / "done").is_file():
            _train(job.preset, run, [*changes, "train.save_every=10"], 60 * job.minutes * self.scale)
            (run / "done").touch()

    def _evaluate(self, job: Job, folder: Path, run: str, spec: str, changes: list[str]) -> Path:
        label = f"{'before' if run == job.preset else 'after'}-{Path(spec).name or 'trained'}"
        to = ["--data", job.data, "--limit", str(self.questions), "--out", str(folder / label)]
        command = [sys.executable, "-m", "rsim", "eval", run, *to, *(["--planner", spec] if spec else [])]
        subprocess.run([*command, *_flags(changes)], check=True, stdout=subprocess.DEVNULL)
        return folder / label


def _train(preset: str, run: Path, changes: list[str], seconds: float | None) -> None:
    """A run that was begun before goes on; after so many seconds it is told to stop, saves, and ends with 0."""
    command = [sys.executable, "-m", "rsim", "train", preset, *_flags([*changes, "train.eval_every=0", f"out={run}"])]
    if list(run.glob("checkpoints/step-*")):
        command.append("--resume")
    run.parent.mkdir(parents=True, exist_ok=True)
    told = run.with_suffix(".stderr")
    with told.open("w") as errors, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(300)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}: {told.read_text()[-3000:]}")


def _steps(label: str, run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [s for s in lines if "seconds" in s]
    warm = steps[1:] or steps
    return [
        row(f"{label}: steps", len(steps)),
        row(f"{label}: sampled tokens", steps[-1]["sampled_tokens"], unit="tokens"),
        row(f"{label}: seconds a step", round(statistics.median(s["seconds"] for s in warm), 1), unit="s"),
        row(f"{label}: seconds of rollout a step", round(statistics.median(s["seconds_rollout"] for s in warm), 1), unit="s"),
        row(f"{label}: sampled", round(statistics.median(s["tokens_per_second"] for s in warm)), unit="tokens/s"),
        row(f"{label}: peak memory", round(steps[-1]["gpu_memory_gib"], 1), unit="GiB"),
    ]


def _accuracies(name: str, before: dict[str, Path], after: dict[str, Path]) -> list[dict[str, Any]]:
    rows = []
    for arm, folder in (before | after).items():
        found = json.loads((folder / "summary.json").read_text())
        label = f"{name}: {'before: ' if arm in before else ''}{arm}"
        rows.append(row(f"{label}: accuracy", found["accuracy"], unit="share", interval=(found["low"], found["high"])))
        rows.append(row(f"{label}: tokens a question", round(found["tokens_per_question"], 1), unit="tokens"))
    for arm, folder in after.items():
        for other, base in before.items():
            gain = compare(folder, base)
            rows.append(row(f"{name}: {arm} minus {other} before", round(100 * gain.difference, 1), unit="points",
                            interval=(round(100 * gain.low, 1), round(100 * gain.high, 1))))  # fmt: skip
    return rows


def _flags(changes: list[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]
