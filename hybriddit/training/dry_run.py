"""Estimate what a distillation needs, in seconds and without weights, from a full-size model of shapes only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
import transformers
from torch import nn

from ..config import HybridConfig
from ..data.buckets import Size, describe_buckets
from ..data.image_folder import count_buckets
from ..data.prompts import few_prompts
from ..data.sources import SOURCES
from ..data.teacher import encoder_names
from ..files import read_json
from ..models import families, family_of, is_hybrid
from ..models.family import Family, find_published
from ..models.peak import decoder_peak, forward_peak, module_peak
from ..models.surgery import keep_dense
from ..pipelines.loading import Base, refuse_modular, refuse_sit, text_to_image
from ..stored import component_classes, weight_files
from .distill import (
    bucket_notes,
    check_settings,
    loss_in_force,
    make_student,
    planned_grids,
    recipe_for,
    with_hybrid_of,
)
from .estimates import (
    THROUGHPUT,
    Rows,
    assumption_row,
    checkpoint_bytes,
    duration,
    hours,
    memory_rows,
    number,
    on_several,
    several_rows,
    si,
    table,
    trained_bytes,
    trained_words,
)
from .losses import converted_layers
from .run_config import DistillConfig
from .step_cost import mean_step_cost, step_flops


@dataclass(frozen=True)
class Plan:
    """A pipeline as far as its shapes tell it, on the meta device.

    transformer: dense, or hybrid as it was saved. vae: None where there is none, or one of another class than the
    family's. vae_scale_factor: pixels per latent. tokenizer_length: the first tokenizer's maximum, in tokens.
    text_parameters: of the text encoders together; None where that is not known. quantised: the bytes of the
    transformer's files, where its weights are quantised; None where they are not. recipe: that the pipeline tells.
    """

    transformer: nn.Module
    vae: nn.Module | None
    vae_scale_factor: int
    tokenizer_length: int
    text_parameters: int | None
    quantised: int | None = None
    recipe: str | None = None


def dry_run(config: DistillConfig) -> dict:
    """Estimate what a run of this config would train, compute and hold in memory, as plain numbers.

    The model is built on the meta device from `model.path`, a local pipeline folder or a repository that a family
    lists, without weights or network. One training step of `train.batch_size / train.accumulation` images then runs on
    fake tensors, which have shapes and no data: torch counts its FLOPs, and its activations are what autograd keeps.

    Bytes are for one GPU that does the whole batch; FLOPs count two per multiply-add. What one pass holds besides the
    weights, while images are made or sample grids drawn, is counted on fake tensors too. With buckets, of which the
    images' headers tell the numbers, "tokens" and bytes are the largest's, and FLOPs those of the mean image. Raises
    what a real run would raise before it loads weights, and ValueError for a repository that no family lists.
    """
    check_settings(config)
    plan = plan_model(config.model.config or config.model.path)
    model = plan.transformer
    config = with_hybrid_of(config, HybridConfig.from_saved(model.config.hybrid_config) if is_hybrid(model) else None)
    config = replace(config, model=replace(config.model, recipe=config.model.recipe or plan.recipe))
    family, recipe = family_of(model), recipe_for(model, config)
    source = SOURCES[config.data.source]
    loss = loss_in_force(recipe, config, source.teacher_made, source.trajectories)
    grids = planned_grids(config, model, plan.vae_scale_factor)
    with torch.device("meta"):
        dense = family.dense_class.from_config({k: v for k, v in model.config.items() if k != "hybrid_config"})
        trained = make_student(model, config)
    text_length = family.text_length(config.data.max_sequence_length, plan.tokenizer_length)

    train, data = config.train, config.data
    count = train.batch_size // train.accumulation
    bf16 = train.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32

    def values(*shape: int) -> torch.Tensor:
        return torch.zeros((), dtype=dtype).expand(shape)  # one element in memory

    def text_of(prompts: int) -> dict[str, torch.Tensor]:
        return family.example_text(model.config, prompts, text_length, values)

    text = text_of(count)
    images = source.count(data)
    buckets = {size: images for size in grids}
    if data.buckets is not None:
        buckets = count_buckets(data.folder, list(grids), data.max_images)
        images = sum(buckets.values())
    by_grid = {grids[size]: number for size, number in buckets.items()}
    grid = max(by_grid, key=lambda grid: grid[0] * grid[1])
    largest, step = mean_step_cost(model, by_grid, text, count, bf16=bf16)
    passes = {"again": train.gradient_checkpointing, "distribution": loss.distribution > 0}
    last_flops = train.accumulation * step_flops(step, **passes)
    all_flops, kept = train.steps * last_flops, [largest]
    if loss.progressive_steps:  # half of the layers first
        keep_dense(model, list(converted_layers(model))[1::2])
        half, first = mean_step_cost(model, by_grid, text, count, bf16=bf16)
        keep_dense(model, ())
        all_flops += loss.progressive_steps * (train.accumulation * step_flops(first, **passes) - last_flops)
        kept.append(half)
    draws = images * data.steps * (2 if _guided(family, config) else 1)
    image_flops = draws * step["teacher"] // count if source.teacher_made else 0

    element = 2 if bf16 else 4
    frozen = sum(t.numel() for name, t in model.state_dict().items() if ".hybrid." not in name)
    added = sum(p.numel() for p in trained.values())
    sampled = 0  # what a pass holds while the student's is kept
    if loss.distribution:
        where = {"device": torch.device("cpu"), "dtype": dtype}
        sampled = max(forward_peak(run, grid, text, **where) for run in (dense, model))
    ways = {"with_checkpointing": "checkpointed", "without_checkpointing": "kept"}
    activations = {name: sampled + max(cost[way] for cost in kept) for name, way in ways.items()}
    memory = {
        "frozen": frozen * element if plan.quantised is None else plan.quantised,
        "trained": trained_bytes(config, trained.values()),
        "activations": activations["with_checkpointing" if train.gradient_checkpointing else "without_checkpointing"],
    }

    several = on_several(config, model, element, added, **memory)
    if plan.quantised is not None:
        several.pop("fsdp2", None)  # see `check_quantised`

    at_once = {"images": data.batch_size, "samples": _sampled_at_once(config)}
    size = max(buckets, key=prod)
    making, sampling = _without_gradients(config, plan, dense, memory, text_of, size, at_once, dtype)
    of_text = sum(tensor[0].numel() * tensor.element_size() for tensor in text.values())
    times = 1 + (data.states if source.trajectories else 0)

    def row(grid: tuple[int, int]) -> int:
        return prod(family.latents_shape(model.config, grid)) * element * times

    texts = source.texts(data) if source.texts else []
    different = len(dict.fromkeys(texts[:images])) + 1  # and the empty one
    of_images = sum(number * row(grid) for grid, number in by_grid.items())
    disk = {
        "cache": different * of_text + of_images if data.cache else 0,
        "checkpoints": checkpoint_bytes(memory["trained"], config.output),  # with an adapter in place of the gradients
    }
    prompts = len(texts) if source.reads == "prompts" else None
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
        "step_flops": last_flops,
        "data_flops": image_flops,
        "images_per_pass": count,
        "gradient_checkpointing": train.gradient_checkpointing,
        "precision": train.precision,
        "use_8bit_adam": config.optim.use_8bit_adam,
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "stage_bytes": {
            "prompts": None if plan.text_parameters is None else plan.text_parameters * element,
            "images": making,
            "training": sum(memory.values()),
            "samples": sampling,
        },
        "at_once": at_once,
        "offload": data.offload,
        "vae_counted": plan.vae is not None,
        "quantised": plan.quantised is not None,
        "several": several,
        "activation_bytes": activations,
        "disk_bytes": disk,
        "prompts": prompts,
        "without_caption": source.bare(data) if source.bare else 0,
        "epochs": train.steps * train.batch_size / images,
        "loss": {
            "task": loss.task,
            "output": loss.output,
            "layer": loss.layer,
            **({"distribution": loss.distribution} if loss.distribution else {}),
            "prompt_dropout": loss.prompt_dropout,
        },
        "progressive_steps": loss.progressive_steps,
        "assumed_flops_per_second": THROUGHPUT,
        "hours": {"data": hours(image_flops), "training": hours(all_flops)},
        "steps": train.steps,
        "images": images,
        "batch_size": train.batch_size,
    }


def _without_gradients(
    config: DistillConfig,
    plan: Plan,
    dense: nn.Module,
    memory: Mapping[str, int],
    text_of: Callable[[int], dict[str, torch.Tensor]],
    largest: Size,
    at_once: Mapping[str, int],
    dtype: torch.dtype,
) -> tuple[int | None, int | None]:
    """The bytes while images are made or encoded, and while samples are drawn; None where they are not known, or not done.

    plan: with the student as its transformer. dense: the teacher. memory: of the weights, while it trains. text_of:
    gives the tensors of so many prompts. largest: (height, width) of the images. at_once: how many of each.
    """
    data, family = config.data, family_of(dense)
    where = {"device": torch.device("cpu"), "dtype": dtype}
    vae = 0 if plan.vae is None else sum(p.numel() for p in plan.vae.parameters()) * dtype.itemsize
    latents = data.height // plan.vae_scale_factor, data.width // plan.vae_scale_factor
    grid = tuple(side // family.latents_per_token(dense.config) for side in latents)
    passes = 2 if _guided(family, config) and family.guided_together else 1

    def one_pass(model: nn.Module, images: int) -> int:
        return forward_peak(model, grid, text_of(images * passes), **where)

    making = sampling = None
    if SOURCES[data.source].teacher_made:
        making = memory["frozen"] + vae + one_pass(dense, at_once["images"])
    elif plan.vae is not None:
        pixels = torch.zeros(()).expand(at_once["images"], 3, *largest)
        making = memory["frozen"] + vae + module_peak(family.encoder(plan.vae), {"sample": pixels}, **where)
    if count := at_once["samples"]:
        peaks = [one_pass(model, count) for model in (dense, plan.transformer)]
        if plan.vae is not None:
            shape = family.latent_channels(dense.config), *latents
            peaks.append(decoder_peak(family.decoder(plan.vae), shape, images=count, **where))
        sampling = memory["frozen"] + memory["trained"] + vae + max(peaks)
    return making, sampling


def _guided(family: Family, config: DistillConfig) -> bool:
    """Whether a step of the sampler has two passes."""
    return family.guided and config.data.guidance_scale > family.guides_above


def _sampled_at_once(config: DistillConfig) -> int:
    """How many images the sample grids or the metrics draw at a time; 0: none are drawn."""
    grid = config.output.samples if config.output.sample_every else 0
    return max(grid, min(config.metrics.batch_size, config.metrics.samples) if config.metrics.every else 0)


def report(figures: dict) -> str:
    """Format `dry_run`'s figures for a terminal."""
    attention, forward = figures["attention_flops"], figures["forward_flops"]
    tokens, took = figures["tokens"], figures["hours"]
    share = figures["trained_parameters"] / figures["parameters"]
    again = ", and the student's forward again for gradient checkpointing" if figures["gradient_checkpointing"] else ""
    sampled = "; a forward of both for loss.distribution" if figures["loss"].get("distribution") else ""
    half = figures["progressive_steps"]
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
        ("attention", f"{si(attention['dense'], 'FLOP')} dense, {si(attention['hybrid'], 'FLOP')} hybrid"),
        ("", "one forward pass of one image; projections apart"),
        (
            "forward",
            f"{si(forward['teacher'], 'FLOP')} teacher, {si(forward['student'], 'FLOP')} student, of one image",
        ),
        ("", "as PyTorch counts it, windows as tiles compute them"),
        *([("", "MORE than the teacher's: at this size a smaller hybrid.window would pay")] if dearer else []),
        ("images", f"{figures['images']:,}{of_prompts}; the steps see each {number(figures['epochs'])} times"),
        *([("", few)] if few else []),
        *([("", f"and {bare:,} without a caption, left out")] if (bare := figures["without_caption"]) else []),
        ("losses", loss),
        ("step", f"{si(figures['step_flops'], 'FLOP')} for {figures['batch_size']} images"),
        ("", f"teacher's forward, student's forward and backward{again}{sampled}"),
        *([("", f"in the first {half:,} half of the layers are the teacher's")] if half else []),
        *memory_rows(figures["stage_bytes"], _stage_words(figures)),
        (
            "",
            "not in it: layer norms that a GPU's autocast keeps in fp32, gradients in flight, the kernels' workspaces,",
        ),
        ("", f"what the allocator wastes{_not_counted(figures)}"),
        *several_rows(figures["several"]),
        (
            "disk",
            f"{si(figures['disk_bytes']['cache'], 'B')} in data.cache, "
            f"{si(figures['disk_bytes']['checkpoints'], 'B')} of checkpoints",
        ),
        ("time", f"{duration(took['data'])} of the transformer for {figures['images']:,} images"),
        ("", f"{duration(took['training'])} for {figures['steps']:,} steps"),
        assumption_row(),
        ("", "not in it: text encoders, VAE, sample grids, checkpoints, loading"),
    ]
    return table(rows)


