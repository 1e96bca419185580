"""Samplers against targets whose exact field is the model: what is left is the solver's error."""

import math

import pytest
import torch
from known_fields import GAUSSIAN, MIXTURE, Mixture, exact, gaussian_flow, normal

from hybriddit.flow import (
    DIFFUSIONS,
    LAST_STEPS,
    ODE_METHODS,
    PATHS,
    PREDICTIONS,
    SDE_METHODS,
    sample_ode,
    sample_sde,
    sampling_interval,
    shift_times,
)
from hybriddit.flow import sample as module


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def orders(errors):
    """log2 of how much each error is larger than the next, of half the step."""
    return [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]


# --- the ODE ---


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_euler_is_of_order_1_heun_of_order_2_and_dopri5_within_tolerance(path, prediction):
    noise = normal(6, 2)
    field = GAUSSIAN.field(path, prediction)
    expected = gaussian_flow(noise, *sampling_interval(path, prediction), path)

    def error(**options):
        out = sample_ode(field, noise, path, prediction=prediction, **options)
        return (out - expected).abs().max().item()

    for method, order in (("euler", 1), ("heun", 2)):
        found = orders([error(method=method, steps=steps) for steps in (64, 128, 256)])
        assert all(abs(slope - order) < 0.15 for slope in found), (method, found)
    assert error() < 1e-2  # dopri5 with SiT's tolerances, relative 1e-3 a step
    assert error(rtol=1e-9, atol=1e-10) < 1e-7


@pytest.mark.parametrize("path", PATHS)
def test_the_orders_on_a_mixture(path):
    """Not linear any more: against dopri5 at a tight tolerance."""
    noise = normal(20, 2)
    field = MIXTURE.field(path, "velocity")
    reference = sample_ode(field, noise, path, rtol=1e-9, atol=1e-10)
    for method, order in (("euler", 1), ("heun", 2)):
        errors = [
            (sample_ode(field, noise, path, method=method, steps=steps) - reference).norm().item()
            for steps in (64, 128, 256)
        ]
        assert all(abs(slope - order) < 0.25 for slope in orders(errors)), (method, errors)


def assert_samples_of(samples, target, bias=0.0):
    """Mean and covariance (and the shares of a mixture's sides) within 4 standard errors, and `bias` more."""
    count = len(samples)
    covariance = target.covariance()
    assert ((samples.mean(0) - target.mean()).abs() < 4 * (covariance.diag() / count).sqrt() + bias).all()
    offset = samples - samples.mean(0)
    products = offset[:, :, None] * offset[:, None, :]
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / math.sqrt(count) + bias).all()
    if len(target.weights) == 2:
        # the line halfway between the means cuts off the smaller part; the parts' tails past it are counted in
        direction = target.means[1] - target.means[0]
        middle = target.means.mean(0) @ direction
        inside = torch.special.ndtr(
            (middle - target.means @ direction)
            / torch.einsum("i,kij,j->k", direction, target.covariances, direction).sqrt()
        )
        share = (target.weights * inside).sum()
        found = (samples @ direction < middle).double().mean()
        assert (found - share).abs() < 4 * (share * (1 - share) / count).sqrt() + bias


@pytest.mark.parametrize("path", PATHS)
def test_the_ode_reaches_the_mixture(path):
    samples = sample_ode(MIXTURE.field(path, "velocity"), normal(8000, 2), path, rtol=1e-5)
    assert_samples_of(samples, MIXTURE, bias=2e-3)  # VP ends 1e-3 early


def test_reverse_goes_back_to_the_noise():
    noise, field = normal(5, 2), MIXTURE.field("gvp", "velocity")
    tight = {"rtol": 1e-9, "atol": 1e-10}
    data = sample_ode(field, noise, "gvp", **tight)
    torch.testing.assert_close(sample_ode(field, data, "gvp", reverse=True, **tight), noise, rtol=1e-6, atol=1e-6)
    back = sample_ode(field, data, "gvp", reverse=True, method="heun", steps=200)
    torch.testing.assert_close(back, noise, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ODE_METHODS)
def test_the_model_is_called_within_the_interval_and_from_its_start_to_its_end(method, reverse):
    calls = []
    field = MIXTURE.field("vp", "noise", calls)
    sample_ode(
        field, normal(3, 2), "vp", prediction="noise", method=method, steps=10, interval=(0.2, 0.7), reverse=reverse
    )
    assert min(calls) >= 0.2 and max(calls) <= 0.7
    assert calls[0] == (0.7 if reverse else 0.2)
    if method != "euler":
        assert (min(calls), max(calls)) == pytest.approx((0.2, 0.7), abs=1e-12)


