"""The planned game for one answer of any LLM, by the same `Rulebook` as the rollout's.

The planner chooses a strategy, its prompt is injected, the upstream writes a step; until termination. The model in this process
takes and gives token ids, so its answers are exact. An upstream that takes and gives text only tokenises what is injected
together with what is around it, and what is injected is counted by an estimate: these answers are *approximate*.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from rsim.answers.prefix import as_message
from rsim.game.rulebook import rulebook_of
from rsim.game.tools import Runner, Tools
from rsim.policies.protocol import Decision
from rsim.rules import ALONE, FENCE, End, Ending, Move, PlayRules, Progress, Rulebook, open_block
from rsim.serving import tracing
from rsim.serving.planner_batcher import PlannedAnswer, PlannerBatcher, estimated_tokens

Mode = Literal["prefill", "turn", "exact"]
Headers = tracing.Headers
_LONG_TOKEN = 16  # characters


@dataclass
class Usage:
    """Tokens as the upstream counts them, summed over its calls; ``estimated`` where it did not say and chunks were counted.
    ``reasoning_tokens``: those of the completion that are thinking."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    estimated: bool = False
    reasoning_tokens: int = 0

    def add(self, other: Usage) -> None:
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cached_tokens += other.cached_tokens
        self.estimated |= other.estimated
        self.reasoning_tokens += other.reasoning_tokens


def tokens_in(piece: str) -> int:
    """What a piece of a stream is taken for: a token; by its length, where an upstream sends many at once."""
    return 1 if len(piece) <= _LONG_TOKEN else estimated_tokens(piece)


def next_seed(seed: int, by: int) -> int:
    """That of another sample, within 64 bits."""
    return seed + by if seed + by < 2**63 else seed - by


@dataclass(frozen=True)
class Until:
    """Where a step ends before the end of the turn: at ``delimiter`` outside code blocks (``answer_prefix``: one that the
    prompt left open), or at one of some ``strings`` (a client's, or what closes a program); at nothing where both are empty.

    ``strict``: the text is in the form that was asked for. ``beyond``: tokens that the upstream may write before it is asked
    again, if steps follow in which nothing is injected.
    """

    delimiter: str = ""
    answer_prefix: str = ""
    strings: tuple[str, ...] = ()
    beyond: int = 0
    strict: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.delimiter,) if self.delimiter else self.strings


TO_END = Until()


@dataclass(frozen=True)
class Thought:
    """Thinking of the model's own before it answers: no part of a step. ``place``: the field of the upstream's message."""

    text: str
    place: str


@dataclass(frozen=True)
class TextDelta:
    """Text that the upstream sampled, or (``sampled`` false) a delimiter that closes a step or a tool's ``output``; with its
    tokens' ``logprobs``, where they are asked for."""

    text: str
    sampled: bool = True
    output: bool = False
    place: str = "content"
    logprobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class StepEnd:
    """Why the upstream stopped, and all that it wrote in the step, the delimiter included.

    ``thought``: how many of its tokens were thinking, which is no part of the step; ``told``: a reason that ends the answer and
    is neither, as the upstream calls it (``content_filter``).
    """

    reason: End
    usage: Usage
    text: str = ""
    thought: int = 0
    told: str = ""

    @property
    def tokens(self) -> int:
        """Of the step's text."""
        return max(0, self.usage.completion_tokens - self.thought)


