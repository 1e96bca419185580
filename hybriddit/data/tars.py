"""Files in tars, read where they lie: nothing is unpacked, and no name in a tar is trusted. Imports no torch."""

from __future__ import annotations

import tarfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

# the first bytes of gzip, bzip2, xz and Zstandard: their files cannot be read from the middle
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True, order=True)
class TarMember:
    """A file in a tar, with those of Path's methods that reading pictures and captions needs.

    start, size: where its bytes are in the tar.
    """

    tar: Path
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def with_suffix(self, suffix: str) -> tuple[Path, str]:
        """The tar, and the name with another ending."""
        return self.tar, str(PurePosixPath(self.name).with_suffix(suffix))

    def relative_to(self, folder: Path) -> PurePosixPath:
        return PurePosixPath(self.tar.relative_to(folder).as_posix(), self.name.lstrip("/"))

    def is_file(self) -> bool:
        return self.tar.is_file()

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=self.size, st_mtime_ns=self.tar.stat().st_mtime_ns)

    def read_bytes(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)

    def open(self, mode: str = "rb") -> BytesIO:
        return BytesIO(self.read_bytes())


def tar_members(path: Path, passed: Counter[str] | None = None) -> list[TarMember]:
    """The files in a tar that is not compressed, sorted by name; of two with one name the last.

    A hard link is the file that it is a link to. passed: counts what is passed over, such as other links.

    Raises ValueError where the tar is damaged.
    """
    passed = Counter() if passed is None else passed
    members: dict[str, TarMember] = {}
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        with path.open("rb") as file:
            if file.read(6).startswith(PACKED):
                raise tarfile.ReadError("it is compressed: unpack it to a plain .tar")
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.islnk() and member.linkname in members:
                    members[member.name] = replace(members[member.linkname], name=member.name)
                elif member.isreg() and member.sparse is None:
                    members[member.name] = TarMember(path, member.name, member.offset_data, member.size)
                elif not member.isdir():
                    passed["links, devices and sparse files in tars"] += 1
            tar.fileobj.seek(tar.offset)  # at a damaged header tarfile stops without a word
            block = tar.fileobj.read(tarfile.BLOCKSIZE)
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"its header at byte {tar.offset} is broken")
            if not block:
                passed["tars without an end mark, which may be cut"] += 1
            elif any(part.strip(b"\0") for part in iter(partial(tar.fileobj.read, 2**20), b"")):
                passed["tars that go on after their end mark"] += 1  # as where several were joined by `cat`
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no tar: {error}") from error
    return sorted(members.values())
