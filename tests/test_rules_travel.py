"""The rules that a planner was trained under are saved with it and obeyed wherever it is plugged in."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from rsim.config import RolloutConfig, load_config
from rsim.errors import UserError
from rsim.evaluation.obeyed import rules_for
from rsim.policies.loading import load_planner
from rsim.policies.planner import Planner
from rsim.policies.scripted import random_planner
from rsim.rules import PlayRules
from rsim.rules_file import overridden
from rsim.serving.card import hub_folder
from rsim.serving.wrap import wrap
from rsim.training.trainer import Trainer

RULES = PlayRules(max_steps=2, step_tokens=9, max_tokens=60, answer_tokens=7, delimiter="\n", paraphrase="first")


@pytest.fixture
def saved(planner, tmp_path):
    planner.rules = RULES
    planner.save_pretrained(tmp_path / "planner")
    return tmp_path / "planner"


def test_a_saved_planner_brings_its_rules(saved, lab_strategies):
    assert Planner.from_pretrained(saved).rules == RULES
    assert load_planner(str(saved), lab_strategies, seed=0).rules == RULES


def test_an_older_folder_warns_in_one_line_and_says_what_is_assumed(saved, caplog):
    (saved / "rules.toml").unlink()
    with caplog.at_level(logging.WARNING, logger="rsim"):
        assert Planner.from_pretrained(saved).rules is None
    (record,) = caplog.records
    said = record.getMessage()
    assert "\n" not in said
    assert all(word in said for word in ("rules.toml", "max_steps = 8", r"delimiter = '\n\n'"))


def test_a_damaged_file_of_rules_is_refused_by_name(saved):
    (saved / "rules.toml").write_text("max_step = 2\n")
    with pytest.raises(UserError, match=r"rules\.toml.*max_step"):
        Planner.from_pretrained(saved)


def test_wrap_plays_by_them_unless_told_otherwise(saved, reasoner):
    planner = Planner.from_pretrained(saved)
    for options, rules in (
        ({}, RULES),
        ({"max_steps": 5}, replace(RULES, max_steps=5)),
        ({"rules": PlayRules()}, PlayRules()),
        ({"rules": PlayRules(), "gate": 0.5}, PlayRules(gate=0.5)),
    ):
        with wrap(planner, reasoner.model, reasoner.tokenizer, **options) as planned:
            assert planned.rules == rules
    with pytest.raises(UserError, match="no rule 'steps'"):
        wrap(planner, reasoner.model, reasoner.tokenizer, steps=3)
    with pytest.raises(UserError, match="max_steps = 0"):
        wrap(planner, reasoner.model, reasoner.tokenizer, max_steps=0)


def test_evaluation_obeys_them_and_what_is_stated_goes_first(saved, lab_strategies):
    planner, rollout = Planner.from_pretrained(saved), RolloutConfig(max_steps=7, temperature=0.5)
    assert overridden(rules_for(rollout, planner)) == RULES
    assert rules_for(rollout, planner).temperature == 0.5
    stated = rules_for(rollout, planner, ["rollout.max_steps=7", "train.steps=3"])
    assert overridden(stated) == replace(RULES, max_steps=7)
    assert rules_for(rollout, random_planner(lab_strategies)) == rollout
    assert rules_for(rollout, None) == rollout


def test_training_saves_its_own_and_a_pushed_planner_has_them(small, tmp_path):
    config = small("run", "train.steps=1")
    Trainer(config).run()
    folder = hub_folder(str(config.folder), tmp_path / "pushed", repo="me/planner", licence="apache-2.0")
    for place in (config.folder / "checkpoints" / "final" / "planner", folder):
        assert Planner.from_pretrained(place).rules == overridden(config.rollout)
    assert overridden(config.rollout) != overridden(load_config().rollout)
