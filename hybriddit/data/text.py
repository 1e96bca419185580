"""Read text files and tables: UTF-8, a line at a time. Imports no torch."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

SPACES = " \t\r\n"  # stripped from texts; other separators, such as U+2028, are part of a text
# cells of a .csv that pandas takes for null
NOTHING = ("None", "null", "NULL", "nan", "NaN", "NA", "<NA>", "N/A", "n/a")
QUOTED = r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\""""  # a text as Python writes it
ARRAY = rf"\[(?:{QUOTED})(?:\s+(?:{QUOTED}))+\]"  # texts as NumPy writes them, which pandas takes for a list


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

    A row of a .csv or .tsv is {its column's name in lower case: its cell}. A cell is text; None where it is empty, says
    null as pandas writes it, or is not there; a list where all of it is a list of texts or nulls as JSON, Python or NumPy
    write it. A row of a .jsonl, or an element of the list in a .json, is any JSON value, the names in an object in lower
    case, and NaN is null. Raises ValueError for a file that cannot be parsed, and for two columns of one name.
    """
    ending = path.suffix.lower()
    rows = _json_rows(path, ending == ".jsonl") if ending in (".jsonl", ".json") else _csv_rows(path, ending == ".tsv")
    for place, row in rows:
        if isinstance(row, dict):
            values = list(row.values())
            row = dict(zip(_column_names(row, place), values, strict=True))
        yield place, row


def _column_names(names: Iterable[str], place: str) -> list[str]:
    """The names of a table's columns in lower case. Raises ValueError, naming the place, where two are the same."""
    names = [name.strip().lower() for name in names]
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ValueError(f"{place}: it has two columns named {twice[0] or 'nothing'}")
    return names


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
        return json.loads(text, parse_constant=lambda name: None)  # NaN, as pandas' rows without a text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: no JSON ({error})") from None


def _csv_rows(path: Path, tabs: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = (line + "\n" for line in lines_of(read_text(path)))
    reader = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
    names, above = None, 0  # above: the lines before a row
    try:
        for row in reader:
            place, above = f"{path}, line {above + 1}", reader.line_num
            if not row:
                continue  # a blank line
            if names is None:
                names = _column_names(row, place)
                continue
            if len(row) > len(names):  # as where a text with a comma is not quoted
                raise ValueError(f"{place}: it has more columns than the first line, {', '.join(names)}")
            yield place, dict(zip_longest(names, map(_cell, row)))
    except csv.Error as error:  # in the row that begins after the last one
        raise ValueError(f"{path}, line {above + 1}: {error}") from None


def _cell(text: str) -> str | list | None:
    """The value of a cell of a .csv or .tsv, see `table_rows`."""
    if not text or text in NOTHING:
        return None
    if text[0] == "[" and text[-1] == "]":
        for parse in (json.loads, _numpy_texts, ast.literal_eval):
            try:
                values = parse(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if is_blank(values) or any(isinstance(value, str) for value in values):
                return values
    return text


def _numpy_texts(text: str) -> list[str]:
    """The texts of an array as NumPy writes it, which Python would join to one. Raises ValueError where it is none."""
    if not re.fullmatch(ARRAY, text):
        raise ValueError("no array of texts")
    return [ast.literal_eval(quoted) for quoted in re.findall(QUOTED, text)]


def first_of(row: dict[str, Any], columns: tuple[str, ...], place: str) -> Any:
    """The first value in these columns of a row that is not null or blank; else null or blank, as the first is.

    Raises ValueError, naming the place, for a row without any of these columns.
    """
    values = [row[name] for name in columns if name in row]
    if not values:
        raise ValueError(f"{place}: it has no {' or '.join(columns)}, only {', '.join(row) or 'nothing'}")
    return next((value for value in values if not is_blank(value)), values[0])


def is_blank(value: Any) -> bool:
    """Whether a value is null, a text of spaces alone, or a list of nothing else."""
    if isinstance(value, list):
        return all(map(is_blank, value))
    return value is None or (isinstance(value, str) and not value.strip())


def check_text(value: Any, what: str, place: str) -> str:
    """Return a text as it is. Raises ValueError, naming it, for another type or what no file could hold."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: {what} must be text, not {json.dumps(value, default=str)[:80]}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{place}: {what} holds half of a character (a lone surrogate)")
    return value
