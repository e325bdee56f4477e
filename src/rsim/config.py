"""One typed tree for everything that a run can be told: TOML files, presets and ``--set key=value`` on top.

Every field carries its help and its bounds. Unknown keys are errors, and an error names the field and the remedy. Nothing here
imports torch.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rsim.errors import UserError, check_url, did_you_mean
from rsim.rules import PlayRules
from rsim.rules_file import check_day
from rsim.settings import check_setting, flat, literal, read_toml, setting, to_table

PRESETS = Path(__file__).with_name("presets")
_RANK = "is a rank: 0 (no adapter) or more"
_WARM = "must be above 0 for training; evaluation has its own"


@dataclass(frozen=True)
class ModelsConfig:
    """The two policies."""

    reasoner: str = setting("nano-s", "a packaged name (nano-s, smollm2-135m), a local folder or a hub id")
    planner: str = setting("nano-s", 'as reasoner; "none" trains the reasoner alone (plain GRPO)')
    planner_sees: Literal["everything", "question", "number"] = setting(
        "everything", "of a new planner; question: not the steps, number: of the step alone (controls)"
    )
    strategies: str = setting("default", "default, instruct, sentences, tables, code, acting, arms, lab or a TOML file")
    system_prompt: str = setting("", "put before the question by the reasoner's chat template")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "auto", "auto: bfloat16 for adapters on a GPU, else float32"
    )
    reasoner_lora: int = setting(0, "rank of its LoRA adapter; 0: it is trained whole", at_least=0, remedy=_RANK)
    planner_lora: int = setting(0, "as reasoner_lora", at_least=0, remedy=_RANK)
    shared_base: bool = setting(False, "both agents read one copy of the same frozen weights")
    quantised: bool = setting(False, "frozen weights in 4 bits (QLoRA)")


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out questions."""

    train: str = setting("lab", "lab, a known set such as gsm8k, or a JSONL file")
    eval: str = setting("lab", "as train")
    eval_split: str = setting("dev", "the split of the held-out questions")
    eval_size: int = setting(200, "held-out questions", at_least=1)
    train_size: int = setting(0, "training questions; 0: all", at_least=0)
    max_question_tokens: int = setting(0, "training questions of more reasoner tokens are left out; 0: none are", at_least=0)
    replay: tuple[str, ...] = setting((), "earlier tasks, mixed into the training questions")
    replay_share: float = setting(0.25, "of the training questions, where there are earlier tasks", at_least=0, below=1)
    data_dir: str = setting("", "where data sets lie; default: $RSIM_DATA")
    columns: tuple[str, ...] = setting((), 'of files and hub sets that name them differently: "question=problem"')


@dataclass(frozen=True)
class RolloutConfig(PlayRules):
    """The rules of the game (`rsim.rules.PlayRules`), and how episodes are sampled."""

    temperature: float = setting(1.0, "of the reasoner's sampling", above=0, remedy=_WARM)
    planner_temperature: float = setting(1.0, "of the planner's sampling", above=0, remedy=_WARM)
    batch: int = setting(256, "episodes in flight", at_least=1)
    engine: Literal["native", "vllm", "llama"] = setting("native", "what samples")
    cuda_graphs: bool = setting(True, "native engine on a GPU: passes of one token per sequence are recorded and replayed")
    vllm_url: str = setting("http://127.0.0.1:8000", "or several, with commas between them")
    vllm_timeout: float = setting(600.0, "seconds that one step may take")
    llama_url: str = setting("http://127.0.0.1:8080", "llama.cpp's server, or several with commas between them")
    llama_timeout: float = setting(3600.0, "seconds that one step may take; on a CPU a step of many at a time is slow")


