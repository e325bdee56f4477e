"""``rsim data list | show | validate | fetch``."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Annotated, Any

import typer

from rsim.cli.options import DataDir, Json, tell
from rsim.data.leaks import question_hash, shared_questions
from rsim.data.load import endless, gym_tasks, load_problems, raw_splits
from rsim.data.origins import fetch_lines
from rsim.data.sources import SOURCES
from rsim.errors import UserError, did_you_mean

command = typer.Typer(no_args_is_help=True)


@command.command(name="list")
def list_sets(
    gym: Annotated[bool, typer.Option("--gym", help="Name the tasks of reasoning-gym instead.")] = False, as_json: Json = False
) -> None:
    """Name the data sets that can be loaded."""
    known = {
        "lab": "the nano lab's own problems, made on the spot; lab:A+B: of these families",
        **{name: f"{source.title} ({', '.join(source.splits)})" for name, source in SOURCES.items()},
        "gym:TASK": "a task of reasoning-gym, made on the spot (rsim data list --gym)",
        "hf:NAME": "a data set of the Hugging Face hub",
        "FILE": ".jsonl, .json, .csv or .parquet with the columns question and answer",
        "85% A, 15% B": "a mixture of the others, by their shares",
    }
    if gym:
        known = {f"gym:{task}": "made on the spot" for task in gym_tasks()}
    tell(known, "\n".join(f"{name:<14} {title}" for name, title in known.items()), as_json)


@command.command()
def show(
    name: Annotated[str, typer.Argument(help="As in rsim data list, or a file.")],
    split: Annotated[str, typer.Option()] = "test",
    limit: Annotated[int, typer.Option(help="Problems to print.", min=0)] = 3,
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Count a data set's problems by kind, level and subject, report leaks between its splits, print a few."""
    generated = endless(name)
    problems = load_problems(name, split, data_dir=data_dir, limit=max(limit, 100) if generated else 0)
    facts: dict[str, Any] = {"name": name, "split": split, "problems": len(problems)}
    facts["kinds"] = dict(Counter(p.kind for p in problems))
    for key, keys in (("level", "levels"), ("subject", "subjects"), ("family", "families")):
        counts = Counter(str(p.meta[key]) for p in problems if key in p.meta)
        if counts:
            facts[keys] = dict(sorted(counts.items()))
    facts["shared_questions"] = _leaks(name, data_dir)
    shown = [{"id": p.id, "question": p.question, "answer": p.answer} for p in problems[:limit]]
    lines = [f"{key}: {value}" for key, value in facts.items()]
    lines += [f"\n[{p['id']}]\n{p['question']}\n=> {p['answer']}" for p in shown]
    tell(facts | {"examples": shown}, "\n".join(lines), as_json)


def _leaks(name: str, data_dir: str) -> dict[str, int]:
    """Questions in common, before the loader separates the splits; MATH-500 is compared with MATH as well."""
    if name not in SOURCES:
        return {}
    splits = raw_splits(name, data_dir)
    if name == "math500":
        splits |= {f"math {split}": problems for split, problems in raw_splits("math", data_dir).items()}
    return {f"{a} / {b}": len(shared_questions(splits[a], splits[b])) for a, b in combinations(splits, 2)}


@command.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A set of rsim data list that is read from files.")],
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Print the lines with which a shell puts a known set where rsim finds it: rsim data fetch NAME | sh."""
    if endless(name) or name.startswith("hf:"):
        raise UserError(name, "needs no fetching: it is made on the spot, or loaded from the hub when it is used")
    if name not in SOURCES:
        raise UserError(f"unknown data set {name!r}", did_you_mean(name, SOURCES))
    lines = fetch_lines(name, data_dir)
    tell({"name": name, "lines": lines}, "\n".join(lines), as_json)


@command.command()
def validate(
    file: Annotated[str, typer.Argument(metavar="FILE")],
    column: Annotated[list[str] | None, typer.Option(metavar="OURS=THEIRS", help="Column map, e.g. question=problem.")] = None,
    as_json: Json = False,
) -> None:
    """Read a file as training would, and say what is in it: kinds, doubled questions, lengths."""
    problems = load_problems(file, "train", columns=tuple(column or ()))
    hashes = Counter(question_hash(p.question) for p in problems)
    facts = {
        "problems": len(problems),
        "kinds": dict(Counter(p.kind for p in problems)),
        "doubled_questions": sum(n - 1 for n in hashes.values()),
        "longest_question": max(len(p.question) for p in problems),
    }
    tell(facts, "\n".join(f"{key.replace('_', ' ')}: {value}" for key, value in facts.items()), as_json)
