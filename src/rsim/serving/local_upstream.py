"""A transformers model in this process as the upstream: exact token ids, continuous batching over all answers.

One thread owns the engine, the same that rollouts use (`rsim.engine.native`). After every forward pass it hands the new text to
the event loop; answers come and go without waiting for each other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
import uuid
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

from rsim.engine.detokenizer import Detokenizer
from rsim.engine.native import NativeEngine
from rsim.engine.protocol import SampledStep, Stop
from rsim.engine.sampling import DelimiterStop, StringStop, Vocabulary
from rsim.errors import UserError, first_line
from rsim.models.prompts import begin_ids, check_length, plain_text
from rsim.models.shape import context
from rsim.policies.reasoner import Reasoner
from rsim.rules import PlayRules
from rsim.serving.grammar import CALL, CALLED, Grammars, Shape, text_form
from rsim.serving.play import Asked, Conversation, Mode, StepEnd, TextDelta, Thought, Until, Usage

log = logging.getLogger("rsim.serve")

# What changes an answer and is not done here, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,), "presence_penalty": (0,),
    "frequency_penalty": (0,), "logit_bias": ({},), "stop_token_ids": ([],), "min_tokens": (0,), "ignore_eos": (False,),
    "chat_template_kwargs": ({},), "structured_outputs": (), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "grammar": ("",), "json_schema": (),
}  # fmt: skip

_SHOWN = f'To use a tool, answer {CALL}{{"name": ..., "arguments": {{...}}}}{CALLED} alone. Tools: '
_LOWEST = -9999.0  # as OpenAI tells the log-prob of what cannot be
_CHUNK = 512  # tokens of prompts in a forward pass: what the other answers wait for
T = TypeVar("T")
_Piece = TextDelta | StepEnd | Exception
Emit = Callable[[_Piece], object]


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of calls as objects: templates that know tools write them as JSON, and a text would be quoted once more."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    try:
        return message | {
            "tool_calls": [
                c | {"function": c["function"] | {"arguments": json.loads(c["function"]["arguments"] or "{}")}} for c in calls
            ]
        }
    except ValueError as error:
        raise UserError("the arguments of a call must be JSON") from error


def _told(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of tools and their results as texts, for templates that know neither. A result joins the user's message beside it:
    many of these templates want the turns to alternate."""
    told: list[dict[str, Any]] = []
    for before, message in zip([{}, *messages], messages, strict=False):
        calls = [call["function"] for call in message.get("tool_calls") or []]
        said = "".join(f'{CALL}{{"name": {json.dumps(c["name"])}, "arguments": {c["arguments"]}}}{CALLED}' for c in calls)
        role, content = message["role"], message["content"] + said
        if before.get("role") in ("tool", "user") and role in ("tool", "user") and "tool" in (before["role"], role):
            told[-1] = {"role": "user", "content": f"{told[-1]['content']}\n\n{content}"}
        else:
            own = {key: value for key, value in message.items() if key != "tool_calls"}
            told.append(own | {"role": "user" if role == "tool" else role, "content": content})
    return told


@dataclass
class _Step:
    """The step that a slot is sampling; ``emit`` hands its text to the event loop."""

    answer: _Answer
    emit: Emit
    text: Detokenizer
    shape: Shape | None
    told: int = 0  # log-probs


@dataclass
class _Answer:
    """One answer of ``length`` tokens, its prompt among them, in ``slot``. ``pending`` is injected with the next step."""

    slot: int
    prompt: list[int]
    key: str
    temperature: float
    length: int
    shaped: Callable[..., Shape]
    matcher: Any  # of what the final step has to keep to
    pending: list[int] = field(default_factory=list)
    begun: bool = False


