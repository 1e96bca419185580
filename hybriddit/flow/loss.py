"""Training by flow matching: random times, and the loss for each kind of prediction."""

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
# training leaves out the ends of the time interval where the loss is multiplied by more than this
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
    """Draw random training times, [count], on `device` (None: the generator's device).

    Args:
        distribution: "uniform", or "logit_normal": sigmoid(mean + std n) with n standard normal (arXiv 2403.03206). A
            negative mean draws times closer to noise; time runs the other way in that paper, so its means have the
            opposite sign.
        shift: moves the drawn times towards noise, see `shift_times`.
        interval: (start, end), the times that 0 and 1 are mapped to, see `training_interval`.

    The numbers are drawn on the generator's device, so they are the same whatever `device` is. Raises ValueError for an
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
    """The interval of training times: [0, 1], shortened by `eps` where the target or its weight is unbounded.

    eps: None takes SiT's values, 1e-5 on the VP path and 1e-3 on the others.
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
    """SiT's loss for each sample, [B]: weighted mean squared error of the prediction, in float32 or wider.

    Args:
        output: [B, ...], the model's output for `interpolate(data, noise, t, path)`. data, noise: [B, ...]. t: [B].
        prediction: what the model predicts: "velocity", "score", "noise" or "data". For the score, the error is that of
            the noise it implies: |sigma score + noise|^2.
        weighting: "none": the error of the prediction itself; "velocity": the error of the velocity it implies;
            "likelihood": that error divided by g, where velocity = (alpha' / alpha) x + g score. With the last two
            (arXiv 2401.08740) the loss does not depend on the kind of prediction.

    Raises ValueError for unknown names and for tensors whose shapes differ.
    """
    check_name("prediction", prediction, PREDICTIONS)
    check_name("weighting", weighting, WEIGHTINGS)
    if not output.shape == data.shape == noise.shape:
        raise ValueError(f"output, data and noise differ in shape: {[list(x.shape) for x in (output, data, noise)]}")
    at = coefficients(path, times_like(t, data))
    dtype = torch.promote_types(output.dtype, torch.float32)
    output, data, noise = (x.to(dtype) for x in (output, data, noise))
    if prediction == "score":  # its own target, -noise / sigma, is unbounded
        output, prediction = -at.sigma * output, "noise"
    error = output - target(data, noise, t, path, prediction)
    return (_weight(at, prediction, weighting) * error**2).flatten(1).mean(1)


def _weight(at, prediction: str, weighting: str) -> Tensor:
    if weighting == "none":
        return torch.ones_like(at.alpha)
    weight = velocity_factor(at, prediction) ** 2
    return weight if weighting == "velocity" else weight / score_factor(at)
