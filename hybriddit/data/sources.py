"""The sources of training data: one function and one row per source. Imports torch only when data is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .buckets import bucket_sizes
from .prompts import read_prompts

if TYPE_CHECKING:
    from .class_data import ClassData, ClassInfo
    from .latents import LatentData
    from .shards import Processes


@dataclass(frozen=True)
class Source:
    """One kind of training data.

    make: (model, settings, progress, processes) -> the data set. model: the teacher's pipeline (or `teacher.Teacher`), or
        the SiT that is trained; settings: the run's `data` section; progress: whether to show progress bars; processes: those that make
        it together (`hybriddit.data.shards.Processes`), each of which calls this.
    count: (settings) -> the number of images, found without a model. Raises FileNotFoundError or ValueError for files
        that are missing or unusable. None: only `make` can tell.
    texts: (settings) -> the prompts, or the captions of the images. None: there are none.
    bare: (settings) -> the number of images that are left out as they have no caption. None: it is none.
    job: the command that uses it, "distill" or "train".
    reads: the setting that names its files: "prompts", "folder" or "path".
    teacher_made: the images are the teacher's own. trajectories: the rows also hold states of the teacher's sampling.
    """

    make: Callable[[Any, Any, bool, Processes], Any]
    count: Callable[[Any], int] | None
    job: str
    reads: str
    teacher_made: bool = False
    trajectories: bool = False
    texts: Callable[[Any], list[str]] | None = None
    bare: Callable[[Any], int] | None = None


def teacher(pipeline, settings, progress: bool, processes: Processes, states: int = 0) -> LatentData:
    """Images that the teacher makes from prompts. states: how many states of each image's sampling to keep."""
    from .teacher_images import teacher_images

    return teacher_images(
        pipeline,
        settings.prompts,
        images=settings.images,
        seed=settings.seed,
        states=states,
        **_common(settings, progress, processes),
    )


def trajectories(pipeline, settings, progress: bool, processes: Processes) -> LatentData:
    """Intermediate states of the teacher's sampling, from noise to its images of the prompts."""
    return teacher(pipeline, settings, progress, processes, settings.states)


def captioned_folder(pipeline, settings, progress: bool, processes: Processes) -> LatentData:
    """A folder of images with captions."""
    from ..models import family_of
    from ..models.family import denoiser
    from .image_folder import image_folder
    from .teacher import Teacher

    own = {"seed": settings.seed, "max_images": settings.max_images}
    teacher = Teacher.of(pipeline, settings.max_sequence_length, settings.cache, processes)
    if settings.buckets is not None:
        family, config = family_of(denoiser(teacher.pipeline)), denoiser(teacher.pipeline).config
        side = family.token_pixels(config, teacher.pipeline.vae_scale_factor)
        own["buckets"] = bucket_sizes(settings.buckets, settings.height, settings.width, side)
    return image_folder(teacher, settings.folder, **own, **_common(settings, progress, processes))


def _common(settings, progress: bool, processes: Processes) -> dict[str, Any]:
    names = ("height", "width", "steps", "guidance_scale", "max_sequence_length", "batch_size", "cache")
    return {name: getattr(settings, name) for name in names} | {"progress": progress, "processes": processes}


def labelled_images(model, settings, progress: bool, processes: Processes) -> ClassData:
    """Images or latents with class labels, of the size that the SiT takes; every process opens all of them."""
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    says = processes.rank == 0
    return open_class_data(settings.path, shape, memory=settings.memory, progress=progress and says, says=says)


def open_class_data(
    path: str | Path, shape: tuple[int, int, int], *, memory: bool = False, progress: bool = True, says: bool = True
) -> ClassData:
    """Open the labelled images at `path`: a cache, class folders, or MNIST's files. shape: (C, H, W) of model inputs.

    memory: read all of a cache now. says: print what of a folder is left out. Raises FileNotFoundError where there is
    no folder, and ValueError, in one line, where its images have another shape or cannot be used.
    """
    from .class_images import read_folder

    data = _open_whole(Path(path), memory)
    if data is None:
        return read_folder(path, shape, progress=progress, says=says)
    _check_shape(path, data.info, shape)
    return data


def look_at_classes(path: str | Path, shape: tuple[int, int, int]) -> tuple[int, ClassInfo]:
    """How many labelled images are at `path`, and what they are, without reading all of a folder's.

    Takes and raises what `open_class_data` does, but for images that cannot be read.
    """
    from .class_data import ClassInfo
    from .class_images import check_images, find_classes

    data = _open_whole(Path(path))
    if data is not None:
        _check_shape(path, data.info, shape)
        return len(data), data.info
    found = find_classes(path)
    check_images(path, found.paths, shape)
    return len(found.paths), ClassInfo(tuple(shape), found.classes)


def _open_whole(path: Path, memory: bool = False) -> ClassData | None:
    """The set at `path`, if it is a cache or MNIST's files; None for folders of images."""
    from . import class_cache, class_images, shards

    if not path.is_dir():
        raise FileNotFoundError(f"no folder at {str(path)!r} (data.path)")
    if (path / shards.SETTINGS).exists():
        return class_cache.open_cache(path, memory=memory)
    if any(path.glob(f"{class_images.MNIST_IMAGES}*")):
        return class_images.read_mnist(path)
    return None


def _check_shape(path: str | Path, info: ClassInfo, shape: tuple[int, int, int]) -> None:
    if info.shape != tuple(shape):
        what = "latents" if info.vae else "images"
        here, wanted = (" x ".join(map(str, sides)) for sides in (info.shape, shape))
        raise ValueError(
            f"{path} holds {what} of {here}, and the model takes {wanted}: set model.in_channels and "
            "model.sample_size, or use another data.path"
        )


def _count_prompted(settings) -> int:
    read_prompts(settings.prompts)
    return settings.images


def _count_captioned(settings) -> int:
    return len(_captions(settings))


def _prompts(settings) -> list[str]:
    return read_prompts(settings.prompts)


def _count_bare(settings) -> int:
    return sum(not caption for caption in _taken(settings).values())


def _captions(settings) -> list[str]:
    captions = _taken(settings)
    found = [caption for caption in captions.values() if caption]
    if not found:
        raise ValueError(f"none of the {len(captions)} images in {settings.folder} has a caption")
    return found


def _taken(settings) -> dict[Path, str | None]:
    """The images of a folder that are taken, with their captions."""
    from .captions import read_captions
    from .image_folder import first_captioned

    return first_captioned(read_captions(settings.folder, settings.seed).captions, settings.max_images)


SOURCES = {
    "teacher": Source(teacher, _count_prompted, "distill", "prompts", teacher_made=True, texts=_prompts),
    "folder": Source(captioned_folder, _count_captioned, "distill", "folder", texts=_captions, bare=_count_bare),
    "trajectories": Source(
        trajectories, _count_prompted, "distill", "prompts", teacher_made=True, trajectories=True, texts=_prompts
    ),
    "classes": Source(labelled_images, None, "train", "path"),
}


def make_data(pipeline, settings, *, progress: bool = True, processes: Processes | None = None) -> LatentData:
    """Make the set that a distillation's `data` section asks for, by all `processes`.

    pipeline: the teacher's, or a `teacher.Teacher`.
    """
    from .shards import ALONE

    return SOURCES[settings.source].make(pipeline, settings, progress, processes or ALONE)


def sources_of(job: str) -> tuple[str, ...]:
    """The names of the sources for a command, "distill" or "train"."""
    return tuple(name for name, source in SOURCES.items() if source.job == job)
