"""Answers that attack the checker, constants, every reasoning-gym task, reference programs, and fuzz of code and gym.

Needs $RSIM_DATA and reasoning-gym; runs in the repository.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from rsim.answers.extract import plain_text
from rsim.data.load import gym_tasks, load_problems
from rsim.game.problem import Problem
from rsim.rewards.grade import check, grade
from studies.checking import in_parallel
from studies.ledger import Row

ISSUE = 12
Part = Literal["attacks", "tasks", "constants", "code", "fuzz"]
CONSTANTS = ("", "0", "1", "nan", "None", "True", "False", "no", "[]")  # and the question, and its longest line
TASK_SEEDS = [0, 1, 2, 3, 4]


def run(only: Part | None = None, seed: int = 0) -> Iterator[Row]:
    parts: dict[Part, Callable[[int], list[Row]]] = {
        "attacks": attacks,
        "fuzz": fuzz,
        "tasks": tasks,
        "code": code,
        "constants": constants,
    }
    for part in [only] if only else list(parts):
        yield from parts[part](seed)


def attacks(seed: int) -> list[Row]:
    """The answers in ``tests/attacks.json``: how many score right, make a file on the host, or raise."""
    known = json.loads(Path("tests/attacks.json").read_text(encoding="utf-8"))
    coded = Problem("", 'assert decode(encode("abc")) == "abc"\nassert encode("abc") == "bcd"\n', kind="code")
    jobs = [(coded, answer) for answer in known["code"].values()]
    jobs += [(Problem("", "x+1", kind="latex"), answer) for answer in known["math"]]
    gym = {task: load_problems(f"gym:{task}", "dev", limit=1)[0] for task, _ in known["gym"]}
    jobs += [(gym[task], answer) for task, answer in known["gym"]]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = in_parallel([(problem, answer.replace("PATH", f"{folder}/touched")) for problem, answer in jobs], _judge)
        touched = len(list(Path(folder).iterdir()))
    right, raised = outcomes.count("right"), sum(o.startswith("raises") for o in outcomes)
    count = f"{len(jobs)} attacks ({len(known['gym'])} gym, {len(known['math'])} math, {len(known['code'])} code)"
    return [
        Row(f"{count}: scored right", right, goal="0", met=right == 0),
        Row(f"{count}: files made on the host", touched, goal="0", met=touched == 0),
        Row(f"{count}: raised an error", raised, goal="0", met=raised == 0),
    ]


def _judge(job: tuple[Problem, str]) -> str:
    try:
        check(*job)
        return "right" if grade(*job).right else "wrong"
    except Exception as error:  # counted: that is what is measured
        print(f"  raises {type(error).__name__}: {job[1][:80]!r}")
        return f"raises {type(error).__name__}"


def tasks(seed: int) -> list[Row]:
    """Every reasoning-gym task loads at five seeds, and its own gold answers, where it gives any, are accepted."""

    def works(task: str) -> bool:
        problems = [p for s in TASK_SEEDS for p in load_problems(f"gym:{task}", "dev", limit=1, seed=s)]
        refused = [p for p in problems if p.answer and not check(p, f"\\boxed{{{p.answer}}}")[1].right]
        for problem in refused:
            print(f"  refused: {task}: {problem.answer[:80]!r}")
        return not refused

    names = gym_tasks()
    count = sum(in_parallel(names, works))
    what = f"reasoning-gym tasks that load at five seeds and accept their gold answers, of {len(names)}"
    return [Row(what, count, goal="all", met=count == len(names), seeds=TASK_SEEDS)]


def constants(seed: int) -> list[Row]:
    """On 25 problems of every task: constants that are taken although gold is something else.

    Where gold is a number or several answers are right, a constant may be; so what counts is a task in which one constant
    that is not gold is right for more than a fifth of the problems.
    """

    def winners(task: str) -> list[str]:
        problems, found = load_problems(f"gym:{task}", "train", limit=25, seed=seed), []
        for name in (*CONSTANTS, "the question", "its longest line"):
            given = [(p, _constant(name, p)) for p in problems]
            taken = [p for p, a in given if not _is_gold(a, p) and grade(p, a).right]
            if len(taken) > len(problems) / 5:
                print(f"  {task}: {name!r} is right {len(taken)} times of {len(problems)}")
                found.append(name)
        return found

    names = gym_tasks()
    won = sum(bool(found) for found in in_parallel(names, winners))
    what = f"reasoning-gym tasks won by one of {len(CONSTANTS) + 2} constants, of {len(names)}, 25 problems each"
    return [Row(what, won, goal="0", met=won == 0, seeds=[seed])]


def _constant(name: str, problem: Problem) -> str:
    lines = {"the question": problem.question, "its longest line": max(problem.question.splitlines(), key=len)}
    return lines.get(name, name)


def _is_gold(answer: str, problem: Problem) -> bool:
    try:
        return float(answer) == float(problem.answer)
    except ValueError:
        return plain_text(answer) == plain_text(problem.answer)


def code(seed: int) -> list[Row]:
    """Reference programs must pass; the same task with an empty program must fail."""
    rows = []
    for name, splits in (("humaneval", ("test",)), ("mbpp", ("train", "dev", "test"))):
        problems = [p for split in splits for p in load_problems(name, split)]
        references = [(p, p.meta.get("prefix", "") + p.meta["reference"]) for p in problems]
        empty = [(p, f"{p.meta['prefix']}    pass\n" if "prefix" in p.meta else "pass\n") for p in problems]
        passed, nothing = (in_parallel(jobs, _judge).count("right") for jobs in (references, empty))
        what = f"{name}: reference programs that pass of {len(problems)}"
        rows.append(Row(what, passed, goal="all", met=passed == len(problems)))
        rows.append(Row(f"{name}: empty programs that pass of {len(problems)}", nothing, goal="0", met=nothing == 0))
    return rows


_PIECES = """```python ``` ```Python3 def f( ): return 1 import os yield lambda [ ] { } ( ' " \\ # é \\boxed{ } None True nan
9**9 1e999 __import__ eval [[0]] 0 -1 , = == : class raise while 1:pass Symbol x**2"""


def fuzz(seed: int) -> list[Row]:
    """Texts of random pieces, judged as answers of kinds code (each in its sandboxes) and gym: how many raise, how many win."""
    rng = random.Random(seed)
    coded = Problem("", "assert f(1) == 'never'", kind="code")
    gym = [load_problems(f"gym:{task}", "dev", limit=1)[0] for task in gym_tasks()]
    count = {"code": 1000, "gym": 4000}
    pieces = [*_PIECES.split(), "\n", "\t", "\0", "\udcff", "\u202e"]
    jobs = []
    for kind, times in count.items():
        for n in range(times):
            text = rng.choice(("", " ")).join(rng.choices(pieces, k=rng.randint(1, 30)))
            jobs.append((coded if kind == "code" else gym[n % len(gym)], text))
    outcomes = in_parallel(jobs, _judge)
    raised, right = sum(o.startswith("raises") for o in outcomes), outcomes.count("right")
    what = f"{len(jobs)} fuzzed answers ({count['code']} code, {count['gym']} gym)"
    return [
        Row(f"{what}: raised an error", raised, goal="0", met=raised == 0, seeds=[seed]),
        Row(f"{what}: scored right", right, seeds=[seed]),
    ]
