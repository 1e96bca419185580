"""The figures of an analysis: mass by radius, layers and heads as heat maps, attention maps, and the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing
from .candidates import parse_candidate

KIND_COLORS = {"dense": "#0072B2", "hybrid": "#D55E00", "window": "#E69F00", "linear": "#009E73"}
HEADS = ("window", "text", "entropy", "rest_rank")
TITLES = {
    "window": "attention mass in the window",
    "text": "attention mass on the text",
    "entropy": "entropy of the map, nats",
    "rest_rank": "stable rank of the rest",
}
SHOWN = 12  # layers with example maps


def draw_all(report: dict[str, Any], maps: dict[str, np.ndarray], folder: Path) -> list[Path]:
    """Draw the figures of analysis.json's content into a folder; maps: [heads, rows, columns] by layer."""
    drawn = {
        "mass_by_radius.png": _mass_by_radius(report),
        "heads.png": _heads(report),
        "maps.png": _maps({name: maps[name] for name in report["layers"]}),
        "plan.png": _plan(report),
    }
    for name, figure in drawn.items():
        with replacing(folder / name) as new, open(new, "wb") as file:
            figure.savefig(file, dpi=110, format="png")
    return [folder / name for name in drawn]


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # not pyplot, which has global state and may open a window

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.set_facecolor("white")
    return figure


def _mass_by_radius(report: dict[str, Any]):
    """How much attention is within a radius of the query, a line a layer (mean over heads), from blue to red in depth."""
    from matplotlib import colormaps

    figure = _figure(7.5, 4.5)
    axis = figure.subplots()
    layers = report["layers"]
    for number, layer in enumerate(layers.values()):
        color = colormaps["coolwarm"](number / max(1, len(layers) - 1))
        axis.plot(report["radii"], np.mean(layer["radius"], axis=0), color=color, linewidth=1.2)
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_xticks(report["radii"], [str(radius) for radius in report["radii"]])
    axis.set_xlabel("radius in tokens (rows and columns); a window of 2 r + 1 holds it")
    axis.set_ylabel("attention mass on image tokens within")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    axis.set_title(
        "mass by radius: a line a layer, from the first (blue) to the last (red), mean over heads", fontsize=10
    )
    return figure


def _heads(report: dict[str, Any]):
    """Layers down, heads across: what each head's map looks like."""
    layers = report["layers"]
    width = max(len(layer["window"]) for layer in layers.values())
    figure = _figure(2.2 + 0.9 * len(HEADS) * max(2.2, 0.11 * width), 1.3 + max(2.2, 0.16 * len(layers)))
    for axis, name in zip(figure.subplots(1, len(HEADS), sharey=True), HEADS, strict=True):
        rows = np.full((len(layers), width), np.nan)
        for row, layer in zip(rows, layers.values(), strict=True):
            row[: len(layer[name])] = layer[name]
        top = 1.0 if name in ("window", "text") else None
        image = axis.imshow(rows, aspect="auto", vmin=0, vmax=top, interpolation="nearest", cmap="viridis")
        figure.colorbar(image, ax=axis, location="bottom", shrink=0.9)
        axis.set_title(TITLES[name], fontsize=9)
        axis.set_xlabel("head", fontsize=8)
    step = max(1, len(layers) // 30)
    figure.axes[0].set_yticks(range(0, len(layers), step), list(layers)[::step], fontsize=7)
    return figure


def _maps(maps: dict[str, np.ndarray]):
    """The attention of one query, in the middle of the image, of evenly chosen layers and heads; each scaled by itself."""
    names = list(maps)
    names = [names[i] for i in sorted(set(np.linspace(0, len(names) - 1, min(SHOWN, len(names))).round().astype(int)))]
    heads = min(8, min(len(maps[name]) for name in names))
    figure = _figure(1.4 + 1.15 * heads, 0.5 + 1.2 * len(names))
    grid = figure.subplots(len(names), heads, squeeze=False)
    for axes, name in zip(grid, names, strict=True):
        picked = np.linspace(0, len(maps[name]) - 1, heads).round().astype(int)
        for axis, head in zip(axes, picked, strict=True):
            values = np.sqrt(maps[name][head])
            axis.imshow(values, vmin=0, vmax=values.max(), interpolation="nearest", cmap="magma")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"head {head}", fontsize=7)
        axes[0].set_ylabel(name, fontsize=7, rotation=0, ha="right")
    figure.suptitle("attention of the query in the middle\n(square root, each map to its own maximum)", fontsize=9)
    return figure


def _plan(report: dict[str, Any]):
    """The error of each replacement in each layer, and what the plan takes."""
    from matplotlib.lines import Line2D

    layers, plan = report["layers"], report["plan"]["layers"]
    figure = _figure(8.5, 1.4 + max(2.0, 0.2 * len(layers)))
    axis = figure.subplots()
    for row, (name, layer) in enumerate(layers.items()):
        for candidate, error in layer["effect"].items():
            kind, window = parse_candidate(candidate)
            taken = plan[name] == candidate
            axis.plot(error, row, "o" if taken else ".", color=KIND_COLORS[kind], markersize=9 if taken else 5,
                      alpha=1.0 if taken else 0.55)  # fmt: skip
            if taken and window:
                axis.annotate(str(window), (error, row), textcoords="offset points", xytext=(7, -3), fontsize=7)
        if plan[name] == "dense":
            axis.plot(1.0, row, "s", color=KIND_COLORS["dense"], markersize=7, transform=axis.get_yaxis_transform(),
                      clip_on=False)  # fmt: skip
    axis.set_xscale("log")
    axis.set_yticks(range(len(layers)), list(layers), fontsize=7)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("squared change of the model's prediction over its variance, where this layer alone is replaced")
    marks = [Line2D([], [], marker="s" if kind == "dense" else "o", linestyle="", color=color, label=kind)
             for kind, color in KIND_COLORS.items()]  # fmt: skip
    figure.legend(handles=marks, loc="outside upper right", ncols=4, fontsize=8, frameon=False,
                  title="large: the plan's choice, with its window; dense: at the right edge", title_fontsize=8)  # fmt: skip
    return figure
