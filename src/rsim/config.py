"""One typed tree for everything that a run can be told: TOML files, presets and ``--set key=value`` on top.

Unknown keys are errors, and an error names the field and the remedy. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rsim.errors import UserError
from rsim.rules import PlayRules

PRESETS = Path(__file__).with_name("presets")


@dataclass(frozen=True)
class ModelsConfig:
    """Where the two policies come from: a packaged name (``nano-s``, ``smollm2-135m``), a local folder or a hub id."""

    reasoner: str = "nano-s"
    planner: str = "nano-s"  # "none" trains the reasoner alone (plain GRPO)
    planner_head: Literal["random", "names"] = "random"  # of a new planner (`models.new_planner`)
    strategies: str = "default"  # "default", "instruct", "sentences", "tables", "code", "lab" or a TOML file
    system_prompt: str = ""  # put before the question by the reasoner's chat template
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = (
        "auto"  # auto: see `rsim.models.device.choose_device`; float64: comparisons
    )
    reasoner_lora: int = 0  # rank of its LoRA adapter; 0: all its weights are trained
    planner_lora: int = 0
    shared_base: bool = False  # both agents read one copy of the same frozen weights
    quantised: bool = False  # frozen weights in 4 bits (QLoRA)


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out questions: ``lab``, a known set such as ``gsm8k``, or a JSONL file."""

    train: str = "lab"
    eval: str = "lab"
    eval_split: str = "dev"
    eval_size: int = 200
    train_size: int = 0  # 0: all
    max_question_tokens: int = 0  # training questions that the reasoner's tokenizer makes longer are left out; 0: none
    replay: tuple[str, ...] = ()  # earlier tasks, mixed into the training questions
    replay_share: float = 0.25  # of the training questions, where there are earlier tasks
    data_dir: str = ""  # default: $RSIM_DATA
    columns: tuple[str, ...] = ()  # of files and hub sets that name them differently: "question=problem"


@dataclass(frozen=True)
class RolloutConfig(PlayRules):
    """The rules of the game (`rsim.rules.PlayRules`), and how episodes are sampled."""

    temperature: float = 1.0
    planner_temperature: float = 1.0
    batch: int = 256  # episodes in flight
    engine: Literal["native", "vllm", "llama"] = "native"
    cuda_graphs: bool = True  # native engine on a GPU: forward passes of one token per sequence are recorded and replayed
    vllm_url: str = "http://127.0.0.1:8000"  # or several, with commas between them; ray:N: Ray starts N of them
    vllm_command: str = "vllm serve {folder} --host {host} --port {port} --logprobs-mode processed_logprobs"  # what Ray starts
    vllm_timeout: float = 600.0  # seconds that one step may take
    llama_url: str = "http://127.0.0.1:8080"  # llama.cpp's server, or several with commas between them
    llama_timeout: float = 3600.0  # seconds that one step may take; on a CPU a step of many at a time is slow


@dataclass(frozen=True)
class RewardsConfig:
    """Weights of the reward parts; 0 removes a part."""

    accuracy: float = 1.0
    format: float = 0.1
    follow: float = 0.1
    terminal: float = 0.1
    penalty: float = 0.05
    penalty_cap: float = 0.2
    repeat_allowance: int = 2
    token_price: float = 0.0  # taken from the planner's return for every 100 tokens, sampled or injected
    checker: Literal["auto", "numeric", "latex", "choice", "text", "code"] = "auto"  # auto: as each problem says
    unsafe_code: bool = False  # run code and judge gym answers without a sandbox where none can be built
    custom: tuple[str, ...] = ()  # "file.py:function"


