"""From a data set's name, file or generator to a list of problems; splits never overlap.

==========================  ===============================================================================
``lab``, ``lab:A+B``        the nano lab's own problems, made on the spot; of these families alone
``gsm8k``, ``math``, ...    the sets of `rsim.data.sources.SOURCES`, under ``data_dir``
``gym:TASK``                any task of reasoning-gym, made on the spot; ``gym:TASK?max_terms=3`` sets its sizes
``85% lab, 15% gym:TASK``   a mixture of the others, by their shares
``hf:NAME``                 a data set of the Hugging Face hub (needs ``datasets``); ``hf:NAME:SUBSET``
``path.jsonl|json|...``     a file (`rsim.data.files`); it has one split, used for all
==========================  ===============================================================================
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from rsim.data.files import READERS, file_records, hub_records, imported, problems_of
from rsim.data.leaks import separate
from rsim.data.sources import SOURCES
from rsim.errors import UserError, did_you_mean, first_line
from rsim.game.problem import Problem, generated_split
from rsim.lab.problems import SPLITS, ProblemMix, render, sample_problems

_SMALL_SEEDS = {"pool_matrix"}  # seeds NumPy with its own seed, which must be below 2**32
_SHARE = re.compile(r"(?:^|,)\s*(\d+(?:\.\d+)?)%\s+")  # of a mixture, before the source that it is of


def load_problems(
    source: str, split: str, *, data_dir: str = "", limit: int = 0, seed: int = 0, columns: tuple[str, ...] = ()
) -> list[Problem]:
    """Problems of ``source``.

    Args:
        source: see the module's table. A mixture needs a limit.
        split: ``train``, ``dev`` or ``test``.
        data_dir: folder of the data sets; empty: ``$RSIM_DATA``.
        limit: at most so many, drawn with ``seed``; 0: all. Generators have no end and need a limit.
        columns: where a file or hub set names its columns differently, e.g. ``("question=problem", "answer=gold")``.

    Raises:
        UserError: no such data, split or folder; an empty or malformed file.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}", f"use one of {', '.join(SPLITS)}")
    if _SHARE.match(source):
        return _mixture(source, split, data_dir, limit, seed, columns)
    if endless(source):
        if limit < 1:
            raise UserError(
                f"the problems of {source} have no end", "give a number: data.train_size, data.eval_size or --limit"
            )
        if source.startswith("gym:"):
            return _gym(source.removeprefix("gym:"), split, limit, seed)
        return _lab(_mix(source), split, limit, seed)
    if source in SOURCES:
        problems = _known(source, split, data_dir)
    elif source.startswith("hf:"):
        problems = problems_of(hub_records(source.removeprefix("hf:"), split), source, columns)
    elif Path(source).suffix.lower() in READERS:
        problems = problems_of(file_records(Path(source)), source, columns)
    else:
        kinds = f"lab, gym:TASK, hf:NAME, or a file ({', '.join(READERS)})"
        raise UserError(f"unknown data set {source!r}", f"{did_you_mean(source, SOURCES)}; or {kinds}")
    if limit and limit < len(problems):
        chosen = sorted(random.Random(f"limit:{seed}").sample(range(len(problems)), limit))
        problems = [problems[i] for i in chosen]
    return problems


def with_replay(problems: list[Problem], earlier: list[list[Problem]], share: float, seed: int) -> list[Problem]:
    """``problems``, of which ``share`` are replaced by problems of earlier tasks, in equal parts: replay.

    Raises:
        UserError: an earlier task has too few.
    """
    count = round(share * len(problems))
    rng = random.Random(f"replay:{seed}")
    kept = rng.sample(problems, len(problems) - count)
    for number, task in enumerate(earlier):
        part = count // len(earlier) + (number < count % len(earlier))
        if part > len(task):
            raise UserError(f"data.replay_share = {share}", f"an earlier task has {len(task)} problems, {part} are wanted")
        kept += rng.sample(task, part)
    return kept


def _mixture(source: str, split: str, data_dir: str, limit: int, seed: int, columns: tuple[str, ...]) -> list[Problem]:
    """``limit`` problems of several sources, shuffled; the last source has what rounding leaves. ``columns`` are everyone's.

    Raises:
        UserError: shares that are not 100% together, a source with too few problems, sources with a question in common.
    """
    shares, sources = [float(share) for share in _SHARE.split(source)[1::2]], mixed(source)
    if abs(sum(shares) - 100) > 1e-6:
        raise UserError(f"the shares of {source!r} are {sum(shares):g}% together", "make them 100%, e.g. 85% lab, 15% gym:gcd")
    counts = [round(share / 100 * limit) for share in shares[:-1]]
    counts.append(limit - sum(counts))
    if min(counts) < 1:
        remedy = "ask for more: data.train_size, data.eval_size or --limit; each source must have one"
        raise UserError(f"{limit} problems of the mixture {source!r}", remedy)
    problems: list[Problem] = []
    for number, (name, count) in enumerate(zip(sources, counts, strict=True)):
        found = load_problems(name, split, data_dir=data_dir, limit=count, seed=seed, columns=columns)
        if len(found) < count:
            few = f"{name} has {len(found)} problems, and its share of the mixture is {count}"
            raise UserError(few, "give it a smaller share, or ask for fewer problems")
        problems += [replace(p, id=f"{number}:{p.id}") for p in found]
    doubled = len(problems) - len({p.question for p in problems})
    if doubled:
        raise UserError(f"the mixture {source!r} asks {doubled} questions twice", "mix sources that do not overlap")
    random.Random(f"mixture:{seed}").shuffle(problems)
    return problems


