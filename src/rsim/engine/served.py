"""What vLLM's and llama.cpp's servers have in common as engines: HTTP, and one request a step, token ids in and out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx

from rsim import proxies
from rsim.engine.protocol import SampledStep, Stop
from rsim.errors import UserError, check_url, key_from


class Server:
    """A running server."""

    kind, setting = "", ""  # as errors call it; what its address and ``$..._API_KEY`` are named after
    idle: int | None = None  # connections that are kept

    def __init__(self, url: str, timeout: float, *, transport: httpx.BaseTransport | None = None) -> None:
        check_url(f"rollout.{self.setting}_url", url)
        key = key_from(f"{self.setting.upper()}_API_KEY")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.idle)
        self.url = url
        self.client = httpx.Client(
            base_url=url,
            timeout=httpx.Timeout(timeout, connect=30.0),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            transport=transport or proxies.transport(httpx.HTTPTransport, url, limits),
        )

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Raises `UserError` where the server is out of reach, or refuses."""
        answer = self.ask(method, path, body)
        if answer.status_code != 200:
            raise UserError(f"the server at {self.url} answered {answer.status_code} to {path}", self.remedy(answer))
        result: dict[str, Any] = answer.json() if answer.content else {}
        return result

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """Raises `UserError` where the server is out of reach."""
        try:
            return self.client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise UserError(f"no {self.kind} server at {self.url}", str(error) or type(error).__name__) from error

    def remedy(self, answer: httpx.Response) -> str:
        """What an answer that is none says of itself."""
        return answer.text[:300]


class ServedEngine(ABC):
    """Sequences of one rollout; each running step is a request of its own, all in flight together.

    Where a step ends is decided here, token by token, by the rule of the native engine; what a server is told of it only keeps
    it from sampling on. What is sampled depends on the seed and the sequence's key, by the server's generator.
    """

    def __init__(self, slots: int, seed: int, end_ids: set[int]) -> None:
        self.seed, self.end_ids = seed, end_ids
        self.threads = ThreadPoolExecutor(slots)
        self.sequences: dict[int, list[int]] = {}
        self.keys: dict[int, str] = {}
        self.futures: dict[Future[SampledStep], int] = {}

    @abstractmethod
    def request(
        self, slot: int, ids: list[int], max_new_tokens: int, seed: int, stops: list[str]
    ) -> tuple[list[int], list[float], bool]:
        """Samples behind ``ids``: tokens, log-probs, whether the server says that the turn is over; ``seed`` has 64 bits."""

    @property
    def running(self) -> int:
        return len(self.futures)

    def start(self, slots: list[int], prompts: list[list[int]], keys: list[str]) -> None:
        for slot, prompt, key in zip(slots, prompts, keys, strict=True):
            self.sequences[slot], self.keys[slot] = list(prompt), key

    def submit(self, slot: int, injected: list[int], max_new_tokens: int, stop: Stop | None) -> None:
        self.sequences[slot] += injected
        self.futures[self.threads.submit(self._step, slot, max_new_tokens, stop)] = slot

    def advance(self) -> list[SampledStep]:
        """Waits for the next steps to end."""
        done, _ = wait(self.futures, return_when=FIRST_COMPLETED)
        finished = sorted((future.result() for future in done), key=lambda step: step.slot)
        for future in done:
            del self.futures[future]
        for step in finished:
            self.sequences[step.slot] += step.tokens
        return finished

    def _step(self, slot: int, max_new_tokens: int, stop: Stop | None) -> SampledStep:
        tokens: list[int] = []
        logprobs: list[float] = []
        stops = list(stop.strings) if stop is not None else []
        while True:
            # Again, where the server stopped and the step did not: at a delimiter inside a code block, say.
            ids = self.sequences[slot] + tokens
            seed = hashlib.sha256(f"{self.seed}:{self.keys[slot]}:{len(ids)}".encode()).digest()[:8]
            left = max_new_tokens - len(tokens)
            more, values, over = self.request(slot, ids, left, int.from_bytes(seed, "big"), stops)
            for token, value in zip(more, values, strict=True):
                tokens.append(token)
                logprobs.append(value)
                if token in self.end_ids:
                    return SampledStep(slot, tokens, logprobs, "end_of_turn")
                if stop is not None and stop.ended(tokens):
                    return SampledStep(slot, tokens, logprobs, "delimiter")
                if len(tokens) == max_new_tokens:
                    return SampledStep(slot, tokens, logprobs, "cap")
            if over:
                return SampledStep(slot, tokens, logprobs, "end_of_turn")

    def release(self, slot: int) -> None:
        del self.sequences[slot], self.keys[slot]

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)
