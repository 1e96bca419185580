"""Images larger than a device holds at once: how they are made within its memory, and a decoder that works in strips."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..attention.rates import Rates
from ..machine import free_bytes
from ..models import family_of, in_strips, is_hybrid
from ..models.family import TILED_VAES, denoiser
from ..models.peak import Cost, decoder_cost, decoder_peak, forward_cost, forward_peak, module_peak
from ..strips_file import seconds_of_file
from .sit import SiTPipeline
from .tile_norms import crop_places, norms_of_crops
from .tiles import Share, blended_rows, in_rows, one_by_one

LEAST_ROWS = 8  # of tokens in a strip: with fewer, most of the work is of the rows around it
BAND_ROWS = 256  # of pixels that come from the device at a time where the VAE decodes the whole image
OVERFLOWED = "the model, a LoRA or the VAE overflowed; float16 does so earlier than bfloat16 or float32"
MOST_TOKENS = 2**20  # of a size that is named in place of a larger one
MARGIN = 1.1  # for what libraries take inside their kernels, and what the allocator cannot use


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
    whole image. tiles: whether the VAE decodes, and encodes, in tiles. transformer, decoder: the bytes that they take at
    most besides the weights on the device; decoder is None for a VAE of which that is not known. available: those there
    are for them. times: None where no rates were given. encoder: like decoder, of a stage that begins with an enlarged image;
    None of others. weights: bytes of the pipeline's on the device. processes: that share the image; the figures are of one.
    """

    width: int
    height: int
    rows: int | None
    tiles: bool
    transformer: int
    decoder: int | None
    available: int
    times: StageTimes | None = None
    encoder: int | None = None
    weights: int | None = None
    processes: int = 1

    def __str__(self) -> str:
        whole, shared = "the whole image at once", ""
        parts = whole if self.rows is None else f"in strips of {self.rows} rows of tokens"
        tiles = "in tiles" if self.tiles else whole
        if self.processes > 1:
            parts, shared = "the rows of one process", f" in each of {self.processes} processes"
        available = f"of {_gib(self.available)} GiB besides the weights{shared}"
        lines = [f"memory for {self.width} x {self.height} pixels, {available}:"]
        rows = [] if self.weights is None else [("weights", self.weights, "on the device")]
        rows += [("transformer", self.transformer, parts), ("VAE", self.decoder, f"decodes {tiles}")]
        rows += [] if self.encoder is None else [("VAE", self.encoder, f"encodes {tiles}")]
        for name, size, how in rows:
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
    processes: int = 1,
    enlarges: bool = False,
) -> MemoryPlan:
    """Find how a pipeline makes an image of this size, in pixels, in so many bytes besides the weights.

    pipeline: a text-to-image pipeline, hybrid or dense, or a SiTPipeline. images: that go through the transformer together,
    2 with guidance (in strips, they go one after another). passes: how often they do. rates: of the device (see
    `attention.rates.probe_rates`); with them the plan says how long it takes. max_sequence_length: text tokens, as the
    pipeline's call has them; None: its default. processes: that share the image, see `parallel.shard`; the plan is of the
    one that holds most. enlarges: whether the VAE encodes an enlarged image first; what an upscaler takes is not counted.

    The transformer sees the whole image if that fits, else, of a hybrid in one process, the largest strips that fit, by
    halves. Raises ValueError if none does, or if the VAE does not fit, in tiles if it can work in those; it names a smaller
    size that does. Found by counting tensors, not by running anything, in seconds.
    """
    settings = {"images": images, "available": available, "passes": passes, "max_sequence_length": max_sequence_length}
    settings |= {"processes": processes, "enlarges": enlarges}
    try:
        return _plan(pipeline, width, height, rates=rates, **settings)
    except _TooLarge as error:
        smaller = partial(_plan, pipeline, **settings)
        fits = _size_that_fits(smaller, (width, height), _token_side(pipeline), error.share)
        told = [f": {fits[0]} x {fits[1]} should fit"] if fits else []
        raise ValueError("; ".join([str(error) + "".join(told), *error.hints])) from None


