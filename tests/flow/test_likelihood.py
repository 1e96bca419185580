import math

import pytest
import torch
from known_fields import GAUSSIAN, MIXTURE, exact, gaussian_flow, normal

from hybriddit.flow import PATHS, PREDICTIONS, log_likelihood, sampling_interval

TIGHT = {"rtol": 1e-7, "atol": 1e-8}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_the_exact_divergence_gives_the_known_density(path, prediction):
    data = MIXTURE.sample(12, generator())
    found, noise = log_likelihood(
        MIXTURE.field(path, prediction), data, path, prediction=prediction, probes=None, **TIGHT
    )
    start, end = sampling_interval(path, prediction)
    expected = MIXTURE.log_density(data, *exact(path, end)[:2])
    # the start is not yet standard normal: alpha is up to 0.0066 there, and the data's mean about 1
    assert (found - expected).abs().max() < (1e-5 if start == 0 and path != "vp" else 2e-2)
    assert noise.shape == data.shape


def test_the_noise_is_where_the_data_came_from():
    noise = normal(5, 2)
    data = gaussian_flow(noise, 0.0, 1.0, "linear")
    _, found = log_likelihood(GAUSSIAN.field("linear", "velocity"), data, **TIGHT)
    torch.testing.assert_close(found, noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "steps"), [("euler", 800), ("heun", 60)])
def test_fixed_steps(method, steps):
    data = GAUSSIAN.sample(6, generator())
    field = GAUSSIAN.field("gvp", "velocity")
    found, _ = log_likelihood(field, data, "gvp", probes=None, method=method, steps=steps)
    assert (found - GAUSSIAN.log_density(data)).abs().max() < 0.02


@pytest.mark.parametrize("probes", [1, 4])
def test_hutchinsons_estimate_is_unbiased(probes):
    """Of one sample, repeated with probes of its own: the mean within 4 standard errors, the spread as it has to be."""
    count = 400
    one = torch.tensor([[0.4, -0.3]], dtype=torch.float64)
    found, _ = log_likelihood(
        GAUSSIAN.field("linear", "velocity"), one.repeat(count, 1), probes=probes, generator=generator(),
        method="heun", steps=40,
    )  # fmt: skip
    exactly, _ = log_likelihood(GAUSSIAN.field("linear", "velocity"), one, probes=None, method="heun", steps=40)
    assert found.std() > 0.05
    assert (found.mean() - exactly).abs() < 4 * found.std() / math.sqrt(count)
    # v^T J v = trace + 2 v1 v2 J12 with v1 v2 = +-1: two values for one probe, five for the means of four
    assert len(found.mul(1e6).round().unique()) == probes + 1


def test_images_and_graphs():
    """Any shape; float32 as float64; no graph left behind."""
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-2)):
        data = (0.5 * normal(3, 2, 4, 4)).to(dtype).requires_grad_()

        def model(x, t):  # the velocity of N(0, 1/4) on the linear path
            t = t.view(-1, 1, 1, 1)
            return x * (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2)

        for probes in (None, 2):  # the Jacobian is diagonal: every probe is exact
            found, noise = log_likelihood(model, data, probes=probes, rtol=1e-6, atol=1e-7)
            expected = torch.distributions.Normal(0, 0.5).log_prob(data).sum((1, 2, 3))
            assert (found - expected).abs().max() < tolerance and found.dtype == noise.dtype == dtype
            assert noise.shape == data.shape and not found.requires_grad and not noise.requires_grad


def test_probes_are_the_generators_alone():
    data = normal(3, 2)
    field = MIXTURE.field("linear", "velocity")

    def run(generator, data=data):
        return log_likelihood(field, data, generator=generator, method="heun", steps=5)[0]

    seeds = [run(generator(seed)) for seed in (0, 0, 1, 2, 3)]
    assert seeds[0].equal(seeds[1]) and any(not torch.allclose(seeds[0], other) for other in seeds[2:])
    each = run([generator(seed) for seed in range(3)])
    torch.testing.assert_close(run([generator(2)], data[2:]), each[2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "at least one probe, or None"),
        ({"path": "cosine"}, "unknown path 'cosine'"),
        ({"prediction": "v"}, "unknown prediction 'v'"),
        ({"method": "rk4"}, "unknown ODE sampler 'rk4'"),
        ({"steps": 0}, "at least one step"),
        ({"interval": (0.0, 2.0)}, "0 <= start < end <= 1"),
        ({"generator": [generator()]}, "1 generators for a batch of 2"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message) as error:
        log_likelihood(GAUSSIAN.field("linear", "velocity"), normal(2, 2), **options)
    assert "\n" not in str(error.value)
