"""Convert a model from dense to hybrid and back, in place; run it as its teacher."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..attention import HybridAttention, TokenLayout
from ..config import FULL, HybridConfig
from .family import Family, Processors, family_of, is_hybrid
from .processing import CheckpointWithKwargs, CheckpointWithLayout, FullDelta, LayoutHolder, LowRankDelta, delta_name
from .wrapping import unwrapped, working_dtype

NOT_IN_PARALLEL = (
    "hybrid models do not run in parallel by enable_parallelism, which cuts the tokens without heed to the image's rows: "
    "use hybriddit.parallel.shard(model, mesh)"
)


def hybridize(model: nn.Module, config: HybridConfig) -> nn.Module:
    """Replace the attention of a diffusers transformer by hybrid attention, in place.

    The model becomes an instance of its family's Hybrid class and keeps the config as `model.config.hybrid_config`, so
    that `save_pretrained` saves it whole. A fresh hybrid has zero gates: it is the dense model with each image token's
    attention masked to its window and the text.

    The model may have LoRAs, or be within torch.compile. Returns the model. Raises ValueError, and leaves the model as
    it was, for an unsupported class, a model that is hybrid already or within DDP, one whose attention processors have
    been replaced, and a config that converts no layer or has a pattern that matches no layer.
    """
    given, model = model, unwrapped(model)
    if isinstance(given, DistributedDataParallel):
        raise ValueError(
            "DDP knows only the weights that a model has when it is wrapped: convert the model before that"
        )
    family = family_of(model)
    if is_hybrid(model):
        raise ValueError("the model is hybrid already: restore_dense(model) before converting it anew")
    if not isinstance(config, HybridConfig):
        raise TypeError(f"hybridize needs a HybridConfig, not {type(config).__name__}")
    insert_hybrid(model, config)
    model.__class__ = family.hybrid_class
    _relabel_in_pipelines(model)
    return given


def restore_dense(model: nn.Module) -> nn.Module:
    """Undo `hybridize`, in place: class, config, processors, weights and outputs are as before. Returns the model."""
    given, model = model, unwrapped(model)
    family = hybrid_family(model)
    for name, processor in model._dense_processors.items():
        attn = model.get_submodule(name)
        attn.set_processor(processor)
        if hasattr(attn, "hybrid"):
            del attn.hybrid
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook in (inject_token_layout, read_token_layout):
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    for module in _checkpointing(model):
        if isinstance(module._gradient_checkpointing_func, CheckpointWithLayout | CheckpointWithKwargs):
            module._gradient_checkpointing_func = module._gradient_checkpointing_func.checkpoint
    del model._dense_processors, model._dense_mode, model._kept_dense, model._layout_holder
    values = {key: value for key, value in model.config.items() if key != "hybrid_config"}
    if "_class_name" in values:
        values["_class_name"] = family.dense_class.__name__
    model._internal_dict = type(model.config)(values)
    model.__class__ = family.dense_class
    _relabel_in_pipelines(model)
    return given


@contextlib.contextmanager
def dense_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, run a hybrid model as the dense teacher it was made from, bit for bit.

    A pass under gradient checkpointing has to be backpropagated within the same context. Raises ValueError for a
    model that is not hybrid.
    """
    given, model = model, unwrapped(model)
    family = hybrid_family(model)
    processors = {name: attn.processor for name, attn in family.attentions(model).items()}
    was_dense, model._dense_mode = model._dense_mode, True
    try:
        for name, processor in model._dense_processors.items():
            model.get_submodule(name).set_processor(processor)
        yield given
    finally:
        for name, processor in processors.items():
            model.get_submodule(name).set_processor(processor)
        model._dense_mode = was_dense


def keep_dense(model: nn.Module, layers: Collection[str]) -> None:
    """Let these converted layers of a hybrid model, by name, run the teacher's attention, and all others their hybrid's.

    It holds until it is called again, and is not saved: it is for training, where layers are converted by turns. Raises
    ValueError for a model that is not hybrid, and for names of other layers.
    """
    hybrid_family(model)
    unknown = [name for name in layers if not hasattr(model.get_submodule(name), "hybrid")]
    if unknown:
        raise ValueError(f"{unknown[0]} is not converted: there is nothing to keep from its hybrid")
    changed = model._kept_dense.symmetric_difference(layers)
    model._kept_dense = frozenset(layers)
    for name in changed:
        model.get_submodule(name).set_processor(_new_processor(model, hybrid_family(model), name))


