"""Neighborhood (sliding-window) attention over a 2-D grid, plus text that every query sees: checks and dispatch."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .window_tiled import axis_mask, best_tile, tiled_attention, tiled_cost

BACKENDS = ("auto", "natten", "flex", "tiled", "dense")
NATTEN_WIDTHS = (32, 64, 128, 256)
# Tiles pay below this share of the pairs of dense attention (measured on a CPU).
TILED_SHARE = 0.65
# Dense masks up to this size are kept: building one costs as much as attention with it on a small grid.
CACHED_MASK_ELEMENTS = 2**21


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    scale: float | None = None,
    text_key: Tensor | None = None,
    text_value: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of every token to the window around it and to all text.

    natten's semantics per axis: the window shifts inwards at borders, and a group of `stride` tokens shares one. With
    dilation d each of the d residue classes of an axis is its own axis. A window larger than its axis is clamped to
    it, then the stride to the window.

    Args:
        query, key, value: [B, H, W, heads, D].
        window, stride, dilation: int or (rows, columns), in tokens.
        scale: of the scores; None is D ** -0.5.
        text_key, text_value: [B, S, heads, D], both or neither.
        backend: "tiled" and "dense" run on any device; "natten" wants its compiled kernels and a GPU, and takes no
            window of 1 and none that has to be clamped; "flex" is torch's FlexAttention, compiled on a GPU and
            without gradients on a CPU. "auto" takes the fastest that can do the case.

    Returns [B, H, W, heads, D]. Raises ValueError for inputs that do not fit together, a window or dilation below 1, a
    stride below 1 or above the window, and a backend that is unknown or cannot do the case.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown window attention backend {backend!r}: use one of {', '.join(BACKENDS)}")
    window, stride, dilation = _pair("window", window), _pair("stride", stride), _pair("dilation", dilation)
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"stride {stride} is larger than window {window}: tokens would be skipped; lower the stride")
    query, key, value, text_key, text_value = _cast_and_check(query, key, value, text_key, text_value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grid = tuple(query.shape[1:3])
    if query.numel() == 0:
        return F.scaled_dot_product_attention(query, key, value)  # nothing to attend to, but a graph to keep
    window = min(window[0], grid[0]), min(window[1], grid[1])
    stride = min(stride[0], window[0]), min(stride[1], window[1])
    if backend == "auto":
        backend = _choose(query, grid, window, stride, dilation)
    if backend == "natten":
        return _natten(query, key, value, text_key, text_value, window, stride, dilation, scale)
    if backend == "flex":
        return _flex(query, key, value, text_key, text_value, window, stride, dilation, scale)
    if backend == "dense":
        return _dense(query, key, value, text_key, text_value, window, stride, dilation, scale)
    settings = (list(x) for x in (window, stride, dilation))
    return tiled_attention(query, key, value, text_key, text_value, *settings, scale)[0]


def _pair(name, size):
    if type(size) is int and size >= 1:
        return size, size
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in pair):
        raise ValueError(f"{name} must be an int of at least 1 or two of them (rows, columns), got {size!r}")
    return pair


def _cast_and_check(query, key, value, text_key, text_value):
    if (text_key is None) != (text_value is None):
        raise ValueError("text_key and text_value come together: pass both or neither")
    image, text = (query, key, value), () if text_key is None else (text_key, text_value)
    if query.ndim != 5 or not query.shape == key.shape == value.shape:
        raise ValueError(f"query, key and value must share one shape [B, H, W, heads, D], got {_shapes(*image)}")
    if text:
        batch, _, _, heads, head_dim = query.shape
        if (
            text_key.ndim != 4
            or text_key.shape != text_value.shape
            or (text_key.shape[0], *text_key.shape[2:]) != (batch, heads, head_dim)
        ):
            raise ValueError(
                f"text_key and text_value must be [{batch}, S, {heads}, {head_dim}] here, got {_shapes(*text)}"
            )
    # plain loops: on a small grid these checks are a measurable part of the call
    if any(x.device != query.device for x in image + text):
        raise ValueError(f"attention inputs are on several devices ({', '.join(str(x.device) for x in image + text)})")
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        image, text = (tuple(x.to(dtype) for x in tensors) for tensors in (image, text))
    if any(x.dtype != image[0].dtype for x in image + text) or not image[0].is_floating_point():
        raise ValueError(
            "attention takes floating-point tensors of one dtype, got " + ", ".join(str(x.dtype) for x in image + text)
        )
    # text of no tokens is no text
    return *image, *(text if text and text[0].shape[1] else (None, None))


def _shapes(*tensors) -> str:
    # only for messages: torch.compile cannot print sizes it keeps symbolic
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _choose(query, grid, window, stride, dilation) -> str:
    if _covers(grid, window, dilation):
        return "dense"
    if query.is_cuda:
        return "natten" if _natten_refusal(query, grid, window, dilation) is None else "tiled"
    if torch.compiler.is_compiling():
        return "tiled"  # the estimate would be traced, and one graph may serve several sizes
    return "tiled" if _tiles_pay(tuple(query.shape), window, stride, dilation) else "dense"


@lru_cache(maxsize=256)
def _tiles_pay(shape, window, stride, dilation) -> bool:
    batch, height, width, heads, head_dim = shape
    dense_cost = batch * heads * head_dim / 64 * (height * width) ** 2
    tile = best_tile(shape, window, stride, dilation)
    return tiled_cost(shape, window, stride, dilation, tile) < TILED_SHARE * dense_cost


def _covers(grid, window, dilation) -> bool:
    return window == grid and all(d == 1 or n == 1 for n, d in zip(grid, dilation, strict=True))


def _dense(query, key, value, text_key, text_value, window, stride, dilation, scale):
    grid, text_length = tuple(query.shape[1:3]), 0 if text_key is None else text_key.shape[1]
    mask = None
    if not _covers(grid, window, dilation):
        # under torch.compile and fake tensors the mask is part of the graph; a kept one would leak into it
        keep = type(query) is Tensor and not torch.compiler.is_compiling()
        keep = keep and (grid[0] * grid[1]) ** 2 <= CACHED_MASK_ELEMENTS
        make_mask = _kept_mask if keep else _dense_mask
        mask = make_mask(grid, window, stride, dilation, text_length, query.dtype, query.device)
    query, key, value = _join_text(query, key, value, text_key, text_value)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).unflatten(1, grid)


def _join_text(query, key, value, text_key, text_value):
    """Image [B, H, W, heads, D] and text [B, S, heads, D] -> query [B, heads, N, D], key and value [B, heads, N + S, D]."""
    query, key, value = (x.flatten(1, 2) for x in (query, key, value))
    if text_key is not None:
        key, value = torch.cat((key, text_key), dim=1), torch.cat((value, text_value), dim=1)
    return tuple(x.transpose(1, 2) for x in (query, key, value))


def _dense_mask(grid, window, stride, dilation, text_length, dtype, device) -> Tensor:
    """Additive [N, N + text]."""
    rows, columns = (axis_mask(*axis).to(device) for axis in zip(grid, window, stride, dilation, strict=True))
    seen = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)
    return F.pad(mask, (0, text_length))


@lru_cache(maxsize=16)
def _kept_mask(*case) -> Tensor:
    with torch.inference_mode(False):  # a mask made in inference mode could not be saved for a later backward
        return _dense_mask(*case)


def _natten_refusal(query, grid, window, dilation) -> str | None:
    """Why natten cannot do this case, or None."""
    try:
        import natten
    except ImportError:
        return "it is not installed"
    if not natten.HAS_LIBNATTEN:
        return "it is installed without its compiled kernels"
    if not query.is_cuda:
        return f"it needs a GPU, and the tensors are on {query.device}"
    if query.dtype == torch.float64:
        return "it has no float64 kernels"
    if query.shape[-1] > NATTEN_WIDTHS[-1]:
        return f"it has no kernels for head width {query.shape[-1]}"
    if min(window) == 1:
        return "it takes no window of 1"
    if any(w * d > n for w, d, n in zip(window, dilation, grid, strict=True)):
        return f"window {window} times dilation {dilation} exceeds the grid {grid}"
    return None


def _natten(query, key, value, text_key, text_value, window, stride, dilation, scale):
    refusal = _natten_refusal(query, tuple(query.shape[1:3]), window, dilation)
    if refusal:
        raise ValueError(f'backend "natten" cannot run this: {refusal}; use backend "auto"')
    import natten

    head_dim = query.shape[-1]
    # zero channels change neither scores nor outputs, and the scale is the true width's
    padding = next(width for width in NATTEN_WIDTHS if width >= head_dim) - head_dim
    query, key, value, text_key, text_value = (
        None if x is None else F.pad(x, (0, padding)).contiguous() for x in (query, key, value, text_key, text_value)
    )
    out = natten.na2d(
        query,
        key,
        value,
        kernel_size=window,
        stride=stride,
        dilation=dilation,
        scale=scale,
        additional_keys=text_key,
        additional_values=text_value,
    )
    return out[..., :head_dim]


def _flex(query, key, value, text_key, text_value, window, stride, dilation, scale):
    from torch.nn.attention.flex_attention import flex_attention

    grid, text_length = tuple(query.shape[1:3]), 0 if text_key is None else text_key.shape[1]
    inputs = [x for x in (query, key, value, text_key, text_value) if x is not None]
    if not query.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise ValueError('backend "flex" has no gradients on a CPU: use backend "auto"')
    query, key, value = _join_text(query, key, value, text_key, text_value)
    if not query.is_cuda:
        query, key, value = query.detach(), key.detach(), value.detach()  # refused even where no gradient is recorded
    mask = _flex_mask(grid, window, stride, dilation, text_length, query.device)
    attend = _compiled_flex() if query.is_cuda else flex_attention
    out = attend(query, key, value, block_mask=mask, scale=scale)
    return out.transpose(1, 2).unflatten(1, grid)


@lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=16)
def _flex_mask(grid, window, stride, dilation, text_length, device):
    from torch.nn.attention.flex_attention import create_block_mask

    width, tokens = grid[1], grid[0] * grid[1]
    rows, columns = (axis_mask(*axis).to(device) for axis in zip(grid, window, stride, dilation, strict=True))

    def seen(batch, head, q, k):
        image = k.clamp(max=tokens - 1)
        near = rows[q // width, image // width] & columns[q % width, image % width]
        return near | (k >= tokens)

    return create_block_mask(seen, None, None, tokens, tokens + text_length, device=device)
