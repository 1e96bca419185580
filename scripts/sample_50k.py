"""Sample a SiTPipeline for evaluation: images to the npz that `hybriddit evaluate` and the ADM suite read.

    python scripts/sample_50k.py outputs/pipeline --num 50000 --class-balanced --sampler sde-euler --out samples.npz
    torchrun --nproc-per-node 8 scripts/sample_50k.py ...    (the same, shared out)

arr_0: uint8 [N, H, W, 3] (grey images three times); arr_1: the labels. samples.json beside it says how they were made.

Image i is of a label, and of noise from a generator seeded seed + i, that depend on nothing but the settings. Processes
share out parts of 256 images, so that with one batch size the bytes are the same for any number of processes on one kind of
machine; other batch sizes change the rounding, and the steps that dopri5 chooses. Killed, it goes on with the parts that
it has.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.distributed as dist
from diffusers.utils.logging import disable_progress_bar
from tqdm import tqdm

from hybriddit import SiTPipeline, __version__
from hybriddit.files import checksum, read_json, read_tensors, replacing, write_tensors
from hybriddit.metrics.run import processes
from hybriddit.pipelines.loading import load_sit_pipeline
from hybriddit.pipelines.sit import SAMPLERS

PART = 256  # images in a file; a kill loses at most this many of each process
OPTIONS = ("atol", "rtol", "diffusion", "diffusion_norm", "last_step", "last_step_size")


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    try:
        with processes() as (rank, distributed, device):
            run(options, rank, distributed, device)
    except (ValueError, OSError) as error:
        print(f"sample_50k: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub repository of a SiTPipeline")
    parser.add_argument("--out", type=Path, required=True, help="npz file")
    parser.add_argument("--num", type=int, default=50000, help="images (default: %(default)s)")
    balance = parser.add_mutually_exclusive_group(required=True)
    balance.add_argument("--class-balanced", action="store_true", help="every class in turn")
    balance.add_argument("--random", action="store_true", help="labels drawn at random, as SiT's and DiT's authors did")
    parser.add_argument("--batch-size", type=int, default=32, help="of each process (default: %(default)s)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="sde-euler", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=250, help="(default: %(default)s)")
    parser.add_argument("--shift", type=float, default=1.0, help="of times, towards noise (default: none)")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale (default: 1, none)")
    parser.add_argument("--guidance-channels", type=int, help="guide the first ones only; published numbers: 3")
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"))
    for name in ("atol", "rtol"):
        parser.add_argument(f"--{name}", type=float, help="of dopri5")
    parser.add_argument("--diffusion", help="of an SDE, as sample_sde's (default: sigma)")
    parser.add_argument("--diffusion-norm", type=float)
    parser.add_argument("--last-step", help="of an SDE: mean, euler or tweedie (default: mean)")
    parser.add_argument("--last-step-size", type=float, help="(default: 0.04)")
    parser.add_argument("--seed", type=int, default=0, help="image i is of seed + i (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def run(options: argparse.Namespace, rank: int, distributed: bool, device: torch.device) -> None:
    check(options)
    if options.quiet or rank > 0:
        disable_progress_bar()
    pipeline = load_sit_pipeline(options.model, getattr(torch, options.dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    settings = describe(options, pipeline)
    labels = make_labels(options.num, pipeline.transformer.config.num_classes, options.class_balanced, options.seed)
    folder = options.out.with_name(f"{options.out.name}.parts")
    world = dist.get_world_size() if distributed else 1
    todo = missing_parts(options.out, folder, settings, rank, distributed)
    if todo is None:
        if rank == 0:
            print(f"{options.out} is there already, made with these settings")
        return
    images = sum(len(rows(part, options.num)) for part in todo)
    with tqdm(total=images, unit="image", disable=options.quiet or rank > 0) as bar:
        for part in todo[rank::world]:
            made = []
            indices = rows(part, options.num)
            for start in range(0, len(indices), options.batch_size):
                batch = indices[start : start + options.batch_size]
                made.append(sample(pipeline, batch, labels, options))
                bar.update(min(len(batch) * world, images - bar.n))  # the others are about as fast
            with replacing(part_path(folder, part)) as partial:
                write_tensors(partial, {"images": torch.cat(made), "labels": labels[indices.start : indices.stop]})
    if distributed:
        dist.barrier()
    if rank == 0:
        write_result(options.out, folder, settings, {"batch_size": options.batch_size, "processes": world})
        if not options.quiet:
            print(f"{options.num} images saved to {options.out}")


def missing_parts(out: Path, folder: Path, settings: dict[str, Any], rank: int, distributed: bool) -> list[int] | None:
    """`prepare`'s, by the first process for all; the others end quietly where it finds a mistake."""
    if not distributed:
        return prepare(out, folder, settings)
    found = [None, None]
    if rank == 0:
        try:
            found = [prepare(out, folder, settings), None]
        except (ValueError, OSError) as error:
            found = [None, str(error)]
    dist.broadcast_object_list(found)
    todo, error = found
    if error is not None:
        if rank == 0:
            raise ValueError(error)
        sys.exit(1)
    return todo


