"""Training images from a folder of files, with captions."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

from ..files import read_json, write_json
from ..images import image_size, open_image
from ..models import family_of
from ..models.family import denoiser
from .buckets import MOST_ENLARGED, Size, choose_bucket, describe_buckets
from .captions import read_captions
from .image_files import reasons_named, say
from .latents import LatentData, LatentInfo, Place, build_latents, find_place
from .pictures import Picture, examine
from .shards import ALONE, Processes
from .teacher import Teacher


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
    max_images: int | None = None,
    buckets: Sequence[Size] | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> LatentData:
    """Encode the images under `folder` and their captions; images are scaled and centre-cropped.

    pipeline: or a `teacher.Teacher`, whose text encoders are loaded apart; then `processes` and the rest of what it has
        are its own.

    Captions: see `read_captions`. Images that cannot be read and images without a caption are left out: their number is
    printed, and `skipped.json` in the cache lists them with the reasons. What else is passed over is printed too.

    height, width: in pixels; all images are of this size, unless there are buckets. steps, guidance_scale: for the
        samples drawn while training; guidance_scale is also the value of a guidance embedding.
    seed: which of an image's captions is taken, where it has several.
    max_images: take the first so many images with captions, by path, fewer if some of them cannot be read; None: all.
    buckets: the sizes (height, width) of images, of which each has the one that fits it best, see `choose_bucket`. An
        image that none fits without enlarging it more than twice is left out.
    cache: a folder to keep the set in; None keeps it in memory. The set is that of the folder as it is now: an image
        has its row by its content, caption and size, wherever it lies, and only rows that the cache does not have are made.
        With a finished cache no image is opened, and nothing is written.
    processes: those that share the work, if there are several; every one of them calls this, with a cache.

    Raises FileNotFoundError for a folder that does not exist, and ValueError where none of its images can be used, or
    for a cache made with other settings.
    """
    folder = Path(folder)
    found = read_captions(folder, seed)
    captions = first_captioned(found.captions, max_images)
    if len(captions) < len(found.captions) and processes.rank == 0:
        say(f"{len(captions)} of the {len(found.captions)} images in {folder} are taken (max_images {max_images})")
    info = LatentInfo(height, width, steps, guidance_scale, max_sequence_length, teacher_made=False)
    settings = {"height": height, "width": width, "max_sequence_length": max_sequence_length, "teacher_made": False}
    teacher = Teacher.of(pipeline, max_sequence_length, cache, processes)
    place = find_place(teacher, cache, settings, ("vae",), says=processes.rank == 0)
    if "files" in place.record:
        if buckets is not None:
            raise ValueError(
                f"the cache {place.folder} was made by version 0.1, without buckets: use another data.cache"
            )
        good, skipped = _files_of_version_0_1(place, folder, captions)
        content, wanted, rows, sizes = None, list(range(len(good))), {}, None
    else:
        captioned = [path for path, caption in captions.items() if caption]
        pictures = examine(folder, captioned, place.folder, progress=progress, processes=processes)
        reasons = {path: picture.error for path, picture in pictures.items()}
        sizes = None
        if buckets is not None:
            read = {path: picture for path, picture in pictures.items() if picture.error is None}
            sizes, too_small = _assign(read, buckets, says=processes.rank == 0)
            reasons |= too_small
        reasons |= {path: found.reasons.get(path, "it has no caption") for path in captions if path not in reasons}
        skipped = {str(path): reasons[path] for path in captions if reasons[path] is not None}
        good = [path for path in captioned if reasons[path] is None]
        own = dict.fromkeys(good, (height, width)) if sizes is None else {path: sizes[path] for path in good}
        keys = {path: _key(pictures[path].sha256, captions[path], own[path], (height, width)) for path in good}
        content = list(keys.values())
        numbers = {key: number for number, key in enumerate(place.record.get("rows", []))}
        for path in sorted(good, key=own.__getitem__):  # images of one size in a row, which are encoded together
            numbers.setdefault(keys[path], len(numbers))
        wanted = [numbers[key] for key in content]
        rows = {"rows": list(numbers)}
        known = set(place.record.get("rows", content))
        changed = [path for path, key in zip(good, content, strict=True) if key not in known]
        if changed and processes.rank == 0:
            say(
                f"{len(changed)} of {len(good)} images, captions or sizes are new or have changed since {place.folder} was "
                f"made ({changed[0]}, ...): these alone are encoded"
            )
    for note in found.notes if processes.rank == 0 else ():
        say(note)
    if skipped and processes.rank == 0:
        say(f"{len(skipped)} of {len(captions)} images in {folder} are left out: {reasons_named(skipped)}")
    if not good:
        raise ValueError(f"none of the {len(captions)} images in {folder} can be used: {next(iter(skipped.items()))}")
    paths = dict(zip(wanted, good, strict=True))
    row_sizes = None if sizes is None else {row: sizes[path] for row, path in paths.items()}

    def make_batch(rows: range, *text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        images = [read_image(paths[row], *(row_sizes[row] if row_sizes else (height, width))) for row in rows]
        return {"latents": encode_images(teacher.pipeline, images)}

    data = build_latents(
        teacher,
        info,
        make_batch,
        place,
        wanted=wanted,
        prompts={row: captions[path] for row, path in paths.items()},
        rows=rows,
        content=content,
        sizes=row_sizes,
        batch_size=batch_size,
        desc="encoding images",
        progress=progress,
    )
    if place.folder is not None and processes.rank == 0:
        _list_skipped(place.folder / "skipped.json", skipped)
    return data


def first_captioned(captions: dict[Path, str | None], count: int | None) -> dict[Path, str | None]:
    """The images up to the `count`-th that has a caption; None: all."""
    if count is None:
        return captions
    ends = [number for number, caption in enumerate(captions.values(), 1) if caption][:count]
    return dict(islice(captions.items(), ends[-1] if ends else 0)) if len(ends) == count else captions


def _assign(
    pictures: Mapping[Path, Picture], buckets: Sequence[Size], *, says: bool
) -> tuple[dict[Path, Size], dict[Path, str]]:
    """Each picture's bucket, and why those are left out that are too small for theirs. says: print their numbers."""
    sizes, reasons, enlarged = {}, {}, []
    for path, picture in pictures.items():
        width, height = (picture.width, picture.height) if picture.width else image_size(path)
        size, scale = choose_bucket(width, height, buckets)
        if scale > MOST_ENLARGED:
            reasons[path] = (
                f"it is {height} x {width} pixels, and its bucket {size[0]} x {size[1]} would enlarge it {scale:.2g} times, "
                f"more than {MOST_ENLARGED:g}: add a smaller size to data.buckets"
            )
        else:
            sizes[path] = size
            enlarged += [path] if scale > 1 else []
    if says:
        say(f"buckets, height x width (images): {describe_buckets(dict(sorted(Counter(sizes.values()).items())))}")
    if says and enlarged:
        say(
            f"{len(enlarged)} of {len(sizes)} images are smaller than their bucket and are enlarged: {enlarged[0]}, ..."
        )
    return sizes, reasons


