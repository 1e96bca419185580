"""Load pipelines from folders and hub repositories, from safetensors only, with every failure told in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from ..files import read_json
from ..machine import device_of_this_machine
from ..models import SiTTransformer2DModel, families, read_adapter_config
from .sit import SiTPipeline


def load_pipeline(path: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load a text-to-image pipeline, dense or hybrid, of diffusers or a registered family, from a folder or repository.

    Raises FileNotFoundError or ValueError, in one line, where there is none.
    """
    refuse_sit(path)
    if _is_local(path):
        if not (Path(path) / "model_index.json").is_file():
            raise FileNotFoundError(f"no diffusers pipeline at {path!r}: it needs a model_index.json")
        missing = f"the pipeline at {path!r} does not load"
    else:
        missing = f"no folder {path!r}, and it could not be fetched from the hub"
    try:
        return _pipeline_class(path).from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{missing}: {error}") from error


def _pipeline_class(path: str) -> type[DiffusionPipeline]:
    """The class to load a pipeline with; DiffusionPipeline if it is diffusers' own, which that finds by itself."""
    name = DiffusionPipeline.load_config(path).get("_class_name")
    classes = (family.pipelines["text-to-image"] for family in families())
    return next((found for found in classes if found.__name__ == name), DiffusionPipeline)


def load_sit_pipeline(path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> SiTPipeline:
    """Load a SiTPipeline from its folder, from a training run's folder or from a hub repository.

    Raises FileNotFoundError or ValueError, in one line, where there is none.
    """
    folder = find_sit_pipeline(path)
    if folder is None and (name := saved_class(Path(path))):
        missing = "it takes no class labels, give generate a --prompt"
        if name == SiTTransformer2DModel.__name__:
            missing = "save one with SiTPipeline(transformer, vae).save_pretrained(folder)"
        raise ValueError(f"{str(path)!r} is a {name}, not a SiTPipeline: {missing}")
    if folder is None and _is_local(path):
        raise FileNotFoundError(f"no SiTPipeline at {str(path)!r}: neither the folder nor pipeline/ in it holds one")
    try:
        return SiTPipeline.from_pretrained(folder or path, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"the pipeline at {str(path)!r} does not load: {error}") from error


def load_for_use(
    path: str,
    *,
    dtype: str | None = None,
    adapter: str | None = None,
    of_classes: bool = False,
    quiet: bool = False,
) -> DiffusionPipeline:
    """Load a pipeline onto this machine's device, for the commands `generate` and `convert`.

    dtype: such as "float16"; None is bfloat16 on a GPU and float32 on a CPU.
    adapter: not loaded here. Its config is checked before the model is loaded, which may take minutes.
    of_classes: load a SiTPipeline, not a text-to-image pipeline.
    quiet: hide progress bars, and messages of the libraries except errors.
    """
    if quiet:
        _silence_libraries()
    if adapter:
        read_adapter_config(adapter)
    device = device_of_this_machine()
    default = "bfloat16" if device.type == "cuda" else "float32"
    load = load_sit_pipeline if of_classes else load_pipeline
    return load(path, getattr(torch, dtype or default)).to(device)


@contextmanager
def quiet(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Hide the pipeline's own progress bar within the block."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def find_sit_pipeline(path: str | os.PathLike) -> Path | None:
    """The folder of a saved SiTPipeline: `path`, or `path`/pipeline as in a training run's folder; None if neither."""
    folders = (Path(path), Path(path, "pipeline"))
    return next((folder for folder in folders if saved_class(folder) == SiTPipeline.__name__), None)


def saved_class(folder: Path) -> str | None:
    """The class name of the pipeline, or else of the model, that was saved to a folder; None if neither was."""
    found = (folder / name for name in ("model_index.json", "config.json"))
    return next((read_json(path).get("_class_name") for path in found if path.is_file()), None)


def refuse_sit(path: str | os.PathLike) -> None:
    """Raise ValueError if `path` holds a SiT, where a text-to-image pipeline is wanted."""
    name = saved_class(find_sit_pipeline(path) or Path(path))
    if name in (SiTPipeline.__name__, SiTTransformer2DModel.__name__):
        raise ValueError(
            f"{str(path)!r} is a {name}, which makes images of classes (hybriddit generate --class-label): prompts, "
            "convert and distill are for text-to-image pipelines"
        )


def _is_local(path: str | os.PathLike) -> bool:
    """Whether the path can only be a folder: it exists, or does not have the form "owner/name" of a repository."""
    return Path(path).exists() or Path(path).is_absolute() or str(path).count("/") != 1


def _silence_libraries() -> None:
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    disable_progress_bars()
