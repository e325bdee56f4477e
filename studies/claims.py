"""The lab's claims against controls (docs/protocol.md): joint training, GRPO, the planner alone, plug-ins."""

from __future__ import annotations

from pathlib import Path

from rsim.lab.oracle import state_blind
from rsim.runs.folder import sampled_tokens
from studies.arms import Arms, measure_arms
from studies.page import Page, each, interval, percent, points
from studies.stats import difference, estimate
from studies.tuning import tuned
from studies.workbench import Measured, Measurement, Training, Workbench, checkpoint

ISSUE = 10
LIMITS = """Tiny models on a procedural lab whose steps were made so that the right strategy depends on the state: results on a
laboratory, not on LLMs. Budgets count the reasoner's sampled tokens, cold start included; the planner's passes come
on top. Settings are those of the three sweeps (`python -m studies tuning`), whose best trials were compared at
200,000 tokens; the blind and the question-only planners have those of rSIM, or of the planner alone. The sequence
found for a reasoner is what single changes lead to from two that are known, on 200 dev problems; not the search over
all. Prompting a model of this size to choose is a weak control: it was pre-trained on the planner's template, never
to follow instructions. The oracle chooses by the rules that the writer knows, before the trained reasoner: no ceiling,
since a planner may know what this reasoner gets wrong."""

BUDGETS = (100_000, 200_000, 400_000)  # read from one run: rates are constant
MAIN = 200_000  # of the tables of controls, to which the settings were tuned
CONTROL_SEEDS = 5  # of the planners that see less, far behind in every pass; compared with ours of the same seeds
_JOINT = ("stages.stage1.steps=12", "stages.stage2.steps=1000")
_FROZEN = ("stages.stage1.steps=1000", "stages.stage1.train_reasoner=false", "stages.stage2.train_reasoner=false")
ALONE = (*_FROZEN, "stages.stage2.steps=0", "cold_start.episodes=0", *tuned("planner"))
BLIND, QUESTION = "blind planner, trained jointly", "question-only planner, trained jointly"
BLIND_ALONE, QUESTION_ALONE = "blind planner alone", "question-only planner alone"
LESS = (BLIND, QUESTION, BLIND_ALONE, QUESTION_ALONE)  # see less than ours does
FOUND = "sequence found for its reasoner"
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rSIM": ("nano", (*_JOINT, *tuned("rsim"))),
    "GRPO alone": ("nano-grpo", tuned("grpo")),
    "planner alone": ("nano", ALONE),
    QUESTION: ("nano", (*_JOINT, *tuned("rsim"), 'models.planner_sees="question"')),
    BLIND: ("nano", (*_JOINT, *tuned("rsim"), 'models.planner_sees="number"')),
    QUESTION_ALONE: ("nano", (*ALONE, 'models.planner_sees="question"')),
    BLIND_ALONE: ("nano", (*ALONE, 'models.planner_sees="number"')),
}

Runs = dict[str, dict[int, list[Path]]]  # of each method at each budget, one a seed


def run(bench: Workbench, page: Page) -> None:
    runs = {name: trained(bench, name) for name in METHODS}
    _budgets(bench, page, runs)
    ours, blind, question = ([checkpoint(r, which="final") for r in runs[name][MAIN]] for name in ("rSIM", BLIND, QUESTION))
    own_reasoners = [f"{run}/reasoner" for run in ours]
    own = {
        "trained planner": [Measurement(r) for r in ours],
        "oracle": [Measurement(r, "oracle") for r in ours],
        "its reasoner, CoT": [Measurement(r, "none") for r in ours],
        "random": [Measurement(r, "random") for r in ours],
        "sequence by hand": [Measurement(r, _by_hand()) for r in ours],
        FOUND: [Measurement(r, spec) for r, spec in zip(ours, bench.search("climb", own_reasoners), strict=True)],
        "blind planner's choices": [Measurement(r, f"{b}/planner") for r, b in zip(ours, blind, strict=False)],
        "question-only planner's choices": [Measurement(r, f"{q}/planner") for r, q in zip(ours, question, strict=False)],
        BLIND: [Measurement(b) for b in blind],
        QUESTION: [Measurement(q) for q in question],
        "shuffled": [Measurement(r, f"shuffled:{r}/planner") for r in ours],
        "prompted": [Measurement(r, "prompted") for r in ours],
    }
    done = measure_arms(bench, own)
    page.text(f"## The trained planner and controls ({MAIN:,} tokens)")
    page.text("Each with rSIM's trained reasoner, but for the planners that were trained jointly with a reasoner of their own.")
    page.arms(done)
    for name, arm in done.items():
        page.measured(f"co-trained: {name}", estimate(arm))
    blinds = {k: done[k] for k in ("sequence by hand", FOUND, "blind planner's choices", BLIND)}
    _above(page, "co-trained", done["trained planner"], blinds, "at least 10 points, interval above 5", 0.1, 0.05)
    questions = {k: done[k] for k in ("question-only planner's choices", QUESTION)}
    _above(page, "co-trained", done["trained planner"], questions, "at least 5 points, interval above 0", 0.05, 0.0)
    for name in ("shuffled", "prompted"):
        _above(page, "co-trained", done["trained planner"], {name: done[name]}, "interval above 0", 0.0, 0.0)
    plugged_into(bench, page, runs, "nano-s")


