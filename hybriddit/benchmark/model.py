"""Whole transformers with random weights: one forward pass, or the steps of a sampler around it. Needs diffusers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..attention import TokenLayout
from ..config import HybridConfig
from ..models import family_of, hybridize
from ..models.flops import attention_flops, sit_flops
from ..models.sit import SiTTransformer2DModel
from ..pipelines.sit import SiTPipeline
from ..training.dry_run import REPOSITORIES
from ..training.recipes import choose_recipe, model_inputs
from .measure import Case, Work
from .shapes import PIXELS_PER_TOKEN, Shape

LATENT_PIXELS = 8
SAMPLER_STEPS = 4
_BLOCKS = ("num_layers", "num_single_layers")
_PIPELINES = {
    "PixArtTransformer2DModel": ("PixArtSigmaPipeline", "DPMSolverMultistepScheduler"),
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"),
    "FluxTransformer2DModel": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
}


def plan(shape: Shape, px: int, layers: int | None) -> tuple[type[nn.Module], dict[str, Any], tuple[int, int]]:
    """Class and arguments of a transformer with so many blocks (None: all), and (blocks, blocks of the whole model).

    FLUX's two kinds of blocks keep their proportion, the first kind at least one. Position tables are of the size
    measured: made for another one, they would be computed anew in every call. Raises ValueError for more blocks than
    there are.
    """
    if shape.model in REPOSITORIES:
        name, values = REPOSITORIES[shape.model]
        model_class = getattr(diffusers, name)
    else:
        model_class = SiTTransformer2DModel
        values = {**model_class.preset(shape.model.removeprefix("SiT-")), "sample_size": px // LATENT_PIXELS}
    defaults = inspect.signature(model_class.__init__).parameters
    counts = {key: values.get(key, defaults[key].default) for key in _BLOCKS if key in defaults}
    of = sum(counts.values())
    if layers is None:
        layers = of
    if not 1 <= layers <= of:
        raise ValueError(f"--layers {layers}: {shape.model} has 1 to {of} blocks")
    first = max(1, round(layers * counts["num_layers"] / of))
    values = {**values, "num_layers": first}
    if "num_single_layers" in counts:
        values["num_single_layers"] = layers - first
    if "dual_attention_layers" in values:
        values["dual_attention_layers"] = tuple(i for i in values["dual_attention_layers"] if i < first)
    if "sample_size" in values:
        values["sample_size"] = px // LATENT_PIXELS
    if "pos_embed_max_size" in values:
        values["pos_embed_max_size"] = max(values["pos_embed_max_size"], px // PIXELS_PER_TOKEN)
    return model_class, values, (layers, of)


def weight_bytes(shape: Shape, px: int, layers: int | None, dtype: torch.dtype) -> int:
    """Of the dense transformer."""
    model_class, values, _ = plan(shape, px, layers)
    with init_empty_weights():
        model = model_class.from_config(values)
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def random_model(model_class: type[nn.Module], values: dict[str, Any], dtype: torch.dtype, device: torch.device):
    """The transformer with random weights, made on the device: no copy of it passes through the host's memory."""
    with init_empty_weights(include_buffers=False):
        model = model_class.from_config(values)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            weights = torch.empty(parameter.shape, dtype=dtype, device=device)
            _fill(name, weights)
            module.register_parameter(name, nn.Parameter(weights, requires_grad=False))
    return nn.Module.to(model, device=device, dtype=dtype).eval()  # diffusers' own warns of what it would keep in fp32


def _fill(name: str, weights: Tensor) -> None:
    if weights.ndim > 1:
        weights.normal_(std=0.02)
    else:
        weights.fill_(0.0 if name.endswith("bias") else 1.0)


def variant_model(model: nn.Module, variant: str, window: int) -> nn.Module:
    """The dense model itself, or a twin that shares its weights and has hybrid or linear attention."""
    if variant == "dense":
        return model
    if isinstance(model, SiTTransformer2DModel):
        return _sit_twin(model, variant, window)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    hybridize(twin, HybridConfig(window=window if variant == "hybrid" else None))
    for name, parameter in twin.named_parameters():
        if ".hybrid." in name:
            _fill(name, parameter.data)
    return twin


