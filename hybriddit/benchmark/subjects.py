"""The models that can be benchmarked, by name: published transformers of every family, and SiTs. Needs diffusers."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..attention import TokenLayout
from ..attention.work import dense_flops
from ..config import HybridConfig
from ..models import SiTTransformer2DModel, families, hybridize
from ..models.family import AttentionShape, Family, Published
from ..models.flops import attention_flops, sit_flops
from ..models.sit import SIT_FAR_BRANCH
from ..pipelines.sit import SiTPipeline

SIT_PRESETS = {"sit-xl": "XL/2"}
SIT_VAE_SCALE_FACTOR = 8
GUIDANCE = 3.5  # for transformers with the scale as an input; its value does not change the time


class Example(NamedTuple):
    """Random inputs of one image: the arguments of a transformer's forward, and the tensors that get gradients."""

    arguments: dict[str, Any]
    inputs: list[Tensor]


class Subject(ABC):
    """A published transformer: its attention layer, the model with random weights, its variants and its sampler.

    name: in tables and on the command line. source: where it is published. guided: whether a sampler runs the model
    twice a step, with the prompt and without; together: whether in one call. prompt: text tokens that the whole
    transformer receives; those in the attention layer are `shape.text`. block_arguments: see
    `Family`. samples: whether there is a sampler.
    """

    samples = True

    def __init__(
        self,
        name: str,
        source: str,
        model_class: type[nn.Module],
        arguments: Mapping[str, Any],
        vae_scale_factor: int,
        guided: bool,
        prompt: int,
        together: bool = True,
        block_arguments: tuple[str, ...] = ("num_layers", "num_single_layers"),
    ):
        self.name, self.source, self.model_class, self.arguments = name, source, model_class, arguments
        self.vae_scale_factor, self.guided, self.prompt = vae_scale_factor, guided, prompt
        self.together, self.block_arguments = together, block_arguments

    @property
    @abstractmethod
    def shape(self) -> AttentionShape:
        """The shape of the attention layers that hybrid attention replaces."""

    @property
    def blocks(self) -> int:
        """Number of blocks of the whole model; 0 if its class has no argument for it and is always built whole."""
        return sum(self._block_counts().values())

    def make(self, px: int, layers: int | None) -> nn.Module:
        """The dense model for images of `px` x `px` pixels with the first `layers` blocks; None: all.

        Its position tables are made for this size, else they would be computed again in every call.
        """
        arguments = self._with_blocks(layers)
        if "sample_size" in arguments:
            arguments["sample_size"] = px // self.vae_scale_factor
        if "pos_embed_max_size" in arguments:
            arguments["pos_embed_max_size"] = max(arguments["pos_embed_max_size"], self.shape.grid(px)[0])
        return self.model_class(**arguments)

    def check_layers(self, layers: int) -> None:
        """Raise ValueError where the model has fewer blocks."""
        if not self.blocks:
            raise ValueError(f"--layers {layers}: {self.source} is always built whole")
        if not 1 <= layers <= self.blocks:
            raise ValueError(f"--layers {layers}: {self.source} has 1 to {self.blocks} blocks")

    def _block_counts(self) -> dict[str, int]:
        """The number of blocks by the argument that sets it; none where there is not the first kind's."""
        defaults, known = inspect.signature(self.model_class.__init__).parameters, self.block_arguments
        names = [name for name in known if {known[0], name} <= defaults.keys()]
        return {name: self.arguments.get(name, defaults[name].default) for name in names}

    def _with_blocks(self, layers: int | None) -> dict[str, Any]:
        """Arguments for a model of `layers` blocks; of two kinds, in proportion, at least one of the first kind."""
        arguments, counts = dict(self.arguments), self._block_counts()
        if not counts or layers is None:
            return arguments
        self.check_layers(layers)
        (name, of_first), *others = counts.items()
        first = max(1, round(layers * of_first / self.blocks))
        arguments[name] = first
        for name, _ in others:
            arguments[name] = layers - first
        if "dual_attention_layers" in arguments:
            arguments["dual_attention_layers"] = tuple(i for i in arguments["dual_attention_layers"] if i < first)
        return arguments

    @abstractmethod
    def example(self, model: nn.Module, px: int, backward: bool = False) -> Example:
        """Random inputs for one image, with the dense model's dtype and on its device; backward: with gradients."""

    @abstractmethod
    def variant(self, model: nn.Module, variant: str, window: int) -> nn.Module:
        """A twin of a dense model that shares its weights and has hybrid or linear attention in every layer.

        The added weights are on the model's device and have arbitrary values.
        """

    @abstractmethod
    def sampler(self, model: nn.Module, px: int, steps: int) -> Callable[[], Tensor]:
        """A function that makes one image's latents with the usual pipeline in `steps` steps, guidance included."""

    @abstractmethod
    def flops(self, models: Mapping[str, nn.Module], px: int) -> tuple[int, dict[str, int]]:
        """FLOPs of one image's forward pass outside the attention, and those of the attention by variant.

        models: the models by variant, with "dense" among them, on the meta device.
        """