class _TooLarge(ValueError):
    """Of an image. share: of the bytes that it needs at least, those that are there. hints: what else would help."""

    def __init__(
        self,
        width: int,
        height: int,
        needed: int,
        available: int,
        where: str = "besides the weights",
        hints: tuple[str, ...] = (),
    ):
        given = f"{width} x {height} pixels need {_gib(needed)} GiB {where}"
        super().__init__(f"{given}, and {_gib(available)} GiB are there")
        self.share, self.hints = available / needed, hints


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
    processes: int,
    enlarges: bool,
    rates: Rates | None = None,
) -> MemoryPlan:
    model, size = denoiser(pipeline), f"{width} x {height} pixels"
    if available <= 0:
        raise ValueError(f"{size}: no memory is left on the device beside the weights")
    device = torch.device(pipeline._execution_device)
    side = _token_side(pipeline)
    grid = height // side, width // side
    channels, text = _channels_and_text(pipeline, images, max_sequence_length)
    tokens = -(-grid[0] // processes) * grid[1] * channels * model.dtype.itemsize  # bytes, of one image
    too_large = partial(_TooLarge, width, height, available=available, **_remedies(pipeline, processes))
    if 2 * tokens > available:  # a block's input and output alone: to count the rest would itself take memory
        raise too_large(needed=4 * tokens)
    peak = partial(forward_peak, model, grid, text, device=device, dtype=model.dtype, processes=processes)
    # the whole image takes its tokens several times; where that is too much it is not tried, because tables of positions
    # are made in earnest
    choices = _halves(grid[0]) if processes == 1 and is_hybrid(model) else []
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
        raise too_large(needed=transformer)
    decoder, encoder, tiles = _plan_vae(pipeline, width, height, available, whole=processes == 1, enlarges=enlarges)
    times = None
    if rates is not None:
        forward = forward_cost(model, grid, text, rates, device=device, dtype=model.dtype, rows=rows)
        decoding = _decoder_seconds(pipeline, width, height, tiles, rates)
        times = StageTimes(rates, passes, forward.seconds, decoding, seconds_of_file(width, height))
    weights, _ = _weights_on(pipeline, device)
    plan = MemoryPlan(width, height, rows, tiles, transformer, decoder, available, times)
    return replace(plan, encoder=encoder, weights=weights, processes=processes)


def _remedies(pipeline: Any, processes: int) -> dict[str, Any]:
    """How an image that is too large for the transformer is told of, and what would help besides a smaller one."""
    model = denoiser(pipeline)
    if processes > 1:
        where = f"besides the weights in each of {processes} processes"
        return {"where": where, "hints": ("or start more processes",)}
    if isinstance(pipeline, SiTPipeline) or is_hybrid(model) or family_of(model).skip_connections:
        return {}
    return {"hints": ("a hybrid of this model could make them in strips (hybriddit convert, or --adapter)",)}


def _channels_and_text(
    pipeline: Any, images: int, max_sequence_length: int | None
) -> tuple[int, dict[str, torch.Tensor]]:
    """Channels of a token in the transformer, and what stands for the text, or the labels, of so many images."""
    model = denoiser(pipeline)
    if isinstance(pipeline, SiTPipeline):
        labels = torch.zeros(images, dtype=torch.long)
        return model.config.num_attention_heads * model.config.attention_head_dim, {"class_labels": labels}
    family = family_of(model)
    length = family.text_length(max_sequence_length)
    text = family.example_text(model.config, images, length, lambda *shape: torch.zeros(()).expand(shape))
    return family.first_layer(model).width, text


def _token_side(pipeline: Any) -> int:
    """Pixels along each side of a token."""
    model = denoiser(pipeline)
    if isinstance(pipeline, SiTPipeline):
        return pipeline.vae_scale_factor * model.config.patch_size
    return family_of(model).token_pixels(model.config, pipeline.vae_scale_factor)


def _halves(rows: int) -> list[int]:
    """Half of the rows, and so on, down to LEAST_ROWS."""
    found = []
    while rows > LEAST_ROWS:
        rows = max(LEAST_ROWS, -(-rows // 2))
        found.append(rows)
    return found


class _Vae(NamedTuple):
    """What takes the memory of encoding and of decoding, see `Family.encoder`, and the channels of latents."""

    encoder: nn.Module
    decoder: nn.Module
    channels: int


def _known_vae(pipeline: Any) -> _Vae | None:
    """The parts of a pipeline's VAE; None for one of another kind or that changes its dtype, and where there is none."""
    model, vae = denoiser(pipeline), pipeline.vae
    if isinstance(pipeline, SiTPipeline):
        return _Vae(vae.encoder, vae.decoder, model.config.in_channels) if isinstance(vae, TILED_VAES) else None
    family = family_of(model)
    if not isinstance(vae, family.vae_class) or _upcasts(pipeline):
        return None
    return _Vae(family.encoder(vae), family.decoder(vae), family.latent_channels(model.config))


def _decodes_here(pipeline: Any) -> bool:
    """Whether the latents are decoded here, in tiles or at once; others are by the pipeline, in its own tiles if any."""
    checked = getattr(pipeline, "safety_checker", None) is not None  # which looks at images that the pipeline decodes
    vae = pipeline.vae
    return isinstance(vae, TILED_VAES) and vae.config.out_channels == 3 and not checked and not _upcasts(pipeline)


def _upcasts(pipeline: Any) -> bool:
    """Whether the pipeline decodes in float32 with a VAE in float16, as SDXL's, which overflows otherwise."""
    vae = pipeline.vae
    return hasattr(pipeline, "upcast_vae") and vae.dtype == torch.float16 and vae.config.force_upcast


def _plan_vae(
    pipeline: Any, width: int, height: int, available: int, *, whole: bool = True, enlarges: bool = False
) -> tuple[int | None, int | None, bool]:
    """The bytes that the VAE takes at most to decode and to encode, and whether it does so in tiles.

    None for what is not known, or not done. whole: whether it may see the whole image at once. enlarges: whether it encodes.
    Raises ValueError where it fits in neither way.
    """
    vae, known, tiled = pipeline.vae, _known_vae(pipeline), _decodes_here(pipeline)
    if known is None or not (tiled or (whole and not vae.use_tiling)):
        return None, None, False
    ways = [False] if not tiled or (whole and not vae.use_tiling) else []
    for tiles in [*ways, True] if tiled else ways:
        where = "in tiles" if tiles else "at once (with vae_tiling it needs less)"
        decoder = int(_decoder_bytes(pipeline, known, width, height, tiles) * MARGIN)
        encoder = int(_encoder_bytes(pipeline, known, width, height, tiles) * MARGIN) if enlarges else None
        needed = max(decoder, encoder or 0)
        if needed <= available:
            return decoder, encoder, tiles
    does = "decodes" if needed == decoder else "encodes"
    raise _TooLarge(width, height, needed, available, f"where the VAE {does} them {where}")


def _decoder_bytes(pipeline: Any, known: _Vae, width: int, height: int, tiles: bool) -> int:
    """What decoding takes; in tiles two rows of them are held, and the strip made of them, see `decode_in_strips`."""
    vae, scale = pipeline.vae, pipeline.vae_scale_factor
    latents = height // scale, width // scale

    def count(latents: tuple[int, int], images: int = 1) -> int:
        on = {"device": torch.device(pipeline._execution_device), "dtype": vae.dtype}
        return decoder_peak(known.decoder, (known.channels, *latents), images=images, **on)

    if not tiles:
        return count(latents)
    tile = tuple(min(side, vae.tile_latent_min_size) for side in latents)
    places, crop = crop_places(latents, vae.tile_latent_min_size)
    rows_of_tiles = 3 * 3 * vae.tile_sample_min_size * width * vae.dtype.itemsize
    return max(count(tile) + rows_of_tiles, count(crop, len(places)))


def _encoder_bytes(pipeline: Any, known: _Vae, width: int, height: int, tiles: bool) -> int:
    """What encoding takes; in tiles all latents are held, twice at last, see `cascade.encode_enlarged`."""
    vae, scale, pixels = pipeline.vae, pipeline.vae_scale_factor, (height, width)

    def count(pixels: tuple[int, int], images: int = 1) -> int:
        sample = torch.zeros(()).expand(images, 1 if vae.config.get("in_channels") == 1 else 3, *pixels)
        return module_peak(known.encoder, {"sample": sample}, torch.device(pipeline._execution_device), vae.dtype)

    if not tiles:
        return count(pixels)
    side = vae.tile_sample_min_size
    places, crop = crop_places(pixels, side, side // vae.tile_latent_min_size)
    latents = known.channels * (height // scale) * (width // scale) * (vae.dtype.itemsize + torch.float32.itemsize)
    return max(count(tuple(min(side, length) for length in pixels)) + latents, count(crop, len(places)))


def _decoder_seconds(pipeline: Any, width: int, height: int, tiles: bool, rates: Rates) -> float | None:
    vae, known = pipeline.vae, _known_vae(pipeline)
    if known is None or not (_decodes_here(pipeline) or not vae.use_tiling):
        return None
    on = {"device": torch.device(pipeline._execution_device), "dtype": vae.dtype}

    def cost(latents: tuple[int, int]) -> Cost:
        return decoder_cost(known.decoder, (known.channels, *latents), rates, **on)

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
    return free_bytes(device) - _weights_on(pipeline, device)[1]


def _weights_on(pipeline: Any, device: torch.device) -> tuple[int, int]:
    """Bytes of a pipeline's weights on a device while it is used, and of those the largest that come as a whole then."""
    coming = staying = 0
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            weights = [weight for weight in part.parameters() if not weight.is_meta]
            if hasattr(part, "_hf_hook"):
                coming = max(coming, sum(weight.nbytes for weight in weights))
            else:
                staying += sum(weight.nbytes for weight in weights if weight.device.type == device.type)
    return staying + coming, coming


def make_within(pipeline: Any, plan: MemoryPlan, **arguments: Any) -> Image.Image:
    """Call a pipeline as planned, for one image. arguments: of the call."""
    return Image.fromarray(np.concatenate(list(strips_within(pipeline, plan, **arguments))))


def strips_within(
    pipeline: Any, plan: MemoryPlan, *, share: Share | None = None, **arguments: Any
) -> Iterator[np.ndarray]:
    """Call a pipeline as planned, for one image: uint8 [rows, width, 3], from the top, never held whole.

    share: see `decode_in_strips`. arguments: of the call. The transformer has done its part when this returns; the VAE
    decodes while the strips are taken. Raises ValueError, of a strip too, where pixels are not finite.
    """
    strips = contextlib.nullcontext() if plan.rows is None else in_strips(denoiser(pipeline), plan.rows)
    with strips:
        if not _decodes_here(pipeline):
            return iter([np.asarray(pipeline(**arguments).images[0].convert("RGB"))])
        latents = pipeline(**arguments, output_type="latent").images
    if isinstance(pipeline, SiTPipeline):
        latents = pipeline.vae_latents(latents)
    else:
        family, side = family_of(denoiser(pipeline)), _token_side(pipeline)
        latents = family.sampled_latents(pipeline.vae, latents)
        latents = family.vae_latents(pipeline.vae, latents, (plan.height // side, plan.width // side))
    return _decode_and_free(pipeline, latents.to(pipeline.vae.dtype), plan.tiles, share)


def _decode_and_free(pipeline: Any, latents: torch.Tensor, tiles: bool, share: Share | None) -> Iterator[np.ndarray]:
    if tiles:
        yield from decode_in_strips(pipeline.vae, latents, share)
    else:
        with torch.no_grad():
            image = pipeline.vae.decode(latents, return_dict=False)[0]
        for top in range(0, image.shape[2], BAND_ROWS):
            yield _pixels(image[:, :, top : top + BAND_ROWS])
    pipeline.maybe_free_model_hooks()


@torch.no_grad()
def decode_in_strips(vae: nn.Module, latents: torch.Tensor, share: Share | None = None) -> Iterator[np.ndarray]:
    """Decode latents [1, C, h, w], as the VAE takes them, to strips of the image: uint8 [rows, width, 3], from the top.

    Tiles are cut and blended as by diffusers' own `tiled_decode`; two rows of them are held at a time. Their group norms
    have one image's statistics, see `tile_norms`.

    share: of the tiles among processes that all decode these latents, see `parallel.shared_tiles`. Raises ValueError where
    pixels are not finite.
    """
    size, pixels, overlap = vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor
    step, blended = int(size * (1 - overlap)), int(pixels * overlap)
    tops, lefts = (range(0, length, step) for length in latents.shape[2:])

    def decode(top: int, left: int) -> torch.Tensor:
        return vae.decode(latents[:, :, top : top + size, left : left + size], return_dict=False)[0]

    decoded = (share or one_by_one)([partial(decode, top, left) for top in tops for left in lefts], latents)
    rows = in_rows(decoded, len(lefts))

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


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**30 else f"{size / 2**30:.2g}"


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
