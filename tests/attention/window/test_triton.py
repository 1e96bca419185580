"""The Triton kernels of window attention against float64: on a GPU where there is one, else in Triton's interpreter, where
test_window.py runs this file in a process of its own (Triton reads TRITON_INTERPRET as it reads a kernel)."""

import random

import pytest
import torch
from attention import interpreter, oracles
from attention.interpreter import poisoned  # noqa: F401
from attention.operators import check_operator
from test_window import LAYOUTS
from torch.utils import deterministic
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hybriddit.attention import neighborhood_attention
from hybriddit.attention.window import seen_pairs

kernels = pytest.importorskip("hybriddit.attention.window.kernels", reason="triton is not installed")
if not (torch.cuda.is_available() or kernels.INTERPRETED):
    pytest.skip("no GPU; test_window.py runs this file in Triton's interpreter", allow_module_level=True)
if kernels.INTERPRETED and (refusal := interpreter.refusal()):
    pytest.skip(refusal, allow_module_level=True)

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
# the interpreter truncates where chips round, and tf32x3 has less than float32's bits
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def fenced(shape, dtype, generator):
    """Random numbers amid NaN on all sides: what a kernel reads beyond is seen."""
    fence = torch.full([n + 2 for n in shape[:-1]] + [shape[-1] + 8], float("nan"), dtype=dtype, device=DEVICE)
    inside = fence[tuple(slice(1, -1) for _ in shape[:-1])][..., 8:]
    inside.copy_(torch.randn(shape, generator=generator))
    return inside.detach().requires_grad_()


