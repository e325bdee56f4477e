"""The answer checker on real data: agreement, gold answers, reference programs, speed, hostile texts.

Needs $RSIM_DATA and reasoning-gym.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from rsim.answers.extract import parse_number
from rsim.data.load import load_problems
from rsim.data.sources import read_theoremqa
from rsim.game.problem import Problem
from rsim.rewards.grade import check
from rsim.rewards.symbolic import shared_pool
from studies import wordings
from studies.ledger import Row

ISSUE = 12
Part = Literal["cases", "inputs", "gold", "fuzz", "speed", "hostile"]
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
    parts: dict[Part, Check] = {
        "cases": cases,
        "inputs": inputs,
        "gold": gold,
        "fuzz": fuzz,
        "speed": speed,
        "hostile": hostile,
    }
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


def fuzz(seed: int) -> list[Row]:
    """Golds with signs put in, taken out and doubled, as answers of every kind: nothing may crash."""
    rng = random.Random(seed)
    golds = [p.answer for p in load_problems("math", "test")]
    problems = [Problem("", rng.choice(golds), kind=kind) for kind in ("latex", "numeric", "text") for _ in range(40)]
    problems += [Problem("", letter, kind="choice", meta={"options": rng.choices(golds, k=4)}) for letter in "ABCD"]
    pieces = [*_PIECES.split(), "\\text{not}", "\\pm", "_5", "'", "million", "\\cup", "\\begin{pmatrix}", "&", "\\\\", "²", "½"]

    def mutated() -> str:
        text = rng.choice(golds)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice([rng.choice(pieces), "", text[at:], text[:at]]) + text[at + rng.randint(0, 2) :]
        return text[:2000]

    texts = [mutated() for _ in range(5000)]

    def crashes(text: str) -> bool:
        try:
            for problem in (problems[len(text) % 120], problems[-1 - len(text) % 4]):
                check(problem, f"\\boxed{{{text}}}")
                check(problem, text, "flexible")
        except Exception as error:  # counted: that is what is measured
            print(f"  crash: {type(error).__name__}: {text!r}")
            return True
        return False

    count = sum(in_parallel(texts, crashes))
    return [Row(f"fuzzed answers that crash the checker of {len(texts)}", count, goal="0", met=count == 0, seeds=[seed])]


def speed(seed: int) -> list[Row]:
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
    # Formulas: what neither a number nor a word is. The other side of a pair is written differently.
    formulas = [p for p in problems if p.kind == "latex" and re.search(r"[a-z](?![a-z])|\\\\(?:sqrt|pi|sin|cos|tan)", p.answer)]
    formulas = [p for p in formulas if parse_number(p.answer) is None and "\\text" not in p.answer]
    pairs = [
        (p, f"So it is \\boxed{{{_turned((p if rng.random() < 0.5 else rng.choice(formulas)).answer)}}}.") for p in formulas
    ]
    asked = [check(p, t)[1] for p, t in pairs]
    needed = sum(v.how == "symbolic" for v in asked) / len(pairs)
    our_way, their_way, agreed = [], [], 0.0
    for _ in range(3):
        our_way.append(_seconds(lambda: [check(p, t) for p, t in pairs[:300]]))
        their_way.append(_seconds(lambda: [_math_verify(math_verify, p, t) for p, t in pairs[:300]]))
    agreed = statistics.mean(v.right == _math_verify(math_verify, p, t) for v, (p, t) in zip(asked[:300], pairs, strict=False))
    faster = statistics.median(t / o for t, o in zip(their_way, our_way, strict=True))
    algebra = f"MATH formulas ({len(formulas)} of {len(problems)} answers)"
    quick = "answers per second on one core, no symbolic algebra needed"
    return [
        Row(quick, round(rate), "1/s", "at least 2,000", rate >= 2000, seeds=[seed]),
        Row("share of mixed GSM8K and MATH answers that need none", share, "share", seeds=[seed]),
        Row("times faster than math-verify on the same answers", round(ratio, 1), "x", seeds=[seed]),
        Row(f"{algebra}: per second on one core", round(300 / statistics.median(our_way)), "1/s", seeds=[seed]),
        Row(f"{algebra}: times faster than math-verify", round(faster, 1), "x", "at least 3", faster >= 3, seeds=[seed]),
        Row(f"{algebra}: same verdict as math-verify", agreed, "share", seeds=[seed]),
        Row(f"{algebra}: share that needs math-verify", needed, "share", seeds=[seed]),
    ]


def _turned(formula: str) -> str:
    """Another way to write it: the last term first."""
    found = re.fullmatch(r"([^-+=,(){}\\\\]+)\+([^-+=,(){}\\\\]+)", formula)
    return f"{found[2]}+{found[1]}" if found else formula.replace("\\frac", "\\dfrac").replace(" ", "")


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _math_verify(library: Any, problem: Problem, text: str) -> bool:
    gold_answer = library.parse(f"${problem.answer}$", parsing_timeout=None)
    return bool(library.verify(gold_answer, library.parse(text, parsing_timeout=None), timeout_seconds=None))


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
