"""Steps that act, in a rollout: programs that run while others sample, and what is injected of them."""

from __future__ import annotations

from concurrent.futures import Future

from rsim.game.episode import Episode
from rsim.game.tools import Runner, Tools
from rsim.policies.reasoner import Reasoner
from rsim.rules import Move, PlayRules


class Acts:
    """The tools of one rollout, whose episodes lie in slots."""

    def __init__(self, reasoner: Reasoner, runner: Runner | None, rules: PlayRules) -> None:
        self.ids = reasoner.injected_ids
        self.tools = Tools(runner, rules, lambda text: len(self.ids(text)))
        self.outputs: dict[int, Future[str]] = {}

    def report(self, move: Move, episode: Episode) -> tuple[list[int], str]:
        """What a tool says before the step begins, as ids and as text."""
        if move.tool != "calculator":
            return [], ""
        report = self.tools.recalculate(episode.steps[-1].text if episode.steps else "")
        return self.ids(report), report

    def start(self, slot: int, program: str, episode: Episode) -> None:
        """Lets the program run that the last step of the episode in ``slot`` wrote."""
        self.outputs[slot] = self.tools.start(program, episode.steps[-1].text)

    def finish(self, slot: int, episode: Episode) -> int:
        """Waits for the program in ``slot`` and injects its output; returns how much the step has sampled."""
        step = episode.steps[-1]
        sampled = step.end - step.body
        step.output, step.before = self.outputs.pop(slot).result(), len(step.text)
        episode.inject(self.ids(step.output))
        step.end = len(episode.token_ids)
        return sampled
