"""The checker: kinds, modes, and a symbolic pool that nothing can hang, crash or fool."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsim.answers.extract import parse_number
from rsim.data.sources import choice_problem
from rsim.game.problem import Problem
from rsim.rewards.grade import check, grade, read_answer
from rsim.rewards.symbolic import LONGEST, SymbolicPool, shared_pool

HARD = "$" + "(" * 5000 + "1" + ")" * 5000 + "$"  # takes math-verify minutes


@pytest.fixture(scope="module")
def pool():
    pool = SymbolicPool(workers=2, seconds=2.0)
    yield pool
    pool.close()


def idle_worker(pool):
    worker = pool._idle["math_verify"].get()
    pool._idle["math_verify"].put(worker)
    return worker


def fork_of(pid: int) -> int:
    """The last descendant of a process: of a worker, the fork that waits for an answer."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return fork_of(int(children[-1])) if children else pid


@pytest.mark.parametrize(("gold", "answer", "right"), [
    (r"\frac{1}{2}", "0.5", True), (r"\frac{\pi}{4}", r"\pi/4", True), ("2x+1", "1+2x", True), ("x^2-1", "(x-1)(x+1)", True),
    (r"\{1,2\}", r"\{2,1\}", True), ("(1,2)", "(2,1)", False), (r"\sqrt{8}", r"2\sqrt{2}", True), ("7", "8", False), ("x", "y", False),
    (r"\text{Evelyn}", "Evelyn", True), (r"90^\circ", "90", True), ("10,000", "10000", True), (r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"\begin{bmatrix}1\\2\end{bmatrix}", True), ("x=5", "5", True), ("5", "x = 5", True), (r"\$32", "32 dollars", True), ("0.3333", "1/3", True),
    ("0.33", "1/3", False), ("1e6", "x", False),
])  # fmt: skip
def test_latex_answers(gold, answer, right):
    assert grade(Problem("", gold, kind="latex"), answer).right is right


def test_percent_and_tolerance():
    assert grade(Problem("", "50"), "50%").right
    assert grade(Problem("", "0.5"), "50%").right
    assert not grade(Problem("", "0.5"), "50").right
    assert grade(Problem("", "17.7", meta={"tolerance": 0.005}), "17.68%").right
    assert not grade(Problem("", "17.7", meta={"tolerance": 0.005}), "17.9").right
    assert not grade(Problem("", "1000001"), "1000000.0").right


def test_strict_and_flexible_reading():
    assert read_answer("it is $x+1$", "strict", "latex") is None
    assert check(Problem("", "x+1", kind="latex"), "Therefore the answer is $1+x$.", "flexible")[1].right
    assert read_answer(r"\boxed{1} and \boxed{2}", "strict", "numeric") is None
    assert check(Problem("", "2"), r"\boxed{1} and \boxed{2}", "flexible")[1].right
    assert check(Problem("", "2"), "nothing here", "flexible") == (None, check(Problem("", "2"), "", "strict")[1])


@pytest.mark.parametrize(("text", "strict", "flexible"), [
    (r"\boxed{B}", True, True), (r"\boxed{(B)}", True, True), (r"\boxed{\text{B}}", True, True), (r"\boxed{a blue one}", True, True),
    (r"\boxed{C}", False, False), ("The answer is (B).", False, True), ("A is wrong, so B", False, True), ("Because it is big, B or C", False, False),
    ("no letter", False, False), (r"\boxed{b}", True, True), ("The answer is a blue one, so B", False, True), ("The answer is b", False, False),
])  # fmt: skip
def test_choices(text, strict, flexible):
    problem = choice_problem("Which?", ["a red one", "a blue one", "none"], "B", "q")
    assert "(B) a blue one" in problem.question
    assert check(problem, text, "strict")[1].right is strict
    assert check(problem, text, "flexible")[1].right is flexible


def test_text_answers():
    problem = Problem("", "True", kind="text")
    assert check(problem, r"\boxed{true}")[1].right
    assert not check(problem, r"\boxed{false}")[1].right


def test_gym_answers_use_the_tasks_verifier_and_partial_marks_are_no_pass():
    from rsim.data.load import load_problems

    for task in ("chain_sum", "simple_equations", "calendar_arithmetic", "spell_backward"):
        for problem in load_problems(f"gym:{task}", "dev", limit=5):
            assert check(problem, f"\\boxed{{{problem.answer}}}")[1].right, task
            assert not check(problem, "\\boxed{wrong}")[1].right, task
            number = parse_number(problem.answer) is not None
            assert check(problem, f"That makes {problem.answer}.", "flexible")[1].right is number, task


