"""The rollout: planner and reasoner take turns until an answer is given, as the `Rulebook` says.

Episodes do not wait for each other: each goes on as soon as the planner has chosen for it, and a finished
one is replaced by the next in the queue. Decisions are taken for several at once, when enough of them wait.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from rsim.answers.prefix import open_prefix
from rsim.config import RolloutConfig
from rsim.engine.protocol import Engine, SampledStep, Stop
from rsim.engine.sampling import DelimiterStop, StringStop, Vocabulary, episode_uniforms
from rsim.errors import UserError
from rsim.game.acting import Acts
from rsim.game.engines import check_context, connect, open_engine
from rsim.game.episode import Episode, Step
from rsim.game.problem import Problem
from rsim.game.progress import ended
from rsim.game.rulebook import check_budget, rulebook_of
from rsim.game.tools import Runner, check_tools
from rsim.policies.protocol import AnyPlanner, Decision, PlannerSession
from rsim.policies.reasoner import Reasoner
from rsim.rules import ALONE, FENCE, End, Lengths, Move, Progress, Rulebook, open_block

OnStep = Callable[[int, Episode], None]

_WAITING = 1 / 4  # share of the episodes in play that rests before the planner is asked


@dataclass
class Game:
    """A reasoner, a planner (None: the reasoner goes on alone, to the end), the settings of a rollout, and
    what runs the programs of strategies that write some."""

    reasoner: Reasoner
    planner: AnyPlanner | None
    rules: RolloutConfig
    runner: Runner | None = None

    def __post_init__(self) -> None:
        self.seconds = {"planner": 0.0, "all": 0.0}  # spent in `play` so far
        self.servers = connect(self.reasoner, self.rules)
        self.delimiter_ids = self.reasoner.injected_ids(self.rules.delimiter)
        self.prompts: list[list[list[int]]] = []
        self.rulebook: Rulebook | None = None
        if self.planner is not None:
            strategies = self.planner.strategies.strategies
            ids = self.reasoner.injected_ids
            self.prompts = [[ids(p) for p in s.prompts] for s in strategies]
            self.rulebook = rulebook_of(self.planner, self.rules, lambda text: len(ids(text)))
            check_budget(self.rulebook)
            check_tools(self.planner.strategies, self.runner)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.reasoner.tokenizer, self.reasoner.vocabulary_size)

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
            greedy: argmax for both agents and the first wording of each prompt, instead of sampling.
            on_step: called with ``(index, episode)`` after each step of each episode.

        Returns:
            ``len(problems) * group_size`` episodes, group by group.

        Raises:
            UserError: a question is too long for the reasoner or the planner; a sampling server fails.
        """
        keys = keys or [str(i) for i in range(len(problems))]
        episodes, names = [], []
        for group, (problem, key) in enumerate(zip(problems, keys, strict=True)):
            prompt = self.reasoner.prompt_ids(problem.question, self.rules.day)
            check_context(self.reasoner, len(prompt), self.rules.max_tokens, self.servers)
            for member in range(group_size):
                nothing = [0] * len(prompt), [0.0] * len(prompt)
                episodes.append(Episode(problem, group, list(prompt), len(prompt), *nothing))
                names.append(f"{key}:{member}")
        slots = min(self.rules.batch, len(episodes))
        longest = max(e.prompt_length for e in episodes)
        engine = open_engine(
            self.reasoner, self.rules, self.servers, slots=slots, seed=seed, greedy=greedy, longest=longest
        )
        began = time.perf_counter()
        try:
            rollout = _Planned if self.planner is not None else _Rollout
            rollout(self, engine, slots, _Asked(episodes, names, seed, greedy, on_step)).run()
        finally:
            engine.close()
            self.seconds["all"] += time.perf_counter() - began
        return episodes


@dataclass(frozen=True)
class _Asked:
    """What one `Game.play` is to play: ``keys`` name each episode's random stream."""

    episodes: list[Episode]
    keys: list[str]
    seed: int
    greedy: bool
    on_step: OnStep | None


