"""Sets of latents with their prompts' embeddings, built batch by batch in memory or in a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..models import dense_mode, family_of, is_hybrid
from ..pipelines.loading import quiet
from .shards import ShardedDataset, ShardFile, save_shard, write_or_check_settings


@dataclass(frozen=True)
class LatentInfo:
    """Describes how a set was made. Sets that were made differently never share a cache.

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

    shards: tables of equally many rows per key: "latents" (as the transformer takes them: [N, C, h, w], or
        [N, tokens, C] where its family packs them) and the prompts' tensors under the names of the
        pipeline's arguments ("prompt_embeds", ...). Trajectories also have "states" [N, states, ...] and "times"
        [N, states].
    empty: the empty prompt's tensors, one row each, which prompt dropout puts in place of the prompt's.
    """

    def __init__(self, shards: Sequence[Mapping], empty: dict[str, torch.Tensor], info: LatentInfo):
        super().__init__(shards)
        self.empty, self.info = empty, info

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's latents."""
        return tuple(self.rows([0])["latents"].shape[1:])


def build_latents(
    pipeline,
    info: LatentInfo,
    make_batch: Callable[[range, dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    *,
    count: int,
    batch_size: int,
    settings: dict,
    cache: str | Path | None,
    desc: str,
    progress: bool,
) -> LatentData:
    """Build or reopen a set of `count` rows, one shard per call of `make_batch`.

    make_batch: (indices of the rows, the empty prompt's tensors) -> the rows' tensors, made with the dense teacher.
    cache: a folder of one safetensors file per shard, each whole or absent. An interrupted run continues where it
        stopped, and a finished cache is only opened. Raises ValueError where the cache was made with other settings.
    settings: what the rows depend on besides `info` and the teacher; recorded in the cache.
    """
    folder = Path(cache) if cache is not None else None
    if folder is not None:
        teacher = {"pipeline": type(pipeline).__name__, "model": str(pipeline.config.get("_name_or_path"))}
        teacher["dtype"] = str(pipeline.transformer.dtype)
        write_or_check_settings(folder, {**teacher, **asdict(info), **settings, "batch_size": batch_size})

    def shard(name: str, make: Callable[[], dict[str, torch.Tensor]]) -> Mapping:
        if folder is None:
            return {key: value.cpu() for key, value in make().items()}
        if not (folder / name).exists():
            save_shard(folder / name, make())
        return ShardFile(folder / name)

    empty = shard("empty.safetensors", lambda: encode_prompts(pipeline, [""], info.max_sequence_length))
    empty = {key: values[:] for key, values in empty.items()}
    shards = []
    with (
        dense_mode(pipeline.transformer) if is_hybrid(pipeline.transformer) else nullcontext(),
        quiet(pipeline),
        tqdm(total=count, desc=desc, unit="image", disable=not progress) as bar,
    ):
        for number, start in enumerate(range(0, count, batch_size)):
            rows = range(start, min(start + batch_size, count))
            shards.append(shard(f"latents-{number:05d}.safetensors", lambda rows=rows: make_batch(rows, empty)))
            bar.update(len(rows))
    return LatentData(shards, empty, info)


@torch.no_grad()
def encode_prompts(pipeline, prompts: list[str], max_sequence_length: int | None = None) -> dict[str, torch.Tensor]:
    """Encode prompts: tensors under the names of the pipeline's arguments, with one row per prompt.

    Raises ValueError for a pipeline whose transformer is of no known family, or that lacks a text encoder it needs.
    """
    family_of(pipeline.transformer).check_encoders(pipeline.components)
    length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    return family_of(pipeline.transformer).encode_prompts(pipeline, prompts, **length)