def insert_hybrid(model: nn.Module, config: HybridConfig) -> None:
    """Add hybrid attention to a model without changing its class; for `hybridize` and the Hybrid constructors."""
    family = family_of(model)
    family.check_config(model.config)
    attentions = family.attentions(model)
    teachers = [row.teacher for row in family.processors]
    for name, attn in attentions.items():
        if type(attn.processor) not in teachers:
            raise ValueError(
                f"{name} runs {type(attn.processor).__name__} instead of {' or '.join(t.__name__ for t in teachers)} "
                "(PAG, an IP-Adapter, fused projections, …): undo that before converting"
            )
        _check_not_fused(name, attn)
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError("the model runs in parallel, with its tokens split over devices: convert it before that")
    layers = [name for name in attentions if family.converts(name)]
    if _is_offloaded(model):
        raise ValueError("the model is offloaded: convert it, or load the adapter, before enabling offload")
    config.check_layers(layers)
    _check_updates(family, config, [attentions[name] for name in layers])
    hybrids = {name: _hybrid_attention(family, name, attentions[name], config, config.kind(name), working_dtype(model),
                                       family.idle_projections(model, name))
               for name in layers if config.kind(name) != "dense"}  # fmt: skip
    if not hybrids:
        raise ValueError(f"no attention layer would be converted: all {len(layers)} are dense by config.layers")

    model._dense_processors = {name: attn.processor for name, attn in attentions.items()}
    model._dense_mode, model._kept_dense = False, frozenset()
    model._layout_holder = LayoutHolder() if family.attention_kwargs is None else None
    for name, attn in attentions.items():
        if name in hybrids:
            attn.hybrid = hybrids[name]
        attn.set_processor(_new_processor(model, family, name))
    for module in _checkpointing(model):
        module._gradient_checkpointing_func = with_what_it_drops(model, module._gradient_checkpointing_func)
    hook = read_token_layout if family.reads_positions else inject_token_layout
    model.register_forward_pre_hook(hook, with_kwargs=True)
    model.register_to_config(hybrid_config=config.to_dict())


def _check_updates(family: Family, config: HybridConfig, attentions: list[nn.Module]) -> None:
    """Raise ValueError if a pattern of `delta_projections` matches no projection of these layers."""
    known = list(dict.fromkeys(name for attn in attentions for name in family.projections(attn)))
    for pattern in config.delta_projections or ():
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"hybrid.delta_projections: {pattern!r} matches no projection of this model; they are {', '.join(known)}"
            )


def convert_dense_layers(model: nn.Module) -> None:
    """Let the layers of a hybrid model that stay dense run as HybridAttention of kind "dense", which has no weights.

    They compute the same, from query, key, value and the token layout, which diffusers' processors do not heed.
    """
    family = family_of(model)
    config = replace(HybridConfig.from_saved(model.config.hybrid_config), delta_rank=None, delta_projections=None)
    for name in model._dense_processors:
        attn = model.get_submodule(name)
        if family.converts(name) and not hasattr(attn, "hybrid"):
            attn.hybrid = _hybrid_attention(family, name, attn, config, "dense", working_dtype(model))
            attn.set_processor(_new_processor(model, family, name))


def _checkpointing(model: nn.Module) -> list[nn.Module]:
    """The modules that recompute their blocks in the backward pass."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


def with_what_it_drops(model: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Gradient checkpointing of a hybrid model by which the blocks know their layout."""
    family = family_of(model)
    if model._layout_holder is not None:
        return CheckpointWithLayout(checkpoint, model._layout_holder)
    return checkpoint if family.checkpoints_kwargs else CheckpointWithKwargs(checkpoint, family.attention_kwargs)


def _new_processor(model: nn.Module, family: Family, name: str) -> Any:
    """Make the processor of the attention module of this name in a hybrid model, converted or not."""
    if _runs_hybrid(model, name):
        processor = _own_processor(model, family, name)()
        if model._layout_holder is not None:
            processor.layout_holder = model._layout_holder
        return processor
    return teacher_processor(model, name)


def teacher_processor(model: nn.Module, name: str) -> Any:
    """The processor with which the attention module of this name, in a call of a hybrid model, computes what it did."""
    teacher = model._dense_processors[name]
    dense = _row(model, family_of(model), name).dense
    if dense is None:
        return teacher
    processor = dense()
    vars(processor).update(vars(teacher))  # keeps its attention backend
    return processor


