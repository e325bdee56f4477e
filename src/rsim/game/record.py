"""An episode as a record for people and reports."""

from __future__ import annotations

from typing import Any

from rsim.game.episode import FLAGS, Episode, Step


def shown(step: Step) -> str:
    """What people see of a step: its text, as `Step.answer` has it, and a tool's output in its place."""
    return step.text[: step.before] + step.output + step.answer


def episode_json(episode: Episode, names: tuple[str, ...]) -> dict[str, Any]:
    """Texts, strategies and probabilities, no tokens; ``names``: of the strategies.

    A step's ``prompt`` is without the box or block that it opens, which is part of its ``text`` (`shown`).
    """
    probabilities = iter(episode.decisions)
    steps = []
    for step in episode.steps:
        chosen = step.strategy >= 0 and not step.forced and episode.decisions
        decision = next(probabilities, None) if chosen else None  # none once a planner's context is full
        record = {
            "strategy": names[step.strategy] if step.strategy >= 0 else None,
            "prompt": step.prompt.removesuffix(step.answer_prefix),
            "text": shown(step),
            "forced": step.forced,
            "probabilities": [round(p, 4) for p in decision.probabilities] if decision else None,
        }
        steps.append(record | ({"output": step.output} if step.output else {}))
    return {
        "question": episode.problem.question,
        "answer": episode.problem.answer,
        "group": episode.group,
        "steps": steps,
        "sampled_tokens": episode.sampled_tokens,
        "injected_tokens": episode.injected_tokens,
        "flags": [f for f in FLAGS if getattr(episode, f)],
    }
