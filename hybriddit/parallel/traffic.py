"""How many bytes a process sends in a layer, by formula: hybrid attention on rows, beside Ulysses and ring attention."""

from __future__ import annotations

from ..attention import HybridAttention, TokenLayout
from ..attention.rows import shares_of

SUM_SIZE = 4  # bytes of an element of sums, which are in float32


def hybrid_bytes(
    layer: HybridAttention, token_layout: TokenLayout, processes: int, element_size: int
) -> dict[str, list[int]]:
    """Bytes that each process sends in the forward pass of a hybrid or window layer, for one image, by what it sends.

    "window": keys and values of its rows, to the processes whose windows reach there. "far": its part of the all-reduce
    of the sums. "text": likewise of the results of text queries. An all-reduce is counted as a ring does it: each process
    sends 2 (P - 1) / P times the tensor. token_layout: of the whole image. element_size: bytes of an element of q, k, v.
    """
    ((height, width),), text = token_layout.grids, token_layout.text_length
    shares = shares_of(height, processes)
    wanted = [layer.near_reach(height)(*share) for share in shares]
    row = 2 * width * layer.kv_heads * layer.head_dim * element_size
    rows = [
        sum(
            max(min(end, first + count) - max(begin, first), 0)
            for other, (begin, end) in enumerate(wanted)
            if other != rank
        )
        for rank, (first, count) in enumerate(shares)
    ]
    sums = 0 if layer.far is None else layer.far.states * layer.heads * layer.far.features * (layer.head_dim + 1)
    results = layer.heads * text * (layer.head_dim + 2)  # an output, a weight and the largest score of each query
    return {
        "window": [count * row for count in rows],
        "far": [_ring(sums * SUM_SIZE, processes)] * processes,
        "text": [_ring(results * SUM_SIZE, processes)] * processes,
    }


def ulysses_bytes(tokens: int, width: int, processes: int, element_size: int) -> int:
    """Bytes that each process sends in a dense layer by Ulysses: q, k, v and the output change hands (arXiv 2309.14509)."""
    return 4 * tokens * width * element_size * (processes - 1) // processes**2


def ring_bytes(tokens: int, width: int, processes: int, element_size: int) -> int:
    """Bytes that each process sends in a dense layer by ring attention: keys and values go round (arXiv 2310.01889)."""
    return 2 * tokens * width * element_size * (processes - 1) // processes


def _ring(size: int, processes: int) -> int:
    return 2 * size * (processes - 1) // processes
