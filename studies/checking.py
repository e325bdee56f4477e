"""Measures the answer checker on real data: agreement, gold answers, reference programs, speed, hostile texts.

RSIM_DATA=... python -m studies.checking [cases gold gym code speed hostile] [--record]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rsim.data.load import gym_tasks, load_problems
from rsim.data.sources import read_theoremqa
from rsim.game.problem import Problem
from rsim.rewards.grade import Verdict, check, grade
from rsim.rewards.symbolic import shared_pool
from studies.ledger import record, row

_TITLE = "Answer checking"


def main() -> None:
    parts = {"cases": cases, "gold": gold, "gym": gym, "code": code, "speed": speed, "hostile": hostile}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)} (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write results/checking.json and its page")
    args = parser.parse_args()
    os.environ.setdefault("RSIM_DATA", str(Path(__file__).parents[2] / "shared" / "data"))
    rows = [r for part in args.parts or parts for r in parts[part](args.seed)]
    for r in rows:
        print(f"{r['what']:<80} {r['value']!s:<10} {r['goal']}  {'' if r['met'] is None else 'met' if r['met'] else 'MISSED'}")
    if args.record:
        record("checking", 2, _TITLE, rows)


def in_parallel(jobs: list[Any], work: Any) -> list[Any]:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(work, jobs))


def cases(seed: int) -> list[dict[str, Any]]:
    """Math-Verify's own test cases, each with the options that its test sets."""
    path = Path(os.environ["RSIM_DATA"]) / "verifier_math_verify_tests" / "cases.jsonl"
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def agrees(case: dict[str, Any]) -> bool:
        meta = {"decimals": case["precision"]} if "precision" in case else {}
        meta |= {"set_relations": case["allow_set_relation_comp"]} if "allow_set_relation_comp" in case else {}
        problem = Problem("", case["gold"], kind="latex", meta=meta)
        verdict = check(problem, case["pred"], "flexible")[1]
        expected = bool(case["expected"] if "expected" in case else case["result"])
        if verdict.right != expected:
            print(f"  disagrees: {case['test']}: gold {case['gold'][:80]!r} answer {case['pred'][-80:]!r}: we say {verdict}")
        return verdict.right == expected

    share = statistics.mean(in_parallel(known, agrees))
    return [
        row(f"agreement with Math-Verify's {len(known)} cases", share, unit="share", goal="at least 98%", met=share >= 0.98)
    ]


def gold(seed: int) -> list[dict[str, Any]]:
    """Every gold answer, given back in a boxed sentence."""
    rows = []
    for name in ("math", "gsm8k", "theoremqa", "svamp", "aqua"):
        problems = load_problems(name, "test")
        if name == "theoremqa":
            problems = read_theoremqa(Path(os.environ["RSIM_DATA"]) / name, pictures=True)["test"]

        def accepted(problem: Problem) -> bool:
            verdict = check(problem, f"So the final answer is \\boxed{{{problem.answer}}}.", "strict")[1]
            if not verdict.right:
                print(f"  refused: {problem.id}: {problem.answer!r}: {verdict}")
            return verdict.right

        count = sum(in_parallel(problems, accepted))
        rows.append(row(f"{name}: gold answers accepted of {len(problems)}", count, goal="all", met=count == len(problems)))
    return rows


def gym(seed: int) -> list[dict[str, Any]]:
    """Every reasoning-gym task: it can be loaded, and its own gold answers, where it gives any, are accepted."""

    def works(task: str) -> bool:
        problems = load_problems(f"gym:{task}", "dev", limit=2, seed=seed)
        judged = [(p, check(p, f"\\boxed{{{p.answer}}}")[1]) for p in problems if p.answer]
        refused = [(p, verdict) for p, verdict in judged if not verdict.right]
        for problem, verdict in refused:
            print(f"  refused: {task}: {problem.answer[:80]!r}: {verdict}")
        return not refused

    tasks = gym_tasks()
    count = sum(in_parallel(tasks, works))
    return [row(f"reasoning-gym tasks that load and accept their gold answers of {len(tasks)}", count, goal="all",
                met=count == len(tasks), seeds=[seed])]  # fmt: skip


def code(seed: int) -> list[dict[str, Any]]:
    """Reference programs must pass; the same task with an empty program must fail."""
    rows = []
    for name, splits in (("humaneval", ("test",)), ("mbpp", ("train", "dev", "test"))):
        problems = [p for split in splits for p in load_problems(name, split)]
        references = [p.meta.get("prefix", "") + p.meta["reference"] for p in problems]
        passed = sum(v.right for v in in_parallel(list(zip(problems, references, strict=True)), _run))
        bodies = [f"{p.meta['prefix']}    pass\n" if "prefix" in p.meta else "pass\n" for p in problems]
        empty = sum(v.right for v in in_parallel(list(zip(problems, bodies, strict=True)), _run))
        rows.append(
            row(f"{name}: reference programs that pass of {len(problems)}", passed, goal="all", met=passed == len(problems))
        )
        rows.append(row(f"{name}: empty programs that pass of {len(problems)}", empty, goal="0", met=empty == 0))
    return rows


def _run(job: tuple[Problem, str]) -> Verdict:
    return grade(*job)


