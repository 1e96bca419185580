"""Targets whose fields are known at every time, written from the definitions and not from the code under test.

x_t = alpha data + sigma noise of a Gaussian mixture is a Gaussian mixture: its score and E[data | x_t] are those of its
parts, in the shares that the parts have in x_t; E[noise | x_t] = -sigma score; velocity = alpha' data + sigma' noise.
"""

import math

import torch


def exact(path, t):
    """alpha, sigma, alpha', sigma' of SiT's paths (arXiv 2401.08740), as floats."""
    if path == "linear":
        return t, 1 - t, 1.0, -1.0
    if path == "gvp":
        angle = math.pi * t / 2
        return math.sin(angle), math.cos(angle), math.pi / 2 * math.cos(angle), -math.pi / 2 * math.sin(angle)
    s = 1 - t
    # alpha = exp(-1/2 integral of beta from 0 to s), beta = 0.1 + 19.9 s
    beta = 0.1 + 19.9 * s
    alpha = math.exp(-0.5 * (0.1 * s + 19.9 * s**2 / 2))
    sigma = math.sqrt(1 - alpha**2)
    return alpha, sigma, 0.5 * beta * alpha, -0.5 * beta * alpha**2 / sigma


class Mixture:
    """sum_k weight_k N(mean_k, covariance_k) in D dimensions; one component is a Gaussian."""

    def __init__(self, weights, means, covariances):
        self.weights, self.means, self.covariances = (
            torch.tensor(x, dtype=torch.float64) for x in (weights, means, covariances)
        )
        self.dimensions = self.means.shape[1]

    def mean(self):
        return self.weights @ self.means

    def covariance(self):
        offset = self.means - self.mean()
        inside = (self.weights[:, None, None] * self.covariances).sum(0)
        return inside + torch.einsum("k,ki,kj->ij", self.weights, offset, offset)

    def _parts(self, x, alpha, sigma):
        """Of each part at one time: log-density [B, K], score [B, K, D], posterior mean of the data [B, K, D]."""
        covariance = alpha**2 * self.covariances + sigma**2 * torch.eye(self.dimensions, dtype=torch.float64)
        offset = x[:, None] - alpha * self.means
        solved = torch.einsum("kij,bkj->bki", torch.linalg.inv(covariance), offset)
        log_density = (
            self.weights.log()
            - 0.5 * (offset * solved).sum(-1)
            - 0.5 * torch.linalg.slogdet(covariance)[1]
            - 0.5 * self.dimensions * math.log(2 * math.pi)
        )
        return log_density, -solved, self.means + alpha * torch.einsum("kij,bkj->bki", self.covariances, solved)

    def log_density(self, x, alpha=1.0, sigma=0.0):
        return self._parts(x, alpha, sigma)[0].logsumexp(1)

    def field(self, path, prediction, calls=None):
        """The exact model function of (x [B, D], t [B]); all t of a call are the same, and go to `calls`."""

        def function(x, t):
            assert t.shape == (len(x),) and (t == t[0]).all()
            time = t[0].item()
            if calls is not None:
                calls.append(time)
            return self.at(x.double(), time, path, prediction).to(x)

        return function

    def at(self, x, time, path, prediction):
        alpha, sigma, d_alpha, d_sigma = exact(path, time)
        log_density, scores, posteriors = self._parts(x, alpha, sigma)
        share = log_density.softmax(1)[..., None]
        data, score = (share * posteriors).sum(1), (share * scores).sum(1)
        kinds = {"data": data, "score": score, "noise": -sigma * score}
        return d_alpha * data - d_sigma * sigma * score if prediction == "velocity" else kinds[prediction]

    def sample(self, count, generator):
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        normal = torch.randn(count, self.dimensions, generator=generator, dtype=torch.float64)
        return self.means[which] + torch.einsum("bij,bj->bi", torch.linalg.cholesky(self.covariances)[which], normal)


GAUSSIAN = Mixture([1.0], [[0.7, -0.4]], [[[0.30, 0.12], [0.12, 0.20]]])
MIXTURE = Mixture(
    [0.3, 0.7], [[-1.5, 0.5], [1.0, -0.5]], [[[0.10, 0.03], [0.03, 0.20]], [[0.25, -0.10], [-0.10, 0.15]]]
)
TARGETS = {"gaussian": GAUSSIAN, "mixture": MIXTURE}


def gaussian_flow(noise, start, end, path, target=GAUSSIAN):
    """Where the ODE takes x from one time to another: the affine map between the marginals (for one component).

    The velocity is linear in x with a matrix that is a function of the covariance at every time, so that all commute: in
    the covariance's eigenbasis each coordinate is scaled by the ratio of its standard deviations.
    """
    values, basis = torch.linalg.eigh(target.covariances[0])

    def deviation(time):
        alpha, sigma, *_ = exact(path, time)
        return (alpha**2 * values + sigma**2).sqrt(), alpha * target.means[0]

    (before, mean_before), (after, mean_after) = deviation(start), deviation(end)
    return ((noise - mean_before) @ basis * (after / before)) @ basis.T + mean_after


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
