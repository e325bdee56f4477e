"""Decoding speed of the native engine against transformers' ``generate``, vLLM on the CPU and the machine's bound.

All measured in turn in the same run; medians of the rounds' ratios. *equal*: every row has the same prompt and length.
*ragged*: three times as many sequences as fit at once, with prompts of different lengths and fixed ends of their own (an eighth
of the longest to the longest, log-uniform); ``generate`` takes them batch by batch in their order. Every round has questions
of its own: a server that remembers the last round's (vLLM does) would not read them, as it must after every update of the
weights. Useful tokens are those before a sequence's end. The bound is the time of the matrix products of one decoding step
alone, on the same weights: as ``torch.nn.functional.linear`` computes them and as oneDNN does, on them and on packed copies;
the goal is on the fastest. ``generate`` runs on a stock copy of the model. ``--vllm`` starts a vLLM server that works on as
many sequences at once; it is asked for the same ones, all together.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import httpx
import torch
from torch.nn.functional import linear

from rsim.config import RolloutConfig
from rsim.engine.layers import product
from rsim.engine.native import NativeEngine
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.policies.loading import load_reasoner
from rsim.policies.reasoner import Reasoner
from studies.ledger import Row
from studies.servers import vllm_server
from studies.workload import questions

ISSUE = 3
Side = Callable[[list[str], list[int]], None]  # samples for these questions, to these lengths
_DYNAMIC, _STATIC = "generate with dynamic cache", "generate with static cache"


def run(model: str = "smollm2-135m", rows: int = 32, tokens: int = 64, rounds: int = 3, vllm: bool = False) -> Iterator[Row]:
    with vllm_server(model, "--max-num-seqs", str(rows)) if vllm else nullcontext() as client:
        yield from measure(load_reasoner(model), client, rows, tokens, rounds)


def measure(reasoner: Reasoner, client: httpx.Client | None, rows: int, tokens: int, rounds: int) -> Iterator[Row]:
    stock = copy.deepcopy(reasoner)  # before the native engine prepares the model for itself
    sides: dict[str, Side] = {
        "native": partial(native, reasoner, rows),
        _DYNAMIC: partial(generated, stock, rows, None),
        _STATIC: partial(generated, stock, rows, "static"),
    }
    if client is not None:
        sides["vllm"] = partial(_vllm, reasoner, client)
    rates: dict[tuple[str, str], list[float]] = {}
    bounds: dict[str, list[float]] = {name: [] for name in ("linear", "oneDNN", "oneDNN on packed weights")}
    for number in range(rounds + 1):
        before = _matrix_seconds(stock, rows)
        work = {"equal": (questions(1, number) * rows, [tokens] * rows), "ragged": _ragged(rows, tokens, number)}
        for kind, (asked, lengths) in work.items():
            for side, sample in sides.items():
                rate = timed(sample, asked, lengths if number else [4] * len(asked))  # the first round warms up
                rates.setdefault((side, kind), []).append(rate)
        for (name, a), b in zip(before.items(), _matrix_seconds(stock, rows).values(), strict=True):
            bounds[name].append(2 * rows / (a + b))

    def ratio(kind: str, *others: str) -> float:
        mine = rates["native", kind]
        return round(statistics.median(mine[i] / max(rates[o, kind][i] for o in others) for i in range(1, rounds + 1)), 2)

    equal, ragged = ratio("equal", _DYNAMIC, _STATIC), ratio("ragged", _DYNAMIC, _STATIC)
    mine = rates["native", "equal"][1:]
    shares = {name: statistics.median(a / b for a, b in zip(mine, values[1:], strict=True)) for name, values in bounds.items()}
    least, better = min(shares.values()), "native / generate (its better cache)"
    yield Row(f"{better}, equal lengths", equal, "x", "at least 1.3", equal >= 1.3)
    yield Row(f"{better}, useful tokens, ragged", ragged, "x", "at least 2", ragged >= 2)
    yield Row("native, equal lengths, of the matrix-product bound", least, "share", "at least 70%", least >= 0.7)
    for name, share in shares.items():
        yield Row(f"native, equal lengths, of the bound by {name}", share, "share")
        yield Row(f"matrix-product bound by {name}", round(statistics.median(bounds[name][1:]), 1), "tokens/s")
    if client is not None:
        faster, uneven = ratio("equal", "vllm"), ratio("ragged", "vllm")
        yield Row("native / vLLM on the CPU, equal lengths", faster, "x", "at least 1.3", faster >= 1.3)
        yield Row("native / vLLM on the CPU, ragged", uneven, "x", "at least 1.2", uneven >= 1.2)
    for (side, kind), values in rates.items():
        yield Row(f"{side}, {kind}", round(statistics.median(values[1:]), 1), "tokens/s")


def timed(sample: Side, asked: list[str], lengths: list[int]) -> float:
    """Tokens a second."""
    began = time.perf_counter()
    sample(asked, lengths)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return sum(lengths) / (time.perf_counter() - began)


def _ragged(rows: int, tokens: int, seed: int) -> tuple[list[str], list[int]]:
    rng = random.Random(seed)
    waiting = [" ".join(rng.choices(questions(1)[0].split(), k=rng.randint(5, 60))) for _ in range(3 * rows)]
    return waiting, [max(2, round(tokens * 2 ** rng.uniform(-3, 0))) for _ in waiting]


def native(reasoner: Reasoner, rows: int, asked: list[str], ends: list[int]) -> None:
    """Sequences end at fixed times, by a cap of their own; the model's end-of-turn tokens are ignored."""
    game = Game(reasoner, None, RolloutConfig(max_tokens=max(ends), answer_tokens=1, batch=rows))
    start, submit, caps = NativeEngine.start, NativeEngine.submit, dict[int, int]()

    def started(engine: NativeEngine, slots: list[int], prompts: list[list[int]], keys: list[str]) -> None:
        caps.update(zip(slots, (ends[int(key.partition(":")[0])] for key in keys), strict=True))
        start(engine, slots, prompts, keys)

    def submitted(engine: NativeEngine, slot: int, injected: list[int], cap: int, *more: Any, **options: Any) -> None:
        submit(engine, slot, injected, caps[slot], *more, **options)

    patched = patch.multiple(NativeEngine, start=started, submit=submitted)
    with patch.object(Reasoner, "end_ids", frozenset()), patched:
        episodes = game.play([Problem(q, "") for q in asked], seed=0)
    assert [e.sampled_tokens for e in episodes] == ends


