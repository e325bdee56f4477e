"""The planned game over text, for one answer of any LLM (by text instead of token ids).

The planner chooses a strategy, its prompt is injected, the upstream writes a step up to the delimiter; until termination. An
upstream that takes and gives text only cannot be held to token ids: it tokenises what is injected together with what is around,
so these answers are *approximate* (the in-process upstream is exact).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from rsim.answers.prefix import as_message
from rsim.serving.planner_batcher import PlannerBatcher

_PROMPT_TOKENS = 64  # of a context, for the prompt of the next strategy

Reason = Literal["stop", "length"]
Mode = Literal["prefill", "turn", "exact"]


@dataclass
class Usage:
    """Tokens as the upstream counts them, summed over its calls; ``estimated`` where it did not say and pieces were counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    estimated: bool = False

    def add(self, other: Usage) -> None:
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cached_tokens += other.cached_tokens
        self.estimated |= other.estimated


@dataclass(frozen=True)
class StepEnd:
    """Why the upstream stopped: at the delimiter (not part of its text), at the end of its turn, or at the limit.

    ``unknown``: it said only that it stopped, which may be either of the first two.
    """

    reason: Literal["delimiter", "end_of_turn", "limit", "unknown"]
    usage: Usage


@dataclass(frozen=True)
class Asked:
    """One answer that is wanted. ``messages`` or ``prompt`` as the client sent them (``prompt_ids`` if it sent token ids);
    ``sampling`` is passed to the upstream; ``continues``: the last message is the assistant's own, to be gone on with."""

    model: str
    messages: list[dict[str, Any]] | None
    prompt: str | None
    sampling: dict[str, Any] = field(default_factory=dict)
    prompt_ids: list[int] | None = None
    continues: bool = False

    @property
    def question(self) -> str:
        """What the planner reads: the last user message's text, or the prompt."""
        if self.messages is None:
            return self.prompt or ""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                return text_of(message.get("content"))
        return ""


def text_of(content: Any) -> str:
    """The text of a message's content, which may be a list of parts (images and the like are left out)."""
    if isinstance(content, list):
        return "\n".join(str(p.get("text", "")) for p in content if isinstance(p, dict) and p.get("type") == "text")
    return str(content or "")


class Conversation(Protocol):
    """The upstream's side of one answer."""

    def step(self, injected: str, limit: int, delimiter: str | None) -> AsyncIterator[str | StepEnd]:
        """Appends ``injected`` and yields pieces of text as they are sampled, at most ``limit`` tokens, then one `StepEnd`.

        ``delimiter`` None: the step goes to the end of the turn.
        """

    def room(self) -> int:
        """How many tokens, prompts of strategies among them, still fit into the upstream's context, as far as is known."""

    async def close(self) -> None: ...


class Upstream(Protocol):
    """An LLM that continues what was injected."""

    mode: Mode

    async def open(self, asked: Asked) -> Conversation: ...


@dataclass(frozen=True)
class Injected:
    """A strategy's prompt, put into the answer; an empty ``text`` where the planner did not intervene."""

    strategy: str
    text: str
    probabilities: dict[str, float]
    forced: bool = False


@dataclass(frozen=True)
class TextDelta:
    """Text that the upstream sampled."""

    text: str


@dataclass(frozen=True)
class Finished:
    reason: Reason
    usage: Usage


Event = Injected | TextDelta | Finished


@dataclass(frozen=True)
class PlayRules:
    """``gate``: below this probability of its best strategy the planner does not intervene."""

    delimiter: str = "\n\n"
    max_steps: int = 8
    step_tokens: int = 512
    max_tokens: int = 4096  # of an answer that states no limit of its own
    answer_tokens: int = 128  # kept back for a forced termination, but never more than a quarter of the limit
    gate: float = 0.0


async def play(
    asked: Asked, planning: PlannerBatcher, upstream: Upstream, rules: PlayRules, limit: int, spent: Usage | None = None
) -> AsyncGenerator[Event]:
    """Plays one answer of at most ``limit`` sampled tokens; the last event is `Finished`.

    ``spent``, if given, is counted up after every step, for a caller who may not read to the end.

    Closing the iterator (a client that went away) cancels what the upstream is doing and frees the planner's slot.
    """
    strategies = planning.strategies
    ending = strategies[strategies.termination]
    usage = Usage() if spent is None else spent
    planner = await planning.open(asked.question, asked.sampling.get("seed"))
    try:
        conversation = await upstream.open(asked)
        try:
            kept_back = min(rules.answer_tokens, max(1, min(limit, conversation.room()) // 4))
            for number in range(rules.max_steps + 1):
                left = min(limit - usage.completion_tokens, conversation.room() - _PROMPT_TOKENS)
                forced = number == rules.max_steps or left <= kept_back
                injected = await _choose(planner, planning, rules, forced=forced)
                if upstream.mode == "turn" and asked.messages is not None:
                    injected = replace(injected, text=as_message(injected.text))
                yield injected
                final = injected.strategy == ending.name
                cap = max(1, left) if final else min(rules.step_tokens, left - kept_back)
                pieces: list[str] = []
                end = StepEnd("limit", Usage())
                async for piece in conversation.step(injected.text, cap, None if final else rules.delimiter):
                    if isinstance(piece, StepEnd):
                        end = piece
                    else:
                        pieces.append(piece)
                        yield TextDelta(piece)
                usage.add(end.usage)
                if final or end.reason == "end_of_turn" or (end.reason == "unknown" and not "".join(pieces).strip()):
                    yield Finished("length" if end.reason == "limit" else "stop", usage)
                    return
                yield TextDelta(rules.delimiter)
                planner.observe(injected.strategy, "".join(pieces) + rules.delimiter)
        finally:
            await conversation.close()
    finally:
        planner.close()


async def _choose(planner: Any, planning: PlannerBatcher, rules: PlayRules, *, forced: bool) -> Injected:
    strategies = planning.strategies
    if forced:
        return Injected(strategies[strategies.termination].name, strategies[strategies.termination].prompts[0], {}, forced=True)
    decision = await planner.decide()
    neutral = strategies[strategies.neutral].name
    if decision is None:
        return Injected(neutral, "", {})
    shown = {name: round(p, 4) for name, p in zip(strategies.names, decision.probabilities, strict=True)}
    if max(decision.probabilities) < rules.gate:
        return Injected(neutral, "", shown)
    chosen = strategies[decision.action]
    return Injected(chosen.name, chosen.prompts[0], shown)
