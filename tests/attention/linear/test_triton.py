"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter, where test_linear.py
runs this file in a process of its own (Triton reads TRITON_INTERPRET as it reads a kernel)."""

from functools import partial

import pytest
import torch
from attention import interpreter, oracles
from attention.interpreter import poisoned  # noqa: F401
from attention.operators import check_operator
from torch.utils import deterministic

from hybriddit.attention import TokenLayout, linear_attention
from hybriddit.attention.linear import FEATURE_MAPS, dispatch, features
from hybriddit.attention.mixers import blocks
from hybriddit.attention.trial import failure_reason

linear_triton = pytest.importorskip("hybriddit.attention.linear.triton", reason="triton is not installed")
if linear_triton.INTERPRETED and (refusal := interpreter.refusal()):
    pytest.skip(refusal, allow_module_level=True)
if not (torch.cuda.is_available() or linear_triton.INTERPRETED):
    pytest.skip("no GPU; test_linear.py runs this file in Triton's interpreter", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

DEVICE = "cpu" if linear_triton.INTERPRETED else "cuda"
# The interpreter truncates where chips round. float32 is computed in three tf32 products: on an H100 (Triton 3.6) most
# results are within 1e-5, but 1e-4 off where heads are padded to a width of 64, with one product's precision at least;
# why is not known.
TOLERANCE = {torch.float32: 1e-5 if DEVICE == "cpu" else 2e-4, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
# batch, query tokens, key tokens, heads, width, value width
SHAPES = [
    (1, 1, 1, 1, 32, 32),
    (2, 5, 3, 3, 64, 64),
    (2, 33, 31, 2, 24, 24),
    (1, 300, 177, 2, 64, 40),
    (1, 130, 210, 2, 72, 72),
    (2, 65, 64, 1, 128, 128),
    (1, 70, 90, 1, 40, 200),
    (1, 33, 65, 1, 256, 256),
]


def fenced(shape, dtype, generator):
    """Random [B, N, heads, D] amid NaN on all sides: what a kernel reads beyond is seen."""
    batch, length, heads, width = shape
    fence = torch.full((batch + 1, length + 70, heads + 1, width + 8), float("nan"), dtype=dtype, device=DEVICE)
    inside = fence[:batch, 2 : length + 2, :heads, 8:]
    inside.copy_(torch.randn(shape, generator=generator))
    return inside.detach().requires_grad_()


def random_inputs(shape, dtype, seed=0):
    batch, queries, keys, heads, width, value_width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = (queries, width), (keys, width), (keys, value_width), (queries, value_width)
    tensors = [fenced((batch, n, heads, d), dtype, generator) for n, d in sizes]
    return tensors[:3], tensors[3].detach()


def assert_equal_to_oracle(inputs, weight, join=(), tolerance=None, **options):
    tolerance = TOLERANCE[inputs[0].dtype] if tolerance is None else tolerance
    options |= dict(zip(("near", "gate"), join, strict=False))
    out = linear_attention(*inputs, backend="triton", **options)
    parts = oracles.linear_parts(*inputs, eps=options.get("eps", 1e-4))
    expected = oracles.joined(parts[0] / parts[1], join)
    assert out.dtype == inputs[0].dtype and out.shape == expected.shape
    assert (out.double() - expected).norm() <= tolerance * expected.norm()
    leaves = [*inputs, *join]
    assert_gradients_equal(out, leaves, weight, oracles.gradients(parts, join, leaves, weight), tolerance)


def assert_gradients_equal(out, leaves, weight, references, tolerance):
    grads = torch.autograd.grad(out, leaves, weight)
    for i, (leaf, grad, (reference, size)) in enumerate(zip(leaves, grads, references, strict=True)):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        assert (grad.double() - reference).norm() <= tolerance * size, f"gradient {i}"
    return grads


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    assert_equal_to_oracle(*random_inputs(shape, dtype))


def test_eps_is_added_to_the_denominator():
    assert_equal_to_oracle(*random_inputs(SHAPES[2], torch.float32), eps=0.5)


# of the result [2, 33, 2, 24]: per head, per channel, per token, one for all, for each element
@pytest.mark.parametrize("gate_shape", [(2, 1), (2, 24), (2, 33, 2, 1), (1,), (2, 33, 2, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_join_with_another_branch(gate_shape, dtype):
    inputs, weight = random_inputs(SHAPES[2], dtype)
    near = fenced(weight.shape, dtype, torch.Generator().manual_seed(1))
    gate = torch.randn(gate_shape, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
    assert_equal_to_oracle(inputs, weight, (near, gate), tolerance=1.5 * TOLERANCE[dtype])


@pytest.mark.parametrize("zeros", [0, 1], ids=["queries", "keys"])
def test_the_slope_of_the_features_at_zero_is_one(zeros):
    """The gradient of a query or key of zeros is then that of its features, all of them 1."""
    inputs, weight = random_inputs(SHAPES[2], torch.float32)
    inputs[zeros] = torch.zeros_like(inputs[zeros]).requires_grad_()
    (grad,) = torch.autograd.grad(linear_attention(*inputs, backend="triton"), inputs[zeros], weight)
    expected = oracles.gradient_of_features(*inputs, weight, zeros)
    assert expected.norm() > 0.1 and (grad - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_a_mask_leaves_out(dtype):
    inputs, weight = random_inputs(SHAPES[1], dtype)
    key_mask = torch.tensor([[True, False, True], [True, True, True]], device=DEVICE)
    out = linear_attention(*inputs, key_mask=key_mask, backend="triton")
    pairs = zip(*inputs, key_mask, strict=True)
    parts = [oracles.linear_parts(q[None], k[None, seen], v[None, seen]) for q, k, v, seen in pairs]
    parts = [torch.cat(part) for part in zip(*parts, strict=True)]
    expected = parts[0] / parts[1]
    assert (out.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    references = oracles.gradients(parts, (), inputs, weight)
    grads = assert_gradients_equal(out, inputs, weight, references, TOLERANCE[dtype])
    assert all(grad[~key_mask].eq(0).all() for grad in grads[1:])


@pytest.mark.parametrize("layout", ["heads first", "one projection", "odd strides", "last dimension strided"])
@pytest.mark.parametrize("width", [72, 64])
def test_strides(layout, width):
    generator = torch.Generator().manual_seed(0)
    if layout == "heads first":
        tensors = [torch.randn(2, 3, 40, width, generator=generator).to(DEVICE).transpose(1, 2) for _ in range(4)]
    elif layout == "one projection":
        tensors = torch.randn(2, 40, 3, 4 * width, generator=generator).to(DEVICE).chunk(4, dim=-1)
    elif layout == "odd strides":
        tensors = [torch.randn(2, 41, 3, width + 1, generator=generator).to(DEVICE)[:, 1:, :, 1:] for _ in range(4)]
    else:
        tensors = [torch.randn(2, 40, 3, 2 * width, generator=generator).to(DEVICE)[..., ::2] for _ in range(4)]
    *inputs, weight = (x.bfloat16() if layout == "heads first" else x for x in tensors)
    assert_equal_to_oracle([x.detach().requires_grad_() for x in inputs], weight)


def test_results_do_not_change_from_run_to_run():
    inputs, weight = random_inputs((1, 500, 500, 2, 32, 32), torch.float32)
    first, second = (linear_attention(*inputs, backend="triton") for _ in range(2))
    assert first.equal(second)
    for a, b in zip(*(torch.autograd.grad(out, inputs, weight) for out in (first, second)), strict=True):
        assert a.equal(b)


split_columns = linear_triton.phi.columns


@triton.jit
def _columns_kernel(x, out, COUNT: tl.constexpr):
    n = tl.arange(0, COUNT)
    columns = split_columns(tl.load(x + n), tl.bfloat16)
    tl.store(out + n, tl.sum(columns.to(tl.float32), axis=1))


def test_columns_keep_what_bfloat16_loses():
    x = torch.randn(32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out = torch.empty_like(x)
    _columns_kernel[(1,)](x, out, COUNT=32)
    assert (out - x).norm() < 2**-14 * x.norm()


@pytest.mark.parametrize("programs", [1, 7, 10**6])
def test_any_number_of_splits(programs, monkeypatch):
    inputs, weight = random_inputs((1, 517, 517, 2, 32, 32), torch.float32)

    def splits(x, pairs, block_rows, per_sm):
        blocks = -(-x.shape[1] // block_rows)
        count = min(programs, blocks)
        return -(-blocks // -(-blocks // count)), -(-blocks // count) * block_rows

    monkeypatch.setattr(linear_triton, "_splits", splits)
    assert_equal_to_oracle(inputs, weight)


def test_splits_cover_the_rows_once():
    for length in (1, 31, 32, 33, 500, 4097):
        x = torch.zeros(1, length, 1, 1, device=DEVICE)
        for programs in (1, 2, 5, 1000):
            for per_sm in (1, 2, 8):
                splits, rows = linear_triton._splits(x, programs, 32, per_sm)
                assert rows % 32 == 0 and (splits - 1) * rows < length <= splits * rows


@pytest.mark.parametrize(
    "shape, strides",
    [((1, 270, 2, 16), (1, 2**23, 16, 1)), ((2, 20, 2, 16), (2**31 + 2**20, 32, 16, 1))],
    ids=["rows", "batches"],
)
def test_offsets_beyond_32_bits(shape, strides):
    """Elements more than 2**31 apart in one buffer; only the pages that hold rows are touched."""
    deterministic.fill_uninitialized_memory = False
    memory = torch.empty(2**31 + 2**28, dtype=torch.bfloat16, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    tensors = [memory.as_strided(shape, strides, 4096 * i) for i in range(4)]
    for x in tensors:
        x.copy_(torch.randn(shape, generator=generator))
    *inputs, weight = tensors
    assert_equal_to_oracle([x.detach().requires_grad_() for x in inputs], weight)


def test_the_backend_named_is_the_one_that_runs(monkeypatch):
    inputs, _ = random_inputs(SHAPES[2], torch.float32)
    expected = linear_attention(*inputs, backend="triton")
    expected.sum().backward()  # on a GPU the first use, with gradients, is tried on a small case: not to be counted
    launched = []

    class Recorder:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(linear_triton, name)

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("_sum_kernel", "_output_kernel", "_output_backward_kernel", "_state_backward_kernel"):
        monkeypatch.setattr(linear_triton, name, Recorder(name))
    out = linear_attention(*inputs, backend="triton")
    assert launched == ["_sum_kernel", "_output_kernel"] and out.equal(expected)
    out.sum().backward()
    assert launched[2:] == ["_output_backward_kernel", "_sum_kernel", "_state_backward_kernel"]
    linear_attention(*inputs, backend="torch").sum().backward()
    assert len(launched) == 5


def test_operator_registration():
    (query, key, value), _ = random_inputs((2, 5, 4, 2, 16, 16), torch.float32)
    operators = torch.ops.hybriddit
    check_operator(operators.linear_state, (key, value, None, None, "elu", True), atol=1e-5, rtol=1e-5)
    state, mean = (x.detach().requires_grad_() for x in operators.linear_state(key, value, None, None, "elu", True))
    near, gate = torch.randn_like(query).requires_grad_(), torch.randn(2, 1, device=DEVICE).requires_grad_()
    for join in ((None, None), (near, gate)):
        check_operator(
            operators.linear_output, (query, state, mean, *join, None, 1e-4, "elu", True), atol=1e-5, rtol=1e-5
        )


def test_compiled_whole():
    def function(query, key, value, near, gate):
        return linear_attention(query, key, value, near=near, gate=gate, backend="triton") * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for shape in (SHAPES[2], SHAPES[5], (2, 40, 40, 2, 24, 24)):  # from the second on torch traces with symbolic sizes
        inputs, weight = random_inputs(shape, torch.float32)
        near = torch.randn(weight.shape, device=DEVICE).requires_grad_()
        leaves = [*inputs, near, torch.randn(shape[3], 1, device=DEVICE).requires_grad_()]
        for grad, reference in zip(
            *(torch.autograd.grad(run(*leaves), leaves, weight) for run in (compiled, function)), strict=True
        ):
            torch.testing.assert_close(grad, reference)


def test_autocast():
    inputs, weight = random_inputs(SHAPES[3], torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = linear_attention(*inputs, backend="triton")
        grads = torch.autograd.grad(out, inputs, weight.to(out.dtype))
    expected = oracles.linear(*(x.detach().bfloat16() for x in inputs))
    assert out.dtype == torch.bfloat16 and grads[0].dtype == torch.float32
    assert (out.double() - expected).norm() < TOLERANCE[torch.bfloat16] * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nan_stays_nan(dtype):
    for tensor in range(3):
        inputs = [x.detach().clone() for x in random_inputs((1, 40, 40, 2, 32, 32), dtype)[0]]
        inputs[tensor][0, 3, 1, 5] = float("nan")
        out = linear_attention(*inputs, backend="triton").isnan()
        assert not out[:, :, 0].any()
        if tensor == 0:  # one query
            assert out[0, 3, 1].all() and out.sum() == 32
        else:  # a key spoils its head's denominators, a value its channel
            assert out[:, :, 1].all() if tensor == 1 else out[:, :, 1, 5].all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's; of the branch that is not taken
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_extreme_inputs_stay_finite(dtype):
    inputs, weight = random_inputs((1, 64, 64, 2, 32, 32), dtype)
    inputs = [(x.detach() * 200).requires_grad_() for x in inputs]
    out = linear_attention(*inputs, backend="triton")
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out, inputs, weight))


def test_nothing_to_do():
    for shape in ((0, 6, 6, 2, 32, 32), (2, 0, 6, 2, 32, 32), (2, 6, 6, 2, 32, 0)):
        inputs, weight = random_inputs(shape, torch.float32)
        out = linear_attention(*inputs, backend="triton")
        assert out.shape == weight.shape
        grads = torch.autograd.grad(out, inputs, weight)
        assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, inputs, strict=True))


def test_what_the_kernels_cannot_take_is_refused_by_name_and_left_to_torch_otherwise():
    for change, message in (
        (dict(dtype=torch.float64), "take bfloat16, float16 and float32, not float64"),
        (dict(width=264), "widths up to 256, not 264"),
    ):
        options = {"dtype": torch.float32, "width": 32} | change
        x = torch.randn(1, 4, 1, options["width"], dtype=options["dtype"], device=DEVICE)
        with pytest.raises(ValueError, match=f'"triton" cannot run this: .*{message}; use backend "auto"'):
            linear_attention(x, x, x, backend="triton")
        expected = oracles.linear(x, x, x)
        assert (linear_attention(x, x, x) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_trial_of_a_first_use(dtype, monkeypatch):
    shapes = [(1, 70, 2, 72), (1, 90, 2, 72), (1, 90, 2, 40)]

    def tried():
        run, reference = (partial(dispatch._small_case, "elu", triton) for triton in (True, False))
        return failure_reason(run, reference, shapes, torch.device(DEVICE), dtype, True)

    assert tried() is None
    backward = linear_triton.state_backward
    monkeypatch.setattr(linear_triton, "state_backward", lambda *args: (*(1.1 * x for x in backward(*args)[:2]), None))
    assert tried() == "its gradient is wrong on this device"
    monkeypatch.setattr(linear_triton, "output", lambda query, *args: torch.full_like(query, float("nan"))[..., :40])
    assert tried() == "its output is wrong on this device"

    def fails(*args):
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(linear_triton, "output", fails)
    assert tried() == "it failed with RuntimeError: out of resource: shared memory"


def attend(query, key, value, feature_map, projections=None, key_mask=None, near=None, gate=None):
    """The two passes of the kernels, put together as `linear_attention` does."""
    query_projection, key_projection = projections or (None, None)
    state, mean = torch.ops.hybriddit.linear_state(key, value, key_projection, key_mask, feature_map, True)
    if key_mask is not None:
        share = key.shape[1] / key_mask.sum(1, dtype=state.dtype)[:, None, None, None]
        state, mean = state * share, mean * share
    settings = query_projection, FEATURE_MAPS[feature_map].eps, feature_map, True
    return torch.ops.hybriddit.linear_output(query, state, mean, near, gate, *settings)


def random_projections(heads, width, channels, dtype, seed=3):
    """Not contiguous, and such that the channels are of size 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = heads, channels, width
    pairs = [torch.randn(shape, generator=generator).to(DEVICE, dtype) / width**0.5 for _ in range(2)]
    return [x.transpose(1, 2).detach().requires_grad_() for x in pairs]


