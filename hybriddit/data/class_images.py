"""Read class folders, tars with labels and MNIST's files into memory."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import extract_archive
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from ..images import IMAGE_ENDINGS, image_size, open_image
from .class_data import ClassData, ClassInfo
from .image_files import files_under, open_tars, passed_over, reasons_named, say
from .tars import TarMember, tar_members
from .text import parse_json, read_text

MNIST_IMAGES, MNIST_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
LOOKED_AT = 16  # images, for whether a set is in colour
LABELS = (".cls", ".json")  # endings of the files beside an image in a tar that hold its label
MOST_CLASSES = 100_000
MODES = {1: "L", 3: "RGB"}  # PIL's modes by the number of channels


@dataclass
class ClassFolder:
    """The image files of class folders, sorted by path, their labels, and the names of the classes.

    note: a line about the files that are passed over; None if there are none.
    """

    paths: list[Path] | list[TarMember]
    labels: list[int]
    classes: list[str]
    note: str | None


def class_images(folder: str | Path) -> tuple[list[Path] | list[TarMember], list[int], list[str]]:
    """Every image file under `folder`, sorted by path, their labels, and the names of the classes: see `find_classes`."""
    found = find_classes(folder)
    return found.paths, found.labels, found.classes


def find_classes(folder: str | Path) -> ClassFolder:
    """Find the images of class folders, or of tars with labels.

    The classes are the subfolders, or links to folders, sorted by name; a folder without subfolders is one class.
    Linked folders in a class are followed, but not back up. Hidden files and folders (.name) are left out. Where there
    are tars and no image files, the images are those in the tars, see `_find_in_tars`.

    Raises FileNotFoundError for a folder that does not exist, and ValueError where it or one of its classes has no
    images, or where images or tars with labels lie beside its subfolders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder at {str(folder)!r}")
    seen = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = {path.name: files_under(path, inside=folder) for path in seen if path.is_dir()}
    files = [path for path in seen if path.name not in found]
    loose = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]
    others = [path for path in files if path.suffix.lower() not in IMAGE_ENDINGS]
    others += [path for of_class in found.values() for path in of_class.others]
    passed = sum((of_class.passed for of_class in found.values()), Counter())
    passed["hidden"] += sum(path.name.startswith(".") for path in folder.iterdir())
    note = passed_over(others, passed, folder)
    if not any(of_class.images for of_class in found.values()):
        if not loose and any(path.suffix.lower() == ".tar" for path in others):
            return _find_in_tars(folder)
        if not loose:
            read = ", ".join(IMAGE_ENDINGS)
            raise ValueError(f"no images in {folder}: {read} are read" + (f"; {note}" if note else ""))
        _check_no_labels(files, "images")
        return ClassFolder(loose, [0] * len(loose), [""], note)
    if loose:
        raise ValueError(
            f"{loose[0]} belongs to no class: the subfolders of {folder} are the classes, move it into one"
        )
    _check_no_labels(files, "class folders")
    empty = [name for name, of_class in found.items() if not of_class.images]
    if empty:  # leaving it out would shift the labels of all classes after it
        raise ValueError(
            f"{folder / empty[0]} has no images, and every subfolder is a class ({len(empty)} of {len(found)} are "
            "empty): fill or remove it"
        )
    paths = [path for of_class in found.values() for path in of_class.images]
    labels = [label for label, of_class in enumerate(found.values()) for _ in of_class.images]
    return ClassFolder(paths, labels, list(found), note)