def random_inputs(grid, text, heads, width, batch, dtype=torch.float32, seed=0):
    """Query, key, value, text key and value, and what both results are multiplied by."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [fenced((batch, *grid, heads, width), dtype, generator) for _ in range(3)]
    inputs += [fenced((batch, text, heads, width), dtype, generator) if text else None for _ in range(2)]
    weight = fenced((batch, *grid, heads, width), dtype, generator).detach()
    return inputs, weight, torch.randn(batch, *grid, heads, generator=generator).to(DEVICE)


def attend(inputs, window, stride=1, dilation=1, **options):
    query, key, value, text_key, text_value = inputs
    options |= {"text_key": text_key, "text_value": text_value, "return_lse": True, "backend": "triton"}
    return neighborhood_attention(query, key, value, window=window, stride=stride, dilation=dilation, **options)


def assert_equal_to_oracle(
    inputs, weight, slope, window, stride=(1, 1), dilation=(1, 1), scale=None, one_by_one=True, **options
):
    """Both results and their gradients, together and, where it is asked for, one by one."""
    dtype, leaves = inputs[0].dtype, [x for x in inputs if x is not None]
    out, lse = attend(inputs, window, stride, dilation, scale=scale, **options)
    expected = oracles.neighborhood(*inputs, window, stride, dilation, scale)
    expected_lse = oracles.neighborhood_lse(inputs[0], inputs[1], inputs[3], window, stride, dilation, scale)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert (out.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert (lse.double() - expected_lse).abs().max() <= TOLERANCE[dtype] * expected_lse.abs().max().clamp(min=1)
    for first, second in ((1, 1), (1, 0), (0, 1)) if one_by_one else ((1, 1),):
        loss = first * (out * weight).sum(dtype=torch.float64) + second * (lse * slope).sum()
        wanted = first * (expected * weight).sum() + second * (expected_lse * slope).sum()
        grads = torch.autograd.grad(loss, leaves, retain_graph=True)
        references = torch.autograd.grad(wanted, leaves, retain_graph=True, allow_unused=True)
        for leaf, grad, reference in zip(leaves, grads, references, strict=True):
            assert grad.dtype == dtype and grad.shape == leaf.shape
            reference = torch.zeros_like(grad) if reference is None else reference
            # where a query sees one key its gradient is zero: the error is then measured against the data
            bound = reference.double().norm().clamp(min=0.1 * weight.double().norm())
            assert (grad.double() - reference.double()).norm() <= 2 * TOLERANCE[dtype] * bound


@pytest.mark.parametrize("seed", range(20))
def test_values_log_sum_exp_and_every_gradient(seed):
    rng = random.Random(seed)
    grid = rng.choice([(1, 1), (1, 19), (11, 1), (5, 7), (9, 12), (16, 9), (13, 20)])
    window = tuple(rng.choice((1, 2, 3, 4, 5, 8, 9, 40)) for _ in range(2))
    stride = tuple(rng.choice((1, rng.randint(1, w))) for w in window)
    dilation = tuple(rng.choice((1, 1, 2, 3)) for _ in range(2))
    heads, batch = rng.choice(((1, 1), (2, 1), (1, 2)))
    inputs = random_inputs(grid, rng.choice((0, 1, 7, 70)), heads, rng.choice((24, 32, 72, 128)), batch, seed=seed)
    assert_equal_to_oracle(*inputs, window, stride, dilation)


@pytest.mark.parametrize(
    "width, text, dtype",
    [(16, 0, torch.bfloat16), (40, 70, torch.float16), (72, 7, torch.bfloat16), (136, 7, torch.float32)]
    + [(200, 0, torch.float16), (256, 7, torch.bfloat16)],
)
def test_widths_and_half_precision(width, text, dtype):
    assert_equal_to_oracle(*random_inputs((7, 12), text, 1, width, 1, dtype), (3, 4))


# grid, window, stride, and text of a whole number of blocks: most or all of what is walked needs no mask
ALIGNED = [
    ((16, 32), (8, 16), (8, 16), 0),
    ((24, 32), (16, 16), (8, 16), 64),
    ((16, 32), (8, 32), (8, 1), 128),
    ((24, 16), (23, 16), (1, 1), 0),
]


@pytest.mark.parametrize("grid, window, stride, text", ALIGNED)
def test_blocks_without_a_mask(grid, window, stride, text):
    inputs, weight, slope = random_inputs(grid, text, 1, 16, 1)
    assert_equal_to_oracle(inputs, weight, slope, window, stride, one_by_one=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid, text, heads, scale", [((5, 9), 7, 2, None), ((9, 14), 64, 1, 0.7)])
def test_padded_text_is_not_seen(grid, text, heads, scale, dtype):
    inputs, weight, slope = random_inputs(grid, text, heads, 24, 3, dtype)
    generator = torch.Generator().manual_seed(1)
    text_mask = torch.stack(
        (torch.arange(text) < 2, torch.rand(text, generator=generator) < 0.5, torch.zeros(text) > 0)
    )
    for x in inputs[3:]:
        x.data[~text_mask] = 100.0
    out, lse = attend(inputs, (3, 5), text_mask=text_mask.to(DEVICE), scale=scale)
    results = []
    for b, seen in enumerate(text_mask):
        image, texts = [x[b, None] for x in inputs[:3]], [x[b, None, seen] for x in inputs[3:]]
        settings = (3, 5), (1, 1), (1, 1), scale
        results.append(
            (oracles.neighborhood(*image, *texts, *settings), oracles.neighborhood_lse(*image[:2], texts[0], *settings))
        )
    expected, expected_lse = (torch.cat(x) for x in zip(*results, strict=True))
    assert (out.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert (lse.double() - expected_lse).abs().max() <= 5 * TOLERANCE[dtype]
    loss, wanted = (
        x[0] + x[1]
        for x in (
            ((out * weight).sum(dtype=torch.float64), (lse * slope).sum()),
            ((expected * weight).sum(), (expected_lse * slope).sum()),
        )
    )
    for grad, reference in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        assert (grad.double() - reference.double()).norm() <= 2 * TOLERANCE[dtype] * reference.double().norm()
    assert all(
        grad[~text_mask].eq(0).all()
        for grad in torch.autograd.grad(attend(inputs, 3, text_mask=text_mask.to(DEVICE))[0].sum(), inputs[3:])
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_gradients_of_any_strides(layout):
    image, prompt = (2, 3, 5, 2, 24), (2, 3, 2, 24)
    inputs = [
        LAYOUTS[layout](shape, torch.float32).to(DEVICE).requires_grad_() for shape in (image,) * 3 + (prompt,) * 2
    ]
    weight = LAYOUTS[layout](image, torch.float32).to(DEVICE)
    assert_equal_to_oracle(inputs, weight, torch.randn(image[:4], device=DEVICE), (3, 4))


def test_one_projection_of_one_sequence():
    """Text and image lie in one tensor, and heads are as wide as no block."""
    joined = torch.randn(2, 5 + 6 * 10, 2, 3 * 72).to(DEVICE)
    text, image = joined[:, :5].chunk(3, dim=-1), joined[:, 5:].unflatten(1, (6, 10)).chunk(3, dim=-1)
    inputs = [x.requires_grad_() for x in (*image, text[1], text[2])]
    assert_equal_to_oracle(inputs, torch.randn_like(image[0]), torch.randn(2, 6, 10, 2, device=DEVICE), (5, 4))


@pytest.mark.parametrize("dimension", [0, 1, 2, 3], ids=["batch", "rows", "columns", "heads"])
def test_offsets_beyond_32_bits(dimension):
    """Elements more than 2**31 apart in one buffer; only the pages that hold tokens are touched."""
    deterministic.fill_uninitialized_memory = False
    memory, shape = torch.empty(2**31 + 2**28, dtype=torch.bfloat16, device=DEVICE), [2, 2, 2, 2, 16]
    strides = [0] * 5
    strides[dimension], strides[4] = 2**31, 1
    step = 16
    for other in range(4):
        if other != dimension:
            strides[other], step = step, 2 * step
    inputs = []
    for i in range(3):
        x = memory.as_strided(shape, strides, 1024 * i)
        x.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
        inputs.append(x.detach().requires_grad_())
    weight, slope = torch.randn(shape).to(memory), torch.randn(shape[:4]).to(DEVICE)
    window = (1, 2)  # not the whole grid, which is dense attention's
    assert_equal_to_oracle([*inputs, None, None], weight, slope, window)


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_scores_far_from_zero(offset, monkeypatch):
    """Neither sum nor log-sum-exp overflow, in the walk with a mask either; float32 rounds such scores by 3e-5."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 2e-4)
    inputs, weight, slope = random_inputs((9, 14), 5, 1, 16, 1)
    with torch.no_grad():
        inputs[0][..., 0], inputs[1][..., 0], inputs[3][..., 0] = 4.0, offset, offset
    assert_equal_to_oracle(inputs, weight, slope, (3, 4))


