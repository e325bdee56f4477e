"""The page of a study of trainings, ``docs/results/NAME.md``: what was done, tables, figures, and what it does not show."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsim.reporting.charts import COLOURS
from studies.ledger import Row, Value
from studies.stats import Estimate, difference, estimate
from studies.workbench import TEST_SEED, Measured, Workbench

PAGES = Path("docs/results")
_SVG = {"svg.hashsalt": "rsim", "svg.fonttype": "none", "font.size": 9}
_STYLE: Any = _SVG | {"axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": cycler(color=COLOURS)}


@dataclass
class Page:
    """Collects a page's parts, its figures and its rows of the ledger."""

    name: str
    bench: Workbench
    parts: list[str] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def command(self) -> str:
        """What makes this page: jobs and folders change nothing."""
        bench = self.bench
        others = f" --first-seed {bench.seeds[0]}" if bench.seeds[0] else ""
        others += f" --test-seed {bench.test_seed}" if bench.test_seed != TEST_SEED else ""
        changes = "".join(f" --set {change}" for change in bench.changes)
        return f"python -m studies {self.name} --seeds {len(bench.seeds)} --questions {bench.questions}{others}{changes}"

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

    def measured(self, what: str, e: Estimate, goal: str = "", met: bool | None = None) -> None:
        """A row of the ledger, with its interval."""
        seeds, between = list(self.bench.seeds[: len(e.seeds)]), [e.low, e.high]
        self.rows.append(Row(what, e.mean, "share", goal, met, command=self.command, seeds=seeds, interval=between))

    def value(self, what: str, value: Value, unit: str = "", goal: str = "", met: bool | None = None) -> None:
        self.rows.append(Row(what, value, unit, goal, met, command=self.command, seeds=list(self.bench.seeds)))

    def figure(self, name: str, caption: str, columns: int = 1, width: float = 6.4) -> list[Axes]:
        """New axes, side by side, under ``name`` and ``caption``."""
        figure = self.figures[name] = Figure((width, 3.2), layout="constrained")
        with mpl.rc_context(_STYLE):
            axes = figure.subplots(1, columns, squeeze=False)
        self.parts.append(f"![{caption}](figures/{self.name}-{name}.svg)\n\n*{caption}*")
        return list(axes[0])

    def bars(self, caption: str, groups: dict[str, dict[str, list[Measured]]], width: float = 7.2) -> None:
        """A figure of accuracies with their intervals: for each arm a bar of each of ``groups``."""
        axes = self.figure("bars", caption, width=width)[0]
        names = list(next(iter(groups.values())))
        for place, (label, arms) in enumerate(groups.items()):
            xs = [i + 0.8 / len(groups) * (place - (len(groups) - 1) / 2) for i in range(len(names))]
            bars(axes, xs, [estimate(arms[name]) for name in names], 0.72 / len(groups), label)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_ylabel("accuracy, %")
        if len(groups) > 1:
            axes.legend(frameon=False)

    def write(self, title: str, limits: str, root: Path = Path()) -> Path:
        """Writes the page and its figures under ``root``."""
        pages = root / PAGES
        (pages / "figures").mkdir(parents=True, exist_ok=True)
        for name, figure in self.figures.items():
            with mpl.rc_context(_STYLE):
                figure.savefig(pages / "figures" / f"{self.name}-{name}.svg", metadata={"Date": None})
        seeds = ", ".join(map(str, self.bench.seeds))
        made = f"Made by `{self.command}` (seeds {seeds}; intervals resample seeds and questions)."
        end = f"## What this does not show\n\n{limits}", f"Every number, with its goal: [results](../results.md#{self.name})."
        text = "\n\n".join(part.strip() for part in (f"# {title}", made, *self.parts, *end))
        (pages / f"{self.name}.md").write_text(text + "\n", encoding="utf-8")
        return pages / f"{self.name}.md"


def bars(axes: Axes, xs: list[float], found: list[Estimate], width: float, label: str) -> None:
    """Bars in percent, with their intervals."""
    errors = [[100 * (e.mean - e.low) for e in found], [100 * (e.high - e.mean) for e in found]]
    axes.bar(xs, [100 * e.mean for e in found], width, yerr=errors, label=label, error_kw={"lw": 0.8})


def percent(value: float) -> str:
    return f"{value:.1%}"


def points(e: Estimate) -> str:
    return f"{100 * e.mean:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]"


def gain(a: list[Measured], b: list[Measured]) -> str:
    """``a`` minus ``b`` in points, with its interval."""
    return points(difference(a, b))


def interval(e: Estimate) -> str:
    return f"{e.low:.1%} to {e.high:.1%}"


def each(e: Estimate) -> str:
    return ", ".join(f"{value:.1%}" for value in e.seeds)
