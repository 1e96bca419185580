"""Images from a diffusers pipeline, dense or hybrid, and how each was made. Importing it imports neither torch nor
diffusers: what a request gets wrong by itself is told before a model is loaded."""

from __future__ import annotations

import inspect
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from . import __version__
from .files import replacing

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RECORD_KEY = "hybriddit"
MAX_SEED = 2**63 - 1

# generate's argument -> the pipeline's
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
    """A setting that this pipeline, or the other settings, give no effect."""


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
    """Make images one by one; image i is what `pipeline` makes of a CPU generator seeded with `seed + i`.

    Args:
        pipeline: text-to-image, of diffusers or hybriddit; with class_labels a SiTPipeline. With `image` its components
            run in the family's image-to-image pipeline, with `mask` too in its inpainting pipeline; both as diffusers
            defines them.
        prompt, class_labels: one of the two. Labels are indices or names.
        seed: 0 to 2**63 - 1, that of the last image too.
        num_images: of the prompt, or of each class label, label by label.
        image: what to start from. Without a height or a width it gives its own, rounded down to what the model takes.
        mask: of the image's size; white is painted anew, black is kept.
        settings: None, or left out, is the pipeline's default.
            negative_prompt, height and width (pixels), steps (1 or more), guidance (0 or more),
            true_cfg (FLUX: classifier-free guidance against the negative prompt, above 1, at twice the time),
            max_sequence_length (text tokens), strength (with `image`: over 0, where it stays, to 1, where it is noise),
            sampler (with class_labels: see SiTPipeline).

    Yields each image with its record: all of the above as actually used, None for what was not, and the versions.
    Warns (NoEffectWarning) of a setting that changes nothing. Raises ValueError, when called, for settings that cannot
    work, labels that the pipeline has not, a height or width the model cannot take, and a pipeline that has no such task.
    """
    check_settings(
        prompt, class_labels=class_labels, seed=seed, num_images=num_images, image=image, mask=mask, **settings
    )
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
    """What needs no model to be told wrong in `generate`'s arguments. Raises ValueError."""
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
    """How many images `generate` makes."""
    labels = 1 if class_labels is None or isinstance(class_labels, int | str) else len(class_labels)
    return labels * num_images


def open_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """An image file, upright, as "RGB" or "L". FileNotFoundError or ValueError, in one line, where there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image file {path}")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits of grey, which convert would clip to 8
                upright = upright.point(lambda level: level / 256, "F")
            return upright.convert(mode)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged or no image: {error}") from error


def output_paths(out: Path, num_images: int) -> list[Path]:
    """`out` for one image; for more of them out-0001.png, out-0002.png, … beside it.

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


def save_png(image: Image.Image, path: Path, record: dict[str, Any]) -> None:
    """Write the image, whole or not at all, with the record as JSON in its text chunk "hybriddit"."""
    info = PngInfo()
    info.add_itxt(RECORD_KEY, json.dumps(record, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The record that `save_png` wrote; None for an image without one. ValueError for a damaged file."""
    try:
        with Image.open(path) as image:
            image.load()  # a text chunk may follow the pixels, and a damaged file shows here
            text = image.info.get(RECORD_KEY)
        return None if text is None else json.loads(text)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged or no image: {error}") from error


def _for_task(pipeline: DiffusionPipeline, image: Image.Image | None, mask: Image.Image | None) -> DiffusionPipeline:
    if image is None:
        return pipeline
    import diffusers

    # by name: diffusers' from_pipe knows neither our pipelines nor our transformers
    name = next(cls.__name__ for cls in type(pipeline).__mro__ if cls.__module__.startswith("diffusers."))
    task = name.replace("Pipeline", "Img2ImgPipeline" if mask is None else "InpaintPipeline")
    if not hasattr(diffusers, task):
        raise ValueError(f"diffusers has no {'image-to-image' if mask is None else 'inpainting'} for a {name}")
    bars = getattr(pipeline, "_progress_bar_config", {})
    pipeline = getattr(diffusers, task)(**pipeline.components)
    pipeline.set_progress_bar_config(**bars)
    return pipeline


def _fit_size(pipeline: DiffusionPipeline, settings: dict[str, Any], image: Image.Image | None) -> dict[str, Any]:
    """Give the image's size where none is asked for; refuse what diffusers would round, with a log line, or break on."""
    # FLUX packs 2 x 2 latents into a token without saying so in its patch size
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    patch = 2 if "Flux" in type(pipeline).__name__ else config.get("patch_size") or 1
    unit = getattr(pipeline, "vae_scale_factor", 1) * patch
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


def _arguments(
    pipeline: DiffusionPipeline, settings: dict[str, Any], subject: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline's arguments, and the settings as used: its defaults filled in, None where they have no effect.

    subject: "prompt" or "class_labels", what the images are of.
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
        arguments["use_resolution_binning"] = False  # PixArt: the size asked for, not the nearest of a list
    return arguments, used


def _images(
    pipeline: DiffusionPipeline,
    arguments: dict[str, Any],
    used: dict[str, Any],
    subjects: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    first_seed: int,
) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """subjects: what each image is of, as the pipeline's arguments and as the record has it."""
    import diffusers
    import torch

    model = getattr(pipeline, "transformer", None)
    made_by = {
        "pipeline": type(pipeline).__name__,
        "weights": pipeline.config.get("weights"),
        "hybrid_config": None if model is None else model.config.get("hybrid_config"),
        "device": str(pipeline.device),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "versions": {
            "hybriddit": __version__,
            "diffusers": diffusers.__version__,
            "torch": str(torch.__version__),
        },
    }
    for seed, (subject, said) in enumerate(subjects, first_seed):
        image = pipeline(**subject, **arguments, generator=torch.Generator("cpu").manual_seed(seed)).images[0]
        yield image, {**said, **used, "seed": seed, "width": image.width, "height": image.height, **made_by}
