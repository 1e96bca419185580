"""Neighborhood (sliding-window) attention over a 2-D grid, plus text that every query sees: checks and dispatch."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .trial import TOLERANCE, triton_requirements, trouble, warn_once
from .window_flex import BLOCK, TILES, best_layout, flex_window_attention, visited_blocks
from .window_tiled import axis_mask, best_tile, tiled_attention, tiled_cost

# A backend is taken where its work is below this share of the query-key pairs of dense attention; above it, dense
# attention under a mask is. The CPU's is measured; those of GPUs are estimated from the pairs computed, unmeasured.
BREAK_EVEN = {
    "cpu": {"tiled": 0.65},
    "gpu": {"natten": 0.8, "flex": 0.8, "tiled": 0.5},
}
# A mask of more elements than this is not made on account of speed alone.
MASK_ELEMENTS = 2**26
# Up to here torch's dense attention in bfloat16 is slower on a CPU than in float32, backward by a quarter.
FLOAT32_TOKENS = 512
# The score of a padded text key, times the scale: its exponential is 0 in every dtype, whatever the others' scores.
PADDED_SCORE = 1e4
# Head widths that the kernels load whole; what hides padded text widens a head to the next one.
HEAD_DIM_MULTIPLE = 8
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
    text_mask: Tensor | None = None,
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
        text_mask: bool [B, S], False for padded text, which no query sees; None sees all text.
        backend: "tiled" and "dense" run on any device; "natten" wants its compiled kernels and an NVIDIA GPU, and takes
            no window of 1 and none that has to be clamped; "flex" is torch's FlexAttention, compiled on a GPU (it wants
            Triton and a C compiler), uncompiled and without gradients on a CPU. "auto" takes the one that should be
            fastest of those that can do the case. Its first use of natten or flex tries a small case; if that fails,
            it warns and takes another.

    Returns [B, H, W, heads, D]. Raises ValueError for inputs that do not fit together, a window or dilation below 1, a
    stride below 1 or above the window, and a backend that is unknown or cannot do the case.

    Neighborhood attention, and windows with a stride: arXiv 2204.07143, 2504.16922. FlexAttention: arXiv 2412.05496.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown window attention backend {backend!r}: use one of auto, {', '.join(BACKENDS)}")
    window, stride, dilation = _pair("window", window), _pair("stride", stride), _pair("dilation", dilation)
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"stride {stride} is larger than window {window}: tokens would be skipped; lower the stride")
    query, key, value, text_key, text_value = _cast_and_check(query, key, value, text_key, text_value)
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if text_mask is not None:
        _check_text_mask(text_mask, text_key)
        query, key, value, text_key, text_value = _hide_padded_text(
            query, key, value, text_key, text_value, text_mask, scale
        )
    if query.numel() == 0:
        return F.scaled_dot_product_attention(query, key, value)  # nothing to attend to, but a graph to keep
    # plain ints: torch.compile may hold sizes as symbols, and what runs is chosen for one grid
    grid, heads = tuple(map(operator.index, query.shape[1:3])), operator.index(query.shape[3])
    inputs = (query, key, value) if text_key is None else (query, key, value, text_key, text_value)
    case = (
        query.device,
        query.dtype,
        grid,
        heads,
        operator.index(query.shape[4]),
        (min(window[0], grid[0]), min(window[1], grid[1])),
        (min(stride[0], window[0], grid[0]), min(stride[1], window[1], grid[1])),
        dilation,
        0 if text_key is None else operator.index(text_key.shape[1]),
        torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
    )
    if torch.compiler.is_compiling():
        from .tracing import constant

        backend = constant(_take, backend, *case)
    else:
        backend = _take(backend, *case)
    attend = BACKENDS[backend].attend
    out = attend(query, key, value, text_key, text_value, *case[5:8], scale)
    return out if text_mask is None else out[..., :head_dim]


def _check_text_mask(text_mask: Tensor, text_key: Tensor | None) -> None:
    if text_key is None:
        raise ValueError("text_mask needs text_key and text_value")
    if text_mask.dtype != torch.bool or text_mask.shape != text_key.shape[:2]:
        wanted = tuple(text_key.shape[:2])
        raise ValueError(f"text_mask must be bool {wanted}, got {text_mask.dtype} {_shapes(text_mask)}")
    if text_mask.device != text_key.device:
        raise ValueError(f"attention inputs are on several devices ({text_key.device}, {text_mask.device})")


def _hide_padded_text(query, key, value, text_key, text_value, text_mask, scale):
    """The inputs with further channels, by which padded text keys have weights of exactly 0 and the rest are unchanged.

    No backend takes a mask: in the first added channel queries are 1 and keys 0, but padded text keys -c, which makes
    their scores -c * scale. That is far enough below any score of the image's own keys for its exponential to be 0.
    """
    head_dim = operator.index(query.shape[-1])
    channels = HEAD_DIM_MULTIPLE - head_dim % HEAD_DIM_MULTIPLE
    # float16 ends at 65504: half of it leaves room for a sum
    low = min(PADDED_SCORE / scale, torch.finfo(query.dtype).max / 2)
    padded = ~text_mask[:, :, None, None]  # [B, S, 1, 1]
    query = torch.cat((query, _channels(query, channels, 1.0)), dim=-1)
    key, value, text_value = (F.pad(x, (0, channels)) for x in (key, value, text_value))
    extra = _channels(text_key, channels, -low).masked_fill(~padded, 0)
    text_key = torch.cat((text_key.masked_fill(padded, 0), extra), dim=-1)
    return query, key, value, text_key, text_value


def _channels(x: Tensor, count: int, first: float) -> Tensor:
    """[..., D] -> [..., count], the first of them `first` and the others 0."""
    return F.pad(x.new_full((*x.shape[:-1], 1), first), (0, count - 1))


def seen_pairs(grid: tuple[int, int], window: tuple[int, int], dilation: tuple[int, int]) -> int:
    """Pairs of a query and a key of its window, on a grid."""
    pairs = 1
    for length, size, step in zip(grid, window, dilation, strict=True):
        classes = [len(range(residue, length, step)) for residue in range(step)]
        pairs *= sum(n * min(size, n) for n in classes)
    return pairs


def aligned_window(
    grid: tuple[int, int], cost: float, *, tile: tuple[int, int] | None = None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """A window and stride whose borders are those of tiles: blocks of keys are seen wholly or not at all, none masked.

    With a tile of t positions along an axis of n = c t, the window is b t and the stride a t, a = 1 where b is odd and
    2 where it is even: windows then start at multiples of t (generalized neighborhood attention, arXiv 2504.16922).
    Every query sees (b1 t1) (b2 t2) keys, the share b1 b2 / (c1 c2) of dense attention's; the window returned is the
    one nearest to a square of `cost` times all keys that is not larger.

    Args:
        grid: (rows, columns) in tokens.
        cost: the share of dense attention's query-key pairs to stay within, above 0, at most 1; text apart.
        tile: (rows, columns); None takes the best of the tiles of 128 tokens that the "flex" backend uses.

    Returns (window, stride), each (rows, columns). Raises ValueError where no tile divides the grid, and where one tile
    is more than `cost`.
    """
    grid = _pair("grid", grid)
    if not 0 < cost <= 1:
        raise ValueError(f"cost must be above 0 and at most 1, got {cost!r}")
    tiles = TILES if tile is None else (_pair("tile", tile),)
    tiles = [tile for tile in tiles if all(n % t == 0 for n, t in zip(grid, tile, strict=True))]
    if not tiles:
        wanted = f"{tile} tokens" if tile else f"{BLOCK} tokens (as 8 x 16)"
        raise ValueError(f"no tile of {wanted} divides the grid {grid}")
    budget = cost * math.prod(grid) * (1 + 1e-9)  # a share such as 9 / 64 is meant exactly
    side = math.sqrt(budget)
    # a square cut by one axis of the grid may be longer on the other
    wanted = [min(n, max(side, budget / other)) for n, other in zip(grid, reversed(grid), strict=True)]
    windows = [
        ((b1 * t1, b2 * t2), (t1, t2))
        for t1, t2 in tiles
        for b1 in range(1, grid[0] // t1 + 1)
        for b2 in range(1, grid[1] // t2 + 1)
        if b1 * t1 * b2 * t2 <= budget
    ]
    if not windows:
        least = min(map(math.prod, tiles)) / math.prod(grid)
        raise ValueError(f"cost {cost:g} is below that of one tile, {least:.4g}")

    def distance(window):
        return sum(abs(math.log(size / goal)) for size, goal in zip(window[0], wanted, strict=True))

    window, tile = min(windows, key=distance)
    return window, tuple(t if w // t % 2 else 2 * t for w, t in zip(window, tile, strict=True))


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


class WindowCase(NamedTuple):
    """What decides which backend runs: sizes in tokens, pairs as (rows, columns), window and stride within the grid."""

    device: torch.device
    dtype: torch.dtype
    grid: tuple[int, int]
    heads: int
    head_dim: int
    window: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    text_length: int = 0
    gradients: bool = False


class Choice(NamedTuple):
    """The backend that runs, why, and (name, reason) of those before it in BACKENDS that do not."""

    backend: str
    reason: str
    passed_over: tuple[tuple[str, str], ...]


class Backend(NamedTuple):
    """attend(query, key, value, text_key, text_value, window, stride, dilation, scale), why it cannot do a case or None,
    why another is faster or None, and whether its first use is tried on a small case."""

    attend: Callable[..., Tensor]
    refusal: Callable[[WindowCase], str | None]
    slower: Callable[[WindowCase], str | None]
    tried: bool = False


def choose_backend(case: WindowCase, *, tried: bool = False) -> Choice:
    """What `neighborhood_attention` takes for a case with backend "auto"; `tried` also runs a backend's small case."""
    if _covers(case.grid, case.window, case.dilation):
        return Choice("dense", "the window covers the grid", ())
    passed_over = []
    for name, backend in BACKENDS.items():
        reason = backend.refusal(case) or backend.slower(case)
        if reason is None and tried and backend.tried and _on_gpu(case):
            reason = _trouble(name, case.device, case.dtype, case.head_dim, case.gradients)
            if reason:
                warn_once(f"window attention does not use {name}: {reason}")
        if reason is None:
            break
        passed_over.append((name, reason))
    return Choice(name, _why(name, case), tuple(passed_over))