def _sit_twin(model: SiTTransformer2DModel, attention: str, window: int) -> SiTTransformer2DModel:
    """What it adds are its query and key maps, and gates; a SiT is built so, not converted."""
    with init_empty_weights(include_buffers=False):
        twin = type(model).from_config(_sit_values(model.config, attention, window))
    weights = dict(model.named_parameters())
    like = next(iter(weights.values()))
    for name, parameter in twin.named_parameters():
        if name not in weights:
            weights[name] = nn.Parameter(torch.empty(parameter.shape, dtype=like.dtype, device=like.device))
            _fill(name, weights[name].data)
    twin.load_state_dict(weights, assign=True)
    return twin.requires_grad_(False).eval()


def _sit_values(values: Mapping[str, Any], variant: str, window: int) -> dict[str, Any]:
    # diffusers notes in a private field which values were defaults, and would set them back
    public = {name: value for name, value in values.items() if not name.startswith("_")}
    return public | {"attention": "softmax" if variant == "dense" else variant, "window": window}


def model_cases(
    part: str,
    shape: Shape,
    px: int,
    variants: Sequence[str],
    window: int,
    layers: int | None,
    compiled: bool,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
) -> list[Case]:
    """One case per variant, on the same weights and inputs; `part` is "transformer" or "generation".

    backward: gradients of latents and text, and of what conversion added, all else frozen, as in distillation. A case
    of "generation" is a diffusers pipeline without text encoders and VAE, over SAMPLER_STEPS steps.
    """
    model_class, values, _ = plan(shape, px, layers)
    model = random_model(model_class, values, dtype, device)
    arguments = _arguments(model, shape, px, dtype, device)
    inputs = [arguments[name] for name in ("hidden_states", "encoder_hidden_states") if name in arguments]
    for tensor in inputs:
        tensor.requires_grad_(backward)
    gradients: dict[torch.Size, Tensor] = {}
    shared = {id(parameter) for parameter in model.parameters()}
    cases = []
    for variant in variants:
        twin = variant_model(model, variant, window)
        added = [p.requires_grad_(backward) for p in twin.parameters() if id(p) not in shared]
        if compiled:
            # block by block, as diffusers' compile_repeated_blocks does: equal blocks are compiled once
            for stack in twin.children():
                for block in stack if isinstance(stack, nn.ModuleList) else ():
                    block.compile()
        if part == "generation":
            forward, steps = _sampler(twin, shape, px, arguments), SAMPLER_STEPS
        else:

            def forward(twin=twin) -> Tensor:
                return twin(**arguments, return_dict=False)[0]

            steps = 1
        cases.append(Case(variant, forward, [*inputs, *added], steps, gradients=gradients))
    return cases


