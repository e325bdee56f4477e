"""What a run costs on machines that one does not have: ``rsim plan``, a model of seconds, memory and bytes sent.

Counted, for each process: the reasoner's decoding (each forward pass reads the weights once, or is bound by its products; on
this machine's CPU it is timed), prompts and prefixes, the planner's reading, forward and backward passes of both agents (6
FLOPs per weight and token, arXiv 2001.08361), the optimiser's pass over memory, and what processes send each other. Devices
reach a fixed part of their peaks.

Simplified: sampling and checkpointing to disk are not counted, evaluation neither; nothing overlaps; the longest episode has
a fixed multiple of the mean length. With vLLM there is one server for all processes, whose own device and memory are not
counted. What it foretells for one and two processes on a CPU is held against runs by ``python -m studies plan``.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from rsim.config import Config
from rsim.engine.packed import heads_of
from rsim.errors import UserError
from rsim.policies.loading import load_reasoner
from rsim.policies.strategies import load_strategies
from rsim.training.estimate import AgentNeeds, needs_of
from rsim.training.timed import among, pass_seconds, product_flops, training_seconds

_GIB = 2**30
_QUESTION = 128  # tokens of a question with its prompt, where nobody says
_TOKENS_A_WORD = 1.4  # of an injected prompt, beside one for the delimiter
# Assumed, not measured: bytes of a token as processes exchange episodes (id, mask, log-prob, pickled); seconds of Python and
# launches for each layer and forward pass of the native engine, and those of a pass that is replayed as a CUDA graph; bytes a
# second at which weights are written for a vLLM server and read by it; and those that processes on one CPU send each other.
_EPISODE_BYTES, _LAYER_SECONDS, _REPLAYED_LAYER, _DISK, _LOOPBACK = 16, 4e-4, 1e-4, 2e9, 1e9
_TOKEN_SECONDS = 6e-5  # of Python for each sampled token on this machine (5e-5 to 8e-5 in runs of nano on one core)
_LONGEST = 2.4  # times the mean length: the episode that the last passes wait for (2.4 and 2.6 in two runs of nano)
_ASKED = 4  # calls of the planner for each decision of all episodes in play: `rollout.game` waits for a quarter of them
_REACHED = 0.45  # of a GPU's peak in training: PaLM's 46% (arXiv 2204.02311, table 3)
_STREAMED = 0.8  # of its memory bandwidth
_RUNTIME = 1.5 * _GIB  # CUDA's context, torch, buffers; 0.6 GiB on a CPU
_MARGIN = 1.15  # of memory, as in `rsim.training.estimate`
_TIMED = 1024, 1536, 4608  # rows, hidden, intermediate of the product that is timed on this machine


@dataclass(frozen=True)
class Timed:
    """Seconds on this machine's CPU, as `timed.pass_seconds` and `timed.training_seconds` have them."""

    sampling: Callable[[PreTrainedModel, int, int], float]
    training: Callable[[PreTrainedModel, int, int], float]


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
    timed: Timed | None = None  # this machine


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
    available: float
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


@contextmanager
def this_machine(processes: int = 1, threads: int = 0) -> Iterator[Device]:
    """What each of ``processes`` on this machine's CPU has, timed with ``threads`` (default: its share of the cores) while as
    many others compute; plans are to be made while it lasts.

    Raises:
        UserError: the machine has fewer cores than ``processes``.
    """
    cores = os.cpu_count() or 1
    if processes > cores:
        raise UserError(f"--workers {processes} --device here", f"this machine has {cores} cores")
    own, before = threads or cores // processes, torch.get_num_threads()
    with among(processes - 1, own):
        torch.set_num_threads(own)
        block = torch.zeros(1 << 26)
        block.add_(1.0)  # the pages are there from now on
        began = time.perf_counter()
        for _ in range(3):
            block.add_(1.0)
        streamed = 3 * 2 * block.numel() * 4 / (time.perf_counter() - began)
        many = product_flops(*_TIMED, torch.device("cpu"), torch.float32)
        memory = psutil.virtual_memory().total / processes
        try:
            yield Device("this machine's CPU", many, many, memory, streamed / _STREAMED, _LOOPBACK, per_machine=processes,
                         reached=0.8, timed=Timed(pass_seconds, training_seconds))  # fmt: skip
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class _Load:
    """What one process does in a step. ``read``: tokens that a model reads of all its episodes, each question once."""

    questions: int
    question: int  # tokens of one
    episodes: float  # those that are continued from a state count as half of one
    sampled: int  # tokens of an episode
    injected: int
    decisions: int

    @property
    def read(self) -> float:
        return self.episodes * (self.sampled + self.injected) + self.questions * self.question


