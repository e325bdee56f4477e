"""Random search over keys of a config: ``rsim sweep sweep.toml``.

Each trial is a run of its own in a process of its own, scored by its held-out accuracy; the best quarter is
run on the other seeds too, and the best mean wins. Every trial's settings lie in an optuna journal, so that a
sweep that was stopped goes on with the trial it was at (and that one with its last checkpoint).
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rsim.config import from_table, load_config
from rsim.engine.llama_process import ending_with_parent
from rsim.errors import UserError
from rsim.runs.folder import records
from rsim.runs.lock import locked
from rsim.settings import check_setting, literal, read_toml, setting

_EDGE = 0.05  # of a range, at either end
_BEYOND = 1.02  # of a budget: what a run that ends at it may have sampled
_REACHED = 0.9  # of a budget: what it must have


@dataclass(frozen=True)
class Settings:
    """A sweep's file, the table ``[search]`` aside."""

    config: str = setting("", "preset or file that the trials change")
    set: tuple[str, ...] = setting((), "overrides that all trials share, as in rsim train --set")
    trials: int = setting(24, "settings that are tried", at_least=2)
    seeds: tuple[int, ...] = setting((100, 101), "the first for every trial, the others for the best")
    confirmed: float = setting(0.25, "share that is run on the other seeds too", above=0, at_most=1)
    confirm: tuple[str, ...] = setting((), "overrides for these, run anew: a larger budget, say")
    budgets: tuple[int, ...] = setting((), "sampled tokens at which runs are read; none: at their end")
    seed: int = setting(0, "of the draws")


@dataclass(frozen=True)
class Range:
    """What a key is drawn from: a list of values, or the numbers between two."""

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    def on_edge(self, value: Any) -> bool:
        """Whether a value is near an end, so that a better one may lie beyond."""
        if self.values:
            ordered = all(type(v) in (int, float) for v in self.values)
            return ordered and len(self.values) > 1 and value in (min(self.values), max(self.values))
        if not self.low < value < self.high:  # a known one may lie beyond
            return True
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        place: float = (value - low) / (high - low)
        return not _EDGE < place < 1 - _EDGE


@dataclass(frozen=True)
class Sweep:
    settings: Settings
    ranges: tuple[Range, ...]
    known: tuple[dict[str, Any], ...] = ()  # settings that are tried beside those that are drawn


@dataclass(frozen=True)
class Trial:
    """``scores``: by budget (0: the end), of each seed that was run; none after an ``error``."""

    number: int
    chosen: dict[str, Any]
    scores: dict[int, list[float]]
    error: str = ""
    confirmed: bool = False

    def mean(self, budget: int) -> float:
        found = self.scores.get(budget, [])
        return sum(found) / len(found) if found else -1.0


def load_sweep(path: Path) -> Sweep:
    """
    Raises:
        UserError: a missing or malformed file, an unknown or doubtful key, a range that is none.
    """
    if not path.is_file():
        raise UserError(f"cannot read {path}", "no such file")
    table = read_toml(path)
    search = table.pop("search", None)
    if not isinstance(search, dict) or not search:
        remedy = 'e.g. "train.planner_lr" = {low = 1e-5, high = 1e-2, log = true}'
        raise UserError(f"{path} has no table [search]", remedy)
    known = table.pop("known", [])
    settings: Settings = from_table(Settings, table, str(path))
    stated = {override.partition("=")[0].strip() for override in (*settings.set, *settings.confirm)}
    if own := {"seed", "out"} & (search.keys() | stated):
        remedy = "a sweep gives each run its own: seeds = [...] are tried for the best"
        raise UserError(f"{path}: {min(own)}", remedy)
    for field in fields(settings):
        check_setting(field, getattr(settings, field.name), f"{path}: {field.name}")
    if not settings.config:
        raise UserError(f"{path} names no config", 'add e.g. config = "nano-grpo"')
    if not settings.seeds:
        raise UserError(f"{path}: seeds is empty", "give one at least")
    if not isinstance(known, list) or any(
        not isinstance(k, dict) or k.keys() != search.keys() for k in known
    ):
        raise UserError(f"{path}: [[known]] must give a value to each key of [search]", "and to no other")
    sweep = Sweep(settings, tuple(_range(str(key), value) for key, value in search.items()), tuple(known))
    for chosen in known:
        load_config(settings.config, _overrides(settings, chosen))
    load_config(settings.config, [*settings.set, *settings.confirm])
    for r in sweep.ranges:  # keys and values are checked before anything runs
        for value in r.values or (r.low, r.high):
            load_config(settings.config, _overrides(settings, {r.key: value}))
    return sweep


