"""Judges the saved answers of `studies.plugin_models` again, after the checker has changed; nothing is sampled.

    python -m studies.judge_again FOLDER [--model qwen2.5-coder-1.5b] [--data tatqa:100] [--record]

FOLDER is what that measurement wrote (its ``--out``). The ledger's rows keep their machine and name both commands.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from rsim.data.load import load_problems
from rsim.evaluation.evaluate import bootstrap_interval
from rsim.game.problem import Problem
from rsim.rewards.grade import check, grade
from studies.ledger import RESULTS, record, row
from studies.plugin_models import arm_folder, best_control, differences, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--data", default="tatqa:100", metavar="SET:QUESTIONS")
    parser.add_argument("--record", action="store_true", help="write results/real_models.json and its page")
    args = parser.parse_args()
    data, _, limit = args.data.partition(":")
    label = f"{args.model}, {data}, {limit} questions"
    known = {r["what"]: r for r in json.loads((RESULTS / "real_models.json").read_text(encoding="utf-8"))["rows"]}
    before, after = f"{label}: ", ": accuracy, boxed"
    names = [w.removeprefix(before).removesuffix(after) for w in known if w.startswith(before) and w.endswith(after)]
    problems = {p.question: p for p in load_problems(data, "test")}
    with tempfile.TemporaryDirectory() as judged:
        rows: list[dict[str, Any]] = []
        done: dict[str, Path] = {}
        for arm in names:
            given = arm_folder(Path(args.folder), args.model, args.data.replace(":", "-"), arm)
            done[arm] = arm_folder(Path(judged), args.model, args.data.replace(":", "-"), arm)
            right, flexible = judge_folder(given, done[arm], problems)
            share = sum(right) / len(right)
            rows.append(row(f"{label}: {arm}: accuracy, boxed", share, unit="share", interval=bootstrap_interval(right)))
            rows.append(row(f"{label}: {arm}: accuracy, last answer", sum(flexible) / len(flexible), unit="share"))
            print(f"{arm}: {known[rows[-2]['what']]['value']:.1%} was, {share:.1%} is", flush=True)
        planners = [name.removeprefix("planner ") for name in names if name.startswith("planner ")]
        controls = [name for name in names if name != "CoT" and not name.startswith("planner ")]
        rows += differences(label, done, best_control(done, controls), planners)
    again = f"python -m studies.judge_again {shlex.join(sys.argv[1:])}"
    sampled = known[before + names[0] + after]
    origin = sampled["command"].partition(", judged again by ")[0]
    rows = [r | {"machine": sampled["machine"], "command": f"{origin}, judged again by {again}"} for r in rows]
    if args.record:
        record("real_models", 6, "Real models", rows, summary)


def judge_folder(given: Path, target: Path, problems: dict[str, Problem]) -> tuple[list[bool], list[bool]]:
    """Judges an evaluation's answers, writes it to ``target`` and returns what is right, boxed and by the last answer."""
    target.mkdir(parents=True)
    right, flexible, lines = [], [], []
    for line in (given / "episodes.jsonl").read_text(encoding="utf-8").splitlines():
        r = json.loads(line)
        problem = problems[r["question"]]
        if r["predicted"] is not None:
            r["correct"] = r["flexible"] = grade(problem, r["predicted"]).right
        else:
            final = r["steps"][-1]["text"] if r["steps"] else ""
            r["flexible"] = check(problem, final, "flexible")[1].right
        right.append(r["correct"])
        flexible.append(r["flexible"])
        lines.append(json.dumps(r))
    (target / "episodes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (target / "summary.json").write_text((given / "summary.json").read_text(encoding="utf-8"), encoding="utf-8")
    return right, flexible


if __name__ == "__main__":
    main()
