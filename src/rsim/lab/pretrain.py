"""Pre-training of the nano family on written lab solutions: ``rsim lab pretrain --size nano-s``.

Two kinds of document share the corpus: a chat (question, then the steps as the reasoner writes them) and, at
`PretrainConfig.planner_share`, the planner's stream of the same solution, so that a planner made from the base reads
its own template. Both come from the stochastic writer of `rsim.lab.behaviour`; neither says which choice is good. The
loss leaves out the question. Documents never see each other: a batch is padded, sorted by length.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from rsim.errors import UserError
from rsim.lab.behaviour import write_solution
from rsim.lab.problems import ProblemMix, sample_problems
from rsim.lab.steps import Rates
from rsim.lab.tokenizer import ANSWER, DELIMITER, EOS, QUESTION, build_tokenizer
from rsim.policies.strategies import load_strategies
from rsim.policies.template import MARKER, question_chunk, strategy_chunk

_KEEP_EVERY = 100  # steps


@dataclass(frozen=True)
class Size:
    """``spelled``: Llama architecture, and a tokenizer that spells phrases, names and things; else Qwen2's and one of words."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    learning_rate: float
    spelled: bool = False


SIZES = {
    "nano-xs": Size(hidden=40, layers=3, heads=4, intermediate=96, steps=2000, learning_rate=6e-3),
    "nano-s": Size(hidden=96, layers=3, heads=4, intermediate=256, steps=4000, learning_rate=5e-3),
    "nano-m": Size(hidden=192, layers=4, heads=6, intermediate=448, steps=2000, learning_rate=2e-3),
    "nano-l": Size(hidden=384, layers=5, heads=6, intermediate=896, steps=2000, learning_rate=1e-3),
    "nano-llama": Size(hidden=128, layers=3, heads=4, intermediate=256, steps=6000, learning_rate=4e-3, spelled=True),
}


@dataclass(frozen=True)
class PretrainConfig:
    size: str = "nano-s"
    seed: int = 0
    batch: int = 48  # documents per step
    steps: int | None = None  # None: the size's own
    planner_share: float = 0.2  # of the documents: the planner's stream of a solution
    drill_share: float = 0.35  # of the documents: steps drawn at random
    mix: ProblemMix = field(default_factory=ProblemMix)
    rates: Rates = field(default_factory=Rates)


def new_model(size: Size, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**shape)) if size.spelled else Qwen2ForCausalLM(Qwen2Config(**shape))


def documents(config: PretrainConfig, tokenizer: Qwen2Tokenizer) -> Iterator[tuple[list[int], int]]:
    """Endless ``(token ids, length of the part without loss)``."""
    strategies = load_strategies("lab")
    rng = random.Random(f"pretrain:{config.seed}")
    for problem in sample_problems("train", config.seed, config.mix):
        drill = rng.random() < config.drill_share
        question, steps = problem.question, write_solution(problem, rng, config.rates, drill=drill)
        if rng.random() < config.planner_share:
            head, body = _planner_text(question, steps)
        else:
            head = f"{QUESTION}{question}{ANSWER}"
            phrases = [rng.choice(strategies[strategies.index(name)].prompts) for name, _ in steps]
            body = DELIMITER.join(phrase + text for phrase, (_, text) in zip(phrases, steps, strict=True)) + EOS
        head_ids = tokenizer.encode(head, add_special_tokens=False)
        yield head_ids + tokenizer.encode(body, add_special_tokens=False), len(head_ids)


def _planner_text(question: str, steps: list[tuple[str, str]]) -> tuple[str, str]:
    chunks = [strategy_chunk(name) + text + (EOS if i == len(steps) - 1 else DELIMITER) for i, (name, text) in enumerate(steps)]
    return question_chunk(question) + MARKER, MARKER.join(chunks)


