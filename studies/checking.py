"""The answer checker on real data: agreement, gold answers in other wordings, known faults, hostile texts.

Needs $RSIM_DATA and reasoning-gym.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from rsim.data.load import load_problems
from rsim.data.sources import read_theoremqa
from rsim.game.problem import Problem
from rsim.rewards.grade import check
from rsim.rewards.symbolic import shared_pool
from studies import wordings
from studies.ledger import Row

ISSUE = 12
Part = Literal["cases", "inputs", "gold", "hostile"]
GOLDS = {  # data set to the splits whose answers are tried
    "math": ("train", "dev", "test"),
    "gsm8k": ("train", "dev", "test"),
    "theoremqa": ("test",),
    "svamp": ("test",),
    "aqua": ("dev", "test"),
}
CODED = (("humaneval", "test"), *(("mbpp", split) for split in ("train", "dev", "test")))
Check = Callable[[int], list[Row]]  # of a seed


def run(only: Part | None = None, seed: int = 0) -> Iterator[Row]:
    parts: dict[Part, Check] = {"cases": cases, "inputs": inputs, "gold": gold, "hostile": hostile}
    for part in [only] if only else list(parts):
        yield from parts[part](seed)


def in_parallel(jobs: list[Any], work: Any) -> list[Any]:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(work, jobs))


def cases(seed: int) -> list[Row]:
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
    return [Row(f"agreement with Math-Verify's {len(known)} cases", share, "share", "at least 98%", share >= 0.98)]


def gold(seed: int) -> list[Row]:
    """Every gold answer in other wordings, which have to be accepted, and altered a little, which have to be refused."""
    rows = []
    for name, splits in GOLDS.items():
        problems = [p for split in splits for p in load_problems(name, split)]
        if name == "theoremqa":
            problems = read_theoremqa(Path(os.environ["RSIM_DATA"]) / name, pictures=True)["test"]
        for table, wanted in ((wordings.WORDINGS, True), (wordings.ALTERED, False)):
            for what, write in table.items():
                rows += _judged(f"{name}, {what}", problems, write, wanted)
    return rows


def _judged(name: str, problems: list[Problem], write: wordings.Writer, wanted: bool) -> list[Row]:
    written = [(p, text) for p in problems if (text := write(p)) is not None]
    texts = [(p, text) for p, text in written if wanted or not wordings.within_tolerance(p, text)]
    if not texts:
        return []
    verdicts = in_parallel(texts, lambda pair: check(pair[0], f"So the final answer is \\boxed{{{pair[1]}}}.")[1])
    for (p, text), verdict in zip(texts, verdicts, strict=True):
        if verdict.right != wanted:
            print(f"  {'refused' if wanted else 'accepted'}: {name}: {p.id}: gold {p.answer!r} answer {text!r}: {verdict}")
    count = sum(verdict.right == wanted for verdict in verdicts)
    skipped = f" ({len(written) - len(texts)} within the tolerance left out)" if len(written) > len(texts) else ""
    what = f"{name}: {'right answers accepted' if wanted else 'altered answers refused'} of {len(texts)}{skipped}"
    return [Row(what, count, goal="all", met=count == len(texts))]


def inputs(seed: int) -> list[Row]:
    """The shared cases: what earlier checkers got wrong."""
    path = Path(os.environ["RSIM_DATA"]).parent / "cases" / "checker.jsonl"
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    coded = {p.id: p for name, split in CODED for p in load_problems(name, split)}
    touched = Path("/tmp/rsim_gym_case")  # what the cases' attacks make
    touched.unlink(missing_ok=True)

    def agrees(case: dict[str, Any]) -> bool:
        gold, answer, kind = case["gold"], case["answer"], case["kind"]
        shown = f"```python\n{answer}\n```" if kind == "code" and "```" not in answer else answer
        shown = shown if kind == "code" else f"So it is \\boxed{{{answer}}}."
        problems = [coded.get(gold, Problem("", gold, kind=kind, meta=case.get("meta", {})))]
        if kind == "gym":  # a constant is wrong where gold is another
            problems = [p for p in load_problems(f"gym:{case['task']}", "dev", limit=20) if p.answer != answer]
        right = any(check(problem, shown)[1].right for problem in problems)
        wanted = case["expected"] is True and not touched.exists()
        if right != wanted:
            print(f"  wrong: gold {gold!r} answer {answer!r}: {right}")
        return bool(right == wanted)

    count = sum(in_parallel(known, agrees))
    made = touched.exists()
    what = f"inputs of known faults judged as they should be of {len(known)}"
    return [
        Row(what, count, goal="all", met=count == len(known)),
        Row("files that they made on the host", int(made), goal="0", met=not made),
    ]


def hostile(seed: int) -> list[Row]:
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
    given_up = sum(pool.failures.values()) - before
    goal = f"at most {limit:g}"
    return [
        Row(f"hostile texts scored as right of {len(texts)}", fooled, goal="0", met=fooled == 0, seeds=[seed]),
        Row("hostile texts that crash the checker", crashed, goal="0", met=crashed == 0, seeds=[seed]),
        Row("hostile texts: slowest, four checks", round(slowest, 1), "s", goal, slowest <= limit, seeds=[seed]),
        Row("hostile texts: checks given up by the pool, all counted wrong", given_up, seeds=[seed]),
    ]


_HOSTILE = r"""
\boxed{10^{1000000}} \boxed{9^{9^{9^{9}}}} \boxed{\boxed{8}} \boxed{\int_0^{8}\sin(x^{x^{x}})dx} \boxed{factorial(10^9)}
\boxed{1000000000!} \boxed{__import__('os')} \boxed{8,} \boxed{,} \boxed{-} \boxed{8/0} \boxed{\frac{8}{0}} \boxed{inf}
\boxed{nan} \boxed{7}\boxed{8} \boxed{{8} \boxed{\text{8} \boxed{\sum_{n=1}^{10^{9}}n} \boxed{\prod_{n=1}^{10^{7}}n}
\boxed{8\%} \boxed{2^{2^{2^{2^{2^{2}}}}}}"""
_PIECES = r"\boxed{ } { 8 9^ \frac $ \left( \sqrt x = , 10^{99} \text{ ! \infty é \ % - / 0"


def hostile_texts(count: int, seed: int) -> list[str]:
    rng, million = random.Random(seed), 10**6
    pieces = [*_PIECES.split(), "\0", "\u202e", " ", "\n"]
    written = [
        *_HOSTILE.split(),
        r"\boxed{7 or 8}",
        r"\boxed{7, 8}",
        r"\boxed{8} \boxed{}",
        "\\boxed{8\0}",
        "\u202e\\boxed{8}\u202c",
    ]
    written += ["\u200f8", "\0" * 1000, "$" * 9999, "8" * million, "{" * million, "}" * million, "a" * million]
    written += [r"\boxed{" * 10_000, r"\boxed{8}" * 5000, r"\boxed{\sqrt{" * 300, r"\boxed{x=" * 1000]
    written += [f"\\boxed{{{'8' * million}}}", f"\\boxed{{{'(' * 5000}8{')' * 5000}}}"]
    written += [r"\boxed{\begin{pmatrix}" + "8&" * 3000 + r"\end{pmatrix}}", r"\boxed{" + r"\frac{1}{" * 500 + "7" + "}" * 501]
    made = ["".join(rng.choices(pieces, k=rng.randint(1, 60))) for _ in range(count - len(written))]
    return written + made