def _range(key: str, value: Any) -> Range:
    if isinstance(value, list) and value:
        return Range(key, values=tuple(value))
    if not isinstance(value, dict) or not {"low", "high"} <= set(value) <= {"low", "high", "log"}:
        raise UserError(f"search.{key} = {value!r}", "give a list, or {low = ..., high = ..., log = true}")
    low, high, log = value["low"], value["high"], value.get("log", False)
    numbers = all(type(x) in (int, float) and math.isfinite(x) for x in (low, high))
    if not numbers or low >= high or (log and low <= 0):
        remedy = "low and high are numbers, low below high (and above 0 where log = true)"
        raise UserError(f"search.{key} = {value!r}", remedy)
    # A key that takes whole numbers is refused.
    return Range(key, low=float(low), high=float(high), log=bool(log))


def _overrides(settings: Settings, chosen: dict[str, Any]) -> list[str]:
    return [*settings.set, *(f"{key}={literal(value)}" for key, value in chosen.items())]


def run_sweep(sweep: Sweep, out: Path, on_trial: Any = lambda trial, of: None) -> list[Trial]:
    """Runs what is left of a sweep in ``out``; returns its trials, the best one first.

    Raises:
        UserError: optuna is missing, or ``out`` holds another sweep or is another process's.
    """
    with locked(out):
        return _run_all(sweep, out, on_trial)


def _run_all(sweep: Sweep, out: Path, on_trial: Any) -> list[Trial]:
    settings, trials = sweep.settings, []
    every = [*_study(sweep, out), *sweep.known]
    for number, chosen in enumerate(every):
        trials.append(_played(settings, out, number, chosen, settings.seeds[:1]))
        on_trial(trials[-1], len(every))
    for trial in ranked(trials, settings)[: max(1, math.ceil(settings.confirmed * len(trials)))]:
        if trial.scores and (settings.seeds[1:] or settings.confirm):
            final = _played(settings, out, trial.number, trial.chosen, settings.seeds, confirm=True)
            trials[trial.number] = final
            on_trial(final, len(every))
    return ranked(trials, settings)


def ranked(trials: list[Trial], settings: Settings) -> list[Trial]:
    """Those that were confirmed first, each by the mean at the last budget."""
    last = settings.budgets[-1] if settings.budgets else 0
    return sorted(trials, key=lambda t: (not (t.confirmed and t.scores), -t.mean(last), t.number))


