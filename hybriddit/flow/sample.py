"""Samplers: from noise to data along a path, by the probability flow ODE or by an SDE with the same marginals.

A sampler takes a model function (x [B, ...], t [B]) -> prediction, and the noise to start from. It computes, and calls
the model, in the noise's dtype, or in float32 if that dtype is narrower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .path import (
    PREDICTIONS,
    check_interval,
    check_name,
    coefficients,
    convert,
    score_factor,
    shift_times,
    times_like,
    velocity_factor,
)

Model = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | list[torch.Generator] | None
# (step, time reached, state), after every step
Callback = Callable[[int, float, Tensor], None]

# g(t) in dx = (velocity + g score) dt + sqrt(2 g) dW. Any g >= 0 keeps the path's marginals; these are SiT's forms.
DIFFUSIONS = {
    "constant": lambda t, at, norm: norm * torch.ones_like(t),
    "sbdm": lambda t, at, norm: norm * score_factor(at),
    "sigma": lambda t, at, norm: norm * at.sigma,
    "linear": lambda t, at, norm: norm * (1 - t),
    "decreasing": lambda t, at, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t, at, norm: norm * torch.sin(math.pi * t) ** 2,
}
# sampling leaves out the ends of the time interval where converting to the velocity multiplies by more than this
LARGEST_FACTOR = 1e6


@torch.no_grad()
def sample_ode(
    model: Model,
    noise: Tensor,
    path: str = "linear",
    *,
    prediction: str = "velocity",
    method: str = "dopri5",
    steps: int = 50,
    shift: float = 1.0,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    interval: tuple[float, float] | None = None,
    reverse: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by the probability flow ODE: solve dx = velocity dt from noise to data.

    Args:
        model: (x [B, ...], t [B]) -> the prediction. prediction: its kind, "velocity", "score", "noise" or "data".
        noise: [B, ...], the state to start from.
        method: "euler", "heun" (two model calls a step) or "dopri5" (adaptive: step sizes follow the tolerances `atol`
            and `rtol`, and are the same for the whole batch).
        steps: number of steps of "euler" and "heun". shift: moves their times towards noise, see `shift_times`.
        interval: (start, end) of the times; None takes `sampling_interval`.
        reverse: solve from end to start, from data to noise.
        callback: called after every step as (step, time reached, x).

    Returns x at the end, [B, ...]. SiT's num_steps = n means n - 1 steps here, because it counts time points. Raises
    ValueError for unknown names, less than one step, and an interval outside [0, 1]; RuntimeError if dopri5 finds no
    step size that meets the tolerances.
    """
    interval = interval or sampling_interval(path, prediction)
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    field = velocity_field(model, path, prediction)
    return solve_ode(
        field, x, interval, method=method, steps=steps, shift=shift, atol=atol, rtol=rtol, reverse=reverse,
        callback=callback,
    )  # fmt: skip


