"""vLLM as an engine, over its HTTP server: token ids in, token ids and log-probs out, one request a step.

The server needs ``--logprobs-mode processed_logprobs`` (log-probs at the sampling temperature) and, to be trained with, the
routes of ``VLLM_SERVER_DEV_MODE=1`` and a folder that `save_untied` wrote; docs/engines.md has the whole command. What is
sampled depends on the seed and the episode, but by vLLM's generator, not the native engine's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rsim import proxies
from rsim.engine.protocol import SampledStep, Stop
from rsim.errors import UserError, check_url
from rsim.models import adapters
from rsim.models.shape import logits
from rsim.rules import End

_PROBE = "1 + 1 ="


class VllmServer:
    """A running server: completions, and new weights for it."""

    def __init__(self, url: str, timeout: float, *, transport: httpx.BaseTransport | None = None) -> None:
        check_url("rollout.vllm_url", url)
        key = os.environ.get("VLLM_API_KEY")
        self.client = httpx.Client(
            base_url=url,
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            transport=transport or proxies.transport(httpx.HTTPTransport, url, httpx.Limits(max_connections=None)),
        )
        self.url = url
        listed = self._call("GET", "/v1/models")["data"][0]
        self.model: str = listed["id"]
        self.context: int = listed.get("max_model_len") or 0

    def complete(self, prompt: list[int], **settings: Any) -> tuple[list[int], list[float], dict[str, Any]]:
        """Sampled ids, their log-probs and the rest of the choice.

        Raises:
            UserError: the server is out of reach, refuses, or does not return token ids and log-probs.
        """
        body = {"model": self.model, "prompt": prompt, "logprobs": 0, "return_token_ids": True} | settings
        choice = self._call("POST", "/v1/completions", body)["choices"][0]
        if choice.get("token_ids") is None or choice.get("logprobs") is None:
            raise UserError(f"the server at {self.url} returns no token ids", "rsim needs vLLM 0.11 or later")
        return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice

    def check_temperature(self, temperature: float) -> None:
        """Raises UserError if log-probs are not those at the sampling temperature (they must be, unless it is 1)."""
        # top_k 1 samples the likeliest token, whose log-prob is then 0, if log-probs are of what is sampled from.
        _, logprobs, _ = self.complete(self._call("POST", "/tokenize", {"prompt": _PROBE})["tokens"],
                                       max_tokens=1, temperature=temperature, top_k=1)  # fmt: skip
        if abs(logprobs[0]) > 1e-6:
            raise UserError(
                f"the server at {self.url} reports raw log-probs, not those at temperature {temperature}",
                "start it with --logprobs-mode processed_logprobs",
            )

    def reload(self, folder: Path) -> None:
        """Takes the weights in ``folder``, which it must see under this path, and drops what it cached with the old ones."""
        self._call("POST", "/pause?mode=wait")
        try:
            taken = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
            self._call("POST", "/collective_rpc", taken)
            if not self._call("POST", "/reset_prefix_cache")["success"]:
                raise UserError(f"the server at {self.url} did not reset its prefix cache", "is something else using it?")
        finally:  # a server that stays paused would hang whoever asks it next
            self._call("POST", "/resume")

    def check_updates(self, model: PreTrainedModel, folder: Path) -> None:
        """Hands over ``model`` with another output head, then as it is, and sees whether the server follows both times.

        A server whose folder ties the head to the embeddings takes new weights without the head, and says nothing.

        Raises:
            UserError: it does not follow.
        """
        ids = self._call("POST", "/tokenize", {"prompt": _PROBE})["tokens"]
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([ids], device=model.device)).last_hidden_state[0, -1]
            expected_of = {f: torch.log_softmax(logits(model, f * hidden).float(), -1) for f in (0.5, 1.0)}
        sure = []
        for factor, other in ((0.5, 1.0), (1.0, 0.5)):
            save_untied(model, folder, head_factor=factor)
            self.reload(folder)
            tokens, logprobs, _ = self.complete(ids, max_tokens=1, temperature=0.0)
            expected, wrong = (float(expected_of[f][tokens[0]]) for f in (factor, other))
            sure.append(abs(logprobs[0] - expected) < abs(logprobs[0] - wrong))  # a bfloat16 server is near, not equal
        if not all(sure):
            raise UserError(
                f"the server at {self.url} does not take new weights as they are",
                "serve a folder written by `rsim export MODEL FOLDER` (its output head is a matrix of its own)",
            )

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self.client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise UserError(f"no vLLM server at {self.url}", str(error) or type(error).__name__) from error
        if answer.status_code != 200:
            hint = "start it with VLLM_SERVER_DEV_MODE=1" if answer.status_code == 404 else answer.text[:300]
            raise UserError(f"the server at {self.url} answered {answer.status_code} to {path}", hint)
        result: dict[str, Any] = answer.json() if answer.content else {}
        return result


class VllmServers:
    """One or more servers of the same model: sequences are spread over them, and all are given the same weights."""

    def __init__(self, url: str, timeout: float) -> None:
        """``url``: one or more, with commas between them."""
        self.servers = [VllmServer(one.strip(), timeout) for one in url.split(",")]
        self.context = max(server.context for server in self.servers)

    def check(self, temperature: float) -> None:
        """`VllmServer.check_temperature` of each."""
        for server in self.servers:
            server.check_temperature(temperature)

    def check_updates(self, model: PreTrainedModel, folder: Path) -> None:
        """`VllmServer.check_updates` of each."""
        for server in self.servers:
            server.check_updates(model, folder)

    def update_weights(self, model: PreTrainedModel, folder: Path) -> None:
        """Writes the weights of ``model`` into ``folder`` once; all servers reload at the same time."""
        save_untied(model, folder)
        with ThreadPoolExecutor(len(self.servers)) as threads:
            list(threads.map(lambda server: server.reload(folder), self.servers))


class VllmEngine:
    """Sequences of one rollout; each running step is a request of its own, all in flight together. A sequence stays with one
    server, whose prefix cache has its beginning."""

    def __init__(self, servers: list[VllmServer], slots: int, *, seed: int, temperature: float, end_ids: set[int]) -> None:
        self.servers, self.seed = servers, seed
        self.settings: dict[str, Any] = {
            "temperature": temperature,
            "stop_token_ids": sorted(end_ids),
            "skip_special_tokens": False,
            "add_special_tokens": False,
            "include_stop_str_in_output": True,
            "top_p": 1.0,
            "top_k": -1,
        }
        self.threads = ThreadPoolExecutor(slots)
        self.sequences: dict[int, list[int]] = {}
        self.keys: dict[int, str] = {}
        self.homes: dict[int, VllmServer] = {}
        self.begun = 0
        self.futures: dict[Future[SampledStep], int] = {}

    @property
    def running(self) -> int:
        return len(self.futures)

    def start(self, slots: list[int], prompts: list[list[int]], keys: list[str]) -> None:
        for slot, prompt, key in zip(slots, prompts, keys, strict=True):
            self.sequences[slot], self.keys[slot] = list(prompt), key
            self.homes[slot] = self.servers[self.begun % len(self.servers)]
            self.begun += 1

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
        tokens, logprobs, end = self._request(slot, [], max_new_tokens, stop)
        while end == "delimiter" and stop is not None and not stop.ended(tokens):
            if len(tokens) >= max_new_tokens:  # inside a code block
                end = "cap"
                break
            more, values, end = self._request(slot, tokens, max_new_tokens - len(tokens), stop)
            tokens, logprobs = tokens + more, logprobs + values
        return SampledStep(slot, tokens, logprobs, end)

    def _request(
        self, slot: int, written: list[int], max_new_tokens: int, stop: Stop | None
    ) -> tuple[list[int], list[float], End]:
        ids = self.sequences[slot] + written
        digest = hashlib.sha256(f"{self.seed}:{self.keys[slot]}:{len(ids)}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big") >> 1  # vLLM takes 63 bits
        stops = list(stop.strings) if stop is not None else []
        server = self.homes[slot]
        settings = self.settings | {"max_tokens": max_new_tokens, "seed": seed, "stop": stops}
        tokens, logprobs, choice = server.complete(ids, **settings)
        end: End = "cap"
        if choice["finish_reason"] == "stop":
            end = "delimiter" if choice["stop_reason"] in stops else "end_of_turn"
        elif len(tokens) < max_new_tokens:
            raise UserError(f"the server at {server.url} cut a step short: its context is full", "raise --max-model-len")
        return tokens, logprobs, end

    def release(self, slot: int) -> None:
        del self.sequences[slot], self.keys[slot], self.homes[slot]

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)


def save_untied(model: PreTrainedModel, folder: Path, *, head_factor: float = 1.0) -> None:
    """Writes ``model`` with an output head of its own: vLLM reloads a head that is tied to the embeddings only in part. Weights
    have the hub's names and shapes, which vLLM reads: in memory a layer's experts are one tensor, there they lie one by one.

    The folder appears whole or not at all; ``head_factor`` scales the head.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    head = model.get_output_embeddings().weight
    weights = {name: tensor.detach() for name, tensor in adapters.merged_weights(model).items()}
    weights["lm_head.weight"] = head.detach().clone() * head_factor
    draft.mkdir(parents=True)
    weights = revert_weight_conversion(model, weights)
    parts = {name for name, tensor in weights.items() if tensor.nbytes < tensor.untyped_storage().nbytes()}
    save_torch_state_dict({n: tensor.clone() if n in parts else tensor for n, tensor in weights.items()}, draft)
    model.config.save_pretrained(draft)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(draft)
    config = json.loads((draft / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
