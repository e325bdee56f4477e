"""What a training before an upstream will cost: requests and tokens, at the most, and whether it answers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rsim.config import Config
from rsim.evaluation.upstream import ServedModel, ask_once
from rsim.game.problem import Problem
from rsim.policies.strategies import StrategySet, load_strategies
from rsim.serving.planner_batcher import estimated_tokens
from rsim.training.questions import load_questions


@dataclass(frozen=True)
class Cost:
    """At the most, if no request is tried again; ``dollars`` None: no prices are given."""

    requests: int
    prompt_tokens: int
    sampled_tokens: int
    dollars: float | None


def most(
    config: Config,
    strategies: StrategySet,
    training: list[Problem],
    held_out: list[Problem],
    step: int = 0,
    *,
    unevaluated: bool = False,
) -> Cost:
    """What is left to be paid after ``step`` (``unevaluated``: with its evaluation), if every episode is as
    long as the rules allow.

    Each step of an episode is a request (two, where a program is run), which reads the question and all that
    was written and injected so far. Lengths of questions are estimated from their letters.
    """
    rules, train = config.rollout, config.train
    calls = (rules.max_steps + 1) * (2 if strategies.tools else 1)
    prompt = max(estimated_tokens(p) for s in strategies.strategies for p in s.prompts)
    grown = sum(min(rules.max_tokens, call * (rules.step_tokens + prompt)) for call in range(calls))
    steps, every = config.total_steps, train.eval_every
    evaluations = sum(s == steps or (every > 0 and s % every == 0) for s in range(step + 1, steps + 1))
    evaluations += unevaluated or (every > 0 and step == 0)  # the first one, before any step
    plays = (
        ((steps - step) * train.questions * train.group, training),
        (evaluations * len(held_out), held_out),
    )
    episodes = sum(count for count, _ in plays)
    system = estimated_tokens(config.models.system_prompt)
    read = sum(count * calls * (system + _mean_tokens(asked)) for count, asked in plays) + episodes * grown
    counting = sum(len(s.prompts) for s in strategies.strategies) + 5  # the prompts' tokens, and the probe
    read, written = math.ceil(read), episodes * rules.max_tokens
    up, dollars = config.upstream, None
    if up.price_in or up.price_out:
        dollars = (read * up.price_in + written * up.price_out) / 1e6
    return Cost(episodes * calls + counting, read, written, dollars)


def _mean_tokens(problems: list[Problem]) -> float:
    return sum(estimated_tokens(p.question) for p in problems) / len(problems)


def describe(config: Config, cost: Cost) -> str:
    up = config.upstream
    price = "--price-in and --price-out tell dollars" if cost.dollars is None else f"${cost.dollars:,.2f}"
    limit = f"; stops at {up.max_requests:,} requests" if up.max_requests else ""
    return (
        f"{up.model or 'a model'} at {up.url}, text only, approximate: at most {cost.requests:,} requests, "
        f"{cost.prompt_tokens:,} tokens read, {cost.sampled_tokens:,} written, {price}{limit}"
    )


def check(config: Config) -> tuple[dict[str, Any], str]:
    """Asks the upstream the first training question, for one token, and estimates the whole run.

    Returns:
        the estimate as a record, and as text.

    Raises:
        UserError: it does not answer.
    """
    training, held_out = load_questions(config)
    up = config.upstream
    model, tokens = ask_once(ServedModel(up.url, up.model), config.models.system_prompt, training[0].question)
    cost = most(config, load_strategies(config.models.strategies), training, held_out)
    counts = (
        f"reads {tokens} tokens in the first question"
        if tokens
        else "counts no tokens: upstream.mode is needed"
    )
    record = {"upstream": up.url, "model": model, "first_question_tokens": tokens} | asdict(cost)
    return record, f"{describe(config, cost)}\nit answers as {model} and {counts}"
