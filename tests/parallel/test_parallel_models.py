"""Whole transformers whose image is spread over processes, against the same ones in one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from runs import in_processes
from tiny_models import FLUX_LIKE, WIDTH, make, make_inputs, perturb_hybrid, run
from torch.distributed.device_mesh import init_device_mesh

from hybriddit import HybridConfig, SiTTransformer2DModel, dense_mode, hybridize
from hybriddit.parallel import shard

GRID = (7, 5)
CONFIGS = {
    "pixart": {"window": (3, 4), "layers": {"*.0.*": "dense"}},
    "sd3": {"window": (4, 3), "stride": (2, 1), "rotary": "axial", "gate": "head"},
    "sd35-medium": {"window": (3, 3), "dilation": (2, 1), "center_keys": True, "layers": {"*.1.attn": "linear"}},
    "flux-dev": {"window": (5, 3), "value_conv": 3, "delta_rank": 2, "layers": {"single*": "dense"}},
    "flux-schnell": {"window": (12, 3), "join": "gate", "feature_map": "hedgehog"},
    "chroma": {"window": (3, 5), "layers": {"single*": "dense"}},
    "qwen-image": {"window": (3, 5), "layers": {"*.0.attn": "dense"}},
    "flux2": {"window": (5, 3), "delta_rank": 2, "layers": {"transformer*": "dense"}},
    "ovis": {"window": (3, 5), "delta_rank": 2},
    "flux3": {"window": (3, 5), "delta_rank": 2, "layers": {"mode_blocks.image.*": "dense"}},
    "krea2": {"window": (3, 5), "delta_rank": 2, "layers": {"*.0.attn": "dense"}},
    "longcat": {"window": (3, 5), "layers": {"single*": "dense"}},
    "fibo": {"window": (3, 5), "layers": {"single*": "dense"}},
}
SIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "num_layers": 4,
    "sample_size": 8,
    "num_classes": 5,
    "window": (4, 3),
    "attention": ["softmax", "linear", "window", "hybrid"],
    "map_rank": 3,
    "gate": "token",
    "gate_init": 0.3,
    "qk_norm": True,
    "rope": True,
    "far_rope": True,
    "value_conv": 3,
}


def make_model(kind):
    """A model in which every weight matters, in float64, and its inputs: the two halves of guidance, as a batch."""
    if kind == "sit":
        torch.manual_seed(0)
        model = SiTTransformer2DModel(**SIT).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        latents = torch.randn(2, 3, 2 * GRID[0], 2 * GRID[1]).double()
        return model, {"hidden_states": latents, "timestep": torch.tensor([0.3]), "class_labels": torch.tensor([2, 5])}
    model = perturb_hybrid(hybridize(make(kind), HybridConfig(**CONFIGS[kind])).double())
    inputs = make_inputs(model, GRID, batch=2)
    if kind in FLUX_LIKE and kind not in ("flux2", "ovis", "flux3", "longcat", "fibo"):  # a ControlNet's residuals
        residuals = torch.randn(2, 2, GRID[0] * GRID[1], WIDTH).double()
        inputs |= {"controlnet_block_samples": [residuals[0]], "controlnet_single_block_samples": [residuals[1]]}
    elif kind == "qwen-image":
        inputs["controlnet_block_samples"] = [torch.randn(2, GRID[0] * GRID[1], WIDTH).double()]
    elif kind == "sd3":
        inputs["block_controlnet_hidden_states"] = [torch.randn(2, GRID[0] * GRID[1], WIDTH).double()]
    elif kind == "pixart":
        inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    return model, inputs


def results(model, inputs):
    """The output, and the gradients of inputs and weights, of two steps that add up."""
    names = [name for name in ("hidden_states", "encoder_hidden_states") if name in inputs]
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    model.zero_grad()
    for seed in (0, 1):
        out = model(**{**inputs, **leaves}).sample
        torch.manual_seed(seed)
        (out * torch.randn_like(out)).sum().backward()
    weights = {name: parameter.grad for name, parameter in model.named_parameters()}
    return out.detach(), {**{name: leaf.grad for name, leaf in leaves.items()}, **weights}


def compare_with_one(rank, kinds):
    for kind in kinds:
        print(kind)  # is shown where it fails
        model, inputs = make_model(kind)
        exit = model.final_layer.linear if kind == "krea2" else model.proj_out
        frozen = exit.weight.requires_grad_(False)
        out, grads = results(model, inputs)
        assert shard(model, dist.group.WORLD) is model
        own_out, own_grads = results(model, inputs)
        torch.testing.assert_close(own_out, out)
        torch.testing.assert_close(run(model, inputs), out)
        assert sum(grad is not None for grad in grads.values()) > 30
        for name, grad in grads.items():
            print(kind, name)
            assert (grad is None) == (own_grads[name] is None)
            if grad is not None:  # diffusers' RMS norms round to float32
                scale = max(1e-6, float(grad.abs().max()))
                torch.testing.assert_close(own_grads[name] / scale, grad / scale, atol=1e-6, rtol=0)
        frozen.requires_grad_(True)
        frozen.grad = None
        results(model, inputs)
        everywhere = [torch.empty_like(frozen.grad) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, frozen.grad)
        assert all(torch.equal(grad, frozen.grad) for grad in everywhere) and frozen.grad.any()


@pytest.mark.parametrize(
    "count, kinds",
    [
        (2, ("pixart", "sd35-medium", "flux-dev", "fibo", "sit")),
        (3, ("sd3", "flux-schnell", "chroma", "flux2", "ovis", "flux3", "krea2", "sit")),
        (4, ("pixart", "flux-dev", "qwen-image", "longcat", "sit")),
    ],
)
def test_several_processes_are_one(count, kinds, tmp_path):
    """Seven rows; windows of 5 and 12 rows are larger than the rows of one process."""
    codes = in_processes(count, compare_with_one, kinds, output=tmp_path / "said")
    assert codes == [0] * count, (tmp_path / "said.0").read_text()


def go_through_modes(rank, kind):
    model, inputs = make_model(kind)
    model.train()
    out, grads = results(model, inputs)
    teacher = make(kind).train()
    with dense_mode(model):
        dense = run(model, inputs)
    mesh = init_device_mesh("cpu", (2,))
    alone = copy.deepcopy(model)
    shard(model, mesh)
    model.enable_gradient_checkpointing()
    own_out, own_grads = results(model, inputs)
    torch.testing.assert_close(own_out, out)
    for name, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(own_grads[name], grad, atol=1e-5, rtol=1e-5)
    with dense_mode(model):
        assert torch.equal(run(model, inputs), dense)
    torch.testing.assert_close(run(teacher, inputs), dense)
    # autocast, as accelerate trains: as near to float64 as one process is
    model.float()
    single = {name: x.float() if isinstance(x, torch.Tensor) else [y.float() for y in x] for name, x in inputs.items()}
    name = "transformer_blocks.0.attn.add_q_proj.weight"
    with torch.autocast("cpu", torch.bfloat16):
        half, half_grads = results(model, single)
        one, one_grads = results(alone.float(), single)
    assert (half - out).norm() < 1.2 * (one - out).norm() < 0.2 * out.norm()
    assert (half_grads[name] - grads[name]).norm() < 1.2 * (one_grads[name] - grads[name]).norm()
    # half precision, as pipelines run
    inputs = {name: x.to(torch.bfloat16) if isinstance(x, torch.Tensor) else [y.to(torch.bfloat16) for y in x]
              for name, x in inputs.items()}  # fmt: skip
    half, one = (run(each.eval().to(torch.bfloat16), inputs) for each in (model, alone))
    assert half.dtype == torch.bfloat16 and (half - out).norm() < 1.2 * (one - out).norm()


@pytest.mark.parametrize("kind", ["flux-dev", "chroma"])
def test_checkpointing_the_teacher_and_bfloat16(kind, tmp_path):
    codes = in_processes(2, go_through_modes, kind, output=tmp_path / "said")
    assert codes == [0, 0], (tmp_path / "said.0").read_text()
