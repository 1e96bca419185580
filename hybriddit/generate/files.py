"""What the command `generate` does: load a pipeline, and save each image with its record as soon as it is made."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import remove_left
from ..images import open_image, read_record
from ..machine import check_offload, find_device
from ..stored import check_any_base
from ..strips_file import STRIP_ENDINGS, add_preview, check_strips_file, preview_path, save_image, write_strips
from .cascade import (
    StageSettings,
    find_schedule,
    make_in_stages,
    plan_cascade,
    stage_paths,
    stages_there,
    told_to_delete,
)
from .images import (
    NoEffectWarning,
    Task,
    check_inputs,
    check_settings,
    family_of_pipeline,
    for_task,
    image_count,
    make,
    make_strips,
    plan,
)

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

    from ..attention.rates import Rates
    from ..config import HybridConfig
    from ..pipelines.cascade import Schedule
    from ..pipelines.loading import Base
    from ..pipelines.memory import MemoryPlan
    from ..pipelines.tiles import Share

LARGE = 2048 * 2048  # pixels from which an image's memory is planned without being asked


def parse_lora(text: str) -> tuple[Path, float]:
    """Read PATH or PATH:WEIGHT of a LoRA file: (path, weight), the weight 1 if it is left out.

    Raises FileNotFoundError for a file that is not there, and ValueError for one that is no safetensors file and for a
    weight that is no finite number.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or "/" in weight or "\\" in weight or weight.endswith(".safetensors") or Path(text).is_file():
        path, weight = text, "1"  # the colon, if there is one, is the path's, as in C:\lora.safetensors
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"the weight of the LoRA {path} must be a number, not {weight!r}")
    if not path.endswith(".safetensors"):
        raise ValueError(f"the LoRA {path} is no .safetensors file, and no other is loaded")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no LoRA file {path}")
    return Path(path), value


