"""What a distillation would need, told in seconds without weights: the full-size model is made of shapes alone."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import hybriddit

from ..data.sources import SOURCES
from ..files import read_json
from ..models import dense_mode, family_of
from ..models.flops import attention_flops
from ..pipelines.loading import refuse_sit
from .config import DistillConfig
from .distill import check_settings, loss_settings, make_student, planned_grid
from .losses import captured_outputs, converted_layers, layer_loss
from .recipes import Recipe, choose_recipe, model_inputs, prediction

# the one assumption behind every time: what a step reaches of an H100's dense bf16 peak
H100_PEAK = 989e12
ASSUMED_SHARE = 0.4

_PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "use_additional_conditions": False,
}
_SD3 = {"sample_size": 128, "in_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096}
_SD3_MEDIUM = {**_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}

# The transformer of each repository that configs/ names: class and arguments, as in its transformer/config.json.
REPOSITORIES = {
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": (
        "PixArtTransformer2DModel",
        {**_PIXART, "sample_size": 64, "interpolation_scale": 1},
    ),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (
        "PixArtTransformer2DModel",
        {**_PIXART, "sample_size": 128, "interpolation_scale": 2},
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        "SD3Transformer2DModel",
        {**_SD3_MEDIUM, "pos_embed_max_size": 192},
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        "SD3Transformer2DModel",
        {
            **_SD3_MEDIUM,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        "SD3Transformer2DModel",
        {
            **_SD3,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "black-forest-labs/FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "black-forest-labs/FLUX.1-schnell": ("FluxTransformer2DModel", {"guidance_embeds": False}),
}
_PIPELINES = {
    "PixArtTransformer2DModel": "PixArtSigmaPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
}


def dry_run(config: DistillConfig) -> dict:
    """What the run of this config would train, compute and hold: plain numbers, every one an estimate.

    The model is built on the meta device from `model.path`, a local pipeline folder or a key of REPOSITORIES: no
    weights, no network. One training step of `train.batch_size / train.accumulation` images then runs on fake
    tensors, which have shapes and no data: its FLOPs are what torch counts, its activations what autograd keeps.

    Bytes are of one GPU that does the whole batch; FLOPs count two per multiply-add. Raises what a real run would
    raise for settings that cannot work, before it loads weights; ValueError for a repository that is not known here.
    """
    check_settings(config)
    pipeline, model, vae_scale_factor, clip_length = plan_model(config.model.path)
    recipe = choose_recipe(pipeline, model, config.model.recipe)
    source = SOURCES[config.data.source]
    loss_settings(recipe, config, source.teacher_made, source.trajectories)
    grid = planned_grid(config, model, vae_scale_factor)
    with torch.device("meta"):
        trained = make_student(model, config)
    text_length = config.data.max_sequence_length
    if text_length is None:
        call = inspect.signature(getattr(diffusers, recipe.pipeline).__call__)
        text_length = call.parameters["max_sequence_length"].default
    if recipe.pipeline == "StableDiffusion3Pipeline":
        text_length += clip_length  # CLIP's tokens go before T5's

    train, data = config.train, config.data
    count = train.batch_size // train.accumulation
    step = _fake_step(model, recipe, config, grid, text_length, count)
    recomputed = step["student"] if train.gradient_checkpointing else 0
    step_flops = train.accumulation * (step["teacher"] + step["student"] + step["backward"] + recomputed)
    guided = recipe.pipeline != "FluxPipeline" and data.guidance_scale > 1  # two passes a step of the sampler
    images = source.count(data)
    image_flops = images * data.steps * (2 if guided else 1) * step["teacher"] // count if source.teacher_made else 0

    element = 2 if train.precision == "bf16" else 4
    frozen = sum(t.numel() for name, t in model.state_dict().items() if ".hybrid." not in name)
    added = sum(p.numel() for p in trained.values())
    activations = {"with_checkpointing": step["checkpointed"], "without_checkpointing": step["kept"]}
    memory = {
        "frozen": frozen * element,
        "trained": added * 4 * 5,  # fp32: the weights, their gradients, Adam's two moments and the average
        "activations": activations["with_checkpointing" if train.gradient_checkpointing else "without_checkpointing"],
    }
    throughput = H100_PEAK * ASSUMED_SHARE
    return {
        "estimate": True,
        "model": config.model.path,
        "class": family_of(model).dense_class.__name__,
        "parameters": sum(p.numel() for name, p in model.named_parameters() if ".hybrid." not in name),
        "trained_parameters": added,
        "tokens": {"grid": list(grid), "image": grid[0] * grid[1], "text": text_length},
        "attention_flops": step["attention"],
        "forward_flops": {"teacher": step["teacher"] // count, "student": step["student"] // count},
        "step_flops": step_flops,
        "data_flops": image_flops,
        "images_per_pass": count,
        "gradient_checkpointing": train.gradient_checkpointing,
        "precision": train.precision,
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "activation_bytes": activations,
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
    """`dry_run`'s figures in words."""
    attention, forward, memory = (figures[key] for key in ("attention_flops", "forward_flops", "memory_bytes"))
    tokens, hours, activations = figures["tokens"], figures["hours"], figures["activation_bytes"]
    share = figures["trained_parameters"] / figures["parameters"]
    if figures["gradient_checkpointing"]:
        how, other = "with gradient checkpointing", f"without it {_si(activations['without_checkpointing'], 'B')}"
        again = ", and the student's forward again for gradient checkpointing"
    else:
        how, other = "without gradient checkpointing", f"with it {_si(activations['with_checkpointing'], 'B')}"
        again = ""
    rows = [
        ("", "Estimates, from shapes alone: no weights were read, nothing was measured."),
        ("model", f"{figures['model']}: {figures['class']}, {figures['parameters']:,} parameters"),
        ("trained", f"{figures['trained_parameters']:,} parameters, {share:.2%} of the model's"),
        ("tokens", f"{tokens['grid'][0]} x {tokens['grid'][1]} of the image, {tokens['text']} of the text"),
        ("attention", f"{_si(attention['dense'], 'FLOP')} dense, {_si(attention['hybrid'], 'FLOP')} hybrid"),
        ("", "one forward pass of one image; projections apart"),
        (
            "forward",
            f"{_si(forward['teacher'], 'FLOP')} teacher, {_si(forward['student'], 'FLOP')} student, of one image",
        ),
        ("", "as PyTorch counts it, windows as tiles compute them"),
        ("step", f"{_si(figures['step_flops'], 'FLOP')} for {figures['batch_size']} images"),
        ("", f"teacher's forward, student's forward and backward{again}"),
        ("memory", f"{_si(memory['total'], 'B')} on one GPU that does the whole batch:"),
        ("", f"{_si(memory['frozen'], 'B')} frozen weights"),
        ("", f"{_si(memory['trained'], 'B')} trained weights, their gradients, Adam's moments and average, in fp32"),
        ("", f"{_si(memory['activations'], 'B')} activations: what autograd keeps and the losses compare,"),
        ("", f"{figures['images_per_pass']} images at a time, {how} ({other})"),
        ("", "not in it: VAE, text encoders (while images are made), layer norms that a GPU's autocast keeps in fp32,"),
        ("", "gradients in flight, the kernels' workspaces, what the allocator wastes"),
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


def _si(value: float, unit: str) -> str:
    scale, prefix = next(
        ((s, p) for s, p in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= s), (1e3, "k")
    )
    return f"{value / scale:.3g} {prefix}{unit}"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.3g} h"
    return f"{hours * 60:.2g} min" if hours >= 1 / 60 else f"{hours * 3600:.2g} s"


