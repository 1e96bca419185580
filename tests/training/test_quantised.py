"""A teacher whose weights are quantised: the layers that are added to it are not, and learn."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from diffusers import FluxPipeline, FluxTransformer2DModel, TorchAoConfig
from safetensors.torch import load_file
from test_distill import tiny_config
from tiny_pipelines import tiny_pipeline
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hybriddit import HybridConfig, hybridize, load_adapter
from hybriddit.cli import main
from hybriddit.models.identity import tensor_digest, weights_digest
from hybriddit.models.wrapping import is_plain
from hybriddit.training.distill import check_quantised
from hybriddit.training.dry_run import dry_run
from hybriddit.training.loop import prepare
from hybriddit.training.run_config import load_config


class Int8(torch.Tensor):
    """A stand-in for quantised weights: it wraps others, has a half-precision type, and can be detached and no more."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return Int8(**parts)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(function)


def quantised(weight):
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return nn.Parameter(Int8((weight.float() / scale).round().to(torch.int8), scale), requires_grad=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a pipeline's folder, that of the same with its transformer in int8)."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    dense, int8 = Path("assets/demo-teacher"), tmp_path_factory.mktemp("int8")
    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    transformer = FluxTransformer2DModel.from_pretrained(
        dense, subfolder="transformer", quantization_config=settings, dtype=torch.bfloat16
    )
    FluxPipeline.from_pretrained(dense, transformer=transformer).save_pretrained(int8)
    return dense, int8


def words(folder, out, **more):
    settings = {
        "model.path": folder, "hybrid.window": 3, "output.folder": out,
        "data.prompts": "[a, b]", "data.images": 4, "data.height": 64, "data.width": 64, "data.steps": 2,
        "data.max_sequence_length": 8, "train.steps": 3, "train.batch_size": 2, "train.precision": "bf16",
        "train.progress": "false", "output.sample_every": 0,
    }  # fmt: skip
    return ["configs/distill/demo.yaml", *(f"{name}={value}" for name, value in (settings | more).items())]


def test_a_quantised_teacher_is_distilled_and_its_adapter_fits_the_other(folders, tmp_path):
    dense, int8 = folders
    assert main(["distill", *words(int8, tmp_path)]) == 0
    learned = load_file(tmp_path / "adapter" / "hybrid_adapter.safetensors")
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in learned.values())
    assert any(weight.any() for name, weight in learned.items() if name.endswith("up.weight"))  # zero at the start
    model = FluxTransformer2DModel.from_pretrained(dense, subfolder="transformer")
    load_adapter(model, tmp_path / "adapter")
    own = model.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in learned.items())


def test_a_dry_run_counts_the_bytes_of_the_files(folders, tmp_path, capsys):
    dense, int8 = folders
    held, of_files = (
        dry_run(load_config(path, rest))["memory_bytes"]["frozen"]
        for path, *rest in (words(dense, tmp_path), words(int8, tmp_path))
    )
    assert of_files == (int8 / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size < held
    assert main(["distill", *words(int8, tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "frozen weights, quantised" in out and "with DDP, to train" in out


def test_half_precision_is_asked_for(folders, tmp_path, capsys):
    assert main(["distill", *words(folders[1], tmp_path, **{"train.precision": "no"})]) == 1
    assert "set train.precision=bf16" in capsys.readouterr().err


def test_fsdp_is_refused():
    model = nn.Linear(8, 8).bfloat16().requires_grad_(False)
    check_quantised(model, SimpleNamespace(is_fsdp2=True))
    model.weight = quantised(model.weight)
    one = SimpleNamespace(is_fsdp2=False, device=torch.device("cpu"))
    check_quantised(model, one)
    check_quantised(model, SimpleNamespace(is_fsdp2=False, device=torch.device("cuda")), compiles=True)
    with pytest.raises(ValueError, match="train.compile does not work with quantised weights on a CPU"):
        check_quantised(model, one, compiles=True)
    with pytest.raises(ValueError, match="FSDP does not shard quantised weights: train with DDP"):
        check_quantised(model, SimpleNamespace(is_fsdp2=True))


def test_quantised_weights_are_told_apart():
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    digests = []
    for changes in ({}, {}, {"codes": (3, 5)}, {"scale": (2, 0)}):
        model = nn.Linear(16, 16, bias=False)
        model.weight = quantised(weight)
        for part, place in changes.items():
            getattr(model.weight, part)[place] += 1
        assert not is_plain(model.weight)
        digests.append(weights_digest(model))
    assert digests[0] == digests[1] and len(set(digests)) == 3
    assert tensor_digest(weight) not in digests


def test_added_weights_have_the_dtype_of_those_beside_quantised_ones():
    """Activations have that; a quantised weight names a half-precision type of its own, whatever the pipeline's."""
    model = tiny_pipeline("flux_dev").transformer
    first = model.time_text_embed.timestep_embedder.linear_1
    first.weight = quantised(first.weight.detach())
    assert model.dtype == torch.bfloat16  # by which the added weights were, and failed in a pipeline in float32
    hybridize(model, HybridConfig(window=3, map_rank=2))
    assert {weight.dtype for name, weight in model.named_parameters() if ".hybrid." in name} == {torch.float32}


def test_ddp_takes_quantised_weights():
    """One process of its kind: DDP sends weights at the start all the same, and such weights cannot be sent."""
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    base[0].weight = quantised(base[0].weight.detach())
    base[0].bias.requires_grad_(False)
    accelerator = SimpleNamespace(
        is_fsdp2=False, device=torch.device("cpu"), prepare=lambda model, other: (DistributedDataParallel(model), other)
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(NotImplementedError):
            DistributedDataParallel(base)
        prepare(SimpleNamespace(model=base, fused=False), tiny_config(), accelerator)
    finally:
        dist.destroy_process_group()
