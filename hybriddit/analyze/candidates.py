"""The names of what a layer could become: "dense", "window:W", "hybrid:W", "linear"."""

from __future__ import annotations

from collections.abc import Sequence


def candidate_names(windows: Sequence[int]) -> list[str]:
    """The names of all but the dense layer, for windows of these sides."""
    return [*(f"window:{side}" for side in windows), "linear", *(f"hybrid:{side}" for side in windows)]


def parse_candidate(name: str) -> tuple[str, int | None]:
    """The kind of layer and the window of a candidate's name."""
    kind, _, window = name.partition(":")
    return kind, int(window) if window else None
