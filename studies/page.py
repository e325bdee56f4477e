"""One page of ``docs/results/`` for each experiment: what was done, tables, figures, targets, and what it does not show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsim.report.charts import COLOURS
from studies import ledger
from studies.stats import Estimate, estimate
from studies.workbench import Measured, Workbench

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "rsim", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
                     "axes.spines.right": False, "axes.prop_cycle": cycler(color=COLOURS)})  # fmt: skip


class Page:
    """Collects the page's parts; `publish` writes page, figures and ledger."""

    def __init__(self, name: str, title: str, bench: Workbench, *, issue: int = 4) -> None:
        self.name, self.title, self.bench, self.issue = name, title, bench, issue
        changes = "".join(f" --set {change}" for change in bench.changes)
        self.command = f"python -m studies {name} --seeds {len(bench.seeds)} --questions {bench.questions}{changes}"
        self.parts: list[str] = []
        self.figures: dict[str, Figure] = {}
        self.rows: list[dict[str, Any]] = []

    def text(self, paragraph: str) -> None:
        self.parts.append(paragraph)

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        self.parts.append("\n".join("| " + " | ".join(cells) + " |" for cells in lines))

    def arms(self, arms: dict[str, list[Measured]]) -> None:
        """A row for each arm: accuracy over its seeds, and what a question costs."""
        rows = []
        for name, measured in arms.items():
            e = estimate(measured)
            tokens, planner, flops = (
                sum(m.summary[key] for m in measured) / len(measured)
                for key in ("tokens_per_question", "planner_tokens", "tflops")
            )
            rows.append([name, percent(e.mean), interval(e), each(e), f"{tokens:.0f}", f"{planner:.0f}", f"{1e3 * flops:.2f}"])
        header = ["", "accuracy", "95% interval", "each seed", "tokens / question", "planner tokens", "GFLOPs / question"]
        self.table(header, rows)

    def measured(self, what: str, e: Estimate, *, goal: str = "", met: bool | None = None) -> None:
        """A row of the ledger."""
        seeds = list(self.bench.seeds[: len(e.seeds)])
        self.rows.append(ledger.row(what, e.mean, unit="share", goal=goal, met=met, seeds=seeds, interval=(e.low, e.high),
                                    command=self.command))  # fmt: skip

    def value(self, what: str, value: Any, *, unit: str = "", goal: str = "", met: bool | None = None) -> None:
        self.rows.append(ledger.row(what, value, unit=unit, goal=goal, met=met, seeds=list(self.bench.seeds),
                                    command=self.command))  # fmt: skip

    def figure(self, name: str, caption: str, columns: int = 1, width: float = 6.4, height: float = 3.2) -> list[Axes]:
        """New axes, side by side, under ``name`` and ``caption``."""
        figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
        self.figures[name] = figure
        self.parts.append(f"![{caption}](figures/{self.name}-{name}.svg)\n\n*{caption}*")
        return list(axes[0])

    def publish(self, root: Path, limits: str) -> Path:
        """Writes ``results/NAME.json``, ``docs/results/NAME.md`` and its figures under ``root``."""
        pages = root / ledger.PAGES
        (pages / "figures").mkdir(parents=True, exist_ok=True)
        for name, figure in self.figures.items():
            figure.savefig(pages / "figures" / f"{self.name}-{name}.svg", metadata={"Date": None})
            pyplot.close(figure)
        ledger.write(self.name, self.issue, self.title, self.rows, root)
        seeds = ", ".join(map(str, self.bench.seeds))
        made = f"Made by `{self.command}` (seeds {seeds}; intervals resample seeds and questions)."
        parts = [f"# {self.title}", made, *self.parts]
        aims = [row for row in self.rows if row["goal"]]
        if aims:
            parts += ["## Targets", "\n".join(ledger.table(self.name, aims))]
        parts += [f"## What this does not show\n\n{limits}", f"Every number: `results/{self.name}.json`."]
        target = pages / f"{self.name}.md"
        target.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
        return target


def bars(axes: Axes, xs: list[float], found: list[Estimate], width: float, label: str) -> None:
    """Bars in percent, with their intervals."""
    errors = [[100 * (e.mean - e.low) for e in found], [100 * (e.high - e.mean) for e in found]]
    axes.bar(xs, [100 * e.mean for e in found], width, yerr=errors, label=label, error_kw={"lw": 0.8})


def percent(value: float) -> str:
    return f"{value:.1%}"


def points(e: Estimate) -> str:
    return f"{100 * e.mean:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]"


def interval(e: Estimate) -> str:
    return f"{e.low:.1%} to {e.high:.1%}"


def each(e: Estimate) -> str:
    return ", ".join(f"{value:.1%}" for value in e.seeds)