def trained(bench: Workbench, name: str, budgets: tuple[int, ...] = ()) -> dict[int, list[Path]]:
    """A method's runs, one a seed, read at each of ``budgets`` (default: those of the claims); each goes on from the last."""
    preset, changes = METHODS[name]
    seeds, budgets = (bench.seeds[:CONTROL_SEEDS], BUDGETS[:2]) if name in LESS else (bench.seeds, budgets or BUDGETS)
    at: dict[int, list[Path]] = {}
    before: list[Path | None] = [None] * len(seeds)
    for budget in budgets:
        these = (*changes, f"train.token_budget={budget}")
        at[budget] = bench.train([Training(preset, these, s, b) for s, b in zip(seeds, before, strict=True)])
        before = list(at[budget])
    return at


def _by_hand() -> str:
    """The best state-blind sequence that is known on dev problems, for the untrained reasoner."""
    return "sequence:" + ",".join(state_blind()["sequence"])


def _last(run: Path) -> Measurement:
    return Measurement(checkpoint(run, which="final"))


def _budgets(bench: Workbench, page: Page, runs: Runs) -> None:
    names = [name for name in METHODS if name not in LESS]
    done = measure_arms(bench, {f"{b:,} tokens: {n}": [_last(r) for r in runs[n][b]] for b in BUDGETS for n in names})
    rows = []
    for b in BUDGETS:
        arms = {name: done[f"{b:,} tokens: {name}"] for name in names}
        for name, arm in arms.items():
            e, used = estimate(arm), [sampled_tokens(r) for r in runs[name][b]]
            lead = points(difference(arms["rSIM"], arm)) if name != "rSIM" else ""
            rows.append([f"{name}, {b:,}", percent(e.mean), interval(e), each(e), f"{sum(used) / len(used):,.0f}", lead])
            page.measured(f"{b:,} tokens: {name}", e)
        grpo = {name: arm for name, arm in arms.items() if name.startswith("GRPO")}
        _above(page, f"{b:,} tokens", arms["rSIM"], grpo, "interval above 0", 0.0, 0.0)
        _above(page, f"{b:,} tokens", arms["rSIM"], {"planner alone": arms["planner alone"]}, "interval above 0", 0.0, 0.0)
    page.text("## Budgets")
    page.table(["", "accuracy", "95% interval", "each seed", "tokens sampled", "rSIM minus it, points"], rows)


def plugged_into(bench: Workbench, page: Page, runs: Runs, reasoner: str) -> None:
    """Trained planners before an untrained reasoner, which none was trained to serve but (nano-s) the planner alone."""
    arms = {
        FOUND: [Measurement("nano", spec, reasoner) for spec in bench.search("climb", [reasoner])],
        "CoT": [Measurement("nano", "none", reasoner)],
        "oracle": [Measurement("nano", "oracle", reasoner)],
        "random": [Measurement("nano", "random", reasoner)],
        "sequence by hand": [Measurement("nano", _by_hand(), reasoner)],
    }
    for name in ("rSIM", "planner alone", *LESS):
        planners = [checkpoint(r, "planner", which="final") for r in runs[name][MAIN]]
        arms[f"planner of: {name}"] = [Measurement("nano", planner, reasoner) for planner in planners]
    done = measure_arms(bench, arms)
    page.text(f"## Plugged into the untrained {reasoner} (planners of {MAIN:,} tokens)")
    page.arms(done)
    for name, arm in done.items():
        page.measured(f"plug-in, {reasoner}: {name}", estimate(arm))
    blinds = {k: done[k] for k in ("sequence by hand", FOUND, f"planner of: {BLIND}", f"planner of: {BLIND_ALONE}")}
    questions = {k: done[k] for k in (f"planner of: {QUESTION}", f"planner of: {QUESTION_ALONE}")}
    for name in ("rSIM", "planner alone"):
        use, ours = f"plug-in, {reasoner}, planner of {name}", done[f"planner of: {name}"]
        _above(page, use, ours, blinds, "at least 10 points, interval above 5", 0.1, 0.05)
        _above(page, use, ours, questions, "at least 5 points, interval above 0", 0.05, 0.0)


def _above(page: Page, use: str, ours: list[Measured], others: Arms, goal: str, mean: float, low: float) -> None:
    """Ours minus the best of the others."""
    best = max(others, key=lambda name: estimate(others[name]).mean)
    seeds = len(others[best]) if len(others[best]) > 1 else len(ours)
    lead = difference(ours[:seeds], others[best])
    page.measured(f"{use}: ours minus {best}", lead, goal, met=lead.mean >= mean and lead.low > low)