class FamilySubject(Subject):
    """A published model of a family, under the family's name for it in the benchmark."""

    def __init__(self, family: Family, source: str, published: Published):
        super().__init__(
            published.shape,
            source,
            family.dense_class,
            published.arguments,
            published.vae_scale_factor,
            family.guided,
            family.text_length(),
            family.guided_together,
            family.block_arguments,
        )
        self.family, self.published, self.samples = family, published, bool(family.pipelines)

    @cached_property
    def shape(self) -> AttentionShape:
        return self.family.attention_shape(self.published)

    def example(self, model: nn.Module, px: int, backward: bool = False) -> Example:
        family, grid, random = self.family, self.shape.grid(px), _maker(torch.randn, model)
        text = family.example_text(model.config, 1, self.prompt, random)
        latents = random(1, *family.latents_shape(model.config, grid))
        inputs = [latents, text["prompt_embeds"]]
        for tensor in inputs:  # before the arguments are made, which may be parts of them
            tensor.requires_grad_(backward)
        times = torch.full((1,), family.middle_time, device=latents.device)
        guidance = GUIDANCE if family.takes_guidance(model.config) else None
        arguments = family.model_inputs(latents, times, text, grid, guidance)
        return Example(arguments, inputs)

    def variant(self, model: nn.Module, variant: str, window: int) -> nn.Module:
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, shared)
        return hybridize(twin, HybridConfig(window=window if variant == "hybrid" else None))

    def sampler(self, model: nn.Module, px: int, steps: int) -> Callable[[], Tensor]:
        pipeline_class = self.family.pipelines["text-to-image"]
        parameters = list(inspect.signature(pipeline_class.__init__).parameters.values())[1:]  # without self
        parts = {one.name: None if one.default is one.empty else one.default for one in parameters}
        pipeline = pipeline_class(**parts | {self.family.component: model, "scheduler": self.family.scheduler()})
        pipeline.vae_scale_factor = self.vae_scale_factor  # the pipeline would ask its VAE, and has none
        pipeline.set_progress_bar_config(disable=True)
        text, empty = (
            self.family.example_text(model.config, 1, self.prompt, _maker(values, model))
            for values in (torch.randn, torch.zeros)
        )
        arguments = self.family.sampling_arguments(text, empty, 1)
        arguments |= {"height": px, "width": px, "num_inference_steps": steps, "output_type": "latent"}
        sample = self.family.sampler(pipeline)
        return lambda: sample(**arguments).images

    def flops(self, models: Mapping[str, nn.Module], px: int) -> tuple[int, dict[str, int]]:
        layout = TokenLayout(self.shape.text, (self.shape.grid(px),), self.shape.text_first)
        inside = {variant: attention_flops(model, layout)["hybrid"] for variant, model in models.items()}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            models["dense"](**self.example(models["dense"], px).arguments)
        return counter.get_total_flops() - inside["dense"], inside


class SiTSubject(Subject):
    """A SiT of a published size: "dense" has softmax attention, the variants are those of configs/sit."""

    def __init__(self, name: str, preset: str):
        arguments = {**SiTTransformer2DModel.preset(preset), "sample_size": 32}  # `make` replaces it
        super().__init__(name, f"SiT-{preset}", SiTTransformer2DModel, arguments, SIT_VAE_SCALE_FACTOR, True, 0)

    @property
    def shape(self) -> AttentionShape:
        heads, head_dim = self.arguments["num_attention_heads"], self.arguments["attention_head_dim"]
        return AttentionShape(heads, head_dim, 0, False, self.vae_scale_factor * self.arguments["patch_size"])

    def example(self, model: nn.Module, px: int, backward: bool = False) -> Example:
        config = model.config
        latents = _maker(torch.randn, model)(1, config.in_channels, config.sample_size, config.sample_size)
        latents.requires_grad_(backward)
        time = torch.full((1,), 0.5, device=latents.device)
        label = torch.zeros(1, dtype=torch.long, device=latents.device)
        return Example({"hidden_states": latents, "timestep": time, "class_labels": label}, [latents])

    def variant(self, model: nn.Module, variant: str, window: int) -> nn.Module:
        # diffusers records in a private field which values were defaults, and would reset those
        arguments = {name: value for name, value in model.config.items() if not name.startswith("_")}
        with init_empty_weights(include_buffers=False):
            twin = type(model)(**arguments | {"attention": variant, "window": window} | SIT_FAR_BRANCH)
        weights = dict(model.named_parameters())
        like = next(iter(weights.values()))
        for name, parameter in twin.named_parameters():
            if name not in weights:
                weights[name] = nn.Parameter(torch.empty(parameter.shape, dtype=like.dtype, device=like.device))
        twin.load_state_dict(weights, assign=True)
        return twin.eval()

    def sampler(self, model: nn.Module, px: int, steps: int) -> Callable[[], Tensor]:
        pipeline = SiTPipeline(model)
        pipeline.set_progress_bar_config(disable=True)
        return lambda: pipeline(0, num_inference_steps=steps, output_type="latent").images

    def flops(self, models: Mapping[str, nn.Module], px: int) -> tuple[int, dict[str, int]]:
        grid, dense = self.shape.grid(px), models["dense"].config
        softmax = dense_flops(grid[0] * grid[1], self.shape.heads * self.shape.head_dim)
        outside = sit_flops(models["dense"], grid) - softmax * dense.num_layers
        return outside, {variant: sit_flops(model, grid) - outside for variant, model in models.items()}


def _maker(values: Callable[..., Tensor], model: nn.Module) -> Callable[..., Tensor]:
    """A function from sizes to tensors of the model's dtype and device, by `values`: torch.randn or torch.zeros."""
    like = next(model.parameters())
    return lambda *size: values(*size, dtype=like.dtype, device=like.device)


def subjects() -> dict[str, Subject]:
    """Everything that can be benchmarked, by name, in the order of the tables."""
    found: list[Subject] = []
    for family in families():
        for source, published in family.published.items():
            if published.shape is not None:
                found.append(FamilySubject(family, source, published))
    found += [SiTSubject(name, preset) for name, preset in SIT_PRESETS.items()]
    return {subject.name: subject for subject in found}


def find_subject(name: str) -> Subject:
    """The subject of this name. Raises ValueError, listing the known names, for an unknown one."""
    known = subjects()
    if name not in known:
        raise ValueError(f"invalid choice: {name!r} (choose from {', '.join(known)})")
    return known[name]
