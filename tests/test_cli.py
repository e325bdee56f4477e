"""The commands as a user meets them: exit codes, one clear line, JSON for programs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forked import Forked
from rsim.cli.main import main
from rsim.policies.planner import Planner
from rsim.policies.strategies import load_strategies

SMALL = ["train.questions=2", "train.group=2", "train.eval_every=2", "checkpoint.save_every=1", "data.eval_size=4", "data.train_size=20",
         "cold_start.episodes=0", "rollout.max_steps=2", "rollout.step_tokens=8", "rollout.max_tokens=40", "rollout.answer_tokens=6",
         "train.trackers=[]"]  # fmt: skip


def arguments(base_folder, *extra: str) -> list[str]:
    settings = [f'models.reasoner="{base_folder}"', f'models.planner="{base_folder}"', *SMALL, *extra]
    return [part for s in settings for part in ("--set", s)]


def run(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([*args])
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RSIM_DATA", raising=False)


def test_help_config_and_check_never_load_torch():
    """Nor does the help of any command."""
    code = """
import sys
import rsim
from rsim.cli.main import COMMANDS, main
asked = [[name, "--help"] for name in COMMANDS]
for arguments in (["--help"], ["config", "show", "nano"], ["check", "--gold", "7", "--answer", "7"], *asked):
    try:
        main(arguments)
    except SystemExit as done:
        assert done.code in (0, None), arguments
