"""Print a table of the bytes that a process sends in a layer: hybrid attention on rows, Ulysses and ring attention.

    python scripts/communication.py [--processes 8] [--window 16]

By formula (hybriddit.parallel.traffic), which tests/parallel/test_parallel_traffic.py compares with what is sent.
"""

import argparse

import torch

from hybriddit.attention import HybridAttention, TokenLayout
from hybriddit.models import families
from hybriddit.parallel.traffic import hybrid_bytes, ring_bytes, ulysses_bytes

SIZES = (1024, 2048, 4096, 8192, 16384)


def rows(shape, processes, window):
    """The table's rows of one kind of layer, in bfloat16."""
    with torch.device("meta"):
        layer = HybridAttention(
            shape.heads * shape.head_dim, shape.heads, shape.head_dim, window=(window, window), map_rank=0
        )
    for px in SIZES:
        grid, width = shape.grid(px), shape.heads * shape.head_dim
        found = hybrid_bytes(layer, TokenLayout(shape.text, (grid,), shape.text_first), processes, 2)
        parts = [max(found[name]) for name in ("window", "far", "text")]
        tokens = grid[0] * grid[1] + shape.text
        yield (
            px,
            *parts,
            sum(parts),
            ulysses_bytes(tokens, width, processes, 2),
            ring_bytes(tokens, width, processes, 2),
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--window", type=int, default=16, help="in tokens")
    options = parser.parse_args()
    print("| | pixels | window | far | text | hybrid, sum | Ulysses | ring |")
    print("|---|---|---|---|---|---|---|---|")
    for family in families():
        if family.image_exit is None:  # its images are not spread over processes
            continue
        for published in family.published.values():
            if published.shape is not None:
                for px, *sizes in rows(family.attention_shape(published), options.processes, options.window):
                    sizes = " | ".join(f"{size / 1e6:,.1f}" for size in sizes)
                    print(f"| {published.shape} | {px} | {sizes} |")


if __name__ == "__main__":
    main()
