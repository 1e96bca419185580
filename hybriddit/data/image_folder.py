"""Training images from a folder of files, with captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from ..files import write_json
from ..images import open_image
from ..models import family_of
from .captions import CaptionedFolder, read_captions
from .image_files import say
from .latents import LatentData, LatentInfo, build_latents, encode_prompts


def image_folder(
    pipeline,
    folder: str | Path,
    *,
    height: int,
    width: int,
    steps: int,
    guidance_scale: float,
    max_sequence_length: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> LatentData:
    """Encode the images under `folder` and their captions; images are scaled and centre-cropped to height x width.

    Captions: see `read_captions`. Images that cannot be read and images without a caption are left out: their number is
    printed, and `skipped.json` in the cache lists them with the reasons. What else is passed over is printed too.

    height, width: in pixels. steps, guidance_scale: for the samples drawn while training; guidance_scale is also the
        value of a guidance embedding.
    seed: which of an image's captions is taken, where it has several.
    cache: a folder to keep the set in, see `build_latents`; None keeps it in memory.

    Raises FileNotFoundError for a folder that does not exist, and ValueError where none of its images can be used.
    """
    found = read_captions(folder, seed)
    captions = found.captions
    for note in found.notes:
        say(note)
    good, skipped = usable(found, progress)
    if skipped:
        first = next(iter(skipped.items()))
        say(f"{len(skipped)} of {len(captions)} images in {folder} are left out: {first[0]} ({first[1]}), ...")
    if not good:
        raise ValueError(f"none of the {len(captions)} images in {folder} can be used: {next(iter(skipped.items()))}")
    info = LatentInfo(height, width, steps, guidance_scale, max_sequence_length, teacher_made=False)

    def make_batch(rows: range, empty: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        text = encode_prompts(pipeline, [captions[good[i]] for i in rows], max_sequence_length)
        images = [read_image(good[i], height, width) for i in rows]
        return {"latents": encode_images(pipeline, images), **text}

    stats = [(str(path.relative_to(folder)), path.stat().st_size, captions[path]) for path in good]
    data = build_latents(
        pipeline,
        info,
        make_batch,
        count=len(good),
        batch_size=batch_size,
        settings={"files": hashlib.sha256(json.dumps(stats).encode()).hexdigest()},
        cache=cache,
        desc="encoding images",
        progress=progress,
    )
    if cache is not None:  # only now is it certain that the cache belongs to this folder
        write_json(Path(cache) / "skipped.json", skipped)
    return data


def captioned_images(folder: str | Path, seed: int = 0) -> dict[Path, str | None]:
    """Every image file under `folder`, sorted by path, with its caption or None; see `read_captions`."""
    return read_captions(folder, seed).captions


def usable(found: CaptionedFolder, progress: bool = True) -> tuple[list[Path], dict[str, str]]:
    """The images that have a caption and can be decoded completely; and {path: reason} of the others."""
    good, skipped = [], {}
    for path, caption in tqdm(found.captions.items(), desc="reading images", unit="image", disable=not progress):
        try:
            if not caption:
                raise ValueError(found.reasons.get(path, "it has no caption"))
            open_image(path)  # as `read_image` will
            good.append(path)
        except (OSError, ValueError) as error:
            skipped[str(path)] = str(error)
    return good, skipped


def read_image(path: Path, height: int, width: int) -> Image.Image:
    """Read an RGB image of this size: turned upright by its EXIF data, scaled to cover the size, centre-cropped."""
    # PIL crops to fractions of a pixel, torchvision's v2 to whole ones: 378 of 400 random sizes came out different
    return ImageOps.fit(open_image(path), (width, height), Image.Resampling.LANCZOS)


@torch.no_grad()
def encode_images(pipeline, images: Sequence[Image.Image]) -> torch.Tensor:
    """Latents of images as the transformer takes them."""
    pixels = pipeline.image_processor.preprocess(list(images)).to(pipeline.vae.device, pipeline.vae.dtype)
    return family_of(pipeline.transformer).encode_images(pipeline.vae, pixels)