def run(
    model: str,
    out: Path,
    *,
    prompt: str | None = None,
    prompts: Path | None = None,
    adapter: str | None = None,
    any_base: bool = False,
    lora: Sequence[str] = (),
    image: Path | None = None,
    mask: Path | None = None,
    variant: str | None = None,
    config: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    offload: str | None = None,
    vae_tiling: bool = False,
    max_memory: float | None = None,
    seed_per_prompt: bool = False,
    parallel: bool = False,
    stages: StageSettings | None = None,
    quiet: bool = False,
    announce: bool = True,
    **settings: Any,
) -> dict[str, Any] | None:
    """Load a pipeline, generate images and save each as a PNG or TIFF file with its record as soon as it is made.

    Images that are large, or whose memory or tiling is asked for, are written while they are decoded. Beside
    each image with a side above 4096 pixels comes a small copy, see `strips_file.write_strips`.

    model, variant, config: see `pipelines.loading.find_base`. prompts: a file, see `data.prompts.read_prompts`.
    adapter: a folder or repository. any_base: take an adapter that was distilled from other weights. lora: of each LoRA
    file PATH or PATH:WEIGHT. image, mask: files. device: see
    `machine.find_device`. dtype: such as "float16"; None is bfloat16 on a GPU and float32 on a CPU. offload: see
    `pipelines.prepare.place`. vae_tiling: decode in tiles. max_memory: GiB that an image may take on the device besides
    the weights, of each process; None is what is free there, for large images. seed_per_prompt, settings: those of `generate`.
    quiet: no progress bars, and no notes on stderr. announce: print each file saved.

    With prompts from a file, each of several processes (torchrun, accelerate launch) makes its share: together they
    make the files that one would. Images that are there, made with the same settings and weights, are kept.
    parallel: all processes make each image together, see `parallel.shard`; the first one writes it.
    stages: make each image in stages, from a prompt or from another image; see `cascade.make_in_stages`. Stages that are
    there, made with the same settings and weights, are not made again.

    Returns {"files", "seeds", "kept": how many were there, "seconds" of generating, "notes"} of this process, or
    None of one that has made its rows of images that the first process has written. Raises ValueError or OSError, in one
    line, for wrong arguments, before the model is loaded if possible.
    """
    class_labels, subjects = settings.get("class_labels"), prompt
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if prompts is not None:
        from ..data.prompts import read_prompts

        subjects = read_prompts(prompts, says=announce and rank == 0)
    if prompts is None and processes > 1 and not parallel:
        raise ValueError(
            f"{processes} processes can share the work on prompts from a file (--prompts) alone: start one, or share each "
            "image (--parallel)"
        )
    if parallel and processes == 1:
        raise ValueError("--parallel is for several processes: torchrun --nproc-per-node 2 -m hybriddit generate …")
    if parallel and offload:
        raise ValueError("--parallel needs the weights in place: leave --offload out")
    if prompts is None and seed_per_prompt:
        raise ValueError("--seed-per-prompt is for prompts from a file (--prompts)")
    check_any_base(any_base, adapter)
    named = subjects if class_labels is None else class_labels
    paths = output_paths(out, image_count(() if named is None else named, settings.get("num_images", 1)))
    loras = [parse_lora(text) for text in lora]
    if max_memory is not None and not 0 < max_memory < math.inf:
        raise ValueError(f"--max-memory must be a number of GiB above 0, not {max_memory}")
    source = {"model": model, "variant": variant, "config": config, "adapter": adapter}
    source |= {"lora": [[str(path), weight] for path, weight in loras], "vae_tiling": vae_tiling}
    source |= {"image": image and str(image), "mask": mask and str(mask)}
    enlarged = None
    if stages is not None:
        for name, given in {"--image": image, "--mask": mask}.items():
            if given:
                raise ValueError(f"{name} has no meaning for an image in stages")
        schedule = find_schedule(stages.schedule, stages.strength, stages.steps, stages.enlarged_in)
        if stages.upscaler is not None and schedule.enlarged_in != "pixels":
            raise ValueError(f"--upscaler enlarges pixels, not {schedule.enlarged_in}: leave it or --stage-enlarge out")
        enlarged = open_image(stages.enlarge) if stages.enlarge else None
        size = stages.target(enlarged)
    if enlarged is not None:
        digest = hashlib.sha256(enlarged.tobytes()).hexdigest()
        source |= {"enlarged": str(stages.enlarge), "enlarged_sha256": digest}
    if stages is not None and stages.upscaler is not None:
        if not stages.upscaler.is_file():
            raise FileNotFoundError(f"no upscaler {stages.upscaler}")
        with stages.upscaler.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        source |= {"upscaler": str(stages.upscaler), "upscaler_sha256": digest}
    settings["image"] = open_image(image) if image else None
    settings["mask"] = open_image(mask, "L", "black") if mask else None
    check_settings(subjects, **settings)
    for name, given in {"an adapter": adapter, "a LoRA": lora, "a config": config}.items():
        if class_labels and given:
            raise ValueError(f"{name} has no meaning with a class label: it is for text-to-image pipelines")

    from ..attention.rates import probe_rates  # it imports torch, which takes seconds with diffusers
    from ..models.family import denoiser
    from ..pipelines.loading import load_sit_pipeline, silence_libraries
    from ..pipelines.prepare import place, tile_vae
    from ..pipelines.upscaler import load_upscaler

    if quiet:
        silence_libraries()
    where, notes = find_device(device), []
    check_offload("--offload ", offload, where)
    kind = weights_dtype(dtype, where)
    upscaler = load_upscaler(stages.upscaler, kind) if stages is not None and stages.upscaler else None
    if class_labels:
        pipeline = load_sit_pipeline(model, kind, variant=variant)
    else:
        files = {"variant": variant, "config": config}
        given = {"image": image is not None, "mask": mask is not None}
        pipeline, notes = open_pipeline(model, kind, adapter, any_base, loras, **files, **given)
    if prompts is not None or stages is not None:
        source["weights_sha256"] = _weights_digest(pipeline)
    if vae_tiling:
        tile_vae(pipeline)
    place(pipeline, where, offload)
    pipeline.set_progress_bar_config(disable=quiet or (rank > 0 if parallel else processes > 1))
    cascade = None
    if stages is not None:
        first = settings.get("width"), settings.get("height")
        options = {"first": first, "scale": stages.scale, "positions": stages.positions, "upscaler": upscaler}
        cascade = plan_cascade(pipeline, size, schedule, image=enlarged, **options)
        settings["height"], settings["width"] = (tokens * cascade.unit for tokens in cascade.native)
        for file in (file for path in paths for file in stage_paths(path, len(cascade.stages))):
            if enlarged is not None and file.exists() and file.samefile(stages.enlarge):
                raise ValueError(f"{file} is the image that is enlarged, and would be overwritten: give another --out")
    pipeline, tasks, more = plan_with_notes(pipeline, subjects, seed_per_prompt=seed_per_prompt, **settings)
    notes += more
    tells = not quiet and rank == 0
    rates = cache(lambda: probe_rates(where, kind) if tells and where.type in ("cpu", "cuda") else None)
    planned = partial(
        _plan_memory, pipeline, tasks[0], where, max_memory, processes if parallel else 1, vae_tiling, rates
    )
    if cascade is None:
        memory = [planned(_size(pipeline, tasks[0]))]
    else:
        memory = []
        for number, stage in reversed([*enumerate(cascade.stages)]):  # the largest first: it is what may not fit
            with cascade.positions_of(denoiser(pipeline), number):
                memory.insert(0, planned(cascade.padded(number), stage.schedule))
        cascade = cascade.within(memory)
    if memory[-1] is not None:
        check_strips_file(out, memory[-1].width, memory[-1].height)
    if tells:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        for plan_of_size in memory:
            if plan_of_size is not None:
                print(plan_of_size, file=sys.stderr)

    share = list(zip(paths, tasks, strict=True))[0 if parallel else rank :: 1 if parallel else processes]
    leads = not parallel or rank == 0  # writes what it makes
    if leads:
        written = [file for path, _ in share for file in stage_paths(path, len(memory))]
        remove_left([*written, *map(preview_path, written)])
    with _processes(pipeline, where, parallel) as (of_first, opens, share_tiles):
        is_made = partial(_is_made, refuses=prompts is not None)
        if cascade is not None:
            there = of_first([stages_there(cascade, task, path, source, is_made) for path, task in share])
        else:
            there = of_first([prompts is not None and is_made(path, {**source, **task.record}) for path, task in share])
        kept = sum(number == len(memory) for number in there)
        if kept and announce and leads:
            print(f"{kept} of {len(share)} images are there already, made with these settings: they are kept")
        started = time.monotonic()
        for (path, task), number in zip(share, there, strict=True):
            if number and leads:
                with told_to_delete():
                    preview = add_preview(stage_paths(path, len(memory))[number - 1])
                if preview and announce:
                    print(f"a small copy, which was missing, saved to {preview}")
            if cascade is not None:
                says = (print if announce else lambda text: None) if leads else None
                own = {"image": enlarged, "source": source, "says": says, "opens": opens, "share": share_tiles}
                make_in_stages(pipeline, task, path, cascade, number, **own)
                continue
            if number:
                continue
            if memory[0] is None:
                picture, record = make(pipeline, task)
                preview = save_image(picture, path, {**source, **record}) if leads else None
            else:
                strips, record = make_strips(pipeline, task, memory[0], share_tiles)
                if leads:
                    preview = write_strips(path, strips, memory[0].width, memory[0].height, {**source, **record})
                else:
                    deque(strips, maxlen=0)
            if leads and announce:
                small = f", a small copy to {preview}" if preview else ""
                print(f"{record['width']} x {record['height']} image saved to {path}{small}")
    seconds = round(time.monotonic() - started, 3)
    if not leads:
        return None
    files, seeds = [str(path) for path, _ in share], [task.seed for _, task in share]
    return {"files": files, "seeds": seeds, "kept": kept, "seconds": seconds, "notes": notes}


