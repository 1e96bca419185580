"""Latents with their prompts' embeddings: rows of tensors, in memory or in safetensors shards on disk."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files import CHECKSUM, read_tensors, replacing, write_json, write_tensors


@dataclass(frozen=True)
class LatentInfo:
    """How a set was made. Sets of different making never share a cache.

    height, width: in pixels. steps, guidance_scale, max_sequence_length, seed: as the teacher's pipeline was called.
    teacher_made: the images are the teacher's own, made with `guidance_scale`.
    states: how many of each image's sampling are kept; 0: the images alone.
    """

    height: int
    width: int
    steps: int
    guidance_scale: float
    max_sequence_length: int | None = None
    seed: int = 0
    teacher_made: bool = True
    states: int = 0


class Shards:
    """Rows of tensors in tables of equally many rows per key: a dict of tensors in memory, or a `TableFile` on disk."""

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


class LatentData(Shards):
    """A set of latents and prompt embeddings.

    shards: tables of equally many rows per key: "latents" (as the transformer takes them: [N, tokens, C] for FLUX,
        [N, C, h, w] else) and the prompt's tensors under the pipeline's names ("prompt_embeds", ...). A set of
        trajectories also has "states" [N, states, ...] and "times" [N, states]. In memory a table is a dict of tensors,
        on disk a `TableFile`.
    empty: the empty prompt's tensors, one row each; what prompt dropout puts in the prompt's place.
    """

    def __init__(self, shards: Sequence[Mapping], empty: dict[str, torch.Tensor], info: LatentInfo):
        super().__init__(shards)
        self.empty, self.info = empty, info

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image's latents."""
        return tuple(self.rows([0])["latents"].shape[1:])


def _length(shard: Mapping) -> int:
    key = next(iter(shard))
    return len(shard[key]) if isinstance(shard, dict) else shard.shape(key)[0]


class TableFile(Mapping):
    """A safetensors file of tensors, as slices that are read when indexed.

    The whole file is held against its checksum before anything of it is read for the first time, not when it is
    opened: a large set then starts at once. Both raise ValueError where the file is damaged.
    """

    def __init__(self, path: Path):
        self.path, self._intact = path, False
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it and run again to remake it") from None
        self.checksum = (self._file.metadata() or {}).get(CHECKSUM)  # as the file has it, not yet compared

    def shape(self, key: str) -> tuple[int, ...]:
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


def save_table(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file so that it is whole or absent, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        write_tensors(partial, tensors)


def claim_folder(folder: Path, making: dict, key: str = "data.cache") -> None:
    """Note in `folder`, which the setting `key` names, how its set is made; ValueError if it holds another already."""
    path = folder / "data.json"
    making = json.loads(json.dumps(making))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, making)
        return
    try:
        found = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): use another {key}, or delete {folder}") from None
    other = [key for key in making if found.get(key) != making[key]]
    if other:
        raise ValueError(
            f"the cache {folder} was made with other values of {', '.join(other)}: use another {key}, or delete it"
        )