def batches(config: PretrainConfig, tokenizer: Qwen2Tokenizer, pool: int = 16) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless ``(ids [B, T] right-padded, loss weights [B, T])``, similar lengths together.

    Every token of a pool weighs the same, whatever batch it fell into. (A mean within each batch would favour the tokens of
    short documents, and with them the habit of answering at once.)
    """
    stream, rng = documents(config, tokenizer), random.Random(config.seed)
    while True:
        drawn = sorted((next(stream) for _ in range(pool * config.batch)), key=lambda d: len(d[0]))
        groups = [drawn[i : i + config.batch] for i in range(0, len(drawn), config.batch)]
        rng.shuffle(groups)
        per_batch = sum(len(tokens) - head for tokens, head in drawn) / len(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            ids = torch.full((len(group), longest), tokenizer.pad_token_id)
            weights = torch.zeros(len(group), longest)
            for row, (tokens, head) in enumerate(group):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                weights[row, head : len(tokens)] = 1 / per_batch
            yield ids, weights


def pretrain(config: PretrainConfig, out: Path, *, quiet: bool = False) -> dict[str, float]:
    """Trains a base from nothing and saves model, tokenizer and the procedure (``pretrain.json``) under ``out``.

    The state is kept in ``out/partial.pt`` every `_KEEP_EVERY` steps: asked for again after a stop, it goes on from there and
    ends with the very weights of a run without a stop.

    Returns:
        ``loss`` (nats per token, mean over the last 50 steps), ``tokens`` trained on, ``seconds``.

    Raises:
        UserError: ``out`` holds the state of a pre-training with other settings.
    """
    torch.manual_seed(config.seed)
    size = SIZES[config.size]
    steps = config.steps or size.steps
    tokenizer = build_tokenizer(spelled=size.spelled)
    model = new_model(size, tokenizer)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=size.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, steps))
    partial = out / "partial.pt"
    wanted = json.loads(json.dumps(asdict(config) | {"size": asdict(size)}))
    first, losses, tokens, seconds = 0, [], 0, 0.0
    if partial.is_file():
        state = torch.load(partial, weights_only=True)
        if state["wanted"] != wanted:
            raise UserError(f"{out} holds a pre-training with other settings", "remove it, or give --out another folder")
        for part, saved in zip((model, optimizer, schedule), state["parts"], strict=True):
            part.load_state_dict(saved)
        first, losses, tokens, seconds = state["step"], state["losses"], state["tokens"], state["seconds"]
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter() - seconds
    model.train()
    for step, (ids, weights) in zip(range(first, steps), islice(batches(config, tokenizer), first, None), strict=False):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        per_token = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (per_token * weights[:, 1:]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses = [*losses[-49:], loss.item()]
        tokens += int((ids != tokenizer.pad_token_id).sum())
        if (step + 1) % 100 == 0 and not quiet:
            rate = tokens / (time.perf_counter() - began)
            left = timedelta(seconds=round((time.perf_counter() - began) / (step + 1) * (steps - step - 1)))
            said = f"loss {sum(losses) / len(losses):.4f}  {rate:,.0f} tokens/s  ETA {left}"
            print(f"step {step + 1}/{steps}  {said}", flush=True)
        if (step + 1) % _KEEP_EVERY == 0:
            parts = [part.state_dict() for part in (model, optimizer, schedule)]
            kept = {"wanted": wanted, "parts": parts, "step": step + 1, "losses": losses, "tokens": tokens}
            torch.save(kept | {"seconds": time.perf_counter() - began}, partial.with_suffix(".new"))
            partial.with_suffix(".new").replace(partial)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    result = {"loss": sum(losses) / len(losses), "tokens": tokens, "seconds": time.perf_counter() - began}
    (out / "pretrain.json").write_text(json.dumps({"config": asdict(config), "size": asdict(size), "result": result}, indent=2))
    partial.unlink(missing_ok=True)
    return result


def _warmup_cosine(step: int, total: int) -> float:
    warmup = max(1, total // 25)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
