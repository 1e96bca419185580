"""A pipeline whose images the processes of torchrun make together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from PIL import Image

from ..images import open_image
from ..models.family import TILED_VAES, denoiser
from .rows import gathered_numbers, of_first
from .shard import shard
from .tiles import spread_tiles

LIMIT = timedelta(minutes=10)  # a process that has not answered by then, while it loads weights too, hangs


@contextmanager
def together(pipeline: DiffusionPipeline, device: torch.device) -> Iterator[dist.ProcessGroup]:
    """Join torchrun's other processes, and spread the pipeline's images over them, within the block: rows and VAE tiles.

    device: where the pipeline is, a CPU or a GPU of this process's own. Yields the group of all processes. Raises as
    `shard`, and ValueError for fewer GPUs than processes and for other devices.
    """
    transformer = denoiser(pipeline)
    if transformer is None:
        raise ValueError(f"a {type(pipeline).__name__} has no transformer whose image could be shared")
    backends = {"cpu": "gloo", "cuda": "nccl"}
    if device.type not in backends:
        raise ValueError(f"an image is shared among GPUs of NVIDIA or AMD or among CPUs, not on {device.type}")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise ValueError(f"{here} processes need a GPU each, and this machine has {torch.cuda.device_count()}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backends[device.type], timeout=LIMIT)
    except RuntimeError as error:
        raise ConnectionError(f"the other processes did not come: {str(error).splitlines()[0]}") from error
    try:
        shard(transformer, dist.group.WORLD)
        vae = getattr(pipeline, "vae", None)
        if isinstance(vae, TILED_VAES):
            spread_tiles(vae, dist.group.WORLD)
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def image_of_first(path: Path, group: dist.ProcessGroup) -> Image.Image:
    """The image that the group's first process finds; the others may have other disks. Raises there as `open_image` does."""
    image = open_image(path) if dist.get_rank(group) == 0 else None
    width, height = gathered_numbers([0, 0] if image is None else image.size, group)[0]
    pixels = torch.empty(height, width, 3, dtype=torch.uint8) if image is None else torch.from_numpy(np.array(image))
    return Image.fromarray(of_first(pixels, group).numpy())
