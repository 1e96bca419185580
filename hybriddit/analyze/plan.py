"""Choose what each layer becomes: the least sum of measured errors under a limit of cost (a knapsack)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import HybridConfig
from ..files import replacing
from .candidates import parse_candidate

STEPS = 4096  # of the limit, to which costs are rounded up


def choose(
    errors: Mapping[str, Mapping[str, float]], costs: Mapping[str, Mapping[str, float]], limit: float
) -> dict[str, str]:
    """For each layer the option with which the sum of errors is least, where the costs are at most `limit` in sum.

    errors, costs: by layer, then by option; the costs are above 0. Costs are rounded up to 1 / STEPS of the limit, so
    that the limit holds, and a choice within a rounding of it may be missed; the cheapest one is not. Of equally good
    choices, one that costs less is taken. Raises ValueError where even the cheapest options cost more.
    """
    layers = list(errors)
    cheapest = {layer: min(errors[layer], key=costs[layer].get) for layer in layers}
    lowest = sum(costs[layer][name] for layer, name in cheapest.items())
    if lowest > limit:
        raise ValueError(f"the cheapest layers cost {lowest:.4g} in sum, above the limit of {limit:.4g}")
    steps = {
        layer: {name: int(np.ceil(cost / limit * STEPS - 1e-9)) for name, cost in costs[layer].items()}
        for layer in layers
    }
    if sum(min(steps[layer].values()) for layer in layers) > STEPS:  # by rounding
        return cheapest
    # least[s]: the least error of the layers so far at s steps in sum; they are added one by one
    least = np.full(STEPS + 1, np.inf)
    least[0] = 0.0
    taken = []
    for layer in layers:
        names = list(errors[layer])
        options = np.full((len(names), STEPS + 1), np.inf)
        for row, name in enumerate(names):
            step = steps[layer][name]
            if step <= STEPS:
                options[row, step:] = least[: STEPS + 1 - step] + errors[layer][name]
        taken.append([names[row] for row in options.argmin(0)])
        least = options.min(0)
    at, chosen = int(least.argmin()), {}
    for layer, names in zip(reversed(layers), reversed(taken), strict=True):
        chosen[layer] = names[at]
        at -= steps[layer][names[at]]
    return {layer: chosen[layer] for layer in layers}


def plan_config(chosen: Mapping[str, str]) -> HybridConfig:
    """The HybridConfig that makes each layer what was chosen for it, and refuses other models."""
    parsed = {layer: parse_candidate(name) for layer, name in chosen.items()}
    sides = [window for _, window in parsed.values() if window is not None]
    common = max(set(sides), key=sides.count) if sides else HybridConfig.window
    return HybridConfig(
        window=common,
        windows={layer: window for layer, (_, window) in parsed.items() if window not in (None, common)},
        layers={layer: kind for layer, (kind, _) in parsed.items()},
        strict_layers=True,
    )


def write_plan(config: HybridConfig, path: Path, notes: list[str]) -> None:
    """Write a plan that `HybridConfig.from_plan` reads, with notes as its first lines; atomically."""
    import yaml

    fields: dict[str, Any] = {"window": config.window, "windows": config.windows, "layers": config.layers}
    fields["strict_layers"] = config.strict_layers
    text = "".join(f"# {note}\n" for note in notes) + yaml.safe_dump(fields, sort_keys=False)
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")
