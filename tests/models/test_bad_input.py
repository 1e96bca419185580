"""One clear line for what cannot work, and the model as it was."""

import copy
import json
import re

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from tiny_models import FIRST_BLOCK, KINDS, make, make_inputs, perturb_hybrid, run

from hybriddit import HybridConfig, dense_mode, hybridize, load_adapter, restore_dense, save_adapter
from hybriddit.attention import TokenLayout
from hybriddit.models.identity import base_digest

GRID = (4, 5)
GATE = "transformer_blocks.0.attn.hybrid.gate.bias"


@pytest.fixture
def adapter(tmp_path):
    model = perturb_hybrid(hybridize(make("sd3"), HybridConfig(window=3)))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(error, match, function, *args):
    with pytest.raises(error, match=match) as caught:
        function(*args)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_converted():
    other = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1)
    refused(ValueError, "DiTTransformer2DModel is not supported.*PixArt.*SD3.*Flux", hybridize, other, HybridConfig())
    refused(ValueError, "Linear is not supported", hybridize, torch.nn.Linear(1, 1), HybridConfig())

    class Holder:
        transformer = make("sd3")

    refused(ValueError, r"pass its \.transformer", hybridize, Holder(), HybridConfig())
    refused(TypeError, "HybridConfig, not dict", hybridize, make("sd3"), {"window": 3})
    model = hybridize(make("sd3"), HybridConfig(window=3))
    refused(ValueError, "hybrid already", hybridize, model, HybridConfig(window=3))
    refused(ValueError, "not hybrid", restore_dense, make("sd3"))
    refused(ValueError, "not hybrid", lambda: dense_mode(make("sd3")).__enter__())


@pytest.mark.parametrize("kind", ["pixart", "flux-dev"])
def test_a_config_that_converts_nothing_leaves_the_model(kind):
    model = make(kind)
    inputs = make_inputs(model, GRID)
    before, attributes = run(model, inputs), set(vars(model))
    refused(ValueError, "no attention layer", hybridize, model, HybridConfig(layers={"*": "dense"}))
    assert set(vars(model)) == attributes and torch.equal(run(model, inputs), before)


@pytest.mark.parametrize("kind, pattern", [("pixart", "*.attn2"), ("flux-dev", "transformer_blocks.7.*")])
def test_a_pattern_that_matches_no_layer_is_named_beside_real_names(kind, pattern):
    model = make(kind)
    attributes = set(vars(model))
    config = HybridConfig(layers={"*blocks.0.*": "dense", pattern: "dense"})
    refused(
        ValueError,
        rf"{re.escape(repr(pattern))} matches no .* like 'transformer_blocks\.0\.attn",
        hybridize,
        model,
        config,
    )
    assert set(vars(model)) == attributes
    hybridize(make(kind, layers=2), HybridConfig.every_nth_dense(2))  # its patterns count on past the model


def pag(model):
    from diffusers.models.attention_processor import PAGJointAttnProcessor2_0

    model.transformer_blocks[0].attn.set_processor(PAGJointAttnProcessor2_0())


def ip_adapter(model):
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(32, 16))


def plain(model):
    model.transformer_blocks[1].attn2.set_processor(AttnProcessor())


@pytest.mark.parametrize(("kind", "replace"), [("pixart", plain), ("sd3", pag), ("flux-dev", ip_adapter)])
def test_replaced_processors_are_refused_not_run(kind, replace):
    model = hybridize(make(kind), HybridConfig(window=3))
    inputs = make_inputs(model, GRID)
    before = run(model, inputs)
    replace(model)
    refused(ValueError, "in place of.*set_default_attn_processor.*restore_dense", run, model, inputs)
    model.set_default_attn_processor()
    assert torch.equal(run(model, inputs), before)
    # before conversion too
    model = make(kind)
    replace(model)
    refused(ValueError, "undo that", hybridize, model, HybridConfig(window=3))


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("z-image", "ovis", "fibo")]
)  # classes without it
def test_setting_processors_changes_nothing_when_refused(kind):
    model = make(kind)
    dense = dict(model.attn_processors)
    hybridize(model, HybridConfig(window=3, layers={FIRST_BLOCK[kind]: "dense"}))
    inputs = make_inputs(model, GRID)
    before, own = run(model, inputs), model.attn_processors
    refused(ValueError, "in place of", model.set_attn_processor, AttnProcessor())
    refused(ValueError, "in place of", model.set_attn_processor, dense)
    assert model.attn_processors == own and torch.equal(run(model, inputs), before)
    model.set_attn_processor(dict(own))  # as PAG's pipelines do when they are done
    assert model.attn_processors == own


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("z-image", "ovis", "fibo")]
)  # whose classes fuse nothing
def test_fused_projections(kind):
    model = make(kind)
    with torch.no_grad():
        model.fuse_qkv_projections()
    if kind != "qwen-image":  # whose processor does not heed them
        refused(ValueError, "undo that|unfuse_qkv_projections", hybridize, model, HybridConfig(window=3))
    model.unfuse_qkv_projections()
    hybridize(model, HybridConfig(window=3))
    inputs = make_inputs(model, GRID)
    before = run(model, inputs)
    refused(ValueError, "leave fuse_qkv_projections out", model.fuse_qkv_projections)
    assert torch.equal(run(model, inputs), before)
    if "flux" in kind:  # layer by layer, whose processor stays
        model.get_submodule(FIRST_BLOCK[kind].removesuffix(".*")).attn.fuse_projections()
        refused(ValueError, "unfuse_qkv_projections", run, model, inputs)
        model.unfuse_qkv_projections()
        assert torch.equal(run(model, inputs), before)


