"""Training images without a data set: the teacher makes them from prompts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from ..models import family_of
from .latents import LatentData, LatentInfo, build_latents, encode_prompts
from .prompts import read_prompts


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
) -> LatentData:
    """Make images from prompts with the teacher; returns their latents with the prompts' embeddings.

    Image i has prompt number i modulo the number of prompts, and noise from a generator seeded with seed + i, whatever
    the batch size. A transformer that is converted already runs as the dense teacher.

    prompts: a list, or a file, see `read_prompts`.
    states: how many of the transformer's inputs to keep while each image is sampled, with their times, evenly spaced
        from the first step on: the set then holds trajectories from noise to the teacher's images. 0 keeps none.
    cache: a folder to keep the set in, see `build_latents`; None keeps it in memory.
    """
    if not 0 <= states <= steps:
        raise ValueError(f"data.states must be in [1, data.steps = {steps}], got {states}")
    prompts = read_prompts(prompts)
    info = LatentInfo(height, width, steps, guidance_scale, max_sequence_length, seed, states=states)

    def make_batch(rows: range, empty: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        text = encode_prompts(pipeline, [prompts[i % len(prompts)] for i in rows], max_sequence_length)
        with captured_inputs(pipeline, len(rows)) if states else nullcontext() as inputs:
            latents = sample(pipeline, text, empty, info, [seed + i for i in rows], output_type="latent")
        kept = {}
        if states:
            chosen = [inputs[round(k * (len(inputs) - 1) / max(states - 1, 1))] for k in range(states)]
            kept = {"states": torch.stack([x for x, _ in chosen], 1), "times": torch.stack([t for _, t in chosen], 1)}
        return {"latents": latents, **kept, **text}

    return build_latents(
        pipeline,
        info,
        make_batch,
        count=images,
        batch_size=batch_size,
        settings={"images": images, "prompts": list(prompts[:images])},
        cache=cache,
        desc="teacher images",
        progress=progress,
    )


@contextmanager
def captured_inputs(pipeline, count: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Within the block, collect (latents, times) of every call of the transformer: the last `count` of each batch.

    With classifier-free guidance those are the conditional ones. Times are in the unit of the family's recipes.
    """
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    family = family_of(pipeline.transformer)

    def keep(module, arguments, kwargs):
        named = inspect.signature(module.forward).bind(*arguments, **kwargs).arguments
        latents, times = family.latents_and_times(named)
        inputs.append((latents[-count:].cpu(), times[-count:].cpu()))

    handle = pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
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
    device = pipeline.transformer.device
    text, empty = ({name: value.to(device) for name, value in tensors.items()} for tensors in (text, empty))
    arguments = family_of(pipeline.transformer).sampling_arguments(text, empty, len(seeds))
    return pipeline(
        **arguments,
        height=info.height,
        width=info.width,
        num_inference_steps=info.steps,
        guidance_scale=info.guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type=output_type,
    ).images
