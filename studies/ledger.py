"""The ledger of measurements: ``results/<topic>.json``, and its pages: ``docs/results.md``, and what was superseded.

A row is written by the study that measured it, never by hand, and a missed target stays in as ``"met": false``.

    python -m studies.ledger        make both from results/*.json
"""

from __future__ import annotations

import ast
import fcntl
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

from rsim.runs.folder import git_commit

RESULTS, PAGE, PAST = Path("results"), Path("docs/results.md"), Path("docs/results/superseded.md")  # of the working directory
FLAGS = ("--record", "--supersede")  # of the runner: where rows go, not what is measured
Value = float | int | str | None


def _command() -> str:
    """What was typed, without where its rows go."""
    return f"python -m studies {shlex.join(a for a in sys.argv[1:] if a not in FLAGS)}".strip()


def _whole(command: str) -> str:
    """The command without ``--only PART``: a part of a study measures what the whole does.

    >>> _whole("python -m studies checking --only gold --seed 1")
    'python -m studies checking --seed 1'
    """
    return re.sub(r" --only \S+", "", command)


@cache
def _machine() -> str:
    import torch  # reading the ledger needs none

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return f"{os.cpu_count()} cores, {platform.machine()}, {memory} GiB, {gpu}"


@cache
def _commit() -> str:
    return git_commit()[:12]


@dataclass(frozen=True)
class Row:
    """One measurement. ``met`` is None where there is no goal; ``interval`` is a 95% interval in the value's unit.

    A row is superseded when its question was asked again with other settings: it stays, and is no longer what is claimed.
    """

    what: str
    value: Value
    unit: str = ""
    goal: str = ""
    met: bool | None = None
    command: str = field(default_factory=_command)
    seeds: list[int] = field(default_factory=list)
    interval: list[float] | None = None
    machine: str = field(default_factory=_machine)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))
    commit: str = field(default_factory=_commit)
    superseded: bool = False

    @property
    def shown(self) -> str:
        """The value with its unit."""
        if self.unit == "share" and isinstance(self.value, int | float):
            return f"{self.value:.1%}"
        return (
            f"{self.value:g} {self.unit}".strip()
            if isinstance(self.value, int | float)
            else f"{self.value} {self.unit}".strip()
        )

    @property
    def verdict(self) -> str:
        return "superseded" if self.superseded else "" if self.met is None else "yes" if self.met else "**no**"

    @property
    def source(self) -> str:
        """What measured it."""
        seeds = f"; seeds {', '.join(map(str, self.seeds))}" if self.seeds else ""
        return f"`{self.command}`: {self.date}, commit {self.commit}{seeds}; {self.machine}"

    @property
    def between(self) -> str:
        if self.interval is None:
            return ""
        low, high = self.interval
        return f"{low:.1%} to {high:.1%}" if self.unit == "share" else f"{low:g} to {high:g}"


def record(topic: str, issue: int, rows: Sequence[Row], root: Path = Path(), changed: bool = False) -> None:
    """Puts ``rows`` into the topic's ledger, under ``root``.

    An older row of the same name is replaced if the same command, or a part of it, measured it on the same seeds; else, or
    where settings inside the study were ``changed`` since, it stays, superseded.
    """
    folder = root / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    file, new = folder / f"{topic}.json", {row.what: row for row in rows}
    with _alone(folder):  # measurements may run side by side
        kept = []
        for old in read(file) if file.is_file() else []:
            latest = new.get(old.what)
            if latest is None or old.superseded:
                kept.append(old)
            elif changed or (_whole(old.command), old.seeds) != (_whole(latest.command), latest.seeds):
                kept.append(replace(old, superseded=True))
        ledger = {"issue": issue, "rows": [asdict(row) for row in (*kept, *rows)]}
        file.write_text(json.dumps(ledger, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def retire(topic: str, measured: set[str], root: Path = Path()) -> None:
    """After a command: rows that it, or a part of it (``--only``), once measured and does no more are superseded.

    Args:
        measured: the names of the rows that it has now.
    """
    folder = root / RESULTS
    file, command = folder / f"{topic}.json", _command()
    with _alone(folder):
        ledger = json.loads(file.read_text(encoding="utf-8"))
        for row in ledger["rows"]:
            own = command in (row["command"], _whole(row["command"]))
            row["superseded"] |= own and row["what"] not in measured
        file.write_text(json.dumps(ledger, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def supersede(topics: Sequence[str], root: Path = Path()) -> None:
    """All rows of some topics: what they measured is another thing now (a lab that was replaced). Of ``TOPIC:BEGINNING``
    those whose names begin so: nothing measures them any more.

    Raises:
        FileNotFoundError: there is no such ledger.
    """
    for given in topics:
        topic, _, beginning = given.partition(":")
        file = root / RESULTS / f"{topic}.json"
        with _alone(file.parent):
            ledger = json.loads(file.read_text(encoding="utf-8"))
            for row in ledger["rows"]:
                row["superseded"] |= row["what"].startswith(beginning)
            file.write_text(json.dumps(ledger, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(file: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is in here with this folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def titles() -> dict[str, str]:
    """Every study, a module of this package with a function ``run``, and the first line of what it says of itself."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or "").splitlines()[0]
    return found


_LEAD = """# Results

Every measurement that counts, made from `results/*.json` by `make results`. A study writes its rows itself (`python -m studies
NAME --record`); a missed goal stays. *Issue* is the number of the piece of work, in this project's history, that a study was
made for; *measured by* points to the command, date, commit, seeds and machine below each table. What was measured before with
other settings is kept apart: [superseded](results/superseded.md)."""

_PAST = """# Superseded

Measurements that are kept and no longer claimed: with settings that were changed later, when the result was known, or on a lab
that was replaced since, or of something that is measured no more. What counts: [results](../results.md)."""

_GONE = "Measured no more: the study was deleted with what it measured."


def pages(root: Path = Path()) -> dict[Path, str]:
    """All ledgers under ``root`` as Markdown, a section for each topic: the rows that count, and the superseded ones."""
    now, past, said = [_LEAD], [_PAST], titles()
    for file in sorted((root / RESULTS).glob("*.json")):
        topic, issue, rows = file.stem, json.loads(file.read_text(encoding="utf-8"))["issue"], read(file)
        head = f"{said.get(topic, _GONE)} (Issue {issue}.)"
        written = (root / f"docs/results/{topic}.md").is_file()
        more = f" Tables, figures and limits: [{topic}](results/{topic}.md)." if written else ""
        for parts, shown, about in (
            (now, [row for row in rows if not row.superseded], head + more),
            (past, [row for row in rows if row.superseded], head),
        ):
            if shown:
                parts += [f"## {topic}", about, *table(shown)]
    return {PAGE: "\n\n".join(now) + "\n", PAST: "\n\n".join(past) + "\n"}


def table(rows: list[Row]) -> tuple[str, str]:
    """The rows as a table, and numbered, what measured them."""
    lines = ["| what | value | 95% interval | goal | met | measured by |", "|---|---:|---:|---|---|---:|"]
    sources: dict[str, int] = {}
    for row in rows:
        number = sources.setdefault(row.source, len(sources) + 1)
        cells = (row.what, row.shown, row.between, row.goal, row.verdict, str(number))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines), "\n".join(f"{number}. {source}" for source, number in sources.items())


def write_pages(root: Path = Path()) -> None:
    for file, text in pages(root).items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":  # with names of topics: their rows are superseded first
    supersede(sys.argv[1:])
    write_pages()
    print(f"wrote {PAGE} and {PAST}")
