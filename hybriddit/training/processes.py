"""What a run needs before it starts: accelerate's processes, of a kind that works, and a folder no other run uses."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, str_to_bool

from ..files import make_folder
from ..machine import device_of_this_machine
from .checkpoint import checkpoints, read_state
from .run_config import DistillConfig


def make_accelerator(config) -> Accelerator:
    """Make the Accelerator that `accelerate launch` has configured, with the run's precision and tracker.

    Raises as `check_launcher`.
    """
    check_launcher(config)
    later = isinstance(config, DistillConfig) and config.loss.progressive_steps > 0
    return Accelerator(
        mixed_precision=config.train.precision,
        log_with=config.output.tracker if config.output.folder else None,
        project_dir=config.output.folder,
        kwargs_handlers=[
            # the processes wait for each other while they make images: the first to be done may wait for long
            InitProcessGroupKwargs(timeout=timedelta(days=2)),
            # layers that are converted later take no part in a step at first
            DistributedDataParallelKwargs(find_unused_parameters=later),
        ],
    )


def check_launcher(config) -> None:
    """Raise NotImplementedError or ValueError for settings of `accelerate launch` that the loop would not follow.

    They are in the environment. What accelerate itself refuses it does in other words, or asks for packages first.
    """

    def given(name: str, *ignored: str) -> str | None:
        value = os.environ.get(name, "").lower()
        return None if value in ("", *ignored) else value

    for kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        if str_to_bool(os.environ.get(f"ACCELERATE_USE_{kind.value}") or "false"):
            raise _unsupported(kind.value)
    if str_to_bool(os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") or "false"):
        raise _unsupported("accelerate's parallelism_config")
    if str_to_bool(os.environ.get("ACCELERATE_USE_FSDP") or "false") and given("FSDP_VERSION") == "1":
        raise _first_fsdp()
    if given("ACCELERATE_DYNAMO_BACKEND", "no"):
        raise NotImplementedError("take train.compile=true in place of accelerate's dynamo_backend")
    if given("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"):
        raise NotImplementedError("take train.accumulation in place of accelerate's gradient_accumulation_steps")
    joined = device_of_this_machine().type != "cpu" or str_to_bool(os.environ.get("ACCELERATE_USE_CPU") or "false")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not joined:  # accelerate has to be told, and torchrun does not
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were launched, and without a GPU accelerate makes each of them a run "
            "of its own: set ACCELERATE_USE_CPU=true, or start one"
        )
    precision = given("ACCELERATE_MIXED_PRECISION", "no", config.train.precision)
    if precision:
        raise ValueError(
            f"accelerate's mixed_precision is {precision}, train.precision {config.train.precision}: give accelerate 'no', "
            "or train.precision the same (it takes no and bf16)"
        )


def check_distribution(accelerator: Accelerator) -> None:
    """Raise NotImplementedError for ways of distributed training that the loop does not support."""
    kind = accelerator.distributed_type
    if kind is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise _first_fsdp()
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise NotImplementedError("take train.gradient_checkpointing=true in place of fsdp_activation_checkpointing")
    by_ddp = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if kind not in by_ddp and not accelerator.is_fsdp2:
        raise _unsupported(kind.value)


def _unsupported(kind: str) -> NotImplementedError:
    return NotImplementedError(f"training runs on one process, by DDP or by FSDP2, not by {kind}")


def _first_fsdp() -> NotImplementedError:
    return NotImplementedError("training shards by FSDP2: give accelerate --fsdp_version 2")


def check_processes(config, processes: int) -> None:
    """Raise ValueError if a step's samples cannot be divided evenly among processes and accumulation steps."""
    count, accumulation = config.train.batch_size, config.train.accumulation
    if count % (processes * accumulation):
        raise ValueError(
            f"train.batch_size {count} does not divide into {processes} processes x {accumulation} accumulation steps"
        )


def claim_folder(folder: Path, result: str, settings: dict, usual: dict, steps: int, resume: bool) -> None:
    """Make the run's folder.

    settings, usual: see `read_state`. steps: that the run is to have at its end. Raises ValueError if a new run would
    overwrite another, if there is none to resume, or if that has more steps already.
    """
    found = checkpoints(folder / "checkpoints")
    if resume and not found:
        raise ValueError(f"nothing to resume: no checkpoint in {folder / 'checkpoints'}")
    if resume:
        done = read_state(found[-1], settings, usual)["step"]
        if done > steps:
            raise ValueError(
                f"train.steps is {steps}, and {found[-1]} has {done} already: give it {done} or more, or start anew in "
                "another output.folder"
            )
    if found and not resume:
        raise ValueError(
            f"{folder} holds a run already (up to {found[-1].name}): pass --resume, or another output.folder"
        )
    if not found and (folder / result).exists():
        raise ValueError(f"{folder} holds a run's {result} already, and no checkpoint: give another output.folder")
    make_folder(folder)
