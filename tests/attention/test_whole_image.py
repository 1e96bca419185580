"""What a layer gathers from strips of an image, against the whole, in float64."""

import pytest
import torch
from attention import oracles

from hybriddit.attention import HybridAttention, TokenLayout, linear_attention
from hybriddit.attention.linear import sum_keys
from hybriddit.attention.strips import Gathered, WholeImage

HEADS, WIDTH = 2, 6


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("feature_map", ["elu", "hedgehog", "polynomial"])
@pytest.mark.parametrize("joint", [False, True])
def test_sums_over_strips_serve_each_strips_queries(feature_map, joint):
    lengths = 5, 11, 3
    query, key, value, near = (draw(2, sum(lengths), HEADS, WIDTH, seed=seed) for seed in range(4))
    gate, lse = draw(2, sum(lengths), HEADS, 1, seed=4), draw(2, sum(lengths), HEADS, seed=5)
    lse = lse if joint else None
    expected = linear_attention(query, key, value, near=near, gate=gate, joint=joint, lse=lse, feature_map=feature_map)
    whole = WholeImage(set())
    parts = [x.split(lengths, 1) for x in (query, key, value, near, gate)]
    sums = [sum_keys(q, k, v, feature_map=feature_map) for q, k, v, _, _ in zip(*parts, strict=True)]
    for length, own in zip(lengths, sums, strict=True):
        whole.add_keys(own, length)
    found, start = [], 0
    for length, own, near_part, gate_part in zip(lengths, sums, *parts[3:], strict=True):
        part_lse = lse[:, start : start + length] if joint else None
        found.append(whole.seen_from(own, length).joined(near_part, gate_part, joint, part_lse))
        start += length
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_text_attends_to_strips_as_to_the_whole(scale):
    query, key, value = (draw(2, length, HEADS, WIDTH, seed=length) for length in (4, 20, 20))
    key = 8 * key  # sharp: a part's weight is near 0 or 1
    seen = draw(2, 7, seed=9) > 0
    whole = WholeImage(set())
    whole.add_text(query, key[:, :7], value[:, :7], scale, seen)
    whole.add_text(query, key[:, 7:9], value[:, 7:9], scale)
    whole.add_text(query, key[:, 9:], value[:, 9:], scale)
    mask = torch.cat((seen, seen.new_ones(2, 13)), 1)[:, None, None]
    expected = oracles.softmax_attention(query, key, value, mask=mask, scale=scale)
    torch.testing.assert_close(whole.text, expected, rtol=1e-12, atol=1e-12)


def test_a_layout_without_its_strip_is_refused():
    layer = HybridAttention(8, HEADS, WIDTH, window=(2, 2), map_rank=0)
    layer.whole_image = WholeImage(set())
    tokens = torch.zeros(1, 4, HEADS, WIDTH)
    with pytest.raises(ValueError, match="dropped its layout's strip: change layouts by their _replace"):
        layer(tokens, tokens, tokens, TokenLayout(0, ((2, 2),), True))


def test_the_last_layer_to_gather_says_so():
    waiting = set()
    first, second = WholeImage(waiting), WholeImage(waiting)
    waiting.update((first, second))
    first.gathered()
    with pytest.raises(Gathered):
        second.gathered()
