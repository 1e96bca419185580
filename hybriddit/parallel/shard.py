"""Spread a transformer's image over processes: one call, and the model is called as ever, on every process."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FirstBlockCacheConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..models import SiTTransformer2DModel, is_hybrid
from ..models.spread import Spread, changed, check_spreads
from ..models.surgery import arguments_of, inject_token_layout, read_token_layout
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
    check_spreads(transformer)
    if any(isinstance(getattr(hook, "__self__", None), SpreadOver) for hook in transformer._forward_pre_hooks.values()):
        raise ValueError("the images of this model are spread over processes already")
    if any(isinstance(parameter, DTensor) for parameter in transformer.parameters()):
        raise ValueError("the model's weights are sharded (FSDP): give a model whose weights are whole")
    device, found = next(transformer.parameters()).device.type, backends(group)
    if (device, found.get(device)) not in (("cuda", "nccl"), ("cpu", "gloo")):
        raise ValueError(f"the model is on {device}, and the processes talk by {found}: GPUs need nccl, CPUs gloo")
    check_equal_models(transformer, group)
    SpreadOver(group).attach(transformer)
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


class SpreadOver(Spread):
    """What a model's hooks do to spread its image over the processes of a group.

    layout: with this process's rows; None where each process runs the whole image.
    """

    def __init__(self, group: dist.ProcessGroup):
        super().__init__(partial(Rows, group))
        self.group = group
        self._added_up: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()

    def __deepcopy__(self, memo: dict) -> SpreadOver:
        return self  # a copy of the model talks to the same processes

    def enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Forward pre-hook of the model: also look that all processes make the same call, and add up gradients."""
        self.layout = None
        inputs = arguments_of(model, args, kwargs)
        if not isinstance(model, SiTTransformer2DModel):
            if not is_hybrid(model) or self._converted_anew(model):
                raise ValueError("the model was converted since its images were spread over processes: load it anew")
            if model._dense_mode:  # each process runs the teacher on the whole image
                if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
                    raise ValueError("the teacher of a model that is spread over processes has no gradients: no_grad()")
                return None
        if isinstance(getattr(model, "_cache_config", None), FirstBlockCacheConfig):
            raise ValueError(
                "the first-block cache would skip blocks by what each process's rows look like: disable_cache() first"
            )
        check_equal_inputs(inputs, self.group)
        if torch.is_grad_enabled():
            self._add_up_gradients(model)
        return super().enter(model, (), {name: changed(value, self._shared) for name, value in inputs.items()})

    def _converted_anew(self, model: nn.Module) -> bool:
        """Whether a later conversion's hook comes after this one, with layers that know nothing of their rows."""
        hooks = list(model._forward_pre_hooks.values())
        return any(hook in (inject_token_layout, read_token_layout) for hook in hooks[hooks.index(self.enter) :])

    def _shared(self, x: Tensor) -> Tensor:
        return shared(x, self.group) if x.requires_grad else x

    def _add_up_gradients(self, model: nn.Module) -> None:
        """Add up the gradients of the weights over the processes, each of which has the share of its rows."""
        for parameter in model.parameters():
            if parameter.requires_grad and parameter not in self._added_up:
                parameter.register_hook(partial(add_up, group=self.group))
                self._added_up[parameter] = True
