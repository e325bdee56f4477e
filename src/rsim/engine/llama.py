"""llama.cpp's server as an engine, over HTTP: token ids in and out, for a reasoner that is not trained.

``studies/llama_server.sh`` builds the server, `rsim.engine.llama_process.llama_servers` starts it. A sequence
keeps one of its slots, whose cache holds what was read before, so that a step costs its new tokens alone; a
new sequence takes the slot that already holds its whole prompt, if one is free (several continuations of one
question, one after the other). What sequences side by side begin with is read once and copied from slot to slot, by a
file of the server's: where it was started with ``--slot-save-path``.

Log-probs are the server's, at the sampling temperature (at temperature 1 for greedy sampling); it gives none for the
tokens of a stop string and for parts of a character, which are ``nan``. What is sampled does not depend on what is
sampled beside it (see `rsim.engine.llama_process`); but a prompt that is in the cache has other last bits than one
that is read, which may decide a near-tie.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from rsim.engine.served import ServedEngine, Server
from rsim.errors import UserError

_NONE = float("nan")  # a log-prob that the server does not give
_SEEDS = 2**32 - 1  # the last one means: a random seed
_KEPT = 16  # greedy requests of a slot: the steps of one question's arms
_TEXTS = (
    "The answer is \\boxed{1234.5}.\n\n",
    "```python\ndef f(x):\n    return x**2  # ²\n```\n",
    " Ünïcode — 中文 🙂",
)


@dataclass
class Seat:
    """One slot of a server, and the token ids that its cache was left with."""

    server: LlamaServer
    index: int
    held: list[int] = field(default_factory=list)
    taken: bool = False
    greedy: dict[str, dict[str, Any]] = field(default_factory=dict)  # the last greedy requests, and their answers

    def shares(self, prompt: list[int]) -> int:
        """How many tokens of ``prompt`` need not be read again."""
        pairs = zip(self.held, prompt, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.held), len(prompt)))


class LlamaServer(Server):
    """A running server and its slots."""

    kind, setting = "llama.cpp", "llama"
    idle = 0  # a connection a request: the server drops idle ones at its own time

    def __init__(self, url: str, timeout: float, *, transport: httpx.BaseTransport | None = None) -> None:
        super().__init__(url, timeout, transport=transport)
        slots = self.call("GET", "/props")["total_slots"]
        self.seats = [Seat(self, index) for index in range(slots)]
        self.copies = self.ask("POST", "/slots/0?action=none", {}).status_code == 400  # else 501: it saves none
        self.files: dict[int, list[int]] = {}  # the prompt in the file of each slot that has one
        self.lock = Lock()

    def remedy(self, answer: httpx.Response) -> str:
        if "exceed_context_size" in answer.text:
            return "a prompt exceeds a slot's context: raise --ctx-size (it is shared by the slots)"
        return super().remedy(answer)

    def complete(self, prompt: list[int], seat: int, **settings: Any) -> dict[str, Any]:
        """The server's answer to a prompt of token ids that is read and continued in its slot ``seat``.

        Raises:
            UserError: the server is out of reach, refuses, or does not return token ids.
        """
        body = {"prompt": prompt, "id_slot": seat, "cache_prompt": True, "return_tokens": True} | settings
        reply = self.call("POST", "/completion", body)
        if not reply.get("tokens"):
            raise UserError(
                f"the server at {self.url} returns no token ids",
                "rsim needs llama.cpp's own server, of 2025 or later",
            )
        return reply

    def begin(self, prompt: list[int], seat: Seat) -> None:
        """Puts a prompt that others have too into a slot's cache: reads and saves it, or copies what was saved. A slot saves
        one at a time: the folder does not grow.

        Raises:
            UserError: the server is out of reach, or can neither save nor restore.
        """
        with self.lock:
            saved = next((index for index, held in self.files.items() if held == prompt), None)
            if saved is None:
                asked = {"prompt": prompt, "id_slot": seat.index, "cache_prompt": True, "n_predict": 0}
                self.call("POST", "/completion", asked)
                self.files.pop(seat.index, None)
                self.call("POST", f"/slots/{seat.index}?action=save", {"filename": f"rsim-{seat.index}"})
                self.files[seat.index] = prompt
            elif seat.shares(prompt) < len(prompt):
                self.call("POST", f"/slots/{seat.index}?action=restore", {"filename": f"rsim-{saved}"})

    def check(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Raises `UserError` unless the server's vocabulary has that size and ids mean the same to both."""
        remedy = "models.reasoner and the server's GGUF file must be the same model"
        meta = self.meta()
        if meta["n_vocab"] != vocabulary:
            raise UserError(
                f"the server at {self.url} knows {meta['n_vocab']} tokens, the reasoner {vocabulary}",
                remedy,
            )
        # How a text is best cut into ids may differ (around ², say): that is the tokenizer's business.
        for text in (*_TEXTS, str(tokenizer.eos_token)):
            ids = tokenizer.encode(text, add_special_tokens=False)
            theirs = self.call("POST", "/detokenize", {"tokens": ids})["content"]
            own = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if theirs.split() != own.split():
                raise UserError(
                    f"the server at {self.url} has another tokenizer: the reasoner's {own!r} is {theirs!r}",
                    remedy,
                )

    def meta(self) -> dict[str, Any]:
        """What the server says of its model."""
        described: dict[str, Any] = self.call("GET", "/v1/models")["data"][0]["meta"]
        return described


