"""FLOPs and memory of one step of training, counted on fake tensors: shapes without data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ..models import dense_mode, family_of
from ..models.family import transformer_blocks
from ..models.flops import attention_flops
from ..models.hybrid_model import stays_in_fp32
from .losses import captured_outputs, converted_layers, layer_loss

Storages = dict[int, torch.UntypedStorage]


def step_cost(
    model: nn.Module, grid: tuple[int, int], text: Mapping[str, torch.Tensor], count: int, *, bf16: bool
) -> dict[str, int]:
    """The cost of one step of `distill` on `count` images. model: a hybrid, on any device, "meta" included.

    grid: (rows, columns) in tokens. text: the prompts' tensors, see `Family.encode_prompts`, for `count` prompts.

    Returns the FLOPs of the "teacher", "student" and "backward" passes, and of the model's "attention" for one image;
    the bytes "kept" for the backward pass, and those kept if the blocks are "checkpointed".
    """
    family, dtype = family_of(model), torch.bfloat16 if bf16 else torch.float32
    family.make_tables(model)
    state = _fake_weights(model, lambda name: ".hybrid." in name, dtype)
    latents = torch.zeros((), dtype=dtype).expand(count, *family.latents_shape(model.config, grid))
    guidance = 1.0 if family.takes_guidance(model.config) else None
    inputs = family.model_inputs(latents, torch.full((count,), family.middle_time), text, grid, guidance)
    layout = family.token_layout(model, inputs)
    latents = latents.float()

    def call() -> torch.Tensor:
        output = functional_call(model, state, (), {**inputs, "return_dict": False})[0]
        return family.prediction(output, latents).float()

    layers = converted_layers(model)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    counts = {name: FlopCounterMode(display=False) for name in ("teacher", "student", "backward")}
    with (
        autocast,
        counts["teacher"],
        torch.no_grad(),
        dense_mode(model),
        captured_outputs(family, layers) as teacher_layers,
    ):
        teacher = call()
    with autocast, counts["student"], _recorded(model) as (kept, entered):
        with captured_outputs(family, layers) as student_layers:
            student = call()
        losses = F.mse_loss(student, latents), F.mse_loss(student, teacher), layer_loss(student_layers, teacher_layers)
    with counts["backward"]:
        sum(losses).backward()

    weights = _storages(state.values())
    held = _storages(
        part for outputs in (teacher_layers, student_layers) for parts in outputs.values() for part in parts
    )
    return {
        **{name: counter.get_total_flops() for name, counter in counts.items()},
        "attention": attention_flops(model, layout),
        **_kept_bytes(kept, entered, held, weights),
    }


def step_flops(cost: Mapping[str, int], *, again: bool = False, distribution: bool = False) -> int:
    """The FLOPs of a step with this `step_cost`. again: of gradient checkpointing; distribution: with that loss."""
    recomputed = cost["student"] if again else 0
    sampled = cost["teacher"] + cost["student"] if distribution else 0
    return cost["teacher"] + cost["student"] + cost["backward"] + recomputed + sampled


def sit_step_memory(model: nn.Module, count: int, *, bf16: bool) -> dict[str, int]:
    """The bytes that a step of `train` on `count` images keeps for the backward pass: "kept" and "checkpointed" as above.

    model: a SiTTransformer2DModel, on any device, "meta" included.
    """
    config = model.config
    state = _fake_weights(model, lambda name: name != "pos_embed", torch.float32)
    images = torch.zeros(()).expand(count, config.in_channels, config.sample_size, config.sample_size)
    inputs = (images, torch.full((count,), 0.5), torch.zeros(count, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), _recorded(model) as (kept, entered):
        output = functional_call(model, state, inputs, {"return_dict": False})[0]
        F.mse_loss(output.float(), images)
    return _kept_bytes(kept, entered, {}, _storages(state.values()))


def _fake_weights(model: nn.Module, trained: Callable[[str], bool], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights without data: in fp32 those that are trained, told by their names, and those that the class keeps so.

    The others are in `dtype`. There is no active fake mode, so that side computations, such as the windows' tiles, stay
    real.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        return {
            name: torch.empty(
                tensor.shape,
                dtype=torch.float32 if trained(name) or stays_in_fp32(model, name) else dtype,
                requires_grad=trained(name),
            )
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }


def _kept_bytes(
    kept: dict[int | None, Storages], entered: Storages, held: Storages, weights: Storages
) -> dict[str, int]:
    """The bytes "kept" for the backward pass, and those if the blocks are "checkpointed"; without the weights.

    kept, entered: see `_recorded`. held: what is kept besides.
    """
    outside = kept.pop(None, {}) | held
    blocks = [{key: s for key, s in block.items() if key not in outside} for block in kept.values()]
    return {
        "kept": _bytes(*blocks, outside, without=weights),
        # a block's input is kept; its inner activations only while the block's own gradients are computed
        "checkpointed": _bytes(outside, entered, without=weights)
        + max((_bytes(block, without=weights | entered) for block in blocks), default=0),
    }


def mean_step_cost(
    model: nn.Module,
    images: Mapping[tuple[int, int], int],
    text: Mapping[str, torch.Tensor],
    count: int,
    *,
    bf16: bool,
) -> tuple[dict[str, int], dict[str, int]]:
    """The cost of a step on the largest of several grids, and the mean over all images of what `step_cost` gives.

    images: how many there are of each grid. In the mean, costs of grids between the smallest and the largest are
    interpolated by their number of tokens, which is slightly too much: they are convex. Other arguments: see
    `step_cost`.
    """
    tokens = {grid: grid[0] * grid[1] for grid in images}
    ends = [find(tokens, key=tokens.__getitem__) for find in (min, max)]
    largest = step_cost(model, ends[1], text, count, bf16=bf16)
    if tokens[ends[0]] == tokens[ends[1]]:
        return largest, largest
    smallest = step_cost(model, ends[0], text, count, bf16=bf16)
    mean = sum(tokens[grid] * number for grid, number in images.items()) / sum(images.values())
    share = (mean - tokens[ends[0]]) / (tokens[ends[1]] - tokens[ends[0]])

    def between(low: int | dict, high: int | dict) -> int | dict:
        if isinstance(low, dict):
            return {name: between(low[name], high[name]) for name in low}
        return round(low + share * (high - low))

    return largest, between(smallest, largest)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[tuple[dict[int | None, Storages], Storages]]:
    """Yield (kept, entered): the storages that autograd keeps, and those that are inputs of a block.

    kept is by the index of the transformer block that uses the storages; None: outside all blocks.
    """
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

    blocks = transformer_blocks(model)
    handles = [block.register_forward_pre_hook(enter(i), with_kwargs=True) for i, block in enumerate(blocks)]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield kept, entered
    finally:
        for handle in handles:
            handle.remove()


def _storages(tensors: Iterable[torch.Tensor]) -> Storages:
    """The tensors' storages by identity. They are held here, so that no identity is used twice."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages}


def _bytes(*groups: Storages, without: Storages) -> int:
    together = {key: storage for group in groups for key, storage in group.items() if key not in without}
    return sum(storage.nbytes() for storage in together.values())
