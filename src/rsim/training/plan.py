"""What a run costs on machines that one does not have: ``rsim plan``, a model of seconds, memory and bytes sent.

Counted, for each process: the reasoner's decoding (each round reads the weights once, or is bound by its products), prompts
and prefixes, the planner's reading, forward and backward passes of both agents (6 FLOPs per weight and token, arXiv
2001.08361), the optimiser's pass over memory, and what processes send each other. Devices reach a fixed part of their peaks.

Simplified: sampling, attention and checkpointing to disk are not counted, evaluation neither; nothing overlaps; all episodes
have the same length. What it foretells for one and two processes on a CPU is held against runs by ``python -m bench.plan``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from rsim.config import Config
from rsim.errors import UserError
from rsim.models import load_reasoner
from rsim.packed import heads_of
from rsim.training.estimate import AgentNeeds, needs_of, product_flops

_GIB = 2**30
_QUESTION = 128  # tokens of a prompt
_INJECTED = 14  # tokens of a strategy's prompt
_EPISODE_BYTES = 16  # of a token, as processes exchange episodes: id, mask, log-prob, pickled
_REACHED = 0.45  # of a GPU's peak in training: PaLM's 46% (arXiv 2204.02311, table 3)
_STREAMED = 0.8  # of its memory bandwidth
_RUNTIME = 1.5 * _GIB  # CUDA's context, torch, buffers; 0.6 GiB on a CPU
_LAYER_SECONDS = 4e-4  # of Python and launches, for each layer and forward pass of the native engine


@dataclass(frozen=True)
class Device:
    """Peaks of one device, in FLOPs and bytes a second; float32 with TF32 on a GPU. ``link``: to others on the machine."""

    name: str
    float32: float
    bfloat16: float
    memory: float
    bandwidth: float
    link: float
    per_machine: int = 8
    reached: float = _REACHED
    decode: Callable[[int, int, int], float] | None = None  # FLOPs a second of rows x hidden x intermediate, timed


# NVIDIA's data sheets: dense peaks without sparsity, bytes in 10^9; NVLink one way, PCIe 4.0 x16 for those without.
DEVICES = {
    "h200": Device("H200", 494e12, 989e12, 141e9, 4.8e12, 450e9),
    "h100": Device("H100 SXM", 494e12, 989e12, 80e9, 3.35e12, 450e9),
    "a100": Device("A100 SXM 80 GB", 156e12, 312e12, 80e9, 2.04e12, 300e9),
    "l40s": Device("L40S", 183e12, 362e12, 48e9, 0.864e12, 32e9),
    "rtx4090": Device("RTX 4090", 82.6e12, 165e12, 24e9, 1.008e12, 32e9, per_machine=4),
}

# Layers, hidden, intermediate, heads, key/value heads, vocabulary, tied output: the models' config.json on the hub.
_SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "qwen2.5-3b": (36, 2048, 11008, 16, 2, 151936, True),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 152064, False),
    "qwen2.5-14b": (48, 5120, 13824, 40, 8, 152064, False),
    "qwen2.5-32b": (64, 5120, 27648, 40, 8, 152064, False),
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128256, False),
}


@dataclass(frozen=True)
class Plan:
    """For one number of processes. Seconds and bytes sent are of one step; bytes and memory are of one process."""

    workers: int
    seconds: dict[str, float]  # sampling, planner, updates, exchange
    memory: float
    sent: float
    tokens_per_second: float  # sampled, by all processes
    hours: float
    fits: bool
    why: str = ""  # it cannot be

    @property
    def step(self) -> float:
        return sum(self.seconds.values())


def shape_of(source: str) -> PreTrainedModel:
    """A model without weights; well-known sizes need no hub.

    >>> shape_of("Qwen/Qwen2.5-7B-Instruct").num_parameters() // 10**6
    7615
    """
    name = source.split("/")[-1].lower()
    for known, (layers, hidden, inner, heads, kv_heads, vocabulary, tied) in _SHAPES.items():
        if name.startswith(known):
            kind: type[PreTrainedConfig] = LlamaConfig if known.startswith("llama") else Qwen2Config
            config = kind(
                num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
                num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
            )  # fmt: skip
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
            return model
    return load_reasoner(source, weights=False).model


def this_machine() -> Device:
    """The CPU of this machine, timed for two seconds, with what two processes here send each other through memory."""
    block = torch.empty(1 << 26)
    began = time.perf_counter()
    for _ in range(3):
        block.add_(1.0)
    streamed = 3 * 2 * block.numel() * 4 / (time.perf_counter() - began)
    cpu = torch.device("cpu")

    def measured(rows: int, hidden: int, intermediate: int) -> float:
        return product_flops(rows, hidden, intermediate, cpu, torch.float32)

    many = measured(1024, 1024, 2816)
    return Device(
        "this machine's CPU", many, many, float(psutil.virtual_memory().total), streamed / _STREAMED, 1e9,
        per_machine=psutil.cpu_count(logical=False) or 1, reached=0.8, decode=measured,
    )  # fmt: skip


def plan(config: Config, device: Device, workers: int, *, tokens: int = 0, network: float = 50e9) -> Plan:
    """What a step of ``config`` costs with ``workers`` processes, each with a ``device`` of its own.

    Args:
        tokens: mean sampled tokens of an episode; 0: as many as ``rollout.max_tokens``.
        network: bytes a second that a machine sends to others.

    Raises:
        UserError: a model cannot be found.
    """
    train, rollout, models = config.train, config.rollout, config.models
    sampled = min(tokens or rollout.max_tokens, rollout.max_tokens)
    on_gpu = device.decode is None
    precise = bool(config.trained_whole) or not on_gpu if models.dtype == "auto" else models.dtype == "float32"
    width, peak = (4, device.float32) if precise else (2, device.bfloat16)
    shapes = {"reasoner": shape_of(models.reasoner)}
    if models.planner != "none":
        shapes["planner"] = shape_of(models.planner)
    ranks = {"reasoner": models.reasoner_lora, "planner": models.planner_lora}
    needs = {name: needs_of(config, name, model, ranks[name], width) for name, model in shapes.items()}
    questions = math.ceil(train.questions / workers)
    episodes = questions * train.group
    decisions = max(1, round(rollout.max_steps * sampled / rollout.max_tokens)) if "planner" in shapes else 0
    injected = decisions * _INJECTED
    read = episodes * (sampled + injected) + questions * _QUESTION  # each question once for its group
    seconds = {"sampling": _sampling(config, shapes["reasoner"], device, peak, width, questions, sampled, injected),
               "planner": 0.0, "updates": 0.0, "exchange": 0.0}  # fmt: skip
    if "planner" in shapes:
        calls = decisions * math.ceil(episodes / rollout.batch)
        layers = shapes["planner"].config.get_text_config().num_hidden_layers
        seconds["planner"] = 2 * needs["planner"].parameters * read / (peak * device.reached) + calls * layers * _LAYER_SECONDS
    sent = float(read * _EPISODE_BYTES * (workers - 1))
    for name, agent in needs.items():
        if not agent.trained:
            continue
        passes = 4 if agent.trained < agent.parameters else 6  # frozen weights get no gradient of their own
        passes += 2 * train.gradient_checkpointing
        flops = passes * agent.parameters * read * train.num_iterations
        optimised = 7 * 4 * agent.trained * train.num_iterations * train.minibatches
        seconds["updates"] += flops / (peak * device.reached) + optimised / (device.bandwidth * _STREAMED)
        sent += _gradients(config, shapes[name], agent, workers, math.ceil(read / train.micro_tokens), width)
    machines = math.ceil(workers / device.per_machine)
    speed = min(device.link, network / min(workers, device.per_machine)) if machines > 1 else device.link
    seconds["exchange"] = sent / speed
    memory = _memory(config, shapes, needs, workers, _RUNTIME if on_gpu else 0.6 * _GIB)
    total = sum(seconds.values())
    steps = sum(stage.steps for stage in config.stages)
    steps = min(steps, train.steps) if train.steps else steps
    why = "" if workers <= train.questions else f"more processes than train.questions = {train.questions}"
    if memory > device.memory:
        why = why or "too little memory"
    rate = train.questions * train.group * sampled / total
    return Plan(workers, seconds, memory, sent, rate, steps * total / 3600, not why, why)


def _sampling(
    config: Config,
    model: PreTrainedModel,
    device: Device,
    peak: float,
    width: int,
    questions: int,
    sampled: int,
    injected: int,
) -> float:
    """Seconds in which the reasoner samples the episodes of one process."""
    text = model.config.get_text_config()
    episodes = questions * config.train.group
    rows = min(config.rollout.batch, episodes)
    weights: int = model.num_parameters()
    reached = device.reached
    if device.decode is not None:
        peak = device.decode(rows, text.hidden_size, text.intermediate_size)
    _, kv_heads, size = heads_of(model.config)
    cached: float = 2 * text.num_hidden_layers * kv_heads * size * width * (_QUESTION + (sampled + injected) / 2)
    products = 2 * weights * rows / (peak * reached)
    streaming = (weights * width + rows * cached) / (device.bandwidth * _STREAMED)
    overhead = text.num_hidden_layers * _LAYER_SECONDS if config.rollout.engine == "native" else 0.0
    prefill = 2 * weights * (questions * _QUESTION + episodes * injected) / (peak * reached)
    return episodes * sampled / rows * (max(products, streaming) + overhead) + prefill


def _gradients(config: Config, model: PreTrainedModel, agent: AgentNeeds, workers: int, micro: int, width: int) -> float:
    """Bytes that one process sends in a step for one agent: gradients around a ring, pieces of weights where they are cut."""
    others = (workers - 1) / workers
    rounds = config.train.num_iterations * config.train.minibatches
    if not config.train.shard:
        return 2 * others * 4 * agent.trained * rounds
    inside = _in_layers(model)
    cut_gradients = inside * 4 if agent.trained == agent.parameters else 0.0
    whole = max(0, agent.trained - inside) if agent.trained == agent.parameters else agent.trained
    each_micro = others * (2 * inside * width + cut_gradients)
    return others * inside * width + config.train.num_iterations * micro * each_micro + 2 * others * 4 * whole * rounds


def _in_layers(model: PreTrainedModel) -> int:
    outside = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m for p in m.parameters()}
    return sum(int(p.numel()) for p in model.parameters() if id(p) not in outside)


def _memory(
    config: Config, shapes: dict[str, PreTrainedModel], needs: dict[str, AgentNeeds], workers: int, runtime: float
) -> float:  # fmt: skip
    """Bytes of one process at its peak: in a rollout all weights are whole, in an update activations come on top."""
    weights = sum(a.weights for a in needs.values())
    if config.models.shared_base:
        weights -= needs["planner"].weights
    kept = 0.0
    for name, agent in needs.items():
        part = 1.0
        if config.train.shard and agent.trained == agent.parameters:
            inside = _in_layers(shapes[name]) / agent.parameters
            part = 1 - inside + inside / workers
        kept += agent.optimiser * part
    share = 1 / workers  # of a step's episodes
    cache = sum(a.cache for a in needs.values()) * min(1.0, share * max(1.0, _episodes(config) / config.rollout.batch))
    return runtime + weights + kept + max(cache, *(a.activations for a in needs.values()))


def _episodes(config: Config) -> int:
    return config.train.questions * config.train.group


def describe(plans: list[Plan], device: Device) -> list[str]:
    """The plans for people, a line each."""
    lines = [f"{'processes':>9}  {'a step':>9}  {'sampling, planner, updates, exchange':>36}  {'tokens/s':>9}  {'memory':>9}  "
             f"{'each sends':>10}  {'hours':>7}"]  # fmt: skip
    for p in plans:
        shares = ", ".join(f"{value / p.step:.0%}" for value in p.seconds.values())
        memory, sent = f"{p.memory / _GIB:>5,.1f} GiB", f"{p.sent / 1e6:>7,.0f} MB"
        lines.append(f"{p.workers:>9}  {p.step:>7,.1f} s  {shares:>36}  {p.tokens_per_second:>9,.0f}  {memory}  {sent}  "
                     f"{p.hours:>7,.1f}{f'  cannot be: {p.why}' if p.why else ''}")  # fmt: skip
    return [
        f"{device.name}, {device.memory / _GIB:,.0f} GiB; a step's share of each part, memory and bytes of each process",
        *lines,
    ]


def find_device(name: str) -> Device:
    """``here``, or one of `DEVICES`."""
    if name == "here":
        return this_machine()
    if name not in DEVICES:
        raise UserError(f"--device {name}", f"use here, or one of {', '.join(DEVICES)}")
    return DEVICES[name]
