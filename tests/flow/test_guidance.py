import pytest
import torch
from known_fields import normal

from hybriddit.flow import convert, guided

LABELS = torch.tensor([3, 1, 4])
NULL = 10
X, T = normal(3, 4, 2, 2), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)


def model(x, t, labels):
    """Any function that tells samples, times and labels apart."""
    return torch.sin(x * (1 + labels.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1))


class Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, x, t, labels):
        self.calls.append((x, t, labels))
        return model(x, t, labels)


WITH, WITHOUT = model(X, T, LABELS), model(X, T, torch.full((3,), NULL))


def test_the_formula_in_one_call():
    record = Recorder()
    out = guided(record, LABELS, NULL, 4.0)(X, T)
    torch.testing.assert_close(out, WITHOUT + 4 * (WITH - WITHOUT))
    ((x, t, labels),) = record.calls
    assert x.equal(torch.cat((X, X))) and t.equal(torch.cat((T, T)))
    assert labels.tolist() == [3, 1, 4, 10, 10, 10]


def test_null_labels_of_each_sample():
    null = torch.tensor([7, 8, 9])
    out = guided(model, LABELS, null, 2.0)(X, T)
    torch.testing.assert_close(out, 2 * WITH - model(X, T, null))


def test_scale_zero_and_one():
    torch.testing.assert_close(guided(model, LABELS, NULL, 0.0)(X, T), WITHOUT)
    record = Recorder()
    assert guided(record, LABELS, NULL, 1.0)(X, T).equal(WITH)
    assert len(record.calls[0][0]) == 3  # at no cost


def test_the_other_channels_are_unguided():
    out = guided(model, LABELS, NULL, 4.0, channels=3)(X, T)
    assert out[:, 3:].equal(WITH[:, 3:])
    torch.testing.assert_close(out[:, :3], (WITHOUT + 4 * (WITH - WITHOUT))[:, :3])
    assert guided(model, LABELS, NULL, 4.0, channels=4)(X, T).equal(guided(model, LABELS, NULL, 4.0)(X, T))


@pytest.mark.parametrize("channels", [None, 3])
def test_the_interval_includes_its_ends_and_leaves_the_rest_alone(channels):
    full = guided(model, LABELS, NULL, 4.0, channels=channels)(X, T)
    for interval, inside in [((0.1, 0.5), [1, 1, 0]), ((0.5, 1.0), [0, 1, 1]), ((0.0, 0.3), [1, 0, 0])]:
        out = guided(model, LABELS, NULL, 4.0, channels=channels, interval=interval)(X, T)
        for i, is_in in enumerate(inside):
            assert out[i].equal((full if is_in else WITH)[i])


def test_outside_the_interval_it_costs_nothing():
    record = Recorder()
    function = guided(record, LABELS, NULL, 4.0, interval=(0.2, 0.4))
    function(X, torch.full((3,), 0.5))
    function(X, torch.full((3,), 0.3))
    assert [len(x) for x, _, _ in record.calls] == [3, 6]


def test_over_all_channels_guidance_commutes_with_conversion():
    def as_noise(x, t, labels):
        return convert(model(x, t, labels), x, t, "gvp", "velocity", "noise")

    velocity, noise = (guided(function, LABELS, NULL, 3.0)(X, T) for function in (model, as_noise))
    torch.testing.assert_close(convert(noise, X, T, "gvp", "noise", "velocity"), velocity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": (0.7, 0.2)}, "0 <= start < end <= 1"),
        ({"interval": (0.7, 1.2)}, "0 <= start < end <= 1"),
        ({"channels": 0}, "at least 1"),
        ({"channels": 5}, "cannot guide the first 5 of 4 channels"),
        ({"labels": LABELS[:2]}, "2 labels for a batch of 3"),
        ({"null_labels": LABELS[:2]}, "2 null labels for 3 labels"),
    ],
)
def test_bad_input(options, message):
    options = {"labels": LABELS, "null_labels": NULL} | options
    with pytest.raises(ValueError, match=message) as error:
        guided(model, scale=2.0, **options)(X, T)
    assert "\n" not in str(error.value)
