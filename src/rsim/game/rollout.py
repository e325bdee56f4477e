"""The game: planner and reasoner take turns until an answer is given or a limit is met.

Trajectories do not wait for each other: each goes on as soon as the planner has chosen for it, and a finished one is replaced
by the next in the queue. Decisions are taken for several at once, when enough of them wait.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from rsim.answers.prefix import open_prefix
from rsim.config import RolloutConfig
from rsim.engine.native import NativeEngine
from rsim.engine.protocol import Engine, SampledStep
from rsim.engine.sampling import StepEnds, episode_uniforms
from rsim.engine.vllm import VllmEngine, VllmServers
from rsim.errors import UserError
from rsim.game.episode import Episode, Step
from rsim.game.problem import Problem
from rsim.policies.protocol import AnyPlanner
from rsim.policies.reasoner import Reasoner

OnStep = Callable[[int, Episode], None]

_WAITING = 1 / 4  # share of the episodes in play that rests before the planner is asked: a forward pass is worth several


@dataclass
class Game:
    """A reasoner, a planner (None: the reasoner writes its chain of thought alone) and the rules."""

    reasoner: Reasoner
    planner: AnyPlanner | None
    rules: RolloutConfig

    def __post_init__(self) -> None:
        self.seconds = {"planner": 0.0, "all": 0.0}  # spent in `play` so far
        self.servers: VllmServers | None = None
        if self.rules.engine == "vllm":
            self.servers = VllmServers(self.rules.vllm_url, self.rules.vllm_timeout)
            self.servers.check(self.rules.temperature)
        self.delimiter_ids = self.reasoner.injected_ids(self.rules.delimiter)
        self.prompts: list[list[list[int]]] = []
        if self.planner is not None:
            self.prompts = [[self.reasoner.injected_ids(p) for p in s.prompts] for s in self.planner.strategies.strategies]
            longest = max(len(p) for p in self.prompts[self.planner.strategies.termination])
            closing = longest + self.rules.answer_tokens + len(self.delimiter_ids)
            if self.rules.max_tokens <= closing:
                raise UserError(f"rollout.max_tokens = {self.rules.max_tokens}",
                                f"a final answer alone takes {closing} tokens")  # fmt: skip

    @cached_property
    def step_ends(self) -> StepEnds:
        vocabulary = self.reasoner.model.get_output_embeddings().weight.shape[0]
        return StepEnds(self.reasoner.tokenizer, self.rules.delimiter, vocabulary)

    @property
    def parameters(self) -> dict[str, int]:
        """How many parameters each side has."""
        planner = self.planner.parameters if self.planner is not None else 0
        return {"reasoner": self.reasoner.model.num_parameters(), "planner": planner}

    @property
    def names(self) -> tuple[str, ...]:
        """The strategies' names, in label order; none without a planner."""
        return self.planner.strategies.names if self.planner is not None else ()

    @property
    def planner_share(self) -> float:
        """The planner's part of the time spent in `play`."""
        return self.seconds["planner"] / self.seconds["all"] if self.seconds["all"] else 0.0

    @torch.no_grad()
    def play(
        self,
        problems: list[Problem],
        *,
        seed: int,
        group_size: int = 1,
        keys: list[str] | None = None,
        greedy: bool = False,
        on_step: OnStep | None = None,
    ) -> list[Episode]:
        """Plays every problem ``group_size`` times.

        Args:
            seed: with ``keys``, all that sampling depends on.
            keys: one name per problem that its random stream depends on (default: its place in ``problems``).
            greedy: argmax for both agents instead of sampling.
            on_step: called with ``(index, episode)`` after each step of each episode.

        Returns:
            ``len(problems) * group_size`` episodes, group by group.
        """
        keys = keys or [str(i) for i in range(len(problems))]
        episodes, names = [], []
        for group, (problem, key) in enumerate(zip(problems, keys, strict=True)):
            prompt = self.reasoner.prompt_ids(problem.question)
            self._check_context(len(prompt))
            for member in range(group_size):
                episodes.append(Episode(problem, group, list(prompt), len(prompt), [0] * len(prompt), [0.0] * len(prompt)))
                names.append(f"{key}:{member}")
        return self.go_on(episodes, names, seed=seed, greedy=greedy, on_step=on_step)

    @torch.no_grad()
    def go_on(
        self, episodes: list[Episode], keys: list[str], *, seed: int, greedy: bool = False, on_step: OnStep | None = None
    ) -> list[Episode]:
        """Plays unfinished episodes, such as `Episode.branch` makes, to their end, in place.

        Args:
            keys: one name per episode that its random stream depends on.
        """
        slots = min(self.rules.batch, len(episodes))
        engine = self._engine(slots, seed, greedy, max(len(e.token_ids) for e in episodes))
        began = time.perf_counter()
        try:
            _Play(self, engine, slots, episodes, keys, seed, greedy, on_step).run()
        finally:
            engine.close()
            self.seconds["all"] += time.perf_counter() - began
        return episodes

    def _engine(self, slots: int, seed: int, greedy: bool, longest_prompt: int) -> Engine:
        temperature = 0.0 if greedy else self.rules.temperature
        step_ends = self.step_ends if self.planner is not None else None
        if self.servers is not None:
            return VllmEngine(self.servers.servers, slots, seed=seed, temperature=temperature, step_ends=step_ends,
                              end_ids=self.reasoner.end_ids)  # fmt: skip
        return NativeEngine(
            self.reasoner, step_ends, slots, seed=seed, temperature=temperature, max_tokens=self.rules.max_tokens,
            longest_prompt=longest_prompt, recorded=self.rules.cuda_graphs,
        )  # fmt: skip

    def _check_context(self, prompt: int) -> None:
        limit = self.reasoner.model.config.get_text_config().max_position_embeddings
        if prompt + self.rules.max_tokens > limit:
            raise UserError(
                f"a question of {prompt} tokens and rollout.max_tokens = {self.rules.max_tokens} exceed the "
                f"reasoner's context of {limit}",
                "lower rollout.max_tokens",
            )


