"""FlexAttention over 2-D tiles: the order of the tokens, the mask and the lists of blocks. Its kernels need a GPU; what
they are given is held against torch's own construction, and against the oracle by doing what the kernels do."""

import random
import shutil
import time
import tracemalloc

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from attention import oracles
from test_window import attend, draw_case, random_inputs

from hybriddit.attention.window import flex
from hybriddit.attention.window.flex import BLOCK, best_layout, block_arrays, visited_blocks


def draw_layout(seed):
    rng = random.Random(seed)
    if seed == 0:
        case = (1, 1), (1, 1), (1, 1), (7, 1)
    else:
        grid = rng.randint(1, 40), rng.randint(1, 70)
        window = tuple(min(rng.randint(1, 40), n) for n in grid)
        stride = tuple(rng.choice((1, rng.randint(1, w))) for w in window)
        case = grid, window, stride, tuple(rng.choice((1, 1, 1, 2, 3, 5, 50)) for _ in range(2))
    return case, rng.choice((0, 1, 77, 128, 300))


def block_mask(layout, gradients=True):
    return flex._block_mask(layout, [torch.from_numpy(x) for x in block_arrays(layout, gradients)])


def elementwise(layout):
    """[queries, keys] bool, by the layout's mask."""
    queries, keys = (torch.arange(length) for length in layout.lengths)
    return layout.mask_mod()(0, 0, queries[:, None], keys[None])


@pytest.mark.parametrize("seed", range(40))
def test_order_and_mask(seed):
    case, text = draw_layout(seed)
    layout = best_layout(*case, text)
    grid = case[0]
    numbers = torch.arange(1, grid[0] * grid[1] + 1).view(1, *grid, 1, 1)
    tokens = layout.to_tiles(numbers)
    assert torch.equal(layout.from_tiles(tokens), numbers)
    tokens, image = tokens.flatten(), layout.lengths[0]
    assert len(tokens) == image
    real, seen = tokens > 0, elementwise(layout)
    order = tokens[real] - 1
    assert torch.equal(seen[real][:, :image][:, real], oracles.window_mask(*case)[order][:, order])
    assert not seen[:, :image][:, ~real].any()
    assert seen[:, image : image + text].all() and not seen[:, image + text :].any()


@pytest.mark.parametrize("seed", range(40))
def test_blocks_are_those_torch_would_make(seed):
    case, text = draw_layout(seed)
    layout = best_layout(*case, text)
    expected = torch_flex.create_block_mask(layout.mask_mod(), None, None, *layout.lengths, device="cpu")
    found = block_mask(layout)
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, indices = getattr(found, f"{kind}_num_blocks"), getattr(found, f"{kind}_indices")
        assert counts.is_contiguous() and indices.is_contiguous() and indices.dtype == torch.int32
        assert torch.equal(counts, getattr(expected, f"{kind}_num_blocks"))
        for block, count in enumerate(counts[0, 0]):
            row, wanted = (x[0, 0, block, :count] for x in (indices, getattr(expected, f"{kind}_indices")))
            assert sorted(row.tolist()) == sorted(wanted.tolist())
    # torch 2.11 reads the lists of whole blocks with the strides of the others
    assert found.kv_indices.shape == found.full_kv_indices.shape
    assert found.q_indices.shape == found.full_q_indices.shape
    whole = int(found.full_kv_num_blocks.sum())
    assert visited_blocks(layout) == (int(found.kv_num_blocks.sum()) + whole, whole)
    assert block_mask(layout, gradients=False).q_indices is None


def test_tiles_touch_few_blocks():
    """Window 16 on 64 x 64 tokens: at most 3 x 3 tiles and the text; row after row of tokens it would be 3 to 4 times."""
    layout = best_layout((64, 64), (16, 16), (1, 1), (1, 1), 512)
    visited, whole = visited_blocks(layout)
    assert layout.image_blocks == 32 and visited <= 32 * (9 + 4) and whole == 32 * 4


