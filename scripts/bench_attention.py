"""Times this machine's attention against dense `scaled_dot_product_attention`, in one process, interleaved.

    python scripts/bench_attention.py [repeats]

Prints a table of median wall times and the ratio dense / ours; the window's dense side sees the text too.
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F

from hybriddit.attention import linear_attention, neighborhood_attention


def dense_attention(query, key, value, text_key=None, text_value=None):
    if query.ndim == 5:
        query, key, value = (x.flatten(1, 2) for x in (query, key, value))
    if text_key is not None:
        key, value = torch.cat((key, text_key), 1), torch.cat((value, text_value), 1)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def window_attention(window):
    def attend(query, key, value, text_key=None, text_value=None):
        return neighborhood_attention(query, key, value, window=window, text_key=text_key, text_value=text_value)

    return attend


def call(function, inputs, backward):
    start = time.perf_counter()
    if backward:
        out = function(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    else:
        with torch.no_grad():
            function(*inputs)
    return time.perf_counter() - start


def compare(name, function, inputs, backward, repeats):
    inputs = [x.requires_grad_(backward) for x in inputs]
    for side in (dense_attention, function):
        call(side, inputs, backward)
    pairs = [[call(side, inputs, backward) for side in (dense_attention, function)] for _ in range(repeats)]
    dense, ours = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    direction = "forward + backward" if backward else "forward"
    print(f"| {name} | {direction} | {dense:.2f} | {ours:.2f} | {dense / ours:.2f} |", flush=True)


def main():
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(
        "| case, fp32, two threads | direction | dense ms | ours ms | dense / ours |\n| --- | --- | ---: | ---: | ---: |"
    )
    for tokens in (256, 1024, 4096):
        for backward in (False, True):
            inputs = [torch.randn(1, tokens, 16, 64) for _ in range(3)]
            count = repeats if tokens > 1024 else 5 * repeats
            compare(f"linear, 16 heads x 64, {tokens} tokens", linear_attention, inputs, backward, count)
    cases = [(16, 3, 0), (16, 9, 0), (16, 15, 0), (16, 9, 77), (16, 9, 512), (32, 9, 0), (32, 15, 77), (32, 31, 0)]
    for size, window, text in [*cases, (64, 9, 0), (64, 9, 77), (64, 9, 512), (128, 9, 0)]:
        for backward in (False, True):
            inputs = [torch.randn(1, size, size, 4, 64) for _ in range(3)]
            inputs += [torch.randn(1, text, 4, 64) for _ in range(2 if text else 0)]
            name = f"window {window}, 4 heads x 64, {size} x {size}, text {text}"
            compare(
                name,
                window_attention(window),
                inputs,
                backward,
                5 * repeats if size <= 32 else repeats if size < 128 else 3,
            )


if __name__ == "__main__":
    main()
