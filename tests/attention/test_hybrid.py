import math

import oracles
import pytest
import torch

from hybriddit.attention import HybridAttention, TokenLayout, mixers
from hybriddit.attention.hybrid import ValueConv, rotate_by_position
from hybriddit.attention.work import dense_flops, dense_work

WIDTH, HEADS, HEAD_DIM, GRID, TEXT = 20, 4, 24, (11, 9), 5


PLAIN = {"feature_map": "elu", "projection": 0, "join": "gate"}


def make_case(text=TEXT, text_first=True, seed=0, **kwargs):
    """A layer with open maps, and all it is called with, in float64; its far branch is LinFusion's if none is given."""
    torch.manual_seed(seed)
    layer = HybridAttention(WIDTH, HEADS, HEAD_DIM, **PLAIN | {"map_rank": 3} | kwargs).double()
    layout = TokenLayout(text, (GRID,), text_first)
    heads = (HEADS, layer.kv_heads, layer.kv_heads)
    qkv = [torch.randn(2, text + layout.image_length, n, HEAD_DIM).double() for n in heads]
    hidden = torch.randn(2, layout.image_length, WIDTH).double()
    if layer.far is not None:
        for name, parameter in layer.named_parameters():
            if name.startswith("map"):
                torch.nn.init.normal_(parameter, std=0.3)
    return layer, layout, qkv, hidden


def call(layer, layout, qkv, hidden, **kwargs):
    far_query, far_key, gate = layer.far_inputs(hidden, *(layout.split(x)[1] for x in qkv[:2]))
    return layer(*qkv, layout, far_query=far_query, far_key=far_key, gate=gate, **kwargs), far_query, far_key


def joint_mask(layout, window):
    """Image queries see their window and the text; text queries see everything."""
    text, tokens = layout.text_length, layout.text_length + layout.image_length
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    image = slice(text, None) if layout.text_first else slice(0, layout.image_length)
    mask[image, image] = oracles.window_mask(GRID, window)
    return mask


