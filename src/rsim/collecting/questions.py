"""Which questions are collected, in which order."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rsim.config import Config
from rsim.data.load import endless, load_problems
from rsim.data.sources import SOURCES
from rsim.errors import UserError
from rsim.game.problem import Problem, generated_split


def questions(data: str, split: str, *, limit: int = 0, exclude: str = "", config: Config) -> list[Problem]:
    """Questions in the order of their ids' hashes, so that a smaller limit's are the first of a larger one's.

    A set that has a test split alone is cut by the same rule as generated questions, by id: 80% train, 10% dev, 10% test.

    Args:
        exclude: a file with the ids, one a line, of questions that are left out (used before).

    Raises:
        UserError: no such data, split or file; two questions have one id.
    """
    if endless(data):
        raise UserError(f"--data {data}", "is made on the spot: a log goes on, so give a known set or a file")
    whole = data in SOURCES and SOURCES[data].splits == ("test",)
    rules = config.data
    problems = load_problems(data, "test" if whole else split, data_dir=rules.data_dir, columns=rules.columns)
    if whole:
        problems = [problem for problem in problems if generated_split(problem.id) == split]
    if exclude and not Path(exclude).is_file():
        raise UserError(f"--exclude {exclude}", "give a file with an id on each line")
    used = set(Path(exclude).read_text(encoding="utf-8-sig").splitlines()) if exclude else set()
    if len({problem.id for problem in problems}) < len(problems):
        raise UserError(f"{data}: two questions have one id", "give each its own")
    problems = [problem for problem in problems if problem.id not in used]
    if not problems:
        raise UserError(f"{data}: no questions of split {split!r}", "give train, dev or test, or exclude fewer")
    problems.sort(key=lambda problem: hashlib.sha256(problem.id.encode()).hexdigest())
    return problems[:limit] if limit else problems