class _Rollout:
    """Episodes in the queue or in a slot of the engine. Here, without a planner, each is a single step."""

    patience = 0.0  # share of the episodes in play that must rest before the next steps are opened

    def __init__(self, game: Game, engine: Engine, slots: int, asked: _Asked) -> None:
        self.game, self.engine, self.asked = game, engine, asked
        self.queue = deque(range(len(asked.episodes)))
        self.free = list(range(slots))
        self.resting: list[int] = []  # slots whose sequence waits for its next step
        self.index: dict[int, int] = {}  # the episode in each taken slot
        self.progress: dict[int, Progress] = {}
        self.moves: dict[int, Move] = {}  # the step that is being sampled in each slot
        self.sent: dict[int, int] = {}  # tokens of each slot's episode that the engine has
        self.book = game.rulebook or Rulebook(game.rules, Lengths(0, 0, 0), -1, -1)
        self.acts = Acts(game.reasoner, game.runner, self.book.rules)
        self.over = 0  # episodes

    def run(self) -> None:
        while self.queue or self.resting or self.engine.running:
            waiting = len(self.resting) + min(len(self.free), len(self.queue))
            if waiting and waiting >= self.patience * (self.engine.running + len(self.resting)):
                self._admit()
                resting, self.resting = self.resting, []
                for slot, move in self._moves(self._go_on(resting)).items():
                    self._open(slot, move)
            for step in self.engine.advance():
                if self._close(step):
                    self.engine.release(step.slot)
                    self.free.append(step.slot)
                else:
                    self.resting.append(step.slot)

    def episode(self, slot: int) -> Episode:
        return self.asked.episodes[self.index[slot]]

    def _admit(self) -> None:
        slots = [self.free.pop() for _ in range(min(len(self.free), len(self.queue)))]
        if not slots:
            return
        for slot in slots:
            self.index[slot] = self.queue.popleft()
            self.progress[slot], self.sent[slot] = Progress(), len(self.episode(slot).token_ids)
        keys = [self.asked.keys[self.index[s]] for s in slots]
        self.engine.start(slots, [self.episode(s).token_ids for s in slots], keys)
        self._entered(slots, keys)
        self.resting += slots

    def _entered(self, slots: list[int], keys: list[str]) -> None:
        """New episodes are in ``slots``."""

    def _go_on(self, slots: list[int]) -> list[int]:
        """Lets those of ``slots`` go on that wait for a program, all at once: what is sampled together does
        not depend on the time it takes. Returns those whose step is over."""
        submitted = []
        for slot in [s for s in slots if s in self.acts.outputs]:
            sampled = self.acts.finish(slot, self.episode(slot))
            left = self.book.after_output(self.moves[slot], self.progress[slot], sampled)
            self.moves[slot] = replace(self.moves[slot], tool=None)
            if left > 0:
                self._submit(slot, left)
                submitted.append(slot)
            else:
                self._end(slot, "cap")
        return [s for s in slots if s not in submitted]

    def _moves(self, slots: list[int]) -> dict[int, Move]:
        """The next step of every slot."""
        return dict.fromkeys(slots, ALONE)

    def _prompt(self, slot: int, move: Move) -> tuple[list[int], str, str]:
        """What is injected before a step: its ids, and as text the strategy's prompt and a tool's report."""
        return [], "", ""

    def _open(self, slot: int, move: Move) -> None:
        """Injects a step's prompt and lets the reasoner go on."""
        episode, progress = self.episode(slot), self.progress[slot]
        ids, prompt, report = self._prompt(slot, move)
        prefix = open_prefix(prompt) if move.strategy == self.book.termination else ""
        start, body = len(episode.token_ids), len(episode.token_ids) + len(ids)
        episode.inject(ids)
        episode.forced |= move.forced
        step = Step(move.strategy, start, body, body, "", move.forced, prefix, report, prompt=prompt)
        episode.steps.append(step)
        self.moves[slot] = move
        self._submit(slot, self.book.max_new_tokens(move, progress, len(ids)))

    def _submit(self, slot: int, limit: int) -> None:
        """Lets the engine read what was injected since it sampled, and sample."""
        stop: Stop | None = None
        episode = self.episode(slot)
        if self.moves[slot].tool == "python":
            stop = StringStop(self.game.vocabulary, (FENCE,))
        elif self.book.stops(self.moves[slot]):
            answer = episode.token_ids[episode.prompt_length :]
            said = self.game.reasoner.tokenizer.decode(answer, skip_special_tokens=True)
            stop = DelimiterStop(self.game.vocabulary, self.book.rules.delimiter, open_block(said))
        self.engine.submit(slot, episode.token_ids[self.sent[slot] :], limit, stop)

    def _close(self, sampled: SampledStep) -> bool:
        """Records what was sampled; True when the episode is over."""
        slot = sampled.slot
        episode, step = self.episode(slot), self.episode(slot).steps[-1]
        episode.sample(sampled.tokens, sampled.logprobs)
        step.end = self.sent[slot] = len(episode.token_ids)
        step.text += self.game.reasoner.tokenizer.decode(sampled.tokens, skip_special_tokens=True)
        program = self.book.program(self.moves[slot], sampled.end, step.text)
        if program is None:
            return self._end(slot, sampled.end)
        self.acts.start(slot, program, episode)
        return False

    def _end(self, slot: int, end: End) -> bool:
        """Records the end of a step and the episode's flags; True when the episode is over."""
        episode, ending = self.episode(slot), self.book.ending(self.moves[slot], end)
        if ending.closes:
            episode.inject(self.game.delimiter_ids)
        episode.truncated, episode.terminated = ending.truncated, ending.terminated
        episode.reasoner_ended = ending.reasoner_ended
        self.progress[slot] = Progress(len(episode.steps), len(episode.token_ids) - episode.prompt_length)
        self._stepped(slot, episode.steps[-1])
        if self.asked.on_step is not None:
            self.asked.on_step(self.index[slot], episode)
        if ending.over:
            self.over += 1
            ended(self.over, len(self.asked.episodes))
        return ending.over

    def _stepped(self, slot: int, step: Step) -> None:
        """A step has ended."""