@dataclass(frozen=True)
class UpstreamConfig:
    """The reasoner of a training of the planner alone, behind any OpenAI-compatible server: text, no token ids."""

    url: str = setting("", "its base URL, with /v1; empty: the reasoner is models.reasoner")
    model: str = setting("", "its name there; empty: the first that is listed")
    mode: Literal["", "prefill", "turn"] = setting("", "how prompts are injected there; empty: probed")
    connections: int = setting(8, "answers asked for together", at_least=1)
    max_requests: int = setting(0, "of the whole run, resumed or not; then it stops; 0: no limit", at_least=0)
    price_in: float = setting(0.0, "dollars for a million tokens that it reads", at_least=0)
    price_out: float = setting(0.0, "dollars for a million tokens that it writes", at_least=0)


@dataclass(frozen=True)
class RewardsConfig:
    """Weights of the reward parts; 0 removes a part."""

    accuracy: float = setting(1.0, "both agents: a right answer")
    format: float = setting(0.1, "reasoner: every step says something, one box closes the last one")
    follow: float = setting(0.1, "reasoner: the share of steps that show evidence of their strategy")
    terminal: float = setting(0.1, "planner: it ended the episode itself, with an answer")
    penalty: float = setting(0.05, "planner: taken for each use of a strategy beyond repeat_allowance", at_least=0)
    penalty_cap: float = setting(0.2, "planner: at most this is taken", at_least=0)
    repeat_allowance: int = setting(2, "uses of a strategy in an episode that cost nothing", at_least=0)
    checker: Literal["auto", "numeric", "latex", "choice", "text", "code"] = setting("auto", "auto: as each problem says")
    unsafe_code: bool = setting(False, "run code and judge gym answers without a sandbox where none can be built")
    custom: tuple[str, ...] = setting((), 'functions of your own: "file.py:function", or "file.py:function@planner*0.5"')


@dataclass(frozen=True)
class ObjectiveConfig:
    """The joint objective."""

    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "ppo"] = setting("grpo", "the surrogate of each action")
    normaliser: Literal["preset", "token", "sequence", "constant", "paper"] = setting("preset", "preset: the loss's own")
    lambda_mode: Literal["lr", "loss"] = setting("lr", "what a stage's lambda scales: learning rates or losses")
    update_order: Literal["joint", "leader_first"] = setting("joint", "leader_first: the planner, then new episodes")
    clip_low: float = setting(
        0.0,
        "a probability ratio is clipped below 1 minus this; 0: the loss's own (3e-4 for gspo, else 0.2)",
        at_least=0,
        below=1,
    )
    clip_high: float = setting(
        0.0, "and above 1 plus this; 0: the loss's own (0.28 for dapo, 4e-4 for gspo, else clip_low)", at_least=0
    )
    scale_by_std: bool = setting(False, "divide advantages by their group's deviation")
    beta: float = setting(0.0, "weight of the reasoner's KL to its starting model", at_least=0)
    kl: Literal["k1", "k2", "k3"] = setting("k3", "the estimate of that KL; k1 has k2's gradient")
    planner_entropy: float = setting(0.0, "weight of the planner's entropy bonus", at_least=0)
    importance_cap: float = setting(0.0, "truncated correction of the sampler's to the trainer's numerics; 0: off", at_least=0)
    importance_level: Literal["token", "sequence"] = setting("token", "of that correction: of each action or of all together")
    mask_truncated: bool = setting(False, "leave truncated episodes out of the update")
    gae_lambda: float = setting(0.95, "ppo: bias (0) against variance (1)", at_least=0, at_most=1)
    value_coefficient: float = setting(0.5, "ppo: weight of the value loss", at_least=0)


@dataclass(frozen=True)
class StageConfig:
    """One stage of training."""

    name: str = setting("stage", "its own, for --set stages.NAME.steps")
    steps: int = setting(0, "optimisation steps", at_least=0)
    lambda_: float = setting(0.5, "weighs the planner against the reasoner (1 - lambda)", at_least=0, at_most=1)
    train_planner: bool = setting(True, "the planner learns")
    train_reasoner: bool = setting(True, "the reasoner learns")


