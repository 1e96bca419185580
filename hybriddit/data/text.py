"""Read text files and tables: UTF-8, a line at a time. Imports no torch."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPACES = " \t\r\n"  # stripped from texts; other separators, such as U+2028, are part of a text


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte order mark. Raises ValueError, naming the file, where it is not UTF-8."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): save it as UTF-8") from None
    if "\0" in text:  # as UTF-16 without a byte order mark has for every letter
        raise ValueError(f"{path} is no UTF-8 text (it holds zero bytes): save it as UTF-8")
    return text


def lines_of(text: str) -> list[str]:
    r"""The lines of a text, which end at \n and \r\n alone: U+2028 and form feeds, too, are part of a line."""
    return re.split("\r?\n", text)


def table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a .jsonl, .json, .csv or .tsv file, and where each is, such as "captions.csv, line 3".

    A row of a .csv or .tsv is {its column's name in lower case: text}, "" where it is too short. A row of a .jsonl, or an
    element of the list in a .json, is any JSON value, the names in an object in lower case. Raises ValueError for a file
    that cannot be parsed.
    """
    ending = path.suffix.lower()
    rows = _json_rows(path, ending == ".jsonl") if ending in (".jsonl", ".json") else _csv_rows(path, ending == ".tsv")
    for place, row in rows:
        yield place, {str(name).strip().lower(): value for name, value in row.items()} if isinstance(row, dict) else row


def _json_rows(path: Path, of_lines: bool) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    if not of_lines:
        values = parse_json(text, str(path))
        if not isinstance(values, list):
            raise ValueError(f"{path} holds no list")
        yield from ((f"{path}, entry {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, parse_json(line, place)


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text. Raises ValueError, naming the place, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: no JSON ({error})") from None


def _csv_rows(path: Path, tabs: bool) -> Iterator[tuple[str, dict[str, str]]]:
    lines = (line + "\n" for line in lines_of(read_text(path)))
    reader = csv.DictReader(lines, delimiter="\t" if tabs else ",", strict=True)
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:  # as where a text with a comma is not quoted
                raise ValueError(f"{place}: it has more columns than the first line, {', '.join(reader.fieldnames)}")
            yield place, {name: value or "" for name, value in row.items()}
    except csv.Error as error:  # in the row that begins after the last one
        raise ValueError(f"{path}, line {reader.line_num + 1}: {error}") from None


def first_of(row: dict[str, Any], columns: tuple[str, ...], place: str) -> Any:
    """The value in the first of these columns that the row has. Raises ValueError, naming the place, if it has none."""
    for name in columns:
        if name in row:
            return row[name]
    raise ValueError(f"{place}: it has no {' or '.join(columns)}, only {', '.join(row) or 'nothing'}")


def check_text(value: Any, what: str, place: str) -> str:
    """Return a text as it is. Raises ValueError, naming it, for another type or what no file could hold."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: {what} must be text, not {json.dumps(value, default=str)[:80]}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{place}: {what} holds half of a character (a lone surrogate)")
    return value
