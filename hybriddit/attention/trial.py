"""Try compiled kernels on a small case before their first use: compilers and drivers may fail, or give wrong values."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

# What every Triton kernel here takes.
KERNEL_DTYPES, KERNEL_MAX_WIDTH = (torch.bfloat16, torch.float16, torch.float32), 256

# Largest difference of a backend's result on a small case from plain torch's in float32, relative to the latter's norm.
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 0.01}


def failure_reason(
    run: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
    gradients: bool,
) -> str | None:
    """Why run(*inputs) does not work for random tensors of these shapes on this device, in one line; None if it does.

    Its output and, with `gradients`, the gradients of all inputs are compared with those of reference(*inputs) in
    float32.
    """
    generator = torch.Generator().manual_seed(0)

    def results(function, dtype):
        with torch.enable_grad() if gradients else torch.no_grad():
            inputs = [x.to(device, dtype, copy=True).requires_grad_(gradients) for x in data]
            out = function(*inputs)
            if not gradients:
                return [out]
            weight = torch.linspace(-1, 1, out.numel(), device=device).to(dtype).view(out.shape)
            return [out, *torch.autograd.grad(out, inputs, weight)]

    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        data = [torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes]
        try:
            found = results(run, dtype)
        except Exception as error:  # compilers and drivers may raise anything
            return f"it failed with {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
        for i, (x, expected) in enumerate(zip(found, results(reference, torch.float32), strict=True)):
            # `not` catches NaN too
            if not (x.float() - expected).norm() <= TOLERANCE[dtype] * expected.norm():
                return f"its {'gradient' if i else 'output'} is wrong on this device"
    return None


def kernel_refusal(kernels: Callable[[], ModuleType], device_type: str, dtype: torch.dtype, width: int) -> str | None:
    """Why Triton kernels cannot take tensors of this kind, or None if they can.

    kernels: imports their module, whose INTERPRETED says whether Triton's interpreter runs them. width: of a head.
    """
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if width > KERNEL_MAX_WIDTH:
        return f"its kernels take head widths up to {KERNEL_MAX_WIDTH}, not {width}"
    try:
        interpreted = kernels().INTERPRETED
    except ImportError:
        return "it is not installed"
    if interpreted:
        return None
    if device_type != "cuda":
        return f"it needs a GPU (or TRITON_INTERPRET=1, to try it), and the tensors are on {device_type}"
    missing = triton_requirements()
    return f"it needs {' and '.join(missing)}" if missing else None


def triton_requirements() -> list[str]:
    """What this machine lacks to compile with Triton, in words; empty if it lacks nothing."""
    missing = [] if importlib.util.find_spec("triton") else ["triton (pip install triton)"]
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        missing.append("a C compiler (gcc or clang), which triton calls")
    return missing


@lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Warn, unless this process has given the same warning before."""
    warnings.warn(message, stacklevel=5)
