"""Gradients, gradient checkpointing and compiled blocks."""

import pytest
import torch
from tiny_models import HELD, KINDS, WHOLE, make, make_inputs, perturb_hybrid, run, together
from torch.utils._python_dispatch import TorchDispatchMode

from hybriddit import HybridConfig, dense_mode, hybridize

CONFIG = HybridConfig(window=3, gate="token", delta_rank=2)
FEWER = {"z-image": {"layers": 1}, "flux3": {"single_layers": 0}}  # of which they have three kinds
# the others' take seconds, and their layout goes the way of z-image's
COMPILED = [kind for kind in KINDS if kind not in ("krea2", "longcat", "fibo")]


def gradients(model, inputs, teacher=None):
    """Gradients of the added weights for a distillation step."""
    model.zero_grad()
    if teacher is None:
        target = torch.zeros(())
    else:
        with torch.no_grad(), dense_mode(model):
            target = together(model(**inputs).sample)
        assert torch.equal(target, teacher)
    loss = (together(model(**inputs).sample) - target).square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if ".hybrid." in name and p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    model = make(kind)
    inputs = make_inputs(model, (4, 5), batch=2, **WHOLE.get(kind, {}))
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


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_blocks(kind):
    torch._dynamo.reset()
    model = perturb_hybrid(hybridize(make(kind, dtype=torch.float32, **FEWER.get(kind, {})), CONFIG))
    # where a layer reads the layout as a constant, each size has graphs
    sizes = [make_inputs(model, grid) for grid in [(4, 5), (6, 3), (3, 7), (9, 8)][: 2 if kind in HELD else 4]]
    eager = [run(model, inputs) for inputs in sizes]
    with dense_mode(model):
        dense = run(model, sizes[0])
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    graphs = []
    for inputs, expected in zip(sizes, eager, strict=True):
        torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # a second size makes sizes symbolic, and its graphs serve all others
    assert 0 < graphs[0] < graphs[1] and len(set(graphs)) == 2
    with dense_mode(model):
        torch.testing.assert_close(run(model, sizes[0]), dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(model, sizes[0]), eager[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in COMPILED if kind != "flux3"])  # tested block by block, above
def test_a_compiled_model_is_one_graph(kind):
    torch._dynamo.reset()
    model = perturb_hybrid(hybridize(make(kind, dtype=torch.float32, **FEWER.get(kind, {})), CONFIG))
    inputs = [make_inputs(model, grid) for grid in [(4, 5), (6, 3)]]
    eager = [run(model, x) for x in inputs]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for x, expected in zip(inputs, eager, strict=True):
        torch.testing.assert_close(run(compiled, x), expected, rtol=1e-4, atol=1e-5)


def test_positions_are_read_once():
    """FLUX's grid is in img_ids, whose reading waits for the GPU: a pipeline passes the same tensor at every step."""
    model = hybridize(make("flux-dev"), CONFIG)
    inputs = make_inputs(model, (4, 6))
    out = run(model, inputs)
    with NoReads():
        assert torch.equal(run(model, inputs), out)
    other = make_inputs(model, (6, 4))
    inputs["img_ids"].copy_(other["img_ids"])  # in place, of the same length
    inputs["hidden_states"] = other["hidden_states"]
    assert torch.equal(run(model, inputs), run(model, other))


class NoReads(TorchDispatchMode):
    """Fails where the value of a tensor is read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


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
