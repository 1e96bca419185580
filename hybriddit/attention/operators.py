"""Operators of torch: torch.compile, autograd, profilers and FLOP counters see each as one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Operator:
    """A function of annotated tensors and plain values as the operator hybriddit::<name>, whose results are new tensors.

    Where gradients are off, a call goes to its overload <name>.lean. It has no autograd formula to pass by, and lacks the
    checks of torch.library.custom_op, which take the host longer than the rest of a small call.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name = f"hybriddit::{name}"
        self._definition = torch.library.custom_op(self.name, function, mutates_args=())
        torch.library.define(f"{self.name}.lean", torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(f"{self.name}.lean", "default", function)
        operator = getattr(torch.ops.hybriddit, name)
        self._full, self._lean = operator.default, operator.lean
        self.register_autograd = self._definition.register_autograd

    def register_fake(self, function: Callable[..., Any]) -> None:
        """The function gives results of the right shapes and dtypes, for tracing."""
        self._definition.register_fake(function)
        torch.library.register_fake(f"{self.name}.lean", function)

    def __call__(self, *args: Any, **settings: Any) -> Any:
        call = self._full if torch.is_grad_enabled() else self._lean
        return call(*args, **settings)


def as_operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function the operator of this name; see `Operator`."""
    return lambda function: Operator(name, function)
