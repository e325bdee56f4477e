"""The game (SPEC 1): planner and reasoner take turns until an answer is given or a limit is met.

All live trajectories move in lockstep by step: one batched planner decision, one prefill of the injected prompts, then
one token at a time until every row has ended its step. Rows that end early leave the batch without a copy of the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rsim.config import RolloutConfig
from rsim.data.problem import Problem
from rsim.errors import UserError
from rsim.planner.planner import AnyPlanner
from rsim.rollout.decoder import Decoder
from rsim.rollout.episode import Episode, Step
from rsim.rollout.reasoner import Reasoner
from rsim.rollout.sampling import StepEnds, choose, episode_uniforms

OnStep = Callable[[int, Episode], None]

_END_OF_TURN, _DELIMITER, _CAP = "end_of_turn", "delimiter", "cap"


@dataclass
class Game:
    """A reasoner, a planner (None: the reasoner writes its chain of thought alone) and the rules."""

    reasoner: Reasoner
    planner: AnyPlanner | None
    rules: RolloutConfig

    def __post_init__(self) -> None:
        vocabulary = self.reasoner.model.get_output_embeddings().weight.shape[0]
        self.step_ends = StepEnds(self.reasoner.tokenizer, self.rules.delimiter, vocabulary)
        self.device = self.reasoner.model.device
        self.step_ends.touching = self.step_ends.touching.to(self.device)
        self.is_end = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        self.is_end[list(self.reasoner.end_ids)] = True
        self.prompts: list[list[list[int]]] = []
        if self.planner is not None:
            self.prompts = [[self.reasoner.injected_ids(p) for p in s.prompts] for s in self.planner.strategies.strategies]
            longest = max(len(p) for p in self.prompts[self.planner.strategies.termination])
            closing = longest + self.rules.answer_tokens + len(self.step_ends.ids)
            if self.rules.max_tokens <= closing:
                raise UserError(f"rollout.max_tokens = {self.rules.max_tokens}",
                                f"a final answer alone takes {closing} tokens")  # fmt: skip

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
            problems: one group each, in this order in the result.
            seed: of all sampling.
            keys: a name per problem that its random stream depends on (default: its place in ``problems``).
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
        for first in range(0, len(episodes), self.rules.batch):
            rows = slice(first, first + self.rules.batch)
            _Table(self, episodes[rows], names[rows], seed, greedy, on_step, first).play()
        return episodes

    def _check_context(self, prompt: int) -> None:
        limit = self.reasoner.model.config.get_text_config().max_position_embeddings
        if prompt + self.rules.max_tokens > limit:
            raise UserError(
                f"a question of {prompt} tokens and rollout.max_tokens = {self.rules.max_tokens} exceed the "
                f"reasoner's context of {limit}",
                "lower rollout.max_tokens",
            )


class _Table:
    """One batch of trajectories being played."""

    def __init__(
        self, game: Game, episodes: list[Episode], keys: list[str], seed: int, greedy: bool, on_step: OnStep | None, first: int
    ) -> None:
        self.game, self.rules, self.episodes, self.on_step, self.first = game, game.rules, episodes, on_step, first
        self.temperature = 0.0 if greedy else self.rules.temperature
        self.planner_temperature = 0.0 if greedy else self.rules.planner_temperature
        limit, decisions = self.rules.max_tokens, self.rules.max_steps + 1
        draws = [episode_uniforms(seed, key, limit + 2 * decisions) for key in keys]
        self.token_uniforms = torch.stack([torch.from_numpy(d[:limit]) for d in draws]).to(game.device)
        self.planner_uniforms = [d[limit : limit + decisions].tolist() for d in draws]
        self.prompt_uniforms = [d[limit + decisions :].tolist() for d in draws]
        longest = max(e.prompt_length for e in episodes)
        self.decoder = Decoder(game.reasoner.model, len(episodes), capacity=longest + 128)
        self.pending = self.decoder.start([e.token_ids for e in episodes])  # ids that the reasoner has not read yet
        if game.planner is not None:
            self.planning = game.planner.begin([e.problem.question for e in episodes])

    def play(self) -> None:
        live = list(range(len(self.episodes)))
        while live:
            strategies = self._choose(live) if self.game.planner is not None else {}
            caps = {h: self._open_step(h, strategies.get(h)) for h in live}
            ends = self._sample_steps(caps)
            live = [h for h in live if not self._close_step(h, ends[h])]

    # --- before a step: the planner's decision and the injection ---

    def _choose(self, live: list[int]) -> dict[int, int]:
        """The strategy of every live row; the forced ones are no decisions."""
        assert self.game.planner is not None
        termination = self.game.planner.strategies.termination
        free = [h for h in live if not self._must_end(self.episodes[h])]
        chosen = dict.fromkeys(live, termination)
        if free:
            uniforms = [self.planner_uniforms[h][len(self.episodes[h].steps)] for h in free]
            for handle, decision in zip(free, self.planning.decide(free, uniforms, self.planner_temperature), strict=True):
                self.episodes[handle].decisions.append(decision)
                chosen[handle] = decision.action
        for handle in set(live) - set(free):
            self.episodes[handle].forced = True
        return chosen

    def _must_end(self, episode: Episode) -> bool:
        return len(episode.steps) >= self.rules.max_steps or self._room(episode) < 1

    def _room(self, episode: Episode) -> int:
        """Tokens that one more step may sample while a forced termination still fits after it."""
        prompts = self.game.prompts
        termination = self.game.planner.strategies.termination  # type: ignore[union-attr]
        longest = max(len(p) for prompt in prompts for p in prompt)
        closing = max(len(p) for p in prompts[termination]) + self.rules.answer_tokens
        return self._left(episode) - longest - len(self.game.step_ends.ids) - closing

    def _left(self, episode: Episode) -> int:
        return self.rules.max_tokens - (len(episode.token_ids) - episode.prompt_length)

    def _open_step(self, handle: int, strategy: int | None) -> int:
        """Injects the prompt of ``strategy`` and returns the number of tokens that the step may sample."""
        episode = self.episodes[handle]
        start = len(episode.token_ids)
        if strategy is None:
            episode.steps.append(Step(-1, start, start, start))
            return self._left(episode)
        paraphrases = self.game.prompts[strategy]
        draw = self.prompt_uniforms[handle][len(episode.steps)] if self.rules.paraphrase == "random" else 0.0
        prompt = paraphrases[int(draw * len(paraphrases))]
        room = self._room(episode)
        episode.inject(prompt)
        self.pending[handle] += prompt
        episode.steps.append(Step(strategy, start, start + len(prompt), start + len(prompt), forced=episode.forced))
        if strategy == self.game.planner.strategies.termination:  # type: ignore[union-attr]
            return min(self._left(episode), max(self.rules.answer_tokens, self.rules.step_tokens))
        return min(self.rules.step_tokens, room)

    # --- the step itself ---

    def _sample_steps(self, caps: dict[int, int]) -> dict[int, str]:
        """Samples every row's step; returns why each ended."""
        game, decoder = self.game, self.decoder
        device, active, width = game.device, len(caps), max(caps.values())
        rows = len(self.episodes)
        tokens = torch.zeros(rows, width, dtype=torch.long, device=device)
        logprobs = torch.zeros(rows, width, device=device)
        cap = torch.zeros(rows, dtype=torch.long, device=device)
        offset = torch.zeros(rows, dtype=torch.long, device=device)
        for handle, limit in caps.items():
            cap[handle] = limit
            offset[handle] = len(self.episodes[handle].token_ids) - self.episodes[handle].prompt_length
        delimited = game.planner is not None
        ends: dict[int, str] = {}
        order, hidden = decoder.append({h: self.pending[h] for h in caps})
        for count in range(width):
            handles = torch.tensor(order, device=device)
            draws = self.token_uniforms[handles, offset[handles] + count]
            picked, logprob = choose(game.reasoner.logits(hidden), self.temperature, draws)
            tokens[handles, count], logprobs[handles, count] = picked, logprob
            suspects = game.is_end[picked] | (count + 1 >= cap[handles])
            if delimited:
                suspects |= game.step_ends.touching[picked]
            # From the back, so that the row moved into a freed place has been looked at already.
            for place in reversed(suspects.nonzero()[:, 0].tolist()):
                handle = order[place]
                if game.is_end[picked[place]]:
                    ends[handle] = _END_OF_TURN
                elif delimited and game.step_ends.ended(tokens[handle, : count + 1].tolist()):
                    ends[handle] = _DELIMITER
                elif count + 1 >= caps[handle]:
                    ends[handle] = _CAP
                else:
                    continue
                self._record(handle, tokens[handle, : count + 1], logprobs[handle, : count + 1])
                decoder.drop_to_back(place, active)
                active -= 1
            if active == 0:
                break
            order = decoder.handles[:active]
            hidden = decoder.append_one(tokens[torch.tensor(order, device=device), count])
        return ends

    def _record(self, handle: int, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        episode, ids = self.episodes[handle], tokens.tolist()
        for token, logprob in zip(ids, logprobs.tolist(), strict=True):
            episode.sample(token, logprob)
        episode.steps[-1].end = len(episode.token_ids)
        episode.steps[-1].text = self.game.reasoner.tokenizer.decode(ids, skip_special_tokens=True)
        self.pending[handle] = ids[-1:]  # sampled last, not read yet

    # --- after a step ---

    def _close_step(self, handle: int, end: str) -> bool:
        """Sets the flags; True when the episode is over."""
        episode, planner = self.episodes[handle], self.game.planner
        step = episode.steps[-1]
        final = planner is None or step.strategy == planner.strategies.termination
        if final:
            episode.truncated = end == _CAP
            episode.terminated = planner is not None and not episode.forced and not episode.truncated
        elif end == _END_OF_TURN:
            episode.reasoner_ended = True
        elif end == _CAP:
            episode.inject(self.game.step_ends.ids)
            self.pending[handle] += self.game.step_ends.ids
        if planner is not None:
            self.planning.observe(handle, planner.strategies[step.strategy].name, step.text)
            episode.planner_ids = self.planning.ids(handle)
        if self.on_step is not None:
            self.on_step(self.first + handle, episode)
        return final or episode.reasoner_ended
