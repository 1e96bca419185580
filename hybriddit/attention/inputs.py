"""Input checks and dtype rules that the attention functions share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def autocast(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Cast the tensors as autocast does on their device, if it is on; float64 stays as it is."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type) or tensors[0].dtype == torch.float64:
        return tuple(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) for x in tensors)


def check_dtype(tensors: Sequence[Tensor]) -> None:
    """Raises ValueError unless all tensors have one floating-point dtype."""
    dtype = tensors[0].dtype
    for x in tensors:
        if x.dtype != dtype or not dtype.is_floating_point:
            raise ValueError(
                "attention takes floating-point tensors of one dtype, got " + ", ".join(str(x.dtype) for x in tensors)
            )


def check_device(tensors: Sequence[Tensor]) -> None:
    """Raises ValueError unless all tensors are on one device."""
    # plain loops, here and above: on a small grid these checks are a measurable part of the call
    device = tensors[0].device
    for x in tensors:
        if x.device != device:
            devices = ", ".join(str(x.device) for x in tensors)
            raise ValueError(f"attention inputs are on several devices ({devices}): use one device")


def check_mask(name: str, mask: Tensor, key: Tensor) -> None:
    """Raises ValueError unless the mask is bool [B, S] for keys [B, S, heads, D]."""
    if mask.dtype != torch.bool or mask.shape != key.shape[:2]:
        raise ValueError(f"{name} must be bool {tuple(key.shape[:2])}, got {mask.dtype} {shapes(mask)}")


def shapes(*tensors: Tensor) -> str:
    """The tensors' shapes as text, for error messages only: torch.compile cannot print symbolic sizes."""
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tokens of this dtype: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