def _load(config: Config, workers: int, tokens: int, question: int) -> _Load:
    train, rollout = config.train, config.rollout
    sampled = min(tokens or rollout.max_tokens, rollout.max_tokens)
    planned = config.models.planner != "none"
    # Steps are taken to be half as long as they may be.
    decisions = max(1, round(rollout.max_steps * min(1.0, 2 * sampled / rollout.max_tokens))) if planned else 0
    questions = math.ceil(train.questions / workers)
    episodes = questions * train.group
    prompts = [prompt for s in load_strategies(config.models.strategies).strategies for prompt in s.prompts]
    injected = 1 + _TOKENS_A_WORD * sum(len(prompt.split()) for prompt in prompts) / len(prompts)
    return _Load(questions, question, episodes, sampled, round(decisions * injected), decisions)


def plan(
    config: Config, device: Device, workers: int, *, tokens: int = 0, question: int = _QUESTION, network: float = 50e9
) -> Plan:  # fmt: skip
    """What a step of ``config`` costs with ``workers`` processes, each with a ``device`` of its own.

    Args:
        tokens: mean sampled tokens of an episode; 0: as many as ``rollout.max_tokens``.
        question: tokens of a question with its prompt.
        network: bytes a second that a machine sends to others.

    Raises:
        UserError: a model cannot be found.
    """
    models, train = config.models, config.train
    on_gpu = device.timed is None
    precise = bool(config.trained_whole) or not on_gpu if models.dtype == "auto" else models.dtype in ("float32", "float64")
    width, peak = (4, device.float32) if precise else (2, device.bfloat16)
    shapes = {"reasoner": shape_of(models.reasoner)}
    if models.planner != "none":
        shapes["planner"] = shape_of(models.planner)
    ranks = {"reasoner": models.reasoner_lora, "planner": models.planner_lora}
    needs = {name: needs_of(config, name, model, ranks[name], width) for name, model in shapes.items()}
    load = _load(config, workers, tokens, question)
    # Forward and backward.
    token = {
        name: device.timed.training(model, load.question, load.sampled) if device.timed
        else 6 * needs[name].parameters / (peak * device.reached) for name, model in shapes.items()
    }  # fmt: skip
    # All processes ask one server, on a device of its own; each of the native ones samples for itself.
    served = config.rollout.engine != "native"
    sampling = _sampling(
        config, shapes["reasoner"], device, peak, width, _load(config, 1, tokens, question) if served else load
    )
    sent = _sent(config, shapes, needs, load, workers, width)
    handed_over = 2 * needs["reasoner"].weights / _DISK if served and needs["reasoner"].trained else 0.0
    speed = device.link if workers <= device.per_machine else min(device.link, network)  # a ring leaves a machine once
    seconds = {
        "sampling": sampling,
        "planner": _planning(config, shapes, device, load, token.get("planner", 0.0)),
        "updates": _updates(config, needs, device, load, token),
        "exchange": sent / speed + handed_over,
    }
    memory = _memory(config, shapes, needs, workers, width, _RUNTIME if on_gpu else 0.6 * _GIB)
    why = ""
    if workers > train.questions:
        why = f"more processes than train.questions = {train.questions}"
    elif train.shard and workers == 1:
        why = "train.shard needs several processes"
    elif memory > device.memory:
        why = "too little memory"
    total = sum(seconds.values())
    steps = sum(stage.steps for stage in config.stages)
    steps = min(steps, train.steps) if train.steps else steps
    rate = train.questions * train.group * load.sampled / total
    return Plan(workers, seconds, memory, device.memory, sent, rate, steps * total / 3600, not why, why)


