"""Window attention joined with linear attention by one Triton kernel, against float64; run as test_triton.py is."""

import random
from functools import partial

import pytest
import torch
from attention import interpreter, oracles
from attention.interpreter import poisoned  # noqa: F401
from attention.operators import check_operator
from test_triton import DEVICE, TOLERANCE, fenced, kernels
from test_window import LAYOUTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hybriddit.attention import HybridAttention, TokenLayout, hybrid, spread
from hybriddit.attention.linear import FEATURE_MAPS, sum_keys
from hybriddit.attention.rows import RowShard
from hybriddit.attention.window import dispatch, joined_attention, seen_pairs

if kernels.INTERPRETED and (refusal := interpreter.refusal()):
    pytest.skip(refusal, allow_module_level=True)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def random_inputs(grid, text, heads, width, batch, dtype=torch.float32, channels=4, seed=0):
    """Query, key, value, text key and value; far query and key; a gate per token; the projections, if there are any."""
    generator = torch.Generator().manual_seed(seed)
    near = [fenced((batch, *grid, heads, width), dtype, generator).detach() for _ in range(3)]
    near += [fenced((batch, text, heads, width), dtype, generator).detach() if text else None for _ in range(2)]
    far = [fenced((batch, grid[0] * grid[1], heads, width), dtype, generator).detach() for _ in range(2)]
    gate = fenced((batch, grid[0] * grid[1], heads, 1), torch.float32, generator).detach()
    if channels is None:
        return near, far, gate, None
    projections = [torch.randn(heads, width, channels, generator=generator) / width**0.5 for _ in range(2)]
    return near, far, gate, [x.to(DEVICE, dtype) for x in projections]


def join(near, far, gate, projections, window, stride=1, dilation=1, feature_map="polynomial", joint=True, **options):
    query, key, value, text_key, text_value = near
    query_projection, key_projection = projections or (None, None)
    phi = {"feature_map": feature_map, "query_projection": query_projection, "key_projection": key_projection}
    sums = sum_keys(*far, value.flatten(1, 2), **phi)
    settings = {"window": window, "stride": stride, "dilation": dilation, "backend": "triton"} | options
    texts = {"text_key": text_key, "text_value": text_value}
    return joined_attention(query, key, value, sums, gate, joint, **texts, **settings)


def expected(near, far, gate, projections, window, stride, dilation, feature_map, joint, scale=None):
    """From the definitions: all weights of window, text and the whole image, over one sum of them where joint."""
    out = oracles.neighborhood(*near, window, stride, dilation, scale).flatten(1, 2)
    value, gate = near[2].flatten(1, 2), gate.double().expand(*out.shape[:3], 1)
    if not joint:
        return oracles.joined(oracles.mapped_linear(feature_map, *far, value, projections), (out, gate))
    lse = oracles.neighborhood_lse(*near[:2], near[3], window, stride, dilation, scale).flatten(1, 2)
    worth = torch.sinh(gate.clamp(-40, 40)) / 10 * torch.exp(-lse.clamp(min=-40)).unsqueeze(-1)
    return oracles.joint(feature_map, *far, value, out, worth, projections)


def assert_equal_to_oracle(
    inputs, window, stride=(1, 1), dilation=(1, 1), feature_map="polynomial", joint=True, text_rows=(0, 0)
):
    near, far, gate, projections = inputs
    out = join(*inputs, window, stride, dilation, feature_map, joint, text_rows=text_rows)
    wanted = expected(*inputs, window, stride, dilation, feature_map, joint)
    tokens, (before, after) = wanted.shape[1], text_rows
    assert out.dtype == near[0].dtype and out.is_contiguous()
    assert out.shape == (len(wanted), before + tokens + after, *wanted.shape[2:])
    image = out[:, before : before + tokens].double()
    assert (image - wanted).norm() <= TOLERANCE[out.dtype] * wanted.norm()


MAPS = [("polynomial", 4), ("polynomial", 14), ("polynomial", 21), ("elu", None), ("elu", 9), ("hedgehog", 12)]


@pytest.mark.parametrize("seed", range(12))
def test_the_join(seed):
    rng = random.Random(seed)
    grid = rng.choice([(1, 1), (1, 19), (5, 7), (9, 12), (16, 9)])
    window = tuple(rng.choice((1, 2, 3, 4, 5, 8, 40)) for _ in range(2))
    stride = tuple(rng.choice((1, rng.randint(1, w))) for w in window)
    dilation = tuple(rng.choice((1, 1, 2, 3)) for _ in range(2))
    feature_map, channels = MAPS[seed % len(MAPS)]
    heads, batch = rng.choice(((2, 1), (1, 2)))
    sizes = grid, rng.choice((0, 7, 70)), heads, rng.choice((24, 32, 72)), batch
    near, far, gate, projections = random_inputs(*sizes, channels=channels, seed=seed)
    gate = gate * rng.choice((0, 1, 5)) if rng.random() < 0.5 else gate[0, 0].clone()  # per token, or per head
    inputs = near, far, gate, projections
    joint, text_rows = rng.random() < 0.8, rng.choice(((0, 0), (7, 0), (0, 5)))
    assert_equal_to_oracle(inputs, window, stride, dilation, feature_map, joint, text_rows)