@dataclass(frozen=True)
class Asked:
    """One answer that is wanted. ``messages`` or ``prompt`` as the client sent them (``prompt_ids`` if it sent token ids);
    ``sampling`` is passed to the upstream; ``continues``: the last message is the assistant's own, to be gone on with. A model
    that thinks may take ``thinking`` more tokens in each call; ``limit_field`` is the one that a call's limit goes in.
    ``headers`` go with every call. ``form`` (a ``response_format``) or ``tools`` are for the final step alone; ``logprobs``:
    how many to tell beside each token's own."""

    model: str
    messages: list[dict[str, Any]] | None
    prompt: str | None
    sampling: dict[str, Any] = field(default_factory=dict)
    prompt_ids: list[int] | None = None
    continues: bool = False
    thinking: int = 0
    limit_field: str = "max_tokens"
    headers: Headers = ()
    form: dict[str, Any] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Any = None
    logprobs: int | None = None

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
    def strict(self) -> bool:
        """Whether the answer is the final step alone; what is before it is thinking."""
        return bool(self.form or self.tools)

    @property
    def greedy(self) -> bool:
        temperature = self.sampling.get("temperature")
        return temperature is not None and temperature < 1e-6  # logits that are divided by less are no numbers any more


def text_of(content: Any) -> str:
    """The text of a message's content, which may be a list of parts (images and the like are left out)."""
    if isinstance(content, list):
        return "\n".join(str(p.get("text", "")) for p in content if isinstance(p, dict) and p.get("type") == "text")
    return str(content or "")


class Conversation(Protocol):
    """The upstream's side of one answer."""

    def inject(self, text: str) -> None:
        """Appends ``text`` to the answer; it is sent with the next step."""

    def step(self, max_new_tokens: int, until: Until) -> AsyncGenerator[TextDelta | Thought | StepEnd]:
        """Yields text as it is sampled, then one `StepEnd`."""

    def cut(self, tokens: int) -> Usage:
        """What a step has spent that is given up after about so many tokens: an estimate."""

    def count(self, text: str) -> int:
        """How many tokens ``text`` takes where it is injected."""

    def room(self) -> int:
        """How many tokens, injected ones among them, still fit into the upstream's context, as far as is known."""

    async def close(self) -> None: ...


class Upstream(Protocol):
    """An LLM that continues what was injected."""

    mode: Mode

    async def open(self, asked: Asked) -> Conversation: ...

    async def text(self, asked: Asked) -> str:
        """Of a prompt that was sent as token ids. Raises `UserError` where they cannot be read."""


@dataclass(frozen=True)
class Injected:
    """A strategy's prompt, put into the answer; an empty ``text`` where the planner did not intervene, no ``decision`` where it
    was not asked. ``place``: the field of the message in which it is shown; "": in none."""

    strategy: str
    text: str
    probabilities: dict[str, float]
    forced: bool = False
    decision: Decision | None = None
    place: str = "content"


@dataclass(frozen=True)
class Finished:
    """The end of an answer. ``reason``: stop, length, or the upstream's own; ``stop``: the client's stop string that ended it;
    ``injected_tokens`` as the budget counts them; ``planner_ids``: what the planner has read at its last decision."""

    reason: str
    usage: Usage
    ending: Ending = field(default_factory=lambda: Ending(over=True))
    injected_tokens: int = 0
    stop: str | None = None
    planner_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Called:
    """A tool that the answer calls; ``arguments`` as JSON."""

    id: str
    name: str
    arguments: str


Event = Injected | Thought | TextDelta | Called | Finished


async def play(
    asked: Asked,
    batcher: PlannerBatcher,
    upstream: Upstream,
    rules: PlayRules,
    limit: int,
    spent: Usage | None = None,
    runner: Runner | None = None,
) -> AsyncGenerator[Event]:
    """Plays one answer of at most ``limit`` tokens, sampled and injected; the last event is `Finished`.

    ``spent``, if given, is counted up after every step, for a caller who may not read to the end. ``runner`` runs the programs
    of strategies that write some: `rsim.game.tools.check_tools` says whether it is needed.

    Closing the iterator (a client that went away) cancels what the upstream is doing and frees the planner's slot.
    """
    usage = Usage() if spent is None else spent
    planner = await batcher.open(asked.question, asked.sampling.get("seed"))
    try:
        conversation = await upstream.open(replace(asked, thinking=max(limit, rules.max_tokens)))
        try:
            allowed = rules.within(min(limit, conversation.room()))
            if asked.strict:
                allowed = replace(allowed, answer_tokens=max(allowed.answer_tokens, _kept_for_form(allowed.max_tokens)))
            book = rulebook_of(batcher.planner, allowed, conversation.count)
            turns = upstream.mode == "turn" and asked.messages is not None
            game = _Game(
                asked, batcher, planner, conversation, book, Tools(runner, book.rules, conversation.count), turns, usage
            )
            async with aclosing(game.steps()) as events:
                async for event in events:
                    yield event
        finally:
            await conversation.close()
    finally:
        planner.close()


