"""What a run will need, before it is started: parameters, memory and time, against this machine.

Simplified: memory counts weights, gradients, Adam's two moments, the KV caches of the rollout and the activations of one
micro-batch, with constants fitted to the peaks in docs/results.md (SmolLM2-135M, CPU), and a margin. Time counts 2
FLOPs per parameter and token read, three times that in training (arXiv 2001.08361, section 2.1), at the speed of two matrix
products that are timed here. Episodes are taken to be as long as the rules allow, so time is an upper estimate: two presets on
two cores took 3 to 5 s a step where 6.4 s were estimated (nano), and 24 to 29 s where 100 were (SmolLM2-135M, whose episodes
had a quarter of the tokens they might have had).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from rsim.config import Config
from rsim.engine.packed import heads_of
from rsim.errors import UserError
from rsim.models.device import choose_device
from rsim.policies.loading import load_reasoner
from rsim.training.timed import product_flops

_GIB = 2**30
_RUNTIME = 0.6 * _GIB  # Python, torch and transformers themselves
_QUESTION = 128  # tokens, prompt included, where the data is not looked at
_MARGIN = 1.15  # of memory: a run of SmolLM2-135M reached 7.0 GiB where the parts sum up to 6.1
_WASTE = 2.0  # time of a step over that of its matrix products: attention, sampling, Python


@dataclass(frozen=True)
class AgentNeeds:
    """One agent. ``trained`` of its ``parameters`` change; memory in bytes."""

    parameters: int
    trained: int
    weights: float
    optimiser: float  # gradients and Adam's moments
    cache: float
    activations: float


@dataclass(frozen=True)
class Estimate:
    agents: dict[str, AgentNeeds]
    memory: float  # bytes at the peak
    available: float
    seconds_per_step: float
    steps: int
    device: str
    reason: str  # for the device and the precision

    @property
    def hours(self) -> float:
        return self.seconds_per_step * self.steps / 3600

    @property
    def fits(self) -> bool:
        return self.memory <= self.available


def estimate(config: Config) -> Estimate:
    """Reads the models' shapes (no weights) and times this machine for a second or two.

    Raises:
        UserError: a model cannot be found.
    """
    chosen = choose_device(config)
    device = torch.device(chosen.name)
    agents, shapes = {}, {}
    for name, source, rank in (
        ("reasoner", config.models.reasoner, config.models.reasoner_lora),
        ("planner", config.models.planner, config.models.planner_lora),
    ):
        if source != "none":
            shapes[name] = load_reasoner(source, weights=False).model
            agents[name] = needs_of(config, name, shapes[name], rank, _width(config))
    shared = agents["planner"].weights - agents["planner"].trained * _width(config) if config.models.shared_base else 0.0
    reference = agents["reasoner"].parameters * _width(config) if config.objective.beta > 0 else 0.0
    lasting = sum(a.weights + a.optimiser for a in agents.values()) - shared + reference
    passing = max(sum(a.cache for a in agents.values()), *(a.activations for a in agents.values()))
    seconds = _WASTE * _seconds(config, shapes, device)
    stages = sum(stage.steps for stage in config.stages)
    steps = min(stages, config.train.steps) if config.train.steps else stages
    name, available = _available(device)
    return Estimate(agents, _MARGIN * (_RUNTIME + lasting + passing), available, seconds, steps, name, chosen.reason)


def check_fits(found: Estimate) -> None:
    """Raises `UserError` for a run that this machine cannot hold."""
    if not found.fits:
        raise UserError(
            f"the run needs about {found.memory / _GIB:.1f} GiB, {found.device} has {found.available / _GIB:.1f} GiB",
            "lower train.micro_tokens or rollout.batch, set train.gradient_checkpointing, give both models an adapter "
            "(models.reasoner_lora, models.planner_lora), or take smaller ones",
        )


def _width(config: Config) -> int:
    return {"float32": 4, "bfloat16": 2, "float64": 8}[choose_device(config).dtype]


def needs_of(config: Config, name: str, model: PreTrainedModel, rank: int, width: int) -> AgentNeeds:
    """What ``model``, without its weights, needs as agent ``name`` with an adapter of that rank, ``width`` bytes a number."""
    text = model.config.get_text_config()
    total = model.num_parameters()
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    trained = sum(rank * (m.in_features + m.out_features) for m in linear) if rank else total
    if name == "reasoner" and not config.trains_reasoner:
        trained = 0
    in_linear = sum(m.weight.numel() for m in linear)
    weights = (total - in_linear) * width + in_linear * (0.55 if config.models.quantised else width)
    if rank:
        total, weights = total + trained, weights + trained * width
    train, rollout = config.train, config.rollout
    episodes = min(rollout.batch, train.questions * train.group)
    longest = _QUESTION + rollout.max_tokens
    per_layer = 5 * text.hidden_size + 2.4 * text.intermediate_size  # floats that the backward pass of a token needs
    layers = text.num_hidden_layers
    kept = layers * text.hidden_size + per_layer if train.gradient_checkpointing else layers * per_layer
    _, kv_heads, size = heads_of(model.config)
    cached = 2 * layers * kv_heads * size * width  # bytes of a token in the KV cache
    if name == "reasoner" and rollout.engine != "native":  # sampled elsewhere: here are its weights while it is trained
        cached, weights = 0, weights if trained else 0.0
    tokens = min(train.micro_tokens, train.questions * train.group * longest)
    return AgentNeeds(
        total, trained, weights, 3 * (4 if rank else width) * trained, episodes * longest * cached,
        kept * width * tokens if trained else 0.0,
    )  # fmt: skip


def _seconds(config: Config, models: dict[str, PreTrainedModel], device: torch.device) -> float:
    """Of a step's matrix products: rollout and training of each agent."""
    train, rollout = config.train, config.rollout
    episodes = train.questions * train.group
    dtype = {4: torch.float32, 2: torch.bfloat16, 8: torch.float64}[_width(config)]
    seconds = 0.0
    for name, model in models.items():
        text = model.config.get_text_config()
        shape = text.hidden_size, text.intermediate_size
        decode = product_flops(min(rollout.batch, episodes), *shape, device, dtype)
        many = product_flops(1024, *shape, device, dtype)
        cost = 2 * model.num_parameters()
        read = episodes * (_QUESTION + rollout.max_tokens)
        # The reasoner samples token by token; the planner reads whole steps.
        seconds += cost * episodes * rollout.max_tokens / (decode if name == "reasoner" else many)
        seconds += 3 * cost * read * train.num_iterations / many
    return seconds