def _why(name: str, case: WindowCase) -> str:
    if name == "dense":
        return "no other backend would be faster on so small a grid or so large a window"
    return "the fastest that can run here" if _on_gpu(case) else "the fastest on a CPU"


def _take(backend: str, *case) -> str:
    """The name of the backend to run. ValueError where a named one cannot."""
    return _taken(backend, WindowCase(*case))


@lru_cache(maxsize=512)
def _taken(backend: str, case: WindowCase) -> str:
    if backend == "auto":
        return choose_backend(case, tried=True).backend
    row = BACKENDS[backend]
    reason = row.refusal(case)
    if reason is None and row.tried and _on_gpu(case):
        reason = _trouble(backend, case.device, case.dtype, case.head_dim, case.gradients)
    if reason:
        raise ValueError(f'backend "{backend}" cannot run this: {reason}; use backend "auto"')
    return backend


@lru_cache(maxsize=64)
def _trouble(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool) -> str | None:
    """What is wrong with a small case of a backend, compared with the tiles; None if nothing."""
    settings = (7, 9), (1, 1), (1, 1), head_dim**-0.5
    shapes = [(1, 20, 36, 2, head_dim)] * 3 + [(1, 5, 2, head_dim)] * 2
    return trouble(
        lambda *inputs: BACKENDS[name].attend(*inputs, *settings),
        lambda *inputs: _tiled(*inputs, *settings),
        shapes,
        device,
        dtype,
        gradients,
    )


