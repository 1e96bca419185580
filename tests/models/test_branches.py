"""One branch of a hybrid alone, and what its layers are without the other."""

import math

import pytest
import torch
from tiny_models import KINDS, make, make_inputs, perturb_hybrid, run

from hybriddit import HybridConfig, hybridize
from hybriddit.attention import HybridAttention
from hybriddit.models.branches import branch_changes, hybrid_layers, one_branch


@pytest.mark.parametrize("join", ("joint", "gate"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_alone_is_a_gate_that_is_shut_or_wide_open(kind, join):
    model = hybridize(make(kind), HybridConfig(window=3, map_rank=2, join=join))
    perturb_hybrid(model)
    inputs = make_inputs(model, (6, 7), batch=2)
    before, weights = run(model, inputs), {name: x.clone() for name, x in model.state_dict().items()}
    found = {}
    for branch in ("near", "far"):
        with one_branch(model, branch):
            found[branch] = run(model, inputs)
    torch.testing.assert_close(run(model, inputs), before, rtol=0, atol=0)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    for branch, gate in (("near", 0.0), ("far", math.inf if join == "joint" else 1.0)):
        for layer in hybrid_layers(model).values():
            layer.gate_init = gate
            layer.init_gate()
        torch.testing.assert_close(run(model, inputs), found[branch], rtol=1e-5, atol=1e-6)
        assert (found[branch] - before).abs().max() > 1e-3


def test_what_a_layer_is_without_a_branch():
    model = hybridize(make("flux-dev"), HybridConfig(window=3, layers={"single*": "window"}))
    inputs = make_inputs(model, (6, 7), batch=2)
    with branch_changes(model) as found:
        run(model, inputs)
    [(name, changes)] = found.items()  # the others have one branch
    assert name == "transformer_blocks.0.attn"
    assert changes["far"][0].tolist() == [0.0, 0.0] and changes["near"][0].min() > 0.1  # fresh: far is not used

    perturb_hybrid(model)
    outputs = {}

    def keep(way):
        return lambda module, args, out: outputs.__setitem__(way, out)

    layer = next(module for module in model.modules() if isinstance(module, HybridAttention))
    for way in ("both", "near", "far"):
        handle = layer.register_forward_hook(keep(way))
        if way == "both":
            run(model, inputs)
        else:
            with one_branch(model, way):
                run(model, inputs)
        handle.remove()
    with branch_changes(model) as found:
        run(model, inputs)
    text = inputs["encoder_hidden_states"].shape[1]
    both = outputs["both"][:, text:].double()
    for branch, other in (("near", "far"), ("far", "near")):
        without = outputs[other][:, text:].double()
        for head in range(2):
            errors = [
                ((w - b) ** 2).mean() / b.var(correction=0)
                for w, b in zip(without[:, :, head], both[:, :, head], strict=True)
            ]
            assert found[name][branch][0][head].item() == pytest.approx((sum(errors) / 2).item(), rel=1e-4)


def test_refused():
    model = hybridize(make("sd3"), HybridConfig(window=3, linear=False))
    with pytest.raises(ValueError, match="no layer of this model has both branches"), one_branch(model, "near"):
        pass
    with pytest.raises(ValueError, match="unknown branch 'left': use one of near, far"), one_branch(model, "left"):
        pass
