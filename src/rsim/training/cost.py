"""What a run costs, here (``--dry-run``) or on machines that one does not have (``rsim plan``).

Memory counts weights, gradients, Adam's two moments, the rollout's KV caches and the activations of one
micro-batch, with constants fitted to the peaks in docs/results.md (SmolLM2-135M, CPU), and a margin.

Seconds are those of decoding (each pass reads the weights once, or is bound by its products), reading, both
agents' passes, the optimiser's pass over memory, and what processes send each other, at a fixed part of a
device's peaks, which are timed for this machine. Not counted: checkpoints, evaluation, overlap, a vLLM
server's own device. The longest episode has a fixed multiple of the mean length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from rsim.config import Config
from rsim.engine.layers import PACKED_BYTES
from rsim.models.device import allow_tf32, choose_device
from rsim.policies.loading import load_reasoner
from rsim.policies.strategies import load_strategies

GIB = 2**30
_MARGIN = 1.15  # of memory: a run of SmolLM2-135M reached 7.0 GiB where the parts sum up to 6.1
_QUESTION = 128  # tokens of a question with its prompt, where nobody says
_TOKENS_A_WORD = 1.4  # of an injected prompt, beside one for the delimiter
_TOKEN_SECONDS = 6e-5  # of Python for a sampled token on this CPU (5e-5 to 8e-5 in runs of nano on one core)
_LONGEST = 2.4  # times the mean length: the episode waited for (2.4 and 2.6 in two runs of nano)
_ASKED = 4  # calls of the planner for each decision of all episodes: a rollout waits for a quarter of them
_STREAMED = 0.8  # of a device's memory bandwidth
_SECONDS = 0.3  # for each timing
# Assumed, not measured: seconds of Python and launches for a layer and pass of the native engine, and where
# the pass is replayed as a CUDA graph; bytes of a token as processes exchange episodes (id, mask, log-prob,
# pickled); bytes a second at which weights go to a vLLM server.
_LAYER_SECONDS, _REPLAYED_LAYER, _EPISODE_BYTES, _DISK = 4e-4, 1e-4, 16, 2e9


@dataclass(frozen=True)
class Hardware:
    """Peaks of one device, in FLOPs and bytes a second; float32 with TF32 on a GPU. ``link``: to others on
    the machine; ``reached``: of a peak in training, PaLM's 46% (arXiv 2204.02311, table 3); ``runtime``:
    bytes of CUDA's context, torch and buffers."""

    name: str
    float32: float
    bfloat16: float
    memory: float
    bandwidth: float
    link: float
    per_machine: int = 8
    reached: float = 0.45
    runtime: float = 1.5 * GIB
    cpu: bool = False


# NVIDIA's data sheets: dense peaks without sparsity, bytes in 10^9; NVLink one way, PCIe 4.0 x16 without it.
DEVICES = {
    "h200": Hardware("H200", 494e12, 989e12, 141e9, 4.8e12, 450e9),
    "h100": Hardware("H100 SXM", 494e12, 989e12, 80e9, 3.35e12, 450e9),
    "a100": Hardware("A100 SXM 80 GB", 156e12, 312e12, 80e9, 2.04e12, 300e9),
    "l40s": Hardware("L40S", 183e12, 362e12, 48e9, 0.864e12, 32e9),
    "rtx4090": Hardware("RTX 4090", 82.6e12, 165e12, 24e9, 1.008e12, 32e9, per_machine=4),
}

# Layers, hidden, intermediate, heads, key/value heads, vocabulary, tied output: config.json on the hub.
_SHAPES = {
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "qwen2.5-3b": (36, 2048, 11008, 16, 2, 151936, True),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 152064, False),
    "qwen2.5-14b": (48, 5120, 13824, 40, 8, 152064, False),
    "qwen2.5-32b": (64, 5120, 27648, 40, 8, 152064, False),
    "qwen2.5-coder-1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128256, False),
    "llama-3.2-1b": (16, 2048, 8192, 32, 8, 128256, True),
    "smollm2-135m": (30, 576, 1536, 9, 3, 49152, True),
}