class LocalUpstream:
    """Up to ``slots`` answers at a time; more wait for a free slot. `close` ends the thread. ``day``: see `PlayRules`."""

    mode: Mode = "exact"

    def __init__(self, reasoner: Reasoner, slots: int, day: str = PlayRules.day) -> None:
        self.reasoner, self.day = reasoner, day
        self.context = context(reasoner.model.config)
        self.engine = NativeEngine(
            reasoner, slots, seed=0, temperature=0.0, max_tokens=self.context, longest_prompt=0, chunk=_CHUNK
        )
        self.reading = ThreadPoolExecutor(1, "rsim-reading")  # tokenises: the event loop has other answers to see to
        self.vocabulary = Vocabulary(reasoner.tokenizer, reasoner.model.get_output_embeddings().weight.shape[0])
        self.ids_of = lru_cache(maxsize=4096)(reasoner.injected_ids)  # of what is injected: prompts come again and again
        self.free: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()
        for slot in range(slots):
            self.free.put_nowait(slot)
        self.grammars: Grammars | None = None  # made when the first is needed
        self.lock = threading.Lock()
        self.commands: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.steps: dict[int, _Step] = {}
        self.thread = threading.Thread(target=self._work, name="rsim-upstream", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.commands.put(None)
        self.thread.join()
        self.reading.shutdown()

    async def open(self, asked: Asked) -> Conversation:
        """Raises `UserError` for a prompt that does not fit, or sampling settings that only a server has."""
        undone = sorted(k for k, v in asked.sampling.items() if v not in _NEUTRAL.get(k, (v,)))
        if undone:
            raise UserError(f"{undone[0]} is not supported by a model in this process", "use an upstream server")
        ids = await self._reads(self._prompt, asked)
        if not ids:
            raise UserError("the prompt is empty")
        if len(ids) >= self.context:
            raise UserError(f"a prompt of {len(ids)} tokens exceeds the model's context of {self.context}")
        top_p = asked.sampling.get("top_p", 1)
        if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
            raise UserError("top_p must be a number above 0, at most 1")
        form = text_form(asked)
        grammars = await asyncio.to_thread(self._grammars) if form else None
        matcher = grammars.matcher(form) if grammars else None
        temperature, seed = asked.sampling.get("temperature"), asked.sampling.get("seed")
        key = uuid.uuid4().hex if seed is None else f"seed:{seed}"
        warmth = 0.0 if asked.greedy else 1.0 if temperature is None else float(temperature)
        shaped = partial(Shape, warmth, top_p, top=asked.logprobs, grammars=grammars)
        slot = await self.free.get()
        return _LocalConversation(self, _Answer(slot, ids, key, warmth, len(ids), shaped, matcher))

    def _grammars(self) -> Grammars:
        with self.lock:
            if self.grammars is None:
                self.grammars = Grammars(self.reasoner.tokenizer, self.vocabulary.size, self.engine.ends)
        return self.grammars

    async def text(self, asked: Asked) -> str:
        """Of a prompt that was sent as token ids. Raises `UserError` for ids that the model does not have."""
        ids, count = asked.prompt_ids, self.reasoner.model.get_input_embeddings().weight.shape[0]
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < count for i in ids):
            raise UserError("the prompt holds a token id that the model does not have")
        return str(await self._reads(self.reasoner.tokenizer.decode, ids))

    async def ids(self, text: str, *, begins: bool) -> list[int]:
        """Of a prompt that is sent as a text or, where it does not begin there, of what goes on."""

        def work(text: str) -> list[int]:
            check_length(self.reasoner.tokenizer, text, self.context)
            return begin_ids(self.reasoner.tokenizer, text) if begins else self.reasoner.injected_ids(text)

        return await self._reads(work, text)

    async def _reads(self, work: Callable[[Any], T], what: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.reading, work, what)

    def _prompt(self, asked: Asked) -> list[int]:
        if asked.prompt_ids is not None:
            return asked.prompt_ids
        if asked.messages is None:
            check_length(self.reasoner.tokenizer, asked.prompt or "", self.context)
            return begin_ids(self.reasoner.tokenizer, asked.prompt or "")
        knows = "tools" in str(self.reasoner.tokenizer.chat_template)
        messages = [m | {"content": ""} if m.get("tool_calls") and m.get("content") is None else m for m in asked.messages]
        messages = [m | {"content": plain_text(m.get("content"), f"messages[{i}]")} for i, m in enumerate(messages)]
        messages = [_with_objects(m) for m in messages] if knows else _told(messages)
        if asked.tools and not knows:
            messages[-1] = messages[-1] | {"content": f"{messages[-1]['content']}\n\n{_SHOWN}{json.dumps(asked.tools)}"}
        tools = asked.tools if knows and asked.tools else None
        check_length(self.reasoner.tokenizer, "".join(m["content"] for m in messages), self.context)
        return self.reasoner.chat_ids(messages, self.day, continues=asked.continues, tools=tools)

    # --- the thread's side ---

    def _work(self) -> None:
        while True:
            while not self.steps or not self.commands.empty():
                command = self.commands.get()
                if command is None:
                    return
                command()
            try:
                finished = self.engine.advance()
            except Exception as error:  # nothing has changed by it
                log.warning("a pass over %d answers failed (%s): each alone", len(self.steps), first_line(error))
                finished = self._one_by_one()
            for sampled in finished:
                self._finish(sampled, self.steps.pop(sampled.slot))
            for slot, step in self.steps.items():
                tokens = self.engine.sampled(slot)
                self._tell(step, step.text.add(tokens), tokens)

    def _one_by_one(self) -> list[SampledStep]:
        """Finds the answers that a forward pass fails on: they get the error, the others go on."""
        finished = []
        for slot, step in list(self.steps.items()):
            try:
                finished += self.engine.advance([slot])
            except Exception as error:
                self.engine.cancel(slot)
                del self.steps[slot]
                step.emit(error)
        return finished

    def _finish(self, sampled: SampledStep, step: _Step) -> None:
        delta, text = step.text.finish(sampled.tokens)
        self._tell(step, delta, sampled.tokens)
        step.emit(StepEnd(sampled.end, Usage(0, len(sampled.tokens)), text))

    def _tell(self, step: _Step, text: str, tokens: list[int]) -> None:
        logprobs = self._logprobs(step, step.shape, tokens) if step.shape else []
        if text or logprobs:
            step.emit(TextDelta(text, logprobs=logprobs))

    def _logprobs(self, step: _Step, shape: Shape, tokens: list[int]) -> list[dict[str, Any]]:
        """Those that were not told yet, as OpenAI tells them, under the model's own distribution."""
        shape.keep(tokens)
        new, step.told = shape.kept[step.told :], len(shape.kept)

        def shown(token: int, logprob: float) -> dict[str, Any]:
            text = str(self.reasoner.tokenizer.decode([token]))
            whole = "\ufffd" not in text  # a part of a character has no text, and its bytes are not told
            return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(text.encode()) if whole else None}

        return [shown(token, own) | {"top_logprobs": [shown(*other) for other in best]} for token, own, best in new]

    def begin(self, answer: _Answer, ids: list[int], max_new_tokens: int, until: Until, emit: Emit) -> None:
        """Lets an answer sample its next step, behind ``ids``."""
        try:
            if not answer.begun:
                self.engine.start([answer.slot], [answer.prompt], [answer.key], [answer.temperature])
                answer.begun = True
            asked = answer.shaped(limit=max_new_tokens, matcher=answer.matcher if until.strict else None)
            shape = asked if asked.bends else None
            self.engine.submit(answer.slot, ids, max_new_tokens, self._stop(until), shape)
            self.steps[answer.slot] = _Step(answer, emit, Detokenizer(self.reasoner.tokenizer), shape)
        except Exception as error:  # this answer's alone
            emit(error)

    def _stop(self, until: Until) -> Stop | None:
        if until.delimiter:
            return DelimiterStop(self.vocabulary, until.delimiter, until.answer_prefix)
        return StringStop(self.vocabulary, until.strings) if until.strings else None

    def stop(self, answer: _Answer) -> None:
        """Ends a step before its time: its client has gone. The slot may be another answer's by now."""
        step = self.steps.get(answer.slot)
        if step is not None and step.answer is answer:
            del self.steps[answer.slot]
            self.engine.cancel(answer.slot)

    def forget(self, answer: _Answer) -> None:
        self.steps.pop(answer.slot, None)
        if answer.begun:
            self.engine.release(answer.slot)


