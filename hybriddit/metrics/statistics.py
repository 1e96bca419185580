"""Scores from features and logits: Fréchet distance, inception score, precision and recall. All in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .processes import gather, share, total


class Moments(NamedTuple):
    """Mean [F] and scatter [F, F], the sum of (x - mean)(x - mean)ᵀ, of `count` feature vectors; float64."""

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @property
    def covariance(self) -> torch.Tensor:
        """The covariance [F, F], unbiased (divided by count - 1), as in numpy.cov and the ADM suite."""
        return self.scatter / (self.count - 1)


def moments(features: torch.Tensor) -> Moments:
    """The moments of [N, F] features, N at least 1, computed in float64."""
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return Moments(len(features), mean, centred.T @ centred)


def merge(one: Moments, other: Moments) -> Moments:
    """The moments of the union of two sets, without the cancellation that sums of squares have."""
    count = one.count + other.count
    step = other.mean - one.mean
    mean = one.mean + step * (other.count / count)
    scatter = one.scatter + other.scatter + torch.outer(step, step) * (one.count * other.count / count)
    return Moments(count, mean, scatter)


def merge_processes(own: Moments, count: int, distributed: bool) -> Moments:
    """The moments of all `count` features, from every process's own."""
    if not distributed:
        return own
    mean = total(own.mean * own.count, distributed) / count
    step = own.mean - mean
    return Moments(count, mean, total(own.scatter + own.count * torch.outer(step, step), distributed))


