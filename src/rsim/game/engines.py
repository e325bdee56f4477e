"""Which engine a rollout samples with, by ``rollout.engine``."""

from __future__ import annotations

from rsim.config import RolloutConfig
from rsim.engine.llama import LlamaEngine, LlamaServers
from rsim.engine.native import NativeEngine
from rsim.engine.protocol import Engine
from rsim.engine.vllm import VllmEngine, VllmServers
from rsim.errors import UserError
from rsim.models.shape import context, first_range
from rsim.policies.reasoner import Reasoner


def connect(reasoner: Reasoner, rollout: RolloutConfig) -> VllmServers | LlamaServers | None:
    """The sampling servers, once they can be used; None where the reasoner in this process is sampled."""
    if rollout.engine == "native":
        return None
    if rollout.engine == "llama":
        llama = LlamaServers(rollout.llama_url, rollout.llama_timeout)
        llama.check(reasoner.tokenizer, reasoner.vocabulary_size)
        return llama
    servers = VllmServers(rollout.vllm_url, rollout.vllm_timeout)
    servers.check(rollout.temperature)
    return servers


def open_engine(
    reasoner: Reasoner,
    rollout: RolloutConfig,
    servers: VllmServers | LlamaServers | None,
    *,
    slots: int,
    seed: int,
    greedy: bool,
    longest: int,
) -> Engine:
    """An engine for one rollout: its cache belongs to the weights as they are now (``longest``: prompt)."""
    temperature = 0.0 if greedy else rollout.temperature
    if isinstance(servers, LlamaServers):
        return LlamaEngine(
            servers,
            slots,
            seed=seed,
            temperature=temperature,
            end_ids=reasoner.end_ids,
            logprobs=temperature in (0, 1),  # at others they cost a third of the speed; nothing reads them
        )
    if servers is not None:
        return VllmEngine(
            servers.servers, slots, seed=seed, temperature=temperature, end_ids=reasoner.end_ids
        )
    return NativeEngine(
        reasoner,
        slots,
        seed=seed,
        temperature=temperature,
        max_tokens=rollout.max_tokens,
        longest_prompt=longest,
        cuda_graphs=rollout.cuda_graphs,
    )


def check_context(
    reasoner: Reasoner, prompt_tokens: int, max_tokens: int, servers: VllmServers | LlamaServers | None = None
) -> None:
    """Raises `UserError` if a question of ``prompt_tokens`` and an episode exceed the reasoner's context, or
    if vLLM reads them by other rotary factors (`rsim.engine.rotary`): it has one set, by its own limit."""
    limit, first = context(reasoner.model.config), first_range(reasoner.model.config)
    if (
        first
        and isinstance(servers, VllmServers)
        and (prompt_tokens <= first if servers.context > first else prompt_tokens + max_tokens > first)
    ):
        raise UserError(
            f"vLLM's --max-model-len of {servers.context} and a question of {prompt_tokens} tokens with "
            f"rollout.max_tokens = {max_tokens} lie on two sides of {first}, where longrope's factors change",
            f"start it with --max-model-len {first} and lower rollout.max_tokens, or ask longer questions",
        )
    if prompt_tokens + max_tokens > limit:
        raise UserError(
            f"a question of {prompt_tokens} tokens and rollout.max_tokens = {max_tokens} exceed the "
            f"reasoner's context of {limit}",
            "lower rollout.max_tokens",
        )
