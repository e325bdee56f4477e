"""Robust prompts: many wordings sampled in training, and what that does to wordings that no one saw in training."""

from __future__ import annotations

import json
import random
import string
from dataclasses import replace
from pathlib import Path

from rsim.policies.strategies import load_strategies
from studies.arms import measure_arms, rsim_runs, write_set
from studies.page import Page, gain, percent
from studies.stats import estimate
from studies.workbench import Measured, Measurement, Training, Workbench, checkpoint

ISSUE = 8
LIMITS = """All unseen wordings contain the prompt that the base was pre-trained on, with something before it. Something behind
it (`Think: now`) takes the base's accuracy to 0, and was neither trained nor tried here. The lab's other words are spelled
letter by letter. The generated wordings were tried after the others, and so with what those had at the unseen ones in
mind. An LLM's paraphrases share meaning rather than letters."""

# What stands around a strategy's first prompt. The first and the last list were fixed before any training with them; the
# second came after five had turned out to be too few, and before it was trained with.
_TRAINED = ("ok {}", "... {}", "> {}", "Hm... {}", "and {}")
_MORE = (
    *("Right, {}", "Good, {}", "So, {}", "2) {}", "a. {}", "NOTE {}", "Let us: {}", "- {}", "then; {}", "Fine. {}"),
    *("What now? {}", "Yes! {}", "# {}", "Step 3: {}", "I will {}"),
)
_LONGER = "stages.stage1.steps=32", "stages.stage2.steps=24"  # four times the preset's
_UNSEEN = ("1. {}", "STEP {}", "Now, {}", "Well, {}", "Ok now: {}", "Please. {}")
_GENERATED = 200
_USUAL = "usual"
_FEW, _MANY, _MOST = "two wordings in training", "seven", "twenty-two, four times as long"
_ANY = f"two, then {_GENERATED} more that were generated"
_GO_ON = "cold_start.episodes=0", "stages.stage1.steps=0", "stages.stage2.steps=42"  # three times the preset's steps


def run(bench: Workbench, page: Page) -> None:
    folder = bench.out / "sets"
    many = _written(folder / "seven-wordings.toml", _TRAINED, usual=True)
    most = _written(folder / "twenty-two-wordings.toml", (*_TRAINED, *_MORE), usual=True)
    drawn = _generated(random.Random(0))
    any_ = _written(folder / f"{_GENERATED}-generated.toml", drawn, usual=True)
    runs = {_FEW: rsim_runs(bench), _MANY: rsim_runs(bench, many), _MOST: rsim_runs(bench, most, *_LONGER)}
    runs[_ANY] = bench.train(
        [Training("nano", (*_taken_up(run), any_, *_GO_ON), seed) for run, seed in zip(runs[_FEW], bench.seeds, strict=True)]
    )
    wordings = {_USUAL: (), **{frame: (_written(folder / f"frame-{i}.toml", (frame,)),) for i, frame in enumerate(_UNSEEN)}}
    usual = _written(folder / "usual.toml", (), usual=True)
    asked = {
        f"{arm}, {wording}": [Measurement(checkpoint(r), changes=changes or (usual,)) for r in found]
        for arm, found in runs.items()
        for wording, changes in wordings.items()
    }
    done = measure_arms(bench, asked)
    page.text(
        f"The preset nano is trained as it is, with the lab's two prompts a strategy, and with five more, the first one "
        f"with something before it: {_shown(_TRAINED)}; and, for four times as many steps, with fifteen more than those: "
        f"{_shown(_MORE)}; and, gone on from the best checkpoint of the run with two, for 42 steps of stage 2, with "
        f"{_GENERATED} more that begin with one to three words made of random letters or digits ({_shown(drawn[:4])}). "
        f'An episode draws the wording of each step (`rollout.paraphrase = "random"`). All are then asked with one '
        f"wording at a time that none was trained with: {_shown(_UNSEEN)}."
    )
    arms = {arm: {wording: done[f"{arm}, {wording}"] for wording in wordings} for arm in runs}
    rows = []
    for wording in wordings:
        name = f"`{wording.format('Think:')}`" if wording != _USUAL else "the two usual ones"
        shares = [percent(estimate(arms[arm][wording]).mean) for arm in arms]
        rows.append([name, *shares, *(gain(arms[arm][wording], arms[_FEW][wording]) for arm in (_MANY, _MOST, _ANY))])
    page.table(["wording", *arms, *(f"{arm}: minus two, points" for arm in (_MANY, _MOST, _ANY))], rows)
    spreads = {arm: _spread(found) for arm, found in arms.items()}
    for arm, found in arms.items():
        page.text(f"{arm}: {percent(_mean(found))} over the unseen wordings, spread {_points(spreads[arm])} points.")
        page.measured(f"{arm}: the usual wordings", estimate(found[_USUAL]))
        page.value(f"{arm}: mean over unseen wordings", round(100 * _mean(found), 1), unit="%")
        page.value(f"{arm}: spread over unseen wordings", _points(spreads[arm]), unit="points")
    for arm in (_MANY, _MOST, _ANY):
        ratio = spreads[arm] / spreads[_FEW]
        what = f"spread over unseen wordings, {arm}, against two wordings"
        page.value(what, round(ratio, 2), "ratio", goal="at most 0.5", met=ratio <= 0.5)


def _generated(rng: random.Random) -> tuple[str, ...]:
    """Beginnings of one to three made-up words or numbers, in any case, with any mark behind them; none of the unseen ones."""
    frames: list[str] = []
    while len(frames) < _GENERATED:
        words = []
        for _ in range(rng.randint(1, 3)):
            letters = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 7)))
            word = rng.choice([letters, letters.capitalize(), letters.upper(), str(rng.randint(0, 99))])
            words.append(word + rng.choice(["", "", *",.:!?);"]))
        frame = f"{' '.join(words)} {{}}"
        if frame not in (*_UNSEEN, *frames):
            frames.append(frame)
    return tuple(frames)


def _taken_up(run: Path) -> tuple[str, ...]:
    """The changes that begin with the best checkpoint of ``run``."""
    return tuple(f"models.{agent}={json.dumps(checkpoint(run, agent))}" for agent in ("reasoner", "planner"))


def _written(file: Path, frames: tuple[str, ...], *, usual: bool = False) -> str:
    """A change of settings: the lab's strategies with each of ``frames`` around its first prompt; ``usual``: after both."""
    chosen = [
        replace(s, prompts=(*(s.prompts if usual else ()), *(frame.format(s.prompts[0]) for frame in frames)))
        for s in load_strategies("lab").strategies
    ]
    return f"models.strategies={json.dumps(write_set(file, chosen))}"


def _spread(arm: dict[str, list[Measured]]) -> float:
    """The best unseen wording's accuracy minus the worst one's."""
    means = [estimate(arm[wording]).mean for wording in _UNSEEN]
    return max(means) - min(means)


def _mean(arm: dict[str, list[Measured]]) -> float:
    return sum(estimate(arm[wording]).mean for wording in _UNSEEN) / len(_UNSEEN)


def _points(share: float) -> float:
    return round(100 * share, 1)


def _shown(frames: tuple[str, ...]) -> str:
    return ", ".join(f"`{frame.format('Think:')}`" for frame in frames)
