"""Run a hybrid model as its teacher, each layer's hybrid beside it on the same input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .surgery import hybrid_family, teacher_processor
from .wrapping import unwrapped, with_forward

Output = torch.Tensor | tuple[torch.Tensor, ...]


@contextlib.contextmanager
def beside_dense(model: nn.Module, use: Callable[[nn.Module, Output, Callable[[], Output]], None]) -> Iterator[None]:
    """Within the block, the converted layers of a hybrid model give what the dense layers give.

    Each calls use(attn, dense, hybrid) meanwhile: the attention module, its dense output, and a function that computes
    its hybrid's output of the same input, with gradients where they are enabled. Gradients do not reach other layers.
    `use` may backpropagate at once, so that no more than one layer's intermediate results are in memory.
    """
    model = unwrapped(model)
    family = hybrid_family(model)
    with contextlib.ExitStack() as stack:
        for name, attn in family.attentions(model).items():
            if hasattr(attn, "hybrid"):
                stack.enter_context(with_forward(attn, _Beside(attn, teacher_processor(model, name), use)))
        yield


class _Beside:
    """The forward of one converted attention module."""

    def __init__(self, attn: nn.Module, dense_processor, use):
        self.attn, self.use = attn, use
        self.hybrid_processor, self.dense_processor, self.forward = attn.processor, dense_processor, attn.forward

    def __call__(self, *args, **kwargs) -> Output:
        with torch.no_grad():
            self.attn.set_processor(self.dense_processor)
            try:
                dense = self.forward(*args, **kwargs)
            finally:
                self.attn.set_processor(self.hybrid_processor)
        self.use(self.attn, dense, lambda: self.forward(*args, **kwargs))
        return dense
