"""Training images without a data set: the teacher makes them from prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from ..models import family_of
from ..models.family import denoiser
from ..models.surgery import arguments_of
from .latents import LatentData, LatentInfo, Place, build_latents, find_place
from .prompts import read_prompts
from .shards import ALONE, Processes, missing_rows, read_settings, shard_rows
from .teacher import Teacher


def teacher_images(
    pipeline,
    prompts: str | Path | Sequence[str],
    *,
    images: int,
    height: int,
    width: int,
    steps: int,
    guidance_scale: float,
    max_sequence_length: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    states: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> LatentData:
    """Make images from prompts with the teacher's pipeline; returns their latents with the prompts' embeddings.

    Image i has prompt number i modulo the number of prompts, and noise from a generator seeded with seed + i, whatever
    the batch size. A transformer that is converted already runs as the dense teacher.

    pipeline: or a `teacher.Teacher`, whose text encoders are loaded apart; then `processes` and the rest of what it has
        are its own.
    prompts: a list, or a file, see `read_prompts`.
    states: how many of the transformer's inputs to keep while each image is sampled, with their times, evenly spaced
        from the first step on: the set then holds trajectories from noise to the teacher's images. 0 keeps none.
    cache: a folder to keep the set in; None keeps it in memory. An interrupted run continues where it stopped. More
        images are added to those that are there, and fewer are the first of them; the teacher may have moved. Another
        teacher's images, by its weights and not its path, are kept beside the first's, in a folder inside the cache.
    processes: those that share the work, if there are several; every one of them calls this, with a cache.

    Raises ValueError for a cache made with other settings, and for prompts that images of it do not have.
    """
    if not 0 <= states <= steps:
        raise ValueError(f"data.states must be in [1, data.steps = {steps}], got {states}")
    prompts = read_prompts(prompts, says=processes.rank == 0)
    teacher = Teacher.of(pipeline, max_sequence_length, cache, processes)
    info = LatentInfo(height, width, steps, guidance_scale, max_sequence_length, seed, states=states)
    if not cache or read_settings(Path(cache)) is None:  # a new set: what it lacks is known without the transformer
        teacher.encode(["", *prompts[:images]], batch_size, progress)

    def make_batch(
        rows: range, text: dict[str, torch.Tensor], empty: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        with captured_inputs(teacher.pipeline, len(rows)) if states else nullcontext() as inputs:
            latents = sample(teacher.pipeline, text, empty, info, [seed + i for i in rows], output_type="latent")
        kept = {}
        if states:
            chosen = [inputs[round(k * (len(inputs) - 1) / max(states - 1, 1))] for k in range(states)]
            kept = {"states": torch.stack([x for x, _ in chosen], 1), "times": torch.stack([t for _, t in chosen], 1)}
        return {"latents": latents, **kept}

    place = find_place(
        teacher, cache, asdict(info), (teacher.texts.family.component, "scheduler"), says=processes.rank == 0
    )
    return build_latents(
        teacher,
        info,
        make_batch,
        place,
        wanted=range(images),
        prompts={i: prompts[i % len(prompts)] for i in range(images)},
        rows=check_prompts(place, prompts, images),
        content=[prompts[i % len(prompts)] for i in range(images)],
        batch_size=batch_size,
        desc="teacher images",
        progress=progress,
    )


def check_prompts(place: Place, prompts: Sequence[str], images: int) -> dict:
    """What a cache records of its rows: image i has prompt i modulo the number of prompts.

    Raises ValueError, naming the first one, where an image in the cache has another prompt than it would have now.
    """
    if not place.record:
        return {"images": images, "prompts": list(prompts[:images])}
    shards, before = shard_rows(place.folder, place.record.get("batch_size")), place.record["prompts"]
    if not missing_rows(range(images), shards, 1):
        shards = [(range(images), place.folder)]  # no other row is used, and the record stays as it is
    for row in (row for rows, _ in shards for row in rows):
        old, new = before[row % len(before)], prompts[row % len(prompts)]
        if old != new:
            raise ValueError(
                f"the cache {place.folder} was made with other values of prompts (image {row} is of {old!r}, and would "
                f"be of {new!r}): use another data.cache, or the prompts it was made of (more may follow them, as "
                "long as no image there repeats one)"
            )
    images = max([images, *(rows.stop for rows, _ in shards)])
    return {"images": images, "prompts": list(prompts[:images])}


@contextmanager
def captured_inputs(pipeline, count: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Within the block, collect (latents, times) of every step: what the transformer is called with, the last `count`.

    With classifier-free guidance those are the conditional ones of a batch, or the first of two calls. Times are in the
    unit of the family's recipes.
    """
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    family = family_of(denoiser(pipeline))

    def keep(module, arguments, kwargs):
        named = arguments_of(module, arguments, kwargs)
        found = tuple(value[-count:].cpu() for value in family.latents_and_times(named))
        if family.guided_together or not inputs or not all(map(torch.equal, found, inputs[-1])):
            inputs.append(found)

    handle = denoiser(pipeline).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield inputs
    finally:
        handle.remove()


@torch.no_grad()
def sample(
    pipeline,
    text: dict[str, torch.Tensor],
    empty: dict[str, torch.Tensor],
    info: LatentInfo,
    seeds: Sequence[int],
    output_type: str = "pil",
):
    """Sample images of encoded prompts, each from a seed of its own.

    empty: the empty prompt's tensors, one row each. output_type: "pil", or "latent" for latents as the transformer
    takes them.
    """
    device = pipeline._execution_device  # its weights may be offloaded
    text, empty = ({name: value.to(device) for name, value in tensors.items()} for tensors in (text, empty))
    family = family_of(denoiser(pipeline))
    arguments = family.sampling_arguments(text, empty, len(seeds))
    arguments[family.guidance_argument] = info.guidance_scale
    images = family.sampler(pipeline)(
        **arguments,
        height=info.height,
        width=info.width,
        num_inference_steps=info.steps,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type=output_type,
    ).images
    return family.sampled_latents(getattr(pipeline, "vae", None), images) if output_type == "latent" else images
