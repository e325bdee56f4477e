"""The training loop: rollout, reward, advantage, loss, step; stage by stage."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rsim.config import Config, StageConfig
from rsim.data.load import load_problems, with_replay
from rsim.distributed.deepspeed import read_settings
from rsim.distributed.shards import ShardedModel, full_state_dict, unsharded
from rsim.distributed.world import join
from rsim.engine.vllm import VllmServers
from rsim.errors import UserError
from rsim.evaluation.evaluate import Evaluation, episode_record, play_scored, summarise
from rsim.game.episode import Episode
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.models.adapters import has_adapter, share_frozen
from rsim.models.device import allow_tf32, choose_device, torch_device
from rsim.policies.loading import load_planner, load_reasoner, quiet_models
from rsim.policies.planner import Planner
from rsim.policies.reasoner import Reasoner
from rsim.policies.strategies import load_strategies
from rsim.rewards.rewards import Score, load_custom, score_all
from rsim.rules import RULE_FIELDS, PlayRules
from rsim.runs.checkpoints import Save, verify
from rsim.runs.folder import RunFolder, Trackers
from rsim.training.agent import Agent
from rsim.training.cold_start import cold_start, format_rate
from rsim.training.entropy_reset import flatten, mean_entropy, reset_temperature
from rsim.training.memory import release_freed
from rsim.training.metrics import rollout_metrics
from rsim.training.update import Update

OnMetrics = Callable[[dict[str, Any]], None]
Weights = dict[str, torch.Tensor]


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop has saved a checkpoint; ``terminated``: by SIGTERM."""

    def __init__(self, *, terminated: bool) -> None:
        super().__init__("stopped")
        self.terminated = terminated


