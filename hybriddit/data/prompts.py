"""Read prompts from lists and text files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def read_prompts(prompts: str | Path | Sequence[str]) -> list[str]:
    """Read prompts from a list, or from a text file with one per line; blank ones are skipped.

    Raises FileNotFoundError where there is no such file, and ValueError where no prompt is left.
    """
    if isinstance(prompts, (str, Path)):
        path = Path(prompts)
        if not path.is_file():
            raise FileNotFoundError(f"no prompt file at {str(prompts)!r} (data.prompts): one prompt a line")
        prompts = read_text(path).splitlines()
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("data.prompts holds no prompt")
    return prompts


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises ValueError, naming the file, where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): save it as UTF-8") from None
