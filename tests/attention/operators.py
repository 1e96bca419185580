"""torch's own checks of hybriddit's operators."""

from __future__ import annotations

from typing import Any

import torch


def check_operator(operator: torch._ops.OpOverloadPacket, arguments: tuple, **settings: Any) -> None:
    """Of the operator, and of its overload for calls without gradients."""
    torch.library.opcheck(operator.default, arguments, **settings)
    without_gradients = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(operator.lean, without_gradients, **settings)