def plan_model(path: str) -> tuple[str, nn.Module, int, int]:
    """The pipeline's class name, its transformer on the meta device, pixels per latent, and CLIP's text length.

    path: a local pipeline folder, of which only the JSON files are read, or a key of REPOSITORIES. Raises ValueError
    for anything else and for a transformer that is not supported, FileNotFoundError where the folder is not whole.
    """
    folder = Path(path)
    refuse_sit(path)
    if path in REPOSITORIES and not folder.is_dir():
        name, values = REPOSITORIES[path]
        pipeline, vae_scale_factor, clip_length = _PIPELINES[name], 8, 77
    elif (folder / "model_index.json").is_file():
        pipeline = _read_json(folder / "model_index.json").get("_class_name", "")
        values = _read_json(folder / "transformer" / "config.json")
        name = values.get("_class_name", "")
        vae_scale_factor = 2 ** (len(_read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1)
        clip_length = _read_json(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length", 77)
    else:
        raise ValueError(
            f"a dry run needs a local pipeline folder, or one of {', '.join(REPOSITORIES)}: model.path is {path!r}"
        )
    model_class = getattr(hybriddit, name, None) or getattr(diffusers, name, None)
    if model_class is None:
        raise ValueError(f"{path}: its transformer is a {name or 'model of no class'}, which diffusers does not have")
    with torch.device("meta"):
        model = model_class.from_config(values)
    family_of(model)
    return pipeline, model, vae_scale_factor, clip_length


def _read_json(path: Path) -> dict:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path}: the pipeline folder is not whole") from None


def _fake_step(
    model: nn.Module, recipe: Recipe, config: DistillConfig, grid: tuple[int, int], text_length: int, count: int
) -> dict:
    """One pass of `count` images as `distill` makes it, on fake tensors.

    FLOPs of the "teacher", the "student" and the "backward" pass, and the model's "attention" of one image; bytes
    "kept" for the backward pass, and as many where the blocks are "checkpointed".
    """
    bf16 = config.train.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    # Fake weights without an active mode: what is computed on the side, such as the windows' tiles, stays real.
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {
            name: torch.empty(
                tensor.shape,
                dtype=torch.float32 if ".hybrid." in name else dtype,
                requires_grad=".hybrid." in name,
            )
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
    latents, inputs = _inputs(model, recipe, grid, text_length, count, dtype)
    layout = family_of(model).token_layout(model, inputs)

    def call() -> torch.Tensor:
        output = functional_call(model, state, (), {**inputs, "return_dict": False})[0]
        return prediction(recipe, output, latents).float()

    layers = converted_layers(model)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    counts = {name: FlopCounterMode(display=False) for name in ("teacher", "student", "backward")}
    with autocast, counts["teacher"], torch.no_grad(), dense_mode(model), captured_outputs(layers) as teacher_layers:
        teacher = call()
    with autocast, counts["student"], _recorded(model) as (kept, entered):
        with captured_outputs(layers) as student_layers:
            student = call()
        losses = F.mse_loss(student, latents), F.mse_loss(student, teacher), layer_loss(student_layers, teacher_layers)
    with counts["backward"]:
        sum(losses).backward()

    weights = _storages(state.values())
    held = _storages(
        part for outputs in (teacher_layers, student_layers) for parts in outputs.values() for part in parts
    )
    outside = kept.pop(None, {}) | held
    blocks = [{key: s for key, s in block.items() if key not in outside} for block in kept.values()]
    return {
        **{name: counter.get_total_flops() for name, counter in counts.items()},
        "attention": attention_flops(model, layout),
        "kept": _bytes(*blocks, outside, without=weights),
        # a block's input is kept, its inside only while its own gradients are computed
        "checkpointed": _bytes(outside, entered, without=weights)
        + max((_bytes(block, without=weights | entered) for block in blocks), default=0),
    }


def _inputs(model, recipe: Recipe, grid, text_length: int, count: int, dtype) -> tuple[torch.Tensor, dict]:
    """Latents and the transformer's arguments, of the shapes that the run would have."""
    config = model.config

    def values(*shape: int) -> torch.Tensor:
        return torch.zeros((), dtype=dtype).expand(shape)  # of one element in memory

    if recipe.pipeline == "FluxPipeline":
        latents = values(count, grid[0] * grid[1], config.in_channels)
    else:
        latents = values(count, config.in_channels, *(side * config.patch_size for side in grid))
    text_width = config.caption_channels if recipe.pipeline == "PixArtSigmaPipeline" else config.joint_attention_dim
    text = {"prompt_embeds": values(count, text_length, text_width)}
    if recipe.pipeline == "PixArtSigmaPipeline":
        text["prompt_attention_mask"] = values(count, text_length)
    else:
        text["pooled_prompt_embeds"] = values(count, config.pooled_projection_dim)
    times = torch.ones(count, dtype=torch.int64 if recipe.times == "ddpm" else torch.float32)
    guidance = 1.0 if config.get("guidance_embeds") else None
    return latents.float(), model_inputs(recipe, latents, times, text, grid, guidance)


Storages = dict[int, torch.UntypedStorage]


@contextmanager
def _recorded(model: nn.Module) -> Iterator[tuple[dict[int | None, Storages], Storages]]:
    """Within it: the storages that autograd keeps, by the transformer block that uses them (None: outside of all), and
    those that enter a block."""
    kept: dict[int | None, Storages] = defaultdict(dict)
    entered: Storages = {}
    current = None

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[current].update(_storages([tensor]))
        return tensor

    def enter(index):
        def hook(module, args, kwargs):
            nonlocal current
            current = index
            entered.update(_storages(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))

        return hook

    def leave(module, args, output):
        nonlocal current
        current = None

    blocks = [block for stack in model.children() if isinstance(stack, nn.ModuleList) for block in stack]
    handles = [block.register_forward_pre_hook(enter(i), with_kwargs=True) for i, block in enumerate(blocks)]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield kept, entered
    finally:
        for handle in handles:
            handle.remove()


def _storages(tensors: Iterable[torch.Tensor]) -> Storages:
    """By identity, and held, so that no identity is used twice."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages}


def _bytes(*groups: Storages, without: Storages) -> int:
    together = {key: storage for group in groups for key, storage in group.items() if key not in without}
    return sum(storage.nbytes() for storage in together.values())
