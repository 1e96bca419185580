"""Large images in stages, for `generate --size` and `upscale`: each stage is a file, and those that are there are kept."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..images import open_image
from ..machine import fits_memory
from ..strips_file import save_image, write_strips
from .images import MAX_SEED, TOO_LARGE, Task, family_of_pipeline, make, make_strips, token_pixels

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from ..pipelines.cascade import Schedule
    from ..pipelines.memory import MemoryPlan
    from ..pipelines.tiles import Share
    from ..pipelines.upscaler import Upscaler


LARGEST_SIDE = 2**31 - 1  # of a PNG file, in pixels


@dataclass(frozen=True)
class Stage:
    """One size of a cascade, (width, height) in pixels, and how its images are made within the device's memory.

    schedule: how the stage before, enlarged, is painted anew; None: the stage makes an image of the prompt.
    """

    size: tuple[int, int]
    schedule: Schedule | None
    memory: MemoryPlan | None = None


@dataclass(frozen=True)
class Cascade:
    """The stages of a large image.

    unit: pixels along each side of which images are multiples. native: (rows, columns) of tokens in an image of the model's
    own size in this shape. positions: see `models.scaled_positions`. upscaler: enlarges the stage before, in place of Lanczos'
    filter.
    """

    stages: tuple[Stage, ...]
    unit: int
    native: tuple[int, int]
    positions: str | None
    upscaler: Upscaler | None = None

    def padded(self, number: int) -> tuple[int, int]:
        """(width, height) in pixels of what the model makes for a stage, before it is cropped."""
        from ..pipelines.cascade import padded_size

        return padded_size(self.stages[number].size, self.unit)

    def positions_of(self, model: nn.Module, number: int) -> AbstractContextManager[None]:
        """Within it the model sees the positions of a stage."""
        from ..models import scaled_positions

        if self.positions is None:
            return contextlib.nullcontext()
        width, height = self.padded(number)
        return scaled_positions(model, self.positions, self.native, (height // self.unit, width // self.unit))

    def within(self, memory: Sequence[MemoryPlan | None]) -> Cascade:
        """The same, by a plan for each stage."""
        stages = (replace(stage, memory=plan) for stage, plan in zip(self.stages, memory, strict=True))
        return replace(self, stages=tuple(stages))

    @property
    def record(self) -> dict[str, Any]:
        """What an image's record says of it."""
        schedule = self.stages[-1].schedule
        sizes = [list(stage.size) for stage in self.stages]
        return {"stages": sizes, "schedule": schedule and asdict(schedule), "positions": self.positions}


@dataclass(frozen=True)
class StageSettings:
    """What the user asks of a cascade.

    size: (width, height) in pixels; or enlarge: an image file, and factor: how many times as large on each side, where no
    size is given. schedule: a name in `pipelines.cascade.SCHEDULES`; strength, steps, enlarged_in: instead of its. scale,
    positions: see `plan_cascade`. upscaler: a file, see `pipelines.upscaler.load_upscaler`.
    """

    size: tuple[int, int] | None = None
    enlarge: Path | None = None
    factor: float | None = None
    schedule: str | None = None
    strength: float | None = None
    steps: int | None = None
    enlarged_in: str | None = None
    scale: float = 2.0
    positions: str | None = None
    upscaler: Path | None = None

    def target(self, image: Image.Image | None) -> tuple[int, int]:
        """The size of the last stage. image: what is enlarged."""
        if self.size is not None:
            return self.size
        if not 1 < self.factor < math.inf:
            raise ValueError(f"an image is enlarged more than 1 times, not {self.factor}")
        if max(image.size) * self.factor > LARGEST_SIDE:
            raise ValueError(
                f"an image file has at most {LARGEST_SIDE} pixels a side: enlarge by less than {self.factor}"
            )
        return tuple(round(side * self.factor) for side in image.size)


