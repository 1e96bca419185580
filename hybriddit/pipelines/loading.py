"""Load any diffusers pipeline, and call one without its progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from .sit import refuse_sit


def load_pipeline(path: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A diffusers pipeline from a folder or a repository, safetensors only.

    Raises FileNotFoundError or ValueError, in one line, where there is none.
    """
    refuse_sit(path)
    if Path(path).exists() or Path(path).is_absolute() or path.count("/") != 1:
        if not (Path(path) / "model_index.json").is_file():
            raise FileNotFoundError(f"no diffusers pipeline at {path!r}: it needs a model_index.json")
        missing = f"the pipeline at {path!r} does not load"
    else:
        missing = f"no folder {path!r}, and it could not be fetched from the hub"
    try:
        return DiffusionPipeline.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{missing}: {error}") from error


@contextmanager
def quiet(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within it, the pipeline shows no progress bar of its own."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
