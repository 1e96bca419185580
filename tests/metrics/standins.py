"""A stand-in extractor, and the five scores once more: numpy and scipy, as the papers define them, nothing shared."""

import numpy as np
import scipy.linalg
import torch

SIDE = 6
PIXELS = SIDE * SIDE * 3
_maps = torch.Generator().manual_seed(0)
MAPS = {
    name: torch.randn(PIXELS, width, generator=_maps, dtype=torch.float64) / 4
    for name, width in (("pooled", 12), ("spatial", 20), ("logits", 7))
}


def extractor(images):
    """A fixed random linear map of the pixels."""
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, SIDE, SIDE) and images.is_contiguous()
    pixels = images.double().flatten(1) / 64
    return {name: pixels @ weights for name, weights in MAPS.items()}


def images(count, seed=0, low=0, high=256):
    """Clusters of different sizes, so that precision and recall are neither 0 nor 1."""
    random = np.random.default_rng(seed)
    centres = random.integers(low, high, (4, SIDE, SIDE, 3))
    spread = random.integers(5, 60, (count, 1, 1, 1))
    noise = random.normal(size=(count, SIDE, SIDE, 3)) * spread
    return (centres[random.integers(0, 4, count)] * 0.3 + 90 + noise).clip(0, 255).astype(np.uint8)


def features(array):
    found = extractor(torch.from_numpy(array).permute(0, 3, 1, 2).contiguous())
    return {name: part.numpy() for name, part in found.items()}


def fid(one, other):
    covariances = [np.cov(x, rowvar=False) for x in (one, other)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    mean = one.mean(0) - other.mean(0)
    return mean @ mean + np.trace(covariances[0] + covariances[1]) - 2 * np.trace(root).real


def score(logits, split_size=5000):
    scores = []
    for start in range(0, len(logits), split_size):
        part = logits[start : start + split_size]
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), 1))))
    return np.mean(scores)


def share_inside(points, balls, neighbours=3):
    """How many of the points lie in a ball around one of `balls`, which reaches to its k-th nearest other."""
    inside = 0
    radii = []
    for i, centre in enumerate(balls):
        others = np.delete(balls, i, axis=0)
        radii.append(np.sort(np.linalg.norm(others - centre, axis=1))[neighbours - 1])
    for point in points:
        inside += bool((np.linalg.norm(balls - point, axis=1) <= radii).any())
    return inside / len(points)


def all_scores(samples, reference, split_size=5000):
    ours, theirs = features(samples), features(reference)
    return {
        "inception_score": score(ours["logits"], split_size),
        "fid": fid(ours["pooled"], theirs["pooled"]),
        "sfid": fid(ours["spatial"], theirs["spatial"]),
        "precision": share_inside(ours["pooled"], theirs["pooled"]),
        "recall": share_inside(theirs["pooled"], ours["pooled"]),
    }
