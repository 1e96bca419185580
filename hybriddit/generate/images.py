"""Generate images with a pipeline, dense or hybrid, each with a record of how it was made.

Importing this imports neither torch nor diffusers, so that wrong settings are refused before a model is loaded.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.text import check_text
from ..images import flatten
from ..machine import fits_memory, running_versions

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline
    from PIL import Image

    from ..models.family import Family
    from ..pipelines.memory import MemoryPlan
    from ..pipelines.tiles import Share

MAX_SEED = 2**63 - 1
TOO_LARGE = (
    "the image does not fit the device's memory: choose a smaller size, or, for a hybrid of a text-to-image model in one "
    "process, let `hybriddit generate` make it in strips (--max-memory)"
)

# generate's argument -> the pipeline's argument
ARGUMENTS = {
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "true_cfg": "true_cfg_scale",
    "max_sequence_length": "max_sequence_length",
    "strength": "strength",
    "sampler": "sampler",
}


class NoEffectWarning(UserWarning):
    """A setting was given that has no effect with this pipeline or with the other settings."""


@dataclass(frozen=True)
class Task:
    """One image to be made: the pipeline's arguments, the seed, and its record but for the image's size."""

    arguments: dict[str, Any]
    seed: int
    record: dict[str, Any]


def generate(
    pipeline: DiffusionPipeline,
    prompt: str | Sequence[str] | None = None,
    *,
    class_labels: int | str | Sequence[int | str] | None = None,
    seed: int = 0,
    seed_per_prompt: bool = False,
    num_images: int = 1,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    **settings: Any,
) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Generate images one by one, image i from a CPU generator seeded with `seed + i`.

    Args:
        pipeline: a text-to-image pipeline of diffusers or hybriddit; with class_labels a SiTPipeline. With `image` its
            components run in diffusers' image-to-image pipeline of the family, with `mask` too in the inpainting one. A
            pipeline that takes an image, or an image and a mask, by itself runs as it is, and needs them.
        prompt, class_labels: one of the two, one or several. Labels are indices or names.
        seed: seed of the first image; all seeds must be from 0 to 2**63 - 1.
        seed_per_prompt: with several images of a prompt, count seeds by prompts: image j of prompt i of n has
            `seed + i + j * n`, so that the first image of a prompt does not depend on `num_images`.
        num_images: number of images of each prompt, or of each class label, one prompt or label after the other.
        image: the image to start from, white where it is transparent. Height and width default to its size, rounded
            down to what the model takes.
        mask: an image of the same size; white is painted anew, black and transparent are kept.
        settings: a setting that is None or left out has the pipeline's default.
            negative_prompt, height and width (pixels), steps (1 or more), guidance (0 or more),
            true_cfg (FLUX, Qwen-Image: classifier-free guidance against the negative prompt, above 1, at twice the
            time),
            max_sequence_length (text tokens), strength (with `image`: from above 0, little change, to 1, pure noise),
            sampler (with class_labels: see SiTPipeline).

    Yields (image, record): the record holds all of the above as actually used (None: not used) and the versions.
    Warns (NoEffectWarning) of settings that change nothing. Raises ValueError, already at the call, for settings that
    cannot work, unknown class labels, sizes the model cannot take, and a pipeline that cannot do the task.
    """
    pipeline, tasks = plan(
        pipeline,
        prompt,
        class_labels=class_labels,
        seed=seed,
        seed_per_prompt=seed_per_prompt,
        num_images=num_images,
        image=image,
        mask=mask,
        **settings,
    )
    return (make(pipeline, task) for task in tasks)