def mixed(source: str) -> list[str]:
    """What a mixture is made of; any other source alone.

    >>> mixed("85% lab, 15% gym:gcd"), mixed("lab:story")
    (['lab', 'gym:gcd'], ['lab:story'])
    """
    return [part.strip() for part in _SHARE.split(source)[2::2]] or [source]


def endless(source: str) -> bool:
    """Whether problems are made on the spot, as many as are asked for. A mixture counts as well: it needs a limit too."""
    return source == "lab" or source.startswith(("lab:", "gym:")) or _SHARE.match(source) is not None


# --- generators ---


def _mix(source: str) -> ProblemMix:
    """What ``lab`` or ``lab:A+B`` is made of; families keep their weights to each other."""
    usual = ProblemMix()
    known = usual.families
    chosen = source.removeprefix("lab").removeprefix(":").split("+") if ":" in source else list(usual.families)
    for name in chosen:
        if name not in known:
            raise UserError(f"the lab has no family {name!r}", f"use some of {', '.join(known)}, e.g. lab:story+equation")
    return replace(usual, families={name: weight for name, weight in known.items() if name in chosen})


def _lab(mix: ProblemMix, split: str, limit: int, seed: int) -> list[Problem]:
    """The first ``limit`` different problems of the seed's stream."""
    seen: set[str] = set()

    def fresh() -> Iterator[Any]:
        for problem in sample_problems(split, seed, mix):
            if problem.question not in seen:
                seen.add(problem.question)
                yield problem

    return [
        Problem(p.question, str(p.answer), f"lab-{split}-{seed}-{i}", {"family": p.family, "terms": render(p.terms)})
        for i, p in enumerate(islice(fresh(), limit))
    ]


def gym_tasks() -> list[str]:
    """The names of reasoning-gym's tasks; ``composite`` is none, but a mixture of others."""
    imported("reasoning_gym", "reasoning-gym")
    return sorted(set(importlib.import_module("reasoning_gym.factory").DATASETS) - {"composite"})


def _gym(source: str, split: str, limit: int, seed: int) -> list[Problem]:
    """Different problems of a reasoning-gym task that belong to ``split`` (`generated_split`).

    Entry ``i`` of a task with seed ``s`` is its entry 0 with seed ``s + i``: ours is hashed, so that two share no entries.
    Some tasks give no gold answer, because their verifier accepts any that is right; ``answer`` is empty then. Integrals that
    the library itself could not solve are left out: their gold repeats the question.
    """
    gym = imported("reasoning_gym", "reasoning-gym")
    task, _, options = source.partition("?")
    if task not in gym_tasks():
        raise UserError(f"reasoning-gym has no task {task!r}", "rsim data list --gym names them all")
    found: dict[str, Problem] = {}
    try:
        settings = {name: json.loads(value) for name, value in parse_qsl(options, strict_parsing=True)} if options else {}
        begin = int(hashlib.sha256(f"{task}:{seed}".encode()).hexdigest()[:12], 16)
        begin = begin % 2**31 if task in _SMALL_SEEDS else begin
        entries = gym.create_dataset(task, size=20 * limit + 200, seed=begin, **settings)
        entries[0]  # a wrong type of value is found out here
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"gym:{source}", f"write gym:{task}?NAME=VALUE&NAME=VALUE; {first_line(error)}") from error
    for index, entry in enumerate(entries):
        question = entry["question"]
        unsolved = "Integral(" in str(entry["answer"])
        if generated_split(question) == split and question not in found and not unsolved:
            meta = {"task": task, "entry": entry}
            found[question] = Problem(question, str(entry["answer"] or ""), f"{task}-{seed}-{index}", meta, "gym")
        if len(found) == limit:
            return list(found.values())
    raise UserError(f"gym:{source} gave only {len(found)} different problems for {split}", "ask for fewer")


# --- sets with a reader of their own ---


def _known(name: str, split: str, data_dir: str) -> list[Problem]:
    splits = raw_splits(name, data_dir)
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}", f"use one of {', '.join(splits)}")
    return separate(splits)[split]


def raw_splits(name: str, data_dir: str) -> dict[str, list[Problem]]:
    """A known set as its files have it, before overlaps are taken out."""
    chosen = data_dir or os.environ.get("RSIM_DATA", "")
    if not chosen or not Path(chosen).is_dir():
        raise UserError(
            f"no data folder {chosen}".rstrip(),
            f"set $RSIM_DATA or data.data_dir to the folder that holds {name}'s (rsim data fetch {name})",
        )
    source = SOURCES[name]
    folder = Path(chosen) / source.folder
    try:
        return source.read(folder)
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OSError,
        EOFError,
        SyntaxError,
        zlib.error,
    ) as error:  # another version of the set, or a file that was cut
        raise UserError(f"{folder} is not {name} as it is known here ({type(error).__name__}: {first_line(error)})") from error
