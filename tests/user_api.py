"""A user's own file: `make lint` and `python -m studies users` check it by mypy --strict, the second against the installed wheel."""

from __future__ import annotations

from pathlib import Path

import rsim


def brief(episode: rsim.Episode) -> float:
    return -episode.sampled_tokens / 100


def enough(record: dict[str, object]) -> bool:
    return record["step"] == 1


def main(out: Path) -> float:
    config: rsim.Config = rsim.load_config("nano", {"train": {"steps": 2}, "out": out})
    rewards = [rsim.Reward(brief, agent="planner", weight=0.5)]
    result = rsim.train(config, rewards=[brief, *rewards], on_step_end=enough, on_evaluate=print, on_save=print)
    summary = rsim.evaluate(out, limit=4, planner="none")
    difference: float = rsim.compare(out / "eval", out / "other").difference
    planner: rsim.Planner = rsim.Planner.from_pretrained(out / "checkpoints/final/planner")
    strategies: rsim.StrategySet = planner.strategies
    rules: rsim.PlayRules | None = planner.rules
    problem = rsim.Problem("1+1=?", "2")
    page: Path = rsim.report(out)
    rsim.push(out, "me/planner", to=out / "hub")
    rsim.fit([out / "log"], out / "fitted", on_state=print)
    tables = rsim.collect("default", "lab", out / "log", limit=4)
    answer = rsim.solve("1+1=?", out, on_step=print)["predicted"]
    print(answer, rsim.check("7", "7"), result, summary, rules, page, tables)
    return difference + len(strategies) + len(problem.question)
