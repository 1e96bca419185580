"""The oracles themselves: they work wherever their inputs are. Tensors of the meta device stand in for a GPU's."""

import pytest
import torch
from attention import oracles

from hybriddit.attention.linear import FEATURE_MAPS

GRID, HEADS, WIDTH = (4, 5), 2, 8


def tensors(*sizes, width=WIDTH):
    return [torch.randn(2, *size, HEADS, width, device="meta", requires_grad=True) for size in sizes]


@pytest.mark.parametrize("text", [0, 3])
def test_window_attention_on_any_device(text):
    query, key, value = tensors(GRID, GRID, GRID)
    text_key, text_value = tensors((text,), (text,)) if text else (None, None)
    geometry = (3, 2), (1, 2), (2, 1)
    out = oracles.neighborhood(query, key, value, text_key, text_value, *geometry)
    assert out.device.type == "meta" and out.shape == query.shape
    lse = oracles.neighborhood_lse(query, key, text_key, *geometry)
    assert lse.device.type == "meta" and lse.shape == query.shape[:4]


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_linear_attention_on_any_device(feature_map, projected):
    query, key, value, weight = tensors((7,), (6,), (6,), (7,))
    projections = [torch.randn(HEADS, WIDTH, 4, device="meta") for _ in range(2)] if projected else None
    key_mask = torch.ones(2, 6, dtype=torch.bool, device="meta")
    near, gate = oracles.beside(weight)
    parts = oracles.mapped_parts(feature_map, query, key, value, projections, key_mask)
    assert oracles.joint(feature_map, query, key, value, near, gate, projections, key_mask).device.type == "meta"
    for join in ((), (near, gate)):
        leaves = [query, key, value, *join]
        found = oracles.gradients(parts, join, leaves, weight)
        assert [reference.shape for reference, _ in found] == [x.shape for x in leaves]
        assert all(x.device.type == "meta" for pair in found for x in pair)


def test_elu_s_gradients_on_any_device():
    query, key, value, weight = tensors((7,), (6,), (6,), (7,))
    for which, x in enumerate((query, key)):
        assert oracles.gradient_of_features(query, key, value, weight, which).shape == x.shape


def test_gradients_are_those_of_the_formula_and_their_size_knows_what_cancels():
    generator = torch.Generator().manual_seed(0)
    query, key, value, weight, near = (
        torch.randn(2, 5, HEADS, WIDTH, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(5)
    )
    gate = torch.rand(HEADS, 1, dtype=torch.float64, generator=generator, requires_grad=True)
    for join in ((), (near, gate)):
        leaves = [query, key, value, *join]
        out = oracles.joined(oracles.linear(query, key, value), join)
        found = oracles.gradients(oracles.linear_parts(query, key, value), join, leaves, weight)
        for (reference, size), expected in zip(found, torch.autograd.grad(out, leaves, weight), strict=True):
            torch.testing.assert_close(reference, expected)
            assert size >= (1 - 1e-9) * reference.norm() > 0
    # one key: the result is its value, whatever the query, but for eps
    one = [x[:, :1].detach().requires_grad_() for x in (query, key, value)]
    [(reference, size), *_] = oracles.gradients(oracles.linear_parts(*one), (), one, weight[:, :1])
    assert reference.norm() < 1e-3 * size
