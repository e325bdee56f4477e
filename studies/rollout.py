"""Decoding speed of the native engine against transformers' ``generate``, vLLM on the CPU and the machine's bound.

    python -m studies.rollout [--model smollm2-135m] [--rows 32] [--tokens 64] [--rounds 3] [--vllm] [--record]

All measured in turn in the same run; medians of the rounds' ratios. *equal*: every row has the same prompt and length.
*ragged*: three times as many sequences as fit at once, with prompts of different lengths and fixed ends of their own (an eighth
of the longest to the longest, log-uniform); ``generate`` takes them batch by batch in their order. Useful tokens are those
before a sequence's end. The bound is the time of the matrix products of one
decoding step alone, on the same weights: as ``torch.nn.functional.linear`` computes them and as oneDNN does; the goal is on the
faster. ``generate`` runs on a stock copy of the model. ``--vllm`` starts a vLLM server in the environment of
``bench/vllm_env.sh`` that works on as many sequences at once; it is asked for the same ones, all together.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import httpx
import torch

from rsim.config import RolloutConfig
from rsim.engine.layers import product
from rsim.game.problem import Problem
from rsim.game.rollout import Game, _Play
from rsim.policies.loading import load_reasoner
from rsim.policies.reasoner import Reasoner
from studies.ledger import record, row
from studies.workload import questions, served_model, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--record", action="store_true", help="write results/rollout.json and its page")
    args = parser.parse_args()
    with served_model(args.model, "--max-num-seqs", str(args.rows)) if args.vllm else nullcontext() as client:
        rows = measure(load_reasoner(args.model), client, args.rows, args.tokens, args.rounds)
    show(rows)
    if args.record:
        record("rollout", 3, f"Rollout speed: {args.model}, {args.rows} sequences at once, float32", rows)


def measure(reasoner: Reasoner, client: httpx.Client | None, rows: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    waiting = [" ".join(rng.choices(questions(1)[0].split(), k=rng.randint(5, 60))) for _ in range(3 * rows)]
    ends = [max(2, round(tokens * 2 ** rng.uniform(-3, 0))) for _ in waiting]
    work = {
        "equal": (questions(1) * rows, [tokens] * rows),
        "ragged": (waiting, ends),
    }
    stock = copy.deepcopy(reasoner)  # before the native engine prepares the model for itself
    sides: dict[str, Callable[[list[str], list[int]], None]] = {
        "native": partial(_native, reasoner, rows),
        "generate with dynamic cache": partial(_generate, stock, rows, None),
        "generate with static cache": partial(_generate, stock, rows, "static"),
    }
    if client is not None:
        sides["vllm"] = partial(_vllm, reasoner, client)
    rates: dict[tuple[str, str], list[float]] = {}
    bounds: dict[str, list[float]] = {"linear": [], "oneDNN": []}
    for number in range(rounds + 1):
        before = _matrix_seconds(stock, rows)
        for kind, (asked, lengths) in work.items():
            if number == 0:  # warms up, with short sequences
                lengths = [4] * len(asked)
            for side, run in sides.items():
                began = time.perf_counter()
                run(asked, lengths)
                rate = sum(lengths) / (time.perf_counter() - began)
                rates.setdefault((side, kind), []).append(rate)
                print(f"round {number}: {side}, {kind}: {rate:.0f} tokens/s", flush=True)
        for (name, a), b in zip(before.items(), _matrix_seconds(stock, rows).values(), strict=True):
            bounds[name].append(2 * rows / (a + b))

    def ratio(kind: str, others: list[str]) -> float:
        mine = rates["native", kind]
        return round(statistics.median(mine[i] / max(rates[o, kind][i] for o in others) for i in range(1, rounds + 1)), 2)

    both = ["generate with dynamic cache", "generate with static cache"]
    equal, ragged = ratio("equal", both), ratio("ragged", both)
    mine = rates["native", "equal"][1:]
    shares = {name: statistics.median(a / b for a, b in zip(mine, values[1:], strict=True)) for name, values in bounds.items()}
    of_bound = min(shares.values())
    results = [
        row("native / generate (its better cache), equal lengths", equal, unit="x", goal="at least 1.3", met=equal >= 1.3),
        row("native / generate (its better cache), useful tokens, ragged", ragged, unit="x", goal="at least 2",
            met=ragged >= 2),
        row("native, equal lengths, of the matrix-product bound", of_bound, unit="share", goal="at least 65%",
            met=of_bound >= 0.65),
        *(row(f"native, equal lengths, of the bound by {name}", share, unit="share") for name, share in shares.items()),
        *(row(f"matrix-product bound by {name}", round(statistics.median(values[1:]), 1), unit="tokens/s")
          for name, values in bounds.items()),
    ]  # fmt: skip
    if client is not None:
        faster = ratio("equal", ["vllm"])
        results.append(row("native / vLLM on the CPU, equal lengths", faster, unit="x", goal="at least 1.1", met=faster >= 1.1))
        results.append(row("native / vLLM on the CPU, ragged", ratio("ragged", ["vllm"]), unit="x"))
    for (side, kind), values in rates.items():
        results.append(row(f"{side}, {kind}", round(statistics.median(values[1:]), 1), unit="tokens/s"))
    return results


def _native(reasoner: Reasoner, rows: int, asked: list[str], ends: list[int]) -> None:
    """Sequences end at fixed times, by a cap of their own; the model's end-of-turn tokens are ignored."""
    game = Game(reasoner, None, RolloutConfig(max_tokens=max(ends), answer_tokens=1, batch=rows))
    problems = [Problem(q, "", str(end)) for q, end in zip(asked, ends, strict=True)]
    with (
        patch.object(Reasoner, "end_ids", frozenset()),
        patch.object(_Play, "_left", lambda play, episode: int(episode.problem.id)),
    ):
        episodes = game.play(problems, seed=0)
    assert [e.sampled_tokens for e in episodes] == ends


