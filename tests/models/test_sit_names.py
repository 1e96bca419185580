"""Files with the names that SiT's weights had before: folders, shards, pipelines, state dicts and checkpoints of runs.

`old_sit` holds two models that version 0.1 (commit ca6db7a) saved in float16, and what they gave in float64 there.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybriddit import SiTPipeline, SiTTransformer2DModel
from hybriddit.models.sit_convert import to_original
from hybriddit.models.sit_names import renamed
from hybriddit.training.checkpoint import load_checkpoint

OLD = sorted((Path(__file__).parent / "old_sit").iterdir())
WEIGHTS = "diffusion_pytorch_model.safetensors"
every_model = pytest.mark.parametrize("folder", OLD, ids=lambda folder: folder.name)


def fresh(folder):
    torch.manual_seed(1)
    return SiTTransformer2DModel.from_config(SiTTransformer2DModel.load_config(folder))


def assert_computes_what_it_did(model, folder):
    latents = torch.linspace(-1, 1, 2 * 8 * 12, dtype=torch.float64).sin().view(2, 1, 8, 12)
    times, labels = torch.tensor([0.25, 0.75], dtype=torch.float64), torch.tensor([1, 2])
    with torch.no_grad():
        sample = model.double().eval()(latents, times, labels).sample
    expected = load_file(folder / "expected.safetensors")["sample"]
    # places and times are embedded in float32, whose sines differ between processors by a rounding
    torch.testing.assert_close(sample, expected, rtol=1e-6, atol=1e-7)


@every_model
def test_a_saved_model_loads_and_computes_what_it_did(folder, tmp_path):
    model, info = SiTTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    model.save_pretrained(tmp_path)  # under today's names
    assert set(load_file(tmp_path / WEIGHTS)) == set(fresh(folder).state_dict())
    assert_computes_what_it_did(model, folder)
    assert_computes_what_it_did(SiTTransformer2DModel.from_pretrained(tmp_path), folder)


def test_a_bfloat16_load_keeps_the_gates_in_float32():
    for folder in OLD:
        model = SiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        gates = {name for name in dtypes if name.startswith("transformer_blocks.0.attn.hybrid.gate")}
        assert (folder.name == "token_gate_swiglu") == bool(gates)
        assert {dtype for name, dtype in dtypes.items() if ".gate" not in name} == {torch.bfloat16}
        assert {dtype for name, dtype in dtypes.items() if ".gate" in name} == {torch.float32}


def shards_of(folder, to, count=3):
    """The model's one file as several and an index, as diffusers writes large ones."""
    tensors = load_file(folder / WEIGHTS)
    shutil.copy(folder / "config.json", to)
    weight_map = {
        name: f"diffusion_pytorch_model-0000{i % count + 1}-of-0000{count}.safetensors"
        for i, name in enumerate(tensors)
    }
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, to / shard)
    size = sum(tensor.nbytes for tensor in tensors.values())
    (to / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))


@every_model
def test_shards(folder, tmp_path):
    shards_of(folder, tmp_path)
    assert_computes_what_it_did(SiTTransformer2DModel.from_pretrained(tmp_path), folder)
    first = fresh(folder).config.attention[:1]
    with pytest.raises(ValueError, match=r"holds unknown weights.*transformer_blocks\.1\."):
        SiTTransformer2DModel.from_pretrained(tmp_path, num_layers=1, attention=first)


def test_shards_of_today_are_loaded_by_diffusers(tmp_path):
    model = SiTTransformer2DModel.from_pretrained(OLD[0])
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_computes_what_it_did(SiTTransformer2DModel.from_pretrained(tmp_path), OLD[0])


@every_model
@pytest.mark.parametrize("in_shards", [False, True])
def test_a_saved_pipeline(folder, in_shards, tmp_path):
    SiTPipeline(fresh(folder)).save_pretrained(tmp_path)
    (tmp_path / "transformer" / WEIGHTS).unlink()
    if in_shards:
        shards_of(folder, tmp_path / "transformer")
    else:
        shutil.copy(folder / WEIGHTS, tmp_path / "transformer")
    assert_computes_what_it_did(SiTPipeline.from_pretrained(tmp_path).transformer, folder)


@every_model
def test_state_dicts(folder):
    old = load_file(folder / WEIGHTS)
    before = dict(old)
    model = fresh(folder)
    model.load_state_dict(old)
    assert old.keys() == before.keys(), "the caller's own"
    assert_computes_what_it_did(model, folder)
    inside = torch.nn.ModuleDict({"module": fresh(folder)})  # as DDP has it
    inside.load_state_dict({f"module.{name}": tensor for name, tensor in old.items()})
    assert_computes_what_it_did(inside["module"], folder)
    model.load_state_dict(model.state_dict())


def test_missing_and_unknown_names_are_still_told():
    model, old = fresh(OLD[0]), load_file(OLD[0] / WEIGHTS)
    lacking = {name: tensor for name, tensor in old.items() if name != "transformer_blocks.1.ff.net.2.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key.*transformer_blocks\.1\.ff\.fc2\.bias"):
        model.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*patch_embed\.scale"):
        model.load_state_dict(old | {"patch_embed.scale": torch.ones(1)})
    both = old | {"patch_embed.proj.bias": torch.zeros(8)}  # which of the two was meant?
    with pytest.raises(RuntimeError, match=r"Unexpected key.*patch_embed\.bias"):
        model.load_state_dict(both)


def test_an_old_softmax_state_dict_is_converted_to_the_original_layout():
    model = SiTTransformer2DModel(2, 4, in_channels=1, num_layers=1, sample_size=8, num_classes=2)
    today = model.state_dict()
    old = {
        name.replace("ff.fc1.", "ff.net.0.proj.")
        .replace("ff.fc2.", "ff.net.2.")
        .replace("embed.proj.", "embed."): value
        for name, value in today.items()
    }
    assert old.keys() != today.keys()
    expected, found = to_original(today), to_original(old)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@every_model
def test_a_checkpoint_of_a_run(folder, tmp_path):
    """Weights, averages and the optimizer's moments and counts all come back under today's names."""
    old = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items() if name != "pos_embed"}
    offsets = {"weight": 0, "average": 1, "exp_avg": 2, "exp_avg_sq": 3}
    tensors = {f"{kind}/{name}": tensor + offset for kind, offset in offsets.items() for name, tensor in old.items()}
    tensors |= {f"step/{name}": torch.tensor(7.0) for name in old}
    save_file(tensors, tmp_path / "state.safetensors")
    (tmp_path / "state.json").write_text(json.dumps({"step": 7, "settings": {}}))

    model = fresh(folder)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    average = [torch.zeros_like(parameter) for parameter in trained.values()]
    optimizer = torch.optim.AdamW(trained.values())
    assert load_checkpoint(tmp_path, trained, average, optimizer, {}, rename=renamed) == 7
    expected = SiTTransformer2DModel.from_pretrained(folder).state_dict()
    for (name, parameter), mean in zip(trained.items(), average, strict=True):
        state = optimizer.state[parameter]
        for value, offset in ((parameter, 0), (mean, 1), (state["exp_avg"], 2), (state["exp_avg_sq"], 3)):
            torch.testing.assert_close(value.detach(), expected[name] + offset, rtol=0, atol=0)
        assert state["step"] == 7
    with pytest.raises(ValueError, match="its trained weights have other names or shapes"):
        load_checkpoint(tmp_path, trained, average, optimizer, {})


def test_names_of_today_stay():
    for folder in OLD:
        today = fresh(folder).state_dict()
        assert list(renamed(today)) == list(today)
