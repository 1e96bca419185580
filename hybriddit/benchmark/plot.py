"""The plot of a report: image tokens against time, both logarithmic, one panel for each shape, part and direction."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from .shapes import DIRECTIONS, PARTS, is_dense

# Okabe and Ito's colours, which colour-blind people tell apart
COLORS = {
    "hybrid": "#D55E00",
    "window": "#E69F00",
    "linear": "#009E73",
    "dense": "#0072B2",
    "dense-flash": "#0072B2",
    "dense-cudnn": "#56B4E9",
    "dense-efficient": "#6A5ACD",
    "circular": "#CC79A7",
}
PANEL = (5.2, 3.9)  # inches
INK = "#333333"


def draw(report: dict[str, Any]):
    """Draw the plot as a matplotlib Figure; None without matplotlib or without a measured row."""
    measured = [row for row in report["cases"] if "seconds" in row and row["direction"] != "backward"]
    if not measured or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # not pyplot, which has global state and may open a window

    shapes = list(dict.fromkeys(row["shape"] for row in measured))
    columns = sorted(
        {(row["part"], row["direction"]) for row in measured},
        key=lambda column: (PARTS.index(column[0]), DIRECTIONS.index(column[1])),
    )
    figure = Figure(figsize=(PANEL[0] * len(columns), PANEL[1] * len(shapes) + 0.9), layout="constrained")
    figure.set_facecolor("white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    device, settings = report["machine"]["device"], report["settings"]
    figure.suptitle(
        f"{device['name']}, {settings['dtype']}, window {settings['window']}, {report['started'][:10]}\n"
        "median and 10–90 % of the time; dashed: the floor set by this device's copy and matrix product rates",
        fontsize=10,
        color=INK,
    )
    axes = figure.subplots(len(shapes), len(columns), squeeze=False)
    for panels, shape in zip(axes, shapes, strict=True):
        for axis, (part, direction) in zip(panels, columns, strict=True):
            found = [
                row for row in measured if (row["shape"], row["part"], row["direction"]) == (shape, part, direction)
            ]
            if found:
                _panel(axis, shape, part, direction, found)
            else:
                axis.set_axis_off()
    return figure


def _panel(axis, shape: str, part: str, direction: str, rows: list[dict[str, Any]]) -> None:
    """Draw the lines of one shape, part and direction, and their floors, with a logarithmic scale on both axes."""
    lines = {
        variant: sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["image_tokens"])
        for variant in COLORS
    }
    lines = {variant: found for variant, found in lines.items() if found}
    labels = []
    for variant, found in lines.items():
        tokens = [row["image_tokens"] for row in found]
        times = [row["seconds"]["median"] for row in found]
        spread = [
            [time - row["seconds"]["p10"] for time, row in zip(times, found, strict=True)],
            [row["seconds"]["p90"] - time for time, row in zip(times, found, strict=True)],
        ]
        color, strong = COLORS[variant], variant == "hybrid" or is_dense(variant)
        axis.errorbar(tokens, times, spread, color=color, marker="o", markersize=4, linewidth=2 if strong else 1.4,
                      elinewidth=1, capsize=2, zorder=3 if strong else 2)  # fmt: skip
        floors = [row["floor"]["seconds"] for row in found]
        axis.plot(tokens, floors, color=color, linestyle=(0, (4, 3)), linewidth=0.9, alpha=0.65, zorder=1)
        labels.append((tokens[-1], times[-1], variant, color))

    sizes = sorted({(row["image_tokens"], row["px"]) for row in rows})
    from matplotlib.ticker import LogLocator

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    low, high = sizes[0][0], sizes[-1][0]
    axis.set_xlim(low / 1.3, high * 1.3)
    axis.set_xticks([count for count, _ in sizes], [f"{count:,}\n{px} px" for count, px in sizes], fontsize=8)
    axis.minorticks_off()
    bottom, top = axis.get_ylim()
    if top < 4 * bottom:  # else a difference of a few per cent would look large
        middle = math.sqrt(bottom * top)
        bottom, top = middle / 2, middle * 2
        axis.set_ylim(bottom, top)
    subs = range(1, 10) if top < 6 * bottom else (1, 2, 5) if top < 100 * bottom else (1,)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(_time)
    axis.tick_params(colors=INK, labelsize=8)
    kind = "attention layer" if part == "attention" else part
    blocks = next((f", {row['layers'][0]} of {row['layers'][1]} blocks" for row in rows if "layers" in row), "")
    axis.set_title(f"{shape}: {kind}{blocks}\n{direction}", fontsize=10, color=INK, loc="left")
    pixels = sizes[0][1] // math.isqrt(sizes[0][0])  # along the side of a token
    axis.set_xlabel(f"image tokens, and the side of the image ({pixels} px a token)", fontsize=8, color=INK)
    if part == "generation":
        axis.set_ylabel("per step", fontsize=9, color=INK)
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    _label(axis, labels)


def _time(seconds: float, position=None) -> str:
    """Format a tick's label; matplotlib also passes the tick's position."""
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms")) if seconds >= 0.999 * s), (1e-6, "µs"))
    return f"{seconds / scale:,.3g} {unit}"


def _label(axis, labels: list[tuple[int, float, str, str]]) -> None:
    """Write each line's name to the right of the panel, in its colour, at the height of its end; labels never overlap.

    labels: (image tokens and seconds of the line's last point, name, colour).
    """
    bottom, top = (math.log10(limit) for limit in axis.get_ylim())
    gap = 0.068 * (top - bottom)  # a line of text
    labels = sorted(labels, key=lambda label: label[1])
    heights: list[float] = []
    for _, time, _, _ in labels:
        at = math.log10(time)
        heights.append(max(at, heights[-1] + gap) if heights else at)
    heights[-1] = min(heights[-1], top)
    for i in reversed(range(len(heights) - 1)):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    for (tokens, time, variant, color), height in zip(labels, heights, strict=True):
        axis.annotate(
            variant,
            xy=(tokens, time),
            xytext=(1.04, 10**height),
            textcoords=axis.get_yaxis_transform(),
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.5, "shrinkA": 1, "shrinkB": 4},
        )
