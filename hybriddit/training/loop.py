"""What the two training loops share: how a run is claimed, stopped, ordered, stepped and watched."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import is_wandb_available
from torch import nn

from .checkpoint import checkpoints, read_state


def make_accelerator(config) -> Accelerator:
    """accelerate as `accelerate launch` set it up, with the run's precision and its tracker.

    Raises ModuleNotFoundError where the tracker is not installed.
    """
    tracker = config.output.tracker if config.output.folder else None
    if tracker == "wandb" and not is_wandb_available():
        raise ModuleNotFoundError("output.tracker is wandb, which is not installed: pip install wandb")
    return Accelerator(
        mixed_precision=config.train.precision,
        log_with=tracker,
        project_dir=config.output.folder,
        # the first process may be making images for hours while the others wait
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))],
    )


def check_processes(config, processes: int) -> None:
    """Raise ValueError where a step's samples cannot be shared out evenly."""
    count, accumulation = config.train.batch_size, config.train.accumulation
    if count % (processes * accumulation):
        raise ValueError(
            f"train.batch_size {count} does not divide into {processes} processes x {accumulation} accumulation steps"
        )


def claim_run(folder: Path, settings: dict, result: str, resume: bool) -> None:
    """ValueError where there is nothing to resume with these settings, or something that a new run would write over.

    result: the name in `folder` of what a run is for, "adapter" or "pipeline".
    """
    found = checkpoints(folder / "checkpoints")
    if resume and not found:
        raise ValueError(f"nothing to resume: no checkpoint in {folder / 'checkpoints'}")
    if resume:
        read_state(found[-1], settings)
    if found and not resume:
        raise ValueError(
            f"{folder} holds a run already (up to {found[-1].name}): pass --resume, or another output.folder"
        )
    if not found and (folder / result).exists():
        raise ValueError(f"{folder} holds a run's {result} already, and no checkpoint: give another output.folder")
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that holds SIGINT or SIGTERM once it has come; the next one does what it always does.

    Signals can be caught in the main thread alone: elsewhere the list stays empty.
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, frame) -> None:
        stopped.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield stopped
    finally:
        restore()


def make_optimizer(trained: dict[str, nn.Parameter], config, *, fused: bool = False) -> torch.optim.Optimizer:
    """AdamW over two groups: everything else, and the gates, which may have a rate of their own."""
    gates = [p for name, p in trained.items() if is_gate(name)]
    others = [p for name, p in trained.items() if not is_gate(name)]
    groups = [{"params": others, "weight_decay": config.optim.weight_decay}, {"params": gates, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.optim.lr, fused=fused, foreach=not fused)


def is_gate(name: str) -> bool:
    """Whether a parameter's full name is a gate's."""
    return any(part.startswith("gate") for part in name.split("."))


def learning_rates(step: int, config) -> tuple[float, float]:
    """Rates of the two groups at `step` (from 0): warm-up is for the first alone."""
    optim = config.optim
    decay = 0.5 * (1 + math.cos(math.pi * step / config.train.steps)) if optim.schedule == "cosine" else 1.0
    warmup = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    return optim.lr * decay * warmup, optim.lr * optim.gate_lr_factor * decay


def epoch_order(count: int, seed: int, start: int, length: int) -> list[int]:
    """Positions start, ..., start + length - 1 of an endless stream of shuffled epochs over `count` items."""
    positions = range(start, start + length)
    return [_permutation(count, seed, position // count)[position % count] for position in positions]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def mean_metrics(names: Sequence[str], values: torch.Tensor, done: int) -> dict[str, float]:
    """Mean over the last steps of their metrics [steps, metrics]; FloatingPointError if one was not finite."""
    bad = (~values.isfinite()).any(dim=1).nonzero()
    if len(bad):
        step = done - len(values) + int(bad[0]) + 1
        shown = ", ".join(
            f"{name} {value:.4g}" for name, value in zip(names, values[int(bad[0])].tolist(), strict=True)
        )
        raise FloatingPointError(f"training stopped: not finite at step {step} ({shown}); earlier checkpoints are kept")
    return dict(zip(names, values.mean(dim=0).tolist(), strict=True))