@dataclass(frozen=True)
class ColdStartConfig:
    """Fine-tuning of the reasoner on its own episodes, before the stages.

    ``teach = "format"`` keeps wrong but well-formatted episodes and learns their sampled tokens: the step format, no answers.
    ``teach = "prompts"`` learns the strategies' prompts too, so that a reasoner without planner writes them by itself.
    ``teach = "strategies"`` is a control: like ``prompts``, with right episodes.
    """

    teach: Literal["format", "prompts", "strategies"] = setting("format", "wrong episodes, these with prompts, right ones")
    episodes: int = setting(0, "sampled; 0 skips the cold start", at_least=0)
    keep: int = setting(1000, "at most, learned from", at_least=1)
    minimum: int = setting(16, "fewer than this is an error", at_least=1)
    epochs: int = setting(1, "passes over the kept episodes", at_least=1)
    learning_rate: float = setting(1e-5, "of the fine-tuning", at_least=0)
    few_shot: str = setting("", "worked examples put before the question while sampling, and removed before fine-tuning")


@dataclass(frozen=True)
class TrainConfig:
    """The updates, and what is logged of them."""

    steps: int = setting(0, "in all, shared by the stages in proportion to their own; 0: the stages' own", at_least=0)
    token_budget: int = setting(0, "sampled reasoner tokens, with the cold start, that the steps share; 0: any", at_least=0)
    questions: int = setting(32, "per step", at_least=1)
    group: int = setting(8, "episodes per question", at_least=2)
    planner_lr: float = setting(1e-3, "the planner's learning rate; this one is for nano models", at_least=0)
    reasoner_lr: float = setting(3e-4, "the reasoner's; this one is for nano models: whole LLMs take 1e-6", at_least=0)
    value_lr: float = setting(0.0, "ppo: a value head's; 0: its agent's; lambda acts on it too", at_least=0)
    warmup: int = setting(0, "steps in which learning rates rise to their own", at_least=0)
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", "of learning rates after that, down to 0")
    weight_decay: float = setting(0.0, "AdamW's", at_least=0)
    grad_clip: float = setting(
        1.0, "an agent's gradient norm, at most", above=0, unbounded=True, remedy="must be above 0; inf turns clipping off"
    )
    num_iterations: int = setting(1, "updates on one batch of episodes", at_least=1)
    minibatches: int = setting(1, "optimiser steps per iteration", at_least=1)
    micro_tokens: int = setting(16384, "tokens per forward pass; gradients are accumulated", at_least=1)
    gradient_checkpointing: bool = setting(False, "less memory for a third more time")
    eval_every: int = setting(10, "steps between held-out evaluations; 0: at the end alone", at_least=0)
    samples_every: int = setting(5, "steps between logged episodes; 0: none are logged", at_least=0)
    trackers: tuple[str, ...] = setting(("tensorboard",), "tensorboard, wandb, trackio")
    project: str = setting("rsim", "wandb's and trackio's project")


