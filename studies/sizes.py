"""The smallest reasoner and a planner, trained, against the chain of thought of one over twenty times larger."""

from __future__ import annotations

from rsim.lab.pretrain import SIZES
from rsim.policies.loading import load_reasoner
from studies.arms import measure_arms
from studies.claims import FOUND, MAIN, METHODS
from studies.page import Page, points
from studies.stats import difference, estimate
from studies.workbench import Measurement, Training, Workbench, checkpoint

ISSUE = 10
LIMITS = """The larger has 1.7 million parameters. Both read as many documents of a hasty writer; text written by people
need not be so. Settings were tuned on nano-s for all."""

_SMALL, _LARGE = "nano-xs", "nano-m"
_OWN = f'models.reasoner="{_SMALL}"'


def run(bench: Workbench, page: Page) -> None:
    parameters = {name: load_reasoner(bench.base(name)).model.num_parameters() for name in (_SMALL, _LARGE)}
    ratio = parameters[_LARGE] / parameters[_SMALL]
    documents = {48 * SIZES[name].steps for name in (_SMALL, _LARGE)}
    page.text(
        f"{_SMALL} has {parameters[_SMALL]:,} parameters, {_LARGE} {parameters[_LARGE]:,}; each read {documents.pop():,} "
        f"documents. rSIM ({_SMALL} is its planner too) and GRPO alone sampled {MAIN:,} tokens; the last checkpoints."
    )
    assert not documents, "one of them read more"
    arms = {f"{name}, CoT": [Measurement("nano", "none", name)] for name in parameters}
    arms |= {f"{n}, {FOUND}": [Measurement("nano", spec, n) for spec in bench.search("climb", [n])] for n in parameters}
    for method, own in (("rSIM", (_OWN, f'models.planner="{_SMALL}"')), ("GRPO alone", (_OWN,))):
        preset, changes = METHODS[method]
        these = (*changes, *own, f"train.token_budget={MAIN}")
        runs = bench.train([Training(preset, these, seed) for seed in bench.seeds])
        arms[f"{_SMALL}, {method}"] = [Measurement(checkpoint(r, which="final")) for r in runs]
    done = measure_arms(bench, arms)
    page.arms(done)
    for name, arm in done.items():
        page.measured(name, estimate(arm))
    page.value(f"{_LARGE} / {_SMALL}, parameters", round(ratio, 1), unit="x", goal="at least 20", met=ratio >= 20)
    for other in (f"{_LARGE}, CoT", f"{_LARGE}, {FOUND}"):
        lead = difference(done[f"{_SMALL}, rSIM"], done[other])
        page.text(f"{_SMALL} with rSIM minus {other}: {points(lead)} points.")
        page.measured(f"{_SMALL}, rSIM, minus {other}", lead)