def test_forward_arguments():
    model = hybridize(make("flux-dev"), HybridConfig(window=3))
    inputs = make_inputs(model, GRID)
    bad = {"ip_adapter_image_embeds": [torch.zeros(1, 1, 4)]}
    refused(ValueError, "IP-Adapter", lambda: run(model, inputs, joint_attention_kwargs=bad))
    ids = {**inputs, "img_ids": inputs["img_ids"][torch.randperm(20)][:19]}
    refused(ValueError, "whole image grids.*token_layout", run, model, ids)
    off = {**inputs, "img_ids": inputs["img_ids"] + torch.tensor([0.0, 1.0, 0.0])}
    refused(ValueError, "whole image grids.*token_layout", run, model, off)
    layout = {"token_layout": TokenLayout(5, ((4, 4),), True)}
    refused(ValueError, "25 tokens", lambda: run(model, inputs, joint_attention_kwargs=layout))
    block = model.transformer_blocks[0].attn
    refused(ValueError, "needs `token_layout`", block, torch.zeros(1, 20, 32), torch.zeros(1, 5, 32))

    model = hybridize(make("krea2"), HybridConfig(window=3))
    inputs = make_inputs(model, GRID)
    refused(ValueError, "not given a token_layout", lambda: run(model, inputs, attention_kwargs=layout))

    model = hybridize(make("pixart"), HybridConfig(window=3))
    mask = torch.ones(1, 20)
    refused(ValueError, "no attention mask", lambda: run(model, make_inputs(model, GRID), attention_mask=mask))


def refused_adapter(error, match, source, model):
    """Dense, and hybrid already: refused, and unchanged."""
    inputs = make_inputs(model, GRID)
    for convert in (False, True):
        if convert:
            perturb_hybrid(hybridize(model, HybridConfig(window=3)))
        before, model_class = run(model, inputs), type(model)
        refused(error, match, load_adapter, model, source)
        assert type(model) is model_class and torch.equal(run(model, inputs), before)


def test_missing_adapter(adapter, tmp_path):
    refused_adapter(FileNotFoundError, "no adapter folder", tmp_path / "nowhere", make("sd3"))
    refused_adapter(FileNotFoundError, "no adapter folder", "./a/b/c", make("sd3"))
    refused_adapter(FileNotFoundError, "no folder someone/nothing, and the hub", "someone/nothing", make("sd3"))
    (adapter / "hybrid_adapter.safetensors").rename(tmp_path / "weights")
    refused_adapter(FileNotFoundError, "has no hybrid_adapter.safetensors", adapter, make("sd3"))
    (tmp_path / "weights").rename(adapter / "hybrid_adapter.safetensors")
    (adapter / "hybrid_config.json").unlink()
    refused_adapter(FileNotFoundError, "has no hybrid_config.json", adapter, make("sd3"))


def test_damaged_adapter(adapter):
    config, weights = adapter / "hybrid_config.json", adapter / "hybrid_adapter.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-10], whole[:50], b"", b"\x80\x04not a tensor", b"\xff" * 100):
        weights.write_bytes(damaged)
        refused_adapter(ValueError, "damaged", adapter, make("sd3"))
    weights.write_bytes(whole)
    text = config.read_text()
    for damaged in ("", "{", "[]", "\x00", text.replace('"window"', '"widnow"'), text.replace('"gate"', '"door"')):
        config.write_text(damaged)
        refused_adapter(ValueError, "no adapter config", adapter, make("sd3"))