def test_dopri5_stays_inside_when_its_first_guess_of_a_step_does_not():
    calls = []

    def slow(x, t):
        calls.append(t[0].item())
        return 1e-3 * x

    x = normal(3, 2)
    torch.testing.assert_close(sample_ode(slow, x, interval=(0.0, 0.5)), x * math.exp(0.5e-3))
    assert max(calls) <= 0.5


def test_fixed_steps_are_even_and_shifted_towards_noise():
    for shift, reverse in [(1.0, False), (3.0, False), (3.0, True)]:
        calls = []
        options = {"method": "euler", "steps": 8, "shift": shift, "interval": (0.1, 0.9), "reverse": reverse}
        sample_ode(GAUSSIAN.field("linear", "velocity", calls), normal(2, 2), **options)
        grid = 0.1 + 0.8 * shift_times(torch.linspace(0, 1, 9, dtype=torch.float64), shift)
        expected = grid.flip(0)[:-1] if reverse else grid[:-1]
        torch.testing.assert_close(torch.tensor(calls, dtype=torch.float64), expected)
    assert calls[4] < 0.4  # half the way


def test_heun_calls_twice_a_step():
    for method, count in (("euler", 5), ("heun", 10)):
        calls = []
        sample_ode(GAUSSIAN.field("linear", "velocity", calls), normal(2, 2), method=method, steps=5)
        assert len(calls) == count


@pytest.mark.parametrize("method", ODE_METHODS)
def test_the_callback_follows_an_ode(method):
    seen = []
    noise = normal(4, 2)
    field = GAUSSIAN.field("linear", "velocity")
    out = sample_ode(field, noise, method=method, steps=4, callback=lambda *a: seen.append(a))
    steps, times, states = zip(*seen, strict=True)
    assert list(steps) == list(range(1, len(seen) + 1)) and times[-1] == 1 and states[-1].equal(out)
    assert list(times) == sorted(times) and times[0] > 0
    for step, time, state in seen:  # the state at that time, not the one before
        if method == "dopri5":
            torch.testing.assert_close(state, gaussian_flow(noise, 0.0, time, "linear"), rtol=0, atol=2e-3)
        else:
            torch.testing.assert_close(state, sample_ode(field, noise, method=method, steps=step, interval=(0, time)))


def test_states_are_float32_at_least_and_no_graph_is_kept():
    seen = []

    def model(x, t):
        seen.append((x.dtype, t.dtype, t.shape, torch.is_grad_enabled()))
        return x

    for dtype, state in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        noise = normal(2, 3, 4, 4, dtype=dtype).requires_grad_()
        outs = [sample_ode(model, noise, method=method, steps=2) for method in ODE_METHODS]
        outs.append(sample_sde(model, noise, steps=3))
        assert {out.dtype for out in outs} == {state} and not any(out.requires_grad for out in outs)
        assert set(seen) == {(state, state, (2,), False)}
        seen.clear()


def test_a_model_that_is_not_finite_is_named():
    with pytest.raises(RuntimeError, match="dopri5 finds no step"):
        sample_ode(lambda x, t: x / (t - t).view(-1, 1), normal(2, 2))

    def failing(x, t):
        raise AssertionError("of the model's own")

    with pytest.raises(AssertionError, match="of the model's own"):
        sample_ode(failing, normal(2, 2))


# --- the SDE ---


def by_hand(form, norm, path, t):
    alpha, sigma, d_alpha, d_sigma = exact(path, t)
    return {
        "constant": norm,
        "sbdm": norm * (d_alpha / alpha * sigma**2 - sigma * d_sigma),
        "sigma": norm * sigma,
        "linear": norm * (1 - t),
        "decreasing": (norm * math.cos(math.pi * t) + 1) ** 2 / 4,
        "increasing-decreasing": norm * math.sin(math.pi * t) ** 2,
    }[form]


