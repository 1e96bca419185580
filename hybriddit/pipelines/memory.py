"""Images larger than a device holds at once: how they are made within its memory, and a decoder that works in strips."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..attention.rates import Rates
from ..machine import free_bytes
from ..models import family_of, in_strips
from ..models.family import TILED_VAES, denoiser
from ..models.peak import Cost, decoder_cost, decoder_peak, forward_cost, forward_peak
from ..strips_file import seconds_of_file
from .tile_norms import crop_places, norms_of_crops

LEAST_ROWS = 8  # of tokens in a strip: with fewer, most of the work is of the rows around it
BAND_ROWS = 256  # of pixels that come from the device at a time where the VAE decodes the whole image
OVERFLOWED = "the model, a LoRA or the VAE overflowed; float16 does so earlier than bfloat16 or float32"
MOST_TOKENS = 2**20  # of a size that is named in place of a larger one
MARGIN = 1.1  # for what libraries take inside their kernels, and what the allocator cannot use

Decode = Callable[[list[torch.Tensor]], list[torch.Tensor]]


@dataclass(frozen=True)
class StageTimes:
    """The least seconds that the stages of an image take, by count, at a device's measured rates.

    passes: of the transformer; forward: of each. decoder: of the VAE, None where that is not known. file: of the file, a
    guess from a small one, while the VAE decodes.
    """

    rates: Rates
    passes: int
    forward: float
    decoder: float | None
    file: float


@dataclass(frozen=True)
class MemoryPlan:
    """How an image is made within a device's memory.

    width, height: in pixels. rows: of tokens in each strip that the transformer sees, see `in_strips`; None: it sees the
    whole image. tiles: whether the VAE decodes in tiles. transformer, decoder: the bytes that they take at most besides
    the weights on the device; decoder is None for a VAE of which that is not known, transformer where several processes
    share the image. available: those there are for them. times: None where no rates were given.
    """

    width: int
    height: int
    rows: int | None
    tiles: bool
    transformer: int | None
    decoder: int | None
    available: int
    times: StageTimes | None = None

    def __str__(self) -> str:
        parts = "the whole image at once" if self.rows is None else f"in strips of {self.rows} rows of tokens"
        tiles = "in tiles" if self.tiles else "the whole image at once"
        lines = [f"memory for {self.width} x {self.height} pixels, of {_gib(self.available)} GiB:"]
        for name, size, how in (("transformer", self.transformer, parts), ("VAE", self.decoder, tiles)):
            lines.append(f"    {name:11}  " + ("not counted" if size is None else f"{_gib(size):>7} GiB, {how}"))
        if (times := self.times) is not None:
            transformer = f"{_time(times.passes * times.forward):>10}, {times.passes} x {_time(times.forward)}"
            rates = (
                f"{times.rates.bytes_per_second / 1e9:.3g} GB/s and {times.rates.flops_per_second / 1e12:.3g} TFLOP/s"
            )
            lines += [
                f"time, at least, by count at {rates} (measured now; kernels that reach less take longer):",
                f"    transformer  {transformer}",
                "    VAE          " + ("not counted" if times.decoder is None else f"{_time(times.decoder):>10}"),
                f"    file         {_time(times.file):>10}, while the VAE decodes",
            ]
        return "\n".join(lines)


def plan_memory(
    pipeline: Any,
    width: int,
    height: int,
    *,
    images: int = 1,
    available: int,
    passes: int = 1,
    rates: Rates | None = None,
    max_sequence_length: int | None = None,
) -> MemoryPlan:
    """Find how a hybrid pipeline makes an image of this size, in pixels, in so many bytes besides the weights.

    images: that go through the transformer together, 2 with guidance (in strips, they go one after another). passes: how
    often they do. rates: of the device (see `attention.rates.probe_rates`); with them the plan says how long it takes.
    max_sequence_length: text tokens, as the pipeline's call has them; None: its default.

    The transformer sees the whole image if that fits, else the largest strips that fit, by halves. Raises ValueError if
    none does, or if the VAE does not fit, in tiles if it can decode in those; it names a smaller size that does. Found by
    counting tensors, not by running anything, in seconds.
    """
    settings = {"images": images, "available": available, "passes": passes, "max_sequence_length": max_sequence_length}
    try:
        return _plan(pipeline, width, height, rates=rates, **settings)
    except _TooLarge as error:
        smaller = partial(_plan, pipeline, **settings)
        fits = _size_that_fits(smaller, (width, height), _token_side(pipeline), error.share)
        raise ValueError(str(error) + (f": {fits[0]} x {fits[1]} should fit" if fits else "")) from None


class _TooLarge(ValueError):
    """Of an image. share: of the bytes that it needs at least, those that are there."""

    def __init__(self, width: int, height: int, needed: int, available: int, where: str = "besides the weights"):
        given = f"{width} x {height} pixels need {_gib(needed)} GiB {where}"
        super().__init__(f"{given}, and {_gib(available)} GiB are there")
        self.share = available / needed


def _size_that_fits(
    plan: Callable[[int, int], MemoryPlan], size: tuple[int, int], unit: int, share: float
) -> tuple[int, int] | None:
    """A smaller size of the same shape, multiples of unit, that `plan` does not refuse; None if none is found soon.

    share: of the bytes that the size needs, those that are there. The size has at most MOST_TOKENS tokens: counting takes
    seconds with as many.
    """
    scale = unit * (MOST_TOKENS / (size[0] * size[1])) ** 0.5
    for _ in range(6):
        # what does not shrink with the image makes more than one round of it
        scale = min(scale, 0.96 * share**0.5)
        smaller = tuple(int(length * scale) // unit * unit for length in size)
        if not all(smaller):
            return None
        try:
            plan(*smaller)
        except _TooLarge as error:
            share = scale**2 * error.share
        except ValueError:  # its strips would be too low
            share = scale**2 / 2
        else:
            return smaller
    return None


def _plan(
    pipeline: Any,
    width: int,
    height: int,
    *,
    images: int,
    available: int,
    passes: int,
    max_sequence_length: int | None,
    rates: Rates | None = None,
) -> MemoryPlan:
    model, size = denoiser(pipeline), f"{width} x {height} pixels"
    if available <= 0:
        raise ValueError(f"{size}: no memory is left on the device beside the weights")
    family, device = family_of(model), torch.device(pipeline._execution_device)
    side = _token_side(pipeline)
    grid = height // side, width // side
    tokens = grid[0] * grid[1] * family.first_layer(model).width * model.dtype.itemsize  # bytes, of one image
    if 2 * tokens > available:  # a block's input and output alone: to count the rest would itself take memory
        raise _TooLarge(width, height, 4 * tokens, available)
    length = family.text_length(max_sequence_length)
    text = family.example_text(model.config, images, length, lambda *shape: torch.zeros(()).expand(shape))
    peak = partial(forward_peak, model, grid, text, device=device, dtype=model.dtype)
    # the whole image takes its tokens several times; where that is too much it is not tried, because tables of positions
    # are made in earnest
    choices = _halves(grid[0])
    if 8 * images * tokens <= available or not choices:
        choices.insert(0, None)
    for rows in choices:
        try:
            transformer = int(peak(rows=rows) * MARGIN)
        except ValueError as error:
            if rows is None:
                raise
            raise ValueError(f"{size} do not fit {_gib(available)} GiB at once, and in strips: {error}") from error
        if transformer <= available:
            break
    else:
        raise _TooLarge(width, height, transformer, available)
    decoder, tiles = _plan_decoder(pipeline, width, height, available)
    times = None
    if rates is not None:
        forward = forward_cost(model, grid, text, rates, device=device, dtype=model.dtype, rows=rows)
        decoding = _decoder_seconds(pipeline, width, height, tiles, rates)
        times = StageTimes(rates, passes, forward.seconds, decoding, seconds_of_file(width, height))
    return MemoryPlan(width, height, rows, tiles, transformer, decoder, available, times)


def _token_side(pipeline: Any) -> int:
    """Pixels along each side of a token."""
    model = denoiser(pipeline)
    return family_of(model).token_pixels(model.config, pipeline.vae_scale_factor)


def _halves(rows: int) -> list[int]:
    """Half of the rows, and so on, down to LEAST_ROWS."""
    found = []
    while rows > LEAST_ROWS:
        rows = max(LEAST_ROWS, -(-rows // 2))
        found.append(rows)
    return found


def plan_shared(pipeline: Any, width: int, height: int, *, available: int) -> MemoryPlan:
    """How each of several processes that share an image makes it: the VAE's tiles are shared, a row of them at a time.

    Raises ValueError where they do not fit.
    """
    decoder, tiles = _plan_decoder(pipeline, width, height, available, whole=False)
    return MemoryPlan(width, height, None, tiles, None, decoder, available)


def _known_decoder(pipeline: Any) -> tuple[nn.Module, int] | None:
    """What takes the memory of decoding, see `Family.decoder`, and the channels of latents; None for another VAE."""
    family = family_of(denoiser(pipeline))
    if not isinstance(pipeline.vae, family.vae_class):
        return None
    return family.decoder(pipeline.vae), family.latent_channels(denoiser(pipeline).config)


def _plan_decoder(
    pipeline: Any, width: int, height: int, available: int, whole: bool = True
) -> tuple[int | None, bool]:
    """The bytes that the VAE takes at most, None where that is not known, and whether it decodes in tiles.

    whole: whether it may decode the whole image at once. Raises ValueError where it fits in neither way.
    """
    vae, known = pipeline.vae, _known_decoder(pipeline)
    # tiled by `decode_in_strips`; others do so by themselves, and are not counted then
    tiled = isinstance(vae, TILED_VAES)
    if known is None or not (tiled or (whole and not vae.use_tiling)):
        return None, False
    decoder, channels = known
    on = {"device": torch.device(pipeline._execution_device), "dtype": vae.dtype}

    def count(latents: tuple[int, int], images: int = 1) -> int:
        return decoder_peak(decoder, (channels, *latents), images=images, **on)

    latents = height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor
    if not tiled:
        needed = int(count(latents) * MARGIN)
        if needed > available:
            where = "where the VAE decodes them at once (with vae_tiling it needs less)"
            raise _TooLarge(width, height, needed, available, where)
        return needed, False
    if whole and not vae.use_tiling and (needed := int(count(latents) * MARGIN)) <= available:
        return needed, False
    tile = tuple(min(side, vae.tile_latent_min_size) for side in latents)
    places, crop = crop_places(latents, vae.tile_latent_min_size)
    rows_of_tiles = 3 * 3 * vae.tile_sample_min_size * width * vae.dtype.itemsize  # two, and the strip made of them
    needed = int(max(count(tile) + rows_of_tiles, count(crop, len(places))) * MARGIN)
    if needed > available:
        raise _TooLarge(width, height, needed, available, "where the VAE decodes them in tiles")
    return needed, True


def _decoder_seconds(pipeline: Any, width: int, height: int, tiles: bool, rates: Rates) -> float | None:
    vae, known = pipeline.vae, _known_decoder(pipeline)
    if known is None or not (isinstance(vae, TILED_VAES) or not vae.use_tiling):
        return None
    decoder, channels = known
    on = {"device": torch.device(pipeline._execution_device), "dtype": vae.dtype}

    def cost(latents: tuple[int, int]) -> Cost:
        return decoder_cost(decoder, (channels, *latents), rates, **on)

    latents = height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor
    if not tiles:
        return cost(latents).seconds
    size = vae.tile_latent_min_size
    step, tile = int(size * (1 - vae.tile_overlap_factor)), tuple(min(side, size) for side in latents)
    decoded = [sum(min(size, side - start) for start in range(0, side, step)) for side in latents]
    places, crop = crop_places(latents, size)
    return cost(tile).seconds * decoded[0] * decoded[1] / (tile[0] * tile[1]) + cost(crop).seconds * len(places)


def free_beside_weights(pipeline: Any, device: torch.device) -> int:
    """Bytes that are free on a device for an image, once the weights are there that come as a whole when they are used."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module) and hasattr(part, "_hf_hook")]
    coming = [sum(weight.nbytes for weight in part.parameters() if not weight.is_meta) for part in parts]
    return free_bytes(device) - max(coming, default=0)


