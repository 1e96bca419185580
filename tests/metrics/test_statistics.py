import math

import numpy as np
import pytest
import scipy.linalg
import torch
from standins import score, share_inside

from hybriddit.metrics import (
    frechet_distance,
    inception_score,
    merge,
    moments,
    precision_recall,
    spatial_features,
    to_uint8,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_gaussians_whose_distance_is_known():
    """Commuting covariances: the distance is |m - m'|² + Σ (σ - σ')²."""
    rotation = torch.linalg.qr(random(6, 6)).Q
    one, other = (torch.tensor(values, dtype=torch.float64) for values in ([1, 4, 9, 0, 2, 0], [4, 1, 9, 3, 0, 0]))
    covariances = [rotation @ torch.diag(values) @ rotation.T for values in (one, other)]
    mean = random(6, seed=1)
    expected = mean.square().sum() + (one.sqrt() - other.sqrt()).square().sum()
    found = frechet_distance(mean, covariances[0], torch.zeros(6), covariances[1])
    assert found == pytest.approx(expected.item(), rel=1e-12)


def test_covariances_that_do_not_commute_as_scipy_has_them():
    roots = [random(9, 9, seed=seed) for seed in (0, 1)]
    one, other = (root @ root.T for root in roots)
    means = random(2, 9, seed=2)
    root = scipy.linalg.sqrtm((one @ other).numpy())
    expected = (means[0] - means[1]).square().sum() + one.trace() + other.trace() - 2 * np.trace(root).real
    assert frechet_distance(means[0], one, means[1], other) == pytest.approx(expected.item(), rel=1e-9)


def test_fewer_images_than_features():
    """The exact value by the data themselves: the singular values of X Yᵀ."""
    one, other = random(10, 64), 1.3 * random(14, 64, seed=1) + 0.2
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (one, other))
    root = torch.linalg.svdvals(a @ b.T).sum()
    gap = (one.mean(0) - other.mean(0)).square().sum()
    expected = gap + a.square().sum() + b.square().sum() - 2 * root
    m, n = moments(one), moments(other)
    found = frechet_distance(m.mean, m.covariance, n.mean, n.covariance)
    assert found == pytest.approx(expected.item(), rel=1e-11)
    assert 0 <= frechet_distance(m.mean, m.covariance, m.mean, m.covariance) < 1e-11
    assert frechet_distance(torch.ones(3), torch.zeros(3, 3), torch.zeros(3), torch.zeros(3, 3)) == 3


def test_small_variances_beside_large_ones_keep_their_part():
    scale = torch.logspace(0, -5, 40, dtype=torch.float64)
    one, other = torch.diag(scale.square()), torch.diag((2 * scale).square())
    zero = torch.zeros(40)
    assert frechet_distance(zero, one, zero, other) == pytest.approx(scale.square().sum().item(), rel=1e-12)


def test_moments_are_numpys_in_any_batches():
    """Far from zero, where sums of squares would leave nothing of the covariance."""
    features = random(101, 5) + 1e7
    merged = moments(features[:1])
    for start, stop in ((1, 40), (40, 41), (41, 101)):
        merged = merge(merged, moments(features[start:stop]))
    assert merged.count == 101
    np.testing.assert_allclose(merged.mean, features.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-7)
    assert moments(features.float()).scatter.dtype == torch.float64


def test_inception_score_by_splits():
    logits = 2 * random(23, 5)
    for split_size in (23, 5000, 10, 7):
        assert inception_score(logits, split_size) == pytest.approx(score(logits.numpy(), split_size), rel=1e-12)
    rounded = logits.float()
    assert inception_score(rounded, 7) == pytest.approx(score(rounded.double().numpy(), 7), rel=1e-13)
    # each image certain of its own class: the number of classes; far beyond what float32's softmax can hold
    assert inception_score(1e4 * torch.eye(8)) == pytest.approx(8, rel=1e-12)
    assert inception_score(torch.ones(9, 4)) == pytest.approx(1, rel=1e-12)


def test_splits_are_of_5000_and_in_the_order_given():
    classes = torch.arange(12_000) * 10 // 12_000
    logits = 40 * torch.nn.functional.one_hot(classes, 10).double()
    # sorted: splits hold 5 (4.17 + 0.83), 5 and 2 classes
    assert inception_score(logits) == pytest.approx(score(logits.numpy()), rel=1e-9)
    assert inception_score(logits) < 5
    mixed = logits[torch.randperm(12_000, generator=torch.Generator().manual_seed(0))]
    assert inception_score(mixed) == pytest.approx(10, rel=1e-2)


