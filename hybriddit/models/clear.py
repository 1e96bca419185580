"""CLEAR's published files for FLUX (arXiv 2412.16112): softmax over a circular window and text, and pooled keys."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from ..config import FULL, HybridConfig
from ..files import read_tensors
from ..stored import PICKLED
from .adapters import check_fit, hub_file, shapes_of
from .family import Family, family_of, model_of
from .processing import delta_name, full_update
from .surgery import hybridize, restore_dense
from .wrapping import plain_state, unwrapped

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # single blocks have the first three
POOLING = "processor.spatial_weight"
FILE = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?\.safetensors")  # the published files' names


def load_clear(model_or_pipeline: Any, source: str | os.PathLike, *, window: int, down_factor: int = 1) -> Any:
    """Convert a dense FLUX transformer, or that of a pipeline, to CLEAR's attention, and load its weights; in place.

    The model becomes a hybrid without far branch, of `clear_config`. What the file has in place of the model's own
    projections is kept beside them, as updates: `restore_dense` and `dense_mode` give the model as it was, and
    `save_adapter` an adapter of about the file's size. Each projection then costs two products. In bfloat16 the updates
    are rounded, by less than the file's own weights are.

    source: a file, or a folder or hub repository ("Huage001/CLEAR") with files under their published names, such as
        clear_local_16.safetensors or clear_local_8_down_4.safetensors.
    window: the circle's radius in tokens: 8, 16 or 32 in the published files.
    down_factor: the side of the blocks whose keys are pooled: 4 in the published files that have them; 1: none.

    Returns model_or_pipeline. Raises FileNotFoundError where there is no such file, and ValueError for one that is
    pickled, damaged, or does not fit these settings or the model, and as `hybridize`; the model is then as it was.
    """
    model = unwrapped(model_of(model_or_pipeline))
    family = family_of(model)
    if family.dense_class is not FluxTransformer2DModel:
        raise ValueError(f"CLEAR's files are for a {FluxTransformer2DModel.__name__}, not for a {type(model).__name__}")
    config = clear_config(window, down_factor)
    path = _file(str(source), window, down_factor)
    found = read_tensors(path)
    _check_pooling(found, path, down_factor)
    check_fit(shapes_of(found), _shapes(model, family, down_factor), f"{path}, as a file of CLEAR's,")
    hybridize(model, config)
    try:
        _take_weights(model, family, found)
    except ValueError:
        restore_dense(model)
        raise
    return model_or_pipeline


def clear_config(window: int, down_factor: int = 1) -> HybridConfig:
    """The config of CLEAR's attention; the arguments are those of `load_clear`. Raises ValueError for impossible ones."""
    if type(down_factor) is not int or down_factor < 1:
        raise ValueError(f"down_factor must be an integer of 1 (no pooled keys) or more, not {down_factor!r}")
    return HybridConfig(
        window=window,
        window_shape="circle",
        pooled_keys=None if down_factor == 1 else down_factor,
        linear=False,
        delta_rank=FULL,
        delta_projections=PROJECTIONS,
    )


def _file(source: str, window: int, down_factor: int) -> str:
    """The path of the file, fetched where `source` may be a hub repository."""
    down = f"_down_{down_factor}" if down_factor > 1 else ""
    name = f"clear_local_{window}{down}.safetensors"
    if os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, name)):
            there = sorted(path.name for path in Path(source).iterdir() if FILE.fullmatch(path.name))
            has = f"it has {', '.join(there)}" if there else "nor any other file of CLEAR's"
            raise FileNotFoundError(f"{source} has no {name}: {has}")
        return os.path.join(source, name)
    if source.endswith(PICKLED):
        raise ValueError(
            f"{source} is pickled and is not loaded: CLEAR's files are safetensors; write one of your own weights by "
            "safetensors.torch.save_file"
        )
    if not os.path.isfile(source):
        if source.endswith(".safetensors"):
            raise FileNotFoundError(f"no file {source}")
        return hub_file(source, name, "file or folder")
    given = FILE.fullmatch(Path(source).name)
    if given and (int(given[1]), int(given[2] or 1)) != (window, down_factor):
        raise ValueError(
            f"{source} is by its name for window={given[1]} and down_factor={given[2] or 1}, not {window} and {down_factor}"
        )
    return source


def _check_pooling(found: dict[str, torch.Tensor], path: str, down_factor: int) -> None:
    """Raise ValueError where the file's pooled keys are not those that `down_factor` says."""
    sides = {tuple(tensor.shape) for name, tensor in found.items() if name.endswith(POOLING)}
    wanted = {_pooling_shape(down_factor)} if down_factor > 1 else set()
    if sides != wanted:
        has = f"weights of pooled keys of shape {', '.join(map(str, sorted(sides)))}" if sides else "no pooled keys"
        raise ValueError(f"{path} has {has}, and down_factor is {down_factor}: give the one that it was made with")


def _pooling_shape(side: int) -> tuple[int, ...]:
    return 1, 1, 1, side, 1, side, 1  # of [B, heads, rows, side, columns, side, D]


def _shapes(model: nn.Module, family: Family, down_factor: int) -> dict[str, tuple[int, ...]]:
    """The shape of everything that a file has for this model, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, attn in family.attentions(model).items():
        for projection, module in family.projections(attn).items():
            if projection in PROJECTIONS:
                shapes[f"{name}.{projection}.weight"] = (module.out_features, module.in_features)
                if module.bias is not None:
                    shapes[f"{name}.{projection}.bias"] = (module.out_features,)
        if down_factor > 1:
            shapes[f"{name}.{POOLING}"] = _pooling_shape(down_factor)
    return shapes


@torch.no_grad()
def _take_weights(model: nn.Module, family: Family, found: dict[str, torch.Tensor]) -> None:
    """Give a converted model the file's weights. Raises ValueError where its own are not ordinary ones."""
    own = plain_state(model)
    for name, attn in family.attentions(model).items():
        for projection in family.projections(attn):
            for part, update in _update(attn, projection):
                key = f"{name}.{projection}.{part}"
                update.copy_(full_update(own[key], found[key], key))
        if attn.hybrid.pooled is not None:
            pooling = attn.hybrid.pooled.weight
            pooling.copy_(found[f"{name}.{POOLING}"].view_as(pooling))


def _update(attn: nn.Module, projection: str) -> list[tuple[str, torch.Tensor]]:
    """The parameters of a projection's update, by their names in it; none where it has no update."""
    deltas = attn.hybrid.deltas
    name = delta_name(projection)
    return list(deltas[name].named_parameters()) if name in deltas else []
