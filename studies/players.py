"""One planner, one reasoner, the same lab questions, greedy: every way to play must give the same answers, step by step."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx

from rsim.data.load import load_problems
from rsim.evaluation.loading import EvalSettings
from rsim.evaluation.saved import evaluate_into
from rsim.evaluation.upstream import ServedModel
from rsim.game.problem import Problem
from rsim.policies.loading import load_reasoner
from rsim.policies.planner import Planner
from rsim.serving.card import hub_folder
from studies.ledger import Row
from studies.servers import free_port, rsim_server, served
from studies.workload import SHORT, trained, training

ISSUE = 9


@dataclass(frozen=True)
class Answer:
    steps: list[tuple[str, str, bool]]  # strategy, text, forced
    sampled_tokens: int


def run(questions: int = 200, seed: int = 0, steps: int = 4) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / "run"
        trained(training("nano", (*SHORT, f"seed={seed}", f"train.steps={steps}", f'out="{here}"')))
        return rows(here, Path(folder), load_problems("lab", "test", limit=questions, seed=seed), seed)


def rows(nano: Path, folder: Path, problems: list[Problem], seed: int) -> list[Row]:
    reasoner, planner = (nano / "checkpoints" / "final" / part for part in ("reasoner", "planner"))
    pushed = hub_folder(str(nano), folder / "pushed", repo="me/planner", licence="apache-2.0")
    expected = evaluated(nano, folder / "eval", len(problems), seed)
    played = {"wrap": wrapped(planner, reasoner, problems), "wrap, pushed planner": wrapped(pushed, reasoner, problems)}
    port, behind = free_port(), free_port()
    url, proxy = (f"http://127.0.0.1:{number}/v1" for number in (port, behind))
    with served(rsim_server(port, str(planner), "--model", str(reasoner)), port):
        played["serve --model"] = asked(url, "reasoner-rsim", problems)
        there = ServedModel(url, "reasoner")
        played["eval --upstream"] = evaluated(nano, folder / "upstream", len(problems), seed, there)
        with served(rsim_server(behind, str(pushed), "--upstream", url), behind):
            played["serve --upstream, pushed planner"] = asked(proxy, "reasoner-rsim", problems)
    found = []
    for name, answers in played.items():
        alike = sum(a == b for a, b in zip(answers, expected, strict=True))
        what = f"{name}: answers with the steps and token counts of rsim eval, of {len(problems)}"
        found.append(Row(what, alike, goal=f"{len(problems)}", met=alike == len(problems), seeds=[seed]))
    return found


def evaluated(run: Path, out: Path, count: int, seed: int, served: ServedModel | None = None) -> list[Answer]:
    evaluate_into(out, EvalSettings(str(run), data="lab", limit=count, seed=seed), served=served)
    records = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    return [Answer([_step(s) for s in r["steps"]], r["sampled_tokens"]) for r in records]


def wrapped(planner: Path, reasoner: Path, problems: list[Problem]) -> list[Answer]:
    loaded = load_reasoner(str(reasoner))
    with Planner.from_pretrained(planner).wrap(loaded.model, loaded.tokenizer) as planned:
        answers = planned.generate([p.question for p in problems])
    return [Answer([_step(s) for s in a.steps], a.usage.completion_tokens) for a in answers]


def asked(url: str, model: str, problems: list[Problem]) -> list[Answer]:
    with httpx.Client(base_url=url, timeout=600) as client:
        bodies = [{"model": model, "temperature": 0, "messages": [{"role": "user", "content": p.question}]} for p in problems]
        replies = [client.post("/chat/completions", json=body).raise_for_status().json() for body in bodies]
    return [Answer([_step(s) for s in r["rsim"]["choices"][0]["steps"]], r["usage"]["completion_tokens"]) for r in replies]


def _step(step: dict[str, object]) -> tuple[str, str, bool]:
    return str(step["strategy"]), str(step["text"]), bool(step["forced"])
