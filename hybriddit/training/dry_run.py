"""Estimate what a distillation needs, in seconds and without weights, from a full-size model of shapes only."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import nn

from ..config import HybridConfig
from ..data.buckets import describe_buckets
from ..data.image_folder import count_buckets
from ..data.prompts import few_prompts, read_prompts
from ..data.sources import SOURCES
from ..files import read_json
from ..models import families, family_of, is_hybrid
from ..models.family import find_published
from ..pipelines.loading import Base, refuse_sit, text_to_image
from ..stored import component_classes
from .distill import (
    bucket_notes,
    check_settings,
    loss_in_force,
    make_student,
    planned_grids,
    recipe_for,
    with_hybrid_of,
)
from .run_config import DistillConfig
from .step_cost import mean_step_cost

# all estimated times assume that a step reaches this share of an H100's dense bf16 peak
H100_PEAK = 989e12
ASSUMED_SHARE = 0.4


def dry_run(config: DistillConfig) -> dict:
    """Estimate what a run of this config would train, compute and hold in memory, as plain numbers.

    The model is built on the meta device from `model.path`, a local pipeline folder or a repository that a family
    lists, without weights or network. One training step of `train.batch_size / train.accumulation` images then runs on
    fake tensors, which have shapes and no data: torch counts its FLOPs, and its activations are what autograd keeps.

    Bytes are for one GPU that does the whole batch; FLOPs count two per multiply-add. With buckets, of which the
    images' headers tell the numbers, "tokens" and bytes are the largest's, and FLOPs those of the mean image. Raises
    what a real run would raise before it loads weights, and ValueError for a repository that no family lists.
    """
    check_settings(config)
    model, vae_scale_factor, tokenizer_length = plan_model(config.model.config or config.model.path)
    config = with_hybrid_of(config, HybridConfig.from_saved(model.config.hybrid_config) if is_hybrid(model) else None)
    family, recipe = family_of(model), recipe_for(model, config)
    source = SOURCES[config.data.source]
    loss = loss_in_force(recipe, config, source.teacher_made, source.trajectories)
    grids = planned_grids(config, model, vae_scale_factor)
    with torch.device("meta"):
        trained = make_student(model, config)
    text_length = family.text_length(config.data.max_sequence_length, tokenizer_length)

    train, data = config.train, config.data
    count = train.batch_size // train.accumulation
    bf16 = train.precision == "bf16"

    def values(*shape: int) -> torch.Tensor:
        dtype = torch.bfloat16 if bf16 else torch.float32
        return torch.zeros((), dtype=dtype).expand(shape)  # one element in memory

    text = family.example_text(model.config, count, text_length, values)
    images = source.count(data)
    buckets = {size: images for size in grids}
    if data.buckets is not None:
        buckets = count_buckets(data.folder, list(grids), data.max_images)
        images = sum(buckets.values())
    by_grid = {grids[size]: number for size, number in buckets.items()}
    largest, step = mean_step_cost(model, by_grid, text, count, bf16=bf16)
    grid = max(by_grid, key=lambda grid: grid[0] * grid[1])
    recomputed = step["student"] if train.gradient_checkpointing else 0
    step_flops = train.accumulation * (step["teacher"] + step["student"] + step["backward"] + recomputed)
    guided = family.guided and data.guidance_scale > 1  # two passes a step of the sampler
    image_flops = images * data.steps * (2 if guided else 1) * step["teacher"] // count if source.teacher_made else 0

    element = 2 if bf16 else 4
    frozen = sum(t.numel() for name, t in model.state_dict().items() if ".hybrid." not in name)
    added = sum(p.numel() for p in trained.values())
    activations = {"with_checkpointing": largest["checkpointed"], "without_checkpointing": largest["kept"]}
    memory = {
        "frozen": frozen * element,
        "trained": added * 4 * 5,  # fp32: the weights, their gradients, Adam's two moments and the average
        "activations": activations["with_checkpointing" if train.gradient_checkpointing else "without_checkpointing"],
    }
    of_text = sum(tensor[0].numel() * tensor.element_size() for tensor in text.values())
    times = 1 + (data.states if source.trajectories else 0)

    def row(grid: tuple[int, int]) -> int:
        return of_text + prod(family.latents_shape(model.config, grid)) * element * times

    disk = {
        "cache": sum(number * row(grid) for grid, number in by_grid.items()) if data.cache else 0,
        # the weights, their average and Adam's moments, the adapter; one more while it is written
        "checkpoints": (config.output.keep + 1) * added * 4 * 5 if config.output.checkpoint_every else 0,
    }
    prompts = len(read_prompts(data.prompts)) if source.reads == "prompts" else None
    throughput = H100_PEAK * ASSUMED_SHARE
    return {
        "estimate": True,
        "model": config.model.path,
        "class": family.dense_class.__name__,
        "parameters": sum(p.numel() for name, p in model.named_parameters() if ".hybrid." not in name),
        "trained_parameters": added,
        "tokens": {"grid": list(grid), "image": grid[0] * grid[1], "text": text_length},
        "buckets": [
            {"size": list(size), "grid": list(grids[size]), "images": number} for size, number in buckets.items()
        ],
        "notes": bucket_notes(list(buckets.values()), config),
        "attention_flops": step["attention"],
        "forward_flops": {"teacher": step["teacher"] // count, "student": step["student"] // count},
        "step_flops": step_flops,
        "data_flops": image_flops,
        "images_per_pass": count,
        "gradient_checkpointing": train.gradient_checkpointing,
        "precision": train.precision,
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "activation_bytes": activations,
        "disk_bytes": disk,
        "prompts": prompts,
        "epochs": train.steps * train.batch_size / images,
        "loss": {"task": loss.task, "output": loss.output, "layer": loss.layer, "prompt_dropout": loss.prompt_dropout},
        "assumed_flops_per_second": throughput,
        "hours": {
            "data": image_flops / throughput / 3600,
            "training": train.steps * step_flops / throughput / 3600,
        },
        "steps": train.steps,
        "images": images,
        "batch_size": train.batch_size,
    }


def report(figures: dict) -> str:
    """Format `dry_run`'s figures for a terminal."""
    attention, forward, memory = (figures[key] for key in ("attention_flops", "forward_flops", "memory_bytes"))
    tokens, hours, activations = figures["tokens"], figures["hours"], figures["activation_bytes"]
    share = figures["trained_parameters"] / figures["parameters"]
    if figures["gradient_checkpointing"]:
        how, other = "with gradient checkpointing", f"without it {_si(activations['without_checkpointing'], 'B')}"
        again = ", and the student's forward again for gradient checkpointing"
    else:
        how, other = "without gradient checkpointing", f"with it {_si(activations['with_checkpointing'], 'B')}"
        again = ""
    dearer = forward["student"] > forward["teacher"]
    loss = ", ".join(f"{name} {value:g}" for name, value in figures["loss"].items())
    of_prompts = "" if figures["prompts"] is None else f" of {figures['prompts']:,} prompts"
    few = figures["prompts"] and few_prompts(figures["prompts"], figures["images"])
    rows = [
        ("", "Estimates, from shapes alone: no weights were read, nothing was measured."),
        ("model", f"{figures['model']}: {figures['class']}, {figures['parameters']:,} parameters"),
        ("trained", f"{figures['trained_parameters']:,} parameters, {share:.2%} of the model's"),
        ("tokens", f"{tokens['grid'][0]} x {tokens['grid'][1]} of the image, {tokens['text']} of the text"),
        *_bucket_rows(figures),
        ("attention", f"{_si(attention['dense'], 'FLOP')} dense, {_si(attention['hybrid'], 'FLOP')} hybrid"),
        ("", "one forward pass of one image; projections apart"),
        (
            "forward",
            f"{_si(forward['teacher'], 'FLOP')} teacher, {_si(forward['student'], 'FLOP')} student, of one image",
        ),
        ("", "as PyTorch counts it, windows as tiles compute them"),
        *([("", "MORE than the teacher's: at this size a smaller hybrid.window would pay")] if dearer else []),
        ("images", f"{figures['images']:,}{of_prompts}; the steps see each {figures['epochs']:.3g} times"),
        *([("", few)] if few else []),
        ("losses", loss),
        ("step", f"{_si(figures['step_flops'], 'FLOP')} for {figures['batch_size']} images"),
        ("", f"teacher's forward, student's forward and backward{again}"),
        ("memory", f"{_si(memory['total'], 'B')} on one GPU that does the whole batch:"),
        ("", f"{_si(memory['frozen'], 'B')} frozen weights"),
        ("", f"{_si(memory['trained'], 'B')} trained weights, their gradients, Adam's moments and average, in fp32"),
        ("", f"{_si(memory['activations'], 'B')} activations: what autograd keeps and the losses compare,"),
        ("", f"{figures['images_per_pass']} images at a time, {how} ({other})"),
        ("", "not in it: VAE, text encoders (while images are made), layer norms that a GPU's autocast keeps in fp32,"),
        ("", "gradients in flight, the kernels' workspaces, what the allocator wastes"),
        (
            "disk",
            f"{_si(figures['disk_bytes']['cache'], 'B')} in data.cache, "
            f"{_si(figures['disk_bytes']['checkpoints'], 'B')} of checkpoints",
        ),
        ("time", f"{_duration(hours['data'])} of the transformer for {figures['images']:,} images"),
        ("", f"{_duration(hours['training'])} for {figures['steps']:,} steps"),
        (
            "",
            f"one GPU, assumed to do {_si(figures['assumed_flops_per_second'], 'FLOP')}/s: {ASSUMED_SHARE:.0%} of an "
            f"H100's dense bf16 peak ({_si(H100_PEAK, 'FLOP')}/s)",
        ),
        ("", "not in it: text encoders, VAE, sample grids, checkpoints, loading"),
    ]
    return "\n".join(f"{name:<11}{text}" for name, text in rows)


