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
from rsim.report.ledger import row

_SHORT = "rollout.max_tokens=448"  # a batch lasts as long as its longest episode
_PLANNER = ("models.planner_lora=32", "train.planner_lr=1e-4", "stages.planner.steps=1000")
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
    "planner on GSM8K": Job("plugin-qwen2.5-coder", (*_PLANNER, _SHORT), "gsm8k", 6),
    "both on GSM8K": Job("qwen2.5-coder-1.5b-gsm8k", _BOTH, "gsm8k", 7, _ARMS),
    "GRPO alone on GSM8K": Job("qwen2.5-coder-1.5b-gsm8k", (*_BOTH, _ALONE), "gsm8k", 7, (("GRPO alone", ""),)),
    "both on TAT-QA": Job("plugin-tatqa", _ADAPTERS, "tatqa", 6, _ARMS),
    "planner, from GSM8K on to MBPP": Job("plugin-mbpp", _PLANNER, "humaneval", 5, after="planner on GSM8K"),
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
        job, folder = JOBS[name], self.out / name.replace(" ", "-").replace(",", "")
        models = [f"models.reasoner={json.dumps(self.reasoner)}"]
        if _ALONE not in job.changes:
            start = self.planner_of(job.after) if job.after else self.planner
            models.append(f"models.planner={json.dumps(start)}")
        changes = [*job.changes, *models, *self.changes]
        before = {arm: self._evaluate(job, folder, job.preset, spec, changes) for arm, spec in _BASE.items()}
        if job.after:
            before["planner as it came"] = self._evaluate(job, folder, job.preset, start, changes)
        self._train(job, folder / "run", changes)
        after = {arm: self._evaluate(job, folder, str(folder / "run"), spec, []) for arm, spec in job.arms}
        return self._rows(name, folder / "run", before, after)

    def planner_of(self, name: str) -> str:
        """The planner of a finished job's last checkpoint."""
        newest = sorted((self.out / name.replace(" ", "-") / "run" / "checkpoints").glob("step-*"))[-1]
        return str(newest / "planner")

    def _train(self, job: Job, run: Path, changes: list[str]) -> None:
        """Until its time is up; a run that was begun before goes on."""
        if (run / "done").is_file():
            return
        sets = [*changes, "train.eval_every=0", "train.save_every=10", f"out={run}"]
        stages = "stages.0.steps=1000"
        command = [sys.executable, "-m", "rsim", "train", job.preset, "--set", stages, *_flags(sets)]
        if list(run.glob("checkpoints/step-*")):
            command.append("--resume")
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                process.wait(60 * job.minutes * self.scale)
            except subprocess.TimeoutExpired:
                process.terminate()  # it saves, and ends with 0
            errors = process.communicate(timeout=300)[1]
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}: {errors[-3000:]}")
        (run / "done").touch()

    def _evaluate(self, job: Job, folder: Path, run: str, spec: str, changes: list[str]) -> Path:
        label = f"{'before' if run == job.preset else 'after'}-{Path(spec).name or 'trained'}"
        limit = str(self.questions)
        command = [
            sys.executable,
            "-m",
            "rsim",
            "eval",
            run,
            "--data",
            job.data,
            "--limit",
            limit,
            "--out",
            str(folder / label),
        ]
        command += ["--planner", spec] if spec else []
        subprocess.run([*command, *_flags(changes)], check=True, stdout=subprocess.DEVNULL)
        return folder / label

    def _rows(self, name: str, run: Path, before: dict[str, Path], after: dict[str, Path]) -> list[dict[str, Any]]:
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [s for s in steps if "seconds" in s]
        rows = [
            row(f"{name}: steps trained", len(steps), unit="steps"),
            row(f"{name}: sampled tokens", steps[-1]["sampled_tokens"], unit="tokens"),
            row(
                f"{name}: seconds a step, beside the other jobs",
                round(statistics.median(s["seconds"] for s in steps), 1),
                unit="s",
            ),
            row(f"{name}: peak memory", round(max(s["gpu_memory_gib"] for s in steps), 1), unit="GiB"),
        ]
        for arm, folder in (before | after).items():
            found = json.loads((folder / "summary.json").read_text())
            label = f"{name}: {'before: ' if arm in before else ''}{arm}"
            rows.append(row(f"{label}: accuracy", found["accuracy"], unit="share", interval=(found["low"], found["high"])))
            rows.append(row(f"{label}: tokens a question", round(found["tokens_per_question"], 1), unit="tokens"))
        for arm, folder in after.items():
            for other, base in before.items():
                found = compare(folder, base)
                rows.append(row(f"{name}: {arm} minus {other} before", round(100 * found.difference, 1), unit="points",
                                interval=(round(100 * found.low, 1), round(100 * found.high, 1))))  # fmt: skip
        return rows


def _flags(changes: list[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]
