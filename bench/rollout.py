"""Decoding speed of the native engine against transformers' ``generate`` and against the machine's bound.

    python -m bench.rollout [--model smollm2-135m] [--rows 32] [--tokens 96] [--repeats 3] [--record]

All measured in turn in the same run; medians. *equal*: every row has the same prompt and length. *ragged*: prompts of different
lengths and rows that end at different, fixed times; useful tokens are those before a row's end. The bound is the time of the
matrix products of one decoding step alone, on the same weights.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import torch

from bench.ledger import record, row
from rsim.config import RolloutConfig
from rsim.data.problem import Problem
from rsim.models import load_reasoner
from rsim.rollout.game import Game, _Play
from rsim.rollout.reasoner import Reasoner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write results/rollout.json and its page")
    args = parser.parse_args()
    rows = measure(load_reasoner(args.model), args.rows, args.tokens, args.repeats)
    for r in rows:
        print(f"{r['what']:<70} {r['value']:<10g} {r['unit']:<10} {r['goal']} {'' if r['met'] is None else r['met']}")
    if args.record:
        record("rollout", 3, f"Rollout speed: {args.model}, {args.rows} sequences, float32", rows)


def measure(reasoner: Reasoner, rows: int, tokens: int, repeats: int) -> list[dict[str, object]]:
    question = "A farmer has 12 hens and each lays 5 eggs a week. How many eggs are there in 4 weeks?"
    equal = [reasoner.prompt_ids(question)] * rows
    rng = random.Random(0)
    words = question.split()
    ragged_questions = [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(rows)]
    ragged = [reasoner.prompt_ids(q) for q in ragged_questions]
    ends = [max(2, round(tokens * 2 ** rng.uniform(-3, 0))) for _ in range(rows)]
    useful = sum(ends)
    contenders: dict[str, tuple[Callable[[], None], int]] = {
        "native, equal": (lambda: _native(reasoner, [question] * rows, [tokens] * rows), rows * tokens),
        "generate with dynamic cache, equal": (lambda: _generate(reasoner, equal, tokens, None), rows * tokens),
        "generate with static cache, equal": (lambda: _generate(reasoner, equal, tokens, "static"), rows * tokens),
        "native, ragged": (lambda: _native(reasoner, ragged_questions, ends), useful),
        "generate with dynamic cache, ragged": (lambda: _generate(reasoner, ragged, max(ends), None), useful),
        "generate with static cache, ragged": (lambda: _generate(reasoner, ragged, max(ends), "static"), useful),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    bounds = []
    for name, (run, _) in contenders.items():
        run()  # warm up
        print(f"warm: {name}", flush=True)
    for _ in range(repeats):
        bounds.append(rows / _matrix_seconds(reasoner, rows))
        for name, (run, count) in contenders.items():
            began = time.perf_counter()
            run()
            rates[name].append(count / (time.perf_counter() - began))

    def ratio(name: str, others: list[str]) -> float:
        return statistics.median(a / max(rates[o][i] for o in others) for i, a in enumerate(rates[name]))

    caches = ("dynamic", "static")
    versus_equal = ratio("native, equal", [f"generate with {c} cache, equal" for c in caches])
    versus_ragged = ratio("native, ragged", [f"generate with {c} cache, ragged" for c in caches])
    of_bound = statistics.median(a / b for a, b in zip(rates["native, equal"], bounds, strict=True))
    return [
        row("native / generate (its better cache), equal lengths", round(versus_equal, 2), unit="x", goal="at least 1.3",
            met=versus_equal >= 1.3),
        row("native / generate (its better cache), useful tokens, ragged", round(versus_ragged, 2), unit="x", goal="at least 2",
            met=versus_ragged >= 2),
        row("native, equal lengths, of the matrix-product bound", of_bound, unit="share", goal="at least 65%",
            met=of_bound >= 0.65),
        row("matrix-product bound", round(statistics.median(bounds), 1), unit="tokens/s"),
        *(row(name, round(statistics.median(values), 1), unit="tokens/s") for name, values in rates.items()),
    ]  # fmt: skip


def _native(reasoner: Reasoner, questions: list[str], ends: list[int]) -> None:
    """Rows end at fixed times, by a cap of their own; the model's end-of-turn tokens are ignored."""
    game = Game(reasoner, None, RolloutConfig(max_tokens=max(ends), answer_tokens=1, batch=len(questions)))
    problems = [Problem(q, "", str(end)) for q, end in zip(questions, ends, strict=True)]
    with (
        patch.object(Reasoner, "end_ids", frozenset()),
        patch.object(_Play, "_left", lambda play, episode: int(episode.problem.id)),
    ):
        game.play(problems, seed=0)


@torch.no_grad()
def _generate(reasoner: Reasoner, prompts: list[list[int]], tokens: int, cache: str | None) -> None:
    width = max(map(len, prompts))
    pad = reasoner.tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    reasoner.model.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=pad, cache_implementation=cache,
        disable_compile=True,
    )  # fmt: skip


@torch.no_grad()
def _matrix_seconds(reasoner: Reasoner, rows: int) -> float:
    """Seconds of one decoding step's matrix products: every linear layer and the output head, ``rows`` rows each."""
    layers = [m for m in reasoner.model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, m.in_features) for m in layers}
    times = []
    for _ in range(8):
        began = time.perf_counter()
        for layer in layers:
            torch.nn.functional.linear(inputs[layer.in_features], layer.weight)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
