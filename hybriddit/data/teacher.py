"""A distillation's teacher as its set is made: the pipeline, and the embeddings of prompts, each of which is made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import release_memory
from tqdm import tqdm

from ..files import make_folder
from ..models import family_of
from ..models.family import Family, denoiser
from .identity import describe_components
from .shards import ALONE, Processes, ShardFile, save_shard

PROMPTS = "sha256"  # the tensor of a file of embeddings that says which prompts they are of: uint8 [N, 32]


class Loaded:
    """A pipeline, or a part of one, that is loaded when it is needed. load: gives it."""

    def __init__(self, load: Callable[[], Any]):
        self._load, self._pipeline = load, None

    @property
    def pipeline(self) -> Any:
        """The pipeline, which is loaded if it is not there."""
        if self._pipeline is None:
            self._pipeline = self._load()
        return self._pipeline

    def free(self) -> None:
        """Let go of the pipeline; it is loaded again if it is needed again."""
        self._pipeline = None
        release_memory()


class PromptEmbeddings(Loaded):
    """The tensors that a pipeline's text encoders make of prompts, one row a prompt: in memory, or in a cache.

    family: of the pipeline's transformer. load: gives a pipeline with the encoders, which may lack the other parts.
    length: max_sequence_length; None: the pipeline's default.
    cache: a folder; the embeddings are in a folder in it that is named by the encoders' weights and the length, and not
        by the transformer. None keeps them in memory.
    processes: those that share the work; every one of them calls `add`.
    """

    def __init__(
        self,
        family: Family,
        load: Callable[[], Any],
        length: int | None = None,
        cache: str | Path | None = None,
        processes: Processes = ALONE,
    ):
        super().__init__(load)
        self._usual = family.usual_sequence_length()
        self.family, self.length, self.processes = family, self._usual if length is None else length, processes
        self._cache = Path(cache) if cache else None
        self._encoders: dict[str, dict[str, Any]] | None = None
        self._rows: dict[bytes, tuple[Mapping, int]] = {}  # by a prompt's digest: its place in a shard
        self._read_files: set[Path] = set()

    @property
    def encoders(self) -> dict[str, dict[str, Any]]:
        """What the text encoders are, see `describe_components`."""
        if self._encoders is None:
            self._encoders = describe_components(self.pipeline, encoder_names(self.family, self.pipeline.components))
        return self._encoders

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of the prompts, each once, that have not been encoded."""
        wanted = list(dict.fromkeys(prompts))
        if wanted:
            self._read(self._folder())
        return [prompt for prompt in wanted if _digest(prompt) not in self._rows]

    def add(self, prompts: Iterable[str], batch_size: int, progress: bool = False) -> None:
        """Encode those of the prompts that are not there yet, `batch_size` at a time.

        Raises ValueError for a pipeline that lacks a text encoder it needs.
        """
        wanted = self.missing(prompts)
        if not wanted:
            return
        folder = self._folder()
        if self._cache is not None:
            make_folder(self._cache)
        self.family.check_encoders(self.pipeline.components)
        parts = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
        count = self.processes.count
        self.processes.gather()  # all have seen the same files, before one writes
        with tqdm(total=len(wanted), desc="prompts", unit="prompt", disable=not progress) as bar:
            for turn in range(0, len(parts), count):
                together = parts[turn : turn + count]  # a part for each process
                for part in together[self.processes.rank : self.processes.rank + 1]:
                    self._keep(part, self._encode(part), folder)
                bar.update(sum(map(len, together)))
        self.processes.gather()
        self._read(folder)

    def place(self, prompt: str) -> tuple[Mapping, int]:
        """The shard that has a prompt's tensors, and their row in it. Raises KeyError for a prompt that was not added."""
        return self._rows[_digest(prompt)]

    def rows(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors of prompts that were added, one row each."""
        places = [self.place(prompt) for prompt in prompts]
        return {key: shared_rows(key, places) for key in tensor_names(places[0][0])}

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        length = {} if self.length is None else {"max_sequence_length": self.length}
        return self.family.encode_prompts(self.pipeline, prompts, **length)

    def _keep(self, prompts: list[str], tensors: dict[str, torch.Tensor], folder: Path | None) -> None:
        digests = b"".join(map(_digest, prompts))
        named = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(len(prompts), -1)
        shard = {PROMPTS: named, **{key: value.cpu() for key, value in tensors.items()}}
        if folder is None:
            self._rows |= {_digest(prompt): (shard, row) for row, prompt in enumerate(prompts)}
        else:
            save_shard(folder / f"prompts-{hashlib.sha256(digests).hexdigest()[:16]}.safetensors", shard)

    def _folder(self) -> Path | None:
        if self._cache is None:
            return None
        names = []
        for length in (self.length, *([None] if self.length == self._usual else [])):  # None: as callers once left it
            made_by = [self.family.name, length, self.encoders]
            names.append(f"text-{hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:12]}")
        folders = [self._cache / name for name in names]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    def _read(self, folder: Path | None) -> None:
        paths = set() if folder is None else set(folder.glob("prompts-*.safetensors")) - self._read_files
        for path in sorted(paths):
            shard = ShardFile(path)
            for row, digest in enumerate(shard.unchecked(PROMPTS)):
                self._rows.setdefault(bytes(digest.tolist()), (shard, row))
        self._read_files |= paths


class SharedText(Mapping):
    """A shard whose rows have the tensors of their prompts, which several rows may share.

    shard: the rows' own tensors. places: of each row's prompt, see `PromptEmbeddings.place`; None for rows that are not
    used.
    """

    def __init__(self, shard: Mapping, places: Sequence[tuple[Mapping, int] | None]):
        self.shard, self.places, self._own = shard, places, tuple(shard)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of one of the rows' own tensors."""
        return tuple(self.shard[key].shape) if isinstance(self.shard, dict) else self.shard.shape(key)

    def __getitem__(self, key: str):
        return self.shard[key] if key in self._own else _Column(key, self.places)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from tensor_names(next(place for place in self.places if place is not None)[0])

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Column:
    """One tensor of all rows' prompts, of which slices are read."""

    def __init__(self, key: str, places: Sequence[tuple[Mapping, int] | None]):
        self.key, self.places = key, places

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return shared_rows(self.key, self.places[rows])


def shared_rows(key: str, places: Sequence[tuple[Mapping, int]]) -> torch.Tensor:
    """One tensor of several prompts, one row each."""
    return torch.cat([shard[key][row : row + 1] for shard, row in places])


def tensor_names(shard: Mapping) -> list[str]:
    """The names of the tensors of a shard of embeddings."""
    return [key for key in shard if key != PROMPTS]


class Teacher(Loaded):
    """What makes a set: a pipeline, and the embeddings of its prompts. Each of its parts is described once.

    load: gives the pipeline; with `texts` it may lack the text encoders, which then are not in memory together with it.
    """

    def __init__(self, load: Callable[[], Any], texts: PromptEmbeddings):
        super().__init__(load)
        self.texts = texts
        self._described: dict[str, dict[str, Any]] = {}

    @classmethod
    def of(cls, pipeline: Any, length: int | None, cache: str | Path | None, processes: Processes) -> Teacher:
        """The teacher that a whole pipeline is; a teacher is returned as it is. Other arguments: of `PromptEmbeddings`."""
        if isinstance(pipeline, Teacher):
            return pipeline
        texts = PromptEmbeddings(family_of(denoiser(pipeline)), lambda: pipeline, length, cache, processes)
        return cls(lambda: pipeline, texts)

    @property
    def pipeline(self) -> Any:
        """The pipeline, which is loaded if it is not there; the encoders are described before, and not held with it."""
        if self._pipeline is None:
            _ = self.texts.encoders
            self.texts.free()
        return super().pipeline

    def describe(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What these components of the pipeline are, and the text encoders, see `describe_components`."""
        names = list(names)
        new = [name for name in names if name not in self._described]
        self._described |= describe_components(self.pipeline, new) if new else {}
        return {name: self._described[name] for name in names if name in self._described} | self.texts.encoders

    def encode(self, prompts: Iterable[str], batch_size: int, progress: bool) -> None:
        """Encode those of the prompts that have not been, while the encoders alone are loaded."""
        if missing := self.texts.missing(prompts):
            self.free()
            self.texts.add(missing, batch_size, progress)
            _ = self.texts.encoders  # they are described while they are there
        self.texts.free()


def encoder_names(family: Family, components: Iterable[str]) -> list[str]:
    """The names of a pipeline's text encoders."""
    return [name for name in components if name.startswith("text_encoder") or name in family.text_encoders]


def _digest(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode()).digest()
