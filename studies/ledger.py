"""The ledger of measurements: ``results/<topic>.json``, one page each in ``docs/results/``, and ``make results``.

A row is written by the command that measured it, never by hand, and a missed target stays in as ``"met": false``.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rsim.runs.folder import git_commit

_COMMIT = git_commit()[:12]  # of the code that this process runs
RESULTS, PAGES = Path("results"), Path("docs/results")  # of the working directory


def row(
    what: str, value: Any, *, unit: str = "", goal: str = "", met: bool | None = None, seeds: list[int] | None = None,
    interval: tuple[float, float] | None = None, command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """One measurement; ``met`` is None where there is no target. Machine, date and commit are filled in, and the command line
    where none is given."""
    module = (sys.modules["__main__"].__spec__ or sys.modules[__name__].__spec__).name.removesuffix(".__main__")  # type: ignore[union-attr]
    return {
        "what": what,
        "value": value,
        "unit": unit,
        "goal": goal,
        "met": met,
        "command": command or f"python -m {module} {shlex.join(sys.argv[1:])}".strip(),
        "seeds": seeds or [],
        "interval": list(interval) if interval else None,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {_memory_gib()} GiB, {_gpu()}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": _COMMIT,
    }


def record(
    topic: str,
    issue: int,
    title: str,
    rows: list[dict[str, Any]],
    lead: Callable[[list[dict[str, Any]]], list[str]] | None = None,
) -> None:
    """Puts ``rows`` into the topic's ledger, in place of older rows of the same name, and rewrites its page.

    ``lead`` makes the lines that come before the page's table, from all rows.
    """
    path = RESULTS / f"{topic}.json"
    RESULTS.mkdir(exist_ok=True)
    with _alone(RESULTS):  # measurements may run side by side
        old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
        new = {r["what"] for r in rows}
        ledger = write(topic, issue, title, [r for r in old if r["what"] not in new] + rows)
        PAGES.mkdir(parents=True, exist_ok=True)
        before = lead(ledger["rows"]) if lead else []
        page = "\n".join([f"# {ledger['title']}", "", *before, *table(topic, ledger["rows"])])
        (PAGES / f"{topic}.md").write_text(page, encoding="utf-8")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is in here with this folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write(topic: str, issue: int, title: str, rows: list[dict[str, Any]], root: Path = Path()) -> dict[str, Any]:
    """The topic's ledger with these rows and no others, under ``root``."""
    (root / RESULTS).mkdir(parents=True, exist_ok=True)
    ledger = {"issue": issue, "title": title, "rows": rows}
    (root / RESULTS / f"{topic}.json").write_text(json.dumps(ledger, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return ledger


def table(topic: str, rows: list[dict[str, Any]]) -> list[str]:
    """The rows as lines of Markdown, and under them, numbered, what measured them."""
    lines = ["| what | value | 95% interval | goal | met | measured by |", "|---|---:|---:|---|---|---:|"]
    sources: dict[str, int] = {}
    for r in rows:
        number = sources.setdefault(_source(r), len(sources) + 1)
        cells = [r["what"], _value(r), _interval(r), r["goal"], _met(r), str(number)]
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return [*lines, "", *(f"{n}. {source}" for source, n in sources.items()), "", f"Made from `results/{topic}.json`.", ""]


def _source(r: dict[str, Any]) -> str:
    seeds = f"; seeds {', '.join(map(str, r['seeds']))}" if r["seeds"] else ""
    return f"`{r['command']}`: {r['date']}, commit {r['commit']}{seeds}; {r['machine']}"


def _value(r: dict[str, Any]) -> str:
    if r["unit"] == "share":
        return f"{r['value']:.1%}"
    return f"{r['value']:g} {r['unit']}".strip() if isinstance(r["value"], int | float) else f"{r['value']} {r['unit']}".strip()


def _interval(r: dict[str, Any]) -> str:
    if r["interval"] is None:
        return ""
    low, high = r["interval"]
    return f"{low:.1%} to {high:.1%}" if r["unit"] == "share" else f"{low:g} to {high:g}"


def _met(r: dict[str, Any]) -> str:
    return "" if r["met"] is None else "yes" if r["met"] else "**no**"


def _gpu() -> str:
    import torch  # printing the ledger needs none

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def main() -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    for path in sorted(RESULTS.glob("*.json")):
        ledger = json.loads(path.read_text(encoding="utf-8"))
        shown = Table(title=f"{ledger['title']} (issue {ledger['issue']})", title_justify="left", expand=True)
        shown.add_column("what", ratio=1)
        for name in ("value", "95% interval", "goal", "met", "date", "commit"):
            shown.add_column(name, no_wrap=name in ("date", "commit", "met"))
        for r in ledger["rows"]:
            shown.add_row(r["what"], _value(r), _interval(r), r["goal"], _met(r).strip("*"), r["date"], r["commit"])
        console.print(shown)


if __name__ == "__main__":
    main()
