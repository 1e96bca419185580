"""Hide code from torch.compile's tracing. Import this only while tracing: torch._dynamo takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value


@torch.compiler.assume_constant_result
def constant(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of plain values once, while tracing, and treat its result as a constant."""
    return function(*args)


def are_symbolic(*sizes: int) -> bool:
    """Whether the graph that is traced is to serve several values of one of these sizes."""
    return not all(has_static_value(size) for size in sizes)
