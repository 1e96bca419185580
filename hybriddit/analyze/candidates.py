"""What a layer could become, by name: "dense", "window:W", "hybrid:W", "linear"; and what that is counted in."""

from __future__ import annotations

from collections.abc import Sequence

COSTS = ("flops", "time")
WINDOWS = (8, 16)  # sides to choose from, in tokens, where no others are given


def candidate_names(windows: Sequence[int]) -> list[str]:
    """The names of all but the dense layer, for windows of these sides."""
    return [*(f"window:{side}" for side in windows), "linear", *(f"hybrid:{side}" for side in windows)]


def parse_candidate(name: str) -> tuple[str, int | None]:
    """The kind of layer and the window of a candidate's name."""
    kind, _, window = name.partition(":")
    return kind, int(window) if window else None
