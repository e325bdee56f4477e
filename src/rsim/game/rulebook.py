"""The `Rulebook` of a planner's strategies for one reasoner's tokenizer."""

from __future__ import annotations

from collections.abc import Callable

from rsim.errors import UserError
from rsim.policies.protocol import AnyPlanner
from rsim.rules import Lengths, PlayRules, Rulebook


def rulebook_of(planner: AnyPlanner, rules: PlayRules, count: Callable[[str], int]) -> Rulebook:
    """The rules for a planner's strategies; ``count`` says how many of the reasoner's tokens a text takes."""
    strategies = planner.strategies
    prompts = [[count(prompt) for prompt in s.prompts] for s in strategies.strategies]
    tool = rules.tool_tokens if strategies.tools else 0
    lengths = Lengths.of(prompts, strategies.termination, count(rules.delimiter), tool)
    return Rulebook(
        rules, lengths, strategies.termination, strategies.neutral, strategies.unlimited, strategies.tools
    )


def check_budget(book: Rulebook) -> None:
    """Raises `UserError` where the budget has no room for an answer, or none for any step."""
    closing = book.closing + book.lengths.delimiter
    limit = book.rules.max_tokens
    if limit <= closing:
        raise UserError(f"rollout.max_tokens = {limit}", f"a final answer alone takes {closing} tokens")
    needed = closing + book.lengths.prompt + book.lengths.tool
    if limit <= needed:
        tool = f" with rollout.tool_tokens = {book.lengths.tool}" if book.tools else ""
        raise UserError(
            f"rollout.max_tokens = {limit}{tool}", f"a step and an answer take over {needed} tokens"
        )