def _bucket_rows(figures: dict) -> list[tuple[str, str]]:
    buckets = {tuple(bucket["size"]): bucket["images"] for bucket in figures["buckets"]}
    if len(buckets) == 1:
        return []
    return [
        ("", "in the largest bucket, which the memory is for; FLOPs and times are those of the mean image"),
        ("buckets", f"height x width (images): {describe_buckets(buckets)}"),
        *(("", note) for note in figures["notes"]),
    ]


def _si(value: float, unit: str) -> str:
    scale, prefix = next(
        ((s, p) for s, p in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= s), (1e3, "k")
    )
    return f"{value / scale:.3g} {prefix}{unit}"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.3g} h"
    return f"{hours * 60:.2g} min" if hours >= 1 / 60 else f"{hours * 3600:.2g} s"


def plan_model(path: str) -> tuple[nn.Module, int, int]:
    """The transformer on the meta device, the pixels per latent, and the first tokenizer's maximum length.

    path: a local pipeline folder, of which only the JSON files are read, or a repository that a family lists. Raises
    ValueError for anything else and for a transformer that is not supported, and FileNotFoundError if a file of the
    folder is missing.
    """
    folder = Path(path)
    refuse_sit(path)
    published = find_published(path)
    if published is not None and not folder.is_dir():
        family, found = published
        with torch.device("meta"):
            return family.dense_class(**found.arguments), found.vae_scale_factor, 77
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        base = text_to_image(Base(path, path, None, index, None, None))
        model, vae_scale_factor = base.shapes()
        tokenizer_length = 77  # what diffusers' pipelines go by without a tokenizer
        if component_classes(index).get("tokenizer"):
            tokenizer = base.read_part("tokenizer", "tokenizer_config.json")
            tokenizer_length = tokenizer.get("model_max_length", tokenizer_length)
        return model, vae_scale_factor, tokenizer_length
    known = ", ".join(repository for family in families() for repository in family.published)
    raise ValueError(f"a dry run needs a local pipeline folder, or one of {known}: model.path is {path!r}")
