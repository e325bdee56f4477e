"""Mutants of objective, game, rewards, update and packing: how many do the tests notice, and which not?

Those that tests once let pass (`tests/mutants.toml`), and others drawn by seed from the syntax tree. Each runs against its
module's tests alone, in a copy of the project, until the first failure; what takes longer than it should counts as noticed.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rsim.errors import UserError
from studies.ledger import Row

ISSUE = 10
_ROOT = Path(__file__).parents[1]


def run(draw: int = 200, seed: int = 0, known: bool = True) -> Iterator[Row]:
    """``draw`` mutants by ``seed``, and with ``known`` those of the list."""
    sys.path.insert(0, str(_ROOT / "tests"))
    mutate: Any = importlib.import_module("mutate")  # needs pytest

    with tempfile.TemporaryDirectory() as folder:
        tree = mutate.Tree(Path(folder))
        listed, others = mutate.known() if known else [], mutate.drawn(draw, seed)
        limits = {file: _seconds(tree, file) * 5 + 30 for file in sorted({m.file for m in [*listed, *others]})}
        if known:
            passed = _passed(tree, listed, limits)
            yield Row("known mutants", len(listed))
            yield Row("known mutants that no test notices", len(passed), goal="0", met=not passed)
        passed = _passed(tree, others, limits)
        share = 1 - len(passed) / draw
        enough = share >= 0.9
        yield Row(
            f"of {draw} drawn mutants, noticed by a test", round(100 * share, 1), "%", "at least 90 %", enough, seeds=[seed]
        )
        yield Row(f"those of the {draw} that no test notices", "; ".join(passed) or "none", seeds=[seed])


def _seconds(tree: Any, file: str) -> float:
    """What a module's tests take, all of which must pass on the source as it is."""
    began = time.monotonic()
    if tree.notices(file, (tree.folder / "src/rsim" / file).read_text(encoding="utf-8"), 600):
        raise UserError(f"the tests of {file} fail on the source as it is", "make test")
    return time.monotonic() - began


def _passed(tree: Any, mutants: list[Any], limits: dict[str, float]) -> list[str]:
    passed = []
    for number, mutant in enumerate(mutants):
        noticed = tree.notices(mutant.file, mutant.text, limits[mutant.file])
        print(f"{number + 1}/{len(mutants)} {'noticed' if noticed else 'PASSES '} {mutant.what}", file=sys.stderr, flush=True)
        passed += [] if noticed else [mutant.what]
    return passed
