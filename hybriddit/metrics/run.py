"""What `hybriddit evaluate` does, in one process or in each of torchrun's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..files import write_json
from ..machine import device_of_this_machine, gpu_name
from .adm import evaluate, read_reference
from .images import read_images
from .inception import find_inception, load_inception


def run(
    samples: Path,
    reference: Path,
    *,
    inception: Path | None = None,
    batch_size: int = 64,
    shuffle: int | None = None,
    settings: Path | None = None,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """The report of `evaluate` with Inception's features, written to `out` if given; None in all processes but the first.

    settings: a JSON file; without one the samples' own, of their name but ending in .json, where it is there. What
    can be wrong with the files is found before the first image is looked at.
    """
    made = read_settings(settings, samples)
    if out is not None:
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a folder: give a file for the scores")
        out.parent.mkdir(parents=True, exist_ok=True)
    inception = find_inception(inception)
    read_images(samples, check=False)
    read_reference(reference, check=False)
    with processes() as (rank, distributed, device):
        extractor = load_inception(inception, device)
        options = {"batch_size": batch_size, "shuffle": shuffle, "distributed": distributed, "progress": progress}
        report = evaluate(samples, reference, extractor, settings=made, **options)
    if rank:
        return None
    report["device"] = gpu_name(device) or device.type
    if out is not None:
        try:
            write_json(out, report)
        except OSError as error:  # a full disk must not cost what took minutes
            raise OSError(f"could not write {out} ({error}); the scores are {json.dumps(report['metrics'])}") from error
    return report


def scores_text(report: dict[str, Any], out: Path | None) -> str:
    """The scores of a report for a terminal, one a line, and the file `out` that they were saved to, if any."""
    lines = [f"{name:15}  {value:.4f}" for name, value in report["metrics"].items()]
    return "\n".join([*lines, f"saved to {out}"] if out else lines)


def read_settings(path: Path | None, samples: Path) -> dict[str, Any]:
    if path is None:
        path = samples.with_suffix(".json")
        if not path.is_file():
            return {}
    elif not path.is_file():
        raise FileNotFoundError(f"no settings file at {path}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(settings).__name__}")
    return settings


@contextmanager
def processes() -> Iterator[tuple[int, bool, torch.device]]:
    """Rank, whether there are others, and this one's device; under torchrun, the process group too."""
    gpu = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, False, device_of_this_machine()
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield dist.get_rank(), True, device
    finally:
        dist.destroy_process_group()
