"""Sets of latents with their prompts' embeddings, built batch by batch in memory or in a cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..models import dense_mode, is_hybrid
from ..models.family import denoiser
from ..pipelines.loading import quiet
from .buckets import Size
from .identity import changed_components
from .image_files import say
from .shards import (
    ShardedDataset,
    ShardFile,
    check_settings,
    missing_rows,
    read_settings,
    save_shard,
    shard_rows,
    write_settings,
)
from .teacher import SharedText, Teacher

IMAGES = ("latents", "states", "times")  # an image's own tensors; the others of a row are its prompt's


@dataclass(frozen=True)
class LatentInfo:
    """Describes how a set was made, and how its teacher samples while training.

    height, width: in pixels. steps, guidance_scale, max_sequence_length, seed: as the teacher's pipeline was called.
    teacher_made: the images are the teacher's own, made with `guidance_scale`.
    states: how many intermediate states of each image's sampling are kept; 0: the images alone.
    """

    height: int
    width: int
    steps: int
    guidance_scale: float
    max_sequence_length: int | None = None
    seed: int = 0
    teacher_made: bool = True
    states: int = 0


class LatentData(ShardedDataset):
    """Latents and prompt embeddings, one row an image.

    Its `buckets` are the rows of each size, in their order: {(height, width) in pixels: rows}. Only rows of one bucket
    can be stacked.

    shards: tables of equally many rows per key: "latents" (as the transformer takes them: [N, C, h, w], or
        [N, tokens, C] where its family packs them) and the prompts' tensors under the names of the
        pipeline's arguments ("prompt_embeds", ...), which rows may share (`teacher.SharedText`). Trajectories also
        have "states" [N, states, ...] and "times" [N, states].
    empty: the empty prompt's tensors, one row each, which prompt dropout puts in place of the prompt's.
    order: see `ShardedDataset`. sizes: of every row's image; None: all are of the info's size. content: a digest of
        all that the rows were made from, in their order, by which a run that is resumed knows its set; None if it is
        not known. prompts: the rows' prompts themselves, for what is shown of them; None if they are not known.
    """

    def __init__(
        self,
        shards: Sequence[Mapping],
        empty: dict[str, torch.Tensor],
        info: LatentInfo,
        order: Sequence[int] | None = None,
        content: str | None = None,
        sizes: Sequence[Size] | None = None,
        prompts: Sequence[str] | None = None,
    ):
        super().__init__(shards, order)
        self.empty, self.info, self.content, self.prompts = empty, info, content, prompts
        self.buckets: dict[Size, Sequence[int]] = {(info.height, info.width): range(len(self))}
        if sizes is not None:
            self.buckets = {size: [] for size in sorted(set(sizes))}
            for row, size in enumerate(sizes):
                self.buckets[size].append(row)

    @cached_property
    def shapes(self) -> dict[Size, tuple[int, ...]]:
        """The shape of an image's latents in each bucket."""
        first = {size: self.rows(rows[:1], ["latents"]) for size, rows in self.buckets.items()}
        return {size: tuple(row["latents"].shape[1:]) for size, row in first.items()}


@dataclass(frozen=True)
class Place:
    """Where a set is kept, and what it is made by.

    folder: the cache's folder; None keeps the set in memory. record: what the folder's data.json says, {} if there is
    none yet. settings: what the rows depend on besides the teacher. teacher: see `describe_components`.
    """

    folder: Path | None
    record: dict[str, Any]
    settings: dict[str, Any]
    teacher: dict[str, Any]


def find_place(
    teacher: Teacher,
    cache: str | Path | None,
    settings: dict[str, Any],
    components: Sequence[str],
    *,
    says: bool = True,
) -> Place:
    """Find where a set is kept: in `cache`, or in a folder inside it if another teacher's set is there.

    Teachers are told apart by their content, so that one may move, and another may come to its place: then the sets of
    both are kept. settings: what the rows depend on besides the teacher. components: the names of the pipeline's
    components that make the rows, besides the text encoders. says: print where another teacher's set is kept.

    Raises ValueError where the cache was made with other settings.
    """
    pipeline, described = teacher.pipeline, teacher.describe(components)
    settings = {"pipeline": type(pipeline).__name__, "dtype": str(denoiser(pipeline).dtype), **settings}
    settings["max_sequence_length"] = teacher.texts.length
    if not cache:
        return Place(None, {}, settings, described)
    folder = Path(cache)
    record = read_settings(folder)
    if record is None:
        if any(folder.glob("latents-*.safetensors")):
            raise ValueError(f"{folder} has latents but no data.json, which says what they are of: delete it")
        return Place(folder, {}, settings, described)
    settings = _as_recorded(record, settings, teacher)
    check_settings(folder, record, settings)
    if "teacher" not in record:  # version 0.1 knew a teacher by its place alone
        if Path(record.get("model", "")).resolve() != Path(_name_of(pipeline)).resolve():
            raise ValueError(
                f"the cache {folder} was made by version 0.1 with other values of model ({record.get('model')!r}, now "
                f"{_name_of(pipeline)!r}), and does not tell its weights: use another data.cache, or the model's old path"
            )
        return Place(folder, record, settings, described)
    changed = changed_components(record["teacher"], described)
    if not changed:
        return Place(folder, record, settings, described)
    own = folder / f"teacher-{hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]}"
    for other in sorted(folder.glob("teacher-*")):
        found = read_settings(other) or {}
        if not changed_components(found.get("teacher", {}), described):
            settings = _as_recorded(found, settings, teacher)
            check_settings(other, found, settings)
            own, record = other, found
            break
    else:
        record = {}
    if says:
        say(f"{folder} holds the set of another teacher ({', '.join(changed)} differ): this one's is in {own}")
    return Place(own, record, settings, described)


