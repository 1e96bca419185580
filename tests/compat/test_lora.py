"""LoRA: load, scale, fuse, unfuse, unload, before and after converting."""

import pytest
import torch
from oracle import GRID, assert_same, check, converted, differs, generate, models, pipelines
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny_models import make, make_inputs, run
from tiny_pipelines import tiny_pipeline

from hybriddit import dense_mode, load_adapter, restore_dense, save_adapter

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp"]
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False)


@pytest.fixture
def lora(request, tmp_path):
    """A LoRA file made on the dense transformer, as training scripts save them."""
    pipeline = tiny_pipeline(request.param)
    torch.manual_seed(7)
    pipeline.transformer.add_adapter(LORA)
    layers = get_peft_model_state_dict(pipeline.transformer)
    type(pipeline).save_lora_weights(tmp_path, transformer_lora_layers=layers)
    return request.param, tmp_path


@pytest.mark.parametrize("lora", ["sd35", "flux_dev", "z_image"], indirect=True)
def test_lora(lora):
    kind, folder = lora
    trio = pipelines(kind)
    without = check(generate, trio)
    for pipeline in trio:
        pipeline.load_lora_weights(folder)
    full = check(generate, trio)
    half = check(lambda p: generate(p, joint_attention_kwargs={"scale": 0.5}), trio)
    none = check(lambda p: generate(p, joint_attention_kwargs={"scale": 0.0}), trio)
    for i in range(3):
        assert_same(none[i], without[i])
        assert differs(full[i], without[i]) and differs(half[i], without[i]) and differs(full[i], half[i])

    for pipeline in trio:
        pipeline.set_adapters(pipeline.get_active_adapters(), adapter_weights=[0.5])
    for found, expected in zip(check(generate, trio), half, strict=True):
        assert_same(found, expected)
    for pipeline in trio:
        pipeline.set_adapters(pipeline.get_active_adapters(), adapter_weights=[1.0])
        pipeline.fuse_lora()
    for found, expected in zip(check(generate, trio), full, strict=True):
        assert_same(found, expected)
    for pipeline in trio:
        pipeline.unfuse_lora()
        pipeline.unload_lora_weights()
    for found, expected in zip(check(generate, trio), without, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("lora", ["sd3", "flux_dev"], indirect=True)
def test_lora_before_converting(lora, tmp_path):
    kind, folder = lora
    after, before = (tiny_pipeline(kind) for _ in range(2))
    dense = generate(before)
    converted(after.transformer)
    without = generate(after)
    after.load_lora_weights(folder)
    before.load_lora_weights(folder)
    dense_lora = generate(before)
    converted(before.transformer)
    assert torch.equal(generate(before), generate(after))
    # the teacher has it too, and the adapter on disk knows nothing of it
    with dense_mode(before.transformer):
        assert torch.equal(generate(before), dense_lora)
    save_adapter(before.transformer, tmp_path / "adapter")
    other = load_adapter(tiny_pipeline(kind), tmp_path / "adapter")
    assert torch.equal(generate(other), without)
    before.unload_lora_weights()
    assert torch.equal(generate(before), without)
    restore_dense(before.transformer)
    assert torch.equal(generate(before), dense)
    # fused first: its weights are the dense model's
    fused, plain = tiny_pipeline(kind), tiny_pipeline(kind)
    for pipeline in (fused, plain):
        pipeline.load_lora_weights(folder)
    fused.fuse_lora()
    fused.unload_lora_weights()
    for pipeline in (fused, plain):
        converted(pipeline.transformer)
    assert_same(generate(fused), generate(plain))


def test_lora_on_pixart(tmp_path):
    """diffusers has no loader for PixArt: its training script wraps the transformer by peft."""
    torch.manual_seed(7)
    get_peft_model(make("pixart"), LORA).save_pretrained(tmp_path)
    trio = models("pixart")
    inputs = make_inputs(trio[0], GRID)
    without = check(lambda model: run(model, inputs), trio)
    wrapped = [PeftModel.from_pretrained(model, tmp_path) for model in trio]
    full = check(lambda model: run(model, inputs), wrapped)
    for i in range(3):
        assert differs(full[i], without[i])
        with wrapped[i].disable_adapter():
            assert_same(run(wrapped[i], inputs), without[i])
    # loaded before converting
    model = make("pixart")
    wrapper = PeftModel.from_pretrained(model, tmp_path)
    converted(model)
    assert_same(run(wrapper, inputs), full[2])
    merged = [model.merge_and_unload() for model in wrapped]
    for found, expected in zip(check(lambda model: run(model, inputs), merged), full, strict=True):
        assert_same(found, expected)


def test_a_pipeline_is_saved_without_its_lora(tmp_path):
    """As diffusers saves it, under the variant's name too."""
    pipeline = tiny_pipeline("flux_dev")
    converted(pipeline.transformer)
    expected = generate(pipeline)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert differs(generate(pipeline), expected)
    pipeline.save_pretrained(tmp_path, variant="plain")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.plain.safetensors").is_file()
    assert torch.equal(generate(type(pipeline).from_pretrained(tmp_path, variant="plain")), expected)


def test_a_compiled_transformer_stays_in_its_pipeline_and_is_saved_as_a_hybrid(tmp_path):
    pipeline, plain = tiny_pipeline("flux_dev"), tiny_pipeline("flux_dev")
    save_adapter(converted(tiny_pipeline("flux_dev").transformer), tmp_path / "adapter")
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    for each in (pipeline, plain):
        load_adapter(each, tmp_path / "adapter")
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert_same(generate(type(plain).from_pretrained(tmp_path / "pipeline")), generate(plain))
