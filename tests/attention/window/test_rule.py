"""Which tokens a window holds, position by position, and what is made of that."""

import random

import numpy as np
import pytest
import torch
from attention import oracles

from hybriddit.attention.window import rule


def draw_axis(seed):
    rng = random.Random(seed)
    length, dilation = rng.randint(1, 30), rng.choice((1, 1, 2, 3, 7))
    window = rng.randint(1, 40)
    return length, window, rng.randint(1, window), dilation


@pytest.mark.parametrize("seed", range(40))
def test_an_axis_against_the_definition(seed):
    length, window, stride, dilation = draw_axis(seed)
    expected = oracles.axis_neighbors(length, window, stride, dilation)
    mask = rule.axis_mask(length, window, stride, dilation)
    assert [set(row.nonzero()[:, 0].tolist()) for row in mask] == expected
    # one residue class at a time, as numpy arrays
    for residue in range(min(dilation, length)):
        places = np.arange(residue, length, dilation)
        first, count = rule.class_windows(np.arange(len(places)), residue, length, window, stride, dilation)
        for place, start in zip(places.tolist(), first.tolist(), strict=True):
            assert {residue + dilation * (start + i) for i in range(count)} == expected[place]


@pytest.mark.parametrize("seed", range(10))
def test_pairs_of_a_grid(seed):
    rows, columns = draw_axis(seed), draw_axis(seed + 100)
    grid, window, stride, dilation = zip(rows, columns, strict=True)
    assert rule.seen_pairs(grid, window, dilation) == oracles.window_mask(grid, window, stride, dilation).sum()


def test_a_window_that_covers_the_grid():
    assert rule.covers((4, 6), (4, 6), (1, 1)) and rule.covers((1, 6), (1, 6), (3, 1))
    assert not rule.covers((4, 6), (4, 5), (1, 1)) and not rule.covers((4, 6), (4, 6), (1, 2))


def test_additive_mask():
    seen = torch.tensor([[True, False], [False, True]])
    mask = rule.additive_mask(seen, 1, torch.float64)
    assert mask.dtype == torch.float64
    assert mask.tolist() == [[0, float("-inf"), 0], [float("-inf"), 0, 0]]
