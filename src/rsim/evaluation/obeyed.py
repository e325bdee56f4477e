"""Which rules an evaluation plays by: a trained planner's own, unless others were stated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rsim.config import RolloutConfig
from rsim.policies.protocol import AnyPlanner
from rsim.rules_file import RULE_FIELDS


def rules_for(rollout: RolloutConfig, planner: AnyPlanner | None, overrides: Sequence[str] = ()) -> RolloutConfig:
    """``rollout`` with the rules that a loaded planner was trained under; ``overrides`` (``rollout.max_steps=4``) go first."""
    if planner is None or planner.rules is None:
        return rollout
    stated = {override.partition("=")[0].strip() for override in overrides}
    own = {name: getattr(planner.rules, name) for name in RULE_FIELDS if f"rollout.{name}" not in stated}
    return replace(rollout, **own)