def _kept_for_form(limit: int) -> int:
    """Of ``limit`` tokens those that the steps leave to an answer in a form: a form that is cut is none. Half of them; of few
    tokens, whose half a short form may exceed, 128 or two thirds."""
    return min(max(limit // 2, 128), 2 * limit // 3)


@dataclass
class _Step:
    """A step as it grows; ``read`` is what the planner will read of it."""

    move: Move
    limit: int  # of what it may sample
    until: Until
    injected: int  # tokens
    sampled: int = 0
    read: str = ""
    before: str = ""  # the answer up to what is sampled and read, the step's prompt included
    end: End = "cap"
    told: str = ""


@dataclass
class _Game:
    """One answer that is played. ``turns``: every strategy is a message of its own."""

    asked: Asked
    batcher: PlannerBatcher
    planner: PlannedAnswer
    conversation: Conversation
    book: Rulebook
    tools: Tools
    turns: bool
    usage: Usage
    progress: Progress = field(default_factory=Progress)
    last: str = ""  # the last step, as it was sampled
    said: str = ""  # all of the answer

    async def steps(self) -> AsyncGenerator[Event]:
        book, strategies, strict = self.book, self.batcher.strategies, self.asked.strict
        injected_tokens, ending = 0, Ending()
        aside, due = "reasoning_content" if strict else "content", False
        while not ending.over:
            with tracing.span("rsim.decision", {}) as note:
                move, decision = (book.move(None), None) if due else await self._choose()
                name = strategies[move.strategy if move != ALONE else strategies.neutral].name
                note({"rsim.strategy": name, "rsim.forced": move.forced})
            prompt = self._prompt(move)
            yield Injected(name, prompt, _shown(strategies.names, decision), move.forced, decision, aside)
            step = self._opened(move, prompt)
            if step.read:
                yield TextDelta(step.read, sampled=False, output=True, place=aside)
            self.last = ""
            if strict and move.final:
                step.until, step.limit = Until(strict=True), max(step.limit, book.left(self.progress) - step.injected)
            called = {"gen_ai.operation.name": "chat", "gen_ai.request.model": self.asked.model, "rsim.strategy": name}
            with tracing.span(f"chat {self.asked.model}", called) as note:
                async with aclosing(self._sampled(step)) as events:
                    async for event in events:
                        if isinstance(event, TextDelta):
                            self.last += event.text if event.sampled else ""
                            if strict and not move.final:  # thinking, which has no log-probs
                                event = replace(event, place=aside, logprobs=[])
                        yield event
                note({"gen_ai.usage.output_tokens": step.sampled, "gen_ai.response.finish_reasons": [step.told or step.end]})
            ending = book.ending(step.move, step.end)
            if strict and ending.over and not move.final and not step.told:  # it ended its turn without the answer
                due, ending = True, Ending()
            if ending.closes:
                self.conversation.inject(book.rules.delimiter)
                step.injected += book.lengths.delimiter
                yield TextDelta(book.rules.delimiter, sampled=False, place=aside)
            self.said = step.before + step.read + (book.rules.delimiter if ending.closes else "")
            injected_tokens += step.injected
            self.progress = Progress(self.progress.steps + 1, self.progress.tokens + step.injected + step.sampled)
            self.planner.observe(name, step.read)
        reason = "length" if ending.truncated else step.told or "stop"
        yield Finished(reason, self.usage, ending, injected_tokens, planner_ids=self.planner.ids())

    async def _choose(self) -> tuple[Move, Decision | None]:
        """The next step, and the planner's decision if it was asked.

        A question that it cannot read is answered without it, in one step; once its context is full, the answer is due.
        """
        reads = self.planner.reads()
        if self.progress.steps == 0 and not reads:
            return ALONE, None
        if self.book.must_end(self.progress) or not reads:
            return self.book.move(None), None
        decision = await self.planner.decide()
        return self.book.move(decision.action, max(decision.probabilities)), decision

    def _prompt(self, move: Move) -> str:
        """The wording that is injected: the first of its strategy or, where answers are sampled, any."""
        if not move.injects:
            return ""
        prompts = self.batcher.strategies[move.strategy].prompts
        drawn = self.book.rules.paraphrase == "random" and not self.asked.greedy
        prompt = self.planner.draws.choice(prompts) if drawn else prompts[0]
        return as_message(prompt) if self.turns else prompt

    def _opened(self, move: Move, prompt: str) -> _Step:
        """A step whose prompt is injected, and behind it a calculator's report on the last step."""
        book, conversation = self.book, self.conversation
        report = self.tools.recalculate(self.last) if move.tool == "calculator" else ""
        injected = sum(conversation.count(text) for text in (prompt, report) if text)
        conversation.inject(prompt)
        conversation.inject(report)
        beyond = book.left(self.progress) - injected if book.rules.gate and not move.final else 0
        before = self.said + prompt
        until = self._until(before + report, beyond) if book.stops(move) else TO_END
        if move.tool == "python":  # a message of its own opens no block: the program comes back inside of one
            until = TO_END if self.turns else Until(strings=(FENCE,))
        return _Step(move, book.max_new_tokens(move, self.progress, injected), until, injected, read=report, before=before)

    def _until(self, said: str, beyond: int = 0) -> Until:
        """A delimiter outside of code blocks; a message of its own goes on with none."""
        return Until(self.book.rules.delimiter, "" if self.turns else open_block(said), beyond=beyond)

    async def _sampled(self, step: _Step) -> AsyncGenerator[Thought | TextDelta]:
        """What is sampled in a step and, where its program is run, the output and what follows it."""
        book, conversation = self.book, self.conversation
        while step.sampled < step.limit:
            end, read = StepEnd("cap", Usage()), 0
            try:
                async with aclosing(conversation.step(step.limit - step.sampled, step.until)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, StepEnd):
                            end = piece
                        else:
                            read += tokens_in(piece.text)
                            yield piece
            except GeneratorExit:  # a string of the client's was met
                self.usage.add(conversation.cut(read))
                raise
            self.usage.add(replace(end.usage, reasoning_tokens=min(end.thought, end.usage.completion_tokens)))
            text, step.end, step.told = end.text, end.reason, end.told
            step.sampled, step.read = step.sampled + end.tokens, step.read + text
            message = self.turns and step.move.tool == "python"
            program = _written(text, step.end) if message else book.program(step.move, step.end, text)
            if program is None:
                return
            output = await asyncio.wrap_future(self.tools.start(program, text))
            conversation.inject(output)
            step.injected += conversation.count(output) if output else 0
            step.read, step.end = step.read + output, "cap"
            step.move, step.until = replace(step.move, tool=None), self._until(step.before + step.read)
            if output:
                yield TextDelta(output, sampled=False, output=True)
            if self.turns:  # the next message has the output: the turn of this one is over
                step.end = "delimiter"
            if self.turns or book.rules.tool_ends_step:
                return


def _written(message: str, end: End) -> str | None:
    """The program in a message that was not cut: the last code block."""
    blocks = message.split(FENCE)[1::2]
    return blocks[-1].partition("\n")[2] if end != "cap" and blocks else None


def _shown(names: tuple[str, ...], decision: Decision | None) -> dict[str, float]:
    return {name: round(p, 4) for name, p in zip(names, decision.probabilities, strict=True)} if decision else {}
