"""The record in a run's folder: how it was started (run.json), its metrics (log.jsonl) and their plot (loss.png)."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..files import replacing, write_json
from ..machine import git_state, gpu_name, versions

PACKAGES = ("hybriddit", "torch", "diffusers", "transformers", "accelerate", "safetensors", "natten", "triton")


def record_start(folder: Path, first: int, processes: int, device: torch.device, **notes) -> None:
    """Append an entry, with `notes`, to the list in `folder/run.json`, which has one per start or resumption."""
    entry = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": first,
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "git": git_state(),
        "device": gpu_name(device) or platform.processor() or "cpu",
        "processes": processes,
        "threads": torch.get_num_threads(),
        **notes,
    }
    write_json(folder / "run.json", [*read_starts(folder), entry])


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The entries of `folder/run.json`, oldest first; none if the run has not started.

    Raises ValueError if the file is damaged.
    """
    path = folder / "run.json"
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): move it away to go on with a new one") from None


def changed_settings(starts: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, list]:
    """The settings of a resumed run that are not those of its last start, as {"section.name": [before, now]}.

    starts: its entries in run.json, whose `config` is compared. Settings that either lacks are left out.
    """
    configs = [start["config"] for start in starts if "config" in start]
    before = flat(configs[-1]) if configs else {}
    now = flat(json.loads(json.dumps(settings)))  # tuples become lists, as in the file
    return {name: [before[name], now[name]] for name in now if name in before and before[name] != now[name]}


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values


def start_log(folder: Path, first: int) -> None:
    """Cut `folder/log.jsonl` after step `first`: steps logged after the last checkpoint are run again."""
    kept = [line for line in read_log(folder) if line["step"] <= first]
    with replacing(folder / "log.jsonl") as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def log(folder: Path, values: dict[str, float]) -> None:
    """Append one line to `folder/log.jsonl`."""
    with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of `folder/log.jsonl`, except one that a killed run left half written."""
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def plot_log(folder: Path, names: tuple[str, ...]) -> None:
    """Plot the metrics `names` of `folder/log.jsonl` over the steps, one panel each, into `folder/loss.png`."""
    from matplotlib.figure import Figure  # not pyplot, which has global state and may open a window

    lines = read_log(folder)
    shown = [name for name in names if any(line.get(name, 0) > 0 for line in lines)]
    if not shown:
        return
    figure = Figure(figsize=(4 * len(shown), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        # markers, because a few points hardly make a line
        axis.plot(*zip(*points, strict=True), linewidth=1, marker="." if len(points) < 50 else "")
        axis.set(title=name, xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    with replacing(folder / "loss.png") as partial:
        figure.savefig(partial, format="png", dpi=120)
