"""What tools write into an answer: what a program printed, and what a calculator says of the last step.

When tools act and how much room they have is the rulebook's matter (`rsim.rules`). Who runs programs is told
from outside: `rsim.rewards.programs` runs them in a sandbox.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from rsim.errors import UserError
from rsim.game.calculator import corrections
from rsim.policies.strategies import StrategySet
from rsim.rules import FENCE, PlayRules

Runner = Callable[[str, float], str]  # a program and its seconds; what it printed, an error as its last line

SILENT = "(it printed nothing)"
NOTHING_TO_CHECK = "there is no calculation to check."
ALL_RIGHT = "all calculations check."
_CUT = " ..."

_threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="rsim-tools")  # each waits for a process


def check_tools(strategies: StrategySet, runner: Runner | None) -> None:
    """Raises `UserError` where a strategy's programs have nobody to run them."""
    acting = [strategies[i].name for i, tool in strategies.tools.items() if tool == "python"]
    if acting and runner is None:
        raise UserError(
            f"the strategy {acting[0]!r} runs programs that the model writes, and nothing here may run them",
            "allow it: --tools python (serve), tools=('python',) (wrap), runner=... (Game)",
        )


class Tools:
    """The tools of one game: outputs are cut to what its rules allow."""

    def __init__(self, runner: Runner | None, rules: PlayRules, count: Callable[[str], int]) -> None:
        """``count``: how many tokens an injected text takes."""
        self.runner, self.rules, self.count = runner, rules, count

    def start(self, program: str, before: str) -> Future[str]:
        """Runs ``program``; the result is what is injected behind ``before``, the text that was sampled."""
        return _threads.submit(self._run, program, before)

    def _run(self, program: str, before: str) -> str:
        assert self.runner is not None
        printed = self.runner(program, self.rules.tool_seconds).strip("\n").replace(FENCE, "'''") or SILENT
        opening = f"{FENCE}output\n" if before.endswith("\n") else f"\n{FENCE}output\n"
        return self._cut(opening, printed, f"\n{FENCE}\n")

    def recalculate(self, text: str) -> str:
        """The calculator's report on a step's text: one line."""
        found = corrections(text)
        said = NOTHING_TO_CHECK if found is None else " ".join(found) or ALL_RIGHT
        return self._cut(" ", said, "\n")

    def _cut(self, opening: str, text: str, closing: str) -> str:
        """``text`` in its frame, as much of it as may be shown; nothing where not even the frame has room."""
        shown = len(text) if len(text) <= self.rules.tool_chars else self.rules.tool_chars
        while True:
            whole = opening + (text if shown == len(text) else text[:shown] + _CUT) + closing
            if self.count(whole) <= self.rules.tool_tokens:
                return whole
            if shown == 0:
                return ""
            shown = shown * 9 // 10
