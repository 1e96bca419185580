"""Find the files of a folder, and say which are passed over. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

from ..images import IMAGE_ENDINGS
from .tars import TarMember, tar_members

NAMED = 10  # files that a line names
PACKED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


@dataclass
class FolderFiles:
    """What lies under a folder.

    images: the files with an image's ending, sorted, those in tars last. others: the other files. passed: what else there
    is, counted.
    """

    images: list[Path | TarMember] = field(default_factory=list)
    others: list[Path | TarMember] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)


def files_under(folder: Path, inside: Path | None = None) -> FolderFiles:
    """Find the files under a folder. Linked folders are followed, but every folder is entered once.

    Links to a folder that holds the link or `folder` are not followed, nor are those to `inside`, a folder above.
    Hidden files and folders (.name) are passed over.
    """
    found, starts = FolderFiles(), deque([folder])
    entered = set(Path(os.path.realpath(inside), "any").parents if inside else Path(os.path.realpath(folder)).parents)

    def unreadable(error: OSError) -> None:
        found.passed["folders that cannot be read"] += 1

    while starts:  # real folders come first: a picture is found under its own path rather than under a link's
        for parent, folders, names in os.walk(starts.popleft(), onerror=unreadable):
            real = Path(os.path.realpath(parent))
            if real in entered:
                found.passed["links to folders that are read elsewhere"] += 1
                folders.clear()
                continue
            entered.add(real)
            found.passed["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for link in [name for name in folders if os.path.islink(Path(parent, name))]:
                folders.remove(link)
                if real.is_relative_to(os.path.realpath(Path(parent, link))):
                    found.passed["links back up"] += 1
                else:
                    starts.append(Path(parent, link))
            for name in names:
                if not name.startswith("."):
                    of_images = name.lower().endswith(IMAGE_ENDINGS)
                    (found.images if of_images else found.others).append(Path(parent, name))
    found.images.sort()
    return found


def open_tars(found: FolderFiles) -> FolderFiles:
    """Put the files in a folder's tars in place of the tars. Raises ValueError where one is damaged."""
    opened = FolderFiles(list(found.images), passed=Counter(found.passed))
    for path in sorted(found.others):
        if path.suffix.lower() != ".tar":
            opened.others.append(path)
            continue
        for member in tar_members(path, opened.passed):
            parts = PurePosixPath(member.name).parts
            if not parts or any(part.startswith(".") for part in parts):
                opened.passed["hidden"] += 1
            else:
                (opened.images if member.suffix.lower() in IMAGE_ENDINGS else opened.others).append(member)
    return opened


def content_of(path: Path | TarMember) -> tuple[int, int, str]:
    """Size in bytes, time of the last change in nanoseconds, and SHA-256 of a file.

    Raises OSError where it cannot be opened, and ValueError for what is no file: to open a pipe would wait for what is
    written into it.
    """
    stat = path.stat()
    if not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        return stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()


def passed_over(files: list[Path | TarMember], passed: Counter[str], folder: Path) -> str | None:
    """One line about the files that are passed over, by their endings; None if there are none."""
    counts = Counter()
    for path in files:
        broken = isinstance(path, Path) and path.is_symlink() and not path.exists()
        packed = str(path).lower().endswith(PACKED_TARS)
        what = "broken links" if broken else "compressed tars, which unpacked to .tar are read" if packed else None
        counts[what or path.suffix.lower() or "without an ending"] += 1
    counts += passed
    if not counts:
        return None
    often = sorted(counts, key=lambda what: (-counts[what], what))
    return f"passed over in {folder}: {', '.join(f'{what} ({counts[what]})' for what in often)}"


def reasons_named(skipped: Mapping[str, str]) -> str:
    """The first files that are left out, each with its reason, and how many more there are."""
    named = [f"{path} ({reason.removeprefix(f'{path} ')})" for path, reason in islice(skipped.items(), NAMED)]
    more = len(skipped) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more else "")


def say(line: str) -> None:
    """Print a line that may hold names of files, in whatever encoding they and the screen are."""
    encoding = sys.stdout.encoding or "utf-8"
    line = line.replace("\n", "\\n").replace("\r", "\\r")
    print(line.encode(encoding, "backslashreplace").decode(encoding))
