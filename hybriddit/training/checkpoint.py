"""Checkpoints of a training run: each whole or absent, in safetensors and JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config import ADDED_FIELDS
from ..files import flush, read_json, read_tensors, write_tensors

# The far branch's fields that SiTs did not have at first, with what they were then.
ADDED_SIT_FIELDS = {"feature_map": "elu", "projection": 0, "far_rope": False, "mixer": "linear"}
# Settings that older checkpoints lack, with the values that those runs had.
ADDED_SETTINGS = {f"hybrid.{name}": value for name, value in ADDED_FIELDS.items()}
ADDED_SETTINGS |= {f"model.{name}": value for name, value in ADDED_SIT_FIELDS.items()}
ADDED_SETTINGS |= {"loss.window_dropout": 0.0, "loss.layer_steps": 0, "loss.distribution": 0.0}
ADDED_SETTINGS |= {"loss.progressive_steps": 0, "optim.use_8bit_adam": False}
# What tells the content of models and data, and the settings that say where they are. Content decides; older
# checkpoints do not have it.
CONTENT = {
    "model.weights": "what is at model.path",
    "data.content": "what the images, captions or prompts are",
}
PLACES = {"model.path": "model.weights", "data.folder": "data.content", "data.prompts": "data.content"}
# Of any job, the settings that must not change when a run is resumed; with other moments the optimizer could not go on.
KEPT = ("train.batch_size", "train.precision", "train.seed", "optim.use_8bit_adam")
TABLES = ("qmap1", "qmap2")  # of bitsandbytes' moments


@contextmanager
def saving_checkpoint(
    folder: Path,
    step: int,
    parameters: dict[str, torch.nn.Parameter],
    average: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    settings: dict,
    keep: int,
    *,
    write: bool = True,
) -> Iterator[Path]:
    """Write `folder/step-<step>`: weights, their average and the optimizer's state after `step` steps.

    Yields its temporary folder, for the files of the block; it gets its name when that is done, and then all
    checkpoints but the newest `keep` are removed. Random numbers and the order of the data depend on the step alone, so
    no other state is needed.

    If the weights are sharded, every process must call this, and the one with `write` writes; the files do not depend
    on the number of processes.
    """
    tensors = gather(_state(parameters, average, optimizer), keep=write)
    final, partial = folder / f"step-{step:08d}", folder / ".partial"
    if not write:
        yield partial
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_tensors(partial / "state.safetensors", tensors)
        (partial / "state.json").write_text(
            json.dumps({"step": step, "settings": settings}, indent=1), encoding="utf-8"
        )
        yield partial
        for path in (*partial.rglob("*"), partial):
            flush(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        flush(folder)
    except OSError as error:
        raise OSError(
            f"{error}; no checkpoint of step {step}, earlier ones are kept: make room and --resume"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in checkpoints(folder)[:-keep]:
        old.rename(partial)  # so that a half-removed checkpoint does not look complete
        shutil.rmtree(partial)


def _state(parameters, average, optimizer) -> Iterable[tuple[str, torch.Tensor]]:
    for (name, parameter), mean in zip(parameters.items(), average, strict=True):
        yield f"weight/{name}", parameter
        yield f"average/{name}", mean
        for key, value in optimizer.state.get(parameter, {}).items():
            # bitsandbytes counts steps by an int, and its parameters have one table, of which a file has no second
            yield f"{key}/{name}", value.clone() if key in TABLES else torch.as_tensor(value)


def gather(named: Iterable[tuple[str, torch.Tensor]], *, keep: bool = True) -> dict[str, torch.Tensor]:
    """The tensors by name; sharded ones are gathered on the CPU, for which every process must call this.

    keep: if False, take part in the gathering, but hold one tensor at a time and return nothing.
    """
    whole = {}
    for name, tensor in named:
        value = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = value
    return whole


def shard(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Move `value` to the device of `like`; if `like` is sharded, return this process's shard of `value`."""
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    # every process has read the whole value: nothing to send
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*"))


def read_state(path: Path, settings: dict, usual: Mapping[str, Any] = MappingProxyType({})) -> dict:
    """Read a checkpoint's step and settings. Raises ValueError if it is damaged or was made with other settings.

    usual: what settings were that it holds as None, as older versions did where a recipe had their values.

    Models and data may have moved, if the checkpoint tells their content.
    """
    try:
        state = read_json(path / "state.json")
        if not isinstance(state.get("step"), int) or not isinstance(state.get("settings"), dict):
            raise ValueError("state.json holds no step and settings")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    found = {**ADDED_SETTINGS, **state["settings"]}
    found |= {key: value for key, value in usual.items() if found.get(key) is None}
    told = {key for key in CONTENT if found.get(key) is not None}
    passed = {place for place, content in PLACES.items() if content in told} | CONTENT.keys() - told
    other = [key for key in settings if key not in passed and found.get(key) != settings[key]]
    if other:
        names = [f"{key} ({CONTENT[key]})" if key in CONTENT else key for key in other]
        raise ValueError(
            f"{path} was made with other values of {', '.join(names)}: resume with the values it began with, or start "
            "anew in another output.folder"
        )
    return state


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"the checkpoint {path} is damaged ({error}): delete it to go on from an older one")


def load_checkpoint(
    path: Path,
    parameters: dict[str, torch.nn.Parameter],
    average: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    settings: dict,
    usual: Mapping[str, Any] = MappingProxyType({}),
    *,
    rename: Callable[[dict], dict] = dict,
) -> int:
    """Load weights, their average and the optimizer's state in place. Returns the step to continue from.

    settings, usual: see `read_state`. rename: gives the tensors of an older version's checkpoint ("weight/NAME", …)
    today's names.

    Raises ValueError where the checkpoint is damaged, or was made with other settings.
    """
    state = read_state(path, settings, usual)
    try:
        tensors = rename(read_tensors(path / "state.safetensors"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    found = {key.removeprefix("weight/"): value.shape for key, value in tensors.items() if key.startswith("weight/")}
    if found != {name: parameter.shape for name, parameter in parameters.items()}:
        raise ValueError(f"{path} was made with another model: its trained weights have other names or shapes")
    by_parameter: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        by_parameter[name][kind] = value
    fused, own = optimizer.defaults.get("fused"), isinstance(optimizer, torch.optim.AdamW)
    with torch.no_grad():
        for (name, parameter), mean in zip(parameters.items(), average, strict=True):
            kinds = by_parameter[name]
            parameter.copy_(shard(kinds.pop("weight"), parameter))
            mean.copy_(shard(kinds.pop("average"), mean))
            if kinds:
                # AdamW counts steps on the host, while its moments are on the device, unless it is fused
                count = kinds.pop("step")
                optimizer.state[parameter] = {
                    "step": (count.to(parameter.device) if fused else count) if own else int(count),
                    **{key: shard(value, parameter) for key, value in kinds.items()},
                }
    return state["step"]
