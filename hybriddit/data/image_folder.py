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
from ..images import IMAGE_ENDINGS, open_image
from ..models import family_of
from .latents import LatentData, LatentInfo, build_latents, encode_prompts
from .prompts import read_text


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
    cache: str | Path | None = None,
    progress: bool = True,
) -> LatentData:
    """Encode the images under `folder` and their captions; images are scaled and centre-cropped to height x width.

    Captions: see `captioned_images`. Images that cannot be read and images without a caption are left out: their
    number is printed, and `skipped.json` in the cache lists them with the reasons.

    height, width: in pixels. steps, guidance_scale: for the samples drawn while training; guidance_scale is also the
        value of a guidance embedding.
    cache: a folder to keep the set in, see `build_latents`; None keeps it in memory.

    Raises FileNotFoundError for a folder that does not exist, and ValueError where none of its images can be used.
    """
    captions = captioned_images(folder)
    good, skipped = usable(captions, progress)
    if skipped:
        first = next(iter(skipped.items()))
        print(f"{len(skipped)} of {len(captions)} images in {folder} are left out: {first[0]} ({first[1]}), ...")
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


def captioned_images(folder: str | Path) -> dict[Path, str | None]:
    """Every image file under `folder`, sorted by path, with its caption or None.

    A caption is the text of `<image>.txt` beside the image, or the "text" of the image's line in
    `folder/metadata.jsonl`, whose "file_name" is relative to `folder`: the two layouts of public data sets. Raises
    FileNotFoundError where there is no folder, and ValueError if it has no images or a damaged metadata.jsonl.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder at {str(folder)!r} (data.folder)")
    listed: dict[Path, str] = {}
    table = folder / "metadata.jsonl"
    if table.is_file():
        for number, line in enumerate(read_text(table).splitlines(), 1):
            try:
                values = json.loads(line)
                listed[folder / values["file_name"]] = str(values["text"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{table}, line {number}: not of the form {{"file_name": ..., "text": ...}}') from None
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if not images:
        raise ValueError(f"no images in {folder}: {', '.join(IMAGE_ENDINGS)} are read")
    return {path: listed.get(path, _caption_beside(path)) for path in images}


def _caption_beside(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    return " ".join(text.read_text(encoding="utf-8", errors="replace").split()) if text.is_file() else None


def usable(captions: dict[Path, str | None], progress: bool = True) -> tuple[list[Path], dict[str, str]]:
    """The images that have a caption and can be decoded completely; and {path: reason} of the others."""
    good, skipped = [], {}
    for path, caption in tqdm(captions.items(), desc="reading images", unit="image", disable=not progress):
        try:
            if not caption:
                raise ValueError("it has no caption")
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