@pytest.mark.parametrize("gate", ["head", "channel", "token"])
@pytest.mark.parametrize("text_first", [True, False])
def test_a_fresh_layer_over_the_whole_grid_is_dense(gate, text_first):
    layer, layout, qkv, hidden = make_case(text_first=text_first, window=(16, 16), gate=gate)
    out = call(layer, layout, qkv, hidden)[0]
    torch.testing.assert_close(out, oracles.softmax_attention(*qkv))


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "token"},
        {"join": "joint", "gate": "token", "feature_map": "polynomial", "projection": 4, "center_keys": True},
        {"join": "joint", "gate": "channel", "feature_map": "hedgehog", "temperature": True},
    ],
    ids=str,
)
def test_the_result_is_the_same_without_gradients(options):
    layer, layout, qkv, hidden = make_case(window=(3, 4), **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    text_mask = torch.arange(TEXT) < torch.tensor([[2], [TEXT]])
    expected = call(layer, layout, qkv, hidden, text_mask=text_mask)[0]
    assert expected.requires_grad
    with torch.no_grad():
        out = call(layer, layout, qkv, hidden, text_mask=text_mask)[0]
    torch.testing.assert_close(out, expected.detach())


@pytest.mark.parametrize("text, text_first", [(TEXT, True), (TEXT, False), (0, True)])
@pytest.mark.parametrize("kind", ["hybrid", "window"])
def test_a_fresh_layer_is_dense_with_the_window_as_mask(text, text_first, kind):
    layer, layout, qkv, hidden = make_case(text, text_first, window=(3, 4), kind=kind)
    out = call(layer, layout, qkv, hidden)[0]
    torch.testing.assert_close(out, oracles.softmax_attention(*qkv, joint_mask(layout, (3, 4))))
    if kind == "window":
        assert not list(layer.parameters())


@pytest.mark.parametrize("gate", ["head", "channel", "token"])
@pytest.mark.parametrize("text_first", [True, False])
def test_an_open_gate_interpolates_between_near_and_far(gate, text_first):
    layer, layout, qkv, hidden = make_case(text_first=text_first, window=(3, 4), gate=gate)
    parameters = [p for name, p in layer.named_parameters() if name.startswith("gate")]
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    out, far_query, far_key = call(layer, layout, qkv, hidden)
    text, image = layout.split(oracles.softmax_attention(*qkv, joint_mask(layout, (3, 4))))
    opening = torch.nn.functional.linear(hidden, *parameters).unsqueeze(-1) if gate == "token" else parameters[0]
    far = oracles.linear(far_query, far_key, layout.split(qkv[2])[1])
    torch.testing.assert_close(out, layout.join(text, image * (1 - opening) + far * opening))


def test_the_maps_add_to_the_teachers_projections():
    layer, layout, qkv, hidden = make_case(window=(3, 3))
    query = layout.split(qkv[0])[1]
    hidden_rank = torch.nn.functional.leaky_relu(
        layer.map_q.norm(hidden @ layer.map_q.down.weight.T + layer.map_q.down.bias)
    )
    added = (hidden_rank @ layer.map_q.up.weight.T + layer.map_q.up.bias).view_as(query)
    torch.testing.assert_close(layer.far_inputs(hidden, query, query)[0], query + added)
    assert added.abs().max() > 0.1


def test_linear_only_attends_to_text_and_image():
    layer, layout, qkv, hidden = make_case(kind="linear")
    out, far_query, far_key = call(layer, layout, qkv, hidden)
    (text_key, _), (text_value, value) = (layout.split(x) for x in qkv[1:])
    keys, values = torch.cat((text_key, far_key), 1), torch.cat((text_value, value), 1)
    text, _ = layout.split(oracles.softmax_attention(*qkv))
    torch.testing.assert_close(out, layout.join(text, oracles.linear(far_query, keys, values)))


def test_gradients_reach_the_gate_first_and_then_the_maps():
    layer, layout, qkv, hidden = make_case(window=(3, 3))
    call(layer, layout, qkv, hidden)[0].square().sum().backward()
    assert layer.gate.grad.abs().min() > 0 and layer.map_q.up.weight.grad.abs().max() == 0
    torch.nn.init.ones_(layer.gate)
    call(layer, layout, qkv, hidden)[0].square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.map_q.parameters())


def test_layout_splits_joins_and_refuses():
    tokens = torch.arange(2 * 104.0).view(2, 104, 1)
    for text_first in (True, False):
        layout = TokenLayout(5, (GRID,), text_first)
        text, image = layout.split(tokens)
        assert (text.shape[1], image.shape[1]) == (5, 99)
        assert text[0, 0, 0] == (0 if text_first else 99)
        assert layout.join(text, image).equal(tokens)
    with pytest.raises(ValueError, match="103 tokens.*pass the right `token_layout`"):
        layout.split(tokens[:, 1:])


def masked_softmax(query, key, value, masks, scale=None):
    """Dense attention of every sample under its own mask [S, S]."""
    outs = [
        oracles.softmax_attention(q[None], k[None], v[None], mask, scale)
        for q, k, v, mask in zip(query, key, value, masks, strict=True)
    ]
    return torch.cat(outs)


def assert_gradients_equal(out, expected, leaves):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    found, wanted = (torch.autograd.grad(x, leaves, weight, retain_graph=True) for x in (out, expected))
    for grad, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, reference)


