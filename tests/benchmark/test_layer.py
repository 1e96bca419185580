import pytest
import torch
from small_benchmarks import CPU, SMALL

from hybriddit.attention.mixers import MIXERS, LinearMixer
from hybriddit.benchmark.circular import circular_pairs
from hybriddit.benchmark.layer import device_variants, input_bytes, layer_cases, layer_work


def test_bytes_and_flops_by_hand():
    # a grid of 4 x 5 tokens, 3 of text, 2 heads x 8, 2 bytes a number: a token is 32 bytes
    def work(variant, direction, window=3):
        return layer_work(variant, SMALL, (4, 5), window, 2, 2)[direction]

    assert work("linear", "forward") == (4 * 20 * 32, 2 * 2 * 20 * 2 * 8 * 8)
    assert work("linear", "backward").bytes == 7 * 20 * 32
    assert work("linear", "forward + backward").bytes == 11 * 20 * 32
    # each image token sees 9 tokens of the window and 3 of text; a pair costs 8 multiply-adds twice, in 2 heads
    assert work("window", "forward") == (32 * (20 + 20 + 20 + 20 + 3 + 3), 20 * 12 * 8 * 2 * 2 * 2)
    assert work("window", "backward").bytes == 32 * (5 * 20 + 2 * 3 + 3 * 20 + 2 * 3)
    assert work("window", "forward", window=16).flops == 20 * 23 * 64, "a window ends with its grid"
    assert work("dense", "forward") == (4 * 23 * 32, 23 * 23 * 64)
    assert work("dense-flash", "backward") == (8 * 23 * 32, 2 * 23 * 23 * 64)
    assert work("dense", "forward + backward") == (12 * 23 * 32, 3 * 23 * 23 * 64)
    hybrid = 20 * 12 * 64 + 3 * 23 * 64 + 2 * 2 * 20 * 2 * 8 * 8
    assert work("hybrid", "forward") == (32 * (4 * 23 + 2 * 20), hybrid)
    assert work("hybrid", "backward").bytes == 32 * (8 * 23 + 4 * 20)
    # radius 2: the token, its 4 neighbours and the 4 diagonal ones, cut at the border
    near = sum(1 for a in range(20) for b in range(20) if (a // 5 - b // 5) ** 2 + (a % 5 - b % 5) ** 2 < 4)
    assert near == circular_pairs((4, 5), 2) and 20 * 4 < near < 20 * 9
    assert work("circular", "forward") == (4 * 23 * 32, (near + 20 * 3 + 3 * 23) * 64)


def test_shared_tensors_are_counted():
    cases = layer_cases(SMALL, 64, ["hybrid"], 3, 2, torch.float32, CPU, False)
    tensors = cases[0].inputs[:5]
    out = cases[0].forward()
    assert sum(x.nbytes for x in (*tensors, out)) == input_bytes(SMALL, 64, torch.float32, False)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [SMALL, SMALL._replace(text_first=False), SMALL._replace(text=0)])
def test_every_case_of_a_layer_runs_and_has_gradients(shape, backward):
    names = [name for name in device_variants(CPU) if name != "circular"]
    cases = layer_cases(shape, 80, names, 3, 2, torch.float32, CPU, backward)
    image, whole = 25, 25 + shape.text
    for case in cases:
        out = case.forward()
        assert out.shape == (1, whole if case.name in ("hybrid", "dense") else image, 2, 8) and out.isfinite().all()
        if backward:
            grads = torch.autograd.grad(out.sum(), case.inputs)
            assert all(grad.abs().sum() > 0 for grad in grads), case.name


def test_the_far_branch_is_the_mixer_that_is_counted(monkeypatch):
    class Last(LinearMixer):
        def forward(self, query, key, value, near=None, gate=None):
            return value if near is None else near + gate * (value - near)

        def flops(self, queries, keys):
            return {"products": 7 * queries, "normalization": 0}

    monkeypatch.setitem(MIXERS, "linear", Last)
    (linear,) = layer_cases(SMALL, 80, ["linear"], 3, 2, torch.float32, CPU, False)
    assert linear.forward() is linear.inputs[2]
    assert layer_work("linear", SMALL, (5, 5), 3, 2, 4)["forward"].flops == 7 * 25


def test_a_window_that_covers_the_grid_is_dense():
    window, dense = layer_cases(SMALL, 64, ["window", "dense"], 4, 2, torch.float64, CPU, False)
    torch.testing.assert_close(window.forward(), dense.forward()[:, 3:])
