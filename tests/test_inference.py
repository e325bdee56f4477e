"""The product that stands in for linear layers while no gradient is asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rsim.engine import packed
from rsim.engine.layers import Linear, pack, product
from rsim.game.problem import Problem
from rsim.game.rollout import Game
from rsim.lab.tokenizer import build_tokenizer
from rsim.policies.reasoner import Reasoner
from tiny import RULES, tiny_model


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("shape", [(8, 16), (300, 400)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_is_the_linear_layer(rows, shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(shape, generator=generator), torch.randn(2, rows, shape[1], generator=generator)
    bias = torch.randn(shape[0], generator=generator) if with_bias else None
    assert torch.allclose(product(x, weight, bias), torch.nn.functional.linear(x, weight, bias), atol=1e-4)


@pytest.mark.parametrize("hidden", [32, 320])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_faster_layers_give_what_the_stock_ones_give(architecture, hidden):
    """Small matrices, which stay with PyTorch's product, and large ones; with gradients, the stock code runs."""
    if architecture == "llama":
        config = LlamaConfig(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
                             vocab_size=64, mlp_bias=True, initializer_range=0.2)  # fmt: skip
        stock = LlamaForCausalLM(config).eval()
    else:
        config = Qwen2Config(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=4, vocab_size=64, initializer_range=0.2)  # fmt: skip
        stock = Qwen2ForCausalLM(config).eval()
    for name, p in stock.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(p, 1.0, 0.3, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(stock)
    packed.attach(model)
    swapped = [type(m) for m in model.modules() if type(m).__name__.endswith(("RMSNorm", "MLP"))]
    assert swapped
    assert all(not kind.__module__.startswith("transformers.") for kind in swapped)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, stock(ids).logits, atol=1e-3)
    assert torch.equal(model(ids).logits, stock(ids).logits)


def test_packed_weights_sample_the_same_and_are_gone_when_weights_may_change(monkeypatch):
    """A rollout lays the large weights out anew; they are laid out again for the next one, after an update."""
    model = tiny_model("llama", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    reasoner, problems = Reasoner(model, build_tokenizer()), [Problem(q, "1") for q in ("4*17+38=?", "7=?")]
    large = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.numel() >= 1 << 16]
    used = []

    def played():
        episodes = Game(reasoner, None, RULES).play(problems, seed=0, on_step=lambda *_: used.append([m.packed for m in large]))
        assert all(m.packed is None for m in large)
        return [e.token_ids for e in episodes], torch.tensor([p for e in episodes for p in e.logprobs])

    first = played()
    assert large
    assert all(one is not None for packs in used for one in packs)
    with torch.no_grad():
        for layer in large:
            layer.weight.mul_(0.5)
    changed = played()
    monkeypatch.setattr("rsim.engine.layers.PACKED_BYTES", 0)
    plain = played()
    assert plain[0] == changed[0] != first[0]
    assert torch.allclose(plain[1], changed[1], atol=1e-4)
    assert used[-1] == [None] * len(large)


def test_a_weight_that_changes_while_it_is_packed_is_read_itself():
    """A wrapped model keeps its engine; whoever trained it between two answers got the old weights' answers."""
    layer, rows = Linear(300, 400), torch.randn(3, 300)
    pack(torch.nn.Sequential(layer))
    assert layer.packed is not None
    with torch.no_grad():
        before = layer(rows)
        layer.weight.mul_(0.5)
        assert torch.allclose(layer(rows), torch.nn.functional.linear(rows, layer.weight, layer.bias), atol=1e-5)
        assert not torch.allclose(layer(rows), before, atol=1e-2)


def test_other_dtypes_and_strided_weights():
    x, weight = torch.randn(3, 512).double(), torch.randn(512, 512).double()
    assert torch.equal(product(x, weight), x @ weight.T)
    assert torch.allclose(product(x.float(), weight.float().T), x.float() @ weight.float(), atol=1e-3)


def test_a_prepared_model_is_the_stock_one_to_everybody_else(tmp_path):
    """Same weights, same names, gradients, copies, saved folders and padded batches."""
    stock = tiny_model("llama", seed=2)
    model = copy.deepcopy(stock)
    packed.attach(model)
    assert any(type(m) is Linear for m in model.modules())
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    for m in (model, copy.deepcopy(model)):
        assert torch.allclose(
            m(ids, attention_mask=mask).logits[:, -1], stock(ids, attention_mask=mask).logits[:, -1], atol=1e-5
        )
        assert (
            m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist()
            == stock.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist()
        )
    model(ids).logits.sum().backward()
    stock(ids).logits.sum().backward()
    for (name, p), (other, q) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        assert name == other
        assert torch.allclose(p.grad, q.grad, atol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    assert "rsim_packed" not in (tmp_path / "saved" / "config.json").read_text()
    again = type(stock).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), stock.state_dict().values(), strict=True))
