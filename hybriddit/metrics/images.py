"""Images as the ADM suite keeps them: uint8 [N, H, W, 3], in memory or as `arr_0` of an npz file."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Images:
    """`count` images, uint8 [N, H, W, 3], made when they are read: `make` makes a range of them."""

    def __init__(self, count: int, make: Callable[[range], np.ndarray]):
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.make(range(self.count)[rows])

    def check(self, progress: bool = True) -> None:  # noqa: B027
        """Raise ValueError for images that cannot be read. `hybriddit evaluate` calls this before all else."""

    def prompts(self) -> list[str] | None:
        """The prompt that each image was made of; None where that is not kept, and ValueError where one is missing."""
        return None

    def described(self) -> dict[str, Any]:
        """What a report says of the images."""
        return {"file": None, "images": len(self)}


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert decoded images, floats in [-1, 1] of any shape, to uint8: 127.5 x + 128, clamped to [0, 255], truncated.

    This rounds 127.5 (x + 1) to the nearest level, as DiT's and SiT's sampling scripts do. Truncating 127.5 (x + 1), or
    rounding 127.5 x + 128, would move half of all pixels by a level, and the FID with them. Raises TypeError for
    integers, and ValueError for NaN or infinite values.
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating-point in [-1, 1], not {images.dtype}")
    if images.element_size() < 4:  # bfloat16 cannot hold all 256 levels
        images = images.float()
    if not images.isfinite().all():
        raise ValueError("images are not finite: the model or the VAE overflowed")
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def read_images(
    source: str | os.PathLike | np.ndarray | torch.Tensor | Images, check: bool = True
) -> np.ndarray | Images:
    """The images of an npz file's `arr_0`, or of an array: uint8 [N, H, W, 3]. `Images` are given back as they are.

    Images of an uncompressed file are mapped into memory, not read. check: compare the file with its checksums, which
    reads all of it. Raises FileNotFoundError where there is no such file, and ValueError if it is damaged, holds
    pickled objects or no `arr_0`, or if `arr_0` is not two or more uint8 images.
    """
    if isinstance(source, Images):
        return source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        entries = npz_entries(path, check)
        if "arr_0" not in entries:
            raise ValueError(
                f"{path} has no images (arr_0, uint8 [N, H, W, 3]), only {', '.join(entries) or 'nothing'}"
            )
        return check_images(read_entry(path, "arr_0"), f"arr_0 of {path}")
    return check_images(as_array(source), "the array of images")


def as_array(images: np.ndarray | torch.Tensor) -> np.ndarray:
    """A tensor or array as a numpy array."""
    return images.cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)


def check_images(images: np.ndarray, name: str) -> np.ndarray:
    """Return `images`. Raises ValueError, calling it `name`, unless it is uint8 [N, H, W, 3] with N at least 2."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"{name} must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}")
    if len(images) < 2:
        raise ValueError(f"{name} has {len(images)} image(s): statistics need at least 2")
    return images


def npz_entries(path: Path, check: bool = True) -> list[str]:
    """The names of an npz file's arrays. check: compare the file with its checksums.

    Raises FileNotFoundError where there is none, and ValueError where it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no npz file at {path}")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip() if check else None
            names = [name.removesuffix(".npy") for name in file.namelist()]
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no npz file ({error})") from error
    if damaged:
        raise ValueError(f"{path} is damaged (the checksum of {damaged} does not match)")
    return names


def read_entry(path: Path, name: str) -> np.ndarray:
    """One array of an npz file, mapped into memory if it is uncompressed, else read. Nothing is unpickled."""
    try:
        mapped = _map_entry(path, name)
        if mapped is not None:
            return mapped
        with np.load(path, allow_pickle=False) as file:
            return file[name]
    except (ValueError, EOFError, struct.error) as error:
        raise ValueError(f"{name} of {path} is no plain array ({error})") from error


def _map_entry(path: Path, name: str) -> np.ndarray | None:
    """Map an array into memory, as 50,000 images take 10 GB in every process; None if it cannot be mapped."""
    with zipfile.ZipFile(path) as file:
        entry = file.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        name_length, extra_length = struct.unpack("<26x2H", file.read(30))
        file.seek(name_length + extra_length, os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            return None
        if dtype.hasobject or 0 in shape:
            return None
        order = "F" if fortran else "C"
        return np.memmap(path, dtype, mode="r", offset=file.tell(), shape=shape, order=order)
