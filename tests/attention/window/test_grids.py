"""Windows over several grids (an image and its references), against a dense formula under a mask."""

import pytest
import torch
from attention import oracles

from hybriddit.attention import HybridAttention, TokenLayout
from hybriddit.attention.window import attention_over_grids, seen_over_grids

GRIDS = [
    ((6, 5), (6, 5)),
    ((4, 6), (3, 5)),
    ((3, 5), (4, 6)),
    ((7, 2), (3, 8), (7, 2)),
    ((2, 9), (9, 2)),
    ((12, 8), (4, 8)),  # three queries share a place
    ((1, 7), (5, 1)),
]
SETTINGS = [
    {"window": (3, 4), "stride": (1, 1), "dilation": (1, 1)},
    {"window": (4, 3), "stride": (2, 3), "dilation": (1, 1)},
    {"window": (2, 2), "stride": (1, 2), "dilation": (2, 3)},
    {"window": (1, 1), "stride": (1, 1), "dilation": (1, 1)},
]


def random_inputs(grids, text, batch=2, heads=2, width=8):
    generator = torch.Generator().manual_seed(0)
    image = sum(rows * columns for rows, columns in grids)
    shapes = [(batch, image, heads, width)] * 3 + [(batch, text, heads, width)] * 2
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def expected_of(inputs, grids, text_mask=None, **settings):
    query, key, value, text_key, text_value = inputs
    mask = oracles.mask_over_grids(grids, **settings)
    text = torch.ones(len(mask), text_key.shape[1], dtype=torch.bool) if text_mask is None else text_mask[None]
    mask = torch.cat((mask, text.expand(len(mask), -1)), 1)
    key, value = torch.cat((key, text_key), 1), torch.cat((value, text_value), 1)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key) * query.shape[-1] ** -0.5
    lse = scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1)
    return oracles.softmax_attention(query, key, value, mask), lse, int(mask[:, : query.shape[1]].sum())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_against_the_dense_formula(grids, settings):
    inputs = random_inputs(grids, 3)
    out, lse = attention_over_grids(
        *inputs[:3], grids, text_key=inputs[3], text_value=inputs[4], return_lse=True, **settings
    )
    expected, expected_lse, pairs = expected_of(inputs, grids, **settings)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)
    assert seen_over_grids(grids, settings["window"], settings["dilation"]) == pairs
    weight, slope = torch.randn_like(out), torch.randn_like(lse)
    grads = [
        torch.autograd.grad((x * weight).sum() + (y * slope).sum(), inputs)
        for x, y in ((out, lse), (expected, expected_lse))
    ]
    for found, right in zip(*grads, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


def test_text_is_seen_once_and_masked_where_it_is_padded():
    grids, settings = ((4, 6), (3, 5)), SETTINGS[0]
    inputs = random_inputs(grids, 4, batch=1)
    text_mask = torch.tensor([[True, False, True, True]])
    text = {"text_key": inputs[3], "text_value": inputs[4], "text_mask": text_mask}
    out = attention_over_grids(*inputs[:3], grids, **text, **settings)
    expected = expected_of(inputs, grids, text_mask[0], **settings)[0]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("join", ["joint", "gate"])
def test_a_window_that_covers_all_grids_is_dense_attention(join):
    """Of a fresh layer: for grids of other sizes too, with and without gradients."""
    torch.manual_seed(0)
    layout = TokenLayout(3, ((6, 5), (4, 7)), text_first=True)
    settings = {"map_rank": 0, "projection": 4, "join": join, "gate": "token"}
    layer = HybridAttention(16, 2, 8, window=(16, 16), **settings).double()
    query, key, value = (torch.randn(2, 61, 2, 8, dtype=torch.float64) for _ in range(3))
    _, _, gate = layer.far_inputs(torch.randn(2, 58, 16, dtype=torch.float64), None, None)
    expected = oracles.softmax_attention(query, key, value)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            out = layer(query, key, value, layout, gate=gate)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    far = layer(query, key, value, layout, gate=gate + 1)
    assert (far - expected)[:, 3:].abs().amax((0, 2, 3)).min() > 1e-4


def test_it_compiles():
    grids, settings = ((4, 6), (3, 5)), SETTINGS[0]
    inputs = random_inputs(grids, 3)[:3]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: attention_over_grids(*x, grids, **settings), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(*inputs), attention_over_grids(*inputs, grids, **settings))