class _Play:
    """The episodes of one `Game.play`, in the queue or in a slot, and the rules of opening and closing a step."""

    def __init__(
        self, game: Game, engine: Engine, slots: int, episodes: list[Episode], keys: list[str], seed: int, greedy: bool,
        on_step: OnStep | None,
    ) -> None:  # fmt: skip
        self.game, self.rules, self.engine, self.on_step = game, game.rules, engine, on_step
        self.episodes, self.keys, self.seed = episodes, keys, seed
        self.planner_temperature = 0.0 if greedy else self.rules.planner_temperature
        self.queue = deque(range(len(episodes)))
        self.free = list(range(slots))
        self.resting: list[int] = []  # slots whose sequence waits for its next step
        self.index: dict[int, int] = {}  # the episode in each taken slot
        self.draws: dict[int, tuple[list[float], list[float]]] = {}  # uniform numbers for decisions and paraphrases
        self.patience = _WAITING if game.planner is not None else 0.0
        if game.planner is not None:
            self.planning = game.planner.begin(slots)

    def run(self) -> None:
        while self.queue or self.resting or self.engine.running:
            waiting = len(self.resting) + min(len(self.free), len(self.queue))
            if waiting and waiting >= self.patience * (self.engine.running + len(self.resting)):
                self._admit()
                self._open(self.resting)
                self.resting = []
            for step in self.engine.advance():
                if self._close(step):
                    self.engine.release(step.slot)
                    self.free.append(step.slot)
                else:
                    self.resting.append(step.slot)

    def _admit(self) -> None:
        slots = [self.free.pop() for _ in range(min(len(self.free), len(self.queue)))]
        for slot in slots:
            self.index[slot] = self.queue.popleft()
        if not slots:
            return
        entering = [self.episodes[self.index[s]] for s in slots]
        keys = [self.keys[self.index[s]] for s in slots]
        # Behind the last step there may be a delimiter that closes it: it is submitted with the next prompt.
        self.engine.start(slots, [e.token_ids[: e.steps[-1].end] if e.steps else e.token_ids for e in entering], keys)
        if self.game.planner is not None:
            limit, decisions = self.rules.max_tokens, self.rules.max_steps + 1
            for slot, key in zip(slots, keys, strict=True):
                uniforms = episode_uniforms(self.seed, key, limit + 2 * decisions)[limit:].tolist()
                self.draws[slot] = uniforms[:decisions], uniforms[decisions:]
            with self._planners_time():
                self.planning.start(slots, [e.problem.question for e in entering])
                self._check_planner(slots)
                for slot, episode in zip(slots, entering, strict=True):
                    for step in episode.steps:
                        self._observe(slot, step)
        self.resting += slots

    def _check_planner(self, slots: list[int]) -> None:
        """Whether the planner can read the questions in ``slots``."""
        longest = max(map(self.planning.length, slots))
        limit = self.game.planner.context  # type: ignore[union-attr]
        if longest > limit:
            raise UserError(
                f"a question of {longest} tokens exceeds the planner's context of {limit}",
                "leave long questions out (data.max_question_tokens), or take a planner that reads more",
            )

    def _observe(self, slot: int, step: Step) -> None:
        self.planning.observe(slot, self.game.names[step.strategy], step.text)

    @contextmanager
    def _planners_time(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.game.seconds["planner"] += time.perf_counter() - began

    # --- before a step: the planner's decision and the injection ---

    def _open(self, slots: list[int]) -> None:
        if self.game.planner is None:
            for slot in slots:
                episode = self.episodes[self.index[slot]]
                start = len(episode.token_ids)
                episode.steps.append(Step(-1, start, start, start))
                self.engine.submit(slot, [], self._left(episode))
            return
        for slot, (strategy, speaks) in self._choose(slots).items():
            self._inject(slot, strategy, speaks=speaks)

    def _choose(self, slots: list[int]) -> dict[int, tuple[int, bool]]:
        """The strategy of every slot, and whether its prompt is injected: not that of a decision below the gate.

        Forced strategies are no decisions. A planner that cannot read more decides nothing.
        """
        assert self.game.planner is not None
        episodes = {s: self.episodes[self.index[s]] for s in slots}
        limit = self.game.planner.context
        free = [s for s in slots if not self._must_end(episodes[s]) and self.planning.length(s) <= limit]
        strategies = self.game.planner.strategies
        chosen = dict.fromkeys(slots, (strategies.termination, True))
        if free:
            uniforms = [self.draws[s][0][len(episodes[s].steps)] for s in free]
            with self._planners_time():
                decisions = self.planning.decide(free, uniforms, self.planner_temperature)
            for slot, decision in zip(free, decisions, strict=True):
                episode = episodes[slot]
                episode.decisions.append(decision)
                sure = max(decision.probabilities) >= self.rules.gate
                chosen[slot] = (decision.action, True) if sure else (strategies.neutral, False)
        for slot in set(slots) - set(free):
            episodes[slot].forced = True
        return chosen

    def _must_end(self, episode: Episode) -> bool:
        return len(episode.steps) >= self.rules.max_steps or self._room(episode) < 1

    def _room(self, episode: Episode) -> int:
        """Tokens that one more step may sample while a forced termination still fits after it."""
        prompts = self.game.prompts
        termination = self.game.planner.strategies.termination  # type: ignore[union-attr]
        longest = max(len(p) for prompt in prompts for p in prompt)
        closing = max(len(p) for p in prompts[termination]) + self.rules.answer_tokens
        return self._left(episode) - longest - len(self.game.delimiter_ids) - closing

    def _left(self, episode: Episode) -> int:
        return self.rules.max_tokens - (len(episode.token_ids) - episode.prompt_length)

    def _inject(self, slot: int, strategy: int, *, speaks: bool) -> None:
        """Appends the prompt of ``strategy``, or nothing, and lets the reasoner go on."""
        episode, rules = self.episodes[self.index[slot]], self.rules
        paraphrases = self.game.prompts[strategy]
        draw = self.draws[slot][1][len(episode.steps)] if rules.paraphrase == "random" else 0.0
        chosen = int(draw * len(paraphrases))
        prompt = paraphrases[chosen] if speaks else []
        cap = min(rules.step_tokens, self._room(episode))
        closing = self._closing_delimiter(episode)
        start = len(episode.token_ids)
        episode.inject(prompt)
        body = start + len(prompt)
        strategies = self.game.planner.strategies  # type: ignore[union-attr]
        final = strategy == strategies.termination
        answer_prefix = open_prefix(strategies[strategy].prompts[chosen]) if final else ""
        episode.steps.append(Step(strategy, start, body, body, forced=episode.forced, answer_prefix=answer_prefix))
        if final:
            cap = min(self._left(episode), max(rules.answer_tokens, rules.step_tokens))
        self.engine.submit(slot, closing + prompt, cap, to_end=final and rules.answer_to_end, answer_prefix=answer_prefix)

    def _closing_delimiter(self, episode: Episode) -> list[int]:
        """What was injected behind the last step's sampled tokens: a delimiter, if a cap had cut it."""
        return episode.token_ids[episode.steps[-1].end :] if episode.steps else []

    # --- after a step ---

    def _close(self, sampled: SampledStep) -> bool:
        """Records the step and sets the flags; True when the episode is over."""
        index = self.index[sampled.slot]
        episode, planner = self.episodes[index], self.game.planner
        step = episode.steps[-1]
        episode.sample(sampled.tokens, sampled.logprobs)
        step.end = len(episode.token_ids)
        step.text = self.game.reasoner.tokenizer.decode(sampled.tokens, skip_special_tokens=True)
        final = planner is None or step.strategy == planner.strategies.termination
        if final:
            episode.truncated = sampled.end == "cap"
            episode.terminated = planner is not None and not episode.forced and not episode.truncated
        elif sampled.end == "end_of_turn":
            episode.reasoner_ended = True
        elif sampled.end == "cap":
            episode.inject(self.game.delimiter_ids)
        if planner is not None:
            with self._planners_time():
                self._observe(sampled.slot, step)
            episode.planner_ids = self.planning.ids(sampled.slot)
        if self.on_step is not None:
            self.on_step(index, episode)
        return final or episode.reasoner_ended