def plan(
    pipeline: DiffusionPipeline,
    prompt: str | Sequence[str] | None = None,
    *,
    class_labels: int | str | Sequence[int | str] | None = None,
    seed: int = 0,
    seed_per_prompt: bool = False,
    num_images: int = 1,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    **settings: Any,
) -> tuple[DiffusionPipeline, list[Task]]:
    """The pipeline that does the task, and what `generate` of these arguments makes, which raises what this raises."""
    from ..models.family import denoiser

    check_settings(
        prompt, class_labels=class_labels, seed=seed, num_images=num_images, image=image, mask=mask, **settings
    )
    image, mask = image and flatten(image), mask and flatten(mask, "L", "black")
    if class_labels is None:
        check_inputs(type(pipeline), image is not None, mask is not None)
        _check_model(pipeline)
    pipeline = for_task(pipeline, image is not None, mask is not None)
    settings = {name: settings.get(name) for name in ARGUMENTS}
    settings = _fit_size(pipeline, settings, image)
    arguments, used = _arguments(pipeline, settings, "prompt" if class_labels is None else "class_labels")
    if image is not None:
        arguments["image"] = image
    if mask is not None:
        arguments["mask_image"] = mask
    if class_labels is None:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        subjects = [({"prompt": prompt}, {"prompt": prompt}) for prompt in prompts]
    else:
        names = pipeline.class_names
        subjects = [
            ({"class_labels": label}, {"class_label": label, "class_name": names.get(label)})
            for label in pipeline.get_label_ids(class_labels)
        ]
    model = denoiser(pipeline)
    made_by = {
        "pipeline": type(pipeline).__name__,
        "weights": pipeline.config.get("weights"),
        "hybrid_config": None if model is None else model.config.get("hybrid_config"),
        "device": getattr(pipeline, "_execution_device", pipeline.device).type,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "versions": running_versions(),
    }
    tasks = []
    for i, (subject, said) in enumerate(subjects):
        for j in range(num_images):
            own = seed + (i + j * len(subjects) if seed_per_prompt else i * num_images + j)
            tasks.append(Task({**subject, **arguments}, own, {**said, **used, "seed": own, **made_by}))
    return pipeline, tasks


def make(pipeline: DiffusionPipeline, task: Task) -> tuple[Image.Image, dict[str, Any]]:
    """Make one image. Returns it with its record.

    Raises ValueError where its pixels are not finite, and where it does not fit the device's memory.
    """
    with _made(task):
        image = pipeline(**_with_generator(task)).images[0]
    return image, {**task.record, "width": image.width, "height": image.height}


def make_strips(
    pipeline: DiffusionPipeline, task: Task, memory: MemoryPlan, share: Share | None = None
) -> tuple[Iterator[np.ndarray], dict[str, Any]]:
    """Make one image within the memory of a plan. Returns it in strips with its record, see `memory.strips_within`.

    The record says whether the VAE works in tiles, which changes the image a little.
    """
    from ..pipelines.memory import strips_within

    with _made(task):
        strips = strips_within(pipeline, memory, share=share, **_with_generator(task))
    return _fitting(strips), {**task.record, "width": memory.width, "height": memory.height, "tiles": memory.tiles}