@contextlib.contextmanager
def _processes(
    pipeline: DiffusionPipeline, device: torch.device, parallel: bool
) -> Iterator[tuple[Callable[[list[int]], list[int]], Callable[[Path], Image.Image], Share | None]]:
    """Let all processes make each image together within the block, if they are to.

    Yields a function that gives what the first process called it with (the others may have other disks), one that opens the
    image that it finds, and how tiles are shared.
    """
    if not parallel:
        yield list, open_image, None
        return
    from ..parallel import gathered_numbers, image_of_first, shared_tiles, together

    with together(pipeline, device) as group:
        opens, share = (partial(each, group=group) for each in (image_of_first, shared_tiles))
        yield lambda numbers: gathered_numbers(numbers, group)[0], opens, share


def open_pipeline(
    model: str,
    dtype: torch.dtype,
    adapter: str | None = None,
    any_base: bool = False,
    loras: Sequence[tuple[Path, float]] = (),
    *,
    variant: str | None = None,
    config: str | None = None,
    image: bool = False,
    mask: bool = False,
) -> tuple[DiffusionPipeline, list[str]]:
    """Load the text-to-image pipeline that `run` names, with its adapter and LoRAs; what cannot work is refused before.

    image, mask: whether there are such. Returns it, as the pipeline of the task, with notes for the user.
    """
    from ..models import load_adapter
    from ..pipelines.loading import load_base
    from ..pipelines.prepare import add_loras

    base = find_pipeline(
        model, [adapter] if adapter else [], loras, variant=variant, config=config, image=image, mask=mask
    )
    pipeline = load_base(base, dtype)
    if adapter:
        load_adapter(pipeline, adapter, check_base=not any_base)
    add_loras(pipeline, loras)
    return for_task(pipeline, image, mask), [base.note] if base.note else []


