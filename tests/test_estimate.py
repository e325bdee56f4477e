"""What a dry run says: counts that training confirms, and a refusal of what cannot fit."""

from __future__ import annotations

import json

import pytest

from rsim.cli.main import main
from rsim.config import load_config
from rsim.models.device import choose_device
from rsim.training import cost as module
from rsim.training.cost import estimate
from rsim.training.fitting import check_fits
from rsim.training.trainer import Trainer


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["models.reasoner_lora=3", "models.planner_lora=2"],
        ["stages.stage1.train_reasoner=false", "stages.stage2.train_reasoner=false"],
    ],
)
def test_the_counted_parameters_are_those_that_training_has(small, changes):
    config = small("run", *changes)
    found, agents = estimate(config), Trainer(config).agents
    assert found.job.needs["reasoner"].trained == (
        sum(p.numel() for p in agents["reasoner"].parameters) if "reasoner" in agents else 0
    )
    heads = sum(p.numel() for n, p in agents["planner"].model.named_parameters() if "score" in n and p.requires_grad)
    trained = sum(p.numel() for p in agents["planner"].parameters) - heads
    if config.models.planner_lora:
        assert found.job.needs["planner"].trained == trained
    else:  # the base's output head is counted in place of the planner's
        assert found.job.needs["planner"].trained >= trained
    assert found.job.config.total_steps == 4
    assert found.step > 0


def test_what_saves_memory_lowers_the_estimate(small):
    full = ["train.questions=32", "train.group=8", "rollout.max_tokens=300"]
    base = estimate(small("run", *full))
    for change in (["train.gradient_checkpointing=true"], ["train.micro_tokens=512"], ["rollout.batch=16"],
                   ["models.reasoner_lora=1", "models.planner_lora=1"]):  # fmt: skip
        one = estimate(small("run", *full, *change))
        assert sum(a.activations + a.cache + a.optimiser for a in one.job.needs.values()) < sum(
            a.activations + a.cache + a.optimiser for a in base.job.needs.values()
        ), change
    lora = ["models.reasoner_lora=1", "models.planner_lora=1"]
    apart, shared = estimate(small("run", *full, *lora)), estimate(small("run", *full, *lora, "models.shared_base=true"))
    assert shared.memory < apart.memory


def dry_run(capsys, *more):
    with pytest.raises(SystemExit) as ended:
        main(["train", "nano", "--dry-run", "--json", "--set", "data.train_size=100", *more])
    out, err = capsys.readouterr()
    return ended.value.code, json.loads(out), err


def test_a_run_that_cannot_fit_is_refused_with_what_would(monkeypatch, capsys, tmp_path):
    """Exit code 2, and settings on top with which the same dry run goes through."""
    found, run = estimate(load_config("nano")), ["--out", str(tmp_path / "run")]
    check_fits(found, [])
    monkeypatch.setattr(module, "_available", lambda device: ("this machine", 0.7 * found.memory))
    code, told, err = dry_run(capsys, *run)
    assert (code, told["fits"]) == (2, False)
    assert f"this machine has {0.7 * found.memory / 2**30:.1f} GiB: it would fit with --set " in err
    assert len(told["proposals"]) == 2, "all weights, and adapters"
    for proposal in told["proposals"]:
        settings = [word for key, value in proposal["settings"].items() for word in ("--set", f"{key}={json.dumps(value)}")]
        assert dry_run(capsys, *run, *settings)[0] == 0, settings
    monkeypatch.setattr(module, "_available", lambda device: ("this machine", 1.0))
    code, told, err = dry_run(capsys, *run)
    assert (code, told["proposals"]) == (2, [])
    assert "smaller models" in err


def test_apples_gpu_is_chosen_where_there_is_no_other(monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    config = load_config("nano", ["models.reasoner_lora=4", "models.planner_lora=4"])
    found = choose_device(config)
    assert (found.name, found.dtype) == ("mps", "float32")
    assert found.reason == "mps (the GPU that torch sees), float32 (rsim's bfloat16 is CUDA's alone)"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert choose_device(config).name == "cuda"


def test_device_and_precision_are_chosen_with_a_reason(monkeypatch):
    """float32 on a CPU and where all weights are trained; bfloat16 on a GPU below adapters."""
    adapters = ["models.reasoner_lora=4", "models.planner_lora=4"]
    assert choose_device(load_config("nano")).reason == (
        "cpu (torch sees no GPU), float32 (other precisions are slow on a CPU)"
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    whole = choose_device(load_config("nano", adapters[:1]))
    assert (whole.name, whole.dtype) == ("cuda", "float32")
    assert "planner" in whole.reason
    assert "reasoner" not in whole.reason
    assert choose_device(load_config("nano", adapters)).dtype == "bfloat16"
    assert choose_device(load_config("nano", [*adapters, "models.dtype=float32"])).dtype == "float32"
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: False)
    assert choose_device(load_config("nano", adapters)).dtype == "float32"
