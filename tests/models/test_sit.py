"""SiT against a plain re-implementation, published parameter counts, and attention written from its definition."""

import argparse
import json
import math

import pytest
import torch
from attention import oracles
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from hybriddit import SiTTransformer2DModel
from hybriddit.attention import TokenLayout
from hybriddit.models.flops import sit_flops
from hybriddit.models.sit import SIT_SIZES, rotary_positions
from hybriddit.models.sit_convert import from_original, load_original, read_original, to_original

WIDTH, HEADS = 24, 2
TINY = {
    "num_attention_heads": HEADS,
    "attention_head_dim": WIDTH // HEADS,
    "in_channels": 3,
    "num_layers": 2,
    "sample_size": 12,
    "num_classes": 5,
    "window": 3,
}
GRIDS = [(6, 6), (4, 7), (9, 4)]  # that of training, another, and another of as many tokens
KINDS = ["softmax", "linear", "window", "hybrid"]
EVERYTHING = {
    "attention": "hybrid",
    "window": (3, 4),
    "stride": (1, 2),
    "map_rank": 5,
    "gate": "token",
    "gate_init": 0.3,
    "qk_norm": True,
    "norm_type": "rms_norm",
    "activation_fn": "swiglu",
    "rope": True,
    "value_conv": 3,
}
FAR = {"feature_map": "hedgehog", "projection": None, "map_rank": 0, "rope": True, "far_rope": True}  # as the recipes
VARIED = [
    *({"attention": kind} for kind in KINDS),
    EVERYTHING,
    *({"attention": k, **FAR} for k in ("linear", "hybrid")),
]


def make(dtype=torch.float64, seed=0, **fields):
    """A model in which every weight matters."""
    torch.manual_seed(seed)
    model = SiTTransformer2DModel(**TINY | fields).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def make_inputs(grid=(6, 6), batch=2, dtype=torch.float64, seed=1, patch=2):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 3, grid[0] * patch, grid[1] * patch, generator=generator).to(dtype)
    times = torch.rand(batch, generator=generator).to(dtype)
    return latents, times, torch.arange(batch) * 5 % 6  # 0, and the null class


