"""What a forward pass of a transformer takes, found without running it, on tensors without data: its peak of memory, and
how much it computes and moves."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from ..attention.rates import Rates
from ..attention.rows import SilentRows, shares_of
from ..attention.work import Work
from .family import block_stacks, family_of, is_hybrid
from .hybrid_model import stays_in_fp32
from .positions import scaled_positions, scaling_of
from .sit import SiTTransformer2DModel
from .spread import Spread, check_spreads
from .strips import shown_strips


def forward_peak(
    model: nn.Module,
    grid: tuple[int, int],
    text: Mapping[str, torch.Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rows: int | None = None,
    processes: int = 1,
) -> int:
    """The most bytes that one forward pass without gradients holds besides the weights, its inputs included.

    model: on any device, as are the prompts' tensors `text` (see `Family.encode_prompts`), as many as there are images;
    of a SiT they are {"class_labels": [B]}. grid: (rows, columns) in tokens. device, dtype: of the pass. rows: that of
    `in_strips`; None: the whole image at once. processes: so many share the image, see `hybriddit.parallel.shard`; it is
    the peak of the one that holds most then. Not in strips. Raises ValueError for an image that they cannot share.

    What libraries take inside their kernels is not seen. Only one block of each kind is run, and two of its strips.
    """

    def peak(rank: int | None) -> int:
        small, inputs, _ = _small_call(model, grid, text)
        if rank is not None:
            Spread(lambda height: SilentRows(height, processes, rank)).attach(small)
        with _as_called(model, small, rows, most=2):
            return _watched(_Held, small, inputs, device, dtype).peak

    if processes == 1:
        return peak(None)
    check_spreads(model)
    return max(map(peak, _heaviest(grid[0], processes)))


def _heaviest(height: int, processes: int) -> set[int]:
    """The ranks of which one holds most: the first attends to the text too, those within fetch rows from both sides."""
    shares = shares_of(height, processes)
    within = sorted(range(1, processes - 1), key=lambda rank: shares[rank][1])
    return {0, *within[-1:], processes - 1}


# what makes a tensor without filling it, views that say not that they are, and questions
FREE = {f"aten::{name}" for name in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")}
FREE |= {"aten::_unsafe_view", "prim::device"}


class Cost(NamedTuple):
    """What a pass computes and moves: FLOPs (two per multiply-add), bytes to and from memory, and the least seconds.

    Both are summed over its operations one by one, as they run where nothing is compiled; each takes the longer of its
    arithmetic and its memory at the device's measured rates. What an operation reaches less comes on top.
    """

    flops: int
    bytes: int
    seconds: float


def forward_cost(
    model: nn.Module,
    grid: tuple[int, int],
    text: Mapping[str, torch.Tensor],
    rates: Rates,
    *,
    device: torch.device,
    dtype: torch.dtype,
    rows: int | None = None,
) -> Cost:
    """The cost of the pass whose peak `forward_peak` finds."""
    small, inputs, blocks = _small_call(model, grid, text)
    with _as_called(model, small, rows):
        return _watched(lambda *held: _Worked(rates, blocks), small, inputs, device, dtype).cost


@contextlib.contextmanager
def _as_called(model: nn.Module, small: nn.Module, rows: int | None, most: int | None = None) -> Iterator[None]:
    """Let a model's twin run in strips, and with its positions where those are scaled."""
    with contextlib.ExitStack() as within:
        if scaling := scaling_of(model):
            within.enter_context(scaled_positions(small, *scaling))
        if rows is not None:
            within.enter_context(shown_strips(small, rows, most))
        yield


def _small_call(
    model: nn.Module, grid: tuple[int, int], text: Mapping[str, torch.Tensor]
) -> tuple[nn.Module, dict[str, Any], dict[nn.Module, int]]:
    """A twin of the model with one block of each kind, the arguments of its call, and how many blocks each stands for."""
    count = len(next(iter(text.values())))
    with torch.device("meta"):
        small = type(model).from_config(model.config).eval()
    blocks = _one_block_of_each_kind(small)
    if isinstance(model, SiTTransformer2DModel):
        shape = model.config.in_channels, *(side * model.config.patch_size for side in grid)
        latents = torch.zeros(()).expand(count, *shape)
        inputs = {"hidden_states": latents, "timestep": torch.full((count,), 0.5), **text}
        return small, {**inputs, "return_dict": False}, blocks
    family = family_of(model)
    family.make_tables(small)
    latents = torch.zeros(()).expand(count, *family.latents_shape(model.config, grid))
    guidance = 1.0 if family.takes_guidance(model.config) else None
    inputs = family.model_inputs(latents, torch.full((count,), family.middle_time), text, grid, guidance)
    layout = family.token_layout(small, inputs)  # some read it from the values of tensors
    if is_hybrid(small) and family.attention_kwargs is None:
        small._layout_holder.given = layout
    elif is_hybrid(small):
        given = inputs.get(family.attention_kwargs) or {}  # such as a mask
        inputs[family.attention_kwargs] = {**given, "token_layout": layout}
    return small, {**inputs, "return_dict": False}, blocks


def decoder_peak(
    decoder: nn.Module, latents: tuple[int, int, int], *, device: torch.device, dtype: torch.dtype, images: int = 1
) -> int:
    """`forward_peak` of a VAE's decoder (see `Family.decoder`), for images of (channels, rows, columns) of latents."""
    return module_peak(decoder, _decoder_call(latents, images), device, dtype)


