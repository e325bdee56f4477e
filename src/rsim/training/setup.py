"""What a run needs before its first step: processes that suit the config, the two policies, their agents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rsim.config import Config
from rsim.distributed.deepspeed import read_settings
from rsim.distributed.world import World
from rsim.errors import UserError
from rsim.evaluation.upstream import ServedGame, ServedModel, first_listed
from rsim.game.rollout import Game
from rsim.models.adapters import share_frozen
from rsim.models.device import Device
from rsim.policies.loading import found_planner, load_planner, load_reasoner
from rsim.policies.planner import Planner, check_labels
from rsim.policies.reasoner import Reasoner
from rsim.policies.strategies import load_strategies
from rsim.rewards.custom import load_custom
from rsim.rewards.programs import runner_for
from rsim.rules_file import overridden
from rsim.runs.folder import RunFolder, check_trackers
from rsim.training.agent import Agent, AgentSettings
from rsim.training.questions import load_questions


def check_world(config: Config, world: World, held_out: int) -> None:
    """Every rank needs a question to play; shards need ranks; an upstream is asked by one process.

    Raises:
        UserError: it is not so, or DeepSpeed's config is none.
    """
    parallel = config.parallel
    for name, asked in (("parallel.shard", parallel.shard), ("parallel.deepspeed", parallel.deepspeed)):
        if asked and world.size == 1:
            raise UserError(name, "there is one process: start several with torchrun, or leave it out")
    if parallel.deepspeed:
        read_settings(parallel.deepspeed)
    if config.upstream.url and world.size > 1:
        raise UserError("upstream.url", f"one process asks it, and there are {world.size}: start one")
    sizes = {"train.questions": config.train.questions, "data.eval_size": held_out}
    if config.cold_start.episodes:
        sizes["cold_start.episodes"] = config.cold_start.episodes
    for name, size in sizes.items():
        if size < world.size:
            remedy = f"there are {world.size} processes, and each plays questions of its own"
            raise UserError(f"{name} = {size}", remedy)


def check_inputs(config: Config, *, resume: bool = False, resume_from: str = "", force: bool = False) -> None:
    """What a run would complain of before its first step, but for the models' weights; nothing is written.

    Raises:
        UserError: of rewards, strategies, data, trackers, the run's folder, or a planner of other strategies.
    """
    load_custom(config.rewards.custom)
    strategies = load_strategies(config.models.strategies)
    load_questions(config)
    folder = RunFolder.open(config, resume=resume or bool(resume_from), force=force)
    if resume or resume_from:
        folder.checkpoints.intact(resume_from)
    check_trackers(config.train.trackers)
    if config.models.planner != "none":
        _, saved = found_planner(config.models.planner)
        if getattr(saved, "rsim_template", None) is not None:
            check_labels(saved, strategies, config.models.planner)


def load_policies(
    config: Config, device: Device, checkpoint: Path | None
) -> tuple[Reasoner | None, Planner | None]:
    """Both policies, as ``checkpoint`` has them or as they begin; no reasoner where it is behind an upstream.

    Raises:
        UserError: a model cannot be loaded; the strategies are not those of the checkpoint.
    """
    models = config.models
    how: dict[str, Any] = {"seed": config.seed, "device": device.name, "dtype": device.dtype}
    how["quantised"] = models.quantised
    saved = checkpoint / "reasoner" if checkpoint else None
    reasoner = None
    if not config.upstream.url:
        reasoner = load_reasoner(
            str(saved) if saved and saved.is_dir() else models.reasoner,
            system_prompt=models.system_prompt,
            weights=config.holds_reasoner,
            lora=models.reasoner_lora,
            **how,
        )
    if models.planner == "none":
        return reasoner, None
    strategies = load_strategies(models.strategies)
    if checkpoint and load_strategies(str(checkpoint / "planner" / "strategies.toml")) != strategies:
        remedy = "put them back as the planner's strategies.toml has them, or begin another run"
        raise UserError(f"the strategies of {models.strategies} have changed since {checkpoint}", remedy)
    planner = load_planner(
        str(checkpoint / "planner") if checkpoint else models.planner,
        strategies,
        sees=models.planner_sees,
        lora=models.planner_lora,
        **how,
    )
    planner.rules = overridden(config.rollout)
    if models.shared_base and reasoner:
        share_frozen(planner.model, reasoner.model)
    return reasoner, planner


def named(config: Config) -> Config:
    """The config with the name of the upstream's model, so that a run keeps to one.

    Raises:
        UserError: it is not given, and the upstream lists none.
    """
    up = config.upstream
    return replace(config, upstream=replace(up, model=up.model or first_listed(up.url))) if up.url else config


def make_game(config: Config, reasoner: Reasoner | None, planner: Planner | None) -> Game | ServedGame:
    """Who plays the rollouts: a reasoner of this process or its servers' tokens, or an upstream over text."""
    if reasoner is None:
        up = config.upstream
        served = ServedModel(up.url, up.model, up.mode, up.connections, up.max_requests)
        return ServedGame(served, planner, config)
    return Game(reasoner, planner, config.rollout, runner_for(planner, config.rewards))


def make_agents(
    config: Config, reasoner: Reasoner | None, planner: Planner | None, world: World
) -> dict[str, Agent]:
    """The policies that are trained: a reasoner that never changes needs no optimiser."""
    train, rollout = config.train, config.rollout
    common: dict[str, Any] = {
        "weight_decay": train.weight_decay,
        "with_values": config.objective.loss == "ppo",
        "value_learning_rate": train.value_lr,
        "checkpointing": train.gradient_checkpointing,
        "shard": config.parallel.shard,
        "deepspeed": config.parallel.deepspeed,
    }
    agents = {}
    if reasoner and config.trains_reasoner:
        _realign(reasoner.model)
        settings = AgentSettings(temperature=rollout.temperature, learning_rate=train.reasoner_lr, **common)
        weight = reasoner.head_weight
        agents["reasoner"] = Agent(
            "reasoner", reasoner.model, reasoner.logits, settings, head_weight=weight, world=world
        )
    if planner is not None:
        _realign(planner.model)
        warmth, rate = rollout.planner_temperature, train.planner_lr
        settings = AgentSettings(temperature=warmth, learning_rate=rate, **common)
        agents["planner"] = Agent("planner", planner.model, planner.logits, settings, world=world)
    return agents


def _realign(model: PreTrainedModel) -> None:
    """Gives what is trained memory of its own. Weights lie as their file has them, and products of matrices
    that are aligned otherwise round otherwise: a resumed run would differ in the last bit."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
