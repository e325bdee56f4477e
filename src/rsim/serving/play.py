"""The planned game for one answer of any LLM, by the same `Rulebook` as the rollout's.

The planner chooses a strategy, its prompt is injected, the upstream writes a step; until termination. The model in this process
takes and gives token ids, so its answers are exact. An upstream that takes and gives text only tokenises what is injected
together with what is around it, and what is injected is counted by an estimate: these answers are *approximate*.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rsim.answers.prefix import as_message, open_prefix
from rsim.game.rollout import rulebook_of
from rsim.rules import ALONE, End, Ending, Move, PlayRules, Progress, Rulebook
from rsim.serving.planner_batcher import PlannedAnswer, PlannerBatcher

Reason = Literal["stop", "length"]
Mode = Literal["prefill", "turn", "exact"]


@dataclass
class Usage:
    """Tokens as the upstream counts them, summed over its calls; ``estimated`` where it did not say and chunks were counted."""

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
class Until:
    """Where a step ends before the end of the turn: at ``delimiter`` outside code blocks (``answer_prefix``: one that the
    prompt left open), or at one of a client's stop ``strings``; at nothing where both are empty."""

    delimiter: str = ""
    answer_prefix: str = ""
    strings: tuple[str, ...] = ()


TO_END = Until()


@dataclass(frozen=True)
class StepEnd:
    """Why the upstream stopped, and all that it wrote in the step, the delimiter included.

    ``unknown``: it said only that it stopped, which may be at a delimiter or at the end of its turn.
    """

    reason: End | Literal["unknown"]
    usage: Usage
    text: str = ""


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

    @property
    def greedy(self) -> bool:
        return self.sampling.get("temperature") == 0


def text_of(content: Any) -> str:
    """The text of a message's content, which may be a list of parts (images and the like are left out)."""
    if isinstance(content, list):
        return "\n".join(str(p.get("text", "")) for p in content if isinstance(p, dict) and p.get("type") == "text")
    return str(content or "")


class Conversation(Protocol):
    """The upstream's side of one answer."""

    def inject(self, text: str) -> None:
        """Appends ``text`` to the answer; it is sent with the next step."""

    def step(self, max_new_tokens: int, until: Until) -> AsyncIterator[str | StepEnd]:
        """Yields text as it is sampled, then one `StepEnd`."""

    def count(self, text: str) -> int:
        """How many tokens ``text`` takes where it is injected."""

    def room(self) -> int:
        """How many tokens, injected ones among them, still fit into the upstream's context, as far as is known."""

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
    """Text that the upstream sampled, or (``sampled`` false) a delimiter that closes a step."""

    text: str
    sampled: bool = True


@dataclass(frozen=True)
class Finished:
    """The end of an answer. ``stop``: the client's stop string that ended it; ``injected_tokens`` as the budget counts them."""

    reason: Reason
    usage: Usage
    ending: Ending = field(default_factory=lambda: Ending(over=True))
    injected_tokens: int = 0
    stop: str | None = None


Event = Injected | TextDelta | Finished


async def play(
    asked: Asked, batcher: PlannerBatcher, upstream: Upstream, rules: PlayRules, limit: int, spent: Usage | None = None
) -> AsyncGenerator[Event]:
    """Plays one answer of at most ``limit`` tokens, sampled and injected; the last event is `Finished`.

    ``spent``, if given, is counted up after every step, for a caller who may not read to the end.

    Closing the iterator (a client that went away) cancels what the upstream is doing and frees the planner's slot.
    """
    usage = Usage() if spent is None else spent
    planner = await batcher.open(asked.question, asked.sampling.get("seed"))
    try:
        conversation = await upstream.open(asked)
        try:
            book = rulebook_of(batcher.planner, rules.within(min(limit, conversation.room())), conversation.count)
            players = _Players(asked, batcher, planner, conversation, turns=upstream.mode == "turn")
            async for event in _steps(players, book, usage):
                yield event
        finally:
            await conversation.close()
    finally:
        planner.close()


@dataclass(frozen=True)
class _Players:
    """Who plays one answer. ``turns``: every strategy is a message of its own."""

    asked: Asked
    batcher: PlannerBatcher
    planner: PlannedAnswer
    conversation: Conversation
    turns: bool


async def _steps(players: _Players, book: Rulebook, usage: Usage) -> AsyncGenerator[Event]:
    strategies, conversation = players.batcher.strategies, players.conversation
    progress, injected_tokens, ending = Progress(), 0, Ending()
    while not ending.over:
        move, probabilities = await _choose(players.planner, book, progress)
        name = strategies[move.strategy if move != ALONE else strategies.neutral].name
        prompt = _prompt(players, book, move)
        answer_prefix = open_prefix(prompt) if move.strategy == book.termination else ""
        yield Injected(name, prompt, _shown(strategies.names, probabilities), forced=move.forced)
        prompt_tokens = conversation.count(prompt) if prompt else 0
        conversation.inject(prompt)
        until = Until(book.rules.delimiter, answer_prefix) if book.stops(move) else TO_END
        end = StepEnd("cap", Usage())
        async for piece in conversation.step(book.max_new_tokens(move, progress, prompt_tokens), until):
            if isinstance(piece, StepEnd):
                end = piece
            else:
                yield TextDelta(piece)
        usage.add(end.usage)
        ending = book.ending(move, _known(end, until))
        if ending.closes:
            conversation.inject(book.rules.delimiter)
            prompt_tokens += book.lengths.delimiter
            yield TextDelta(book.rules.delimiter, sampled=False)
        injected_tokens += prompt_tokens
        progress = Progress(progress.steps + 1, progress.tokens + prompt_tokens + end.usage.completion_tokens)
        players.planner.observe(name, end.text)
    yield Finished("length" if ending.truncated else "stop", usage, ending, injected_tokens)


async def _choose(planner: PlannedAnswer, book: Rulebook, progress: Progress) -> tuple[Move, list[float]]:
    """The next step, and the probabilities of the strategies if the planner was asked.

    A question that it cannot read is answered without it, in one step; once its context is full, the answer is due.
    """
    if progress.steps == 0 and not planner.reads():
        return ALONE, []
    if book.must_end(progress) or not planner.reads():
        return book.move(None), []
    decision = await planner.decide()
    return book.move(decision.action, max(decision.probabilities)), decision.probabilities


def _prompt(players: _Players, book: Rulebook, move: Move) -> str:
    """The wording that is injected: the first of its strategy or, where answers are sampled, any."""
    if not move.injects:
        return ""
    prompts = players.batcher.strategies[move.strategy].prompts
    drawn = book.rules.paraphrase == "random" and not players.asked.greedy
    prompt = players.planner.draws.choice(prompts) if drawn else prompts[0]
    return as_message(prompt) if players.turns and players.asked.messages is not None else prompt


def _known(end: StepEnd, until: Until) -> End:
    """Why a step ended, where the upstream did not say it: at a delimiter if it wrote anything."""
    if end.reason != "unknown":
        return end.reason
    return "delimiter" if until.delimiter and end.text.strip() else "end_of_turn"


def _shown(names: tuple[str, ...], probabilities: list[float]) -> dict[str, float]:
    return {name: round(p, 4) for name, p in zip(names, probabilities, strict=False)}
