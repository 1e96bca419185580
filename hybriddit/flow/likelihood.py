"""Log-likelihood of data under a model, by the probability flow ODE (arXiv 1810.01367, 2011.13456)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .sample import (
    Callback,
    Generators,
    Model,
    check_generators,
    normal_like,
    sampling_interval,
    solve_ode,
    velocity_field,
)


@torch.no_grad()
def log_likelihood(
    model: Model,
    data: Tensor,
    path: str = "linear",
    *,
    prediction: str = "velocity",
    probes: int | None = 1,
    method: str = "dopri5",
    steps: int = 50,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    interval: tuple[float, float] | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each sample in nats, [B], and the noise that the ODE maps it to, [B, ...].

    The ODE is solved from data to noise. log p(data) is the standard normal log-density of that noise plus the integral
    of the velocity's divergence along the trajectory.

    Args:
        model, path, prediction, method, steps, atol, rtol, interval: as in `sample_ode`. The model is differentiated
            with respect to x; it must not mix the samples of a batch (no batch norm).
        probes: number of random +-1 vectors in Hutchinson's estimate of the divergence; each takes a backward pass.
            They stay the same along the trajectory, so that the ODE is smooth; the estimate is unbiased. None computes
            the divergence exactly, with a backward pass for each dimension.
        generator: draws the probes; one, or a list with one for each sample.
        callback: called after every step as (step, time reached, state); the state is [B, D + 1]: x flattened, then the
            integral of the divergence so far.

    On the VP path the interval ends before time 1, and the result is the density of x at that earlier time; at time 0 x
    is only approximately standard normal (alpha is 0.0066, not 0). Raises ValueError as `sample_ode` does, and for less
    than one probe.
    """
    if probes is not None and probes < 1:
        raise ValueError(f"at least one probe, or None for the exact divergence, got {probes}")
    check_generators(generator, data)
    interval = interval or sampling_interval(path, prediction)
    field = velocity_field(model, path, prediction)
    x = data.to(torch.promote_types(data.dtype, torch.float32))
    dimensions = x[0].numel()
    # >= and not sign(): sign(0) is 0
    vectors = [torch.where(normal_like(x, generator) >= 0, 1.0, -1.0).to(x) for _ in range(probes or 0)]

    def with_divergence(state: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = state[:, :-1].reshape(data.shape).requires_grad_()
            velocity = field(x, t)
            divergence = _divergence(velocity, x, vectors)
        return torch.cat((velocity.detach().flatten(1), divergence[:, None]), dim=1)

    state = torch.cat((x.flatten(1), x.new_zeros(len(x), 1)), dim=1)
    state = solve_ode(
        with_divergence, state, interval, method=method, steps=steps, atol=atol, rtol=rtol, reverse=True,
        callback=callback,
    )  # fmt: skip
    noise, gained = state[:, :-1], state[:, -1]
    prior = -0.5 * (noise**2).sum(1) - 0.5 * dimensions * math.log(2 * math.pi)
    # added, not subtracted: the divergence was integrated backwards in time
    return prior + gained, noise.reshape(data.shape)


def _divergence(velocity: Tensor, x: Tensor, vectors: list[Tensor]) -> Tensor:
    """The divergence of the velocity with respect to x, [B]: the mean of v^T J v over `vectors`, or the trace of J."""
    if vectors:
        products = [torch.autograd.grad(velocity, x, v, retain_graph=True)[0] * v for v in vectors]
        return torch.stack(products).mean(0).flatten(1).sum(1)
    rows = velocity.flatten(1).unbind(1)
    columns = (torch.autograd.grad(row.sum(), x, retain_graph=True)[0].flatten(1)[:, i] for i, row in enumerate(rows))
    return sum(columns)