def test_results_are_reproducible_bit_for_bit():
    inputs, weight, slope = random_inputs((9, 13), 70, 1, 24, 2)
    first, second = (attend(inputs, (5, 4)) for _ in range(2))
    assert all(map(torch.equal, first, second))
    grads = [torch.autograd.grad((x[0] * weight).sum() + (x[1] * slope).sum(), inputs) for x in (first, second)]
    assert all(map(torch.equal, *grads))


def test_compile_checkpoint_and_the_operators():
    def function(*inputs):
        return attend(inputs, (5, 4))[0]

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for grid in ((4, 5), (6, 3)):
        inputs, weight, _ = random_inputs(grid, 3, 1, 24, 1)
        expected = torch.autograd.grad(function(*inputs), inputs, weight)
        for run in (compiled, lambda *x: checkpoint(function, *x, use_reentrant=False)):
            for grad, reference in zip(torch.autograd.grad(run(*inputs), inputs, weight), expected, strict=True):
                torch.testing.assert_close(grad, reference)
    text_mask = torch.tensor([[True, False, True]], device=DEVICE)
    for case in ((*inputs, None), (*inputs, text_mask), (*inputs[:3], None, None, None)):
        check_operator(torch.ops.hybriddit.window_attention, (*case, [3, 4], [1, 1], [1, 1], 0.3))


def test_flops_are_counted():
    inputs, weight, _ = random_inputs((12, 10), 7, 2, 24, 2)
    with FlopCounterMode(display=False) as forward:
        out = attend(inputs, (3, 4))[0]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out, inputs, weight)
    product = 2 * 2 * 2 * 24 * (seen_pairs((12, 10), (3, 4), (1, 1)) + 120 * 7)
    assert (forward.get_total_flops(), backward.get_total_flops()) == (2 * product, 7 * product)


def test_nan_reaches_every_query_that_sees_it():
    inputs, _, _ = random_inputs((12, 14), 3, 1, 32, 1)
    inputs = [x.detach() for x in inputs]
    seen = oracles.window_mask((12, 14), (5, 4))[:, 6 * 14 + 7].view(12, 14)
    for tensor in (1, 2):
        broken = [x.clone() for x in inputs]
        broken[tensor][0, 6, 7, 0, 5] = torch.nan
        assert attend(broken, (5, 4))[0][0].cpu().isnan().any(-1)[..., 0][seen].all()
        broken = [x.clone() for x in inputs]
        broken[tensor + 2][0, 1, 0, 5] = torch.nan
        assert attend(broken, (5, 4))[0].isnan().any(-1).all()
    broken = [x.clone() for x in inputs]
    broken[1][0, 6, 7, 0, 5] = torch.nan
    assert not attend(broken, (5, 4))[0][0].cpu().isnan().any(-1)[..., 0][~seen].any()
    broken = [x.clone() for x in inputs]
    broken[0][0, 3, 4, 0, 1] = torch.nan
    nan = attend(broken, (5, 4))[0][0].isnan().any(-1)[..., 0]
    assert nan[3, 4] and nan.sum() == 1


def test_tiles_are_those_that_walk_the_least():
    # FLUX at 2048 px, window 16: 8 by 16 queries see 23 by 31 keys, in 12 blocks of 2 by 32
    assert kernels.tile_shape((128, 128), (16, 16), (1, 1), (1, 1), 128, 64) == ((8, 16), 32)
    # windows that follow the tiles are walked whole
    assert kernels.tile_shape((128, 128), (16, 16), (16, 16), (1, 1), 128, 64)[0] in ((8, 16), (16, 8))
    assert kernels.tile_shape((1, 512), (1, 9), (1, 1), (1, 1), 64, 32)[0] == (1, 64)
