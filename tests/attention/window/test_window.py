import random
from pathlib import Path

import pytest
import torch
from attention import oracles
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hybriddit.attention import neighborhood_attention
from hybriddit.attention.window import BACKENDS as ROWS
from hybriddit.attention.window import WindowCase, tiled

BACKENDS = ["auto", "tiled", "dense"]  # those that have gradients everywhere
EVERY_BACKEND = ["auto", *ROWS]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
TEXT = {name: torch.zeros(1, 3, 2, 8) for name in ("text_key", "text_value")}
GRIDS = [(1, 1), (1, 19), (23, 1), (5, 7), (16, 16), (9, 26), (20, 13), (33, 10)]


def draw_case(seed):
    """A random case: grid, window, stride, dilation, text, heads, width, batch."""
    rng = random.Random(seed)
    grid = rng.choice(GRIDS)
    window = tuple(rng.choice((1, 2, 3, 4, 5, 8, 9, 15, 40)) for _ in range(2))
    stride = tuple(rng.choice((1, 1, rng.randint(1, w))) for w in window)
    dilation = tuple(rng.choice((1, 1, 1, 2, 3, 5)) for _ in range(2))
    text = rng.choice((0, 1, 77)) if seed % 6 else 512
    return (
        grid,
        window,
        stride,
        dilation,
        text,
        rng.choice((1, 3)),
        rng.choice((24, 32, 64, 72, 128)),
        rng.choice((1, 2)),
    )


