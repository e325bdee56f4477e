from __future__ import annotations

import pytest

from rsim.lab.tokenizer import build_tokenizer
from rsim.models import load_planner
from rsim.planner.planner import Planner
from rsim.rollout.reasoner import Reasoner
from rsim.strategies import StrategySet, load_strategies
from tiny import tiny_model


@pytest.fixture
def lab_strategies() -> StrategySet:
    return load_strategies("lab")


@pytest.fixture
def reasoner() -> Reasoner:
    return Reasoner(tiny_model("qwen2"), build_tokenizer())


@pytest.fixture
def base_folder(tmp_path, reasoner):
    folder = tmp_path / "base"
    reasoner.model.save_pretrained(folder)
    reasoner.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def planner(base_folder, lab_strategies) -> Planner:
    return load_planner(str(base_folder), lab_strategies, device="cpu", dtype="float32", seed=0)
