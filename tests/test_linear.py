"""The product that stands in for linear layers while no gradient is asked for."""

from __future__ import annotations

import copy

import pytest
import torch

from rsim import packed
from rsim.linear import Linear, product
from tiny import tiny_model


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("shape", [(8, 16), (300, 400)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_is_the_linear_layer(rows, shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(shape, generator=generator), torch.randn(2, rows, shape[1], generator=generator)
    bias = torch.randn(shape[0], generator=generator) if with_bias else None
    assert torch.allclose(product(x, weight, bias), torch.nn.functional.linear(x, weight, bias), atol=1e-4)


def test_other_dtypes_and_strided_weights():
    x, weight = torch.randn(3, 512).double(), torch.randn(512, 512).double()
    assert torch.equal(product(x, weight), x @ weight.T)
    assert torch.allclose(product(x.float(), weight.float().T), x.float() @ weight.float(), atol=1e-3)


def test_a_prepared_model_is_the_stock_one_to_everybody_else(tmp_path):
    """Same weights, same names, gradients, copies, saved folders and padded batches."""
    stock = tiny_model("llama", seed=2)
    model = copy.deepcopy(stock)
    packed.prepare(model)
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