@dataclass(frozen=True)
class ParallelConfig:
    """What several processes share beside the episodes (none of it: each holds both models, as torchrun starts them)."""

    shard: bool = setting(False, "each process keeps a shard of every layer's weights, gradients and moments (FSDP2)")
    deepspeed: str = setting("", "a file with DeepSpeed's config, ZeRO stage 1 or 2")


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run can be resumed from."""

    save_every: int = setting(10, "steps between checkpoints", at_least=1)
    keep: int = setting(2, "the newest ones to resume from, beside the best and the final one", at_least=1)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = setting("run", "its name in trackers")
    seed: int = setting(0, "of everything that is drawn", at_least=0, at_most=2**32 - 1)
    out: str = setting("", "its folder; default: runs/NAME")
    models: ModelsConfig = field(default_factory=ModelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    upstream: UpstreamConfig = field(default_factory=UpstreamConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    stages: tuple[StageConfig, ...] = (StageConfig("stage1", 100, 0.7), StageConfig("stage2", 100, 0.3))
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    @property
    def reasoner(self) -> str:
        """``models.reasoner``. Raises `UserError` where the reasoner is behind an upstream in its place."""
        if self.upstream.url:
            raise UserError(f"the reasoner is behind {self.upstream.url}", "give --upstream, or name one of this machine")
        return self.models.reasoner

    @property
    def trains_reasoner(self) -> bool:
        return bool(self.cold_start.episodes) or any(stage.train_reasoner for stage in self.stages)

    @property
    def holds_reasoner(self) -> bool:
        """Whether the reasoner's weights are needed here, and not on a server alone."""
        return self.trains_reasoner or (self.rollout.engine == "native" and not self.upstream.url)

    @property
    def total_steps(self) -> int:
        return sum(self.stage_steps)

    @property
    def stage_steps(self) -> list[int]:
        """How many steps each stage takes: its own, or its share of ``train.steps``."""
        own = [stage.steps for stage in self.stages]
        if not self.train.steps or not sum(own):
            return own
        ends = [round(self.train.steps * sum(own[: i + 1]) / sum(own)) for i in range(len(own))]
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]

    def stage_at(self, step: int) -> StageConfig:
        for stage, steps in zip(self.stages, self.stage_steps, strict=True):
            if step < steps:
                return stage
            step -= steps
        return self.stages[-1]

    @property
    def trained_whole(self) -> list[str]:
        """The agents that train all their weights, not an adapter."""
        models = self.models
        whole = ["reasoner"] if self.trains_reasoner and not models.reasoner_lora else []
        return [*whole, "planner"] if models.planner != "none" and not models.planner_lora else whole


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


Overrides = Sequence[str] | Mapping[str, Any]  # ``key=value`` strings, or a dict with nested or dotted keys


def load_config(source: str | Path | Mapping[str, Any] | None = None, overrides: Overrides = ()) -> Config:
    """The config of a preset, a TOML file or a dict, with overrides on top of it; what is left out has its default.

    Args:
        source: a preset's name, a file, or a dict with nested or dotted keys.
        overrides: a dict like it, or ``key=value`` strings. ``stages.NAME.steps`` is the steps of the stage of that name.

    Raises:
        UserError: no such preset or file, invalid TOML, an unknown key, a value of the wrong type or out of range.

    Examples:
        >>> load_config({"models": {"planner": "none"}, "train.steps": 3}).train.steps
        3
    """
    table: dict[str, Any] = {}
    if isinstance(source, Mapping):
        overrides, source = [*as_overrides(source), *as_overrides(overrides)], None
    if source is not None:
        path = PRESETS / f"{source}.toml" if str(source) in presets() else Path(source)
        if not path.is_file():
            raise UserError(f"no preset or config file {str(source)!r}", did_you_mean(str(source), presets()))
        table = read_toml(path)
    for override in as_overrides(overrides):
        _apply(table, override)
    config: Config = from_table(Config, table, "")
    validate(config)
    return config


def as_overrides(overrides: Overrides) -> list[str]:
    """Overrides as ``key=value`` strings.

    >>> as_overrides({"train": {"steps": 3}, "out": "run"})
    ['train.steps=3', 'out="run"']
    """
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{key}={literal(value)}" for key, value in flat(overrides).items()]


