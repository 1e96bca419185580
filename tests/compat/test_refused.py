"""What replaces attention processors: refused in one line, and the hybrid goes on as before."""

import pytest
import torch
from diffusers import PixArtSigmaPAGPipeline, StableDiffusion3PAGPipeline
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from oracle import GRID, assert_same, differs, generate, models, pipelines
from tiny_models import make_inputs, run
from tiny_pipelines import tiny_pipeline

from hybriddit import HybridConfig, hybridize, restore_dense


def refused(match, function, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


def flux_ip_adapter():
    """An IP-Adapter for the tiny FLUX: 16 channels, 1 double block, embeddings of 8."""
    random = torch.Generator().manual_seed(2)
    shapes = {"proj.weight": (4 * 16, 8), "proj.bias": (4 * 16,), "norm.weight": (16,), "norm.bias": (16,)}
    layer = {"to_k_ip.weight": (16, 16), "to_k_ip.bias": (16,), "to_v_ip.weight": (16, 16), "to_v_ip.bias": (16,)}
    return {
        "image_proj": {name: torch.randn(shape, generator=random) for name, shape in shapes.items()},
        "ip_adapter": {f"0.{name}": torch.randn(shape, generator=random) for name, shape in layer.items()},
    }


def load_flux(pipeline):
    pipeline.load_ip_adapter(flux_ip_adapter(), weight_name="", image_encoder_pretrained_model_name_or_path=None)


def test_flux_ip_adapter():
    embeds = {"ip_adapter_image_embeds": [torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(3))]}
    dense, _, hybrid = pipelines("flux_dev")
    before, plain = generate(hybrid), generate(dense)
    refused("do not take IP-Adapters.*restore_dense", load_flux, hybrid)
    assert torch.equal(generate(hybrid), before)
    refused("do not take IP-Adapter images", run, hybrid.transformer, make_inputs(hybrid.transformer, GRID),
            joint_attention_kwargs=embeds)  # fmt: skip
    # as the message says: on the dense model it works, and what has it is not converted until it is unloaded
    restored = restore_dense(hybrid.transformer)
    for pipeline in (dense, hybrid):
        load_flux(pipeline)
    images = {**embeds, "negative_ip_adapter_image_embeds": embeds["ip_adapter_image_embeds"]}
    guided = generate(dense, **images)
    assert torch.equal(generate(hybrid, **images), guided) and differs(guided, plain)
    refused("undo that before converting", hybridize, restored, HybridConfig(window=3))
    hybrid.unload_ip_adapter()
    hybridize(restored, HybridConfig(window=16))
    assert_same(generate(hybrid), plain)


@pytest.mark.parametrize("kind", ["sd3", "sd35"])
def test_sd3_ip_adapter(kind):
    dense, _, hybrid = pipelines(kind)
    before = generate(hybrid)
    refused("do not take IP-Adapters.*restore_dense", hybrid.load_ip_adapter, {"image_proj": {}, "ip_adapter": {}},
            weight_name="", image_encoder_folder=None)  # fmt: skip
    assert torch.equal(generate(hybrid), before)
    processor = SD3IPAdapterJointAttnProcessor2_0(16, 16, 8, timesteps_emb_dim=16)
    refused("in place of", hybrid.transformer.set_attn_processor, processor)
    assert torch.equal(generate(hybrid), before)
    dense.transformer.set_attn_processor(processor)
    refused("undo that before converting", hybridize, dense.transformer, HybridConfig(window=3))


@pytest.mark.parametrize("kind", ["pixart_sigma", "sd3"])
def test_pag(kind):
    pag_class = PixArtSigmaPAGPipeline if kind == "pixart_sigma" else StableDiffusion3PAGPipeline
    dense, hybrid = (pag_class(**_components(p)) for p in pipelines(kind)[::2])
    before = generate(hybrid, pag_scale=0.0)
    refused("PAG.* in place of .*set_default_attn_processor", generate, hybrid, pag_scale=3.0)
    refused("PAG.* in place of .*set_default_attn_processor", generate, hybrid, pag_scale=0.0)
    hybrid.transformer.set_default_attn_processor()
    assert torch.equal(generate(hybrid, pag_scale=0.0), before)
    # as the message says: on the dense model it works
    restore_dense(hybrid.transformer)
    guided = generate(dense, pag_scale=3.0)
    assert torch.equal(generate(hybrid, pag_scale=3.0), guided)
    assert differs(guided, generate(dense, pag_scale=0.0))


def _components(pipeline):
    components = pipeline.components
    return {name: part for name, part in components.items() if name not in ("image_encoder", "feature_extractor")}


def test_perturbed_attention_guider():
    """The guider's hook answers for softmax alone: diffusers refuses the processors that it does not know."""
    perturbed = LayerSkipConfig(indices=[0], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    for model in models("pixart")[1:]:
        inputs = make_inputs(model, GRID)
        before = run(model, inputs)
        refused("HybridAttnProcessor", apply_layer_skip, model, perturbed)
        assert torch.equal(run(model, inputs), before)


def test_parallel():
    model = hybridize(tiny_pipeline("flux_dev").transformer, HybridConfig(window=3))
    model._parallel_config = object()
    refused("do not run in parallel", run, model, make_inputs(model, GRID))
