"""The interface that describes a kind of transformer to hybriddit, and the table of registered families.

A family is one file with a subclass of `Family`, and one call of `register`. Everything else in the package asks the
family of a model: nothing outside `models/` knows a diffusers class by name. docs/adding-a-family.md walks through one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from inspect import signature
from math import inf, prod
from textwrap import shorten
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, DiffusionPipeline
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..attention import TokenLayout
from .recipe import Recipe, flow_noise, flow_parts

TILED_VAES = (AutoencoderKL, AutoencoderKLFlux2)  # whose `tiled_decode` cuts and blends in the same way
# of the AutoencoderKL of the published models
VAE_BLOCKS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2} | {
    f"{way}_block_types": (f"{name}Block2D",) * 4 for way, name in (("down", "DownEncoder"), ("up", "UpDecoder"))
}
TASKS = ("text-to-image", "image-to-image", "inpainting")
T5_XXL = 4_762_310_656  # parameters of its encoder, version 1.1
# with these settings diffusers' schedulers take the sigmas that they are given
_AS_GIVEN = {
    "shift": 1.0,
    "shift_terminal": None,
    "use_dynamic_shifting": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
}


@dataclass(frozen=True)
class Published:
    """A published model of a family, known by its repository: `--dry-run` and `benchmark` build it without weights.

    arguments: the arguments of the transformer's class that differ from its defaults.
    shape: its name in `hybriddit benchmark`; None: the benchmark does not have it.
    vae_scale_factor: pixels per latent, along each axis.
    text_parameters: of the text encoders together; None: not known.
    recipe: that its pipeline's config tells, see `Family.pipeline_recipe`.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    shape: str | None = None
    vae_scale_factor: int = 8
    text_parameters: int | None = None
    recipe: str | None = None


class Processors(NamedTuple):
    """The processors of one kind of attention module.

    teacher: the class that diffusers puts there.
    hybrid: the class that replaces it on converted layers.
    dense: the class that replaces it on the other layers, where `token_layout` arrives as a keyword: it accepts and
        ignores that. None: the teacher's class stays.
    layers: a pattern of the names of these modules, for kinds with the same teacher's class; the first that fits is it.
    """

    teacher: type
    hybrid: type
    dense: type | None = None
    layers: str = "*"


class AttentionShape(NamedTuple):
    """The layers of one model that hybrid attention replaces, and the tokens in them.

    text: number of text tokens in the layer's sequence; text_first: whether they precede the image tokens.
    pixels: pixels per image token, along each axis.
    """

    heads: int
    head_dim: int
    text: int
    text_first: bool
    pixels: int

    def grid(self, px: int) -> tuple[int, int]:
        """(rows, columns) of the tokens of a square image."""
        return px // self.pixels, px // self.pixels


