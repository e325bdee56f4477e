"""Measures llama.cpp's server: ``python -m studies.llama [MODEL] [--core N] [--slots 8 32 64]``.

MODEL is a packaged GGUF model. One server of one thread, pinned to a core, reads a question of GSM8K in each
slot, then samples the same number of tokens in all slots at once; then arms of one question follow each other
in a slot. Rates are per second of the server's own CPU time, so that other processes on the core do not count.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from rsim.data.load import load_problems
from rsim.engine.llama import LlamaServer, sampling
from rsim.engine.llama_process import llama_servers
from rsim.models.weights import package_file
from rsim.policies.loading import load_reasoner

_OPENINGS = (
    "",
    "Let's think step by step.",
    "The answer is",
    "```python\n",
    "First, split the problem into parts.",
)


def together(server: LlamaServer, prompts: list[list[int]], **settings: Any) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the server's CPU time, and the replies to one request in each slot."""
    began = cpu_seconds()
    with ThreadPoolExecutor(len(prompts)) as threads:
        replies = list(threads.map(lambda i: server.complete(prompts[i], i, stop=[], seed=i, **settings), range(len(prompts))))
    return cpu_seconds() - began, replies


def cpu_seconds() -> float:
    """Of the processes below this one."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return float(sum(t.user + t.system for t in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="qwen2.5-coder-1.5b")
    parser.add_argument("--core", type=int, default=1)
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="further arguments of the server")
    chosen = parser.parse_args()
    reasoner = load_reasoner(chosen.model, weights=False)
    questions = load_problems("gsm8k", "train", limit=max(chosen.slots))
    every = [reasoner.prompt_ids(problem.question) for problem in questions]
    kinds = {"greedy": (0.0, False), "temperature 1": (1.0, False), "temperature 0.7": (0.7, False)}
    kinds |= {f"{name}, log-probs": (t, True) for name, (t, _) in kinds.items()}
    with tempfile.TemporaryDirectory() as folder:
        for slots in chosen.slots:
            how: dict[str, Any] = {"slots": slots, "context": chosen.context, "cores": (chosen.core,)}
            with llama_servers(package_file(chosen.model), Path(folder) / "log", **how, more=tuple(chosen.server)) as url:
                server = LlamaServer(url, 3600)
                prompts = every[:slots]
                seconds, replies = together(server, prompts, n_predict=1, **sampling(0.0, logprobs=False))
                read = sum(reply["timings"]["prompt_n"] for reply in replies)
                print(f"{slots} slots: {read} prompt tokens, {read / seconds:.1f} a second", flush=True)
                for name, (temperature, logprobs) in kinds.items() if slots == 32 else list(kinds.items())[:1]:
                    how = sampling(temperature, logprobs=logprobs) | {
                        "n_predict": chosen.tokens,
                        "ignore_eos": True,
                    }
                    seconds, replies = together(server, prompts, **how)
                    sampled = sum(len(reply["tokens"]) for reply in replies)
                    again = sum(reply["timings"]["prompt_n"] for reply in replies)
                    print(
                        f"  {name}: {sampled / seconds:.1f} sampled tokens a second ({again} prompt tokens read)",
                        flush=True,
                    )
                if slots == chosen.slots[0]:
                    for opening in _OPENINGS:
                        ids = prompts[0] + reasoner.injected_ids(opening)
                        times = server.complete(ids, 0, n_predict=8, **sampling(0.0, logprobs=False))["timings"]
                        print(
                            f"  arm {opening!r}: {times['prompt_n']} tokens read, {times['cache_n']} were there",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