@dataclass(frozen=True)
class AgentNeeds:
    """One agent. ``trained`` of its ``parameters`` change, ``in_layers`` can be sharded; memory in bytes."""

    parameters: int
    trained: int
    in_layers: int
    weights: float
    optimiser: float  # gradients and Adam's moments
    cache: float
    activations: float

    @property
    def adapted(self) -> bool:
        """Frozen weights below an adapter."""
        return 0 < self.trained < self.parameters


@dataclass(frozen=True)
class _Load:
    """What one process does in a step."""

    questions: int
    question: int  # tokens of one
    episodes: int
    sampled: int  # tokens of an episode
    injected: int
    decisions: int

    @property
    def read(self) -> float:
        """Tokens that a model reads of all episodes, each question once."""
        return self.episodes * (self.sampled + self.injected) + self.questions * self.question


@dataclass(frozen=True)
class _Job:
    """One process of ``workers``; ``width``: bytes a number."""

    config: Config
    shapes: dict[str, PreTrainedModel]
    load: _Load
    hardware: Hardware
    workers: int
    width: int

    @cached_property
    def needs(self) -> dict[str, AgentNeeds]:
        return {name: _needs(self.config, name, model, self.width) for name, model in self.shapes.items()}

    @property
    def speed(self) -> float:
        """FLOPs a second."""
        return self.hardware.reached * (self.hardware.float32 if self.width > 2 else self.hardware.bfloat16)

    def token(self, name: str) -> float:
        """Seconds of a token forward and backward."""
        return 6 * self.needs[name].parameters / self.speed

    def memory(self) -> float:
        """Bytes of one process at its peak: in a rollout, with unsharded layers and caches, or in an
        update."""
        train, rollout, shard = self.config.train, self.config.rollout, self.config.parallel.shard
        weights = sum(a.weights for a in self.needs.values())
        if self.config.models.shared_base:
            planner = self.needs["planner"]
            weights -= planner.weights - planner.trained * self.width
        lasting = self.hardware.runtime
        if self.config.objective.beta > 0:
            lasting += self.needs["reasoner"].parameters * self.width
        sharded = 0.0 if shard else weights
        for name, agent in self.needs.items():
            inside = agent.in_layers / _counted(self.shapes[name])[0] if shard and agent.trained else 0.0
            part = 1 - inside + inside / self.workers
            sharded += agent.weights * part if shard else 0.0
            lasting += agent.optimiser * (1.0 if agent.adapted else part)
        of_all = min(rollout.batch, train.questions * train.group)
        mine = min(rollout.batch, self.load.episodes) / of_all
        caches = mine * sum(a.cache for a in self.needs.values())
        asked = self.needs["reasoner"].weights if "reasoner" in self.needs else 0.0
        packed = (
            self.hardware.cpu and self.width == 4 and rollout.engine == "native" and asked <= PACKED_BYTES
        )
        rolling = weights + (asked if packed else 0.0) + (sharded if shard else 0.0) + caches
        updating = sharded + max(a.activations for a in self.needs.values())
        return _MARGIN * (lasting + max(rolling, updating))

    def sampling(self) -> float:
        """Seconds in which the reasoner samples all episodes of a process (or of a server)."""
        model, load = self.shapes["reasoner"], self.load
        rollout, hardware = self.config.rollout, self.hardware
        rows = min(rollout.batch, load.episodes)
        weights = _counted(model)[0]
        # All rows are busy but at the end, when the longest episode is waited for.
        longest = min(rollout.max_tokens, _LONGEST * load.sampled)
        passes = (load.episodes / rows - 1) * load.sampled + longest
        rows = max(1, round(load.episodes * load.sampled / passes))  # on average
        length = load.question + (load.sampled + load.injected) // 2
        rest = 2 * weights * (load.questions * load.question + load.episodes * load.injected) / self.speed
        rest += _TOKEN_SECONDS * load.episodes * load.sampled if hardware.cpu else 0.0
        layers, (_, kv_heads, size) = model.config.get_text_config().num_hidden_layers, heads_of(model.config)
        cached = 2 * layers * kv_heads * size * self.width * length
        streaming = (weights * self.width + rows * cached) / (hardware.bandwidth * _STREAMED)
        each_layer = _REPLAYED_LAYER if rollout.cuda_graphs else _LAYER_SECONDS
        overhead = layers * each_layer if rollout.engine == "native" else 0.0
        return float(passes * (max(2 * weights * rows / self.speed, streaming) + overhead) + rest)

    def planning(self) -> float:
        """Seconds in which the planner reads and decides; a forward pass is a third of a `token`."""
        load, layers = self.load, self.shapes["planner"].config.get_text_config().num_hidden_layers
        calls = _ASKED * load.decisions * math.ceil(load.episodes / self.config.rollout.batch)
        return float(self.token("planner") / 3 * load.read + calls * layers * _LAYER_SECONDS)

    def updates(self) -> float:
        """Seconds of both agents' passes and optimiser steps."""
        train, objective = self.config.train, self.config.objective
        steps = train.num_iterations * train.minibatches
        seconds = 0.0
        for name, agent in self.needs.items():
            if agent.trained:
                thirds = 2 if agent.adapted else 3  # frozen weights get no gradient of their own
                thirds += train.gradient_checkpointing + (name == "reasoner" and objective.beta > 0)
                before = steps > 1 or objective.loss == "ppo"  # log-probs before the first step
                seconds += (thirds * train.num_iterations + before) / 3 * self.token(name) * self.load.read
                seconds += 7 * 4 * agent.trained * steps / (self.hardware.bandwidth * _STREAMED)
        return seconds

    def sent(self) -> float:
        """Bytes that one process sends in a step: its episodes to all others, gradients around a ring,
        layers."""
        train, others = self.config.train, (self.workers - 1) / self.workers
        rounds = train.num_iterations * train.minibatches
        micro = math.ceil(self.load.read / train.micro_tokens)
        sent = self.load.read * _EPISODE_BYTES * (self.workers - 1)
        for agent in self.needs.values():
            if agent.trained and self.config.parallel.shard:
                inside = agent.in_layers
                outside = agent.trained if agent.adapted else agent.trained - inside
                each_micro = others * (2 * inside * self.width + 4 * inside * (not agent.adapted))
                sent += others * inside * self.width + train.num_iterations * micro * each_micro
                sent += 2 * others * 4 * outside * rounds
            elif agent.trained:
                sent += 2 * others * 4 * agent.trained * rounds
        return sent