def find_pipeline(
    model: str,
    adapters: Sequence[str] = (),
    loras: Sequence[tuple[Path, float]] = (),
    *,
    variant: str | None = None,
    config: str | None = None,
    image: bool = False,
    mask: bool = False,
) -> Base:
    """Find the text-to-image pipeline that `open_pipeline` loads; what cannot work, with any of the adapters, is refused."""
    from ..models import read_adapter_config
    from ..pipelines.loading import find_base

    hybrids = [(*read_adapter_config(adapter), adapter) for adapter in adapters]
    base = find_base(model, variant=variant, config=config)
    _check_base(base, hybrids, loras, image, mask)
    return base


def weights_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The dtype of this name, such as "float16"; None: bfloat16 on a GPU, float32 on a CPU."""
    import torch

    return getattr(torch, dtype or ("float32" if device.type == "cpu" else "bfloat16"))


def plan_with_notes(
    pipeline: DiffusionPipeline, subjects: str | Sequence[str] | None, **settings: Any
) -> tuple[DiffusionPipeline, list[Task], list[str]]:
    """`plan`, with its warnings of settings without effect as notes for the user."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoEffectWarning)
        pipeline, tasks = plan(pipeline, subjects, **settings)
    return pipeline, tasks, [str(warning.message) for warning in caught if warning.category is NoEffectWarning]


def refuse_processes(command: str) -> None:
    """Raise ValueError where a launcher has started several processes of a command that works in one."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(f"hybriddit {command} works in one process: start one, whose times nothing else disturbs")


def open_to_measure(
    model: str,
    device: torch.device,
    dtype: str | None,
    subjects: Sequence[str],
    *,
    adapter: str | None = None,
    any_base: bool = False,
    variant: str | None = None,
    config: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> tuple[DiffusionPipeline, list[Task]]:
    """`open_pipeline` and `plan_with_notes` for commands that make images to measure: on the device, without bars.

    dtype: such as "bfloat16"; None: that on a GPU, float32 on a CPU. Unless `quiet`, notes go to stderr.
    """
    from ..pipelines.prepare import place

    kind = weights_dtype(dtype, device)
    pipeline, notes = open_pipeline(model, kind, adapter, any_base, variant=variant, config=config)
    place(pipeline, device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline, tasks, more = plan_with_notes(pipeline, subjects, **settings)
    for note in [] if quiet else notes + more:
        print(f"note: {note}", file=sys.stderr)
    return pipeline, tasks


def _size(pipeline: DiffusionPipeline, task: Task) -> tuple[int, int]:
    """(width, height) of a task's image, in pixels; 0 where that is not known."""
    from ..pipelines.cascade import native_size

    width, height = task.record.get("width"), task.record.get("height")
    return width or native_size(pipeline), height or native_size(pipeline)


