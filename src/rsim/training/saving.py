"""What a run writes of its policies: checkpoints, the best and the final models, a KL term's reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rsim.config import Config
from rsim.distributed.shards import full_state_dict
from rsim.distributed.world import World
from rsim.engine.vllm import VllmServers
from rsim.evaluation.upstream import ServedGame
from rsim.game.rollout import Game
from rsim.models.adapters import has_adapter
from rsim.models.device import Device
from rsim.policies.loading import load_reasoner
from rsim.policies.planner import Planner
from rsim.policies.reasoner import Reasoner
from rsim.runs.checkpoints import Save
from rsim.runs.folder import RunFolder
from rsim.training.agent import Agent

Weights = dict[str, torch.Tensor]


@dataclass
class Saver:
    """Writes both policies into a run's folder; all ranks must come to each of its methods."""

    config: Config
    world: World
    folder: RunFolder
    reasoner: Reasoner | None  # None: behind an upstream
    planner: Planner | None
    agents: dict[str, Agent]
    game: Game | ServedGame
    # Told of each checkpoint that is there.
    on_save: Callable[[Path], None] = lambda folder: None

    def resumable(self, name: str, place: dict[str, Any]) -> None:
        """A checkpoint to resume from; ``place``: where the run is in its schedule."""
        state = place | {"agents": {key: agent.state() for key, agent in self.agents.items()}}
        if isinstance(self.game, ServedGame):
            state["account"] = dict(self.game.account)
        self.write(name, place["step"], state)

    def write(self, name: str, step: int, state: dict[str, Any] | None = None) -> None:
        """The checkpoint ``name`` of ``step``: both models and, where it is to be resumed from, ``state``."""
        savers: dict[str, Save] = {}
        if self.reasoner and self.config.holds_reasoner:
            weights = self._weights("reasoner", self.reasoner.model)
            savers["reasoner"] = partial(self.reasoner.save_pretrained, weights=weights)
        if self.planner:
            weights = self._weights("planner", self.planner.model)
            savers["planner"] = partial(self.planner.save_pretrained, weights=weights)
        if self.world.is_main:
            self.folder.flush()
            self.on_save(self.folder.checkpoints.save(name, step, savers, state))
        self.world.barrier()

    @property
    def _has_reference(self) -> bool:
        return self.config.objective.beta > 0 and "reasoner" in self.agents

    def write_reference(self) -> None:
        """The reasoner as it is now, for `load_reference`, where there is a KL term."""
        if self.reasoner is None or not self._has_reference:
            return
        weights = self._weights("reasoner", self.reasoner.model)
        if self.world.is_main:
            self.reasoner.save_pretrained(self.folder.path / "reference", weights)
        self.world.barrier()

    def load_reference(self, device: Device) -> None:
        """Gives the reasoner's agent what the KL term holds it to; read back from where it was saved, so that
        a resumed run has the same."""
        if self._has_reference:
            source, quantised = str(self.folder.path / "reference"), self.config.models.quantised
            saved = load_reasoner(source, device=device.name, dtype=device.dtype, quantised=quantised)
            self.agents["reasoner"].set_reference(saved)

    def check_servers(self) -> None:
        """Raises `UserError` where sampling servers take no new weights and the reasoner is to get some."""
        if self.reasoner and isinstance(self.game.servers, VllmServers) and self.config.trains_reasoner:
            if self.world.is_main:
                self.game.servers.check_updates(self.reasoner.model, self.folder.path / "vllm")
            self.world.barrier()

    def hand_over(self) -> None:
        """Gives sampling servers the reasoner's new weights, through the run's folder."""
        if self.reasoner and isinstance(self.game.servers, VllmServers) and self.config.trains_reasoner:
            if self.world.is_main:
                self.game.servers.update_weights(self.reasoner.model, self.folder.path / "vllm")
            self.world.barrier()

    def _weights(self, name: str, model: PreTrainedModel) -> Weights | None:
        """What is to be saved of an agent's model; None: whatever it holds when it is written."""
        if name not in self.agents or self.agents[name].sharded is None:
            return None
        weights: Weights = dict(model.state_dict())
        if has_adapter(model):  # the frozen weights are not saved
            trained = {name for name, p in model.named_parameters() if p.requires_grad}
            weights = {name: tensor for name, tensor in weights.items() if name in trained}
        else:
            weights = full_state_dict(weights, keep=self.world.is_main)
        return weights if self.world.is_main else None
