"""Converting and back, copies, saving and loading, adapters, the teacher's pass."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import DENSE_CLASS, KINDS, make, make_inputs, perturb_hybrid, run
from torch.utils._pytree import tree_map

import hybriddit
from hybriddit import HybridConfig, dense_mode, hybridize, load_adapter, restore_dense, save_adapter
from hybriddit.models import family_of

CONFIG = HybridConfig(window=(3, 2), stride=(2, 1), gate="token", delta_rank=2, layers={"*blocks.7.*": "dense"})
GRID = (4, 5)


def converted(kind, config=CONFIG, dtype=torch.float32, **kwargs):
    return perturb_hybrid(hybridize(make(kind, dtype=dtype, **kwargs), config))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_restore_dense_is_bit_identical(kind):
    model = make(kind)
    inputs = make_inputs(model, GRID)
    state, config, attributes = snapshot(model), dict(model.config), set(vars(model))
    attentions = family_of(model).attentions(model)
    processors, before = {name: attn.processor for name, attn in attentions.items()}, run(model, inputs)
    assert hybridize(model, CONFIG) is model
    perturb_hybrid(model)
    assert isinstance(model, DENSE_CLASS[kind]) and type(model).__name__ == "Hybrid" + DENSE_CLASS[kind].__name__
    assert HybridConfig.from_dict(model.config.hybrid_config) == CONFIG
    assert (run(model, inputs) - before).abs().max() > 1e-4

    assert restore_dense(model) is model
    assert type(model) is DENSE_CLASS[kind]
    assert dict(model.config) == config and set(vars(model)) == attributes
    assert_same_state(model, state)
    assert all(attentions[name].processor is processor for name, processor in processors.items())
    assert torch.equal(run(model, inputs), before)
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    # and it converts anew
    hybridize(model, HybridConfig(window=5))
    torch.testing.assert_close(run(model, inputs), before, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_mode_is_the_teacher(kind):
    model = make(kind)
    inputs = make_inputs(model, GRID)
    dense = run(model, inputs)
    perturb_hybrid(hybridize(model, CONFIG))
    student = run(model, inputs)
    with dense_mode(model) as teacher:
        assert teacher is model and torch.equal(run(model, inputs), dense)
        with dense_mode(model):
            assert torch.equal(run(model, inputs), dense)
        assert torch.equal(run(model, inputs), dense)
    assert torch.equal(run(model, inputs), student)
    with pytest.raises(RuntimeError, match="inside"), dense_mode(model):
        raise RuntimeError("inside")
    assert torch.equal(run(model, inputs), student)


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy(kind):
    model = converted(kind)
    inputs, other = make_inputs(model, GRID), make_inputs(model, (3, 4))
    out = run(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, inputs), out)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hybrid." in name:
                parameter.zero_()
    run(model, other)  # another size through the original leaves the copy alone
    assert torch.equal(run(twin, inputs), out)
    restore_dense(model)
    assert torch.equal(run(twin, inputs), out)
    assert type(restore_dense(twin)) is DENSE_CLASS[kind]


LOAD = """
import copy, sys, torch, hybriddit
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(int(sys.argv[3]))
from pathlib import Path
from tiny_models import make_inputs, run
import diffusers
for folder in sorted(Path(sys.argv[2]).iterdir()):
    hybrid_class = getattr(hybriddit, (folder / "class").read_text())
    weights, expected = torch.load(folder / "expected.pt", weights_only=True)
    model = hybrid_class.from_pretrained(folder / "model")
    assert type(model) is hybrid_class, type(model)
    dense = getattr(diffusers, hybrid_class.__name__.removeprefix("Hybrid")).from_pretrained(folder / "dense")
    assert hybriddit.load_adapter(dense, folder / "adapter") is dense
    assert type(dense) is hybrid_class
    for loaded in (model, dense):
        state = loaded.state_dict()
        assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)
        # copied once: weights mapped from a file lie off 64-byte boundaries, where torch rounds differently
        out = run(copy.deepcopy(loaded), make_inputs(loaded, (4, 5)))
        assert torch.equal(out, expected), (folder, (out - expected).abs().max())
    print("same")
