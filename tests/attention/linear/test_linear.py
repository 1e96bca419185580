import weakref
from pathlib import Path

import pytest
import torch
from attention import oracles
from attention.operators import check_operator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from hybriddit.attention import linear_attention
from hybriddit.attention.linear import FEATURE_MAPS, FeatureMap, dispatch, linear_attention_formula
from hybriddit.attention.linear import torch as passes

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


MAPS = list(FEATURE_MAPS)


def random_projections(inputs, channels, seed=1):
    """Two of [heads, D, channels] like the inputs, as options of linear_attention; none if channels is None."""
    if channels is None:
        return {}
    heads, width = inputs[0].shape[2:]
    generator = torch.Generator().manual_seed(seed)
    pair = (1.5 * torch.randn(2, heads, width, channels, generator=generator) / width**0.5).to(inputs[0].dtype)
    return dict(zip(("query_projection", "key_projection"), (x.clone().requires_grad_() for x in pair), strict=True))


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


# batch, query tokens, key tokens, heads, width, value width; the projections' channels
MAPPED_SHAPES = [
    ((2, 37, 30, 3, 24, 16), 5),
    ((1, 70, 77, 2, 72, 40), 16),
    ((1, 2100, 60, 2, 24, 24), 16),
    ((1, 60, 2100, 2, 72, 24), 33),
    ((3, 40, 33, 1, 24, 24), 2),
    ((2, 37, 30, 3, 24, 16), None),
    ((1, 60, 2100, 2, 5, 24), None),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
@pytest.mark.parametrize("shape, channels", MAPPED_SHAPES, ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_every_feature_map_with_and_without_projections(feature_map, shape, channels, joined, masked, dtype):
    inputs, weight = random_inputs(shape, dtype)
    generator = torch.Generator().manual_seed(2)
    projections = random_projections(inputs, channels)
    key_mask = torch.rand(shape[0], shape[2], generator=generator) < 0.6 if masked else None
    out_shape, heads = weight.shape, shape[3]
    beside = {
        "near": torch.randn(out_shape, generator=generator).to(dtype).requires_grad_(),
        "gate": torch.rand(heads, 1, generator=generator)
        .to(torch.promote_types(dtype, torch.float32))
        .requires_grad_(),
    }
    options = dict(feature_map=feature_map, key_mask=key_mask, **projections, **(beside if joined else {}))
    out = linear_attention(*inputs, backend="torch", **options)
    expected = oracles.mapped_linear(feature_map, *inputs, list(projections.values()) or None, key_mask)
    if joined:
        expected = beside["near"].double() + beside["gate"] * (expected - beside["near"].double())
    assert out.dtype == dtype and relative_error(out, expected) < TOLERANCE[dtype]
    leaves = [*inputs, *projections.values(), *(beside.values() if joined else ())]
    grads = torch.autograd.grad(out, leaves, weight)
    references = torch.autograd.grad(expected, leaves, weight.double())
    for leaf, grad, reference in zip(leaves, grads, references, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        assert relative_error(grad, reference.double()) < 2 * TOLERANCE[dtype]
    if masked:
        assert all(grad[~key_mask].eq(0).all() for grad in grads[1:3])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("masked, told", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape, channels", MAPPED_SHAPES[:5:4] + MAPPED_SHAPES[5:6], ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_joined_as_one_average(feature_map, shape, channels, masked, told, dtype, monkeypatch):
    """With and without gradients, by the passes and by the formula; told: near's log-sum-exp."""
    inputs, weight = random_inputs(shape, dtype)
    key_mask = torch.rand(shape[0], shape[2], generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    near, gate, projections = *oracles.beside(weight), random_projections(inputs, channels)
    gate, lse, worth = oracles.beside_softmax(gate) if told else (gate, None, gate)
    expected = oracles.joint(feature_map, *inputs, near, worth, list(projections.values()) or None, key_mask)
    leaves = [*inputs, near, gate, *projections.values()] + [lse] * told
    references = torch.autograd.grad(expected, leaves, weight.double())
    settings = {"feature_map": feature_map, "key_mask": key_mask, "near": near, "gate": gate, "lse": lse}
    settings["joint"] = True
    for fused in (True, False):
        monkeypatch.setitem(FEATURE_MAPS, feature_map, FEATURE_MAPS[feature_map]._replace(fused=fused))
        out = linear_attention(*inputs, **settings, **projections)
        with torch.no_grad():
            alone = linear_attention(*inputs, **settings, **projections)
        for found in (out, alone):
            assert found.dtype == dtype and relative_error(found, expected) < TOLERANCE[dtype]
        for grad, reference in zip(torch.autograd.grad(out, leaves, weight), references, strict=True):
            assert relative_error(grad, reference.double()) < 2 * TOLERANCE[dtype]
    with pytest.raises(ValueError, match="pass near and gate"):
        linear_attention(*inputs, joint=True)
    with pytest.raises(ValueError, match="lse goes with joint, and must be"):
        linear_attention(*inputs, near=near, gate=gate, lse=near[..., 0])


@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("feature_map", MAPS)
def test_the_formula_of_every_feature_map_is_the_definition(feature_map, channels):
    inputs, weight = random_inputs((2, 37, 30, 3, 8, 12))
    projections = random_projections(inputs, channels)
    key_mask = torch.arange(30).expand(2, -1) < torch.tensor([[11], [30]])
    out = linear_attention_formula(*inputs, feature_map=feature_map, key_mask=key_mask, **projections)
    expected = oracles.mapped_linear(feature_map, *inputs, list(projections.values()) or None, key_mask)
    assert relative_error(out, expected) < 1e-12
    leaves = [*inputs, *projections.values()]
    for grad, reference in zip(*(torch.autograd.grad(x, leaves, weight) for x in (out, expected)), strict=True):
        assert relative_error(grad, reference) < 1e-11


@pytest.mark.parametrize("feature_map", MAPS)
def test_the_passes_compute_every_row(feature_map, monkeypatch):
    """The formula, whose features are of all tokens at once, does not run."""
    monkeypatch.setattr(dispatch, "linear_attention_formula", None)
    inputs, weight = random_inputs(SHAPES[0], torch.float32)
    for channels in None, 5:
        linear_attention(*inputs, feature_map=feature_map, **random_projections(inputs, channels)).backward(weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_formula_is_the_definition(shape):
    inputs, weight = random_inputs(shape)
    out, expected = linear_attention_formula(*inputs, eps=0.5), oracles.linear(*inputs, eps=0.5)
    assert relative_error(out, expected) < 1e-12
    for grad, reference in zip(*(torch.autograd.grad(x, inputs, weight) for x in (out, expected)), strict=True):
        assert (grad - reference).norm() <= 1e-11 * (reference.norm() + 0.01 * weight.norm())
    key_mask = torch.arange(shape[2]).expand(shape[0], -1) < max(1, shape[2] // 2)
    masked = linear_attention_formula(*inputs, key_mask=key_mask)
    seen = [x[:, : max(1, shape[2] // 2)] for x in inputs[1:]]
    assert relative_error(masked, oracles.linear(inputs[0], *seen)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_another_feature_map_is_a_row(dtype, monkeypatch):
    """One that no kernel has is computed by the formula, with the mask and the join."""
    monkeypatch.setitem(FEATURE_MAPS, "exp", FeatureMap(torch.exp, lambda m: m, eps=1e-4))
    inputs, weight = random_inputs((2, 30, 20, 3, 8, 12), dtype)
    key_mask = torch.arange(20).expand(2, -1) < 13
    near, gate = torch.randn(weight.shape).to(dtype), torch.rand(3, 1, dtype=torch.float64)
    out = linear_attention(*inputs, near=near, gate=gate, key_mask=key_mask, feature_map="exp", eps=0)
    query, key, value = (x.double() for x in inputs)
    weights = torch.einsum("bqhd,bkhd->bhqk", query.exp(), key[:, :13].exp())
    far = torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True), value[:, :13])
    assert out.dtype == dtype and relative_error(out, near.double() + gate * (far - near.double())) < TOLERANCE[dtype]
    with pytest.raises(ValueError, match='backend "torch" does not have feature map \'exp\': use backend "auto"'):
        linear_attention(*inputs, feature_map="exp", backend="torch")


def test_eps_is_added_to_the_denominator():
    inputs, _ = random_inputs(SHAPES[0])
    assert relative_error(linear_attention(*inputs, eps=0.5), oracles.linear(*inputs, eps=0.5)) < 1e-12


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("feature_map", MAPS)
def test_gradcheck(feature_map, channels, masked):
    inputs, _ = random_inputs((2, 5, 4, 2, 3, 4))
    names = ("query_projection", "key_projection")[: 0 if channels is None else 2]
    key_mask = torch.tensor([[True, False, True, True], [False, True, True, False]]) if masked else None

    def attend(query, key, value, *projections):
        options = dict(zip(names, projections, strict=True), feature_map=feature_map, key_mask=key_mask)
        return linear_attention(query, key, value, **options)

    assert torch.autograd.gradcheck(attend, (*inputs, *random_projections(inputs, channels).values()))


@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("feature_map", MAPS)
def test_operator_registration(feature_map, channels):
    inputs, _ = random_inputs((2, 5, 4, 2, 3, 4))
    query, key, value = inputs
    to_query, to_key = random_projections(inputs, channels).values() or (None, None)
    operators = torch.ops.hybriddit
    key_mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    for mask in None, key_mask:
        check_operator(operators.linear_state, (key, value, to_key, mask, feature_map, False))
    sums = operators.linear_state(key, value, to_key, None, feature_map, False)
    state, mean = (x.detach().requires_grad_() for x in sums)
    settings = to_query, 1e-4, feature_map, False
    check_operator(operators.linear_output, (query, state, mean, None, None, *settings))
    near, gate = torch.randn(2, 5, 2, 4, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    joined = (query, state, mean, near.requires_grad_(), gate.requires_grad_(), *settings)
    check_operator(operators.linear_output, joined)


def test_non_contiguous_input():
    joined = torch.randn(2, 50, 3, 3 * 8, dtype=torch.float64)
    inputs = [x[:, 7:].requires_grad_() for x in joined.chunk(3, dim=-1)]
    out = linear_attention(*inputs)
    expected = oracles.linear(*inputs)
    weight = torch.randn(2, 3, 43, 8, dtype=torch.float64).transpose(1, 2)
    assert relative_error(out, expected) < 1e-12
    for grad, reference in zip(*(torch.autograd.grad(y, inputs, weight) for y in (out, expected)), strict=True):
        assert relative_error(grad, reference) < 1e-11


# rows and heads of a block: a ragged part of an image of 150 rows and three heads, or two of three images
BLOCKS = {"rows": (64, 2 * 64), "images": (150, 2 * 3 * 150)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("channels", [None, 12])
@pytest.mark.parametrize("feature_map", MAPS)
def test_heads_first_input_of_several_ragged_blocks(feature_map, channels, block, dtype, monkeypatch):
    """Views of [B, heads, N, D]."""
    rows, lines = BLOCKS[block]
    features = FEATURE_MAPS[feature_map].features(channels or 24)
    monkeypatch.setattr(passes, "CPU_ROWS", rows)
    monkeypatch.setattr(passes, "CPU_ELEMENTS", lines * max(24, features))
    inputs = [torch.randn(3, 3, 150, 24).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    if feature_map == "polynomial" and channels is None:
        inputs[0], inputs[1] = ((x.detach() / 2).requires_grad_() for x in inputs[:2])
    projections = random_projections(inputs, channels)
    weight, key_mask = torch.randn(3, 150, 3, 24).to(dtype), torch.rand(3, 150) < 0.7
    cut = [(b.images, b.heads, b.rows) for b in passes._blocks(inputs[0], features)]
    parts = [(slice(0, 2), slice(0, 3), slice(0, 150)), (slice(2, 3), slice(0, 3), slice(0, 150))]
    assert cut == parts if block == "images" else len(cut) == 3 * 2 * 3
    out = linear_attention(*inputs, feature_map=feature_map, key_mask=key_mask, **projections)
    expected = oracles.mapped_linear(feature_map, *inputs, list(projections.values()) or None, key_mask)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    leaves = [*inputs, *projections.values()]
    grads = torch.autograd.grad(expected, leaves, weight.double())
    for grad, reference in zip(torch.autograd.grad(out, leaves, weight), grads, strict=True):
        assert relative_error(grad, reference.double()) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("instructions", [(), ("sse2", "neon")], ids=["without", "with"])
def test_bfloat16_with_and_without_its_instructions(instructions, monkeypatch):
    monkeypatch.setattr(passes, "BFLOAT16_INSTRUCTIONS", instructions)
    product = passes._product_dtype(torch.zeros(1, dtype=torch.bfloat16))
    assert product == (torch.bfloat16 if instructions else torch.float32)
    test_values_and_gradients(SHAPES[2], torch.bfloat16, "torch")
    test_join_with_another_branch((3, 1), torch.bfloat16)
    for feature_map in MAPS:
        test_every_feature_map_with_and_without_projections(feature_map, *MAPPED_SHAPES[1], True, True, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_the_passes_have_the_formula_s_features(feature_map, dtype):
    x = 3 * torch.randn(2, 40, 7, dtype=dtype)
    x[0, 0], x[0, 1], x[0, 2, 0], x[0, 3, 0] = 0, 300 * x[0, 1], 3e38, -3e38
    features = passes._PHI[feature_map].features(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(features, FEATURE_MAPS[feature_map].formula(x))


def test_phi():
    x = torch.tensor([-1e4, -200, -80, -3, -1e-3, 0, 1e-3, 2, 1e4], dtype=torch.float64)
    expected = torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    torch.testing.assert_close(passes._elu(x), expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(passes._elu(x.float()), expected.float(), rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("zeros", [0, 1], ids=["queries", "keys"])
@pytest.mark.parametrize("attend", [linear_attention, linear_attention_formula])
def test_the_slope_of_the_features_at_zero_is_one(attend, zeros):
    """The gradient of a query or key of zeros is then that of its features, all of them 1."""
    inputs, weight = random_inputs(SHAPES[0])
    inputs[zeros] = torch.zeros_like(inputs[zeros]).requires_grad_()
    (grad,) = torch.autograd.grad(attend(*inputs), inputs[zeros], weight)
    expected = oracles.gradient_of_features(*inputs, weight, zeros)
    assert expected.norm() > 0.1 and relative_error(grad, expected) < 1e-11


def test_extreme_inputs_stay_finite():
    inputs = [x.detach() * 200 for x in random_inputs(SHAPES[0], torch.float32)[0]]
    assert linear_attention(*inputs).isfinite().all()


@pytest.mark.parametrize(
    "dtype, size", [(torch.bfloat16, 3e38), (torch.float16, 65504), (torch.float32, 3e38)], ids=str
)
@pytest.mark.parametrize("channels", [None, 5])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("attend", [linear_attention, linear_attention_formula])
def test_queries_and_keys_of_any_size_give_finite_results(attend, feature_map, channels, dtype, size):
    (query, key, value), weight = random_inputs((1, 64, 80, 2, 9, 8), torch.float32)
    for scale in (size, (size * torch.rand(9) ** 40)):
        for sign in (lambda x: x, torch.sign, lambda x: x.abs().sign(), lambda x: -x.abs().sign()):
            large = [(sign(x.detach()).clamp(-1, 1) * scale).to(dtype) for x in (query, key)]
            small = [x.detach().to(dtype) for x in (query, key)]
            for q, k in (large, (large[0], small[1]), (small[0], large[1])):
                inputs = [x.detach().requires_grad_() for x in (q, k, value.to(dtype))]
                leaves = inputs + list(random_projections(inputs, channels).values())
                names = ("query_projection", "key_projection")[: len(leaves) - 3]
                read = inputs if attend is linear_attention else [x.float() for x in inputs]
                out = attend(*read, feature_map=feature_map, **dict(zip(names, leaves[3:], strict=True)))
                assert all(x.isfinite().all() for x in inputs) and out.isfinite().all()
                assert all(grad.isfinite().all() for grad in torch.autograd.grad(out, leaves, weight.to(out.dtype)))


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_a_million_tokens(feature_map, projected):
    """The sums stay as exact as float32, and finite."""
    inputs = [torch.randn(1, 2**20, 1, 4).bfloat16().requires_grad_() for _ in range(3)]
    projections = random_projections(inputs, 3 if projected else None)
    weight = torch.randn(1, 2**20, 1, 4).bfloat16()
    leaves = [*inputs, *projections.values()]
    grads = torch.autograd.grad(linear_attention(*inputs, feature_map=feature_map, **projections), leaves, weight)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    options = dict(zip(projections, doubles[3:], strict=True), feature_map=feature_map)
    expected = linear_attention_formula(*doubles[:3], **options)
    for grad, reference in zip(grads, torch.autograd.grad(expected, doubles, weight.double()), strict=True):
        assert relative_error(grad, reference) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("feature_map", MAPS)
def test_beyond_their_bounds_projected_inputs_have_no_gradient(feature_map):
    inputs, weight = random_inputs((1, 6, 6, 2, 4, 4), torch.float32)
    projections = random_projections(inputs, 3)
    for x in inputs[:2]:
        x.data[0, 2, 1, 3], x.data[0, 4, 0, 1] = 2.0**41, -(2.0**41)
    grads, references = (
        torch.autograd.grad(attend(*inputs, feature_map=feature_map, **projections), inputs[:2], weight.float())
        for attend in (linear_attention, linear_attention_formula)
    )
    for grad, reference in zip(grads, references, strict=True):
        assert grad[0, 2, 1, 3] == grad[0, 4, 0, 1] == 0 and grad.norm() > 0
        torch.testing.assert_close(grad, reference)


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("feature_map", MAPS)
def test_empty_batch(feature_map, channels):
    inputs, weight = random_inputs((0, 6, 6, 2, 4, 4))
    projections = random_projections(inputs, channels)
    out = linear_attention(*inputs, feature_map=feature_map, **projections)
    assert out.shape == (0, 6, 2, 4)
    leaves = [*inputs, *projections.values()]
    assert [grad.shape for grad in torch.autograd.grad(out, leaves, weight)] == [x.shape for x in leaves]


@pytest.mark.parametrize("channels", [None, 8])
@pytest.mark.parametrize("feature_map", MAPS)
def test_compile_checkpoint_and_inference_mode(feature_map, channels):
    def attend(query, key, value, *projections):
        names = ("query_projection", "key_projection")[: len(projections)]
        return linear_attention(
            query, key, value, feature_map=feature_map, **dict(zip(names, projections, strict=True))
        )

    torch.compiler.reset()  # torch compiles a function a few times only
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    large = SHAPES[3] if feature_map != "polynomial" else (1, 2300, 2100, 2, 16, 16)  # which has a thousand features
    for shape in (SHAPES[0], large, SHAPES[2]):  # from the second on torch traces with symbolic sizes
        inputs, weight = random_inputs(shape)
        inputs += random_projections(inputs, channels).values()
        expected = torch.autograd.grad(attend(*inputs), inputs, weight)
        for function in (compiled, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
            for grad, reference in zip(torch.autograd.grad(function(*inputs), inputs, weight), expected, strict=True):
                torch.testing.assert_close(grad, reference)
        with torch.inference_mode():
            torch.testing.assert_close(attend(*inputs), attend(*(x.detach() for x in inputs)))


@pytest.mark.parametrize("channels", [None, 16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_autocast_keeps_the_sums_in_float32(feature_map, channels):
    inputs, weight = random_inputs((1, 3000, 3000, 1, 24, 32), torch.float32)
    projections = random_projections(inputs, channels)
    leaves = [*inputs, *projections.values()]
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_attention(*inputs, feature_map=feature_map, **projections)
        grads = torch.autograd.grad(out, leaves, weight.to(out.dtype))
    rounded = [x.detach().bfloat16() for x in leaves]
    assert out.dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in grads)
    expected = oracles.mapped_linear(feature_map, *rounded[:3], rounded[3:] or None)
    assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]


def test_cost_is_linear():
    """The counter sees the operators' own products, and they grow with the tokens, not with their square."""

    def flops(tokens):
        inputs, weight = random_inputs((1, tokens, tokens, 2, 16, 16), torch.float32)
        with FlopCounterMode(display=False) as counter:
            linear_attention(*inputs).backward(weight)
        return counter.get_total_flops()

    assert flops(4096) == 4 * flops(1024) > 0


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made under it hold at once."""

    def __init__(self):
        super().__init__()
        self.made, self.bytes = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        others = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in others:
                self.made.append(weakref.ref(x))
        self.made = [x for x in self.made if x() is not None]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (y() for y in self.made)}
        self.bytes = max(self.bytes, sum(storages.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature_map, channels", [("elu", None), ("elu", 64), ("hedgehog", 32), ("polynomial", 9)])
def test_memory_beside_the_output_does_not_grow(feature_map, channels, dtype):
    key, query = (torch.randn(1, 65536, 1, 64).to(dtype).expand(1, 65536, 16, 64) for _ in range(2))
    weights = None if channels is None else torch.randn(16, 64, channels).to(dtype)
    with torch.no_grad(), PeakMemory() as peak:
        state = passes.state(key, key, weights, None, feature_map)
        out = passes.output(query, *state, None, None, weights, 1e-4, feature_map)
    assert out.nbytes <= peak.bytes <= 1.1 * out.nbytes


@pytest.mark.parametrize("channels", [None, 5])
@pytest.mark.parametrize("feature_map", MAPS)
def test_flop_formulas_count_what_runs(feature_map, channels):
    inputs, weight = random_inputs((2, 30, 20, 3, 8, 12), torch.float32)
    query, key, value = (x.detach() for x in inputs)
    weights = None if channels is None else torch.randn(3, 8, channels)
    operators, options = torch.ops.hybriddit, (False,)
    state = operators.linear_state(key, value, weights, None, feature_map, False)
    grad_state = [torch.randn_like(x) for x in state]
    for operator, function, args in (
        (operators.linear_state, passes.state, (key, value, weights, None, feature_map)),
        (
            operators.linear_state_backward,
            passes.state_backward,
            (*grad_state, key, value, weights, None, feature_map),
        ),
        (operators.linear_output, passes.output, (query, *state, None, None, weights, 1e-4, feature_map)),
        (
            operators.linear_output_backward,
            passes.output_backward,
            (weight, query, *state, weights, 1e-4, feature_map),
        ),
    ):
        with FlopCounterMode(display=False) as declared:
            operator(*args, *options)
        in_place = {
            torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm].__wrapped__
        }  # unknown to the counter
        with FlopCounterMode(display=False, custom_mapping=in_place) as run:
            function(*args)
        assert declared.get_total_flops() == run.get_total_flops() > 0


# of the result [2, 50, 3, 16]: per head, per channel, per token, one for all
GATES = [(3, 1), (3, 16), (2, 50, 3, 1), (1,)]


@pytest.mark.parametrize("gate_shape", GATES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_join_with_another_branch(gate_shape, dtype):
    inputs, weight = random_inputs((2, 50, 40, 3, 24, 16), dtype)
    near = torch.randn(weight.shape).to(dtype).requires_grad_()
    gate = torch.randn(gate_shape, dtype=torch.float32 if dtype == torch.bfloat16 else dtype).requires_grad_()
    out = linear_attention(*inputs, near=near, gate=gate)
    expected = near.double() + gate * (oracles.linear(*inputs) - near.double())
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    leaves = (*inputs, near, gate)
    grads = torch.autograd.grad(out, leaves, weight)
    for leaf, grad, reference in zip(
        leaves, grads, torch.autograd.grad(expected, leaves, weight.double()), strict=True
    ):
        assert grad.dtype == leaf.dtype
        assert relative_error(grad, reference.double()) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("join", [False, True])
def test_keys_that_a_mask_leaves_out(join, dtype):
    """As if they were not among the keys: in the sums, in what these are divided by, and in every gradient."""
    inputs, weight = random_inputs((3, 50, 40, 2, 24, 16), dtype)
    key_mask = torch.stack((torch.arange(40) < 11, torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.5,
                            torch.ones(40) > 0))  # fmt: skip
    options = {}
    if join:
        options = {"near": torch.randn(weight.shape).to(dtype), "gate": torch.full((2, 1), 0.4, dtype=torch.float64)}
    out = linear_attention(*inputs, key_mask=key_mask, eps=0.5, **options)
    query, key, value = inputs
    parts = [oracles.linear(query[b, None], key[b, None, seen], value[b, None, seen], eps=0.5)
             for b, seen in enumerate(key_mask)]  # fmt: skip
    expected = torch.cat(parts)
    if join:
        expected = options["near"].double() + 0.4 * (expected - options["near"].double())
    assert out.dtype == dtype and relative_error(out, expected) < TOLERANCE[dtype]
    grads = torch.autograd.grad(out, inputs, weight)
    for grad, reference in zip(grads, torch.autograd.grad(expected, inputs, weight.double()), strict=True):
        assert relative_error(grad, reference.double()) < 2 * TOLERANCE[dtype]
    assert all(grad[~key_mask].eq(0).all() for grad in grads[1:])


def test_a_closed_gate_leaves_the_other_branch_as_it_is():
    inputs, _ = random_inputs(SHAPES[0], torch.bfloat16)
    near = torch.randn(2, 37, 3, 24).bfloat16()
    assert linear_attention(*inputs, near=near, gate=torch.zeros(3, 1)).equal(near)


@pytest.mark.parametrize("channels", [None, 5])
@pytest.mark.parametrize("feature_map", MAPS)
def test_nan_stays_nan(feature_map, channels):
    for tensor in range(3):
        inputs = [x.detach() for x in random_inputs((1, 40, 40, 2, 8, 8), torch.float32)[0]]
        inputs[tensor][0, 3, 1, 5] = float("nan")
        projections = {name: x.detach() for name, x in random_projections(inputs, channels).items()}
        out = linear_attention(*inputs, feature_map=feature_map, **projections).isnan()
        assert not out[:, :, 0].any()
        if tensor == 0:  # one query
            assert out[0, 3, 1].all() and out.sum() == 8
        else:  # a key spoils its head's denominators, a value its channel
            assert out[:, :, 1].all() if tensor == 1 else out[:, :, 1, 5].all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=torch.zeros(2, 3, 4)), "takes .B, N, heads, D."),
        (dict(query=torch.zeros(1, 3, 2, 5)), "query and key must agree"),
        (dict(value=torch.zeros(1, 4, 2, 4)), "key and value must agree"),
        (dict(value=torch.zeros(1, 3, 2, 4, dtype=torch.float64)), "one dtype"),
        (dict(value=torch.zeros(1, 3, 2, 4, device="meta")), "use one device"),
        (dict(backend="cuda"), "unknown linear attention backend 'cuda'"),
        (dict(feature_map="exp"), "unknown feature map 'exp': use one of elu"),
        (dict(key_mask=torch.ones(1, 3)), r"key_mask must be bool \(1, 3\), got torch.float32 \(1, 3\)"),
        (dict(key_mask=torch.ones(1, 4, dtype=torch.bool)), r"key_mask must be bool \(1, 3\)"),
        (dict(query_projection=torch.zeros(2, 4, 3)), "query_projection and key_projection come together"),
        (dict(query_projection=torch.zeros(2, 4, 3), key_projection=torch.zeros(2, 4, 2)), "one m for both, got"),
        (dict(query_projection=torch.zeros(4, 3), key_projection=torch.zeros(4, 3)), r"must be \[2, 4\] x m"),
        (dict(query_projection=torch.zeros(2, 4, 0), key_projection=torch.zeros(2, 4, 0)), "1 to 256 channels"),
        (dict(near=torch.zeros(1, 3, 2, 4)), "near and gate come together"),
        (dict(near=torch.zeros(1, 3, 2, 5), gate=torch.zeros(2, 1)), "near must have the result's shape"),
        (dict(near=torch.zeros(1, 3, 2, 4), gate=torch.zeros(3, 1)), "gate must broadcast"),
    ],
)
def test_bad_input(change, message):
    args = {name: torch.zeros(1, 3, 2, 4) for name in ("query", "key", "value")} | change
    with pytest.raises(ValueError, match=message) as error:
        linear_attention(**args)
    assert "\n" not in str(error.value)


def test_triton_is_refused_in_one_line():
    x = torch.zeros(1, 3, 2, 4)
    with pytest.raises(ValueError, match='"triton" cannot run this: .* use backend "auto"'):
        linear_attention(x, x, x, backend="triton")


@pytest.mark.slow
def test_the_kernels_in_triton_s_interpreter():
    interpreter = pytest.importorskip("attention.interpreter", reason="triton is not installed")
    interpreter.run_in_interpreter(Path(__file__).parent)


def test_kernels_that_fail_their_trial_are_left_aside_with_a_warning(monkeypatch):
    """A GPU's first use of the kernels; the GPU is pretended."""
    case = torch.device("cuda"), torch.bfloat16, 64, 40, 64, "elu", False, True
    tried = []
    monkeypatch.setattr(dispatch, "triton_refusal", lambda *case: None)
    monkeypatch.setattr(dispatch, "failure_reason", lambda *case: tried.append(case[2:]))
    dispatch._kept_takes_triton.cache_clear()
    assert [dispatch._takes_triton("auto", *case) for _ in range(2)] == [True, True]
    assert tried == [([(1, 70, 2, 64), (1, 90, 2, 64), (1, 90, 2, 40)], *case[:2], True)]  # once

    monkeypatch.setattr(dispatch, "failure_reason", lambda *case: "its output is wrong on this device")
    dispatch._kept_takes_triton.cache_clear()
    with pytest.warns(UserWarning, match="does not use triton: its output is wrong"):
        assert dispatch._takes_triton("auto", *case) is False
    with pytest.raises(ValueError, match='"triton" cannot run this: its output is wrong on this device; use'):
        dispatch._takes_triton("triton", *case)
    dispatch._kept_takes_triton.cache_clear()
