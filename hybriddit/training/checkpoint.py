"""Checkpoints of a training run: whole or absent, and nothing that needs unpickling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ..files import flush, read_tensors, write_tensors


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: dict[str, torch.nn.Parameter],
    average: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    settings: dict,
    keep: int,
) -> Path:
    """Write `folder/step-<step>`: weights, their average and the optimizer's state after `step` steps.

    It appears under its name only when complete; then all but the newest `keep` are removed. The random numbers and
    the order of the data depend on the step alone, so the step is all there is to keep of them.
    """
    tensors = {}
    for (name, parameter), mean in zip(parameters.items(), average, strict=True):
        tensors[f"weight/{name}"], tensors[f"average/{name}"] = parameter, mean
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"step-{step:08d}", folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_tensors(partial / "state.safetensors", tensors)
        (partial / "state.json").write_text(json.dumps({"step": step, "settings": settings}, indent=1))
        for path in (*partial.iterdir(), partial):
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
        old.rename(partial)  # half removed, it must not look complete
        shutil.rmtree(partial)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*"))


def read_state(path: Path, settings: dict) -> dict:
    """The checkpoint's step and settings. Raises ValueError where it is damaged, or was made with other settings."""
    try:
        state = dict(json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, error) from None
    other = [key for key in settings if state.get("settings", {}).get(key) != settings[key]]
    if other:
        raise ValueError(
            f"{path} was made with other values of {', '.join(other)}: resume with the values it began with, or start "
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
) -> int:
    """Put everything back in place, and return the step to go on from.

    Raises ValueError where the checkpoint is damaged, or was made with other settings.
    """
    state = read_state(path, settings)
    try:
        tensors = read_tensors(path / "state.safetensors")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    found = {key.removeprefix("weight/"): value.shape for key, value in tensors.items() if key.startswith("weight/")}
    if found != {name: parameter.shape for name, parameter in parameters.items()}:
        raise ValueError(f"{path} was made with another model: its trained weights have other names or shapes")
    by_parameter: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        by_parameter[name][kind] = value
    fused = optimizer.defaults.get("fused")
    with torch.no_grad():
        for (name, parameter), mean in zip(parameters.items(), average, strict=True):
            kinds = by_parameter[name]
            parameter.copy_(kinds.pop("weight"))
            mean.copy_(kinds.pop("average"))
            if kinds:
                # AdamW counts steps on the host, beside moments on the device, unless one kernel does it all
                optimizer.state[parameter] = {
                    key: value if key == "step" and not fused else value.to(parameter.device)
                    for key, value in kinds.items()
                }
    return state["step"]
