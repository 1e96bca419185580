"""`loss.distribution`: against the closed form of a linear Gaussian student and teacher, and in runs."""

import copy

import pytest
import torch
from diffusers import DDPMScheduler
from family_calls import call
from test_distill import GRIDS, logged, tiny_config
from tiny_pipelines import recipe_of, tiny_data, tiny_pipeline

from hybriddit import HybridConfig, hybridize
from hybriddit.models import FLUX, STABLE_DIFFUSION_UNET
from hybriddit.training.distill import distill, draw_batches, loss_in_force
from hybriddit.training.losses import distribution_loss


def kinds():
    """kind of prediction -> (family, scheduler, times s and t, factors of image and noise at both, and of the step).

    The step is x_t = A x_s + C prediction, as its two factors.
    """
    s, t = 0.8, 0.3
    found = {"velocity": (FLUX, None, s, t, (1 - s, s), (1 - t, t), (1.0, t - s))}
    for name in ("epsilon", "sample", "v_prediction"):
        scheduler, s, t = DDPMScheduler(prediction_type=name), 700, 260
        keep = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        (a, b), (c, d) = ((keep[i].sqrt().item(), (1 - keep[i]).sqrt().item()) for i in (s, t))
        step = {"epsilon": (c / a, d - c * b / a), "sample": (d / b, c - d * a / b)}
        step["v_prediction"] = (c * a + d * b, d * a - c * b)
        found[name] = (STABLE_DIFFUSION_UNET, scheduler, s, t, (a, b), (c, d), step[name])
    return found


@pytest.mark.parametrize("kind", ("velocity", "epsilon", "sample", "v_prediction"))
def test_the_gradient_is_that_of_the_divergence_of_gaussians(kind):
    """Images are normal with variance 0.5 to the teacher. The student predicts `weight` times its input at time s."""
    family, scheduler, s, t, (image_s, noise_s), (image_t, noise_t), (a, c) = kinds()[kind]
    at_s, of_teacher = image_s**2 * 0.5 + noise_s**2, image_t**2 * 0.5 + noise_t**2
    noisy = torch.randn(4, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy *= (at_s / noisy.square().mean()).sqrt()
    weight = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    of_student = (a + c * weight) ** 2 * at_s  # the variance of x_t
    divergence = (of_student / of_teacher - 1 - (of_student / of_teacher).log()) / 2
    (slope,) = torch.autograd.grad(divergence, weight)

    def predicts(variance):
        """The prediction of which the noise is that of a normal x_t with this variance: its score is -x_t / variance."""

        def predict(x):
            noise = noise_t * x / variance
            image = (x - noise_t * noise) / image_t
            return {
                "velocity": noise - image,
                "epsilon": noise,
                "sample": image,
                "v_prediction": image_t * noise - noise_t * image,
            }[kind]

        return predict

    def loss(student, teacher):
        times = (torch.full((4,), time) for time in (s, t))
        return distribution_loss(family, scheduler, noisy, weight * noisy, *times, student, teacher)

    found = loss(predicts(of_student.detach()), predicts(of_teacher))
    (gradient,) = torch.autograd.grad(found, weight)
    assert abs(slope) > 1e-3
    torch.testing.assert_close(gradient, slope * noise_t / abs(c), rtol=1e-5, atol=0)
    difference = noise_t * (1 / of_student - 1 / of_teacher)
    torch.testing.assert_close(found.detach(), (difference**2 * of_student).detach(), rtol=1e-5, atol=0)
    same = loss(predicts(of_teacher), predicts(of_teacher))
    assert same == 0 and torch.autograd.grad(same, weight)[0] == 0


@pytest.mark.parametrize("family", ("flux_dev", "pixart_sigma"))
def test_a_run_compares_the_student_with_its_teacher_where_one_step_arrives(family, tmp_path):
    pipeline = tiny_pipeline(family)
    data, dense, fresh = tiny_data(pipeline), copy.deepcopy(pipeline.transformer), copy.deepcopy(pipeline.transformer)
    hybridize(fresh, HybridConfig(window=3, map_rank=4))
    config = tiny_config(tmp_path, train__steps=2, train__accumulation=2, loss__distribution=3.0)
    distill(pipeline, data, config)

    values = []
    recipe = recipe_of(pipeline)
    for part in draw_batches(data, recipe, config, 0, recipe.prompt_dropout, GRIDS, pipeline.scheduler):
        latents, noise, times, text, _, earlier, _ = part
        assert earlier.dtype == times.dtype and (earlier >= 0).all() and (earlier <= times).all()
        keep = getattr(pipeline.scheduler, "alphas_cumprod", None)
        factors = [
            (1 - time, time) if keep is None else (keep[time].sqrt(), (1 - keep[time]).sqrt())
            for time in (times, earlier)
        ]
        (a, b), (c, d) = [[x.view(-1, *[1] * (latents.ndim - 1)) for x in pair] for pair in factors]

        def says(model, x, time, image, strength):
            """The noise and the image in x."""
            with torch.no_grad():
                out = call(family, model, x, time, text, 3.5)  # noqa: B023
            noise = out if family == "pixart_sigma" else x + image * out
            return noise, (x - strength * noise) / image

        noisy = a * latents + b * noise
        if family == "flux_dev":  # where a may be 0: Euler's step
            state = noisy + (d - b) * call(family, fresh, noisy, times, text, 3.5).detach()
        else:
            noise, image = says(fresh, noisy, times, a, b)
            state = c * image + d * noise
        difference = says(fresh, state, earlier, c, d)[0] - says(dense, state, earlier, c, d)[0]
        values.append(difference.square().mean().item())
    scalars = logged(tmp_path)
    assert scalars["distribution"][0] == pytest.approx(sum(values) / 2, rel=1e-3)
    parts = [scalars[name][0] for name in ("task", "output", "layer", "distribution")]
    total = sum(weight * part for weight, part in zip((1, 0.5, 0.5, 3), parts, strict=True))
    assert scalars["loss"][0] == pytest.approx(total, rel=1e-4)


def test_few_step_teachers_are_refused():
    for family in ("flux_schnell", "flux2_klein", "z_image_turbo"):
        recipe = recipe_of(tiny_pipeline(family))
        with pytest.raises(ValueError, match="loss.distribution: a few-step teacher's output"):
            loss_in_force(recipe, tiny_config(loss__distribution=1.0))
        loss_in_force(recipe, tiny_config())