@pytest.mark.parametrize("form", DIFFUSIONS)
@pytest.mark.parametrize("path", PATHS)
def test_one_step_is_the_formula(path, form):
    x, start, end, norm = normal(5, 2), 0.3, 0.45, 0.7
    random = torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    g, h = by_hand(form, norm, path, start), end - start

    def drift(x, t):
        return MIXTURE.at(x, t, path, "velocity") + by_hand(form, norm, path, t) * MIXTURE.at(x, t, path, "score")

    options = {"last_step": None, "diffusion": form, "diffusion_norm": norm, "interval": (start, end), "steps": 1}
    field = MIXTURE.field(path, "velocity")
    euler, heun = (sample_sde(field, x, path, method=m, generator=generator(), **options) for m in ("euler", "heun"))
    noise = math.sqrt(2 * g * h) * random
    torch.testing.assert_close(euler, x + h * drift(x, start) + noise)
    first = drift(x + noise, start)
    second = drift(x + noise + h * first, end)
    torch.testing.assert_close(heun, x + noise + h / 2 * (first + second))


LINE = Mixture([1.0], [[0.8]], [[[0.3]]])


def moments(path, form, method, steps, interval, monkeypatch):
    """Mean and variance of the chain, exactly: for a linear drift the result is affine in every random number.

    The batch is a first row without noise, one for the start's, and one for each step's, which has a unit there.
    """
    alpha, sigma, *_ = exact(path, interval[0])
    start = torch.full((steps + 2, 1), alpha * 0.8, dtype=torch.float64)
    start[1] += math.sqrt(alpha**2 * 0.3 + sigma**2)
    step = iter(range(2, steps + 2))

    def unit(x, _):
        row = torch.zeros_like(x)
        row[next(step)] = 1
        return row

    monkeypatch.setattr(module, "normal_like", unit)
    field = LINE.field(path, "velocity")
    options = {"method": method, "steps": steps, "diffusion": form, "last_step": None, "interval": interval}
    out = sample_sde(field, start, path, **options)[:, 0]
    return out[0].item(), ((out[1:] - out[0]) ** 2).sum().item()


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("form", DIFFUSIONS)
@pytest.mark.parametrize("path", PATHS)
def test_sde_samplers_are_of_weak_order_1(path, form, method, monkeypatch):
    interval = (0.2, 0.9)
    alpha, sigma, *_ = exact(path, interval[1])
    mean, variance = alpha * 0.8, alpha**2 * 0.3 + sigma**2
    found = [moments(path, form, method, steps, interval, monkeypatch) for steps in (32, 64, 128)]
    errors = [abs(m - mean) + abs(v - variance) for m, v in found]
    assert errors[-1] < 0.04
    assert all(slope > 0.8 for slope in orders(errors)), errors


@pytest.mark.parametrize("form", DIFFUSIONS)
@pytest.mark.parametrize("method", SDE_METHODS)
def test_sde_samplers_reach_the_mixture(form, method):
    samples = sample_sde(
        MIXTURE.field("linear", "velocity"), normal(3000, 2), method=method, diffusion=form, last_step="tweedie",
        last_step_size=0.01, steps=100, generator=generator(),
    )  # fmt: skip
    # "constant" is stiff near the data, and its steps are not small there
    assert_samples_of(samples, MIXTURE, bias=0.04)


@pytest.mark.parametrize("path", ["gvp", "vp"])
def test_sits_default_reaches_the_mixture_on_every_path(path):
    samples = sample_sde(MIXTURE.field(path, "velocity"), normal(3000, 2), path, generator=generator())
    assert_samples_of(samples, MIXTURE, bias=0.04)


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rule", LAST_STEPS)
def test_last_steps(rule, path, method):
    """The steps before are those to 1 - size; then one call of the model and one formula."""
    size, noise, calls = 0.1, normal(6, 2), []
    field = MIXTURE.field(path, "velocity", calls)
    options = {"method": method, "diffusion": "linear", "diffusion_norm": 0.5}
    before = sample_sde(
        field, noise, path, steps=9, last_step=None, interval=(0.0, 1 - size), generator=generator(), **options
    )
    per_step = len(calls) // 9
    calls.clear()
    after = sample_sde(
        field, noise, path, steps=10, last_step=rule, last_step_size=size, generator=generator(), **options
    )
    assert len(calls) == 9 * per_step + 1 and calls[-1] == pytest.approx(1 - size)
    velocity, score, data = (MIXTURE.at(before, 1 - size, path, kind) for kind in ("velocity", "score", "data"))
    expected = {
        "mean": before + size * (velocity + 0.5 * size * score),
        "euler": before + size * velocity,
        "tweedie": data,
    }[rule]
    torch.testing.assert_close(after, expected)