def _on_gpu(case: WindowCase) -> bool:
    return case.device.type != "cpu"


def _too_much_work(name: str, case: WindowCase, share: float) -> str | None:
    """Why dense attention is faster, for a backend with this share of dense attention's work."""
    limit = BREAK_EVEN["gpu" if _on_gpu(case) else "cpu"][name]
    if share < limit or math.prod(case.grid) ** 2 > MASK_ELEMENTS:
        return None
    return f"it would do {share:.2f} of dense attention's work, and pays below {limit}"


def _dense_pairs(case: WindowCase) -> int:
    tokens = math.prod(case.grid)
    return tokens * (tokens + case.text_length)


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
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu" and math.prod(grid) <= FLOAT32_TOKENS:
        query, key, value = query.float(), key.float(), value.float()
        mask = None if mask is None else mask.float()
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).to(dtype)
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


def _natten_refusal(case: WindowCase) -> str | None:
    if case.device.type != "cuda" or torch.version.hip:
        return f"it needs an NVIDIA GPU, and the tensors are on {case.device}"
    try:
        import natten
    except (ImportError, OSError) as error:  # OSError: built for another torch
        return "it is not installed" if isinstance(error, ModuleNotFoundError) else f"it cannot be imported ({error})"
    if not natten.HAS_LIBNATTEN:
        return "it is installed without its compiled kernels"
    if case.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it has no {case.dtype} kernels"
    if min(case.window) == 1:
        return "it takes no window of 1"
    if any(w * d > n for w, d, n in zip(case.window, case.dilation, case.grid, strict=True)):
        return f"window {case.window} times dilation {case.dilation} exceeds the grid {case.grid}"
    return None


