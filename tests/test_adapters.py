"""LoRA adapters: what is trained and saved, merging, one shared base, 4 bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rsim
from rsim.config import Config
from rsim.engine.vllm import save_untied
from rsim.errors import UserError
from rsim.evaluation.loading import load_game
from rsim.models.adapters import add, merged_weights, share_frozen
from rsim.policies.loading import load_planner, load_reasoner
from rsim.policies.planner import Planner
from rsim.policies.strategies import load_strategies
from rsim.serving.card import hub_folder
from rsim.training.trainer import Trainer
from tiny import TINY, metrics_of, tiny_model

LORA = ("models.reasoner_lora=2", "models.planner_lora=2", "train.reasoner_lr=0.01", "train.planner_lr=0.01")
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def saved(config: Config, agent: str) -> Path:
    return config.folder / "checkpoints" / "final" / agent


def adapter_of(config: Config, agent: str) -> dict[str, torch.Tensor]:
    return load_file(saved(config, agent) / "adapter_model.safetensors")


def test_only_the_adapters_and_the_planners_head_are_trained_and_saved(small):
    config = small("run", *LORA)
    trainer = Trainer(config)
    before = {a: {n: p.clone() for n, p in agent.model.named_parameters()} for a, agent in trainer.agents.items()}
    trainer.run()
    for name, agent in trainer.agents.items():
        moved = {n for n, p in agent.model.named_parameters() if not torch.equal(p, before[name][n])}
        assert moved
        assert all(".lora_" in n or n == "score.modules_to_save.default.weight" for n in moved)
    assert any("score" in n for n in adapter_of(config, "planner"))
    for agent in ("planner", "reasoner"):
        assert not (saved(config, agent) / "model.safetensors").exists()
        assert sum(t.numel() for t in adapter_of(config, agent).values()) < 0.3 * trainer.agents[agent].model.num_parameters()


def test_a_saved_adapter_is_stock_peft_and_merges_into_an_ordinary_model(small, tmp_path):
    config = small("run", *LORA, "models.dtype=float32")
    trainer = Trainer(config)
    trainer.run()
    trained, merged = trainer.reasoner.model, load_reasoner(str(saved(config, "reasoner")), device="cpu").model
    stock = AutoModelForCausalLM.from_pretrained(saved(config, "reasoner"))
    with torch.no_grad():
        expected = trained(IDS).logits
        torch.testing.assert_close(stock(IDS).logits, expected)
        torch.testing.assert_close(merged(IDS).logits, expected)
        assert not any(".lora_" in n for n, _ in merged.named_parameters())
        save_untied(trained, tmp_path / "served")
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "served")(IDS).logits, expected)
        planner = trainer.planner.model
        ordinary = load_planner(str(saved(config, "planner")), load_strategies("lab"), device="cpu", seed=0).model
        torch.testing.assert_close(ordinary(IDS).logits, planner(IDS).logits)
        assert merged_weights(planner).keys() == ordinary.state_dict().keys()
        hub_folder(str(config.folder), tmp_path / "hub", repo="me/p", licence="mit")
        pushed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hub")
        torch.testing.assert_close(pushed(IDS).logits, planner(IDS).logits)
    assert Planner.from_pretrained(saved(config, "planner")).strategies.names == load_strategies("lab").names
    for model in (merged, ordinary):
        assert all(p.requires_grad for p in model.parameters()), "one that is trained whole from there on"
    with pytest.raises(UserError, match="an adapter of rank 5"):
        load_reasoner(str(saved(config, "reasoner")), device="cpu", lora=5)
    with pytest.raises(UserError, match="an adapter of rank 5"):
        load_planner(str(saved(config, "planner")), load_strategies("lab"), device="cpu", seed=0, lora=5)


@pytest.mark.parametrize("extra", [[], ["objective.beta=0.05"], ["models.shared_base=true", "cold_start.episodes=0"]])
def test_a_resumed_run_with_adapters_equals_an_uninterrupted_one(small, extra):
    whole, parts = small("whole", *LORA, *extra), small("parts", *LORA, *extra)
    rsim.train(whole)
    trainer = Trainer(parts)
    trainer.on_metrics = lambda record: setattr(
        trainer, "stop_requested", "reward/accuracy" in record or trainer.stop_requested
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    rsim.train(parts, resume=True)
    assert metrics_of(parts) == metrics_of(whole)
    for agent in ("planner", "reasoner"):
        one, other = adapter_of(whole, agent), adapter_of(parts, agent)
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_shared_base_is_one_copy_and_changes_no_number(small):
    apart, shared = small("apart", *LORA), small("shared", *LORA, "models.shared_base=true")
    rsim.train(apart)
    trainer = Trainer(shared)
    planner, reasoner = trainer.planner.model.base_model, trainer.reasoner.model.base_model
    frozen = [{p.data_ptr() for p in model.parameters() if not p.requires_grad} for model in (planner, reasoner)]
    assert frozen[0] == frozen[1]
    assert len(frozen[0]) > 20
    trained = [{p.data_ptr() for p in a.model.parameters() if p.requires_grad} for a in trainer.agents.values()]
    assert not trained[0] & trained[1]
    trainer.run()
    assert metrics_of(shared) == metrics_of(apart)


def test_a_planner_alone_shares_the_weights_of_a_frozen_reasoner(small):
    frozen = ("stages.stage1.train_reasoner=false", "stages.stage2.train_reasoner=false", "models.planner_lora=2")
    trainer = Trainer(small("run", *frozen, "models.shared_base=true", "train.planner_lr=0.01"))
    before = {n: p.clone() for n, p in trainer.reasoner.model.named_parameters()}
    theirs = {p.data_ptr() for p in trainer.reasoner.model.base_model.parameters()}
    own = {p.data_ptr() for p in trainer.planner.model.base_model.parameters() if not p.requires_grad}
    assert own == theirs
    trainer.run()
    assert all(torch.equal(p, before[n]) for n, p in trainer.reasoner.model.named_parameters())


def test_what_is_trained_is_float32_also_above_bfloat16_weights(small):
    """Steps of 1e-5 would vanish in bfloat16; frozen weights stay in it."""
    config = small("run", "models.reasoner_lora=2", "models.planner_lora=2", "models.dtype=bfloat16", "train.planner_lr=1e-5",
                   "train.steps=2", "checkpoint.save_every=1")  # fmt: skip
    rsim.train(config)
    for resume in (False, True):
        trainer = Trainer(config, resume=True) if resume else Trainer(replace(config, out=config.out + "2"))
        for agent in trainer.agents.values():
            kinds = {(p.requires_grad, p.dtype) for n, p in agent.model.named_parameters() if "score" not in n}
            assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
            assert all(p.dtype == torch.float32 for p in agent.parameters)
    before, after = (load_file(config.folder / "checkpoints" / f"step-{i:06d}" / "planner" / "adapter_model.safetensors")
                     for i in (1, 2))  # fmt: skip
    assert all(t.dtype == torch.float32 for t in after.values())
    assert any(not torch.equal(before[k], after[k]) for k in after)


def test_models_of_different_bases_share_nothing(reasoner):
    other = tiny_model("qwen2", hidden_size=64)
    add(other, 2, "other", 0)
    with pytest.raises(UserError, match="same base"):
        share_frozen(other, reasoner.model)


def test_four_bit_weights_train_their_adapters(small, base_folder):
    pytest.importorskip("bitsandbytes")
    tiny_model("qwen2", hidden_size=64, intermediate_size=128).save_pretrained(base_folder)  # 4-bit blocks are 64 wide
    config = small("run", *LORA, "models.quantised=true", "models.dtype=float32", "train.steps=2", "objective.beta=0.1")
    trainer = Trainer(config)
    kinds = {type(m).__name__ for m in trainer.reasoner.model.modules()}
    assert "Linear4bit" in kinds
    trainer.run()
    ratios = [r["reasoner/ratio"] for r in metrics_of(config) if "reasoner/ratio" in r]
    assert ratios == pytest.approx([1] * len(ratios), abs=1e-3)
    first = next(r for r in metrics_of(config) if "reasoner/kl" in r)
    assert abs(first["reasoner/kl"]) < 1e-6, "the reference is the reasoner itself, in 4 bits as well"
    assert any(t.abs().sum() > 0 for n, t in adapter_of(config, "reasoner").items() if "lora_B" in n)
    game = load_game(config, config.folder / "checkpoints" / "final", "", "", [])
    with torch.no_grad():
        torch.testing.assert_close(game.reasoner.model(IDS).logits, trainer.reasoner.model(IDS).logits)
        torch.testing.assert_close(game.planner.model(IDS).logits, trainer.planner.model(IDS).logits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["models.reasoner_lora=-1"], "reasoner_lora"),
        (["models.quantised=true", "models.planner_lora=4"], "reasoner_lora"),
        (["models.quantised=true", *LORA, "rollout.engine=vllm"], "vLLM"),
        (["models.shared_base=true", "models.reasoner_lora=4"], "planner_lora"),
        (
            ["models.shared_base=true", "models.reasoner_lora=4", "models.planner_lora=4", 'models.planner="nano-s"'],
            "same base",
        ),
    ],
)
def test_combinations_that_cannot_work_are_refused(small, changes, said):
    with pytest.raises(UserError, match=said):
        small("run", *changes)


def test_an_adapter_remembers_the_name_of_its_base(small, base_folder):
    config = small("run", *LORA, "train.steps=1")
    rsim.train(config)
    assert json.loads((saved(config, "reasoner") / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base_folder
    )


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_merged_weights_have_the_experts_updates(family, tmp_path):
    """peft wraps a layer's experts as parameters: the weights handed to a server lacked them. Later they had names and shapes
    that are transformers' own, in memory, where the server reads the hub's."""
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = getattr(transformers, f"{family}Config")(**TINY, **experts)
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind(config).eval()
    model.save_pretrained(tmp_path / "hub")
    add(model, 4, "base", seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    fresh = kind(config).eval()
    fresh.load_state_dict(merged_weights(model))
    ids = torch.tensor([[5, 9, 11, 7, 30, 41]])
    torch.testing.assert_close(fresh(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-4)
    save_untied(model, tmp_path / "served")
    before, served = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hub", "served"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in served.items()}
    assert sum(not torch.equal(before[n], served[n]) for n in before if ".experts." in n) == 2 * 4 * 3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-4)


def test_an_adapter_whose_update_is_not_known_is_not_merged_without_it():
    """A layer of another kind was left as its base has it, without a word."""
    model = tiny_model("qwen2")
    model.add_adapter(LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"model\.embed_tokens, a Embedding, cannot be merged"):
        merged_weights(model)
