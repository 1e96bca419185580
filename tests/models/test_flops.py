"""`attention_flops` against torch's own counter, and against figures worked out by hand."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from hybriddit import HybridConfig, hybridize
from hybriddit.attention import TokenLayout
from hybriddit.models.flops import attention_flops


def tiny_flux():
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )


def test_dense_count_is_what_torch_counts():
    model, grid, text = tiny_flux(), (6, 5), 7
    ids = torch.tensor([[0, row, column] for row in range(grid[0]) for column in range(grid[1])]).float()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            hidden_states=torch.randn(1, 30, 4),
            encoder_hidden_states=torch.randn(1, text, 8),
            pooled_projections=torch.randn(1, 8),
            timestep=torch.tensor([0.5]),
            img_ids=ids,
            txt_ids=torch.zeros(text, 3),
        )
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    hybridize(model, HybridConfig(window=3))
    assert attention_flops(model, TokenLayout(text, (grid,), True))["dense"] == counted > 0


def test_hybrid_count_by_hand():
    # per layer, width 32 in 2 heads of 16, N = 30, T = 7, window 3 x 3 of 6 x 5, rank 2
    text_queries = 4 * 7 * 37 * 32
    near = 4 * 30 * (9 + 7) * 32
    far = 2 * (30 + 30) * 32 * (16 + 1)
    maps = 2 * (2 * 30 * 32 * 2 + 2 * 30 * 2 * 32)
    model = hybridize(tiny_flux(), HybridConfig(window=3, map_rank=2))
    layout = TokenLayout(7, ((6, 5),), True)
    assert attention_flops(model, layout)["hybrid"] == 2 * (text_queries + near + far + maps)

    window_only = hybridize(tiny_flux(), HybridConfig(window=3, linear=False, layers={"single*": "dense"}))
    assert attention_flops(window_only, layout)["hybrid"] == text_queries + near + 4 * 37 * 37 * 32


def test_second_attention_of_sd35_sees_no_text():
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        dual_attention_layers=(0,),
    )
    hybridize(model, HybridConfig(window=3, linear=False))
    joint, alone = 4 * (64 + 5) ** 2 * 16, 4 * 64**2 * 16
    assert attention_flops(model, TokenLayout(5, ((8, 8),), False))["dense"] == pytest.approx(2 * joint + alone)
