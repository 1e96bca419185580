"""Benchmark cases of one attention layer: every variant, on random tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import HybridAttention, TokenLayout, neighborhood_attention
from ..attention.work import Work, dense_work
from ..models.family import AttentionShape
from .circular import circular_attention, circular_block_mask, circular_work, compiled_flex
from .measure import Case
from .shapes import is_dense

SDPA = {
    "dense-flash": SDPBackend.FLASH_ATTENTION,
    "dense-cudnn": SDPBackend.CUDNN_ATTENTION,
    "dense-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def device_variants(device: torch.device) -> tuple[str, ...]:
    """The variants that this device can run, in the order of the tables."""
    dense = tuple(SDPA) if device.type == "cuda" else ("dense",)
    return ("hybrid", "window", "linear", *dense, "circular")


def input_bytes(shape: AttentionShape, px: int, dtype: torch.dtype, backward: bool) -> int:
    """Bytes of the inputs that a layer's variants share, with one output and, if `backward`, all gradients."""
    rows, columns = shape.grid(px)
    image = rows * columns
    elements = shape.heads * shape.head_dim * (4 * (image + shape.text) + 2 * image)
    return elements * dtype.itemsize * (2 if backward else 1)


def layer_cases(
    shape: AttentionShape,
    px: int,
    variants: Sequence[str],
    window: int,
    radius: int,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
) -> list[Case]:
    """One case per variant, on random inputs of batch 1 that they share.

    Projections and the query and key maps are not timed: every case starts from q, k, v, and the hybrid case also from
    the far branch's q and k. backward: the inputs need gradients.
    """
    grid = shape.grid(px)
    image = grid[0] * grid[1]
    layout = TokenLayout(shape.text, (grid,), shape.text_first)

    def random(length: int) -> Tensor:
        heads = torch.randn(1, length, shape.heads, shape.head_dim, device=device, dtype=dtype)
        return heads.requires_grad_(backward)

    query, key, value = (random(image + shape.text) for _ in range(3))
    far_query, far_key = random(image), random(image)
    (_, image_query), (text_key, image_key), (text_value, image_value) = (layout.split(x) for x in (query, key, value))
    text = {"text_key": text_key, "text_value": text_value} if shape.text else {}
    gradients: dict[torch.Size, Tensor] = {}

    def hybrid() -> Case:
        layer = _hybrid_layer(shape, window).to(device)
        layer.gate.data.uniform_()
        inputs = [query, key, value, far_query, far_key, layer.gate]
        return case(lambda: layer(query, key, value, layout, far_query=far_query, far_key=far_key), inputs)

    # gradients of the single branches stop at the image tokens: cutting these out of the sequence is not timed
    def near() -> Case:
        inputs = [image_query, image_key, image_value, *text.values()]

        def forward() -> Tensor:
            heads = (x.unflatten(1, grid) for x in inputs[:3])
            return neighborhood_attention(*heads, window=window, **text).flatten(1, 2)

        return case(forward, inputs)

    def linear() -> Case:
        inputs, mixer = [far_query, far_key, image_value], _hybrid_layer(shape, window).to(device).far
        return case(lambda: mixer(*inputs), inputs)

    def dense(backend: SDPBackend | None = None) -> Case:
        def forward() -> Tensor:
            heads = (x.transpose(1, 2) for x in (query, key, value))
            if backend is None:
                return F.scaled_dot_product_attention(*heads).transpose(1, 2)
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(*heads).transpose(1, 2)

        return case(forward, [query, key, value])

    def circular() -> Case:
        attend, mask = compiled_flex(), None

        def forward() -> Tensor:
            nonlocal mask
            if mask is None:  # made once, in the first call, which is not timed
                mask = circular_block_mask(grid, shape.text, shape.text_first, radius, device)
            return circular_attention(query, key, value, mask, attend)

        refusal = "FlexAttention has no backward pass on a CPU" if device.type == "cpu" else None
        return case(forward, [query, key, value], no_backward=refusal)

    def case(forward, inputs: list[Tensor], **kwargs) -> Case:
        return Case("", forward, inputs, gradients=gradients, **kwargs)

    makers = {"hybrid": hybrid, "window": near, "linear": linear, "dense": dense, "circular": circular}
    makers |= {name: lambda backend=backend: dense(backend) for name, backend in SDPA.items()}
    cases = []
    for name in variants:
        made = makers[name]()
        made.name = name
        cases.append(made)
    return cases


def layer_work(
    variant: str, shape: AttentionShape, grid: tuple[int, int], window: int, radius: int, element: int
) -> dict[str, Work]:
    """The least work of each direction, bytes and FLOPs, as the layers count it (see `attention.work`).

    "window" and "linear" are the hybrid layer's branches alone. radius: of the circular window. element: bytes of one
    number. The query and key maps, which no variant runs, are left out.
    """
    layout = TokenLayout(shape.text, (grid,), shape.text_first)
    tokens, width = layout.text_length + layout.image_length, shape.heads * shape.head_dim
    if variant == "circular":
        return circular_work(grid, shape.text, radius, width, element)
    if is_dense(variant):
        return dense_work(tokens, width, element)
    with torch.device("meta"):
        layer = _hybrid_layer(shape, window)
    if variant == "window":
        return layer.near_work(layout, element)
    if variant == "linear":
        return layer.far.work(layout.image_length, layout.image_length, element)
    return layer.work(layout, element)


def _hybrid_layer(shape: AttentionShape, window: int) -> HybridAttention:
    """A hybrid layer of input width 1: its maps are tiny, and not run, as the far queries and keys are given."""
    return HybridAttention(1, shape.heads, shape.head_dim, window=(window, window))