def close(actual, expected, tolerance=1e-5):
    """To what rounding the positions to float32 leaves, where their coordinates are no whole numbers."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def run(model, inputs):
    with torch.no_grad():
        return model(*inputs).sample


# --- a plain SiT, in the names of the original checkpoints --------------------------------------------------------


def plain_positions(grid, base, width):
    """One patch, one channel at a time: sines and cosines of the column's coordinate, then of the row's."""
    table = torch.zeros(grid[0] * grid[1], width, dtype=torch.float64)
    quarter = width // 4
    for row in range(grid[0]):
        for column in range(grid[1]):
            y = (row + 0.5) / grid[0] * base - 0.5
            x = (column + 0.5) / grid[1] * base - 0.5
            for c in range(quarter):
                frequency = 10000 ** (-c / quarter)
                values = (
                    math.sin(x * frequency),
                    math.cos(x * frequency),
                    math.sin(y * frequency),
                    math.cos(y * frequency),
                )
                table[row * grid[1] + column, [c, quarter + c, 2 * quarter + c, 3 * quarter + c]] = torch.tensor(
                    values, dtype=torch.float64
                )
    return table.float().double()  # kept in float32


def plain_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def plain_mlp(w, name, x):
    x = x @ w[f"{name}.fc1.weight"].T + w[f"{name}.fc1.bias"]
    x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x @ w[f"{name}.fc2.weight"].T + w[f"{name}.fc2.bias"]


def plain_attention(w, name, x, grid):
    qkv = x @ w[f"{name}.qkv.weight"].T + w[f"{name}.qkv.bias"]
    query, key, value = qkv.reshape(*x.shape[:2], 3, HEADS, -1).unbind(2)
    return oracles.softmax_attention(query, key, value).flatten(2)


def plain_sit(
    w, latents, times, labels, depth, attend=plain_attention, norm=plain_norm, mlp=plain_mlp, patch=2, base=6
):
    """`attend` gives the heads' output, before the projection."""
    batch, channels, height, width_px = latents.shape
    grid = rows, columns = height // patch, width_px // patch

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(x):
        return x / (1 + torch.exp(-x))

    # patches, row by row; channels first within a patch, as the weights of a convolution lie
    patches = torch.stack(
        [
            latents[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].reshape(batch, -1)
            for r in range(rows)
            for c in range(columns)
        ],
        dim=1,
    )
    kernel = w["x_embedder.proj.weight"]
    x = patches @ kernel.reshape(kernel.shape[0], -1).T + w["x_embedder.proj.bias"]
    x = x + plain_positions(grid, base, x.shape[-1])
    # in float32, as the authors have it
    angles = times[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    waves = torch.cat((angles.cos(), angles.sin()), dim=-1).double()
    conditioning = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
    conditioning = silu(conditioning + w["y_embedder.embedding_table.weight"][labels])
    for i in range(depth):
        modulation = linear(f"blocks.{i}.adaLN_modulation.1", conditioning)[:, None].chunk(6, dim=-1)
        shift, scale, gate = modulation[:3]
        heads = attend(w, f"blocks.{i}.attn", norm(x) * (1 + scale) + shift, grid)
        x = x + gate * linear(f"blocks.{i}.attn.proj", heads)
        shift, scale, gate = modulation[3:]
        x = x + gate * mlp(w, f"blocks.{i}.mlp", norm(x) * (1 + scale) + shift)
    shift, scale = linear("final_layer.adaLN_modulation.1", conditioning)[:, None].chunk(2, dim=-1)
    x = linear("final_layer.linear", norm(x) * (1 + scale) + shift)
    out = torch.zeros(batch, x.shape[-1] // patch**2, height, width_px, dtype=x.dtype)
    for r in range(rows):
        for c in range(columns):
            tile = x[:, r * columns + c].reshape(batch, patch, patch, -1).permute(0, 3, 1, 2)
            out[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = tile
    return out[:, :channels]  # the other half is the variance, which SiT leaves unused


def plain_of(model, inputs, **changes):
    """`plain_sit` with the weights of a model that has parts the original layout cannot name."""
    state = model.state_dict()
    bare = SiTTransformer2DModel(**TINY | {"num_layers": len(model.transformer_blocks)}).state_dict()
    # a SwiGLU's weights are passed by `changes`: the plain model never reads the ones put here
    weights = to_original({n: state[n] if state[n].shape == bare[n].shape else bare[n] for n in bare})
    return plain_sit(weights, *inputs, len(model.transformer_blocks), **changes)


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "softmax", "full", "narrow"),
    [
        ("S", "33.0", "40.1", "33.4"),
        ("B", "130.5", "158.9", "132.3"),
        ("L", "458", "559", "464.5"),
        ("XL", "675", "824", "684.5"),
    ],
)
def test_parameter_counts_are_the_published_ones(size, softmax, full, narrow):
    preset = SiTTransformer2DModel.preset(f"{size}/2")
    width = preset["num_attention_heads"] * preset["attention_head_dim"]
    for expected, fields in (
        (softmax, {}),
        (softmax, {"attention": "window"}),
        (full, {"attention": "linear"}),
        (full, {"attention": "hybrid"}),
        (narrow, {"attention": "linear", "map_rank": width // 16}),
    ):
        with torch.device("meta"):
            model = SiTTransformer2DModel(**preset, **fields)
        millions = model.num_parameters() / 1e6
        assert f"{millions:.{len(expected.partition('.')[2])}f}" == expected, fields


def test_the_count_of_the_largest_to_the_last_parameter():
    with torch.device("meta"):
        assert SiTTransformer2DModel(**SiTTransformer2DModel.preset("XL/2")).num_parameters() == 675_129_632


@pytest.mark.parametrize("size", SIT_SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_presets(size, patch):
    with torch.device("meta"):
        model = SiTTransformer2DModel(**SiTTransformer2DModel.preset(f"{size}/{patch}"))
    width = {"S": 384, "B": 768, "L": 1024, "XL": 1152}[size]
    assert model.pos_embed.shape == (1, (32 // patch) ** 2, width)
    assert len(model.transformer_blocks) == {"S": 12, "B": 12, "L": 24, "XL": 28}[size]
    assert model.transformer_blocks[0].ff.fc2.in_features == 4 * width
    assert model.proj_out.out_features == 8 * patch**2


@pytest.mark.parametrize("name", ["M/2", "S", "S/3", "s/2", "S/2/2", "S/02"])
def test_unknown_presets_are_refused(name):
    with pytest.raises(ValueError, match="unknown SiT size .*S, B, L, XL"):
        SiTTransformer2DModel.preset(name)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("map_rank", [None, 5])
def test_flops_are_torch_s_count_and_the_formulas_of_each_kind(grid, map_rank):
    latents, times, labels = make_inputs(grid, batch=1, dtype=torch.float32)
    model = make(torch.float32, activation_fn="swiglu")
    with FlopCounterMode(display=False) as counter:
        run(model, (latents, times, labels))
    assert sit_flops(model, grid) == counter.get_total_flops()
    tokens, rank, layers = grid[0] * grid[1], map_rank or WIDTH, 2
    outside = sit_flops(model, grid) - layers * 4 * tokens**2 * WIDTH
    near = 4 * tokens * min(3, grid[0]) * min(3, grid[1]) * WIDTH
    maps = 2 * 2 * tokens * 2 * WIDTH * rank  # of queries and keys, down and up
    far = 2 * tokens * WIDTH * (2 * WIDTH // HEADS + 2)  # keys with values, queries with that, two sums below
    again = 2 * 2 * tokens * WIDTH**2  # queries and keys are projected for each branch
    for kind, expected in (("window", near), ("linear", maps + far), ("hybrid", near + maps + far + again)):
        other = make(torch.float32, activation_fn="swiglu", attention=kind, map_rank=map_rank)
        assert sit_flops(other, grid) == outside + layers * expected, kind


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("projection", [None, 5])
def test_flops_of_the_recipes_far_branch(grid, projection):
    tokens, layers, head = grid[0] * grid[1], 2, WIDTH // HEADS
    outside = sit_flops(make(torch.float32), grid) - layers * 4 * tokens**2 * WIDTH
    channels = projection or head // 2
    # of queries and of keys: the projection, their features with the state, and a sum of these
    far = 2 * 2 * tokens * HEADS * (head * channels + 2 * channels * head + 2 * channels)
    near = 4 * tokens * min(3, grid[0]) * min(3, grid[1]) * WIDTH
    for kind, expected in (("linear", far), ("hybrid", near + far)):
        model = make(torch.float32, attention=kind, **FAR | {"projection": projection})
        assert sit_flops(model, grid) == outside + layers * expected, kind


# --- the forward pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_softmax_is_the_plain_sit(grid, learn_sigma):
    model, inputs = make(learn_sigma=learn_sigma), make_inputs(grid)
    expected = plain_sit(to_original(model.state_dict()), *inputs, depth=2)
    assert expected.abs().mean() > 0.1
    close(run(model, inputs), expected, 1e-8 if grid == (6, 6) else 1e-5)


def test_another_patch_is_the_plain_sit():
    model, inputs = make(patch_size=4), make_inputs((2, 3), patch=4)
    expected = plain_sit(to_original(model.state_dict()), *inputs, depth=2, patch=4, base=3)
    close(run(model, inputs), expected)


def heads_of(x):
    return x.unflatten(-1, (HEADS, -1))


def near_and_far(model, name, x, grid, mask=None, norm=lambda module, tokens: tokens, rotate=lambda tokens: tokens):
    """Both branches and v of a layer, from its weights."""
    layer = model.get_submodule(name.replace("blocks.", "transformer_blocks."))
    w = layer.state_dict()

    def project(part, tokens):
        return heads_of(tokens @ w[f"to_{part}.weight"].T + w[f"to_{part}.bias"])

    def mapped(part):
        hidden = x @ w[f"hybrid.map_{part}.down.weight"].T + w[f"hybrid.map_{part}.down.bias"]
        centred = hidden - hidden.mean(-1, keepdim=True)
        hidden = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        hidden = hidden * w[f"hybrid.map_{part}.norm.weight"] + w[f"hybrid.map_{part}.norm.bias"]
        hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
        return project(part, x + hidden @ w[f"hybrid.map_{part}.up.weight"].T + w[f"hybrid.map_{part}.up.bias"])

    value = project("v", x)
    query, key = (rotate(norm(getattr(layer, f"norm_{part}"), project(part, x))) for part in "qk")
    near, far = oracles.softmax_attention(query, key, value, mask), None
    if layer.hybrid.map_q is not None:
        query, key = (norm(getattr(layer, f"norm_{part}"), mapped(part)) for part in "qk")
        far = oracles.linear(query, key, value)
    return near, far, value


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("map_rank", [None, 5])
def test_linear_is_the_definition(grid, map_rank):
    model, inputs = make(attention="linear", map_rank=map_rank), make_inputs(grid)
    assert model.transformer_blocks[1].attn.hybrid.map_q.down.out_features == (map_rank or WIDTH)

    def attend(w, name, x, grid):
        return near_and_far(model, name, x, grid)[1].flatten(2)

    close(run(model, inputs), plain_of(model, inputs, attend=attend))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("window", "stride"), [(3, 1), ((2, 4), (1, 2)), ((20, 3), 1)])
def test_windows_are_a_mask(grid, window, stride):
    model, inputs = make(attention="window", window=window, stride=stride), make_inputs(grid)
    window, stride = (pair if isinstance(pair, tuple) else (pair, pair) for pair in (window, stride))
    mask = oracles.window_mask(grid, window, stride)

    def attend(w, name, x, grid):
        return near_and_far(model, name, x, grid, mask)[0].flatten(2)

    close(run(model, inputs), plain_of(model, inputs, attend=attend))


@pytest.mark.parametrize("gate", ["head", "channel", "token"])
@pytest.mark.parametrize("grid", GRIDS)
def test_hybrid_joins_near_and_far(grid, gate):
    model, inputs = make(attention="hybrid", gate=gate), make_inputs(grid)
    mask = oracles.window_mask(grid, (3, 3))

    def attend(w, name, x, grid):
        near, far, _ = near_and_far(model, name, x, grid, mask)
        state = model.get_submodule(name.replace("blocks.", "transformer_blocks.")).state_dict()
        if gate == "token":
            share = (x @ state["hybrid.gate.weight"].T + state["hybrid.gate.bias"]).unsqueeze(-1)
        else:
            share = state["hybrid.gate"]
            assert share.shape == (HEADS, WIDTH // HEADS if gate == "channel" else 1)
        return (near + share * (far - near)).flatten(2)

    close(run(model, inputs), plain_of(model, inputs, attend=attend))


@pytest.mark.parametrize("gate", ["head", "channel", "token"])
def test_the_gate_starts_where_it_is_told(gate):
    inputs = make_inputs()
    softmax, linear, hybrid = (
        make(attention=kind, window=6, gate=gate, **({"gate_init": 1.0} if kind == "hybrid" else {}))
        for kind in ("softmax", "linear", "hybrid")
    )
    start = SiTTransformer2DModel(**TINY, attention="hybrid", gate=gate, gate_init=0.25)
    start = start.transformer_blocks[0].attn.hybrid
    assert torch.equal(
        start.gate.bias if gate == "token" else start.gate.flatten(),
        torch.full((HEADS if gate != "channel" else WIDTH,), 0.25),
    )
    assert gate != "token" or start.gate.weight.abs().max() == 0
    for value, other in ((0.0, softmax), (1.0, linear)):  # 0: near alone, over the whole grid; 1: far alone
        with torch.no_grad():
            hybrid.load_state_dict(other.state_dict(), strict=False)
            for block in hybrid.transformer_blocks:
                for parameter in [block.attn.hybrid.gate] if gate != "token" else block.attn.hybrid.gate.parameters():
                    parameter.fill_(value if parameter.ndim != 2 or gate != "token" else 0)
        torch.testing.assert_close(run(hybrid, inputs), run(other, inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_window_over_the_grid_is_softmax(grid):
    window, softmax = make(attention="window", window=9), make()
    softmax.load_state_dict(window.state_dict())
    torch.testing.assert_close(run(window, make_inputs(grid)), run(softmax, make_inputs(grid)), rtol=1e-9, atol=1e-9)


def test_layers_of_several_kinds():
    patterns = {"*blocks.[02].*": "softmax", "transformer_blocks.1.attn": "window", "*": "linear"}
    model = make(attention=patterns, num_layers=4)
    kinds = ["softmax", "window", "softmax", "linear"]
    assert [block.attn.kind for block in model.transformer_blocks] == kinds
    assert [block.attn.hybrid.map_q is not None for block in model.transformer_blocks] == [False, False, False, True]
    assert not any(hasattr(block.attn.hybrid, "gate") for block in model.transformer_blocks)
    inputs = make_inputs((4, 7))
    mask = oracles.window_mask((4, 7), (3, 3))

    def attend(w, name, x, grid):
        index = int(name.split(".")[1])
        branches = near_and_far(model, name, x, grid, mask if index == 1 else None)
        return branches[1 if index == 3 else 0].flatten(2)

    close(run(model, inputs), plain_of(model, inputs, attend=attend))
    assert [block.attn.kind for block in make(attention=kinds, num_layers=4).transformer_blocks] == kinds


# --- optional parts ------------------------------------------------------------------------------------------------


def plain_rms(module, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight.double()


@pytest.mark.parametrize("kind", KINDS)
def test_qk_norm(kind):
    model, inputs = make(attention=kind, qk_norm=True), make_inputs((4, 7))
    mask = None if kind in ("softmax", "linear") else oracles.window_mask((4, 7), (3, 3))

    def attend(w, name, x, grid):
        near, far, _ = near_and_far(model, name, x, grid, mask, norm=plain_rms)
        if kind == "hybrid":
            return (near + w_gate(model, name) * (far - near)).flatten(2)
        return (far if kind == "linear" else near).flatten(2)

    close(run(model, inputs), plain_of(model, inputs, attend=attend))


def plain_rotate(tokens, grid):
    """One token, one axis at a time: neighbouring channels are a complex number, times exp(i angle)."""
    half = tokens.shape[-1] // 2
    out = tokens.clone()
    for token in range(tokens.shape[1]):
        for axis, place in enumerate(divmod(token, grid[1])):
            angle = ((place + 0.5) / grid[axis] * 6 - 0.5) * 10000 ** (-torch.arange(0, half, 2) / half)
            part = tokens[:, token, :, axis * half : (axis + 1) * half]
            turned = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
                torch.ones(half // 2, dtype=torch.float64), angle.double()
            )
            out[:, token, :, axis * half : (axis + 1) * half] = torch.view_as_real(turned).flatten(-2)
    return out


def w_gate(model, name):
    return model.get_submodule(name.replace("blocks.", "transformer_blocks.")).hybrid.gate.detach()


def test_rms_norm():
    model, inputs = make(norm_type="rms_norm"), make_inputs((4, 7))
    expected = plain_of(model, inputs, norm=lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    close(run(model, inputs), expected)


def test_swiglu():
    model, inputs = make(activation_fn="swiglu"), make_inputs((4, 7))
    hidden = model.transformer_blocks[0].ff.fc2.in_features
    assert hidden == 64  # two thirds of 96

    def mlp(w, name, x):
        w = model.get_submodule(name.replace("blocks.", "transformer_blocks.").replace("mlp", "ff")).state_dict()
        x = x @ w["fc1.weight"].T + w["fc1.bias"]
        x = x[..., :hidden] * x[..., hidden:] / (1 + torch.exp(-x[..., hidden:]))
        return x @ w["fc2.weight"].T + w["fc2.bias"]

    close(run(model, inputs), plain_of(model, inputs, mlp=mlp))
    counts = {
        fn: make(activation_fn=fn, num_attention_heads=8).num_parameters() for fn in ("swiglu", "gelu-approximate")
    }
    assert abs(counts["swiglu"] / counts["gelu-approximate"] - 1) < 0.01


@pytest.mark.parametrize("kind", ["softmax", "window", "hybrid"])
@pytest.mark.parametrize("grid", GRIDS)
def test_rope_turns_near_queries_and_keys(kind, grid):
    model, inputs = make(attention=kind, rope=True), make_inputs(grid)
    mask = None if kind == "softmax" else oracles.window_mask(grid, (3, 3))

    def attend(w, name, x, grid):
        near, far, _ = near_and_far(model, name, x, grid, mask, rotate=lambda tokens: plain_rotate(tokens, grid))
        return (near if kind != "hybrid" else near + w_gate(model, name) * (far - near)).flatten(2)

    close(run(model, inputs), plain_of(model, inputs, attend=attend))


def plain_phi(name, x):
    """A feature map by its formula; of "polynomial" all m^2 ordered products, whose sums are those of the distinct."""
    if name == "hedgehog":
        return torch.cat([sign.exp() / sign.exp().sum(-1, keepdim=True) for sign in (x, -x)], dim=-1)
    if name == "polynomial":
        x = x / x.shape[-1] ** 0.25
        return torch.cat((torch.ones_like(x[..., :1]), x, (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / 2**0.5), -1)
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def plain_layer(layer, w, x, grid, window=3):
    """A whole attention layer, from its weights w and what its model's config says: [B, N, width], before to_out."""
    config = layer.fields

    def project(part, tokens):
        return heads_of(tokens @ w[f"to_{part}.weight"].T + w[f"to_{part}.bias"])

    def placed(part, tokens, turn):
        if config["qk_norm"]:
            tokens = tokens / (tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"norm_{part}.weight"]
        return plain_rotate(tokens, grid) if turn else tokens

    def mapped(part):
        if config["map_rank"] == 0:
            return x
        hidden = x @ w[f"hybrid.map_{part}.down.weight"].T + w[f"hybrid.map_{part}.down.bias"]
        centred = hidden - hidden.mean(-1, keepdim=True)
        hidden = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        hidden = hidden * w[f"hybrid.map_{part}.norm.weight"] + w[f"hybrid.map_{part}.norm.bias"]
        hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
        return x + hidden @ w[f"hybrid.map_{part}.up.weight"].T + w[f"hybrid.map_{part}.up.bias"]

    value = project("v", x)
    features = []
    for part in "qk":
        tokens = placed(part, project(part, mapped(part)), config["far_rope"])
        if config["projection"] != 0:
            tokens = torch.einsum("bnhd,hdm->bnhm", tokens, w[f"hybrid.far.projection_{part}"])
        features.append(plain_phi(config["feature_map"], tokens))
    shares = torch.einsum("bqhf,bkhf->bhqk", *features)
    if config["mixer"] == "blocks":  # of 4 x 4 parts
        part = torch.tensor([4 * (4 * r // grid[0]) + 4 * c // grid[1] for r in range(grid[0]) for c in range(grid[1])])
        shares = shares * w["hybrid.far.log_factors"][:, part][:, :, part].exp()
    shares = shares / (shares.sum(-1, keepdim=True) + (1e-4 if config["feature_map"] == "elu" else 1e-8) * x.shape[1])
    far = torch.einsum("bhqk,bkhd->bqhd", shares, value)
    if layer.kind == "linear":
        return far.flatten(2)
    query, key = (placed(part, project(part, x), config["rope"]) for part in "qk")
    near = oracles.softmax_attention(query, key, value, oracles.window_mask(grid, (window, window)))
    return (near + w["hybrid.gate"] * (far - near)).flatten(2)


def with_fields(model):
    """Its layers, by the name in the plain SiT, each with the fields of the model's config."""
    for block in model.transformer_blocks:
        block.attn.fields = dict(model.config)
    return {f"blocks.{index}.attn": block.attn for index, block in enumerate(model.transformer_blocks)}


FAR_BRANCHES = {
    "recipe": FAR,
    "norm": {**FAR, "qk_norm": True},
    "narrow": {**FAR, "projection": 5},
    "wide": {**FAR, "feature_map": "elu", "projection": 16},
    "polynomial": {**FAR, "feature_map": "polynomial", "qk_norm": True},
    "maps": {**FAR, "map_rank": 5, "qk_norm": True},
    "turned LinFusion": {"rope": True, "far_rope": True, "map_rank": 5},
    "no positions": {**FAR, "rope": False, "far_rope": False, "qk_norm": True},
    "no maps alone": {"map_rank": 0},
    "block states": {**FAR, "mixer": "blocks"},
}


@pytest.mark.parametrize("grid", [*GRIDS, (5, 7)])
@pytest.mark.parametrize("kind", ["linear", "hybrid"])
@pytest.mark.parametrize("fields", FAR_BRANCHES.values(), ids=FAR_BRANCHES)
def test_the_far_branch_is_its_formula(fields, kind, grid):
    model, inputs = make(attention=kind, **fields), make_inputs(grid)
    layers = with_fields(model)

    def attend(w, name, x, grid):
        return plain_layer(layers[name], layers[name].state_dict(), x, grid)

    expected = plain_of(model, inputs, attend=attend)
    assert expected.abs().mean() > 0.1
    close(run(model, inputs), expected)


@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
@pytest.mark.parametrize("kind", ["linear", "hybrid"])
@pytest.mark.parametrize("fields", FAR_BRANCHES.values(), ids=FAR_BRANCHES)
def test_the_far_branch_s_gradients_are_those_of_its_formula(fields, kind, grid):
    layer = with_fields(make(attention=kind, **fields))["blocks.1.attn"]
    generator = torch.Generator().manual_seed(2)
    x, back = (torch.randn(2, grid[0] * grid[1], WIDTH, generator=generator).double() for _ in range(2))
    rope = rotary_positions(grid, (6, 6), WIDTH // HEADS) if fields.get("rope") else None
    w = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = layer(one, TokenLayout(0, (grid,), False), rope)
    expected = plain_layer(layer, w, other, grid) @ w["to_out.weight"].T + w["to_out.bias"]
    close(found, expected)
    (found * back).sum().backward()
    (expected * back).sum().backward()
    for name, value in [("x", one), *layer.named_parameters()]:
        wanted = other.grad if name == "x" else w[name].grad
        torch.testing.assert_close(
            value.grad, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item() + 1e-12, msg=name
        )
        assert wanted.abs().max() > 1e-6, f"{name} matters"


@pytest.mark.parametrize("maps", [0, 5])
def test_rope_alone_does_not_turn_the_far_branch(maps):
    """In a hybrid layer, which has both, and in a linear one beside it."""
    kinds = ["hybrid", "linear"]
    fields = {**FAR, "attention": kinds, "far_rope": False, "map_rank": maps, "qk_norm": True}
    model, inputs = make(**fields), make_inputs((4, 7))
    layers = with_fields(model)

    def attend(w, name, x, grid):
        return plain_layer(layers[name], layers[name].state_dict(), x, grid)

    close(run(model, inputs), plain_of(model, inputs, attend=attend))


def test_the_far_branch_knows_where_a_token_is():
    """A linear layer gives swapped tokens swapped results, unless far_rope tells them apart."""
    x = torch.randn(1, 36, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    swap = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    rope = rotary_positions((6, 6), (6, 6), WIDTH // HEADS)
    with torch.no_grad():
        for fields, positions in ((FAR, rope), ({**FAR, "rope": False, "far_rope": False}, None)):
            layer = make(attention="linear", **fields).transformer_blocks[0].attn
            one, other = (layer(tokens, TokenLayout(0, ((6, 6),), False), positions) for tokens in (x[:, swap], x))
            apart = (one - other[:, swap]).abs().max()
            assert apart > 1e-3 if positions else apart < 1e-9


def test_the_projections_start_alike_and_orthonormal():
    torch.manual_seed(0)
    far = SiTTransformer2DModel(**TINY, attention="hybrid", **FAR).transformer_blocks[1].attn.hybrid.far
    assert far.projection_q.shape == (HEADS, WIDTH // HEADS, WIDTH // HEADS // 2)
    assert torch.equal(far.projection_q, far.projection_k) and far.projection_q is not far.projection_k
    for matrix in far.projection_q.detach():
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(WIDTH // HEADS // 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [3, 5])
def test_value_conv(kind, size):
    grid = (4, 7)
    model, inputs = make(attention=kind, value_conv=size), make_inputs(grid)
    mask = None if kind == "softmax" else oracles.window_mask(grid, (3, 3))

    def attend(w, name, x, grid):
        near, far, value = near_and_far(model, name, x, grid, mask)
        joined = {"linear": far, "hybrid": near if far is None else near + 0 * far}.get(kind, near)
        if kind == "hybrid":
            joined = near + w_gate(model, name) * (far - near)
        layer = model.get_submodule(name.replace("blocks.", "transformer_blocks."))
        kernel, bias = layer.value_conv.weight[:, 0], layer.value_conv.bias
        image, reach = value.flatten(2).unflatten(1, grid), size // 2
        conv = torch.zeros_like(image) + bias
        for y in range(grid[0]):
            for x_ in range(grid[1]):
                for dy in range(-reach, reach + 1):
                    for dx in range(-reach, reach + 1):
                        if 0 <= y + dy < grid[0] and 0 <= x_ + dx < grid[1]:
                            conv[:, y, x_] += image[:, y + dy, x_ + dx] * kernel[:, dy + reach, dx + reach]
        return joined.flatten(2) + conv.flatten(1, 2)

    with torch.no_grad():
        expected = plain_of(model, inputs, attend=attend)
    close(run(model, inputs), expected)


def test_optional_parts_add_nothing_unless_asked_for():
    names = set(SiTTransformer2DModel(**TINY).state_dict())
    assert not [name for name in names if "conv" in name or "norm" in name or "map" in name or "gate" in name]
    fresh = SiTTransformer2DModel(**TINY, value_conv=3).transformer_blocks[0].attn.value_conv
    assert fresh.weight.abs().max() == 0 and fresh.bias.abs().max() == 0


# --- the start of training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VARIED)
def test_a_fresh_model_gives_zero_and_its_blocks_nothing(fields):
    torch.manual_seed(0)
    model = SiTTransformer2DModel(**TINY | fields).double()
    assert torch.equal(run(model, make_inputs()), torch.zeros(2, 3, 12, 12, dtype=torch.float64))
    tokens = torch.randn(2, 36, WIDTH, dtype=torch.float64)
    conditioning = torch.randn(2, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        block = SiTTransformer2DModel(**TINY).double().transformer_blocks[0]
        assert torch.equal(block(tokens, conditioning, TokenLayout(0, ((6, 6),), False), None), tokens)


def test_initial_weights():
    torch.manual_seed(0)
    model = SiTTransformer2DModel(16, 16, num_layers=1, attention="linear", num_classes=100)
    block, width = model.transformer_blocks[0], 256

    def std(weight):
        return weight.std().item() if weight.numel() else 0

    xavier = {
        block.attn.to_q: width + 3 * width,  # as one layer with to_k and to_v
        block.attn.to_k: width + 3 * width,
        block.attn.to_v: width + 3 * width,
        block.attn.to_out: 2 * width,
        block.attn.hybrid.map_q.down: 2 * width,
        block.attn.hybrid.map_k.up: 2 * width,
        block.ff.fc1: 5 * width,
        block.ff.fc2: 5 * width,
    }
    for layer, fans in xavier.items():
        assert std(layer.weight) == pytest.approx(math.sqrt(2 / fans), rel=0.02), layer
        assert layer.weight.abs().max() <= math.sqrt(6 / fans) and layer.bias.abs().max() == 0
    assert std(model.patch_embed.proj.weight) == pytest.approx(math.sqrt(2 / (width + 16)), rel=0.02)
    assert model.patch_embed.proj.bias.abs().max() == 0
    for layer in (model.label_embed, model.time_embed.linear_1, model.time_embed.linear_2):
        assert std(layer.weight) == pytest.approx(0.02, rel=0.02)
    for layer in (block.modulation, model.modulation_out, model.proj_out):
        assert layer.weight.abs().max() == 0 and layer.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("gate", "query", "label"),
    [
        ("head", (-0.01640291, -0.33552352), 0.00147184),
        ("channel", (-0.01640291, -0.33552352), 0.00147184),
        ("token", (0.12899210, -0.05253749), 0.01242009),
    ],
)
def test_a_seed_gives_the_weights_it_gave_in_0_1_0(gate, query, label):
    """As commit ca6db7a drew them: a run that is started again from its config begins from the same model."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 2, "sample_size": 8}
    model = SiTTransformer2DModel(**sizes, num_classes=3, attention="hybrid", window=3, gate=gate, gate_init=0.25)
    attn = model.transformer_blocks[1].attn
    assert attn.to_q.weight[0, :2].tolist() == pytest.approx(query, abs=1e-7)
    assert model.label_embed.weight[0, 0].item() == pytest.approx(label, abs=1e-7)
    weights, start = (attn.hybrid.gate.weight, attn.hybrid.gate.bias) if gate == "token" else ((), attn.hybrid.gate)
    assert all(not row.any() for row in weights) and (start == 0.25).all()


@pytest.mark.parametrize("fields", VARIED)
def test_every_weight_learns(fields):
    """From SiT's zeros it takes some steps until gradients reach the first weights; then none is idle."""
    torch.manual_seed(0)
    model = SiTTransformer2DModel(**TINY | fields, learn_sigma=False).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    latents, times, _ = make_inputs(dtype=torch.float32, batch=12)
    labels = torch.arange(12) % 6
    target = torch.randn(latents.shape)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (model(latents, times, labels).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    idle = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # softmax does not see a constant added to all keys
    assert not [name for name in idle if not name.endswith("to_k.bias")]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_labels_are_dropped_for_the_null_class_while_training():
    model, (latents, times, _) = make(class_dropout_prob=0.3), make_inputs(batch=1)
    latents, times = latents.expand(400, -1, -1, -1), times.expand(400)
    labels = torch.full((400,), 2)
    kept, null = (run(model, (latents[:1], times[:1], torch.tensor([label])))[0] for label in (2, 5))
    torch.manual_seed(0)
    samples = run(model.train(), (latents, times, labels))
    is_null = (samples - null).abs().amax((1, 2, 3)) < 1e-9
    is_kept = (samples - kept).abs().amax((1, 2, 3)) < 1e-9
    assert (is_null ^ is_kept).all() and 90 <= is_null.sum() <= 150
    assert torch.equal(labels, torch.full((400,), 2))  # the caller's own are left alone
    for probability, expected in ((0.0, kept), (1.0, null)):
        model = make(class_dropout_prob=probability).train()
        torch.testing.assert_close(run(model, (latents[:3], times[:3], labels[:3])), expected.expand(3, -1, -1, -1))


# --- running it ----------------------------------------------------------------------------------------------------


def gradients(model, inputs):
    model.zero_grad()
    model(*inputs).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_changes_no_gradient():
    model, inputs = make(**EVERYTHING, class_dropout_prob=0.0).train(), make_inputs((4, 7))
    plain = gradients(model, inputs)
    calls = []
    model.transformer_blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    for name, grad in gradients(model, inputs).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-9, atol=1e-12)
    assert len(calls) == 2  # once more for the backward


@pytest.mark.parametrize("fields", [{}, *({"attention": kind} for kind in ("linear", "hybrid")), *VARIED[4:]])
def test_compiled_whole(fields):
    torch._dynamo.reset()
    model = make(torch.float32, num_layers=1, **fields)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for grid in ((6, 6), (4, 7)):
        inputs = make_inputs(grid, dtype=torch.float32)
        torch.testing.assert_close(run(compiled, inputs), run(model, inputs), rtol=1e-4, atol=1e-4)


def test_compiled_whole_trains():
    torch._dynamo.reset()
    model, inputs = make(torch.float32, num_layers=1, **EVERYTHING).train(), make_inputs(dtype=torch.float32)
    torch.manual_seed(0)
    eager = gradients(model, inputs)
    torch.manual_seed(0)
    compiled = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), inputs)
    compiled = {name.removeprefix("_orig_mod."): grad for name, grad in compiled.items()}
    for name, grad in eager.items():
        torch.testing.assert_close(compiled[name], grad, rtol=1e-3, atol=1e-4 * max(grad.abs().max().item(), 1e-3))


@pytest.mark.parametrize("fields", VARIED)
def test_bfloat16(fields):
    model, inputs = make(torch.float32, **fields), make_inputs((4, 7), dtype=torch.float32)
    expected = run(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(model, inputs)
    whole = run(model.to(torch.bfloat16), [x.bfloat16() if x.is_floating_point() else x for x in inputs])
    for result in (mixed.float(), whole.float()):
        assert (result - expected).norm() < 0.1 * expected.norm()
    assert whole.dtype == torch.bfloat16


def test_all_is_made_on_the_device_of_the_latents():
    latents, times, labels = (x.to("meta") for x in make_inputs((4, 7), dtype=torch.float32))
    model = SiTTransformer2DModel(**TINY, rope=True).to("meta").train()
    assert model(latents, times, labels).sample.shape == latents.shape


def test_calls():
    model, (latents, times, labels) = make(), make_inputs()
    sample = run(model, (latents, times, labels))
    with torch.no_grad():
        (as_tuple,) = model(latents, times, labels, return_dict=False)
        named = model(hidden_states=latents, timestep=times, class_labels=labels).sample
        one_time = model(latents, times[:1].squeeze(), labels).sample
    assert torch.equal(as_tuple, sample) and torch.equal(named, sample)
    assert torch.equal(one_time, run(model, (latents, times[:1].expand(2), labels)))


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VARIED)
def test_save_and_load(fields, tmp_path):
    model, inputs = make(torch.float32, **fields), make_inputs((4, 7), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = SiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(again, inputs), run(model, inputs))
    assert again.num_parameters() == model.num_parameters()
    assert [name for name, p in again.named_parameters() if not p.requires_grad] == ["pos_embed"]
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "SiTTransformer2DModel"
    half = SiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for name, p in half.named_parameters() if "gate" not in name} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for name, p in half.named_parameters() if "gate" in name)
    assert run(half, [x.bfloat16() if x.is_floating_point() else x for x in inputs]).isfinite().all()


def test_a_config_without_the_far_branch_s_fields_means_linfusion_s(tmp_path):
    fields = {"feature_map": "elu", "projection": 0, "far_rope": False}
    model, inputs = make(torch.float32, attention="hybrid", **fields), make_inputs(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for field in fields:
        del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(run(SiTTransformer2DModel.from_pretrained(tmp_path), inputs), run(model, inputs))


def test_the_order_of_patterns_survives_saving(tmp_path):
    model = make(torch.float32, attention={"transformer_blocks.0.*": "softmax", "*": "linear"})
    model.save_pretrained(tmp_path)  # sorted by key, "*" would come first
    kinds = [b.attn.kind for b in SiTTransformer2DModel.from_pretrained(tmp_path).transformer_blocks]
    assert kinds == ["softmax", "linear"]


def test_loading_other_fields_is_refused(tmp_path):
    make(torch.float32).save_pretrained(tmp_path)
    load = SiTTransformer2DModel.from_pretrained
    with pytest.raises(ValueError, match=r"lacks weights.*map_k.*another depth or attention") as error:
        load(tmp_path, attention="linear")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"holds unknown weights.*transformer_blocks\.1\."):
        load(tmp_path, num_layers=1)
    with pytest.raises(ValueError, match=r"pos_embed expected shape"):
        load(tmp_path, sample_size=16)
    with pytest.raises(ValueError, match="safetensors only"):
        load(tmp_path, use_safetensors=False)
    model, info = load(tmp_path, output_loading_info=True)
    assert model.config.num_layers == 2 and not info["missing_keys"]


# --- what does not work says so ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "sparse"}, "unknown attention 'sparse': use one of softmax, linear, window, hybrid"),
        ({"attention": {"*": "dense"}}, "unknown attention 'dense'"),
        ({"attention": {"*blocks.7.*": "linear", "*": "softmax"}}, r"'\*blocks.7.\*' matches no layer"),
        ({"attention": {"*blocks.0.*": "linear"}}, r"no pattern matches 'transformer_blocks.1.attn'"),
        ({"attention": ["softmax"]}, "lists 1 kinds for 2 layers"),
        ({"window": 0}, "window must be"),
        ({"window": None, "attention": "hybrid"}, "window and hybrid layers need a window"),
        ({"window": 2, "stride": 3}, "stride 3 is larger than window 2"),
        ({"map_rank": -1}, "map_rank must be"),
        ({"gate": "layer"}, "unknown gate 'layer'"),
        ({"num_layers": 0}, "num_layers must be a positive integer, not 0"),
        ({"patch_size": 2.0}, "patch_size must be a positive integer"),
        ({"num_classes": True}, "num_classes must be a positive integer"),
        ({"num_attention_heads": 1, "attention_head_dim": 6}, "multiple of 4"),
        ({"sample_size": 13}, "sample_size 13 is not a multiple of patch_size 2"),
        ({"mlp_ratio": 0}, "mlp_ratio must be above 0"),
        ({"mlp_ratio": 0.04}, "mlp_ratio must be above 0, and enough for one channel, not 0.04"),
        ({"mlp_ratio": "large"}, "mlp_ratio must be a number, not 'large'"),
        ({"gate_init": None, "attention": "hybrid"}, "gate_init must be a number, not None"),
        ({"rope": "maybe"}, "rope must be true or false, not 'maybe'"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob must be from 0 to 1"),
        ({"norm_type": "batch"}, "unknown norm_type 'batch': use one of layer_norm, rms_norm"),
        ({"activation_fn": "relu"}, "unknown activation_fn 'relu'"),
        ({"value_conv": 4}, "value_conv must be an odd integer"),
        ({"value_conv": -1}, "value_conv must be an odd integer"),
        ({"rope": True, "num_attention_heads": 4, "attention_head_dim": 6}, "rope needs an attention_head_dim"),
        ({"rope": True, "attention": "linear"}, "rope does nothing in linear attention"),
        ({"feature_map": "relu"}, "unknown feature map 'relu': use one of elu, hedgehog, polynomial"),
        ({"feature_map": None, "attention": "linear"}, "feature_map must be a name, not None"),
        ({"mixer": 1, "attention": "linear"}, "mixer must be a name, not 1"),
        ({"mixer": "blocks"}, "mixer is for linear and hybrid layers, and there are none"),
        ({"mixer": "pooled", "attention": "linear"}, "without feature map 'elu': leave that at 'polynomial'"),
        ({"projection": 129, "attention": "linear"}, "does not take a projection of 129 channels: use .* at most 128"),
        ({"projection": 22, "feature_map": "polynomial"}, "'polynomial' does not take a projection of 22 channels"),
        (
            {"feature_map": "polynomial", "attention": "hybrid", "num_attention_heads": 1, "attention_head_dim": 24},
            "does not take heads of 24 without projection: use a projection of at most 21",
        ),
        ({"projection": -1}, "projection must be a positive integer, 0 for none, or None, not -1"),
        ({"projection": True}, "projection must be a positive integer"),
        ({"far_rope": "yes", "rope": True, "attention": "linear"}, "far_rope must be true or false, not 'yes'"),
        ({"far_rope": True, "attention": "linear"}, "far_rope rotates by rope, which is off: set rope too"),
        ({"far_rope": True, "rope": True}, "far_rope is for linear and hybrid layers, and there are none"),
        ({"far_rope": True, "rope": True, "attention": "window"}, "far_rope is for linear and hybrid layers"),
    ],
)
def test_fields_that_cannot_work(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        SiTTransformer2DModel(**TINY | fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, y: (x[:, :2], t, y), r"takes \[B, 3, H, W\] latents, got \(2, 2, 12, 12\)"),
        (lambda x, t, y: (x[0], t, y), r"takes \[B, 3, H, W\] latents"),
        (lambda x, t, y: (x[..., :11], t, y), r"multiples of the patch of 2, got \(12, 11\)"),
        (lambda x, t, y: (x[:, :, :0], t, y), r"multiples of the patch of 2, got \(0, 12\)"),
        (lambda x, t, y: (x, t[:, None], y), r"timestep must be one value or \[2\]"),
        (lambda x, t, y: (x, t.repeat(2), y), r"timestep must be one value or \[2\]"),
        (lambda x, t, y: (x, t, y[:1]), r"class_labels must be \[2\] integers, got \(1,\)"),
        (lambda x, t, y: (x, t, y.float()), r"class_labels must be \[2\] integers, .* torch.float32"),
        (lambda x, t, y: (x, t, y + 6), "class labels must be 0 to 4, or 5 for none; got 11"),
        (lambda x, t, y: (x, t, y - 1), "class labels must be 0 to 4, or 5 for none; got -1"),
    ],
)
def test_inputs_that_cannot_work(change, message):
    model = make()
    with pytest.raises(ValueError, match=message) as error:
        model(*change(*make_inputs()))
    assert "\n" not in str(error.value)


# --- original checkpoints ------------------------------------------------------------------------------------------


def original_checkpoint(depth=2, width=WIDTH, channels=3, patch=2, tokens=36, classes=5, seed=3):
    """The keys and shapes that the authors' code saves."""
    shapes = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        "final_layer.linear.weight": (patch**2 * 2 * channels, width),
        "final_layer.linear.bias": (patch**2 * 2 * channels,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for i in range(depth):
        for name, out, fan_in in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
            ("adaLN_modulation.1", 6 * width, width),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (out, fan_in), f"blocks.{i}.{name}.bias": (out,)}
    generator = torch.Generator().manual_seed(seed)
    state = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["pos_embed"] = plain_positions((round(tokens**0.5),) * 2, round(tokens**0.5), width)[None].float()
    return state


def test_an_original_checkpoint_computes_what_the_original_does(tmp_path):
    state, inputs = original_checkpoint(), make_inputs()
    torch.save(state, tmp_path / "sit.pt")
    model = load_original(SiTTransformer2DModel(**TINY), tmp_path / "sit.pt").double().eval()
    expected = plain_sit({name: tensor.double() for name, tensor in state.items()}, *inputs, depth=2)
    close(run(model, inputs), expected, 1e-8)


def test_conversion_and_its_inverse_are_exact(tmp_path):
    state = original_checkpoint()
    converted = from_original(state)
    model = SiTTransformer2DModel(**TINY)
    assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in model.state_dict().items()}
    back = to_original(converted)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    ours = make(torch.float32).state_dict()
    again = from_original(to_original(ours))
    assert again.keys() == ours.keys() and all(torch.equal(again[name], ours[name]) for name in ours)
    save_file(converted, tmp_path / "ours.safetensors")
    # the positions of a checkpoint are those of a model that is built
    torch.testing.assert_close(state["pos_embed"], model.pos_embed.detach(), rtol=0, atol=1e-6)


def test_files_of_the_authors_training(tmp_path):
    """Weights, their average, an optimizer and the arguments in one file; and safetensors."""
    state, other = original_checkpoint(), original_checkpoint(seed=4)
    torch.save(
        {"model": other, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "run.pt"
    )
    torch.save({"model": state, "opt": {}}, tmp_path / "model.pt")
    save_file(state, tmp_path / "sit.safetensors")
    for name in ("run.pt", "model.pt", "sit.safetensors"):
        read = read_original(tmp_path / name)
        assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_files_that_are_no_checkpoint(tmp_path):
    model = SiTTransformer2DModel(**TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("404: not found")
    (tmp_path / "text.safetensors").write_text("404: not found")
    torch.save(original_checkpoint(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"step": 3}, tmp_path / "step.pt")
    for name in ("trap.pt", "empty.pt", "text.pt", "text.safetensors", "cut.pt", "list.pt", "step.pt"):
        with pytest.raises(ValueError, match=f"{name} (is damaged|holds no state dict)") as error:
            load_original(model, tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_original(model, tmp_path / "none.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"depth": 3}, "of another size: 3 blocks, where this model has 2"),
        ({"width": 48}, r"of another size: pos_embed is \(1, 36, 48\), and \(1, 36, 24\) in this model"),
        ({"tokens": 64}, r"of another size: pos_embed is \(1, 64, 24\)"),
        ({"classes": 7}, r"of another size: label_embed.weight is \(8, 24\)"),
        ({"patch": 4}, "of another size: patch_embed.proj.weight"),
        ({"channels": 4}, "of another size: patch_embed.proj.weight"),
    ],
)
def test_a_checkpoint_of_another_size_is_refused(size, message, tmp_path):
    torch.save(original_checkpoint(**size), tmp_path / "sit.pt")
    model = SiTTransformer2DModel(**TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_original(model, tmp_path / "sit.pt")
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_keys_that_do_not_fit(tmp_path):
    state = original_checkpoint()
    missing = {name: tensor for name, tensor in state.items() if name != "blocks.1.attn.qkv.bias"}
    with pytest.raises(ValueError, match=r"lacks 1 keys of the original layout \(first: blocks\.1\.attn\.qkv\.bias\)$"):
        from_original(missing)
    with pytest.raises(
        ValueError, match=r"has 1 keys unknown to the original layout \(first: blocks\.0\.attn\.rope\)$"
    ):
        from_original(state | {"blocks.0.attn.rope": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"lacks .* and has .*original layout"):
        from_original(make().state_dict())
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight must hold queries, keys and values"):
        from_original(state | {"blocks.0.attn.qkv.weight": torch.zeros(70, WIDTH)})
    with pytest.raises(ValueError, match=r"unknown to a softmax SiT .*map_k"):
        to_original(make(attention="linear").state_dict())
    torch.save(missing, tmp_path / "sit.pt")
    with pytest.raises(ValueError, match=r"sit\.pt: the state dict lacks 1 keys"):
        load_original(SiTTransformer2DModel(**TINY), tmp_path / "sit.pt")
    torch.save(state, tmp_path / "sit.pt")
    with pytest.raises(
        ValueError, match=r"it has no transformer_blocks\.0\.attn\.hybrid\.map_k.*build a softmax model"
    ):
        load_original(SiTTransformer2DModel(**TINY, attention="linear"), tmp_path / "sit.pt")
