"""A fresh hybrid is the dense model under its window as a mask; with open gates it sees the whole image."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    FIRST_BLOCK,
    FLUX_LIKE,
    HEAD_DIM,
    HELD,
    KINDS,
    ONE_BLOCK,
    PADDED,
    TEXT,
    WHOLE,
    WIDTH,
    add_to_token,
    by_token,
    joint_mask,
    make,
    make_inputs,
    perturb_hybrid,
    run,
    window_mask,
)

from hybriddit import HybridConfig, HybridQwenImageTransformer2DModel, dense_mode, hybridize
from hybriddit.attention import TokenLayout
from hybriddit.models import BRIA_FIBO, FLUX, FLUX_2_KLEIN, FLUX_3_KLEIN, QWEN_IMAGE, Z_IMAGE, family_of
from hybriddit.models.peak import forward_peak

# rotary embeddings and norms round to fp32 inside an fp64 model
CLOSE = {"rtol": 0, "atol": 2e-6}


def masked_dense(model, inputs, image_mask, monkeypatch):
    """The dense model's output with `image_mask` on every attention between image tokens."""
    length, family, other = len(image_mask), family_of(model), []
    attention, used = F.scaled_dot_product_attention, []
    for name, attn in family.attentions(model).items():
        if not family.converts(name):  # text alone, or to it
            attn.register_forward_pre_hook(lambda *call: other.append(call[0]))
            attn.register_forward_hook(lambda *call: other.remove(call[0]))

    def masked(query, key, value, attn_mask=None, **kwargs):
        if not other:
            mask = joint_mask(image_mask, query.shape[2] - length, family.text_first)
            attn_mask = mask if attn_mask is None else attn_mask & mask  # of padded text
            used.append(query.shape[2])
        return attention(query, key, value, attn_mask=attn_mask, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masked)
        out = run(model, inputs)
    assert used
    return out


def text_first(model):
    return family_of(model).text_first