def test_the_steps_are_sits():
    """250: 249 even ones to 0.96, and the last."""
    calls = []
    sample_sde(GAUSSIAN.field("linear", "velocity", calls), normal(2, 2))
    torch.testing.assert_close(torch.tensor(calls), torch.linspace(0, 0.96, 250))
    calls.clear()
    sample_sde(GAUSSIAN.field("linear", "velocity", calls), normal(2, 2), steps=6, shift=3.0)
    grid = 0.96 * shift_times(torch.linspace(0, 1, 6, dtype=torch.float64), 3.0)
    torch.testing.assert_close(torch.tensor(calls, dtype=torch.float64), grid)


@pytest.mark.parametrize("last_step", [None, *LAST_STEPS])
@pytest.mark.parametrize("path", PATHS)
def test_the_same_field_gives_the_same_samples_whichever_way_it_is_predicted(path, last_step):
    interval = (0.01, 0.99)
    outs = [
        sample_sde(
            MIXTURE.field(path, kind), normal(4, 2), path, prediction=kind, steps=30, last_step=last_step,
            interval=interval, generator=generator(), diffusion="increasing-decreasing",
        )
        for kind in PREDICTIONS
    ]  # fmt: skip
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-8, atol=1e-8)


def test_without_diffusion_it_is_the_ode():
    field, noise = MIXTURE.field("gvp", "velocity"), normal(4, 2)
    for method in SDE_METHODS:
        options = {"method": method, "steps": 12, "interval": (0.0, 0.9), "shift": 2.0}
        sde = sample_sde(field, noise, "gvp", diffusion_norm=0.0, last_step=None, **options)
        torch.testing.assert_close(sde, sample_ode(field, noise, "gvp", **options))


def test_noise_is_the_generators_alone():
    field, noise = MIXTURE.field("linear", "velocity"), normal(4, 2)
    state = torch.get_rng_state()
    first, again, other = (sample_sde(field, noise, steps=5, generator=generator(seed)) for seed in (0, 0, 1))
    assert first.equal(again) and not torch.allclose(first, other)
    assert torch.get_rng_state().equal(state)
    assert not torch.allclose(*(sample_sde(field, noise, steps=5) for _ in range(2)))


def test_each_sample_has_its_generator():
    field, noise = MIXTURE.field("linear", "velocity"), normal(4, 2)
    whole = sample_sde(field, noise, steps=5, generator=[generator(seed) for seed in range(4)])
    for i in range(4):
        alone = sample_sde(field, noise[i : i + 1], steps=5, generator=[generator(i)])
        torch.testing.assert_close(alone[0], whole[i])


@pytest.mark.parametrize("last_step", [None, "mean"])
@pytest.mark.parametrize("method", SDE_METHODS)
def test_the_callback_follows_an_sde(method, last_step):
    seen = []
    out = sample_sde(
        GAUSSIAN.field("linear", "velocity"), normal(2, 2), method=method, steps=4, last_step=last_step,
        interval=(0.0, 0.8), callback=lambda *a: seen.append(a),
    )  # fmt: skip
    steps, times, states = zip(*seen, strict=True)
    assert steps == (1, 2, 3, 4) and states[-1].equal(out)
    expected = [0.2, 0.4, 0.6, 0.8] if last_step is None else [0.76 / 3, 1.52 / 3, 0.76, 0.8]
    assert list(times) == pytest.approx(expected)


def test_fixed_steps_wait_for_no_device():
    """The meta device has no values to look at, and refuses tensors of another."""
    noise = torch.empty(3, 4, 8, 8, device="meta")
    assert sample_ode(lambda x, t: x * t.view(-1, 1, 1, 1), noise, method="heun", steps=3).device.type == "meta"
    for source in (generator(), [generator(seed) for seed in range(3)], None):
        for form in DIFFUSIONS:
            out = sample_sde(lambda x, t: x, noise, "vp", diffusion=form, steps=4, method="heun", generator=source)
            assert out.device.type == "meta" and out.shape == noise.shape


# --- intervals ---


