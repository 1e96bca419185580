"""A folder of images as one set for an evaluation, decoded when they are read."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..images import open_image, read_record
from ..metrics.images import Images
from .image_files import files_under, open_tars, passed_over

DECODED = 64  # images at a time
NAMED = 5  # broken images in a message


class FolderImages(Images):
    """The images under a folder, sorted by path, those in tars last: uint8 [N, H, W, 3], see `open_image`.

    size: scale and crop every image to size x size, as ADM does (see `adm_crop`); None: they must be of one size.

    The constructor finds the files, `check` reads them. Raises ValueError where there are fewer than two.
    """

    def __init__(self, folder: Path, size: int | None = None):
        found = open_tars(files_under(folder))
        self.folder, self.size, self.files = folder, size, found.images
        if size is not None:
            from .class_images import adm_crop  # imports diffusers, which the metrics do without

            self.crop = partial(adm_crop, size=size)
        self.note = passed_over(found.others, found.passed, folder)
        if len(self.files) < 2:
            advice = f" ({self.note})" if self.note else ""
            raise ValueError(f"{folder} has {len(self.files)} image(s): statistics need at least 2{advice}")
        super().__init__(len(self.files), self._read)
        self.sha256, self.sizes = None, Counter()

    def check(self, progress: bool = True) -> None:
        """Read all images once, for what is wrong with them and for the SHA-256 of their pixels.

        Raises ValueError, in one line, naming images that cannot be read, or where their sizes differ.
        """
        if progress and self.note:
            print(self.note.encode("ascii", "backslashreplace").decode(), file=sys.stderr)
        digest, broken, first = hashlib.sha256(), [], {}
        with tqdm(total=len(self), desc=f"checking {self.folder.name}", unit="image", disable=not progress) as bar:
            for start in range(0, len(self), DECODED):
                rows = range(start, min(start + DECODED, len(self)))
                for row, decoded in zip(rows, self._decode(rows), strict=True):
                    if isinstance(decoded, ValueError):
                        broken.append(str(decoded))
                        continue
                    size = decoded.shape[1::-1]
                    self.sizes[size] += 1
                    first.setdefault(size, self.files[row])
                    digest.update(decoded)
                bar.update(len(rows))
        if broken:
            named = "; ".join(broken[:NAMED]) + (" …" if len(broken) > NAMED else "")
            raise ValueError(f"{len(broken)} of {len(self)} images in {self.folder} cannot be read: {named}")
        if len(self.sizes) > 1:
            counts = ", ".join(
                f"{width} x {height} ({count}, such as {first[width, height]})"
                for (width, height), count in self.sizes.most_common(3)
            )
            raise ValueError(
                f"the images in {self.folder} are of {len(self.sizes)} sizes: {counts}; --size scales and crops them to one"
            )
        self.sha256 = digest.hexdigest()

    def prompts(self) -> list[str]:
        found = []
        for file in self.files:
            made = read_record(file) if isinstance(file, Path) else None
            if not isinstance((made or {}).get("prompt"), str):
                raise ValueError(
                    f"{file} has no record of its prompt: --clip needs the PNG files that `generate` wrote"
                )
            found.append(made["prompt"])
        return found

    def described(self) -> dict[str, Any]:
        """Name, number and size of the images for a report, and the SHA-256 of their pixels, as of an array of them."""
        if self.sha256 is None:  # in processes that have left the check to the first
            return super().described()
        ((width, height),) = self.sizes
        cropped = {"cropped": "to the centre, as ADM does"} if self.size else {}
        return {
            "folder": self.folder.resolve().name,
            "sha256": self.sha256,
            "images": len(self),
            "size": [height, width],
            **cropped,
        }

    def _read(self, rows: range) -> np.ndarray:
        decoded = self._decode(rows)
        for one in decoded:
            if isinstance(one, ValueError):
                raise one
        return np.stack(decoded)

    def _decode(self, rows: range) -> list[np.ndarray | ValueError]:
        """Each image [H, W, 3], or why it cannot be read."""
        with ThreadPoolExecutor() as threads:
            return list(threads.map(self._decode_one, (self.files[row] for row in rows)))

    def _decode_one(self, path) -> np.ndarray | ValueError:
        try:
            image = open_image(path)
            return np.asarray(image if self.size is None else self.crop(image))
        except (OSError, ValueError) as error:
            named = str(error) if str(path) in str(error) else f"{path}: {error}"
            return ValueError(named)
