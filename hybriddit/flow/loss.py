"""Training a model on a path: how times are drawn, and the loss of each prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from .path import (
    PREDICTIONS,
    check_interval,
    check_name,
    coefficients,
    score_factor,
    shift_times,
    target,
    times_like,
    velocity_factor,
)

WEIGHTINGS = ("none", "velocity", "likelihood")
TIME_DISTRIBUTIONS = ("uniform", "logit_normal")
# what the loss may be multiplied by, at most, for an end of time to be left in
LARGEST_WEIGHT = 1e6


def draw_times(
    count: int,
    distribution: str = "uniform",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`count` training times, [count], on `device` (the generator's where none is given).

    Args:
        distribution: "uniform", or "logit_normal": sigmoid(mean + std n), n normal (arXiv 2403.03206; its time runs the
            other way, so that its mean m is -m here: a negative mean draws more noise).
        shift: applied to the drawn times, see `shift_times`.
        interval: (start, end) that [0, 1] is mapped to, see `training_interval`.

    The numbers are drawn on the generator's device, so that they do not depend on `device`. Raises ValueError for an
    unknown distribution, a std or shift that is not positive, and an interval outside [0, 1].
    """
    check_name("distribution of times", distribution, TIME_DISTRIBUTIONS)
    check_interval(interval)
    if count < 0 or not std > 0:
        raise ValueError(f"a count of times is not negative and their std positive, got {count} and {std}")
    options = {"generator": generator, "dtype": dtype, "device": device if generator is None else generator.device}
    if distribution == "uniform":
        t = torch.rand(count, **options)
    else:
        t = torch.sigmoid(mean + std * torch.randn(count, **options))
    start, end = interval
    t = start + (end - start) * shift_times(t, shift)
    return t if device is None else t.to(device)


def training_interval(
    path: str, prediction: str = "velocity", weighting: str = "none", *, eps: float | None = None
) -> tuple[float, float]:
    """The times to train on: [0, 1], less `eps` at an end where the target or its weight grows without bound.

    eps: SiT's by default, 1e-5 on the VP path and 1e-3 on the others.
    """
    check_name("prediction", prediction, PREDICTIONS)
    check_name("weighting", weighting, WEIGHTINGS)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    at = coefficients(path, ends)
    size = _weight(at, "noise" if prediction == "score" else prediction, weighting)
    if prediction == "velocity":
        size = size * at.d_sigma**2
    eps = eps if eps is not None else 1e-5 if path == "vp" else 1e-3
    start, end = (size > LARGEST_WEIGHT).tolist()
    return (eps if start else 0.0, 1 - eps if end else 1.0)


def flow_loss(
    output: Tensor,
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    path: str = "linear",
    *,
    prediction: str = "velocity",
    weighting: str = "none",
) -> Tensor:
    """SiT's loss of each sample: the weighted mean square of prediction - target, [B], in float32 at the least.

    Args:
        output: [B, ...], what the model returned for `interpolate(data, noise, t, path)`. data, noise: [B, ...]. t: [B].
        prediction: "velocity", "score", "noise" or "data". The score is compared as noise: |sigma score + noise|^2.
        weighting: "none": the prediction's own error; "velocity": the error that it makes in the velocity; "likelihood":
            that, divided by g of velocity = (alpha' / alpha) x + g score. The last two (arXiv 2401.08740) give a field
            the same loss whichever way it is predicted.

    Raises ValueError for unknown names and for shapes that differ.
    """
    check_name("prediction", prediction, PREDICTIONS)
    check_name("weighting", weighting, WEIGHTINGS)
    if not output.shape == data.shape == noise.shape:
        raise ValueError(f"output, data and noise differ in shape: {[list(x.shape) for x in (output, data, noise)]}")
    at = coefficients(path, times_like(t, data))
    dtype = torch.promote_types(output.dtype, torch.float32)
    output, data, noise = (x.to(dtype) for x in (output, data, noise))
    if prediction == "score":  # its own target, -noise / sigma, has no bound
        output, prediction = -at.sigma * output, "noise"
    error = output - target(data, noise, t, path, prediction)
    return (_weight(at, prediction, weighting) * error**2).flatten(1).mean(1)


def _weight(at, prediction: str, weighting: str) -> Tensor:
    if weighting == "none":
        return torch.ones_like(at.alpha)
    weight = velocity_factor(at, prediction) ** 2
    return weight if weighting == "velocity" else weight / score_factor(at)
