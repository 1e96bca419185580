"""Where a run starts: accelerate's processes, and a folder that no other run has."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, is_wandb_available, str_to_bool

from ..files import make_folder
from .checkpoint import checkpoints, read_state


def start_run(config, result: str, settings: dict, *, resume: bool) -> Accelerator:
    """Set up the processes and claim `config.output.folder`, if one is given, before anything is loaded.

    result: the name in the folder of what the run is for, "adapter" or "pipeline". settings: what must not change
    between a checkpoint and its continuation. Raises ValueError, NotImplementedError or ModuleNotFoundError, in one
    line, for settings, launchers and folders that cannot work.
    """
    accelerator = make_accelerator(config)
    check_distribution(accelerator)
    check_processes(config, accelerator.num_processes)
    if config.output.folder:
        claim_folder(Path(config.output.folder), result, settings, resume)
    return accelerator


def make_accelerator(config) -> Accelerator:
    """Accelerate as `accelerate launch` set it up, with the run's precision and tracker.

    Raises ModuleNotFoundError where the tracker is not installed, and NotImplementedError for DeepSpeed.
    """
    if str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")):  # accelerate would ask for its package first
        raise _unsupported(DistributedType.DEEPSPEED)
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


def check_distribution(accelerator: Accelerator) -> None:
    """Raise NotImplementedError for ways of distributing that the loop does not support."""
    kind = accelerator.distributed_type
    if kind is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise NotImplementedError("training shards by FSDP2: give accelerate --fsdp_version 2")
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise NotImplementedError("take train.gradient_checkpointing=true in place of fsdp_activation_checkpointing")
    by_ddp = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if kind not in by_ddp and not accelerator.is_fsdp2:
        raise _unsupported(kind)


def _unsupported(kind: DistributedType) -> NotImplementedError:
    return NotImplementedError(f"training runs on one process, by DDP or by FSDP2, not by {kind.value}")


def check_processes(config, processes: int) -> None:
    """Raise ValueError where a step's samples cannot be divided evenly."""
    count, accumulation = config.train.batch_size, config.train.accumulation
    if count % (processes * accumulation):
        raise ValueError(
            f"train.batch_size {count} does not divide into {processes} processes x {accumulation} accumulation steps"
        )


def claim_folder(folder: Path, result: str, settings: dict, resume: bool) -> None:
    """Make the run's folder. Raises ValueError where a new run would overwrite another, or none can be resumed."""
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
    make_folder(folder)
