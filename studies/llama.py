"""llama.cpp's server as the sampling engine: rates of one single-thread server, by the seconds of its core's time.

*server*: prompt tokens read and tokens sampled, and what a further arm of a question reads. *group*: what eight episodes of one
question read, with and without copies of slots. *episodes*: planned episodes of eight steps, greedy, against the native engine
with one thread, on the same weights (there in float32); the two in turn.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import psutil
import torch
import typer

from rsim.config import RolloutConfig
from rsim.data.load import load_problems
from rsim.engine.llama import LlamaServer, LlamaServers, sampling
from rsim.engine.llama_process import llama_servers
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.models.weights import package_file
from rsim.policies.loading import load_reasoner
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import sequence_planner
from rsim.policies.strategies import load_strategies
from studies.ledger import Row

ISSUE = 11
_OPENINGS = ("", "Let's think step by step.", "The answer is", "```python\n", "First, split the problem into parts.")
_STEPS = ["sub-planning", *["decomposition", "validation"] * 3, "termination"]
_GROUP = 8


def run(
    model: str = "qwen2.5-coder-1.5b",
    core: int = 1,
    slots: Annotated[list[int] | None, typer.Option(help="May be repeated; default: 8, 32, 64.")] = None,
    tokens: int = 64,
    step_tokens: int = 32,
    rounds: int = 2,
    data: str = "gsm8k",
    only: Literal["", "server", "group", "episodes"] = "",
) -> Iterator[Row]:
    questions = load_problems(data, "train", limit=64)
    if only in ("", "server"):
        yield from _server(model, core, slots or [8, 32, 64], tokens, questions)
    if only in ("", "group"):
        yield from _group(model, core, step_tokens, questions)
    if only in ("", "episodes"):
        yield from _episodes(model, core, [n for n in slots or [8, 32] if n <= 32], step_tokens, rounds, questions)


@contextmanager
def _started(model: str, core: int, slots: int, *more: str, context: int = 2048) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with llama_servers(package_file(model), log, slots=slots, context=context, cores=(core,), more=more) as url:
            yield url


def _game(reasoner: Reasoner, slots: int, step_tokens: int, url: str = "") -> Game:
    """Eight planned steps of each episode; over a server where there is a ``url``."""
    planner = sequence_planner(load_strategies("default"), _STEPS)
    own = RolloutConfig(max_steps=len(_STEPS), step_tokens=step_tokens, max_tokens=1024, answer_tokens=step_tokens, batch=slots)
    return Game(reasoner, planner, replace(own, engine="llama", llama_url=url, llama_timeout=7200) if url else own)


def _group(model: str, core: int, step_tokens: int, questions: list[Problem]) -> Iterator[Row]:
    reasoner, read = load_reasoner(model, weights=False), {}
    with _started(model, core, _GROUP, "--metrics", context=4096) as url:
        for number, copies in enumerate((False, True)):
            game = _game(reasoner, _GROUP, step_tokens, url)
            assert isinstance(game.servers, LlamaServers)
            game.servers.servers[0].copies = copies
            before = _read(url)
            episodes = game.play(questions[number : number + 1], seed=0, group_size=_GROUP)
            injected = sum(len(e.token_ids) - e.prompt_length - e.sampled_tokens for e in episodes)
            read[copies] = (_read(url) - before - injected) / episodes[0].prompt_length
    yield Row(
        f"{_GROUP} episodes of a question side by side: times that it is read",
        round(read[True], 1),
        goal="1",
        met=read[True] < 2,
    )
    yield Row(f"{_GROUP} episodes of a question side by side: times that it is read, without copies", round(read[False], 1))


def _read(url: str) -> float:
    """Prompt tokens that the server has read so far."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("llamacpp:prompt_tokens_total")))


def _episodes(
    model: str, core: int, counts: list[int], step_tokens: int, rounds: int, questions: list[Problem]
) -> Iterator[Row]:
    torch.set_num_threads(1)
    reasoner = load_reasoner(model)
    for count in counts:
        with _started(model, core, count) as url:
            rates: dict[str, list[float]] = {"native": [], "llama": []}
            for number in range(rounds):
                for engine, kept in rates.items():
                    game = _game(reasoner, count, step_tokens, url if engine == "llama" else "")
                    began = time.perf_counter()
                    episodes = game.play(questions[number * count % 64 :][:count], seed=0, greedy=True)
                    kept.append(sum(e.sampled_tokens for e in episodes) / (time.perf_counter() - began))
        ratio = statistics.median(b / a for a, b in zip(*rates.values(), strict=True))
        what = f"{model}, {count} planned episodes of {len(_STEPS)} steps"
        yield Row(f"{what}: llama.cpp's tokens/s over the native engine's", round(ratio, 2), "x")
        for engine, kept in rates.items():
            yield Row(f"{what}: {engine}", round(statistics.median(kept), 1), "tokens/s of a core")


def _server(model: str, core: int, counts: list[int], tokens: int, questions: list[Problem]) -> Iterator[Row]:
    reasoner = load_reasoner(model, weights=False)
    prompts = [reasoner.prompt_ids(problem.question) for problem in questions]
    greedy = sampling(0.0, logprobs=False)
    for count in counts:
        with _started(model, core, count, context=1024) as url:
            server = LlamaServer(url, 3600)
            seconds, replies = _together(server, prompts[:count], n_predict=1, **greedy)
            read = sum(reply["timings"]["prompt_n"] for reply in replies) / seconds
            seconds, replies = _together(server, prompts[:count], n_predict=tokens, ignore_eos=True, **greedy)
            sampled = sum(len(reply["tokens"]) for reply in replies) / seconds
            arms = [prompts[0] + reasoner.injected_ids(opening) for opening in _OPENINGS]
            times = [server.complete(ids, 0, n_predict=8, **greedy)["timings"] for ids in arms]
        again = max(t["prompt_n"] for t in times[1:])
        yield Row(f"{model}, {count} slots: prompt tokens read", round(read, 1), "tokens/s of a core")
        yield Row(f"{model}, {count} slots: tokens sampled", round(sampled, 1), "tokens/s of a core")
        yield Row(f"{count} slots: most tokens that a further arm of a question reads", again, f"of {len(prompts[0])}")


def _together(server: LlamaServer, prompts: list[list[int]], **settings: Any) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the server's CPU time, and the replies to one request in each slot."""
    began = _cpu_seconds()
    with ThreadPoolExecutor(len(prompts)) as threads:
        replies = list(threads.map(lambda i: server.complete(prompts[i], i, stop=[], seed=i, **settings), range(len(prompts))))
    return _cpu_seconds() - began, replies


def _cpu_seconds() -> float:
    """Of the processes below this one."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return float(sum(t.user + t.system for t in times))
