"""Gradients, gradient checkpointing and compiled blocks."""

import pytest
import torch
from tiny_models import KINDS, make, make_inputs, perturb_hybrid, run

from hybriddit import HybridConfig, dense_mode, hybridize

CONFIG = HybridConfig(window=3, gate="token", delta_rank=2)


def gradients(model, inputs, teacher=None):
    """Gradients of the added weights for a distillation step."""
    model.zero_grad()
    if teacher is None:
        target = torch.zeros(())
    else:
        with torch.no_grad(), dense_mode(model):
            target = model(**inputs).sample
        assert torch.equal(target, teacher)
    loss = (model(**inputs).sample - target).square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if ".hybrid." in name and p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    model = make(kind)
    inputs = make_inputs(model, (4, 5), batch=2)
    model.requires_grad_(False)  # first: torch's linear layers round differently with it
    teacher = run(model, inputs)
    perturb_hybrid(hybridize(model, CONFIG)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".hybrid." in name)
    plain = gradients(model, inputs, teacher)
    # none is idle, which distributed training would call an error
    assert plain.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad.abs().max() > 0 for grad in plain.values())
    model.enable_gradient_checkpointing()
    # the first size's layout must not leak into the second's recomputation
    run(model, make_inputs(model, (3, 7)))
    checkpointed = gradients(model, inputs, teacher)
    assert checkpointed.keys() == plain.keys()
    assert all(torch.allclose(checkpointed[name], grad, rtol=1e-9, atol=1e-12) for name, grad in plain.items())


@pytest.mark.parametrize("gate", ["head", "channel", "token"])
def test_a_fresh_hybrid_learns_its_gates_first(gate):
    """With the gates at zero the maps get no gradient, and need none: the gates do."""
    model = hybridize(make("flux-dev"), HybridConfig(window=3, gate=gate))
    grads = gradients(model, make_inputs(model, (4, 4)))
    for name, grad in grads.items():
        assert (grad.abs().max() > 0) == (".gate" in name), name


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks(kind):
    torch._dynamo.reset()
    model = perturb_hybrid(hybridize(make(kind, dtype=torch.float32), CONFIG))
    sizes = [make_inputs(model, grid) for grid in [(4, 5), (6, 3)]]
    eager = [run(model, inputs) for inputs in sizes]
    with dense_mode(model):
        dense = run(model, sizes[0])
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    for inputs, expected in zip(sizes, eager, strict=True):
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    with dense_mode(model):
        torch.testing.assert_close(run(model, sizes[0]), dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(model, sizes[0]), eager[0], rtol=1e-4, atol=1e-5)


def test_compiled_blocks_train():
    torch._dynamo.reset()
    model = perturb_hybrid(hybridize(make("flux-dev", dtype=torch.float32), CONFIG)).train()
    inputs = make_inputs(model, (4, 5))
    eager = gradients(model, inputs)
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    compiled = gradients(model, inputs)
    assert eager.keys() == compiled.keys()
    for name, grad in eager.items():
        torch.testing.assert_close(compiled[name], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())