def parse_size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT in pixels, such as 4096x2048. Raises ValueError for anything else."""
    width, _, height = text.lower().partition("x")
    sides = [side.strip() for side in (width, height)]
    # no image file has sides of more than ten digits
    if not all(side.isdecimal() and len(side) <= 10 and 0 < int(side) <= LARGEST_SIDE for side in sides):
        given = repr(text) if len(text) <= 40 else f"{text[:40]!r}..."
        raise ValueError(f"a size is WIDTHxHEIGHT in pixels, such as 4096x2048, not {given}")
    return int(width), int(height)


def find_schedule(
    name: str | None, strength: float | None, steps: int | None, enlarged_in: str | None = None
) -> Schedule:
    """The schedule of this name, or the usual one, with another noise to start from, number of steps or way to enlarge."""
    from ..pipelines.cascade import SCHEDULES

    if name is not None and name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose from {', '.join(SCHEDULES)}")
    given = {"sigma": strength, "steps": steps, "enlarged_in": enlarged_in}
    changed = {key: value for key, value in given.items() if value is not None}
    return replace(SCHEDULES[name or next(iter(SCHEDULES))], **changed)


def plan_cascade(
    pipeline: DiffusionPipeline,
    size: tuple[int, int],
    schedule: Schedule,
    *,
    image: Image.Image | None = None,
    first: tuple[int | None, int | None] = (None, None),
    scale: float = 2.0,
    positions: str | None = None,
    upscaler: Upscaler | None = None,
) -> Cascade:
    """The stages up to a size, (width, height) in pixels. image: what is enlarged, else the first stage makes an image.

    first: (width, height) of the first stage, by default the model's own in the shape of `size`. Stages behind an image are
    not smaller than that either. scale: see `pipelines.cascade.stage_sizes`. positions: see `models.scaled_positions`; None:
    "interpolated", where the family has it. upscaler: of the stages behind the first one. Raises ValueError for what cannot
    work, before anything is made.
    """
    from ..models.family import denoiser, families
    from ..pipelines.cascade import check_schedule, first_size, native_size, padded_size, stage_sizes
    from ..pipelines.sit import SiTPipeline

    kinds = (SiTPipeline, *(kind for family in families() for kind in family.pipeline_classes("text-to-image")))
    if not isinstance(pipeline, kinds):
        raise ValueError(f"images in stages are for text-to-image pipelines and SiTs, not a {type(pipeline).__name__}")
    model, unit = denoiser(pipeline), token_pixels(pipeline)
    family = family_of_pipeline(pipeline)
    own = first_size(size, native_size(pipeline), unit)
    own = tuple(given or usual for given, usual in zip(first, own, strict=True))
    for name, side in zip(("width", "height"), first, strict=True):
        if side is not None and (side < 1 or side % unit):
            raise ValueError(f"{name} {side} of the first stage is no multiple of {unit}, which this model needs")
    start = image.size if image else own
    if any(first) or image:
        stretch = size[0] * start[1] / (size[1] * start[0])
        if not 0.95 < stretch < 1.05:
            raise ValueError(
                f"{size[0]} x {size[1]} pixels are of another shape than {start[0]} x {start[1]}, which would be stretched"
            )
    sizes = stage_sizes(size, start, unit, scale=scale)
    if image is None:
        sizes.insert(0, own)
        if len(sizes) == 1:
            raise ValueError(
                f"{size[0]} x {size[1]} pixels are no larger than the first stage, {own[0]} x {own[1]}: ask for them by "
                "--width and --height, or for a smaller first stage"
            )
    elif not sizes:
        raise ValueError(f"{size[0]} x {size[1]} pixels are no larger than the image, {image.width} x {image.height}")
    else:
        sizes = [other for other in sizes[:-1] if other[0] * other[1] >= own[0] * own[1]] + sizes[-1:]
    if upscaler is not None:
        for smaller, larger in itertools.pairwise([image.size, *sizes] if image else sizes):
            upscaler.check(smaller, larger)
    if family is None:
        if positions is not None:
            raise ValueError("--positions is for text-to-image pipelines: a SiT spreads its own over any size")
    else:
        positions = positions or ("interpolated" if "interpolated" in family.positions else family.positions[0])
        if positions not in family.positions:
            raise ValueError(f"positions of {family.name} are {' or '.join(family.positions)}, not {positions!r}")
        for other in sizes if positions == family.positions[0] else ():
            width, height = padded_size(other, unit)
            family.check_grid(model.config, (height // unit, width // unit))
    native = own[1] // unit, own[0] // unit
    if family is not None and not any(first):
        try:
            family.check_grid(model.config, native)
        except ValueError as error:
            raise ValueError(
                f"{size[0]} x {size[1]} pixels are too long a shape for this model, whose own size in it is {own[0]} x {own[1]}: "
                f"{error}"
            ) from error
    check_schedule(pipeline, schedule)
    stages = tuple(Stage(other, schedule if image or number else None) for number, other in enumerate(sizes))
    return Cascade(stages, unit, native, positions, upscaler)


def stage_paths(path: Path, count: int) -> list[Path]:
    """The files of a cascade: NAME-stage1.png, NAME-stage2.png, …, and at last NAME.png."""
    return [*(path.with_stem(f"{path.stem}-stage{number}") for number in range(1, count)), path]


def stages_there(cascade: Cascade, task: Task, path: Path, source: dict[str, Any], is_made: Callable[..., bool]) -> int:
    """How many stages of an image need not be made.

    is_made: (file, record, named=...) -> whether the file is there with such a record. named: whether the user named it.
    """
    files = zip(stage_paths(path, len(cascade.stages)), _records(cascade, task, source), strict=True)
    made = [is_made(file, record, named=file == path) for file, record in files]
    return max((number for number, there in enumerate(made, 1) if there), default=0)


@contextlib.contextmanager
def told_to_delete() -> Iterator[None]:
    """Let errors of an image file that is there, and is damaged, say what to do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}: delete it, or give another --out") from error


