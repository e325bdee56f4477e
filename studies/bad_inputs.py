"""Bad inputs: each must end in one line on stderr and exit code 2, and leave every file as it was.

The table of them, with what each says, is docs/results/bad_inputs.md.
"""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import socket
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

from rsim.cli.main import main
from studies.ledger import Row

ISSUE = 15
_PAGE = Path(__file__).parents[1] / "docs/results/bad_inputs.md"
_SMALL = (
    "train.steps=1 train.questions=2 train.group=2 data.eval_size=2 data.train_size=20 cold_start.episodes=0 train.trackers=[] "
    "rollout.max_steps=1"
)
_TRAIN = "train nano --quiet " + " ".join(f"--set {one}" for one in _SMALL.split())
_FILES = {
    "bad.toml": "name = \n",
    "latin.toml": "name = '\udce9'\n",
    "empty.jsonl": "",
    "half.jsonl": '{"question": "1+1=?", "ans',
    "columns.csv": "ask,tell\n1+1=?,2\n",
    "own.jsonl": '{"question": "1+1=?", "answer": "2"}\n{"question": "2+1=?", "answer": "3"}\n',
    "own.py": "def f(e):\n    return 1.0\ndef none(e):\n    return None\ndef nan(e):\n    return float('nan')\n",
    "broken.py": "import nothing_of_this_name\n",
    "short.toml": '[[strategy]]\nname = "validation"\nprompts = ["Check:"]\n',
    "empty.toml": 'extends = "lab"\n[[strategy]]\nname = "mine"\nprompts = []\n',
    "box.toml": 'extends = "lab"\n[[strategy]]\nname = "mine"\nprompts = ["So \\\\boxed{7}"]\n',
    "field.toml": 'extends = "lab"\n[[strategy]]\nname = "mine"\nprompts = ["So"]\ncolour = "red"\n',
    "sweep.toml": '[sweep]\nconfig = "nano"\n',
}
# What is typed: `TRAIN` is a small run, `NEW` no folder yet, {port} in use; r is a run, hurt one with a damaged file.
_TYPED = """
trian
eval
eval r --foo
eval r --limit 0
data shw
config show gone
train no.toml
train bad.toml
train latin.toml
train nano --set train
train nano --set train.stesp=1
train nano --set train.steps=many
train nano --set train.steps=-1
train nano --set train.planner_lr=inf
train nano --set train.planner_lr=nan
train nano --set train.group=1
train nano --set train.minibatches=99
train nano --set train.questions.more=1
train nano --set stages.stage9.steps=1
train nano --set 'rollout.delimiter=""'
train nano --set rollout.max_tokens=3
train nano --set objective.loss=ppi
train nano --set models.quantised=true
train nano --set upstream.url=localhost
TRAIN --out NEW --set parallel.shard=true
TRAIN --out NEW --set rollout.max_tokens=9000
TRAIN --out NEW --set data.train=empty.jsonl
TRAIN --out NEW --set data.train=gone.jsonl
TRAIN --out NEW --set data.train=half.jsonl
TRAIN --out NEW --set data.train=columns.csv
TRAIN --out NEW --set data.train=gsm9k
TRAIN --out NEW --set data.train=gsm8k
TRAIN --out NEW --set data.train=lab:story+stroy
TRAIN --out NEW --set data.train=gym:gdc
TRAIN --out NEW --set 'data.train=50% lab, 20% gym:gcd'
TRAIN --out NEW --set train.questions=21
TRAIN --out NEW --set models.reasoner=./gone
TRAIN --out NEW --set models.planner=r/checkpoints/best/planner --strategies acting
TRAIN --out NEW --set 'train.trackers=["mlflow"]'
TRAIN --out NEW --reward gone.py:f
TRAIN --out NEW --reward own.py:g
TRAIN --out NEW --reward own.py:f@everyone
TRAIN --out NEW --reward broken.py:f
TRAIN --out NEW --reward own.py:none
TRAIN --out NEW --reward own.py:nan
TRAIN --out NEW --strategies gone.toml
TRAIN --out NEW --strategies short.toml
TRAIN --out NEW --strategies empty.toml
TRAIN --out NEW --strategies box.toml
TRAIN --out NEW --strategies field.toml
TRAIN --out r
TRAIN --out own.py/x
TRAIN --out NEW --resume
TRAIN --out r --resume --set train.group=4
TRAIN --out r --resume-from step-000099
TRAIN --out NEW --launcher slurm
eval gone
eval empty
eval r --split middle
eval r --data gone.jsonl
eval r --planner fixed:validtion
eval r --planner r/checkpoints/best/reasoner
eval r --planner oracle --data own.jsonl
eval r --limit 3 --out done
eval r --mode turn
eval r --upstream http://127.0.0.1:9/v1 --limit 2 --out NEW
eval hurt --limit 2 --out NEW
compare done gone
solve ' ' --run r
solve 1+1=? --run gone
report gone
report hurt
push nano me/planner
push r me/planner --to empty
export r empty
serve --planner random
serve --planner random --upstream localhost:80
serve --planner random --model nano-s --port {port}
serve --planner gone --model nano-s --port 0
strategies show gone
data show nothing
data show gsm8k
data validate gone.csv
data validate columns.csv
check --gold 7 --answer 7 --kind numbr
collect default
collect gone.toml --data own.jsonl --out NEW
fit empty --out NEW
fit empty --out empty
sweep gone.toml --out NEW
sweep sweep.toml --out NEW
plan nano --device tpu
lab pretrain --size nano-xl
"""


