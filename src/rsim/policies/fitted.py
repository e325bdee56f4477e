"""What a planner was fitted for: it warns where it is plugged into another model."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

log = logging.getLogger("rsim")


@dataclass(frozen=True)
class FittedFor:
    """The reasoner of the log that a planner was fitted to; ``template``: the sha256 of its chat template."""

    model: str
    weights: dict[str, str]
    quantisation: str
    template: str
    system_prompt: str

    def warn(self, model: str, system_prompt: str | None = None) -> None:
        """Says in a line what differs: the model's name (the last part of a path), or the system prompt, where it is told."""
        if _name(model) != _name(self.model):
            log.warning(
                "the planner was fitted for %s (%s), not for %s: measure it there", self.model, self.quantisation, model
            )
        elif system_prompt is not None and system_prompt != self.system_prompt:
            log.warning("the planner was fitted behind another system prompt: %s", json.dumps(self.system_prompt))


def _name(model: str) -> str:
    """
    >>> _name("/models/Qwen2.5-Coder-1.5B.gguf") == _name("qwen2.5-coder-1.5b")
    True
    """
    return PurePath(model).name.lower().removesuffix(".gguf")


def to_json(fitted: FittedFor) -> str:
    return json.dumps(asdict(fitted), indent=1, ensure_ascii=False) + "\n"


def from_json(file: Path) -> FittedFor:
    return FittedFor(**json.loads(file.read_text(encoding="utf-8")))
