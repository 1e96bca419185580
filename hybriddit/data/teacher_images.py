"""Training images without a data set: the teacher makes them from prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from ..models import dense_mode, is_hybrid
from .latents import LatentData, LatentInfo, TableFile, claim_folder, save_table


def read_prompts(prompts: str | Path | Sequence[str]) -> list[str]:
    """Prompts from a list, or from a text file with one a line (blank lines are skipped)."""
    if isinstance(prompts, (str, Path)):
        path = Path(prompts)
        if not path.is_file():
            raise FileNotFoundError(f"no prompt file at {str(prompts)!r} (data.prompts): one prompt a line")
        prompts = read_text(path).splitlines()
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("data.prompts holds no prompt")
    return prompts


def read_text(path: Path) -> str:
    """A UTF-8 file's text. ValueError, naming the file, where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): save it as UTF-8") from None


def teacher_images(
    pipeline,
    prompts: Sequence[str],
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
    """Let the teacher make `images` images; keep their latents and the prompts' embeddings.

    Image i is of prompt i modulo their number, from a generator seeded seed + i, so that it does not depend on
    batch_size. A transformer that is converted already runs as the dense teacher.

    states: of every image's sampling, keep so many inputs of the transformer, evenly spaced from the first step on,
        with their times; the set is then one of trajectories, from noise to the teacher's image.
    cache: see `make_set`.
    """
    if not 0 <= states <= steps:
        raise ValueError(f"data.states must be in [1, data.steps = {steps}], got {states}")
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

    return make_set(
        pipeline,
        info,
        make_batch,
        count=images,
        batch_size=batch_size,
        making={"images": images, "prompts": list(prompts[:images])},
        cache=cache,
        desc="teacher images",
        progress=progress,
    )


def make_set(
    pipeline,
    info: LatentInfo,
    make_batch: Callable[[range, dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    *,
    count: int,
    batch_size: int,
    making: dict,
    cache: str | Path | None,
    desc: str,
    progress: bool,
) -> LatentData:
    """A set of `count` rows, `make_batch(rows, the empty prompt's tensors)` by `make_batch(...)`.

    cache: a folder of safetensors shards, one per batch, each whole or absent; an interrupted run continues where it
        stopped, and a finished cache is only opened. Raises ValueError if it was made with other settings, which
        `making` tells as far as info and the pipeline do not.
    """
    folder = Path(cache) if cache is not None else None
    if folder is not None:
        teacher = {"pipeline": type(pipeline).__name__, "model": str(pipeline.config.get("_name_or_path"))}
        teacher["dtype"] = str(pipeline.transformer.dtype)
        claim_folder(folder, {**teacher, **asdict(info), **making, "batch_size": batch_size})

    def table(name: str, make: Callable[[], dict[str, torch.Tensor]]) -> Mapping:
        if folder is None:
            return {key: value.cpu() for key, value in make().items()}
        if not (folder / name).exists():
            save_table(folder / name, make())
        return TableFile(folder / name)

    empty = table("empty.safetensors", lambda: encode_prompts(pipeline, [""], info.max_sequence_length))
    empty = {key: values[:] for key, values in empty.items()}
    shards = []
    with (
        dense_mode(pipeline.transformer) if is_hybrid(pipeline.transformer) else nullcontext(),
        quiet(pipeline),
        tqdm(total=count, desc=desc, unit="image", disable=not progress) as bar,
    ):
        for number, start in enumerate(range(0, count, batch_size)):
            rows = range(start, min(start + batch_size, count))
            shards.append(table(f"latents-{number:05d}.safetensors", lambda rows=rows: make_batch(rows, empty)))
            bar.update(len(rows))
    return LatentData(shards, empty, info)


@contextmanager
def captured_inputs(pipeline, count: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Within it, what the transformer is called with: (hidden_states, times), of the last `count` of a batch.

    Those are the conditional ones under classifier-free guidance. Times are as `training.recipes.draw_times` gives
    them: in [0, 1] for FLUX and Stable Diffusion 3, steps of the noise schedule for PixArt-Sigma.
    """
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    scale = 1000 if "StableDiffusion3" in type(pipeline).__name__ else 1

    def keep(module, arguments, kwargs):
        named = inspect.signature(module.forward).bind(*arguments, **kwargs).arguments
        hidden_states, times = named["hidden_states"][-count:], named["timestep"][-count:]
        inputs.append((hidden_states.cpu(), (times / scale if scale != 1 else times).cpu()))

    handle = pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield inputs
    finally:
        handle.remove()


@torch.no_grad()
def encode_prompts(pipeline, prompts: list[str], max_sequence_length: int | None = None) -> dict[str, torch.Tensor]:
    """The prompts' tensors under the names the pipeline's call takes them by, one row a prompt."""
    length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    kind = type(pipeline).__name__
    if "Flux" in kind:
        embeds, pooled, _ = pipeline.encode_prompt(prompts, **length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    if "StableDiffusion3" in kind:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    if "PixArt" in kind:
        embeds, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **length)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    raise ValueError(f"cannot encode prompts with a {kind}: supported are FLUX, Stable Diffusion 3 and PixArt-Sigma")


@torch.no_grad()
def sample(
    pipeline,
    text: dict[str, torch.Tensor],
    empty: dict[str, torch.Tensor],
    info: LatentInfo,
    seeds: Sequence[int],
    output_type: str = "pil",
):
    """Generate from encoded prompts, one seed each; PIL images, or latents as the transformer takes them."""
    device = pipeline.transformer.device
    arguments = {key: value.to(device) for key, value in text.items()}
    if "Flux" not in type(pipeline).__name__:  # classifier-free guidance
        count = len(seeds)
        arguments |= {f"negative_{key}": value.to(device).repeat_interleave(count, 0) for key, value in empty.items()}
    if "PixArt" in type(pipeline).__name__:
        arguments |= {"use_resolution_binning": False, "prompt": None, "negative_prompt": None}
    return pipeline(
        **arguments,
        height=info.height,
        width=info.width,
        num_inference_steps=info.steps,
        guidance_scale=info.guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type=output_type,
    ).images


@contextmanager
def quiet(pipeline):
    """Within it, the pipeline shows no progress bar of its own."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