@dataclass(frozen=True)
class Cost:
    """Of a run as ``job`` has it. Seconds and bytes sent are of a step, bytes and memory of one process."""

    job: _Job
    seconds: dict[str, float]  # of each part of a step
    memory: float  # at the peak
    available: float
    sent: float = 0.0

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    @property
    def hours(self) -> float:
        return self.step * self.job.config.total_steps / 3600

    @property
    def tokens_per_second(self) -> float:
        """Sampled, by all processes."""
        train = self.job.config.train
        return train.questions * train.group * self.job.load.sampled / self.step

    @property
    def why(self) -> str:
        """Why it cannot be; empty where it can."""
        config, workers = self.job.config, self.job.workers
        if workers > config.train.questions:
            return f"more processes than train.questions = {config.train.questions}"
        if config.parallel.shard and workers == 1:
            return "parallel.shard needs several processes"
        return "too little memory" if self.memory > self.available else ""

    def to_json(self) -> dict[str, Any]:
        names = ("seconds", "step", "hours", "tokens_per_second", "memory", "available", "sent", "why")
        agents = {name: asdict(needs) for name, needs in self.job.needs.items()}
        told = {"workers": self.job.workers, "fits": not self.why, "agents": agents}
        return told | {name: getattr(self, name) for name in names}


