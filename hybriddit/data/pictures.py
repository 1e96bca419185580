"""What is known of a folder's pictures: their content, and whether they can be read. Kept, so that it is found once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from ..files import make_folder, read_json, write_json
from ..images import open_image
from .image_files import content_of
from .shards import ALONE, Processes
from .tars import TarMember

PICTURES = "pictures.json"  # the file in a cache that keeps it


@dataclass(frozen=True)
class Picture:
    """A file of a picture.

    size, mtime_ns: of the file, in bytes and nanoseconds; where they are the same, so is the content. sha256: of its
    bytes; "" where they cannot be read. error: why it is no picture; None if it is one. width, height: upright, in
    pixels; None for what is no picture, and in caches from before they were kept.
    """

    size: int
    mtime_ns: int
    sha256: str
    error: str | None = None
    width: int | None = None
    height: int | None = None


def examine(
    folder: Path,
    paths: Sequence[Path | TarMember],
    cache: Path | None,
    *,
    progress: bool = True,
    processes: Processes = ALONE,
) -> dict[Path | TarMember, Picture]:
    """Find out the content of pictures under `folder`, also in tars, and whether they can be read.

    A picture whose size and time `cache` has already is not opened, and one whose content it has is not decoded. The
    others are shared among the processes; a call that is interrupted loses at most a fifth of its work. Nothing is
    written where nothing is new.

    Raises ValueError where what the cache keeps is damaged.
    """
    known = _read(cache)
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    unknown = [path for path, name in names.items() if name not in known or not _is_same(path, known[name])]
    contents = {picture.sha256: picture for picture in known.values()}
    if unknown:
        processes.gather()  # all have seen the same files, before one writes
    not_kept = {}
    turn = processes.count * max(1000, len(known) // 4)
    with tqdm(total=len(unknown), desc="reading images", unit="image", disable=not (progress and unknown)) as bar:
        for start in range(0, len(unknown), turn):
            own = {}
            for path in unknown[start : start + turn][processes.rank :: processes.count]:
                own[names[path]] = _look_at(path, contents)
                bar.update(processes.count)
            learnt = {name: picture for share in processes.gather(own) for name, picture in share.items()}
            not_kept |= {name: picture for name, picture in learnt.items() if not picture.sha256}
            learnt = {name: picture for name, picture in learnt.items() if picture.sha256}
            known |= learnt
            if cache is not None and learnt and processes.rank == 0:
                try:
                    make_folder(cache)
                    write_json(cache / PICTURES, {name: astuple(known[name]) for name in sorted(known)})
                except OSError:
                    if any(picture.sha256 not in contents for picture in learnt.values()):
                        raise  # but the new times of files that were copied need not be kept
    known |= not_kept
    return {path: known[name] for path, name in names.items()}


def _is_same(path: Path | TarMember, picture: Picture) -> bool:
    try:
        stat = path.stat()
    except OSError:  # a link that leads nowhere
        return False
    return (picture.size, picture.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def _look_at(path: Path | TarMember, contents: dict[str, Picture]) -> Picture:
    """contents: the pictures that are known already, by digest."""
    try:
        size, mtime_ns, digest = content_of(path)
    except OSError as error:
        return Picture(0, 0, "", f"it cannot be opened ({error.strerror})")
    except ValueError as error:
        return Picture(0, 0, "", str(error))
    if digest in contents:
        return replace(contents[digest], size=size, mtime_ns=mtime_ns)
    try:
        width, height = open_image(path).size
    except (OSError, ValueError) as reason:
        return Picture(size, mtime_ns, digest, " ".join(str(reason).replace(str(path), "it").split()))
    return Picture(size, mtime_ns, digest, None, width, height)


def _read(cache: Path | None) -> dict[str, Picture]:
    if cache is None or not (cache / PICTURES).exists():
        return {}
    path = cache / PICTURES
    try:
        return {name: Picture(*values) for name, values in read_json(path).items()}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it and run again, which reads all pictures anew"
        ) from None