def assert_close_to_oracle(feature_map, inputs, weight, projections=None, key_mask=None, join=(), change=lambda x: x):
    """change: of query and key, for the oracle only."""
    tolerance = TOLERANCE[inputs[0].dtype]
    out = attend(*inputs, feature_map, projections, key_mask, *join)
    changed = change(inputs[0].double()), change(inputs[1].double()), inputs[2]
    parts = oracles.mapped_parts(feature_map, *changed, projections, key_mask)
    expected = oracles.joined(parts[0] / parts[1], join)
    assert out.dtype == inputs[0].dtype and out.shape == expected.shape
    assert (out.double() - expected).norm() <= tolerance * expected.norm()
    leaves = [*inputs, *(projections or ()), *join]
    references = oracles.gradients(parts, join, leaves, weight)
    grads = assert_gradients_equal(out, leaves, weight, references, 1.5 * tolerance)
    if key_mask is not None:
        assert all(grad[~key_mask].eq(0).all() for grad in grads[1:3])
    return grads


# feature map, shape, channels of the projection (None is without one): the state is of one block and of several, of
# features and of values, and no width is a whole block
MAPPED = [
    ("elu", (2, 33, 31, 2, 24, 24), 5),
    ("elu", (1, 70, 90, 2, 72, 72), 36),
    ("elu", (1, 33, 40, 1, 16, 130), 33),
    ("hedgehog", (2, 33, 31, 2, 24, 24), None),
    ("hedgehog", (1, 70, 90, 2, 72, 72), 36),
    ("hedgehog", (1, 33, 40, 1, 16, 130), 33),
    ("hedgehog", (1, 40, 33, 1, 128, 128), 128),
    ("polynomial", (2, 33, 31, 2, 24, 24), 5),
    ("polynomial", (1, 70, 90, 2, 72, 72), 10),
    ("polynomial", (1, 17, 20, 1, 16, 130), None),
    ("polynomial", (1, 20, 17, 1, 24, 24), 16),
]