class LayerShape(NamedTuple):
    """Sizes of one attention layer: channels of its input, heads of queries and of keys and values, and their width."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int


class Part(NamedTuple):
    """A part of a linear layer that computes several things at once, such as queries and an MLP: its sizes and bias."""

    in_features: int
    out_features: int
    bias: torch.Tensor | None = None


class Family(ABC):
    """One kind of transformer: its layers, its tokens, its prompts, and how its teacher was trained.

    A family must define the class attributes without a default and the abstract methods; `register` names those that
    are missing. The defaults of the other methods are right for most transformers.

    name: in tables and messages, such as "FLUX".
    component: what its pipelines call the model.
    dense_class, hybrid_class: the diffusers class, and `hybrid_class(dense_class)` of `models.hybrid_model`.
    layers: fnmatch patterns of the attention modules whose cost is quadratic in image tokens.
    processors: of each kind of attention module that the model has.
    attention_kwargs: the argument of forward whose entries reach the processors as keywords, `token_layout` included.
        None if there is no such argument: then hybrid processors find the layout in `self.layout_holder`, see
        `models.processing.LayoutHolder`.
    block_kwargs: the blocks' name for that argument; None: the same.
    checkpoints_kwargs: whether the model passes these to its blocks under gradient checkpointing, too.
    joint: whether text tokens are part of the converted layers' sequence; text_first: whether they come before the
        image's.
    rotary: whether the layers rotate queries and keys by position, and the hybrid processor gives `far_inputs` that
        rotation.
    skip_connections: whether blocks also read what earlier ones gave, as in a UNet: then none of them stands for others when
        a call is counted, and none runs in strips.
    reads_positions: whether `token_layout` reads the values of tensors. torch.compile cannot trace that: it is left out
        of the graph of a compiled model, and an outer function that calls the model has to pass the layout.
    image_entrance, image_exit: for `hybriddit.parallel`, the modules of the model whose outputs are the image's tokens,
        [B, N, channels], before the first block and behind the last; the entrance's output may also be a tuple that begins
        with a table of theirs, [N, channels]. No entrance: the tokens are arguments of forward.
        No exit: the model's images cannot be spread over processes.
    positions: the ways in which images larger than those trained on can have their positions, the model's own first; see
        `models.positions.rotary_frequencies`.
    image_arguments: arguments of forward that have image tokens in their second last dimension; tensors, or lists of
        tensors.
    joint_arguments: arguments of forward that have text and image tokens in their second last dimension, in the layers'
        order.
    image_lists: arguments of forward that are lists with an element for each image of the batch.
    block_arguments: arguments of the class that say how many blocks there are of each kind, where it has them.
    pipelines: diffusers' pipeline classes by task, a subset of TASKS. None, with no recipes, where diffusers has no
        ordinary pipeline: its models are converted and measured, and no command makes images with or distills them.
    other_pipelines: further sets of those, for models of the same class that go with other text encoders.
    text_encoders: the pipeline's components without which it cannot read prompts; others may be missing.
    longest_text: the largest max_sequence_length that the pipelines take; None: they do not limit it.
    scheduler: the pipeline's usual scheduler class.
    samples_with_vae: whether the pipeline needs its VAE for latents, too.
    vae_class: the VAE's usual class.
    guided: whether sampling runs the model twice, with the prompt and with an empty or negative one; guided_together:
        whether that is one call with both; guides_above: the scale above which it does so; unguided_if_distilled: whether
        pipelines that say `is_distilled` never do, whatever the scale.
    usual_side: of the images that the pipelines make where no size is asked for, in pixels, if neither their
        `default_sample_size` nor the model's `sample_size` tells it.
    guidance_argument: the argument of the pipelines' call that sets the scale of that, or of a guidance embedding.
    empty_prompt: what such pipelines guide away from where no other prompt is given.
    middle_time: a time halfway to noise, in the unit of the recipes' times: an int for steps of a schedule.
    recipes: by name; the names are unique among families.
    published: by repository.
    """

    name: ClassVar[str]
    component: ClassVar[str] = "transformer"
    dense_class: ClassVar[type[nn.Module]]
    hybrid_class: ClassVar[type[nn.Module]]
    layers: ClassVar[tuple[str, ...]]
    processors: ClassVar[tuple[Processors, ...]]
    attention_kwargs: ClassVar[str | None]
    block_kwargs: ClassVar[str | None] = None
    checkpoints_kwargs: ClassVar[bool] = True
    joint: ClassVar[bool]
    text_first: ClassVar[bool] = False
    rotary: ClassVar[bool] = False
    skip_connections: ClassVar[bool] = False
    reads_positions: ClassVar[bool] = False
    image_entrance: ClassVar[str | None] = None
    image_exit: ClassVar[str | None] = None
    positions: ClassVar[tuple[str, ...]] = ("plain",)
    image_arguments: ClassVar[tuple[str, ...]] = ()
    joint_arguments: ClassVar[tuple[str, ...]] = ()
    image_lists: ClassVar[tuple[str, ...]] = ()
    block_arguments: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")
    pipelines: ClassVar[Mapping[str, type]]
    other_pipelines: ClassVar[tuple[Mapping[str, type], ...]] = ()
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    longest_text: ClassVar[int | None] = None
    vae_class: ClassVar[type[nn.Module]] = AutoencoderKL
    scheduler: ClassVar[type]
    samples_with_vae: ClassVar[bool] = False
    guided: ClassVar[bool] = True
    guided_together: ClassVar[bool] = True
    guides_above: ClassVar[float] = 1.0
    unguided_if_distilled: ClassVar[bool] = False
    usual_side: ClassVar[int] = 0
    guidance_argument: ClassVar[str] = "guidance_scale"
    empty_prompt: ClassVar[str] = ""
    middle_time: ClassVar[float] = 0.5
    recipes: ClassVar[Mapping[str, Recipe]]
    published: ClassVar[Mapping[str, Published]] = {}

    def serves(self, config: Mapping[str, Any]) -> bool:
        """Whether a transformer of the class is of this family: for families that share one. config: its config."""
        return True

    def check_config(self, config: Mapping[str, Any]) -> None:  # noqa: B027
        """Raise ValueError for a transformer of the class that is not served. config: its config."""

    def check_shared(self, config: Mapping[str, Any]) -> None:  # noqa: B027
        """Raise ValueError for a transformer whose images cannot be spread over processes, for `hybriddit.parallel`."""

    # Layers

    def attentions(self, model: nn.Module) -> dict[str, nn.Module]:
        """Every attention module of the model, by name."""
        return {name: module for name, module in model.named_modules() if hasattr(module, "set_processor")}

    def converts(self, layer: str) -> bool:
        """Whether the attention module of this name is one that hybrid attention can replace."""
        return any(fnmatchcase(layer, pattern) for pattern in self.layers)

    def kind_of(self, layer: str, teacher: type) -> Processors:
        """The processors of the attention module of this name, which runs a processor of the class `teacher`."""
        return next(row for row in self.processors if row.teacher is teacher and fnmatchcase(layer, row.layers))

    def layer_shape(self, attn: nn.Module) -> LayerShape:
        """Sizes of an attention layer; this one reads them from to_q, to_k and `heads`."""
        head_dim = attn.to_q.out_features // attn.heads
        return LayerShape(attn.to_q.in_features, attn.heads, attn.to_k.out_features // head_dim, head_dim)

    def projections(self, attn: nn.Module) -> dict[str, nn.Linear | Part]:
        """The linear layers of an attention module that get low-rank updates, by their names within it.

        Parts of a layer have names of their own, under which the hybrid processor adds their updates, with `updated`.
        """
        names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        modules = dict(attn.named_modules())
        return {name: modules[name] for name in names if modules.get(name) is not None}

    def idle_projections(self, model: nn.Module, layer: str) -> tuple[str, ...]:
        """Those of `projections` whose results the model does not use, in the layer of this name: they are not learned."""
        return ()

    def layer_layout(self, model: nn.Module, layer: str, token_layout: TokenLayout) -> TokenLayout:
        """The layout of the tokens that this layer sees: the model's layout, or what of it reaches the layer."""
        return token_layout

    def layer_outputs(self, attn: nn.Module, output: torch.Tensor | tuple) -> tuple[torch.Tensor, ...]:
        """The parts of a layer's output that the model uses, [B, tokens, width] each."""
        return output if isinstance(output, tuple) else (output,)

    # Tokens

    def token_layout(self, model: nn.Module, inputs: Mapping[str, Any]) -> TokenLayout:
        """The token layout of one call, from the arguments of forward. By default for latents [B, C, h, w]."""
        patch = model.config.patch_size
        grid = tuple(side // patch for side in inputs["hidden_states"].shape[-2:])
        text_length = inputs["encoder_hidden_states"].shape[1] if self.joint else 0
        return TokenLayout(text_length, (grid,), self.text_first)

    def strip(self, arguments: Mapping[str, Any], token_layout: TokenLayout, rows: tuple[int, int]) -> dict[str, Any]:
        """The arguments of a transformer block for a part of the image's rows, from rows[0] to before rows[1].

        arguments: for the whole image. This one cuts `hidden_states`, [B, N, width] of the image, or [B, S, width] of text
        and image, and the block's result, or the last part of it, has to be the same tokens. The layout in the attention
        kwargs is seen to by `strips`.
        """
        hidden_states, columns = arguments.get("hidden_states"), token_layout.grids[0][1]
        place = slice(rows[0] * columns, rows[1] * columns)
        lengths = token_layout.image_length, token_layout.image_length + token_layout.text_length
        if hidden_states is None or hidden_states.shape[1] not in lengths:
            raise ValueError(f"the blocks of {self.name} cannot run in strips: it has no `strip` for them")
        if hidden_states.shape[1] == lengths[0]:
            return {**arguments, "hidden_states": hidden_states[:, place]}
        text, image = token_layout.split(hidden_states)
        return {**arguments, "hidden_states": token_layout.join(text, image[:, place])}

    def strip_forwards(self, model: nn.Module, rows: int) -> dict[nn.Module, Callable[..., Any]]:
        """What else of the model is run over strips of `rows` rows of tokens: for a module, what replaces its forward."""
        return {}

    def position_forwards(
        self, model: nn.Module, positions: str, native: tuple[int, int], grid: tuple[int, int]
    ) -> dict[nn.Module, Callable[..., Any]]:
        """For each module that gives tokens their positions, what replaces its forward; see `scaled_positions`."""
        return {}

    def make_tables(self, model: nn.Module) -> None:  # noqa: B027
        """Make anew what a model that was built on the meta device lacks to be counted, but for weights and buffers."""

    def exact_inputs(self, inputs: dict[str, Any], token_layout: TokenLayout) -> dict[str, Any]:
        """The arguments of forward of a hybrid, of those for the dense model.

        For what rounding may have done to positions, and for masks, which processors take as `text_mask` alone. Not
        called where `attention_kwargs` is None.
        """
        return inputs

    def latents_per_token(self, config: Mapping[str, Any]) -> int:
        """How many latents one token covers, along each axis. config: the transformer's config."""
        return config["patch_size"]

    def token_pixels(self, config: Mapping[str, Any], vae_scale_factor: int) -> int:
        """How many pixels one token covers, along each axis: image sizes are multiples of it."""
        return vae_scale_factor * self.latents_per_token(config)

    def latent_pixels(self, vae_config: Mapping[str, Any]) -> int:
        """How many pixels one latent covers, along each axis; here of a VAE that halves once less than it has levels.

        Raises ValueError for the config of a VAE that does not say its levels as diffusers' AutoencoderKL does.
        """
        if "block_out_channels" not in vae_config:
            kind = vae_config.get("_class_name", "VAE of no class")
            raise ValueError(f"how many pixels a latent of {kind} covers is not known: {self.name} needs latent_pixels")
        return 2 ** (len(vae_config["block_out_channels"]) - 1)

    def latents_shape(self, config: Mapping[str, Any], grid: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one image's latents as the transformer takes them, for a grid of tokens (rows, columns)."""
        return (config["in_channels"], *(side * self.latents_per_token(config) for side in grid))

    def check_grid(self, config: Mapping[str, Any], grid: tuple[int, int]) -> None:  # noqa: B027
        """Raise ValueError for a grid (rows, columns) that is larger than the transformer's table of positions."""

    def encode_images(self, vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """Latents as the transformer takes them, of images [B, 3, height, width] in [-1, 1].

        This is the mode of the VAE's posterior, as `model_latents` gives it. Raises ValueError as that does.
        """
        return self.model_latents(vae, self.vae_encode(vae, pixels))

    def vae_encode(self, vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """The mode of the VAE's posterior, [B, C, h, w], of images [B, 3, height, width] in [-1, 1]."""
        return vae.encode(pixels).latent_dist.mode()

    def vae_decode(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, height, width] of the VAE's latents [B, C, h, w]."""
        return vae.decode(latents, return_dict=False)[0]

    def encoder(self, vae: nn.Module) -> nn.Module:
        """What takes the memory of `vae_encode`: a module that is called with `sample`, the images."""
        return vae.encoder

    def decoder(self, vae: nn.Module) -> nn.Module:
        """What takes the memory of `vae_decode`: a module that is called with `sample`, the latents."""
        return vae.decoder

    def published_vae(self, channels: int) -> nn.Module:
        """The VAE of the published models, for latents of so many channels."""
        return AutoencoderKL(**VAE_BLOCKS, latent_channels=channels)

    def latents_scale(self, vae: nn.Module) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """(shift, factor): the transformer takes (latents - shift) * factor of what the VAE gives, [B, C, h, w].

        Raises ValueError for a VAE with a mean and std per channel, which these families' pipelines do not apply.
        """
        check_latents_scale(vae.config)
        return vae.config.shift_factor or 0.0, vae.config.scaling_factor

    def model_latents(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """What the transformer takes, of latents [B, C, h, w] that the VAE gives: shifted, scaled and packed.

        Raises ValueError as `latents_scale` does.
        """
        shift, factor = (_like(value, latents) for value in self.latents_scale(vae))
        return self.pack((latents - shift) * factor)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Rearrange the VAE's latents, [B, C, h, w], to what the transformer takes."""
        return latents

    def unpack(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The inverse of `pack`, for a grid of tokens (rows, columns)."""
        return latents

    def vae_latents(self, vae: nn.Module, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """What the VAE decodes, [B, C, h, w], of latents as the transformer takes them: the inverse of `model_latents`.

        Raises ValueError as that does.
        """
        shift, factor = (_like(value, latents) for value in self.latents_scale(vae))
        return self.unpack(latents, grid) / factor + shift

    def given_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """What the pipeline's argument `latents` takes, of latents as the transformer takes them.

        grid: (rows, columns) in tokens.
        """
        return latents

    def sampled_latents(self, vae: nn.Module | None, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the transformer takes them, of what the pipeline gives with output_type="latent".

        vae: the pipeline's, which may have none unless `samples_with_vae`.
        """
        return latents

    # Prompts

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: list[str], **length: int) -> dict[str, torch.Tensor]:
        """Encode prompts: tensors with one row per prompt, named like the arguments of the pipeline's call.

        A cache keeps these tensors; "prompt_embeds" is among them. pipeline: it may have no VAE, and of
        its transformer only `config` and `dtype`, as these are not loaded together with the text encoders; so its class
        has to load without them. length: max_sequence_length, or nothing for the
        pipeline's default.
        """

    @abstractmethod
    def example_text(
        self, config: Mapping[str, Any], count: int, length: int, make: Callable[..., torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Make up tensors as `encode_prompts` gives them, for `count` prompts of `length` tokens.

        config: the transformer's. make(*shape) gives the values.
        """

    def text_length(self, max_sequence_length: int | None = None, tokenizer_length: int = 77) -> int:
        """How many text tokens the transformer receives; a max_sequence_length of None is the pipeline's default.

        tokenizer_length: the maximum length of the pipeline's first tokenizer, in tokens. Raises ValueError for a length that
        the pipelines do not take.
        """
        if max_sequence_length is not None and max_sequence_length > (self.longest_text or inf):
            raise ValueError(
                f"max_sequence_length of {self.name} is at most {self.longest_text}, not {max_sequence_length}"
            )
        return self.usual_sequence_length() if max_sequence_length is None else max_sequence_length

    def usual_sequence_length(self) -> int | None:
        """The text-to-image pipeline's max_sequence_length where it is not given; None: its call has no such argument."""
        arguments = signature(self.pipelines["text-to-image"].__call__).parameters
        return arguments["max_sequence_length"].default if "max_sequence_length" in arguments else None

    def sampling_arguments(
        self, text: Mapping[str, torch.Tensor], empty: Mapping[str, torch.Tensor], count: int
    ) -> dict[str, Any]:
        """The pipeline's arguments for `count` encoded prompts. empty: the empty prompt's tensors, one row each."""
        if not self.guided:
            return dict(text)
        negative = {f"negative_{name}": value.repeat_interleave(count, 0) for name, value in empty.items()}
        return {**text, **negative}

    def sampler(self, pipeline: Any) -> Callable[..., Any]:
        """What is called with `sampling_arguments` and the pipeline's others: the pipeline, if it takes encoded prompts."""
        return pipeline

    # The teacher

    def default_recipe(self, config: Mapping[str, Any]) -> str:
        """The name of the recipe that fits a transformer of this config."""
        return next(iter(self.recipes))

    def pipeline_recipe(self, config: Mapping[str, Any]) -> str | None:
        """The name of the recipe that a pipeline's own config tells, from its model_index.json; None: it tells none."""
        return None

    def takes_guidance(self, config: Mapping[str, Any]) -> bool:
        """Whether the guidance scale is an input of the transformer."""
        return bool(config.get("guidance_embeds"))

    @abstractmethod
    def model_inputs(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        grid: tuple[int, int],
        guidance: float | None,
    ) -> dict[str, Any]:
        """The keyword arguments of the transformer's forward.

        noisy: latents as the transformer takes them. times: [B], as the recipes draw them. text: as `encode_prompts`
        gives it. grid: (rows, columns) in tokens. guidance: the scale, where `takes_guidance`, else None.
        """

    def latents_and_times(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `model_inputs`: a call's noisy latents, and its times [B] in the recipes' unit."""
        return inputs["hidden_states"], inputs["timestep"]

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, scheduler: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The noisy latents, and what the teacher was trained to predict from them; all shaped like `latents`."""
        return flow_noise(latents, noise, times)

    def parts(
        self, noisy: torch.Tensor, prediction: torch.Tensor, times: torch.Tensor, scheduler: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `add_noise`: the latents and the noise that a prediction says to be in noisy latents."""
        return flow_parts(noisy, prediction, times)

    def times_at(self, sigmas: Sequence[float], scheduler: Any) -> torch.Tensor:
        """Times, as the recipes draw them, at which noise is sigma / (1 - sigma) times as strong as the image.

        sigmas: above 0 and below 1.
        """
        return torch.tensor(sigmas)

    def sampling_from(self, scheduler: Any, sigmas: Sequence[float]) -> tuple[Any, dict[str, Any]]:
        """What samples an image from noisy latents: a scheduler, and arguments of the pipeline's call.

        scheduler: the pipeline's, which stays as it is. sigmas: falling, see `times_at`; the first is that of the latents,
        and a step of sampling is made from each, the last one to 0. Raises ValueError for another kind of scheduler.
        """
        if not isinstance(scheduler, self.scheduler):
            raise ValueError(
                f"sampling from a given noise needs a {self.scheduler.__name__}, and this pipeline has a "
                f"{type(scheduler).__name__}"
            )
        plain = {name: value for name, value in _AS_GIVEN.items() if name in scheduler.config}
        scheduler = type(scheduler).from_config(scheduler.config, **plain)
        return scheduler, {"sigmas": list(sigmas), "num_inference_steps": len(sigmas)}

    def prediction(self, output: Any, latents: torch.Tensor) -> torch.Tensor:
        """What of the transformer's output predicts the target, shaped like `latents`."""
        return output

    def check_encoders(self, components: Mapping[str, Any]) -> None:
        """Raise ValueError for a pipeline that cannot read prompts. components: by name; a missing one is None."""
        for name in self.text_encoders:
            if components.get(name) is None:
                raise ValueError(f"this pipeline has no {name}, without which a {self.pipeline_name} reads no prompts")
        for name, component in components.items():
            tokenizer = name.replace("text_encoder", "tokenizer")
            if tokenizer != name and component is not None and components.get(tokenizer, ()) is None:
                raise ValueError(f"this pipeline has a {name} and no {tokenizer} for it")

    # Not to be overridden

    def pipelines_like(self, kind: type) -> Mapping[str, type]:
        """The set of pipeline classes by task that `kind`, one of `pipeline_classes`, is in."""
        return next(
            found for found in (self.pipelines, *self.other_pipelines) if issubclass(kind, tuple(found.values()))
        )

    def pipeline_classes(self, task: str | None = None) -> tuple[type, ...]:
        """diffusers' pipeline classes for the family's models, of one task or of all."""
        sets = (self.pipelines, *self.other_pipelines)
        return tuple(kind for found in sets for name, kind in found.items() if task in (None, name))

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """Channels of the VAE's latents, for a transformer of this config."""
        return prod(self.latents_shape(config, (1, 1))) // self.latents_per_token(config) ** 2

    def first_layer(self, model: nn.Module) -> LayerShape:
        """Sizes of the first of the model's layers that hybrid attention can replace."""
        return self.layer_shape(next(attn for name, attn in self.attentions(model).items() if self.converts(name)))

    def attention_shape(self, published: Published) -> AttentionShape:
        """The attention layer of a published model, which is built without weights."""
        with torch.device("meta"):
            model = self.dense_class(**published.arguments)
        layer = self.first_layer(model)
        text = self.text_length() if self.joint else 0
        pixels = self.token_pixels(model.config, published.vae_scale_factor)
        return AttentionShape(layer.heads, layer.head_dim, text, self.text_first, pixels)

    def recipe(self, config: Mapping[str, Any], name: str | None = None) -> Recipe:
        """The recipe of this name; None: the one that fits the transformer's config.

        Raises ValueError for an unknown name, and for a recipe of another family.
        """
        name = self.default_recipe(config) if name is None else name
        if name in self.recipes:
            return self.recipes[name]
        for other in families():
            if name in other.recipes:
                raise ValueError(f"recipe {name!r} is for a {other.pipeline_name}, not for a {self.pipeline_name}")
        known = (known for family in families() for known in family.recipes)
        raise ValueError(f"unknown recipe {name!r}: choose from {', '.join(known)}")

    @property
    def pipeline_name(self) -> str:
        """The name of the text-to-image pipeline's class; of the model's, where there is none."""
        return self.pipelines.get("text-to-image", self.dense_class).__name__


def _like(value: float | torch.Tensor, latents: torch.Tensor) -> float | torch.Tensor:
    return value.to(latents) if isinstance(value, torch.Tensor) else value


def check_latents_scale(vae_config: Mapping[str, Any]) -> None:
    """Raise ValueError for a VAE whose latents are scaled otherwise than by one factor and one shift."""
    for name in ("latents_mean", "latents_std"):
        if vae_config.get(name) is not None:
            raise ValueError(
                f"the VAE has {name} per channel, which is not applied here: only scaling_factor and shift_factor are"
            )


_FAMILIES: list[Family] = []


def register(family_class: type[Family]) -> Family:
    """Add a family, so that its models can be converted, distilled, sampled, measured and described.

    Returns its one instance. Raises TypeError for anything but a subclass of Family, and ValueError, in one line, where
    it lacks parts, has a part of the wrong kind, or repeats a name of another family.
    """
    if not _is_class(family_class, Family):
        raise TypeError(f"register takes a subclass of Family, not {shorten(repr(family_class), 80)}")
    own = {name for name in Family.__annotations__ if not hasattr(family_class, name)}
    missing = sorted(own | getattr(family_class, "__abstractmethods__", frozenset()))
    named = getattr(family_class, "name", family_class.__name__)
    if missing:
        raise ValueError(f"the family {named} lacks {', '.join(missing)}: see hybriddit.models.family.Family")
    for part, (fits, wanted) in _PARTS.items():
        value = getattr(family_class, part)
        if not fits(family_class, value):
            raise ValueError(f"the family {named}: {part} must be {wanted}, not {shorten(repr(value), 80)}")
    for row in family_class.processors if family_class.attention_kwargs is not None else ():
        for made in (row.hybrid, row.dense or row.teacher):
            if not _takes(made.__call__, "token_layout"):
                raise ValueError(
                    f"the family {named}: {made.__name__} must take the keyword token_layout, as processors of hybrid "
                    "and of dense layers both do with attention_kwargs"
                )
    for other in _FAMILIES:
        own, theirs = _unique_names(family_class), _unique_names(other)
        if family_class.hybrid_class is other.hybrid_class and family_class.serves is not Family.serves:
            own["model class"] = set()  # `serves` tells their models apart
        taken = [f"{kind} {name}" for kind in own for name in sorted(own[kind] & theirs[kind])]
        if taken:
            raise ValueError(f"the family {named} repeats {', '.join(taken)} of the family {other.name}")
    unfit = {part: lacks for part in _DEFAULTS if (lacks := _lacks_for_default(family_class, part))}
    if unfit:
        found = ", ".join(f"{part} (the default needs {' and '.join(lacks)})" for part, lacks in unfit.items())
        raise ValueError(f"the family {named} lacks {found}: see hybriddit.models.family.Family")
    family = family_class()
    _FAMILIES.append(family)
    return family


def _unique_names(family: Family | type[Family]) -> dict[str, set[str]]:
    """The names by which a family and its parts are found, by what they name: no two families share one."""
    return {
        "name": {family.name},
        "model class": {family.dense_class.__name__},
        "recipe": set(family.recipes),
        "repository": set(family.published),
        "shape": {published.shape for published in family.published.values() if published.shape},
    }


def _is_class(value: Any, base: type = object) -> bool:
    return isinstance(value, type) and issubclass(value, base)


def _maps(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) and fits(part) for name, part in value.items())


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of this name."""
    parameters = signature(function).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _are_processors(row: Any) -> bool:
    return isinstance(row, Processors) and all(_is_class(made) for made in row[:3] if made is not None)


# part of a family -> a check of its value (run in this order), and what the value must be, in words
_PARTS: dict[str, tuple[Callable[[type[Family], Any], bool], str]] = {
    "name": (lambda family, value: isinstance(value, str) and value, "a text"),
    "dense_class": (lambda family, value: _is_class(value, nn.Module), "the model's class"),
    "hybrid_class": (
        lambda family, value: _is_class(value, family.dense_class) and value is not family.dense_class,
        "hybrid_class(dense_class), of models.hybrid_model",
    ),
    "layers": (
        lambda family, value: isinstance(value, tuple) and value and all(isinstance(name, str) for name in value),
        "a tuple of patterns of module names",
    ),
    "attention_kwargs": (
        lambda family, value: value is None or value in signature(family.dense_class.forward).parameters,
        "None or an argument of the model's forward",
    ),
    "processors": (
        lambda family, value: isinstance(value, tuple) and value and all(_are_processors(row) for row in value),
        "a tuple of Processors, each of classes",
    ),
    **dict.fromkeys(
        ("joint", "text_first", "guided", "guided_together"),
        (lambda family, value: isinstance(value, bool), "True or False"),
    ),
    "pipelines": (
        lambda family, value: (
            _maps(value, lambda made: _is_class(made, DiffusionPipeline))
            and (not value or "text-to-image" in value)
            and set(value) <= set(TASKS)
        ),
        f"pipeline classes by task: text-to-image, and where they exist {' and '.join(TASKS[1:])}; or none at all",
    ),
    "scheduler": (lambda family, value: _is_class(value), "a scheduler's class"),
    "recipes": (
        lambda family, value: (
            _maps(value, lambda recipe: isinstance(recipe, Recipe)) and bool(value) == bool(family.pipelines)
        ),
        "one Recipe or more, by name; none without pipelines",
    ),
    "published": (
        lambda family, value: _maps(value, lambda model: isinstance(model, Published)),
        "a mapping of repositories to Published",
    ),
}


# method with a default -> what the default reads: fields of the model's config, arguments of its forward, and of the
# text-to-image pipeline's call
_DEFAULTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "token_layout": (("patch_size",), ("hidden_states",), ()),
    "latents_per_token": (("patch_size",), (), ()),
    "latents_shape": (("in_channels",), (), ()),
    "latents_and_times": ((), ("hidden_states", "timestep"), ()),
    "text_length": ((), (), ("max_sequence_length",)),
}


def _lacks_for_default(family_class: type[Family], method: str) -> list[str]:
    """What the default of a method needs and the family's classes do not have; nothing where it has its own."""
    if getattr(family_class, method) is not getattr(Family, method):
        return []
    fields, arguments, settings = _DEFAULTS[method]
    if method == "token_layout" and family_class.joint:
        arguments = (*arguments, "encoder_hidden_states")
    model, pipeline = family_class.dense_class, family_class.pipelines.get("text-to-image")
    return [
        *(f"config.{name}" for name in fields if not _takes(model.__init__, name)),
        *(f"forward's {name}" for name in arguments if not _takes(model.forward, name)),
        *(f"the pipeline's {name}" for name in settings if pipeline is None or not _takes(pipeline.__call__, name)),
    ]


def unregister(family: Family) -> None:
    """Remove a family from the table."""
    _FAMILIES.remove(family)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks in the stacks of a transformer of diffusers, in their order."""
    return [block for _, _, stack in block_stacks(model) for block in stack]


def block_stacks(model: nn.Module) -> list[tuple[nn.Module, str, nn.ModuleList]]:
    """The stacks of blocks of a transformer of diffusers: the module that holds a stack, its name there, and the stack.

    Lists of single layers are none, such as FIBO's for text.
    """
    stacks = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleDict):
            stacks += block_stacks(child)
        elif isinstance(child, nn.ModuleList) and any(len(list(block.children())) > 1 for block in child):
            stacks.append((model, name, child))
    return stacks


def families() -> Sequence[Family]:
    """The registered families, oldest first."""
    return tuple(_FAMILIES)


def family_of(model: nn.Module) -> Family:
    """The family of this model's class, dense or hybrid. Raises ValueError for any other class, subclasses included."""
    for family in _FAMILIES:
        if unsharded_class(model) in (family.dense_class, family.hybrid_class) and family.serves(model.config):
            return family
    supported = ", ".join(dict.fromkeys(family.dense_class.__name__ for family in _FAMILIES))
    held = next((name for name in component_names() if hasattr(model, name)), None)
    hint = f": pass its .{held}" if held else ""
    raise ValueError(f"{type(model).__name__} is not supported{hint}: hybridize one of {supported}")


def family_of_class(name: str | None, config: Callable[[], Mapping[str, Any]] | None = None) -> Family | None:
    """The family that has a model class of this name, dense or hybrid, or None.

    config: gives the model's config, which tells families apart that share a class, and is not called for others; None:
    the first of them.
    """
    found = [f for f in _FAMILIES if name in (f.dense_class.__name__, f.hybrid_class.__name__)]
    if len(found) > 1 and config is not None:
        values = config()
        found = [family for family in found if family.serves(values)]
    return next(iter(found), None)


def component_names() -> tuple[str, ...]:
    """What pipelines call the models that families describe, such as "transformer"."""
    return tuple(dict.fromkeys(("transformer", *(family.component for family in _FAMILIES))))


def component_of(kind: type[DiffusionPipeline]) -> str | None:
    """What a class of pipelines calls the model that its images come from; None for one that has no such model."""
    parameters = signature(kind.__init__).parameters
    return next((name for name in component_names() if name in parameters), None)


def denoiser(pipeline: Any) -> Any:
    """The model that a pipeline's images come from, its transformer or UNet; None where it has none."""
    found = (getattr(pipeline, name, None) for name in component_names())
    return next((model for model in found if model is not None), None)


def model_of(model_or_pipeline: Any) -> Any:
    """A pipeline's `denoiser`; a model as it is."""
    found = None if isinstance(model_or_pipeline, nn.Module) else denoiser(model_or_pipeline)
    return model_or_pipeline if found is None else found


def find_published(repository: str) -> tuple[Family, Published] | None:
    """The family and the description of a published model, or None for a repository that no family lists."""
    return next(((f, f.published[repository]) for f in _FAMILIES if repository in f.published), None)


def is_hybrid(model: nn.Module) -> bool:
    """Whether the model has been converted."""
    return any(unsharded_class(model) is family.hybrid_class for family in _FAMILIES)


def unsharded_class(model: nn.Module) -> type[nn.Module]:
    """The model's class; for a model that FSDP2 has sharded and given a new class, the class it had before."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