def _natten_slower(case: WindowCase) -> str | None:
    pairs = math.prod(case.grid) * (math.prod(case.window) + case.text_length)
    return _too_much_work("natten", case, pairs / _dense_pairs(case))


def _natten_width(device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool) -> int:
    """The head width to pad to: that of Hopper's kernels where there is one, else the next multiple of 8."""
    if torch.cuda.get_device_capability(device) == (9, 0) and dtype != torch.float32:
        # estimated, unmeasured: they are worth the padding of 72 to 128
        for width in (32, 64, 128) if gradients else (32, 64, 128, 256):
            if head_dim <= width <= 2 * head_dim:
                return width
    return -(-head_dim // 8) * 8


def _natten(query, key, value, text_key, text_value, window, stride, dilation, scale):
    import natten

    inputs = [x for x in (query, key, value, text_key, text_value) if x is not None]
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    head_dim = operator.index(query.shape[-1])
    case = query.device, query.dtype, head_dim, gradients
    if torch.compiler.is_compiling():
        from .tracing import constant

        padding = constant(_natten_width, *case) - head_dim
    else:
        padding = _natten_width(*case) - head_dim
    # zero channels change neither scores nor outputs, and the scale is the true width's
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


def _flex_refusal(case: WindowCase) -> str | None:
    if case.device.type == "cpu":
        return "it has no gradients on a CPU" if case.gradients else None
    if case.device.type not in ("cuda", "xpu"):
        return f"it does not run on {case.device.type}"
    if case.dtype not in TOLERANCE:
        return f"it has no {case.dtype} kernels"
    if case.head_dim > 256:
        return f"it has no kernels for head width {case.head_dim}"
    missing = triton_requirements()
    return f"it needs {' and '.join(missing)}" if missing else None


def _flex_slower(case: WindowCase) -> str | None:
    if not _on_gpu(case):
        return "on a CPU it is not compiled"
    layout = best_layout(case.grid, case.window, case.stride, case.dilation, case.text_length)
    return _too_much_work("flex", case, visited_blocks(layout)[0] * BLOCK**2 / _dense_pairs(case))


def _tiled_slower(case: WindowCase) -> str | None:
    shape = 1, *case.grid, case.heads, case.head_dim
    settings = case.window, case.stride, case.dilation
    dense = case.heads * case.head_dim / 64 * math.prod(case.grid) ** 2  # by the cost model of a CPU, as the tiles'
    return _too_much_work("tiled", case, tiled_cost(shape, *settings, best_tile(shape, *settings)) / dense)


def _tiled(query, key, value, text_key, text_value, window, stride, dilation, scale):
    settings = (list(x) for x in (window, stride, dilation))
    return tiled_attention(query, key, value, text_key, text_value, *settings, scale)[0]


def _none(case: WindowCase) -> None:
    return None


# Fastest first.
BACKENDS = {
    "natten": Backend(_natten, _natten_refusal, _natten_slower, tried=True),
    "flex": Backend(flex_window_attention, _flex_refusal, _flex_slower, tried=True),
    "tiled": Backend(_tiled, _none, _tiled_slower),
    "dense": Backend(_dense, _none, _none),
}