@pytest.mark.parametrize("neighbours, block", [(3, 4096), (3, 7), (1, 7), (5, 16)])
def test_precision_and_recall_by_brute_force(neighbours, block):
    reference = random(60, 4)
    samples = 0.6 * random(90, 4, seed=1) + torch.tensor([0.8, 0, 0, 0], dtype=torch.float64)
    precision, recall = precision_recall(reference, samples, neighbours, block=block)
    assert precision == share_inside(samples.numpy(), reference.numpy(), neighbours)
    assert recall == share_inside(reference.numpy(), samples.numpy(), neighbours)
    assert recall < precision < 1, "the example tells the two apart"
    assert precision_recall(reference.float(), samples.float(), neighbours) == (precision, recall)
    assert precision_recall(reference + 1e7, samples + 1e7, neighbours, block=block) == (precision, recall)


def test_precision_and_recall_of_sets_that_are_known():
    line = torch.arange(10, dtype=torch.float64)[:, None] * torch.ones(1, 3)
    assert precision_recall(line, line) == (1, 1)
    assert precision_recall(line, line + 1000) == (0, 0)
    # one ball's surface is inside: the end of the line reaches 3 steps, to -3 and no further
    ends = line - 3
    assert precision_recall(line, ends)[0] == 1
    assert precision_recall(line, ends - 1e-6)[0] == 0.9
    # a collapsed generator: all samples are one of the reference images, whose balls have no radius
    collapsed = line[4].expand(6, 3) + 1e5
    assert precision_recall(line + 1e5, collapsed) == (1, 0.1)
    for i in range(8):  # where products round
        reference = random(40, 33, seed=i)
        assert precision_recall(reference, reference[4].expand(9, 33), block=5 + i) == (1, 1 / 40)


def test_precision_is_not_symmetric():
    wide, narrow = 10 * random(50, 3), random(50, 3, seed=1)
    precision, recall = precision_recall(reference=wide, samples=narrow)
    assert precision == 1 and recall < 0.2


@pytest.mark.parametrize("kind, call, message", [
    (ValueError, lambda: precision_recall(random(3, 2), random(9, 2)), "at least 4 images of each, not 3 reference"),
    (ValueError, lambda: precision_recall(random(9, 2), random(9, 3)), r"\[N, F\] and \[M, F\]"),
    (ValueError, lambda: precision_recall(random(9, 2), random(9, 2) * float("nan")), "not finite"),
    (ValueError, lambda: frechet_distance(*[torch.ones(3), torch.eye(3), torch.ones(2), torch.eye(2)]), "one width"),
    (ValueError, lambda: frechet_distance(*[torch.ones(2), torch.eye(2) / 0] * 2), "not finite"),
    (TypeError, lambda: to_uint8(torch.zeros(2, dtype=torch.int32)), "floating-point"),
    (ValueError, lambda: to_uint8(torch.tensor([0.0, float("nan")])), "not finite"),
])  # fmt: skip
def test_bad_input_is_told(kind, call, message):
    with pytest.raises(kind, match=message):
        call()


def test_decoded_images_are_truncated_after_128():
    x = torch.tensor([-1.2, -1.0, -0.998, 0.0, 0.5, 0.996, 1.0, 1.2], dtype=torch.float64)
    found = to_uint8(x)
    assert found.dtype == torch.uint8 and found.tolist() == [0, 0, 0, 128, 191, 254, 255, 255]
    grid = torch.linspace(-1.1, 1.1, 4001, dtype=torch.float64)
    expected = [min(max(math.floor(127.5 * value + 128), 0), 255) for value in grid.tolist()]
    assert to_uint8(grid).tolist() == expected
    wrong = {
        "rounded": (127.5 * grid + 128).round(),
        "127.5 (x + 1)": 127.5 * (grid + 1),
        "128 x + 128": 128 * grid + 128,
    }
    for rule, values in wrong.items():
        assert values.clamp(0, 255).to(torch.uint8).tolist() != expected, rule
    # bfloat16 has 8 digits: the sum must not be of that type
    levels = torch.linspace(-1, 1, 97).bfloat16()
    assert torch.equal(to_uint8(levels), to_uint8(levels.float()))
    assert not torch.equal(to_uint8(levels), (127.5 * levels + 128).clamp(0, 255).to(torch.uint8))


def test_spatial_features_are_channels_last():
    """The value at (row, column, channel) stands at (row W + column) 7 + channel."""
    x = torch.arange(2 * 9 * 3 * 4).reshape(2, 9, 3, 4)
    found = spatial_features(x)
    assert found.shape == (2, 3 * 4 * 7)
    for image, row, column, channel in ((0, 0, 0, 6), (1, 2, 3, 6), (0, 1, 0, 2), (1, 0, 3, 5)):
        assert found[image, (row * 4 + column) * 7 + channel] == x[image, channel, row, column]
    assert not torch.equal(found, x[:, :7].flatten(1)), "NCHW is another order"
    assert spatial_features(torch.zeros(1, 192, 17, 17)).shape == (1, 2023)