def random_inputs(grid, text, heads, width, batch, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs = [draw(batch, *grid, heads, width).requires_grad_() for _ in range(3)]
    inputs += [draw(batch, text, heads, width).requires_grad_() if text else None for _ in range(2)]
    return inputs, draw(batch, *grid, heads, width)


def attend(inputs, window, stride=1, dilation=1, **kwargs):
    query, key, value, text_key, text_value = inputs
    texts = dict(text_key=text_key, text_value=text_value)
    return neighborhood_attention(query, key, value, window=window, stride=stride, dilation=dilation, **texts, **kwargs)


def assert_equal_to_oracle(inputs, weight, window, stride, dilation, tolerance, **kwargs):
    out = attend(inputs, window, stride, dilation, **kwargs)
    expected = oracles.neighborhood(*inputs, window, stride, dilation, kwargs.get("scale"))
    leaves = [x for x in inputs if x is not None]
    assert out.dtype == inputs[0].dtype
    assert (out.double() - expected).norm() <= tolerance * expected.norm()
    grads = torch.autograd.grad(out, leaves, weight)
    for grad, reference in zip(grads, torch.autograd.grad(expected, leaves, weight.double()), strict=True):
        assert grad.dtype == inputs[0].dtype and grad.shape == reference.shape
        # where a query sees one key its gradient is zero: the error is then measured against the data
        assert (grad.double() - reference).norm() <= tolerance * reference.norm().clamp(min=weight.norm().double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(24))
def test_values_and_every_gradient(seed, backend):
    *geometry, text, heads, width, batch = draw_case(seed)
    inputs, weight = random_inputs(geometry[0], text, heads, width, batch, seed=seed)
    assert_equal_to_oracle(inputs, weight, *geometry[1:], TOLERANCE[torch.float64], backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", [0, 77, 512])
def test_dtypes(dtype, backend, text):
    inputs, weight = random_inputs((18, 21), text, 2, 64, 1, dtype)
    assert_equal_to_oracle(inputs, weight, (5, 6), (1, 2), (1, 1), TOLERANCE[dtype], backend=backend)


@pytest.mark.parametrize("seed", range(8))
def test_arithmetic_for_other_devices(seed, monkeypatch):
    """The plain-torch route of the tiles, which devices without the CPU's fused kernel take."""

    monkeypatch.setattr(tiled, "has_fused_kernel", lambda query: False)
    *geometry, text, heads, width, batch = draw_case(seed)
    inputs, weight = random_inputs(geometry[0], text, heads, width, batch, seed=seed)
    assert_equal_to_oracle(inputs, weight, *geometry[1:], TOLERANCE[torch.float64], backend="tiled")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", [0, 3, 150])
def test_gradcheck(backend, text):
    inputs, _ = random_inputs((9, 10), text, 1, 2, 1)
    leaves = [x for x in inputs if x is not None]

    def function(*leaves):
        return attend([*leaves, None, None][:5], (3, 4), (2, 1), (1, 2), backend=backend)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_input(backend):
    joined = torch.randn(2, 3 + 12 * 17, 2, 3 * 24, dtype=torch.float64)
    text, image = joined[:, :3].chunk(3, dim=-1), joined[:, 3:].unflatten(1, (12, 17)).chunk(3, dim=-1)
    inputs = [x.requires_grad_() for x in (*image, text[1], text[2])]
    weight = torch.randn(2, 2, 12, 17, 24, dtype=torch.float64).movedim(1, 3)
    assert_equal_to_oracle(inputs, weight, (5, 4), (1, 1), (1, 1), 1e-11, backend=backend)


# (shape, dtype) -> random numbers of that shape, with channels that are not neighbors in memory, or that overlap
LAYOUTS = {
    "heads innermost": lambda shape, dtype: torch.randn(*shape[:-2], *shape[:-3:-1], dtype=dtype).transpose(-1, -2),
    "every other channel": lambda shape, dtype: torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2],
    "channels slowest": lambda shape, dtype: torch.randn(shape[-1], *shape[:-1], dtype=dtype).movedim(0, -1),
    "one head for all": lambda shape, dtype: torch.randn(*shape[:-2], 1, shape[-1], dtype=dtype).expand(shape),
    "one value for all channels": lambda shape, dtype: torch.randn(*shape[:-1], 1, dtype=dtype).expand(shape),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", [0, 3, 150])  # none, copied behind every tile's keys, attended to once
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_inputs_and_gradients_of_any_strides(dtype, text, layout, backend):
    image, prompt = (2, 9, 10, 3, 24), (2, text, 3, 24)
    inputs = [LAYOUTS[layout](shape, dtype).requires_grad_() for shape in (image,) * 3 + (prompt,) * 2 * bool(text)]
    weight = LAYOUTS[layout](image, dtype)
    assert all(not x.is_contiguous() for x in (*inputs, weight))
    inputs += [] if text else [None, None]
    assert_equal_to_oracle(inputs, weight, (3, 4), (1, 1), (1, 1), TOLERANCE[dtype], backend=backend)


@pytest.mark.parametrize("backend", ["tiled", "dense"])
def test_a_kept_mask_is_of_its_dtype(backend):
    """Masks are kept from call to call: one dtype's must not serve another's."""
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    for dtype in [*dtypes, *reversed(dtypes)]:
        # 25 x 26 tokens: above those for which the dense backend computes bfloat16 in float32
        inputs, _ = random_inputs((25, 26), 3, 1, 24, 1, dtype)
        inputs = [x.detach() for x in inputs]
        out = attend(inputs, (4, 5), backend=backend)
        expected = oracles.neighborhood(*inputs, (4, 5), (1, 1), (1, 1))
        assert out.dtype == dtype
        tolerance = TOLERANCE[torch.bfloat16 if dtype == torch.float16 else dtype]
        assert (out.double() - expected).norm() <= tolerance * expected.norm(), dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend):
    inputs, weight = random_inputs((18, 18), 2, 1, 24, 1)
    assert_equal_to_oracle(inputs, weight, (3, 3), (1, 1), (1, 1), 1e-11, backend=backend, scale=0.7)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "flex"])