@pytest.mark.parametrize("feature_map, shape, channels", MAPPED, ids=str)
def test_feature_maps_and_projections(feature_map, shape, channels):
    inputs, weight = random_inputs(shape, torch.float32)
    projections = channels and random_projections(*shape[3:5], channels, torch.float32)
    assert_close_to_oracle(feature_map, inputs, weight, projections)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [33, 36])
def test_a_polynomial_of_many_blocks(channels):
    inputs, weight = random_inputs((1, 20, 17, 1, 24, 24), torch.float32)
    assert_close_to_oracle("polynomial", inputs, weight, random_projections(1, 24, channels, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_feature_maps_in_half_precision(feature_map, dtype):
    """With a mask and the join."""
    inputs, weight = random_inputs((2, 33, 31, 2, 24, 24), dtype)
    projections = random_projections(2, 24, 5, dtype)
    assert_close_to_oracle(feature_map, inputs, weight, projections)
    generator = torch.Generator().manual_seed(1)
    key_mask = (torch.rand(2, 31, generator=generator) < 0.6).to(DEVICE)
    near, gate = fenced(weight.shape, dtype, generator), torch.rand(2, 1, generator=generator).to(DEVICE)
    out = attend(*inputs, feature_map, projections, key_mask, near, gate)
    far = oracles.mapped_linear(feature_map, *inputs, projections, key_mask)
    expected = near.double() + gate.double() * (far - near.double())
    assert (out.double() - expected).norm() <= 1.5 * TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_feature_maps_with_mask_and_join(feature_map, projected):
    shape = (2, 40, 50, 2, 12, 20)
    inputs, weight = random_inputs(shape, torch.float32)
    generator = torch.Generator().manual_seed(1)
    key_mask = (torch.rand(2, 50, generator=generator) < 0.6).to(DEVICE)
    near = fenced(weight.shape, torch.float32, generator)
    gate = torch.rand(2, 40, 2, 1, generator=generator).to(DEVICE).requires_grad_()
    projections = random_projections(2, 12, 5, torch.float32) if projected else None
    assert_close_to_oracle(feature_map, inputs, weight, projections, key_mask, (near, gate))


@pytest.mark.parametrize("told", [False, True], ids=["", "log-sum-exp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_joined_as_one_average(feature_map, dtype, told):
    """With gradients, and without, where one kernel does all; with a gate, and with one and near's log-sum-exp."""
    inputs, weight = random_inputs((2, 40, 33, 2, 24, 24), dtype)
    projections = [x.requires_grad_() for x in random_projections(2, 24, 6, dtype)]
    near, gate = oracles.beside(weight)
    settings = dict(zip(("query_projection", "key_projection"), projections, strict=True), feature_map=feature_map)
    gate, lse, worth = oracles.beside_softmax(gate) if told else (gate, None, gate)
    settings |= {"near": near, "gate": gate, "lse": lse, "joint": True, "backend": "triton"}
    out = linear_attention(*inputs, **settings)
    with torch.no_grad():
        alone = linear_attention(*inputs, **settings)
    expected = oracles.joint(feature_map, *inputs, near, worth, projections)
    leaves = [*inputs, near, gate, *projections] + [lse] * told
    grads = torch.autograd.grad(out, leaves, weight)
    references = torch.autograd.grad(expected, leaves, weight.double())
    for found, reference in zip((out, alone, *grads), (expected, expected, *references), strict=True):
        assert (found.double() - reference.double()).norm() <= 2 * TOLERANCE[dtype] * reference.double().norm()


def test_a_gate_beside_a_softmax_at_its_extremes():
    """No gate and no log-sum-exp gives NaN; a gate of 0 is near, bit for bit, and a small one is no rounding error."""
    inputs, weight = random_inputs((1, 12, 9, 2, 16, 16), torch.float32)
    near = weight
    values = [0.0, 1e-6, -1e-3, 0.049, 0.051, 39.0, 41.0, 1e4, -1e4, float("inf"), 0.0, 1e-6]
    gate = torch.tensor(values, device=DEVICE).view(1, 12, 1, 1).expand(1, 12, 2, 1)
    lse = torch.tensor([0.0, 200.0], device=DEVICE).expand(1, 12, 2).clone()
    lse[0, -2:] = -1e4
    with torch.no_grad():
        out = linear_attention(
            *inputs, near=near, gate=gate, lse=lse, joint=True, feature_map="hedgehog", backend="triton"
        )
        bounded = gate.double().clamp(-40, 40)
        worth = torch.sinh(bounded) / 10 * torch.exp(-lse.double().clamp(min=-40)).unsqueeze(-1)
        expected = oracles.joint("hedgehog", *inputs, near, worth)
    assert out.isfinite().all() and torch.equal(out[:, [0, -2]], near[:, [0, -2]])
    assert (out.double() - expected).abs().max() <= 1e-5
    small = (out - near).double()[:, [1, 2, -1], 0], (expected - near.double())[:, [1, 2, -1], 0]
    assert (small[0][:, -1] - small[1][:, -1]).norm() <= 1e-4 * small[1][:, -1].norm()


@pytest.mark.parametrize("programs", [1, 10**6])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_any_number_of_splits_gives_the_gradient_of_projections(feature_map, programs, monkeypatch):
    inputs, weight = random_inputs((2, 100, 117, 1, 16, 16), torch.float32)
    projections = random_projections(1, 16, 5, torch.float32)

    def splits(x, pairs, block_rows, per_sm):
        blocks = -(-x.shape[1] // block_rows)
        count = min(programs, blocks)
        return -(-blocks // -(-blocks // count)), -(-blocks // count) * block_rows

    monkeypatch.setattr(linear_triton, "_splits", splits)
    first, second = (assert_close_to_oracle(feature_map, inputs, weight, projections) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's; of the branch that is not taken
@pytest.mark.parametrize(
    "feature_map, projected, largest",
    [("elu", False, features.LARGEST), ("hedgehog", True, features.LARGEST), ("elu", True, features.LARGEST),
     ("polynomial", False, features.LARGEST_FACTOR), ("polynomial", True, features.LARGEST)],
)  # fmt: skip
def test_values_beyond_the_largest_count_as_it(feature_map, projected, largest):
    """And have no gradient, but for elu's own, whose slope stays 1 as in the torch passes."""
    own = (feature_map, projected) == ("elu", False)
    inputs, weight = random_inputs((1, 40, 40, 1, 12, 12), torch.float32)
    inputs = [x.detach().clone() for x in inputs]
    factors = torch.linspace(2, 200, 14, device=DEVICE)  # one for all would not show in the weighted mean
    for x in inputs[:2]:
        x[0, ::3, 0, 1], x[0, 1::7, 0, 3] = factors * largest, -8 * largest
    # small enough that what is clamped gives channels of size 1
    projections = random_projections(1, 12, 5, torch.float32) if projected else None
    for x in projections or ():
        x.detach()[:, [1, 3]] /= largest
    inputs = [x.requires_grad_() for x in inputs]

    def change(x):
        clamped = x.clamp(-largest, largest)
        return x + (clamped - x).detach() if own else clamped

    grads = assert_close_to_oracle(feature_map, inputs, weight, projections, change=change)
    if not own:
        for x, grad in zip(inputs[:2], grads[:2], strict=True):
            assert grad[x.abs() > largest].eq(0).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's; of the branch that is not taken
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_the_largest_inputs_stay_finite(feature_map, projected, dtype):
    inputs, weight = random_inputs((1, 40, 40, 1, 12, 12), dtype)
    inputs = [x.detach().clone() for x in inputs]
    for x in inputs[:2]:
        x[:, :20] = x[:, :20].sign() * torch.finfo(dtype).max
    inputs = [x.requires_grad_() for x in inputs]
    projections = random_projections(1, 12, 5, dtype) if projected else None
    out = attend(*inputs, feature_map, projections)
    assert out.isfinite().all()
    if dtype == torch.bfloat16:  # float16 has not the range of such gradients
        leaves = [*inputs, *(projections or ())]
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out, leaves, weight))


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # numpy's; NaN is the subject
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_nan_stays_nan_through_feature_maps(feature_map):
    projections = [x.detach() for x in random_projections(2, 16, 5, torch.float32)]
    for tensor in range(3):
        inputs = [x.detach().clone() for x in random_inputs((1, 20, 20, 2, 16, 16), torch.float32)[0]]
        inputs[tensor][0, 3, 1, 5] = float("nan")
        out = attend(*inputs, feature_map, projections).isnan()
        assert not out[:, :, 0].any()
        if tensor == 0:
            assert out[0, 3, 1].all() and out.sum() == 16
        else:
            assert out[:, :, 1].all() if tensor == 1 else out[:, :, 1, 5].all()


def test_operator_registration_with_a_projection():
    (query, key, value), _ = random_inputs((1, 5, 4, 1, 16, 16), torch.float32)
    projection, _ = random_projections(1, 16, 5, torch.float32)
    key_mask = torch.tensor([[True, False, True, True]], device=DEVICE)
    operators, checks = torch.ops.hybriddit, ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = key, value, projection, key_mask, "hedgehog", True
    check_operator(operators.linear_state, arguments, test_utils=checks)
    sums = operators.linear_state(*arguments)
    arguments = query, *sums, None, None, projection, 1e-8, "hedgehog", True
    check_operator(operators.linear_output, arguments, test_utils=checks)
    arguments = query.detach(), query.detach(), *(x.detach() for x in sums), projection.detach(), 1e-8, "hedgehog", True
    torch.library.opcheck(operators.linear_output_backward, arguments, test_utils=checks[:2])


def test_nothing_to_do_with_a_projection():
    for shape in ((0, 6, 6, 2, 16, 16), (2, 0, 6, 2, 16, 16), (2, 6, 6, 2, 16, 0)):
        inputs, weight = random_inputs(shape, torch.float32)
        projections = random_projections(2, 16, 5, torch.float32)
        out = attend(*inputs, "hedgehog", projections)
        assert out.shape == weight.shape
        leaves = [*inputs, *projections]
        for grad, x in zip(torch.autograd.grad(out, leaves, weight), leaves, strict=True):
            assert grad.shape == x.shape and not grad.any()


pairs_of_features = linear_triton.phi.pairs


@triton.jit
def _pairs_kernel(left, right, scale, CHANNELS: tl.constexpr, COUNT: tl.constexpr):
    f = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    i, j, factor = pairs_of_features(f, CHANNELS)
    tl.store(left + f, i, mask=f < COUNT)
    tl.store(right + f, j, mask=f < COUNT)
    tl.store(scale + f, factor, mask=f < COUNT)


@pytest.mark.parametrize("channels", [1, 2, 14, 36, 128])
def test_the_polynomial_s_pairs_are_those_of_the_formula(channels):
    count = FEATURE_MAPS["polynomial"].features(channels)
    left, right = torch.zeros(2, count, dtype=torch.int32, device=DEVICE)
    scale = torch.zeros(count, device=DEVICE)
    _pairs_kernel[(-(-count // 1024),)](left, right, scale, CHANNELS=channels, COUNT=count)
    expected = features.product_pairs(channels)
    assert left.tolist() == expected[0] and right.tolist() == expected[1]
    torch.testing.assert_close(scale.cpu(), torch.tensor(expected[2]))


def test_maps_and_widths_that_the_kernels_lack_are_refused():
    refusal = partial(dispatch.triton_refusal, DEVICE, torch.float32, 256)
    assert refusal() is refusal("hedgehog", 128) is None
    assert refusal("hedgehog", 129) == (
        "its kernels take projections, and feature maps other than elu, at widths up to 128, not 129"
    )
    assert refusal("exp", 64) == "its kernels have the feature maps elu, hedgehog, polynomial, not exp"
    for options in ({"projected": True}, {"feature_map": "polynomial"}):
        case = dict(feature_map="elu", projected=False, gradients=True) | options
        with pytest.raises(ValueError, match="widths up to 128, not 136"):
            dispatch._takes_triton("triton", torch.device(DEVICE), torch.float32, 136, 64, 64, *case.values())


def test_block_states_are_passes_over_parts(monkeypatch):
    """The mixer of them, joined with near as layers do, against itself in float64; 16 parts, of two sizes."""
    grid, generator = (4, 5), torch.Generator().manual_seed(0)
    mixer = blocks.BlockMixer(1, 16, feature_map="elu", projection=0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    sizes = [(1, 20, 1, 16)] * 5 + [(1, 20, 1)]
    *inputs, weight, lse = (torch.randn(size, generator=generator).to(DEVICE) for size in sizes)
    gate, layout, found = torch.tensor([[2.0]], device=DEVICE), TokenLayout(0, (grid,), True), []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "triton")):
        monkeypatch.setattr(blocks, "sum_keys", partial(dispatch.sum_keys, backend=backend))
        mixer.to(DEVICE, dtype)
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        join = {"near": leaves[3], "gate": gate, "joint": True, "lse": lse.to(dtype), "layout": layout}
        out = mixer(*leaves[:3], **join)
        with torch.no_grad():
            found.append([out, mixer(*leaves[:3], **join)])
        found[-1] += torch.autograd.grad(out, [*leaves, *mixer.parameters()], weight.to(dtype))
    for exact, own in zip(*found, strict=True):
        assert own.dtype == torch.float32 and (own - exact).norm() <= 2 * TOLERANCE[torch.float32] * exact.norm()
