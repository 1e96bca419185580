"""Generate images with a pipeline, dense or hybrid, each with a record of how it was made.

Importing this imports neither torch nor diffusers, so that wrong settings are refused before a model is loaded.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .images import flatten, open_image, save_png
from .machine import running_versions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

MAX_SEED = 2**63 - 1

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


def generate(
    pipeline: DiffusionPipeline,
    prompt: str | None = None,
    *,
    class_labels: int | str | Sequence[int | str] | None = None,
    seed: int = 0,
    num_images: int = 1,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    **settings: Any,
) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Generate images one by one, image i from a CPU generator seeded with `seed + i`.

    Args:
        pipeline: a text-to-image pipeline of diffusers or hybriddit; with class_labels a SiTPipeline. With `image` its
            components run in diffusers' image-to-image pipeline of the family, with `mask` too in the inpainting one.
        prompt, class_labels: one of the two. Labels are indices or names.
        seed: seed of the first image; all seeds must be from 0 to 2**63 - 1.
        num_images: number of images of the prompt, or of each class label, label by label.
        image: the image to start from, white where it is transparent. Height and width default to its size, rounded
            down to what the model takes.
        mask: an image of the same size; white is painted anew, black and transparent are kept.
        settings: a setting that is None or left out has the pipeline's default.
            negative_prompt, height and width (pixels), steps (1 or more), guidance (0 or more),
            true_cfg (FLUX: classifier-free guidance against the negative prompt, above 1, at twice the time),
            max_sequence_length (text tokens), strength (with `image`: from above 0, little change, to 1, pure noise),
            sampler (with class_labels: see SiTPipeline).

    Yields (image, record): the record holds all of the above as actually used (None: not used) and the versions.
    Warns (NoEffectWarning) of settings that change nothing. Raises ValueError, already at the call, for settings that
    cannot work, unknown class labels, sizes the model cannot take, and a pipeline that cannot do the task.
    """
    check_settings(
        prompt, class_labels=class_labels, seed=seed, num_images=num_images, image=image, mask=mask, **settings
    )
    image, mask = image and flatten(image), mask and flatten(mask, "L", "black")
    pipeline = _for_task(pipeline, image, mask)
    settings = {name: settings.get(name) for name in ARGUMENTS}
    settings = _fit_size(pipeline, settings, image)
    arguments, used = _arguments(pipeline, settings, "prompt" if class_labels is None else "class_labels")
    if image is not None:
        arguments["image"] = image
    if mask is not None:
        arguments["mask_image"] = mask
    if class_labels is None:
        subjects = [({"prompt": prompt}, {"prompt": prompt})]
    else:
        names = pipeline.class_names
        subjects = [
            ({"class_labels": label}, {"class_label": label, "class_name": names.get(label)})
            for label in pipeline.get_label_ids(class_labels)
        ]
    return _images(pipeline, arguments, used, [subject for subject in subjects for _ in range(num_images)], seed)