@pytest.mark.parametrize("seed", range(8))
def test_the_log_sum_exp(seed, backend, dtype):
    """Values, with and without gradients, and the gradients of both results."""
    *geometry, text, heads, width, batch = draw_case(seed)
    inputs, weight = random_inputs(geometry[0], text, heads, width, batch, dtype, seed)
    slope = torch.randn(weight.shape[:4], generator=torch.Generator().manual_seed(1))
    expected = oracles.neighborhood(*inputs, *geometry[1:])
    lse = oracles.neighborhood_lse(inputs[0], inputs[1], inputs[3], *geometry[1:])
    leaves = [x for x in inputs if x is not None]
    references = torch.autograd.grad((expected * weight).sum() + (lse * slope).sum(), leaves)
    for gradients in (False, True)[: 1 if backend == "flex" else 2]:
        with torch.set_grad_enabled(gradients):
            out, found = attend(inputs, *geometry[1:], backend=backend, return_lse=True)
        assert out.dtype == dtype and found.dtype == torch.promote_types(dtype, torch.float32)
        assert (out.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
        assert (found.double() - lse).abs().max() <= 5 * TOLERANCE[dtype]
    if gradients:
        grads = torch.autograd.grad((out * weight).sum() + (found * slope).sum(), leaves)
        for grad, reference in zip(grads, references, strict=True):
            assert (grad.double() - reference).norm() <= 2 * TOLERANCE[dtype] * reference.norm().clamp(
                min=weight.norm()
            )


@pytest.mark.parametrize("offset", [-90.0, 0.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_log_sum_exp_of_scores_far_from_zero(dtype, offset):
    """With padded text too, of which nothing is seen."""
    inputs, _ = random_inputs((16, 16), 5, 2, 32, 2, dtype)
    query = torch.ones_like(inputs[0])
    key = torch.full_like(inputs[1], offset / 32**0.5, requires_grad=True)
    text_mask = torch.tensor([[True, True, False, True, False], [False] * 5])
    out, lse = attend([query, key, inputs[2], key[:, 0, :5], inputs[4]], (3, 4), text_mask=text_mask, return_lse=True)
    wanted = torch.tensor([12.0 + 3, 12.0]).log() + key[0, 0, 0, 0, 0].item() * 32**0.5
    torch.testing.assert_close(lse, wanted.view(2, 1, 1, 1).expand_as(lse), rtol=0, atol=0.1)
    expected = masked_neighborhood([query, key, inputs[2], key[:, 0, :5], inputs[4]], text_mask, (3, 4), (1, 1), (1, 1))
    assert (out.double() - expected).norm() <= 2 * TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_more_key_does_not_count_among_scores_in_the_thousands(dtype):
    """bfloat16 rounds them by more than the added key's distance from the others."""
    inputs, _ = random_inputs((16, 16), 5, 2, 32, 1, dtype)
    inputs = [(40 * x).detach().requires_grad_() for x in inputs[:2]] + inputs[2:]
    out, lse = attend(inputs, (3, 4), return_lse=True)
    expected = oracles.neighborhood(*inputs, (3, 4), (1, 1), (1, 1))
    assert (out.double() - expected).norm() <= 2 * TOLERANCE[dtype] * expected.norm()
    assert lse.isfinite().all()


def masked_neighborhood(inputs, text_mask, window, stride, dilation, scale=None):
    """The oracle, sample by sample, without the text that the mask hides."""
    outs = []
    for b, seen in enumerate(text_mask):
        image, text = [x[b, None] for x in inputs[:3]], [x[b, None, seen] for x in inputs[3:]]
        outs.append(oracles.neighborhood(*image, *text, window, stride, dilation, scale))
    return torch.cat(outs)


def text_mask_of(text):
    """Of three samples: their text's first part, some of it, none of it."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack((torch.arange(text) < 2, torch.rand(text, generator=generator) < 0.5, torch.zeros(text) > 0))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "flex"])
@pytest.mark.parametrize("grid, text, width", [((16, 16), 7, 24), ((14, 21), 150, 64), ((9, 26), 150, 72)])
def test_padded_text_is_not_seen(backend, dtype, grid, text, width):
    """Short text stands behind every tile's keys, long text is merged by its log-sum-exp: of no token, too."""
    inputs, weight = random_inputs(grid, text, 2, width, 3, dtype)
    text_mask, geometry = text_mask_of(text), ((5, 6), (1, 2), (1, 1))
    for scale in (None, 0.7):
        with torch.set_grad_enabled(backend != "flex"):  # which has no gradients on a CPU
            out = attend(inputs, *geometry, backend=backend, text_mask=text_mask, scale=scale)
        expected = masked_neighborhood(inputs, text_mask, *geometry, scale)
        assert out.dtype == dtype and out.shape == expected.shape
        assert (out.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
        if backend == "flex":
            continue
        grads = torch.autograd.grad(out, inputs, weight)
        references = torch.autograd.grad(expected, inputs, weight.double())
        for grad, reference in zip(grads, references, strict=True):
            assert grad.dtype == dtype
            assert (grad.double() - reference).norm() <= TOLERANCE[dtype] * reference.norm()
        assert all(grad[~text_mask].eq(0).all() for grad in grads[3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_in_padded_text_makes_no_difference(backend):
    for dtype, largest in ((torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float16, 6e4)):
        inputs, _ = random_inputs((18, 19), 150, 1, 64, 3, dtype)
        text_mask = text_mask_of(150)
        # scores of real keys far from zero, on both sides
        inputs = [x.detach() * 8 for x in inputs]
        out = attend(inputs, (5, 6), backend=backend, text_mask=text_mask)
        for text in inputs[3:]:
            text[~text_mask] = largest if text is inputs[3] else 7
        assert torch.equal(attend(inputs, (5, 6), backend=backend, text_mask=text_mask), out)
        expected = masked_neighborhood(inputs, text_mask, (5, 6), (1, 1), (1, 1))
        assert (out.double() - expected).norm() <= 1.5e-2 * expected.norm()


def test_a_text_mask_in_a_compiled_model():
    def function(text_mask, *inputs):
        return attend(inputs, (5, 4), text_mask=text_mask)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for grid in ((12, 12), (21, 30), (17, 18)):  # from the second size on torch traces with symbolic sizes
        inputs, _ = random_inputs(grid, 7, 1, 24, 3)
        torch.testing.assert_close(compiled(text_mask_of(7), *inputs), function(text_mask_of(7), *inputs))


def case_of(inputs, window_size, stride, dilation, gradients):
    """The WindowCase of a call."""
    query, text = inputs[0], inputs[3]
    grid = tuple(query.shape[1:3])
    window_size = tuple(map(min, window_size, grid))
    return WindowCase(
        query.device,
        query.dtype,
        grid,
        *query.shape[3:],
        window_size,
        tuple(map(min, stride, window_size)),
        dilation,
        0 if text is None else text.shape[1],
        gradients,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("seed", range(10))
def test_every_backend_and_device(seed, backend, device):
    *geometry, text, heads, width, batch = draw_case(seed)
    inputs, weight = random_inputs(geometry[0], text, heads, width, batch, torch.float32, seed)
    inputs = [x if x is None else x.detach().to(device).requires_grad_() for x in inputs]
    cases = [case_of(inputs, *geometry[1:], gradients) for gradients in (True, False)]
    refusals = [None if backend == "auto" else ROWS[backend].refusal(case) for case in cases]
    tolerance = TOLERANCE[torch.float32] if device == "cpu" else 2e-3  # on a GPU there is TF32
    for refusal, gradients in zip(refusals, (True, False), strict=True):
        with torch.set_grad_enabled(gradients):
            if refusal:
                with pytest.raises(ValueError, match=f'backend "{backend}" cannot run this: .*use backend "auto"$'):
                    attend(inputs, *geometry[1:], backend=backend)
            elif gradients:
                assert_equal_to_oracle(inputs, weight.to(device), *geometry[1:], tolerance, backend=backend)
            else:
                out, expected = (
                    attend(inputs, *geometry[1:], backend=backend),
                    oracles.neighborhood(*inputs, *geometry[1:]),
                )
                assert (out.double() - expected).norm() <= tolerance * expected.norm()
    if all(refusals):
        pytest.skip(f"{backend}: {refusals[1]}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_nan_stays_nan(backend, device):
    inputs, _ = random_inputs((20, 22), 3, 1, 32, 1, torch.float32)
    inputs = [x.detach().to(device) for x in inputs]
    refusal = backend != "auto" and ROWS[backend].refusal(case_of(inputs, (5, 4), (1, 1), (1, 1), False))
    if refusal:
        pytest.skip(f"{backend}: {refusal}")
    seen = oracles.window_mask((20, 22), (5, 4))[:, 10 * 22 + 7].view(20, 22)
    for tensor in (1, 2):
        broken = [x.clone() for x in inputs]
        broken[tensor][0, 10, 7, 0, 5] = torch.nan
        assert attend(broken, (5, 4), backend=backend)[0].cpu().isnan().any(-1)[..., 0][seen].all()
        broken = [x.clone() for x in inputs]
        broken[tensor + 2][0, 1, 0, 5] = torch.nan
        assert attend(broken, (5, 4), backend=backend).isnan().any(-1).all()
    broken = [x.clone() for x in inputs]
    broken[0][0, 3, 4, 0, 1] = torch.nan
    assert attend(broken, (5, 4), backend=backend)[0, 3, 4].isnan().all()


@pytest.mark.parametrize("case", [((7, 9), (3, 4), (2, 3), (1, 1)), ((8, 12), (3, 2), (1, 1), (2, 3))])
def test_semantics_are_natten_s(case):
    """natten's own FlexAttention backend, forward, where natten is installed."""
    natten = pytest.importorskip("natten")
    grid, window, stride, dilation = case
    query, key, value = (torch.randn(1, *grid, 1, 32) for _ in range(3))
    with torch.no_grad():
        expected = natten.na2d(query, key, value, window, stride, dilation, backend="flex-fna")
        for backend in BACKENDS:
            out = attend((query, key, value, None, None), window, stride, dilation, backend=backend)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_a_window_over_the_grid_is_dense_attention():
    inputs, _ = random_inputs((6, 7), 4, 2, 24, 1)
    joined = [torch.cat((x.flatten(1, 2), t), 1) for x, t in zip(inputs[1:3], inputs[3:], strict=True)]
    expected = oracles.softmax_attention(inputs[0].flatten(1, 2), *joined).unflatten(1, (6, 7))
    for backend in BACKENDS:
        torch.testing.assert_close(attend(inputs, 50, 50, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_checkpoint_inference_mode(backend):
    def function(*inputs):
        return attend(inputs, (5, 4), backend=backend)

    torch.compiler.reset()  # recompilations are counted by code, here for all backends together
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for grid in ((12, 12), (40, 33), (21, 30)):  # from the second size on torch traces with symbolic sizes
        inputs, weight = random_inputs(grid, 3, 1, 24, 1)
        with torch.inference_mode():
            function(*inputs)  # what it keeps must serve the training below
        expected = torch.autograd.grad(function(*inputs), inputs, weight)
        for run in (compiled, lambda *x: checkpoint(function, *x, use_reentrant=False)):
            for grad, reference in zip(torch.autograd.grad(run(*inputs), inputs, weight), expected, strict=True):
                torch.testing.assert_close(grad, reference)
        torch.testing.assert_close(function(*inputs), compiled(*inputs))


@pytest.mark.parametrize("text", [None, 3, 200])
def test_operator_registration(text):
    inputs, _ = random_inputs((10, 9), text, 1, 8, 1)
    torch.library.opcheck(torch.ops.hybriddit.tiled_attention, (*inputs, [3, 4], [1, 1], [1, 1], 0.3))


def test_autocast():
    inputs, _ = random_inputs((20, 20), 5, 1, 32, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [attend(inputs, 3, backend=backend) for backend in BACKENDS]
    expected = oracles.neighborhood(*(x.detach().bfloat16() for x in inputs), (3, 3), (1, 1), (1, 1))
    for out in outs:
        assert out.dtype == torch.bfloat16
        assert (out.double() - expected).norm() < 1.5e-2 * expected.norm()


def test_empty_batch():
    inputs, weight = random_inputs((9, 9), 0, 1, 8, 0)
    for backend in BACKENDS:
        assert torch.autograd.grad(attend(inputs, 3, backend=backend), inputs[:3], weight)[0].shape == weight.shape


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("text", [0, 300])
def test_cost_is_linear_and_no_square_tensor_is_made(text):
    def measure(size):
        inputs, weight = random_inputs((size, size), text, 2, 64, 1, torch.float32)
        inputs = [x if x is None else x.detach() for x in inputs]
        settings = [5, 5], [1, 1], [1, 1], 0.3
        with FlopCounterMode(display=False) as declared:
            out = torch.ops.hybriddit.tiled_attention(*inputs, *settings)
            torch.ops.hybriddit.tiled_attention_backward(weight, *inputs, *out, *settings)
        # the operators' bodies, so that the counter and the watcher see every step
        with FlopCounterMode(display=False) as run, LargestTensor() as largest:
            out = tiled._forward(*inputs, *settings)
            tiled._backward(weight, *inputs, *out, *settings)
        assert declared.get_total_flops() == run.get_total_flops() > 0
        return run.get_total_flops(), largest.elements

    (small, _), (large, elements) = measure(32), measure(128)
    assert large / small < 16 * 1.15  # border tiles are cheaper, and there are fewer of them
    assert elements < 128**4 / 16


def test_auto_never_makes_a_square_mask_on_a_large_grid():
    inputs, _ = random_inputs((64, 64), 0, 1, 8, 1, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attend(inputs, 9)
    assert counter.get_total_flops() < 4 * 64**4 * 8 / 4


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(window=0), "window must be an int of at least 1"),
        (dict(window=(3, -1)), "window must be"),
        (dict(window=2.5), "window must be"),
        (dict(stride=0), "stride must be"),
        (dict(dilation=(1, 2, 3)), "dilation must be"),
        (dict(stride=4), "larger than window"),
        (dict(stride=(1, 40), window=(3, 39)), "larger than window"),
        (dict(query=torch.zeros(1, 5, 2, 8)), "share one shape"),
        (dict(value=torch.zeros(1, 4, 4, 2, 16)), "share one shape"),
        (dict(key=torch.zeros(1, 4, 4, 2, 8, dtype=torch.float64)), "one dtype"),
        (dict(key=torch.zeros(1, 4, 4, 2, 8, device="meta")), "several devices"),
        (dict(text_key=torch.zeros(1, 3, 2, 8)), "come together"),
        (dict(text_key=torch.zeros(1, 3, 2, 9), text_value=torch.zeros(1, 3, 2, 9)), "text_key and text_value must be"),
        (dict(text_key=torch.zeros(1, 3, 2, 8), text_value=torch.zeros(1, 2, 2, 8)), "text_key and text_value must be"),
        (dict(text_mask=torch.ones(1, 3, dtype=torch.bool)), "text_mask needs text_key and text_value"),
        (dict(**TEXT, text_mask=torch.ones(1, 3)), r"text_mask must be bool \(1, 3\), got torch.float32 \(1, 3\)"),
        (dict(**TEXT, text_mask=torch.ones(1, 4, dtype=torch.bool)), r"text_mask must be bool \(1, 3\)"),
        (dict(**TEXT, text_mask=torch.ones(1, 3, dtype=torch.bool, device="meta")), "several devices"),
        (dict(backend="cuda"), "unknown window attention backend 'cuda'"),
    ],
)
def test_bad_input(change, message):
    args = {name: torch.zeros(1, 4, 4, 2, 8) for name in ("query", "key", "value")} | {"window": 3} | change
    with pytest.raises(ValueError, match=message) as error:
        neighborhood_attention(**args)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_kernels_in_triton_s_interpreter():
    interpreter = pytest.importorskip("attention.interpreter", reason="triton is not installed")
    interpreter.run_in_interpreter(Path(__file__).parent)
