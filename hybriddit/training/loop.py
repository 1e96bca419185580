"""What the two training loops share: how a run is claimed, begun, stopped, ordered, stepped and watched."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import is_wandb_available
from diffusers.training_utils import EMAModel
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from ..files import replacing
from .checkpoint import checkpoints, load_checkpoint, read_state
from .config import to_dict


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


def begin(
    folder: Path | None,
    config,
    settings: dict,
    trained: dict[str, nn.Parameter],
    average: EMAModel,
    optimizer: torch.optim.Optimizer,
    *,
    resume: bool,
    writes: bool,
    rename: Callable[[dict], dict] = dict,
) -> int:
    """The step to start from: that of the newest checkpoint, which is loaded, or 0, with the config written down.

    writes: whether this process is the one that writes in `folder`. rename: see `load_checkpoint`.
    """
    if resume:
        newest = checkpoints(folder / "checkpoints")[-1]
        average.optimization_step = load_checkpoint(
            newest, trained, average.shadow_params, optimizer, settings, rename=rename
        )
        return average.optimization_step
    if writes:
        with replacing(folder / "config.yaml") as partial:
            OmegaConf.save(OmegaConf.create(to_dict(config)), partial)
    return 0


def progress_bar(name: str, first: int, config, accelerator: Accelerator) -> tqdm:
    """Of the run's steps, in the first process."""
    shown = config.train.progress and accelerator.is_main_process
    return tqdm(initial=first, total=config.train.steps, desc=name, unit="step", disable=not shown)


def due_after(done: int, config, **every: int) -> dict[str, bool]:
    """Whether to log, to write a checkpoint, to sample, and what else happens `every` so many steps, after `done` steps.

    All that happens at all happens after the last one.
    """
    every |= {name: getattr(config.output, f"{name}_every") for name in ("log", "checkpoint", "sample")}
    return {name: n > 0 and (done % n == 0 or done == config.train.steps) for name, n in every.items()}


@contextmanager
def averaged(model: nn.Module, average: EMAModel, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within it, the parameters of `model` are their averages."""
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what it gathered for a call without gradients, it would use in the next step


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