def _available(device: torch.device) -> tuple[str, float]:
    """Memory that is free, and where."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), float(torch.cuda.mem_get_info(device)[0])
    return "this machine", float(psutil.virtual_memory().available)


def describe(found: Estimate) -> list[str]:
    """The estimate for people, line by line."""
    lines = [found.reason]
    for name, a in found.agents.items():
        share = "all trained" if a.trained == a.parameters else f"{a.trained / 1e6:,.2f} M trained" if a.trained else "frozen"
        lines.append(f"{name}: {a.parameters / 1e6:,.1f} M parameters, {share}; weights {a.weights / _GIB:.2f} GiB, gradients "
                     f"and optimiser {a.optimiser / _GIB:.2f} GiB, KV cache {a.cache / _GIB:.2f} GiB, activations "
                     f"{a.activations / _GIB:.2f} GiB")  # fmt: skip
    lines.append(f"memory: about {found.memory / _GIB:.1f} GiB at the peak; {found.device} has "
                 f"{found.available / _GIB:.1f} GiB free")  # fmt: skip
    lines.append(f"time: at most about {found.seconds_per_step:,.1f} s a step, {found.hours:,.1f} h for {found.steps:,} steps "
                 "(episodes as long as the rules allow; evaluation not counted)")  # fmt: skip
    return lines


def to_json(found: Estimate) -> dict[str, Any]:
    """The estimate for programs."""
    return {
        "agents": {name: vars(a) for name, a in found.agents.items()}, "memory_bytes": found.memory,
        "available_bytes": found.available, "fits": found.fits, "seconds_per_step": found.seconds_per_step,
        "steps": found.steps, "hours": found.hours, "device": found.device,
    }  # fmt: skip
