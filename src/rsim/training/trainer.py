"""The training loop: rollout, reward, advantage, loss, step; stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rsim.config import Config
from rsim.distributed.shards import ShardedModel, unsharded
from rsim.distributed.world import join
from rsim.errors import UserError
from rsim.evaluation.evaluate import Evaluation, play_scored, summarise
from rsim.evaluation.upstream import ServedGame, UpstreamStopped
from rsim.game.episode import Episode
from rsim.models.device import allow_tf32, choose_device, torch_device
from rsim.rewards.custom import Reward, load_custom
from rsim.rewards.rewards import Score, score_all
from rsim.runs.folder import RunFolder
from rsim.runs.lock import unlock
from rsim.training.cold_start import cold_start
from rsim.training.memory import peak_on_gpu, release_freed
from rsim.training.questions import (
    affordable,
    fingerprint,
    load_questions,
    questions_of_step,
    require_same,
    without_long,
)
from rsim.training.records import Records, held_out_metrics, rollout_metrics
from rsim.training.saving import Saver
from rsim.training.setup import check_world, load_policies, make_agents, make_game, named
from rsim.training.update import Update

OnMetrics = Callable[[dict[str, Any]], None]


class Stopped(KeyboardInterrupt):
    """A run that was told to stop (``terminated``: by SIGTERM) has saved; ``result``: its last evaluation."""

    def __init__(self, result: dict[str, Any], *, terminated: bool) -> None:
        super().__init__("stopped")
        self.result, self.terminated = result, terminated


class Trainer:
    """Two policies, their optimisers and the place in the schedule. All sampling depends on ``(seed, step)``
    alone, so a resumed run replays nothing and skips nothing."""

    def __init__(
        self,
        config: Config,
        *,
        resume: bool = False,
        resume_from: str = "",
        force: bool = False,
        on_metrics: OnMetrics | None = None,
        rewards: Sequence[Reward] = (),
    ) -> None:
        """``resume`` goes on from the newest checkpoint, ``resume_from`` from the one of that name; ``force``
        also with a config that has changed. ``rewards``: those that the config names as given in Python.

        Raises:
            UserError: of models, data and run folders; a checkpoint that is damaged.
        """
        if config.rollout.gate:
            remedy = "is for a finished planner: train without, and set it after"
            raise UserError(f"rollout.gate = {config.rollout.gate}", remedy)
        self.config = config = named(config)
        self.on_metrics = on_metrics or (lambda record: None)
        self.world = join(cpu=torch_device(config.models.device).type == "cpu")
        self.custom = load_custom(config.rewards.custom, rewards)
        questions, self.eval_set = load_questions(config)
        check_world(config, self.world, len(self.eval_set))
        resume = resume or bool(resume_from)
        folder = RunFolder.open(config, resume=resume, force=force, hold=self.world.is_main)
        self.checkpoints = folder.checkpoints
        checkpoint = self.checkpoints.intact(resume_from) if resume else None
        self.device = choose_device(config, self.world.local_rank)
        allow_tf32(self.device)
        self.reasoner, self.planner = load_policies(config, self.device, checkpoint)
        self.strategies = self.planner.strategies if self.planner else None
        self.train_set = without_long(config, self.reasoner or self.planner, questions)
        self.left_out = len(questions) - len(self.train_set)
        self.agents = make_agents(config, self.reasoner, self.planner, self.world)
        self.game = make_game(config, self.reasoner, self.planner)
        self.saver = Saver(config, self.world, folder, self.reasoner, self.planner, self.agents, self.game)
        self.step, self.sampled_tokens, self.best, self.cold_started = 0, 0, -1.0, False
        self.a_question = 0.0  # tokens sampled for each question of the last step
        self.unevaluated = False  # the step is one that is evaluated, and an upstream failed meanwhile
        # What this process was told: by anyone, by SIGTERM.
        self.stop_requested, self.terminated = False, False
        self.drawn_from = fingerprint(questions)
        if checkpoint:
            self._restore(checkpoint, force)
        self.world.barrier()  # all have looked at the folder before it is written to
        if self.world.is_main:
            folder.begin(self.step, checkpoint)
        if not self.world.any(self.world.is_main and (self.checkpoints.path / "best").is_dir()):
            self.best = -1.0
        self.saver.check_servers()
        names = self.strategies.names if self.strategies else ()
        self.records = Records(folder, self.world, names, self.step)

    def _restore(self, checkpoint: Path, force: bool) -> None:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        require_same(state.get("questions"), self.drawn_from, force)
        self.step, self.sampled_tokens, self.best = state["step"], state["sampled_tokens"], state["best"]
        self.a_question = state["a_question"]
        self.cold_started = True
        if isinstance(self.game, ServedGame):
            self.game.account, self.unevaluated = state["account"], state["unevaluated"]
        for name, agent in self.agents.items():
            agent.load_state(state["agents"][name])
        self.saver.load_reference(self.device)

    def run(self) -> dict[str, Any]:
        """Trains to the end of the last stage (or the token budget); returns the last held-out evaluation.

        Raises:
            Stopped: some rank was asked to stop; all of them have saved and stop.
            UserError: an upstream failed; what was finished before is saved, since it was paid for.
        """
        try:
            return self._run()
        except UpstreamStopped as error:
            if not self.checkpoints.latest():
                raise
            self.save(f"step-{self.step:06d}")
            raise UserError(error.problem, f"step {self.step} is kept: go on with --resume") from error
        finally:
            unlock(self.config.folder)

    def _run(self) -> dict[str, Any]:
        if not self.cold_started:
            self._start()
        train, save_every = self.config.train, self.config.checkpoint.save_every
        result = self.evaluate().to_json() if self.unevaluated else self.records.last_held_out()
        stopping = self.world.any(self.stop_requested)
        while not self._ended and not stopping:
            self.train_step()
            self.unevaluated = self._ended or bool(train.eval_every and self.step % train.eval_every == 0)
            if self.unevaluated:
                result = self.evaluate().to_json()
            stopping = self.world.any(self.stop_requested)
            if self._ended or stopping or self.step % save_every == 0:
                self.save(f"step-{self.step:06d}")
                release_freed()
        self.records.close()
        if stopping:
            raise Stopped(result, terminated=self.world.any(self.terminated))
        self.saver.write("final", self.step)
        return result

    @property
    def _ended(self) -> bool:
        return self.step >= self.config.total_steps or not self._affordable

    @property
    def _affordable(self) -> int:
        return affordable(self.config.train, self.sampled_tokens, self.a_question, self.world.size)

    def _start(self) -> None:
        """Cold start, a KL term's reference model, and a first checkpoint to resume from."""
        if self.config.data.max_question_tokens:
            counts = {"data/questions": len(self.train_set), "data/left_out": self.left_out}
            self._log({"step": 0, "stage": "data"} | counts)
        if self.reasoner and self.config.cold_start.episodes:
            report, tokens = cold_start(
                self.config, self.reasoner, self.train_set, self.custom, self.world, self._sync
            )
            self.sampled_tokens += tokens
            self._log({"step": 0, "stage": "cold_start"} | report)
        else:
            self._sync()
        self.cold_started = True
        self.saver.write_reference()
        self.saver.load_reference(self.device)
        if self.config.train.eval_every:
            self.evaluate()
        self.save("step-000000")

    def train_step(self) -> dict[str, Any]:
        """One batch of questions: play, score, update both agents (or the leader first), log. All ranks come
        out alike."""
        began, before, asked_for = time.perf_counter(), self.sampled_tokens, self._affordable
        stage = self.config.stage_at(self.step)
        update = Update(self.config, stage, self.step, alone=self.planner is None or self.reasoner is None)
        leads = self.planner is not None and stage.train_planner
        episodes, scores = self._rollout("a", asked_for)
        rollout = time.perf_counter() - began
        metrics: dict[str, Any] = {}
        if leads:
            metrics |= update.agent(self.agents["planner"], episodes, scores)
        if stage.train_reasoner:
            if leads and self.config.objective.update_order == "leader_first":
                asked = time.perf_counter()
                episodes, scores = self._rollout("b", asked_for)  # the follower answers the new leader
                rollout += time.perf_counter() - asked
            metrics |= update.agent(self.agents["reasoner"], episodes, scores)
            self._sync()
        self.step += 1
        self.a_question = (self.sampled_tokens - before) / asked_for
        seconds = time.perf_counter() - began
        record = {"step": self.step, "stage": stage.name, "lambda": stage.lambda_}
        record |= rollout_metrics(episodes, scores, self.records.names) | metrics
        record |= {
            "seconds": seconds,
            "seconds_rollout": rollout,
            "sampled_tokens": self.sampled_tokens,
            "tokens_per_second": sum(e.sampled_tokens for e in episodes) / seconds,
        }
        record |= peak_on_gpu(self.device)
        if isinstance(self.game, ServedGame):
            record |= {f"upstream/{name}": count for name, count in self.game.account.items()}
        self._log(record)
        if self.config.train.samples_every and self.step % self.config.train.samples_every == 0:
            self.records.sample(self.step, episodes, scores)
        return record

    def _rollout(self, name: str, count: int) -> tuple[list[Episode], list[Score]]:
        """``count`` of the step's questions, a block played by each rank; all get all episodes and scores."""
        train, seed = self.config.train, self.config.seed
        problems = questions_of_step(self.train_set, seed, self.step, train.questions)[:count]
        mine = self.world.block(len(problems))
        asked, keys = [problems[i] for i in mine], [f"{self.step}:{name}:{i}" for i in mine]
        with unsharded(self._sharded):
            played = self.game.play(asked, seed=seed, group_size=train.group, keys=keys)
        for episode in played:
            episode.group += mine.start
        scores = self.world.all_gather(score_all(played, self.strategies, self.config.rewards, self.custom))
        episodes = self.world.all_gather(played)
        self.sampled_tokens += sum(e.sampled_tokens for e in episodes)
        return episodes, scores

    def _sync(self) -> None:
        """Gives a sampling server the reasoner's new weights; the native engine samples from these."""
        self.saver.hand_over()

    @property
    def _sharded(self) -> list[ShardedModel]:
        return [agent.sharded for agent in self.agents.values() if agent.sharded]

    def evaluate(self) -> Evaluation:
        """Greedy accuracy on the held-out questions; keeps the best checkpoint."""
        mine = self.world.block(len(self.eval_set))
        part, rewards = self.eval_set[mine.start : mine.stop], self.config.rewards
        with unsharded(self._sharded):
            played = play_scored(self.game, part, rewards, seed=0, greedy=True, first=mine.start)
        self.records.held_out(self.step, *played[1:])
        result = summarise("held-out", self.world.all_gather(played[0]), self.game)
        self.unevaluated = False
        self._log({"step": self.step} | held_out_metrics(result))
        if result.accuracy > self.best:
            self.best = result.accuracy
            self.saver.write("best", self.step)
        return result

    def save(self, name: str) -> None:
        """Writes a checkpoint to resume from."""
        place: dict[str, Any] = {"step": self.step, "sampled_tokens": self.sampled_tokens, "best": self.best}
        place |= {"a_question": self.a_question, "unevaluated": self.unevaluated}
        place["questions"] = self.drawn_from
        self.saver.resumable(name, place)

    def _log(self, record: dict[str, Any]) -> None:
        self.records.log(record)
        if self.world.is_main:
            self.on_metrics(record)
