import math

import pytest
import torch
from known_fields import MIXTURE, exact, normal

from hybriddit.flow import (
    PATHS,
    PREDICTIONS,
    WEIGHTINGS,
    convert,
    draw_times,
    flow_loss,
    interpolate,
    training_interval,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drift_variance(path, t):
    """SiT's factor of the score in the velocity: alpha' / alpha sigma^2 - sigma sigma'."""
    alpha, sigma, d_alpha, d_sigma = exact(path, t)
    return d_alpha / alpha * sigma**2 - sigma * d_sigma


def by_definition(output, data, noise, t, path, prediction, weighting):
    """The loss of one sample at one time, from SiT's paper and scripts; velocity and data by what they imply."""
    alpha, sigma, d_alpha, d_sigma = exact(path, t)
    g = drift_variance(path, t)
    if prediction == "velocity":
        error = output - (d_alpha * data + d_sigma * noise)
        weight = {"none": 1, "velocity": 1, "likelihood": 1 / g}[weighting]
    elif prediction == "data":
        error = output - data
        in_noise = (alpha / sigma) ** 2  # x is fixed: alpha d data = -sigma d noise
        weight = {"none": 1, "velocity": in_noise * (g / sigma) ** 2, "likelihood": in_noise * g / sigma**2}[weighting]
    else:
        error = output - noise if prediction == "noise" else output * sigma + noise
        weight = {"none": 1, "velocity": (g / sigma) ** 2, "likelihood": g / sigma**2}[weighting]
    return weight * (error**2).mean()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_the_loss_is_that_of_the_definition(path, prediction, weighting):
    output, data, noise = (normal(4, 3, 2, 2, seed=seed) for seed in range(3))
    t = torch.tensor([0.05, 0.3, 0.8, 0.99], dtype=torch.float64)
    loss = flow_loss(output, data, noise, t, path, prediction=prediction, weighting=weighting)
    for i, time in enumerate(t.tolist()):
        expected = by_definition(output[i], data[i], noise[i], time, path, prediction, weighting)
        torch.testing.assert_close(loss[i], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("weighting", ["velocity", "likelihood"])
@pytest.mark.parametrize("path", PATHS)
def test_a_weighted_loss_is_the_same_for_every_way_to_predict(path, weighting):
    velocity, data, noise = (normal(5, 4, seed=seed) for seed in range(3))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x = interpolate(data, noise, t, path)
    losses = [
        flow_loss(
            convert(velocity, x, t, path, "velocity", kind), data, noise, t, path, prediction=kind, weighting=weighting
        )
        for kind in PREDICTIONS
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_the_exact_field_is_the_minimum(path, prediction, weighting):
    """At one time the loss falls along no direction from the exact field: its slope is 0 within 4 standard errors."""
    count, time = 20_000, 0.6
    data, noise, t = MIXTURE.sample(count, generator()), normal(count, 2, seed=1), torch.full((count,), time).double()
    x = interpolate(data, noise, t, path)
    field = MIXTURE.at(x, t[0].item(), path, prediction)

    def loss(output):
        return flow_loss(output, data, noise, t, path, prediction=prediction, weighting=weighting)

    at_field = loss(field)
    for direction in (torch.ones_like(x), x, torch.tanh(3 * x).flip(1)):
        size = 0.3 * field.norm() / direction.norm()
        higher, lower = loss(field + size * direction), loss(field - size * direction)
        slope = (higher - lower) / 2
        assert slope.mean().abs() < 4 * slope.std() / math.sqrt(count)
        for other in (higher, lower):
            assert (other - at_field).mean() > 4 * (other - at_field).std() / math.sqrt(count)


def test_the_loss_of_bfloat16_outputs_is_taken_in_float32():
    output, data, noise = (normal(2, 3, seed=seed, dtype=torch.float32) for seed in range(3))
    t = torch.tensor([0.2, 0.7])
    loss = flow_loss(output.bfloat16(), data, noise, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, flow_loss(output.bfloat16().float(), data, noise, t))


def test_the_loss_waits_for_no_device_and_compiles_whole():
    for kind in PREDICTIONS:
        x, t = (
            torch.empty(3, 4, 8, 8, device="meta"),
            draw_times(3, "logit_normal", generator=generator(), device="meta"),
        )
        loss = flow_loss(interpolate(x, x, t, "gvp"), x, x, t, "gvp", prediction=kind, weighting="likelihood")
        assert loss.device.type == "meta" and loss.shape == (3,)
    compiled = torch.compile(flow_loss, backend="eager", fullgraph=True)
    inputs = [normal(4, 3, seed=seed) for seed in range(3)] + [torch.linspace(0.1, 0.9, 4, dtype=torch.float64)]
    torch.testing.assert_close(compiled(*inputs, "vp"), flow_loss(*inputs, "vp"))


@pytest.mark.parametrize(
    ("path", "prediction", "weighting", "start", "end"),
    [
        ("linear", "velocity", "none", 0, 0),
        ("gvp", "velocity", "none", 0, 0),
        ("vp", "velocity", "none", 0, 1e-5),  # sigma' has no bound
        ("linear", "noise", "none", 0, 0),
        ("vp", "score", "none", 0, 0),
        ("linear", "data", "none", 0, 0),
        ("linear", "velocity", "velocity", 0, 0),
        ("linear", "noise", "velocity", 1e-3, 0),  # 1 / t^2
        ("gvp", "score", "velocity", 1e-3, 0),
        ("vp", "noise", "velocity", 0, 1e-5),
        ("linear", "noise", "likelihood", 1e-3, 1e-3),  # 1 / (t (1 - t))
        ("linear", "velocity", "likelihood", 0, 1e-3),  # t / (1 - t)
        ("linear", "data", "velocity", 0, 1e-3),  # 1 / (1 - t)^2
        ("vp", "data", "likelihood", 0, 1e-5),
    ],
)
def test_training_keeps_from_the_ends_where_the_loss_has_no_bound(path, prediction, weighting, start, end):
    assert training_interval(path, prediction, weighting) == (start, 1 - end)
    # and says so of the loss itself
    t = torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)
    losses = flow_loss(
        normal(2, 4), normal(2, 4, seed=1), normal(2, 4, seed=2), t, path, prediction=prediction, weighting=weighting
    )
    assert (losses > 1e5).tolist() == [bool(start), bool(end)]


def test_the_distance_from_the_ends_can_be_set():
    assert training_interval("linear", "noise", "likelihood", eps=0.02) == (0.02, 0.98)


def quantiles(t, at=(0.05, 0.25, 0.5, 0.75, 0.95)):
    return torch.quantile(t, torch.tensor(at, dtype=t.dtype))


def test_uniform_times():
    t = draw_times(40_000, generator=generator())
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() < 1
    # four standard errors of the quantile of 40 000
    torch.testing.assert_close(quantiles(t), torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]), atol=0.01, rtol=0)