assert "torch" not in sys.modules and "transformers" not in sys.modules, "torch was loaded"
assert not hasattr(rsim, "Reasoner")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "planner_lr" in done.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["eval"], "Missing argument 'RUN|CHECKPOINT|PRESET' (see rsim eval --help)"),
        (["eval", "r", "--foo"], "No such option: --foo"),
        (["eval", "r", "--limit", "0"], "Invalid value for '--limit'"),
        (["data", "shw"], "see rsim data --help"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(capsys, line, message):
    code, out, err = run(capsys, *line)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_eval_goes_on_where_it_was_stopped(capsys, base_folder, tmp_path, monkeypatch):
    """Stopped after the first write, asked for again: only the rest is played, and the result is that of one go."""
    from rsim.evaluation.evaluate import play_scored

    run(capsys, "train", "nano", "--json", *arguments(base_folder, "train.steps=1", 'out="r"'))
    asked = ["eval", "r", "--limit", "9", "--samples", "2", "--json", "--set", "rollout.batch=2"]
    code, out, _ = run(capsys, *asked, "--out", "whole")
    assert code == 0
    whole = json.loads(out)
    calls: list[int] = []

    def stops(game, problems, *args, first, **kwargs):
        calls.append(first)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return play_scored(game, problems, *args, first=first, **kwargs)

    monkeypatch.setattr("rsim.evaluation.loading.play_scored", stops)
    code, _, _ = run(capsys, *asked, "--out", "parts")
    assert code == 130
    with (tmp_path / "parts" / "episodes.jsonl").open("a") as file:
        file.write('{"half": ')
    code, out, _ = run(capsys, *asked, "--out", "parts")
    assert code == 0
    assert calls == [0, 2, 4, 4, 6, 8]
    own = {"planner_share", "folder", "report"}
    assert {k: v for k, v in json.loads(out).items() if k not in own} == {k: v for k, v in whole.items() if k not in own}
    assert (tmp_path / "parts" / "episodes.jsonl").read_text() == (tmp_path / "whole" / "episodes.jsonl").read_text()
    code, _, err = run(capsys, *asked, "--out", "parts", "--seed", "1")
    assert (code, err.count("\n")) == (2, 1)
    assert "--overwrite" in err
    code, out, _ = run(capsys, *asked, "--out", "parts", "--seed", "1", "--overwrite")
    assert (code, json.loads(out)["seed"]) == (0, 1)

    def broken(*_):
        raise OSError("the cable was pulled")

    monkeypatch.setattr("rsim.evaluation.saved.play_part", broken)
    assert run(capsys, *asked, "--out", "parts", "--seed", "2", "--overwrite")[0] == 2
    assert sorted(p.name for p in Path("parts").iterdir() if p.suffix) == ["settings.json"], (
        "numbers of another evaluation stay"
    )


def test_samples_at_equal_tokens_and_compare(capsys, base_folder, tmp_path):
    run(capsys, "train", "nano", "--json", *arguments(base_folder, "train.steps=1", 'out="r"'))
    run(capsys, "eval", "r", "--limit", "6", "--json", "--out", "planned")
    code, out, _ = run(
        capsys, "eval", "r", "--limit", "6", "--planner", "none", "--match-tokens", "planned", "--json", "--out", "sc"
    )
    assert code == 0
    summary = json.loads(out)
    planned = json.loads((tmp_path / "planned" / "summary.json").read_text())
    one = summary["tokens_per_question"] / summary["samples"]
    assert (summary["samples"] - 1.5) * one <= planned["tokens_per_question"]
    code, _, err = run(capsys, "eval", "r", "--match-tokens", "planned", "--samples", "3", "--out", "both")
    assert (code, "--samples 3" in err) == (2, True)
    code, out, _ = run(capsys, "compare", "planned", "sc", "--json")
    assert (code, json.loads(out)["questions"]) == (0, 6)
    code, _, err = run(capsys, "compare", "planned", "nowhere")
    assert (code, err.count("\n")) == (2, 1)


def test_export_writes_an_untied_folder_once(capsys, base_folder, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    code, out, _ = run(capsys, "export", str(base_folder), "served", "--json")
    assert (code, json.loads(out)) == (0, {"folder": "served"})
    assert not AutoConfig.from_pretrained(tmp_path / "served").tie_word_embeddings
    assert AutoTokenizer.from_pretrained(tmp_path / "served").encode("7=?")
    code, _, err = run(capsys, "export", str(base_folder), "served")
    assert (code, err.count("\n")) == (2, 1)
    assert "exists already" in err


def test_train_eval_solve_report(capsys, base_folder, tmp_path):
    code, out, _ = run(capsys, "train", "nano", "--json", *arguments(base_folder, "train.steps=2", 'out="r"'))
    assert code == 0
    assert set(json.loads(out)) >= {"accuracy", "low", "high"}
    code, out, _ = run(capsys, "eval", "r", "--limit", "5", "--json")
    summary = json.loads(out)
    assert (code, summary["questions"], summary["name"]) == (0, 5, "trained planner")
    assert (tmp_path / "r" / "eval" / "report.html").is_file()
    code, out, _ = run(capsys, "eval", "r", "--limit", "5", "--planner", "none", "--out", "e")
    assert code == 0
    assert "accuracy" in out
    code, out, _ = run(capsys, "solve", "4*17+38=?", "--run", "r", "--json")
    record = json.loads(out)
    assert (code, record["question"]) == (0, "4*17+38=?")
    assert len(record["steps"][0]["probabilities"]) == 9
    code, out, _ = run(capsys, "solve", "4*17+38=?", "--run", "r", "--planner", "fixed:validation")
    assert code == 0
    assert "validation" in out
    code, out, _ = run(capsys, "report", "r", "--out", "page.html", "--json")
    assert code == 0
    assert json.loads(out) == {"report": "page.html"}
    assert "<svg" in Path("page.html").read_text()


def test_options_with_a_name_of_their_own(capsys, base_folder, tmp_path):
    (tmp_path / "mine.toml").write_text('extends = "lab"\n[[strategy]]\nname = "analogy"\nprompts = ["Next:"]\n')
    (tmp_path / "mine.py").write_text("def half(episode):\n    return 0.5\n")
    options = ["--strategies", "mine.toml", "--reward", "mine.py:half", "--data-dir", "somewhere"]
    code, _, err = run(capsys, "train", "nano", "--json", *options, *arguments(base_folder, "train.steps=1", 'out="r"'))
    assert code == 0, err
    record = next(r for r in map(json.loads, Path("r/metrics.jsonl").read_text().splitlines()) if "accuracy" in r)
    assert record["reward/half"] == 0.5
    assert "strategy/analogy" in record
    assert 'data_dir = "somewhere"' in Path("r/config.toml").read_text()


def test_json_lines_and_presets(capsys):
    assert "nano" in run(capsys, "config", "show")[1].splitlines()
    code, out, _ = run(capsys, "config", "show", "nano", "--set", "seed=3", "--json")
    assert code == 0
    assert json.loads(out)["seed"] == 3
    assert "# the planner's learning rate" in run(capsys, "config", "show", "--explain")[1], "of no preset: the defaults"
    assert json.loads(run(capsys, "config", "show", "--set", "seed=4", "--json")[1])["seed"] == 4


def test_bad_input_is_one_line_and_exit_code_2(capsys, base_folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "three.toml").write_text('[[strategy]]\nname = "termination"\nprompts = ["End:"]\n')
    good = arguments(base_folder, "train.steps=1", 'out="r"')
    assert run(capsys, "train", "nano", "--json", *good)[0] == 0
    cases = [
        (["train", "no.toml"], "no preset or config file"),
        (["train", "nano", "--set", "train.stesp=1"], "train.stesp"),
        (["train", "nano", *arguments(base_folder, 'data.train="empty.jsonl"', 'out="x"')], "is empty"),
        (["train", "nano", *arguments(base_folder, 'data.train="gone.jsonl"', 'out="x"')], "not found"),
        (["train", "nano", *arguments(base_folder, "train.questions=21", 'out="x"')], "has 20 questions"),
        (["train", "nano", *arguments(base_folder, "train.minibatches=3", 'out="x"')], "train.minibatches"),
        (["train", "nano", *arguments(base_folder, 'models.planner="r/checkpoints/final/planner"', 'models.strategies="three.toml"',
                                      'out="x"')], "strategy set is [termination]"),
        (["train", "nano", *arguments(base_folder, 'train.trackers=["mlflow"]', 'out="x"')], "unknown tracker"),
        (["train", "nano", *arguments(base_folder, "rollout.max_tokens=9000", 'out="x"')], "context"),
        (["train", "nano", *good], "already holds a run"),
        (["train", "nano", "--resume", *arguments(base_folder, 'out="y"')], "no run in y"),
        (["train", "nano", *arguments(base_folder, 'out="empty.jsonl/run"')], "cannot write"),
        (["train", "smollm2-gsm8k"], "RSIM_DATA"),
        (["train", "nano", "--launcher", "slurm", "--dry-run"], "use ray"),
        (["train", "nano", "--workers", "4"], "--launcher ray's"),
        (["train", "nano", "--launcher", "ray", "--workers", "3:2"], "MIN:MAX"),
        (["eval", "nowhere"], "no run, checkpoint or preset"),
        (["eval", "r", "--planner", "fixed:guessing"], "guessing"),
        (["eval", "r", "--planner", "gone"], "no planner"),
        (["eval", "r", "--planner", "r"], "r is a run or a checkpoint"),
        (["eval", "r", "--set", "models.planner=none"], "--planner names another"),
        (["eval", "r", "--set", "models.reasoner=nano-s"], "--reasoner names another"),
        (["collect", "default", "--data", "q.jsonl", "--out", "log"], "give --model"),
        (["collect", "default", "--data", "q.jsonl", "--out", "log", "--model", "nano-s", "--mode", "turn"], "--upstream URL"),
        (["collect", "default", "--data", "lab", "--limit", "4", "--out", "log", "--model", "nano-s"], "made on the spot"),
        (["eval", "r", "--reasoner", "./gone"], "no model folder"),
        (["eval", "r", "--data", "gsm9k"], "unknown data set"),
        (["eval", "r", "--match-tokens", "empty.jsonl"], "give a folder that rsim eval wrote"),
        (["eval", "r", "--upstream", "http://127.0.0.1:9/v1", "--reasoner", "nano-s"], "--model names it"),
        (["eval", "r", "--upstream", "http://127.0.0.1:80a0/v1"], "base URL"),
        (["eval", "r", "--mode", "turn"], "--upstream URL"),
        (["check", "--kind", "choice", "--gold", "AB", "--answer", "A"], "letter from A to J"),
        (["solve", " ", "--run", "r"], "question is empty"),
        (["report", "nowhere"], "no metrics"),
        (["push", "nano", "me/planner"], "no trained planner"),
        (["serve", "--planner", "random"], "no model to serve"),
        (["serve", "--planner", "random", "--upstream", "localhost:80"], "base URL"),
        (["serve", "--planner", "random", "--model", "./gone"], "no model folder"),
        (["serve", "--planner", "./gone", "--upstream", "http://127.0.0.1:9/v1"], "cannot load a planner"),
        (["serve", "--planner", "random", "--upstream", "http://127.0.0.1:9/v1", "--mode", "x"], "prefill or turn"),
        (["lab", "pretrain", "--size", "nano-xl"], "nano-xl"),
        (["lab", "pretrain", "--seed", "9" * 20], "--seed"),
        (["config", "show", "gone"], "no preset"),
    ]  # fmt: skip
    for args, message in cases:
        code, _, err = run(capsys, *args)
        said = [line for line in err.splitlines() if line.strip()]
        assert code == 2, (args, err)
        assert len(said) == 1, (args, err)
        assert message in said[0], (args, err)


def test_push_writes_a_hub_ready_folder(capsys, base_folder, tmp_path, monkeypatch):
    run(capsys, "train", "nano", "--json", *arguments(base_folder, "train.steps=1", 'out="r"'))
    code, _, _ = run(capsys, "push", "r", "me/good-planner", "--to", "ready")
    assert code == 0
    card = (tmp_path / "ready" / "README.md").read_text()
    for part in ("license: apache-2.0", "# good-planner", "| validation |", "lambda 0.7", "Held-out accuracy", "## Limits"):
        assert part in card, part
    again = Planner.from_pretrained(tmp_path / "ready")
    assert again.strategies.names == load_strategies("lab").names
    assert run(capsys, "eval", "r", "--limit", "2", "--planner", "none")[0] == 0
    assert run(capsys, "push", "r", "me/good-planner", "--to", "alone")[0] == 0
    assert "not of these weights" in (tmp_path / "alone" / "README.md").read_text(), "the planner did not play"
    shutil.rmtree("r/eval")
    uploaded: dict[str, object] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo, **kw: uploaded.update(repo=repo, **kw))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda self, **kw: uploaded.update(files=sorted(os.listdir(kw["folder_path"])))
    )
    assert run(capsys, "push", "r", "me/good-planner", "--private")[0] == 0
    assert (uploaded["repo"], uploaded["private"]) == ("me/good-planner", True)
    assert {"README.md", "strategies.toml", "config.json", "model.safetensors"} <= set(uploaded["files"])
    code, _, err = run(capsys, "push", "r", "me/good-planner", "--to", "ready")
    assert code == 2
    assert "exists already" in err