def _records(cascade: Cascade, task: Task, source: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**source, **task.record, **cascade.record, "stage": number, "width": stage.size[0], "height": stage.size[1]}
        for number, stage in enumerate(cascade.stages, 1)
    ]


def make_in_stages(
    pipeline: DiffusionPipeline,
    task: Task,
    path: Path,
    cascade: Cascade,
    there: int,
    *,
    image: Image.Image | None,
    source: dict[str, Any],
    says: Callable[[str], None] | None,
    opens: Callable[[Path], Image.Image] = open_image,
    share: Share | None = None,
) -> None:
    """Make the stages of one image behind the first `there`, whose files exist, and save each as soon as it is made.

    The last one is written while it is decoded, if it has a plan. task: of the first stage's image. image: what is enlarged,
    if not that. source: what the records say besides. says: is told of each stage; None: another process saves them. opens:
    opens a stage's file. share: see `pipelines.cascade.repainting`. Records also say whether the VAE worked in tiles; stages
    are gone on from whether or not it would again.
    """
    import torch

    from ..models.family import TILED_VAES, denoiser
    from ..pipelines.cascade import repainting

    count = len(cascade.stages)
    paths, records = stage_paths(path, count), _records(cascade, task, source)
    if 0 < there < count:
        with told_to_delete():
            image = opens(paths[there - 1])
        if says:
            says(f"stage {there} of {count} is there, made with these settings: {paths[there - 1]}")
    vae = getattr(pipeline, "vae", None)
    of_vae = isinstance(vae, TILED_VAES) and vae.use_tiling
    for number in range(there, count):
        stage, started = cascade.stages[number], time.monotonic()
        with contextlib.ExitStack() as within:
            within.enter_context(fits_memory(TOO_LARGE))  # what is enlarged is encoded too
            within.enter_context(cascade.positions_of(denoiser(pipeline), number))
            own = task
            # without a plan the VAE works by itself, in tiles where the user asks for them
            tiles = of_vae if stage.memory is None else stage.memory.tiles
            if stage.schedule is not None:
                generator = torch.Generator().manual_seed((task.seed + (number + 1 << 40)) & MAX_SEED)
                options = {"tiles": tiles, "upscaler": cascade.upscaler, "share": share}
                repaint = repainting(pipeline, image, stage.size, stage.schedule, generator, **options)
                own = replace(task, arguments={**task.arguments, **within.enter_context(repaint)})
            if stage.memory is None:
                image = make(pipeline, own)[0].crop((0, 0, *stage.size))
            else:
                strips, _ = make_strips(pipeline, own, stage.memory, share)
        if stage.memory is not None:
            strips, image = _cropped(strips, stage.size), None
            if number < count - 1:
                image = Image.fromarray(np.concatenate(list(strips)))
        if says is None:
            if image is None:
                deque(strips, maxlen=0)
            continue
        record = {**records[number], "tiles": tiles}
        if image is None:
            preview = write_strips(paths[number], strips, *stage.size, record)
        else:
            preview = save_image(image, paths[number], record)
        seconds = time.monotonic() - started
        left = _seconds_left(cascade, number, seconds, task.record.get("steps"))
        says(
            f"stage {number + 1} of {count}: {stage.size[0]} x {stage.size[1]} image saved to {paths[number]}"
            f"{f', a small copy to {preview}' if preview else ''} "
            f"({seconds:.0f} s{f', about {left:.0f} s left' if left else ''})"
        )


def _cropped(strips: Iterator[np.ndarray], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The strips of an image without what is beyond a size, (width, height); all of them are taken."""
    left = size[1]
    for strip in strips:
        if left:
            yield strip[:left, : size[0]]
            left -= min(left, len(strip))


def _seconds_left(cascade: Cascade, done: int, seconds: float, steps: int | None) -> float:
    """For the stages behind `done`, from the seconds that it took: in proportion to pixels times steps, the VAE as one."""

    def work(stage: Stage) -> float:
        return stage.size[0] * stage.size[1] * (1 + (stage.schedule.steps if stage.schedule else steps or 1))

    return seconds * sum(map(work, cascade.stages[done + 1 :])) / work(cascade.stages[done])
