"""FLUX.3 klein within diffusers' modular pipelines, which make its images; what the commands refuse of it."""

import pytest
import torch
from diffusers import Flux3AutoBlocks, Flux3DistilledAutoBlocks
from PIL import Image
from tiny_models import make, make_inputs, perturb_hybrid, run
from tiny_pipelines import _flux2_vae

from hybriddit import HybridConfig, hybridize, load_adapter, restore_dense, save_adapter
from hybriddit.benchmark.subjects import find_subject
from hybriddit.info.contents import describe
from hybriddit.models import FLUX_3_KLEIN
from hybriddit.models.flops import attention_flops
from hybriddit.pipelines.loading import find_base
from hybriddit.push import make_card
from hybriddit.training.dry_run import plan_model

PICTURE = Image.effect_mandelbrot((40, 24), (-2, -1, 1, 1), 20).convert("RGB")


def pipeline_of(distilled):
    """Text comes encoded: its steps are left out. Also the blocks, and what makes an image."""
    blocks = (Flux3DistilledAutoBlocks if distilled else Flux3AutoBlocks)()
    for name in ("prompt_upsampler", "text_encoder"):
        blocks.sub_blocks.pop(name)
    pipeline = blocks.init_pipeline()
    model = make("flux3", dtype=torch.float32, flow_map=distilled)
    pipeline.update_components(transformer=model, vae=_flux2_vae(2))
    generator = torch.Generator().manual_seed(0)
    words, others = (torch.randn(1, length, 12, generator=generator) for length in (7, 4))
    text = {"prompt_embeds": words} | ({} if distilled else {"negative_prompt_embeds": others})

    def image(pipeline, **settings):
        pipeline.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(1)
        return pipeline(**text, **settings, num_inference_steps=2, generator=seed, output_type="pt", output="images")

    return pipeline, blocks, image


@pytest.mark.filterwarnings("ignore:The default of `overwrite_modular_index`")
@pytest.mark.parametrize("distilled", [False, True])
def test_its_modular_pipeline_takes_the_hybrid_and_saves_it(distilled, tmp_path):
    pipeline, blocks, image = pipeline_of(distilled)
    calls = [{"height": 32, "width": 80}, {"image": PICTURE}, {"image": [PICTURE, PICTURE.rotate(90, expand=True)]}]
    dense = [image(pipeline, **call) for call in calls]
    hybridize(pipeline.transformer, HybridConfig(window=64))
    for call, expected in zip(calls, dense, strict=True):
        torch.testing.assert_close(image(pipeline, **call), expected, rtol=0, atol=1e-5)

    restore_dense(pipeline.transformer)
    perturb_hybrid(hybridize(pipeline.transformer, HybridConfig(window=2)))
    expected = image(pipeline, **calls[1])
    assert (expected - dense[1]).abs().max() > 1e-3
    save_adapter(pipeline.transformer, tmp_path / "adapter")
    card = str(make_card(tmp_path / "adapter", "someone/flux3-w2"))
    assert 'pipeline = ModularPipeline.from_pretrained("path/to/the/base")\npipeline.load_components()\n' in card
    for folder in ("hybrid", "dense"):
        if folder == "dense":
            restore_dense(pipeline.transformer)
        pipeline.save_pretrained(str(tmp_path / folder))
        loaded = blocks.init_pipeline(str(tmp_path / folder))
        loaded.load_components(dtype=torch.float32)
        assert type(loaded.transformer) is type(pipeline.transformer)
        if folder == "dense":
            load_adapter(loaded, tmp_path / "adapter")
        torch.testing.assert_close(image(loaded, **calls[1]), expected, rtol=0, atol=1e-6)


def test_calls_that_cannot_be_served():
    model = hybridize(make("flux3"), HybridConfig(window=3))
    inputs = make_inputs(model, (4, 6), references=((2, 3),))
    second = inputs["img_ids"] + torch.tensor([0, 0, 0, 1])
    for match, changed in {
        "img_ids do not describe whole image grids of 24 tokens together$": {"img_ids": inputs["img_ids"][:20]},
        "image_cond_ids do not describe whole": {"image_cond_ids": inputs["image_cond_ids"][:5]},
        "img_ids are of one image, not of 2": {"img_ids": torch.cat([inputs["img_ids"][:12], second[:12]])},
        "requires `image_cond_ids`": {"image_cond_ids": None},
        "`target_timestep` is required by, and only by": {"target_timestep": inputs["timestep"]},
    }.items():
        with pytest.raises(ValueError, match=match):
            run(model, {**inputs, **changed})
    with pytest.raises(ValueError, match="reads one prompt at a time"):
        FLUX_3_KLEIN.encode_prompts(None, ["a", "b"])


def test_flops_are_of_what_each_block_sees():
    model = hybridize(make("flux3"), HybridConfig(window=3))
    layout = FLUX_3_KLEIN.token_layout(model, make_inputs(model, (4, 6), references=((2, 3), (5, 1))))
    pairs = 24**2 + 11**2 + (5 + 24 + 11) ** 2
    assert attention_flops(model, layout)["dense"] == 4 * 32 * pairs
    alone = attention_flops(model, layout._replace(grids=((4, 6),)))
    assert alone["dense"] == 4 * 32 * (24**2 + 29**2) and alone["hybrid"] > 0


def test_the_commands_refuse_modular_pipelines(tmp_path):
    (tmp_path / "modular_model_index.json").write_text('{"_class_name": "Flux3ModularPipeline"}')
    for path in (str(tmp_path), *FLUX_3_KLEIN.published):
        for command in (find_base, plan_model):
            with pytest.raises(ValueError, match="is a modular pipeline of diffusers, which the commands do not load"):
                command(path)
    with pytest.raises(ValueError, match="whose parts may be anywhere: give the folder of one of them"):
        describe(tmp_path)
    assert not find_subject("flux3").samples