@torch.no_grad()
def sample_sde(
    model: Model,
    noise: Tensor,
    path: str = "linear",
    *,
    prediction: str = "velocity",
    method: str = "euler",
    steps: int = 250,
    diffusion: str = "sigma",
    diffusion_norm: float = 1.0,
    last_step: str | None = "mean",
    last_step_size: float = 0.04,
    shift: float = 1.0,
    interval: tuple[float, float] | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by an SDE: solve dx = (velocity + g score) dt + sqrt(2 g) dW from noise to data.

    Args:
        model, noise, prediction, shift, callback: as in `sample_ode`.
        method: "euler" (Euler-Maruyama) or "heun" (SiT's: add the step's noise, then do a Heun step; two model calls).
        steps: number of steps, the last one included. shift applies to the others.
        diffusion: the form of g(t): "constant", "sbdm" (the g in velocity = (alpha' / alpha) x + g score, that of
            score-based diffusion), "sigma", "linear" (1 - t), "decreasing" ((1 + norm cos pi t)^2 / 4) or
            "increasing-decreasing" (sin^2 pi t).
        diffusion_norm: multiplies g; in "decreasing" it is the norm in the formula.
        last_step: a last step without noise, `last_step_size` long: "mean" (the SDE's drift), "euler" (the ODE's
            velocity) or "tweedie" (to the predicted data). None: the last step is like the others.
        interval: (start, end) of time, last step included; None takes `sampling_interval`.
        generator: draws the noise, on its own device; one, or a list with one for each sample, so that a sample's noise
            does not depend on the rest of the batch.

    Returns x at the end, [B, ...]. With a last step, `steps` is SiT's num_steps. Raises ValueError for unknown names,
    too few steps, and intervals or sizes that do not fit.
    """
    check_name("prediction", prediction, PREDICTIONS)
    check_name("SDE sampler", method, SDE_METHODS)
    check_name("diffusion form", diffusion, DIFFUSIONS)
    check_name("last step", last_step, (None, *LAST_STEPS))
    start, end = interval or sampling_interval(path, prediction, diffusion=diffusion, last_step=last_step)
    check_interval((start, end))
    if steps < (1 if last_step is None else 2):
        raise ValueError(f"an SDE sampler takes at least one step, and one before a last step of its own, got {steps}")
    if last_step is not None and not 0 < last_step_size < end - start:
        raise ValueError(f"the last step is a part of the interval {start:g} to {end:g}, got {last_step_size:g}")
    if not diffusion_norm >= 0:
        raise ValueError(f"diffusion_norm is not negative, got {diffusion_norm}")
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    check_generators(generator, x)

    def call(x: Tensor, time: float) -> tuple[Tensor, Tensor]:
        t = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
        return t, model(x, t)

    def drift(x: Tensor, time: float) -> Tensor:
        t, output = call(x, time)
        velocity, eps = (convert(output, x, t, path, prediction, kind) for kind in ("velocity", "noise"))
        shaped = times_like(t, x)
        at = coefficients(path, shaped)
        # velocity + g score, written with the noise: g / sigma stays finite at time 1 if g vanishes with sigma
        return velocity - DIFFUSIONS[diffusion](shaped, at, diffusion_norm) / at.sigma * eps

    def spread(x: Tensor, time: float, after: float) -> Tensor:
        """The noise of one step, sqrt(2 g dt) times a normal draw."""
        t = torch.full((), time, dtype=x.dtype, device=x.device)
        g = DIFFUSIONS[diffusion](t, coefficients(path, t), diffusion_norm)
        return (2 * g * (after - time)).sqrt() * normal_like(x, generator)

    stop = end if last_step is None else end - last_step_size
    times = time_grid(steps - (last_step is not None), (start, stop), shift)
    for step, (time, after) in enumerate(pairwise(times), 1):
        x = SDE_METHODS[method](drift, spread, x, time, after)
        if callback is not None:
            callback(step, after, x)
    if last_step is None:
        return x
    if last_step == "mean":
        x = x + (end - stop) * drift(x, stop)
    else:
        t, output = call(x, stop)
        if last_step == "tweedie":
            x = convert(output, x, t, path, prediction, "data")
        else:
            x = x + (end - stop) * convert(output, x, t, path, prediction, "velocity")
    if callback is not None:
        callback(steps, end, x)
    return x


def sampling_interval(
    path: str,
    prediction: str = "velocity",
    *,
    diffusion: str | None = None,
    last_step: str | None = None,
    eps: float = 1e-3,
) -> tuple[float, float]:
    """The interval of sampling times: [0, 1], shortened by `eps` (SiT's by default) where the field is undefined.

    diffusion: the form of the SDE's g; None means the ODE. last_step: the SDE's; with one, no model call is at time 1.

    The start is cut off where the conversion divides by alpha = 0: for noise and score predictions and for diffusion
    "sbdm". The end of an ODE is cut off where the velocity is unbounded: on the VP path and for data predictions. The
    end of an SDE without a last step is cut off because its drift contains the score.
    """
    check_name("prediction", prediction, PREDICTIONS)
    check_name("diffusion form", diffusion, (None, *DIFFUSIONS))
    check_name("last step", last_step, (None, *LAST_STEPS))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    at = coefficients(path, ends)
    sizes = velocity_factor(at, prediction).abs().maximum(at.d_sigma.abs())
    if diffusion == "sbdm":
        sizes = sizes.maximum(score_factor(at))
    start, end = (sizes > LARGEST_FACTOR).tolist()
    if diffusion is not None:
        end = last_step is None
    return (eps if start else 0.0, 1 - eps if end else 1.0)


def time_grid(steps: int, interval: tuple[float, float], shift: float = 1.0) -> list[float]:
    """steps + 1 times from start to end of the interval, evenly spaced before the shift.

    They are plain numbers, so that no step of a sampler waits for a GPU. Raises ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"a sampler takes at least one step, got {steps}")
    check_interval(interval)
    start, end = interval
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return [start, *(start + (end - start) * shift_times(even, shift))[1:-1].tolist(), end]


def velocity_field(model: Model, path: str, prediction: str) -> Model:
    """The model function with its output converted to the velocity."""
    check_name("prediction", prediction, PREDICTIONS)
    return lambda x, t: convert(model(x, t), x, t, path, prediction, "velocity")


def solve_ode(
    field: Model,
    x: Tensor,
    interval: tuple[float, float],
    *,
    method: str,
    steps: int,
    shift: float = 1.0,
    atol: float,
    rtol: float,
    reverse: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Solve dx = field(x, t [B]) dt over the interval; returns the final state, [B, ...]. See `sample_ode`."""
    check_name("ODE sampler", method, ODE_METHODS)
    times = time_grid(steps, interval, shift)
    times = times[::-1] if reverse else times
    if method == "dopri5":
        for name, tolerance in (("atol", atol), ("rtol", rtol)):
            if not 0 < tolerance < float("inf"):
                raise ValueError(f"{name} must be a number above 0, not {tolerance}")
        return _dopri5(field, x, times[0], times[-1], atol, rtol, callback)

    def at_time(x: Tensor, time: float) -> Tensor:
        return field(x, torch.full((len(x),), time, dtype=x.dtype, device=x.device))

    for step, (time, after) in enumerate(pairwise(times), 1):
        x = _ODE_STEPS[method](at_time, x, time, after)
        if callback is not None:
            callback(step, after, x)
    return x


def _euler(field, x: Tensor, time: float, after: float) -> Tensor:
    return x + (after - time) * field(x, time)


def _heun(field, x: Tensor, time: float, after: float) -> Tensor:
    first = field(x, time)
    second = field(x + (after - time) * first, after)
    return x + (after - time) / 2 * (first + second)


_ODE_STEPS = {"euler": _euler, "heun": _heun}
ODE_METHODS = (*_ODE_STEPS, "dopri5")


def _dopri5(field: Model, x: Tensor, start: float, end: float, atol: float, rtol: float, callback) -> Tensor:
    from torchdiffeq import odeint  # imports scipy, which is slow

    low, high = min(start, end), max(start, end)
    accepted = 0

    def function(t: Tensor, x: Tensor) -> Tensor:
        # the solver's first trial step may go past the end of the interval
        return field(x, t.clamp(low, high).to(x).expand(len(x)))

    def accept(t: Tensor, x: Tensor, dt: Tensor) -> None:
        nonlocal accepted
        if accepted and callback is not None:  # odeint passes the state before the step: the first one is the start
            callback(accepted, float(t), x)
        accepted += 1

    function.callback_accept_step = accept
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    times = torch.tensor([start, end], dtype=exact, device=x.device)
    try:
        # step_t makes the last step end exactly at the end; without it the solver goes past and interpolates back
        x = odeint(function, x, times, method="dopri5", atol=atol, rtol=rtol, options={"step_t": times[1:]})[-1]
    except AssertionError as error:
        if not str(error).startswith(("underflow in dt", "non-finite values")):
            raise  # an assertion in the model, not in the solver
        raise RuntimeError(
            f"dopri5 finds no step that meets atol {atol:g} and rtol {rtol:g}: the model is not finite, or too steep"
        ) from error
    if callback is not None:
        callback(accepted, end, x)
    return x


def _euler_maruyama(drift, spread, x: Tensor, time: float, after: float) -> Tensor:
    return x + (after - time) * drift(x, time) + spread(x, time, after)


def _stochastic_heun(drift, spread, x: Tensor, time: float, after: float) -> Tensor:
    return _heun(drift, x + spread(x, time, after), time, after)


SDE_METHODS = {"euler": _euler_maruyama, "heun": _stochastic_heun}
LAST_STEPS = ("mean", "euler", "tweedie")


def check_generators(generator: Generators, x: Tensor) -> None:
    if isinstance(generator, list) and len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for a batch of {len(x)}")


def normal_like(x: Tensor, generator: Generators) -> Tensor:
    """Normal noise shaped as x, drawn on the generator's device; a list has one generator for each sample."""
    if generator is None:
        return torch.randn_like(x)
    if isinstance(generator, list):
        return torch.cat([normal_like(sample, one) for sample, one in zip(x.split(1), generator, strict=True)])
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
