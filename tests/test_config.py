from __future__ import annotations

import dataclasses
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsim.config import Config, load_config, presets, to_toml
from rsim.errors import UserError
from rsim.settings import to_table


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_survive_a_round_trip(name, tmp_path):
    config = load_config(name)
    file = tmp_path / "again.toml"
    file.write_text(to_toml(config))
    assert load_config(str(file)) == config
    assert tomllib.loads(to_toml(config)) == to_table(config)


@given(
    st.text(),
    st.floats(0.01, 10),
    st.integers(0, 10**9),
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), max_size=3),
)
def test_any_value_survives_a_round_trip(text, temperature, seed, trackers):
    text = "".join(c for c in text if c.isprintable() or c in "\n\t")
    table = {"name": text, "seed": seed, "rollout": {"temperature": temperature}, "train": {"trackers": trackers}}
    from rsim.config import from_table

    config = from_table(Config, table, "")
    assert from_table(Config, tomllib.loads(to_toml(config)), "") == config


def test_overrides():
    config = load_config("nano", ["train.steps=2", "stages.stage1.lambda=0.5", "stages.1.steps=7", "name=x", 'train.trackers=["wandb"]',
                                  "rollout.delimiter=\"\\n\\n\"", "rewards.penalty=0"])  # fmt: skip
    assert config.train.steps == 2
    assert config.stages[0].lambda_ == 0.5
    assert config.stages[1].steps == 7
    assert config.name == "x"
    assert config.train.trackers == ("wandb",)
    assert config.rollout.delimiter == "\n\n"
    assert config.rewards.penalty == 0.0


@pytest.mark.parametrize(("override", "message"), [
    ("train.stesp=2", "train.stesp"), ("trian.steps=2", "trian"), ("train.steps", "key=value"), ("train.steps=two", "train.steps"),
    ("train.steps=2.5", "train.steps"), ("train=5", "train"), ("train.steps.deep=1", "train.steps must be int"), ("train.questions=0", "train.questions"),
    ("train.group=1", "train.group"), ("objective.loss=reinforce", "objective.loss"), ("stages.third.steps=1", "third"),
    ("stages.0.lambda=1.5", "lambda"), ("stages=3", "stages"), ("rollout.temperature=0", "temperature"),
    ("rollout.max_tokens=10", "max_tokens"), ("rollout.delimiter=\"\"", "delimiter"), ("train.minibatches=64", "minibatches"),
    ("train.warmup=-1", "warmup"), ("train.grad_clip=0", "inf turns clipping off"), ("train.planner_lr=-1", "planner_lr"),
    ("cold_start.epochs=0", "epochs"), ("cold_start.keep=0", "keep"), ("data.train_size=-1", "train_size"),
    ("objective.clip_low=-0.1", "clip_low"), ("seed=true", "seed"), ("rewards.custom=x", "rewards.custom"),
    ("objective.importance_level=sequence", "set objective.importance_cap"), ("train.value_lr=1e-3", "has no value head"),
    ("train.schedule=step", "constant, linear, cosine"),
])  # fmt: skip
def test_bad_overrides_are_named(override, message):
    with pytest.raises(UserError, match=message):
        load_config("nano", [override])


def test_every_key_says_what_it_means_and_explaining_changes_nothing(tmp_path):
    def check(table, where):
        for f in dataclasses.fields(table):
            value = getattr(table, f.name)
            if dataclasses.is_dataclass(value):
                check(value, f"{where}{f.name}.")
            elif f.name != "stages":
                assert f.metadata["help"], where + f.name

    config = load_config("nano")
    check(config, "")
    check(config.stages[0], "stages.")
    explained = to_toml(config, explain=True)
    assert "# episodes per question\ngroup = 8\n" in explained
    (tmp_path / "explained.toml").write_text(explained)
    assert load_config(str(tmp_path / "explained.toml")) == config


@pytest.mark.parametrize(("override", "remedy"), [
    ("train.group=1", "must be at least 2"), ("data.replay_share=1", "must lie between 0 and 1"),
    ("rollout.gate=1.5", "is a probability: from 0 (off) to 1"), ("objective.clip_low=1", "must lie between 0 and 1"),
    ("train.grad_clip=0", "must be above 0; inf turns clipping off"), ("models.planner_lora=-1", "is a rank: 0 (no adapter) or more"),
    ("stages.stage2.steps=-1", "must be at least 0"), ("train.planner_lr=nan", "must be a finite number"),
    # What was ignored in silence: KL and entropy below 0; what ended in a traceback: nothing kept to learn from.
    ("objective.beta=-0.1", "must be at least 0"), ("objective.planner_entropy=-1", "must be at least 0"),
    ("objective.gae_lambda=7", "must lie between 0 and 1"), ("cold_start.minimum=0", "must be at least 1"),
    ("rewards.penalty_cap=-0.2", "must be at least 0"),  # a bonus for everyone
])  # fmt: skip
def test_a_value_out_of_its_bounds_is_told_them(override, remedy):
    with pytest.raises(UserError) as refused:
        load_config("nano", [override])
    assert override.split("=")[0] in str(refused.value)
    assert refused.value.remedy == remedy


def test_bad_sources(tmp_path):
    with pytest.raises(UserError, match="no preset or config file"):
        load_config("nanoo")
    file = tmp_path / "bad.toml"
    file.write_text("a = [")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(str(file))


@pytest.mark.parametrize(("overrides", "said"), [
    (["models.planner=none", "stages.stage1.train_reasoner=false"], "stages.stage1 trains nothing"),
    (["train.steps=5", "stages.stage1.steps=0", "stages.stage2.steps=0"], "train.steps = 5: stages share them"),
    (["objective.loss=ppo", "objective.scale_by_std=true"], "objective.scale_by_std: ppo's advantages"),
    (["objective.beta=0.1", "cold_start.episodes=0", *(f"stages.{i}.train_reasoner=false" for i in (0, 1))], "objective.beta = 0.1"),
    (["models.reasoner_lora=8", "cold_start.episodes=0", *(f"stages.{i}.train_reasoner=false" for i in (0, 1))], "models.reasoner_lora = 8"),
    (["data.replay_share=0.5"], "data.replay_share = 0.5: name earlier tasks"),
    (["seed=99999999999999999999"], "seed = 99999999999999999999: must lie between"),
])  # fmt: skip
def test_what_would_have_no_effect_is_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        load_config("nano", overrides)


def test_no_replay_may_be_said_outright():
    assert load_config("nano", ["data.replay_share=0"]).data.replay_share == 0


def test_the_usual_stages_can_be_overridden_where_a_file_names_none():
    config = load_config({"stages.stage1.steps": 5, "stages.1.lambda": 0.4})
    assert [(s.steps, s.lambda_) for s in config.stages] == [(5, 0.7), (100, 0.4)]
    with pytest.raises(UserError, match="no entry 'stage3'"):
        load_config({"stages.stage3.steps": 5})


def test_a_stage_that_trains_nothing_is_refused(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[[stages]]\nname = "s"\nsteps = 1\ntrain_planner = false\ntrain_reasoner = false\n')
    with pytest.raises(UserError, match="trains nothing"):
        load_config(str(file))
