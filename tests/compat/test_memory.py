"""Offloading, storage in low precision, quantized weights: the same numbers as with all weights in place."""

import accelerate
import pytest
import torch
from oracle import GRID, SMALL, assert_same, check, converted, differs, generate, models, pipelines
from tiny_models import KINDS, make, make_inputs, perturb_hybrid, run

from hybriddit import HybridConfig, dense_mode, hybridize, load_adapter, restore_dense, save_adapter

CPU = torch.device("cpu")


def hybrid(kind, gate="head", **kwargs):
    return perturb_hybrid(hybridize(make(kind, **kwargs), HybridConfig(window=3, gate=gate, delta_rank=2)))


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@pytest.mark.parametrize("kind", KINDS)
def test_group_offload(kind, level, tmp_path):
    """To disk: between calls the weights in memory are rubbish."""
    model = hybrid(kind)
    inputs = make_inputs(model, GRID)
    expected = run(model, inputs)
    model.enable_group_offload(CPU, CPU, level, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    for _ in range(2):  # torch rounds differently over weights mapped from a file
        assert_same(run(model, inputs), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "gate"), [*((kind, "head") for kind in KINDS), ("sd3", "channel"), ("flux-dev", "token")]
)
def test_sequential_offload(kind, gate):
    """What enable_sequential_cpu_offload does to each model: between calls its weights are on the meta device."""
    model = hybrid(kind, gate)
    inputs = make_inputs(model, GRID)
    expected = run(model, inputs)
    accelerate.cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)
    assert all(parameter.is_meta for parameter in model.parameters())
    for _ in range(2):
        assert torch.equal(run(model, inputs), expected)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["pixart_sigma", "sd35", "flux_dev"])
def test_model_offload(kind):
    """diffusers' own call, with the CPU as the accelerator: its hooks run, though nothing moves."""
    pipeline = pipelines(kind)[2]
    expected = generate(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipeline.transformer, "_hf_hook")
    assert torch.equal(generate(pipeline), expected)


def test_offloaded_models_are_not_converted(tmp_path):
    save_adapter(hybrid("flux-dev"), tmp_path / "adapter")

    def refused(model):
        for convert in (lambda: hybridize(model, SMALL), lambda: load_adapter(model, tmp_path / "adapter")):
            with pytest.raises(ValueError, match="before enabling offload") as caught:
                convert()
            assert "\n" not in str(caught.value)

    for level in ("leaf_level", "block_level"):
        model = make("flux-dev")
        model.enable_group_offload(CPU, CPU, level, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path / level))
        refused(model)
    model = make("flux-dev")
    accelerate.cpu_offload(model, CPU)
    refused(model)


@pytest.mark.parametrize("kind", KINDS)
def test_layerwise_casting(kind):
    storage = torch.float8_e4m3fn
    trio = models(kind, dtype=torch.float32)
    inputs = make_inputs(trio[0], GRID)
    plain = check(lambda model: run(model, inputs), trio)
    early = make(kind, dtype=torch.float32)
    for model in (*trio, early):
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    stored = {name: p.dtype for name, p in trio[2].named_parameters() if ".hybrid." in name}
    kept = (".hybrid.gate", ".norm.", ".far.projection_")  # diffusers casts linear layers and convolutions
    assert all((dtype is storage) != any(part in name for part in kept) for name, dtype in stored.items())
    cast = check(lambda model: run(model, inputs), trio)
    assert all(differs(*outputs, by=1e-6) for outputs in zip(plain, cast, strict=True))
    # before converting: what is added is not stored low
    converted(early)
    assert all(p.dtype is torch.float32 for name, p in early.named_parameters() if ".hybrid." in name)
    assert (run(early, inputs) - plain[2]).norm() < 0.5 * plain[2].norm()
    assert_same(run(restore_dense(early), inputs), cast[0])


def quantization(package):
    if package == "torchao":
        pytest.importorskip(
            "torchao",
            reason="torchao is not installed: it warns on every import of diffusers, so the dev extra leaves it out",
        )
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype="int8")


@pytest.mark.parametrize("package", ["torchao", "optimum-quanto"])
@pytest.mark.parametrize("kind", ["pixart", "sd35-medium", "flux-dev"])
def test_quantized_loading(kind, package, tmp_path):
    """A dense model loaded in int8 and then converted, and a hybrid loaded in int8. (bitsandbytes needs a GPU.)"""
    settings = {"quantization_config": quantization(package), "torch_dtype": torch.float32}
    dense, _, other = models(kind, dtype=torch.float32)
    dense.save_pretrained(tmp_path / "dense")
    other.save_pretrained(tmp_path / "hybrid")
    inputs = make_inputs(dense, GRID)
    plain, expected = run(dense, inputs), run(other, inputs)

    model = type(dense).from_pretrained(tmp_path / "dense", **settings)
    low = run(model, inputs)
    assert 1e-4 * plain.norm() < (low - plain).norm() < 0.05 * plain.norm()
    assert_same(run(hybridize(model, HybridConfig(window=16)), inputs), low)

    model = type(other).from_pretrained(tmp_path / "hybrid", **settings)
    assert 1e-4 * expected.norm() < (run(model, inputs) - expected).norm() < 0.05 * expected.norm()
    with dense_mode(model):
        assert_same(run(model, inputs), low)
