"""Large images in stages: an image is enlarged, and its details are painted anew at the larger size, in few steps.

At its own size a model knows where things go; beyond it, it repeats them. So the first stage makes the image at the
model's size, and each later one keeps the composition of the stage before: the enlarged image gets noise up to a level
sigma, and sampling goes on from there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..flow.path import interpolate, time_of_noise
from ..flow.sample import sampling_interval
from ..models import family_of
from ..models.family import denoiser, family_of_class
from .sit import SiTPipeline
from .tile_norms import crop_places, norms_of_crops
from .tiles import Share, blended_rows, in_rows, one_by_one
from .upscaler import Upscaler

GUIDES = (None, "residual", "low-frequency")
ENLARGED_IN = ("pixels", "latents")


@dataclass(frozen=True)
class Schedule:
    """How a stage paints an enlarged image anew.

    sigma: the noise that it starts from, above 0 and below 1: the share of noise, as in flow matching; a DDPM model starts
        at the step where noise and image are in the same proportion.
    steps: of the sampler, from sigma to 0.
    guide: what keeps it near the enlarged image. None: the start alone. "residual": after each step a part of the latents
        is replaced by the enlarged image's with as much noise (DemoFusion's skip residual, arXiv 2311.16973);
        "low-frequency": the same, of what the smaller image can show alone (as in I-Max, arXiv 2410.07536). The part falls
        from 1 to 0 with sigma, as half a cosine, cubed.
    enlarged_in: "pixels": by Lanczos or an upscaler, then encoded; "latents": bicubic, of the smaller image's latents.
    """

    sigma: float
    steps: int
    guide: str | None = None
    enlarged_in: str = "pixels"

    def __post_init__(self):
        if not 0 < self.sigma < 1:
            raise ValueError(f"the noise of a stage is above 0, where nothing changes, and below 1, not {self.sigma}")
        if self.steps < 1:
            raise ValueError(f"a stage takes 1 step or more, not {self.steps}")
        for name, known in {"guide": GUIDES, "enlarged_in": ENLARGED_IN}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(map(str, known))}, not {getattr(self, name)!r}")

    def sigmas(self) -> list[float]:
        """The noise at the start of each step, in even steps."""
        return [self.sigma * (1 - step / self.steps) for step in range(self.steps)]


SCHEDULES = {
    "refine": Schedule(0.15, 1),
    "sdedit": Schedule(0.4, 6),
    "residual": Schedule(0.8, 12, guide="residual"),
    "low-frequency": Schedule(0.8, 12, guide="low-frequency"),
}


def native_size(pipeline: Any) -> int:
    """The side, in pixels, of the images that a pipeline makes where no size is asked for; 0 where that is not known."""
    model = denoiser(pipeline)
    told = None if model is None else model.config.get("sample_size")
    if latents := told or getattr(pipeline, "default_sample_size", 0):
        return latents * pipeline.vae_scale_factor
    family = family_of_class(type(model).__name__)
    return 0 if family is None else family.usual_side


def stage_sizes(
    size: tuple[int, int], first: tuple[int, int], unit: int, *, scale: float = 2.0
) -> list[tuple[int, int]]:
    """(width, height) of each stage behind the first one, in pixels; the last is what is asked for.

    first: size of the first stage. scale: how much larger a stage is at most, along each side, 2 or so. Sizes but the last
    are multiples of unit. Empty where the first stage is large enough. Raises ValueError for a scale below 1.2.
    """
    if not 1.2 <= scale < math.inf:
        raise ValueError(f"a stage is at least 1.2 times as large as the one before, not {scale}")
    ratio = max(size[0] / first[0], size[1] / first[1])
    if ratio <= 1:
        return []
    count = max(1, math.ceil(math.log(ratio) / math.log(scale) - 1e-6))
    sizes = []
    for left in range(count - 1, 0, -1):
        smaller = ratio ** (-left / count)
        sizes.append(tuple(max(unit, round(side * smaller / unit) * unit) for side in size))
    return [*sizes, size]


def first_size(size: tuple[int, int], side: int, unit: int) -> tuple[int, int]:
    """(width, height) of about side x side pixels in the shape of a size, multiples of unit."""
    smaller = side / math.sqrt(size[0] * size[1])
    return tuple(max(unit, round(length * smaller / unit) * unit) for length in size)


def padded_size(size: tuple[int, int], unit: int) -> tuple[int, int]:
    """A size with each side rounded up to a multiple of unit."""
    return tuple(-(-side // unit) * unit for side in size)


def check_schedule(pipeline: Any, schedule: Schedule) -> None:
    """Raise ValueError for a schedule that a pipeline cannot follow."""
    if not isinstance(pipeline, SiTPipeline):
        family_of(denoiser(pipeline)).sampling_from(pipeline.scheduler, schedule.sigmas())
    elif schedule.guide:
        raise ValueError(f"the guide {schedule.guide!r} is for text-to-image pipelines, not for a SiT")


@contextlib.contextmanager
def repainting(
    pipeline: Any,
    image: Image.Image,
    size: tuple[int, int],
    schedule: Schedule,
    generator: torch.Generator,
    *,
    tiles: bool = False,
    upscaler: Upscaler | None = None,
    share: Share | None = None,
) -> Iterator[dict[str, Any]]:
    """Let a text-to-image pipeline, or a SiTPipeline, paint an image anew at a larger size within the block, once.

    image: what is enlarged. size: (width, height) in pixels; the pipeline's image goes beyond it, at the right and at the
    bottom, up to a multiple of what the model takes. generator: draws the noise, on its own device. tiles: whether the VAE
    encodes in tiles. upscaler: enlarges pixels in place of Lanczos' filter. share: of the VAE's and the upscaler's tiles among
    processes that all paint this image, see `parallel.shared_tiles`; None: this process makes them all. Yields arguments for
    the pipeline's call, which is otherwise as the user wants it.

    Raises ValueError for a pipeline whose scheduler or VAE does not allow it, and for an upscaler that enlarges less.
    """
    check_schedule(pipeline, schedule)
    if upscaler is not None and schedule.enlarged_in != "pixels":
        raise ValueError(f"an upscaler enlarges pixels, and this schedule {schedule.enlarged_in}")
    if isinstance(pipeline, SiTPipeline):
        yield _repainting_sit(pipeline, image, size, schedule, generator, tiles, upscaler, share)
        return
    model, own = denoiser(pipeline), pipeline.scheduler
    family = family_of(model)
    side, scale = family.token_pixels(model.config, pipeline.vae_scale_factor), pipeline.vae_scale_factor
    padded = padded_size(size, side)
    rows, columns = padded[1] // scale, padded[0] // scale  # of latents
    small = _smaller(image, size, (rows, columns))
    scheduler, arguments = family.sampling_from(own, schedule.sigmas())
    enlarged = _enlarged(pipeline, image, size, padded, schedule, tiles, upscaler, share)
    latents = family.model_latents(pipeline.vae, enlarged)
    noise = torch.randn(latents.shape, generator=generator).to(latents)

    def noisy(sigma: float) -> torch.Tensor:
        return family.add_noise(latents, noise, family.times_at([sigma], own), own)[0]

    if schedule.guide:
        sigmas = [*schedule.sigmas(), 0.0]

        def guide(step: int, x: torch.Tensor) -> torch.Tensor:
            if not sigmas[step]:
                return x
            part = (0.5 - 0.5 * math.cos(math.pi * sigmas[step] / schedule.sigma)) ** 3
            change = noisy(sigmas[step]).to(x) - x
            if schedule.guide == "low-frequency":
                whole = family.unpack(change, (padded[1] // side, padded[0] // side))
                low = F.interpolate(whole, size=small, mode="area")
                change = family.pack(F.interpolate(low, size=(rows, columns), mode="bilinear"))
            return x + part * change

        _after_steps(scheduler, guide)
    start = noisy(schedule.sigma)
    pipeline.scheduler = scheduler
    try:
        start = family.given_latents(start, (padded[1] // side, padded[0] // side))
        yield {"width": padded[0], "height": padded[1], "latents": start, **arguments}
    finally:
        pipeline.scheduler = own


def _smaller(image: Image.Image, size: tuple[int, int], latents: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of latents that show what the smaller image does, of those of the enlarged one."""
    return tuple(max(1, round(length * image.width / size[0])) for length in latents)


