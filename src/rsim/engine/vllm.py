"""vLLM as an engine, over its HTTP server: token ids in, token ids and log-probs out, one request a step.

The server needs ``--logprobs-mode processed_logprobs`` (log-probs at the sampling temperature) and, to be trained with, the
routes of ``VLLM_SERVER_DEV_MODE=1`` and a folder that `save_untied` wrote; docs/engines.md has the whole command.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rsim.engine.served import ServedEngine, Server
from rsim.errors import UserError
from rsim.models import adapters
from rsim.models.shape import logits

_PROBE = "1 + 1 ="


class VllmServer(Server):
    """A running server: completions, and new weights for it."""

    kind, setting = "vLLM", "vllm"

    def __init__(self, url: str, timeout: float, *, transport: httpx.BaseTransport | None = None) -> None:
        super().__init__(url, timeout, transport=transport)
        listed = self.call("GET", "/v1/models")["data"][0]
        self.model: str = listed["id"]
        self.context: int = listed.get("max_model_len") or 0

    def remedy(self, answer: httpx.Response) -> str:
        return "start it with VLLM_SERVER_DEV_MODE=1" if answer.status_code == 404 else super().remedy(answer)

    def complete(self, prompt: list[int], **settings: Any) -> tuple[list[int], list[float], dict[str, Any]]:
        """Sampled ids, their log-probs and the rest of the choice.

        Raises:
            UserError: the server is out of reach, refuses, or does not return token ids and log-probs.
        """
        body = {"model": self.model, "prompt": prompt, "logprobs": 0, "return_token_ids": True} | settings
        choice = self.call("POST", "/v1/completions", body)["choices"][0]
        if choice.get("token_ids") is None or choice.get("logprobs") is None:
            raise UserError(f"the server at {self.url} returns no token ids", "rsim needs vLLM 0.11 or later")
        return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice

    def check_temperature(self, temperature: float) -> None:
        """Raises UserError if log-probs are not those at the sampling temperature (they must be, unless it is 1)."""
        # top_k 1 samples the likeliest token, whose log-prob is then 0, if log-probs are of what is sampled from.
        _, logprobs, _ = self.complete(self.call("POST", "/tokenize", {"prompt": _PROBE})["tokens"],
                                       max_tokens=1, temperature=temperature, top_k=1)  # fmt: skip
        if abs(logprobs[0]) > 1e-6:
            raise UserError(
                f"the server at {self.url} reports raw log-probs, not those at temperature {temperature}",
                "start it with --logprobs-mode processed_logprobs",
            )

    def reload(self, folder: Path) -> None:
        """Takes the weights in ``folder``, which it must see under this path, and drops what it cached with the old ones."""
        self.call("POST", "/pause?mode=wait")
        try:
            taken = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
            self.call("POST", "/collective_rpc", taken)
            if not self.call("POST", "/reset_prefix_cache")["success"]:
                raise UserError(f"the server at {self.url} did not reset its prefix cache", "is something else using it?")
        finally:  # a server that stays paused would hang whoever asks it next
            self.call("POST", "/resume")

    def check_updates(self, model: PreTrainedModel, folder: Path) -> None:
        """Hands over ``model`` with another output head, then as it is, and sees whether the server follows both times.

        A server whose folder ties the head to the embeddings takes new weights without the head, and says nothing.

        Raises:
            UserError: it does not follow.
        """
        ids = self.call("POST", "/tokenize", {"prompt": _PROBE})["tokens"]
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


class VllmEngine(ServedEngine):
    """A sequence stays with one server, whose prefix cache has its beginning."""

    def __init__(self, servers: list[VllmServer], slots: int, *, seed: int, temperature: float, end_ids: set[int]) -> None:
        super().__init__(slots, seed, end_ids)
        self.servers = servers
        self.settings: dict[str, Any] = {
            "temperature": temperature,
            "stop_token_ids": sorted(end_ids),
            "skip_special_tokens": False,
            "add_special_tokens": False,
            "include_stop_str_in_output": True,
            "top_p": 1.0,
            "top_k": -1,
        }
        self.homes: dict[int, VllmServer] = {}
        self.begun = 0

    def start(self, slots: list[int], prompts: list[list[int]], keys: list[str]) -> None:
        super().start(slots, prompts, keys)
        for slot in slots:
            self.homes[slot] = self.servers[self.begun % len(self.servers)]
            self.begun += 1

    def request(
        self, slot: int, ids: list[int], max_new_tokens: int, seed: int, stops: list[str]
    ) -> tuple[list[int], list[float], bool]:
        server = self.homes[slot]
        settings = self.settings | {"max_tokens": max_new_tokens, "seed": seed >> 1, "stop": stops}  # it takes 63 bits
        tokens, logprobs, choice = server.complete(ids, **settings)
        stopped = choice["finish_reason"] == "stop"
        if not stopped and len(tokens) < max_new_tokens:
            raise UserError(f"the server at {server.url} cut a step short: its context is full", "raise --max-model-len")
        return tokens, logprobs, stopped and choice["stop_reason"] not in stops

    def release(self, slot: int) -> None:
        super().release(slot)
        del self.homes[slot]


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
