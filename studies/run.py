"""The experiments, each a module with ``run`` and ``LIMITS``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from rsim.errors import UserError

EXPERIMENTS = {
    "fig1": "strategies used before and after GRPO, and by the planner",
    "fig3": "reasoner sizes x {CoT, + GRPO, + rSIM, + planner}",
    "fig4": "the frozen planner with other reasoners and other tasks",
    "fig5": "training curves for a small and a large planner",
    "collapse": "long runs of GRPO alone and of rSIM",
    "balance": "even use of the strategies in place of the penalty on repeats",
    "cost": "a price for tokens, and whether the planner knows how sure it is",
    "growth": "candidates for a strategy set: what pays is kept, what does not is dropped",
    "outside": "tasks that the nine strategies cannot solve, and a tenth that is tried on them",
    "gym": "the same with a task of reasoning-gym",
    "controls": "the trained planner against every control, co-trained and as a plug-in",
    "budgets": "rSIM against tuned GRPO at three budgets of equal tokens",
    "rewards": "reward parts, removed one at a time",
    "schedule": "lambda fixed, switched, reversed",
    "continual": "a sequence of tasks, with and without replay",
    "reopen": "a planner that is sure goes on to another task, as it is and made to choose again",
    "prompts": "other wordings of the injected prompts",
    "robust": "many wordings in training, and wordings that were not among them",
    "finance": "SmolLM2-135M on TAT-QA before and after training (an hour)",
    "arith": "SmolLM2-135M on sums: base, cold start, GRPO, rSIM, controls (hours)",
}
_MODULES = {"fig1": "usage", "fig3": "sizes", "fig4": "transfer", "fig5": "curves"}  # where the module has another name


def run_experiment(
    name: str, seeds: Iterable[int], questions: int, jobs: int, out: Path, root: Path, overrides: list[str], *, quiet: bool
) -> Path:
    """Does what of the experiment was not done yet, and writes its page.

    Raises:
        UserError: there is no such experiment.
    """
    if name not in EXPERIMENTS:
        raise UserError(f"no experiment {name!r}", f"use one of {', '.join(EXPERIMENTS)}")
    from rsim.policies.loading import quiet_models
    from studies.workbench import Workbench

    quiet_models()
    module = module_of(name)
    bench = Workbench(out.resolve(), tuple(seeds), questions, jobs, tuple(overrides), quiet)
    page: Path = module.run(bench).publish(root, module.LIMITS)
    return page


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"studies.{_MODULES.get(name, name)}")
