"""How much arithmetic a model's attention asks for."""

from __future__ import annotations

from torch import nn

from ..attention import TokenLayout
from .families import family_of


def attention_flops(model: nn.Module, token_layout: TokenLayout) -> dict[str, int]:
    """FLOPs (two per multiply-add) of one forward pass of one image through the layers that hybrid attention replaces.

    Counted from the formulas, projections apart: "dense" as the teacher computes them, "hybrid" as this model does,
    with the query and key maps and, on layers left dense, dense attention. A backend may do more than the formula
    asks for, such as the part of a tile's keys that its mask hides.
    """
    family = family_of(model)
    text, image = token_layout.text_length, token_layout.image_length
    dense = hybrid = 0
    for name, attn in family.attentions(model).items():
        if not family.converts(name):
            continue
        layer_text = 0 if name.endswith(".attn2") else text  # SD3.5's second attention sees the image alone
        width = attn.to_q.out_features
        full = 4 * (layer_text + image) ** 2 * width
        dense += full
        layer = getattr(attn, "hybrid", None)
        if layer is None:
            hybrid += full
            continue
        hybrid += 4 * layer_text * (layer_text + image) * width
        if layer.window is not None:
            near = sum(
                height * columns * min(layer.window[0], height) * min(layer.window[1], columns)
                for height, columns in token_layout.grids
            )
            hybrid += 4 * width * (near + image * layer_text)
        if layer.far:
            keys = image + (layer_text if layer.window is None else 0)
            # phi(k) times v and phi(q) times that state, then both sums of the denominator
            hybrid += 2 * (image + keys) * width * (layer.head_dim + 1)
            rank = layer.map_q.down.out_features
            hybrid += 2 * 2 * image * rank * (attn.to_q.in_features + width)
    return {"dense": dense, "hybrid": hybrid}
