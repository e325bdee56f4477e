"""A stand-in for llama.cpp's server, in process: the routes that rsim uses, over a real (tiny) model, with slots
that remember what they have read, and can be saved and restored."""

from __future__ import annotations

import json
from typing import Any

import httpx
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class StandIn(httpx.MockTransport):
    """``eog``: what the server takes for an end of turn, which may be more than the model's own; ``read``: prompt
    tokens that were not in the slot's cache, request by request."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int = 64,
        context: int = 512,
        eog: set[int],
        copies: bool = True,
    ) -> None:
        super().__init__(self.answer)
        self.model, self.tokenizer, self.context, self.eog = model, tokenizer, context, eog
        self.caches: list[list[int]] = [[] for _ in range(slots)]
        self.busy: set[int] = set()
        self.copies, self.files = copies, dict[str, list[int]]()  # started with --slot-save-path; what lies there
        self.read: list[int] = []
        self.asked: list[dict[str, Any]] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        body = json.loads(request.content) if request.content else {}
        if path == "/props":
            return httpx.Response(200, json={"total_slots": len(self.caches)})
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"meta": {"n_vocab": self.model.config.vocab_size, "ftype": "all F32"}}]})
        if path == "/detokenize":
            return httpx.Response(200, json={"content": self.tokenizer.decode(body["tokens"])})
        if path.startswith("/slots/"):
            return self.slot(int(path.removeprefix("/slots/")), request.url.params["action"], body)
        assert path == "/completion"
        if len(body["prompt"]) >= self.context:
            error = {"code": 400, "message": "too long", "type": "exceed_context_size_error"}
            return httpx.Response(400, json={"error": error})
        if body["n_predict"] == 0:
            self.read.append(len(body["prompt"]))
            self.caches[body["id_slot"]] = body["prompt"]
            return httpx.Response(200, json={"tokens": []})
        self.asked.append(body)
        return httpx.Response(200, json=self.complete(**body))

    def slot(self, index: int, action: str, body: dict[str, Any]) -> httpx.Response:
        if action == "none" or not self.copies:
            return httpx.Response(400 if self.copies else 501, json={"error": {"message": "no"}})
        assert index not in self.busy, "copied to or from a slot at work"
        if action == "save":
            self.files[body["filename"]] = self.caches[index]
        else:
            self.caches[index] = self.files[body["filename"]]
        return httpx.Response(200, json={})

    @torch.no_grad()
    def complete(
        self,
        prompt: list[int],
        id_slot: int,
        n_predict: int,
        seed: int,
        stop: list[str],
        temperature: float,
        **body: Any,
    ) -> dict[str, Any]:
        assert id_slot not in self.busy, "two sequences in one slot"
        self.busy.add(id_slot)
        assert body["cache_prompt"]
        assert body["return_tokens"]
        assert 0 <= seed < 2**32 - 1
        same = 0
        while same < min(len(prompt), len(self.caches[id_slot])) and prompt[same] == self.caches[id_slot][same]:
            same += 1
        self.read.append(len(prompt) - min(same, len(prompt) - 1))
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        given: list[dict[str, Any]] = []
        kind = "limit"
        while len(tokens) < n_predict and len(prompt) + len(tokens) < self.context:
            logits = self.model(torch.tensor([prompt + tokens])).logits[0, -1]
            table = torch.log_softmax(logits / temperature, -1)
            greedy = body["samplers"] == ["top_k"] and body["top_k"] == 1
            assert greedy or (body["samplers"] == ["temperature"] and body["top_k"] == 0)
            token = int(table.argmax() if greedy else torch.multinomial(table.exp(), 1, generator=generator))
            tokens.append(token)
            if body["post_sampling_probs"]:
                given.append({"id": token, "prob": table[token].exp().item()})
            else:
                given.append({"id": token, "logprob": torch.log_softmax(logits, -1)[token].item()})
            if token in self.eog:
                kind = "eos"
                break
            if any(word in self.tokenizer.decode(tokens) for word in stop):
                kind = "word"
                del given[-len(self.tokenizer.encode(stop[0], add_special_tokens=False)) :]
                break
        self.caches[id_slot] = prompt + tokens[:-1]
        self.busy.discard(id_slot)
        return {
            "tokens": tokens,
            "stop_type": kind,
            "completion_probabilities": given if body["n_probs"] else [],
        }