def as_the_kernels_do(query, key, value, block_mask, scale):
    """FlexAttention by its lists: forward by those of the queries, which those of the keys must agree with."""
    queries, keys = block_mask.seq_lengths
    assert query.shape[2] == queries and key.shape[2] == value.shape[2] == keys
    assert all(x.is_contiguous() for x in (query, key, value))
    masks = []
    for side, blocks in (("kv", queries // BLOCK), ("q", keys // BLOCK)):
        mask = torch.zeros(queries, keys, dtype=torch.bool)
        other = block_mask.mask_mod(0, 0, torch.arange(queries)[:, None], torch.arange(keys)[None])
        for kind in (side, f"full_{side}"):
            counts, indices = (getattr(block_mask, f"{kind}_{what}")[0, 0] for what in ("num_blocks", "indices"))
            for block in range(blocks):
                for seen in indices[block, : counts[block]].tolist():
                    q, k = (block, seen) if side == "kv" else (seen, block)
                    area = slice(q * BLOCK, (q + 1) * BLOCK), slice(k * BLOCK, (k + 1) * BLOCK)
                    assert not mask[area].any()  # a block in two lists would count twice
                    mask[area] = other[area] if kind == side else True
        masks.append(mask)
    assert torch.equal(*masks)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=masks[0], scale=scale)


@pytest.mark.parametrize("seed", range(16))
def test_values_and_gradients_by_the_lists(seed, monkeypatch):
    monkeypatch.setattr(torch_flex, "flex_attention", as_the_kernels_do)
    grid, window, stride, dilation, text, heads, width, batch = draw_case(seed)
    window = tuple(min(w, n) for w, n in zip(window, grid, strict=True))
    stride = tuple(min(s, w) for s, w in zip(stride, window, strict=True))
    inputs, weight = random_inputs(grid, text, heads, 8 if seed % 4 == 0 else width, batch, seed=seed)
    weight = weight[..., : inputs[0].shape[-1]]
    layout = best_layout(grid, window, stride, dilation, text)
    blocks = [torch.from_numpy(x) for x in block_arrays(layout, True)]
    out = flex._attend(*inputs, blocks, layout, 0.3)
    expected = oracles.neighborhood(*inputs, window, stride, dilation, 0.3)
    torch.testing.assert_close(out, expected)
    leaves = [x for x in inputs if x is not None]
    for grad, reference in zip(
        torch.autograd.grad(out, leaves, weight), torch.autograd.grad(expected, leaves, weight), strict=True
    ):
        torch.testing.assert_close(grad, reference)


def test_no_padding_is_seen():
    """Whatever stands in the padding of keys and text, nothing of it reaches an output."""
    layout = best_layout((9, 10), (3, 4), (1, 1), (1, 1), 5)
    seen = elementwise(layout)
    keys = torch.cat((layout.to_tiles(torch.ones(1, 9, 10, 1, 1)).flatten(), torch.ones(5), torch.zeros(BLOCK - 5)))
    assert not seen[:, keys == 0].any() and seen.any(1).all()


@pytest.mark.parametrize("gradients, limit", [(False, 8e6), (True, 150e6)])
def test_large_grids_need_little_memory(gradients, limit):
    tracemalloc.start()
    start = time.perf_counter()
    layout = best_layout((512, 512), (16, 16), (1, 1), (1, 1), 512)
    arrays = block_arrays(layout, gradients)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < limit and seconds < 20
    assert max(x.size for x in arrays[:4]) < 2048 * 10  # not 2048 x 2052
    # without text the lists for gradients are as narrow
    layout = best_layout((512, 512), (16, 16), (1, 1), (1, 1), 0)
    assert max(x.size for x in block_arrays(layout, True)) < 2048 * 10


def test_compiled_model_and_many_sizes():
    def function(*inputs):
        return attend(inputs, (5, 4), stride=(1, 2), backend="flex") * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for size in range(10):  # beyond torch's eight recompilations of one function
        inputs, _ = random_inputs((6 + size, 9), 3 if size < 5 else 0, 1, 24, 1, torch.float32)
        with torch.no_grad():
            out = function(*inputs)
            expected = oracles.neighborhood(*inputs, (5, 4), (1, 2), (1, 1)) * 2
            assert (out - expected).abs().max() < 1e-5
            if size in (0, 3):
                torch.testing.assert_close(compiled(*inputs), out)
                with torch.inference_mode():
                    torch.testing.assert_close(function(*inputs), out)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_torch_s_code_generator_takes_the_mask():
    """By its kernel for CPUs: the mask as generated code instead of as torch calls."""
    inputs, _ = random_inputs((12, 12), 7, 2, 24, 1, torch.float32)
    with torch.no_grad():
        compiled = torch.compile(lambda *x: attend(x, (5, 4), (2, 1), backend="flex"), fullgraph=True)
        expected = oracles.neighborhood(*inputs, (5, 4), (2, 1), (1, 1))
        assert (compiled(*inputs) - expected).norm() < 1e-4 * expected.norm()


def test_operator_registration():
    layout = best_layout((20, 33), (5, 4), (1, 1), (1, 2), 7)
    args = list(layout.rows), list(layout.columns), 7, True, torch.device("cpu")
    torch.library.opcheck(torch.ops.hybriddit.window_blocks, args)
