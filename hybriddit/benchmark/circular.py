"""CLEAR's attention (arXiv 2412.16112), for comparison: softmax over a circular window and text, by FlexAttention.

Tokens lie row by row, as in the published model; an image token sees the image tokens at a Euclidean distance below the
radius, text sees everything, and everything sees text.
"""

from __future__ import annotations

import torch

from ..attention.window import seen_pairs
from ..attention.work import Work, attention_work, softmax_flops

BLOCK = 128  # FlexAttention's block size


def circular_block_mask(grid: tuple[int, int], text_length: int, text_first: bool, radius: int, device, block=BLOCK):
    """FlexAttention's BlockMask [S, S] of the circular window, S = text_length + height * width tokens.

    It is made from the blocks' bounding boxes: memory grows with the blocks squared, not with the tokens squared.
    """
    from torch.nn.attention.flex_attention import BlockMask

    width, image = grid[1], grid[0] * grid[1]
    start, total = text_length if text_first else 0, text_length + image

    def seen(batch, head, q, k):
        q, k = q - start, k - start
        rows, columns = q // width - k // width, q % width - k % width
        text = (q < 0) | (q >= image) | (k < 0) | (k >= image)
        return text | (rows * rows + columns * columns < radius * radius)

    first = torch.arange(0, total, block, device=device)
    last = (first + block).clamp(max=total) - 1
    low, high = (first - start).clamp(0, image - 1), (last - start).clamp(0, image - 1)
    has_image = (last >= start) & (first < start + image)
    has_text = (first < start) | (last >= start + image)
    whole = last - first + 1 == block
    top, bottom = low // width, high // width
    one_row = top == bottom
    left, right = torch.where(one_row, low % width, 0), torch.where(one_row, high % width, width - 1)

    def nearest(low, high):
        return torch.maximum(low[None] - high[:, None], low[:, None] - high[None]).clamp(min=0)

    def farthest(low, high):
        return torch.maximum(high[None] - low[:, None], high[:, None] - low[None])

    def pair(combine, flags):
        return combine(flags[:, None], flags[None])

    both = pair(torch.logical_and, has_image)
    text = pair(torch.logical_or, has_text)
    touched = text | (both & (nearest(top, bottom) ** 2 + nearest(left, right) ** 2 < radius**2))
    inside = ~text & (farthest(top, bottom) ** 2 + farthest(left, right) ** 2 < radius**2)
    all_text = pair(torch.logical_or, has_text & ~has_image)
    full = (inside | all_text) & pair(torch.logical_and, whole)
    lists = [_indices(blocks) for blocks in (touched & ~full, full)]
    return BlockMask.from_kv_blocks(*lists[0], *lists[1], BLOCK_SIZE=block, mask_mod=seen, seq_lengths=(total, total))


def _indices(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For bool [Q, K]: each row's number of True [1, 1, Q], and its columns, True first [1, 1, Q, K]; int32."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def circular_pairs(grid: tuple[int, int], radius: int) -> int:
    """Number of pairs of image tokens at a distance below the radius."""
    return seen_pairs(grid, (radius, radius), (1, 1), circle=True)


def circular_work(grid: tuple[int, int], text: int, radius: int, width: int, element_size: int) -> dict[str, Work]:
    """The work of one image, by direction (see `attention_work`); width: heads x head width."""
    image = grid[0] * grid[1]
    elements = (text + image) * width
    pairs = circular_pairs(grid, radius) + image * text + text * (text + image)
    flops = softmax_flops(pairs, width)
    return attention_work(3 * elements, elements, flops, element_size, softmax_outputs=elements)


def compiled_flex():
    """torch's FlexAttention, compiled anew for each size; uncompiled it would compute all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def circular_attention(query, key, value, mask, attend) -> torch.Tensor:
    """Attention under a `circular_block_mask`, [B, S, heads, D]; attend: `compiled_flex()`, or flex_attention."""
    return attend(*(x.transpose(1, 2) for x in (query, key, value)), block_mask=mask).transpose(1, 2)
