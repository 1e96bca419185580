"""`attention_flops` against torch's own counter, and against figures worked out by hand."""

import pytest
from tiny_models import flux, make_inputs, run, sd3
from torch.utils.flop_counter import FlopCounterMode

from hybriddit import HybridConfig, hybridize
from hybriddit.attention import TokenLayout
from hybriddit.models.flops import attention_flops


def test_dense_count_is_what_torch_counts():
    model, grid, text = flux(), (6, 5), 7
    with FlopCounterMode(display=False) as counter:
        run(model, make_inputs(model, grid, text=text))
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    hybridize(model, HybridConfig(window=3))
    assert attention_flops(model, TokenLayout(text, (grid,), True))["dense"] == counted > 0


def test_hybrid_count_by_hand():
    # per layer, width 32 in 2 heads of 16, N = 30, T = 7, window 3 x 3 of 6 x 5, rank 2
    text_queries = 4 * 7 * 37 * 32
    near = 4 * 30 * (9 + 7) * 32
    far = 2 * (30 + 30) * 2 * (16 * 4 + 15 * (16 + 1))  # in each head a projection to 4 channels, then 15 features
    maps = 2 * (2 * 30 * 32 * 2 + 2 * 30 * 2 * 32)
    model = hybridize(flux(), HybridConfig(window=3, map_rank=2))
    layout = TokenLayout(7, ((6, 5),), True)
    assert attention_flops(model, layout)["hybrid"] == 2 * (text_queries + near + far + maps)

    window_only = hybridize(flux(), HybridConfig(window=3, linear=False, layers={"single*": "dense"}))
    assert attention_flops(window_only, layout)["hybrid"] == text_queries + near + 4 * 37 * 37 * 32


def test_second_attention_of_sd35_sees_no_text():
    model = hybridize(sd3(dual_attention_layers=(0,)), HybridConfig(window=3, linear=False))
    joint, alone = 4 * (64 + 5) ** 2 * 32, 4 * 64**2 * 32
    assert attention_flops(model, TokenLayout(5, ((8, 8),), False))["dense"] == pytest.approx(2 * joint + alone)