@torch.no_grad()
def _generate(reasoner: Reasoner, rows: int, cache: str | None, asked: list[str], ends: list[int]) -> None:
    pad = reasoner.tokenizer.eos_token_id
    for first in range(0, len(asked), rows):
        prompts = [reasoner.prompt_ids(q) for q in asked[first : first + rows]]
        tokens, width = max(ends[first : first + rows]), max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=reasoner.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=reasoner.model.device)
        reasoner.model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, min_new_tokens=tokens,
            max_new_tokens=tokens, pad_token_id=pad, cache_implementation=cache, disable_compile=True,
        )  # fmt: skip


def _vllm(reasoner: Reasoner, client: httpx.Client, asked: list[str], ends: list[int]) -> None:
    """All sequences at once, one request each, as the server's own scheduler likes them."""

    def ask(question: str, end: int) -> None:
        body = {
            "prompt": reasoner.prompt_ids(question),
            "max_tokens": end,
            "ignore_eos": True,
            "temperature": 1.0,
            "logprobs": 0,
        }
        answer = client.post("/v1/completions", json=body).raise_for_status().json()
        assert answer["usage"]["completion_tokens"] == end

    with ThreadPoolExecutor(len(asked)) as threads:
        list(threads.map(ask, asked, ends))


@torch.no_grad()
def _matrix_seconds(reasoner: Reasoner, rows: int) -> dict[str, float]:
    """Seconds of one decoding step's matrix products, every linear layer and the output head, ``rows`` rows each, both ways."""
    layers = [m for m in reasoner.model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, m.in_features) for m in layers}
    times: dict[str, list[float]] = {"linear": [], "oneDNN": []}
    for _ in range(8):
        for (_, kept), multiply in zip(times.items(), (torch.nn.functional.linear, product), strict=True):
            began = time.perf_counter()
            for layer in layers:
                multiply(inputs[layer.in_features], layer.weight)
            kept.append(time.perf_counter() - began)
    return {name: statistics.median(kept) for name, kept in times.items()}


if __name__ == "__main__":
    main()
