"""SiT's pipeline: images from class labels, with a sampler of `hybriddit.flow` or a scheduler of diffusers."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..flow import ODE_METHODS, PATHS, PREDICTIONS, SDE_METHODS, guided, sample_ode, sample_sde
from ..flow.path import check_name
from ..flow.sample import velocity_field
from ..metrics.images import to_uint8
from ..models import SiTTransformer2DModel
from ..models.family import check_latents_scale

SAMPLERS = (*ODE_METHODS, *(f"sde-{name}" for name in SDE_METHODS))
# the keys that `sampler_options` may have
FIXED_STEP_OPTIONS = ("interval",)
DOPRI5_OPTIONS = ("atol", "rtol", "interval")
SDE_OPTIONS = ("diffusion", "diffusion_norm", "last_step", "last_step_size", "interval")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
IMAGENET_CLASSES, IMAGENET_ENDS = 1000, ("n01440764", "n15075141")


class SiTPipeline(DiffusionPipeline):
    """Generates images of given classes; called like diffusers' DiTPipeline.

    Save it with save_pretrained and load it with `SiTPipeline.from_pretrained(folder)`: diffusers' own
    `DiffusionPipeline.from_pretrained` finds only classes that are in diffusers.

    Args:
        transformer: SiTTransformer2DModel.
        vae: AutoencoderKL; the transformer was trained on its latents times its scaling_factor. None: the transformer
            was trained on pixels in [-1, 1].
        scheduler: a flow-matching scheduler of diffusers (FlowMatchEulerDiscreteScheduler, or another one with
            use_flow_sigmas), used by calls that do not name a sampler; the path must be linear. None: they use "euler".
        id2label: {class index, as int or string: "name" or "name, other name"}. None: ImageNet's names if the model has
            1000 classes, else none.
        path, prediction: what the transformer was trained for, see `hybriddit.flow`.
        weights: a note on the weights, such as "EMA 0.9999, step 400000", written into the records of images.

    Raises ValueError for an unknown path or prediction, a class index that the transformer does not have, and a VAE
    with a mean and std per channel.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae", "scheduler"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        vae: AutoencoderKL | None = None,
        scheduler: Any = None,
        id2label: dict[str, str] | None = None,
        path: str = "linear",
        prediction: str = "velocity",
        weights: str | None = None,
    ):
        super().__init__()
        if vae is not None:
            check_latents_scale(vae.config)
        check_name("path", path, PATHS)
        check_name("prediction", prediction, PREDICTIONS)
        classes = transformer.config.num_classes
        if id2label is not None:
            id2label = {str(int(index)): str(name) for index, name in id2label.items()}  # JSON's keys are strings
            outside = [index for index in id2label if not 0 <= int(index) < classes]
            if outside:
                raise ValueError(f"id2label names class {outside[0]}: the transformer's are 0 to {classes - 1}")
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label, path=path, prediction=prediction, weights=weights)
        self.vae_scale_factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **kwargs):
        """Load a saved pipeline, from safetensors only. folder: a folder or hub repository; kwargs: as in diffusers."""
        return super().from_pretrained(folder, **{"use_safetensors": True, **kwargs})

    @property
    def class_names(self) -> dict[int, str]:
        """{index: name} of the classes that have a name."""
        if self.config.id2label is not None:
            return {int(index): name for index, name in self.config.id2label.items()}
        return imagenet_names() if self.transformer.config.num_classes == IMAGENET_CLASSES else {}

    @property
    def labels(self) -> dict[str, int]:
        """{name: index}; if several classes share a name, the first one's index."""
        return {name: indices[0] for name, indices in sorted(_indices_by_name(self.class_names).items())}

    @property
    def default_sampler(self) -> str:
        """The sampler of calls that do not name one: the scheduler's class name, or "euler" without a scheduler."""
        return "euler" if self.scheduler is None else type(self.scheduler).__name__

    def get_label_ids(self, label: str | int | Sequence[str | int]) -> list[int]:
        """Class indices of one label or several, always as a list. A label is a name, in any case, or an index.

        Raises ValueError for an unknown name (suggesting similar ones), a name that several classes share, and an index
        out of range.
        """
        labels = [label] if isinstance(label, str) or not isinstance(label, Sequence | torch.Tensor) else label
        classes, names, found = self.transformer.config.num_classes, None, []
        for one in labels.tolist() if isinstance(labels, torch.Tensor) else labels:
            if isinstance(one, str):
                if names is None:
                    names = _indices_by_name(self.class_names)
                one = _index_of(one, names, classes)
            elif isinstance(one, bool) or not isinstance(one, int | np.integer):
                raise ValueError(f"a class label is an index or a name, not {one!r}")
            if not 0 <= one < classes:
                raise ValueError(f"class labels are 0 to {classes - 1}, got {one}")
            found.append(int(one))
        return found

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        sampler: str | None = None,
        sampler_options: Mapping[str, Any] | None = None,
        shift: float = 1.0,
        guidance_channels: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, float, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generate one image for each label.

        Args:
            class_labels: class indices or names, see `get_label_ids`.
            guidance_scale: of classifier-free guidance. 1 turns it off and halves the cost; 0 ignores the label.
            generator: draws the starting noise and the noise of an SDE's steps. With a list of one for each image, an
                image does not depend on the others of the batch.
            num_inference_steps: number of the sampler's steps; "dopri5" chooses its own.
            output_type: "pil" (rounded as `hybriddit.metrics.to_uint8` does), "np" [B, H, W, C] or "pt" [B, C, H, W]
                in [0, 1], or "latent" [B, C, h, w], before the VAE.
            sampler: "euler", "heun" or "dopri5" (ODE), "sde-euler" or "sde-heun" (SDE). None: the pipeline's scheduler,
                or "euler" without one.
            sampler_options: arguments of `hybriddit.flow.sample_ode` (interval; for "dopri5" also atol, rtol) or of
                `sample_sde` (diffusion, diffusion_norm, last_step, last_step_size, interval).
            shift: moves times towards noise; above 1 for images larger than the training size. Not for schedulers.
            guidance_channels: guide only the first so many channels; None: all. The published SiT and DiT numbers were
                made with 3.
            guidance_interval: (low, high), the times that are guided; 0 is noise and 1 the image.
            height, width: in pixels, multiples of the model's patch; None: the training size.
            latents: starting noise, [B, C, h, w], instead of the generator's.
            callback_on_step_end: called as (pipeline, step from 0, time reached, {"latents": [B, C, h, w]}). It returns
                a dict; latents in it replace the sampler's, except with "dopri5". With a scheduler it receives the
                scheduler's timestep instead of the time.
            callback_on_step_end_tensor_inputs: ("latents",) or ().

        Between steps the latents are kept in float32 or wider, whatever the transformer's dtype. The transformer is in
        eval mode during the call, and afterwards in the mode it was in. Returns ImagePipelineOutput(images), or
        (images,). Raises ValueError for labels, sizes, samplers and options that do not fit.
        """
        labels = self.get_label_ids(class_labels)
        _check_call(labels, guidance_scale, num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        scheduler = self.scheduler if sampler is None else None
        if scheduler is not None:
            self._check_scheduler(scheduler, shift, sampler_options)
        else:
            sampler = sampler or self.default_sampler
            _check_options(sampler, sampler_options or {})
        device, config = self._execution_device, self.transformer.config
        latents = self._noise(len(labels), height, width, generator, latents, device)

        def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.transformer(x.to(self.transformer.dtype), t, y, return_dict=False)[0].to(x.dtype)

        field = guided(
            model,
            torch.tensor(labels, device=device),
            config.num_classes,
            guidance_scale,
            channels=guidance_channels,
            interval=guidance_interval,
        )
        callback = callback_on_step_end and _callback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        options = {"shift": shift, **(sampler_options or {})}
        training = self.transformer.training
        self.transformer.eval()  # a model in training drops labels
        try:
            if scheduler is not None:
                latents = self._schedule(scheduler, field, latents, num_inference_steps, generator, callback)
            else:
                latents = self._sample(sampler, field, latents, num_inference_steps, generator, callback, **options)
        finally:
            self.transformer.train(training)
        images = latents if output_type == "latent" else self._images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, batch, height, width, generator, latents, device) -> torch.Tensor:
        config, unit = self.transformer.config, self.vae_scale_factor * self.transformer.config.patch_size
        sides = []
        for name, side in (("height", height), ("width", width)):
            side = config.sample_size * self.vae_scale_factor if side is None else side
            if side < unit or side % unit:
                raise ValueError(f"{name} must be a multiple of {unit} pixels for this model, got {side}")
            sides.append(side // self.vae_scale_factor)
        shape = (batch, config.in_channels, *sides)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for {batch} images")
        # at least float32, so that a seed gives the same image in every dtype of the transformer, up to rounding
        dtype = torch.promote_types(self.transformer.dtype, torch.float32)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if height is None and width is None and latents.ndim == 4:
            shape = (*shape[:2], *latents.shape[2:])  # the given noise sets the size
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {list(shape)}, got {list(latents.shape)}")
        return latents.to(device, torch.promote_types(latents.dtype, torch.float32))

    def _sample(self, sampler, field, noise, steps, generator, callback, **options) -> torch.Tensor:
        adaptive = sampler == "dopri5"
        with self.progress_bar(total=100 if adaptive else steps) as bar:  # dopri5: in percent of the time interval

            def after_step(step: int, time: float, x: torch.Tensor) -> None:
                bar.update((round(100 * time) if adaptive else step) - bar.n)
                latents = callback(step - 1, time, x) if callback else x
                if latents is not x:
                    if adaptive:
                        raise ValueError("dopri5 keeps what it has computed: a callback cannot change its latents")
                    x.copy_(latents)  # in place: the sampler goes on from x

            common = {"prediction": self.config.prediction, "steps": steps, "callback": after_step, **options}
            if sampler.startswith("sde-"):
                method = sampler.removeprefix("sde-")
                return sample_sde(field, noise, self.config.path, method=method, generator=generator, **common)
            return sample_ode(field, noise, self.config.path, method=sampler, **common)

    def _schedule(self, scheduler, field, latents, steps, generator, callback) -> torch.Tensor:
        """Sample with a scheduler of diffusers: its sigma is 1 - t, so its model output is the negative velocity."""
        velocity = velocity_field(field, "linear", self.config.prediction)
        sigmas = {}
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            # evenly spaced, as in diffusers' FLUX and our samplers
            sigmas = {"sigmas": np.linspace(1, 1 / steps, steps)}
        scheduler.set_timesteps(steps, device=latents.device, **sigmas)
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        times = (1 - scheduler.sigmas.cpu().double()).tolist()  # timesteps may be rounded to integers
        for step, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            # a shifted scheduler may go past pure noise: clamp to t = 0
            t = torch.full((len(latents),), max(times[step], 0.0), dtype=latents.dtype, device=latents.device)
            latents = scheduler.step(-velocity(latents, t), timestep, latents, return_dict=False, **extra)[0]
            if callback:
                latents = callback(step, timestep, latents)
        return latents

    def _check_scheduler(self, scheduler, shift, sampler_options) -> None:
        name, config = type(scheduler).__name__, scheduler.config
        if not (name.startswith("FlowMatch") or config.get("use_flow_sigmas")):
            raise ValueError(f"{name} is no flow-matching scheduler: use FlowMatchEulerDiscreteScheduler or a sampler")
        if self.config.path != "linear":
            raise ValueError(f"diffusers' schedulers are for the linear path, not {self.config.path!r}: name a sampler")
        if config.get("use_dynamic_shifting") or config.get("invert_sigmas"):
            raise ValueError(f"a {name} for SiT has use_dynamic_shifting and invert_sigmas off: give it a shift")
        if shift != 1 or sampler_options:
            raise ValueError(f"shift and sampler_options are for samplers: the {name} has its own, or name a sampler")

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents [B, C, h, w], as output_type="latent" returns them, to pixels in about [-1, 1], [B, C, H, W].

        Without a VAE the latents are the pixels. The VAE must be on the latents' device; after
        `pipeline.vae.enable_slicing()` it decodes one image at a time.
        """
        if self.vae is None:
            return latents
        return self.vae.decode(self.vae_latents(latents).to(self.vae.dtype), return_dict=False)[0]

    def vae_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """What the VAE decodes, of latents as output_type="latent" returns them."""
        config = self.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def _images(self, latents: torch.Tensor, output_type: str):
        pixels = self.decode(latents)
        if output_type == "pil":
            images = to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()
            return [Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in images]
        images = (pixels.float() / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def imagenet_names() -> dict[int, str]:
    """{index: name} of ImageNet's 1000 classes, as torchvision has them."""
    from torchvision.models import ResNet50_Weights  # imported here: it imports all of torchvision's models

    return dict(enumerate(ResNet50_Weights.IMAGENET1K_V1.meta["categories"]))


def id2label_of(classes: Sequence[str]) -> dict[int, str] | None:
    """A pipeline's id2label from the class names of a data set, in the order of their labels; None if all are empty.

    ImageNet's folder names (the 1000 wnids n01440764 to n15075141) become ImageNet's class names.
    """
    imagenet = len(classes) == IMAGENET_CLASSES and (classes[0], classes[-1]) == IMAGENET_ENDS
    if imagenet and list(classes) == sorted(classes) and all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return imagenet_names()
    return {index: name for index, name in enumerate(classes) if name} or None


def _indices_by_name(class_names: Mapping[int, str]) -> dict[str, list[int]]:
    """{name: class indices}: each class under its whole name, and under each part of a name with commas."""
    found: dict[str, list[int]] = {}
    for index, name in sorted(class_names.items()):
        for part in dict.fromkeys((name.strip(), *(part.strip() for part in name.split(",")))):
            found.setdefault(part, []).append(index)
    return found


def _index_of(name: str, names: Mapping[str, list[int]], classes: int) -> int:
    indices = names.get(name)
    if indices is None:
        lower = name.strip().lower()
        indices = sorted({index for known, of in names.items() if known.lower() == lower for index in of})
    if len(indices) > 1:
        raise ValueError(f"{name!r} is the name of classes {', '.join(map(str, indices))}: give an index")
    if indices:
        return indices[0]
    if name.strip().isdecimal():
        return int(name)
    if not names:
        raise ValueError(f"unknown class {name!r}: this model's classes have no names, only 0 to {classes - 1}")
    close = difflib.get_close_matches(name.strip().lower(), {known.lower() for known in names}, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"names are such as {next(iter(names))!r}"
    raise ValueError(f"unknown class {name!r}: {hint}")


def _check_call(labels, guidance_scale, steps, output_type, tensor_inputs) -> None:
    if not labels:
        raise ValueError("class_labels holds no label")
    if not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale must be 0 or more, not {guidance_scale}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps must be 1 or more, not {steps!r}")
    check_name("output type", output_type, OUTPUT_TYPES)
    for name in tensor_inputs:
        check_name("callback tensor", name, SiTPipeline._callback_tensor_inputs)


def _check_options(sampler: str, options: Mapping[str, Any]) -> None:
    check_name("sampler", sampler, SAMPLERS)
    known = DOPRI5_OPTIONS if sampler == "dopri5" else FIXED_STEP_OPTIONS if sampler in ODE_METHODS else SDE_OPTIONS
    for name in options:
        check_name(f"option of sampler {sampler}", name, known)


def _callback(pipeline, function, tensor_inputs):
    """Wrap a user's callback as (step, time, latents) -> the latents to continue with."""

    def call(step: int, time: float, latents: torch.Tensor) -> torch.Tensor:
        outputs = function(pipeline, step, time, {"latents": latents} if "latents" in tensor_inputs else {})
        return (outputs or {}).get("latents", latents)

    return call
