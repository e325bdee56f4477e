"""A stand-in for a vLLM server, in process: the routes that rsim uses, over a real (tiny) model, with a prefix cache that is wrong
after a weight update until it is reset, as vLLM's is."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

# transformers' from_pretrained patches its classes while it runs: two at once leave tied heads unloaded.
_loading = threading.Lock()


class StandIn(httpx.MockTransport):
    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, processed: bool = True, context: int = 512,
        keeps_head: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(self.answer)
        self.model, self.tokenizer = model, tokenizer
        self.processed, self.context, self.keeps_head = processed, context, keeps_head
        self.cache: dict[tuple[int, ...], torch.Tensor] = {}  # first logits after a prompt
        self.calls: list[str] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.calls.append(path)
        body = json.loads(request.content) if request.content else {}
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "rsim"}]})
        if path == "/tokenize":
            return httpx.Response(200, json={"tokens": self.tokenizer.encode(body["prompt"])})
        if path == "/v1/completions":
            return httpx.Response(200, json={"choices": [self.complete(**body)]})
        if path == "/reset_prefix_cache":
            self.cache.clear()
            return httpx.Response(200, json={"success": True})
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            head = self.model.get_output_embeddings().weight
            with _loading:
                self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
            assert not self.model.config.tie_word_embeddings
            if self.keeps_head:
                self.model.lm_head.weight = head
            return httpx.Response(200, json={"results": [None]})
        return httpx.Response(200 if path in ("/pause", "/resume", "/health") else 404, json={})

    @torch.no_grad()
    def complete(self, prompt: list[int], max_tokens: int, temperature: float, **body: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body.get("seed", 0) % 2**31)
        tokens: list[int] = []
        logprobs: list[float] = []
        choice = {"finish_reason": "length", "stop_reason": None}
        while len(tokens) < max_tokens and len(prompt) + len(tokens) < self.context:
            key = tuple(prompt + tokens)
            if key not in self.cache:
                self.cache[key] = self.model(torch.tensor([key])).logits[0, -1]
            scaled = self.cache[key] / (temperature or 1.0)
            greedy = temperature == 0 or body.get("top_k") == 1
            token = int(scaled.argmax() if greedy else torch.multinomial(scaled.softmax(-1), 1, generator=generator))
            reported = torch.log_softmax(scaled if self.processed else self.cache[key], -1)
            if self.processed and body.get("top_k") == 1:
                reported = torch.zeros_like(reported)
            tokens.append(token)
            logprobs.append(float(reported[token]))
            if token in body.get("stop_token_ids", []):
                choice = {"finish_reason": "stop", "stop_reason": token}
                break
            found = [stop for stop in body.get("stop", []) if stop in self.tokenizer.decode(tokens)]
            if found:
                choice = {"finish_reason": "stop", "stop_reason": found[0]}
                break
        return choice | {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}
