import oracles
import pytest
import torch

from hybriddit.attention import HybridAttention, TokenLayout

WIDTH, HEADS, HEAD_DIM, GRID, TEXT = 20, 2, 24, (11, 9), 5


def make_case(text=TEXT, text_first=True, seed=0, **kwargs):
    """A layer with open maps, and all it is called with, in float64."""
    torch.manual_seed(seed)
    layer = HybridAttention(WIDTH, HEADS, HEAD_DIM, map_rank=3, **kwargs).double()
    layout = TokenLayout(text, (GRID,), text_first)
    query, key, value = (torch.randn(2, text + layout.image_length, HEADS, HEAD_DIM).double() for _ in range(3))
    hidden = torch.randn(2, layout.image_length, WIDTH).double()
    if layer.far is not None:
        for name, parameter in layer.named_parameters():
            if name.startswith("map"):
                torch.nn.init.normal_(parameter, std=0.3)
    return layer, layout, (query, key, value), hidden


def call(layer, layout, qkv, hidden):
    far_query, far_key, gate = layer.far_inputs(hidden, *(layout.split(x)[1] for x in qkv[:2]))
    return layer(*qkv, layout, far_query=far_query, far_key=far_key, gate=gate), far_query, far_key


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