def _arguments(model: nn.Module, shape: Shape, px: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Of the transformer's forward, for one image."""
    config, side = model.config, px // PIXELS_PER_TOKEN

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    if isinstance(model, SiTTransformer2DModel):
        latents = random(1, config.in_channels, config.sample_size, config.sample_size)
        time, label = torch.full((1,), 0.5, device=device), torch.zeros(1, dtype=torch.long, device=device)
        return {"hidden_states": latents, "timestep": time, "class_labels": label}
    recipe = choose_recipe(_PIPELINES[type(model).__name__][0], model)
    if recipe.pipeline == "FluxPipeline":
        latents = random(1, side * side, config.in_channels)
    else:
        latents = random(1, config.in_channels, px // LATENT_PIXELS, px // LATENT_PIXELS)
    text_width = config.caption_channels if recipe.pipeline == "PixArtSigmaPipeline" else config.joint_attention_dim
    text = {"prompt_embeds": random(1, shape.prompt, text_width)}
    if recipe.pipeline == "PixArtSigmaPipeline":
        text["prompt_attention_mask"] = torch.ones(1, shape.prompt, device=device, dtype=dtype)
    else:
        text["pooled_prompt_embeds"] = random(1, config.pooled_projection_dim)
    times = torch.full((1,), 500, device=device) if recipe.times == "ddpm" else torch.full((1,), 0.5, device=device)
    guidance = 3.5 if config.get("guidance_embeds") else None
    return model_inputs(recipe, latents, times, text, (side, side), guidance)


def _sampler(model: nn.Module, shape: Shape, px: int, arguments: dict[str, Any]):
    """A function that runs SAMPLER_STEPS steps of the family's pipeline, guidance and scheduler included."""
    if isinstance(model, SiTTransformer2DModel):
        sit = SiTPipeline(model)
        sit.set_progress_bar_config(disable=True)
        return lambda: sit(0, num_inference_steps=SAMPLER_STEPS, output_type="latent").images
    pipeline_name, scheduler = _PIPELINES[family_of(model).dense_class.__name__]
    pipeline_class = getattr(diffusers, pipeline_name)
    names = [name for name in inspect.signature(pipeline_class.__init__).parameters if name != "self"]
    parts = dict.fromkeys(names) | {"transformer": model, "scheduler": getattr(diffusers, scheduler)()}
    pipeline = pipeline_class(**parts)
    pipeline.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": arguments["encoder_hidden_states"]}
    if pipeline_name == "PixArtSigmaPipeline":
        text["prompt_attention_mask"] = arguments["encoder_attention_mask"]
    else:
        text["pooled_prompt_embeds"] = arguments["pooled_projections"]
    if shape.guided:
        text |= {f"negative_{name}": torch.zeros_like(tensor) for name, tensor in text.items()}
    if pipeline_name == "PixArtSigmaPipeline":
        text["negative_prompt_attention_mask"] = text["prompt_attention_mask"]
        text |= {"negative_prompt": None, "use_resolution_binning": False}

    def forward() -> Tensor:
        size = {"height": px, "width": px, "num_inference_steps": SAMPLER_STEPS}
        return pipeline(**text, **size, output_type="latent").images

    return forward


def batch_of(part: str, shape: Shape) -> int:
    """Images in one call of the transformer: with guidance a sampler's step takes the prompt and the empty one."""
    return 2 if part == "generation" and shape.guided else 1


def model_work(
    part: str,
    shape: Shape,
    px: int,
    variants: Sequence[str],
    window: int,
    layers: int | None,
    dtype: torch.dtype,
) -> dict[str, dict[str, Work]]:
    """The least that each variant and direction has to compute, and the weights it has to read.

    FLOPs outside the attention are those of the dense model, counted on the meta device; those inside come from the
    formula of `attention_flops`. Backward: gradients of activations, not of the frozen weights.
    """
    model_class, values, _ = plan(shape, px, layers)
    batch, meta = batch_of(part, shape), torch.device("meta")
    side = px // PIXELS_PER_TOKEN
    sit = model_class is SiTTransformer2DModel
    with meta:
        models = {"dense": model_class.from_config(values)}
        for variant in variants:
            if sit:
                models[variant] = model_class.from_config(_sit_values(values, variant, window))
            elif variant != "dense":
                config = HybridConfig(window=window if variant == "hybrid" else None)
                models[variant] = hybridize(model_class.from_config(values), config)
    layout = TokenLayout(shape.text, ((side, side),), shape.text_first)
    if sit:
        softmax = 4 * side**4 * shape.heads * shape.head_dim * values["num_layers"]
        outside = sit_flops(models["dense"], (side, side)) - softmax
    else:
        arguments = _arguments(models["dense"], shape, px, torch.float32, meta)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            models["dense"](**arguments)
        outside = counter.get_total_flops() - attention_flops(models["dense"], layout)["hybrid"]
    works = {}
    for variant in variants:
        if sit:
            inside = sit_flops(models[variant], (side, side)) - outside
        else:
            inside = attention_flops(models[variant], layout)["hybrid"]
        weights = sum(p.numel() for p in models[variant].parameters()) * dtype.itemsize
        forward = Work(weights, batch * (outside + inside))
        back = Work(weights, batch * (outside + 2 * inside))
        both = Work(weights, forward.flops + back.flops)
        works[variant] = {"forward": forward, "backward": back, "forward + backward": both, "step": forward}
    return works
