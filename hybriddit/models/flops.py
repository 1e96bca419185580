"""FLOPs of a model's attention, summed over what its layers count."""

from __future__ import annotations

from torch import nn

from ..attention import TokenLayout
from ..attention.hybrid import HybridAttention
from ..attention.work import dense_flops
from .family import family_of


def attention_flops(model: nn.Module, token_layout: TokenLayout) -> dict[str, int]:
    """FLOPs (two per multiply-add) of one forward pass of one image through the layers that hybrid attention replaces.

    Counted from the formulas, without projections: "dense" as the teacher computes these layers, "hybrid" as this model
    does, with the query and key maps and with dense attention on layers left dense. A backend may do more than the
    formula, such as scores of keys that its mask then hides.
    """
    family = family_of(model)
    dense = hybrid = 0
    for name, attn in family.attentions(model).items():
        if not family.converts(name):
            continue
        layout, shape = family.layer_layout(model, name, token_layout), family.layer_shape(attn)
        full = dense_flops(layout.text_length + layout.image_length, shape.heads * shape.head_dim)
        dense += full
        layer = getattr(attn, "hybrid", None)
        hybrid += full if layer is None else layer.flops(layout)
    return {"dense": dense, "hybrid": hybrid}


def sit_flops(model: nn.Module, grid: tuple[int, int]) -> int:
    """FLOPs (two per multiply-add) of one forward pass of one image of `grid` tokens through a SiTTransformer2DModel.

    Counted from the formulas; sums, norms and activations are left out. Training takes three times as many.
    """
    layout = TokenLayout(0, (grid,), text_first=False)
    tokens, flops = grid[0] * grid[1], 0
    for name, module in model.named_modules():
        if isinstance(module, HybridAttention):
            flops += module.flops(layout)
        elif isinstance(module, nn.Linear) and ".hybrid.map_" not in name:  # the layer has counted its maps
            once = "modulation" in name or "time_embed" in name  # on the conditioning, not on every token
            flops += 2 * module.weight.numel() * (1 if once else tokens)
        elif isinstance(module, nn.Conv2d):
            flops += 2 * module.weight.numel() * tokens
    return flops