def make_within(pipeline: Any, plan: MemoryPlan, **arguments: Any) -> Image.Image:
    """Call a text-to-image pipeline as planned, for one image. arguments: of the call."""
    return Image.fromarray(np.concatenate(list(strips_within(pipeline, plan, **arguments))))


def strips_within(
    pipeline: Any, plan: MemoryPlan, *, decode: Decode | None = None, **arguments: Any
) -> Iterator[np.ndarray]:
    """Call a text-to-image pipeline as planned, for one image: uint8 [rows, width, 3], from the top, never held whole.

    decode: see `decode_in_strips`. arguments: of the call. The transformer has done its part when this returns; the VAE
    decodes while the strips are taken. Raises ValueError, of a strip too, where pixels are not finite.
    """
    strips = contextlib.nullcontext() if plan.rows is None else in_strips(denoiser(pipeline), plan.rows)
    with strips:
        if not isinstance(pipeline.vae, TILED_VAES):
            return iter([np.asarray(pipeline(**arguments).images[0])])
        latents = pipeline(**arguments, output_type="latent").images
    family = family_of(denoiser(pipeline))
    side = _token_side(pipeline)
    latents = family.sampled_latents(pipeline.vae, latents)
    latents = family.vae_latents(pipeline.vae, latents, (plan.height // side, plan.width // side))
    return _decode_and_free(pipeline, latents.to(pipeline.vae.dtype), plan.tiles, decode)


def _decode_and_free(pipeline: Any, latents: torch.Tensor, tiles: bool, decode: Decode | None) -> Iterator[np.ndarray]:
    if tiles:
        yield from decode_in_strips(pipeline.vae, latents, decode)
    else:
        with torch.no_grad():
            image = pipeline.vae.decode(latents, return_dict=False)[0]
        for top in range(0, image.shape[2], BAND_ROWS):
            yield _pixels(image[:, :, top : top + BAND_ROWS])
    pipeline.maybe_free_model_hooks()


@torch.no_grad()
def decode_in_strips(vae: nn.Module, latents: torch.Tensor, decode: Decode | None = None) -> Iterator[np.ndarray]:
    """Decode latents [1, C, h, w], as the VAE takes them, to strips of the image: uint8 [rows, width, 3], from the top.

    Tiles are cut and blended as by diffusers' own `tiled_decode`; two rows of them are held at a time. Their group norms
    have one image's statistics, see `tile_norms`.

    decode: gives the decoded tiles of a row of tiles of latents, such as `parallel.decoding_together`; None: the VAE
    decodes one after another. Raises ValueError where pixels are not finite.
    """
    size, pixels, overlap = vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor
    step, blended = int(size * (1 - overlap)), int(pixels * overlap)
    decode = decode or (lambda tiles: [vae.decode(tile, return_dict=False)[0] for tile in tiles])
    rows = (
        decode([latents[:, :, top : top + size, left : left + size] for left in range(0, latents.shape[3], step)])
        for top in range(0, latents.shape[2], step)
    )

    def decode_crops() -> None:
        places, (height, width) = crop_places(latents.shape[2:], size)
        vae.decode(torch.cat([latents[:, :, y : y + height, x : x + width] for y, x in places]))

    several = max(latents.shape[2:]) > step
    with norms_of_crops(vae, vae.decoder, decode_crops) if several else contextlib.nullcontext():
        for strip in blended_rows(vae, rows, blended, pixels - blended):
            yield _pixels(strip)


def _pixels(strip: torch.Tensor) -> np.ndarray:
    """uint8 [rows, width, 3] of what a VAE gives, [1, 3, rows, width], as diffusers makes them."""
    strip = (strip[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu()
    if strip.isnan().any():
        raise ValueError(f"the image is not finite: {OVERFLOWED}")
    return (strip * 255).round().numpy().astype(np.uint8)


def blended_rows(vae: nn.Module, rows: Iterable[list[torch.Tensor]], blended: int, kept: int) -> Iterator[torch.Tensor]:
    """Join tiles [B, C, h, w] that overlap, given row by row, to strips from the top, as diffusers' VAEs do.

    blended: over how many rows and columns tiles are blended into their neighbours; kept: of each tile, from the top left.
    """
    above: list[torch.Tensor] = []
    for row in rows:
        for i, tile in enumerate(row):  # both blend into their second argument
            if above:
                vae.blend_v(above[i], tile, blended)
            if i:
                vae.blend_h(row[i - 1], tile, blended)
        yield torch.cat([tile[:, :, :kept, :kept] for tile in row], 3)
        above = row


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**30 else f"{size / 2**30:.2g}"


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
