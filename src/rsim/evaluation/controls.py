"""Controls that every claim about a trained planner is measured against."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rsim.game.episode import Episode
from rsim.models.prompts import begin_ids
from rsim.models.shape import context
from rsim.policies import template
from rsim.policies.planner import LearnedSession, name_tokens
from rsim.policies.reasoner import Reasoner
from rsim.policies.scripted import ScriptedPlanner, one_hot
from rsim.policies.strategies import TERMINATION, Strategy, StrategySet
from rsim.rules import PlayRules

_INSTRUCTION = "Strategies for the next step of a solution:"


@dataclass
class PromptedPlanner:
    """An LLM that is told what the strategies are and asked for the next one; nothing is trained.

    It reads the planner's own stream (`rsim.policies.template`) behind a list of the strategies with their descriptions, or
    ``bare``, without that list. The probability of a strategy is that of the first token of its name, among the names.

    Raises:
        UserError: two names begin with the same token.
    """

    reasoner: Reasoner
    strategies: StrategySet
    bare: bool = False
    rules: PlayRules | None = None
    sees: template.Sees = "everything"
    first_tokens: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.first_tokens = name_tokens(self.chunk, self.strategies)

    @property
    def parameters(self) -> int:
        return int(self.model.num_parameters())

    @property
    def context(self) -> int:
        return context(self.model.config)

    @property
    def model(self) -> PreTrainedModel:
        return self.reasoner.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.reasoner.tokenizer

    def chunk(self, text: str) -> list[int]:
        return self.reasoner.injected_ids(text)

    def opening(self, question: str) -> list[int]:
        asked, marker = template.question_chunk(question), self.chunk(template.MARKER)
        if self.bare:
            return begin_ids(self.tokenizer, asked) + marker
        lines = [f"{s.name}: {s.description}" for s in self.strategies.strategies]
        preamble: list[int] = begin_ids(self.tokenizer, "\n".join([_INSTRUCTION, *lines, "", ""]))
        return preamble + self.chunk(asked) + marker

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.reasoner.logits(hidden)[..., self.first_tokens]

    def begin(self, slots: int) -> LearnedSession:
        return LearnedSession(self, slots)


def wait_planner(strategies: StrategySet, times: int) -> ScriptedPlanner:
    """ "Wait," with no planner (budget forcing, arXiv 2501.19393): the reasoner goes on by itself, is told to wait ``times``
    times, and then asked for its answer.

    The first step's prompt is *continuation*'s where the set has one, else none of the set's but "Wait," as well.
    """
    wait = Strategy("wait", "", ("Wait,",), (), repeat_free=True)
    ending = strategies[strategies.termination]
    first = [s for s in strategies.strategies if s.name == "continuation"] or [wait]
    chosen = StrategySet((*dict.fromkeys((*first, wait)), ending))
    order = [chosen.names.index(first[0].name), *[chosen.names.index("wait")] * times, chosen.names.index(TERMINATION)]
    return ScriptedPlanner(
        chosen, lambda question, steps, uniform: one_hot(order[min(len(steps), len(order) - 1)], len(chosen))
    )


def shuffled_planner(strategies: StrategySet, played: list[Episode], seed: int) -> ScriptedPlanner:
    """A trained planner's own decisions, given to other questions: what is left when they do not depend on the state.

    ``played`` are its episodes, one per question; each question gets the strategies of another one (a random cyclic
    permutation), and termination after them.
    """
    order = list(range(len(played)))
    random.Random(f"shuffled:{seed}").shuffle(order)
    donors = dict(zip(order, [*order[1:], order[0]], strict=True))
    plans = {
        played[receiver].problem.question: [d.action for d in played[donor].decisions] for receiver, donor in donors.items()
    }

    def rule(question: str, steps: list[tuple[str, str]], uniform: float) -> list[float]:
        plan = [*plans[question], strategies.termination]
        return one_hot(plan[min(len(steps), len(plan) - 1)], len(strategies))

    return ScriptedPlanner(strategies, rule)