def check(options: argparse.Namespace) -> None:
    """What needs no model to be told wrong."""
    for name in ("num", "batch_size", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(options, name)}")
    if options.out.suffix != ".npz":
        raise ValueError(f"{options.out} must end in .npz")
    if not 0 <= options.seed < 2**32 - options.num:
        raise ValueError(
            f"--seed must be from 0 to 2**32 - num, not {options.seed}"
        )  # what a CPU's generator tells apart
    if options.out.is_dir():
        raise ValueError(f"{options.out} is a folder: give a file")
    options.out.parent.mkdir(parents=True, exist_ok=True)


def describe(options: argparse.Namespace, pipeline: SiTPipeline) -> dict[str, Any]:
    """All that the images depend on, and nothing else."""
    vae = pipeline.vae
    return {
        "model": options.model,
        "transformer_sha256": checksum(_on_cpu(pipeline.transformer)),
        "weights": pipeline.config.weights,
        "path": pipeline.config.path,
        "prediction": pipeline.config.prediction,
        "vae": None if vae is None else {"scaling_factor": vae.config.scaling_factor, "sha256": checksum(_on_cpu(vae))},
        "num": options.num,
        "classes": pipeline.transformer.config.num_classes,
        "labels": "class-balanced" if options.class_balanced else "random",
        "seed": options.seed,
        "sampler": options.sampler,
        "steps": None if options.sampler == "dopri5" else options.steps,
        "sampler_options": sampler_options(options),
        "shift": options.shift,
        "guidance": options.guidance,
        "guidance_channels": options.guidance_channels,
        "guidance_interval": list(options.guidance_interval),
        "dtype": options.dtype,
        "versions": {
            "hybriddit": __version__,
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
        },
    }


def sampler_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}


def make_labels(num: int, classes: int, balanced: bool, seed: int) -> torch.Tensor:
    """[num]: each class in turn, so that no part is of one class; or at random."""
    if balanced:
        return torch.arange(num) % classes
    return torch.randint(classes, (num,), generator=torch.Generator().manual_seed(seed))


def rows(part: int, num: int) -> range:
    return range(part * PART, min((part + 1) * PART, num))


def part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.safetensors"


def sample(pipeline: SiTPipeline, indices: range, labels: torch.Tensor, options: argparse.Namespace) -> torch.Tensor:
    """uint8 [B, H, W, 3] of these rows."""
    images = pipeline(
        labels[indices.start : indices.stop],
        guidance_scale=options.guidance,
        generator=[torch.Generator().manual_seed(options.seed + index) for index in indices],
        num_inference_steps=options.steps,
        sampler=options.sampler,
        sampler_options=sampler_options(options),
        shift=options.shift,
        guidance_channels=options.guidance_channels,
        guidance_interval=tuple(options.guidance_interval),
    ).images
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))


def prepare(out: Path, folder: Path, settings: dict[str, Any]) -> list[int] | None:
    """The parts that are still to be made; None where the result is there.

    Raises ValueError where what is there was made with other settings. A damaged part is made again.
    """
    if out.exists():
        found = out.with_suffix(".json")
        compare(read_json(found) if found.is_file() else {}, settings, out)
        shutil.rmtree(folder, ignore_errors=True)  # of a run killed between the result and this
        return None
    folder.mkdir(exist_ok=True)
    kept = folder / "settings.json"
    if any(folder.glob("part-*")):
        compare(read_json(kept) if kept.is_file() else {}, settings, folder)
    else:  # a run that made nothing, of settings that were wrong perhaps, binds none after it
        write_json(kept, settings)
    for left in folder.glob(".*.tmp"):  # of a process that was killed
        left.unlink()
    missing = []
    for part in range(-(-settings["num"] // PART)):
        path = part_path(folder, part)
        try:
            intact = path.is_file() and len(read_tensors(path)["images"]) == len(rows(part, settings["num"]))
        except (ValueError, KeyError):
            intact = False
            print(f"{path} is damaged, and is made again", file=sys.stderr)
        if not intact:
            missing.append(part)
    return missing


def compare(found: dict[str, Any], settings: dict[str, Any], where: Path) -> None:
    for name, value in settings.items():
        if name not in found or found[name] != value:
            raise ValueError(
                f"{where} was made with {name} {found.get(name)}, not {value}: give another --out, or delete it"
            )


def write_json(path: Path, values: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_result(out: Path, folder: Path, settings: dict[str, Any], made: dict[str, Any]) -> None:
    """The npz, part by part: 50,000 images of 256 pixels are 10 GB. Then the parts go."""
    parts = [part_path(folder, part) for part in range(-(-settings["num"] // PART))]
    shape = (settings["num"], *read_tensors(parts[0])["images"].shape[1:])
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
        # before the npz: a result without its settings would never be recognised
        counts = torch.bincount(torch.cat(labels), minlength=settings["classes"])
        of_class = {"smallest": int(counts.min()), "largest": int(counts.max())}
        write_json(out.with_suffix(".json"), {**settings, "images_of_a_class": of_class, **made})
    shutil.rmtree(folder)


def _on_cpu(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    sys.exit(main())