def check_settings(
    prompt: str | None = None,
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
    if sampler is not None:
        from .flow.path import check_name
        from .pipelines.sit import SAMPLERS

        check_name("sampler", sampler, SAMPLERS)
    counts = {"num_images": num_images, "height": height, "width": width, "steps": steps}
    for name, value in {**counts, "max_sequence_length": max_sequence_length}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")
    for name, value in {"guidance": guidance, "true_cfg": true_cfg}.items():
        if value is not None and not (0 <= value < math.inf):
            raise ValueError(f"{name} must be 0 or more, not {value}")
    total = image_count(class_labels, num_images)
    if not total:
        raise ValueError("class_labels holds no label")
    if not 0 <= seed <= seed + total - 1 <= MAX_SEED:
        raise ValueError(f"seeds go from 0 to 2**63 - 1: {total} from {seed} do not fit")
    if image is None and (mask is not None or strength is not None):
        raise ValueError(f"a {'strength' if mask is None else 'mask'} needs an image to start from")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0, where the image stays as it is, and at most 1, not {strength}")
    if mask is not None and mask.size != image.size:
        sizes = " and ".join("{} x {}".format(*picture.size) for picture in (mask, image))
        raise ValueError(f"the mask and the image must be of one size: they are {sizes}")


def image_count(class_labels: int | str | Sequence[int | str] | None, num_images: int) -> int:
    """The number of images that `generate` makes."""
    labels = 1 if class_labels is None or isinstance(class_labels, int | str) else len(class_labels)
    return labels * num_images


def run(
    model: str,
    out: Path,
    *,
    prompt: str | None = None,
    adapter: str | None = None,
    image: Path | None = None,
    mask: Path | None = None,
    dtype: str | None = None,
    quiet: bool = False,
    announce: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Load a pipeline, generate images and save each as a PNG file with its record as soon as it is made.

    model, adapter, dtype: see `pipelines.loading.load_for_use`. image, mask: files. settings: those of `generate`.
    quiet: no progress bars, and no notes on stderr about settings without effect. announce: print each file saved.

    Returns {"files", "seeds", "seconds" of generating, "notes"}. Raises ValueError or OSError, in one line, for wrong
    arguments, before the model is loaded if possible.
    """
    class_labels = settings.get("class_labels")
    paths = output_paths(out, image_count(class_labels, settings.get("num_images", 1)))
    source = {"model": model, "adapter": adapter, "image": image and str(image), "mask": mask and str(mask)}
    settings["image"] = open_image(image) if image else None
    settings["mask"] = open_image(mask, "L", "black") if mask else None
    check_settings(prompt, **settings)
    if class_labels and adapter:
        raise ValueError("an adapter has no meaning with a class label: it is for text-to-image pipelines")

    from .pipelines.loading import load_for_use  # imports torch and diffusers, which takes seconds

    pipeline = load_for_use(model, dtype=dtype, adapter=adapter, of_classes=bool(class_labels), quiet=quiet)
    if adapter:
        from .models import load_adapter

        load_adapter(pipeline, adapter)
    pipeline.set_progress_bar_config(disable=quiet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoEffectWarning)
        images = generate(pipeline, prompt, **settings)
    notes = [str(warning.message) for warning in caught if warning.category is NoEffectWarning]
    if not quiet:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    started, seeds = time.monotonic(), []
    for path, (picture, record) in zip(paths, images, strict=True):
        save_png(picture, path, {**source, **record})
        seeds.append(record["seed"])
        if announce:
            print(f"{picture.width} x {picture.height} image saved to {path}")
    seconds = round(time.monotonic() - started, 3)
    return {"files": [str(path) for path in paths], "seeds": seeds, "seconds": seconds, "notes": notes}


def output_paths(out: Path, num_images: int) -> list[Path]:
    """The files to write: `out` for one image, else out-0001.png, out-0002.png, … beside it.

    Raises ValueError for a path that no PNG file can be written to.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out} must end in .png: the image's record is kept in the file")
    paths = [out] if num_images == 1 else [out.with_stem(f"{out.stem}-{i:04d}") for i in range(1, num_images + 1)]
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give a file")
    for folder in out.parents:
        if folder.exists():
            if not folder.is_dir():
                raise ValueError(f"{folder} is a file: {out} cannot be written into it")
            if not os.access(folder, os.W_OK):
                raise ValueError(f"{folder} is not yours to write to: give {out.name} another folder")
            break
    return paths


def _for_task(pipeline: DiffusionPipeline, image: Image.Image | None, mask: Image.Image | None) -> DiffusionPipeline:
    """The pipeline itself if there is no image; else an image-to-image or inpainting pipeline of its components."""
    if image is None:
        return pipeline
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    from .models.family import family_of_class

    task, auto = ("image-to-image", AutoPipelineForImage2Image)
    if mask is not None:
        task, auto = ("inpainting", AutoPipelineForInpainting)
    family = family_of_class(type(getattr(pipeline, "transformer", None)).__name__)
    if family is not None and not isinstance(pipeline, family.pipelines["text-to-image"]):
        family = None  # another pipeline of the family's models
    bars = getattr(pipeline, "_progress_bar_config", {})
    if family is None:  # diffusers finds its own pipelines by class name
        try:
            made = auto.from_pipe(pipeline)
        except ValueError as error:
            raise ValueError(f"diffusers has no {task} for a {type(pipeline).__name__}") from error
    elif task not in family.pipelines:
        raise ValueError(f"diffusers has no {task} for a {family.pipeline_name}")
    else:
        made = family.pipelines[task](**pipeline.components)
    made.set_progress_bar_config(**bars)
    return made


def _fit_size(pipeline: DiffusionPipeline, settings: dict[str, Any], image: Image.Image | None) -> dict[str, Any]:
    """Fill in the image's size where none is given. Raises ValueError for sizes that the model does not take.

    (diffusers would round some of them, with a log line only, and fail on others.)
    """
    unit = _token_pixels(pipeline)
    fitted = {}
    for index, side in enumerate(("width", "height")):
        fitted[side] = settings[side]
        if fitted[side] is None and image is not None:
            fitted[side] = image.size[index] // unit * unit
            if not fitted[side]:
                raise ValueError(f"the image is {image.width} x {image.height}: this model needs {unit} pixels or more")
        elif fitted[side] is not None and fitted[side] % unit:
            raise ValueError(f"{side} {fitted[side]} is no multiple of {unit}, which this model needs")
    return settings | fitted


def _token_pixels(pipeline: DiffusionPipeline) -> int:
    """The number that image sides are multiples of: pixels per token, or per latent if there are no tokens."""
    from .models.family import family_of_class

    model, scale = getattr(pipeline, "transformer", None), getattr(pipeline, "vae_scale_factor", 1)
    family = family_of_class(type(model).__name__)
    if family is not None:
        return family.token_pixels(model.config, scale)
    return scale * (getattr(model, "config", {}).get("patch_size") or 1)


def _arguments(
    pipeline: DiffusionPipeline, settings: dict[str, Any], subject: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the pipeline's call, and the settings as used: defaults filled in, None if without effect.

    subject: what the images are made from, "prompt" or "class_labels".
    """
    kind, parameters = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    if subject == "prompt" and "prompt" not in parameters:
        raise ValueError(f"a {kind} takes no prompt: those are for text-to-image pipelines")
    if subject == "class_labels" and not hasattr(pipeline, "class_names"):
        raise ValueError(f"a {kind} takes no class labels: those are for a SiTPipeline")
    arguments, used = {}, {}
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

    if "true_cfg_scale" in parameters:
        if used["negative_prompt"] is None:
            no_effect("true_cfg", "it guides away from a negative prompt, and there is none")
        elif used["true_cfg"] <= 1:
            no_effect("negative_prompt", f"a {kind} heeds it only with a true_cfg above 1, at twice the time")
            no_effect("true_cfg", "it guides only above 1")
        if getattr(getattr(pipeline, "transformer", None), "config", {}).get("guidance_embeds") is False:
            no_effect("guidance", "this model was distilled to need none")
    elif used["guidance"] is not None and used["guidance"] <= 1:
        no_effect("negative_prompt", "guidance works only above 1")
    if "sampler" in parameters:
        used["sampler"] = settings["sampler"] or pipeline.default_sampler
        if used["sampler"] == "dopri5":
            no_effect("steps", "dopri5 chooses its own")
    if "use_resolution_binning" in parameters:
        arguments["use_resolution_binning"] = False  # PixArt: the requested size, not the nearest of a list
    return arguments, used


def _images(
    pipeline: DiffusionPipeline,
    arguments: dict[str, Any],
    used: dict[str, Any],
    subjects: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    first_seed: int,
) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Run the pipeline once per image. subjects: each image's (arguments of the pipeline, entries of the record)."""
    import torch

    model = getattr(pipeline, "transformer", None)
    made_by = {
        "pipeline": type(pipeline).__name__,
        "weights": pipeline.config.get("weights"),
        "hybrid_config": None if model is None else model.config.get("hybrid_config"),
        "device": str(pipeline.device),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "versions": running_versions(),
    }
    for seed, (subject, said) in enumerate(subjects, first_seed):
        image = pipeline(**subject, **arguments, generator=torch.Generator("cpu").manual_seed(seed)).images[0]
        yield image, {**said, **used, "seed": seed, "width": image.width, "height": image.height, **made_by}