@dataclass(frozen=True)
class ObjectiveConfig:
    """The joint objective."""

    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "ppo"] = "grpo"
    normaliser: Literal["preset", "token", "sequence", "constant", "paper"] = "preset"
    lambda_mode: Literal["lr", "loss"] = "lr"
    update_order: Literal["joint", "leader_first"] = "joint"
    clip_low: float = 0.2
    clip_high: float = 0.0  # 0: the loss's own (0.28 for dapo, else clip_low)
    scale_by_std: bool = False
    beta: float = 0.0  # KL of the reasoner to its starting model
    kl: Literal["k1", "k2", "k3"] = "k3"
    planner_entropy: float = 0.0  # entropy bonus
    entropy_target: float = 0.0  # nats: the bonus fades as the planner's entropy comes up to it; 0: it never does
    usage_weight: float = 0.0  # pulls the planner's use of the strategies, averaged over all states, towards equal use
    importance_cap: float = 0.0  # truncated sampler/trainer correction; 0: off
    mask_truncated: bool = False
    gae_lambda: float = 0.95
    value_coefficient: float = 0.5


@dataclass(frozen=True)
class StageConfig:
    """One stage of training. ``lambda_`` weighs the planner (written ``lambda`` in TOML)."""

    name: str = "stage"
    steps: int = 0
    lambda_: float = 0.5
    train_planner: bool = True
    train_reasoner: bool = True


