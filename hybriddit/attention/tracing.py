"""Hide code from torch.compile's tracing. Import this only while tracing: torch._dynamo takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.assume_constant_result
def constant(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of plain values once, while tracing, and treat its result as a constant."""
    return function(*args)
