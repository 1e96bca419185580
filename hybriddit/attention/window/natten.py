"""Window attention by natten's compiled kernels, on NVIDIA GPUs."""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import WindowCase

# The backend is chosen below this share of dense attention's query-key pairs (estimated from the pairs, unmeasured).
BREAK_EVEN = 0.8


def attend(query, key, value, text_key, text_value, window, stride, dilation, scale) -> Tensor:
    """Compute window attention (see `dispatch.Backend`)."""
    return _attend(query, key, value, text_key, text_value, window, stride, dilation, scale, False)


def attend_with_lse(query, key, value, text_key, text_value, window, stride, dilation, scale) -> tuple[Tensor, Tensor]:
    """The same, and its log-sum-exp [B, H, W, heads], of which natten's kernels drop gradients."""
    return _attend(query, key, value, text_key, text_value, window, stride, dilation, scale, True)


def _attend(query, key, value, text_key, text_value, window, stride, dilation, scale, return_lse):
    import natten

    inputs = [x for x in (query, key, value, text_key, text_value) if x is not None]
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    head_dim = operator.index(query.shape[-1])
    case = query.device, query.dtype, head_dim, gradients
    if torch.compiler.is_compiling():
        from ..tracing import constant

        padding = constant(head_width, *case) - head_dim
    else:
        padding = head_width(*case) - head_dim
    # padding with zero channels changes neither scores nor outputs; the scale is that of the true width
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
        return_lse=return_lse,
    )
    if return_lse:
        return out[0][..., :head_dim], out[1].float()
    return out[..., :head_dim]


def head_width(device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool) -> int:
    """The head width to pad to: one of Hopper's kernels where it is wide enough, else the next multiple of 8."""
    if torch.cuda.get_device_capability(device) == (9, 0) and dtype != torch.float32:
        # Hopper's kernels are worth padding even 72 to 128 (estimated, unmeasured)
        for width in (32, 64, 128) if gradients else (32, 64, 128, 256):
            if head_dim <= width <= 2 * head_dim:
                return width
    return -(-head_dim // 8) * 8


def refusal(case: WindowCase) -> str | None:
    """Why natten cannot do a case, or None."""
    if case.circle:
        return "it has no circular windows"
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


def slower(case: WindowCase) -> str | None:
    """Why dense attention is faster, or None."""
    pairs = case.tokens * (math.prod(case.window) + case.text_length)
    return case.too_much_work(pairs / case.dense_pairs, BREAK_EVEN)
