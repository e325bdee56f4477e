"""llama.cpp's server as the sampling engine: rates of one single-thread server, by the seconds of its core's time."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from rsim.data.load import load_problems
from rsim.engine.llama import LlamaServer, sampling
from rsim.engine.llama_process import llama_servers
from rsim.models.weights import package_file
from rsim.policies.loading import load_reasoner
from studies.ledger import Row

ISSUE = 11
_OPENINGS = ("", "Let's think step by step.", "The answer is", "```python\n", "First, split the problem into parts.")


def run(
    model: str = "qwen2.5-coder-1.5b",
    core: int = 1,
    slots: Annotated[list[int] | None, typer.Option(help="May be repeated; default: 8, 32, 64.")] = None,
    tokens: int = 64,
) -> list[Row]:
    reasoner, counts = load_reasoner(model, weights=False), slots or [8, 32, 64]
    questions = load_problems("gsm8k", "train", limit=max(counts))
    prompts = [reasoner.prompt_ids(problem.question) for problem in questions]
    greedy, rows = sampling(0.0, logprobs=False), []
    for count in counts:
        with (
            tempfile.TemporaryDirectory() as folder,
            llama_servers(package_file(model), Path(folder) / "log", slots=count, context=1024, cores=(core,)) as url,
        ):
            server = LlamaServer(url, 3600)
            seconds, replies = _together(server, prompts[:count], n_predict=1, **greedy)
            read = sum(reply["timings"]["prompt_n"] for reply in replies) / seconds
            seconds, replies = _together(server, prompts[:count], n_predict=tokens, ignore_eos=True, **greedy)
            sampled = sum(len(reply["tokens"]) for reply in replies) / seconds
            arms = [prompts[0] + reasoner.injected_ids(opening) for opening in _OPENINGS]
            times = [server.complete(ids, 0, n_predict=8, **greedy)["timings"] for ids in arms]
        again = max(t["prompt_n"] for t in times[1:])
        rows += [
            Row(f"{model}, {count} slots: prompt tokens read", round(read, 1), "tokens/s of a core"),
            Row(f"{model}, {count} slots: tokens sampled", round(sampled, 1), "tokens/s of a core"),
            Row(f"{count} slots: most tokens that a further arm of a question reads", again, f"of {len(prompts[0])}"),
        ]
    return rows


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
