"""A pipeline that stays loaded, with hybrids of it to choose from: what the page and ComfyUI's nodes make images with."""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..machine import check_offload, find_device
from .files import find_pipeline, plan_with_notes, weights_dtype
from .images import ARGUMENTS, for_task, make

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..pipelines.loading import Base

SAVED = "the saved hybrid"  # the name of a pipeline's hybrid that is no adapter
SAMPLED = 0.005  # seconds between two looks at the memory of this process
Tell = Callable[[int, int], None]  # is told of (steps done, steps of all images)


@dataclass(frozen=True)
class Source:
    """What a session is loaded from: found and checked, but not loaded. See `find_source`."""

    base: Base
    adapters: tuple[str, ...]
    any_base: bool
    device: torch.device
    dtype: str | None
    offload: str | None


def find_source(
    model: str,
    adapters: Sequence[str] = (),
    *,
    any_base: bool = False,
    variant: str | None = None,
    config: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    offload: str | None = None,
) -> Source:
    """Find a pipeline and its adapters, without reading weights. The arguments are those of `generate.run`.

    Raises ValueError or OSError, in one line, for what cannot work.
    """
    if any_base and not adapters:
        raise ValueError("--any-base is for an adapter: give --adapter too")
    where = find_device(device)
    check_offload("--offload ", offload, where)
    adapters = tuple(dict.fromkeys(adapters))
    if offload and len(adapters) > 1:
        raise ValueError("--offload is for one adapter: a model whose weights are elsewhere takes no other later")
    base = find_pipeline(model, adapters, variant=variant, config=config)
    if base.is_hybrid and adapters:
        raise ValueError(f"{model} is hybrid already: give the dense pipeline it was made from, or leave adapters out")
    return Source(base, adapters, any_base, where, dtype, offload)


@dataclass(frozen=True)
class Made:
    """An image, and what making it took.

    record: see `generate`. seconds: of the whole pipeline, text encoders and VAE included. memory: the most bytes held
    meanwhile, weights included: on an NVIDIA GPU what torch had allocated there; on a CPU the resident memory of this
    process, libraries and what it freed but kept included; None: not measured. first: whether it was the first image of its
    size by this model, whose seconds include what is made or loaded on first use.
    """

    image: Image.Image
    record: dict[str, Any]
    seconds: float
    memory: int | None
    first: bool


@dataclass(frozen=True)
class Pair:
    """The images that the teacher and a hybrid of it made of the same noise; PSNR in dB and SSIM between them."""

    teacher: Made
    hybrid: Made
    psnr: float
    ssim: float


