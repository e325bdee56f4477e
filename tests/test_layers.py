"""The floor plan: which room may import from which. A room imports from those above it in the list, never from below."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import rsim
import studies

LAYERS = [
    "errors",
    "proxies",
    "settings",  # fields with help and bounds
    "rules",  # the rulebook
    "rules_file",
    "config",
    "answers",  # text to answer
    "models",  # where weights come from
    "engine",  # fast tokens
    "policies",  # planner and reasoner
    "game",  # rollout, episode, problem
    "rewards",
    "objective",
    "lab",
    "data",
    "runs",  # folders and checkpoints
    "distributed",
    "serving",
    "evaluation",
    "training",
    "collecting",  # every arm on every question
    "reporting",
    "api",  # the Python side of the commands
    "cli",
]
# What is imported inside a function on purpose, against the order: planner.wrap(model) is how people plug a planner in.
DOORS = {("policies/planner.py", "rsim.serving.wrap")}

SOURCE = Path(rsim.__file__).parent
# What a step of training consists of: the part of the source that a reader of the method reads.
CORE = (
    "rules.py",
    "game/rollout.py",
    "game/episode.py",
    "rewards/rewards.py",
    "objective/advantages.py",
    "objective/losses.py",
    "objective/joint.py",
    "training/batch.py",
    "training/update.py",
    "training/trainer.py",
)
CORE_LINES, CORE_WIDTH = 1700, 110


def imported(file: Path) -> set[str]:
    """The modules of rsim that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} if node.module != "rsim" else {f"rsim.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module for module in found if module.split(".")[0] in ("rsim", "studies")}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_one_way(file):
    place = file.relative_to(SOURCE).as_posix()
    if place in ("__init__.py", "__main__.py"):  # the front door: it imports what it is asked for, when it is asked for
        return
    own = place.removesuffix(".py").split("/")[0]
    assert own in LAYERS, f"{own} has no place in the floor plan"
    for module in imported(file):
        assert not module.startswith("studies"), f"{place} imports {module}: studies are not in the wheel"
        if (place, module) not in DOORS and room(module) != own:
            assert room(module) in LAYERS, module
            assert LAYERS.index(room(module)) < LAYERS.index(own), f"{place} imports {module}"


def test_modules_of_a_room_do_not_import_in_a_circle():
    graph = {}
    for file in SOURCE.rglob("*.py"):
        name = ".".join(("rsim", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        graph[name] = imported(file)
    state: dict[str, str] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != "open", f"a circle: {' > '.join((*path, name))}"
        if name in state or name not in graph:
            return
        state[name] = "open"
        for other in graph[name]:
            if (name.removeprefix("rsim.").replace(".", "/") + ".py", other) not in DOORS:
                visit(other, (*path, name))
        state[name] = "done"

    for name in graph:
        if name != "rsim":
            visit(name, ())


def test_the_core_path_stays_short():
    files = {name: (SOURCE / name).read_text(encoding="utf-8") for name in CORE}
    for name, text in files.items():
        assert "fmt: skip" not in text, f"{name}: its lines are not those that ruff would write"
        assert all(len(line) <= CORE_WIDTH for line in text.splitlines()), f"{name} has a line over {CORE_WIDTH}"
    lines = {name: len(text.splitlines()) for name, text in files.items()}
    assert sum(lines.values()) <= CORE_LINES, lines
    readme = (SOURCE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"{sum(lines.values()):,} lines" in readme, "the README states the count"


@pytest.mark.parametrize("module", sorted(m.name for m in pkgutil.walk_packages(studies.__path__, "studies.")))
def test_every_study_can_be_imported(module):
    if not module.endswith("__main__"):
        importlib.import_module(module)