def speed(seed: int) -> list[dict[str, Any]]:
    """Answers per second on one core, and the ratio to math-verify on the same answers, measured in turn."""
    import math_verify

    problems = load_problems("gsm8k", "test") + load_problems("math", "test")
    rng = random.Random(seed)
    rng.shuffle(problems)
    # Half are right, half carry the answer of another problem; kept are those that need no symbolic algebra.
    texts = [
        (p, f"So the final answer is \\boxed{{{(p if rng.random() < 0.5 else rng.choice(problems)).answer}}}.")
        for p in problems
    ]
    verdicts = [check(p, t)[1] for p, t in texts]
    plain = [pair for pair, v in zip(texts, verdicts, strict=True) if v.how in ("text", "number")]
    ours, theirs = [], []
    sample = plain[:400]
    for _ in range(5):
        ours.append(_seconds(lambda: [check(p, t) for p, t in plain]) / len(plain))
        theirs.append(_seconds(lambda: [_math_verify(math_verify, p, t) for p, t in sample]) / len(sample))
    rate = 1 / statistics.median(ours)
    ratio = statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
    share = len(plain) / len(texts)
    return [
        row("answers per second on one core, no symbolic algebra needed", round(rate), unit="1/s", goal="at least 2,000",
            met=rate >= 2000, seeds=[seed]),
        row("share of mixed GSM8K and MATH answers that need none", share, unit="share", seeds=[seed]),
        row("times faster than math-verify on the same answers", round(ratio, 1), unit="x", seeds=[seed]),
    ]  # fmt: skip


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _math_verify(library: Any, problem: Problem, text: str) -> bool:
    gold_answer = library.parse(f"${problem.answer}$", parsing_timeout=None)
    return bool(library.verify(gold_answer, library.parse(text, parsing_timeout=None), timeout_seconds=None))


def hostile(seed: int) -> list[dict[str, Any]]:
    """Texts that are made to crash, hang or fool a checker; none of them answers the question (gold 7)."""
    texts = hostile_texts(1000, seed)
    pool = shared_pool()
    before = sum(pool.failures.values())
    problems = [Problem("", "7", kind=kind) for kind in ("latex", "numeric")]

    def attack(text: str) -> tuple[str, float]:
        began = time.perf_counter()
        try:
            right = any(check(p, text, mode)[1].right for p in problems for mode in ("strict", "flexible"))
        except Exception as error:  # counted: that is what is measured
            return f"crash: {type(error).__name__}", 0.0
        return "right" if right else "", time.perf_counter() - began

    results = in_parallel(texts, attack)
    for text, (outcome, _) in zip(texts, results, strict=True):
        if outcome:
            print(f"  {outcome}: {text[:100]!r}")
    fooled = sum(outcome == "right" for outcome, _ in results)
    crashed = sum(outcome.startswith("crash") for outcome, _ in results)
    slowest = max(seconds for _, seconds in results)
    limit = 4 * pool.seconds + 5  # four checks, each under the pool's limit, and the start of a new worker
    return [
        row(f"hostile texts scored as right of {len(texts)}", fooled, goal="0", met=fooled == 0, seeds=[seed]),
        row("hostile texts that crash the checker", crashed, goal="0", met=crashed == 0, seeds=[seed]),
        row("hostile texts: slowest, four checks", round(slowest, 1), unit="s", goal=f"at most {limit:g}", met=slowest <= limit,
            seeds=[seed]),
        row("hostile texts: checks given up by the pool, all counted wrong", sum(pool.failures.values()) - before, seeds=[seed]),
    ]  # fmt: skip


def hostile_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    written = [
        "\\boxed{10^{1000000}}", "\\boxed{9^{9^{9^{9}}}}", "\\boxed{" + "\\frac{1}{" * 500 + "7" + "}" * 501, "\\boxed{" * 10_000,
        "\\boxed{\\boxed{8}}", "\\boxed{8\0}", "\0" * 1000, "8" * 10**6, "\\boxed{" + "8" * 10**6 + "}", "{" * 10**6, "}" * 10**6,
        "\u202e\\boxed{8}\u202c", "\u200f8", "\\boxed{" + "(" * 5000 + "8" + ")" * 5000 + "}", "$" * 9999, "\\boxed{8}" * 5000,
        "\\boxed{\\int_0^{8} \\sin(x^{x^{x}}) dx}", "\\boxed{factorial(10^9)}", "\\boxed{1000000000!}", "\\boxed{\\sqrt{" * 300,
        "\\boxed{\\begin{pmatrix}" + "8&" * 3000 + "\\end{pmatrix}}", "\\boxed{x=" * 1000, "\\boxed{__import__('os')}",
        "\\boxed{8,}", "\\boxed{,}", "\\boxed{-}", "\\boxed{8/0}", "\\boxed{\\frac{8}{0}}", "\\boxed{inf}", "\\boxed{nan}", "a" * 10**6,
        "\\boxed{7 or 8}", "\\boxed{7, 8}", "\\boxed{7}\\boxed{8}", "\\boxed{8} \\boxed{}", "\\boxed{{8}", "\\boxed{\\text{8}",
        "\\boxed{\\sum_{n=1}^{10^{9}} n}", "\\boxed{\\prod_{n=1}^{10^{7}} n}", "\\boxed{8\\%}", "\\boxed{2^{2^{2^{2^{2^{2}}}}}}",
    ]  # fmt: skip
    pieces = ["\\boxed{", "}", "{", "8", "9^", "\\frac", "$", "\\left(", "\\sqrt", "\0", "\u202e", "x", "=", ",", " ", "10^{99}", "\\text{",
              "!", "\\infty", "é", "\\", "\n", "%", "-", "/", "0"]  # fmt: skip
    made = ["".join(rng.choices(pieces, k=rng.randint(1, 60))) for _ in range(count - len(written))]
    return written + made


if __name__ == "__main__":
    main()
