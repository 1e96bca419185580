"""Classifier-free guidance (arXiv 2207.12598): a conditional model becomes a guided one."""

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
    """A guided model function for a sampler: (x, t) -> unlabelled + scale (labelled - unlabelled).

    Args:
        model: (x [2 B, C, ...], t [2 B], labels [2 B]) -> prediction, shaped as x. One call predicts both: the first
            half of the batch has the labels, the second half the null labels.
        labels: [B] class labels. null_labels: the label that means "no label", or [B] of them.
        scale: guidance scale; at 1 the model is called with the labels alone, at half the cost.
        channels: guide only the first so many channels; the rest are predicted with the label. None guides all. The
            published SiT and DiT numbers were made with 3 of 4.
        interval: (low, high), the times that are guided, ends included (arXiv 2404.07724); at other times the model is
            called with the labels alone.

    If all channels are guided, guiding velocities, scores, noise or data gives the same samples; if only some are, it
    does not. Raises ValueError for an interval outside [0, 1] and for batches or channels that do not fit.
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