@pytest.mark.parametrize(
    ("path", "prediction", "options", "start", "end"),
    [
        ("linear", "velocity", {}, 0, 0),
        ("gvp", "velocity", {}, 0, 0),
        ("vp", "velocity", {}, 0, 1e-3),
        ("linear", "noise", {}, 1e-3, 0),
        ("gvp", "score", {}, 1e-3, 0),
        ("linear", "data", {}, 0, 1e-3),
        ("vp", "noise", {}, 0, 1e-3),
        ("vp", "score", {}, 0, 1e-3),
        ("linear", "velocity", {"diffusion": "sigma", "last_step": "mean"}, 0, 0),
        ("linear", "velocity", {"diffusion": "sigma"}, 0, 1e-3),
        ("linear", "velocity", {"diffusion": "sbdm", "last_step": "mean"}, 1e-3, 0),
        ("gvp", "velocity", {"diffusion": "sbdm", "last_step": "euler"}, 1e-3, 0),
        ("vp", "velocity", {"diffusion": "sbdm", "last_step": "euler"}, 0, 0),
        ("gvp", "noise", {"diffusion": "linear", "last_step": "tweedie"}, 1e-3, 0),
        ("linear", "data", {"diffusion": "linear", "last_step": "tweedie"}, 0, 0),
        ("linear", "noise", {"eps": 0.02}, 0.02, 0),
    ],
)
def test_sampling_keeps_from_the_ends_that_need_it(path, prediction, options, start, end):
    assert sampling_interval(path, prediction, **options) == (start, 1 - end)


@pytest.mark.parametrize("last_step", [None, *LAST_STEPS])
@pytest.mark.parametrize("form", DIFFUSIONS)
@pytest.mark.parametrize("path", PATHS)
def test_no_default_stands_on_a_singular_end(path, form, last_step):
    for prediction in PREDICTIONS:
        calls = []
        field = GAUSSIAN.field(path, prediction, calls)
        out = sample_sde(
            field, normal(2, 2, dtype=torch.float32), path, prediction=prediction, method="heun", steps=3, diffusion=form,
            last_step=last_step, generator=generator(),
        )  # fmt: skip
        assert out.isfinite().all() and max(calls) < 1


FIELD, NOISE = GAUSSIAN.field("linear", "velocity"), normal(2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_ode(FIELD, NOISE, "cosine"), "unknown path 'cosine': choose from linear, gvp, vp"),
        (lambda: sample_ode(FIELD, NOISE, prediction="v"), "unknown prediction 'v'"),
        (lambda: sample_ode(FIELD, NOISE, prediction="v", interval=(0, 1)), "unknown prediction 'v'"),
        (lambda: sample_ode(FIELD, NOISE, method="rk4"), "unknown ODE sampler 'rk4': choose from euler, heun, dopri5"),
        (lambda: sample_ode(FIELD, NOISE, method="heun", steps=0), "at least one step, got 0"),
        (lambda: sample_ode(FIELD, NOISE, steps=-1), "at least one step, got -1"),
        (lambda: sample_ode(FIELD, NOISE, shift=0), "shift is a positive number"),
        (lambda: sample_ode(FIELD, NOISE, interval=(0, 1.1)), "0 <= start < end <= 1"),
        (lambda: sample_ode(FIELD, NOISE, interval=(0.7, 0.3)), "0 <= start < end <= 1"),
        (lambda: sample_ode(lambda x, t: torch.cat((x, x), 1), NOISE), r"returned \[2, 4\] for x of shape \[2, 2\]"),
        (lambda: sample_sde(FIELD, NOISE, "cosine"), "unknown path 'cosine'"),
        (lambda: sample_sde(FIELD, NOISE, prediction="v"), "unknown prediction 'v'"),
        (lambda: sample_sde(FIELD, NOISE, method="dopri5"), "unknown SDE sampler 'dopri5': choose from euler, heun"),
        (lambda: sample_sde(FIELD, NOISE, diffusion="none"), "unknown diffusion form 'none'"),
        (lambda: sample_sde(FIELD, NOISE, diffusion_norm=-1), "diffusion_norm is not negative"),
        (lambda: sample_sde(FIELD, NOISE, last_step="Mean"), "unknown last step 'Mean': choose from None, mean"),
        (lambda: sample_sde(FIELD, NOISE, steps=1), "at least one step, and one before a last step of its own, got 1"),
        (lambda: sample_sde(FIELD, NOISE, steps=0, last_step=None), "at least one step"),
        (lambda: sample_sde(FIELD, NOISE, last_step_size=1.0), "a part of the interval 0 to 1, got 1"),
        (lambda: sample_sde(FIELD, NOISE, last_step_size=0.0), "a part of the interval"),
        (lambda: sample_sde(FIELD, NOISE, interval=(-0.1, 1)), "0 <= start < end <= 1"),
        (lambda: sample_sde(FIELD, NOISE, generator=[generator()]), "1 generators for a batch of 2"),
        (lambda: sampling_interval("linear", diffusion="none"), "unknown diffusion form 'none'"),
        (lambda: sampling_interval("linear", last_step="last"), "unknown last step 'last'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