@pytest.mark.parametrize("gate", ["head", "channel", "token"])
@pytest.mark.parametrize("kind", KINDS)
def test_window_over_the_grid_is_the_dense_model(kind, gate):
    model = make(kind)
    inputs = make_inputs(model, (6, 7), batch=2)
    dense = run(model, inputs)
    hybridize(model, HybridConfig(window=7, gate=gate))
    torch.testing.assert_close(run(model, inputs), dense, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_control_is_the_dense_model_and_has_the_hybrid_s_updates_alone(kind):
    model, hybrid = make(kind), hybridize(make(kind), HybridConfig(window=3, delta_rank=2))
    inputs = make_inputs(model, (6, 8), batch=2)
    dense = run(model, inputs)
    hybridize(model, HybridConfig(window=1024, linear=False, delta_rank=2))
    torch.testing.assert_close(run(model, inputs), dense, **CLOSE)
    added, updates = ([n for n, _ in m.named_parameters() if ".hybrid." in n] for m in (model, hybrid))
    assert added == [name for name in updates if ".deltas." in name] != []


@pytest.mark.parametrize(
    ("window", "stride", "dilation", "grid"),
    [
        ((3, 3), (1, 1), (1, 1), (6, 6)),
        ((4, 3), (1, 1), (1, 1), (5, 9)),  # even, non-square
        ((4, 5), (2, 3), (1, 1), (8, 7)),
        ((3, 2), (1, 1), (2, 3), (7, 8)),
        ((1, 3), (1, 1), (1, 1), (1, 8)),  # one row
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_smaller_window_is_the_masked_dense_model(kind, window, stride, dilation, grid, monkeypatch):
    model = make(kind)
    inputs = make_inputs(model, grid, batch=2)
    dense = run(model, inputs)
    expected = masked_dense(model, inputs, window_mask(grid, window, stride, dilation), monkeypatch)
    assert (expected - dense).abs().max() > 1e-3
    hybridize(model, HybridConfig(window=window, stride=stride, dilation=dilation))
    torch.testing.assert_close(run(model, inputs), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_stay_dense_where_the_config_says_so(kind, monkeypatch):
    model = make(kind)
    inputs = make_inputs(model, (6, 6))
    dense = run(model, inputs)
    first = FIRST_BLOCK[kind]
    hybridize(model, HybridConfig(window=3, layers={first: "dense"}))
    names = {name.rpartition(".hybrid")[0] for name, _ in model.named_modules() if name.endswith(".hybrid")}
    assert names and not any(name.startswith(first[:-1]) for name in names)
    mixed = run(model, inputs)
    assert (mixed - dense).abs().max() > 1e-4
    wide = hybridize(make(kind), HybridConfig(window=7, layers={first: "dense"}))
    torch.testing.assert_close(run(wide, inputs), dense, **CLOSE)
    # with the first block masked too it is another model
    everywhere = run(hybridize(make(kind), HybridConfig(window=3)), inputs)
    assert (mixed - everywhere).abs().max() > 1e-4


def test_dense_layers_take_the_layout_quietly(caplog):
    import logging

    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        for kind in KINDS:
            model = make(kind, **ONE_BLOCK[kind] | {"layers": 2})
            hybridize(model, HybridConfig(window=3, layers={"*.0.*": "dense"}))
            run(model, make_inputs(model, (4, 4)))
    finally:
        logger.removeHandler(caplog.handler)
    assert "token_layout" not in caplog.text and "not expected" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_two_sizes_in_a_row(kind):
    model = hybridize(make(kind), HybridConfig(window=3))
    sizes = [(6, 6), (4, 9), (6, 6)]
    first, other, again = (run(model, make_inputs(model, size)) for size in sizes)
    assert torch.equal(first, again)
    fresh = hybridize(make(kind), HybridConfig(window=3))
    assert torch.equal(other, run(fresh, make_inputs(fresh, (4, 9))))


def joined(one, other, in_turn):
    """Arguments of two calls as those of one. in_turn: whether lists have an element for each image."""
    if isinstance(one, dict):
        return {key: joined(value, other[key], in_turn) for key, value in one.items()}
    if isinstance(one, list):
        return one + other if in_turn else [torch.cat(pair) for pair in zip(one, other, strict=True)]
    return torch.cat([one, other])


@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_guidance_batch(kind):
    """Every sample of a batch, as classifier-free guidance makes one, is what it is alone."""
    model = perturb_hybrid(hybridize(make(kind), HybridConfig(window=3)))
    alone = [make_inputs(model, (5, 6), seed=seed) for seed in (1, 2)]
    shared = ("img_ids", "txt_ids", "position_ids")
    batch = {
        key: value
        if key in shared or value is None
        else joined(value, alone[1][key], in_turn=key in family_of(model).image_lists)
        for key, value in alone[0].items()
    }
    together = run(model, batch)
    for out, inputs in zip(together, alone, strict=True):
        torch.testing.assert_close(out[None], run(model, inputs), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_far_influence_with_open_gates(kind):
    """One block: a token far outside the window changes the output only through the far branch."""
    grid, reach = (9, 9), {}
    for name, config in {
        "hybrid": HybridConfig(window=3),
        "channel": HybridConfig(window=3, gate="channel"),
        "token": HybridConfig(window=3, gate="token"),
        "linear": HybridConfig(window=None),
        "window": HybridConfig(window=3, linear=False),
    }.items():
        model = hybridize(make(kind, **ONE_BLOCK[kind]), config)
        inputs = make_inputs(model, grid)
        changed = add_to_token(model, inputs, grid, 0, 0)

        def influence(model=model, inputs=inputs, changed=changed):
            difference = by_token(model, run(model, changed) - run(model, inputs), grid).abs().amax(-1)[0]
            assert difference[0, 0] > 1e-3
            return difference[5:, 5:].max().item()

        reach[name] = (influence(), perturb_hybrid(model) and influence())
    for name in ("hybrid", "channel", "token"):
        fresh, opened = reach[name]
        assert fresh == 0 and opened > 1e-6, (name, reach[name])
    assert reach["window"] == (0, 0)
    assert min(reach["linear"]) > 1e-6


LAYERS = [
    ("pixart", "attn1", {}),
    ("sd3", "attn", {}),
    ("sd35-medium", "attn", {}),
    ("sd35-medium", "attn2", {}),
    ("flux-dev", "attn", {}),
    ("flux-schnell", "attn", {"layers": 0, "single_layers": 1}),
    ("chroma", "attn", {}),
    ("chroma", "attn", {"layers": 0, "single_layers": 1}),
    ("qwen-image", "attn", {}),
    ("flux2", "attn", {}),
    ("flux2", "attn", {"layers": 0, "single_layers": 1}),
    ("flux3", "attn", {"layers": 0, "single_layers": 1}),
    ("z-image", "attention", {}),
    ("z-image", "attention", {"layers": 0, "refiners": 1}),
]


OPEN = {
    "head": HybridConfig(window=(3, 2)),
    "channel": HybridConfig(window=(3, 2), gate="channel"),
    "token": HybridConfig(window=(3, 2), gate="token"),
    "one gate": HybridConfig(window=(3, 2), join="gate"),
    "linear only": HybridConfig(window=None),
    "linfusion": HybridConfig(window=(3, 2), mixer="linfusion"),
    "linear only, linfusion": HybridConfig(window=None, mixer="linfusion"),
    "no maps": HybridConfig(window=(3, 2), map_rank=0),
    "no maps, linear only": HybridConfig(window=None, map_rank=0, projection=5),
    "no maps, not rotated": HybridConfig(window=(3, 2), map_rank=0, rotary="none", projection=0),
    "axial": HybridConfig(window=(3, 2), rotary="axial", feature_map="polynomial", temperature=True),
    "axial, no maps": HybridConfig(window=(3, 2), rotary="axial", map_rank=0, center_keys=True),
    "convolution": HybridConfig(window=(3, 2), value_conv=3, feature_map="elu"),
}


def rotated(x, cos, sin):
    """[B, N, heads, D] by tables [N, D], as complex numbers of neighbouring channels."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)[:, None, ::2]
    return torch.view_as_real(turned).flatten(-2)


def axial_tables(grid, width):
    """Angles of the first half of the channels by row, of the second by column, at 10000 ** -(2 i / (width / 2))."""
    rates = torch.tensor([10000.0 ** -(2 * (i // 2) / (width / 2)) for i in range(width // 2)])
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    angles = torch.stack([torch.cat((row * rates, column * rates)) for row, column in places])
    return angles.cos(), angles.sin()


def similarity(query, key, config):
    """phi(q) . phi(k) of all pairs, [B, heads, N, M], of queries and keys after their projections."""
    if config.feature_map == "elu":
        return torch.einsum("bnhd,bmhd->bhnm", F.elu(query) + 1, F.elu(key) + 1)
    if config.feature_map == "polynomial":
        scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * query.shape[-1] ** -0.5
        return 1 + scores + scores**2 / 2
    parts = []
    for sign in (1, -1):
        soft = [(sign * x).exp() / (sign * x).exp().sum(-1, keepdim=True) for x in (query, key)]
        parts.append(torch.einsum("bnhd,bmhd->bhnm", *soft))
    return parts[0] + parts[1]


def parts_of(fused):
    """A single block's queries and keys in FLUX.2, of the first rows of the layer that they share with the MLP."""
    return [lambda x, rows=fused.weight[i * WIDTH : (i + 1) * WIDTH]: x @ rows.T for i in range(2)]


@pytest.mark.parametrize("far", OPEN)
@pytest.mark.parametrize(("kind", "layer", "sizes"), LAYERS)
def test_an_open_layer_against_the_formulas(kind, layer, sizes, far):
    """One layer of a model, recomputed from its input and its joint query, key and value, with dense matrices."""
    config = OPEN[far]
    model = perturb_hybrid(hybridize(make(kind, **ONE_BLOCK[kind] | sizes), config))
    attn = next(module for name, module in model.named_modules() if name.endswith(f".{layer}"))
    seen = {}

    def keep_input(module, args, kwargs):
        seen["x"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen["tables"] = kwargs.get("freqs_cis", kwargs.get("image_rotary_emb"))

    def keep_joint(module, args, kwargs, out):
        seen["query"], seen["key"], seen["value"], seen["layout"] = args
        seen["out"], seen["text"] = out, kwargs.get("text_mask")

    attn.register_forward_pre_hook(keep_input, with_kwargs=True)
    attn.hybrid.register_forward_hook(keep_joint, with_kwargs=True)
    grid, count = (4, 5), 20
    run(model, make_inputs(model, grid))
    text, first = 0 if layer in ("attn1", "attn2") else TEXT, text_first(model)
    if kind == "z-image":  # image and text filled up to 32s, the text in the stream alone
        text = 32 - count + (0 if sizes else 32)
    assert seen["layout"] == TokenLayout(text, (grid,), first)
    image = slice(text, None) if first else slice(0, count)
    words = slice(0, text) if first else slice(count, None)
    hybrid = attn.hybrid
    hidden = torch.zeros(text + count, dtype=torch.bool)  # padded text
    if seen["text"] is not None:
        hidden[words] = ~seen["text"][0]
    assert hidden.any() == (kind in PADDED)

    with torch.no_grad():
        x = seen["x"][:, image] if sizes or kind == "z-image" else seen["x"]  # a single block's input is text and image
        norms = (attn.norm_q or torch.nn.Identity(), attn.norm_k or torch.nn.Identity())
        maps = (hybrid.map_q, hybrid.map_k) if config.map_rank != 0 else (torch.zeros_like, torch.zeros_like)
        projections = (attn.to_q, attn.to_k) if hasattr(attn, "to_q") else parts_of(attn.to_qkv_mlp_proj)
        pairs = zip(projections, maps, norms, strict=True)
        far_query, far_key = (
            norm((project(x) + (up_down(x) if config.map_rank != 0 else 0)).unflatten(-1, (-1, HEAD_DIM)))
            for project, up_down, norm in pairs
        )
        tables = None
        if config.rotary == "axial":
            tables = axial_tables(grid, HEAD_DIM)
        elif config.rotary == "auto" and kind in FLUX_LIKE:
            tables = [table[image] for table in seen["tables"]]
        elif config.rotary == "auto" and kind in ("qwen-image", "z-image"):
            turns = seen["tables"][0][:count].repeat_interleave(2, 1)
            tables = turns.real, turns.imag
        if tables is not None:
            far_query, far_key = rotated(far_query, *tables), rotated(far_key, *tables)
        value = seen["value"][:, image]
        if config.window is None:  # over text too, with the keys as the teacher made them
            shown = ~hidden[words]
            far_key = torch.cat([seen["key"][:, words][:, shown], far_key], 1)
            value = torch.cat([seen["value"][:, words][:, shown], value], 1)
        if config.center_keys:
            far_key = far_key - far_key.mean(1, keepdim=True)
        if config.projection != 0:
            far_query, far_key = (
                torch.stack([x[:, :, head] @ matrix[head] for head in range(len(matrix))], dim=2)
                for x, matrix in ((far_query, hybrid.far.projection_q), (far_key, hybrid.far.projection_k))
            )
        if config.temperature:
            far_query = far_query / hybrid.far.log_temperature_q.exp().view(-1, 1)
            far_key = far_key / hybrid.far.log_temperature_k.exp().view(-1, 1)
        weights = similarity(far_query, far_key, config)
        eps = 1e-4 if config.feature_map == "elu" else 1e-8
        total = weights.sum(-1, keepdim=True) + eps * value.shape[1]
        expected = torch.einsum("bhnm,bmhd->bnhd", weights / total, value)
        if config.window is not None:
            mask = joint_mask(window_mask(grid, (3, 2)), text, first) & ~hidden
            joint = (seen[name].transpose(1, 2) for name in ("query", "key", "value"))
            near = F.scaled_dot_product_attention(*joint, attn_mask=mask).transpose(1, 2)[:, image]
            g = hybrid.gate(x.float()).unsqueeze(-1) if config.gate == "token" else hybrid.gate
            if config.join == "joint":  # far's share of all weights; taken away where the gate is below 0
                scores = torch.einsum("bnhd,bmhd->bhnm", seen["query"], seen["key"]) * HEAD_DIM**-0.5
                near_total = (scores.exp() * mask).sum(-1).transpose(1, 2)[:, image].unsqueeze(-1)
                far_total = torch.sinh(g.abs()) / 10 * total.transpose(1, 2)
                g = g.sign() * far_total / (far_total + near_total)
            expected = near + g * (expected - near)
        if config.value_conv:
            picture = seen["value"][:, image].flatten(2).transpose(1, 2).unflatten(2, grid)
            conv = hybrid.value_conv
            picture = F.pad(picture, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # [B, width, rows, columns, 3, 3]
            picture = torch.einsum("bcyxij,cij->bcyx", picture, conv.weight[:, 0]) + conv.bias[:, None, None]
            expected = expected + picture.flatten(2).transpose(1, 2).view_as(expected)
    torch.testing.assert_close(seen["out"][:, image], expected, rtol=0, atol=5e-7)
    dense_text = (seen[name].transpose(1, 2) for name in ("query", "key", "value"))
    text_out = F.scaled_dot_product_attention(*dense_text, attn_mask=~hidden[None]).transpose(1, 2)[:, words]
    torch.testing.assert_close(seen["out"][:, words], text_out[:, :text], rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HELD])  # which have no argument for it
def test_an_explicit_layout_overrides(kind):
    model = hybridize(make(kind), HybridConfig(window=3))
    inputs = make_inputs(model, (6, 6))
    named = {"pixart": "cross_attention_kwargs", "qwen-image": "attention_kwargs"}
    argument = named.get(kind, "joint_attention_kwargs")
    layout = TokenLayout(0 if kind == "pixart" else TEXT, ((4, 9),), text_first(model))
    inputs.pop(argument, None)  # FIBO's mask
    out = run(model, inputs)
    kwargs = {argument: {"token_layout": layout}}
    assert (run(model, inputs, **kwargs) - out).abs().max() > 1e-4
    assert kwargs == {argument: {"token_layout": layout}}
    assert torch.equal(run(model, inputs, **{argument: {"token_layout": layout._replace(grids=((6, 6),))}}), out)
    assert torch.equal(run(model, inputs, **{argument: {}}), out)


def test_positional_arguments():
    model = hybridize(make("sd3"), HybridConfig(window=3))
    inputs = make_inputs(model, (4, 5))
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    with torch.no_grad():
        out = model(*(inputs[name] for name in names), return_dict=False)[0]
    assert torch.equal(out, run(model, inputs))


def test_a_mask_of_numbers_hides_padded_text():
    """As Chroma was trained; diffusers' pipeline passes such a mask, and its dense model adds it to the scores."""
    model = make("chroma", layers=2)
    inputs = make_inputs(model, (4, 5), batch=3)
    dense, mask = run(model, inputs), inputs["attention_mask"]
    for config in (HybridConfig(window=7), HybridConfig(window=7, layers={"*blocks.0.*": "dense"})):
        hybrid = hybridize(make("chroma", layers=2), config)
        for numbers in (mask, mask.double(), mask.long()):
            torch.testing.assert_close(run(hybrid, {**inputs, "attention_mask": numbers}), dense, **CLOSE)
        assert (run(hybrid, {**inputs, "attention_mask": None}) - dense).abs().max() > 1e-4
        with pytest.raises(ValueError, match=r"each token of text and image, \(3, 25\): not \(3, 5\)"):
            run(hybrid, {**inputs, "attention_mask": mask[:, :TEXT]})


def test_flux_grid_from_bf16_ids_past_256():
    """bf16 cannot tell row 256 from 257; the grid is counted, not measured by the largest id."""
    model = make("flux-schnell", dtype=torch.float32)
    for grid in [(300, 2), (2, 300), (259, 3), (1, 7), (7, 1)]:
        inputs = make_inputs(model, grid)
        expected = TokenLayout(TEXT, (grid,), True)
        assert FLUX.token_layout(model, {**inputs, "img_ids": inputs["img_ids"].bfloat16()}) == expected
        assert FLUX.token_layout(model, {**inputs, "img_ids": inputs["img_ids"][None]}) == expected


def test_flux_reference_grids_are_told_apart():
    model = make("flux-schnell", dtype=torch.float32)
    image, reference = (make_inputs(model, grid) for grid in [(4, 6), (3, 5)])
    reference["img_ids"][:, 0] = 1
    inputs = {
        **image,
        "hidden_states": torch.cat([image["hidden_states"], reference["hidden_states"]], 1),
        "img_ids": torch.cat([image["img_ids"], reference["img_ids"]]),
    }
    assert FLUX.token_layout(model, inputs) == TokenLayout(TEXT, ((4, 6), (3, 5)), True)


def reference_mask(grids):
    """[N, N] of the tokens of several images: windows of 3 x 3 at their relative places in each."""
    rows = []
    for height, width in grids:
        places = [(row, column) for row in range(height) for column in range(width)]
        there = [
            [(2 * row + 1) * h // (2 * height) * w + (2 * column + 1) * w // (2 * width) for row, column in places]
            for h, w in grids
        ]
        masks = [window_mask(grid, (3, 3))[own] for grid, own in zip(grids, there, strict=True)]
        rows.append(torch.cat(masks, 1))
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("grids", "sizes"),
    [
        (((4, 6), (3, 5)), {}),
        (((4, 6), (3, 5)), {"zero_cond_t": True}),  # Qwen-Image-Edit-2511
        (((3, 5), (3, 5), (3, 5)), {"use_layer3d_rope": True, "use_additional_t_cond": True}),  # Layered
    ],
)
def test_qwen_image_has_a_window_in_each_image(grids, sizes, monkeypatch):
    """Reference images, and layers: a token sees those near it, and near its relative place in the others."""
    model, batch = make("qwen-image", **sizes), 2
    tokens = [rows * columns for rows, columns in grids]
    inputs = make_inputs(model, (sum(tokens), 1), batch=batch)
    inputs["img_shapes"] = [[(1, *grid) for grid in grids]] * batch
    if model.config.use_additional_t_cond:
        inputs["additional_t_cond"] = torch.tensor([0, 1])
    dense = run(model, inputs)
    expected = masked_dense(model, inputs, reference_mask(grids), monkeypatch)
    assert (expected - dense).abs().max() > 1e-3
    hybridize(model, HybridConfig(window=3))
    assert QWEN_IMAGE.token_layout(model, inputs) == TokenLayout(TEXT, grids, True)
    torch.testing.assert_close(run(model, inputs), expected, **CLOSE)


def test_flux2_has_a_window_in_each_image(monkeypatch):
    """Reference images, whose first number counts in tens; each image of the batch has ids, of which the first's count."""
    model, grids = make("flux2", guidance_embeds=False), ((4, 6), (3, 5))
    inputs = make_inputs(model, (sum(rows * columns for rows, columns in grids), 1), batch=2)
    ids = [
        (10 * image, row, column, 0)
        for image, (rows, columns) in enumerate(grids)
        for row in range(rows)
        for column in range(columns)
    ]
    inputs["img_ids"] = torch.tensor([ids, ids])
    dense = run(model, inputs)
    expected = masked_dense(model, inputs, reference_mask(grids), monkeypatch)
    assert (expected - dense).abs().max() > 1e-3
    hybridize(model, HybridConfig(window=3))
    assert FLUX_2_KLEIN.token_layout(model, inputs) == TokenLayout(TEXT, grids, True)
    torch.testing.assert_close(run(model, inputs), expected, **CLOSE)


def test_longcat_image_has_a_window_in_each_image(monkeypatch):
    """The edit model's: places of both images count from as many as there are words, and bf16 would not hold them."""
    model, grids = make("longcat"), ((4, 6), (3, 5))
    inputs = make_inputs(model, (sum(rows * columns for rows, columns in grids), 1), batch=2)
    ids = [
        (1.0 + image, TEXT + row, TEXT + column)
        for image, (rows, columns) in enumerate(grids)
        for row in range(rows)
        for column in range(columns)
    ]
    inputs["img_ids"] = torch.tensor(ids)
    dense = run(model, inputs)
    expected = masked_dense(model, inputs, reference_mask(grids), monkeypatch)
    assert (expected - dense).abs().max() > 1e-3
    hybridize(model, HybridConfig(window=3))
    torch.testing.assert_close(run(model, inputs), expected, **CLOSE)
    for wrong, reason in ((torch.tensor(ids).bfloat16(), "do not tell rows from 512 on apart"), (ids[:-1], "grids")):
        with pytest.raises(ValueError, match=reason):
            run(model, {**inputs, "img_ids": torch.as_tensor(wrong)})


def test_fibo_has_a_window_in_each_image_and_takes_the_pipelines_masks(monkeypatch):
    model, grids = make("fibo"), ((4, 6), (3, 5))
    inputs = make_inputs(model, (sum(rows * columns for rows, columns in grids), 1), batch=3)
    ids = [
        (image, row, column)
        for image, (rows, columns) in enumerate(grids)
        for row in range(rows)
        for column in range(columns)
    ]
    inputs["img_ids"] = torch.tensor(ids).double()
    dense, mask = run(model, inputs), inputs["joint_attention_kwargs"]["attention_mask"]
    assert not mask.all()
    expected = masked_dense(model, inputs, reference_mask(grids), monkeypatch)
    assert (expected - dense).abs().max() > 1e-3
    hybridize(model, HybridConfig(window=3))
    torch.testing.assert_close(run(model, inputs), expected, **CLOSE)
    unpadded = run(model, {**inputs, "joint_attention_kwargs": None})
    assert (unpadded - expected).abs().max() > 1e-4
    for wrong in (mask.double(), mask[:, 0, 0], mask & mask.transpose(2, 3)):
        with pytest.raises(ValueError, match=r"attention_mask hides keys.*bool \(3, 1, 1, 44\), not torch"):
            run(model, {**inputs, "joint_attention_kwargs": {"attention_mask": wrong}})
    text = BRIA_FIBO.example_text(model.config, 2, TEXT, torch.zeros)
    assert forward_peak(model, (4, 6), text, device=torch.device("cpu"), dtype=torch.float32) > 0


def test_flux2_calls_that_cannot_be_served():
    model = hybridize(make("flux2", dtype=torch.float32), HybridConfig(window=3))
    with pytest.raises(ValueError, match="no keys and values of reference images"):
        run(model, make_inputs(model, (4, 6)), kv_cache_mode="extract", num_ref_tokens=2)
    inputs = make_inputs(model, (300, 2))
    with pytest.raises(ValueError, match="img_ids in torch.bfloat16 do not tell all rows"):
        run(model, {**inputs, "img_ids": inputs["img_ids"].bfloat16()})
    assert torch.equal(run(model, {**inputs, "img_ids": inputs["img_ids"].float()}), run(model, inputs))


def test_flux3_has_a_window_in_each_image(monkeypatch):
    """Blocks of the image, of the references (together as many tokens, in other grids), then of all, in this order."""
    model, grids = make("flux3"), ((4, 6), (6, 3), (2, 3))
    inputs = make_inputs(model, grids[0], batch=2, references=grids[1:])
    dense, attention = run(model, inputs), F.scaled_dot_product_attention
    masks = [None, window_mask(grids[0], (3, 3)), reference_mask(grids[1:])]
    masks.append(joint_mask(reference_mask(grids), TEXT, True))

    def masked(query, key, value, **kwargs):
        return attention(query, key, value, attn_mask=masks.pop(0))

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masked)
        expected = run(model, inputs)
    assert not masks and (expected - dense).abs().max() > 1e-3
    hybridize(model, HybridConfig(window=3))
    assert FLUX_3_KLEIN.token_layout(model, inputs) == TokenLayout(TEXT, grids, True)
    torch.testing.assert_close(run(model, inputs), expected, **CLOSE)


def test_qwen_image_padding_does_not_matter():
    """Text of any length, padded to another one: positions are counted from the first word."""
    model = perturb_hybrid(hybridize(make("qwen-image"), HybridConfig(window=3)))
    inputs = make_inputs(model, (4, 5), batch=2)
    words = inputs["encoder_hidden_states"]
    out = run(model, {**inputs, "encoder_hidden_states_mask": None})
    padded = {
        **inputs,
        "encoder_hidden_states": torch.cat([words, torch.randn(2, 4, words.shape[2]).double()], 1),
        "encoder_hidden_states_mask": torch.arange(TEXT + 4).expand(2, -1) < TEXT,
    }
    torch.testing.assert_close(run(model, padded), out, **CLOSE)


def test_qwen_image_calls_that_cannot_be_served():
    model = hybridize(make("qwen-image"), HybridConfig(window=3))
    inputs = make_inputs(model, (4, 6), batch=2)
    for shapes, reason in {
        None: "img_shapes is needed",
        ((1, 4, 6), (1, 6, 4)): "differ within the batch",
        ((2, 4, 3),) * 2: "one frame each, and together of 24 tokens",
        ((1, 4, 5),) * 2: "one frame each, and together of 24 tokens",
    }.items():
        with pytest.raises(ValueError, match=reason):
            run(model, {**inputs, "img_shapes": shapes and [[shape] for shape in shapes]})
    with pytest.raises(ValueError, match="guidance_embeds"):
        HybridQwenImageTransformer2DModel(**dict(make("qwen-image").config, guidance_embeds=True))


DELTAS = {
    "pixart": 4 + 4,
    "sd3": 8 + 6,
    "sd35-large": 8 + 6,
    "sd35-medium": 8 + 4 + 6,
    "qwen-image": 8 + 6,
    "flux2": 8 + 4,
    "z-image": 4 + 8,
    "flux3": 3 * 4,
    "krea2": 5 + 5,
}


@pytest.mark.parametrize("kind", KINDS)
def test_deltas(kind):
    """Fresh deltas change nothing; every one of them counts; the teacher does without."""
    model = make(kind)
    inputs = make_inputs(model, (3, 4), **WHOLE.get(kind, {}))
    dense = run(model, inputs)
    plain = run(hybridize(make(kind), HybridConfig(window=3)), inputs)
    hybridize(model, HybridConfig(window=3, delta_rank=2))
    assert torch.equal(run(model, inputs), plain)

    ups = {name: p for name, p in model.named_parameters() if ".hybrid.deltas." in name and name.endswith("up.weight")}
    assert len(ups) == DELTAS.get(kind, 8 + 3)
    with torch.no_grad():
        for name, parameter in ups.items():
            parameter.add_(1)
            assert (run(model, inputs) - plain).abs().max() > 1e-6, name
            parameter.sub_(1)
        for parameter in ups.values():
            parameter.add_(1)
    with dense_mode(model):
        assert torch.equal(run(model, inputs), dense)


def test_krea2_calls_that_cannot_be_served():
    model = hybridize(make("krea2"), HybridConfig(window=3))
    inputs = make_inputs(model, (4, 6), batch=2)
    ids, mask = inputs["position_ids"], inputs["encoder_attention_mask"]
    for words, other in {
        "a row for each of 5 text and 24 image tokens, not 28 rows": {"position_ids": ids[1:]},
        "position_ids do not describe whole image grids of 24 tokens together$": {"position_ids": ids.flip(0)},
        r"of bool, \(2, 5\).* not torch.float64, \(2, 5\)": {"encoder_attention_mask": mask.double()},
        r"of bool, \(2, 5\).* not torch.bool, \(2, 4\)": {"encoder_attention_mask": mask[:, 1:]},
    }.items():
        with pytest.raises(ValueError, match=words) as caught:
            run(model, {**inputs, **other})
        assert "\n" not in str(caught.value)


def test_z_image_calls_that_cannot_be_served():
    model = hybridize(make("z-image"), HybridConfig(window=3))
    inputs = make_inputs(model, (4, 6), batch=2)
    assert Z_IMAGE.token_layout(model, inputs) == TokenLayout(8 + 64, ((4, 6),), False)  # filled up: 24 to 32, 37 to 64
    films = [image.expand(-1, 2, -1, -1) for image in inputs["x"]]
    for match, changed in {
        "for omni calls, restore_dense": {"x": [[image] for image in inputs["x"]]},
        r"one size in a call, not \[\(1, 8, 8\), \(1, 8, 12\)\]": {"x": [inputs["x"][0][..., :8], inputs["x"][1]]},
        "of one frame": {"x": films},
        "captions of 256 tokens are too long: this model has positions for 254": {
            "cap_feats": [torch.ones(230, 12)] * 2
        },
    }.items():
        with pytest.raises(ValueError, match=match):
            run(model, {**inputs, **changed})
    with pytest.raises(ValueError, match="reads images .omni. is not served"):
        hybridize(make("z-image", siglip_feat_dim=8), HybridConfig(window=3))
    with pytest.raises(ValueError, match=r"all_patch_size \[4\].*no weights for"):
        hybridize(make("z-image", all_patch_size=(4,)), HybridConfig(window=3))
    with pytest.raises(
        ValueError, match="an image of 300 x 4 tokens is too large: this model has positions for 256 x 256"
    ):
        Z_IMAGE.check_grid(model.config, (300, 4))
