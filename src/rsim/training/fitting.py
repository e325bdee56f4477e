"""What a run's cost says to people; where a run does not fit, which settings would, by the same estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from rsim.config import Config, as_overrides, validate
from rsim.errors import UserError
from rsim.models.device import choose_device
from rsim.training.cost import GIB, Cost

NOTHING = "take smaller models, or lower rollout.max_tokens"
_RANKS = {"reasoner": 32, "planner": 16}
_LEAST_BATCH = 8  # episodes in flight: with fewer, sampling takes for ever
_PROCESSES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Proposal:
    """``settings`` on top of a config, with which ``cost`` says that it fits."""

    settings: dict[str, Any]
    cost: Cost

    @property
    def line(self) -> str:
        """As people type it."""
        workers = [f"--workers {self.cost.job.workers}"] * (self.cost.job.workers > 1 or not self.settings)
        return " ".join([*workers, *(f"--set {one}" for one in as_overrides(self.settings))])

    def to_json(self) -> dict[str, Any]:
        return {"settings": self.settings, "workers": self.cost.job.workers} | {
            name: getattr(self.cost, name) for name in ("memory", "hours")
        }


def proposals(config: Config, cost_of: Callable[[Config, int], Cost], most: int = 1) -> list[Proposal]:
    """The fastest settings that fit with all weights trained, with adapters, in 4 bits where that is faster,
    and on several devices.

    Args:
        cost_of: the estimate of a config with a number of processes.
        most: processes; the smallest number above 1 that fits is proposed.
    """
    ranks = {f"models.{agent}_lora": _RANKS[agent] for agent in config.trained_whole}
    whole = _fastest(config, {}, cost_of, 1)
    adapters = _fastest(config, ranks, cost_of, 1) if ranks else None
    four_bits = _fastest(config, ranks | {"models.quantised": True}, cost_of, 1) if not whole else None
    if four_bits and adapters and four_bits.cost.hours > 0.8 * adapters.cost.hours:
        four_bits = None
    found = [one for one in (whole, adapters, four_bits) if one]
    for workers in _PROCESSES:
        for way in ({}, ranks) if workers <= most else ():
            if shared := _fastest(config, way | {"parallel.shard": True}, cost_of, workers):
                return [*found, shared]
    return found


def _fastest(
    config: Config, way: dict[str, Any], cost_of: Callable[[Config, int], Cost], workers: int
) -> Proposal | None:
    """With ``way``, and as little else as is needed of what costs time alone; None where nothing fits."""
    found = []
    for less in _less_memory(config):
        settings = way | less
        if changed := _changed(config, settings):
            cost = cost_of(changed, workers)
            found += [] if cost.why else [Proposal(settings, cost)]
    return min(found, key=lambda one: (round(one.cost.hours, 2), len(one.settings)), default=None)


def _less_memory(config: Config) -> Iterator[dict[str, Any]]:
    """Settings that train the same with less memory at a time."""
    train, rollout = config.train, config.rollout
    batches = _halves(min(rollout.batch, train.questions * train.group), _LEAST_BATCH)
    micro = _halves(train.micro_tokens, rollout.max_tokens + 128)  # an episode and its question in one pass
    again = [{}] if train.gradient_checkpointing else [{}, {"train.gradient_checkpointing": True}]
    shared = [{}] if config.models.shared_base else [{}, {"models.shared_base": True}]
    for one, other, sizes, tokens in product(again, shared, batches, micro):
        batch = {"rollout.batch": sizes} if sizes < batches[0] else {}
        yield other | batch | ({"train.micro_tokens": tokens} if tokens < micro[0] else {}) | one


def _halves(size: int, least: int) -> list[int]:
    """
    >>> _halves(256, 60), _halves(5, 60)
    ([256, 128, 64], [5])
    """
    return [size, *_halves(size // 2, least)] if size // 2 >= least else [size]


def _changed(config: Config, settings: dict[str, Any]) -> Config | None:
    """None where the settings do not go together."""
    for key, value in settings.items():
        table, name = key.split(".")
        config = replace(config, **{table: replace(getattr(config, table), **{name: value})})
    try:
        validate(config)
    except UserError:
        return None
    return config


def describe_proposals(found: Sequence[Proposal]) -> list[str]:
    """Proposals for people, a line each; what to do where there are none."""
    if not found:
        return [f"nothing that was tried fits: {NOTHING}"]
    lines = ["it would fit with, by the same estimate:"]
    lines += [f"  {p.line}   {p.cost.memory / GIB:.1f} GiB, {p.cost.hours:,.1f} h" for p in found]
    if any("lora" in key for p in found for key in p.settings):
        lines.append("(adapters take ten to fifty times the rates: train.reasoner_lr, train.planner_lr)")
    return lines


def check_fits(found: Cost, would: Sequence[Proposal]) -> None:
    """Raises `UserError` for a run that this machine cannot hold."""
    if found.memory > found.available:
        needed, there = found.memory / GIB, found.available / GIB
        raise UserError(
            f"the run needs about {needed:.1f} GiB, {found.job.hardware.name} has {there:.1f} GiB",
            f"it would fit with {would[0].line}" if would else NOTHING,
        )


def describe_estimate(found: Cost) -> list[str]:
    """A dry run's cost for people, line by line."""
    lines = [choose_device(found.job.config).reason]
    for name, a in found.job.needs.items():
        share = f"{a.trained / 1e6:,.2f} M trained" if a.trained else "frozen"
        share = "all trained" if a.trained == a.parameters else share
        lines.append(
            f"{name}: {a.parameters / 1e6:,.1f} M parameters, {share}; weights {a.weights / GIB:.2f} GiB, "
            f"gradients and optimiser {a.optimiser / GIB:.2f} GiB, KV cache {a.cache / GIB:.2f} GiB, "
            f"activations {a.activations / GIB:.2f} GiB"
        )
    memory, there, device = found.memory / GIB, found.available / GIB, found.job.hardware.name
    steps = found.job.config.total_steps
    lines.append(f"memory: about {memory:.1f} GiB at the peak; {device} has {there:.1f} GiB free")
    lines.append(
        f"time: about {found.step:,.1f} s a step, {found.hours:,.1f} h for {steps:,} steps "
        "(episodes as long as the rules allow; evaluation not counted)"
    )
    return lines


def describe_plans(plans: list[Cost]) -> list[str]:
    """Plans for people, a line each."""
    lines = [
        f"{plans[0].job.hardware.name}; a step's share of each part, memory and bytes of each process",
        f"{'processes':>9}  {'a step':>9}  {'sampling, planner, updates, exchange':>36}  {'tokens/s':>9}  "
        f"{'memory':>16}  {'each sends':>10}  {'hours':>7}",
    ]
    for p in plans:
        shares = ", ".join(f"{value / p.step:.0%}" for value in p.seconds.values())
        why = f"  cannot be: {p.why}" if p.why else ""
        lines.append(
            f"{p.job.workers:>9}  {p.step:>7,.1f} s  {shares:>36}  {p.tokens_per_second:>9,.0f}  "
            f"{p.memory / GIB:>5,.1f} of {p.available / GIB:>4,.0f} GiB  {p.sent / 1e6:>7,.0f} MB  "
            f"{p.hours:>7,.1f}{why}"
        )
    return lines