def _stage_words(figures: dict) -> dict[str, Rows]:
    """What each stage's memory is of."""
    memory, activations, at_once = figures["memory_bytes"], figures["activation_bytes"], figures["at_once"]
    if figures["gradient_checkpointing"]:
        how, other = "with gradient checkpointing", f"without it {si(activations['without_checkpointing'], 'B')}"
    else:
        how, other = "without gradient checkpointing", f"with it {si(activations['with_checkpointing'], 'B')}"
    offload = f", without data.offload={figures['offload']}" if figures["offload"] else ""
    made = "made" if figures["data_flops"] else "encoded"
    return {
        "prompts": [("", f"while prompts are encoded: the text encoders' weights{offload}")],
        "images": [
            (
                "",
                f"while images are {made}, data.batch_size={at_once['images']} at a time, by the dense teacher{offload}",
            )
        ],
        "training": [
            ("", "while it trains:"),
            ("", f"    {si(memory['frozen'], 'B')} frozen weights{', quantised' if figures['quantised'] else ''}"),
            (
                "",
                f"    {si(memory['trained'], 'B')} trained weights, {trained_words(figures)}",
            ),
            ("", f"    {si(memory['activations'], 'B')} activations: what autograd keeps and the losses compare,"),
            ("", f"    {figures['images_per_pass']} images at a time, {how} ({other})"),
        ],
        "samples": [("", f"while sample grids or metrics are drawn, {at_once['samples']} images at a time")],
    }


