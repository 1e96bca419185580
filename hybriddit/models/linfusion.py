"""Load the files that LinFusion's authors published for the UNets of Stable Diffusion (arXiv 2409.02097).

Such a file has a module for each self-attention (attn1), numbered in the order in which the UNet holds them. Each is a
whole layer: the projections to_q, to_k, to_v and to_out.0, which take the place of the UNet's, and the maps to_q_ and
to_k_ (0: down, 1: norm, 3: up), whose results are added to the layer's input before to_q and to_k. A hybrid of kind
"linear" with full updates computes the same: an update is the difference of two projections, and to_q(x + map(x)) is
to_q(x) + map'(x), where map' ends in the product of to_q and the map's last matrix.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import FULL, HybridConfig
from ..files import read_json, read_tensors
from ..stored import PICKLED
from .adapters import hub_file
from .family import family_of, is_hybrid, model_of
from .processing import delta_name, full_update
from .surgery import hybridize
from .wrapping import unwrapped

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
MAPS = {"map_q": ("to_q_", "to_q"), "map_k": ("to_k_", "to_k")}  # ours: theirs, and the projection behind it
PARTS = {"down": "0", "norm": "1", "up": "3"}  # of a map: ours, theirs
KEYS = {
    *(f"{name}.weight" for name in PROJECTIONS),
    "to_out.0.bias",
    *(f"{map}.{part}.{kind}" for map, _ in MAPS.values() for part in PARTS.values() for kind in ("weight", "bias")),
}
HOW = "convert it, safetensors.torch.save_file(torch.load(path, weights_only=True), 'linfusion.safetensors')"


def load_linfusion(model_or_pipeline: Any, source: str | os.PathLike) -> Any:
    """Load a published LinFusion file into a dense UNet, or a pipeline's, and return what was given.

    source: the file, in safetensors; a folder that holds it as diffusion_pytorch_model.safetensors; or a hub repository,
    such as Yuanshi/LinFusion-1-5 for Stable Diffusion 1.5 and what was finetuned from it. Where there is a config.json
    beside it, that says which layer has which number.

    The UNet becomes a hybrid whose self-attentions are LinFusion's alone, kind "linear". Its outputs are those of
    LinFusion's formula, up to rounding, and its own weights stay: `restore_dense` undoes it. It is saved as any other
    hybrid, also as an adapter, and can be distilled on.

    Raises FileNotFoundError for a missing file, and ValueError for one that is pickled, damaged or for another UNet,
    and for a model that is hybrid already; the model is then as it was.
    """
    model = unwrapped(model_of(model_or_pipeline))
    family = family_of(model)
    if is_hybrid(model):
        raise ValueError("the model is hybrid already: restore_dense(model) before loading a LinFusion file")
    layers = {name: attn for name, attn in family.attentions(model).items() if family.converts(name)}
    file, config = _find(str(source))
    names = list(layers) if config is None else _names(config)
    theirs = _by_layer(read_tensors(file), names, str(file))
    for name, tensors in theirs.items():
        if name not in layers:
            raise ValueError(
                f"{file} does not fit this model: it has a layer {name}, and the model has none of that name"
            )
        _check_layer(name, layers[name], tensors, str(file))
    if lacking := [name for name in layers if name not in theirs]:
        raise ValueError(
            f"{file} does not fit this model: it has {len(theirs)} layers, and the model has {len(layers)} self-attentions "
            f"({lacking[0]} is not in it)"
        )
    updates = {name: _updates(name, layers[name], tensors) for name, tensors in theirs.items()}
    changed = any(bool(update.any()) for found in updates.values() for update in found.values())
    ranks = {name: len(tensors["to_q_.0.weight"]) for name, tensors in theirs.items()}
    widths = {name: family.layer_shape(attn).width for name, attn in layers.items()}
    hybridize(
        model,
        HybridConfig(
            window=None, mixer="linfusion", map_rank=_map_rank(ranks, widths), delta_rank=FULL if changed else None
        ),
    )
    with torch.no_grad():
        for name, attn in layers.items():
            for key, weight in attn.hybrid.named_parameters():
                weight.copy_((updates[name] | _maps(theirs[name]))[key])
    return model_or_pipeline


def _find(source: str) -> tuple[Path, Path | None]:
    """The paths of the weights and, if there is one, of the config beside them."""
    path = Path(source)
    if path.suffix in PICKLED:
        raise ValueError(f"{source} is pickled, and nothing pickled is loaded: {HOW}")
    if path.is_dir():
        file, config = path / WEIGHTS, path / CONFIG
        if not file.is_file():
            pickled = next((found.name for found in sorted(path.iterdir()) if found.suffix in PICKLED), None)
            hint = f": {pickled} is pickled and is not loaded; {HOW}" if pickled else ""
            raise FileNotFoundError(f"no {WEIGHTS} in {source}{hint}")
    elif path.is_file():
        file, config = path, path.with_name(CONFIG)
    else:
        file, config = Path(hub_file(source, WEIGHTS, "LinFusion file")), None
        try:
            config = Path(hub_file(source, CONFIG, "LinFusion file"))
        except FileNotFoundError:
            return file, None
    # a config of another model may lie beside a single file
    return file, config if config.is_file() and "modules_list" in read_json(config) else None


def _names(config: Path) -> list[str]:
    """The names of the layers that a config numbers."""
    layers = read_json(config)["modules_list"]
    if not isinstance(layers, list) or not all(isinstance(one, dict) and "module_name" in one for one in layers):
        raise ValueError(f"{config} is damaged: its modules_list does not name the layers")
    return [str(one["module_name"]) for one in layers]


def _by_layer(tensors: Mapping[str, torch.Tensor], names: list[str], file: str) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each layer, in float64, by the names of layers and of tensors within one."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, rest = key.partition(".")
        if not (number.isdecimal() and rest in KEYS):
            raise ValueError(f"{file} is no LinFusion file: it has {key!r}, which such files do not have")
        found.setdefault(number, {})[rest] = tensor.double()
    count = len(found)
    if set(found) != {str(i) for i in range(count)} or count > len(names):
        raise ValueError(f"{file} does not fit this model: it numbers {count} layers, and there are {len(names)}")
    for number, own in found.items():
        if missing := sorted(KEYS - own.keys()):
            raise ValueError(f"{file} is not whole: layer {number} lacks {', '.join(missing)}")
    return {names[int(number)]: own for number, own in found.items()}


def _check_layer(name: str, attn: nn.Module, tensors: Mapping[str, torch.Tensor], file: str) -> None:
    """Raise ValueError for a layer's tensors of other shapes than the model's layer has."""
    width, rank = attn.to_q.in_features, tensors["to_q_.0.weight"].shape[0]
    wanted = {key: tuple(attn.get_parameter(key).shape) for key in KEYS if not key.startswith(("to_q_", "to_k_"))}
    for map, _ in MAPS.values():
        wanted |= {f"{map}.0.weight": (rank, width), f"{map}.3.weight": (width, rank), f"{map}.3.bias": (width,)}
        wanted |= dict.fromkeys((f"{map}.0.bias", f"{map}.1.weight", f"{map}.1.bias"), (rank,))
    for key, shape in wanted.items():
        if tensors[key].shape != shape:
            raise ValueError(
                f"{file} is for another UNet: {key} of {name} is {tuple(tensors[key].shape)}, and here it is {shape}"
            )


def _updates(name: str, attn: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is added to the projections of the layer of this name, which makes them the file's."""
    found = {}
    for projection in PROJECTIONS:
        for kind in ("weight", "bias"):
            if (key := f"{projection}.{kind}") in tensors:
                update = full_update(attn.get_parameter(key), tensors[key], f"{name}.{key}")
                found[f"deltas.{delta_name(projection)}.{kind}"] = update
    return found


def _maps(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The maps with the projection behind them folded into their last layer."""
    found = {}
    for map, (own, projection) in MAPS.items():
        for part, number in PARTS.items():
            for kind in ("weight", "bias"):
                tensor = tensors[f"{own}.{number}.{kind}"]
                found[f"{map}.{part}.{kind}"] = tensors[f"{projection}.weight"] @ tensor if part == "up" else tensor
    return found


def _map_rank(ranks: Mapping[str, int], widths: Mapping[str, int]) -> int | str | None:
    """The map_rank of HybridConfig that gives these layers their ranks."""
    if all(rank == widths[name] for name, rank in ranks.items()):
        return FULL
    if all(rank == max(1, widths[name] // 16) for name, rank in ranks.items()):
        return None
    if len(set(ranks.values())) == 1:
        return next(iter(ranks.values()))
    raise ValueError(
        f"the file's maps are {', '.join(map(str, sorted(set(ranks.values()))))} wide: they must be as wide as their layers, a "
        "sixteenth of that, or all alike"
    )
