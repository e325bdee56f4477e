"""A set that grows by what pays: each candidate is trained beside the set as it is, and stays if it wins a paired test.

Both begin with the same planner and take the same number of steps, the reasoner frozen. A planner that is sure would never try
what is new, so the candidate begins with a tenth of the probability wherever the planner decides (`adapt.lift`). One that is
not used after the trial is not kept, whatever the test says: two trainings differ by chance as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rsim.config import ColdStartConfig, Config, StageConfig, load_config
from rsim.data.load import load_problems
from rsim.discovery.adapt import adapted, lift, load
from rsim.errors import UserError
from rsim.evaluation.compare import Comparison, compare
from rsim.evaluation.loading import EvalSettings, load_game
from rsim.evaluation.saved import evaluate_into
from rsim.policies.planner import Planner
from rsim.policies.strategies import StrategySet, to_toml
from rsim.runs.folder import differences
from rsim.runs.locate import locate
from rsim.training.run import train

_SEED = 2000  # of the questions of the test: where questions have no end, not those by which a run's best checkpoint is picked
_BEST = Path("checkpoints", "best")
_LIFTED_ON = 64  # training questions, played once each
_USED = 0.01  # of all steps: the least that a strategy is used for after its trial if it is to stay


@dataclass(frozen=True)
class Trial:
    """One candidate: its planner's accuracy minus that of the set without it, its share of all steps, whether it stays."""

    strategy: str
    kept: bool
    used: float
    result: Comparison


def grow(
    run: str,
    candidates: StrategySet,
    out: Path,
    *,
    steps: int = 20,
    questions: int = 500,
    changes: tuple[str, ...] = (),
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> tuple[StrategySet, Path, list[Trial]]:
    """Tries what is new in ``candidates``, one after the other.

    Args:
        run: whose planner grows, beside its reasoner; ``changes`` override its config.
        out: trials are kept here; asked for again after a stop, what was done is not done again.
        steps: of training, for a trial and for the set as it is.
        questions: of the paired test, held out (``data.eval``, ``data.eval_split``). A candidate stays where the 95% interval
            of its gain is above 0 and it is used for one step in a hundred.

    Returns:
        the grown set, the run whose planner goes with it, and what came of each candidate. ``out`` also gets
        ``strategies.toml`` and ``trials.json``.

    Raises:
        UserError: nothing in ``candidates`` is new; the run has no planner, or one that is an adapter; ``out`` holds trials
            with other settings.
    """
    config, checkpoint = locate(run, list(changes))
    if checkpoint is None or not (checkpoint / "planner").is_dir():
        raise UserError(f"{run} has no trained planner", "give the folder of a run that trained one")
    trained = checkpoint / "reasoner"
    reasoner = str(trained) if trained.is_dir() else config.reasoner
    config = replace(config, models=replace(config.models, reasoner=reasoner))
    planner = checkpoint / "planner"
    current = load(str(planner)).strategies
    new = [strategy for strategy in candidates.strategies if strategy.name not in current.names]
    if not new:
        raise UserError("no new strategy", f"the planner knows {', '.join(current.names)}: add a [[strategy]] to the file")
    data = config.data  # an error in it comes now, not later
    load_problems(data.eval, data.eval_split, data_dir=data.data_dir, limit=questions, seed=_SEED)
    trials: list[Trial] = []
    rival = _trained(config, planner, current, out / "as-it-was", steps, questions)[0]
    for number, strategy in enumerate(new, 1):
        larger = StrategySet((*current.strategies, strategy))
        found, usage = _trained(config, planner, larger, out / f"trial-{number}", steps, questions)
        result = compare(found / "evaluation", rival / "evaluation")
        used = usage.get(strategy.name, 0.0)
        trials.append(Trial(strategy.name, result.low > 0 and used >= _USED, used, result))
        on_trial(trials[-1])
        if trials[-1].kept:
            current, planner = larger, found / _BEST / "planner"
            rival = found
            if strategy is not new[-1]:  # what comes next begins with this planner, and so does what it is held against
                rival = _trained(config, planner, current, out / f"after-trial-{number}", steps, questions)[0]
    (out / "strategies.toml").write_text(to_toml(current), encoding="utf-8")
    (out / "trials.json").write_text(json.dumps([asdict(trial) for trial in trials], indent=2) + "\n")
    return current, rival, trials


def _trained(
    config: Config, planner: Path, strategies: StrategySet, out: Path, steps: int, questions: int
) -> tuple[Path, dict[str, float]]:
    """The run ``out``: the planner over ``strategies``, trained with a frozen reasoner and evaluated; and what it uses."""
    start, known = out / "start", out / "begun.json"
    weights = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(planner.glob("*.safetensors"))]
    begun = {"strategies": to_toml(strategies), "planner": weights}
    if not known.is_file():
        _begun(config, planner, strategies, out).save_pretrained(start)
        (out / "set.toml").write_text(to_toml(strategies), encoding="utf-8")
        known.write_text(json.dumps(begun))
    elif json.loads(known.read_text()) != begun:
        raise UserError(f"{out} began with another planner or other strategies", "give --out another folder")
    now = replace(
        config,
        out=str(out),
        models=replace(config.models, planner=str(start), strategies=str(out / "set.toml")),
        cold_start=ColdStartConfig(),
        stages=(StageConfig("grow", steps, 0.5, train_reasoner=False),),
    )
    if (out / "checkpoints" / "final").is_dir():
        changed = differences(load_config(str(out / "config.toml")), now)
        if changed:
            raise UserError(f"{out} was trained with other settings: {'; '.join(changed)}", "give --out another folder")
    else:
        train(now, resume=any((out / "checkpoints").glob("step-*/manifest.json")))
    asked = EvalSettings(str(out / _BEST), split=config.data.eval_split, limit=questions, seed=_SEED)
    return out, evaluate_into(out / "evaluation", asked).usage


def _begun(config: Config, planner: Path, strategies: StrategySet, out: Path) -> Planner:
    """The planner over the larger set, what is new in it lifted where it decides today."""
    start = load(str(planner))
    today = start.strategies
    new = [name for name in strategies.names if name not in today.names]
    adapted(start, strategies)
    if not new:
        return start
    out.mkdir(parents=True, exist_ok=True)
    (out / "before.toml").write_text(to_toml(today), encoding="utf-8")
    before = replace(config, models=replace(config.models, strategies=str(out / "before.toml")))
    game = load_game(before, planner.parent, "", config.models.reasoner, [])
    problems = load_problems(config.data.train, "train", data_dir=config.data.data_dir, limit=_LIFTED_ON, seed=config.seed)
    episodes = game.play(problems, seed=config.seed)
    for name in new:
        lift(start, name, episodes)
    return start
