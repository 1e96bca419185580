"""Far branches of other papers against dense float64 weights, written out from their definitions."""

import math
import sys
from types import ModuleType

import oracles
import pytest
import torch
from torch.nn.functional import softplus

from hybriddit.attention import HybridAttention, TokenLayout
from hybriddit.attention.mixers import MIXERS, check_mixer
from hybriddit.attention.mixers import scan as scans

HEADS, HEAD_DIM, TEXT = 3, 12, 4
GRIDS = {"one": ((8, 4),), "two": ((5, 4), (3, 9))}
OTHERS = [name for name in MIXERS if name != "linear"]


def places(grids):
    """(grid, row, column, rows, columns) of every token."""
    return [(g, r, c, *grid) for g, grid in enumerate(grids) for r in range(grid[0]) for c in range(grid[1])]


def similarity(mixer, query, key):
    """phi(q) . phi(k) of projected queries and keys, [B, heads, M, N]."""
    query, key = (
        torch.einsum("bnhd,hdm->bnhm", x, matrix)
        for x, matrix in ((query, mixer.projection_q), (key, mixer.projection_k))
    )
    return oracles.similarity(query, key, "polynomial"), query, key


def block_weights(mixer, query, key, value, grids):
    weights, tokens = similarity(mixer, query, key)[0], places(grids)
    part = torch.tensor([4 * (4 * r // rows) + 4 * c // columns for _, r, c, rows, columns in tokens])
    return weights * mixer.log_factors.exp()[:, part][:, :, part], value


def scan_weights(mixer, query, key, value, grids):
    weights, tokens = similarity(mixer, query, key)[0], places(grids)
    projected = torch.einsum("bnhd,hdm->bnhm", key, mixer.projection_k)
    # distinct products of degree 0, 1 and 2, in the order of phi
    m = projected.shape[-1]
    x = torch.cat((torch.ones_like(projected[..., :1]), projected * m**-0.25), -1)
    pairs = [(i, j) for i in range(m + 1) for j in range(i, m + 1)]
    scale = torch.tensor([math.sqrt(0.5) if i == j and i else 1.0 for i, j in pairs], dtype=torch.float64)
    phi = torch.stack([x[..., i] * x[..., j] for i, j in pairs], -1) * scale
    torch.testing.assert_close(
        torch.einsum("bnhf,bmhf->bhnm", phi, phi), oracles.similarity(projected, projected, "polynomial")
    )
    decay = softplus(torch.einsum("bnhf,hf->bnh", phi, mixer.decay_weight) + mixer.decay_bias)
    shares = torch.zeros_like(weights)
    for head in range(HEADS):
        order = sorted(
            range(len(tokens)), key=lambda i: (tokens[i][0], tokens[i][1 + head % 2], tokens[i][2 - head % 2])
        )
        for i, a in enumerate(order):
            for j, b in enumerate(order):
                if tokens[a][0] == tokens[b][0]:
                    between = order[min(i, j) + 1 : max(i, j) + 1]
                    shares[:, head, a, b] = torch.exp(-decay[:, between, head].sum(1))
    return weights * shares, value


def multiscale_weights(mixer, query, key, value, grids):
    def around(x, conv):
        rows = []
        for _, (g, r, c, *_) in enumerate(tokens):
            total = 0
            for j, (other, s, d, *_) in enumerate(tokens):
                if other == g and abs(s - r) <= 2 and abs(d - c) <= 2:
                    kernel = conv.weight[:, 0, s - r + 2, d - c + 2].view(HEADS, HEAD_DIM)
                    total = total + x[:, j] * kernel
            rows.append(total)
        return torch.stack(rows, 1)

    tokens = places(grids)
    keys = torch.cat((key, around(key, mixer.key_conv)), 1)
    return similarity(mixer, query, keys)[0], torch.cat((value, around(value, mixer.value_conv)), 1)


def pooled_weights(mixer, query, key, value, grids):
    side, first, keys, values, counts = 3, 0, [], [], []  # the root of 12, rounded
    for rows, columns in grids:
        for i in range(side):
            for j in range(side):
                inside = [
                    first + r * columns + c
                    for r in range(i * rows // side, math.ceil((i + 1) * rows / side))
                    for c in range(j * columns // side, math.ceil((j + 1) * columns / side))
                ]
                keys.append(key[:, inside].mean(1))
                values.append(value[:, inside].mean(1))
                counts.append(rows * columns / side**2)
        first += rows * columns
    _, query, keys = similarity(mixer, query, torch.stack(keys, 1))
    scores = torch.einsum("bmhd,bphd->bhmp", query, keys) / math.sqrt(query.shape[-1])
    return scores.exp() * torch.tensor(counts).double(), torch.stack(values, 1)


WEIGHTS = {"blocks": block_weights, "scan": scan_weights, "multiscale": multiscale_weights, "pooled": pooled_weights}


def make(name, grids, text, **settings):
    """A layer with random weights and its inputs, in float64."""
    torch.manual_seed(0)
    layer = HybridAttention(8, HEADS, HEAD_DIM, map_rank=0, mixer=name, projection=3, **settings).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layout = TokenLayout(text, grids, True)
    qkv = [torch.randn(2, text + layout.image_length, HEADS, HEAD_DIM).double().requires_grad_() for _ in range(3)]
    return layer, layout, qkv


def assert_equal(found, expected, leaves):
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    for grads in zip(
        *(torch.autograd.grad(x, leaves, weight, retain_graph=True) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("name", OTHERS)
def test_joined_with_a_window(name, grids):
    """One average over window, text and the mixer's weights; values and every gradient."""
    layer, layout, qkv = make(name, GRIDS[grids], TEXT, window=(3, 3), gate="head")
    with torch.no_grad():
        layer.gate.copy_(layer.gate.abs() + 0.1)
    found = layout.split(layer(*qkv, layout))[1]
    query, key, value = (layout.split(x)[1] for x in qkv)
    weights, values = WEIGHTS[name](layer.far, query, key, value, layout.grids)
    far = torch.einsum("bhmn,bnhd->bmhd", weights, values)
    scores = torch.einsum("bmhd,bnhd->bhmn", query, qkv[1]) * HEAD_DIM**-0.5
    seen = torch.ones(layout.image_length, TEXT + layout.image_length, dtype=torch.bool)
    seen[:, TEXT:] = oracles.mask_over_grids(layout.grids, (3, 3))
    near = scores.exp() * seen
    opening = torch.sinh(layer.gate) / 10  # [heads, 1]
    count = values.shape[1] if name == "multiscale" else layout.image_length
    total = weights.sum(-1).transpose(1, 2).unsqueeze(-1) + 1e-8 * count
    numerator = torch.einsum("bhmn,bnhd->bmhd", near, qkv[2]) + opening * far
    expected = numerator / (near.sum(-1).transpose(1, 2).unsqueeze(-1) + opening * total)
    assert_equal(found, expected, [*qkv, *layer.parameters()])
    with torch.no_grad():
        torch.testing.assert_close(layout.split(layer(*qkv, layout))[1], found)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_alone_with_text(name, masked):
    """Layers of kind "linear": text keys have phi(q) . phi(k), or the exponential of their score, alone."""
    layer, layout, qkv = make(name, GRIDS["one"], TEXT, kind="linear")
    text_mask = torch.tensor([[True, False, True, True], [False] * 4]) if masked else None
    found = layout.split(layer(*qkv, layout, text_mask=text_mask))[1]
    (_, query), (text_key, key), (text_value, value) = map(layout.split, qkv)
    weights, values = WEIGHTS[name](layer.far, query, key, value, layout.grids)
    words, projected, projected_key = similarity(layer.far, query, text_key)
    if name == "pooled":
        words = torch.exp(torch.einsum("bmhd,bnhd->bhmn", projected, projected_key) / math.sqrt(3))
    if masked:
        words = words * text_mask[:, None, None]
    weights, values = torch.cat((weights, words), -1), torch.cat((values, text_value), 1)
    expected = torch.einsum("bhmn,bnhd->bmhd", weights / (weights.sum(-1, keepdim=True) + 1e-8), values)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_a_gate_of_each_token_may_be_that_of_all_images(name):
    layer, layout, qkv = make(name, GRIDS["one"], 0, window=(3, 3), gate="token")
    gate = torch.randn(1, layout.image_length, HEADS, 1, dtype=torch.float64)
    torch.testing.assert_close(layer(*qkv, layout, gate=gate), layer(*qkv, layout, gate=gate.expand(2, -1, -1, -1)))


@pytest.mark.parametrize("name", ["blocks", "scan"])
def test_a_fresh_one_is_or_nears_linear_attention(name):
    """Without factors, and with no decay, the weights are LinearMixer's."""
    settings = {"kind": "linear", "map_rank": 0, "projection": 3}
    torch.manual_seed(0)
    layer = HybridAttention(8, HEADS, HEAD_DIM, mixer=name, **settings)
    torch.manual_seed(0)
    plain = HybridAttention(8, HEADS, HEAD_DIM, mixer="linear", **settings)
    if name == "scan":
        reach = 1 / softplus(layer.far.decay_bias)
        torch.testing.assert_close(reach, torch.tensor([16.0, 256.0, 4096.0]), rtol=1e-3, atol=0)
        torch.nn.init.constant_(layer.far.decay_bias, -100.0)
    layout = TokenLayout(0, ((150, 2),), True)  # several chunks
    qkv = [torch.randn(1, 300, HEADS, HEAD_DIM) for _ in range(3)]
    torch.testing.assert_close(layer(*qkv, layout), plain(*qkv, layout), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OTHERS)
def test_finite_on_large_inputs(name, dtype):
    layer, layout, qkv = make(name, ((40, 60),), TEXT, window=(3, 3), gate="token")
    layer, qkv = layer.cast(dtype), [x.detach().to(dtype).mul(20).requires_grad_() for x in qkv]
    layer.far.to(dtype)
    gate = layer.gate(torch.randn(2, 2400, 8, dtype=torch.float64)).unsqueeze(-1)
    out = layer(*qkv, layout, gate=gate)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().square().mean(), qkv))


@pytest.mark.parametrize("name", OTHERS)
def test_cost_grows_with_the_tokens(name):
    mixer = MIXERS[name](HEADS, HEAD_DIM)
    small, large = (mixer.flops(n, n) for n in (10_000, 40_000))
    assert set(small) == {"products", "normalization"}
    assert large["products"] <= 4 * small["products"] and mixer.work(100, 100, 2)["forward"].flops > 0


def test_settings_that_it_has_not():
    check_mixer("pooled")
    with pytest.raises(ValueError, match="mixer 'pooled' weighs keys by exp.q . k., without feature map 'elu'"):
        check_mixer("pooled", feature_map="elu")


def causal(query, key, value, g, scale):
    """What flash-linear-attention's chunk_simple_gla is documented to give, token by token: [B, N, heads, E], state."""
    state, found = 0, []
    for q, k, v, decay in zip(*(x.unbind(1) for x in (query, key, value, g)), strict=True):
        state = state * decay.exp()[..., None, None] + k[..., :, None] * v[..., None, :]
        found.append(scale * torch.einsum("bhk,bhke->bhe", q, state))
    return torch.stack(found, 1), None


@pytest.fixture
def fla(monkeypatch):
    """A module in place of flash-linear-attention's, whose kernels need a GPU."""
    modules = {name: ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.simple_gla")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules["fla.ops.simple_gla"].chunk_simple_gla = causal
    scans.kernels_refusal.cache_clear()
    yield modules["fla.ops.simple_gla"]
    scans.kernels_refusal.cache_clear()


@pytest.mark.parametrize("length", [1, 2, 70, 130])
def test_scans_by_flash_linear_attention(length, fla):
    """Causal scans there and back, against the dense weights; values and gradients."""
    inputs = [torch.randn(2, length, 3, n, dtype=torch.float64, requires_grad=True) for n in (5, 5, 4, 1)]
    query, key, value, decay = inputs
    place = softplus(decay - 2).cumsum(1).squeeze(-1).transpose(1, 2)
    weights = torch.einsum("bihk,bjhk->bhij", query, key) * torch.exp(-(place[..., None] - place[:, :, None]).abs())
    expected = torch.einsum("bhij,bjhe->bihe", weights, value)
    for way in (scans.scan_by_kernels, scans.scan_in_chunks):
        out = way(query, key, value, softplus(decay - 2))
        torch.testing.assert_close(out, expected)
        for grad, right in zip(
            torch.autograd.grad(out.sin().sum(), inputs),
            torch.autograd.grad(expected.sin().sum(), inputs, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(grad, right)


def test_kernels_that_are_missing_or_wrong_do_not_scan(fla, monkeypatch):
    case = torch.device("cpu"), 5, 4, True
    assert scans.kernels_refusal(*case) is None
    scans.kernels_refusal.cache_clear()
    fla.chunk_simple_gla = lambda query, *args, **kwargs: (causal(query * 1.05, *args, **kwargs)[0], None)
    with pytest.warns(UserWarning, match="scans do not use flash-linear-attention: its output is wrong"):
        assert "wrong" in scans.kernels_refusal(*case)
    scans.kernels_refusal.cache_clear()
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", None)
    assert "is not installed" in scans.kernels_refusal(*case)