def test_data_and_check_commands(capsys, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"problem": "2+2?", "gold": "4"}\n{"problem": "2 + 2", "gold": "4"}\n')
    code, out, _ = run(
        capsys, "data", "validate", "d.jsonl", "--column", "question=problem", "--column", "answer=gold", "--json"
    )
    assert (code, json.loads(out)["doubled_questions"]) == (0, 1)
    code, out, _ = run(capsys, "data", "list", "--json")
    assert {"lab", "gsm8k", "math", "mmlu_pro", "humaneval"} <= set(json.loads(out))
    assert "gym:chain_sum" in json.loads(run(capsys, "data", "list", "--gym", "--json")[1])
    code, out, _ = run(capsys, "data", "show", "gym:chain_sum", "--json")
    assert (code, json.loads(out)["kinds"]) == (0, {"gym": 100})
    code, out, _ = run(capsys, "check", "--gold", "\\frac{1}{2}", "--answer", "I say 0.5", "--json")
    result = json.loads(out)
    assert (code, result["strict"]["right"], result["flexible"]["right"]) == (0, False, True)
    assert "right" in run(capsys, "check", "--gold", "7", "--answer", "\\boxed{7}")[1]
    for args, message in (
        (["check", "--gold", "7", "--answer", "7", "--kind", "numbr"], "numbr"),
        (["data", "show", "math"], "RSIM_DATA"),
        (["data", "show", "nothing"], "unknown data set"),
        (["data", "show", "gsm9k"], "did you mean 'gsm8k'?"),
        (["data", "fetch", "gsm9k"], "did you mean 'gsm8k'?"),
        (["data", "fetch", "gym:gcd"], "needs no fetching"),
        (["strategies", "show", "defalt"], "did you mean 'default'?"),
        (["eval", "nano", "--reasoner", "nano-z"], "did you mean 'nano-s'?"),
        (["data", "validate", "gone.csv"], "not found"),
    ):
        code, _, err = run(capsys, *args)
        assert (code, len(err.splitlines())) == (2, 1), err
        assert message in err