def _not_counted(figures: dict) -> str:
    """The parts whose sizes are not known."""
    parts = [] if figures["vae_counted"] else ["the VAE"]
    parts += ["the text encoders"] if figures["stage_bytes"]["prompts"] is None else []
    return "".join(f", {part}" for part in parts)


def _bucket_rows(figures: dict) -> list[tuple[str, str]]:
    buckets = {tuple(bucket["size"]): bucket["images"] for bucket in figures["buckets"]}
    if len(buckets) == 1:
        return []
    return [
        ("", "in the largest bucket, which the memory is for; FLOPs and times are those of the mean image"),
        ("buckets", f"height x width (images): {describe_buckets(buckets)}"),
        *(("", note) for note in figures["notes"]),
    ]


def plan_model(path: str) -> Plan:
    """What is known of a pipeline without its weights.

    path: a local pipeline folder, of which only the JSON files are read, or a repository that a family lists. Raises
    ValueError for anything else and for a transformer that is not supported, and FileNotFoundError if a file of the
    folder is missing.
    """
    folder = Path(path)
    refuse_sit(path)
    refuse_modular(path)
    published = find_published(path)
    if published is not None and not folder.is_dir():
        family, found = published
        with torch.device("meta"):
            model = family.dense_class(**found.arguments)
            vae = family.published_vae(family.latent_channels(model.config))
        return Plan(model, vae, found.vae_scale_factor, 77, found.text_parameters, recipe=found.recipe)
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        base = text_to_image(Base(path, path, None, index, None, None))
        model, vae_scale_factor = base.shapes()
        kinds = component_classes(index)
        tokenizer_length, vae = 77, None  # what diffusers' pipelines go by without a tokenizer
        if kinds.get("tokenizer"):
            tokenizer = base.read_part("tokenizer", "tokenizer_config.json")
            tokenizer_length = tokenizer.get("model_max_length", tokenizer_length)
        told = family_of(model).pipeline_recipe(index)
        made = family_of(model).vae_class
        if kinds.get("vae") == made.__name__:
            with torch.device("meta"):
                vae = made.from_config(base.read_part("vae"))
        return Plan(model, vae, vae_scale_factor, tokenizer_length, _text_parameters(base), _quantised(base), told)
    known = ", ".join(repository for family in families() if family.pipelines for repository in family.published)
    raise ValueError(f"a dry run needs a local pipeline folder, or one of {known}: model.path is {path!r}")


def _quantised(base: Base) -> int | None:
    """The bytes of the transformer's files if they are quantised; None if not."""
    if "quantization_config" not in base.read_part(base.component):
        return None
    return sum(file.stat().st_size for file in weight_files(Path(base.path) / base.component))


def _text_parameters(base: Base) -> int | None:
    """The parameters of a pipeline's text encoders together; None where one is not of transformers' classes."""
    count, kinds = 0, component_classes(base.index)
    for name in encoder_names(base.family, kinds):
        if kinds[name] is None:
            continue
        made = getattr(transformers, kinds[name], None)
        if made is None:
            return None
        with torch.device("meta"):
            encoder = made(made.config_class.from_dict(base.read_part(name)))
        count += sum(p.numel() for p in encoder.parameters())
    return count
