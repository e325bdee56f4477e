from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from rsim.config import Config, load_config
from rsim.engine.prepare import prepare
from rsim.lab.tokenizer import build_tokenizer
from rsim.policies.loading import load_planner
from rsim.policies.planner import Planner
from rsim.policies.reasoner import Reasoner
from rsim.policies.strategies import StrategySet, load_strategies
from tiny import tiny_model


@pytest.fixture
def lab_strategies() -> StrategySet:
    return load_strategies("lab")


def tiny_reasoner() -> Reasoner:
    model = tiny_model("qwen2")
    prepare(model)  # as a loaded one is
    return Reasoner(model, build_tokenizer())


@pytest.fixture
def reasoner() -> Reasoner:
    return tiny_reasoner()


@pytest.fixture(scope="session")
def written_base(tmp_path_factory):
    folder, reasoner = tmp_path_factory.mktemp("written") / "base", tiny_reasoner()
    reasoner.model.save_pretrained(folder)
    reasoner.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base_folder(tmp_path, written_base):
    return shutil.copytree(written_base, tmp_path / "base")


@pytest.fixture
def planner(base_folder, lab_strategies) -> Planner:
    return load_planner(str(base_folder), lab_strategies, device="cpu", dtype="float32", seed=0)


SMALL = ["train.questions=4", "train.group=4", "train.eval_every=2", "checkpoint.save_every=100", "train.samples_every=1", "data.eval_size=6",
         "data.train_size=40", "cold_start.episodes=0", "rollout.max_steps=2", "rollout.step_tokens=8", "rollout.max_tokens=40",
         "rollout.answer_tokens=6", "stages.stage1.steps=2", "stages.stage2.steps=2", "train.reasoner_lr=1e-3",
         "train.trackers=[]", "models.dtype=float64", "rewards.custom=[\"rewards.py:length\"]"]  # fmt: skip


@pytest.fixture
def small(base_folder, tmp_path, monkeypatch):
    """A config maker; a custom reward gives random models something to learn from.

    In float64: sums in another order, as other processors, thread counts and numbers of processes have them, then differ by
    some 1e-16. In float32 they differ by 1e-7, and sooner or later a uniform number falls between the two, another token is
    sampled, and what is the same run is no more.
    """
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text("def length(episode):\n    return (episode.sampled_tokens % 7) / 7\n")

    def make(out: str, *overrides: str) -> Config:
        models = [f'models.reasoner="{base_folder}"', f'models.planner="{base_folder}"', f'out="{tmp_path / out}"']
        return load_config("nano", [*models, *SMALL, *overrides])

    return make


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium; `.ci/run` installs it and requires the tests that need it. Playwright's event loop runs as long as it is
    open: longer than a module it would be in the way of tests that run one of their own."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        assert not os.environ.get("RSIM_REQUIRE_BROWSER"), "chromium is required here and not installed"
        pytest.skip("chromium is not installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
