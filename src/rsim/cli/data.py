"""``rsim data list | show | validate`` and ``rsim check``."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Annotated, Any, get_args

import typer

from rsim.cli.options import DataDir, Json
from rsim.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Look at data sets and check files.")


@app.command(name="list")
def list_sets(
    gym: Annotated[bool, typer.Option("--gym", help="Name the tasks of reasoning-gym instead.")] = False, as_json: Json = False
) -> None:
    """Name the data sets that can be loaded."""
    from rsim.data.load import gym_tasks
    from rsim.data.sources import SOURCES

    known = {f"gym:{task}": "made on the spot" for task in gym_tasks()} if gym else {
        "lab": "the nano lab's own problems, made on the spot; lab:A+B: of these families",
        **{name: f"{source.title} ({', '.join(source.splits)})" for name, source in SOURCES.items()},
        "gym:TASK": "a task of reasoning-gym, made on the spot (rsim data list --gym)",
        "hf:NAME": "a data set of the Hugging Face hub",
        "FILE": ".jsonl, .csv or .parquet with the columns question and answer",
        "85% A, 15% B": "a mixture of the others, by their shares",
    }  # fmt: skip
    print(json.dumps(known) if as_json else "\n".join(f"{name:<14} {title}" for name, title in known.items()))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="As in rsim data list, or a file.")],
    split: Annotated[str, typer.Option()] = "test",
    limit: Annotated[int, typer.Option(help="Problems to print.", min=0)] = 3,
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Count a data set's problems by kind, level and subject, report leaks between its splits, print a few."""
    from rsim.data.load import endless, load_problems

    generated = endless(name)
    problems = load_problems(name, split, data_dir=data_dir, limit=max(limit, 100) if generated else 0)
    facts: dict[str, Any] = {"name": name, "split": split, "problems": len(problems)}
    facts["kinds"] = dict(Counter(p.kind for p in problems))
    for key in ("level", "subject", "family"):
        counts = Counter(str(p.meta[key]) for p in problems if key in p.meta)
        if counts:
            facts[f"{key}s"] = dict(sorted(counts.items()))
    facts["shared_questions"] = _leaks(name, data_dir)
    shown = [{"id": p.id, "question": p.question, "answer": p.answer} for p in problems[:limit]]
    if as_json:
        print(json.dumps(facts | {"examples": shown}))
        return
    for key, value in facts.items():
        print(f"{key}: {value}")
    for problem in shown:
        print(f"\n[{problem['id']}]\n{problem['question']}\n=> {problem['answer']}")


def _leaks(name: str, data_dir: str) -> dict[str, int]:
    """Questions in common, before the loader separates the splits; MATH-500 is compared with MATH as well."""
    from itertools import combinations

    from rsim.data.leaks import shared_questions
    from rsim.data.load import raw_splits
    from rsim.data.sources import SOURCES

    if name not in SOURCES:
        return {}
    splits = raw_splits(name, data_dir)
    if name == "math500":
        splits |= {f"math {split}": problems for split, problems in raw_splits("math", data_dir).items()}
    return {f"{a} / {b}": len(shared_questions(splits[a], splits[b])) for a, b in combinations(splits, 2)}


@app.command()
def validate(
    file: Annotated[str, typer.Argument(metavar="FILE")],
    column: Annotated[list[str] | None, typer.Option(metavar="OURS=THEIRS", help="Column map, e.g. question=problem.")] = None,
    as_json: Json = False,
) -> None:
    """Read a file as training would, and say what is in it: kinds, doubled questions, lengths."""
    from rsim.data.leaks import question_hash
    from rsim.data.load import load_problems

    problems = load_problems(file, "train", columns=tuple(column or ()))
    hashes = Counter(question_hash(p.question) for p in problems)
    facts = {
        "problems": len(problems),
        "kinds": dict(Counter(p.kind for p in problems)),
        "doubled_questions": sum(n - 1 for n in hashes.values()),
        "longest_question": max(len(p.question) for p in problems),
    }
    print(json.dumps(facts) if as_json else "\n".join(f"{key.replace('_', ' ')}: {value}" for key, value in facts.items()))


def check(
    gold: Annotated[str, typer.Option(help="The right answer; for code, the test program.")],
    answer: Annotated[str, typer.Option(help="A bare answer, or a model's final words.")],
    kind: Annotated[str, typer.Option(help="numeric, latex, choice, text or code.")] = "latex",
    tolerance: Annotated[float, typer.Option(help="Relative error that a number may have.", min=0.0)] = 0.0,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Run code without a sandbox where none can be built.")] = False,
    as_json: Json = False,
) -> None:
    """Judge an answer as rewards and evaluation do: strictly (one box) and flexibly (the last answer)."""
    from typing import cast

    from rsim.game.problem import Kind, Problem
    from rsim.rewards.grade import check as judge_text

    if kind not in get_args(Kind) or kind == "gym":
        raise UserError(f"--kind {kind}", "use numeric, latex, choice, text or code")
    problem = Problem("", gold, kind=cast(Kind, kind), meta={"tolerance": tolerance})
    result = {}
    for mode in ("strict", "flexible"):
        found, verdict = judge_text(problem, answer, "strict" if mode == "strict" else "flexible", unsafe=unsafe)
        result[mode] = {"answer": found} | asdict(verdict)
    if as_json:
        print(json.dumps(result))
        return
    for mode, seen in result.items():
        said = "no answer" if seen["answer"] is None else "right" if seen["right"] else "wrong"
        print(f"{mode:<9} {said:<10} {seen['how']:<9} {seen['failure'] or seen['answer'] or ''}")