def _is_offloaded(model: nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers move the weights between devices; they would miss added weights."""
    return any(
        hasattr(module, "_hf_hook")
        or (hasattr(module, "_diffusers_hook") and module._diffusers_hook.get_hook("group_offloading") is not None)
        for module in model.modules()
    )


def _hybrid_attention(
    family: Family,
    name: str,
    attn: nn.Module,
    config: HybridConfig,
    kind: str,
    dtype: torch.dtype,
    idle: tuple[str, ...] = (),
) -> HybridAttention:
    """Make the added module of one attention layer, on the layer's device, in `dtype` except the gate (fp32).

    idle: projections that get no updates.
    """
    shape = family.layer_shape(attn)
    rotary = config.rotary
    if rotary == "auto":
        rotary = "model" if family.rotary else "none"
    if rotary == "model" and not family.rotary:
        raise ValueError(f"rotary 'model': {family.name} has no rotary embedding: use 'axial', 'none' or 'auto'")
    hybrid = HybridAttention(
        shape.width,
        shape.heads,
        shape.head_dim,
        kind=kind,
        kv_heads=shape.kv_heads,
        window=config.window_of(name),
        stride=config.pair("stride"),
        dilation=config.pair("dilation"),
        window_shape=config.window_shape,
        pooled_keys=config.pooled_keys,
        map_rank=shape.width if config.map_rank == FULL else config.map_rank,
        mixer=config.mixer,
        **config.mixer_settings,
        rotary=rotary,
        value_conv=config.value_conv,
        join=config.join,
        gate=config.gate,
    )
    projections = family.projections(attn)
    hybrid.deltas, hybrid.idle = nn.ModuleDict(), idle
    for projection, module in projections.items():
        if config.updates(projection) and projection not in idle:
            sides = module.in_features, module.out_features
            full = config.delta_rank == FULL
            delta = FullDelta(*sides, module.bias is not None) if full else LowRankDelta(*sides, config.delta_rank)
            hybrid.deltas[delta_name(projection)] = delta
    return hybrid.to(next(attn.parameters()).device).train(attn.training).cast(dtype)


def inject_token_layout(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a hybrid model: passes the `token_layout` of this call to every attention processor.

    It runs outside the blocks, which may be compiled or checkpointed. A layout that the caller passes is kept. Raises
    ValueError if a converted layer has lost its processor, because it would silently be dense.
    """
    if model._dense_mode:
        _keep_for_checkpoints(model, None)
        return None
    check_processors(model)
    if getattr(model, "_parallel_config", None) is not None:
        # each device would take its share of the image for the whole image
        raise ValueError(f"{NOT_IN_PARALLEL}, or restore_dense(model) before that")
    family = family_of(model)
    inputs = arguments_of(model, args, kwargs)
    if family.attention_kwargs is None:
        if any(isinstance(value, dict) and "token_layout" in value for value in inputs.values()):
            raise ValueError(f"{family.name} is not given a token_layout: its other arguments tell it")
        with_layout(model, inputs, model._layout_holder.given or family.token_layout(model, inputs))
        return None
    attention_kwargs = inputs.get(family.attention_kwargs) or {}
    if "ip_adapter_image_embeds" in attention_kwargs:
        raise ValueError("hybrid models do not take IP-Adapter images: use them on the dense model")
    token_layout = attention_kwargs.get("token_layout")
    if token_layout is None:
        token_layout = family.token_layout(model, inputs)
    return (), with_layout(model, family.exact_inputs(inputs, token_layout), token_layout)


def _keep_for_checkpoints(model: nn.Module, attention_kwargs: dict[str, Any] | None) -> None:
    """Let gradient checkpointing know what a call's blocks get, where the model drops it there."""
    checkpoint = getattr(model, "_gradient_checkpointing_func", None)
    if isinstance(checkpoint, CheckpointWithKwargs):
        checkpoint.kwargs = attention_kwargs


def arguments_of(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module's forward, by name."""
    arguments = _forward_signature(type(module)).bind(module, *args, **kwargs).arguments
    arguments.pop("self")
    return arguments


def given_layout(model: nn.Module, arguments: dict[str, Any], name: str | None = None) -> TokenLayout:
    """The layout that reaches the attention processors of a hybrid model in a call with these arguments.

    name: of the attention kwargs among them; None: the model's own name of them.
    """
    if model._layout_holder is not None:
        return model._layout_holder.token_layout
    return arguments[name or family_of(model).attention_kwargs]["token_layout"]


def with_layout(
    model: nn.Module, arguments: dict[str, Any], token_layout: TokenLayout, name: str | None = None
) -> dict[str, Any]:
    """The arguments with which another layout reaches them. name: as of `given_layout`."""
    if model._layout_holder is not None:
        model._layout_holder.token_layout = token_layout
        return arguments
    name = name or family_of(model).attention_kwargs
    attention_kwargs = {**(arguments.get(name) or {}), "token_layout": token_layout}
    _keep_for_checkpoints(model, attention_kwargs)
    return {**arguments, name: attention_kwargs}


@torch.compiler.disable
def read_token_layout(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    """`inject_token_layout` for families whose layout is read from tensors: it runs before a compiled model's graph."""
    return inject_token_layout(model, args, kwargs)


def check_processors(model: nn.Module) -> None:
    """Raise ValueError if a layer of a hybrid model has another processor than conversion gave it."""
    family = family_of(model)
    for name in model._dense_processors:
        attn = model.get_submodule(name)
        expected = _own_processor(model, family, name)
        if type(attn.processor) is not expected:
            raise ValueError(
                f"{name} runs {type(attn.processor).__name__} in place of {expected.__name__}: hybrid models do not "
                "work with what replaces attention processors (IP-Adapter, PAG, set_attn_processor): go back with "
                "model.set_default_attn_processor(), or use it on the dense model, restore_dense(model)"
            )
        _check_not_fused(name, attn)


def reset_processors(model: nn.Module) -> None:
    """Give the layers of a hybrid model that have lost their processor a new one of the class conversion gave them."""
    family = family_of(model)
    for name in model._dense_processors:
        attn = model.get_submodule(name)
        if type(attn.processor) is not _own_processor(model, family, name):
            attn.set_processor(_new_processor(model, family, name))


def _own_processor(model: nn.Module, family: Family, name: str) -> type:
    """The class of processor that the attention module of this name has in a hybrid model."""
    row = _row(model, family, name)
    return row.hybrid if _runs_hybrid(model, name) else row.dense or row.teacher


def _runs_hybrid(model: nn.Module, name: str) -> bool:
    """Whether the attention module of this name runs its hybrid: it is converted, and `keep_dense` does not name it."""
    return hasattr(model.get_submodule(name), "hybrid") and name not in model._kept_dense


def _row(model: nn.Module, family: Family, name: str) -> Processors:
    """The family's processors for the attention module of this name."""
    return family.kind_of(name, type(model._dense_processors[name]))


def _check_not_fused(name: str, attn: nn.Module) -> None:
    # FLUX keeps its processor when its projections are fused: hybrid attention would go on using the separate
    # projections, which are then stale. Other models get another processor, which `check_processors` notices; their
    # flag is never reset.
    if isinstance(attn, AttentionModuleMixin) and attn.fused_projections:
        raise ValueError(f"{name} has fused projections: call model.unfuse_qkv_projections() first")


@functools.cache
def _forward_signature(model_class: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(model_class.forward)


def hybrid_family(model: nn.Module) -> Family:
    """The family of a hybrid model. Raises ValueError for one that is not."""
    family = family_of(model)
    if not is_hybrid(model):
        raise ValueError(f"the {type(model).__name__} is not hybrid: hybridize it first")
    return family


def _relabel_in_pipelines(model: nn.Module) -> None:
    """Update the model's class in the configs of the pipelines that hold it, which become their `model_index.json`.

    A pipeline records a component's class only when it is set. Saved with the old class, it would load a dense model.
    """
    ordinary, modular = (
        getattr(sys.modules.get(f"diffusers.{module}"), kind, ())  # nothing is of a kind that is not imported
        for module, kind in (
            ("pipelines.pipeline_utils", "DiffusionPipeline"),
            ("modular_pipelines.modular_pipeline", "ModularPipeline"),
        )
    )
    name = family_of(model).component
    for held in gc.get_objects():
        if not issubclass(type(held), (ordinary, modular)) or unwrapped(vars(held).get(name)) is not model:
            continue
        component = vars(held)[name]
        if issubclass(type(held), ordinary):
            setattr(held, name, component)
        else:  # it passes over what it has already
            held.register_components(**{name: None})
            held.update_components(**{name: component})
