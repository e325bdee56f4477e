"""Two users in a fresh environment from the built wheel: a student trains and gets a report, an engineer a planned answer.

Everything that they type, and what they see, is kept in docs/results/users.md. Twelve minutes on two cores are the goal.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from studies.ledger import Row

ISSUE = 15
_ROOT = Path(__file__).parents[1]
_PAGE = _ROOT / "docs/results/users.md"
_SHOWN = 12  # lines of what a command says, the last ones
_ASKED = {"messages": [{"role": "user", "content": "85-(12+5)+26=?"}]}


class Terminal:
    """A shell in ``folder`` that remembers what was typed and seen."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, list[str]()
        bins = f"{folder}/env/bin:{os.environ['PATH']}"
        self.env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RSIM_DATA")} | {"PATH": bins}

    def type(self, command: str, *, fails: bool = False) -> str:
        began = time.perf_counter()
        done = subprocess.run(command, shell=True, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False)
        said = done.stdout if "pip install" in command and done.returncode == 0 else done.stdout + done.stderr
        self.note(command, said, time.perf_counter() - began)
        if bool(done.returncode) != fails:
            raise RuntimeError(f"{command}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def note(self, command: str, said: str, seconds: float) -> None:
        shown = [line for line in said.replace(str(self.folder), "~").replace(str(_ROOT), "rsim").splitlines() if line.strip()]
        cut = ["..."] * (len(shown) > _SHOWN)
        self.lines += [f"$ {command.replace(sys.executable, 'python3')}", *cut, *shown[-_SHOWN:], f"# {seconds:.1f} s", ""]

    @contextmanager
    def serving(self, command: str) -> Iterator[str]:
        """A server's base URL, as its banner says it."""
        began = time.perf_counter()
        server = subprocess.Popen(shlex.split(command), cwd=self.folder, env=self.env, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            banner = server.stdout.readline()
            self.note(f"{command} &", banner, time.perf_counter() - began)
            found = re.search(r"http://\S+", banner)
            assert found, banner
            yield f"{found[0]}/v1"
        finally:
            server.terminate()
            server.wait(30)

    def ask(self, url: str, model: str) -> str:
        """A chat completion; the server may still be loading."""
        body = json.dumps(_ASKED | {"model": model}).encode()
        request = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
        began = time.perf_counter()
        while True:
            try:
                answer: str = json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["message"]["content"]
                break
            except urllib.error.HTTPError as error:
                raise RuntimeError(error.read().decode()) from error
            except urllib.error.URLError as error:
                if not isinstance(error.reason, ConnectionError):
                    raise
                time.sleep(0.2)
        self.note(
            f"curl {url}/chat/completions -d '{json.dumps(_ASKED | {'model': model})}'", answer, time.perf_counter() - began
        )
        return answer


def run(steps: int = 24) -> Iterator[Row]:
    """``steps`` of the student's run; fewer try it out."""
    with tempfile.TemporaryDirectory() as place:
        shell, began = Terminal(Path(place)), time.perf_counter()
        pins = "pins.txt"  # as requirements.txt has them, without extras
        pinned = re.sub(r"\[.*?\]", "", (_ROOT / "requirements.txt").read_text(encoding="utf-8"))
        (shell.folder / pins).write_text(pinned, encoding="utf-8")
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", place, str(_ROOT)], check=True)
        (wheel,) = Path(place).glob("*.whl")
        student = time.perf_counter()
        shell.type(f"{sys.executable} -m venv env")
        shell.type(f"pip install -q -c {pins} torch")
        shell.type(f"pip install -q -c {pins} '{wheel.name}[train]'")
        shell.type("rsim --version")
        shell.type("rsim config show")
        shell.type(f"rsim train nano --out runs/mine --set train.steps={steps} --dry-run")
        shell.type(f"rsim train nano --out runs/mine --set train.steps={steps}")
        shell.type("rsim solve '85-(12+5)+26=?' --run runs/mine")
        shell.type("rsim eval runs/mine --limit 200 --out runs/planned")
        shell.type("rsim report runs/mine")
        assert (shell.folder / "runs/mine/report.html").is_file()
        shell.type("rsim train nano --out runs/mine", fails=True)
        to_report = time.perf_counter() - student
        best = "runs/mine/checkpoints/best"
        with (
            shell.serving(f"rsim serve --planner random --model {best}/reasoner --port 0") as endpoint,
            shell.serving(f"rsim serve --planner {best}/planner --upstream {endpoint} --mode turn --port 0") as url,
        ):
            alone, planned = shell.ask(url, "reasoner"), shell.ask(url, "reasoner-rsim")
        to_answer = time.perf_counter() - student
        shell.type(f"pip install -q -c {pins} mypy")
        (shell.folder / "user.py").write_text((_ROOT / "tests/user_api.py").read_text(encoding="utf-8"), encoding="utf-8")
        (shell.folder / "typo.py").write_text("import rsim\n\nrsim.tarin('nano')\n", encoding="utf-8")
        shell.type("mypy --strict user.py")
        refused = "tarin" in shell.type("mypy --strict typo.py", fails=True)
        lines = [
            f"# Two users, from the wheel\n\nWritten by `python -m studies users`, in {time.perf_counter() - began:.0f} s.\n"
        ]
        _PAGE.write_text("\n".join([*lines, "```text", *shell.lines[:-1], "```", ""]), encoding="utf-8")
        site = _ROOT / "mkdocs.yml"  # whose navigation ends with the results; a page that is not there would be an error
        if (entry := "      - Two users: results/users.md\n") not in (text := site.read_text(encoding="utf-8")):
            site.write_text(text + entry, encoding="utf-8")
    yield Row("from pip install to the report of an own run", to_report / 60, "min", goal="at most 12", met=to_report <= 720)
    yield Row("and on to a planned answer", to_answer / 60, "min", goal="at most 12", met=to_answer <= 720)
    yield Row(
        "answers of the model alone and planned", len([a for a in (alone, planned) if a]), goal="2", met=bool(alone and planned)
    )
    yield Row("a user's file passes mypy --strict, and a wrong name does not", int(refused), goal="1", met=refused)