def expected_output(layer, layout, qkv, far_query, far_key, text_mask=None, scale=None):
    """What a layer of any kind gives, from the definitions: dense weights in float64, heads of keys repeated one by one."""
    query, (key, value) = qkv[0], ([x[:, :, h // (HEADS // x.shape[2])] for h in range(HEADS)] for x in qkv[1:])
    key, value = torch.stack(key, 2), torch.stack(value, 2)
    window = layer.window if layer.kind in ("hybrid", "window") else GRID
    masks = [joint_mask(layout, window) for _ in query]
    if text_mask is not None:
        for mask, seen in zip(masks, text_mask, strict=True):
            mask &= layout.join(seen[None], torch.ones(1, layout.image_length, dtype=torch.bool))
    text, near = layout.split(masked_softmax(query, key, value, masks, scale))
    if layer.far is None:
        return layout.join(text, near)
    far_key = torch.stack([far_key[:, :, h // (HEADS // far_key.shape[2])] for h in range(HEADS)], 2)
    (text_key, _), (text_value, image_value) = (layout.split(x) for x in (key, value))
    if layer.kind == "hybrid":
        return layout.join(text, near + layer.gate * (oracles.linear(far_query, far_key, image_value) - near))
    far = []
    for b in range(len(query)):
        words = slice(None) if text_mask is None else text_mask[b].nonzero()[:, 0]
        keys, values = torch.cat((text_key[b, words], far_key[b])), torch.cat((text_value[b, words], image_value[b]))
        far.append(oracles.linear(far_query[b][None], keys[None], values[None]))
    return layout.join(text, torch.cat(far))


KINDS = {"hybrid": {"window": (3, 4)}, "window": {"window": (3, 4)}, "linear": {}, "dense": {}}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_against_the_definitions(kind, text_first, kv_heads, masked):
    """With a scale, with fewer heads of keys than of queries, and with padded text: outputs and gradients."""
    layer, layout, qkv, hidden = make_case(text_first=text_first, kind=kind, kv_heads=kv_heads, **KINDS[kind])
    if kind == "hybrid":
        torch.nn.init.normal_(layer.gate)
    # a part of the first sample's text, none of the second's
    text_mask = torch.tensor([[True, False, True, True, False], [False] * TEXT]) if masked else None
    leaves = [x.requires_grad_() for x in qkv]
    out, far_query, far_key = call(layer, layout, qkv, hidden, scale=0.7, text_mask=text_mask)
    expected = expected_output(layer, layout, qkv, far_query, far_key, text_mask, scale=0.7)
    if masked:  # what stands in the place of padded text has no meaning
        seen = layout.join(text_mask, torch.ones(2, layout.image_length, dtype=torch.bool))[:, :, None, None]
        out, expected = out * seen, expected * seen
    torch.testing.assert_close(out, expected)
    assert_gradients_equal(out, expected, [*leaves, *layer.parameters()] if layer.far is not None else leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_text_is_as_no_text(kind):
    """Whatever stands in it, and whichever dtype; a mask of only text that is there changes nothing."""

    def assert_close(out, expected):
        assert (out - expected).norm() <= {torch.float64: 1e-12, torch.float32: 1e-6}.get(out.dtype, 1e-2) * out.norm()

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer, layout, qkv, hidden = make_case(kind=kind, **KINDS[kind])
        layer, qkv, hidden = layer.to(dtype), [x.to(dtype) for x in qkv], hidden.to(dtype)
        text_mask = torch.tensor([[True, False, True, True, False]]).expand(2, -1)
        out, *_ = call(layer, layout, qkv, hidden, text_mask=text_mask)
        words = torch.cat((text_mask[0], torch.ones(layout.image_length, dtype=torch.bool))).nonzero()[:, 0]
        shorter = layout._replace(text_length=3)
        assert_close(out[:, words], call(layer, shorter, [x[:, words] for x in qkv], hidden)[0])
        garbage = [x.clone() for x in qkv]
        for x in garbage[1:]:
            x[:, [1, 4]] = 300
        assert torch.equal(call(layer, layout, garbage, hidden, text_mask=text_mask)[0][:, words], out[:, words])
        everything = torch.ones(2, TEXT, dtype=torch.bool)
        assert_close(call(layer, layout, qkv, hidden, text_mask=everything)[0], call(layer, layout, qkv, hidden)[0])


def test_maps_before_the_projection():
    layer, layout, qkv, hidden = make_case(window=(3, 3), maps="before", kv_heads=1, gate="token", gate_init=0.25)
    to_q, to_k = torch.nn.Linear(WIDTH, HEADS * HEAD_DIM).double(), torch.nn.Linear(WIDTH, HEAD_DIM).double()
    far_query, far_key, gate = layer.far_inputs(hidden, None, None, to_q=to_q, to_k=to_k)
    for found, project, up_down, heads in ((far_query, to_q, layer.map_q, HEADS), (far_key, to_k, layer.map_k, 1)):
        expected = project(hidden + up_down(hidden))
        assert found.shape == (2, layout.image_length, heads, HEAD_DIM) and up_down.up.out_features == WIDTH
        torch.testing.assert_close(found.flatten(2), expected)
    assert gate.shape == (2, layout.image_length, HEADS, 1) and torch.equal(gate, torch.full_like(gate, 0.25))


def test_a_gate_starts_where_it_is_told():
    for gate in ("head", "channel"):
        layer, layout, qkv, hidden = make_case(window=(3, 3), gate=gate, gate_init=1)
        out, far_query, far_key = call(layer, layout, qkv, hidden)
        far = oracles.linear(far_query, far_key, layout.split(qkv[2])[1])
        torch.testing.assert_close(layout.split(out)[1], far)
    assert HybridAttention(64, 2, 16, window=(3, 3)).map_q.down.out_features == 4  # a sixteenth of the width


@pytest.mark.parametrize("join", ["gate", "joint"])
@pytest.mark.parametrize("gate", ["head", "channel", "token"])
def test_far_only_is_the_far_branch_alone_for_these_images(gate, join):
    layer, layout, qkv, hidden = make_case(window=(3, 3), gate=gate, gate_init=0.25, join=join)
    kept = layout.split(call(layer, layout, qkv, hidden)[0])[1]
    layer.far_only = torch.tensor([False, True])
    chosen = layout.split(call(layer, layout, qkv, hidden)[0])[1]
    layer.far_only, layer.gate_init = None, 1.0 if join == "gate" else math.inf
    layer.init_gate()
    far = layout.split(call(layer, layout, qkv, hidden)[0])[1]
    assert torch.equal(chosen[0], kept[0])
    torch.testing.assert_close(chosen[1], far[1])


@pytest.mark.parametrize("text_first, text", [(True, TEXT), (False, TEXT), (True, 0)])
@pytest.mark.parametrize("gate", ["head", "channel", "token"])
@pytest.mark.parametrize("feature_map, projection", [("elu", 0), ("polynomial", 6), ("hedgehog", 10)])
def test_joint_is_one_average(feature_map, projection, gate, text, text_first):
    """Window, text and far weights over one denominator: values and gradients, by dense weights."""
    settings = {"feature_map": feature_map, "projection": projection, "join": "joint", "gate": gate}
    layer, layout, qkv, hidden = make_case(text, text_first, window=(3, 4), **settings)
    hidden = hidden.abs()  # for gates per token above 0
    fresh = call(layer, layout, qkv, hidden)[0]
    torch.testing.assert_close(fresh, oracles.softmax_attention(*qkv, joint_mask(layout, (3, 4))))
    for name, parameter in layer.named_parameters():
        if name.startswith("gate"):
            torch.nn.init.uniform_(parameter, 0, 1)
    text_mask = torch.tensor([[True, False, True, True, False], [False] * TEXT]) if text and gate == "head" else None
    leaves = [x.requires_grad_() for x in qkv]
    out, far_query, far_key = call(layer, layout, qkv, hidden, text_mask=text_mask, scale=0.3)
    opening = layer.gate
    if gate == "token":
        opening = torch.nn.functional.linear(hidden, layer.gate.weight, layer.gate.bias).unsqueeze(-1)
    if projection:
        far_query = torch.einsum("bnhd,hdm->bnhm", far_query, layer.far.projection_q)
        far_key = torch.einsum("bnhd,hdm->bnhm", far_key, layer.far.projection_k)
    far = oracles.similarity(far_query, far_key, feature_map)  # [B, heads, N, N]
    mask = joint_mask(layout, (3, 4)).expand(2, -1, -1)
    if text_mask is not None:
        mask = mask & layout.join(text_mask, torch.ones(2, layout.image_length, dtype=torch.bool))[:, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", *qkv[:2]) * 0.3
    weights = scores.exp() * mask[:, None]
    weights = weights.movedim(2, 0)[slice(text, None) if text_first else slice(0, layout.image_length)].movedim(0, 2)
    image_value = layout.split(qkv[2])[1]
    opening = torch.sinh(opening) / 10
    numerator = torch.einsum("bhqk,bkhd->bqhd", weights, qkv[2])
    numerator = numerator + opening * torch.einsum("bhqk,bkhd->bqhd", far, image_value)
    near, far = (x.sum(-1).transpose(1, 2).unsqueeze(-1) for x in (weights, far))
    eps = 1e-4 if feature_map == "elu" else 1e-8
    expected = numerator / (near + opening * (far + eps * layout.image_length))
    found = layout.split(out)[1]
    torch.testing.assert_close(found, expected)
    assert_gradients_equal(found, expected, [*leaves, *layer.parameters()])
    with torch.no_grad():
        alone = call(layer, layout, qkv, hidden, text_mask=text_mask, scale=0.3)[0]
    torch.testing.assert_close(layout.split(alone)[1], expected)


def test_joint_gates_of_wide_layers_move_no_faster():
    """By a token's width: of 192 channels each counts half as much as of 96."""
    hidden = torch.randn(1, 99, 192)
    for join, factor in (("joint", 0.5), ("gate", 1.0)):
        layer = HybridAttention(192, 2, 16, window=(3, 3), gate="token", join=join, map_rank=0)
        torch.nn.init.normal_(layer.gate.weight)
        torch.nn.init.normal_(layer.gate.bias)
        expected = factor * hidden @ layer.gate.weight.T + layer.gate.bias
        torch.testing.assert_close(layer.far_inputs(hidden, None, None)[2], expected.unsqueeze(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [-300.0, 300.0, 1e5])
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_joint_gates_of_any_size_give_finite_gradients(size, value, dtype):
    layer, layout, qkv, hidden = make_case(window=(3, 4), join="joint", feature_map="polynomial", projection=6)
    layer.to(dtype).gate.data = torch.full_like(layer.gate.data, value, dtype=torch.float32)
    qkv = [(size * x).to(dtype).requires_grad_() for x in qkv]
    out = call(layer, layout, qkv, hidden.to(dtype))[0]
    leaves = [*qkv, *layer.parameters()]
    assert out.isfinite().all() and all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("offset", [-60.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_joint_with_scores_far_from_zero(dtype, offset):
    """An offset that all keys share changes no softmax: at the start the layer is its window whatever it is."""
    layer, layout, qkv, hidden = make_case(window=(3, 4), join="joint")
    query, key, value = (x.to(dtype) for x in qkv)
    query, key = query + 1, (key + offset / HEAD_DIM**0.5).to(dtype)
    layer.to(dtype).gate.data = layer.gate.data.float()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            out = call(layer, layout, [query, key, value], hidden.to(dtype))[0]
        expected = oracles.softmax_attention(query, key, value, joint_mask(layout, (3, 4)))
        assert (out.double() - expected).norm() < {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype] * expected.norm()


def test_a_joint_gate_below_zero_takes_away_what_it_would_add():
    layer, layout, qkv, hidden = make_case(window=(3, 4), join="joint")
    near, added, taken = (
        call(layer, layout, qkv, hidden)[0]
        for value in (0.0, 2.0, -2.0)
        if torch.nn.init.constant_(layer.gate, value) is not None
    )
    assert (added - near).abs().max() > 0.01
    torch.testing.assert_close(near - taken, added - near)


@pytest.mark.parametrize("grids", [((11, 9),), ((4, 5), (3, 2))])
def test_positions_depend_on_differences_of_rows_and_columns(grids):
    """q . k of rotated vectors is a function of the distance alone, of each axis, and lengths stay."""
    x = torch.randn(1, 1, 2, 24, dtype=torch.float64)
    rotated = rotate_by_position(x.expand(1, sum(rows * columns for rows, columns in grids), 2, 24), grids)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1).expand(rotated.shape[:3]))
    start, seen = 0, {}
    for rows, columns in grids:
        image = rotated[0, start : start + rows * columns].unflatten(0, (rows, columns))
        torch.testing.assert_close(image[0, 0], x[0, 0])
        for y in range(rows - 1):
            for z in range(columns - 1):
                for dy, dz in ((1, 0), (0, 1), (1, 1)):
                    product = (image[y, z] * image[y + dy, z + dz]).sum(-1)
                    torch.testing.assert_close(product, seen.setdefault((dy, dz), product), rtol=0, atol=1e-5)
        start += rows * columns
    assert len({round(float(value[0]), 3) for value in seen.values()}) == 3


def test_the_convolution_is_zero_at_the_start_and_keeps_to_its_grid():
    conv = ValueConv(12, 3)
    value = torch.randn(2, 26, 3, 4)
    assert torch.equal(conv(value, ((4, 5), (3, 2))), torch.zeros_like(value))
    torch.nn.init.normal_(conv.weight)
    changed = value.clone()
    changed[:, :20] += 1
    assert torch.equal(conv(changed, ((4, 5), (3, 2)))[:, 20:], conv(value, ((4, 5), (3, 2)))[:, 20:])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind="softmax"), "unknown layer kind 'softmax': use one of hybrid, window, linear, dense"),
        (dict(gate="door"), "unknown gate 'door'"),
        (dict(mixer="mamba"), "unknown mixer 'mamba': use one of linear"),
        (dict(feature_map="exp"), "unknown feature map 'exp': use one of elu, hedgehog, polynomial"),
        (
            dict(feature_map="hedgehog", projection=129),
            "'hedgehog' does not take a projection of 129 channels: use .* at most 128",
        ),
        (dict(feature_map="polynomial", projection=22), "does not take a projection of 22 channels: .* at most 21"),
        (dict(feature_map="polynomial", head_dim=22, projection=0), "does not take heads of 22 without projection"),
        (dict(rotary="yes"), "unknown rotary 'yes': use one of model, axial, none"),
        (dict(rotary="axial"), "'axial' needs a head width that is a multiple of 4, not 2"),
        (dict(maps="beside"), "unknown maps 'beside'"),
        (dict(kv_heads=4), "6 heads cannot share 4 heads of keys and values"),
        (dict(window=None), "a layer of kind 'hybrid' needs a window"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message) as error:
        HybridAttention(**dict(width=12, heads=6, head_dim=2, window=(3, 3)) | change)
    assert "\n" not in str(error.value)


def test_another_mixer_is_a_row(monkeypatch):
    """A layer asks its mixer for the result and for the cost of it."""

    class Mean(torch.nn.Module):
        def __init__(self, heads, head_dim, **settings):
            super().__init__()

        def forward(
            self, query, key, value, *, near=None, gate=None, key_mask=None, joint=False, lse=None, layout=None
        ):
            return near + gate * (value.mean(1, keepdim=True) - near)

        def flops(self, queries, keys):
            return {"products": 5, "normalization": 7}

    monkeypatch.setitem(mixers.MIXERS, "mean", Mean)
    layer, layout, qkv, hidden = make_case(window=(3, 3), mixer="mean", gate_init=1)
    mean = layout.split(qkv[2])[1].mean(1, keepdim=True)
    image = layout.split(call(layer, layout, qkv, hidden)[0])[1]
    torch.testing.assert_close(image, mean.expand_as(image))
    parts = layer.flops_by_part(layout)
    assert (parts["far"], parts["normalization"]) == (5, 7)


# width 32 in 2 heads of 16, one head of keys, N = 30, T = 7, window 3 x 3 of 6 x 5, rank 2
COUNTED = dict(width=32, heads=2, head_dim=16, map_rank=2, **PLAIN)
LAYOUT = TokenLayout(7, ((6, 5),), True)


def test_flops_by_hand():
    text, near = 4 * 7 * 37 * 32, 4 * 30 * (9 + 7) * 32
    far, sums = 2 * (30 + 30) * 32 * 16, 2 * (30 + 30) * 32
    maps = 2 * 30 * (32 * 2 + 2 * 32) + 2 * 30 * (32 * 2 + 2 * 16)
    hybrid = HybridAttention(**COUNTED, kv_heads=1, window=(3, 3))
    expected = {"text": text, "near": near, "far": far, "normalization": sums, "maps": maps}
    assert hybrid.flops_by_part(LAYOUT) == expected and hybrid.flops(LAYOUT) == sum(expected.values())
    window = HybridAttention(**COUNTED, kind="window", window=(3, 3))
    assert window.flops_by_part(LAYOUT) == {"text": text, "near": near}
    linear = HybridAttention(**COUNTED, kv_heads=1, kind="linear")
    expected = {"text": text, "far": 2 * (30 + 37) * 32 * 16, "normalization": 2 * (30 + 37) * 32, "maps": maps}
    assert linear.flops_by_part(LAYOUT) == expected
    assert HybridAttention(**COUNTED, kind="dense").flops_by_part(LAYOUT) == {"dense": 4 * 37 * 37 * 32}
    # before the projection the maps are as wide as the input, and a hybrid layer projects once more
    both = 2 * 2 * 30 * (32 * 2 + 2 * 32)
    assert HybridAttention(**COUNTED, maps="before", kind="linear").flops_by_part(LAYOUT)["maps"] == both
    before = HybridAttention(**COUNTED, maps="before", window=(3, 3))
    assert before.flops_by_part(LAYOUT)["maps"] == both + 2 * 30 * 32 * (32 + 32)
    # a projection to 5 channels and hedgehog's 10 features of them, no maps, and a convolution of 3 x 3
    counted = COUNTED | {"feature_map": "hedgehog", "projection": 5, "map_rank": 0}
    hybrid = HybridAttention(**counted, kv_heads=1, window=(3, 3), value_conv=3)
    far, sums = 2 * 60 * 2 * (16 * 5 + 10 * 16), 2 * 60 * 2 * 10
    expected = {"text": text, "near": near, "far": far, "normalization": sums, "value_conv": 2 * 30 * 32 * 9}
    assert hybrid.flops_by_part(LAYOUT) == expected


def test_a_dilated_window_ends_with_its_residue_class():
    layer = HybridAttention(**COUNTED, kind="window", window=(3, 4), dilation=(1, 2))
    pairs = int(oracles.window_mask((6, 5), (3, 4), dilation=(1, 2)).sum())
    assert layer.flops_by_part(LAYOUT)["near"] == 4 * (pairs + 30 * 7) * 32


def test_work_by_hand():
    # numbers of 2 bytes; 37 tokens of 2 heads, or of the one head that keys and values have
    def work(kind, direction, layout=LAYOUT):
        layer = HybridAttention(**COUNTED, kv_heads=1, kind=kind, window=(3, 3))
        return layer.work(layout, 2)[direction]

    products = 4 * 7 * 37 * 32 + 4 * 30 * (9 + 7) * 32 + 2 * (30 + 30) * 32 * 16
    read, written = 37 * (32 + 16 + 16) + 30 * (32 + 16), 37 * 32
    assert work("hybrid", "forward") == (2 * (read + written), products)
    no_maps = HybridAttention(**COUNTED | {"map_rank": 0}, kv_heads=1, window=(3, 3))
    assert no_maps.work(LAYOUT, 2)["forward"] == (2 * (37 * (32 + 16 + 16) + written), products)
    # back: the inputs, the output and its gradient are read, the inputs' gradients written
    assert work("hybrid", "backward") == (2 * (2 * read + 2 * written), 2 * products)
    assert work("hybrid", "forward + backward") == (2 * (3 * read + 3 * written), 3 * products)
    assert work("dense", "forward") == (2 * (37 * 64 + written), 4 * 37 * 37 * 32)
    # text queries need q and k, far's own replace the image's; only the text has a softmax
    read = 7 * 32 + 37 * 16 + 37 * 16 + 30 * (32 + 16)
    assert work("linear", "forward").bytes == 2 * (read + written)
    assert work("linear", "backward").bytes == 2 * (2 * read + written + 7 * 32)
    alone = LAYOUT._replace(text_length=0)
    assert work("linear", "forward", alone).bytes == 2 * 30 * (32 + 16 + 16 + 32)
    assert dense_work(37, 32, 2) == HybridAttention(**COUNTED, kind="dense").work(LAYOUT, 2)
    assert dense_flops(37, 32) == 4 * 37 * 37 * 32
