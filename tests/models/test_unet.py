"""UNets: the grids of their levels, Stable Diffusion's pipelines, and what cannot be done with them."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from tiny_models import HEADS, make_inputs, perturb_hybrid, run, unet, window_mask
from tiny_pipelines import TEXT_LENGTH, tiny_pipeline

import hybriddit
from hybriddit.attention import TokenLayout
from hybriddit.data.latents import LatentData, LatentInfo
from hybriddit.generate.images import for_task
from hybriddit.models import STABLE_DIFFUSION_UNET as FAMILY
from hybriddit.models.family import find_published
from hybriddit.models.flops import attention_flops
from hybriddit.training.distill import distill
from hybriddit.training.run_config import DistillConfig, TrainConfig

GRID = (9, 6)  # halved, rounding up: 5 x 3
XL = {
    "attention_head_dim": (1, HEADS),  # heads of one width at every level
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}
KINDS = {"sd15": {}, "sdxl": XL}


def make(kind, **kwargs):
    torch.manual_seed(0)
    model = unet(**KINDS[kind], **kwargs).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter.mul_(3)  # sharp attention: a wrong mask shows
    return model


class Masked:
    """Softmax attention under a window as a mask, whatever the level."""

    def __init__(self, window):
        grids = (GRID, (5, 3))
        self.masks = {rows * columns: window_mask((rows, columns), window) for rows, columns in grids}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        projections = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (to(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in projections)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.masks[hidden_states.shape[1]])
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_hybrid_is_the_dense_model_under_its_window(kind, tmp_path):
    model = make(kind)
    inputs = make_inputs(model, GRID, batch=2)
    dense = run(model, inputs)
    hybriddit.hybridize(model, hybriddit.HybridConfig(window=9))
    torch.testing.assert_close(run(model, inputs), dense)  # the window covers the grids
    hybriddit.restore_dense(model)
    assert type(model) is UNet2DConditionModel and torch.equal(run(model, inputs), dense)
    layers = [attn for name, attn in FAMILY.attentions(model).items() if FAMILY.converts(name)]
    before = layers[0].processor
    for attn in layers:
        attn.processor = Masked((3, 3))
    expected = run(model, inputs)
    for attn in layers:
        attn.processor = before
    hybriddit.hybridize(model, hybriddit.HybridConfig(window=3))
    torch.testing.assert_close(run(model, inputs), expected)
    assert (expected - dense).abs().max() > 1e-3
    perturb_hybrid(model)
    changed = run(model, inputs)
    assert (changed - expected).abs().max() > 1e-3  # the far branches count
    model.save_pretrained(tmp_path)
    again = hybriddit.HybridUNet2DConditionModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(run(again, inputs), changed)
    with hybriddit.dense_mode(again):
        torch.testing.assert_close(run(again, inputs), dense)


@pytest.mark.parametrize("grid", [(9, 6), (8, 5), (1, 7)])
def test_every_layer_has_the_grid_of_its_level(grid):
    """Layers by name, of three levels: as many tokens as they get; and FLOPs of all levels."""
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2), "block_out_channels": (8, 8, 16)}
    levels["up_block_types"] = (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D")
    model = UNet2DConditionModel(**levels, layers_per_block=1, norm_num_groups=2, cross_attention_dim=12,
                                 attention_head_dim=2)  # fmt: skip
    inputs, counts = make_inputs(model, grid), {}
    layers = {name: attn for name, attn in FAMILY.attentions(model).items() if FAMILY.converts(name)}
    for name, attn in layers.items():
        attn.register_forward_pre_hook(lambda _, args, name=name: counts.update({name: args[0].shape[1]}))
    hybriddit.hybridize(model, hybriddit.HybridConfig(window=None))
    run(model, inputs)
    layout = FAMILY.token_layout(model, inputs)
    assert layout.grids == (grid,)
    assert counts == {name: FAMILY.layer_layout(model, name, layout).image_length for name in layers}
    assert len(set(counts.values())) == 2 and len(counts) == 7
    widths = {name: attn.to_q.in_features for name, attn in layers.items()}
    assert attention_flops(model, layout)["dense"] == sum(4 * counts[name] ** 2 * widths[name] for name in layers)


def test_it_learns_alike_with_gradient_checkpointing_and_compiles():
    model = make("sd15")
    perturb_hybrid(hybriddit.hybridize(model, hybriddit.HybridConfig(window=3, delta_rank="full")))
    inputs, grads = make_inputs(model, GRID), []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model.train()(**inputs).sample.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if ".hybrid." in name})
    assert all(torch.equal(grads[0][name], grad) for name, grad in grads[1].items())
    assert all(grad.abs().max() > 0 for grad in grads[0].values())
    block = model.mid_block.attentions[0].transformer_blocks[0]
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for grid in (GRID, (6, 7)):
        lower = [-(-side // 2) for side in grid]
        kwargs = {"token_layout": TokenLayout(0, (grid,), False)}
        states = torch.randn(1, lower[0] * lower[1], 32).double(), None, torch.randn(1, 5, 12).double()
        torch.testing.assert_close(*(b(*states, cross_attention_kwargs=kwargs) for b in (compiled, block)))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_it_is_called_as_its_pipeline_does(family):
    pipeline = tiny_pipeline(family)
    text = FAMILY.encode_prompts(pipeline, ["a red shoe", ""])
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    pipeline("a red shoe", height=72, width=56, num_inference_steps=2, guidance_scale=5.0, output_type="latent")
    (sample, step), kwargs = calls[0]
    turned = {name: value.flip(0) for name, value in text.items()}  # pipelines put the negative prompt first
    own = FAMILY.model_inputs(sample, torch.full((2,), int(step)), turned, (9, 7), None)
    assert torch.equal(own["encoder_hidden_states"], kwargs["encoder_hidden_states"])
    for name, value in (kwargs["added_cond_kwargs"] or {}).items():
        torch.testing.assert_close(own["added_cond_kwargs"][name], value.to(own["added_cond_kwargs"][name]))
    latents, times = FAMILY.latents_and_times({"sample": sample, "timestep": step})
    assert latents is sample and times.shape == (2,)
    example = FAMILY.example_text(pipeline.unet.config, 2, 16, torch.zeros)
    assert {name: value.shape for name, value in example.items()} == {name: value.shape for name, value in text.items()}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_is_what_the_scheduler_says(kind):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    latents, noise, times = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([10, 700])
    noisy, target = FAMILY.add_noise(latents, noise, times, scheduler)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, times))
    torch.testing.assert_close(target, noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, times))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_sampling_starts_from_noisy_latents_with_any_scheduler_of_ddpm(family):
    pipeline = tiny_pipeline(family)
    own = pipeline.scheduler
    scheduler, arguments = FAMILY.sampling_from(own, [0.5, 0.25])
    assert isinstance(scheduler, DPMSolverMultistepScheduler) and pipeline.scheduler is own
    assert scheduler.config.prediction_type == own.config.prediction_type
    keep = own.alphas_cumprod[torch.tensor(arguments["timesteps"])]
    torch.testing.assert_close((1 - keep).sqrt() / keep.sqrt(), torch.tensor([1.0, 1 / 3]), rtol=0.02, atol=0)


def test_pipelines_keep_the_hybrid_and_their_options(tmp_path):
    pipeline = tiny_pipeline("sdxl")
    perturb_hybrid(hybriddit.hybridize(pipeline.unet, hybriddit.HybridConfig(window=3)))
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"][1] == "HybridUNet2DConditionModel"
    again = type(pipeline).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 56, "num_inference_steps": 2, "output_type": "np"}
    images = [p("a red shoe", generator=torch.manual_seed(0), **call).images for p in (pipeline, again)]
    assert (images[0] == images[1]).all()
    made = for_task(again, True, True)
    assert type(made) is StableDiffusionXLInpaintPipeline and made.unet is again.unet
    assert made.config.force_zeros_for_empty_prompt is False


def test_two_steps_of_distillation_change_the_added_weights_alone():
    pipeline = tiny_pipeline("sdxl")
    text = FAMILY.example_text(pipeline.unet.config, 4, TEXT_LENGTH, torch.randn)
    empty = {name: tensor[:1] for name, tensor in text.items()}
    info = LatentInfo(height=72, width=56, steps=2, guidance_scale=3.5)
    data = LatentData([{"latents": torch.randn(4, 4, 9, 7), **text}], empty, info)
    config = hybriddit.HybridConfig(window=3, mixer="linfusion", delta_rank=2)
    train = TrainConfig(steps=2, batch_size=2, gradient_checkpointing=True, progress=False)
    before = {name: weights.clone() for name, weights in pipeline.unet.state_dict().items()}
    model = distill(pipeline, data, DistillConfig(hybrid=config, train=train))
    now = model.state_dict()
    assert all(torch.equal(now[name], weights) for name, weights in before.items())
    assert any(weights.abs().max() > 0 for name, weights in now.items() if name.endswith("up.weight"))


def test_what_is_not_served_is_refused_in_one_line():
    model = make("sd15")
    with pytest.raises(ValueError, match="only_cross_attention True is not supported"):
        hybriddit.hybridize(make("sd15", only_cross_attention=True), hybriddit.HybridConfig())
    hybriddit.hybridize(model, hybriddit.HybridConfig(window=3))
    with pytest.raises(ValueError, match="cannot run in strips"), hybriddit.in_strips(model, 4):
        pass
    with pytest.raises(ValueError, match="token_layout"):
        model.mid_block.attentions[0].transformer_blocks[0].attn1(torch.randn(1, 15, 32).double())
    with pytest.raises(ValueError, match="not distilled: distill the text-to-image UNet"):
        FAMILY.recipe({"in_channels": 9, "out_channels": 4})
    with pytest.raises(ValueError, match="leave max_sequence_length out"):
        FAMILY.encode_prompts(None, ["a"], max_sequence_length=8)
    with pytest.raises(ValueError, match="4 pixels a latent"):
        FAMILY.latent_pixels({"block_out_channels": (4, 4, 4)})
    with pytest.raises(ValueError, match="no text_encoder_2"):
        FAMILY.check_encoders({"text_encoder": "a", "text_encoder_2": None})


@pytest.mark.parametrize(
    "repository, count",
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859_520_964),
        ("stabilityai/stable-diffusion-2-1", 865_910_724),
        ("stabilityai/stable-diffusion-xl-base-1.0", 2_567_463_684),
    ],
)
def test_published_models_have_the_parameters_of_the_real_ones(repository, count):
    family, found = find_published(repository)
    with torch.device("meta"):
        assert sum(p.numel() for p in family.dense_class(**found.arguments).parameters()) == count
