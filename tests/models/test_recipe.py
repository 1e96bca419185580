"""How each family's teacher is distilled: times, noise, targets and the weights of the losses."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import recipe_of, tiny_pipeline

from hybriddit.models import (
    BRIA_FIBO,
    CHROMA,
    FLUX,
    FLUX_2,
    FLUX_2_KLEIN,
    KREA_2,
    LONGCAT_IMAGE,
    OVIS_IMAGE,
    PIXART_SIGMA,
    QWEN_IMAGE,
    STABLE_DIFFUSION_3,
    Z_IMAGE,
)
from hybriddit.models.recipe import scheduler_shift

COUNT = 20_000
RECIPES = {**PIXART_SIGMA.recipes, **STABLE_DIFFUSION_3.recipes, **FLUX.recipes, **CHROMA.recipes, **QWEN_IMAGE.recipes}
RECIPES |= {
    **FLUX_2.recipes,
    **FLUX_2_KLEIN.recipes,
    **Z_IMAGE.recipes,
    **OVIS_IMAGE.recipes,
    **KREA_2.recipes,
    **LONGCAT_IMAGE.recipes,
    **BRIA_FIBO.recipes,
}


def draw(name, tokens=1024, scheduler=None, count=COUNT):
    return RECIPES[name].draw_times(count, tokens, scheduler, torch.Generator().manual_seed(0))


def test_pixart_times_are_uniform_ddpm_steps():
    times = draw("pixart_sigma", scheduler=DDPMScheduler())
    counts = times.bincount(minlength=1000)
    assert times.dtype == torch.int64 and len(counts) == 1000
    assert counts.view(10, 100).sum(1).float().div(COUNT).sub(0.1).abs().max() < 0.01
    assert {0, 999} <= set(times.tolist())


@pytest.mark.parametrize("tokens, shift", [(256, math.exp(0.5)), (4096, math.exp(1.15)), (1024, math.exp(0.63))])
def test_flux_times_are_logit_normal_shifted_by_size(tokens, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    normal = draw("flux_dev", tokens, scheduler).logit() - math.log(shift)
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert abs((normal < 1).float().mean() - 0.8413) < 0.01


def test_a_tenth_of_fibo_s_times_are_uniform():
    """As its fine-tuning draws them: the others' share below a time is that of a normal distribution."""
    times = draw("fibo", 1024, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    for time in (0.02, 0.1, 0.5, 0.9):
        below = (1 + math.erf((math.log(time / (1 - time)) - 0.63) / math.sqrt(2))) / 2
        assert (times < time).float().mean() == pytest.approx(0.9 * below + 0.1 * time, abs=0.005)


@pytest.mark.parametrize("recipe", ["sd3", "chroma"])
@pytest.mark.parametrize("tokens, shift", [(4096, 3.0), (1024, 1.5), (16384, 6.0), (64, 1.0)])
def test_sd3_times_are_logit_normal_shifted_by_size(tokens, shift, recipe):
    normal = draw(recipe, tokens, FlowMatchEulerDiscreteScheduler(shift=3.0)).logit() - math.log(shift)
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03


def test_the_shift_is_read_under_every_name():
    """FLUX's linear kind of dynamic shift, and the name that DPM-Solver and UniPC have for SD3's."""
    linear = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    assert scheduler_shift(4096, linear.config) == pytest.approx(1.15)
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert scheduler_shift(4096, solver.config) == pytest.approx(3.0)


def test_schnell_times_are_those_of_its_schedules():
    times = draw("flux_schnell")
    own, chance = [], {}
    for steps in range(1, 5):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
        own += scheduler.sigmas[:-1].tolist()
        for sigma in scheduler.sigmas[:-1].tolist():
            chance[round(sigma, 5)] = chance.get(round(sigma, 5), 0) + 1 / 4 / steps
    values, counts = times.unique(return_counts=True)
    assert all(min(abs(value - sigma) for sigma in own) < 1e-6 for value in values.tolist())
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        assert abs(count / COUNT - chance[round(value, 5)]) < 0.015
    assert len(values) == len(chance)


def test_ddpm_noise_is_the_schedulers_own():
    scheduler = DDPMScheduler()
    latents, noise, times = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    noisy, target = PIXART_SIGMA.add_noise(latents, noise, times, scheduler)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, times))
    assert target is noise


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_target_is_what_the_scheduler_says_that_the_teacher_predicts(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    latents, noise, times = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    _, target = PIXART_SIGMA.add_noise(latents, noise, times, scheduler)
    velocity = scheduler.get_velocity(latents, noise, times)
    torch.testing.assert_close(target, {"epsilon": noise, "sample": latents, "v_prediction": velocity}[kind])


def test_schedulers_that_the_teacher_was_not_trained_with_are_refused():
    latents = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="prediction_type is 'other': epsilon, sample, v_prediction can be distilled"):
        scheduler = DDPMScheduler()
        scheduler.register_to_config(prediction_type="other")
        PIXART_SIGMA.add_noise(latents, latents, torch.tensor([1]), scheduler)
    for scheduler in (FlowMatchEulerDiscreteScheduler(), DPMSolverMultistepScheduler(use_flow_sigmas=True)):
        with pytest.raises(ValueError, match=f"a {type(scheduler).__name__} has no noise schedule of DDPM"):
            draw("pixart_sigma", scheduler=scheduler)


