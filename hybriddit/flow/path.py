"""Paths between noise and data in SiT's convention (arXiv 2401.08740): time 0 is noise, time 1 is data.

x_t = alpha_t data + sigma_t noise. A path is a function that returns the coefficients at given times; with them, any
prediction (velocity, score, noise or data) is converted to any other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PREDICTIONS = ("velocity", "score", "noise", "data")


class Coefficients(NamedTuple):
    """A path's alpha and sigma and their time derivatives; each has the shape of the times."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def linear(t: Tensor) -> Coefficients:
    """The straight path: alpha = t, sigma = 1 - t."""
    one = torch.ones_like(t)
    return Coefficients(_positive(t), _positive(1 - t), one, -one)


def gvp(t: Tensor) -> Coefficients:
    """The generalized variance-preserving path: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""
    half = math.pi / 2
    # cos(x) as sin(pi / 2 - x): exact near time 1, where cos(pi / 2) may round to a negative number
    alpha, sigma = torch.sin(half * t), torch.sin(half * (1 - t))
    return Coefficients(_positive(alpha), _positive(sigma), half * sigma, -half * alpha)


def vp(t: Tensor) -> Coefficients:
    """SiT's variance-preserving path: alpha = exp(-(1 - t)^2 (20 - 0.1) / 4 - (1 - t) 0.1 / 2), sigma^2 = 1 - alpha^2.

    At time 0, alpha is 0.0066 instead of zero; near time 1 sigma's derivative is unbounded.
    """
    rest = 1 - t
    beta = 0.1 + (20 - 0.1) * rest
    log_alpha = -(rest**2) * (20 - 0.1) / 4 - rest * 0.1 / 2
    alpha = log_alpha.exp()
    sigma = _positive(torch.expm1(2 * log_alpha).neg().sqrt())
    return Coefficients(alpha, sigma, alpha * beta / 2, -(alpha**2) * beta / (2 * sigma))


PATHS = {"linear": linear, "gvp": gvp, "vp": vp}


def coefficients(path: str, t: Tensor) -> Coefficients:
    """The path's alpha, sigma and their derivatives at times t in [0, 1], which may have any shape.

    path: "linear" (t, 1 - t), "gvp" (sin and cos of pi t / 2) or "vp" (SiT's variance-preserving path, beta 0.1 to 20).

    The result is in the times' dtype, float32 or wider, and exact to rounding, except that alpha and sigma are clamped
    to the root of the dtype's smallest normal number (1e-19 in float32), so that divisions by them stay finite.
    Raises ValueError for an unknown path and, on a CPU, for times outside [0, 1]; a check on a GPU would make the host
    wait.
    """
    check_name("path", path, PATHS)
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"times are within [0, 1] (0 noise, 1 data), got {t.min().item():g} to {t.max().item():g}")
    return PATHS[path](t.to(torch.promote_types(t.dtype, torch.float32)))


def interpolate(data: Tensor, noise: Tensor, t: Tensor, path: str = "linear") -> Tensor:
    """The noisy input at time t, alpha_t data + sigma_t noise. data, noise: [B, ...]; t: [B]; returns [B, ...]."""
    at = coefficients(path, times_like(t, data))
    return at.alpha * data + at.sigma * noise


def target(data: Tensor, noise: Tensor, t: Tensor, path: str = "linear", prediction: str = "velocity") -> Tensor:
    """The regression target of a prediction, [B, ...]; an ideal model returns the target's mean given x_t. t: [B].

    "velocity": alpha' data + sigma' noise; "score": -noise / sigma; "noise"; "data".
    """
    check_name("prediction", prediction, PREDICTIONS)
    return _from_pair(data, noise, coefficients(path, times_like(t, data)), prediction)


def convert(output: Tensor, x: Tensor, t: Tensor, path: str, source: str, target: str) -> Tensor:
    """Convert a model's output at (x, t) from one kind of prediction to another; exact for any output.

    Args:
        output: [B, ...], what the model returned. x: [B, ...]. t: [B], or one time for all.
        source, target: "velocity", "score", "noise" or "data".

    Some conversions are undefined at time 0 or 1: noise or score do not determine the data where alpha is zero (time
    0; not on the VP path), velocity or data do not determine the score where sigma is zero (time 1). The result is
    finite there, but amplifies any error of the output; `sampling_interval` leaves such times out.
    """
    check_name("prediction", source, PREDICTIONS)
    check_name("prediction", target, PREDICTIONS)
    if output.shape != x.shape:
        raise ValueError(f"the model returned {list(output.shape)} for x of shape {list(x.shape)}")
    at = coefficients(path, times_like(t, x))
    if source == target:
        return output
    return _from_pair(*_to_pair(output, x, at, source), at, target)


def _to_pair(output: Tensor, x: Tensor, at: Coefficients, source: str) -> tuple[Tensor, Tensor]:
    """The data and noise that a prediction implies, solved from it and x = alpha data + sigma noise."""
    if source == "velocity":
        determinant = at.alpha * at.d_sigma - at.sigma * at.d_alpha
        return (
            (at.d_sigma * x - at.sigma * output) / determinant,
            (at.alpha * output - at.d_alpha * x) / determinant,
        )
    if source == "data":
        return output, (x - at.alpha * output) / at.sigma
    noise = -at.sigma * output if source == "score" else output
    return (x - at.sigma * noise) / at.alpha, noise


def _from_pair(data: Tensor, noise: Tensor, at: Coefficients, target: str) -> Tensor:
    if target == "velocity":
        return at.d_alpha * data + at.d_sigma * noise
    if target == "score":
        return -noise / at.sigma
    return data if target == "data" else noise


def score_factor(at: Coefficients) -> Tensor:
    """The factor g in velocity = (alpha' / alpha) x + g score; it is >= 0."""
    return at.sigma * (at.d_alpha * at.sigma - at.alpha * at.d_sigma) / at.alpha


def velocity_factor(at: Coefficients, prediction: str) -> Tensor:
    """The derivative d velocity / d prediction at fixed x and t."""
    if prediction == "velocity":
        return torch.ones_like(at.alpha)
    factor = score_factor(at)
    if prediction == "score":
        return factor
    return -factor / at.sigma if prediction == "noise" else at.alpha * factor / at.sigma**2


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Shift times towards noise (shift > 1), as larger images need: t / (t + shift (1 - t)); 0 and 1 stay.

    This is SD3's shift (arXiv 2403.03206), s u / (1 + (s - 1) u), applied to the noise level u = 1 - t.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift is a positive number, got {shift}")
    return t / (t + shift * (1 - t))


def time_of_noise(path: str, sigma: float) -> float:
    """The time at which noise is sigma / (1 - sigma) times as strong as the data, for sigma above 0 and below 1.

    On the linear path it is 1 - sigma; elsewhere it is found by halving. Raises ValueError for an unknown path.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        time = (low + high) / 2
        at = coefficients(path, torch.tensor(time, dtype=torch.float64))
        low, high = (time, high) if at.sigma * (1 - sigma) > at.alpha * sigma else (low, time)
    return (low + high) / 2


def check_name(what: str, name: str, known) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(map(str, known))}")


def check_interval(interval: tuple[float, float]) -> None:
    start, end = interval
    if not 0 <= start < end <= 1:
        raise ValueError(f"a time interval is 0 <= start < end <= 1 (0 noise, 1 data), got ({start:g}, {end:g})")


def times_like(t: Tensor, x: Tensor) -> Tensor:
    """Reshape times, [B] or one for all, to broadcast against x, [B, ...]. Raises ValueError for another number."""
    if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x))):
        raise ValueError(f"times are one for each sample: got {list(t.shape)} for a batch of {len(x)}")
    return t.view(-1, *[1] * (x.ndim - 1))


def _positive(x: Tensor) -> Tensor:
    """Clamped to the smallest normal number's root, so that divisions by it, and by its square, stay finite."""
    return x.clamp(min=math.sqrt(torch.finfo(x.dtype).tiny))