def _fitting(strips: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    with fits_memory(TOO_LARGE):
        yield from strips


def _with_generator(task: Task) -> dict[str, Any]:
    import torch

    return {**task.arguments, "generator": torch.Generator("cpu").manual_seed(task.seed)}


@contextlib.contextmanager
def _made(task: Task) -> Iterator[None]:
    """Raises ValueError where diffusers would give a black image, and where the device's memory is full."""
    from ..pipelines.memory import OVERFLOWED

    with warnings.catch_warnings(), fits_memory(TOO_LARGE):
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        try:
            yield
        except RuntimeWarning:
            raise ValueError(f"the image of seed {task.seed} is not finite: {OVERFLOWED}") from None


def check_settings(
    prompt: str | Sequence[str] | None = None,
    *,
    class_labels: int | str | Sequence[int | str] | None = None,
    seed: int = 0,
    num_images: int = 1,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    true_cfg: float | None = None,
    max_sequence_length: int | None = None,
    strength: float | None = None,
    sampler: str | None = None,
) -> None:
    """Check `generate`'s arguments as far as possible without a model. Raises ValueError for what cannot work."""
    if (prompt is None) == (class_labels is None):
        raise ValueError("give one of a prompt and class labels")
    of_prompts = {"negative_prompt": negative_prompt, "true_cfg": true_cfg, "max_sequence_length": max_sequence_length}
    of_prompts |= {"image": image, "mask": mask, "strength": strength}
    for name, value in ({"sampler": sampler} if class_labels is None else of_prompts).items():
        if value is not None:
            raise ValueError(f"{name} has no meaning with a {'prompt' if class_labels is None else 'class label'}")
    for text in (*([prompt] if isinstance(prompt, str) else prompt or ()), negative_prompt or ""):
        check_text(text, repr(text)[:80], "the prompt")
    if sampler is not None:
        from ..flow.path import check_name
        from ..pipelines.sit import SAMPLERS

        check_name("sampler", sampler, SAMPLERS)
    counts = {"num_images": num_images, "height": height, "width": width, "steps": steps}
    for name, value in {**counts, "max_sequence_length": max_sequence_length}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")
    for name, value in {"guidance": guidance, "true_cfg": true_cfg}.items():
        if value is not None and not (0 <= value < math.inf):
            raise ValueError(f"{name} must be 0 or more, not {value}")
    total = image_count(prompt if class_labels is None else class_labels, num_images)
    if not total:
        raise ValueError("there is no prompt" if class_labels is None else "class_labels holds no label")
    if not 0 <= seed <= seed + total - 1 <= MAX_SEED:
        raise ValueError(f"seeds go from 0 to 2**63 - 1: {total} from {seed} do not fit")
    if image is None and (mask is not None or strength is not None):
        raise ValueError(f"a {'strength' if mask is None else 'mask'} needs an image to start from")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0, where the image stays as it is, and at most 1, not {strength}")
    if mask is not None and mask.size != image.size:
        sizes = " and ".join("{} x {}".format(*picture.size) for picture in (mask, image))
        raise ValueError(f"the mask and the image must be of one size: they are {sizes}")


def image_count(subjects: int | str | Sequence[int | str], num_images: int) -> int:
    """The number of images that `generate` makes of prompts or class labels."""
    return num_images * (1 if isinstance(subjects, int | str) else len(subjects))


def check_inputs(kind: type, image: bool, mask: bool) -> None:
    """Raise ValueError for a class of pipelines that does not make images of a prompt with what is given.

    image, mask: whether there is an image to start from, and a mask.
    """
    from ..models.family import families

    name, parameters = kind.__name__, inspect.signature(kind.__call__).parameters
    if "prompt" not in parameters or "num_inference_steps" not in parameters:
        raise ValueError(f"a {name} takes no prompt to make images of: those are for text-to-image pipelines")
    if any(kind in family.pipeline_classes() for family in families()):
        return  # `for_task` finds the family's pipeline for what is given
    if "control_image" in parameters:
        raise ValueError(f"a {name} needs a control image, for which there is no option: call it in Python")
    if "mask_image" in parameters and not (image and mask):
        raise ValueError(f"a {name} paints over a part of an image: give it an image and a mask")
    if "image" in parameters and not image:
        raise ValueError(f"a {name} needs an image: give it one")
    if "image" in parameters and "mask_image" not in parameters and mask:
        raise ValueError(f"a {name} takes no mask")


def for_task(pipeline: DiffusionPipeline, image: bool, mask: bool) -> DiffusionPipeline:
    """The family's pipeline of these components that starts from what is given; other pipelines as they are.

    image, mask: whether there is an image to start from, and a mask. Raises ValueError where diffusers has none.
    """
    task = "inpainting" if mask else "image-to-image" if image else "text-to-image"
    family = family_of_pipeline(pipeline)
    if family is not None and isinstance(pipeline, family.pipeline_classes()):
        kinds = family.pipelines_like(type(pipeline))
        if task not in kinds:
            raise ValueError(f"diffusers has no {task} for a {family.pipeline_name}")
        kind = kinds[task]
        if isinstance(pipeline, kind):
            return pipeline
        taken = inspect.signature(kind.__init__).parameters
        options = {name: pipeline.config[name] for name in taken if name in pipeline.config}
        made = kind(**{**options, **{name: part for name, part in pipeline.components.items() if name in taken}})
    elif not image or "image" in inspect.signature(type(pipeline).__call__).parameters:
        return pipeline
    else:  # diffusers finds its own pipelines by class name
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

        try:
            made = (AutoPipelineForInpainting if mask else AutoPipelineForImage2Image).from_pipe(pipeline)
        except ValueError as error:
            raise ValueError(f"diffusers has no {task} for a {type(pipeline).__name__}") from error
    made.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return made


def family_of_pipeline(pipeline: DiffusionPipeline) -> Family | None:
    """The family of a pipeline's transformer or UNet; None for a pipeline without one, and for a model of none."""
    from ..models.family import denoiser, family_of_class

    model = denoiser(pipeline)
    return family_of_class(type(model).__name__, lambda: model.config)


def _check_model(pipeline: DiffusionPipeline) -> None:
    """Raise ValueError for a pipeline that cannot read prompts, or that its hybrid transformer does not work in."""
    from ..models.family import denoiser
    from ..pipelines.loading import check_parts, check_takes_hybrid

    model = denoiser(pipeline)
    family = family_of_pipeline(pipeline)
    check_parts(type(pipeline), pipeline.components)
    if family is not None:
        family.check_encoders(pipeline.components)
        if model.config.get("hybrid_config") is not None:
            check_takes_hybrid(type(pipeline))


def _fit_size(pipeline: DiffusionPipeline, settings: dict[str, Any], image: Image.Image | None) -> dict[str, Any]:
    """Fill in the image's size where none is given. Raises ValueError for sizes that the model does not take.

    (diffusers would round some of them, with a log line only, and fail on others.)
    """
    from ..models.family import denoiser

    unit, taken = token_pixels(pipeline), inspect.signature(type(pipeline).__call__).parameters
    fitted = {}
    for index, side in enumerate(("width", "height")):
        fitted[side] = settings[side]
        if fitted[side] is None and image is not None and side in taken:  # others take the image's own
            fitted[side] = image.size[index] // unit * unit
            if not fitted[side]:
                raise ValueError(f"the image is {image.width} x {image.height}: this model needs {unit} pixels or more")
        elif fitted[side] is not None and fitted[side] % unit:
            raise ValueError(f"{side} {fitted[side]} is no multiple of {unit}, which this model needs")
    model = denoiser(pipeline)
    family = family_of_pipeline(pipeline)
    if family is not None and None not in fitted.values():
        family.check_grid(model.config, (fitted["height"] // unit, fitted["width"] // unit))
    return settings | fitted


def token_pixels(pipeline: DiffusionPipeline) -> int:
    """The number that image sides are multiples of: pixels per token, or per latent if there are no tokens."""
    from ..models.family import denoiser

    model, scale = denoiser(pipeline), getattr(pipeline, "vae_scale_factor", 1)
    family = family_of_pipeline(pipeline)
    if family is not None:
        return family.token_pixels(model.config, scale)
    return scale * (getattr(model, "config", {}).get("patch_size") or 1)


def _arguments(
    pipeline: DiffusionPipeline, settings: dict[str, Any], subject: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the pipeline's call, and the settings as used: defaults filled in, None if without effect.

    subject: what the images are made from, "prompt" or "class_labels".
    """
    from ..models.family import denoiser

    kind, parameters = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    if subject == "prompt" and "prompt" not in parameters:
        raise ValueError(f"a {kind} takes no prompt: those are for text-to-image pipelines")
    if subject == "class_labels" and not hasattr(pipeline, "class_names"):
        raise ValueError(f"a {kind} takes no class labels: those are for a SiTPipeline")
    arguments, used = {}, {}
    family = family_of_pipeline(pipeline)
    guides = family is not None and family.guidance_argument == "true_cfg_scale"
    if guides and settings["negative_prompt"] is None and (settings["true_cfg"] is None or settings["true_cfg"] > 1):
        settings = settings | {"negative_prompt": family.empty_prompt}  # without one the pipeline would not guide
    for name, argument in ARGUMENTS.items():
        if argument in parameters:
            used[name] = parameters[argument].default if settings[name] is None else settings[name]
        elif settings[name] is not None:
            raise ValueError(f"a {kind} takes no {argument}")
        else:
            used[name] = None
        if settings[name] is not None:
            arguments[argument] = settings[name]

    def no_effect(name: str, why: str) -> None:
        if settings[name] is not None:
            warnings.warn(f"{name} has no effect: {why}", NoEffectWarning, stacklevel=4)
        used[name] = None

    if guides:
        no_effect("guidance", f"a {kind} is guided by true_cfg")
    if "true_cfg_scale" in parameters:
        if used["negative_prompt"] is None and guides:
            pass  # true_cfg is at most 1: it says that nothing guides
        elif used["negative_prompt"] is None:
            no_effect("true_cfg", "it guides away from a negative prompt, and there is none")
        elif used["true_cfg"] <= 1:
            no_effect("negative_prompt", f"a {kind} heeds it only with a true_cfg above 1, at twice the time")
            no_effect("true_cfg", "it guides only above 1")
        if not guides and getattr(denoiser(pipeline), "config", {}).get("guidance_embeds") is False:
            no_effect("guidance", "this model was distilled to need none")
    elif family is not None and family.unguided_if_distilled and pipeline.config.get("is_distilled"):
        no_effect("guidance", "this model was distilled to need none")
    elif used["guidance"] is not None:
        above = 1.0 if family is None else family.guides_above
        if used["guidance"] <= above:
            no_effect("negative_prompt", f"guidance works only above {above:g}")
    if "sampler" in parameters:
        used["sampler"] = settings["sampler"] or pipeline.default_sampler
        if used["sampler"] == "dopri5":
            no_effect("steps", "dopri5 chooses its own")
    if "use_resolution_binning" in parameters:
        arguments["use_resolution_binning"] = False  # PixArt: the requested size, not the nearest of a list
    if "enable_prompt_rewrite" in parameters:
        arguments["enable_prompt_rewrite"] = False  # LongCat-Image: the given prompt, not what its encoder makes of it
    if "max_area" in parameters:
        arguments["max_area"] = used["height"] * used["width"]  # Kontext: it takes the sides' ratio alone
    return arguments, used
