"""The charts of a report: what one run logged, or the same metric of several runs."""

from __future__ import annotations

from typing import Any

from rsim.reporting.charts import Series, area_chart, colour, line_chart

Records = list[dict[str, Any]]  # the lines of metrics.jsonl

_ENDINGS = ("terminated", "forced", "truncated", "reasoner_ended")


def _both(metric: str) -> dict[str, str]:
    """A metric of each agent."""
    return {f"{agent}/{metric}": agent for agent in ("planner", "reasoner")}


# (title, {metric: label}, unit) of every line chart; metrics that a run did not log are left out.
_CHARTS: list[tuple[str, dict[str, str], str]] = [
    ("Return of each agent", _both("return"), "return"),
    ("Entropy", _both("entropy"), "nats per action"),
    ("Lambda", {"lambda": "lambda"}, "lambda"),
    ("Tokens per episode", {"length/sampled": "sampled", "length/injected": "injected"}, "tokens"),
    ("Steps per episode", {"length/steps": "steps"}, "steps"),
    ("How episodes end", {f"flags/{flag}": flag.replace("_", " ") for flag in _ENDINGS}, "share of episodes"),
    ("Trainer / sampler ratio", _both("ratio"), "ratio"),
    ("Clip fraction", _both("clip_fraction"), "share of actions"),
    ("Groups of like returns", _both("alike_groups"), "groups"),
    ("Skipped groups", _both("skipped_groups"), "groups"),
    ("Gradient norm before clipping", _both("grad_norm"), "norm"),
    ("Speed", {"tokens_per_second": "sampled tokens"}, "tokens per second"),
]


def charts_section(runs: dict[str, Records]) -> str:
    """The charts of the runs that trained, by name; of several, a chart for each metric with a line for each run."""
    steps = {name: [r for r in records if "accuracy" in r] for name, records in runs.items()}
    steps = {name: records for name, records in steps.items() if records}
    if not steps:
        return ""
    held_out = {name: [r for r in runs[name] if "eval/accuracy" in r] for name in steps}
    (charts, marks) = ([], []) if len(steps) > 1 else _alone(*steps.values(), *held_out.values())
    if len(steps) > 1:
        lines = [_greedy(name, held_out[name], i) for i, name in enumerate(steps)]
        charts.append(line_chart("Accuracy: greedy, held-out questions", lines, [], "share of questions"))
        charts.append(_compared("Accuracy: sampled, training questions", "accuracy", "share of episodes", steps))
    logged = dict.fromkeys(key for records in steps.values() for key in records[0] if key.startswith("reward/"))
    parts = {key: key.removeprefix("reward/") for key in logged}  # people's own among them
    for title, metrics, unit in [("Reward parts, batch mean", parts, "reward"), *_CHARTS]:
        if len(steps) > 1:
            label = {metric: f"{title}: {name}" if len(metrics) > 1 else title for metric, name in metrics.items()}
            charts += [_compared(label[metric], metric, unit, steps) for metric in metrics]
            continue
        records = next(iter(steps.values()))
        lines = [_line(name, metric, records, i) for i, (metric, name) in enumerate(metrics.items())]
        charts.append(line_chart(title, lines, marks, unit))
    return f'<h2>Training</h2><div class="charts">{"".join(charts)}</div>'


def _alone(steps: Records, held_out: Records) -> tuple[list[str], list[tuple[float, str]]]:
    """The charts that only a single run has, and where its stages begin."""
    marks: list[tuple[float, str]] = []
    for record in steps:
        if not marks or marks[-1][1] != record["stage"]:
            marks.append((record["step"], record["stage"]))
    greedy = _greedy("greedy, held-out questions", held_out, 1)
    accuracy = [_line("sampled, training questions", "accuracy", steps, 0), greedy]
    return [line_chart("Accuracy", accuracy, marks, "share right"), _usage(steps, marks)], marks


def _line(name: str, metric: str, records: Records, index: int) -> Series:
    return Series(name, [(r["step"], r[metric]) for r in records if metric in r], colour(index))


def _greedy(name: str, held_out: Records, index: int) -> Series:
    band = tuple((r["step"], r["eval/accuracy_low"], r["eval/accuracy_high"]) for r in held_out)
    return Series(name, [(r["step"], r["eval/accuracy"]) for r in held_out], colour(index), band, dots=True)


def _compared(title: str, metric: str, unit: str, runs: dict[str, Records]) -> str:
    lines = [_line(name, metric, records, i) for i, (name, records) in enumerate(runs.items())]
    return line_chart(title, lines, [], unit)


def _usage(steps: Records, marks: list[tuple[float, str]]) -> str:
    names = [key.removeprefix("strategy/") for key in steps[0] if key.startswith("strategy/")]
    rows = [(float(r["step"]), [r[f"strategy/{name}"] for name in names]) for r in steps] if names else []
    return area_chart("Strategy usage", names, rows, marks)
