"""One attention layer over rows that lie with several processes, against the same layer in one process."""

import math

import pytest
import torch
import torch.distributed as dist
from oracles_of_rows import rows_that_are_seen
from runs import in_processes

from hybriddit.attention import HybridAttention, TokenLayout
from hybriddit.attention.rows import RowShard
from hybriddit.attention.window.rule import axis_mask, key_rows
from hybriddit.parallel.rows import Rows, add_up

WIDTH, HEADS, HEAD_DIM, COLUMNS, TEXT = 12, 4, 8, 3, 5
# settings of a layer, and of its call: text, text_first, masked text, images that see far alone
CASES = [
    ({"window": (3, 2)}, {}),
    ({"window": (4, 3), "gate": "token", "kv_heads": 2}, {"text": 0}),
    ({"window": (9, 3), "gate": "channel", "join": "gate", "center_keys": True}, {"text_first": False, "masked": True}),
    ({"window": (3, 2), "dilation": (3, 2), "feature_map": "elu", "projection": 0}, {"masked": True}),
    ({"window": (4, 2), "stride": (3, 1), "dilation": (2, 1), "value_conv": 5, "rotary": "axial"}, {}),
    ({"window": (20, 2), "temperature": True, "feature_map": "hedgehog", "gate": "token"}, {"far_only": True}),
    ({"window": (3, 2), "mixer": "blocks", "center_keys": True}, {"far_only": True}),
    ({"kind": "linear", "mixer": "blocks", "feature_map": "elu", "kv_heads": 2}, {"masked": True, "text_first": False}),
    ({"kind": "window", "window": (5, 3), "stride": (2, 3)}, {"kv_heads": 1}),
    ({"kind": "linear", "center_keys": True, "value_conv": 3}, {"masked": True}),
    ({"kind": "linear", "kv_heads": 2, "feature_map": "elu", "projection": 0}, {"text": 0}),
    ({"kind": "dense", "kv_heads": 2}, {"masked": True, "text_first": False}),
]


def make_layer(options):
    torch.manual_seed(0)
    layer = HybridAttention(WIDTH, HEADS, HEAD_DIM, **{"map_rank": 3} | options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def make_tensors(layer, height, text):
    """Query, key, value of the whole image, of the text, and the layer's input; and what the output is weighed by."""
    torch.manual_seed(1)
    counts = HEADS, layer.kv_heads, layer.kv_heads
    image = [torch.randn(2, height * COLUMNS, n, HEAD_DIM).double().requires_grad_() for n in counts]
    words = [torch.randn(2, text, n, HEAD_DIM).double().requires_grad_() for n in counts]
    hidden = torch.randn(2, height * COLUMNS, WIDTH).double().requires_grad_()
    weights = torch.randn(2, text + height * COLUMNS, HEADS, HEAD_DIM).double()
    return image, words, hidden, weights


def attend(layer, image, words, hidden, layout, masked=False, far_only=False):
    """The outputs for text and image."""
    mask = None
    if masked and layout.text_length:
        mask = torch.ones(2, layout.text_length, dtype=torch.bool)
        mask[0, 2:] = mask[1, 0] = False
    layer.far_only = torch.tensor([True, False]) if far_only else None
    far_query, far_key, gate = layer.far_inputs(hidden, *image[:2])
    joined = [layout.join(*pair) for pair in zip(words, image, strict=True)]
    out = layer(*joined, layout, far_query=far_query, far_key=far_key, gate=gate, text_mask=mask)
    return layout.split(out)


def compare_with_one(rank, height):
    group = dist.group.WORLD
    for options, call in CASES:
        print(options, call)  # is shown where it fails
        settings = {"masked": call.get("masked", False), "far_only": call.get("far_only", False)}
        layer = make_layer(options)
        image, words, hidden, weights = make_tensors(layer, height, call.get("text", TEXT))
        layout = TokenLayout(words[0].shape[1], ((height, COLUMNS),), call.get("text_first", True))
        text_weights, image_weights = layout.split(weights)
        inputs = [*image, *words, hidden, *layer.parameters()]

        text, out = attend(layer, image, words, hidden, layout, **settings)
        loss = (text * text_weights).sum() + (out * image_weights).sum()
        wanted = torch.autograd.grad(loss, inputs, allow_unused=True)

        rows = Rows(group, height)
        own = layout._replace(grids=((rows.count, COLUMNS),), rows=rows)
        part = slice(rows.first * COLUMNS, (rows.first + rows.count) * COLUMNS)
        for no_grad in (True, False):
            with torch.set_grad_enabled(not no_grad):
                mine = [x[:, part] for x in image], words, hidden[:, part], own
                own_text, own_out = attend(layer, *mine, **settings)
            torch.testing.assert_close(own_text, text)
            torch.testing.assert_close(own_out, out[:, part])
        # the text's gradient is shared out: each process starts with its part of it
        loss = (own_text * text_weights).sum() / dist.get_world_size() + (own_out * image_weights[:, part]).sum()
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
        for one, several in zip(wanted, found, strict=True):
            assert (one is None) == (several is None)
            if one is not None:
                torch.testing.assert_close(add_up(several, group), one)


@pytest.mark.parametrize("count, height", [(2, 11), (3, 11), (4, 7)])
def test_several_processes_are_one(count, height, tmp_path):
    """Uneven rows; windows of 9 and 20 reach over several processes' rows."""
    codes = in_processes(count, compare_with_one, height, output=tmp_path / "said")
    assert codes == [0] * count, (tmp_path / "said.0").read_text()


def test_key_rows_are_those_that_the_windows_hold():
    """And as an axis of their own they give the same windows."""
    for length, window, stride, dilation in [
        (length, window, stride, dilation)
        for length in (1, 2, 7, 12)
        for window in (1, 2, 3, 4, 7, 15)
        for stride in (1, 2, 3)
        for dilation in (1, 2, 5)
        if stride <= window
    ]:
        mask = axis_mask(length, window, stride, dilation)
        for first in range(length):
            for end in {first + 1, first + 3, length} & set(range(first + 1, length + 1)):
                settings = {"window": window, "stride": stride, "dilation": dilation}
                begin, stop = key_rows(first, end - first, height=length, **settings)
                seen = rows_that_are_seen(first, end, length, **settings)
                assert begin <= min(*seen, first) < begin + stride * dilation
                assert stop == max(*seen, end - 1) + 1
                alone = axis_mask(stop - begin, window, stride, dilation)
                assert torch.equal(alone[first - begin : end - begin], mask[first:end, begin:stop])


def test_what_travels_for_a_window_does_not_grow_with_the_rows():
    for rows in (16, 64, 1024):
        begin, end = key_rows(rows, rows, height=4 * rows, window=9)
        assert (rows - begin, end - 2 * rows) == (4, 4)


def test_rows_are_shared_evenly():
    assert issubclass(Rows, RowShard)
    for height, size in ((7, 3), (8, 4), (1024, 7)):
        ends = [height * rank // size for rank in range(size + 1)]
        counts = [end - first for first, end in zip(ends, ends[1:], strict=False)]
        assert sum(counts) == height and max(counts) - min(counts) <= 1 and max(counts) == math.ceil(height / size)
