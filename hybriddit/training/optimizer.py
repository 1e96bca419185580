"""AdamW with a separate parameter group for the gates, and the learning rates of both groups."""

from __future__ import annotations

import math

import torch
from torch import nn


def make_optimizer(trained: dict[str, nn.Parameter], config, *, fused: bool = False) -> torch.optim.Optimizer:
    """AdamW with two groups: the gates, which have their own rate and no weight decay, after all other weights."""
    gates = [p for name, p in trained.items() if is_gate(name)]
    others = [p for name, p in trained.items() if not is_gate(name)]
    groups = [{"params": others, "weight_decay": config.optim.weight_decay}, {"params": gates, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.optim.lr, fused=fused, foreach=not fused)


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
