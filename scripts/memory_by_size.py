#!/usr/bin/env python
"""Count what a hybrid transformer's forward pass holds on a GPU, by the size of the image. No GPU is needed.

    python scripts/memory_by_size.py

One image, bfloat16, window 16, besides the weights; at once, and in strips of rows of tokens (`hybriddit.in_strips`).
Tensors without data are counted, for a GPU on which hybriddit's kernels run.
"""

import contextlib
from unittest.mock import patch

import torch

from hybriddit import HybridConfig, hybridize
from hybriddit.attention.linear import dispatch as linear_dispatch
from hybriddit.attention.window import dispatch as window_dispatch
from hybriddit.models.family import find_published
from hybriddit.models.peak import forward_peak

MODELS = (
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "stabilityai/stable-diffusion-3.5-medium",
    "black-forest-labs/FLUX.1-dev",
)
SIZES, ROWS = (1024, 2048, 4096, 8192, 16384), (None, 256, 128, 64)


@contextlib.contextmanager
def gpu_kernels():
    """Within it hybriddit's kernels run on tensors without data, as on a GPU."""
    with contextlib.ExitStack() as replaced:
        for dispatch in (linear_dispatch, window_dispatch):
            replaced.enter_context(patch.object(dispatch, "failure_reason", lambda *case: None))
        yield


def main() -> None:
    with gpu_kernels():
        count()


def count() -> None:
    print("| model | pixels | " + " | ".join("at once" if rows is None else f"{rows} rows" for rows in ROWS) + " |")
    print("| --- | --- |" + " --- |" * len(ROWS))
    for repository in MODELS:
        family, published = find_published(repository)
        with torch.device("meta"):
            model = family.dense_class(**published.arguments)
        hybridize(model, HybridConfig(window=16))
        text = family.example_text(model.config, 1, family.text_length(), lambda *shape: torch.zeros(()).expand(shape))
        for size in SIZES:
            side = size // family.token_pixels(model.config, published.vae_scale_factor)
            try:
                family.check_grid(model.config, (side, side))
            except ValueError:
                continue  # beyond the model's table of positions
            cells = []
            for rows in ROWS:
                if rows is not None and rows >= side:
                    cells.append("")
                    continue
                peak = forward_peak(
                    model, (side, side), text, device=torch.device("cuda"), dtype=torch.bfloat16, rows=rows
                )
                cells.append(f"{peak / 2**30:.1f}")
            print(f"| {repository.split('/')[1]} | {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