class LlamaServers:
    """One or more servers of the same model; sequences are spread over their slots."""

    def __init__(self, urls: str, timeout: float) -> None:
        """``urls``: one or more, with commas between them."""
        self.servers = [LlamaServer(url.strip(), timeout) for url in urls.split(",")]

    @property
    def slots(self) -> int:
        return sum(len(server.seats) for server in self.servers)

    def check(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """`LlamaServer.check` of each."""
        for server in self.servers:
            server.check(tokenizer, vocabulary)

    @property
    def quantisation(self) -> str:
        """The type of the weights, as the first server names it."""
        return str(self.servers[0].meta()["ftype"])

    def single(self) -> list[LlamaServers]:
        """Every slot on its own, for rollouts side by side of one sequence at a time; those of several servers in turn."""
        views = []
        for server in self.servers:
            for seat in server.seats:
                alone, view = copy.copy(server), copy.copy(self)
                alone.seats, view.servers = [seat], [alone]
                views.append(view)
        return sorted(views, key=lambda view: view.servers[0].seats[0].index)

    def take(self, prompt: list[int]) -> Seat:
        """A free slot: one that holds the whole prompt, else the best of the server with most of them free."""

        def worth(seat: Seat) -> tuple[bool, int, int]:
            shared = seat.shares(prompt)
            return shared == len(prompt), sum(not other.taken for other in seat.server.seats), shared

        seat = max((seat for server in self.servers for seat in server.seats if not seat.taken), key=worth)
        seat.taken = True
        return seat


class LlamaEngine(ServedEngine):
    """A sequence keeps a slot of a server."""

    def __init__(
        self,
        servers: LlamaServers,
        slots: int,
        *,
        seed: int,
        temperature: float,
        end_ids: set[int],
        logprobs: bool = True,
    ) -> None:
        """``logprobs``: ask for them; without, all are ``nan``.

        Raises:
            UserError: the servers have fewer slots than ``slots``.
        """
        if slots > servers.slots:
            raise UserError(
                f"{slots} episodes at a time on {servers.slots} slots of llama.cpp",
                f"set rollout.batch = {servers.slots}, or start the servers with a larger --parallel",
            )
        super().__init__(slots, seed, end_ids)
        self.servers = servers
        self.settings = sampling(temperature, logprobs=logprobs)
        self.seats: dict[int, Seat] = {}
        self.begun: Counter[tuple[int, ...]] = Counter()  # sequences of each prompt
        self.new: dict[int, list[int]] = {}  # prompts of the slots whose sequence has sent nothing yet

    def start(self, slots: list[int], prompts: list[list[int]], keys: list[str]) -> None:
        super().start(slots, prompts, keys)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.seats[slot] = self.servers.take(prompt)
            self.new[slot] = list(prompt)  # the game appends to its own
        self.begun.update(map(tuple, prompts))

    def request(
        self, slot: int, ids: list[int], max_new_tokens: int, seed: int, stops: list[str]
    ) -> tuple[list[int], list[float], bool]:
        seat, prompt = self.seats[slot], self.new.pop(slot, [])
        if self.begun[tuple(prompt)] > 1 and seat.server.copies:
            seat.server.begin(prompt, seat)
        asked = self.settings | {"n_predict": max_new_tokens, "seed": seed % _SEEDS, "stop": stops}
        reply = self._reply(seat, ids, asked)
        tokens: list[int] = reply["tokens"]
        if reply["stop_type"] == "limit" and len(tokens) < max_new_tokens:
            raise UserError(
                f"the server at {seat.server.url} cut a step short: a slot's context is full",
                "raise --ctx-size (it is shared by the slots)",
            )
        return tokens, aligned(tokens, reply.get("completion_probabilities", [])), False

    def _reply(self, seat: Seat, ids: list[int], asked: dict[str, Any]) -> dict[str, Any]:
        """The server's. A greedy step that this slot has just taken, as arms that begin alike do, is not sampled again."""
        if asked["top_k"] != 1:
            return seat.server.complete(ids, seat.index, **asked)
        key = json.dumps([ids, asked["n_predict"], asked["stop"], asked["n_probs"]])
        reply = seat.greedy.get(key) or seat.server.complete(ids, seat.index, **asked)
        seat.greedy = dict([*seat.greedy.items(), (key, reply)][-_KEPT:])
        return reply

    def release(self, slot: int) -> None:
        seat = self.seats.pop(slot)
        seat.held, seat.taken = self.sequences[slot], False
        super().release(slot)

    def close(self) -> None:
        super().close()
        for seat in self.seats.values():
            seat.taken = False


def sampling(temperature: float, *, logprobs: bool) -> dict[str, Any]:
    """The sampler: temperature alone; greedy is the likeliest token. Nothing that bends the distribution."""
    settings: dict[str, Any] = {
        "temperature": temperature or 1.0,
        "samplers": ["temperature"] if temperature else ["top_k"],
    }
    settings |= {"top_k": 0 if temperature else 1, "n_probs": int(logprobs)}
    # A chosen token's probability is known behind the sampler, at the temperature, or before it, at 1.
    return settings | {"post_sampling_probs": temperature not in (0, 1)}


def aligned(tokens: list[int], given: list[dict[str, Any]]) -> list[float]:
    """Log-probs of ``tokens``, from entries the server gave for some of them, in order; ``nan`` for the rest.

    >>> aligned([5, 7, 9], [{"id": 5, "logprob": -0.5}, {"id": 9, "prob": 1.0}])
    [-0.5, nan, 0.0]
    """
    values = []
    entries = iter(given)
    entry = next(entries, None)
    for token in tokens:
        if entry is None or entry["id"] != token:
            values.append(_NONE)
            continue
        values.append(entry["logprob"] if "logprob" in entry else math.log(entry["prob"]))
        entry = next(entries, None)
    return values