def test_damaged_records_are_named(capsys, base_folder):
    assert run(capsys, "train", "nano", "--json", *arguments(base_folder, "train.steps=1", 'out="r"'))[0] == 0
    with Path("r/metrics.jsonl").open("a") as file:
        file.write("{half a li")
    assert run(capsys, "report", "r")[0] == 0, "a run that goes on drops a last line that was cut"
    with Path("r/metrics.jsonl").open("a") as file:
        file.write("ne\n")
    code, _, err = run(capsys, "report", "r")
    assert (code, err.count("\n")) == (2, 1)
    assert "line 4 is damaged" in err
    Path("r/metrics.jsonl").write_text('{"step": 1}\n')
    Path("r/config.toml").write_text("name = \n")
    code, _, err = run(capsys, "report", "r")
    assert (code, err.count("\n")) == (2, 1)
    assert "config.toml: not valid TOML" in err


def test_evaluations_and_runs_leave_each_others_folders_alone(capsys, base_folder, tmp_path):
    assert run(capsys, "train", "nano", "--json", *arguments(base_folder, "train.steps=1", 'out="r"'))[0] == 0
    kept = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
    asked = ["eval", "r/checkpoints/best", "--limit", "2", "--json"]
    for out in ("r", "r/checkpoints/final"):
        for more in ([], ["--overwrite"]):
            code, _, err = run(capsys, *asked, "--out", out, *more)
            assert code == 2
            assert f"{out} holds a run or a checkpoint: give --out another folder" in err
    code, out, _ = run(capsys, *asked)
    assert (code, json.loads(out)["folder"]) == (0, "r/eval-best"), "the next best one would have taken it along"
    assert {path: path.read_bytes() for path in kept} == kept
    Path("r/checkpoints/best/notes.txt").write_text("is none of the checkpoint's files")
    code, again, _ = run(capsys, *asked)
    assert (code, again) == (0, out), "it goes on"
    played = Path("r/eval-best/episodes.jsonl").read_bytes()
    code, _, err = run(capsys, "train", "nano", *arguments(base_folder, 'out="r/eval-best"'))
    assert code == 2
    assert "r/eval-best holds an evaluation" in err
    assert Path("r/eval-best/episodes.jsonl").read_bytes() == played
    for checkpoint in Path("r/checkpoints").glob("step-*"):
        shutil.rmtree(checkpoint)
    code, _, err = run(capsys, "train", "nano", *arguments(base_folder, 'out="r"'))
    assert code == 2
    assert "already holds a run" in err, "one that ended, and whose checkpoints to resume from were removed"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_in_mid_run_saves_and_the_run_goes_on_where_it_was(base_folder, tmp_path, sent, code):
    """A real signal to a real process."""
    args = ["train", "nano", *arguments(base_folder, 'out="r"', "stages.stage1.steps=500", "stages.stage2.steps=0")]
    process = Forked(args, os.environ | {"OMP_NUM_THREADS": "1"})
    metrics = Path("r/metrics.jsonl")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("stage1") >= 2):
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    last = {130: "stopped; --resume goes on from step-", 0: "terminated: finishing this step, then saving"}
    assert last[code] in err
    done = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (tmp_path / "r" / "checkpoints" / f"step-{done:06d}" / "state.pt").is_file()
    settings = Path("r/config.toml").read_text().replace("steps = 500", f"steps = {done + 2}")
    Path("r/config.toml").write_text(settings)
    again = Forked(["train", "r/config.toml", "--resume"], os.environ)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "reward/accuracy" in line]
    assert steps == list(range(1, done + 3))
