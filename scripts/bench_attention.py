"""Time this machine's attention in one process, interleaving the two sides of each row, and measure its memory.

    python scripts/bench_attention.py [--only linear window bfloat16 join memory] [--repeats 7] [--threads 2]

It prints tables of median wall times and their ratio: linear and window attention against dense
`scaled_dot_product_attention` (which also sees the text), ours in bfloat16 against ours in float32, joining two
branches inside linear attention against joining them after it; and the peak memory of linear attention over 65536
tokens.
"""

import argparse
import concurrent.futures
import multiprocessing
import re
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from hybriddit.attention import linear_attention, neighborhood_attention


def dense_attention(query, key, value, text_key=None, text_value=None):
    if query.ndim == 5:
        query, key, value = (x.flatten(1, 2) for x in (query, key, value))
    if text_key is not None:
        key, value = torch.cat((key, text_key), 1), torch.cat((value, text_value), 1)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def window_attention(query, key, value, text_key=None, text_value=None, *, window):
    return neighborhood_attention(query, key, value, window=window, text_key=text_key, text_value=text_value)


def joined(query, key, value, near, gate):
    return linear_attention(query, key, value, near=near, gate=gate)


def joined_after(query, key, value, near, gate):
    return near + gate * (linear_attention(query, key, value) - near)


def linear_inputs(tokens):
    return [torch.randn(1, tokens, 16, 64) for _ in range(3)]


def window_inputs(size, text):
    return [torch.randn(1, size, size, 4, 64) for _ in range(3)] + [
        torch.randn(1, text, 4, 64) for _ in range(2 if text else 0)
    ]


def call(function, inputs, backward):
    start = time.perf_counter()
    if backward:
        out = function(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    else:
        with torch.no_grad():
            function(*inputs)
    return time.perf_counter() - start


def compare(name, sides, repeats):
    """Print one row per direction: the first of two (function, inputs) against the second."""
    for backward in (False, True):
        ready = [(function, [x.requires_grad_(backward) for x in inputs]) for function, inputs in sides]
        for function, inputs in ready:
            call(function, inputs, backward)
        rounds = [[call(function, inputs, backward) for function, inputs in ready] for _ in range(repeats)]
        first, second = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
        direction = "forward + backward" if backward else "forward"
        print(f"| {name} | {direction} | {first:.2f} | {second:.2f} | {first / second:.2f} |", flush=True)


def header(first, second):
    print(f"\n| case | direction | {first} ms | {second} ms | {first} / {second} |\n| --- | --- | ---: | ---: | ---: |")


def time_linear(repeats):
    header("dense", "ours")
    for tokens, count in ((256, 5 * repeats), (1024, 5 * repeats), (4096, repeats), (16384, 3)):
        inputs = linear_inputs(tokens)
        name = f"linear, 16 heads x 64, {tokens} tokens"
        compare(name, [(dense_attention, inputs), (linear_attention, inputs)], count)


def time_window(repeats):
    header("dense", "ours")
    small = [(16, 3, 0), (16, 9, 0), (16, 15, 0), (16, 9, 77), (16, 9, 512), (32, 9, 0), (32, 15, 77), (32, 31, 0)]
    for size, window, text in [*small, (64, 9, 0), (64, 9, 77), (64, 9, 512), (64, 21, 0), (128, 9, 0)]:
        inputs = window_inputs(size, text)
        count = 5 * repeats if size <= 32 else repeats if size < 128 else 3
        name = f"window {window}, 4 heads x 64, {size} x {size}, text {text}"
        compare(name, [(dense_attention, inputs), (partial(window_attention, window=window), inputs)], count)


def time_bfloat16(repeats):
    header("float32", "bfloat16")
    cases = [(f"linear, 16 heads x 64, {n} tokens", linear_attention, linear_inputs(n)) for n in (1024, 4096, 16384)]
    for size, text in ((64, 0), (64, 77), (64, 512), (128, 0)):
        name = f"window 9, 4 heads x 64, {size} x {size}, text {text}"
        cases.append((name, partial(window_attention, window=9), window_inputs(size, text)))
    for name, function, inputs in cases:
        compare(name, [(function, inputs), (function, [x.bfloat16() for x in inputs])], 2 * repeats)


def time_join(repeats):
    header("after", "inside")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1024, 4096):
            inputs = [x.to(dtype) for x in (*linear_inputs(tokens), torch.randn(1, tokens, 16, 64))]
            inputs.append(torch.rand(16, 1))
            name = f"linear and join, 16 heads x 64, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
            compare(name, [(joined_after, inputs), (joined, inputs)], 2 * repeats)


def peak_growth(dtype, threads, tokens=65536):
    """Peak memory of one forward pass beyond what the process held before it, as a multiple of the output's size."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        linear_attention(*(x.to(dtype) for x in linear_inputs(64)))  # libraries load and set up things once
        inputs = [torch.empty(1, tokens, 16, 64, dtype=dtype).uniform_(-2, 2) for _ in range(3)]
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which imports have raised
        before = resident("VmRSS")
        out = linear_attention(*inputs)
        after = resident("VmHWM")
    return (after - before) / (out.numel() * out.element_size())


def resident(name):
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM); Linux only."""
    return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure_memory(threads):
    print("\n| case | peak memory growth / output |\n| --- | ---: |")
    for dtype in (torch.float32, torch.bfloat16):
        # in a new process, because a process's peak never falls
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            growth = pool.submit(peak_growth, dtype, threads).result()
        name = f"linear, 16 heads x 64, 65536 tokens, {str(dtype).removeprefix('torch.')}, forward"
        print(f"| {name} | {growth:.3f} |", flush=True)


def main():
    parts = {"linear": time_linear, "window": time_window, "bfloat16": time_bfloat16, "join": time_join}
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*parts, "memory"], default=[*parts, "memory"], help="parts to run"
    )
    parser.add_argument("--repeats", type=int, default=7, help="repeats of a medium-sized case")
    parser.add_argument("--threads", type=int, default=2, help="torch's number of threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads")
    for name, part in parts.items():
        if name in args.only:
            part(args.repeats)
    if "memory" in args.only:
        measure_memory(args.threads)


if __name__ == "__main__":
    main()
