"""What torch.compile must not trace. Imported while tracing only: torch._dynamo takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.assume_constant_result
def constant(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of plain values once, at the time of tracing."""
    return function(*args)
