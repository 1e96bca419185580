"""Read prompts from lists, text files and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .image_files import say
from .text import SPACES, check_text, first_of, is_blank, lines_of, read_text, table_rows

COLUMNS = ("prompt", "text", "caption")  # that hold the prompts of a table
OFTEN = 10  # images of a prompt, from which on more prompts would teach more
TABLES = (".jsonl", ".json", ".csv", ".tsv")


def read_prompts(prompts: str | Path | Sequence[str], *, says: bool = False) -> list[str]:
    """Read prompts from a list, a file or a folder of files, in UTF-8; blank ones and a table's null ones are left out.

    says: print how many rows of a table are left out.

    A file ending in .txt, or in nothing, holds one prompt a line. A .jsonl, .json (a list), .csv or .tsv holds one a
    row, in the first of its columns "prompt", "text" and "caption", in upper or lower case, that is not null or blank;
    in JSON a row may also be the prompt. Of a folder, these files are read in the order of their names, see `prompt_files`.

    Raises FileNotFoundError where there is no such file, and ValueError for another ending, where something is no text,
    and where no prompt is left.
    """
    name = "data.prompts"
    if isinstance(prompts, (str, Path)):
        name, files = str(prompts), prompt_files(Path(prompts))
        prompts = [prompt for file in files for prompt in _read_file(file, says)]
    else:
        prompts = [check_text(prompt, f"prompt {i}", name) for i, prompt in enumerate(prompts, 1)]
    prompts = [prompt.strip(SPACES) for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"{name} holds no prompt")
    return prompts


def prompt_files(path: Path) -> list[Path]:
    """The file of prompts itself, or those of a folder in the order of their names: .txt, .jsonl, .json, .csv, .tsv.

    Raises FileNotFoundError for a folder without any.
    """
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in (".txt", *TABLES) and file.is_file()]
    if not files:
        raise FileNotFoundError(f"no prompt file in {path}: it holds none that ends in .txt, {', '.join(TABLES)}")
    return files


def few_prompts(prompts: int, images: int) -> str | None:
    """What to tell a user who has so many prompts for so many images; None where they are enough."""
    if images <= OFTEN * prompts:
        return None
    return (
        f"data.prompts holds {prompts:,} prompts for {images:,} images, {images / prompts:.0f} images of each: with "
        "more prompts the student learns of more than these"
    )


def _read_file(path: Path, says: bool) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {str(path)!r} (data.prompts): one prompt a line")
    ending = path.suffix.lower()
    if ending in ("", ".txt"):
        return lines_of(read_text(path))
    if ending not in TABLES:
        raise ValueError(f"{path}: prompts are read from files ending in .txt, {', '.join(TABLES)}, not in {ending}")
    rows = ((place, first_of(row, COLUMNS, place) if isinstance(row, dict) else row) for place, row in table_rows(path))
    found = [None if is_blank(row) else check_text(row, "a prompt", place) for place, row in rows]
    prompts = [prompt for prompt in found if prompt is not None]
    if says and len(prompts) < len(found):
        say(f"{len(found) - len(prompts)} of {len(found)} rows in {path} have no prompt: they are left out")
    return prompts
