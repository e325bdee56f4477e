"""The training loop on tiny random models: stages, records, checkpoints, resume, cold start."""

from __future__ import annotations

import json
import re
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rsim
from rsim.config import Config, load_config
from rsim.errors import UserError
from rsim.game.episode import Episode
from rsim.game.problem import Problem
from rsim.policies.loading import load_reasoner
from rsim.reporting.report import build_report
from rsim.rewards.rewards import Score
from rsim.training.cold_start import cold_start
from rsim.training.questions import affordable, leaked
from rsim.training.trainer import Trainer, questions_of_step
from tiny import metrics_of


def weights_of(config: Config, agent: str) -> dict[str, torch.Tensor]:
    kind = AutoModelForCausalLM if agent == "reasoner" else AutoModelForSequenceClassification
    return kind.from_pretrained(config.folder / "checkpoints" / "final" / agent).state_dict()


def same_weights(a: Config, b: Config) -> bool:
    pairs = [(weights_of(a, agent), weights_of(b, agent)) for agent in ("planner", "reasoner")]
    return all(one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one) for one, other in pairs)


def test_long_questions_are_left_out_and_counted(small):
    """The longest allowed is trained on; evaluation asks all."""
    everything = Trainer(small("all"))
    tokenizer = everything.reasoner.tokenizer
    lengths = sorted(len(tokenizer.encode(p.question)) for p in everything.train_set)
    longest = lengths[len(lengths) // 2]
    trainer = Trainer(small("short", f"data.max_question_tokens={longest}"))
    kept = [len(tokenizer.encode(p.question)) for p in trainer.train_set]
    assert max(kept) == longest
    assert len(kept) + trainer.left_out == len(lengths)
    assert trainer.left_out == sum(n > longest for n in lengths) > 0
    assert trainer.eval_set == everything.eval_set
    trainer.run()
    assert metrics_of(trainer.config)[0]["data/left_out"] == trainer.left_out
    with pytest.raises(UserError, match="the data has 0 questions"):
        Trainer(small("none", "data.max_question_tokens=1"))


def test_a_gate_is_for_finished_planners(small):
    with pytest.raises(UserError, match=r"rollout\.gate"):
        Trainer(small("gated", "rollout.gate=0.5"))


def test_a_run_leaves_everything_behind(small):
    config = small("run", 'train.trackers=["tensorboard"]', "checkpoint.save_every=1")
    result = rsim.train(config)
    assert 0 <= result["accuracy"] <= 1
    records = metrics_of(config)
    steps = [r for r in records if "accuracy" in r]
    assert [(r["step"], r["stage"], r["lambda"]) for r in steps] == [
        (1, "stage1", 0.7),
        (2, "stage1", 0.7),
        (3, "stage2", 0.3),
        (4, "stage2", 0.3),
    ]
    assert [r["step"] for r in records if "eval/accuracy" in r] == [0, 2, 4]
    for record in steps:
        for agent in ("planner", "reasoner"):
            for name in (
                "ratio",
                "sampler_kl",
                "clip_fraction",
                "entropy",
                "kl",
                "loss",
                "grad_norm",
                "skipped_groups",
                "alike_groups",
                "return",
                "learning_rate",
            ):
                assert f"{agent}/{name}" in record, (agent, name)
        assert record["reasoner/ratio"] == pytest.approx(1, abs=1e-4)
        assert sum(v for k, v in record.items() if k.startswith("strategy/")) == pytest.approx(1)
    assert steps[0]["planner/learning_rate"] == pytest.approx(4.2e-3)
    assert steps[-1]["planner/learning_rate"] == pytest.approx(1.8e-3)
    folder = config.folder
    provenance = json.loads((folder / "run.json").read_text())
    assert provenance["seed"] == 0
    assert {"torch", "transformers", "python"} <= set(provenance["versions"])
    assert load_config(str(folder / "config.toml")) == config
    assert (folder / "tensorboard").is_dir()
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best", "final", "step-000003", "step-000004"}
    assert weights_of(config, "planner")["score.weight"].shape[0] == 9
    episodes = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    assert len([e for e in episodes if "held_out" not in e]) == 16
    asked = [e["question"] for e in episodes if "held_out" in e]
    assert len(asked) == 3 * 6, "each evaluation asks the same questions"
    assert len(set(asked)) == 6
    assert all(s["prompt"] for e in episodes for s in e["steps"])
    page = build_report(folder).read_text()
    assert "stage2" in page
    assert not re.search(r"(src|href)=", page), "it stands alone"


def test_the_same_seed_gives_the_same_run_and_another_does_not(small):
    a, b, c = small("a"), small("b"), small("c", "seed=1")
    for config in (a, b, c):
        rsim.train(config)
    assert metrics_of(a) == metrics_of(b) != metrics_of(c)
    assert same_weights(a, b)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["objective.beta=0.05"],
        ["objective.update_order=leader_first"],
        ["objective.loss=ppo", "train.value_lr=5e-3", "train.schedule=cosine", "train.warmup=1"],
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(small, extra):
    """Interrupted in the middle of stage 1, of stage 2 and between them."""
    whole, parts = small("whole", *extra), small("parts", *extra)
    rsim.train(whole)
    for step in range(3):
        trainer = Trainer(parts, resume=step > 0)
        assert trainer.step == step

        def stop(record, trainer=trainer):
            trainer.stop_requested = "reward/accuracy" in record or trainer.stop_requested

        trainer.on_metrics = stop
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    rsim.train(parts, resume=True)
    assert metrics_of(parts) == metrics_of(whole)
    assert same_weights(parts, whole)


def test_resume_drops_what_came_after_the_checkpoint(small):
    whole, torn = small("whole", "checkpoint.save_every=2"), small("torn", "checkpoint.save_every=2")
    rsim.train(whole)
    trainer = Trainer(torn)
    trainer._start()
    for _ in range(3):  # the third step is recorded but never saved
        trainer.train_step()
        if trainer.step == 2:
            trainer.evaluate()
            trainer.save("step-000002")
    rsim.train(torn, resume=True)
    assert metrics_of(torn) == metrics_of(whole)
    assert same_weights(torn, whole)


def test_run_folders_are_not_overwritten_and_not_resumed_blindly(small):
    config = small("run", "train.steps=1")
    with pytest.raises(UserError, match="no run in"):
        Trainer(config, resume=True)
    rsim.train(config)
    with pytest.raises(UserError, match="already holds a run"):
        Trainer(config)
    with pytest.raises(UserError, match="config differs"):
        Trainer(replace(config, seed=5), resume=True)
    moved = Path(config.out).rename(Path(config.out).with_name("moved"))
    assert Trainer(replace(config, out=str(moved)), resume=True).step == 1, "where a run lies is no setting of it"


def test_other_questions_are_noticed_on_resume(small, tmp_path):
    """A run draws its questions by their places: with others it would go on with what it was never meant to see."""
    file = tmp_path / "q.jsonl"
    lines = [json.dumps({"question": f"{i}+1=?", "answer": str(i + 1)}) for i in range(8)]
    file.write_text("\n".join(lines))
    config = small("run", "train.steps=1", f"data.train={file}")
    rsim.train(config)
    file.write_text("\n".join(lines[1:] + lines[:1]))
    with pytest.raises(UserError, match="training questions are not those of the run"):
        Trainer(config, resume=True)
    assert Trainer(config, resume=True, force=True).step == 1
    file.write_text("\n".join(lines))
    assert Trainer(config, resume=True).step == 1


def test_a_start_that_failed_leaves_the_folder_free(small):
    """The context limit is met only when the first question is asked, after the folder was made."""
    with pytest.raises(UserError, match="context"):
        rsim.train(small("run", "rollout.max_tokens=9000"))
    with pytest.raises(UserError, match="no checkpoint yet"):
        rsim.train(small("run", "rollout.max_tokens=9000"), resume=True)
    config = small("run", "train.steps=1")
    rsim.train(config)
    assert [r["step"] for r in metrics_of(config)] == [0, 1, 1]


def test_train_steps_and_token_budget_bound_the_run(small):
    config = small("steps", "train.steps=3")
    rsim.train(config)
    assert metrics_of(config)[-1]["step"] == 3
    config = small("budget", "train.token_budget=1", "train.eval_every=0")
    rsim.train(config)
    assert [r["step"] for r in metrics_of(config) if "accuracy" in r] == [1]


def test_a_token_budget_is_met_closely_and_by_no_tiny_step(small):
    """Arms are compared at equal tokens: a last whole step went beyond the budget by up to a step."""
    whole = small("whole", "train.steps=3", "train.questions=8", "train.eval_every=0")
    rsim.train(whole)
    budget = int(0.9 * [r for r in metrics_of(whole) if "accuracy" in r][-1]["sampled_tokens"])
    config = small("budget", f"train.token_budget={budget}", "train.questions=8", "train.eval_every=0", "train.steps=9")
    rsim.train(config)
    steps = [r for r in metrics_of(config) if "accuracy" in r]
    assert len(steps) == 3
    assert steps[-1]["sampled_tokens"] == pytest.approx(budget, rel=0.1)


@pytest.mark.parametrize(
    ("sampled", "questions"), [(0, 32), (100, 24), (32 * 90, 10), (32 * 70, 30), (32 * 99, 0), (32 * 100, 0), (9999, 0)]
)
def test_the_steps_left_share_the_budget_evenly(sampled, questions):
    train = replace(load_config("nano").train, token_budget=32 * 100)
    assert affordable(train, sampled, a_question=32.0 if sampled else 0.0, at_least=1) == questions
    assert affordable(replace(train, token_budget=0), sampled, a_question=32.0, at_least=1) == 32
    assert affordable(train, 32 * 98, a_question=32.0, at_least=4) == 4, "every rank plays a question"


def test_without_planner_the_reasoner_trains_alone(small):
    config = small("alone", 'models.planner="none"', "stages.stage1.lambda=0.7")
    rsim.train(config)
    steps = [r for r in metrics_of(config) if "accuracy" in r]
    assert not any(k.startswith(("planner/", "strategy/")) for k in steps[0])
    assert steps[0]["reasoner/learning_rate"] == pytest.approx(1e-3), "the plain rate: lambda plays no part"
    assert not (config.folder / "checkpoints" / "final" / "planner").exists()


def test_gradient_checkpointing_changes_no_number(small):
    plain, switched = small("plain"), small("switched", "train.gradient_checkpointing=true")
    rsim.train(plain)
    rsim.train(switched)
    for a, b in zip(metrics_of(plain), metrics_of(switched), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value == (pytest.approx(b[name], rel=1e-3, abs=1e-5) if isinstance(value, float) else b[name]), name


@pytest.mark.parametrize(("frozen", "moving"), [("reasoner", "planner"), ("planner", "reasoner")])
def test_a_stage_may_freeze_an_agent(small, base_folder, lab_strategies, frozen, moving):
    from rsim.policies.loading import load_planner

    config = small("run", f"stages.stage1.train_{frozen}=false", f"stages.stage2.train_{frozen}=false")
    start = {"reasoner": load_reasoner(str(base_folder)).model.state_dict(),
             "planner": load_planner(str(base_folder), lab_strategies, seed=0).model.state_dict()}  # fmt: skip
    rsim.train(config)
    changed = {a: any(not torch.equal(start[a][k], v) for k, v in weights_of(config, a).items()) for a in start}
    assert changed == {frozen: False, moving: True}


@pytest.mark.parametrize("teach", ["format", "prompts", "strategies"])
def test_strategy_labelled_fine_tuning_learns_the_prompts(small, lab_strategies, monkeypatch, teach):
    """Only the control keeps right episodes; it and ``prompts`` put their loss on the prompts and the end of the turn too."""
    from rsim.data.load import load_problems
    from rsim.training import cold_start as module

    config = small("run", "cold_start.episodes=24", "cold_start.minimum=1", "cold_start.epochs=8", "train.questions=2",
                   "cold_start.learning_rate=1e-2", f"cold_start.teach={teach}", "rollout.max_tokens=64")  # fmt: skip
    reasoner = load_reasoner(config.models.reasoner)
    seen = {}

    def scored(episodes, *args):
        seen["all"] = episodes
        return [Score("1", i % 2 == 0, 0.0, 0.0, {}) for i, _ in enumerate(episodes)]

    kept: list[Episode] = []
    fine_tune = module._fine_tune
    monkeypatch.setattr(module, "score_all", scored)
    monkeypatch.setattr(module, "well_formatted", lambda episode: True)
    monkeypatch.setattr(module, "_fine_tune", lambda c, a, e: (kept.extend(e), fine_tune(c, a, e))[1])

    def prompt_logprob() -> float:
        values = []
        for e in seen["all"]:
            with torch.no_grad():
                table = torch.log_softmax(reasoner.model(torch.tensor([e.token_ids])).logits[0], -1)
            values += [float(table[s.start - 1, e.token_ids[s.start]]) for s in e.steps]
        return sum(values) / len(values)

    problems = load_problems("lab", "train", limit=20, seed=0)
    before_model = {k: v.clone() for k, v in reasoner.model.state_dict().items()}
    cold_start(config, reasoner, problems, {})
    after = prompt_logprob()
    reasoner.model.load_state_dict(before_model)
    gain = after - prompt_logprob()
    ends = reasoner.end_ids
    if teach != "format":
        assert gain > 1
        assert all(e.token_ids[-1] in ends and all(e.reasoner_mask[e.prompt_length :]) for e in kept)
        assert len(kept) == 12
    else:
        assert gain < 1
        assert any(not all(e.reasoner_mask[e.prompt_length :]) for e in kept)


def test_a_cold_start_that_takes_the_whole_budget_is_told(small):
    config = small("run", "cold_start.episodes=4", "cold_start.minimum=1", "train.token_budget=3", 'models.reasoner="nano-s"')
    with pytest.raises(UserError, match=r"train\.token_budget = 3: the cold start sampled \d+"):
        Trainer(config).run()


def test_held_out_questions_that_are_trained_on_are_told(small):
    ours, theirs = [Problem("1+1 = ?", "2"), Problem("2+2=?", "4")], [Problem("1+1=?", "2"), Problem("3+3=?", "6")]
    (line,) = leaked(small("run", "data.train=q.jsonl"), ours, theirs)
    assert line.startswith("1 of the 2 held-out questions are trained on too")
    assert leaked(small("run", "data.train=q.jsonl"), ours, theirs[1:]) == []


def test_cold_start_teaches_the_format_without_the_answers(small):
    config = small("cold", "cold_start.episodes=64", "cold_start.minimum=500")
    with pytest.raises(UserError, match=r"cold_start\.minimum = 500"):
        rsim.train(config)
    trained = small("nano-cold", 'models.reasoner="nano-s"', 'models.planner="nano-s"', "cold_start.episodes=64", "cold_start.minimum=4",
                    "cold_start.learning_rate=1e-4", "cold_start.epochs=3", "train.steps=1", "rollout.max_tokens=160", "rollout.step_tokens=48",
                    "rollout.answer_tokens=12", "rollout.max_steps=5")  # fmt: skip
    rsim.train(trained)
    report = next(r for r in metrics_of(trained) if r.get("stage") == "cold_start")
    assert report["cold_start/kept"] >= 4
    assert report["cold_start/loss_after"] < report["cold_start/loss_before"]
    assert 0 < report["cold_start/format_rate"] <= 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_are_used_by_name(small, monkeypatch, name):
    calls: list[tuple] = []
    tracker = types.ModuleType(name)
    tracker.__spec__ = ModuleSpec(name, None)  # it is looked for before the run begins
    tables = []
    tracker.init = lambda **settings: calls.append(("init", settings["project"], settings["config"]["train"]["steps"]))
    tracker.log = lambda record: calls.append(("table" if "table" in record.values() else "log", record["step"]))
    tracker.Table = lambda columns, data: tables.append([dict(zip(columns, row, strict=True)) for row in data]) or "table"
    tracker.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, tracker)
    rsim.train(small("run", f'train.trackers=["{name}"]', "train.steps=1", 'train.project="mine"'))
    in_order = [("init", "mine", 1), ("log", 0), ("table", 0), ("log", 1), ("table", 1), ("log", 1), ("table", 1), ("finish",)]
    assert sorted(calls) == sorted(in_order)
    assert tables[0][0]["step"] == 0
    assert "[termination]" in tables[0][0]["trace"]


def test_impossible_batches_are_refused(small):
    with pytest.raises(UserError, match="has 40 questions"):
        Trainer(small("run", "train.questions=41"))


def test_questions_walk_through_every_epoch_once():
    problems = list(range(10))
    walked = [q for step in range(5) for q in questions_of_step(problems, 0, step, 4)]
    assert sorted(walked[:10]) == problems
    assert sorted(walked[10:]) == problems
    assert walked[:10] != walked[10:]
