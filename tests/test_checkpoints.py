"""Checkpoints: whole or not there, checked before they are trusted, and the runs that go on from them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rsim
from rsim.cli.main import main
from rsim.errors import UserError
from rsim.lab.tokenizer import build_tokenizer
from rsim.policies.strategies import load_strategies
from rsim.runs.checkpoints import MANIFEST, Checkpoints, step_of, verify
from rsim.runs.locate import locate
from rsim.training.trainer import Trainer
from tiny import metrics_of, stopped_after


def write(text: str):
    def save(path: Path) -> None:
        path.mkdir()
        (path / "model.safetensors").write_text(text)

    return save


def write_tokenizer(path: Path) -> None:
    path.mkdir()
    build_tokenizer().backend_tokenizer.save(str(path / "tokenizer.json"))  # a library with errors of its own


@pytest.fixture
def small(small):
    """A checkpoint after every step."""
    return lambda out, *overrides: small(out, "checkpoint.save_every=1", *overrides)


@pytest.fixture
def folder(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "reasoner" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "planner" / "config.json").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used_when_asked(small, tmp_path, capsys):
    """One run for all kinds of damage: what is refused changes nothing."""
    whole, parts = small("whole", "train.steps=3"), small("parts", "train.steps=3")
    rsim.train(whole)
    stopped_after(parts, 2)
    before, newest = metrics_of(parts), parts.folder / "checkpoints" / "step-000002"
    shutil.copytree(newest, tmp_path / "sound")
    for damage, said in ((truncate, "bytes in place of"), (flip_a_bit, "state.pt differs from its checksum"),
                         (lose_a_file, "planner/config.json is missing"), (lose_the_manifest, "no manifest")):  # fmt: skip
        shutil.rmtree(newest)
        shutil.copytree(tmp_path / "sound", newest)
        damage(newest)
        with pytest.raises(UserError, match=said) as refusal:
            Trainer(parts, resume=True)
        assert "step-000002 is damaged" in str(refusal.value)
        assert refusal.value.remedy.endswith("--resume-from step-000001")
        with pytest.raises(SystemExit, match="2"):
            main(["train", str(parts.folder / "config.toml"), "--resume", "--json"])
        assert "step-000002 is damaged" in capsys.readouterr().err
        assert metrics_of(parts) == before, "a refusal changes nothing"
    with pytest.raises(SystemExit, match="0"):
        main(["train", str(parts.folder / "config.toml"), "--resume-from", "step-000001", "--json"])
    assert metrics_of(parts) == metrics_of(whole)


def test_an_unknown_checkpoint_is_named(small):
    stopped_after(small("run"), 1)
    with pytest.raises(UserError, match=r"no checkpoint 'step-000007'.*step-000000, step-000001"):
        Trainer(small("run"), resume_from="step-000007")


def test_a_changed_config_is_refused_key_by_key_unless_forced(small):
    config = small("run")
    stopped_after(config, 1)
    changed = replace(config, train=replace(config.train, planner_lr=0.5), seed=3)
    with pytest.raises(UserError, match=r"seed: 0 -> 3; train.planner_lr: 0.003 -> 0.5") as refusal:
        Trainer(changed, resume=True)
    assert "--force" in refusal.value.remedy
    assert Trainer(changed, resume=True, force=True).step == 1
    assert "planner_lr = 0.5" in (config.folder / "config.toml").read_text()


def test_what_was_made_for_another_model_or_loss_is_refused_even_when_forced(small):
    config = small("run")
    stopped_after(config, 1)
    for change in ("models.reasoner_lora=4", "objective.loss=ppo", "objective.beta=0.1", "stages.stage1.train_reasoner=false"):
        changed = small("run", change, *(["stages.stage2.train_reasoner=false"] if "train_reasoner" in change else []))
        with pytest.raises(UserError, match="cannot be changed in mid-run"):
            Trainer(changed, resume=True, force=True)
    forced = Trainer(small("run", "train.weight_decay=0.1"), resume=True, force=True)
    assert forced.agents["planner"].optimizer.param_groups[0]["weight_decay"] == 0.1
    kept = json.loads((config.folder / "run.json").read_text())["changed"]
    assert kept == [{"step": 1, "keys": ["train.weight_decay: 0.0 -> 0.1"]}]


def test_going_on_from_an_older_checkpoint_leaves_the_newer_ones_behind(small):
    config = small("run", "checkpoint.keep=9")
    rsim.train(config)
    forced = Trainer(replace(config, seed=7), resume_from="step-000001", force=True)
    names = sorted(p.name for p in (config.folder / "checkpoints").iterdir())
    assert names in (["step-000000", "step-000001"], ["best", "step-000000", "step-000001"])
    assert max(r["step"] for r in metrics_of(config)) == 1
    forced.run()
    assert sorted(p.name for p in (config.folder / "checkpoints").glob("step-*"))[-1] == "step-000004"


def test_a_run_that_goes_on_after_its_end_is_its_newest_checkpoint(small, capsys):
    """The final one is of the shorter run until the longer one has ended. The last evaluation has one form, asked for again too."""
    short = small("run", "train.steps=2", "stages.stage1.steps=1", "stages.stage2.steps=1")
    told = rsim.train(short, quiet=True)
    again = rsim.train(short, resume=True, quiet=True)
    assert {key: told[key] for key in again.keys() - {"step"}} == {key: again[key] for key in again.keys() - {"step"}}
    assert "tokens_per_question" in again
    assert locate(str(short.folder), [])[1].name == "final"
    longer = replace(short, train=replace(short.train, steps=4))
    rsim.train(longer, resume=True, force=True, quiet=True, on_step_end=lambda record: True)
    assert locate(str(short.folder), [])[1].name == "step-000003"
    with pytest.raises(SystemExit) as done:
        main(["train", str(short.folder / "config.toml"), "--dry-run", "--resume-from", "step-000099"])
    assert done.value.code == 2
    assert "no checkpoint 'step-000099'" in capsys.readouterr().err


def test_a_runs_strategies_are_those_that_its_planner_keeps(small, tmp_path, monkeypatch):
    """Whatever has become of the file that they came from: evaluated without it, and not gone on with by others."""
    Path("own.toml").write_text('extends = "lab"\n[[strategy]]\nname = "analogy"\nprompts = ["Alike:"]\n')
    config = small("run", "train.steps=2", "models.strategies=own.toml", "train.eval_every=0")
    stopped_after(config, 1)
    Path("own.toml").write_text(Path("own.toml").read_text().replace("Alike", "Like"))
    with pytest.raises(UserError, match=r"the strategies of own\.toml have changed since .*step-000001"):
        Trainer(config, resume=True)
    Path("own.toml").unlink()
    found, _ = locate(str(config.folder), [])
    assert load_strategies(found.models.strategies).strategies[-1].prompts == ("Alike:",)
    assert locate(str(config.folder), ["models.strategies=lab"])[0].models.strategies == "lab"


def test_a_checkpoint_that_lacks_an_agent_is_not_evaluated_as_one_without(small):
    config = small("run", "train.steps=1")
    rsim.train(config)
    shutil.rmtree(config.folder / "checkpoints" / "final" / "reasoner")
    with pytest.raises(UserError, match=r"final is damaged: reasoner/.* is missing"):
        locate(str(config.folder), [])


def test_the_newest_are_kept(folder):
    for step in range(5):
        folder.save(f"step-{step:06d}", step, {"planner": write("x")}, {"step": step})
        folder.save("best", step, {"planner": write("x")}, None)
    assert sorted(p.name for p in folder.path.iterdir()) == ["best", "step-000003", "step-000004"]
    verify(folder.path / "best")


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(folder):
    """A limit on the size of files stands for the disk: writing beyond it fails with an error, as on a full one."""
    folder.save("step-000001", 1, {"planner": write("x")}, {"step": 1})
    large = {"step": 2, "weights": torch.zeros(1 << 20)}
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 10, limits[1]))
    try:
        for model, state in ((write("x"), large), (write("x" * (2 << 20)), {"step": 2}), (write_tokenizer, {"step": 2})):
            with pytest.raises(UserError, match=r"cannot write the checkpoint .*step-000002"):
                folder.save("step-000002", 2, {"planner": model}, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in folder.path.iterdir()] == ["step-000001"], "nothing half-written is left"
    verify(folder.path / "step-000001")


def test_a_line_that_was_cut_off_is_dropped(small):
    whole, torn = small("whole"), small("torn")
    rsim.train(whole)
    stopped_after(torn, 2)
    with (torn.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "stage": "sta')
    rsim.train(torn, resume=True)
    assert metrics_of(torn) == metrics_of(whole)


def test_a_best_checkpoint_that_a_kill_left_without_its_name_gets_it_back(small):
    config = small("run")
    stopped_after(config, 2)
    folder = config.folder / "checkpoints"
    (folder / "best").rename(folder / ".best.old")
    rsim.train(config, resume=True)
    assert (folder / "best" / "manifest.json").is_file()
    assert not (folder / ".best.old").exists()


def test_a_copied_run_keeps_its_best_and_one_that_lost_it_gets_another(small):
    """Times of files say in which order they were copied. The score of a best checkpoint that is gone beat all that came."""
    config = small("run", "train.steps=3", "train.eval_every=1", "data.eval_size=2")
    stopped_after(config, 2)
    folder = config.folder / "checkpoints"
    assert step_of(folder / "best") <= 2
    for name in ("step-000002", "best"):
        os.utime(folder / name / MANIFEST, ns=(0, 10**18 if name == "best" else 0))
    Trainer(config, resume=True)
    assert (folder / "best").is_dir()
    shutil.rmtree(folder / "best")
    rsim.train(config, resume=True)
    assert step_of(folder / "best") == 3
    assert step_of(folder / "final") == 3
    verify(folder / "best")


def test_drafts_of_a_killed_save_do_no_harm(small):
    whole, killed = small("whole"), small("killed")
    rsim.train(whole)
    stopped_after(killed, 2)
    draft = killed.folder / "checkpoints" / ".step-000003.draft"
    shutil.copytree(killed.folder / "checkpoints" / "step-000002", draft)
    rsim.train(killed, resume=True)
    assert metrics_of(killed) == metrics_of(whole)
    assert not draft.exists()


def test_a_tracker_that_fails_is_one_line_and_the_run_goes_on_without_it(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "trackio.py").write_text(
        "calls = []\n"
        "def init(**settings): pass\n"
        "def log(record):\n"
        "    calls.append(record)\n"
        "    if len(calls) > 4: raise ConnectionError('no route to host')\n"
        "def finish(): pass\n"
        "Table = dict\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    whole, tracked = small("whole"), small("tracked", 'train.trackers=["trackio"]')
    rsim.train(whole)
    with pytest.raises(UserError, match="tracker 'trackio' failed: no route to host"):
        rsim.train(tracked)
    command = ["train", str(tracked.folder / "config.toml"), "--json", "--resume"]
    for more, code in (["--set", "train.trackers=[]"], "2"), (["--set", "train.trackers=[]", "--force"], "0"):
        with pytest.raises(SystemExit, match=code):
            main([*command, *more])
    assert "train.trackers: ['trackio'] -> []" in capsys.readouterr().err
    assert metrics_of(tracked) == metrics_of(whole)


def test_a_full_disk_in_mid_run_is_one_line_and_nothing_is_lost(small, capsys):
    """Nothing that is larger than a limit can be written: first the records, then, with a larger one, the checkpoints."""
    whole, parts = small("whole"), small("parts")
    rsim.train(whole)
    stopped_after(parts, 1)
    config = str(parts.folder / "config.toml")
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in ((parts.folder / "metrics.jsonl").stat().st_size + 100, 200_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(SystemExit, match="2"):
                main(["train", config, "--resume", "--json"])
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert len(capsys.readouterr().err.strip().splitlines()) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    rsim.train(parts, resume=True)
    assert metrics_of(parts) == metrics_of(whole)
