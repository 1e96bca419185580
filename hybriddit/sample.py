"""`hybriddit sample`: write many images of a SiTPipeline to an npz file, for an evaluation.

arr_0: uint8 [N, H, W, 3] (grey images as three equal channels); arr_1: the labels. A JSON file beside it says how they
were made.

Label and noise of image i depend on the settings alone; the noise is drawn by a generator seeded with seed + i. The
processes divide the work in parts of 256 images, so that with the same batch size the bytes are the same for any number
of processes on one kind of machine. Another batch size changes the rounding, and the steps that dopri5 chooses. A run
that was killed continues from the parts that exist.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers.utils.logging import disable_progress_bar
from tqdm import tqdm

from .files import checksum, make_folder, read_json, read_tensors, replacing, write_json, write_tensors
from .machine import running_versions
from .metrics.processes import process_group
from .pipelines.loading import load_sit_pipeline
from .pipelines.sit import SiTPipeline

PART = 256  # images per file; a kill loses at most this many in each process
SAMPLER_OPTIONS = ("atol", "rtol", "diffusion", "diffusion_norm", "last_step", "last_step_size")


@dataclass(frozen=True)
class SampleSettings:
    """What to sample; the fields are named like the command's options.

    model: folder or repository of a SiTPipeline. out: the npz file. batch_size: images at a time in each process.
    class_balanced: every class in turn; else labels are drawn at random. The others are SiTPipeline's arguments; None
    is the sampler's default.
    """

    model: str
    out: Path
    num: int = 50000
    class_balanced: bool = False
    batch_size: int = 32
    sampler: str = "sde-euler"
    steps: int = 250
    shift: float = 1.0
    guidance: float = 1.0
    guidance_channels: int | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    atol: float | None = None
    rtol: float | None = None
    diffusion: str | None = None
    diffusion_norm: float | None = None
    last_step: str | None = None
    last_step_size: float | None = None
    seed: int = 0
    dtype: str = "float32"
    quiet: bool = False

    @property
    def sampler_options(self) -> dict[str, Any]:
        """The sampler's options that are set."""
        return {name: value for name in SAMPLER_OPTIONS if (value := getattr(self, name)) is not None}


def run(settings: SampleSettings) -> None:
    """Sample, in one process or in each of torchrun's. Raises ValueError or OSError, in one line."""
    with process_group() as (rank, distributed, device):
        check(settings)
        if settings.quiet or rank > 0:
            disable_progress_bar()
        pipeline = load_sit_pipeline(settings.model, getattr(torch, settings.dtype)).to(device)
        pipeline.set_progress_bar_config(disable=True)
        record = describe(settings, pipeline)
        labels = make_labels(
            settings.num, pipeline.transformer.config.num_classes, settings.class_balanced, settings.seed
        )
        folder = settings.out.with_name(f"{settings.out.name}.parts")
        world = dist.get_world_size() if distributed else 1
        todo = missing_parts(settings.out, folder, record, rank, distributed)
        if todo is None:
            if rank == 0:
                print(f"{settings.out} is there already, made with these settings")
            return
        images = sum(len(rows(part, settings.num)) for part in todo)
        with tqdm(total=images, unit="image", disable=settings.quiet or rank > 0) as bar:
            for part in todo[rank::world]:
                made = []
                indices = rows(part, settings.num)
                for start in range(0, len(indices), settings.batch_size):
                    batch = indices[start : start + settings.batch_size]
                    made.append(sample(pipeline, batch, labels, settings))
                    bar.update(min(len(batch) * world, images - bar.n))  # estimate for all processes
                with replacing(part_path(folder, part)) as partial:
                    write_tensors(partial, {"images": torch.cat(made), "labels": labels[indices.start : indices.stop]})
        if distributed:
            dist.barrier()
        if rank == 0:
            made_by = {"batch_size": settings.batch_size, "processes": world}
            write_result(settings.out, folder, record, made_by)
            if not settings.quiet:
                print(f"{settings.num} images saved to {settings.out}")


def missing_parts(out: Path, folder: Path, record: dict[str, Any], rank: int, distributed: bool) -> list[int] | None:
    """Call `prepare` in the first process, and return its result in all; if it fails, the others exit silently."""
    if not distributed:
        return prepare(out, folder, record)
    found = [None, None]
    if rank == 0:
        try:
            found = [prepare(out, folder, record), None]
        except (ValueError, OSError) as error:
            found = [None, str(error)]
    dist.broadcast_object_list(found)
    todo, error = found
    if error is not None:
        if rank == 0:
            raise ValueError(error)
        sys.exit(1)
    return todo


def check(settings: SampleSettings) -> None:
    """Raise ValueError for settings that are wrong for any model; make the folder of the output."""
    for name in ("num", "batch_size", "steps"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(settings, name)}")
    if settings.out.suffix != ".npz":
        raise ValueError(f"{settings.out} must end in .npz")
    if not 0 <= settings.seed < 2**32 - settings.num:  # torch's CPU generator uses 32 bits of a seed
        raise ValueError(f"--seed must be from 0 to 2**32 - num, not {settings.seed}")
    if settings.out.is_dir():
        raise ValueError(f"{settings.out} is a folder: give a file")
    make_folder(settings.out.parent)


