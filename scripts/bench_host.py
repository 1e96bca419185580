#!/usr/bin/env python
"""What a hybrid attention layer costs the host: Python, checks and dispatch, on a CPU with all kernels left out.

    python scripts/bench_host.py

One call of the default layer with text, as in FLUX, without gradients, in microseconds of processor time: the least of
nine rounds. Then the first of its two passes, and what a layer takes that is joined in three, as those with a gate per
channel are; and the first and the last two of these. Triton's launches and the softmax attention of text queries
do nothing; allocations, views and small operations of torch are counted, Triton's own launcher is not.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are: they are then taken on a CPU

import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch

from hybriddit.attention import hybrid
from hybriddit.attention.layout import TokenLayout
from hybriddit.attention.linear import triton as linear_kernels
from hybriddit.attention.mixers import linear as mixers
from hybriddit.attention.window import grids
from hybriddit.attention.window import kernels as window_kernels
from hybriddit.machine import device_details

ROUNDS, CALLS = 9, 300


class NoKernel:
    """Stands for a Triton kernel, and does nothing."""

    def __getitem__(self, programs) -> Callable[..., None]:
        return lambda *args, **constants: None


def microseconds(call: Callable[[], object]) -> float:
    """The least mean of ROUNDS rounds of CALLS calls."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        times.append((time.process_time() - start) / CALLS * 1e6)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    heads, head_dim, text, grid = 2, 16, 8, (20, 20)  # the host does not see sizes, but a CPU would copy them
    layer = hybrid.HybridAttention(heads * head_dim, heads, head_dim, window=(4, 4), gate="token", rotary="model")
    layer.cast(torch.bfloat16)  # as a loaded pipeline's is
    layout = TokenLayout(text, (grid,), text_first=True)
    query, key, value = torch.zeros(3, 1, text + grid[0] * grid[1], heads, head_dim, dtype=torch.bfloat16).unbind()
    far_query, far_key, near = torch.zeros(3, 1, grid[0] * grid[1], heads, head_dim, dtype=torch.bfloat16).unbind()
    gate, lse = torch.zeros(1, grid[0] * grid[1], heads, 1), torch.zeros(1, grid[0] * grid[1], heads)
    channel_gate = gate.expand(near.shape)
    far = {"far_query": far_query, "far_key": far_key}
    text_key, image = layout.split(key)
    near_inputs = [image.unflatten(1, grid)] * 3
    attend = partial(grids.neighborhood_attention, backend="triton")
    settings = {"window": (4, 4), "text_key": text_key, "text_value": text_key, "return_lse": True}
    parts = {
        "hybrid layer": lambda: layer(query, key, value, layout, gate=gate, **far),
        "its linear branch's sums": lambda: layer.far(far_query, far_key, near, only_sums=True),
        "in three passes": lambda: layer(query, key, value, layout, gate=channel_gate, **far),
        "its window branch": lambda: attend(*near_inputs, **settings),
        "its linear branch": lambda: layer.far(far_query, far_key, near, near=near, gate=gate, joint=True, lse=lse),
    }
    left_out = [
        patch.object(module, name, NoKernel())
        for module in (linear_kernels, window_kernels)
        for name in dir(module)
        if name.endswith("_kernel") and name != "_kernel"
    ]
    left_out += [
        patch.object(grids, "neighborhood_attention", attend),
        patch.object(hybrid, "joined_attention", partial(hybrid.joined_attention, backend="triton")),
        patch.object(mixers, "sum_keys", partial(mixers.sum_keys, backend="triton")),
        patch.object(mixers, "linear_attention", partial(mixers.linear_attention, backend="triton")),
        patch.object(hybrid.F, "scaled_dot_product_attention", lambda query, *args, **kwargs: query),
    ]
    for replacement in left_out:
        replacement.start()
    with torch.no_grad():
        for name, call in parts.items():
            print(f"{name:24} {microseconds(call):6.1f} us")
    print(f"{device_details(torch.device('cpu'))['name']}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