def _study(sweep: Sweep, out: Path) -> list[dict[str, Any]]:
    """What each trial has chosen, drawn by optuna's random sampler and kept in ``out/trials.journal``."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("rsim sweep needs optuna", "pip install 'rsim-rl[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    journal = optuna.storages.journal
    storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(out / "trials.journal")))
    sampler = optuna.samplers.RandomSampler(seed=sweep.settings.seed)
    study = optuna.create_study(
        storage=storage, study_name="sweep", sampler=sampler, direction="maximize", load_if_exists=True
    )
    file = Path(sweep.settings.config)  # which may say something else by now; a preset has no file here
    said = file.read_text(encoding="utf-8") if file.is_file() else ""
    for name, wanted in {"sweep": repr(sweep), "config": said}.items():
        if study.user_attrs.get(name, wanted) != wanted:
            raise UserError(f"{out} holds another sweep", "give --out another folder")
        study.set_user_attr(name, wanted)
    spaces: dict[str, Any] = {
        r.key: optuna.distributions.CategoricalDistribution(r.values)
        if r.values
        else optuna.distributions.FloatDistribution(r.low, r.high, log=r.log)
        for r in sweep.ranges
    }
    known = [trial.params for trial in study.trials if trial.params.keys() == spaces.keys()]
    # What is known, of a sweep that was stopped, is drawn aside once more; what follows is what would have.
    aside, count = optuna.create_study(sampler=sampler), sweep.settings.trials
    drawn = [(study if n >= len(known) else aside).ask(spaces).params for n in range(count)]
    return known + drawn[len(known) :]


def _played(
    settings: Settings,
    out: Path,
    number: int,
    chosen: dict[str, Any],
    seeds: tuple[int, ...],
    *,
    confirm: bool = False,
) -> Trial:
    scores: dict[int, list[float]] = {}
    anew = confirm and bool(settings.confirm)
    for seed in seeds:
        folder = out / f"trial-{number:03d}" / f"{'confirmed' if anew else 'seed'}-{seed}"
        own = [*(settings.confirm if anew else ()), f"seed={seed}", f"out={literal(folder)}"]
        error = _run(settings, folder, [*_overrides(settings, chosen), *own])
        if error:
            return Trial(number, chosen, {}, error)
        for budget in settings.budgets or (0,):
            score = _score(folder, budget)
            if score is None:
                within = f" within {budget} tokens: lower train.eval_every" if budget else ""
                return Trial(number, chosen, {}, f"no evaluation{within}")
            ended = max((r.get("sampled_tokens", 0) for r in records(folder)), default=0)
            if ended < _REACHED * budget:
                why = f"it ended at {ended:,} tokens, not at the budget of {budget:,}: lower it, or train on"
                return Trial(number, chosen, {}, why)
            scores.setdefault(budget, []).append(score)
    return Trial(number, chosen, scores, confirmed=confirm)


def _run(settings: Settings, folder: Path, overrides: list[str]) -> str:
    """Trains to the end what is not; returns the last line of what went wrong."""
    final = folder / "checkpoints" / "final"
    if final.exists():
        return ""
    changed = [part for override in overrides for part in ("--set", override)]
    resume = ["--resume"] if any((folder / "checkpoints").glob("step-*")) else []
    command = [sys.executable, "-m", "rsim", "train", settings.config, *changed, *resume, "--json"]
    # The run would go on alone and hold its folder, which a sweep that goes on needs; what it saved is there.
    command = ending_with_parent(command, signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (-signal.SIGINT, -signal.SIGTERM, 130) or (
        not done.returncode and not final.exists()
    ):
        raise KeyboardInterrupt  # it was told to stop
    said = done.stderr.strip().splitlines() or [f"it said nothing and ended with {done.returncode}"]
    return said[-1].removeprefix("rsim: ") if done.returncode else ""


def _score(folder: Path, budget: int) -> float | None:
    """Held-out accuracy at the last evaluation within the budget of sampled tokens (0: at the end), which
    a run's end may go beyond a little; None where none is within it."""
    accuracy: float | None = None
    tokens = 0
    for record in records(folder):
        tokens = record.get("sampled_tokens", tokens)
        if "eval/accuracy" in record and (not budget or tokens <= _BEYOND * budget):
            accuracy = record["eval/accuracy"]
    return accuracy


def edges(sweep: Sweep, best: Trial) -> list[str]:
    """The keys whose best value lies on the edge of its range: the range is to be widened."""
    return [r.key for r in sweep.ranges if r.on_edge(best.chosen[r.key])]


def write_table(sweep: Sweep, trials: list[Trial], out: Path) -> Path:
    """``table.md`` and ``plot.png``: every trial with its settings and scores; the scores over each key."""
    from matplotlib import pyplot

    keys, budgets = [r.key for r in sweep.ranges], sweep.settings.budgets or (0,)
    at = [f"at {budget:,} tokens" if budget else "at the end" for budget in budgets]
    head = ["trial", *keys, *at, "seeds"]
    rows = [
        [
            str(t.number),
            *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in (t.chosen[key] for key in keys)),
            *(f"{t.mean(b):.1%}" if t.scores else t.error.replace("|", "\\|") for b in budgets),
            str(len(t.scores.get(budgets[-1], []))),
        ]
        for t in trials
    ]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    size = (3 * len(keys), 3)
    figure, axes = pyplot.subplots(
        1, len(keys), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    shown = [t for t in trials if t.scores]
    for r, axis in zip(sweep.ranges, axes[0], strict=True):
        values = [t.chosen[r.key] if not r.values else str(t.chosen[r.key]) for t in shown]
        sizes = [18 * len(t.scores[budgets[-1]]) for t in shown]
        axis.scatter(values, [t.mean(budgets[-1]) for t in shown], s=sizes)
        axis.set_xlabel(r.key)
        if r.log:
            axis.set_xscale("log")
    axes[0][0].set_ylabel("held-out accuracy")
    figure.savefig(out / "plot.png", dpi=120)
    pyplot.close(figure)
    return out / "table.md"