def _enlarged(
    pipeline: Any,
    image: Image.Image,
    size: tuple[int, int],
    padded: tuple[int, int],
    schedule: Schedule,
    tiles: bool,
    upscaler: Upscaler | None,
    share: Share | None,
) -> torch.Tensor:
    """The VAE's latents of the enlarged image, as the schedule says."""
    if upscaler is not None:
        image = upscaler.enlarge(image, size, pipeline._execution_device, pipeline.progress_bar, share)
    if schedule.enlarged_in == "pixels":
        return encode_enlarged(pipeline, image, size, padded, tiles, share)
    scale = pipeline.vae_scale_factor
    latents = padded[1] // scale, padded[0] // scale
    smaller = tuple(length * scale for length in reversed(_smaller(image, size, latents)))
    encoded = encode_enlarged(pipeline, image, smaller, smaller, tiles, share)
    return F.interpolate(encoded, size=latents, mode="bicubic")


def _repainting_sit(
    pipeline: SiTPipeline,
    image: Image.Image,
    size: tuple[int, int],
    schedule: Schedule,
    generator: torch.Generator,
    tiles: bool,
    upscaler: Upscaler | None,
    share: Share | None,
) -> dict[str, Any]:
    """`repainting` for a model of classes, by Euler's steps along its path."""
    config, path = pipeline.transformer.config, pipeline.config.path
    padded = padded_size(size, pipeline.vae_scale_factor * config.patch_size)
    latents = _enlarged(pipeline, image, size, padded, schedule, tiles, upscaler, share)
    if pipeline.vae is not None:
        latents = (latents - (pipeline.vae.config.shift_factor or 0.0)) * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    time, (_, end) = time_of_noise(path, schedule.sigma), sampling_interval(path, pipeline.config.prediction)
    return {
        "width": padded[0],
        "height": padded[1],
        "latents": interpolate(latents, noise, torch.tensor([time], device=latents.device), path),
        "num_inference_steps": schedule.steps,
        "sampler": "euler",
        "sampler_options": {"interval": (time, end)},
    }


