"""Samplers: from noise to data along a path, by the probability flow ODE or by an SDE with the same marginals.

A sampler is a function of a model function (x [B, ...], t [B]) -> prediction and of the noise to start from. It works in
the noise's dtype, float32 at the least, and calls the model with that.
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

# The SDE's g(t) in dx = (velocity + g score) dt + sqrt(2 g) dW: any g >= 0 has the path's marginals. Forms as in SiT.
DIFFUSIONS = {
    "constant": lambda t, at, norm: norm * torch.ones_like(t),
    "sbdm": lambda t, at, norm: norm * score_factor(at),
    "sigma": lambda t, at, norm: norm * at.sigma,
    "linear": lambda t, at, norm: norm * (1 - t),
    "decreasing": lambda t, at, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t, at, norm: norm * torch.sin(math.pi * t) ** 2,
}
# by how much a prediction may be enlarged on its way to the velocity for an end of time to be left in
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
    """Solve dx = velocity dt from noise to data.

    Args:
        model: (x [B, ...], t [B]) -> what `prediction` says: "velocity", "score", "noise" or "data".
        noise: [B, ...], where to start.
        method: "euler", "heun" (two calls a step), or "dopri5", whose steps fit the tolerances `atol` and `rtol` and are
            the same for the whole batch. The others take `steps` steps, `shift`ed towards noise (see `shift_times`).
        interval: (start, end) of time; None takes `sampling_interval`'s.
        reverse: from end to start, data to noise.
        callback: called as (step, time reached, x) after every step.

    Returns x at the end, [B, ...]. SiT's num_steps counts points: its n are n - 1 steps here. Raises ValueError for
    unknown names, less than one step, and an interval outside [0, 1]; RuntimeError where dopri5 finds no step.
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
    """Solve dx = (velocity + g score) dt + sqrt(2 g) dW from noise to data.

    Args:
        model, noise, prediction, shift, callback: as in `sample_ode`.
        method: "euler" (Euler-Maruyama) or "heun" (SiT's: the step's noise first, then a Heun step; two calls a step).
        steps: all of them, the last one included; `shift` spreads the others.
        diffusion: g(t): "constant", "sbdm" (of velocity = (alpha' / alpha) x + g score, score-based diffusion's own),
            "sigma", "linear" (1 - t), "decreasing" ((1 + norm cos pi t)^2 / 4) or "increasing-decreasing" (sin^2 pi t);
            times `diffusion_norm`, which "decreasing" has inside.
        last_step: a last step without noise, of `last_step_size`: "mean" (of the SDE), "euler" (of the ODE) or "tweedie"
            (to the predicted data); None: all steps are alike.
        interval: (start, end) of time, last step included; None takes `sampling_interval`'s.
        generator: of the noise; one, or a list of one for each sample, whose noise then depends on no other. It is drawn
            on the generator's device.

    Returns x at the end, [B, ...]. With a last step, SiT's num_steps and `steps` are the same. Raises ValueError for
    unknown names, too few steps, and intervals or sizes that do not fit.
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
        # g score; the quotient stays finite at time 1 where g falls with sigma
        return velocity - DIFFUSIONS[diffusion](shaped, at, diffusion_norm) / at.sigma * eps

    def spread(x: Tensor, time: float, after: float) -> Tensor:
        """The step's noise."""
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
    """The times to sample over: [0, 1], less `eps` (SiT's by default) at an end that a solver cannot stand on.

    diffusion: the SDE's form; None for the ODE. last_step: the SDE's rule; with one, nothing is evaluated at time 1.

    The start is cut where noise or score predict, or diffusion "sbdm" divides by, what alpha = 0 leaves open; the end of
    an ODE where the path's velocity grows without bound (VP) or data predicts; the end of an SDE, whose drift has the
    score, where it has no last step.
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
    """steps + 1 times over the interval, evenly spaced before the shift. Numbers, so that no step waits for a GPU."""
    if steps < 1:
        raise ValueError(f"a sampler takes at least one step, got {steps}")
    check_interval(interval)
    start, end = interval
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return [start, *(start + (end - start) * shift_times(even, shift))[1:-1].tolist(), end]


def velocity_field(model: Model, path: str, prediction: str) -> Model:
    """The model function as one of velocity."""
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
    """The state [B, ...] after dx = field(x, t [B]) dt over the interval; arguments as in `sample_ode`."""
    check_name("ODE sampler", method, ODE_METHODS)
    times = time_grid(steps, interval, shift)
    times = times[::-1] if reverse else times
    if method == "dopri5":
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
        # the solver tries its first step before it knows where the interval ends
        return field(x, t.clamp(low, high).to(x).expand(len(x)))

    def accept(t: Tensor, x: Tensor, dt: Tensor) -> None:
        nonlocal accepted
        if accepted and callback is not None:  # the state given is the one before the step
            callback(accepted, float(t), x)
        accepted += 1

    function.callback_accept_step = accept
    times = torch.tensor([start, end], dtype=torch.float64, device=x.device)
    try:
        # a step has to end on the end, or the solver passes it and interpolates back
        x = odeint(function, x, times, method="dopri5", atol=atol, rtol=rtol, options={"step_t": times[1:]})[-1]
    except AssertionError as error:
        if not str(error).startswith(("underflow in dt", "non-finite values")):
            raise  # not the solver's, but the model's
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
    """Normal numbers like x, drawn where the generator is; each sample by its own where it is a list."""
    if generator is None:
        return torch.randn_like(x)
    if isinstance(generator, list):
        return torch.cat([normal_like(sample, one) for sample, one in zip(x.split(1), generator, strict=True)])
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
