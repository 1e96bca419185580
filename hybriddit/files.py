"""Write files and folders so that they are whole or absent; read JSON and tensors, with clear errors if damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CHECKSUM = "hybriddit_sha256"
UNTOUCHED = 24 * 3600  # seconds after which a temporary file of another machine is taken for left behind
# how systems and file systems say that a folder cannot be opened, or has no fsync
NO_FOLDER_FSYNC = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.EBADF, errno.ENOTSUP)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless it is there. Raises FileExistsError where a file stands in the way."""
    there = next(part for part in (folder, *folder.parents) if part.exists())
    if not there.is_dir():
        what = "give a folder" if there == folder else f"{folder} cannot be made in it"
        raise FileExistsError(f"{there} is a file: {what}")
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Name the path in errors of writing, such as a full disk's, that do not say where they occurred."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there replaces `path` when the block ends without an error.

    Otherwise the temporary file is removed, and `path` is as it was. Only where the process is killed the temporary file
    stays, for `remove_left`.
    """
    partial = temporary_path(path)
    try:
        with _telling(path):
            yield partial
            flush(partial)
        partial.replace(path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Where `replacing` keeps what is written, named after the machine and the process."""
    return path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.tmp")


def _machine() -> str:
    """Eight letters for who counts this process, where machines and containers share a disk."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino  # a container counts its processes by itself
    except OSError:
        space = 0
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def remove_left(paths: Iterable[Path]) -> None:
    """Remove the temporary files of `replacing` that killed processes have left beside these paths.

    That is, those of this machine's processes that have ended, and others that nobody has written to for a day: whether
    their process is alive cannot be seen from here. What cannot be removed, such as another user's, stays.
    """
    import psutil

    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    machine, now = _machine(), time.time()
    for folder in filter(Path.is_dir, names):
        for left in folder.iterdir():
            found = re.fullmatch(r"\.(.+)\.([0-9a-f]{8})\.(\d{1,9})\.tmp", left.name)
            if found is None or found[1] not in names[folder]:
                continue
            with suppress(OSError):  # another process may have removed it meanwhile
                here = found[2] == machine
                if not psutil.pid_exists(int(found[3])) if here else now - left.stat().st_mtime > UNTOUCHED:
                    left.unlink()


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `folder`, which it replaces when the block ends without an error.

    `folder` is never half written: it is the old one, for an instant absent, and then the new one. The next call for
    the same folder removes what a killed process left, so two processes must not write one folder at the same time.
    """
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with _telling(folder):
            yield partial
            _with_usual_mode(partial)
            for path in (*partial.rglob("*"), partial):
                flush(path)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        flush(folder.parent)
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `folder`; its content moves into `folder` when the block ends without an error.

    Otherwise `folder` is as it was, absent or empty. Raises FileExistsError, at the start, if `folder` is a file or not
    empty.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder that is new or empty")
    was_there = folder.is_dir()
    held = next(folder.iterdir(), None) if was_there else None
    if held is not None:
        raise FileExistsError(f"{folder} holds {held.name} already: give a folder that is new or empty")
    partial = folder / f".{os.getpid()}.tmp"
    make_folder(folder)
    partial.mkdir()
    try:
        with _telling(folder):
            yield partial
            _with_usual_mode(partial)
        for path in sorted(partial.iterdir(), key=Path.is_file):  # files last: they say what the folders are
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not was_there and next(folder.iterdir(), None) is None:
            folder.rmdir()


def _with_usual_mode(folder: Path) -> None:
    """Let those read the tensors in a folder who may read other new files: safetensors lets their owner alone."""
    probe = folder / f".{os.getpid()}.mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of entries, are on the disk (fsync).

    Folders are left out where the system cannot open them, as on Windows, or their file system has no fsync for them.
    """
    # Windows flushes only what may be written
    flags = os.O_RDWR if os.name == "nt" else os.O_RDONLY
    try:
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in NO_FOLDER_FSYNC:
            raise


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object. Raises ValueError, naming the file, if it holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return values


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file with a checksum in its metadata; not atomic: give it a path of `replacing`.

    Raises OSError, with the reason, where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(tensors, path, metadata={CHECKSUM: checksum(tensors)})  # one key: the order of several varies
        path.chmod(mode)  # safetensors lets the owner alone read it
    except SafetensorError as error:  # raised for a full disk too
        raise OSError(f"could not write {path}: {error}") from error


def read_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file, to the CPU.

    Raises ValueError where the file is damaged or does not match its checksum, if it has one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            expected = (file.metadata() or {}).get(CHECKSUM)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
    if expected not in (None, checksum(tensors)):
        raise ValueError(f"{path} is damaged (its checksum does not match)")
    return tensors


def read_weights(path: str | os.PathLike, allowed: Sequence[type] = ()) -> Any:
    """What a weights file holds, on the CPU: a .safetensors file's tensors, or what torch.load with weights_only gives.

    allowed: classes that may be in the file besides. Raises FileNotFoundError, or ValueError for a damaged file and for one
    that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    import torch

    with path.open("rb") as file, torch.serialization.safe_globals(list(allowed)):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or holds more than tensors and plain values") from error


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors on the CPU: over names, dtypes, shapes and bytes, in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