def test_cheap_comparisons_start_no_process(monkeypatch):
    monkeypatch.setattr("rsim.rewards.grade.shared_pool", lambda: pytest.fail("a process was used"))
    for gold, answer in (("42", "42.0"), (r"\frac{3}{4}", "0.75"), (r"\dfrac{x}{2}", r"\frac{x}{2}"), ("(1, 2)", "(1,2)")):
        assert grade(Problem("", gold, kind="latex"), answer).right


def test_a_hanging_comparison_is_killed_counted_logged_and_wrong(pool, caplog):
    began = time.monotonic()
    outcome = pool.same("$1$", HARD)
    assert (outcome.same, outcome.failure) == (False, "timeout")
    assert time.monotonic() - began < 60  # two seconds of processor time
    assert pool.failures["timeout"] >= 1
    assert "gave up (timeout)" in caplog.text
    assert pool.same("$x+1$", "$1+x$").same, "the next comparison gets a new worker"


def test_a_crashed_worker_is_replaced(pool):
    pool.same("$x$", "$x$")
    worker = idle_worker(pool)
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert pool.same("$x+1$", "$1+x$").same


def test_a_worker_that_dies_in_the_middle_counts_as_a_crash():
    pool = SymbolicPool(workers=1, seconds=20.0)
    pool.same("$x$", "$x$")
    worker = idle_worker(pool)
    threading.Timer(0.5, lambda: os.kill(worker.process.pid, signal.SIGKILL)).start()
    assert pool.same("$1$", HARD).failure == "crash"
    pool.close()


def test_a_workers_memory_is_limited():
    pool = SymbolicPool(workers=1, memory_mb=1234)
    assert pool.same("$x+1$", "$1+x$").same
    worker = idle_worker(pool)
    limits = Path(f"/proc/{fork_of(worker.process.pid)}/limits").read_text()
    assert re.search(rf"Max address space\s+{1234 << 20}\s+{1234 << 20}", limits)
    assert re.search(r"Max core file size\s+0\s+0", limits)
    pool.close()


def test_too_long_is_refused_not_cut(pool):
    assert pool.same("$1$", "1" * (LONGEST + 1)).failure == "too long"


def test_threads(pool):
    pairs = [(f"${i}+x$", f"$x+{i if i % 3 else i + 1}$") for i in range(24)]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda pair: pool.same(*pair).same, pairs))
    assert results == [bool(i % 3) for i in range(24)]


def test_async_handlers(pool):
    async def both():
        return await asyncio.gather(*(asyncio.to_thread(pool.same, "$x+1$", a) for a in ("$1+x$", "$2+x$")))

    assert [o.same for o in asyncio.run(both())] == [True, False]


def in_fork(pool, queue):
    queue.put(pool.same("$x+1$", "$1+x$").same)
    pool.close()


def test_a_forked_process_gets_workers_of_its_own(pool):
    assert pool.same("$x+1$", "$1+x$").same
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=in_fork, args=(pool, queue))
    process.start()
    assert queue.get(timeout=60)
    process.join(timeout=60)
    assert pool.same("$x+2$", "$2+x$").same, "the parent's workers are still its own"


def test_closing_ends_the_processes():
    pool = SymbolicPool(workers=1)
    pool.same("$x$", "$x$")
    worker = idle_worker(pool)
    pool.close()
    assert worker.process.poll() is not None
    assert pool.same("$x+1$", "$1+x$").same, "and it can be used again"
    pool.close()


PIECES = [
    "\\boxed{",
    "}",
    "{",
    "8",
    "^",
    "\\frac",
    "$",
    "\\sqrt",
    "\0",
    "\u202e",
    "x",
    "=",
    ",",
    " ",
    "10^{99}",
    "\\text{",
    "!",
    "\n",
    "%",
    "-",
    "/",
]


@given(st.lists(st.sampled_from(PIECES), max_size=30))
@settings(max_examples=60, deadline=None)
def test_no_text_crashes_the_checker_or_scores_by_accident(pieces):
    text = "".join(pieces)
    for kind, gold in (("latex", "7123"), ("numeric", "7123"), ("choice", "C"), ("text", "seven")):
        for mode in ("strict", "flexible"):
            assert not check(Problem("", gold, kind=kind), text, mode)[1].right


def test_the_shared_pool_is_one():
    assert shared_pool() is shared_pool()
