"""Find the images of a folder and their captions. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any
from unicodedata import normalize

from ..images import IMAGE_ENDINGS
from .image_files import files_under, open_tars, passed_over
from .tars import TarMember
from .text import SPACES, check_text, first_of, parse_json, read_text, table_rows

TABLES = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("text", "caption", "prompt")  # that hold the captions of a table
BESIDE = (".txt", ".caption", ".json")  # endings of caption files beside their images


@dataclass
class CaptionedFolder:
    """The images of a folder.

    captions: every image file, sorted by path, with its caption or None. reasons: why an image has none, where there is
    more to say. notes: what else is to be said of the folder, in one line each.
    """

    captions: dict[Path | TarMember, str | None] = field(default_factory=dict)
    reasons: dict[Path | TarMember, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_captions(folder: str | Path, seed: int = 0) -> CaptionedFolder:
    """Find the images under `folder`, through linked folders too, and their captions.

    An image's caption is in the first of these places that has one:

    - a `metadata.jsonl`, or then a `metadata.csv`, in the image's folder, or then in those above it up to `folder`:
      the "text", "caption" or "prompt", the first that is not null or blank, of the row whose "file_name" is the image,
      relative to the table's folder;
    - `<image>.txt`, or then `<image>.caption`, beside it: the whole file is one caption;
    - `<image>.json` beside it: the "text", "caption" or "prompt" of its object.

    Images in tars, as of WebDataset, have their captions beside them in the tar. A caption in a table or a .json may be a
    list, and several rows may be about one image: one of them is drawn, by `seed` and the
    image's path in `folder`. Null and blank captions are none.

    Raises FileNotFoundError where there is no folder, and ValueError if it has no images, a damaged tar, or a table that
    cannot be used: damaged, not UTF-8, without these columns, or with a caption that is no text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder at {str(folder)!r} (data.folder)")
    files = open_tars(files_under(folder))
    if not files.images:
        note = passed_over(files.others, files.passed, folder)
        raise ValueError(f"no images in {folder}: {', '.join(IMAGE_ENDINGS)} are read" + (f"; {note}" if note else ""))
    result = CaptionedFolder(dict.fromkeys(files.images))
    tables = [path for path in files.others if isinstance(path, Path) and path.name.lower() in TABLES]
    tables.sort(key=lambda path: (-len(path.parts), TABLES.index(path.name.lower()), path))
    listed = [_read_table(table, folder, result) for table in tables]
    beside = {path.with_suffix(path.suffix.lower()): path for path in files.others}
    used, differing = set(tables), []
    for path in files.images:
        files_beside = [beside[name] for name in map(path.with_suffix, BESIDE) if name in beside]
        used.update(files_beside)
        found = [captions[path] for captions in listed if captions.get(path)]
        for file in files_beside:
            try:
                found += [captions] if (captions := _read_beside(file)) else []
            except (OSError, ValueError) as error:
                result.reasons[path] = f"its caption cannot be read: {error}"
        if found:
            result.captions[path] = _drawn(found[0], path.relative_to(folder), seed)
            differing += [path] if any(set(captions) != set(found[0]) for captions in found) else []
    _note(result.notes, "captions in several places that differ, of which the first is taken", differing)
    if over := passed_over([path for path in files.others if path not in used], files.passed, folder):
        result.notes.append(over)
    return result


def _read_beside(path: Path | TarMember) -> list[str]:
    """The captions in a file beside its image that are not blank."""
    text = read_text(path)
    if path.suffix.lower() == ".json":
        row = parse_json(text, str(path))
        return _captions(first_of(row, COLUMNS, str(path)) if isinstance(row, dict) else row, str(path))
    return _captions(re.sub(f"[{SPACES}]+", " ", text).strip(SPACES), str(path))


def _read_table(table: Path, folder: Path, result: CaptionedFolder) -> dict[Path, list[str]]:
    """{image: captions that are not blank} of a table; notes the files that are not there, or not under `folder`."""
    listed: dict[Path, list[str]] = {}
    missing, outside = [], []
    for place, row in table_rows(table):
        if not isinstance(row, dict):
            raise ValueError(f'{place}: not of the form {{"file_name": ..., "text": ...}}')
        name = check_text(first_of(row, ("file_name",), place), "a file_name", place)
        captions = _captions(first_of(row, COLUMNS, place), place)
        paths = [_place(spelled, table.parent, folder) for spelled in _spellings(name)]
        path = next((path for path in paths if path in result.captions), None)
        if path is not None:
            listed.setdefault(path, []).extend(captions)
        else:
            (outside if paths[1] is None else missing).append(name)
    _note(result.notes, f"listed in {table}, but not there or not read as an image", missing)
    _note(result.notes, f"listed in {table}, but outside of {folder}", outside)
    return listed


def _spellings(name: str) -> list[str]:
    """How a file may be spelled that a table names: as there, on Windows, and with accents as macOS writes them or not."""
    posix = name.replace("\\", "/")
    return [name, posix, normalize("NFC", posix), normalize("NFD", posix)]


def _place(name: str, parent: Path, folder: Path) -> Path | None:
    """The path of a file that a table in `parent` names; None if it is not under `folder`."""
    path, root = Path(os.path.abspath(parent / name)), os.path.abspath(folder)
    return folder / path.relative_to(root) if path.is_relative_to(root) else None


def _captions(value: Any, place: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    captions = [check_text(caption, "a caption", place) for caption in values if caption is not None]
    return [caption for caption in captions if caption.strip()]


def _drawn(captions: list[str], path: PurePath, seed: int) -> str:
    """One of an image's captions, whatever else there is in the folder."""
    digest = hashlib.sha256(f"{seed} {path.as_posix()}".encode("utf-8", "surrogateescape")).digest()
    return captions[int.from_bytes(digest[:8], "big") % len(captions)]


def _note(notes: list[str], what: str, names: list[str] | list[Path]) -> None:
    if names:
        first = ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
        notes.append(f"{what} ({len(names)}): {first}")
