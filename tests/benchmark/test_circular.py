import math

import pytest
import torch
from small_benchmarks import CPU

from hybriddit.benchmark.circular import circular_attention, circular_block_mask, circular_pairs


def seen(grid, text, text_first, radius):
    """[S, S] of bool, token by token."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    order = [None] * text + places if text_first else places + [None] * text
    return torch.tensor(
        [[a is None or b is None or (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < radius**2 for b in order] for a in order]
    )


CIRCLES = [
    ((6, 6), 0, True, 2, 16),
    ((8, 16), 5, True, 3, 16),
    ((9, 7), 5, False, 3, 16),
    ((12, 32), 32, True, 4, 16),
    ((5, 48), 7, False, 1, 16),
    ((16, 16), 20, False, 40, 32),
    ((4, 16), 0, True, 15, 16),  # the ends of a row are exactly a radius apart
]


@pytest.mark.parametrize("grid, text, text_first, radius, block", CIRCLES)
def test_circular_attention_against_the_formula(grid, text, text_first, radius, block):
    from torch.nn.attention.flex_attention import flex_attention

    expected = seen(grid, text, text_first, radius)
    mask = circular_block_mask(grid, text, text_first, radius, CPU, block=block)
    total = len(expected)
    query, key, value = torch.randn(3, 1, total, 2, 8, dtype=torch.float64)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5
    weights = scores.masked_fill(~expected, -math.inf).softmax(-1)
    out = circular_attention(query, key, value, mask, flex_attention)
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", weights, value))
    image = expected.clone()
    places = slice(text, None) if text_first else slice(None, total - text)
    assert circular_pairs(grid, radius) == image[places, places].sum()

    # the kernel goes by the lists of blocks: partial ones get the mask, full ones do not, others are left out
    count = math.ceil(total / block)
    padded = torch.zeros(count * block, count * block, dtype=torch.bool)
    padded[:total, :total] = expected
    blocks = padded.view(count, block, count, block)
    partial, full = (listed(*lists) for lists in (
        (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)))  # fmt: skip
    assert not (partial & full).any()
    assert (blocks.any(3).any(1) <= (partial | full)).all(), "no pair is lost"
    assert (full <= blocks.all(3).all(1)).all(), "no pair is added"
    # and where a block is of whole rows or within one, no block is read for nothing
    if block % grid[1] == 0 or grid[1] % block == 0:
        if not text_first or text % block == 0:
            assert torch.equal(full, blocks.all(3).all(1))
        if text == 0:
            assert torch.equal(partial | full, blocks.any(3).any(1))


def listed(counts, indices):
    found = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, places) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        found[row, places[:count].long()] = True
    return found
