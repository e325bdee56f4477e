"""How large the house is and how well it stands: lines of the core path, of the package and of the studies; imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import rsim
from studies.ledger import Row

ISSUE = 9
_ROOT = Path(__file__).parents[1]
_SOURCE = Path(rsim.__file__).parent


def run() -> list[Row]:
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\((src/rsim/[\w/]+\.py)\)", readme[readme.index("The core path") :].split("##")[0])
    core = sum(_lines(_ROOT / name) for name in listed)
    package = sum(map(_lines, _SOURCE.rglob("*.py")))
    studies = sum(map(_lines, [*Path(__file__).parent.glob("*.py"), *Path(__file__).parent.glob("*.sh")]))
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_layers.py"]
    held = subprocess.run(tests, cwd=_ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    return [
        Row(f"lines of the core path ({len(listed)} files, width 110)", core, goal="at most 1700", met=core <= 1700),
        Row("lines of the package", package, goal="at most 14900", met=package <= 14900),
        Row("lines of the studies", studies, goal="at most 4000", met=studies <= 4000),
        Row("tests/test_layers.py: imports one way, no circle, every study imports; 0 fails", held, goal="pass", met=held == 0),
    ]


def _lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())