"""


@pytest.mark.slow
def test_save_and_load_in_a_new_process(tmp_path):
    for kind in KINDS:
        folder = tmp_path / kind
        model = make(kind, dtype=torch.float32)
        model.save_pretrained(folder / "dense")
        perturb_hybrid(hybridize(model, CONFIG))
        model.save_pretrained(folder / "model")
        save_adapter(model, folder / "adapter")
        torch.save((model.state_dict(), run(model, make_inputs(model, GRID))), folder / "expected.pt")
        (folder / "class").write_text(type(model).__name__)
        config = json.loads((folder / "model/config.json").read_text())
        assert config["_class_name"] == type(model).__name__
        assert HybridConfig.from_dict(config["hybrid_config"]) == CONFIG
    arguments = [str(Path(__file__).parent), str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"] * len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_holds_only_what_was_added(kind, tmp_path):
    dense = make(kind, dtype=torch.float32)
    names = set(dense.state_dict())
    model = converted(kind)
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hybrid_adapter.safetensors", "hybrid_config.json"]
    weights = load_file(tmp_path / "hybrid_adapter.safetensors")
    assert weights.keys() == set(model.state_dict()) - names
    assert all(".hybrid." in name for name in weights)
    assert HybridConfig.from_plan(tmp_path / "hybrid_config.json") == CONFIG

    inputs = make_inputs(model, GRID)
    assert torch.equal(run(load_adapter(dense, tmp_path), inputs), run(model, inputs))
    # onto a hybrid of the same config, over other weights; and over an older save
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.add_(1) if ".hybrid." in name else None
    load_adapter(dense, tmp_path)
    assert torch.equal(run(dense, inputs), run(model, inputs))
    save_adapter(dense, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_window_only_adapter_is_empty_but_whole(tmp_path):
    model = converted("sd3", HybridConfig(window=3, linear=False))
    save_adapter(model, tmp_path)
    inputs = make_inputs(model, GRID)
    loaded = load_adapter(make("sd3", dtype=torch.float32), tmp_path)
    assert torch.equal(run(loaded, inputs), run(model, inputs))


def test_an_interrupted_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    import hybriddit.models.adapters as adapters

    model = converted("sd3")
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(path, tensors):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(adapters, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(perturb_hybrid(model), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_adapter_from_the_hub_fetches_two_files(tmp_path, monkeypatch):
    import huggingface_hub

    model = converted("sd3")
    save_adapter(model, tmp_path)
    fetched = []

    def download(repo, name):
        fetched.append((repo, name))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    inputs = make_inputs(model, GRID)
    loaded = load_adapter(make("sd3", dtype=torch.float32), "someone/an-adapter")
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert fetched == [("someone/an-adapter", f"hybrid_{n}") for n in ("config.json", "adapter.safetensors")]


@pytest.mark.parametrize("gate", ["head", "token"])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_keeps_the_gates_in_fp32(kind, gate, tmp_path):
    reference = converted(kind, HybridConfig(window=3, gate=gate), dtype=torch.float64)
    inputs = make_inputs(reference, GRID)
    model = hybridize(make(kind).to(torch.bfloat16), HybridConfig(window=3, gate=gate))
    model.load_state_dict(reference.state_dict())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    low = tree_map(lambda v: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v, inputs)
    if kind == "longcat":  # whose places bf16 does not hold
        low |= {name: ids for name, ids in inputs.items() if name.endswith("_ids")}
    expected = run(reference, inputs)
    # what bf16 costs the dense model itself: hybrid attention adds next to nothing to it
    dense = run(make(kind), inputs)
    cost = (run(make(kind).to(torch.bfloat16), low) - dense).norm() / dense.norm()
    own = set(DENSE_CLASS[kind]._keep_in_fp32_modules or ())  # what diffusers loads in fp32, of the dense model
    for candidate in (model, loaded):
        dtypes = {name: parameter.dtype for name, parameter in candidate.named_parameters()}
        if candidate is loaded and kind == "flux3":  # whose norms diffusers keeps, too
            norms = [dtypes.pop(name) for name in tuple(dtypes) if ".norm_" in name]
            assert norms and set(norms) == {torch.float32}
        gates = {name for name in dtypes if ".hybrid.gate" in name}
        norms = {name for name in dtypes if own & set(name.split(".")) and ".hybrid." not in name}
        kept = gates | norms if candidate is loaded else gates
        assert gates and all((dtype is torch.float32) == (name in kept) for name, dtype in dtypes.items())
        out = run(candidate, low)
        assert candidate.dtype is out.dtype is torch.bfloat16
        assert (out - expected).norm() < 1.5 * cost * expected.norm()
    assert own or torch.equal(run(model, low), run(loaded, low))


@pytest.mark.parametrize("kind", ["pixart", "sd3", "flux-dev"])
def test_layerwise_casting_leaves_the_gates(kind):
    """Stored in bf16 are the maps, not the gates and projections; the model is the one whose maps were rounded to bf16."""
    model = converted(kind, HybridConfig(window=3, gate="token"))
    inputs, gates = make_inputs(model, GRID), {}
    for name, parameter in model.named_parameters():
        if ".hybrid.gate" in name:
            gates[name] = parameter.detach().clone()
    rounded = copy.deepcopy(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    stored = dict(model.named_parameters())
    hybrid = {name: parameter.dtype for name, parameter in stored.items() if ".hybrid." in name}
    assert set(hybrid.values()) == {torch.bfloat16, torch.float32}
    kept = ("gate", ".norm.", ".far.projection_")  # diffusers casts linear layers and convolutions
    assert all((dtype is torch.float32) == any(part in name for part in kept) for name, dtype in hybrid.items())
    assert gates and all(torch.equal(stored[name], gate) for name, gate in gates.items())
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            parameter.copy_(stored[name])
    out = run(model, inputs)
    torch.testing.assert_close(out, run(rounded, inputs), rtol=0, atol=1e-5)
    assert {name: parameter.dtype for name, parameter in stored.items() if ".hybrid." in name} == hybrid


@pytest.mark.parametrize("kind", KINDS)
def test_lora_reaches_the_far_branch(kind):
    """Projections are called, not read: LoRA on to_q changes near and far."""
    from peft import LoraConfig, inject_adapter_in_model

    model = converted(kind, HybridConfig(window=None))
    inputs = make_inputs(model, GRID)
    before = run(model, inputs)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), model)
    assert (run(model, inputs) - before).abs().max() > 1e-5


def test_config_arguments_are_diffusers_own():
    """The Hybrid classes list every argument: a new diffusers may add one."""
    import inspect

    for dense in set(DENSE_CLASS.values()):
        hybrid = getattr(hybriddit, f"Hybrid{dense.__name__}")
        expected = {name: p.default for name, p in inspect.signature(dense.__init__).parameters.items()}
        found = {name: p.default for name, p in inspect.signature(hybrid.__init__).parameters.items()}
        assert found == {**expected, "hybrid_config": None}


def test_hybrid_class_built_directly():
    torch.manual_seed(0)
    config = {k: v for k, v in make("sd3").config.items() if not k.startswith("_")}
    model = hybriddit.HybridSD3Transformer2DModel(**config, hybrid_config={"window": 3}).eval()
    assert HybridConfig.from_dict(model.config.hybrid_config) == HybridConfig(window=3)
    run(model, make_inputs(model, GRID))
    assert type(restore_dense(model)) is DENSE_CLASS["sd3"] and "hybrid_config" not in model.config
    with pytest.raises(ValueError, match="safetensors"):
        hybriddit.HybridSD3Transformer2DModel.from_pretrained("anywhere", use_safetensors=False)


def test_dense_weights_are_not_a_hybrid_checkpoint(tmp_path):
    make("sd3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks .* weights of HybridSD3"):
        hybriddit.HybridSD3Transformer2DModel.from_pretrained(tmp_path)


def test_attention_backend_of_dense_layers_is_kept():
    model = make("flux-dev")
    for processor in model.attn_processors.values():  # as set_attention_backend does, which is global besides
        processor._attention_backend = "_native_math"
    hybridize(model, HybridConfig(window=3, layers={"single*": "dense"}))
    single = model.single_transformer_blocks[0].attn.processor
    assert single._attention_backend == "_native_math"
