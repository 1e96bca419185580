import oracles
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from hybriddit.attention import linear_attention
from hybriddit.attention.linear import _linear_attention, _linear_attention_backward

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
# batch, query tokens, key tokens, heads, width, value width
SHAPES = [
    (2, 37, 37, 3, 24, 24),
    (1, 1, 1, 1, 32, 32),
    (1, 300, 77, 2, 64, 40),
    (1, 2300, 2100, 2, 72, 72),
    (2, 65, 65, 5, 128, 128),
]


def random_inputs(shape, dtype=torch.float64, seed=0):
    batch, queries, keys, heads, width, value_width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = (queries, width), (keys, width), (keys, value_width), (queries, value_width)
    tensors = [torch.randn(batch, n, heads, d, generator=generator).to(dtype) for n, d in sizes]
    return [x.requires_grad_() for x in tensors[:3]], tensors[3]


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_values_and_gradients(shape, dtype, backend):
    inputs, weight = random_inputs(shape, dtype)
    out = linear_attention(*inputs, backend=backend)
    expected = oracles.linear(*inputs)
    assert out.dtype == dtype and out.shape == expected.shape
    assert relative_error(out, expected) < TOLERANCE[dtype]
    grads = torch.autograd.grad(out, inputs, weight)
    for grad, reference in zip(grads, torch.autograd.grad(expected, inputs, weight.double()), strict=True):
        assert grad.dtype == dtype
        assert (grad.double() - reference).norm() <= TOLERANCE[dtype] * (
            reference.norm() + 0.01 * weight.double().norm()
        )


def test_eps_is_added_to_the_denominator():
    inputs, _ = random_inputs(SHAPES[0])
    assert relative_error(linear_attention(*inputs, eps=0.5), oracles.linear(*inputs, eps=0.5)) < 1e-12


def test_gradcheck():
    inputs, _ = random_inputs((2, 5, 4, 2, 3, 4))
    assert torch.autograd.gradcheck(linear_attention, inputs)


def test_operator_registration():
    inputs, _ = random_inputs((2, 5, 4, 2, 3, 4))
    torch.library.opcheck(torch.ops.hybriddit.linear_attention, (*inputs, 1e-4))


def test_non_contiguous_input():
    joined = torch.randn(2, 50, 3, 3 * 8, dtype=torch.float64)
    inputs = [x[:, 7:].requires_grad_() for x in joined.chunk(3, dim=-1)]
    out = linear_attention(*inputs)
    expected = oracles.linear(*inputs)
    weight = torch.randn(2, 3, 43, 8, dtype=torch.float64).transpose(1, 2)
    assert relative_error(out, expected) < 1e-12
    for grad, reference in zip(*(torch.autograd.grad(y, inputs, weight) for y in (out, expected)), strict=True):
        assert relative_error(grad, reference) < 1e-11


def test_extreme_inputs_stay_finite():
    inputs = [x.detach() * 200 for x in random_inputs(SHAPES[0], torch.float32)[0]]
    assert linear_attention(*inputs).isfinite().all()


def test_empty_batch():
    inputs, weight = random_inputs((0, 6, 6, 2, 4, 4))
    out = linear_attention(*inputs)
    assert out.shape == (0, 6, 2, 4)
    assert [grad.shape for grad in torch.autograd.grad(out, inputs, weight)] == [x.shape for x in inputs]


def test_compile_checkpoint_and_inference_mode():
    compiled = torch.compile(linear_attention, backend="aot_eager", fullgraph=True)
    for shape in SHAPES[:1] + SHAPES[3:4] + SHAPES[2:3]:  # from the second on torch traces with symbolic sizes
        inputs, weight = random_inputs(shape)
        expected = torch.autograd.grad(linear_attention(*inputs), inputs, weight)
        for function in (compiled, lambda *x: checkpoint(linear_attention, *x, use_reentrant=False)):
            for grad, reference in zip(torch.autograd.grad(function(*inputs), inputs, weight), expected, strict=True):
                torch.testing.assert_close(grad, reference)
        with torch.inference_mode():
            torch.testing.assert_close(linear_attention(*inputs), linear_attention(*(x.detach() for x in inputs)))


def test_autocast_keeps_the_sums_in_float32():
    inputs, weight = random_inputs((1, 3000, 3000, 1, 32, 32), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_attention(*inputs)
        grads = torch.autograd.grad(out, inputs, weight.to(out.dtype))
    rounded = [x.detach().bfloat16() for x in inputs]
    assert out.dtype == torch.bfloat16 and grads[0].dtype == torch.float32
    assert relative_error(out, oracles.linear(*rounded)) < TOLERANCE[torch.bfloat16]


def test_cost_is_linear():
    """The counter sees the operators' own products, and they grow with the tokens, not with their square."""

    def flops(tokens):
        inputs, weight = random_inputs((1, tokens, tokens, 2, 16, 16), torch.float32)
        with FlopCounterMode(display=False) as counter:
            linear_attention(*inputs).backward(weight)
        return counter.get_total_flops()

    assert flops(4096) == 4 * flops(1024) > 0


def test_flop_formulas_count_what_runs():
    inputs, weight = random_inputs((2, 30, 20, 3, 8, 12), torch.float32)
    inputs = [x.detach() for x in inputs]
    saved = torch.ops.hybriddit.linear_attention(*inputs, 1e-4)
    for operator, function, args in (
        (torch.ops.hybriddit.linear_attention, _linear_attention, (*inputs, 1e-4)),
        (torch.ops.hybriddit.linear_attention_backward, _linear_attention_backward, (weight, *inputs, *saved, 1e-4)),
    ):
        with FlopCounterMode(display=False) as declared:
            operator(*args)
        in_place = {
            torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm].__wrapped__
        }  # unknown to the counter
        with FlopCounterMode(display=False, custom_mapping=in_place) as run:
            function._init_fn(*args)
        assert declared.get_total_flops() == run.get_total_flops() > 0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=torch.zeros(2, 3, 4)), "takes .B, N, heads, D."),
        (dict(query=torch.zeros(1, 3, 2, 5)), "query and key must agree"),
        (dict(value=torch.zeros(1, 4, 2, 4)), "key and value must agree"),
        (dict(value=torch.zeros(1, 3, 2, 4, dtype=torch.float64)), "one dtype"),
        (dict(value=torch.zeros(1, 3, 2, 4, device="meta")), "use one device"),
        (dict(backend="cuda"), "unknown linear attention backend 'cuda'"),
    ],
)
def test_bad_input(change, message):
    args = {name: torch.zeros(1, 3, 2, 4) for name in ("query", "key", "value")} | change
    with pytest.raises(ValueError, match=message) as error:
        linear_attention(**args)
    assert "\n" not in str(error.value)


def test_triton_is_refused_in_one_line():
    x = torch.zeros(1, 3, 2, 4)
    with pytest.raises(NotImplementedError, match="not available yet"):
        linear_attention(x, x, x, backend="triton")
