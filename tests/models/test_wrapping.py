"""Models with LoRAs or within torch.compile, DDP or peft: saved and loaded as the models within, or refused in words."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny_models import make, make_inputs, perturb_hybrid, run
from torch.nn.parallel import DistributedDataParallel

import hybriddit
from hybriddit import HybridConfig, dense_mode, hybridize, load_adapter, restore_dense, save_adapter
from hybriddit.models import SiTTransformer2DModel

GRID = (4, 5)
CONFIG = HybridConfig(window=3, gate="token", map_rank=4, delta_rank=2)
ALL = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
MAPS = LoraConfig(r=3, target_modules=["down", "to_q"], init_lora_weights=False, use_dora=True)
OWN_COPIES = LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["up"], init_lora_weights=False)
KINDS = ("sd35-medium", "flux-dev")


def hybrid(kind, seed=3):
    torch.manual_seed(seed)
    return perturb_hybrid(hybridize(make(kind), CONFIG))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def adapter_of(model, folder):
    save_adapter(model, folder)
    return files(folder)


def with_lora(model, *configs):
    """Adds LoRAs, by copies of the configs: peft writes the layers it has found into them."""
    for index, config in enumerate(configs):
        model.add_adapter(copy.deepcopy(config), adapter_name=f"lora{index}")
    return model


@pytest.mark.parametrize("configs", [[ALL], [MAPS], [ALL, MAPS]], ids=["all-linear", "dora", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_models_are_saved_without_loras_and_under_plain_names(kind, configs, tmp_path):
    model = hybrid(kind)
    inputs = make_inputs(model, GRID)
    before, adapter = run(model, inputs), adapter_of(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "model")
    with_lora(model, *configs)
    assert any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert (run(model, inputs) - before).abs().max() > 1e-4
    assert adapter_of(model, tmp_path / "again") == adapter
    model.save_pretrained(tmp_path / "model again")
    assert files(tmp_path / "model again") == files(tmp_path / "model")
    assert any("lora" in name for name in model.state_dict()), "the model itself keeps its LoRAs"
    torch.testing.assert_close(run(load_adapter(make(kind), tmp_path / "again"), inputs), before, rtol=0, atol=1e-6)


def test_modules_that_peft_trains_copies_of_are_saved_as_they_were(tmp_path):
    """modules_to_save: the adapter is of the originals."""
    model = hybrid("flux-dev")
    adapter = adapter_of(model, tmp_path / "adapter")
    with_lora(model, OWN_COPIES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    assert adapter_of(model, tmp_path / "again") == adapter


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_loaded_into_a_hybrid_that_has_a_lora(kind, tmp_path):
    save_adapter(hybrid(kind, seed=4), tmp_path)
    model, expected = with_lora(hybrid(kind), ALL), with_lora(load_adapter(hybrid(kind), tmp_path), ALL)
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" in k}, strict=False)
    load_adapter(model, tmp_path)
    inputs = make_inputs(model, GRID)
    assert torch.equal(run(model, inputs), run(expected, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_and_the_way_back_with_a_lora_on_all_layers(kind):
    dense = make(kind)
    inputs = make_inputs(dense, GRID)
    plain = run(dense, inputs)
    with_lora(dense, ALL)
    expected = run(dense, inputs)
    model = with_lora(hybrid(kind), ALL)
    loras = {k: v for k, v in dense.state_dict().items() if "lora" in k}
    model.load_state_dict(loras, strict=False)
    with dense_mode(model):
        assert torch.equal(run(model, inputs), expected)
    restore_dense(model)
    assert torch.equal(run(model, inputs), expected)
    model.delete_adapters("lora0")
    assert torch.equal(run(model, inputs), plain)


def test_fused_weights_are_refused_before_anything_is_written(tmp_path):
    model = with_lora(hybrid("flux-dev"), ALL)
    model.fuse_lora()
    for save in (lambda: save_adapter(model, tmp_path / "out"), lambda: model.save_pretrained(tmp_path / "out")):
        with pytest.raises(ValueError, match="is fused with a LoRA: unfuse it first"):
            save()
        assert not (tmp_path / "out").exists()
    save_adapter(hybrid("flux-dev"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is fused with a LoRA"):
        load_adapter(model, tmp_path / "adapter")
    model.unfuse_lora()
    save_adapter(model, tmp_path / "out")


def test_a_lora_fused_into_other_layers_is_no_matter_to_the_adapter(tmp_path):
    model = hybrid("flux-dev")
    adapter = adapter_of(model, tmp_path / "adapter")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    model.fuse_lora()
    assert adapter_of(model, tmp_path / "again") == adapter


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "peft": lambda model: get_peft_model(model, copy.deepcopy(ALL)),
    "data parallel": torch.nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_saved_and_loaded_as_the_one_within(wrap, tmp_path):
    model = hybrid("flux-dev")
    adapter = adapter_of(model, tmp_path / "adapter")
    wrapped = wrap(model)
    assert adapter_of(wrapped, tmp_path / "again") == adapter
    other = hybrid("flux-dev", seed=4)
    assert load_adapter(wrap(other), tmp_path / "adapter") is not other
    assert adapter_of(other, tmp_path / "other") == adapter
    with dense_mode(wrapped) as teacher:
        assert teacher is wrapped and model._dense_mode
    restore_dense(wrapped)
    assert not hybriddit.models.is_hybrid(model)


def test_a_compiled_model_is_converted_within(tmp_path):
    plain = make("flux-dev")
    compiled = torch.compile(make("flux-dev"), backend="eager")
    inputs = make_inputs(plain, GRID)
    torch.testing.assert_close(run(compiled, inputs), run(plain, inputs), rtol=0, atol=1e-6)
    save_adapter(hybrid("flux-dev"), tmp_path)
    load_adapter(plain, tmp_path)
    assert load_adapter(compiled, tmp_path) is compiled
    torch.testing.assert_close(run(compiled, inputs), run(plain, inputs), rtol=0, atol=1e-6)


def test_names_of_compiled_blocks_are_plain(tmp_path):
    """As after `block = torch.compile(block)` in a model's list of blocks."""
    model = hybrid("flux-dev")
    adapter = adapter_of(model, tmp_path / "adapter")
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for index, block in enumerate(blocks):
            blocks[index] = torch.compile(block, backend="eager")
    assert any("_orig_mod" in name for name in model.state_dict())
    assert adapter_of(model, tmp_path / "again") == adapter
    model.save_pretrained(tmp_path / "model")
    names = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert not [name for name in names if "_orig_mod" in name]


def test_what_another_library_made_of_the_weights_is_refused(tmp_path):
    model = hybrid("flux-dev")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.utils.parametrizations.weight_norm(module)
    with pytest.raises(ValueError, match=r"\.hybrid\..* changed by another library"):
        save_adapter(model, tmp_path / "out")
    integers = hybrid("flux-dev")
    for name, parameter in integers.named_parameters():
        if ".hybrid." in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(torch.int8)
    with pytest.raises(ValueError, match="changed by another library"):
        save_adapter(integers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ddp_is_not_converted_within():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="convert the model before that"):
            hybridize(DistributedDataParallel(make("flux-dev")), CONFIG)
    finally:
        torch.distributed.destroy_process_group()


def test_a_sit_is_saved_without_its_lora(tmp_path):
    model = SiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, sample_size=8, num_classes=2, attention="hybrid"
    )
    model.save_pretrained(tmp_path / "model")
    get_peft_model(model, copy.deepcopy(ALL))
    model.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "model")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["attention"] == "hybrid"
