"""Launch options of the Triton kernels that were measured to be the fastest on one chip.

`sm_<capability>.json` is a file as `hybriddit benchmark --tune` writes it, and says on which device, when and with what
it was measured. Chips without a file, and kernels that a file lacks, keep the kernels' own defaults.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...files import read_json

FORMAT = 1
FOLDER = Path(__file__).parent


def tuned_options(part: str, kernel: str, dtype: torch.dtype, width: int, target: int | str) -> dict[str, Any]:
    """What replaces the default launch options of a kernel on a chip; empty where nothing was measured.

    part: "linear" or "window". kernel: its name in `launch_options`. width: of a head. target: 10 * major + minor of a
    CUDA compute capability, or another name, which has no table.
    """
    return _options_of(target).get((part, kernel, dtype, width), {})


@cache
def _options_of(target: int | str) -> dict[tuple, dict[str, Any]]:
    path = FOLDER / f"sm_{target}.json"
    return options_by_kernel(read_json(path)) if path.exists() else {}


def options_by_kernel(table: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    """A table's options, by part, kernel, dtype and width. Raises ValueError if it is not of this format."""
    if table.get("format") != FORMAT:
        raise ValueError(f"no table of launch options of format {FORMAT}")
    return {
        (row["part"], row["kernel"], getattr(torch, row["dtype"]), row["width"]): row["options"]
        for row in table["kernels"]
    }
