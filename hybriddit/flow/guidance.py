"""Classifier-free guidance (arXiv 2207.12598) as a wrapper of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .path import check_interval


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    null_labels: Tensor | int,
    scale: float,
    *,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Tensor, Tensor], Tensor]:
    """The model function (x, t) -> null + scale (labelled - null), for a sampler.

    Args:
        model: (x [2 B, C, ...], t [2 B], labels [2 B]) -> prediction like x. It is called once, with the labels in the
            first half of the batch and the null labels in the second.
        labels: [B]. null_labels: the label that stands for none, or [B] of them.
        scale: 1 is no guidance, and costs none.
        channels: guide the first ones only; the rest are predicted with the label. None: all. The published SiT and DiT
            numbers were made with 3 of 4.
        interval: (low, high), guided where low <= t <= high (arXiv 2404.07724); elsewhere the model is called with the
            labels alone, at half the cost.

    Over all channels it is the same field whichever kind the prediction is; over some it depends on the kind.
    Raises ValueError for an interval outside [0, 1] and for batches or channels that do not fit.
    """
    check_interval(interval)
    if channels is not None and channels < 1:
        raise ValueError(f"channels is how many of the first are guided, at least 1, got {channels}")
    null = torch.as_tensor(null_labels, dtype=labels.dtype, device=labels.device)
    if null.ndim and null.shape != labels.shape:
        raise ValueError(f"{len(null)} null labels for {len(labels)} labels")
    null = null.expand_as(labels)
    low, high = interval
    always = low <= 0 and high >= 1

    def function(x: Tensor, t: Tensor) -> Tensor:
        if len(labels) != len(x):
            raise ValueError(f"{len(labels)} labels for a batch of {len(x)}")
        if channels is not None and channels > x.shape[1]:
            raise ValueError(f"cannot guide the first {channels} of {x.shape[1]} channels")
        inside = (t >= low) & (t <= high)
        if scale == 1 or not (always or bool(inside.any())):
            return model(x, t, labels)
        both = model(torch.cat((x, x)), torch.cat((t, t)), torch.cat((labels, null)))
        labelled, unlabelled = both.chunk(2)
        out = unlabelled + scale * (labelled - unlabelled)
        if channels is not None:
            out = torch.cat((out[:, :channels], labelled[:, channels:]), dim=1)
        return out if always else torch.where(inside.view(-1, *[1] * (x.ndim - 1)), out, labelled)

    return function