def frechet_distance(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """The squared Fréchet distance of two Gaussians, as in FID (Heusel et al., 1706.08500).

    It is |m - m'|² + tr(C + C' - 2 (C C')^½).

    Means are [F], covariances [F, F]. The trace of (C C')^½ is the sum of the singular values of Aᵀ A', where A Aᵀ = C
    comes from C's eigenvalues in float64: no root of an unsymmetric matrix is taken, and singular covariances (fewer
    images than features) need no offset. Raises ValueError for shapes that do not fit or values that are not finite.
    """
    parts = [part.double() for part in (mean, covariance, other_mean, other_covariance)]
    width = len(parts[0])
    if [tuple(part.shape) for part in parts] != [(width,), (width, width)] * 2:
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise ValueError(f"means and covariances must be [F] and [F, F] of one width, not {shapes}")
    if not all(part.isfinite().all() for part in parts):
        raise ValueError("means or covariances are not finite")
    mean, covariance, other_mean, other_covariance = (part.to(parts[0].device) for part in parts)
    root = torch.linalg.svdvals(_factor(covariance).T @ _factor(other_covariance)).sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * root
    return max(distance.item(), 0.0)  # equal sets give about -1e-10


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """A factor A [F, rank] of the covariance = A Aᵀ."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    # an eigenvalue of zero is computed as about 1e-16, whose root would add 1e-8
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def inception_score(logits: torch.Tensor, split_size: int = 5000) -> float:
    """The inception score exp(mean KL(p(y|x) | p(y))) of [N, C] logits: the mean over splits of `split_size` in order.

    As in the ADM suite (Dhariwal and Nichol, 2105.05233) the logits are Inception's without bias, and a last split that
    is not full counts as much as the others. Samples sorted by class must be shuffled first: else a split holds only
    some of the classes, and the score is too low.
    """
    sums = split_sums(logits, torch.arange(len(logits)), len(logits), split_size)
    return score_of_splits(sums, len(logits), split_size)


def split_sums(logits: torch.Tensor, positions: torch.Tensor, count: int, split_size: int) -> torch.Tensor:
    """Sums over [B, C] logits for the inception score: Σ p and Σ p log p of each split, [splits, C + 1].

    positions [B]: the rows' indices among all `count`, which determine their splits.
    """
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    rows = torch.cat([p, (p * log_p).sum(1, keepdim=True)], 1)
    sums = rows.new_zeros(-(-count // split_size), rows.shape[1])
    return sums.index_add_(0, (positions // split_size).to(rows.device), rows)


def score_of_splits(sums: torch.Tensor, count: int, split_size: int) -> float:
    """The inception score from the sums of `split_sums` over all `count` images."""
    first = torch.arange(len(sums), device=sums.device) * split_size
    sizes = (count - first).clamp(max=split_size)
    means = sums / sizes[:, None]
    marginal, negative_entropy = means[:, :-1], means[:, -1]
    return (negative_entropy - torch.xlogy(marginal, marginal).sum(1)).exp().mean().item()


def precision_recall(
    reference: torch.Tensor,
    samples: torch.Tensor,
    neighbours: int = 3,
    *,
    block: int = 4096,
    distributed: bool = False,
) -> tuple[float, float]:
    """The improved precision and recall of Kynkäänniemi et al. (1904.06991), as the ADM suite computes them.

    reference [N, F], samples [M, F]. Every vector has a ball whose radius is the distance to its `neighbours`-th
    nearest other vector of its own set. Precision is the share of samples in some reference vector's ball, recall the
    share of reference vectors in some sample's ball; the surface belongs to the ball. Both depend on the numbers of
    images: ADM takes 10,000 reference images and 50,000 samples.

    Squared distances are computed in float64, block x block at a time; those within rounding of 0, as between equal
    vectors, are set to 0. (ADM computes in float16 where that does not overflow, about three digits, else in float32.)
    distributed: every process calls this with the same features and takes a share of the rows. Raises ValueError if a
    set has at most `neighbours` vectors, if widths differ, or if values are not finite.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(f"features must be [N, F] and [M, F], not {list(reference.shape)} and {list(samples.shape)}")
    if min(len(reference), len(samples)) <= neighbours:
        counts = f"{len(reference)} reference images and {len(samples)} samples"
        raise ValueError(f"precision and recall take at least {neighbours + 1} images of each, not {counts}")
    centre = reference.double().mean(0)  # centring makes numbers smaller, and their differences more precise
    if not (centre.isfinite().all() and samples.isfinite().all()):
        raise ValueError("features are not finite")
    reference, samples = reference - centre.to(reference.dtype), samples - centre.to(samples.dtype)
    radii = _radii(reference, neighbours, block, distributed)
    sample_radii = _radii(samples, neighbours, block, distributed)
    rows = share(len(reference), distributed)
    reference_inside = torch.zeros(len(rows), dtype=torch.bool, device=reference.device)
    samples_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    for i in range(rows.start, rows.stop, block):
        own = slice(i, min(i + block, rows.stop))
        for j in range(0, len(samples), block):
            distances = _squared_distances(reference[own], samples[j : j + block])
            at = slice(own.start - rows.start, own.stop - rows.start)
            reference_inside[at] |= (distances <= sample_radii[j : j + block]).any(1)
            samples_inside[j : j + block] |= (distances <= radii[own, None]).any(0)
    precision = (total(samples_inside.int(), distributed) > 0).double().mean().item()
    recall = total(reference_inside.sum(), distributed).item() / len(reference)
    return precision, recall


def _radii(features: torch.Tensor, neighbours: int, block: int, distributed: bool) -> torch.Tensor:
    """Squared distance of each vector to its k-th nearest other one, [N]: the k + 1-th nearest with itself counted."""
    rows = share(len(features), distributed)
    radii = []
    for i in range(rows.start, rows.stop, block):
        own = features[i : min(i + block, rows.stop)]
        nearest = own.new_full((len(own), neighbours + 1), float("inf"), dtype=torch.float64)
        for j in range(0, len(features), block):
            distances = _squared_distances(own, features[j : j + block])
            nearest = torch.cat([nearest, distances], 1).topk(neighbours + 1, largest=False).values
        radii.append(nearest.amax(1))
    return gather(torch.cat(radii), len(features), distributed)


def _squared_distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    one, other = one.double(), other.double()
    norms = one.square().sum(1)[:, None] + other.square().sum(1)
    distances = torch.addmm(norms, one, other.T, alpha=-2)
    return distances.masked_fill_(distances < norms * 1e-13, 0)