class Session:
    """A loaded pipeline, dense, and hybrid by one adapter at a time.

    hybrids: the names of what it can be besides dense: the adapters as they were given, or SAVED for a pipeline that was
    saved as a hybrid. takes: the settings of `generate` that the pipeline takes. notes: of loading, for the user.

    One thread at a time makes images: the others wait.
    """

    def __init__(self, source: Source):
        """Load the pipeline and all adapters. Raises ValueError, in one line, for what does not load."""
        from ..models import HeldAdapters, family_of
        from ..models.family import denoiser
        from ..pipelines.loading import load_base
        from ..pipelines.prepare import place

        self.source = source
        found = load_base(source.base, weights_dtype(source.dtype, source.device))
        self.pipeline = for_task(found, image=False, mask=False)  # it may have been saved as one for another task
        self.model = denoiser(self.pipeline)
        self.notes = [source.base.note] if source.base.note else []
        self.takes = frozenset(
            name
            for name, argument in ARGUMENTS.items()
            if argument in inspect.signature(type(self.pipeline).__call__).parameters
        )
        self._saved = source.base.is_hybrid
        self._adapters = None
        if not self._saved and source.base.family is not None:
            family_of(self.model)
            self._adapters = HeldAdapters(self.pipeline)
        self._lock, self._seen = threading.Lock(), set()
        for adapter in source.adapters:
            self.add(adapter)
        place(self.pipeline, source.device, source.offload)
        self.pipeline.set_progress_bar_config(disable=True)

    @property
    def hybrids(self) -> list[str]:
        if self._saved:
            return [SAVED]
        return self._adapters.names if self._adapters else []

    def add(self, adapter: str) -> str:
        """Load one more adapter, or again one that is loaded. Returns its name. Raises as `load_adapter` does."""
        if self._adapters is None:
            what = (
                "hybrid already" if self._saved else f"no pipeline of a supported model ({type(self.model).__name__})"
            )
            raise ValueError(f"{self.source.base.path} is {what}: it takes no adapter")
        with self._lock:
            self._adapters.add(adapter, adapter, check_base=not self.source.any_base)
        return adapter

    def usual(self, name: str) -> Any:
        """What a setting is where it is left out, as far as the pipeline tells; None where it does not."""
        from ..pipelines.cascade import native_size

        if name in ("width", "height"):
            return native_size(self.pipeline) or None
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        return parameters[ARGUMENTS[name]].default if name in self.takes else None

    def make(
        self, hybrid: str | None, prompt: str, *, tell: Tell | None = None, **settings: Any
    ) -> tuple[list[Made], list[str]]:
        """Make images of a prompt by a hybrid of this name, or None: by the dense model. Returns notes, too.

        tell: is called after each step, with the number of steps done and that of all images; what it raises ends the
        work. settings: those of `generate`. Raises ValueError, in one line, for what cannot work.
        """
        tell = tell or (lambda done, total: None)
        with self._lock, self._by(hybrid):
            pipeline, tasks, notes = plan_with_notes(self.pipeline, prompt, **settings)
            made = []
            for number, task in enumerate(tasks):
                size = (hybrid, task.arguments.get("width"), task.arguments.get("height"))
                told = self._told(tell, number, len(tasks))
                with told, measured(self.source.device) as figures:
                    image, record = make(pipeline, task)
                if hybrid is None:
                    record["hybrid_config"] = None  # of an adapter that was not in use
                by = {"model": self.source.base.path, "adapter": None if hybrid == SAVED else hybrid}
                made.append(Made(image, {**by, **record}, **figures, first=size not in self._seen))
                self._seen.add(size)
        return made, notes

    def compare(
        self, hybrid: str | None, prompt: str, *, tell: Tell | None = None, **settings: Any
    ) -> tuple[Pair, list[str]]:
        """Make one image by the dense teacher and by a hybrid of it, from the same noise. Arguments as those of `make`."""
        from ..metrics.nearness import nearness

        if hybrid is None:
            what = "choose" if self.hybrids else "load"
            raise ValueError(f"the dense model is the teacher itself: {what} an adapter to compare with it")
        nearness(*[np.zeros((8, 8, 3), np.uint8)] * 2)  # a missing package is told before images are made
        tell = tell or (lambda done, total: None)
        [teacher], notes = self.make(None, prompt, tell=lambda done, total: tell(done, 2 * total), **settings)
        [made], _ = self.make(hybrid, prompt, tell=lambda done, total: tell(total + done, 2 * total), **settings)
        pixels = (np.asarray(each.image.convert("RGB")) for each in (made, teacher))
        return Pair(teacher, made, *nearness(*pixels)), notes

    def _by(self, hybrid: str | None) -> AbstractContextManager[Any]:
        """Within it the model is the hybrid of this name; None: the dense one. Raises ValueError for an unknown name."""
        from ..models import dense_mode, is_hybrid

        if hybrid is not None and hybrid not in self.hybrids:
            loaded = f"only {', '.join(self.hybrids)}" if self.hybrids else "none"
            raise ValueError(f"no hybrid {hybrid!r} is loaded here, {loaded}: choose anew")
        if hybrid is None:  # the adapter stays, so that the next image by it need not convert the model again
            return dense_mode(self.model) if is_hybrid(self.model) else contextlib.nullcontext()
        if self._adapters is not None:
            self._adapters.use(hybrid)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _told(self, tell: Tell, number: int, images: int) -> Iterator[None]:
        """Within it, tell hears of the pipeline's steps. number: of the image that is made, from 0."""

        def progress_bar(iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
            items = None if iterable is None else list(iterable)
            bar = _Bar(tell, number, images, total if items is None else len(items))
            return bar if items is None else bar.over(items)

        self.pipeline.progress_bar = progress_bar  # all of diffusers' pipelines ask for it, callbacks are not in all
        try:
            yield
        finally:
            del self.pipeline.progress_bar


class _Bar:
    """What a pipeline takes for its progress bar: it tells of the steps of one image among several."""

    def __init__(self, tell: Tell, number: int, images: int, total: int):
        self.tell, self.done, self.total = tell, number * total, images * total

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def update(self, steps: int = 1) -> None:
        self.done += steps
        self.tell(self.done, self.total)

    def over(self, items: list[Any]) -> Iterator[Any]:
        for item in items:
            yield item
            self.update()


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure a block. The dict it yields has, at the end, "seconds" and "memory" in bytes, see `Made`."""
    import psutil
    import torch

    figures, on_gpu = {"seconds": None, "memory": None}, device.type == "cuda"
    over = threading.Event()

    def watch() -> None:
        process = psutil.Process()
        while True:
            figures["memory"] = max(figures["memory"] or 0, process.memory_info().rss)
            if over.wait(SAMPLED):
                return

    watcher = threading.Thread(target=watch, daemon=True) if device.type == "cpu" else None
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    if watcher:
        watcher.start()
    started = time.perf_counter()
    try:
        yield figures
        if on_gpu:
            torch.cuda.synchronize(device)
        figures["seconds"] = round(time.perf_counter() - started, 3)
    finally:
        over.set()
        if watcher:
            watcher.join()
    if on_gpu:
        figures["memory"] = torch.cuda.max_memory_allocated(device)
