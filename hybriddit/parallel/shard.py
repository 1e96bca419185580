"""Spread a transformer's image over processes: one call, and the model is called as ever, on every process."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FirstBlockCacheConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..attention import HybridAttention, TokenLayout
from ..models import SiTTransformer2DModel, family_of, is_hybrid
from ..models.surgery import (
    arguments_of,
    convert_dense_layers,
    given_layout,
    inject_token_layout,
    read_token_layout,
    with_layout,
)
from ..models.wrapping import check_unwrapped
from .equal import check_equal_inputs, check_equal_models
from .rows import Rows, add_up, backends, shared


def shard(transformer: nn.Module, mesh: DeviceMesh | dist.ProcessGroup) -> nn.Module:
    """Spread the image of every later call of a transformer over processes, in place.

    Each process computes some rows of tokens, and all of the text. What they exchange in a layer does not grow with the
    image's tokens: the far branch's sums, the rows of neighbours that a window reaches into, and the text's results.
    Layers that stay dense gather all keys and values. Every process calls the model, or the pipeline that has it, with
    the same arguments (the same seed), and gets the whole output.

    For training, every process computes the same loss of that output; after backward(), every process has the gradients
    that one alone would have, so that optimizers take the same step.

    transformer: a hybrid model, or a SiT; the same on every process. mesh: a mesh of one dimension, or a process group.
    Its timeout is how long a process waits for another one that hangs, before it raises ConnectionError.

    Returns the transformer. Raises ValueError, in one line and on every process, for a model that cannot be spread, and
    for processes whose versions, configs or weights differ.
    """
    group = _group_of(mesh)
    check_unwrapped(transformer)
    if not isinstance(transformer, SiTTransformer2DModel):
        family = family_of(transformer)
        if not is_hybrid(transformer):
            raise ValueError(f"the {type(transformer).__name__} is not hybrid: hybridize it first")
        family.check_shared(transformer.config)
        if family.image_exit is None:
            raise ValueError(
                f"{family.name} does not say where its image tokens leave the model: it needs image_exit (see Family)"
            )
    if any(isinstance(getattr(hook, "__self__", None), Spread) for hook in transformer._forward_pre_hooks.values()):
        raise ValueError("the images of this model are spread over processes already")
    if any(isinstance(parameter, DTensor) for parameter in transformer.parameters()):
        raise ValueError("the model's weights are sharded (FSDP): give a model whose weights are whole")
    device, found = next(transformer.parameters()).device.type, backends(group)
    if (device, found.get(device)) not in (("cuda", "nccl"), ("cpu", "gloo")):
        raise ValueError(f"the model is on {device}, and the processes talk by {found}: GPUs need nccl, CPUs gloo")
    check_equal_models(transformer, group)
    for name, module in transformer.named_modules():
        if not isinstance(module, HybridAttention):
            continue
        if module.pooled is not None:
            raise ValueError(f"{name} has pooled keys: such a model's images are not spread over processes")
        if module.far is not None and not module.far.spreads:
            raise ValueError(
                f"the far branch of {name} sees the whole image at once (a mixer of whole images, or a feature map without "
                "kernels): such a model's images are not spread over processes"
            )
    spread = Spread(group)
    entrance, exit = None, "proj_out"
    if not isinstance(transformer, SiTTransformer2DModel):
        convert_dense_layers(transformer)
        entrance, exit = family.image_entrance, family.image_exit
    transformer.register_forward_pre_hook(spread.enter, with_kwargs=True)
    if entrance is not None:
        transformer.get_submodule(entrance).register_forward_hook(spread.take)
    transformer.get_submodule(exit).register_forward_hook(spread.gather)
    for module in transformer.modules():
        if isinstance(module, HybridAttention):
            module.register_forward_pre_hook(spread.check_layer, with_kwargs=True)
    return transformer


def _group_of(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("there are no other processes: torch.distributed.init_process_group in each of them first")
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"the mesh has {mesh.ndim} dimensions: give the one that shares an image, mesh[name]")
        return mesh.get_group()
    if mesh is None or mesh == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not one of the group: call shard in the group's processes alone")
    return mesh


class Spread:
    """What a model's hooks do to spread its image over the processes of a group.

    layout: of the call that runs, with this process's rows; None where each process runs the whole image.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.layout: TokenLayout | None = None
        self._added_up: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()

    def __deepcopy__(self, memo: dict) -> Spread:
        return self  # a copy of the model talks to the same processes

    def enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Forward pre-hook of the model: give it the layout of this process's rows, and its part of the inputs."""
        self.layout = None
        inputs = arguments_of(model, args, kwargs)
        if isinstance(model, SiTTransformer2DModel):
            grid = model.patch_embed.dynamic_feat_size(inputs["hidden_states"].shape[2:])
            layout, cut, joint = TokenLayout(0, (grid,), text_first=False), (), ()
        elif not is_hybrid(model) or self._converted_anew(model):
            raise ValueError("the model was converted since its images were spread over processes: load it anew")
        elif model._dense_mode:  # each process runs the teacher on the whole image
            if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
                raise ValueError("the teacher of a model that is spread over processes has no gradients: no_grad()")
            return None
        else:
            family = family_of(model)
            layout, cut, joint = given_layout(model, inputs), family.image_arguments, family.joint_arguments
        if isinstance(getattr(model, "_cache_config", None), FirstBlockCacheConfig):
            raise ValueError(
                "the first-block cache would skip blocks by what each process's rows look like: disable_cache() first"
            )
        check_equal_inputs(inputs, self.group)
        if len(layout.grids) != 1:
            raise ValueError("an image with reference images is not spread over processes: call the model in one")
        height, width = layout.grids[0]
        rows = Rows(self.group, height)
        self.layout = layout._replace(grids=((rows.count, width),), rows=rows)
        parts = dict.fromkeys(cut, self.layout.own) | dict.fromkeys(joint, self.layout.own_joint)
        inputs = {name: self._part(value, parts.get(name)) for name, value in inputs.items()}
        if torch.is_grad_enabled():
            self._add_up_gradients(model)
        if isinstance(model, SiTTransformer2DModel):
            return (), {**inputs, "token_layout": self.layout}
        return (), with_layout(model, inputs, self.layout)

    def take(self, module: nn.Module, args: tuple, found: Tensor | tuple) -> Tensor | tuple:
        """Forward hook of the model's entrance: this process's rows of [B, N, width], or of the first of several tables."""
        if self.layout is None:
            return found
        if isinstance(found, tuple):
            return (self.layout.own(found[0]), *found[1:])
        return self.layout.own(found)

    def check_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of attention: a layer that took its rows for the whole image would be wrong without a word."""
        layout = args[3] if len(args) > 3 else kwargs["token_layout"]
        if self.layout is not None and layout.rows is not self.layout.rows:
            raise ValueError("an attention processor has dropped its layout's rows: change layouts by their _replace")

    def gather(self, module: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
        """Forward hook of the model's exit: the rows of all processes."""
        if self.layout is None:
            return tokens
        return self.layout.rows.gathered(tokens.unflatten(1, self.layout.grids[0])).flatten(1, 2)

    def _converted_anew(self, model: nn.Module) -> bool:
        """Whether a later conversion's hook comes after this one, with layers that know nothing of their rows."""
        hooks = list(model._forward_pre_hooks.values())
        return any(hook in (inject_token_layout, read_token_layout) for hook in hooks[hooks.index(self.enter) :])

    def _part(self, value: Any, cut: Callable[[Tensor], Tensor] | None) -> Any:
        """An argument, shared, and cut where there is a function for that: a tensor, or each of a list."""
        if isinstance(value, Tensor):
            value = shared(value, self.group) if value.requires_grad else value
            return value if cut is None else cut(value)
        if isinstance(value, list | tuple) and value and all(isinstance(x, Tensor) for x in value):
            return type(value)(self._part(x, cut) for x in value)
        return value

    def _add_up_gradients(self, model: nn.Module) -> None:
        """Add up the gradients of the weights over the processes, each of which has the share of its rows."""
        for parameter in model.parameters():
            if parameter.requires_grad and parameter not in self._added_up:
                parameter.register_hook(partial(add_up, group=self.group))
                self._added_up[parameter] = True
