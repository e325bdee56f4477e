"""What ``rsim experiment`` does. Each experiment is a module of `rsim.experiments` with ``run`` and ``LIMITS``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

from rsim.errors import UserError

EXPERIMENTS = {
    "controls": "the trained planner against every control, co-trained and as a plug-in",
    "budgets": "rSIM against tuned GRPO at three budgets of equal tokens",
    "fig3": "reasoner sizes x {CoT, + GRPO, + rSIM, + planner}",
    "fig4": "the frozen planner with other reasoners and other tasks",
}
_MODULES = {"fig3": "sizes", "fig4": "transfer"}  # where the module has another name


def run_experiment(
    name: str, seeds: Iterable[int], questions: int, jobs: int, out: Path, root: Path, overrides: list[str], *, quiet: bool
) -> Path:
    """Does what of the experiment was not done yet, and writes its page.

    Raises:
        UserError: there is no such experiment.
    """
    if name not in EXPERIMENTS:
        raise UserError(f"no experiment {name!r}", f"use one of {', '.join(EXPERIMENTS)}")
    from rsim.experiments.workbench import Workbench
    from rsim.models import quiet_models

    quiet_models()
    module = importlib.import_module(f"rsim.experiments.{_MODULES.get(name, name)}")
    bench = Workbench(out.resolve(), tuple(seeds), questions, jobs, tuple(overrides), quiet)
    page: Path = module.run(bench).publish(root, module.LIMITS)
    return page