def estimate(config: Config) -> Cost:
    """The cost of one process here, whose episodes are as long as the rules allow.

    Raises:
        UserError: a model cannot be found.
    """
    shapes = {name: load_reasoner(source, weights=False).model for name, source in sources(config).items()}
    return plan(config, this_machine(config), 1, shapes=shapes)


def plan(
    config: Config,
    hardware: Hardware,
    workers: int,
    *,
    tokens: int = 0,
    question: int = _QUESTION,
    network: float = 50e9,
    shapes: dict[str, PreTrainedModel] | None = None,
) -> Cost:
    """What a step of ``config`` costs with ``workers`` processes, each with a device of its own.

    Args:
        tokens: mean sampled tokens of an episode; 0: as many as ``rollout.max_tokens``.
        question: tokens of a question with its prompt.
        network: bytes a second that a machine sends to others.
        shapes: the agents' models without weights, if they are not to be found by their names.

    Raises:
        UserError: a model cannot be found.
    """
    shapes = shapes or {name: shape_of(source) for name, source in sources(config).items()}
    load = _load(config, workers, tokens, question)
    job = _Job(config, shapes, load, hardware, workers, _width(config, hardware))
    # All processes ask one server, on a device of its own; each of the native ones samples for itself.
    served = config.rollout.engine != "native"
    sampler = replace(job, load=_load(config, 1, tokens, question)) if served else job
    sent = job.sent()
    # A ring leaves a machine once.
    speed = hardware.link if workers <= hardware.per_machine else min(hardware.link, network)
    reasoner = job.needs["reasoner"]
    handed_over = 2 * reasoner.weights / _DISK if served and reasoner.trained else 0.0
    seconds = {
        "sampling": sampler.sampling(),
        "planner": job.planning() if "planner" in shapes else 0.0,
        "updates": job.updates(),
        "exchange": sent / speed + handed_over,
    }
    return Cost(job, seconds, job.memory(), hardware.memory, sent)


def _width(config: Config, hardware: Hardware) -> int:
    """Bytes of a number."""
    if config.models.dtype != "auto":
        return {"bfloat16": 2, "float32": 4, "float64": 8}[config.models.dtype]
    return 4 if hardware.cpu or config.trained_whole else 2


def sources(config: Config) -> dict[str, str]:
    """Where each agent's model comes from."""
    found = {"reasoner": config.models.reasoner, "planner": config.models.planner}
    return {name: source for name, source in found.items() if source != "none"}


def shape_of(source: str) -> PreTrainedModel:
    """A model without weights; well-known sizes need no hub.

    >>> shape_of("Qwen/Qwen2.5-7B-Instruct").num_parameters() // 10**6
    7615
    """
    name = source.split("/")[-1].lower()
    for known, (layers, hidden, inner, heads, kv_heads, vocabulary, tied) in _SHAPES.items():
        if name.startswith(known):
            kind: type[PreTrainedConfig] = LlamaConfig if known.startswith("llama") else Qwen2Config
            config = kind(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner)
            config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
            config.vocab_size, config.tie_word_embeddings = vocabulary, tied
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
            return model
    return load_reasoner(source, weights=False).model


