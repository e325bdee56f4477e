"""The lab's methods, tuned alike: random search on dev problems, with as many trials, seeds and tokens (docs/protocol.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rsim.training.sweep import edges, load_sweep, run_sweep, write_table
from studies import ledger
from studies.ledger import Row

ISSUE = 10
SWEEPS = Path(__file__).parent / "sweeps"
NAMES = {"rsim": "rSIM", "grpo": "GRPO alone", "planner": "planner alone"}


def run(out: Path = Path("runs/sweeps")) -> Iterator[Row]:
    for name, shown in NAMES.items():
        sweep = load_sweep(SWEEPS / f"{name}.toml")
        trials = run_sweep(sweep, out / name)
        write_table(sweep, trials, out / name)
        best, seeds = trials[0], list(sweep.settings.seeds)
        others = [trial.scores[0][0] for trial in trials if trial.scores and not trial.confirmed]
        count = len([trial for trial in trials if trial.confirmed])
        yield Row(f"{shown}: trials of {len(trials)} that failed", len([t for t in trials if t.error]))
        what = f"{shown}: held-out accuracy of the best of {len(trials)} trials, {count} of them run on to 200,000 tokens"
        yield Row(what, best.mean(0), "share", seeds=seeds)
        yield Row(f"{shown}: median of the others at 100,000 tokens", median(others), "share", seeds=seeds[:1])
        yield Row(_settings(shown), " ".join(f"{key}={value}" for key, value in best.chosen.items()), seeds=seeds)
        yield Row(f"{shown}: settings on the edge of their range", ", ".join(edges(sweep, best)) or "none", seeds=seeds)


def _settings(shown: str) -> str:
    return f"{shown}: settings of the best trial"


def tuned(name: str) -> tuple[str, ...]:
    """The overrides that a method's sweep came to, as they stand in the ledger."""
    rows = ledger.read(Path(__file__).parent.parent / ledger.RESULTS / "tuning.json")
    (value,) = [row.value for row in rows if row.what == _settings(NAMES[name]) and not row.superseded]
    return tuple(str(value).replace("True", "true").replace("False", "false").split())
