"""The best fixed sequence: on games whose best sequence is known, the search finds it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from rsim.config import load_config
from rsim.data.load import load_problems
from rsim.evaluation.search import SequenceSearch, play_sequences
from rsim.game.rollout import Game
from rsim.policies.scripted import sequence_planner

NAMES = ("a", "b", "c", "d", "termination")


def search(worth: Callable[[str], float], longest: int = 6, **other: int) -> tuple[str, list[tuple[str, int]]]:
    """What is found where ``worth`` of a sequence, written as letters, is its accuracy; and every question that was asked."""
    asked: list[tuple[str, int]] = []

    def scores(specs: list[str], count: int) -> list[float]:
        letters = [spec.removeprefix("sequence:").replace("termination", "").replace(",", "") for spec in specs]
        asked.extend((word, count) for word in letters)
        return [worth(word) for word in letters]

    found = SequenceSearch(NAMES, scores, longest, **other).best()
    return found.removeprefix("sequence:").removesuffix("termination").replace(",", ""), asked


@pytest.mark.parametrize("best", ["", "b", "abcd", "ddddda"])
def test_the_one_best_sequence_is_found_at_every_length(best):
    def worth(word: str) -> float:
        return sum(x == y for x, y in zip(word, best, strict=False)) - 0.1 * abs(len(word) - len(best))

    assert search(worth)[0] == best


def test_what_the_beam_has_dropped_is_reached_by_single_changes():
    """ "c" alone is worth nothing, so a beam of one goes on from "a": "ab", and from there by changes to "cb" and "cbd"."""
    ladder = {"ab": 0.5, "cb": 0.7, "cbd": 0.9}
    assert search(lambda word: ladder.get(word, 0.0), width=1)[0] == "cbd"


def test_a_climb_goes_on_from_the_best_sequences_that_are_known():
    ladder = {"ab": 0.5, "cb": 0.7, "cbd": 0.9, "dd": 0.6, "dda": 0.65}

    def scores(specs: list[str], count: int) -> list[float]:
        words = [spec.removeprefix("sequence:").replace("termination", "").replace(",", "") for spec in specs]
        return [ladder.get(word, 0.0) for word in words]

    known = [("a",), ("d", "d"), ("a", "b")]
    assert SequenceSearch(NAMES, scores, 6, starts=2).climb(known) == "sequence:c,b,d,termination"
    assert SequenceSearch(NAMES, scores, 6, starts=1).climb(known) == "sequence:d,d,a,termination"


def test_what_looks_good_on_few_problems_only_is_not_taken():
    """On 60 problems "c" seems best by chance; on 500 it isn't."""

    def scores(specs: list[str], count: int) -> list[float]:
        words = [spec.removesuffix("termination") for spec in specs]
        return [(0.9 if count == 60 else 0.4) if "c," in word else 0.5 * ("a," in word) for word in words]

    assert SequenceSearch(NAMES, scores, longest=2).best() == "sequence:a,termination"


def test_halving_asks_few_problems_of_the_many():
    rng = random.Random(0)
    _, asked = search(lambda word: rng.random(), longest=3, width=8, finalists=2)
    many = [word for word, count in asked if count == 500]
    assert len(many) < len(asked) / 2
    assert max(map(len, many)) == 3


def test_sequences_that_are_played_together_score_as_each_alone(reasoner, lab_strategies):
    """More episodes than slots, so that slots are taken again by other sequences."""
    config = load_config("nano", ["rollout.batch=7", "rollout.max_tokens=80", "rollout.step_tokens=8"])
    problems = load_problems("lab", "dev", limit=4, seed=0)
    specs = [
        "sequence:sub-planning,continuation,termination",
        "sequence:termination",
        "sequence:validation,summarization,termination",
    ]
    asked = []
    played = play_sequences(reasoner, lab_strategies, specs, problems, config)
    for spec, episodes in zip(specs, played, strict=True):
        names = spec.removeprefix("sequence:").split(",")
        alone = Game(reasoner, sequence_planner(lab_strategies, names), config.rollout).play(problems, seed=0, greedy=True)
        assert [e.token_ids for e in episodes] == [e.token_ids for e in alone]
        asked += [lab_strategies.names[s.strategy] for s in episodes[0].steps]
    assert {"sub-planning", "summarization", "termination"} <= set(asked)