@pytest.mark.parametrize(
    "width, dtype, feature_map, channels",
    [
        (128, torch.bfloat16, "polynomial", 14),
        (72, torch.bfloat16, "polynomial", 10),
        (72, torch.float16, "elu", None),
        (40, torch.float16, "hedgehog", 20),
        (16, torch.bfloat16, "elu", 16),
    ],
)
def test_widths_and_half_precision(width, dtype, feature_map, channels):
    inputs = random_inputs((7, 12), 7, 1, width, 1, dtype, channels)
    assert_equal_to_oracle(inputs, (3, 4), feature_map=feature_map)


def test_padded_text_is_not_seen():
    near, far, gate, projections = random_inputs((9, 14), 7, 2, 24, 3)
    text_mask = torch.stack((torch.arange(7) < 2, torch.arange(7) % 3 == 1, torch.zeros(7) > 0)).to(DEVICE)
    for x in near[3:]:
        x[~text_mask] = 100.0
    out = join(near, far, gate, projections, (3, 5), text_mask=text_mask, scale=0.7)
    for b, seen in enumerate(text_mask):
        one = [x[b, None] for x in near[:3]] + [x[b, None, seen] for x in near[3:]]
        one = one, [x[b, None] for x in far], gate[b, None], projections
        wanted = expected(*one, (3, 5), (1, 1), (1, 1), "polynomial", True, 0.7)
        assert (out[b, None].double() - wanted).norm() <= TOLERANCE[torch.float32] * wanted.norm()