def _sampling(config: Config, model: PreTrainedModel, device: Device, peak: float, width: int, load: _Load) -> float:
    """Seconds in which the reasoner samples all episodes of a process (or of a server)."""
    text = model.config.get_text_config()
    rows = min(config.rollout.batch, load.questions * config.train.group)
    weights: int = model.num_parameters()
    # All rows are busy but at the end, when the longest episode is waited for.
    longest = min(config.rollout.max_tokens, _LONGEST * load.sampled)
    passes = (load.episodes / rows - 1) * load.sampled + longest
    rows = max(1, round(load.episodes * load.sampled / passes))  # on average
    length = load.question + (load.sampled + load.injected) // 2
    rest = 2 * weights * (load.questions * load.question + load.episodes * load.injected) / (peak * device.reached)
    if device.timed:
        in_python = _TOKEN_SECONDS * load.episodes * load.sampled
        return passes * device.timed.sampling(model, rows, length) + in_python + rest
    _, kv_heads, size = heads_of(model.config)
    cached: float = 2 * text.num_hidden_layers * kv_heads * size * width * length
    products = 2 * weights * rows / (peak * device.reached)
    streaming = (weights * width + rows * cached) / (device.bandwidth * _STREAMED)
    each_layer = _REPLAYED_LAYER if config.rollout.cuda_graphs else _LAYER_SECONDS
    overhead: float = text.num_hidden_layers * each_layer if config.rollout.engine == "native" else 0.0
    return passes * (max(products, streaming) + overhead) + rest


def _planning(
    config: Config, shapes: dict[str, PreTrainedModel], device: Device, load: _Load, token: float
) -> float:  # fmt: skip
    """Seconds in which the planner reads and decides; a ``token`` takes so many to train on."""
    if "planner" not in shapes:
        return 0.0
    calls = _ASKED * load.decisions * math.ceil(load.episodes / config.rollout.batch)
    layers: int = shapes["planner"].config.get_text_config().num_hidden_layers
    overhead = device.timed.sampling(shapes["planner"], 1, load.question) if device.timed else layers * _LAYER_SECONDS
    return token / 3 * load.read + calls * overhead


def _updates(config: Config, needs: dict[str, AgentNeeds], device: Device, load: _Load, token: dict[str, float]) -> float:
    """Seconds of both agents' forward and backward passes and optimiser steps; a forward pass is a third of what a ``token``
    takes to train on."""
    train, objective = config.train, config.objective
    steps = train.num_iterations * train.minibatches
    seconds = 0.0
    for name, agent in needs.items():
        if not agent.trained:
            continue
        thirds = 2 if agent.trained < agent.parameters else 3  # frozen weights get no gradient of their own
        thirds += train.gradient_checkpointing + (name == "reasoner" and objective.beta > 0)
        thirds = thirds * train.num_iterations + (steps > 1 or objective.loss == "ppo")  # log-probs before the first step
        seconds += thirds / 3 * token[name] * load.read
        seconds += 7 * 4 * agent.trained * steps / (device.bandwidth * _STREAMED)
    return seconds


