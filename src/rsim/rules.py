"""The rulebook: what comes next in an episode, and when a step and an episode are over. No tensors.

Everyone who plays asks here: the rollout of training and evaluation, whatever its engine, and the plug-in, in
process, as a server and before an upstream that takes text only. A planner is saved with its `PlayRules`.

Before each step of an episode the planner chooses a strategy, unless the episode must end; its prompt is
injected; the reasoner samples the step. All lengths are tokens of the reasoner. The budget, ``max_tokens``,
counts what was sampled and injected, and always keeps enough for a forced termination.

A strategy may have a tool. *python*: its prompt opens a code block, the closing fence ends the sampling, what
the program prints is injected, and the reasoner goes on to a delimiter (``tool_ends_step``: it is injected):
one step, which samples no more than any other. A block that is not closed ends the step as usual, and nothing
is run. *calculator*: its report on the last step follows the prompt. ``tool_tokens`` are kept for an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rsim.settings import setting

End = Literal["end_of_turn", "delimiter", "cap"]  # why a step's sampling ended
Tool = Literal["python", "calculator"]
FENCE = "```"  # opens and closes a code block
_SHARE = "is a probability: from 0 (off) to 1"


@dataclass(frozen=True)
class PlayRules:
    """The limits of an episode and of its steps."""

    max_steps: int = setting(8, "planner decisions before termination is forced", at_least=1)
    step_tokens: int = setting(128, "the most that one step may sample", at_least=1)
    max_tokens: int = setting(1024, "sampled and injected tokens of an episode", at_least=1)
    answer_tokens: int = setting(64, "kept back for the answer of a forced termination", at_least=1)
    delimiter: str = setting("\n\n", "ends a step, outside code blocks")
    answer_to_end: bool = setting(False, "the final step goes on over delimiters (programs have blank lines)")
    gate: float = setting(0.0, "a planner less sure says nothing", at_least=0, at_most=1, remedy=_SHARE)
    paraphrase: Literal["random", "first"] = setting("random", "of a strategy's prompts; greedy: the first")
    tool_chars: int = setting(400, "the most that a tool's output shows", at_least=1)
    tool_tokens: int = setting(200, "the most that it takes", at_least=1)
    tool_seconds: float = setting(5.0, "the longest that a program runs", above=0)
    tool_ends_step: bool = setting(False, "after a program's output the planner chooses what follows")
    day: str = setting("2026-01-01", "what a chat template that says the date takes for today")

    def within(self, limit: int) -> PlayRules:
        """The same rules for ``limit`` tokens; a quarter at most is kept for a forced end or an output."""
        if limit >= self.max_tokens:
            return self
        answer, tool = (min(kept, max(1, limit // 4)) for kept in (self.answer_tokens, self.tool_tokens))
        return replace(self, max_tokens=limit, answer_tokens=answer, tool_tokens=tool)


@dataclass(frozen=True)
class Lengths:
    """Tokens of what may be injected: any prompt, the longest of *termination*, a delimiter, an output."""

    prompt: int
    termination: int
    delimiter: int
    tool: int = 0

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], termination: int, delimiter: int, tool: int) -> Lengths:
        """``prompts``: the lengths of each strategy's paraphrases, in label order."""
        return cls(max(max(row) for row in prompts), max(prompts[termination]), delimiter, tool)


@dataclass
class Progress:
    """How far an episode has come: steps that were opened, tokens that were sampled or injected."""

    steps: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Move:
    """What the next step is. ``strategy`` is a label index, or -1 where nobody chooses (no planner)."""

    strategy: int
    injects: bool = True  # False: below the gate, nothing is said
    final: bool = False  # the episode is over after it
    forced: bool = False  # a termination that the planner did not choose
    unlimited: bool = False  # the null action: to the end of the turn, as the reasoner would go on alone
    tool: Tool | None = None  # that is still to be used in it


@dataclass(frozen=True)
class Ending:
    """What the end of a step means for the episode; the last three are flags of it."""

    over: bool = False
    closes: bool = False  # a delimiter is injected, since none was sampled
    truncated: bool = False
    terminated: bool = False
    reasoner_ended: bool = False


ALONE = Move(-1, injects=False, final=True, unlimited=True)  # the one step of a reasoner without planner


