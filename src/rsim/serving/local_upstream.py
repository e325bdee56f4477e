"""A transformers model in this process as the upstream: exact token ids, continuous batching over all answers.

One thread owns the model. It samples a token of every running answer per forward pass (`rsim.engine.decoder`) and hands the
text to the event loop; answers come and go without waiting for each other.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rsim.answers.prefix import step_end
from rsim.engine.decoder import Decoder
from rsim.engine.sampling import StepEnds, choose
from rsim.errors import UserError
from rsim.policies.reasoner import Reasoner
from rsim.serving.play import Asked, Conversation, Mode, StepEnd, Usage

_FIRST_TOKENS = 256  # that the cache has room for before it grows
SAMPLING = {"temperature", "seed"}  # what requests may set


_Piece = str | StepEnd | Exception


@dataclass
class _Answer:
    """One slot's sequence of ``length`` tokens; ``emit`` hands pieces to the event loop."""

    slot: int
    pending: list[int]
    temperature: float
    draws: np.random.Generator
    emit: Callable[[_Piece], object] = lambda piece: None
    delimiter: str | None = None
    limit: int = 0
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    shown: str = ""


class LocalUpstream:
    """Up to ``slots`` answers at a time; more wait for a free slot. `close` ends the thread."""

    mode: Mode = "exact"

    def __init__(self, reasoner: Reasoner, slots: int) -> None:
        self.reasoner = reasoner
        self.decoder = Decoder(reasoner.model, slots, capacity=_FIRST_TOKENS)
        self.context: int = reasoner.model.config.get_text_config().max_position_embeddings
        self.free: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()  # low ones first: the cache is read up to the last
        for slot in range(slots):
            self.free.put_nowait(slot)
        self.commands: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.running: dict[int, _Answer] = {}
        self.ends: dict[str, StepEnds] = {}
        self.thread = threading.Thread(target=self._work, name="rsim-upstream", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.commands.put(None)
        self.thread.join()

    async def open(self, asked: Asked) -> Conversation:
        """Raises `UserError` for a prompt that does not fit, or sampling settings that only a server has."""
        unknown = {k for k, v in asked.sampling.items() if k not in SAMPLING and v is not None and (k, v) != ("top_p", 1)}
        if unknown:
            raise UserError(f"{sorted(unknown)[0]} is not supported by a model in this process", "use an upstream server")
        ids = self._prompt(asked)
        if not ids:
            raise UserError("the prompt is empty")
        if len(ids) >= self.context:
            raise UserError(f"a prompt of {len(ids)} tokens exceeds the model's context of {self.context}")
        temperature, seed = asked.sampling.get("temperature"), asked.sampling.get("seed")
        warmth = 1.0 if temperature is None else float(temperature)
        draws = np.random.default_rng(None if seed is None else seed % (1 << 63))
        answer = _Answer(await self.free.get(), ids, warmth, draws, length=len(ids))
        return _LocalConversation(self, answer)

    def decode(self, ids: list[int]) -> str:
        """The text of a prompt that was sent as token ids.

        Raises:
            UserError: an id that the model does not have.
        """
        if not all(0 <= i < self.reasoner.model.get_input_embeddings().weight.shape[0] for i in ids):
            raise UserError("the prompt holds a token id that the model does not have")
        return str(self.reasoner.tokenizer.decode(ids))

    def _prompt(self, asked: Asked) -> list[int]:
        tokenizer = self.reasoner.tokenizer
        if asked.prompt_ids is not None:
            return asked.prompt_ids
        if asked.messages is None:
            ids: list[int] = tokenizer.encode(asked.prompt or "")
            return ids
        if not tokenizer.chat_template:
            return self.reasoner.prompt_ids(asked.question)
        text = tokenizer.apply_chat_template(
            asked.messages, add_generation_prompt=not asked.continues, continue_final_message=asked.continues, tokenize=False
        )
        return self.reasoner.injected_ids(str(text))

    # --- the thread's side ---

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            while not self.running or not self.commands.empty():
                command = self.commands.get()
                if command is None:
                    return
                command()
            try:
                self._advance()
            except Exception as error:  # the answers that run get it; the thread goes on for the next ones
                for answer in self.running.values():
                    answer.emit(error)
                self.running.clear()

    def _advance(self) -> None:
        """One token of every running answer."""
        answers = list(self.running.values())
        fresh = [a for a in answers if a.slot not in self.decoder.prefixes]
        for answer, rest in zip(
            fresh, self.decoder.start([a.slot for a in fresh], [a.pending for a in fresh]) if fresh else [], strict=True
        ):
            answer.pending = rest
        hidden = self.decoder.append([a.slot for a in answers], [a.pending for a in answers])
        temperatures = torch.tensor([a.temperature for a in answers], device=hidden.device)
        draws = torch.tensor([a.draws.random(dtype=np.float32) for a in answers], device=hidden.device)
        picked, _ = choose(self.reasoner.logits(hidden), temperatures, draws)
        for answer, token in zip(answers, picked.tolist(), strict=True):
            answer.pending = [token]
            answer.tokens.append(token)
            self._show(answer)

    def _show(self, answer: _Answer) -> None:
        """Hands on the text that the last token completed, and the step's end."""
        ended = answer.tokens[-1] in self.reasoner.end_ids
        text = self.reasoner.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        reason: Any = "end_of_turn" if ended else None
        if reason is None and answer.delimiter is not None and self._step_ends(answer.delimiter).ended(answer.tokens):
            reason, text = "delimiter", text[: step_end(text, answer.delimiter)]
        if reason is None and len(answer.tokens) >= answer.limit:
            reason = "limit"
        if reason is None and answer.delimiter is not None:
            text = _without_partial(text, answer.delimiter)  # the beginning of a delimiter is held back
        if len(text) > len(answer.shown) and (reason is not None or not text.endswith("�")):
            answer.emit(text[len(answer.shown) :])
            answer.shown = text
        if reason is not None:
            del self.running[answer.slot]
            answer.length += len(answer.tokens)
            answer.emit(StepEnd(reason, Usage(0, len(answer.tokens))))

    def _step_ends(self, delimiter: str) -> StepEnds:
        if delimiter not in self.ends:
            vocabulary = self.reasoner.model.get_output_embeddings().weight.shape[0]
            self.ends[delimiter] = StepEnds(self.reasoner.tokenizer, delimiter, vocabulary)
        return self.ends[delimiter]

    def stop(self, answer: _Answer) -> None:
        self.running.pop(answer.slot, None)

    def forget(self, answer: _Answer) -> None:
        self.stop(answer)
        self.decoder.release(answer.slot)


class _LocalConversation:
    def __init__(self, upstream: LocalUpstream, answer: _Answer) -> None:
        self.upstream, self.answer = upstream, answer
        self.prompt_tokens = answer.length  # not yet accounted for
        self.owed: list[int] = []  # the delimiter, if a limit cut the last step

    async def step(self, injected: str, limit: int, delimiter: str | None) -> AsyncIterator[str | StepEnd]:
        upstream, answer = self.upstream, self.answer
        pieces: asyncio.Queue[_Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        ids = self.owed + (upstream.reasoner.injected_ids(injected) if injected else [])
        limit = min(limit, upstream.context - answer.length - len(ids))
        if limit < 1:
            yield StepEnd("limit", Usage(self.prompt_tokens, 0))
            self.prompt_tokens = 0
            return

        def begin() -> None:
            answer.pending = answer.pending + ids
            answer.emit = lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)
            answer.delimiter, answer.tokens, answer.shown = delimiter, [], ""
            answer.limit = limit
            answer.length += len(ids)
            upstream.running[answer.slot] = answer

        upstream.commands.put(begin)
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                if isinstance(piece, StepEnd):
                    cut = piece.reason == "limit" and delimiter is not None
                    self.owed = upstream.reasoner.injected_ids(delimiter or "") if cut else []
                    yield StepEnd(piece.reason, Usage(self.prompt_tokens, piece.usage.completion_tokens))
                    self.prompt_tokens = 0
                    return
                yield piece
        finally:
            upstream.commands.put(lambda: upstream.stop(answer))

    def room(self) -> int:
        return self.upstream.context - self.answer.length - len(self.owed)

    async def close(self) -> None:
        upstream, answer, loop = self.upstream, self.answer, asyncio.get_running_loop()

        def forget() -> None:
            upstream.forget(answer)
            loop.call_soon_threadsafe(upstream.free.put_nowait, answer.slot)

        upstream.commands.put(forget)


def _without_partial(text: str, delimiter: str) -> str:
    """``text`` without an ending that may become the delimiter.

    >>> _without_partial("so far\\n", "\\n\\n")
    'so far'
    """
    for length in range(min(len(delimiter) - 1, len(text)), 0, -1):
        if text.endswith(delimiter[:length]):
            return text[:-length]
    return text