def count_buckets(folder: str | Path, buckets: Sequence[Size], max_images: int | None = None) -> dict[Size, int]:
    """How many images of a folder each bucket has, by the images' headers alone; buckets without any are left out.

    Raises as `read_captions`, and ValueError where no image can be used.
    """
    counts = Counter()
    for path, caption in first_captioned(read_captions(folder).captions, max_images).items():
        if caption:
            try:
                size, scale = choose_bucket(*image_size(path), buckets)
            except (OSError, ValueError):  # counted where they are read
                continue
            counts[size] += scale <= MOST_ENLARGED
    if not counts.total():
        raise ValueError(f"none of the images in {folder} can be used: data.buckets has no size for them")
    return {size: counts[size] for size in sorted(counts) if counts[size]}


def _key(sha256: str, caption: str, size: Size, usual: Size) -> str:
    """What a row is of. usual: the size of a set without buckets, whose rows a set with buckets has too."""
    what = f"{sha256} {caption}" if size == usual else f"{size[0]}x{size[1]} {sha256} {caption}"
    return hashlib.sha256(what.encode()).hexdigest()


def _list_skipped(path: Path, skipped: dict[str, str]) -> None:
    """Write the list, unless it is there: the same files, wherever their folder was then."""

    def names(listed: dict[str, str]) -> list[tuple[str, str]]:
        return [(Path(image).name, reason) for image, reason in listed.items()]

    if not path.exists() or names(read_json(path)) != names(skipped):
        write_json(path, skipped)


def _files_of_version_0_1(
    place: Place, folder: Path, captions: Mapping[Path, str | None]
) -> tuple[list[Path], dict[str, str]]:
    """The images of a cache that knows them by name, length and caption alone, and {path: reason} of those left out.

    Raises ValueError where the folder's are others.
    """
    listed = place.folder / "skipped.json"
    skipped = read_json(listed) if listed.exists() else {}
    first = Path(next(iter(skipped), folder / "none"))
    for then in (folder, *first.parents):  # where the folder was then
        left_out = {folder / Path(path).relative_to(then) for path in skipped if Path(path).is_relative_to(then)}
        good = [path for path in captions if path not in left_out and captions[path] and path.is_file()]
        files = [(str(path.relative_to(folder)), path.stat().st_size, captions[path]) for path in good]
        if hashlib.sha256(json.dumps(files).encode()).hexdigest() == place.record["files"]:
            return good, skipped
    raise ValueError(
        f"the cache {place.folder} was made by version 0.1 with other values of files (it does not tell which image or "
        "caption has changed since): use another data.cache, or delete it"
    )


def captioned_images(folder: str | Path, seed: int = 0) -> dict[Path, str | None]:
    """Every image file under `folder`, sorted by path, with its caption or None; see `read_captions`."""
    return read_captions(folder, seed).captions


def read_image(path: Path, height: int, width: int) -> Image.Image:
    """Read an RGB image of this size: turned upright by its EXIF data, scaled to cover the size, centre-cropped."""
    # PIL crops to fractions of a pixel, torchvision's v2 to whole ones: 378 of 400 random sizes came out different
    return ImageOps.fit(open_image(path), (width, height), Image.Resampling.LANCZOS)


@torch.no_grad()
def encode_images(pipeline, images: Sequence[Image.Image]) -> torch.Tensor:
    """Latents of images, RGB and of one size, as the transformer takes them."""
    # not by the pipeline's own processor: FIBO's would make the sides multiples of two tokens
    pixels = VaeImageProcessor(do_resize=False).preprocess(list(images))
    pixels = pixels.to(pipeline._execution_device, pipeline.vae.dtype)
    return family_of(denoiser(pipeline)).encode_images(pipeline.vae, pixels)