def _plan_memory(
    pipeline: DiffusionPipeline,
    task: Task,
    device: torch.device,
    gib: float | None,
    processes: int,
    vae_tiling: bool,
    rates: Callable[[], Rates | None],
    size: tuple[int, int],
    schedule: Schedule | None = None,
) -> MemoryPlan | None:
    """How images of a task's kind are made in so many GiB, or the memory that is free; None where all is done at once.

    processes: that share each image. rates: measures the device's, for how long it will take, or gives None. size: (width,
    height) in pixels. schedule: of a stage that paints an enlarged image anew.
    Raises ValueError, where a limit is given, for a pipeline that does not keep one.
    """
    from ..models.family import denoiser, families, family_of
    from ..pipelines.memory import free_beside_weights, plan_memory
    from ..pipelines.sit import SiTPipeline

    of_classes = isinstance(pipeline, SiTPipeline)
    from_text = any(isinstance(pipeline, family.pipeline_classes("text-to-image")) for family in families())
    if not of_classes and (not from_text or family_of_pipeline(pipeline) is None):
        if gib is not None:
            raise ValueError(
                "--max-memory is for images that a text-to-image pipeline makes of a prompt, or a SiT of a class, and "
                f"not for a {type(pipeline).__name__}"
            )
        return None
    if gib is None and size[0] * size[1] < LARGE and not vae_tiling:
        return None
    if gib is not None:
        available = int(gib * 2**30)
    else:  # of a CPU's memory each process on this machine has a part
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if processes > 1 and device.type == "cpu" else 1
        available = free_beside_weights(pipeline, device) // sharing
    guidance, steps = task.record.get("guidance"), schedule.steps if schedule else task.record["steps"]
    if of_classes:
        guided = guidance != 1
    else:
        family = family_of(denoiser(pipeline))
        guided = family.guided and (guidance or 0) > family.guides_above
    return plan_memory(
        pipeline,
        *size,
        images=1 + guided,
        available=available,
        passes=(steps or 1) * (2 if (task.record.get("true_cfg") or 0) > 1 else 1),
        rates=rates() if processes == 1 and steps else None,  # what travels is not timed
        max_sequence_length=task.arguments.get("max_sequence_length"),
        processes=processes,
        enlarges=schedule is not None,
    )


def output_paths(out: Path, num_images: int) -> list[Path]:
    """The files to write: `out` for one image, else out-0001.png, out-0002.png, … beside it.

    Raises ValueError for a path that no PNG or TIFF file can be written to.
    """
    if out.suffix.lower() not in STRIP_ENDINGS:
        raise ValueError(f"{out} must end in .png, .tif or .tiff: the image's record is kept in the file")
    paths = [out] if num_images == 1 else [out.with_stem(f"{out.stem}-{i:04d}") for i in range(1, num_images + 1)]
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give a file")
    for folder in out.parents:
        if folder.exists():
            if not folder.is_dir():
                raise ValueError(f"{folder} is a file: {out} cannot be written into it")
            if not os.access(folder, os.W_OK):
                raise ValueError(f"{folder} is not yours to write to: give {out.name} another folder")
            break
    return paths


def _check_base(
    base: Base,
    hybrids: Sequence[tuple[HybridConfig, str | None, str]],
    loras: Sequence[tuple[Path, float]],
    image: bool,
    mask: bool,
) -> None:
    """Raise ValueError for what cannot work, before the weights, which may take minutes, are read.

    hybrids: of each adapter its config, the class that it is for, and where it is.
    """
    from ..pipelines.loading import check_convertible, check_parts, check_takes_hybrid
    from ..pipelines.prepare import check_lora_loader
    from ..stored import component_classes

    check_inputs(base.pipeline_class, image, mask)
    family = base.family
    if base.file is None:
        components = component_classes(base.index)
        check_parts(base.pipeline_class, components)
        if family is not None:
            family.check_encoders(components)
    for hybrid in hybrids:
        check_convertible(base, *hybrid)
    if base.is_hybrid and not hybrids:
        check_takes_hybrid(base.pipeline_class)
    if loras:
        check_lora_loader(base.pipeline_class)


def _weights_digest(pipeline: DiffusionPipeline) -> str:
    """SHA-256 of the digests of all components' weights, as they were loaded."""
    from torch import nn

    from ..models.identity import weights_digest

    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    told = {name: weights_digest(part, added=True) for name, part in parts.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _is_made(path: Path, record: dict[str, Any], refuses: bool = True, named: bool = True) -> bool:
    """Whether the image is there, made as the record says. One that was made otherwise is a ValueError, if it is refused.

    named: whether the user named the file, and not hybriddit; else one that has no record is another's, and a ValueError too.
    """
    if not path.exists():
        return False
    with told_to_delete():
        found = read_record(path)
    if found is None and not named:
        raise ValueError(f"{path} is there already, and is no image of hybriddit's: move it, or give another --out")
    found = found or {}
    for name, value in json.loads(json.dumps(record)).items():
        if name not in found or found[name] != value:
            if not refuses:
                return False
            made = f"made with {name} {found.get(name)}, not {value}"
            raise ValueError(f"{path} is there already, {made}: give another --out, or delete it")
    return True
