"""What one play of the game leaves behind: token ids, masks, sampler log-probs, decisions, steps and flags.

These arrays are the only thing that training reads; nothing is ever recomputed from text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rsim.answers.prefix import answer_text
from rsim.game.problem import Problem
from rsim.policies.protocol import Decision

FLAGS = ("forced", "truncated", "reasoner_ended", "terminated")  # of an episode


@dataclass
class Step:
    """One step of the chain of thought, as spans of `Episode.token_ids`.

    ``[start, body)`` is the injected prompt, with a calculator's report; ``[body, end)`` is what was sampled,
    with a program's output among it, which the mask tells apart; an injected delimiter that closes a capped
    step lies after ``end``. ``strategy`` is the label index, or -1 where nobody chose (no planner).
    ``answer_prefix`` is the end of the prompt where it opens a box or a code block for the answer.

    ``text`` is what was sampled, ``prompt`` the strategy's words before it. A tool's ``output`` was injected
    after ``before`` characters of ``text``.
    """

    strategy: int
    start: int
    body: int
    end: int
    text: str = ""
    forced: bool = False
    answer_prefix: str = ""
    output: str = ""
    before: int = 0
    prompt: str = ""

    @property
    def answer(self) -> str:
        """The sampled text without a program that was run, behind the box or block that the prompt opened."""
        return answer_text(self.answer_prefix, self.text[self.before :])

    @property
    def read(self) -> str:
        """What the planner reads: the sampled text, and the output in its place."""
        return self.text[: self.before] + self.output + self.text[self.before :]


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
