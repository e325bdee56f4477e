"""One GPU, no internet: what real models are trained to in 25 minutes, and how fast.

    python -m studies.gpu [--parts speed steps training] [--jobs NAME ...] [--minutes 25] [--questions 200] [--reasoner MODEL]
        [--planner MODEL] [--out FOLDER] [--set KEY=VALUE ...] [--record]

*speed*: rollout of the native engine against transformers' ``generate``. *steps*: seconds and memory of training steps.
*training*: a planner for the frozen reasoner on GSM8K, both agents (adapters) on GSM8K and on TAT-QA, GRPO alone on GSM8K, and
the first planner trained on for MBPP's programs; accuracy on unseen questions before and after (HumanEval for programs).

One thing after the other: processes that share a GPU take turns on it. A command that was stopped goes on where it was.
``--set`` reaches every training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from rsim.policies.loading import quiet_models
from studies.gpu.speed import rollout
from studies.gpu.training import JOBS, Bench
from studies.ledger import record
from studies.workload import show

_LARGE = ("train.questions=16", "train.group=16", "rollout.batch=256", "train.micro_tokens=16384")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parts = ("speed", "steps", "training")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--questions", type=int, default=200, help="asked in each evaluation")
    parser.add_argument("--reasoner", default="qwen2.5-coder-1.5b")
    parser.add_argument("--planner", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--record", action="store_true", help="write results/gpu.json and its page")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    quiet_models()
    if "speed" in args.parts:
        for model, dtype in ((args.reasoner, "bfloat16"), (args.planner, "float32")):
            _done(rollout(model, dtype, rows=256, tokens=64, rounds=3), args.record)
    bench = Bench(args.out, args.reasoner, args.planner, args.questions, (*_LARGE, *args.changes), args.minutes / 25)
    if "steps" in args.parts:
        for name in args.jobs:
            _done(bench.steps(name), args.record)
    if "training" in args.parts:
        for name in args.jobs:
            _done(bench.run(name), args.record)


def _done(rows: list[dict[str, Any]], recorded: bool) -> None:
    show(rows)
    if recorded:
        record("gpu", 6, "One GPU", rows)


if __name__ == "__main__":
    main()