@dataclass(frozen=True)
class ColdStartConfig:
    """Fine-tuning of the reasoner on its own episodes, before the stages.

    ``teach = "format"`` keeps wrong but well-formatted episodes and learns their sampled tokens: the step format, no answers.
    ``teach = "prompts"`` learns the strategies' prompts too, so that a reasoner without planner writes them by itself.
    ``teach = "strategies"`` is a control: like ``prompts``, with right episodes.
    """

    teach: Literal["format", "prompts", "strategies"] = "format"
    episodes: int = 0  # sampled; 0 skips the cold start
    keep: int = 1000
    minimum: int = 16  # fewer than this is an error
    epochs: int = 1
    learning_rate: float = 1e-5
    few_shot: str = ""  # worked examples put before the question while sampling, and removed before fine-tuning


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 0  # 0: every stage's own; else an upper bound over all stages
    token_budget: int = 0  # stop once so many reasoner tokens were sampled, cold start included; 0: no budget
    questions: int = 32  # per step
    group: int = 8  # episodes per question
    entropy_reset: float = 0.0  # nats: a planner that was trained before and is surer begins with this entropy; 0: as it comes
    planner_lr: float = 1e-3
    reasoner_lr: float = 3e-4
    warmup: int = 0
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # per agent
    num_iterations: int = 1  # updates on one batch of episodes
    minibatches: int = 1  # optimiser steps per iteration
    micro_tokens: int = 16384  # tokens per forward; gradients are accumulated
    gradient_checkpointing: bool = False  # make activations again in the backward pass: less memory, a third more time
    shard: bool = False  # several processes: each keeps a piece of every layer's weights, gradients and moments (FSDP2)
    deepspeed: str = ""  # several processes: a file with DeepSpeed's config, ZeRO stage 1 or 2
    compile: bool = False  # torch.compile each layer's norms and MLP; minutes at the start
    eval_every: int = 10
    save_every: int = 10
    keep_checkpoints: int = 2  # the newest ones to resume from, beside the best and the final one
    save_in_background: bool = False  # checkpoints are written while training goes on; takes a copy of weights and optimisers
    samples_every: int = 5
    trackers: tuple[str, ...] = ("tensorboard",)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = "run"
    seed: int = 0
    out: str = ""  # default: runs/<name>
    models: ModelsConfig = field(default_factory=ModelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    stages: tuple[StageConfig, ...] = (
        StageConfig("stage1", 100, 0.7),
        StageConfig("stage2", 100, 0.3),
    )
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    @property
    def trains_reasoner(self) -> bool:
        return bool(self.cold_start.episodes) or any(stage.train_reasoner for stage in self.stages)

    @property
    def trained_whole(self) -> list[str]:
        """The agents that train all their weights, not an adapter."""
        models = self.models
        agents = (("reasoner", self.trains_reasoner, models.reasoner_lora),
                  ("planner", models.planner != "none", models.planner_lora))  # fmt: skip
        return [name for name, trained, rank in agents if trained and not rank]


_RENAMED = {"train.reopen": "train.entropy_reset"}  # keys of older configs


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_config(source: str | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a preset name or a TOML file and applies ``key=value`` overrides.

    Raises:
        UserError: no such preset or file, invalid TOML, an unknown key, a value of the wrong type or out of range.
    """
    table: dict[str, Any] = {}
    if source is not None:
        path = PRESETS / f"{source}.toml" if source in presets() else Path(source)
        if not path.is_file():
            raise UserError(f"no preset or config file {source!r}", f"presets: {', '.join(presets())}")
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid TOML", str(error)) from error
    for override in overrides:
        _apply(table, override)
    config: Config = from_table(Config, table, "")
    validate(config)
    return config


def _apply(table: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key.strip():
        raise UserError(f"--set {override}", "write key=value, e.g. train.steps=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = key.strip().split(".")
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
        if path in _RENAMED:
            raise UserError(f"{path} has another name now", f"write {_RENAMED[path]}")
        if key not in known:
            raise UserError(f"unknown key {path!r}", f"known here: {', '.join(known)}")
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
    if origin in (types.UnionType, typing.Union):
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{path} must be {hint.__name__}", f"got {value!r}")
    return value


def validate(config: Config) -> None:
    """Ranges and combinations that types cannot say."""
    train, rollout, objective = config.train, config.rollout, config.objective
    at_least = {
        "train.questions": (train.questions, 1), "train.group": (train.group, 2), "train.steps": (train.steps, 0),
        "train.num_iterations": (train.num_iterations, 1), "train.minibatches": (train.minibatches, 1),
        "train.micro_tokens": (train.micro_tokens, 1), "train.eval_every": (train.eval_every, 0),
        "train.save_every": (train.save_every, 1), "train.keep_checkpoints": (train.keep_checkpoints, 1),
        "data.eval_size": (config.data.eval_size, 1), "data.max_question_tokens": (config.data.max_question_tokens, 0),
        "rollout.max_steps": (rollout.max_steps, 1), "rollout.step_tokens": (rollout.step_tokens, 1),
        "rollout.answer_tokens": (rollout.answer_tokens, 1), "rollout.batch": (rollout.batch, 1),
        "rewards.token_price": (config.rewards.token_price, 0),
        "objective.usage_weight": (config.objective.usage_weight, 0),
        "objective.entropy_target": (config.objective.entropy_target, 0),
        "train.entropy_reset": (config.train.entropy_reset, 0), "train.warmup": (train.warmup, 0),
        "train.planner_lr": (train.planner_lr, 0), "train.reasoner_lr": (train.reasoner_lr, 0),
        "train.weight_decay": (train.weight_decay, 0), "train.token_budget": (train.token_budget, 0),
        "data.train_size": (config.data.train_size, 0), "cold_start.episodes": (config.cold_start.episodes, 0),
        "cold_start.keep": (config.cold_start.keep, 1), "cold_start.epochs": (config.cold_start.epochs, 1),
        "cold_start.learning_rate": (config.cold_start.learning_rate, 0),
    }  # fmt: skip
    for name, (value, low) in at_least.items():
        if value < low:
            raise UserError(f"{name} = {value}", f"must be at least {low}")
    if train.grad_clip <= 0:
        raise UserError(f"train.grad_clip = {train.grad_clip}", "must be above 0; inf turns clipping off")
    if not 0 <= config.data.replay_share < 1:
        raise UserError(f"data.replay_share = {config.data.replay_share}", "must lie between 0 and 1")
    if train.minibatches > train.questions:
        raise UserError(f"train.minibatches = {train.minibatches}", f"cannot exceed train.questions = {train.questions}")
    if rollout.max_tokens <= rollout.answer_tokens:
        raise UserError(f"rollout.max_tokens = {rollout.max_tokens}",
                        f"must exceed rollout.answer_tokens = {rollout.answer_tokens}")  # fmt: skip
    _validate_planner_terms(config)
    if rollout.temperature <= 0 or rollout.planner_temperature <= 0:
        raise UserError("rollout.temperature", "must be above 0 for training; evaluation has its own")
    if not 0 <= rollout.gate <= 1:
        raise UserError(f"rollout.gate = {rollout.gate}", "is a probability: from 0 (off) to 1")
    if not rollout.delimiter:
        raise UserError("rollout.delimiter is empty", 'use e.g. "\\n\\n"')
    if not 0 < objective.clip_low < 1:
        raise UserError(f"objective.clip_low = {objective.clip_low}", "must lie between 0 and 1")
    _validate_adapters(config)
    for stage in config.stages:
        if not 0 <= stage.lambda_ <= 1:
            raise UserError(f"stages.{stage.name}.lambda = {stage.lambda_}", "must lie between 0 and 1")
        if stage.steps < 0:
            raise UserError(f"stages.{stage.name}.steps = {stage.steps}", "must be at least 0")
        if not (stage.train_planner or stage.train_reasoner):
            raise UserError(f"stages.{stage.name} trains nothing", "set train_planner or train_reasoner")
    names = [s.name for s in config.stages]
    if len(set(names)) < len(names):
        raise UserError("stages share a name", "give each stage its own")


def _validate_planner_terms(config: Config) -> None:
    objective, train = config.objective, config.train
    if train.entropy_reset and config.models.planner == "none":
        raise UserError("train.entropy_reset", "is the entropy that the planner begins with, and there is no planner: set 0")
    if objective.entropy_target and not objective.planner_entropy:
        raise UserError(
            "objective.entropy_target", "is what objective.planner_entropy leads to: set that one too, e.g. to 0.05"
        )


def _validate_adapters(config: Config) -> None:
    models = config.models
    for name, rank in (("reasoner_lora", models.reasoner_lora), ("planner_lora", models.planner_lora)):
        if rank < 0:
            raise UserError(f"models.{name} = {rank}", "is a rank: 0 (no adapter) or more")
    whole = config.trained_whole
    if models.quantised and whole:
        raise UserError("models.quantised", f"4-bit weights cannot be trained: set models.{whole[0]}_lora, e.g. to 16")
    if models.quantised and config.rollout.engine == "vllm":
        raise UserError("models.quantised", "4-bit weights cannot be handed to a vLLM server: use rollout.engine = native")
    if models.shared_base and config.rollout.engine != "native" and not config.trains_reasoner:
        raise UserError("models.shared_base", "a frozen reasoner's weights are on the server alone: there is nothing to share")
    if config.rollout.engine == "llama" and config.trains_reasoner:
        raise UserError(
            "rollout.engine = llama",
            "its server takes no new weights: train the planner alone (stages.*.train_reasoner = false, "
            "cold_start.episodes = 0), or use another engine",
        )
    if models.shared_base and (models.planner != models.reasoner or whole or not models.planner_lora):
        raise UserError("models.shared_base", "needs the same base for both agents, and an adapter for each that is trained "
                        "(models.planner_lora, models.reasoner_lora)")  # fmt: skip
    if config.train.shard and config.train.deepspeed:
        raise UserError("train.deepspeed", "either DeepSpeed cuts or train.shard does")
    if config.train.shard and (models.quantised or models.shared_base or config.rollout.engine == "vllm"):
        raise UserError("train.shard", "layers are not cut with models.quantised, models.shared_base or rollout.engine = vllm")


def to_table(config: Any) -> dict[str, Any]:
    """The inverse of `from_table`: plain dicts, lists and values, keys as written in TOML."""
    table: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        key = f.name.rstrip("_")
        if dataclasses.is_dataclass(value):
            table[key] = to_table(value)
        elif isinstance(value, tuple):
            table[key] = [to_table(v) if dataclasses.is_dataclass(v) else v for v in value]
        else:
            table[key] = value
    return table


def to_toml(config: Config) -> str:
    """The resolved config as TOML that `load_config` reads back."""
    table = to_table(config)
    lines = [f"{k} = {_literal(v)}" for k, v in table.items() if not isinstance(v, dict) and k != "stages"]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{k} = {_literal(v)}" for k, v in value.items())]
    for stage in table["stages"]:
        lines += ["", "[[stages]]", *(f"{k} = {_literal(v)}" for k, v in stage.items())]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)
