"""Data sets in shards (rows of tensors in memory or in safetensors files), and the cache folders that hold them."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from ..files import CHECKSUM, make_folder, read_tensors, replacing, write_json, write_tensors

SETTINGS = "data.json"  # the file in a cache that records how it was made


class ShardedDataset:
    """Rows of tensors, in shards of equally many rows per key.

    shards: dicts of tensors in memory, or `ShardFile`s on disk.
    order: the rows of the set, as their places in the shards one after another; None: all, as they are there.

    Raises ValueError if there are no rows.
    """

    def __init__(self, shards: Sequence[Mapping], order: Sequence[int] | None = None):
        self.shards = shards
        self._ends = list(accumulate(_length(shard) for shard in shards))
        self._order = range(self._ends[-1] if self._ends else 0) if order is None else order
        if not self._order:
            raise ValueError("a set needs at least one image")

    def __len__(self) -> int:
        return len(self._order)

    def rows(self, indices: Sequence[int], keys: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """The rows `indices` of every key, or of `keys` alone, stacked."""
        indices = [self._order[index] for index in indices]
        if len(self.shards) == 1 and isinstance(self.shards[0], dict):
            chosen = torch.tensor(indices)
            return {key: self.shards[0][key][chosen] for key in keys or self.shards[0]}
        picked = []
        for index in indices:
            number = bisect_right(self._ends, index)
            picked.append((self.shards[number], index - (self._ends[number - 1] if number else 0)))
        return {key: torch.cat([shard[key][row : row + 1] for shard, row in picked]) for key in keys or picked[0][0]}


def _length(shard: Mapping) -> int:
    key = next(iter(shard))
    return len(shard[key]) if isinstance(shard, dict) else shard.shape(key)[0]


class ShardFile(Mapping):
    """A safetensors file whose rows are read when they are indexed.

    Opening it reads only the header, so that a large set starts at once. The first access to a tensor compares the
    whole file with its checksum. Both raise ValueError if the file is damaged.
    """

    def __init__(self, path: Path):
        self.path, self._intact = path, False
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and run again to remake it") from None
        self.checksum = (self._file.metadata() or {}).get(CHECKSUM)  # as the file states it, not verified yet

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return tuple(self._file.get_slice(key).get_shape())

    def unchecked(self, key: str) -> torch.Tensor:
        """A whole tensor, read without a look at the others and at the checksum. Raises ValueError if it is not there."""
        try:
            return self._file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete it and run again to remake it") from None

    def __getitem__(self, key: str):
        if not self._intact:
            try:
                read_tensors(self.path)
            except ValueError as error:
                raise ValueError(f"{error}: delete it and run again to remake it") from None
            self._intact = True
        return self._file.get_slice(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def save_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file with its checksum; the file is whole or absent, even after a kill."""
    make_folder(path.parent)
    with replacing(path) as partial:
        write_tensors(partial, tensors)


@dataclass(frozen=True)
class Processes:
    """The processes of torch.distributed that make a set together: this one's rank, and how many there are."""

    rank: int = 0
    count: int = 1

    def gather(self, value: Any = None) -> list[Any]:
        """Every process's value, in the order of the ranks. Each has to call this, so it also waits for all.

        Raises ConnectionError where another process has ended.
        """
        if self.count == 1:
            return [value]
        values = [None] * self.count
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise ConnectionError(f"another process of this run has ended, see what it said: {error}") from None
        return values


ALONE = Processes()


def shard_rows(folder: Path, old_size: int | None = None) -> list[tuple[range, Path]]:
    """The shards in a cache's folder, and which rows each holds, in their order.

    Shards may be of any size: latents-00008-00012.safetensors has the rows from 8 to 11. Version 0.1 numbered shards of
    one size, old_size: latents-00002.safetensors. A shard whose rows others have already is passed over.
    """
    found = []
    for path in folder.glob("latents-*.safetensors"):
        numbers = [int(number) for number in re.findall(r"\d+", path.stem)]
        if len(numbers) == 1 and old_size:
            start = numbers[0] * old_size
            found.append((range(start, start + _length(ShardFile(path))), path))
        elif len(numbers) == 2:
            found.append((range(*numbers), path))
    kept: list[tuple[range, Path]] = []
    for rows, path in sorted(found, key=lambda shard: (shard[0].start, -shard[0].stop)):
        if not kept or rows.start >= kept[-1][0].stop:
            kept.append((rows, path))
    return kept


def missing_rows(
    wanted: Sequence[int], shards: Sequence[tuple[range, Path]], size: int, kinds: Mapping[int, Any] | None = None
) -> list[range]:
    """The rows of `wanted`, rising numbers, that no shard has: in parts of up to `size` that follow each other.

    kinds: of every row; those of a part are of one kind.
    """
    there = {row for rows, _ in shards for row in rows}
    parts: list[range] = []
    for row in wanted:
        if row in there:
            continue
        alike = kinds is None or kinds[row] == kinds.get(row - 1)
        if parts and parts[-1].stop == row and len(parts[-1]) < size and alike:
            parts[-1] = range(parts[-1].start, row + 1)
        else:
            parts.append(range(row, row + 1))
    return parts


def read_settings(folder: Path, option: str = "data.cache") -> dict[str, Any] | None:
    """What a cache's folder records about how its set was made; None where there is no cache.

    option: the setting that error messages name. Raises ValueError where the record is damaged.
    """
    path = folder / SETTINGS
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): use another {option}, or delete {folder}") from None


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Record in a cache's folder how its set is made."""
    make_folder(folder)
    write_json(folder / SETTINGS, settings)


def check_settings(folder: Path, found: dict[str, Any], settings: dict[str, Any], option: str = "data.cache") -> None:
    """Raise ValueError where `settings` are others than those that a cache was made with, which its record has.

    A set must never continue in the files of one that was made differently.
    """
    settings = json.loads(json.dumps(settings))
    other = [name for name in settings if found.get(name) != settings[name]]
    if other:
        raise ValueError(
            f"the cache {folder} was made with other values of {', '.join(other)}: use another {option}, or delete it"
        )
