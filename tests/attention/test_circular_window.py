"""Circular windows and pooled keys against plain float64 formulas, which measure every distance token by token."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from hybriddit.attention import HybridAttention, TokenLayout, neighborhood_attention
from hybriddit.attention.window import (
    WindowCase,
    attention_over_grids,
    choose_backend,
    flex,
    key_rows,
    seen_over_grids,
    seen_pairs,
)

# the last but one: wider than tall, a radius that reaches over one axis and not over the other
CASES = [((5, 7), 2, 0), ((33, 9), 6, 3), ((1, 17), 4, 2), ((20, 35), 23, 130), ((6, 6), 40, 0)]


def circle(grid, radius):
    """[N, N] of bool."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    return torch.tensor([[(a - c) ** 2 + (b - d) ** 2 < radius**2 for c, d in places] for a, b in places])


def softmax(query, key, value, seen):
    """[B, N, heads, D]; seen [B or 1, N, M] of bool. And its log-sum-exp [B, N, heads]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value), scores.logsumexp(-1).transpose(1, 2)


def inputs(grid, text, seed=0):
    torch.manual_seed(seed)
    image, words = (2, *grid, 2, 8), (2, text, 2, 8)
    shapes = [image] * 3 + [words] * 2
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def expected(tensors, grid, radius, text_mask=None):
    query, key, value = (x.flatten(1, 2) for x in tensors[:3])
    key, value = (torch.cat(pair, 1) for pair in ((key, tensors[3]), (value, tensors[4])))
    words = torch.ones(2, tensors[3].shape[1], dtype=torch.bool) if text_mask is None else text_mask
    seen = torch.cat((circle(grid, radius).expand(2, -1, -1), words[:, None].expand(-1, query.shape[1], -1)), 2)
    return tuple(x.unflatten(1, grid) for x in softmax(query, key, value, seen))


def attend(tensors, radius, **settings):
    text = {"text_key": tensors[3], "text_value": tensors[4]} if tensors[3].shape[1] else {}
    return neighborhood_attention(*tensors[:3], window=radius, circle=True, **text, **settings)


@pytest.mark.parametrize("grid, radius, text", CASES)
@pytest.mark.parametrize("backend", ["dense", "tiled", "flex", "auto"])
def test_a_circle_against_the_formula(grid, radius, text, backend):
    tensors = inputs(grid, text)
    wanted, lse = expected(tensors, grid, radius)
    if backend == "flex":  # without gradients on a CPU
        with torch.no_grad():
            return torch.testing.assert_close(attend(tensors, radius, backend=backend), wanted)
    out = attend(tensors, radius, backend=backend)
    torch.testing.assert_close(out, wanted)
    weight = torch.randn_like(out)
    used = tensors if text else tensors[:3]
    found, right = (torch.autograd.grad((weight * x).sum(), used) for x in (out, wanted))
    torch.testing.assert_close(found, right)
    with torch.no_grad():
        torch.testing.assert_close(attend(tensors, radius, return_lse=True, backend=backend), (wanted, lse))


def test_padded_text_beside_a_circle():
    grid, text_mask = (9, 6), torch.tensor([[True, True, False], [True, False, False]])
    tensors = inputs(grid, 3)
    for backend in ("dense", "tiled"):
        found = attend(tensors, 4, text_mask=text_mask, backend=backend)
        torch.testing.assert_close(found, expected(tensors, grid, 4, text_mask)[0])


@pytest.mark.parametrize("grid, radius", [((5, 7), 2), ((33, 9), 6), ((4, 6), 40), ((8, 8), 1)])
def test_pairs_of_a_circle(grid, radius):
    assert seen_pairs(grid, (radius, radius), (1, 1), circle=True) == circle(grid, radius).sum()


def test_several_grids():
    # of another grid, a token has the circle around its own relative place
    grids, radius = ((6, 8), (3, 4), (6, 8)), 2
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 108, 1, 8, dtype=torch.float64)
    places = [
        (g, row, column) for g, (rows, columns) in enumerate(grids) for row in range(rows) for column in range(columns)
    ]
    seen = torch.zeros(108, 108, dtype=torch.bool)
    for i, (g, row, column) in enumerate(places):
        for j, (h, there_row, there_column) in enumerate(places):
            at = [(2 * x + 1) * m // (2 * n) for x, n, m in zip((row, column), grids[g], grids[h], strict=True)]
            seen[i, j] = (at[0] - there_row) ** 2 + (at[1] - there_column) ** 2 < radius**2
    out = attention_over_grids(query, key, value, grids, window=radius, circle=True)
    torch.testing.assert_close(out, softmax(query, key, value, seen[None])[0])
    assert seen_over_grids(grids, (radius, radius), (1, 1), circle=True) == seen.sum()


def test_what_a_circle_refuses():
    tensors = inputs((6, 6), 0)
    for settings in ({"stride": 2}, {"dilation": 2}):
        with pytest.raises(ValueError, match="neither stride nor dilation"):
            attend(tensors, 3, **settings)
    for backend in ("triton", "natten"):
        with pytest.raises(ValueError, match="no circular windows"):
            attend(tensors, 3, backend=backend)
    case = WindowCase(torch.device("cpu"), torch.float32, (64, 64), 2, 64, (8, 8), circle=True)
    choice = choose_backend(case)
    assert choice.backend == "tiled" and ("triton", "it has no circular windows") in choice.passed_over


def test_rows_around_a_strip_suffice():
    grid, radius = (23, 6), 5
    tensors = inputs(grid, 0)
    whole = attend(tensors, radius)
    for first, count in ((0, 3), (9, 4), (20, 3)):
        begin, end = key_rows(first, count, height=grid[0], window=radius, circle=True)
        assert (begin, end) == (max(0, first - 4), min(23, first + count + 4))
        part = attend([x[:, begin:end] for x in tensors[:3]] + tensors[3:], radius)
        own = slice(first - begin, first - begin + count)
        torch.testing.assert_close(part[:, own], whole[:, first : first + count])


@pytest.mark.parametrize("settings", [{"window_shape": "circle"}, {"stride": (2, 1)}], ids=["circle", "square"])
def test_pooled_keys_of_a_layer(settings):
    """Of grids that blocks do not divide, beside padded text, with shared key heads, joined with a far branch."""
    grids, side, words = ((7, 10), (3, 4)), 4, torch.tensor([[True, True, False], [True, False, False]])
    torch.manual_seed(0)
    layer = HybridAttention(
        32, 4, 8, kv_heads=2, window=(3, 3), map_rank=0, pooled_keys=side, gate="head", gate_init=0.7, **settings
    ).double()
    bare = HybridAttention(32, 4, 8, kv_heads=2, window=(3, 3), map_rank=0, gate="head", gate_init=0.7, **settings)
    bare.double().load_state_dict({k: v for k, v in layer.state_dict().items() if "pooled" not in k})
    with torch.no_grad():
        layer.pooled.weight.add_(0.1 * torch.randn(side, side))
    layout = TokenLayout(3, grids, text_first=True)
    query = torch.randn(2, 85, 4, 8, dtype=torch.float64)
    key, value = (torch.randn(2, 85, 2, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")

    pools = []
    for tokens in (key, value):
        blocks = []
        for (height, width), image in zip(grids, tokens[:, 3:].split([70, 12], 1), strict=True):
            for row in range(0, height, side):
                for column in range(0, width, side):
                    blocks.append(sum(
                        layer.pooled.weight[a, b] * image[:, min(row + a, height - 1) * width + min(column + b, width - 1)]
                        for a in range(side) for b in range(side)
                    ))  # fmt: skip
        pools.append(torch.stack(blocks, 1))
    # pooled keys are as more words that image tokens see, which the layer without them can be given
    joined = [
        torch.cat((tokens[:, :3], pool, tokens[:, 3:]), 1) for tokens, pool in zip((key, value), pools, strict=True)
    ]
    more = len(pools[0][0])
    longer = torch.cat((query[:, :3], query.new_zeros(2, more, 4, 8), query[:, 3:]), 1)
    mask = torch.cat((words, torch.ones(2, more, dtype=torch.bool)), 1)
    wanted = bare(longer, *joined, TokenLayout(3 + more, grids, text_first=True), text_mask=mask)[:, 3 + more :]
    out = layer(query, key, value, layout, text_mask=words)
    torch.testing.assert_close(out[:, 3:], wanted)
    torch.testing.assert_close(out[:, :3], bare(query, key, value, layout, text_mask=words)[:, :3])  # text sees none
    leaves = [key, value, layer.pooled.weight]
    weight = torch.randn_like(wanted)
    found, right = (torch.autograd.grad((weight * x).sum(), leaves) for x in (out[:, 3:], wanted))
    torch.testing.assert_close(found, right)

    parts, plain = layer.flops_by_part(layout), bare.flops_by_part(layout)
    assert more == 2 * 3 + 1 and parts.pop("pooling") == 4 * 82 * 16
    assert parts.pop("near") - plain.pop("near") == 4 * 82 * more * 32 and parts == plain


@pytest.mark.parametrize("grid, radius, text", [((20, 35), 23, 130), ((33, 70), 9, 5), ((64, 48), 20, 0)])
def test_flex_is_given_the_blocks_that_torch_would_make(grid, radius, text):
    # its CPU path does not heed which blocks are seen wholly, its kernels do
    layout = flex.best_layout(grid, (radius, radius), (1, 1), (1, 1), text, circle=True)
    expected = create_block_mask(layout.mask_mod(), None, None, *layout.lengths, device="cpu")
    found = flex._block_mask(layout, [torch.from_numpy(x) for x in flex.block_arrays(layout, True)])
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, wanted = (getattr(mask, f"{kind}_num_blocks") for mask in (found, expected))
        assert torch.equal(counts, wanted)
        for block, count in enumerate(counts[0, 0]):
            lists = (getattr(mask, f"{kind}_indices")[0, 0, block, :count].tolist() for mask in (found, expected))
            assert len({tuple(sorted(x)) for x in lists}) == 1
    whole = int(found.full_kv_num_blocks.sum())
    assert flex.visited_blocks(layout) == (int(found.kv_num_blocks.sum()) + whole, whole)