def describe(settings: SampleSettings, pipeline: SiTPipeline) -> dict[str, Any]:
    """All that the images depend on, and nothing else; it is kept in the JSON file."""
    vae = pipeline.vae
    return {
        "model": settings.model,
        "transformer_sha256": checksum(_on_cpu(pipeline.transformer)),
        "weights": pipeline.config.weights,
        "path": pipeline.config.path,
        "prediction": pipeline.config.prediction,
        "vae": None if vae is None else {"scaling_factor": vae.config.scaling_factor, "sha256": checksum(_on_cpu(vae))},
        "num": settings.num,
        "classes": pipeline.transformer.config.num_classes,
        "labels": "class-balanced" if settings.class_balanced else "random",
        "seed": settings.seed,
        "sampler": settings.sampler,
        "steps": None if settings.sampler == "dopri5" else settings.steps,
        "sampler_options": settings.sampler_options,
        "shift": settings.shift,
        "guidance": settings.guidance,
        "guidance_channels": settings.guidance_channels,
        "guidance_interval": list(settings.guidance_interval),
        "dtype": settings.dtype,
        "versions": running_versions(),
    }


def make_labels(num: int, classes: int, balanced: bool, seed: int) -> torch.Tensor:
    """Labels, int64 [num]: every class in turn, so that parts do not hold one class only; or drawn at random."""
    if balanced:
        return torch.arange(num) % classes
    return torch.randint(classes, (num,), generator=torch.Generator().manual_seed(seed))


def rows(part: int, num: int) -> range:
    """The indices of a part's images."""
    return range(part * PART, min((part + 1) * PART, num))


def part_path(folder: Path, part: int) -> Path:
    """The file that holds a part until all are made."""
    return folder / f"part-{part:05d}.safetensors"


def sample(pipeline: SiTPipeline, indices: range, labels: torch.Tensor, settings: SampleSettings) -> torch.Tensor:
    """Sample the images of these indices, uint8 [B, H, W, 3]."""
    images = pipeline(
        labels[indices.start : indices.stop],
        guidance_scale=settings.guidance,
        generator=[torch.Generator().manual_seed(settings.seed + index) for index in indices],
        num_inference_steps=settings.steps,
        sampler=settings.sampler,
        sampler_options=settings.sampler_options,
        shift=settings.shift,
        guidance_channels=settings.guidance_channels,
        guidance_interval=tuple(settings.guidance_interval),
    ).images
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))


def prepare(out: Path, folder: Path, record: dict[str, Any]) -> list[int] | None:
    """The parts that are still to be made; None if the result exists. A damaged part is made again.

    Raises ValueError if existing parts or results were made with other settings.
    """
    if out.exists():
        found = out.with_suffix(".json")
        compare(read_json(found) if found.is_file() else {}, record, out)
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed after writing the result
        return None
    folder.mkdir(exist_ok=True)
    kept = folder / "settings.json"
    if any(folder.glob("part-*")):
        compare(read_json(kept) if kept.is_file() else {}, record, folder)
    else:  # settings of a run that made no part, perhaps because they were wrong, may be replaced
        write_json(kept, record)
    for left in folder.glob(".*.tmp"):  # of a killed process
        left.unlink()
    missing = []
    for part in range(-(-record["num"] // PART)):
        path = part_path(folder, part)
        try:
            intact = path.is_file() and len(read_tensors(path)["images"]) == len(rows(part, record["num"]))
        except (ValueError, KeyError):
            intact = False
            print(f"{path} is damaged, and is made again", file=sys.stderr)
        if not intact:
            missing.append(part)
    return missing


def compare(found: dict[str, Any], record: dict[str, Any], where: Path) -> None:
    """Raise ValueError, naming the first difference, if `where` was made with other settings than `record`.

    The model may have moved: the digests of its weights tell which one it is.
    """
    for name, value in record.items():
        if name != "model" and (name not in found or found[name] != value):
            raise ValueError(
                f"{where} was made with {name} {found.get(name)}, not {value}: give another --out, or delete it"
            )


def write_result(out: Path, folder: Path, record: dict[str, Any], made_by: dict[str, Any]) -> None:
    """Write the npz part by part, as 50,000 images of 256 x 256 pixels take 10 GB, and remove the parts."""
    parts = [part_path(folder, part) for part in range(-(-record["num"] // PART))]
    shape = (record["num"], *read_tensors(parts[0])["images"].shape[1:])
    labels = []
    with replacing(out) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)
            for path in parts:
                tensors = read_tensors(path)
                entry.write(tensors["images"].numpy().tobytes())
                labels.append(tensors["labels"])
        with file.open("arr_1.npy", "w") as entry:
            np.lib.format.write_array(entry, torch.cat(labels).numpy(), allow_pickle=False)
        # before the npz gets its name, because a result without its settings would never be recognised
        counts = torch.bincount(torch.cat(labels), minlength=record["classes"])
        of_class = {"smallest": int(counts.min()), "largest": int(counts.max())}
        write_json(out.with_suffix(".json"), {**record, "images_of_a_class": of_class, **made_by})
    shutil.rmtree(folder)


def _on_cpu(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}
