"""What is installed: the version, what the base install does without, and what tells people that a part is missing."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

import rsim
from rsim.cli.main import app, main
from rsim.errors import UserError
from rsim.rewards import symbolic
from rsim.runs.folder import Trackers

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements):
    return {re.split(r"[\[>=<~!;]", requirement)[0] for requirement in requirements}


def test_the_version_is_told_and_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (0, f"rsim {rsim.__version__}\n")
    assert PROJECT["dynamic"] == ["version"]


def test_a_served_planner_needs_nothing_of_training():
    """Without matplotlib, tensorboard and math-verify, serving, fitting and the plug-in import."""
    absent = {"matplotlib", "tensorboard", "math_verify"}
    assert not absent & {name.replace("-", "_") for name in names(PROJECT["dependencies"])}
    program = f"""
import sys
for name in {sorted(absent)}:
    sys.modules[name] = None
import rsim.cli.serve, rsim.cli.solve, rsim.collecting.fit, rsim.serving.wrap, rsim.training.trainer
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("missing", ["math_verify", "reasoning_gym"])
def test_a_grader_that_is_not_installed_is_named_with_its_remedy(monkeypatch, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pool = symbolic.SymbolicPool(workers=1)
    with pytest.raises(UserError, match=rf"{missing}.*pip install 'rsim-rl\["):
        pool.gym_mark("gcd", {}, "1", unsafe=True) if missing == "reasoning_gym" else pool.same("x^2", "y")


def test_a_tracker_that_is_not_installed_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"tensorboard.*rsim-rl\[train\]"):
        Trackers(("tensorboard",), tmp_path, config=None)


def test_every_install_line_names_the_distribution_and_an_extra_of_it():
    """The name rsim belongs to another project on the package index."""
    assert PROJECT["name"] == "rsim-rl"
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    said = [found for file in files for found in re.findall(r"pip install '?(rsim[^' \n]*)", file.read_text(encoding="utf-8"))]
    assert said, "nobody is told what to install"
    for name in said:
        found = re.fullmatch(r"rsim-rl(?:\[([a-z,]+)\])?", name)
        assert found, name
        assert set((found[1] or "gguf").split(",")) <= set(PROJECT["optional-dependencies"]), name


def test_the_package_is_typed_and_says_so():
    assert (Path(rsim.__file__).parent / "py.typed").is_file()


def test_the_dockerfile_copies_what_is_there_and_starts_a_server_that_the_command_knows():
    """What can be seen without a daemon; the command of its comment is parsed as the entry point gets it."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    found = [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    first, said = found[0], dict(found)
    assert {name for name, _ in found} <= {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "USER", "ENV", "EXPOSE", "ENTRYPOINT"}
    assert (first[0], said["USER"], [name for name, _ in found][-1]) == ("FROM", "rsim", "ENTRYPOINT")
    assert re.fullmatch(r"python:3\.\d+-slim", first[1])
    copied = [path for name, rest in found if name == "COPY" for path in rest.split()[:-1] if not path.startswith("--")]
    assert all((ROOT / path).exists() for path in copied)
    needed = {"pyproject.toml", PROJECT["readme"], *(path.split("/")[0] for path in PROJECT["license-files"]), "src"}
    assert needed <= set(copied), "what the wheel is built of"
    entry = json.loads(said["ENTRYPOINT"])
    usage = re.search(r"#\s+docker build .*&& docker run -p (\d+):(\d+) .* rsim (--.*)", text)
    assert usage
    assert (entry[:2], usage[2], said["EXPOSE"]) == (["rsim", "serve"], entry[-1], entry[-1])
    typer.main.get_command(app).resolve_command(typer.Context(typer.main.get_command(app)), ["serve"])[1].make_context(
        "serve", [*entry[2:], *shlex.split(usage[3])]
    )


def test_the_index_s_page_has_absolute_links_alone_and_commands_that_the_entry_point_knows():
    page = (ROOT / PROJECT["readme"]).read_text(encoding="utf-8")
    links = re.findall(r"\]\((.*?)\)", page)
    assert links
    assert all(link.startswith("https://") for link in links), links
    known = typer.main.get_command(app)
    commands = re.findall(r"^rsim ([^#\n]*)", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        name, *arguments = shlex.split(command)
        known.resolve_command(typer.Context(known), [name])[1].make_context(name, arguments)
