"""Data sets in shards: rows of tensors in memory or in safetensors files, and the folders that keep them."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files import CHECKSUM, make_folder, read_tensors, replacing, write_json, write_tensors

SETTINGS = "data.json"  # in a cache: how it was made


class ShardedDataset:
    """Rows of tensors, in shards of equally many rows per key.

    shards: each a dict of tensors in memory, or a `ShardFile` on disk. Raises ValueError where there is no row.
    """

    def __init__(self, shards: Sequence[Mapping]):
        self.shards = shards
        self._ends = list(accumulate(_length(shard) for shard in shards))
        if not self._ends or not self._ends[-1]:
            raise ValueError("a set needs at least one image")

    def __len__(self) -> int:
        return self._ends[-1]

    def rows(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows `indices` of every key, stacked."""
        if len(self.shards) == 1 and isinstance(self.shards[0], dict):
            chosen = torch.tensor(list(indices))
            return {key: values[chosen] for key, values in self.shards[0].items()}
        picked = []
        for index in indices:
            number = bisect_right(self._ends, index)
            picked.append((self.shards[number], index - (self._ends[number - 1] if number else 0)))
        return {key: torch.cat([shard[key][row : row + 1] for shard, row in picked]) for key in picked[0][0]}


def _length(shard: Mapping) -> int:
    key = next(iter(shard))
    return len(shard[key]) if isinstance(shard, dict) else shard.shape(key)[0]


class ShardFile(Mapping):
    """A safetensors file of tensors, whose rows are read when they are indexed.

    Opening reads the header only, so that a large set starts at once. The whole file is compared with its checksum
    when a tensor is first asked for. Both raise ValueError where the file is damaged.
    """

    def __init__(self, path: Path):
        self.path, self._intact = path, False
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and run again to remake it") from None
        self.checksum = (self._file.metadata() or {}).get(CHECKSUM)  # what the file claims, not compared yet

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor, from the header alone."""
        return tuple(self._file.get_slice(key).get_shape())

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
    """Write a safetensors file with its checksum; after a failure or a kill it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        write_tensors(partial, tensors)


def write_or_check_settings(folder: Path, settings: dict, option: str = "data.cache") -> None:
    """Note in a cache's folder how its set is made, or compare with what is noted there.

    A set that is made otherwise must never go on in another's files. option: the setting that error messages name.
    Raises ValueError for a folder whose set was made with other settings.
    """
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        make_folder(folder)
        write_json(path, settings)
        return
    try:
        found = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): use another {option}, or delete {folder}") from None
    other = [name for name in settings if found.get(name) != settings[name]]
    if other:
        raise ValueError(
            f"the cache {folder} was made with other values of {', '.join(other)}: use another {option}, or delete it"
        )
