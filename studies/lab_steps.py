"""How often a lab base works out each kind of step rightly, in its greedy chain of thought on dev problems.

    python -m studies.lab_steps [--models nano-xs nano-s nano-m] [--questions 500] [--record]

A step is right if the expression that it ends with has the value of the one before it.
"""

from __future__ import annotations

import argparse
from collections import Counter

from rsim.config import load_config
from rsim.data.load import load_problems
from rsim.game.rollout import Game
from rsim.lab.expressions import parse, value_of
from rsim.lab.oracle import expression_after
from rsim.policies.loading import load_reasoner, quiet_models
from studies.ledger import record, row

_SEED = 1000
# The word that a step begins with, and how many terms were left before it.
_SHOWN = {
    "a product, in parts": ("parts", (2, 3, 4)),
    "two numbers, place by place": ("slowly", (2,)),
    "three numbers at once, in the head": ("total", (3,)),
    "four numbers at once, in the head": ("total", (4,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", default=["nano-xs", "nano-s", "nano-m"])
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--record", action="store_true", help="write results/lab_steps.json and its page")
    args = parser.parse_args()
    quiet_models()
    rows = []
    for model in args.models:
        right, tried = measure(model, args.questions)
        for what, (word, counts) in _SHOWN.items():
            keys = [(word, n) for n in counts]
            total = sum(tried[k] for k in keys)
            share = round(sum(right[k] for k in keys) / total, 3) if total else None
            rows.append(row(f"{model}: {what}, right ({total} steps)", share, unit="share", seeds=[_SEED]))
            print(f"{rows[-1]['what']:<70} {share}")
    if args.record:
        record("lab_steps", 4, "Kinds of step in the bases' greedy chain of thought", rows)


def measure(model: str, questions: int) -> tuple[Counter[tuple[str, int]], Counter[tuple[str, int]]]:
    """Right steps and all steps, by ``(first word, terms before it)``."""
    reasoner, rules = load_reasoner(model), load_config("nano").rollout
    problems = load_problems("lab", "dev", limit=questions, seed=_SEED)
    right: Counter[tuple[str, int]] = Counter()
    tried: Counter[tuple[str, int]] = Counter()
    for episode in Game(reasoner, None, rules).play(problems, seed=0, greedy=True):
        current = parse(episode.problem.meta["expression"])
        assert current is not None
        text = reasoner.tokenizer.decode(episode.token_ids[episode.prompt_length :])
        for step in text.split(rules.delimiter):
            after = expression_after(step)
            if after is None:
                continue
            for word in {word for word, _ in _SHOWN.values()}:
                if f"{word} " in step:
                    tried[word, len(current)] += 1
                    right[word, len(current)] += value_of(after) == value_of(current)
            current = after
    return right, tried


if __name__ == "__main__":
    main()