def _find_in_tars(folder: Path) -> ClassFolder:
    """Find the images in the tars under a folder, of WebDataset's layout.

    An image's label is the number in the `.cls` file beside it in the tar, or else the "label" in its `.json`. Images
    without one are left out, and counted. The classes are the numbers up to the largest label.
    """
    found = open_tars(files_under(folder))
    beside = {path.with_suffix(path.suffix.lower()): path for path in found.others}
    labels, unlabelled, used = {}, [], set()
    for path in found.images:
        file = next((beside[name] for name in map(path.with_suffix, LABELS) if name in beside), None)
        label = None if file is None else _read_label(file)
        if label is None:
            unlabelled.append(path)
        else:
            labels[path] = label
            used.add(file)
    notes = [passed_over([path for path in found.others if path not in used], found.passed, folder)]
    if unlabelled:
        notes.insert(
            0, f"{len(unlabelled)} of {len(found.images)} images have no label and are left out: {unlabelled[0]}, ..."
        )
    note = "; ".join(filter(None, notes)) or None
    if not labels:
        raise ValueError(
            f'no image in the tars of {folder} has a label (a number in <image>.cls, or the "label" in <image>.json)'
            + (f"; {note}" if note else "")
        )
    classes = [str(number) for number in range(max(labels.values()) + 1)]
    return ClassFolder(list(labels), list(labels.values()), classes, note)


def _read_label(path: TarMember) -> int | None:
    """The label in a .cls or .json file; None where a .json has none."""
    text = read_text(path).strip()
    value: Any = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else text
    if path.suffix.lower() == ".json":
        row = parse_json(text, str(path))
        value = row.get("label") if isinstance(row, dict) else None
        if value is None:
            return None
    if type(value) is not int or not 0 <= value < MOST_CLASSES:
        raise ValueError(
            f"{path}: a label must be a whole number from 0 to {MOST_CLASSES - 1}, not {str(value)[:40]!r}"
        )
    return value


