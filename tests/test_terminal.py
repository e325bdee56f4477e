"""What people see in a terminal: bars that fit, examples in helps, dry runs that find what a run would, ports, and Ctrl-C that tells the truth."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import socket
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from rsim.cli import main as commands
from rsim.cli.main import app, main
from rsim.cli.progress import _bar
from rsim.training.run import step_line, train


def run(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([*args])
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


def test_bars_fit_80_columns_with_their_eta():
    record = {"reasoner/return": 1.13, "accuracy": 0.44, "lambda": 0.7, "tokens_per_second": 123456.0, "planner/entropy": 2.17}
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    progress = _bar(console)
    task = progress.add_task("stage1", total=200, shown=step_line(record, short=True))
    progress.update(task, completed=100)
    progress.add_task("episodes", total=1024, completed=1000, shown="")
    lines = [
        text
        for segments in console.render_lines(progress.get_renderable())
        if (text := "".join(s.text for s in segments).strip())
    ]
    assert len(lines) == 2, "nothing is wrapped"
    assert lines[0].endswith(("-:--:--", "0:00:00")), lines
    assert "…" not in "".join(lines)
    assert "H 2.17" in lines[0]


def words_of(line: str) -> tuple[str, list[str]]:
    name, *rest = shlex.split(line)[1:]
    return name, rest


def test_every_help_ends_in_an_example_that_is_a_command_line():
    """Each example is parsed as the command parses it; nothing is run."""
    root = typer.main.get_command(app)
    known = set()
    for name in commands.COMMANDS:
        _, command, _ = root.resolve_command(typer.Context(root), [name])
        for sub, one in getattr(command, "commands", {"": command}).items():
            key = f"{name} {sub}".strip()
            known.add(key)
            assert one.epilog == f"Example: {commands.EXAMPLES[key]}", key
            line = shlex.split(commands.EXAMPLES[key])
            assert " ".join(line[: 1 + len(key.split())]) == f"rsim {key}"
            one.make_context(key, line[1 + len(key.split()) :])
    assert known == set(commands.EXAMPLES)
    shown = CliRunner().invoke(app, ["train", "--help"]).stdout
    assert "Example: rsim train nano" in shown


def test_out_seed_and_quiet(small, base_folder, capsys):
    settings = [part for s in ("train.steps=1", "train.questions=2", "train.group=2", "data.eval_size=2", "data.train_size=20",
                               "cold_start.episodes=0", "train.trackers=[]", "rollout.max_steps=1", f'models.reasoner="{base_folder}"',
                               f'models.planner="{base_folder}"') for part in ("--set", s)]  # fmt: skip
    code, out, err = run(capsys, "train", "nano", "--out", "mine", "--seed", "0", "--quiet", *settings)
    assert (code, out, err) == (0, "run folder: mine\n", "")
    assert run(capsys, "train", "nano", "--out", "mine", *settings)[2].count("\n") == 1, "no empty line where no bar is shown"
    assert "seed = 0\n" in Path("mine/config.toml").read_text()
    code, out, err = run(capsys, "eval", "mine", "--limit", "4")
    assert (code, "accuracy" in out) == (0, True)
    assert "evaluating: 4 of 4" in err
    assert run(capsys, "eval", "mine", "--limit", "4", "--out", "again", "--quiet")[2] == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--reward", "no.py:f"], "with a file that exists"),
        (["--reward", "own.py:g"], "has no function 'g'"),
        (["--strategies", "no.toml"], "strategy file not found"),
        (["--set", "data.train=no.jsonl"], "not found"),
        (["--set", "data.eval=no.jsonl"], "not found"),
        (["--set", "models.reasoner=./no"], "no model folder"),
        (["--set", "models.planner=./no"], "no model folder"),
        (["--set", "models.planner=nano-z"], "cannot load a planner from 'nano-z': did you mean 'nano-s'?"),
        (["--set", 'train.trackers=["mlflow"]'], "unknown tracker"),
        (["--set", "train.questions=20", "--set", "data.train_size=10"], "has 10 questions"),
        (["--resume"], "no run in"),
    ],
)
def test_a_dry_run_finds_what_the_run_would(tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def f(episode):\n    return 1.0\n")
    code, out, err = run(capsys, "train", "nano", "--out", "r", "--dry-run", "--set", "train.trackers=[]", *given)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert [path.name for path in tmp_path.iterdir()] == ["own.py"], "nothing is written"


def test_a_dry_run_refuses_a_planner_of_other_strategies(small, planner, tmp_path, capsys):
    planner.save_pretrained(tmp_path / "planner")
    asked = [
        "train",
        "nano",
        "--out",
        "r",
        "--dry-run",
        "--set",
        f'models.planner="{tmp_path / "planner"}"',
        "--strategies",
        "acting",
    ]
    code, _, err = run(capsys, *asked, "--set", "train.trackers=[]")
    assert (code, "but the strategy set is" in err) == (2, True)


def test_a_port_in_use_is_found_before_the_models_and_the_banner(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, out, err = run(capsys, "serve", "--planner", "no-such-planner", "--model", "no-such-model", "--port", port)
    assert (code, out) == (2, "")
    assert err == f"rsim: cannot listen on 127.0.0.1:{port}: Address already in use; --port names another\n"


def test_ctrl_c_before_the_first_checkpoint_tells_the_truth(small):
    """The first held-out evaluation comes before the first checkpoint. Twice: at once, nothing is kept. Once: at the first checkpoint."""
    said: list[str] = []

    def interrupt(record):
        if record["step"] == 0 and "eval/accuracy" in record:
            os.kill(os.getpid(), signal.SIGINT)

    def interrupt_twice(record):
        interrupt(record)
        interrupt(record)

    config = small("twice")
    with pytest.raises(KeyboardInterrupt):
        train(config, on_record=interrupt_twice, say=said.append)
    assert said[-2:] == [
        "no checkpoint yet: stopping at the first; Ctrl-C again stops at once, with nothing kept",
        "stopped before the first checkpoint: nothing is kept; start it again without --resume",
    ]
    train(small("twice", "train.eval_every=0"))  # so it is: it begins again in the same folder
    config = small("once")
    with pytest.raises(KeyboardInterrupt):
        train(config, on_record=interrupt, say=said.append)
    assert said[-1] == "stopped; --resume goes on from step-000000"
    train(config, resume=True)
    steps = [
        json.loads(line)["step"] for line in (config.folder / "metrics.jsonl").read_text().splitlines() if "lambda" in line
    ]
    assert steps == [1, 2, 3, 4]
