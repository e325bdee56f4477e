"""One GPU, no internet: what real models are trained to in 25 minutes, and how fast.

    python -m bench.gpu [--parts speed training] [--jobs NAME ...] [--minutes 25] [--questions 300] [--reasoner MODEL]
        [--planner MODEL] [--out FOLDER] [--set KEY=VALUE ...] [--record]

*speed*, alone on the GPU: rollout of the native engine against transformers' ``generate``, seconds and memory of training
steps. *training*, all jobs side by side: a planner for the frozen reasoner on GSM8K, both agents (adapters) on GSM8K and on
TAT-QA, GRPO alone on GSM8K, and the first planner trained on for MBPP's programs; accuracy on unseen questions before and
after (HumanEval for programs).
A command that was stopped goes on where it was. ``--set`` reaches every training.
"""

from __future__ import annotations

import argparse
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.gpu.speed import rollout, step
from bench.gpu.training import JOBS, Bench
from bench.workload import show
from rsim.models import quiet_models
from rsim.report.ledger import record

_LARGE = ("train.questions=16", "rollout.batch=256", "train.micro_tokens=16384")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", nargs="+", choices=("speed", "training"), default=["speed", "training"])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--questions", type=int, default=300, help="asked in each evaluation")
    parser.add_argument("--reasoner", default="qwen2.5-coder-1.5b")
    parser.add_argument("--planner", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--record", action="store_true", help="write results/gpu.json and its page")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    quiet_models()
    changes = (*_LARGE, *args.changes)
    if "speed" in args.parts:
        _done(speed(args.reasoner, args.planner, changes, args.out), args.record)
    if "training" in args.parts:
        bench = Bench(args.out, args.reasoner, args.planner, args.questions, changes, args.minutes / 25)
        train(bench, args.jobs, args.record)


def speed(reasoner: str, planner: str, changes: tuple[str, ...], out: Path) -> list[dict[str, Any]]:
    rows = []
    for model, dtype, count in ((planner, "float32", 256), (reasoner, "float32", 128), (reasoner, "bfloat16", 128),
                                (reasoner, "bfloat16", 512)):  # fmt: skip
        rows += rollout(model, dtype, count, tokens=128, rounds=2)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for name in ("planner on GSM8K", "both on GSM8K"):
        models = [f"models.reasoner={reasoner}", f"models.planner={planner}"]
        rows += step(name, JOBS[name].preset, [*JOBS[name].changes, *models, *changes], out)
    return rows


def train(bench: Bench, names: list[str], recorded: bool) -> None:
    """Every job in a thread of its own; one that goes on from another waits for it."""
    futures: dict[str, Future[list[dict[str, Any]]]] = {}

    def work(name: str) -> list[dict[str, Any]]:
        earlier = JOBS[name].after
        if earlier in futures:
            futures[earlier].result()
        rows = bench.run(name)
        _done(rows, recorded)
        return rows

    with ThreadPoolExecutor(len(names)) as pool:
        for name in sorted(names, key=lambda n: bool(JOBS[n].after)):
            futures[name] = pool.submit(work, name)
    for future in futures.values():
        future.result()


def _done(rows: list[dict[str, Any]], recorded: bool) -> None:
    show(rows)
    if recorded:
        record("gpu", 6, "One GPU", rows)


if __name__ == "__main__":
    main()