def _check_no_labels(files: Sequence[Path], kind: str) -> None:
    """Raise ValueError where one of these files is a tar with labels."""
    for path in files:
        try:
            members = tar_members(path) if path.suffix.lower() == ".tar" else []
        except ValueError:  # of no use, and counted
            continue
        if any(member.suffix.lower() == ".cls" for member in members):
            raise ValueError(f"{path} has labels of its own (.cls) and lies beside {kind}: keep one layout in a folder")


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an image, scaled to size x size pixels exactly as in ADM's guided_diffusion.

    The image is halved by box filters as long as it stays at least `size` large, scaled by a bicubic filter so that its
    shorter side is `size`, and cropped. Raises ValueError for an image more than 100 times as long as wide: scaled
    before it is cropped, it would take gigabytes.
    """
    # not torchvision's v2: its Resize truncates the longer side where ADM rounds it, and its CenterCrop rounds the
    # corner where ADM truncates it; for 230 of 400 random sizes the crop came out different
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"it is {image.width} x {image.height} pixels: too long to scale before it is cut")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in sides)
    return image.crop((left, top, left + size, top + size))


def read_pixels(path: Path | TarMember, size: int, channels: int) -> torch.Tensor:
    """Read an image file and crop it as `adm_crop` does: uint8 [C, size, size]. Raises ValueError if it is no image."""
    return pil_to_tensor(adm_crop(open_image(path, MODES[channels]), size))


def read_folder(
    folder: str | Path, shape: tuple[int, int, int], *, progress: bool = True, says: bool = True
) -> ClassData:
    """Read class folders into memory, with the images cropped to `shape` (C, H, W).

    Images that cannot be read are left out. says: print their number, and what is passed over. Raises what
    `find_classes` and `check_images` raise, and ValueError where no image can be read.
    """
    found = find_classes(folder)
    paths = found.paths
    channels, size = shape[:2]
    check_images(folder, paths, shape)
    if found.note and says:
        say(found.note)
    images, kept, skipped = read_images(paths, found.labels, size, channels, progress)
    if skipped and says:
        say(f"{len(skipped)} of {len(paths)} images are left out: {reasons_named(skipped)}")
    if not kept:
        raise ValueError(f"none of the {len(paths)} images in {folder} can be read: {next(iter(skipped.values()))}")
    tables = {"images": torch.stack(images), "labels": torch.tensor(kept)}
    return ClassData([tables], ClassInfo((channels, size, size), found.classes))


def check_images(folder: str | Path, paths: Sequence[Path | TarMember], shape: tuple[int, int, int]) -> None:
    """Raise ValueError where images do not fit a model's inputs (C, H, W); a few from all over the set are looked at.

    That is where they are in colour and the model takes grey ones, and where all are squares of another size: they were
    made for another model, and would be scaled a second time. Sets of several sizes are scaled and cropped.
    """
    channels, size = shape[:2]
    if channels not in MODES:
        raise ValueError(
            f"images have 1 or 3 channels, and the model takes {channels}: set model.in_channels, or make a cache of "
            "latents with `hybriddit cache` and give that as data.path"
        )
    some = paths[:: -(-len(paths) // LOOKED_AT)]
    colourful = next((path for path in some if channels == 1 and _in_colour(path)), None)
    if colourful is not None:
        raise ValueError(f"{colourful} is in colour, and the model takes grey images: set model.in_channels to 3")
    sizes = {found for path in some if (found := _size(path)) is not None}
    if len(sizes) == 1 and len(set(*sizes)) == 1 and (size, size) not in sizes:
        [(side, _)] = sizes
        raise ValueError(
            f"the images in {folder} are {side} x {side} pixels, and the model takes {size} x {size}: set "
            f"model.sample_size={side}, or scale them once (hybriddit cache {folder} --size {size} --out FOLDER) and give "
            "that as data.path"
        )


def _size(path: Path | TarMember) -> tuple[int, int] | None:
    """The size of an image; None for one that cannot be read."""
    try:
        return image_size(path)
    except (ValueError, OSError):
        return None


def _in_colour(path: Path) -> bool:
    """Whether an image has colours that would be lost as grey; not for one that cannot be read."""
    try:
        pixels = np.asarray(open_image(path)).astype(int)
    except (ValueError, OSError):
        return False
    return bool((pixels.max(2) - pixels.min(2) > 16).any())


def read_images(
    paths: Sequence[Path | TarMember], labels: Sequence[int], size: int, channels: int, progress: bool = False
) -> tuple[list[torch.Tensor], list[int], dict[str, str]]:
    """Pixels and labels of the images that can be read; and {path: reason} of the others."""
    images, kept, skipped = [], [], {}
    for path, label in zip(tqdm(paths, desc="reading images", unit="image", disable=not progress), labels, strict=True):
        try:
            images.append(read_pixels(path, size, channels))
            kept.append(label)
        except (ValueError, OSError) as error:
            skipped[str(path)] = " ".join(str(error).split())
    return images, kept, skipped


def read_mnist(folder: str | Path) -> ClassData:
    """Read the training images of MNIST, or of a set in its format: two files, gzipped or not, in `folder`.

    Raises FileNotFoundError where one is missing, and ValueError where one is damaged or they do not belong together.
    """
    images, labels = (
        _read_mnist_file(Path(folder), name, read)
        for name, read in ((MNIST_IMAGES, read_image_file), (MNIST_LABELS, read_label_file))
    )
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} images and {len(labels)} labels: its files are of different sets")
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    return ClassData([{"images": images.unsqueeze(1), "labels": labels}], ClassInfo((1, *images.shape[1:]), classes))


def _read_mnist_file(folder: Path, name: str, read: Callable[[str | Path], torch.Tensor]) -> torch.Tensor:
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {name} or {name}.gz in {folder}")
    try:
        with TemporaryDirectory() as unpacked:
            return read(extract_archive(path, unpacked) if path.suffix == ".gz" else path)
    # on a wrong file torchvision fails with an assertion, an unknown type, too few bytes or a view of a wrong size
    except (OSError, EOFError, zlib.error, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or "its header is of another format"
        raise ValueError(f"{path} is damaged or none of MNIST's files: {reason}") from None
