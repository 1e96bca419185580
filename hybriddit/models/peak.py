"""How much memory a transformer's forward pass takes at its peak, found without running it: on tensors without data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .family import family_of, is_hybrid
from .strips import shown_strips


def forward_peak(
    model: nn.Module,
    grid: tuple[int, int],
    text: Mapping[str, torch.Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rows: int | None = None,
) -> int:
    """The most bytes that one forward pass without gradients holds besides the weights, its inputs included.

    model: on any device, as are the prompts' tensors `text` (see `Family.encode_prompts`), as many as there are images.
    grid: (rows, columns) in tokens. device, dtype: of the pass. rows: that of `in_strips`; None: the whole image at once.

    What libraries take inside their kernels is not seen. Only one block of each kind is run, and two of its strips.
    """
    family, count = family_of(model), len(next(iter(text.values())))
    with torch.device("meta"):
        small = type(model).from_config(model.config).eval()
    _one_block_of_each_kind(small)
    latents = torch.zeros(()).expand(count, *family.latents_shape(model.config, grid))
    guidance = 1.0 if family.takes_guidance(model.config) else None
    inputs = family.model_inputs(latents, torch.full((count,), family.middle_time), text, grid, guidance)
    layout = family.token_layout(small, inputs)  # some read it from the values of tensors
    if is_hybrid(small) and family.attention_kwargs is not None:
        inputs[family.attention_kwargs] = {"token_layout": layout}
    with contextlib.nullcontext() if rows is None else shown_strips(small, rows, most=2):
        return module_peak(small, {**inputs, "return_dict": False}, device, dtype)


def decoder_peak(
    vae: nn.Module, latents: tuple[int, int], *, device: torch.device, dtype: torch.dtype, images: int = 1
) -> int:
    """The same of a VAE's decoder, for images of so many (rows, columns) of latents."""
    shape = images, vae.config.latent_channels, *latents
    return module_peak(vae.decoder, {"sample": torch.zeros(()).expand(shape)}, device, dtype)


def module_peak(module: nn.Module, arguments: dict[str, Any], device: torch.device, dtype: torch.dtype) -> int:
    """The same of a module on any device, for these arguments of forward. dtype: of weights and floating arguments."""
    # fake weights without an active mode, so that side computations, such as the windows' tiles, stay real; but of a
    # device that is not here nothing can be real
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    absent = device.type == "cuda" and not torch.cuda.is_available()

    def empty(like: Any, dtype: torch.dtype = dtype) -> Any:
        if not isinstance(like, torch.Tensor):
            return like
        kept = dtype if like.is_floating_point() else like.dtype
        with fake:
            return torch.empty(like.shape, dtype=kept, device=device)

    weights = {
        name: empty(tensor, torch.float32 if _is_gate(name) else dtype)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
    for name, value in arguments.items():  # whole numbers, such as labels, are looked at where they can be
        looked_at = isinstance(value, torch.Tensor) and not value.is_floating_point() and not absent
        arguments = {**arguments, name: value.to(device) if looked_at else empty(value)}
    with torch.no_grad(), fake if absent else contextlib.nullcontext():
        functional_call(module, weights, (), arguments)  # what is made once and kept, such as the windows' tiles
        with _Held(besides=weights.values()) as held:
            held.note(arguments.values())
            functional_call(module, weights, (), arguments)
    return held.peak


class _Held(TorchDispatchMode):
    """Notes the storages that operations make, and the most bytes that they hold together, besides some tensors."""

    def __init__(self, besides: Iterable[torch.Tensor]):
        super().__init__()
        self.besides = {tensor.untyped_storage()._cdata for tensor in besides}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.note(tree_leaves(out))
        return out

    def note(self, values: Iterable[Any]) -> None:
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        for value in values:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata in self.besides:
                    continue
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))


def _is_gate(name: str) -> bool:
    return "gate" in name.split(".") and ".hybrid." in name


def _one_block_of_each_kind(model: nn.Module) -> None:
    """Leave one block of each structure in a model's stacks."""
    for name, stack in list(model.named_children()):
        if isinstance(stack, nn.ModuleList):
            kinds = {_structure(block): block for block in reversed(stack)}
            setattr(model, name, nn.ModuleList(block for block in stack if block in kinds.values()))
    if is_hybrid(model):
        left = {name for name, _ in model.named_modules()}
        model._dense_processors = {name: own for name, own in model._dense_processors.items() if name in left}


def _structure(block: nn.Module) -> tuple:
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    return shapes, tuple((name, type(module)) for name, module in block.named_modules())
