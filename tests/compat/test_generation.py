"""Other pipelines, and what pipelines offer beside the prompt, with a hybrid transformer in them."""

import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from oracle import GRID, assert_same, check, converted, differs, generate, models, pipelines
from tiny_models import make_inputs, run
from tiny_pipelines import tiny_pipeline

import hybriddit
from hybriddit import HybridConfig, hybridize

IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(1, 1, 64, 64)
MASK[..., 16:48, 16:48] = 1
EVERY = ["pixart_sigma", "sd35", "flux_dev"]
SD3_AND_FLUX = ["sd3", "sd35", "flux_dev"]


@pytest.mark.parametrize("kind", SD3_AND_FLUX)
def test_controlnet(kind):
    trio = pipelines(kind)
    guided = []
    for pipeline in trio:
        if "flux" in kind:
            controlnet = FluxControlNetModel.from_transformer(
                pipeline.transformer, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2
            )
            pipeline = FluxControlNetPipeline(**pipeline.components, controlnet=controlnet)
        else:
            controlnet = SD3ControlNetModel.from_transformer(
                pipeline.transformer, num_layers=2, num_extra_conditioning_channels=0
            )
            pipeline = StableDiffusion3ControlNetPipeline(**pipeline.components, controlnet=controlnet)
        # a controlnet made of a hybrid is the dense one: same weights, none of ours
        state = controlnet.state_dict()
        assert not any(".hybrid." in name for name in state)
        assert all(torch.equal(state[name], weight) for name, weight in trio[0].transformer.state_dict().items()
                   if name in state and "pos_embed" not in name)  # fmt: skip
        torch.manual_seed(5)
        for parameter in controlnet.parameters():  # its outputs start at zero
            parameter.data.normal_(std=0.1)
        guided.append(pipeline)

    def control(image, scale):
        return check(lambda p: generate(p, control_image=image, controlnet_conditioning_scale=scale), guided)

    for one, other, without in zip(control(IMAGE, 1.0), control(1 - IMAGE, 1.0), control(IMAGE, 0.0), strict=True):
        assert differs(one, other) and differs(one, without)
    for one, other in zip(control(IMAGE, 0.0), control(1 - IMAGE, 0.0), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("kind", SD3_AND_FLUX)
def test_img2img(kind):
    trio = [AutoPipelineForImage2Image.from_pipe(pipeline) for pipeline in pipelines(kind)]
    half = check(lambda p: generate(p, image=IMAGE, strength=0.6, num_inference_steps=4), trio)
    other = check(lambda p: generate(p, image=1 - IMAGE, strength=0.6, num_inference_steps=4), trio)
    assert all(differs(*images) for images in zip(half, other, strict=True))


@pytest.mark.parametrize("kind", SD3_AND_FLUX)
def test_inpaint(kind):
    trio = [AutoPipelineForInpainting.from_pipe(pipeline) for pipeline in pipelines(kind, latent_channels=16)]
    settings = {"mask_image": MASK, "strength": 1.0, "num_inference_steps": 3}
    found = check(lambda p: generate(p, image=IMAGE, **settings), trio)
    other = check(lambda p: generate(p, image=1 - IMAGE, **settings), trio)
    assert all(differs(*images) for images in zip(found, other, strict=True))


def widened(pipeline, channels):
    """A dense pipeline whose transformer takes further channels beside the latents, as FLUX's tools do."""
    config = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    torch.manual_seed(4)
    transformer = FluxTransformer2DModel(**{**config, "in_channels": channels, "out_channels": 16})
    for name, parameter in transformer.named_parameters():
        if "norm" in name and name.endswith("linear.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    return {**pipeline.components, "transformer": transformer}


@pytest.mark.parametrize(("pipeline_class", "channels", "extra"), [
    (FluxFillPipeline, 16 + 16 + 4 * 64 // 4, {"image": IMAGE, "mask_image": MASK}),
    (FluxControlPipeline, 32, {"control_image": IMAGE}),
])  # fmt: skip
def test_flux_tools(pipeline_class, channels, extra):
    trio = []
    for _ in range(3):
        components = widened(tiny_pipeline("flux_dev"), channels)
        components = {
            name: part for name, part in components.items() if name not in ("image_encoder", "feature_extractor")
        }
        trio.append(pipeline_class(**components))
    hybridize(trio[1].transformer, HybridConfig(window=16))
    converted(trio[2].transformer)
    check(lambda p: generate(p, **extra), trio)


def kontext(config):
    pipeline = FluxKontextPipeline(**tiny_pipeline("flux_dev").components)
    if config is not None:
        hybridize(pipeline.transformer, config)
    return lambda image=None: generate(pipeline, image=image, max_area=64 * 64, _auto_resize=False)


def test_kontext():
    """A reference image is a second grid, of which windows see what is at the same relative position."""
    dense, same = kontext(None), kontext(HybridConfig(window=16))
    small, linear = kontext(HybridConfig(window=3)), kontext(HybridConfig(window=None))
    assert_same(same(), dense())
    assert_same(same(IMAGE), dense(IMAGE))
    assert differs(small(IMAGE), dense(IMAGE))
    assert all(differs(model(IMAGE), model(1 - IMAGE)) for model in (small, linear, dense))


@pytest.mark.parametrize("kind", EVERY)
def test_from_pipe(kind):
    """Pipelines of one another's parts: the transformer stays hybrid, and is the same one."""
    pipeline = pipelines(kind)[2]
    before, transformer = generate(pipeline), pipeline.transformer
    name = type(pipeline).__name__
    tasks = ["PAG"] if kind == "pixart_sigma" else ["Img2Img", "Inpaint"]
    for other in [getattr(diffusers, name.replace("Pipeline", f"{task}Pipeline")) for task in tasks]:
        # a class asked for by name compares the transformer's class with its own: diffusers says to pass it
        with pytest.raises(ValueError, match="transformer"):
            other.from_pipe(pipeline)
        there = other.from_pipe(pipeline, transformer=transformer)
        back = type(pipeline).from_pipe(there, transformer=transformer)
        assert there.transformer is back.transformer is transformer
        assert torch.equal(generate(back), before)
    back = AutoPipelineForText2Image.from_pipe(there, enable_pag=False)
    assert type(back) is type(pipeline) and back.transformer is transformer
    assert torch.equal(generate(back), before)
    ours = getattr(hybriddit, f"Hybrid{name}").from_pipe(pipeline, transformer=transformer)
    assert torch.equal(generate(ours), before)


@pytest.mark.parametrize("kind", EVERY)
def test_callbacks(kind):
    """A callback sees every step's latents, and may change them."""
    old = kind == "pixart_sigma"  # has the older argument, which cannot change anything

    def watched(pipeline, change=0.0):
        seen = []

        def at_end(_, step, time, values):
            seen.append(values["latents"])
            return {"latents": values["latents"] + change}

        if old:
            images = generate(pipeline, callback=lambda step, time, latents: seen.append(latents))
        else:
            images = generate(pipeline, callback_on_step_end=at_end)
        return images, torch.stack(seen)

    trio = pipelines(kind)
    images = check(generate, trio)
    latents = check(lambda p: watched(p)[1], trio)
    assert all(len(steps) == 2 for steps in latents)
    if not old:
        changed = check(lambda p: watched(p, change=0.5)[0], trio)
        assert all(differs(*pair) for pair in zip(changed, images, strict=True))


@pytest.mark.parametrize("kind", ["pixart_sigma", "sd3", "flux_dev"])
def test_vae_tiling(kind):
    trio = pipelines(kind)
    whole = check(generate, trio)
    for pipeline in trio:
        pipeline.vae.enable_tiling()
        pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 32, 8
    tiled = check(generate, trio)
    assert all(differs(*images, by=1e-5) for images in zip(tiled, whole, strict=True))


@pytest.mark.parametrize("kind", ["sd3", "sd35"])
def test_skip_layer_guidance(kind):
    trio = pipelines(kind)
    plain = check(lambda p: generate(p, num_inference_steps=3), trio)
    settings = {
        "num_inference_steps": 3,
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
    }
    skipped = check(lambda p: generate(p, **settings), trio)
    assert all(differs(*images) for images in zip(plain, skipped, strict=True))


def test_skipped_layers_by_hook():
    """What the skip-layer guider does, on PixArt: diffusers' hook swaps text and image on the others, dense too."""
    trio = models("pixart")
    inputs = make_inputs(trio[0], GRID)
    plain = check(lambda model: run(model, inputs), trio)
    for model in trio:
        apply_layer_skip(model, LayerSkipConfig(indices=[0]))
    skipped = check(lambda model: run(model, inputs), trio)
    assert all(differs(*outputs) for outputs in zip(plain, skipped, strict=True))


def test_pixart_sigma_takes_no_image():
    """No image-to-image or inpainting pipeline of diffusers takes PixArt-Sigma: the table says so."""
    names = [name for name in dir(diffusers) if name.startswith("PixArt") and name.endswith("Pipeline")]
    assert {PixArtSigmaPipeline.__name__, PixArtSigmaPAGPipeline.__name__} <= set(names)
    assert not any(word in name for name in names for word in ("Img2Img", "Inpaint", "ControlNet"))