def test_logit_normal_times():
    t = draw_times(40_000, "logit_normal", mean=-0.5, std=1.5, generator=generator(), dtype=torch.float64)
    at = (0.05, 0.25, 0.5, 0.75, 0.95)
    expected = torch.special.ndtri(torch.tensor(at, dtype=torch.float64)) * 1.5 - 0.5
    torch.testing.assert_close(torch.logit(quantiles(t, at)), expected, atol=0.06, rtol=0)
    assert quantiles(t)[2] < 0.5  # a negative mean draws more noise


def test_shifted_times_and_their_interval():
    plain, shifted = (draw_times(1000, generator=generator(), dtype=torch.float64, shift=s) for s in (1, 3))
    # the odds of noise are multiplied by the shift
    torch.testing.assert_close((1 - shifted) / shifted, 3 * (1 - plain) / plain)
    inside = draw_times(1000, generator=generator(), dtype=torch.float64, shift=3, interval=(0.2, 0.6))
    torch.testing.assert_close(inside, 0.2 + 0.4 * shifted)


def test_times_depend_on_the_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (draw_times(8, generator=generator(seed)) for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)
    assert torch.get_rng_state().equal(state)
    assert draw_times(3, generator=generator(), device="meta").device.type == "meta"
    assert draw_times(3).shape == (3,) and draw_times(0).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_times(3, "cosine"), "unknown distribution of times 'cosine': choose from uniform, logit_normal"),
        (lambda: draw_times(3, std=0), "std positive"),
        (lambda: draw_times(-1), "not negative"),
        (lambda: draw_times(3, shift=-1), "shift is a positive number"),
        (lambda: draw_times(3, interval=(0.5, 1.2)), "0 <= start < end <= 1"),
        (lambda: draw_times(3, interval=(0.5, 0.5)), "0 <= start < end <= 1"),
        (lambda: training_interval("vp", "velocity", "snr"), "unknown weighting 'snr'"),
        (lambda: training_interval("vp", "v"), "unknown prediction 'v'"),
        (lambda: training_interval("ve"), "unknown path 've'"),
        (lambda: flow_loss(*[normal(2, 3)] * 3, torch.ones(2), weighting="snr"), "unknown weighting 'snr'"),
        (lambda: flow_loss(*[normal(2, 3)] * 3, torch.ones(2), prediction="v"), "unknown prediction 'v'"),
        (lambda: flow_loss(*[normal(2, 3)] * 3, 2 * torch.ones(2)), "times are within"),
        (lambda: flow_loss(normal(2, 6), *[normal(2, 3)] * 2, torch.ones(2)), "differ in shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
