#!/usr/bin/env python
"""Count what a forward pass takes on an H100, by the size of the image, beside dense attention. No GPU is needed.

    python scripts/large_images.py > benchmarks/results/large_images.md

One image, bfloat16, window 16. FLOPs, bytes and memory are counted on tensors without data (`hybriddit.models.peak`), for
a GPU on which hybriddit's kernels run. The seconds are the least ones: each operation takes the longer of its FLOPs and its
bytes, at the rates of one H100. What was measured is beside it.
"""

import datetime

import torch
from diffusers import AutoencoderKL
from memory_by_size import MODELS, gpu_kernels

from hybriddit import HybridConfig, hybridize
from hybriddit.attention.rates import Rates
from hybriddit.models.family import find_published
from hybriddit.models.peak import decoder_cost, decoder_peak, forward_cost, forward_peak

SIZES, ROWS = (1024, 2048, 4096, 8192, 16384), 64
# of an NVIDIA H100 80 GB HBM3, torch 2.11.0, 2026-11-26: copies of 1 GiB, and products of bfloat16 matrices
RATES = Rates(2.97e12, 758e12)
# seconds of a pass and the most GB that it held besides the weights, on that GPU and day, of commit ca6db7a, at once
MEASURED = {
    ("PixArt-Sigma-XL-2-1024-MS", "hybrid", 8192): "1.21 s, 6.9 GB",
    ("PixArt-Sigma-XL-2-1024-MS", "hybrid", 16384): "4.95 s, 27.6 GB",
    ("FLUX.1-dev", "hybrid", 1024): "0.148 s, compiled",
    ("FLUX.1-dev", "hybrid", 2048): "0.519 s, compiled",
    ("FLUX.1-dev", "dense", 1024): "0.134 s, compiled",
    ("FLUX.1-dev", "dense", 2048): "0.703 s, compiled",
}
GPU = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
HEAD = """# Large images, counted

By `python scripts/large_images.py`, {date}; no GPU took part. One forward pass of one image in bfloat16, with a window
of 16 and the default far branch, of random weights; sampling takes as many passes as steps, and twice as many images with
guidance.

- **TFLOP, TB**: computed and moved, summed over the operations one by one, as they run where nothing is compiled.
- **s**: the least seconds on one H100: each operation takes the longer of its FLOPs at 758 TFLOP/s and its bytes at
  2.97 TB/s, which were measured there (2026-11-26: products of matrices, and copies). It is no forecast. Kernels reach
  less; the window's, at that time, a seventh of that rate. Compiled blocks move fewer bytes, and may be faster than this.
- **GiB**: the most that is held besides the weights; by count.
- **in strips**: of {rows} rows of tokens (`hybriddit.in_strips`).
- **measured**: on that H100 of an earlier version (commit ca6db7a: before the window's kernels and the tuned launch options
  of the linear ones), at once, not compiled unless it says so. Strips, and sizes without an entry, are unmeasured.
"""

VAE_HEAD = """
The VAE of these models, decoding one image in bfloat16 by diffusers' code: at once, or in tiles of 1024 x 1024 pixels, of
which two rows are held.
"""
VAE = {  # SDXL's, as PixArt-Sigma has it; SD3's and FLUX's differ in the number of latent channels
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def model_of(family, published, size, hybrid):
    """The model without weights; with positions for this size, in whatever way they are made."""
    arguments = dict(published.arguments)
    with torch.device("meta"):
        side = size // family.token_pixels(family.dense_class(**arguments).config, published.vae_scale_factor)
        if "pos_embed_max_size" in arguments:
            arguments["pos_embed_max_size"] = max(arguments["pos_embed_max_size"], side)
        model = family.dense_class(**arguments)
    return hybridize(model, HybridConfig(window=16)) if hybrid else model, (side, side)


def row(name, kind, size, model, grid, text, rows):
    cost = forward_cost(model, grid, text, RATES, **GPU, rows=rows)
    peak = forward_peak(model, grid, text, **GPU, rows=rows) / 2**30
    how = kind if rows is None else f"{kind}, in strips"
    measured = MEASURED.get((name, kind, size), "") if rows is None else ""
    seconds = f"{cost.seconds:.3g}" if cost.seconds < 1000 else f"{cost.seconds:.0f}"
    cells = (name, size, how, f"{cost.flops / 1e12:.0f}", f"{cost.bytes / 1e12:.2f}", seconds)
    print(f"| {' | '.join(map(str, cells))} | {peak:.1f} | {measured} |", flush=True)


def decoder_rows(vae, size):
    side, tile = size // 8, vae.tile_latent_min_size
    starts = range(0, side, int(tile * (1 - vae.tile_overlap_factor)))
    tiles = (sum(min(tile, side - start) for start in starts) / tile) ** 2  # in whole tiles
    strips = 3 * 3 * vae.tile_sample_min_size * size * 2
    for how, latents, times, more in (("at once", side, 1, 0), ("in tiles", tile, tiles, strips)):
        if how == "in tiles" and side <= tile:
            continue
        shape = vae.config.latent_channels, latents, latents
        cost = decoder_cost(vae.decoder, shape, RATES, **GPU)
        peak = (decoder_peak(vae.decoder, shape, **GPU) + more) / 2**30
        cells = (size, how, f"{times * cost.flops / 1e12:.0f}", f"{times * cost.bytes / 1e12:.2f}")
        print(f"| {' | '.join(map(str, cells))} | {times * cost.seconds:.3g} | {peak:.1f} |", flush=True)


def main():
    print(HEAD.format(date=datetime.date.today(), rows=ROWS))
    print("| model | pixels | attention | TFLOP | TB | s | GiB | measured |\n" + "| --- " * 8 + "|")
    with gpu_kernels():
        for repository in MODELS:
            family, published = find_published(repository)
            for size in SIZES:
                for kind in ("hybrid", "dense"):
                    model, grid = model_of(family, published, size, kind == "hybrid")
                    text = family.example_text(
                        model.config, 1, family.text_length(), lambda *shape: torch.zeros(()).expand(shape)
                    )
                    for rows in (None, ROWS) if kind == "hybrid" and grid[0] > ROWS else (None,):
                        row(repository.split("/")[1], kind, size, model, grid, text, rows)
        print(VAE_HEAD)
        with torch.device("meta"):
            vae = AutoencoderKL(**VAE)
        print("| pixels | how | TFLOP | TB | s | GiB |\n" + "| --- " * 6 + "|")
        for size in SIZES:
            decoder_rows(vae, size)


if __name__ == "__main__":
    main()