def this_machine(config: Config) -> Hardware:
    """The device that ``config`` runs on: its free memory, and timed, its products and its memory's speed."""
    chosen = choose_device(config)
    allow_tf32(chosen)  # as training does
    device = torch.device(chosen.name)
    left, right = torch.ones(1024, 1536, device=device), torch.ones(1536, 4608, device=device)
    block = torch.ones(1 << 26, device=device)
    flops = 2 * 1024 * 1536 * 4608 / _timed(lambda: left @ right, device)
    bandwidth = 2 * block.nbytes / _timed(lambda: block.add_(1.0), device) / _STREAMED
    (name, free), cpu = _available(device), device.type == "cpu"
    runtime, reached = (0.6 * GIB, 0.4) if cpu else (1.5 * GIB, 0.45)
    wide = 1.0 if cpu else 2.0  # of a GPU's bfloat16 over its float32
    return Hardware(name, flops, wide * flops, free, bandwidth, 1e9, 1, reached, runtime, cpu)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Mean seconds, on this machine as busy as it is."""
    work()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        count += 1
    return (time.perf_counter() - began) / count


def _available(device: torch.device) -> tuple[str, float]:
    """Memory that is free, and where."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), float(torch.cuda.mem_get_info(device)[0])
    return "this machine", float(psutil.virtual_memory().available)


def _needs(config: Config, name: str, model: PreTrainedModel, width: int) -> AgentNeeds:
    """What ``model``, without its weights, needs as agent ``name``, ``width`` bytes a number."""
    train, rollout = config.train, config.rollout
    rank = config.models.reasoner_lora if name == "reasoner" else config.models.planner_lora
    text = model.config.get_text_config()
    total, in_layers, linear = _counted(model)
    trained = sum(rank * (inputs + outputs) for inputs, outputs in linear) if rank else total
    if name == "reasoner" and not config.trains_reasoner:
        trained = 0
    in_linear = sum(inputs * outputs for inputs, outputs in linear)
    weights = (total - in_linear) * width + in_linear * (0.55 if config.models.quantised else width)
    if rank:
        total, weights = total + trained, weights + trained * width
    longest = _QUESTION + rollout.max_tokens
    layers = text.num_hidden_layers
    # Floats that a token's backward pass needs.
    per_layer = 5 * text.hidden_size + 2.4 * text.intermediate_size
    kept = layers * text.hidden_size + per_layer if train.gradient_checkpointing else layers * per_layer
    _, kv_heads, size = heads_of(model.config)
    cached = 2 * layers * kv_heads * size * width  # bytes of a token in the KV cache
    if name == "reasoner" and rollout.engine != "native":  # here are its weights while it is trained
        cached, weights = 0, weights if trained else 0.0
    tokens = min(train.micro_tokens, train.questions * train.group * longest)
    return AgentNeeds(
        parameters=total,
        trained=trained,
        in_layers=in_layers,
        weights=weights,
        optimiser=3 * (4 if rank else width) * trained,
        cache=min(rollout.batch, train.questions * train.group) * longest * cached,
        activations=kept * width * tokens if trained else 0.0,
    )


@cache  # walking through a large model's modules takes as long as all else
def _counted(model: PreTrainedModel) -> tuple[int, int, list[tuple[int, int]]]:
    """Its parameters, those of its layers, and the inputs and outputs of the linear ones."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = {id(p) for m in ends if m for p in m.parameters()}
    in_layers = sum(int(p.numel()) for p in model.parameters() if id(p) not in outside)
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    return model.num_parameters(), in_layers, [(m.in_features, m.out_features) for m in linear]


def _load(config: Config, workers: int, tokens: int, question: int) -> _Load:
    train, rollout = config.train, config.rollout
    sampled = min(tokens or rollout.max_tokens, rollout.max_tokens)
    # Steps are taken to be half as long as they may be.
    decisions = max(1, round(rollout.max_steps * min(1.0, 2 * sampled / rollout.max_tokens)))
    decisions *= config.models.planner != "none"
    questions = math.ceil(train.questions / workers)
    prompts = [prompt for s in load_strategies(config.models.strategies).strategies for prompt in s.prompts]
    injected = 1 + _TOKENS_A_WORD * sum(len(prompt.split()) for prompt in prompts) / len(prompts)
    episodes = questions * train.group
    return _Load(questions, question, episodes, sampled, round(decisions * injected), decisions)


def heads_of(config: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads and head size of a model's config."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, getattr(text, "num_key_value_heads", None) or heads, size