@pytest.mark.parametrize("feature_map, channels", [("polynomial", 6), ("elu", None)])
@pytest.mark.parametrize("offset", [-300.0, 0.0, 300.0])
def test_gates_and_scores_of_any_size(offset, feature_map, channels, monkeypatch):
    """From near alone to far alone and beyond, of either sign; float32 rounds such scores by 3e-5."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 2e-4)
    near, far, _, projections = random_inputs((6, 9), 5, 1, 16, 1, channels=channels)
    near[0][..., 0], near[1][..., 0], near[3][..., 0] = 4.0, offset, offset
    gates = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 20.0, 39.0, 300.0, 1e30, torch.inf])
    gate = torch.cat((gates, -gates)).repeat(3).view(1, 54, 1, 1).to(DEVICE)
    inputs = near, far, gate, projections
    assert_equal_to_oracle(inputs, (3, 4), feature_map=feature_map)


@pytest.mark.parametrize("feature_map, channels", [("polynomial", 6), ("elu", None), ("hedgehog", 6)])
def test_no_finite_query_gives_nan(feature_map, channels):
    near, far, gate, projections = random_inputs((6, 9), 0, 1, 16, 1, channels=channels)
    for i, size in enumerate((1e38, -1e38, 1e20, -1e20, 1e5, 0.0)):
        far[0][:, i], far[1][:, -i] = size, size
    for factor in (0.0, 1.0, -1e3, 1e30):
        assert join(near, far, gate * factor, projections, (3, 4), feature_map=feature_map).isfinite().all()
    far[0][:, 20, :, 3] = torch.nan
    nan = join(near, far, gate, projections, (3, 4), feature_map=feature_map).flatten(1, 2).isnan().any(-1)
    assert nan[:, 20].all() and nan.sum() == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_strides(layout):
    image, prompt, tokens = (2, 5, 6, 3, 24), (2, 7, 3, 24), (2, 30, 3, 24)
    near, far = (
        [LAYOUTS[layout](shape, torch.float32).to(DEVICE) for shape in shapes]
        for shapes in ((image,) * 3 + (prompt,) * 2, (tokens,) * 2)
    )
    gate = torch.randn(3, 30, 2, device=DEVICE).permute(2, 1, 0).unsqueeze(-1)
    assert_equal_to_oracle((near, far, gate, random_inputs((1, 1), 0, 3, 24, 1)[3]), (3, 4))


class Seen(TorchDispatchMode):
    """The names of the operators that run, and the sizes of what they allocate."""

    def __enter__(self):
        self.names, self.allocated = [], []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.names.append(function.name().removesuffix(".lean"))
        if "empty" in function.name():
            self.allocated.append(out.numel())
        return out


def make_layer(monkeypatch, grid=(6, 7), text=5, text_first=True, **options):
    monkeypatch.setattr(hybrid, "joined_attention", partial(joined_attention, backend="triton"))
    torch.manual_seed(0)
    layer = HybridAttention(48, 2, 24, window=(3, 4), **options).to(DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    layout, tokens = TokenLayout(text, (grid,), text_first), text + grid[0] * grid[1]
    heads = 2, layer.kv_heads, layer.kv_heads
    return layer, layout, [torch.randn(2, tokens, n, 24, device=DEVICE) for n in heads]


def call(layer, layout, qkv):
    hidden = torch.linspace(-1, 1, 48, device=DEVICE).expand(2, layout.image_length, 48)
    far_query, far_key, gate = layer.far_inputs(hidden, *(layout.split(x)[1] for x in qkv[:2]))
    return layer(*qkv, layout, far_query=far_query, far_key=far_key, gate=gate)


@pytest.mark.parametrize(
    "options, fused",
    [
        ({}, True),
        ({"gate": "token", "temperature": True, "center_keys": True, "stride": (2, 1)}, True),
        ({"text_first": False, "gate": "token", "value_conv": 3}, True),
        ({"text_first": False, "map_rank": 0}, True),
        ({"feature_map": "elu", "projection": 0, "join": "gate", "kv_heads": 1, "map_rank": 0}, True),
        ({"gate": "channel"}, False),
        ({"feature_map": "elu", "projection": 40}, False),
    ],
    ids=str,
)
def test_a_layer_is_joined_in_the_window_s_kernel(options, fused, monkeypatch):
    case = make_layer(monkeypatch, **options)
    with Seen() as seen:
        out = call(*case)
    assert ("hybriddit::joined_attention" in seen.names) == fused
    assert ("hybriddit::linear_output" in seen.names) == (not fused)
    in_place = "value_conv" not in options  # then the image's rows are written where they stay
    assert ("aten::cat" not in seen.names) == in_place
    with torch.enable_grad(), Seen() as seen:
        torch.testing.assert_close(out, call(*case).detach(), atol=2e-5, rtol=2e-5)
    assert "hybriddit::joined_attention" not in seen.names
    case[0].far_only = torch.tensor([True, False], device=DEVICE)
    image = slice(5, None) if case[1].text_first else slice(-5)
    assert not torch.allclose(call(*case)[0, image], out[0, image])
    torch.testing.assert_close(call(*case)[1], out[1], atol=2e-5, rtol=2e-5)


class Part(RowShard):
    """One process's rows, where what the others send is at hand: the whole image's keys, values and sums."""

    def __init__(self, first, count, images, sums):
        self.first, self.count, self.height, self.leads = first, count, images[0].shape[1], first == 0
        self.images, self.sums = images, sums

    def total(self, *tensors):
        return lambda: self.sums

    def largest(self, x):
        raise AssertionError("there is no text")

    def extended(self, images, reach):
        begin, end = reach(self.first, self.count)
        return lambda: tuple(image[:, begin:end] for image in self.images)


@pytest.mark.parametrize(
    "options", [{"gate": "token", "stride": (2, 1)}, {"kv_heads": 1, "feature_map": "elu", "join": "gate"}], ids=str
)
def test_rows_of_a_spread_image_are_joined_in_the_kernel(options, monkeypatch):
    monkeypatch.setattr(spread, "joined_attention", partial(joined_attention, backend="triton"))
    layer, layout, (query, key, value) = make_layer(monkeypatch, (9, 6), text=0, map_rank=0, **options)
    whole, tokens = call(layer, layout, (query, key, value)), 9 * 6
    sums = layer.far(query, layer.for_every_head(key), layer.for_every_head(value), only_sums=True)
    images = [x.unflatten(1, (9, 6)) for x in (key, value)]
    for first, count in ((0, 2), (2, 4), (6, 3)):
        rows = Part(first, count, images, (sums.state * tokens, sums.mean * tokens))
        part = slice(first * 6, (first + count) * 6)
        with Seen() as seen:
            out = call(layer, TokenLayout(0, ((count, 6),), True, rows), [x[:, part] for x in (query, key, value)])
        assert "hybriddit::joined_attention" in seen.names and "hybriddit::linear_output" not in seen.names
        torch.testing.assert_close(out, whole[:, part], atol=2e-5, rtol=2e-5)


def test_near_is_never_allocated():
    near, far, gate, projections = random_inputs((9, 12), 7, 2, 24, 1)
    sums = sum_keys(*far, near[2].flatten(1, 2), feature_map="polynomial", query_projection=projections[0],
                    key_projection=projections[1])  # fmt: skip
    settings = (3, 4), (1, 1), (1, 1), 0.3, "polynomial", 1e-8, True, (7, 0)
    tensors = *near, None, sums.query.view(near[0].shape), *sums[1:4], gate.view(near[0].shape[:4])
    with Seen() as seen:
        out = kernels.joined(*tensors, *settings)
    assert [n for n in seen.allocated if n] == [out.numel()] and not any("clone" in name for name in seen.names)


def test_compile_and_the_operator(monkeypatch):
    layer, _, _ = make_layer(monkeypatch, gate="token")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for grid in ((6, 7), (9, 5), (2, 3)):  # the last is covered by the window
        layout = TokenLayout(5, (grid,), True)
        qkv = [torch.randn(2, 5 + grid[0] * grid[1], 2, 24, device=DEVICE) for _ in range(3)]
        gate = torch.randn(2, grid[0] * grid[1], 2, 1, device=DEVICE)
        torch.testing.assert_close(compiled(*qkv, layout, gate=gate), layer(*qkv, layout, gate=gate))
    assert counters["unique_graphs"] == 1
    near, far, gate, projections = random_inputs((4, 5), 3, 1, 16, 1)
    image, value = near[0].shape, near[2].flatten(1, 2)
    text_mask = torch.tensor([[True, False, True]], device=DEVICE)
    projected = {"query_projection": projections[0], "key_projection": projections[1]}
    for texts, phi in (((*near[3:], text_mask), projected), ((None, None, None), {})):
        sums = sum_keys(*far, value, feature_map="elu", **phi)
        tensors = *near[:3], *texts, far[0].view(image), *sums[1:4]
        case = *tensors, gate.view(image[:4]), [3, 4], [1, 1], [1, 1], 0.3, "elu", 1e-4, True
        check_operator(torch.ops.hybriddit.joined_attention, (*case, [0, 0]))
        # the rows left to be written are not the same in two runs
        checks = "test_schema", "test_faketensor"
        check_operator(torch.ops.hybriddit.joined_attention, (*case, [0, 2]), test_utils=checks)


def test_flops_are_counted():
    near, far, gate, projections = random_inputs((6, 10), 7, 2, 24, 2)
    with FlopCounterMode(display=False) as counted:
        join(near, far, gate, projections, (3, 4))
    product = 2 * 2 * 2 * 24 * (seen_pairs((6, 10), (3, 4), (1, 1)) + 60 * 7)
    tokens, features = 2 * 2 * 60, FEATURE_MAPS["polynomial"].features(4)
    state, output = (2 * tokens * (24 * 4 + features * n) for n in (24, 25))
    assert counted.get_total_flops() == 2 * product + state + output


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(
    "width, feature_map, channels, backend",
    [
        (16, "polynomial", 4, "tiled"),
        (16, "elu", 33, "triton"),
        (16, "hedgehog", None, "triton"),
        (136, "elu", None, "triton"),
    ],
)
def test_what_is_left_to_passes_of_their_own(width, feature_map, channels, backend, joint):
    inputs = random_inputs((6, 7), 0, 1, width, 1, channels=channels)
    with Seen() as seen:
        out = join(*inputs, (3, 4), feature_map=feature_map, joint=joint, backend=backend, text_rows=(0, 5))[:, :-5]
    assert "hybriddit::joined_attention" not in seen.names
    wanted = expected(*inputs, (3, 4), (1, 1), (1, 1), feature_map, joint)
    assert (out.double() - wanted).norm() <= TOLERANCE[out.dtype] * wanted.norm()


def test_what_is_refused():
    near, far, gate, projections = random_inputs((6, 7), 0, 1, 16, 1)
    with pytest.raises(ValueError, match="no gradients"), torch.enable_grad():
        join(near, far, gate, projections, (3, 4))
    with pytest.raises(ValueError, match="over the grid's tokens"):
        join(near, (far[0][:, 1:], far[1]), gate, projections, (3, 4))


@pytest.mark.parametrize("joint, channels", [(True, 4), (False, None)])
def test_a_small_case_is_tried(joint, channels, monkeypatch):
    case = "triton", torch.device(DEVICE), torch.float32, 16, "polynomial" if channels else "elu", channels, joint
    failure = dispatch._joined_failure.__wrapped__  # which keeps what it finds
    assert failure(*case) is None
    row = dispatch.BACKENDS["triton"]
    zero = row._replace(attend_joined=lambda query, *args: torch.zeros_like(query).flatten(1, 2))
    monkeypatch.setitem(dispatch.BACKENDS, "triton", zero)
    assert "wrong" in failure(*case)
