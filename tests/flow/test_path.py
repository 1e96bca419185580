import math

import pytest
import torch
from known_fields import TARGETS, exact, normal

from hybriddit.flow import PATHS, PREDICTIONS, coefficients, convert, interpolate, shift_times, target

TIMES = torch.linspace(0, 1, 41, dtype=torch.float64)
INSIDE = TIMES[1:-1]


@pytest.mark.parametrize("path", PATHS)
def test_coefficients_are_those_of_the_definition(path):
    expected = torch.tensor([exact(path, t) for t in INSIDE.tolist()], dtype=torch.float64).T
    for value, reference in zip(coefficients(path, INSIDE), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_are_those_of_autograd(path):
    t = INSIDE.clone().requires_grad_()
    at = coefficients(path, t)
    for value, derivative in ((at.alpha, at.d_alpha), (at.sigma, at.d_sigma)):
        found = torch.autograd.grad(value.sum(), t, retain_graph=True, materialize_grads=True)[0]
        torch.testing.assert_close(derivative.detach(), found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_ends_are_noise_and_data_and_all_stays_finite(path, dtype):
    at = coefficients(path, torch.tensor([0.0, 1.0], dtype=dtype))
    assert all(x.isfinite().all() and x.dtype == dtype for x in at)
    start = math.exp(-5.025) if path == "vp" else 0.0
    torch.testing.assert_close(at.alpha.double(), torch.tensor([start, 1.0]).double(), rtol=1e-6, atol=1e-18)
    torch.testing.assert_close(
        at.sigma.double(), torch.tensor([math.sqrt(1 - start**2), 0.0]).double(), atol=1e-18, rtol=1e-6
    )
    x, y = normal(2, 5, dtype=dtype), normal(2, 5, seed=1, dtype=dtype)
    x_t = interpolate(x, y, torch.tensor([0.0, 1.0], dtype=dtype), path)
    torch.testing.assert_close(x_t[1], x[1])
    if path != "vp":
        torch.testing.assert_close(x_t[0], y[0])


def test_float32_is_precise_where_the_noise_is_small():
    t = 1 - torch.logspace(-7, -1, 30, dtype=torch.float64).float()
    for path in PATHS:
        sigma = torch.tensor([exact_sigma(path, x) for x in t.double().tolist()], dtype=torch.float64)
        torch.testing.assert_close(coefficients(path, t).sigma.double(), sigma, rtol=2e-6, atol=0)


def exact_sigma(path, t):
    rest = 1 - t
    if path == "vp":
        return math.sqrt(-math.expm1(-(0.1 * rest + 19.9 * rest**2 / 2)))
    return rest if path == "linear" else math.sin(math.pi / 2 * rest)


def test_half_precision_times_are_widened():
    assert coefficients("gvp", torch.tensor([0.5], dtype=torch.bfloat16)).alpha.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_the_state_and_its_velocity(path):
    data, noise, time = normal(3, 2, 2), normal(3, 2, 2, seed=1), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x = interpolate(data, noise, time, path)
    velocity = target(data, noise, time, path, "velocity")
    for i, t in enumerate(time.tolist()):
        alpha, sigma, d_alpha, d_sigma = exact(path, t)
        torch.testing.assert_close(x[i], alpha * data[i] + sigma * noise[i])
        torch.testing.assert_close(velocity[i], d_alpha * data[i] + d_sigma * noise[i])
        # the state itself, moved in time
        step = 1e-6
        later, earlier = (
            interpolate(data[i : i + 1], noise[i : i + 1], torch.tensor([t + s], dtype=torch.float64), path)
            for s in (step, -step)
        )
        torch.testing.assert_close((later - earlier)[0] / (2 * step), velocity[i], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(target(data, noise, time, path, "score")[i], -noise[i] / sigma)
    assert target(data, noise, time, path, "noise") is noise and target(data, noise, time, path, "data") is data


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("path", PATHS)
def test_every_conversion_of_the_exact_field(path, name):
    x = 1.5 * normal(20, 2)
    for t in (1e-3, 0.1, 0.5, 0.9, 1 - 1e-3):
        fields = {kind: TARGETS[name].at(x, t, path, kind) for kind in PREDICTIONS}
        time = torch.full((20,), t, dtype=torch.float64)
        for source in PREDICTIONS:
            for to in PREDICTIONS:
                found = convert(fields[source], x, time, path, source, to)
                torch.testing.assert_close(found, fields[to], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_conversions_of_any_output_return(path):
    """Not only of an exact field: there and back is the identity, for samples at different times."""
    x, output, t = normal(9, 3), normal(9, 3, seed=1), torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    for source in PREDICTIONS:
        for to in PREDICTIONS:
            there = convert(output, x, t, path, source, to)
            torch.testing.assert_close(convert(there, x, t, path, to, source), output, rtol=1e-9, atol=1e-9)
            assert source == to or not torch.allclose(there, output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", PATHS)
def test_conversions_at_the_ends(path, dtype):
    """Finite everywhere; right wherever the one kind says all of the other."""
    x = normal(6, 2, dtype=dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    time_0, time_1 = torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype)
    mixture = TARGETS["mixture"]
    for source in PREDICTIONS:
        for to in PREDICTIONS:
            for t in (time_0, time_1):
                assert convert(normal(6, 2, seed=2, dtype=dtype), x, t, path, source, to).isfinite().all()
    at_0 = {kind: mixture.at(x.double(), 0.0, path, kind).to(dtype) for kind in PREDICTIONS}
    known = PREDICTIONS if path == "vp" else ("velocity", "data")  # noise alone leaves the data open
    for source in known:
        for to in PREDICTIONS:
            torch.testing.assert_close(convert(at_0[source], x, time_0, path, source, to), at_0[to], **tolerance)
    # at the end x is the data; sigma is 0, and only the score has more to say
    score = mixture.at(x.double(), 1.0, "linear", "score").to(dtype)
    velocity = {"linear": x, "gvp": 0 * x, "vp": 0.05 * (x + score)}[path]
    for source, output in (("score", score), ("velocity", velocity)):
        torch.testing.assert_close(convert(output, x, time_1, path, source, "data"), x, **tolerance)
        torch.testing.assert_close(convert(output, x, time_1, path, source, "noise"), 0 * x, **tolerance)
        torch.testing.assert_close(convert(output, x, time_1, path, source, "velocity"), velocity, **tolerance)
    if path == "vp":
        torch.testing.assert_close(convert(velocity, x, time_1, path, "velocity", "score"), score, rtol=1e-3, atol=1e-4)


def test_one_time_serves_a_batch():
    x, output = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    one = convert(output, x, torch.tensor(0.3, dtype=torch.float64), "gvp", "velocity", "noise")
    torch.testing.assert_close(one, convert(output, x, torch.full((4,), 0.3).double(), "gvp", "velocity", "noise"))


def test_conversion_is_differentiable_in_x():
    x, t = normal(3, 2).requires_grad_(), torch.full((3,), 0.4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: convert(x**2, x, t, "vp", "noise", "velocity"), x)


def test_shift_is_the_one_of_sd3_seen_from_the_other_end():
    for shift in (0.5, 1.0, 3.0):
        noise_level = 1 - TIMES
        expected = 1 - shift * noise_level / (1 + (shift - 1) * noise_level)
        torch.testing.assert_close(shift_times(TIMES, shift), expected)
    assert shift_times(torch.tensor(0.5), 3.0) == 0.25  # towards noise
    assert shift_times(TIMES, 1.0).equal(TIMES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coefficients("cosine", TIMES), "unknown path 'cosine': choose from linear, gvp, vp"),
        (lambda: coefficients("vp", TIMES + 0.1), "within \\[0, 1\\]"),
        (lambda: coefficients("vp", -TIMES), "within \\[0, 1\\]"),
        (lambda: coefficients("vp", TIMES * math.nan), "within \\[0, 1\\]"),
        (lambda: target(TIMES, TIMES, TIMES, "linear", "x0"), "unknown prediction 'x0'"),
        (lambda: convert(TIMES, TIMES, TIMES, "linear", "x0", "data"), "unknown prediction 'x0'"),
        (lambda: convert(TIMES, TIMES, TIMES, "linear", "data", "x0"), "unknown prediction 'x0'"),
        (lambda: convert(TIMES[:3], TIMES, TIMES, "linear", "data", "data"), r"returned \[3\] for x of shape \[41\]"),
        (lambda: interpolate(TIMES, TIMES, TIMES[:3]), "one for each sample"),
        (lambda: interpolate(TIMES, TIMES, TIMES[:, None]), "one for each sample"),
        (lambda: shift_times(TIMES, 0.0), "shift is a positive number"),
        (lambda: shift_times(TIMES, math.inf), "shift is a positive number"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