@dataclass(frozen=True)
class Rulebook:
    """`PlayRules` for one strategy set and one reasoner's tokenizer.

    ``termination`` and ``neutral`` are label indices (``neutral`` is what a step without intervention is
    called); ``unlimited`` are those of null actions, ``tools`` those of strategies with a tool.
    """

    rules: PlayRules
    lengths: Lengths
    termination: int
    neutral: int
    unlimited: frozenset[int] = frozenset()
    tools: Mapping[int, Tool] = field(default_factory=dict)

    @property
    def closing(self) -> int:
        """Tokens that a forced termination takes, its answer included."""
        return self.lengths.termination + self.rules.answer_tokens

    def left(self, progress: Progress) -> int:
        """What is left of the budget."""
        return self.rules.max_tokens - progress.tokens

    def room(self, progress: Progress) -> int:
        """Tokens that one more step may sample while a forced termination still fits after it."""
        injected = self.lengths.prompt + self.lengths.tool + self.lengths.delimiter
        return self.left(progress) - injected - self.closing

    def must_end(self, progress: Progress) -> bool:
        """Whether termination is forced now: the planner is not asked."""
        return progress.steps >= self.rules.max_steps or self.room(progress) < 1

    def move(self, action: int | None, confidence: float = 1.0) -> Move:
        """The next step: what the planner chose, or nothing where it is less sure than the gate asks.

        Args:
            action: a label index; None: no decision (`must_end`, or a planner whose context is full), so that
                the episode is ended.
            confidence: the probability of the planner's best strategy.
        """
        if action is None:
            return Move(self.termination, final=True, forced=True)
        alone = self.rules.gate == 1  # no planner is sure enough
        if alone or confidence < self.rules.gate:
            return Move(self.neutral, injects=False, final=alone, unlimited=alone)
        if action in self.unlimited:
            return Move(action, final=True, unlimited=True)
        return Move(action, final=action == self.termination, tool=self.tools.get(action))

    def max_new_tokens(self, move: Move, progress: Progress, prompt_tokens: int) -> int:
        """The most that the step may sample; ``progress``: before its prompt of ``prompt_tokens``."""
        left = self.left(progress) - prompt_tokens
        if move.unlimited:
            return max(1, left)
        if move.final:
            return max(1, min(left, max(self.rules.answer_tokens, self.rules.step_tokens)))
        return min(self.rules.step_tokens, self.room(progress))

    def after_output(self, move: Move, progress: Progress, sampled: int) -> int:
        """What a step may still sample behind a program's output; below 1: it ends, as at a cap."""
        return 0 if self.rules.tool_ends_step else self.max_new_tokens(move, progress, 0) - sampled

    def program(self, move: Move, end: End, text: str) -> str | None:
        """What is run, now that the sampling of ``text`` ended so; None: nothing, the step is over."""
        return text.partition(FENCE)[0] if move.tool == "python" and end == "delimiter" else None

    def stops(self, move: Move) -> bool:
        """Whether a delimiter ends the step (`FENCE`, as long as a program is to be written)."""
        return not move.unlimited and not (move.final and self.rules.answer_to_end)

    def ending(self, move: Move, end: End) -> Ending:
        """What follows from a step that ended so."""
        cut, ended = end == "cap", end == "end_of_turn"
        if move.final:
            own = not move.forced and not move.unlimited
            by_reasoner = ended and move.unlimited and move != ALONE
            return Ending(over=True, truncated=cut, terminated=own and not cut, reasoner_ended=by_reasoner)
        return Ending(over=ended, closes=cut, reasoner_ended=ended)


def in_block(text: str) -> bool:
    """Whether a code block is open where ``text`` ends."""
    return text.count(FENCE) % 2 == 1


def open_block(said: str) -> str:
    """The fence that a step's text is read behind where ``said``, the answer so far, leaves a block open."""
    return f"{FENCE}\n" if in_block(said) else ""


def step_end(text: str, delimiter: str) -> int:
    """Where a step's text meets its delimiter, or -1. A delimiter inside a code block ends no step.

    >>> step_end("so\\n\\nthen", "\\n\\n"), step_end("```\\nx = 1\\n\\ny = 2", "\\n\\n")
    (2, -1)
    """
    at = text.find(delimiter)
    while at >= 0 and in_block(text[:at]):
        at = text.find(delimiter, at + 1)
    return at