class Trainer:
    """Two policies, their optimisers and the place in the schedule. All sampling depends on ``(seed, step)`` alone, so a
    resumed run replays nothing and skips nothing."""

    def __init__(
        self, config: Config, *, resume: bool = False, resume_from: str = "", force: bool = False,
        on_metrics: OnMetrics | None = None,
    ) -> None:  # fmt: skip
        """``resume`` goes on from the newest checkpoint, ``resume_from`` from the one of that name; ``force`` also with a
        config that has changed.

        Raises:
            UserError: of models, data and run folders; a checkpoint that is damaged.
        """
        resume = resume or bool(resume_from)
        if config.rollout.gate:
            raise UserError(
                f"rollout.gate = {config.rollout.gate}", "is for a finished planner: train without, and set it after"
            )
        self.config = config
        self.world = join(cpu=torch_device(config.models.device).type == "cpu")
        self.on_metrics = on_metrics or (lambda record: None)
        self.custom = load_custom(config.rewards.custom)
        self.train_set = self._problems("train")
        self.eval_set = self._problems("eval")
        strategies = load_strategies(config.models.strategies)
        self._check_questions()
        self._check_shares()
        self.folder = RunFolder.open(config, resume=resume, force=force)
        self.checkpoints = self.folder.checkpoints
        checkpoint = None
        if resume:
            checkpoint = self.checkpoints.named(resume_from) if resume_from else self.checkpoints.latest()
            assert checkpoint is not None
            verify(checkpoint)
        models = config.models
        self.device = choose_device(config, self.world.local_rank)
        allow_tf32(self.device)
        how: dict[str, Any] = {"device": self.device.name, "dtype": self.device.dtype, "quantised": models.quantised}
        saved = checkpoint / "reasoner" if checkpoint else None
        source = str(saved) if saved and saved.is_dir() else models.reasoner
        # A reasoner that never changes needs no optimiser and, with vLLM, no weights here.
        self.reasoner_changes = config.trains_reasoner
        self.reasoner_here = self.reasoner_changes or config.rollout.engine == "native"
        self.reasoner: Reasoner = load_reasoner(
            source, system_prompt=models.system_prompt, weights=self.reasoner_here, lora=models.reasoner_lora,
            seed=config.seed, **how,
        )  # fmt: skip
        self.left_out = self._leave_out_long()
        self.planner: Planner | None = None
        if models.planner != "none":
            source = str(checkpoint / "planner") if checkpoint else models.planner
            self.planner = load_planner(
                source, strategies, seed=config.seed, head=models.planner_head, lora=models.planner_lora, **how
            )
            self.planner.rules = PlayRules().with_(**{name: getattr(config.rollout, name) for name in RULE_FIELDS})
            if models.shared_base:
                share_frozen(self.planner.model, self.reasoner.model)
        self.agents = self._agents()
        self.game = Game(self.reasoner, self.planner, config.rollout)
        self.step, self.sampled_tokens, self.best, self.cold_started = 0, 0, -1.0, False
        self.stop_requested, self.terminated = False, False  # what this process was told: by anyone, by SIGTERM
        if checkpoint:
            self._restore(checkpoint)
        self.world.barrier()  # all have looked at the folder before it is written to
        if self.world.is_main:
            self.folder.begin(self.step, checkpoint)
        if isinstance(self.game.servers, VllmServers) and self.reasoner_changes:
            if self.world.is_main:
                self.game.servers.check_updates(self.reasoner.model, self._handover)
            self.world.barrier()
        trackers = config.train.trackers if self.world.is_main else ()
        self.trackers = Trackers(trackers, self.folder.path, config, self.step)

    # --- setting up ---

    def _check_questions(self) -> None:
        if len(self.train_set) < self.config.train.questions:
            raise UserError(
                f"train.questions = {self.config.train.questions}", f"the data has {len(self.train_set)} questions to train on"
            )

    def _leave_out_long(self) -> int:
        """Takes what ``data.max_question_tokens`` forbids out of the training questions, and says how many that is."""
        longest, before = self.config.data.max_question_tokens, len(self.train_set)
        if longest:
            tokenizer = self.reasoner.tokenizer
            self.train_set = [
                p for p in self.train_set if len(tokenizer.encode(p.question, add_special_tokens=False)) <= longest
            ]
            self._check_questions()
        return before - len(self.train_set)

    def _check_shares(self) -> None:
        """Every rank needs a question to play; pieces need ranks."""
        for name, asked in (("train.shard", self.config.train.shard), ("train.deepspeed", self.config.train.deepspeed)):
            if asked and self.world.size == 1:
                raise UserError(name, "there is one process, nothing to cut for: start several with torchrun, or leave it out")
        if self.config.train.deepspeed:
            read_settings(self.config.train.deepspeed)
        sizes = {"train.questions": self.config.train.questions, "data.eval_size": len(self.eval_set)}
        if self.config.cold_start.episodes:
            sizes["cold_start.episodes"] = self.config.cold_start.episodes
        for name, size in sizes.items():
            if size < self.world.size:
                raise UserError(
                    f"{name} = {size}", f"there are {self.world.size} processes, and each plays questions of its own"
                )

    def _problems(self, split: str) -> list[Problem]:
        data, seed = self.config.data, self.config.seed

        def load(source: str, split: str, limit: int, seed: int) -> list[Problem]:
            return load_problems(source, split, data_dir=data.data_dir, limit=limit, seed=seed, columns=data.columns)

        if split == "eval":
            return load(data.eval, data.eval_split, data.eval_size, 0)
        problems = load(data.train, "train", data.train_size, seed)
        earlier = [load(source, "train", data.train_size, seed) for source in data.replay]
        return with_replay(problems, earlier, data.replay_share, seed) if earlier else problems

    def _agents(self) -> dict[str, Agent]:
        train, objective, rollout = self.config.train, self.config.objective, self.config.rollout
        common: dict[str, Any] = {
            "weight_decay": train.weight_decay,
            "with_values": objective.loss == "ppo",
            "checkpointing": train.gradient_checkpointing,
            "compiled": train.compile,
            "world": self.world,
            "shard_layers": train.shard,
            "deepspeed": train.deepspeed,
        }
        agents = {}
        if self.reasoner_changes:
            agents["reasoner"] = Agent(
                "reasoner", self.reasoner.model, self.reasoner.logits, temperature=rollout.temperature,
                learning_rate=train.reasoner_lr, head_weight=self.reasoner.head_weight, **common,
            )  # fmt: skip
        if self.planner is not None:
            agents["planner"] = Agent(
                "planner", self.planner.model, self.planner.logits, temperature=rollout.planner_temperature,
                learning_rate=train.planner_lr, **common,
            )  # fmt: skip
        return agents

    @property
    def total_steps(self) -> int:
        planned = sum(stage.steps for stage in self.config.stages)
        return min(planned, self.config.train.steps) if self.config.train.steps else planned

    def stage_at(self, step: int) -> StageConfig:
        for stage in self.config.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.config.stages[-1]

    # --- the loop ---

    def run(self) -> dict[str, Any]:
        """Trains to the end of the last stage (or the token budget) and returns the last held-out evaluation.

        Raises:
            Stopped: some rank was asked to stop; all of them have saved and stop.
        """
        if not self.cold_started:
            self._start()
        result: dict[str, Any] = {}
        stopping = self.world.any(self.stop_requested)
        while self.step < self.total_steps and not self._budget_spent() and not stopping:
            self.train_step()
            last = self.step == self.total_steps or self._budget_spent()
            if last or (self.config.train.eval_every and self.step % self.config.train.eval_every == 0):
                result = self.evaluate().to_json()
            stopping = self.world.any(self.stop_requested)
            if last or stopping or self.step % self.config.train.save_every == 0:
                self.save(f"step-{self.step:06d}")
                release_freed()
        self.trackers.close()
        self.checkpoints.finish()
        if stopping:
            raise Stopped(terminated=self.world.any(self.terminated))
        self._write("final", None, wait=True)
        return result

    def _budget_spent(self) -> bool:
        budget = self.config.train.token_budget
        return bool(budget) and self.sampled_tokens >= budget

    def _start(self) -> None:
        """Cold start, the reference model of a KL term, and a first checkpoint to resume from."""
        if self.config.data.max_question_tokens:
            self._log({"step": 0, "stage": "data", "data/questions": len(self.train_set), "data/left_out": self.left_out})
        if self.config.cold_start.episodes:
            before = self._format_rate()
            report, tokens = cold_start(self.config, self.reasoner, self.train_set, self.custom, self.world)
            self.sampled_tokens += tokens
            self._sync()
            rates = {"cold_start/format_rate_before": before, "cold_start/format_rate_after": self._format_rate()}
            self._log({"step": 0, "stage": "cold_start"} | report | rates)
        else:
            self._sync()
        self.cold_started = True
        if self.config.train.entropy_reset and self.planner is not None:
            self._reset_entropy(self.planner)
        if self.config.objective.beta > 0 and "reasoner" in self.agents:
            weights = self._weights_of("reasoner", self.reasoner.model)
            if self.world.is_main:
                self._save_reasoner(self.folder.path / "reference", weights)
            self.world.barrier()
            self._load_reference()
        if self.config.train.eval_every:
            self.evaluate()
        self.save("step-000000")

    def _format_rate(self) -> float:
        with unsharded(self._sharded):
            return format_rate(self.config, self.reasoner, self.train_set, self.world)

    @torch.no_grad()
    def _reset_entropy(self, planner: Planner) -> None:
        """A planner that is surer than ``train.entropy_reset`` allows begins less sure."""
        problems = questions_of_step(self.train_set, self.config.seed, 0, self.config.train.questions)
        mine = self.world.block(len(problems))
        with unsharded(self._sharded):
            keys = [f"entropy_reset:{i}" for i in mine]
            played = self.game.play([problems[i] for i in mine], seed=self.config.seed, keys=keys)
            episodes = self.world.all_gather(played)
            logits = (
                planner.logits(planner.states([(e.planner_ids, e.decisions) for e in episodes]))
                / self.config.rollout.planner_temperature
            )
        temperature = reset_temperature(logits, self.config.train.entropy_reset)
        flatten(planner, temperature)
        self.sampled_tokens += sum(e.sampled_tokens for e in episodes)
        self._log({"step": 0, "stage": "entropy_reset", "entropy_reset/temperature": temperature, 
                   "entropy_reset/entropy": mean_entropy(logits),
                   "entropy_reset/opened": mean_entropy(logits / temperature)})  # fmt: skip

    def train_step(self) -> dict[str, Any]:
        """One batch of questions: play, score, update both agents (or the leader first), log. All ranks come out alike."""
        began = time.perf_counter()
        stage = self.stage_at(self.step)
        update = Update(self.config, stage, self.step, alone=self.planner is None)
        episodes, scores = self._rollout("a")
        rollout = time.perf_counter() - began
        metrics: dict[str, Any] = {}
        if self.planner is not None and stage.train_planner:
            metrics |= update.agent(self.agents["planner"], episodes, scores)
        if stage.train_reasoner:
            if self.config.objective.update_order == "leader_first" and self.planner is not None and stage.train_planner:
                asked = time.perf_counter()
                episodes, scores = self._rollout("b")  # the follower answers the leader's new policy
                rollout += time.perf_counter() - asked
            metrics |= update.agent(self.agents["reasoner"], episodes, scores)
            self._sync()
        self.step += 1
        seconds = time.perf_counter() - began
        record = {"step": self.step, "stage": stage.name, "lambda": stage.lambda_}
        record |= rollout_metrics(episodes, scores, self._names()) | metrics
        record |= {"seconds": seconds, "seconds_rollout": rollout, "sampled_tokens": self.sampled_tokens,
                   "tokens_per_second": sum(e.sampled_tokens for e in episodes) / seconds}  # fmt: skip
        if self.device.name.startswith("cuda"):
            record["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device.name) / 2**30  # the peak so far
        self._log(record)
        if self.config.train.samples_every and self.step % self.config.train.samples_every == 0:
            self._log_episodes(list(zip(episodes, scores, strict=True)))
        return record

    def _rollout(self, name: str) -> tuple[list[Episode], list[Score]]:
        train = self.config.train
        problems = questions_of_step(self.train_set, self.config.seed, self.step, train.questions)
        mine = self.world.block(len(problems))
        keys = [f"{self.step}:{name}:{i}" for i in mine]
        with unsharded(self._sharded):
            played = self.game.play([problems[i] for i in mine], seed=self.config.seed, group_size=train.group, keys=keys)
            for episode in played:
                episode.group += mine.start
        strategies = self.planner.strategies if self.planner else None
        scores = self.world.all_gather(score_all(played, strategies, self.config.rewards, self.custom))
        episodes = self.world.all_gather(played)
        self.sampled_tokens += sum(e.sampled_tokens for e in episodes)
        return episodes, scores

    def _sync(self) -> None:
        """Gives a sampling server the reasoner's new weights; the native engine samples from the weights themselves."""
        if isinstance(self.game.servers, VllmServers) and self.reasoner_changes:
            if self.world.is_main:
                self.game.servers.update_weights(self.reasoner.model, self._handover)
            self.world.barrier()

    @property
    def _handover(self) -> Path:
        """Where weights lie while a sampling server reads them."""
        return self.folder.path / "vllm"

    # --- records ---

    def evaluate(self) -> Evaluation:
        """Greedy accuracy on the held-out questions; keeps the best checkpoint."""
        mine = self.world.block(len(self.eval_set))
        part = self.eval_set[mine.start : mine.stop]
        with unsharded(self._sharded):
            records, _, _ = play_scored(self.game, part, self.config.rewards, seed=0, greedy=True, first=mine.start)
        result = summarise("held-out", self.world.all_gather(records), self.game)
        self._log({"step": self.step, "eval/accuracy": result.accuracy, "eval/accuracy_low": result.low,
                   "eval/accuracy_high": result.high, "eval/flexible": result.flexible,
                   "eval/tokens": result.tokens_per_question})  # fmt: skip
        if result.accuracy > self.best:
            self.best = result.accuracy
            self._write("best", None)
        return result

    def _log(self, record: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        self.folder.append("metrics.jsonl", record)
        self.trackers.log(record)
        self.on_metrics(record)

    def _log_episodes(self, played: list[tuple[Episode, Score]], count: int = 4) -> None:
        if not self.world.is_main:
            return
        for episode, score in random.Random(self.step).sample(played, min(count, len(played))):
            record = {"step": self.step} | episode_record(episode, score, self._names())
            self.folder.append("episodes.jsonl", record)

    def _names(self) -> tuple[str, ...]:
        return self.planner.strategies.names if self.planner else ()

    # --- checkpoints ---

    def _save_reasoner(self, path: Path, weights: Weights | None = None) -> None:
        self.reasoner.model.save_pretrained(path, state_dict=weights)
        self.reasoner.tokenizer.save_pretrained(path)

    @property
    def _sharded(self) -> list[ShardedModel]:
        """The models whose layers are cut over the ranks."""
        return [agent.sharded for agent in self.agents.values() if agent.sharded]

    def _weights_of(self, name: str, model: PreTrainedModel) -> Weights | None:
        """What is to be saved of an agent's model; None: whatever it holds when it is written. All ranks must come here."""
        background = self.config.train.save_in_background
        cut = name in self.agents and self.agents[name].sharded is not None
        weights: Weights = dict(model.state_dict()) if cut or background else {}
        if has_adapter(model):  # the frozen weights are not saved
            trained = {name for name, p in model.named_parameters() if p.requires_grad}
            weights = {name: tensor for name, tensor in weights.items() if name in trained}
        elif cut:
            weights = full_state_dict(weights, keep=self.world.is_main)
        if not (cut or background) or not self.world.is_main:
            return None
        return copy_of(weights) if background else weights

    def _savers(self) -> dict[str, Save]:
        """What writes each model into a folder: as it will be then or, for a checkpoint in the background, as it is now."""
        savers: dict[str, Save] = {}
        if self.reasoner_here:
            savers["reasoner"] = partial(self._save_reasoner, weights=self._weights_of("reasoner", self.reasoner.model))
        if self.planner:
            savers["planner"] = partial(self.planner.save_pretrained, weights=self._weights_of("planner", self.planner.model))
        return savers

    def save(self, name: str) -> None:
        """Writes a checkpoint to resume from."""
        states = {key: agent.state() for key, agent in self.agents.items()}
        state = {
            "step": self.step,
            "sampled_tokens": self.sampled_tokens,
            "best": self.best,
            "agents": copy.deepcopy(states) if self.config.train.save_in_background else states,
        }
        self._write(name, state)

    def _write(self, name: str, state: dict[str, Any] | None, *, wait: bool = False) -> None:
        savers = self._savers()
        if self.world.is_main:
            self.folder.flush()
            self.checkpoints.save(name, savers, state, wait=wait or not self.config.train.save_in_background)
        self.world.barrier()

    def _restore(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        self.step, self.sampled_tokens, self.best = state["step"], state["sampled_tokens"], state["best"]
        self.cold_started = True
        for key, agent in self.agents.items():
            agent.load_state(state["agents"][key])
        if self.config.objective.beta > 0 and "reasoner" in self.agents:
            self._load_reference()

    def _load_reference(self) -> None:
        """What the KL term holds the reasoner to; read back from where it was saved, so that a resumed run has the same."""
        models = self.config.models
        how: dict[str, Any] = {"device": self.device.name, "dtype": self.device.dtype, "quantised": models.quantised}
        reference = load_reasoner(str(self.folder.path / "reference"), **how)
        self.agents["reasoner"].set_reference(reference.model)


def copy_of(weights: Weights) -> Weights:
    """A model's weights as they are now, in memory of their own; tied ones stay tied."""
    copies: dict[int, torch.Tensor] = {}
    return {
        name: copies.setdefault(tensor.data_ptr(), tensor.detach().to("cpu", copy=True)) for name, tensor in weights.items()
    }


def train(config: Config, *, resume: bool = False, on_metrics: OnMetrics | None = None) -> dict[str, Any]:
    """Trains as ``config`` says; the Python side of ``rsim train``.

    Returns:
        the last held-out evaluation (``accuracy``, ``low``, ``high``, ...). Everything else is in the run's folder.
    """
    return Trainer(config, resume=resume, on_metrics=on_metrics).run()


def train_quietly(config: Config, resume: bool, force: bool) -> None:
    """What each process of a run does that others watch over (`rsim.distributed.ray_launcher`)."""
    quiet_models()
    Trainer(config, resume=resume, force=force).run()


def questions_of_step(problems: list[Problem], seed: int, step: int, count: int) -> list[Problem]:
    """The questions of one step: a walk through a permutation that is new in every epoch, a function of its arguments.

    An epoch's last, incomplete batch is filled from the next epoch.
    """
    picked = []
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, len(problems))
        picked.append(problems[_permutation(len(problems), seed, epoch)[place]])
    return picked


_permutations: dict[tuple[int, int, int], list[int]] = {}


def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    key = (size, seed, epoch)
    if key not in _permutations:
        if len(_permutations) > 4:
            _permutations.clear()
        order = list(range(size))
        random.Random(f"epoch:{seed}:{epoch}").shuffle(order)
        _permutations[key] = order
    return _permutations[key]