def module_peak(module: nn.Module, arguments: dict[str, Any], device: torch.device, dtype: torch.dtype) -> int:
    """The same of a module on any device, for these arguments of forward. dtype: of weights and floating arguments."""
    return _watched(_Held, module, arguments, device, dtype).peak


def decoder_cost(
    decoder: nn.Module, latents: tuple[int, int, int], rates: Rates, *, device: torch.device, dtype: torch.dtype
) -> Cost:
    """`forward_cost` of a VAE's decoder."""
    return _watched(lambda *held: _Worked(rates, {}), decoder, _decoder_call(latents), device, dtype).cost


def _decoder_call(latents: tuple[int, int, int], images: int = 1) -> dict[str, Any]:
    return {"sample": torch.zeros(()).expand(images, *latents)}


def _watched(
    watcher: Callable[[Iterable[Any], Iterable[Any]], Watcher],
    module: nn.Module,
    arguments: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Watcher:
    """What watcher(weights, arguments) makes, after a call of the module under it."""
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
        name: empty(tensor, torch.float32 if stays_in_fp32(module, name) else dtype)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }

    def given(value: Any) -> Any:  # whole numbers, such as labels, are looked at where they can be
        looked_at = isinstance(value, torch.Tensor) and not value.is_floating_point() and not absent
        return value.to(device) if looked_at else empty(value)

    arguments = tree_map(given, arguments)
    fused = contextlib.nullcontext() if device.type == "cpu" else _FusedAttention()
    with torch.no_grad(), fused, fake if absent else contextlib.nullcontext():
        functional_call(module, weights, (), arguments)  # what is made once and kept, such as the windows' tiles
        with watcher(weights.values(), tree_leaves(arguments)) as seen:
            functional_call(module, weights, (), arguments)
    return seen


class _FusedAttention(TorchFunctionMode):
    """Softmax attention as a GPU's fused kernels do it: for tensors without data, torch may take the one that holds scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            func = _fused_attention
        return func(*args, **(kwargs or {}))


def _fused_attention(query, key, value, *others, **options):
    if not isinstance(query, FakeTensor):  # in a trial of a backend
        return F.scaled_dot_product_attention(query, key, value, *others, **options)
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=options.get("scale"))[0]


class _Held(TorchDispatchMode):
    """Notes the storages that operations make, and the most bytes that they hold together, besides some tensors."""

    def __init__(self, besides: Iterable[torch.Tensor], held: Iterable[Any]):
        super().__init__()
        self.besides = {tensor.untyped_storage()._cdata for tensor in besides}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.held = self.peak = 0
        self.note(held)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.note(tree_leaves(out))
        if func._schema.name == "aten::convolution" and out.device.type == "cpu":
            # oneDNN copies image and weights, and then the result, to and from an order of its own
            copies = sum(x.numel() * x.itemsize for x in args[:2]), out.untyped_storage().nbytes()
            self.peak = max(self.peak, self.held + max(copies))
        return out

    def note(self, values: Iterable[Any]) -> None:
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        for value in values:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata in self.besides:
                    continue
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.held = sum(size for _, size in self.storages.values())
        self.peak = max(self.peak, self.held)


class _Worked(TorchDispatchMode):
    """Adds up what operations cost; those of a block as often as there are such blocks."""

    def __init__(self, rates: Rates, blocks: Mapping[nn.Module, int]):
        super().__init__()
        self.rates, self.cost, self.times = rates, Cost(0, 0, 0.0), 1
        for block, count in blocks.items():
            block.register_forward_pre_hook(lambda *call, count=count: self.repeat(count))
            block.register_forward_hook(lambda *call: self.repeat(1))

    def repeat(self, times: int) -> None:
        self.times = times

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name not in FREE and not all(_is_view(part) for part in func._schema.returns):
            tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
            moved = sum(min(x.untyped_storage().nbytes(), x.numel() * x.itemsize) for x in tensors.values())
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
            seconds = self.rates.floor(Work(moved, flops))
            values = zip(self.cost, (flops, moved, seconds), strict=True)
            self.cost = Cost(*(before + self.times * more for before, more in values))
        return out


def _is_view(part: Any) -> bool:
    return part.alias_info is not None and not part.alias_info.is_write


Watcher = TypeVar("Watcher", _Held, _Worked)


def _one_block_of_each_kind(model: nn.Module) -> dict[nn.Module, int]:
    """Leave one block of each structure in a model's stacks. Returns how many there were of each; {}: all are left."""
    if not isinstance(model, SiTTransformer2DModel) and family_of(model).skip_connections:
        return {}
    found = {}
    for holder, name, stack in block_stacks(model):
        kinds = {_structure(block): block for block in reversed(stack)}
        counts = Counter(map(_structure, stack))
        setattr(holder, name, nn.ModuleList(block for block in stack if block in kinds.values()))
        found |= {block: counts[kind] for kind, block in kinds.items()}
    if is_hybrid(model):
        left = {name for name, _ in model.named_modules()}
        model._dense_processors = {name: own for name, own in model._dense_processors.items() if name in left}
    return found


def _structure(block: nn.Module) -> tuple:
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    # of attention without weights too
    return shapes, tuple(
        (name, type(module), *(getattr(module, part, None) for part in ("kind", "window")))
        for name, module in block.named_modules()
    )