def _as_recorded(record: dict[str, Any], settings: dict[str, Any], teacher: Teacher) -> dict[str, Any]:
    """The settings, with no text length where a cache's record has none and it is the usual one: that is the same."""
    length, usual = settings["max_sequence_length"], teacher.texts.family.usual_sequence_length()
    if record.get("max_sequence_length") is None and length == usual:
        return {**settings, "max_sequence_length": None}
    return {**settings, "max_sequence_length": length}


def _name_of(pipeline) -> str:
    return str(pipeline.config.get("_name_or_path"))


def build_latents(
    teacher: Teacher,
    info: LatentInfo,
    make_batch: Callable[[range, dict[str, torch.Tensor], dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    place: Place,
    *,
    wanted: Sequence[int],
    prompts: Mapping[int, str],
    rows: dict[str, Any],
    content: Any,
    sizes: Mapping[int, Size] | None = None,
    batch_size: int,
    desc: str,
    progress: bool,
) -> LatentData:
    """Build or reopen a set, one shard per call of `make_batch`, by all of `teacher.texts.processes`.

    A cache is a folder of one safetensors file per shard, each whole or absent; the prompts' tensors are in files of
    their own, once for all rows of a prompt. (Caches of earlier versions have them in every row.) An interrupted run
    continues where it stopped, with any batch size and number of processes; a finished cache is only opened, and
    nothing is written.

    make_batch: (numbers of the rows, their prompts' tensors, the empty prompt's) -> the images' tensors, made with the
        dense teacher.
    wanted: the numbers of the set's rows in its order. prompts: of each of them. rows: what the cache records of them,
        which may grow.
    sizes: of each row's image, where they differ; the rows of a call of `make_batch` are of one size.
    content: what the set's rows are, in its order, for `LatentData.content`; None if that is not known.
    """
    folder, texts = place.folder, teacher.texts
    processes = texts.processes
    if folder is None and processes.count > 1:
        raise ValueError("several processes need a cache, in which they find each other's images")
    order = sorted(set(wanted))
    old_size = place.record.get("batch_size")
    there = _opened(folder, old_size)
    missing = missing_rows(order, there, batch_size, sizes)
    without = {row for part, shard in there if not _own_text(shard) for row in part}.union(*missing)
    old_empty = folder / "empty.safetensors" if folder is not None else None  # of a cache with the text in its rows
    has_empty = old_empty is not None and old_empty.exists()
    needed = [prompts[row] for row in order if row in without]
    teacher.encode(needed if has_empty else ["", *needed], batch_size, progress)
    pipeline = teacher.pipeline
    if missing and folder is not None:
        processes.gather()  # all have seen the same files, before one writes
        if processes.rank == 0:
            new = {**place.settings, "model": _name_of(pipeline), "teacher": place.teacher}
            record = {**(place.record or new), **rows}
            if record != place.record:
                write_settings(folder, record)
        processes.gather()
    empty = {key: table[:] for key, table in ShardFile(old_empty).items()} if has_empty else texts.rows([""])

    done = len(order) - sum(map(len, missing))
    with (
        dense_mode(denoiser(pipeline)) if is_hybrid(denoiser(pipeline)) else nullcontext(),
        quiet(pipeline),
        tqdm(total=len(order), initial=done, desc=desc, unit="image", disable=not progress) as bar,
    ):
        for turn in range(0, len(missing), processes.count):
            together = missing[turn : turn + processes.count]  # a part for each process
            for part in together[processes.rank : processes.rank + 1]:
                tensors = make_batch(part, texts.rows([prompts[row] for row in part]), empty)
                if folder is None:
                    there.append((part, {key: value.cpu() for key, value in tensors.items()}))
                else:
                    save_shard(folder / f"latents-{part.start:05d}-{part.stop:05d}.safetensors", tensors)
            bar.update(sum(map(len, together)))
    if missing and folder is not None:
        processes.gather()
        there = _opened(folder, old_size)

    def with_text(part: range, shard: Mapping) -> Mapping:
        if _own_text(shard):
            return shard
        return SharedText(shard, [texts.place(prompts[row]) if row in prompts else None for row in part])

    there = [(part, shard) for part, shard in there if not prompts.keys().isdisjoint(part)]
    places = {row: number for number, row in enumerate(row for part, _ in there for row in part)}
    if content is not None:
        weights = {name: component.get("weights") for name, component in place.teacher.items()}
        content = hashlib.sha256(json.dumps([place.settings, weights, content]).encode()).hexdigest()
    of_rows = None if sizes is None else [sizes[row] for row in wanted]
    shards = [with_text(part, shard) for part, shard in there]
    order, texts_of_rows = [places[row] for row in wanted], [prompts[row] for row in wanted]
    return LatentData(shards, empty, info, order, content, of_rows, texts_of_rows)


def _opened(folder: Path | None, old_size: int | None) -> list[tuple[range, Mapping]]:
    """The shards of a cache, and the rows that each has. Raises ValueError for one that does not hold its rows."""
    if folder is None:
        return []
    opened = [(rows, ShardFile(path)) for rows, path in shard_rows(folder, old_size)]
    for rows, shard in opened:
        if any(shard.shape(key)[0] != len(rows) for key in shard):
            raise ValueError(
                f"{shard.path} is damaged (it does not hold {len(rows)} rows): delete it and run again to remake it"
            )
    return opened


def _own_text(shard: Mapping) -> bool:
    """Whether a shard's rows have their prompts' tensors, as those of earlier versions do."""
    return any(key not in IMAGES for key in shard)
