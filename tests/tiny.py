"""Tiny models with random weights, so that tests need no download and no trained checkpoint."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rsim.config import Config, RolloutConfig
from rsim.lab.tokenizer import build_tokenizer
from rsim.policies.loading import load_planner, load_reasoner
from rsim.policies.planner import Planner, name_tokens
from rsim.policies.strategies import StrategySet
from rsim.training.trainer import Trainer

RULES = RolloutConfig(max_steps=3, step_tokens=10, max_tokens=64, answer_tokens=6, delimiter="\n", batch=64)


# slow, and of a kind that `make test` has too: `make test-full` alone runs it
full = pytest.mark.skipif(not os.environ.get("RSIM_FULL"), reason="slow: make test-full runs it")


_TOKENIZER = build_tokenizer()
TINY: dict[str, Any] = {
    "vocab_size": len(_TOKENIZER), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 512,
    "pad_token_id": _TOKENIZER.pad_token_id, "eos_token_id": _TOKENIZER.eos_token_id, "bos_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip


def tiny_model(architecture: str, seed: int = 0, **other: int) -> PreTrainedModel:
    shape = TINY | other
    torch.manual_seed(seed)
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    if architecture == "gemma3":  # sliding-window layers beside full ones, a head size of its own
        layers = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(**shape, head_dim=16, sliding_window=12, layer_types=layers, query_pre_attn_scalar=16)
        return Gemma3ForCausalLM(config).eval()
    return Qwen2ForCausalLM(Qwen2Config(**shape)).eval()


def named_planner(strategies: StrategySet) -> Planner:
    """A planner that chooses sensibly without training: its head has nano-s's own rows of the strategies' names."""
    planner = load_planner("nano-s", strategies, seed=0)
    rows = load_reasoner("nano-s").model.get_output_embeddings().weight[name_tokens(planner.chunk, strategies)]
    with torch.no_grad():
        planner.model.score.weight.copy_(rows)
    return planner


def metrics_of(config: Config) -> list[dict]:
    timed = {"seconds", "seconds_rollout", "tokens_per_second"}
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def stopped_after(config: Config, steps: int) -> None:
    """Trains ``steps`` steps, saves and stops."""
    trainer = Trainer(config)

    def stop(record: dict[str, Any]) -> None:
        trainer.stop_requested = (record["step"] == steps and "reward/accuracy" in record) or trainer.stop_requested

    trainer.on_metrics = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
