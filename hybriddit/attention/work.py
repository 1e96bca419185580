"""What attention costs, by formulas: FLOPs, and the fewest bytes to and from memory."""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """The least that a computation has to do: bytes to and from memory, and FLOPs (two per multiply-add)."""

    bytes: int
    flops: int


def softmax_flops(pairs: int, width: int) -> int:
    """FLOPs of softmax attention over `pairs` query-key pairs; width: heads x head width.

    Two products, queries with keys and weights with values; the softmax itself is left out.
    """
    return 4 * pairs * width


def dense_flops(tokens: int, width: int) -> int:
    """FLOPs of softmax attention among `tokens` tokens, text and image together."""
    return softmax_flops(tokens**2, width)


def attention_work(
    inputs: int, outputs: int, flops: int, element_size: int, *, softmax_outputs: int = 0
) -> dict[str, Work]:
    """The work by direction: "forward", "backward" and "forward + backward"; every element is read or written once.

    inputs, outputs: elements of the tensors that the forward pass reads and writes. The backward pass reads the inputs
    and the output's gradient, writes the inputs' gradients, and takes twice the `flops`. The derivative of a softmax
    also needs the softmax attention's own output, of `softmax_outputs` elements.
    element_size: bytes of a number.
    """
    forward = Work((inputs + outputs) * element_size, flops)
    backward = Work((2 * inputs + outputs + softmax_outputs) * element_size, 2 * flops)
    both = Work(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return {"forward": forward, "backward": backward, "forward + backward": both}


def dense_work(tokens: int, width: int, element_size: int) -> dict[str, Work]:
    """The work of softmax attention among `tokens` tokens, by direction (see `attention_work`)."""
    elements = tokens * width
    flops = dense_flops(tokens, width)
    return attention_work(3 * elements, elements, flops, element_size, softmax_outputs=elements)
