import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hybriddit.models import FLUX, STABLE_DIFFUSION_3
from hybriddit.training.losses import captured_outputs, layer_loss


def test_layer_loss_is_relative_to_each_samples_variance():
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    teacher = {"a": (rand(2, 5, 3) * 100, rand(2, 4, 3)), "b": (rand(2, 9, 3) * 0.01 + 7,)}
    student = {name: tuple(t + 0.1 * rand(*t.shape) for t in parts) for name, parts in teacher.items()}

    def relative(s, t):
        s, t = s.double().numpy(), t.double().numpy()
        return sum(((a - b) ** 2).mean() / b.var() for a, b in zip(s, t, strict=True)) / len(t)

    (s1, s2), (t1, t2) = student["a"], teacher["a"]
    expected = ((relative(s1, t1) + relative(s2, t2)) / 2 + relative(student["b"][0], teacher["b"][0])) / 2
    assert layer_loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_a_layer_that_did_not_run_is_noticed():
    with pytest.raises(RuntimeError, match="different layers"):
        layer_loss({"a": (torch.ones(2),)}, {"b": (torch.ones(2),)})


def test_capture_survives_recomputation():
    calls = []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.Linear(4, 4)

        def forward(self, x):
            calls.append(1)
            return torch.tanh(self.attention(x)) + x

    torch.manual_seed(0)
    block, x = Block(), torch.randn(3, 4)
    grads = []
    for run in (lambda: block(x), lambda: checkpoint(block, x, use_reentrant=False)):
        with captured_outputs(FLUX, {"layer": block.attention}) as outputs:
            y = run()
        kept = outputs["layer"][0]
        (y.sum() + kept.square().mean()).backward()
        assert outputs["layer"][0] is kept and not block.attention._forward_hooks
        grads.append(block.attention.weight.grad.clone())
        block.zero_grad()
    assert len(calls) == 3  # the second pass was recomputed
    torch.testing.assert_close(grads[0], grads[1])


def test_unused_text_output_of_the_last_sd3_block_is_left_out():
    class Attention(nn.Module):
        context_pre_only = True

        def forward(self, x):
            return x, x + 1

    layer = Attention()
    with captured_outputs(STABLE_DIFFUSION_3, {"last": layer}) as outputs:
        layer(torch.zeros(2))
    assert len(outputs["last"]) == 1