def test_flow_target_leads_from_image_to_noise():
    latents, noise, sigma = torch.randn(3, 6, 4), torch.randn(3, 6, 4), torch.tensor([0.1, 0.5, 1.0])
    noisy, velocity = FLUX.add_noise(latents, noise, sigma, None)
    torch.testing.assert_close(noisy - sigma.view(3, 1, 1) * velocity, latents)
    torch.testing.assert_close(noisy + (1 - sigma).view(3, 1, 1) * velocity, noise)


@pytest.mark.parametrize("kind", ["flux2_dev", "flux2_klein"])
def test_flux2_learns_at_the_times_of_its_pipelines_schedules(kind):
    """The steps of klein, and the middle of dev's times: what its pipeline calls the transformer with."""
    pipeline = tiny_pipeline(kind)
    called = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: called.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    steps = 4 if kind == "flux2_klein" else 50
    pipeline(
        prompt="a bag", height=64, width=64, num_inference_steps=steps, max_sequence_length=6, output_type="latent"
    )
    generator = torch.Generator().manual_seed(0)
    times = recipe_of(pipeline).draw_times(4000, 64, pipeline.scheduler, generator)
    if kind == "flux2_klein":
        assert {round(time, 4) for time in called} <= {round(time, 4) for time in times.tolist()}
    else:
        assert times.median() == pytest.approx(called[25], abs=0.01)


@pytest.mark.parametrize("recipe", ["z_image", "z_image_turbo", "krea2", "krea2_turbo"])
def test_students_learn_at_the_times_of_their_pipelines_schedule(recipe):
    """The steps of Turbo, and the middle of the other's times: what the pipeline calls the transformer with."""
    pipeline, called = tiny_pipeline(recipe), []

    def note(module, args, kwargs):  # Z-Image counts from noise
        called.append(float(kwargs["timestep"][0]) if "timestep" in kwargs else 1 - float(args[1][0]))

    pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    steps = 8 if recipe.endswith("turbo") else 50
    sizes = {"height": 64, "width": 64, "num_inference_steps": steps, "max_sequence_length": 6}
    pipeline(prompt="a bag", guidance_scale=0.0, output_type="latent", **sizes)
    times = recipe_of(pipeline, recipe).draw_times(4000, 64, pipeline.scheduler, torch.Generator().manual_seed(0))
    if recipe.endswith("turbo"):
        assert {round(time, 4) for time in called} <= {round(time, 4) for time in times.tolist()}
    else:
        assert times.median() == pytest.approx(called[25], abs=0.01)


def test_the_table_is_the_designs():
    weights = {name: (r.task, r.output, r.layer, r.prompt_dropout) for name, r in RECIPES.items()}
    assert weights == {
        "pixart_sigma": (1.0, 0.5, 0.5, 0.1),
        "sd3": (1.0, 0.5, 0.5, 0.1),
        "flux_dev": (1.0, 0.5, 0.5, 0.0),
        "flux_schnell": (0.0, 1.0, 0.5, 0.0),
        "chroma": (1.0, 0.5, 0.5, 0.1),
        "qwen_image": (1.0, 0.5, 0.5, 0.1),
        "flux2_dev": (1.0, 0.5, 0.5, 0.0),
        "flux2_klein": (0.0, 1.0, 0.5, 0.0),
        "flux2_klein_base": (1.0, 0.5, 0.5, 0.1),
        "z_image": (1.0, 0.5, 0.5, 0.1),
        "z_image_turbo": (0.0, 1.0, 0.5, 0.0),
        "ovis_image": (1.0, 0.5, 0.5, 0.1),
        "krea2": (1.0, 0.5, 0.5, 0.1),
        "krea2_turbo": (0.0, 1.0, 0.5, 0.0),
        "longcat_image": (1.0, 0.5, 0.5, 0.1),
        "fibo": (1.0, 0.5, 0.5, 0.1),
        "fibo_lite": (0.0, 1.0, 0.5, 0.0),
    }


def test_recipe_is_told_from_the_transformer_or_the_pipeline():
    for family, name in {
        "pixart_sigma": "pixart_sigma",
        "sd35": "sd3",
        "flux_schnell": "flux_schnell",
        "chroma": "chroma",
        "qwen_image": "qwen_image",
        "flux2_dev": "flux2_dev",
        "flux2_klein": "flux2_klein",
        "flux2_klein_base": "flux2_klein_base",
        "z_image_turbo": "z_image_turbo",
        "ovis_image": "ovis_image",
        "krea2": "krea2",
        "krea2_turbo": "krea2_turbo",
        "longcat_image": "longcat_image",
        "fibo": "fibo",
    }.items():
        assert recipe_of(tiny_pipeline(family)) is RECIPES[name]
    flux = tiny_pipeline("flux_dev")
    assert recipe_of(flux) is RECIPES["flux_dev"]
    assert recipe_of(flux, "flux_schnell") is RECIPES["flux_schnell"]
    with pytest.raises(ValueError, match="for a StableDiffusion3Pipeline"):
        recipe_of(flux, "sd3")
    with pytest.raises(ValueError, match="unknown recipe 'flux'"):
        recipe_of(flux, "flux")