@torch.no_grad()
def generated(reasoner: Reasoner, rows: int, cache: str | None, asked: list[str], ends: list[int]) -> None:
    """transformers' ``generate``, batch by batch, each as long as its longest sequence."""
    model, pad = reasoner.model, reasoner.tokenizer.eos_token_id
    settings = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "cache_implementation": cache, "disable_compile": True}
    for first in range(0, len(asked), rows):
        prompts = [reasoner.prompt_ids(q) for q in asked[first : first + rows]]
        tokens, width = max(ends[first : first + rows]), max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": pad}
        model.generate(ids, attention_mask=mask, do_sample=True, **length, **settings)


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
    """Seconds of one decoding step's matrix products, every linear layer and the output head, ``rows`` rows each, each way."""
    layers = [m for m in reasoner.model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, m.in_features) for m in layers}
    plain = [(inputs[layer.in_features], layer.weight) for layer in layers]
    packed = [(given, torch.ops.mkldnn._reorder_linear_weight(weight, rows)) for given, weight in plain]
    ways = {"linear": (linear, plain), "oneDNN": (product, plain), "oneDNN on packed weights": (product, packed)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(8):
        for name, (multiply, pairs) in ways.items():
            began = time.perf_counter()
            for pair in pairs:
                multiply(*pair)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(kept) for name, kept in times.items()}
