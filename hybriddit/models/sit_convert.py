"""Convert checkpoints of the SiT and DiT authors (both have one layout) to SiTTransformer2DModel's, and back."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..files import read_weights
from .sit import SiTTransformer2DModel
from .sit_names import renamed

# original module -> ours; each has a weight and a bias, except those that are single tensors
OUTER = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "modulation_out",
}
SINGLE = {"pos_embed": "pos_embed", "y_embedder.embedding_table.weight": "label_embed.weight"}
IN_BLOCK = {
    "attn.proj": "attn.to_out",
    "mlp.fc1": "ff.fc1",
    "mlp.fc2": "ff.fc2",
    "adaLN_modulation.1": "modulation",
}
# one layer in the original, whose outputs are in this order
QKV, Q_K_V = "attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert an original state dict to that of a softmax SiTTransformer2DModel of its size.

    `to_original` is the exact inverse. Raises ValueError, in one line, for missing or unknown keys, and for a qkv layer
    whose outputs do not divide by three.
    """
    names, fused = _layout(_depth(state, "blocks"))
    _check_keys(state, {*names, *fused}, "the original layout")
    converted = {ours: state[original] for original, ours in names.items()}
    for original, parts in fused.items():
        if state[original].shape[0] % 3:
            raise ValueError(f"{original} must hold queries, keys and values, got {tuple(state[original].shape)}")
        converted |= zip(parts, state[original].chunk(3), strict=True)
    return converted


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a softmax SiTTransformer2DModel's state dict, of this version or an older one, to the original layout.

    Raises ValueError, in one line, for missing keys and for weights that the original layout has no place for, such as
    those of linear attention.
    """
    state = renamed(state)
    names, fused = _layout(_depth(state, "transformer_blocks"))
    _check_keys(state, {*names.values(), *(part for parts in fused.values() for part in parts)}, "a softmax SiT")
    converted = {original: state[ours] for original, ours in names.items()}
    return converted | {original: torch.cat([state[part] for part in parts]) for original, parts in fused.items()}


def read_original(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a checkpoint file's state dict, on the CPU; the averaged weights (EMA) if it has them.

    A .safetensors file is read as such, any other by torch.load with weights_only. Raises FileNotFoundError, or
    ValueError if the file is damaged or holds something else.
    """
    # the authors' training script saves its arguments, an argparse.Namespace, in the file
    loaded = read_weights(path, [argparse.Namespace])
    for name in ("ema", "model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} holds no state dict")
    return loaded


def load_original(model: SiTTransformer2DModel, path: str | os.PathLike) -> SiTTransformer2DModel:
    """Load a checkpoint file of the SiT or DiT authors into a softmax model of its size, and return the model.

    Raises FileNotFoundError; or ValueError, in one line, if the file is not such a checkpoint or has another size. The
    model is then unchanged.
    """
    state = read_original(path)
    try:
        state = from_original(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    expected = model.state_dict()
    theirs, mine = _depth(state, "transformer_blocks"), len(model.transformer_blocks)
    if theirs != mine:
        raise ValueError(f"{path} is of another size: {theirs} blocks, where this model has {mine}")
    extra = sorted(expected.keys() - state.keys())
    if extra:
        raise ValueError(
            f"{path} does not fill this model: it has no {extra[0]}; build a softmax model without optional parts"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path} is of another size: {name} is {tuple(tensor.shape)}, "
                f"and {tuple(expected[name].shape)} in this model"
            )
    model.load_state_dict(state)
    return model


def _layout(depth: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """{original key: our key}, and {original qkv key: our three keys}, of a model with `depth` blocks."""
    modules = dict(OUTER)
    for index in range(depth):
        modules |= {
            f"blocks.{index}.{original}": f"transformer_blocks.{index}.{IN_BLOCK[original]}" for original in IN_BLOCK
        }
    names = SINGLE | {f"{o}.{part}": f"{ours}.{part}" for o, ours in modules.items() for part in ("weight", "bias")}
    fused = {
        f"blocks.{index}.{QKV}.{part}": [f"transformer_blocks.{index}.{name}.{part}" for name in Q_K_V]
        for index in range(depth)
        for part in ("weight", "bias")
    }
    return names, fused


def _depth(state: Mapping[str, Tensor], blocks: str) -> int:
    matches = (re.match(rf"{blocks}\.(\d+)\.", name) for name in state)
    return len({match[1] for match in matches if match})


def _check_keys(state: Mapping[str, Tensor], expected: set[str], what: str) -> None:
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    problems = [f"lacks {len(missing)} keys of {what} (first: {missing[0]})"] if missing else []
    problems += [f"has {len(unknown)} keys unknown to {what} (first: {unknown[0]})"] if unknown else []
    if problems:
        raise ValueError(f"the state dict {' and '.join(problems)}")