def _after_steps(scheduler: Any, change: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Let a scheduler give change(steps done, latents) after each step, in place of the latents."""
    step, done = scheduler.step, 0

    def changed(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        latents, *rest = step(*args, **{**kwargs, "return_dict": False})
        return (change(done, latents), *rest)

    scheduler.step = changed


@torch.no_grad()
def encode_enlarged(
    pipeline: Any,
    image: Image.Image,
    size: tuple[int, int],
    padded: tuple[int, int],
    tiles: bool,
    share: Share | None = None,
) -> torch.Tensor:
    """The VAE's latents [1, C, h, w], in float32, of an image enlarged by Lanczos' filter to size: (width, height).

    Without a VAE they are the pixels, in [-1, 1].

    padded: size of what is encoded: the image, and its last row and column again where that is larger. tiles: encode in the
    VAE's tiles, a row of them at a time, so that the enlarged image is never held as a whole; they are cut and blended as in
    diffusers' own tiled encoding, and their group norms have one image's statistics, see `tile_norms`. share: of the tiles
    among processes that all encode this image, see `parallel.shared_tiles`.
    """
    vae, device = pipeline.vae, torch.device(pipeline._execution_device)

    def to_latents(pixels: torch.Tensor) -> torch.Tensor:
        if isinstance(pipeline, SiTPipeline):
            return vae.encode(pixels).latent_dist.mode()
        return family_of(denoiser(pipeline)).vae_encode(vae, pixels)

    image = image.convert("L" if (vae or denoiser(pipeline)).config.get("in_channels") == 1 else "RGB")
    across, down = image.width / size[0], image.height / size[1]
    more = [math.ceil((whole - own) * ratio) for whole, own, ratio in zip(padded, size, (across, down), strict=True)]
    if any(more):
        widths = ((0, more[1]), (0, more[0]), (0, 0))[: np.asarray(image).ndim]
        image = Image.fromarray(np.pad(np.asarray(image), widths, "edge"))

    def pixels_of(left: int, top: int, side: tuple[int, int]) -> torch.Tensor:
        right, bottom = min(left + side[0], padded[0]), min(top + side[1], padded[1])
        # Pillow's filter reaches beyond the box
        box = (left * across, top * down, right * across, bottom * down)
        part = image.resize((right - left, bottom - top), Image.Resampling.LANCZOS, box)
        pixels = torch.from_numpy(np.array(part)).to(device).view(part.height, part.width, -1).permute(2, 0, 1)[None]
        pixels = pixels / 127.5 - 1
        return pixels if vae is None else pixels.to(vae.dtype)

    def encode(left: int, top: int, side: tuple[int, int]) -> torch.Tensor:
        pixels = pixels_of(left, top, side)
        return pixels if vae is None else to_latents(pixels)

    if not tiles:
        return encode(0, 0, padded).float()
    side, latents = vae.tile_sample_min_size, vae.tile_latent_min_size
    step, blended = int(side * (1 - vae.tile_overlap_factor)), int(latents * vae.tile_overlap_factor)
    lefts, tops = range(0, padded[0], step), range(0, padded[1], step)
    makes = [partial(encode, left, top, (side, side)) for top in tops for left in lefts]
    encoded = (share or one_by_one)(makes, torch.empty(0, 0, 0, 0, dtype=vae.dtype, device=device))
    rows = in_rows(encoded, len(lefts))

    def encode_crops() -> None:
        places, (height, width) = crop_places(padded[::-1], side, side // latents)
        to_latents(torch.cat([pixels_of(x, y, (width, height)) for y, x in places]))

    several = max(padded) > step
    with norms_of_crops(vae, vae.encoder, encode_crops) if several else contextlib.nullcontext():
        return torch.cat(list(blended_rows(vae, rows, blended, latents - blended)), 2).float()
