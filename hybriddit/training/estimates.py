"""What the dry runs of both kinds of training have in common: memory on several GPUs, files, times, and their words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..models.family import transformer_blocks
from .optimizer import moment_bytes

# all estimated times assume that a step reaches this share of an H100's dense bf16 peak
H100_PEAK = 989e12
ASSUMED_SHARE = 0.4
THROUGHPUT = H100_PEAK * ASSUMED_SHARE
MANY = (8, 4, 2)  # GPUs

Rows = list[tuple[str, str]]


def trained_bytes(config: Any, parameters: Iterable[nn.Parameter]) -> int:
    """The bytes of trained weights in fp32, their gradients, average and AdamW's moments."""
    parameters = list(parameters)
    return 4 * 3 * sum(p.numel() for p in parameters) + moment_bytes(parameters, config)


def trained_words(figures: dict) -> str:
    """What `trained_bytes` counts, in words."""
    if figures["use_8bit_adam"]:
        return "their gradients and average, in fp32, and Adam's moments in 8 bits"
    return "their gradients, Adam's moments and average, in fp32"


def on_several(
    config: Any, model: nn.Module, element: int, weights: int, *, frozen: int, trained: int, activations: int
) -> dict:
    """The bytes on each of as many GPUs, up to 8, as divide a step's images; nothing where that is one.

    element: bytes of a weight while the model runs. weights: how many are trained. frozen, trained, activations: bytes
    on one GPU, see `trained_bytes`.
    """
    train = config.train
    alone = train.batch_size // train.accumulation
    for gpus in MANY:
        accumulation = max(1, train.accumulation // gpus)
        images, rest = divmod(train.batch_size, gpus * accumulation)
        if rest:
            continue
        own = activations * images // alone
        block = max((sum(p.numel() for p in block.parameters()) for block in transformer_blocks(model)), default=0)
        found = {
            "gpus": gpus,
            "accumulation": accumulation,
            "images_per_pass": images,
            "ddp": frozen + trained + 4 * weights + own,  # DDP has the gradients a second time, in its buckets
        }
        if not config.optim.use_8bit_adam:
            found["fsdp2"] = (frozen + trained) // gpus + 2 * block * element + own  # a block, and the next one
        return found
    return {}


def checkpoint_bytes(trained: int, output: Any) -> int:
    """The bytes of a run's checkpoints; one more is there while it is written. trained: bytes as `trained_bytes` counts."""
    return (output.keep + 1) * trained if output.checkpoint_every else 0


def hours(flops: int) -> float:
    """How long so much takes at the assumed rate."""
    return flops / THROUGHPUT / 3600


def memory_rows(stages: dict[str, int | None], words: dict[str, Rows]) -> Rows:
    """The memory of a run's stages, where they are known. words: of each stage, what it is made of."""
    known = {stage: size for stage, size in stages.items() if size is not None}
    rows = [("memory", f"{si(max(known.values()), 'B')} on one GPU that does the whole batch, the largest of these:")]
    for stage, size in known.items():
        (_, first), *more = words[stage]
        rows += [("", f"{si(size, 'B')} {first}"), *more]
    return rows


def several_rows(several: dict) -> Rows:
    """What `on_several` found, in words."""
    if not several:
        return [("GPUs", "one: train.batch_size does not divide by more")]
    sharded = f", {si(several['fsdp2'], 'B')} with FSDP2" if "fsdp2" in several else ""
    return [
        (
            "GPUs",
            f"{several['gpus']} need {si(several['ddp'], 'B')} each with DDP{sharded}, to train",
        ),
        (
            "",
            f"with train.accumulation={several['accumulation']}, {several['images_per_pass']} images at a time on each; "
            f"times divide by {several['gpus']} at best",
        ),
    ]


def assumption_row() -> tuple[str, str]:
    return (
        "",
        f"one GPU, assumed to do {si(THROUGHPUT, 'FLOP')}/s: {ASSUMED_SHARE:.0%} of an H100's dense bf16 peak "
        f"({si(H100_PEAK, 'FLOP')}/s)",
    )


def table(rows: Rows) -> str:
    """The rows' lines."""
    return "\n".join(f"{name:<11}{text}" for name, text in rows)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def si(value: float, unit: str) -> str:
    scale, prefix = next(
        ((s, p) for s, p in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= s), (1e3, "k")
    )
    return f"{value / scale:.3g} {prefix}{unit}"


def duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.3g} h"
    return f"{hours * 60:.2g} min" if hours >= 1 / 60 else f"{hours * 3600:.2g} s"