def _apply(table: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key.strip():
        raise UserError(f"--set {override}", "write key=value, e.g. train.steps=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = key.strip().split(".")
    if parents[:1] == ["stages"]:
        table.setdefault("stages", [to_table(stage) for stage in Config.stages])
    node: Any = table
    for depth, name in enumerate(parents):
        node = _list_item(node, name, key) if isinstance(node, list) else node.setdefault(name, {})
        if not isinstance(node, dict | list):
            raise UserError(f"--set {override}", f"{'.'.join(parents[: depth + 1])} is a value, not a table")
    if isinstance(node, list):
        raise UserError(f"--set {override}", f"name a field of an entry, e.g. {key}.steps=10")
    node[last] = value


def _list_item(items: list[Any], name: str, key: str) -> Any:
    """Entries of ``stages`` are addressed by their name or number."""
    for index, item in enumerate(items):
        if name in (str(index), item.get("name") if isinstance(item, dict) else None):
            return item
    raise UserError(f"--set {key}: no entry {name!r}", f"there are {len(items)}, by name or number from 0")


def from_table(cls: type[Any], table: Any, where: str) -> Any:
    """Builds the dataclass ``cls`` from a plain table, checking keys and types."""
    if not isinstance(table, dict):
        raise UserError(f"{where or 'config'} must be a table", f"got {table!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name.rstrip("_"): f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            raise UserError(f"unknown key {path!r}", did_you_mean(key, known))
        values[known[key]] = _coerce(hints[known[key]], value, path)
    return cls(**values)


def _coerce(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_table(typing.cast(type[Any], hint), value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{path} = {value!r}", f"use one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path} must be a list", f"got {value!r}")
        return tuple(_coerce(args[0], item, f"{path}.{i}") for i, item in enumerate(value))
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{path} must be {hint.__name__}", f"got {value!r}")
    return value


def validate(config: Config) -> None:
    """The fields' bounds, and combinations.

    Raises:
        UserError: a value out of its range; values that do not go together.
    """
    _check_bounds(config, "")
    train, rollout, it, data = config.train, config.rollout, config.objective, config.data
    names, ppo, kept = [stage.name for stage in config.stages], it.loss == "ppo", rollout.answer_tokens
    limit = f"rollout.max_tokens = {rollout.max_tokens}"
    many = f"train.minibatches = {train.minibatches}"
    _need(train.minibatches <= train.questions, many, f"cannot exceed train.questions = {train.questions}")
    _need(rollout.max_tokens > kept, limit, f"must exceed rollout.answer_tokens = {kept}")
    _need(rollout.delimiter, "rollout.delimiter is empty", 'use e.g. "\\n\\n"')
    check_day(rollout.day, "rollout.day")
    _check_adapters(config)
    _check_upstream(config)  # and what would have no effect is refused too:
    capped = it.importance_cap or it.importance_level != "sequence"
    _need(capped, "objective.importance_level", "there is no correction: set objective.importance_cap too, e.g. to 2")
    headless = f"objective.loss = {it.loss} has no value head: leave it out, or take ppo"
    _need(ppo or not train.value_lr, "train.value_lr", headless)
    _need(not (ppo and it.scale_by_std), "objective.scale_by_std", "ppo's advantages are its value head's: leave it out")
    if names:  # else no run is meant
        _need(config.trains_reasoner or not it.beta, f"objective.beta = {it.beta}", "the reasoner is not trained: set 0")
        adapted = config.trains_reasoner or config.models.shared_base or not config.models.reasoner_lora
        _need(adapted, f"models.reasoner_lora = {config.models.reasoner_lora}", "the reasoner is not trained: leave it out")
        shared = not train.steps or any(stage.steps for stage in config.stages)
        _need(shared, f"train.steps = {train.steps}", "stages share them in proportion to their own steps: give them some")
    mixed = data.replay or data.replay_share in (0, DataConfig.replay_share)
    _need(mixed, f"data.replay_share = {data.replay_share}", "name earlier tasks too: data.replay")
    for stage in config.stages:
        learns = stage.train_reasoner or (stage.train_planner and config.models.planner != "none")
        _need(learns, f"stages.{stage.name} trains nothing", "set train_planner (with a planner) or train_reasoner")
    _need(len(set(names)) == len(names), "stages share a name", "give each stage its own")


def _need(holds: object, where: str, remedy: str) -> None:
    if not holds:
        raise UserError(where, remedy)


def _check_bounds(table: Any, where: str) -> None:
    for f in dataclasses.fields(table):
        value, path = getattr(table, f.name), where + f.name.rstrip("_")
        if path == "stages":
            for stage in value:
                _check_bounds(stage, f"stages.{stage.name}.")
        elif dataclasses.is_dataclass(value):
            _check_bounds(value, f"{path}.")
        else:
            check_setting(f, value, path)


def _check_upstream(config: Config) -> None:
    if not config.upstream.url:
        if config.upstream != UpstreamConfig():
            raise UserError("upstream", "its settings are of a server: give upstream.url (--upstream URL) too")
        return
    check_url("upstream.url", config.upstream.url)
    models, there = config.models, "the reasoner is behind upstream.url"
    if config.rollout.engine != "native":
        raise UserError(f"rollout.engine = {config.rollout.engine}", f"{there}, which samples: leave it at native")
    if config.cold_start.episodes:
        raise UserError(f"cold_start.episodes = {config.cold_start.episodes}", f"{there} and cannot be fine-tuned: set 0")
    for stage in config.stages:
        if stage.train_reasoner:
            raise UserError(f"stages.{stage.name}.train_reasoner", f"{there} and cannot be trained: set it to false")
    if models.planner == "none":
        raise UserError("models.planner = none", f"{there}, so a planner is all that can be trained: name its base")
    if models.shared_base or models.reasoner_lora:
        name = "shared_base" if models.shared_base else "reasoner_lora"
        raise UserError(f"models.{name}", f"{there}, its weights are not here: leave it out")


def _check_adapters(config: Config) -> None:
    models, vllm = config.models, config.rollout.engine == "vllm"
    whole = config.trained_whole
    if models.quantised and whole:
        raise UserError("models.quantised", f"4-bit weights cannot be trained: set models.{whole[0]}_lora, e.g. to 16")
    if models.quantised and vllm:
        raise UserError("models.quantised", "4-bit weights cannot be handed to a vLLM server: use rollout.engine = native")
    if models.shared_base and config.rollout.engine != "native" and not config.trains_reasoner:
        raise UserError("models.shared_base", "a frozen reasoner's weights are on the server alone: there is nothing to share")
    if config.rollout.engine == "llama" and config.trains_reasoner:
        remedy = "train the planner alone (stages.*.train_reasoner = false, cold_start.episodes = 0), or use another engine"
        raise UserError("rollout.engine = llama", f"its server takes no new weights: {remedy}")
    if models.shared_base and (models.planner != models.reasoner or whole or not models.planner_lora):
        remedy = "and an adapter for each that is trained (models.planner_lora, models.reasoner_lora)"
        raise UserError("models.shared_base", f"needs the same base for both agents, {remedy}")
    if config.parallel.shard and config.parallel.deepspeed:
        raise UserError("parallel.deepspeed", "either DeepSpeed shards or parallel.shard does")
    if config.parallel.shard and (models.quantised or models.shared_base or vllm):
        remedy = "layers are not sharded with models.quantised, models.shared_base or rollout.engine = vllm"
        raise UserError("parallel.shard", remedy)


def to_toml(config: Config, *, explain: bool = False) -> str:
    """The resolved config as TOML that `load_config` reads back; ``explain``: the help of every key above it."""
    lines = _lines(config, explain)
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            lines += ["", f"[{f.name}]", *_lines(value, explain)]
    for stage in config.stages:
        lines += ["", "[[stages]]", *_lines(stage, explain)]
    return "\n".join(lines) + "\n"


def _lines(table: Any, explain: bool) -> list[str]:
    """The keys of one table that are no tables themselves."""
    lines, values = [], to_table(table)
    for f in dataclasses.fields(table):
        if "help" in f.metadata:
            lines += [f"# {f.metadata['help']}"] if explain else []
            lines.append(f"{f.name.rstrip('_')} = {literal(values[f.name.rstrip('_')])}")
    return lines