class _LocalConversation:
    def __init__(self, upstream: LocalUpstream, answer: _Answer) -> None:
        self.upstream, self.answer = upstream, answer
        self.prompt_tokens = answer.length  # not yet accounted for

    def inject(self, text: str) -> None:
        self.answer.pending = self.answer.pending + self.upstream.ids_of(text)

    def count(self, text: str) -> int:
        return len(self.upstream.ids_of(text))

    async def step(self, max_new_tokens: int, until: Until) -> AsyncGenerator[TextDelta | Thought | StepEnd]:
        upstream, answer = self.upstream, self.answer
        pieces: asyncio.Queue[_Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        ids, answer.pending = answer.pending, []
        answer.length += len(ids)
        limit = min(max_new_tokens, upstream.context - answer.length)
        if limit < 1:
            yield StepEnd("cap", self._usage(0))
            return

        def emit(piece: _Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        upstream.commands.put(lambda: upstream.begin(answer, ids, limit, until, emit))
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                if isinstance(piece, StepEnd):
                    answer.length += piece.usage.completion_tokens
                    yield replace(piece, usage=self._usage(piece.usage.completion_tokens))
                    return
                yield piece
        finally:
            upstream.commands.put(lambda: upstream.stop(answer))

    def cut(self, tokens: int) -> Usage:
        return replace(self._usage(tokens), estimated=True)

    def _usage(self, sampled: int) -> Usage:
        """Of a step; the prompt counts once."""
        prompt, self.prompt_tokens = self.prompt_tokens, 0
        return Usage(prompt, sampled)

    def room(self) -> int:
        return self.upstream.context - self.answer.length

    async def close(self) -> None:
        upstream, answer, loop = self.upstream, self.answer, asyncio.get_running_loop()

        def forget() -> None:
            upstream.forget(answer)
            loop.call_soon_threadsafe(upstream.free.put_nowait, answer.slot)

        upstream.commands.put(forget)
