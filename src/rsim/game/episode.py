"""What one play of the game leaves behind: token ids, masks, sampler log-probs, decisions, steps and flags.

These arrays are the only thing that training reads; nothing is ever recomputed from text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rsim.answers.prefix import answer_text
from rsim.game.problem import Problem
from rsim.policies.protocol import Decision

FLAGS = ("forced", "truncated", "reasoner_ended", "terminated")  # of an episode


@dataclass
class Step:
    """One step of the chain of thought, as spans of `Episode.token_ids`.

    ``[start, body)`` is the injected prompt and ``[body, end)`` what was sampled; an injected delimiter that
    closes a capped step lies after ``end``. ``strategy`` is the label index, or -1 where nobody chose (no
    planner). ``answer_prefix`` is the end of the prompt where it opens a box or a code block for the answer.
    """

    strategy: int
    start: int
    body: int
    end: int
    text: str = ""
    forced: bool = False
    answer_prefix: str = ""

    @property
    def answer(self) -> str:
        """The sampled text, behind the box or code block that the prompt has opened for it."""
        return answer_text(self.answer_prefix, self.text)


@dataclass
class Episode:
    """One trajectory. All three token arrays have the length of ``token_ids``.

    ``reasoner_mask`` is 1 on sampled tokens, 0 on the question's and on injected ones; ``logprobs`` holds
    the sampler's log-probs (nats, at the sampling temperature) where the mask is 1, else 0.
    """

    problem: Problem
    group: int
    token_ids: list[int]
    prompt_length: int
    reasoner_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    planner_ids: list[int] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    forced: bool = False  # termination was injected by the game, not chosen
    truncated: bool = False  # cut by the token limit
    reasoner_ended: bool = False  # the reasoner ended its turn outside a termination step
    terminated: bool = False  # ended by the planner's own termination

    @property
    def sampled_tokens(self) -> int:
        return sum(self.reasoner_mask)

    @property
    def injected_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_length - self.sampled_tokens

    @property
    def final_text(self) -> str:
        """The text of the final step, the only place an answer is read from."""
        return self.steps[-1].answer if self.steps else ""

    def inject(self, ids: list[int]) -> None:
        self.token_ids += ids
        self.reasoner_mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def sample(self, tokens: list[int], logprobs: list[float]) -> None:
        self.token_ids += tokens
        self.reasoner_mask += [1] * len(tokens)
        self.logprobs += logprobs

    def to_json(self, names: tuple[str, ...]) -> dict[str, Any]:
        """A record for people and reports: text (`Step.answer`), strategies, probabilities; no tokens."""
        probabilities = iter(self.decisions)
        steps = []
        for step in self.steps:
            chosen = step.strategy >= 0 and not step.forced and self.decisions
            decision = next(probabilities, None) if chosen else None  # none once a planner's context is full
            steps.append(
                {
                    "strategy": names[step.strategy] if step.strategy >= 0 else None,
                    "text": step.answer,
                    "forced": step.forced,
                    "probabilities": [round(p, 4) for p in decision.probabilities] if decision else None,
                }
            )
        return {
            "question": self.problem.question,
            "answer": self.problem.answer,
            "group": self.group,
            "steps": steps,
            "sampled_tokens": self.sampled_tokens,
            "injected_tokens": self.injected_tokens,
            "flags": [f for f in FLAGS if getattr(self, f)],
        }