def _sent(
    config: Config, shapes: dict[str, PreTrainedModel], needs: dict[str, AgentNeeds], load: _Load, workers: int, width: int
) -> float:  # fmt: skip
    """Bytes that one process sends in a step: its episodes to all others, gradients around a ring, pieces of layers."""
    train, others = config.train, (workers - 1) / workers
    rounds, micro = train.num_iterations * train.minibatches, math.ceil(load.read / train.micro_tokens)
    sent = load.read * _EPISODE_BYTES * (workers - 1)
    for name, agent in needs.items():
        if not agent.trained:
            continue
        if not train.shard:
            sent += 2 * others * 4 * agent.trained * rounds
            continue
        inside, trains_layers = _in_layers(shapes[name]), agent.trained == agent.parameters
        outside = agent.trained - inside if trains_layers else agent.trained
        each_micro = others * (2 * inside * width + 4 * inside * trains_layers)
        sent += others * inside * width + train.num_iterations * micro * each_micro + 2 * others * 4 * outside * rounds
    return sent


def _in_layers(model: PreTrainedModel) -> int:
    outside = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m for p in m.parameters()}
    return sum(int(p.numel()) for p in model.parameters() if id(p) not in outside)


def _memory(
    config: Config, shapes: dict[str, PreTrainedModel], needs: dict[str, AgentNeeds], workers: int, width: int, runtime: float
) -> float:  # fmt: skip
    """Bytes of one process at its peak: in a rollout, when all layers are whole and there are caches, or in an update."""
    train, rollout = config.train, config.rollout
    frozen = {name: a.weights - (a.trained * 4 if a.trained < a.parameters else 0) for name, a in needs.items()}
    weights = sum(a.weights for a in needs.values()) - (frozen["planner"] if config.models.shared_base else 0.0)
    if config.objective.beta > 0:
        runtime += needs["reasoner"].parameters * width
    kept = pieces = 0.0
    for name, agent in needs.items():
        cut = train.shard and agent.trained > 0
        inside = _in_layers(shapes[name]) / shapes[name].num_parameters() if cut else 0.0
        part = 1 - inside + inside / workers  # of the weights
        pieces += agent.weights * part if cut else agent.weights
        kept += agent.optimiser * (part if agent.trained == agent.parameters else 1.0)
    pieces = pieces if train.shard else weights
    episodes = train.questions * train.group
    mine = min(rollout.batch, math.ceil(train.questions / workers) * train.group) / min(rollout.batch, episodes)
    caches = sum(a.cache for name, a in needs.items() if name == "planner" or rollout.engine == "native") * mine
    rolling = weights + (pieces if train.shard else 0.0) + caches
    updating = pieces + max(a.activations for a in needs.values())
    return _MARGIN * (runtime + kept + max(rolling, updating))


def describe(plans: list[Plan], name: str) -> list[str]:
    """The plans for people, a line each."""
    lines = [f"{'processes':>9}  {'a step':>9}  {'sampling, planner, updates, exchange':>36}  {'tokens/s':>9}  {'memory':>16}  "
             f"{'each sends':>10}  {'hours':>7}"]  # fmt: skip
    for p in plans:
        shares = ", ".join(f"{value / p.step:.0%}" for value in p.seconds.values())
        memory, sent = f"{p.memory / _GIB:>5,.1f} of {p.available / _GIB:>4,.0f} GiB", f"{p.sent / 1e6:>7,.0f} MB"
        lines.append(f"{p.workers:>9}  {p.step:>7,.1f} s  {shares:>36}  {p.tokens_per_second:>9,.0f}  {memory}  {sent}  "
                     f"{p.hours:>7,.1f}{f'  cannot be: {p.why}' if p.why else ''}")  # fmt: skip
    return [f"{name}; a step's share of each part, memory and bytes of each process", *lines]


@contextmanager
def find_device(name: str, processes: int = 1) -> Iterator[Device]:
    """``here``, as `this_machine` has it, or one of `DEVICES`.

    Raises:
        UserError: there is none of that name; this machine has fewer cores than ``processes``.
    """
    if name == "here":
        with this_machine(processes) as device:
            yield device
    elif name in DEVICES:
        yield DEVICES[name]
    else:
        raise UserError(f"--device {name}", f"use here, or one of {', '.join(DEVICES)}")
