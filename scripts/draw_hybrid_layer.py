"""Draw docs/hybrid-layer.svg, the diagram of docs/concepts.md: python scripts/draw_hybrid_layer.py [file]"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, FROZEN, ADDED, NEAR, FAR = "#24292f", "#e6e9ed", "#fbd7a8", "#a9cdf3", "#eaf3fc"
ADDED_EDGE = "#c46a00"


def draw(path: Path) -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "hybriddit", "font.size": 10, "font.family": "DejaVu Sans"})
    figure = Figure(figsize=(11.4, 5.1), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 114), ylim=(0, 51))
    axis.axis("off")
    _tokens(axis)
    _layer(axis)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=110, metadata=metadata)


def _tokens(axis) -> None:
    """Draw which keys one image token sees, and by which branch."""
    cell, left, bottom, size = 2.6, 4, 13.5, 9
    query_row, query_column, reach = 5, 3, 2
    for row in range(size):
        for column in range(size):
            near = abs(row - query_row) <= reach and abs(column - query_column) <= reach
            query = (row, column) == (query_row, query_column)
            color = INK if query else NEAR if near else FAR
            x, y = left + column * cell, bottom + (size - 1 - row) * cell
            axis.add_patch(Rectangle((x, y), cell, cell, facecolor=color, edgecolor="white", linewidth=1.5))
    for column in range(6):
        x = left + column * cell
        axis.add_patch(Rectangle((x, 40.5), cell, cell, facecolor=NEAR, edgecolor="white", linewidth=1.5))
    text = {"va": "center", "color": INK}
    axis.text(left, 47.5, "What one image token sees", weight="bold", **text)
    axis.text(left + 6 * cell + 1, 41.8, "text", **text)
    axis.text(left, 38.3, "image", **text)
    for y, color, words in (
        (9.5, INK, "the token, query of both branches"),
        (6.5, NEAR, "near: its window and the text, softmax"),
        (3.5, FAR, "far: the whole image, linear"),
    ):
        edge = "#8aa4bf" if color == FAR else color
        axis.add_patch(Rectangle((left, y - 0.9), 1.8, 1.8, facecolor=color, edgecolor=edge, linewidth=0.8))
        axis.text(left + 3, y, words, fontsize=9, **text)


def _box(axis, x, y, width, height, words, color=FROZEN, edge="#8c959f") -> None:
    axis.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.8", facecolor=color, edgecolor=edge)
    )
    axis.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=9, color=INK, linespacing=1.35)


def _arrow(axis, *points, words="", at=None) -> None:
    """Draw a line through the points, with an arrowhead at the last."""
    for start, end in zip(points[:-2], points[1:-1], strict=True):
        axis.plot(*zip(start, end, strict=True), color=INK, linewidth=1, solid_capstyle="round")
    axis.add_patch(
        FancyArrowPatch(*points[-2:], arrowstyle="-|>", mutation_scale=9, color=INK, linewidth=1, shrinkA=0, shrinkB=0)
    )
    if words:
        axis.text(*at, words, fontsize=9, style="italic", color=INK, ha="center", va="center")


def _layer(axis) -> None:
    """Draw the layer's data flow, left to right: near above, far below."""
    axis.text(42, 47.5, "The layer", weight="bold", va="center", color=INK)
    axis.text(40.5, 29.5, "x", style="italic", ha="center", va="center", fontsize=11, color=INK)
    _box(axis, 44, 25.5, 11, 8, "to_q, to_k, to_v")
    _box(axis, 61, 35, 12, 7, "norm, rotary\nembedding")
    _box(axis, 79, 35, 16, 7, "softmax attention\nover window and text", color=NEAR, edge="#5b8fc7")
    _box(axis, 44, 10, 11, 7, "maps of q, k\n(low rank)", color=ADDED, edge=ADDED_EDGE)
    _box(axis, 61, 16, 12, 7, "+ maps, norm,\nrotary\nembedding")
    _box(axis, 79, 16, 16, 7, "projections, φ,\nlinear attention\nover the image", color=FAR, edge=ADDED_EDGE)
    _box(axis, 79, 25.5, 16, 6.5, "one average\nover both (gate)", color=ADDED, edge=ADDED_EDGE)
    _box(axis, 100, 25.5, 9, 6.5, "to_out")

    _arrow(axis, (41.5, 29.5), (44, 29.5))
    _arrow(axis, (40.5, 27.7), (40.5, 13.5), (44, 13.5))
    _arrow(axis, (55, 31.5), (58, 31.5), (58, 38.5), (61, 38.5), words="q, k", at=(58, 39.8))
    _arrow(axis, (55, 27.5), (58, 27.5), (58, 21), (61, 21), words="q, k", at=(59.8, 24.6))
    _arrow(axis, (55, 13.5), (58, 13.5), (58, 18), (61, 18))
    _arrow(axis, (73, 38.5), (79, 38.5))
    _arrow(axis, (73, 19.5), (79, 19.5))
    # v, shared by both branches
    _arrow(axis, (55, 29.5), (76, 29.5), (76, 36.5), (79, 36.5), words="v", at=(66, 30.7))
    _arrow(axis, (76, 29.5), (76, 21.5), (79, 21.5))
    _arrow(axis, (87, 35), (87, 32))
    _arrow(axis, (87, 23), (87, 25.5))
    _arrow(axis, (95, 28.75), (100, 28.75))
    _arrow(axis, (109, 28.75), (112, 28.75))

    for x, color, edge, words in (
        (44, FROZEN, "#8c959f", "the teacher's, frozen"),
        (68, ADDED, ADDED_EDGE, "added, trained (also: the projections)"),
    ):
        axis.add_patch(Rectangle((x, 5.6), 1.8, 1.8, facecolor=color, edgecolor=edge, linewidth=0.8))
        axis.text(x + 3, 6.5, words, fontsize=9, va="center", color=INK)
    axis.text(44, 3, "Text tokens' queries attend to everything by softmax, as before.", fontsize=9, color=INK)


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "hybrid-layer.svg"))
