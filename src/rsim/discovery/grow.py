"""A set that grows by what pays: each candidate is trained beside the set as it is, and stays if it wins a paired test.

Both begin with the same planner and take the same number of steps, the reasoner frozen. A planner that is sure hardly ever
tries what is new, so both are trained with an entropy target: its gradient lifts a new row without a sample of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rsim.config import ColdStartConfig, Config, StageConfig, load_config
from rsim.discovery.adapt import adapted, load
from rsim.errors import UserError
from rsim.evaluation.compare import Comparison, compare
from rsim.evaluation.loading import EvalSettings, locate
from rsim.evaluation.saved import evaluate_into
from rsim.strategies import StrategySet, to_toml
from rsim.training.run_folder import differences
from rsim.training.trainer import train

_SEED = 2000  # of the questions of the test: not those by which a run's best checkpoint is picked
_BEST = Path("checkpoints", "best")
_ENTROPY_WEIGHT, _ENTROPY_TARGET = 0.05, 1.0  # nats


@dataclass(frozen=True)
class Trial:
    """One candidate: its planner's accuracy minus that of the set without it, and whether it stays."""

    strategy: str
    kept: bool
    result: Comparison


def grow(
    run: str, candidates: StrategySet, out: Path, *, steps: int = 20, questions: int = 500, changes: tuple[str, ...] = (),
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> tuple[StrategySet, Path, list[Trial]]:  # fmt: skip
    """Tries what is new in ``candidates``, one after the other.

    Args:
        run: whose planner grows, beside its reasoner; ``changes`` override its config.
        out: trials are kept here; asked for again after a stop, what was done is not done again.
        steps: of training, for a trial and for the set as it is.
        questions: dev questions of the paired test. A candidate stays where the 95% interval of its gain is above 0.

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
    if (checkpoint / "reasoner").is_dir():
        config = replace(config, models=replace(config.models, reasoner=str(checkpoint / "reasoner")))
    planner = checkpoint / "planner"
    current = load(str(planner)).strategies
    new = [strategy for strategy in candidates.strategies if strategy.name not in current.names]
    if not new:
        raise UserError("no new strategy", f"the planner knows {', '.join(current.names)}: add a [[strategy]] to the file")
    trials: list[Trial] = []
    rival = _trained(config, planner, current, out / "as-it-was", steps, questions)
    for number, strategy in enumerate(new, 1):
        larger = StrategySet((*current.strategies, strategy))
        found = _trained(config, planner, larger, out / f"trial-{number}", steps, questions)
        result = compare(found / "evaluation", rival / "evaluation")
        trials.append(Trial(strategy.name, result.low > 0, result))
        on_trial(trials[-1])
        if trials[-1].kept:
            current, planner = larger, found / _BEST / "planner"
            rival = found
            if strategy is not new[-1]:  # what comes next begins with this planner, and so does what it is held against
                rival = _trained(config, planner, current, out / f"after-trial-{number}", steps, questions)
    (out / "strategies.toml").write_text(to_toml(current), encoding="utf-8")
    (out / "trials.json").write_text(json.dumps([asdict(trial) for trial in trials], indent=2) + "\n")
    return current, rival, trials


def _trained(config: Config, planner: Path, strategies: StrategySet, out: Path, steps: int, questions: int) -> Path:
    """The run ``out``: the planner over ``strategies``, trained with a frozen reasoner and evaluated."""
    start, known = out / "start", out / "begun.json"
    weights = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(planner.glob("*.safetensors"))]
    begun = {"strategies": to_toml(strategies), "planner": weights}
    if not known.is_file():
        adapted(load(str(planner)), strategies).save_pretrained(start)
        (out / "set.toml").write_text(to_toml(strategies), encoding="utf-8")
        known.write_text(json.dumps(begun))
    elif json.loads(known.read_text()) != begun:
        raise UserError(f"{out} began with another planner or other strategies", "give --out another folder")
    now = replace(
        config,
        out=str(out),
        models=replace(config.models, planner=str(start), strategies=str(out / "set.toml")),
        objective=replace(config.objective, planner_entropy=_ENTROPY_WEIGHT, entropy_target=_ENTROPY_TARGET),
        cold_start=ColdStartConfig(),
        stages=(StageConfig("grow", steps, 0.5, train_reasoner=False),),
    )
    if (out / "checkpoints" / "final").is_dir():
        changed = differences(load_config(str(out / "config.toml")), now)
        if changed:
            raise UserError(f"{out} was trained with other settings: {'; '.join(changed)}", "give --out another folder")
    else:
        train(now, resume=any((out / "checkpoints").glob("step-*/manifest.json")))
    evaluate_into(out / "evaluation", EvalSettings(str(out / _BEST), "", "", "", "dev", questions, _SEED, True, 1, ()))
    return out
