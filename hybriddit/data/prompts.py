"""Read prompts from lists, text files and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .text import SPACES, check_text, first_of, lines_of, read_text, table_rows

COLUMNS = ("prompt", "text", "caption")  # that hold the prompts of a table
OFTEN = 10  # images of a prompt, from which on more prompts would teach more
TABLES = (".jsonl", ".json", ".csv", ".tsv")


def read_prompts(prompts: str | Path | Sequence[str]) -> list[str]:
    """Read prompts from a list or from a file, in UTF-8; blank ones are skipped.

    A file ending in .txt, or in nothing, holds one prompt a line. A .jsonl, .json (a list), .csv or .tsv holds one a
    row, in its column "prompt", "text" or "caption", in upper or lower case; in JSON a row may also be the prompt.

    Raises FileNotFoundError where there is no such file, and ValueError for another ending, where something is no text,
    and where no prompt is left.
    """
    name = "data.prompts"
    if isinstance(prompts, (str, Path)):
        name, prompts = str(prompts), _read_file(Path(prompts))
    else:
        prompts = [check_text(prompt, f"prompt {i}", name) for i, prompt in enumerate(prompts, 1)]
    prompts = [prompt.strip(SPACES) for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"{name} holds no prompt")
    return prompts


def few_prompts(prompts: int, images: int) -> str | None:
    """What to tell a user who has so many prompts for so many images; None where they are enough."""
    if images <= OFTEN * prompts:
        return None
    return (
        f"data.prompts holds {prompts:,} prompts for {images:,} images, {images / prompts:.0f} images of each: with "
        "more prompts the student learns of more than these"
    )


def _read_file(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {str(path)!r} (data.prompts): one prompt a line")
    ending = path.suffix.lower()
    if ending in ("", ".txt"):
        return lines_of(read_text(path))
    if ending not in TABLES:
        raise ValueError(f"{path}: prompts are read from files ending in .txt, {', '.join(TABLES)}, not in {ending}")
    found = []
    for place, row in table_rows(path):
        prompt = first_of(row, COLUMNS, place) if isinstance(row, dict) else row
        found.append(check_text(prompt, "a prompt", place))
    return found
