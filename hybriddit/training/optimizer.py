"""AdamW with a separate parameter group for the gates, its memory, and the learning rates of both groups."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable

import torch
from torch import nn

# bitsandbytes' 8-bit AdamW: smaller weights have moments in fp32, and so many values of a moment share a factor
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256


def make_optimizer(trained: dict[str, nn.Parameter], config, *, fused: bool = False) -> torch.optim.Optimizer:
    """AdamW with two groups: the gates, which have their own rate and no weight decay, after all other weights.

    fused: whether torch's runs as one kernel. With `optim.use_8bit_adam` it is bitsandbytes'.
    """
    gates = [p for name, p in trained.items() if is_gate(name)]
    others = [p for name, p in trained.items() if not is_gate(name)]
    groups = [{"params": others, "weight_decay": config.optim.weight_decay}, {"params": gates, "weight_decay": 0.0}]
    if config.optim.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=config.optim.lr, min_8bit_size=SMALLEST_8BIT)
    return torch.optim.AdamW(groups, lr=config.optim.lr, fused=fused, foreach=not fused)


def check_8bit(config, *, sharded: bool = False) -> None:
    """Raise ModuleNotFoundError or ValueError where `optim.use_8bit_adam` cannot work. sharded: whether weights are."""
    if not config.optim.use_8bit_adam:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError('optim.use_8bit_adam needs bitsandbytes: pip install "hybriddit[8bit]"')
    if sharded:
        raise ValueError(
            "optim.use_8bit_adam does not run with FSDP, which shares out the moments by itself: leave it out"
        )


def moment_bytes(parameters: Iterable[nn.Parameter], config) -> int:
    """The bytes of AdamW's two moments of these parameters."""
    if not config.optim.use_8bit_adam:
        return 2 * 4 * sum(p.numel() for p in parameters)
    counts = [p.numel() for p in parameters]
    return 2 * sum(n + 4 * math.ceil(n / BLOCK_8BIT) if n >= SMALLEST_8BIT else 4 * n for n in counts)


def is_gate(name: str) -> bool:
    """Whether the parameter of this full name is a gate."""
    return any(part.startswith("gate") for part in name.split("."))


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, config) -> None:
    """Set both groups' learning rates for `step` (from 0)."""
    for group, rate in zip(optimizer.param_groups, learning_rates(step, config), strict=True):
        group["lr"] = rate


def learning_rates(step: int, config) -> tuple[float, float]:
    """Learning rates of the two groups at `step` (from 0); only the first group warms up."""
    optim = config.optim
    decay = 0.5 * (1 + math.cos(math.pi * step / config.train.steps)) if optim.schedule == "cosine" else 1.0
    warmup = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    return optim.lr * decay * warmup, optim.lr * optim.gate_lr_factor * decay