class _Planned(_Rollout):
    """With a planner, which reads what was sampled and chooses the steps."""

    patience = _WAITING

    def __init__(self, game: Game, engine: Engine, slots: int, asked: _Asked) -> None:
        super().__init__(game, engine, slots, asked)
        assert game.planner is not None
        self.planner = game.planner
        self.session: PlannerSession = game.planner.begin(slots)
        self.temperature = 0.0 if asked.greedy else game.rules.planner_temperature
        self.draws: dict[int, tuple[list[float], list[float]]] = {}  # uniform numbers: decisions, wordings

    def _entered(self, slots: list[int], keys: list[str]) -> None:
        limit, decisions = self.book.rules.max_tokens, self.book.rules.max_steps + 1
        for slot, key in zip(slots, keys, strict=True):
            uniforms = episode_uniforms(self.asked.seed, key, limit + 2 * decisions)[limit:].tolist()
            self.draws[slot] = uniforms[:decisions], uniforms[decisions:]
        with self._planners_time():
            self.session.start(slots, [self.episode(s).problem.question for s in slots])
        longest = max(map(self.session.length, slots))
        if longest > self.planner.context:
            raise UserError(
                f"a question of {longest} tokens exceeds the planner's context of {self.planner.context}",
                "leave long questions out (data.max_question_tokens), or take a planner that reads more",
            )

    def _moves(self, slots: list[int]) -> dict[int, Move]:
        """Asks the planner where it may choose and can read what there is; elsewhere the episode must end."""
        readable = [s for s in slots if self.session.reads(s)]
        free = [s for s in readable if not self.book.must_end(self.progress[s])]
        moves = dict.fromkeys(slots, self.book.move(None))
        for slot, decision in zip(free, self._decide(free), strict=True):
            self.episode(slot).decisions.append(decision)
            moves[slot] = self.book.move(decision.action, max(decision.probabilities))
        return moves

    def _decide(self, slots: list[int]) -> list[Decision]:
        if not slots:
            return []
        uniforms = [self.draws[s][0][self.progress[s].steps] for s in slots]
        with self._planners_time():
            return self.session.decide(slots, uniforms, self.temperature)

    def _prompt(self, slot: int, move: Move) -> tuple[list[int], str, str]:
        wordings = self.game.prompts[move.strategy]
        drawn = self.book.rules.paraphrase == "random" and not self.asked.greedy
        chosen = int(self.draws[slot][1][self.progress[slot].steps] * len(wordings)) if drawn else 0
        if not move.injects:
            return [], "", ""
        text = self.planner.strategies[move.strategy].prompts[chosen]
        ids, report = self.acts.report(move, self.episode(slot))
        return wordings[chosen] + ids, text, report

    def _stepped(self, slot: int, step: Step) -> None:
        with self._planners_time():
            self.session.observe(slot, self.game.names[step.strategy], step.read)
        self.episode(slot).planner_ids = self.session.ids(slot)

    @contextmanager
    def _planners_time(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.game.seconds["planner"] += time.perf_counter() - began