def run() -> list[Row]:
    lines, good = [], 0
    typed = _TYPED.strip().splitlines()
    with tempfile.TemporaryDirectory() as place, chdir(place), socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        _prepare()
        port = str(taken.getsockname()[1])
        for number, line in enumerate(typed):
            command = line.replace("TRAIN", _TRAIN).replace("{port}", port).replace("NEW", f"new{number}")
            before = _digests()
            code, said = typed_in(shlex.split(command))
            kept = before.items() <= _digests().items()
            fine = code == 2 and len(said) == 1 and kept
            good += fine
            told = " / ".join(said).replace(place, "~").replace("|", "\\|").removeprefix("rsim: ")
            told = told.replace(port, "8017").replace(f"new{number}", "NEW")
            wrong = "" if fine else f"**exit code {code}, {len(said)} lines{'' if kept else ', files changed'}** "
            shown = line.replace("{port}", "8017").replace("|", "\\|")
            lines.append(f"| `rsim {shown}` | {wrong}{told} |")
            print(f"{'ok ' if fine else 'BAD'} {line}: {told}", flush=True)
    told = f"Written by `python -m studies bad_inputs`. `TRAIN` is `{_TRAIN}`, `NEW` a folder that is not there."
    head = f"# {len(typed)} bad inputs\n\n{told}\n"
    _PAGE.write_text("\n".join([head, "| typed | said |", "|---|---|", *lines, ""]), encoding="utf-8")
    goal = f"all {len(typed)}"
    return [Row("bad inputs that end in one line and exit code 2, with nothing lost", good, goal=goal, met=good == len(typed))]


def typed_in(words: list[str]) -> tuple[int, list[str]]:
    """The exit code and the lines on stderr; -1: something else than an exit came out."""
    err = io.StringIO()
    with redirect_stderr(err), redirect_stdout(io.StringIO()):
        try:
            main(words)
        except SystemExit as done:
            code = int(done.code or 0)
        except BaseException as error:
            code = -1
            err.write(f"{type(error).__name__}: {error}\n")
    return code, [line for line in err.getvalue().splitlines() if line.strip()]


def _prepare() -> None:
    os.environ.pop("RSIM_DATA", None)
    for name, text in _FILES.items():
        Path(name).write_bytes(text.encode("utf-8", "surrogateescape"))
    Path("empty").mkdir()
    for words in (f"{_TRAIN} --out r", f"{_TRAIN} --out hurt", "eval r --limit 2 --out done --quiet"):
        code, said = typed_in(shlex.split(words))
        if code:
            raise RuntimeError(f"{words}: {said}")
    with Path("hurt/metrics.jsonl").open("a") as file:
        file.write("{half a line\n")
    next(Path("hurt/checkpoints/final/planner").glob("*.safetensors")).unlink()


def _digests() -> dict[str, str]:
    """Of every file but locks."""
    files = [path for path in sorted(Path().rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
