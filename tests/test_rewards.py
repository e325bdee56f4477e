"""Rewards: each part, when it pays, and that nothing but sampled text of the final step counts as an answer."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest

from rsim.config import RewardsConfig
from rsim.errors import UserError
from rsim.game.episode import Episode, Step
from rsim.game.problem import Problem
from rsim.policies.protocol import Decision
from rsim.rewards.code import run_answer
from rsim.rewards.custom import load_custom
from rsim.rewards.grade import grade
from rsim.rewards.programs import run_program
from rsim.rewards.rewards import repeats, score
from rsim.rewards.symbolic import SymbolicPool


def episode(strategies, steps, gold="5", *, forced=False, truncated=False, terminated=True) -> Episode:
    """``steps`` are ``(strategy name, sampled text)``."""
    indices = [strategies.index(name) for name, _ in steps]
    decided = indices[:-1] if forced else indices
    return Episode(
        Problem("2+3=?", gold), 0, [1] * 10, 2, [0, 0] + [1] * 8, [0.0] * 10,
        decisions=[Decision(i, a, -1.0, []) for i, a in enumerate(decided)],
        steps=[Step(i, 0, 0, 0, text) for i, (_, text) in zip(indices, steps, strict=True)],
        forced=forced, truncated=truncated, terminated=terminated and not forced,
    )  # fmt: skip


def test_a_right_answer_pays_everything(lab_strategies):
    s = score(
        episode(lab_strategies, [("validation", " check 2+3=5 ok"), ("termination", " \\boxed{5}")]),
        lab_strategies,
        RewardsConfig(),
    )
    assert s.correct
    assert s.parts == {"accuracy": 1.0, "format": 0.1, "follow": 0.1, "terminal": 0.1, "penalty": 0.0}
    assert s.planner == pytest.approx(1.1)
    assert s.reasoner == pytest.approx(1.2)


def test_a_wrong_answer_still_pays_for_its_form(lab_strategies):
    s = score(episode(lab_strategies, [("validation", " hm"), ("termination", " \\boxed{6}")]), lab_strategies, RewardsConfig())
    assert not s.correct
    assert s.predicted == "6"
    assert s.parts["format"] == 0.1
    assert s.parts["follow"] == pytest.approx(0.05), "one of two steps shows its strategy"


@pytest.mark.parametrize(("opened", "text", "predicted"), [
    ("\\boxed{", "5}.", "5"),
    ("\\boxed{", "5} or \\boxed{6}", None),  # two boxes
    ("\\boxed{", "\\boxed{5}", "5"),  # it opens its own
    ("\\boxed{", "5", None),  # never closed
    ("\\boxed{", "The answer is $\\boxed{5}$.", "5"),
    ("\\boxed{", "5 \\boxed{5} or \\boxed{6}", None),
    ("\\boxed{", "}", None),
    ("```python\n", "def f():\n    return 5\n```", "def f():\n    return 5\n"),
    ("```python\n", "```python\ndef f():\n    return 5\n```\nDone.", "def f():\n    return 5\n"),
    ("```python\n", "Here it is:\n```python\ndef f():\n    return 5\n```", "def f():\n    return 5\n"),
    ("```python\n", "def f():\n    return 5", "def f():\n    return 5\n"),  # the end of the turn ends the block
    ("```python\n", "def f():\n    return 5\n```\n```python\ndef f():\n    return 6\n```", None),  # two blocks
    ("```python\n", " ", None),
])  # fmt: skip
def test_a_prompt_may_open_the_box_that_the_answer_is_written_into(lab_strategies, opened, text, predicted):
    played = episode(lab_strategies, [("validation", " check"), ("termination", text)])
    played.steps[-1].answer_prefix = opened
    played.problem = replace(played.problem, kind="code" if "`" in opened else "numeric")
    s = score(played, lab_strategies, RewardsConfig(unsafe_code=True))
    assert s.predicted == predicted
    assert s.correct == (predicted is not None)
    assert (s.parts["format"] > 0) == (predicted is not None)


def test_a_box_that_was_opened_before_the_final_step_is_no_answer(lab_strategies):
    """The reasoner ended its turn in an ordinary step: nothing was opened for it."""
    played = episode(lab_strategies, [("validation", " 5}")], terminated=False)
    assert score(played, lab_strategies, RewardsConfig()).predicted is None


@pytest.mark.parametrize("steps", [
    [("validation", " check 5"), ("termination", " 5")],  # the right number, but in no box
    [("validation", " check \\boxed{5}"), ("termination", " done")],  # a box, but not in the final step
    [("validation", " check"), ("termination", " \\boxed{5} \\boxed{5}")],  # two boxes
    [("validation", " check"), ("termination", " \\boxed{}")],
])  # fmt: skip
def test_without_an_answer_nothing_pays(lab_strategies, steps):
    s = score(episode(lab_strategies, steps), lab_strategies, RewardsConfig())
    assert s.predicted is None
    assert not s.correct
    assert s.planner == s.reasoner == 0


def test_the_answer_is_not_found_in_the_injected_prompt(lab_strategies):
    e = episode(lab_strategies, [("termination", " I do not know")])
    e.problem = Problem("q", "5")
    assert not score(e, lab_strategies, RewardsConfig()).correct
    assert all("\\boxed{5" not in p for s in lab_strategies.strategies for p in s.prompts)


def test_truncated_and_forced_episodes(lab_strategies):
    steps = [("validation", " check"), ("termination", " \\boxed{5}")]
    cut = score(episode(lab_strategies, steps, truncated=True), lab_strategies, RewardsConfig())
    assert not cut.correct
    assert cut.reasoner == 0
    forced = score(episode(lab_strategies, steps, forced=True), lab_strategies, RewardsConfig())
    assert forced.correct
    assert forced.parts["terminal"] == 0
    assert forced.parts["accuracy"] == 1


def test_repeats_beyond_the_allowance_and_the_cap(lab_strategies):
    five = episode(lab_strategies, [("validation", " check")] * 5 + [("termination", " \\boxed{5}")])
    assert repeats(five, lab_strategies, 2) == 3
    assert score(five, lab_strategies, RewardsConfig()).parts["penalty"] == pytest.approx(-0.15)
    nine = episode(lab_strategies, [("validation", " check")] * 9 + [("termination", " \\boxed{5}")])
    assert score(nine, lab_strategies, RewardsConfig()).parts["penalty"] == pytest.approx(-0.2)
    free = episode(lab_strategies, [("continuation", " next")] * 5 + [("termination", " \\boxed{5}")])
    assert repeats(free, lab_strategies, 2) == 0


def test_continuation_is_left_out_of_follow(lab_strategies):
    e = episode(lab_strategies, [("continuation", " whatever"), ("termination", " \\boxed{5}")])
    assert score(e, lab_strategies, RewardsConfig()).parts["follow"] == pytest.approx(0.1)


def test_every_part_can_be_switched_off(lab_strategies):
    e = episode(lab_strategies, [("validation", " check")] * 5 + [("termination", " \\boxed{5}")])
    off = RewardsConfig(accuracy=0, format=0, follow=0, terminal=0, penalty=0)
    s = score(e, lab_strategies, off)
    assert s.planner == s.reasoner == 0
    for part in ("accuracy", "format", "follow", "terminal", "penalty"):
        assert score(e, lab_strategies, RewardsConfig(**{part: 0})).parts[part] == 0


def test_custom_rewards_are_loaded_and_added(lab_strategies, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def short(episode):\n    return 0.5 if len(episode.steps) == 1 else 0.0\n")
    custom = load_custom((f"{file}:short",))
    s = score(episode(lab_strategies, [("termination", " \\boxed{5}")]), lab_strategies, RewardsConfig(), custom)
    assert s.parts["short"] == 0.5
    assert s.planner == pytest.approx(1.6)
    for spec in ("nothing.py:f", f"{file}:missing", str(file)):
        with pytest.raises(UserError):
            load_custom((spec,))
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Own:\n    weight: float = 0.5\n"
        "def own(episode):\n    return Own().weight\n"
    )
    assert load_custom((f"{file}:own",))["own"](None) == 0.5
    file.write_text("def accuracy(episode):\n    return 1.0\ndef short(episode):\n    return 0.0\n")
    for specs in ((f"{file}:accuracy",), (f"{file}:short", f"{file}:short")):
        with pytest.raises(UserError, match="is taken"):
            load_custom(specs)


def test_failures_of_the_checker_are_reported_and_many_are_scored_at_once(lab_strategies):
    from rsim.rewards.rewards import score_all

    episodes = []
    for answer in ("x+1", "1+x", "y", "(" * 30_000):
        e = episode(lab_strategies, [("termination", f" \\boxed{{{answer}}}")], gold="1+x")
        e.problem = replace(e.problem, kind="latex")
        episodes.append(e)
    scores = score_all(episodes, lab_strategies, RewardsConfig())
    assert [s.correct for s in scores] == [True, True, False, False]
    assert [s.failure for s in scores] == ["", "", "", "too long"]


def test_injected_tokens_are_what_lies_behind_the_prompt_and_was_not_sampled(lab_strategies):
    played = episode(lab_strategies, [("termination", "\\boxed{5}")])
    assert (played.sampled_tokens, played.injected_tokens) == (8, 0)
    played.reasoner_mask = [0] * 5 + [1] * 5
    assert (played.sampled_tokens, played.injected_tokens) == (5, 3)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("B", True),
        ("dog", True),
        ("(B) dog", True),
        ("A", False),
        ("cat", False),
        ("banana", False),
        ("B or A", False),
        ("", False),
    ],
)
def test_a_choice_is_a_letter_or_the_words_of_its_option(said, right):
    asked = Problem("Which barks?", "B", kind="choice", meta={"options": ["cat", "dog"]})
    assert grade(asked, said).right is right


@pytest.mark.parametrize(
    ("said", "right"), [("5", True), ("5 million", True), ("5000000", True), ("6", False), ("5 thousand", False)]
)
def test_an_amount_may_be_told_in_the_questions_scale(said, right):
    assert grade(Problem("In millions?", "5", meta={"scale": "million"}), said).right is right


def test_programs_are_never_run_unprotected_unasked():
    """Whoever forgets to say so gets the sandbox."""
    for function in (grade, run_answer, run_program, SymbolicPool.gym_mark):
        assert inspect.signature(function).parameters["unsafe"].default is False, function


def test_the_config_may_override_the_kind(lab_strategies):
    e = episode(lab_strategies, [("termination", " \\boxed{5 eggs}")])
    assert score(e, lab_strategies, RewardsConfig()).correct
    assert not score(e, lab_strategies, RewardsConfig(checker="text")).correct


def test_without_planner_only_accuracy_and_format(lab_strategies):
    e = episode(lab_strategies, [("termination", "2+3=5 \\boxed{5}")])
    e.steps[0].strategy, e.decisions, e.terminated = -1, [], False
    s = score(e, None, RewardsConfig())
    assert s.reasoner == pytest.approx(1.1)
    assert s.parts["follow"] == s.parts["terminal"] == s.parts["penalty"] == 0


@pytest.mark.parametrize("steps", [
    [("validation", " \n"), ("termination", " \\boxed{5}")],  # a step that says nothing
    [("validation", " so \\boxed{5}"), ("termination", " \\boxed{5}")],  # a box before the final step
])  # fmt: skip
def test_a_right_answer_in_bad_form_is_right_and_no_more(lab_strategies, steps):
    s = score(episode(lab_strategies, steps), lab_strategies, RewardsConfig())
    assert s.correct
    assert s.parts["format"] == 0
    assert s.parts["terminal"] == 0.1
