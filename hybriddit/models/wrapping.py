"""See a model through what others put around it or its layers: torch.compile, DDP, and peft's LoRAs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# children under which torch.compile, activation checkpointing and FSDP keep the module that they wrap
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is numbers in memory: not quantised, sharded, offloaded, or of another library's type."""
    return type(weight) in (torch.Tensor, nn.Parameter) and not weight.is_meta


def working_dtype(model: ModelMixin) -> torch.dtype:
    """The dtype that a model's activations have: its weights', but for quantised ones, which name a type of their own."""
    quantised = (is_traceable_wrapper_subclass(one) and not isinstance(one, DTensor) for one in model.parameters())
    beside = (weight.dtype for weight in model.parameters() if is_plain(weight) and weight.is_floating_point())
    return next(beside, model.dtype) if any(quantised) else model.dtype


@contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block, the module's forward is this function; then it is its own again, or that of a hook before."""
    with with_method(module, "forward", forward):
        yield


@contextmanager
def with_method(held: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Within the block, an object's method of this name is this function; then it is what it was."""
    before = vars(held).get(name)
    setattr(held, name, method)
    try:
        yield
    finally:
        delattr(held, name)
        if before is not None:
            setattr(held, name, before)


def unwrapped(model: Any) -> Any:
    """The model within the wrappers of torch.compile, DDP and peft; anything else as it is."""
    while True:
        peft = sys.modules.get("peft")  # without it there are no wrappers of its
        if "_orig_mod" in getattr(model, "_modules", ()):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif peft is not None and isinstance(model, peft.PeftModel):
            model = model.get_base_model()
        else:
            return model


def plain_state(model: nn.Module, part: str = "") -> dict[str, torch.Tensor]:
    """The state dict without LoRAs and under the names that it has without wrappers; `part` is in all names to give.

    The tensors are the model's own, so that what is copied into them changes the model. Raises ValueError where the
    weights themselves are not the model's: fused with a LoRA, or sharded.
    """
    state = {}
    for key, value in model.state_dict().items():
        name, fused = plain_name(model, key)
        if name is None or part not in name:
            continue
        if fused:
            raise ValueError(
                f"{name} is fused with a LoRA: unfuse it first (unfuse_lora, unmerge_adapter); to keep it, unload it "
                "while it is fused"
            )
        if isinstance(value, DTensor):
            raise ValueError(f"{name} is sharded over processes: gather the model's weights first")
        state[name] = value
    return state


def has_lora(model: nn.Module, part: str = "") -> bool:
    """Whether one of peft's layers is in the model, or in those of its modules whose names contain `part`."""
    return any(part in name and _kept_child(module) for name, module in model.named_modules())


def check_unwrapped(model: nn.Module) -> None:
    """Raise ValueError for a model within torch.compile, DDP or peft's wrapper, which training puts around it itself."""
    if unwrapped(model) is not model:
        raise ValueError(
            f"the model is within {type(model).__name__}: give the model itself, and train.compile=true to compile it"
        )


def plain_name(model: nn.Module, key: str) -> tuple[str | None, bool]:
    """The name without wrappers of an entry of the state dict, or None for one of a LoRA's; and whether it is fused."""
    module, plain, fused = model, [], False
    for part in key.split("."):
        kept = _kept_child(module)
        if kept:
            if part != kept:
                return None, False
            fused |= bool(getattr(module, "merged", False))
        elif part not in WRAPPED:
            plain.append(part)
        module = getattr(module, "_modules", {}).get(part)
    return ".".join(plain), fused


def _kept_child(module: nn.Module | None) -> str | None:
    """The child of one of peft's layers that is the model's own; None for any other module."""
    tuners, others = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is not None and isinstance(module, tuners.BaseTunerLayer):
        return "base_layer"
    if others is not None and isinstance(module, others.ModulesToSaveWrapper):
        return "original_module"
    return None


class SavesPlain:
    """A model class whose `save_pretrained` saves the model's own weights; put it before the diffusers class."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as diffusers does, without LoRAs and under plain names.

        Raises ValueError, before anything is written, where LoRAs are fused into the weights, or those are sharded.
        """
        plain = plain_state(self)

        def replaced(module, state: dict, prefix: str, metadata) -> None:
            state.clear()
            state.update(plain)

        hook = self.register_state_dict_post_hook(replaced)
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            hook.remove()

    # pipelines pass on only those arguments that the signature names
    save_pretrained.__signature__ = inspect.signature(ModelMixin.save_pretrained)