def test_pickled_weights_are_not_read(adapter):
    """A pickle under the right name is a damaged file, and its code does not run."""

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    torch.save(Bomb(), adapter / "hybrid_adapter.safetensors")
    refused_adapter(ValueError, "damaged", adapter, make("sd3"))


def test_adapter_of_another_model(adapter):
    for kind in ("pixart", "flux-dev"):
        refused_adapter(ValueError, "is for SD3Transformer2DModel", adapter, make(kind))
    refused_adapter(ValueError, r"lacks \d+ of its weights \(transformer_blocks\.2", adapter, make("sd3", layers=3))
    refused_adapter(ValueError, r"no place for \(transformer_blocks\.1", adapter, make("sd3", layers=1))
    medium = make("sd35-medium")
    refused_adapter(ValueError, r"lacks \d+ of its weights \(transformer_blocks\.0\.attn2", adapter, medium)

    weights = load_file(adapter / "hybrid_adapter.safetensors")
    save_file({**weights, GATE: torch.zeros(3)}, adapter / "hybrid_adapter.safetensors")
    refused_adapter(ValueError, rf"{GATE} is \(3,\), the model's is \(2,\)", adapter, make("sd3"))
    save_file({**weights, "x_embedder.weight": torch.zeros(1)}, adapter / "hybrid_adapter.safetensors")
    refused_adapter(ValueError, "no place for .x_embedder.weight", adapter, make("sd3"))


def test_adapter_of_other_weights(tmp_path):
    """Of the same class and size: refused, unless that is what is wanted."""
    model, source = perturb_hybrid(hybridize(make("sd3", dtype=torch.float32), HybridConfig(window=3))), tmp_path / "a"
    save_adapter(model, source)
    other = make("sd3", dtype=torch.float32)
    with torch.no_grad():
        other.proj_out.weight[0, 0] += 0.1
    message = "was made from other weights, a model without a name: .* check_base=False"
    refused_adapter(ValueError, message, source, copy.deepcopy(other))
    assert load_adapter(other, source, check_base=False) is other
    assert torch.equal(other.state_dict()[GATE], model.state_dict()[GATE])
    with pytest.warns(UserWarning, match="cannot be told: its weights are neither float32 nor bfloat16"):
        load_adapter(make("sd3", dtype=torch.float16), source)
    # one of version 0.1 does not tell its base
    values = json.loads((source / "hybrid_config.json").read_text())
    assert values.pop("_base") == {"name": None, "weights": base_digest(model)}
    (source / "hybrid_config.json").write_text(json.dumps(values))
    restore_dense(other)
    load_adapter(other, source)
    (source / "hybrid_config.json").write_text(json.dumps({**values, "_base": "flux"}))
    refused(ValueError, "no adapter config: its _base is 'flux'", load_adapter, other, source)


def test_adapter_of_another_config(adapter):
    model = hybridize(make("sd3"), HybridConfig(window=5))
    refused(ValueError, "another config", load_adapter, model, adapter)
    refused(ValueError, "not supported", load_adapter, torch.nn.Linear(1, 1), adapter)


def test_save_adapter_refuses_a_dense_model(tmp_path):
    for kind in KINDS:
        refused(ValueError, "not hybrid", save_adapter, make(kind), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_plan_files(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("window: [8, 4]\nstride: 2\nlayers: {'*.0.*': dense}\n")
    assert HybridConfig.from_plan(plan) == HybridConfig(window=(8, 4), stride=2, layers={"*.0.*": "dense"})
    plan.write_text(json.dumps(HybridConfig(window=None).to_dict()))
    assert HybridConfig.from_plan(plan) == HybridConfig(window=None)
    refused(FileNotFoundError, "no plan file", HybridConfig.from_plan, tmp_path / "none.yaml")
    for text, match in [
        ("windw: 3", "plan.yaml: unknown field 'windw'.*'window'"),
        ("window: 0", "plan.yaml: window must be"),
        ("- 3", "plan.yaml: .*field names"),
        ("", "plan.yaml: .*field names"),
        ("{", "plan.yaml: "),
    ]:
        plan.write_text(text)
        refused(ValueError, match, HybridConfig.from_plan, plan)
