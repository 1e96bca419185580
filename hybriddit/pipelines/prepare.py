"""Prepare a loaded pipeline for generation: LoRA files, a tiled VAE, and where its weights are while it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from ..models.family import component_of, denoiser
from .loading import check_whole

LORA = r"\.lora[._]"  # behind a layer's name, in keys of diffusers' files; with a point in older ones


def check_lora_loader(kind: type[DiffusionPipeline]) -> None:
    """Raise ValueError for a class of pipelines without a transformer that diffusers loads a LoRA into."""
    if not hasattr(kind, "load_lora_weights") or component_of(kind) is None:
        raise ValueError(f"diffusers loads no LoRA into the transformer of a {kind.__name__}")


def add_loras(pipeline: DiffusionPipeline, loras: Sequence[tuple[Path, float]]) -> None:
    """Load LoRA files into a pipeline, dense or hybrid, and add each times its weight.

    Raises ValueError, in one line, for a file that is not for this pipeline, in whole or in part.
    """
    if not loras:
        return
    check_lora_loader(type(pipeline))
    names = [f"lora{number}" for number in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        where = {"pretrained_model_name_or_path_or_dict": str(path.parent), "weight_name": path.name}
        try:
            found = pipeline.lora_state_dict(use_safetensors=True, **where)
            _check_modules(pipeline, found[0] if isinstance(found, tuple) else found)  # with alphas, of a UNet
            pipeline.load_lora_weights(adapter_name=name, use_safetensors=True, **where)
            check_whole(denoiser(pipeline), "it")
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split("\n")[:2])
            raise ValueError(f"the LoRA {path} does not fit this {type(pipeline).__name__}: {reason}") from error
        if not any(name in loaded for loaded in pipeline.get_list_adapters().values()):
            raise ValueError(f"diffusers found nothing to load in the LoRA {path}")
    pipeline.set_adapters(names, [weight for _, weight in loras])


def _check_modules(pipeline: DiffusionPipeline, tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless the layers of a LoRA, named as in diffusers, are in the pipeline.

    Of the text encoders only that they are there: their layers have other names in some versions of transformers.
    """
    targets = {re.split(LORA, key)[0] for key in tensors if re.search(LORA, key)}
    if not targets:
        raise ValueError("it holds no LoRA")
    layers = {f"{component_of(type(pipeline))}.{name}" for name, _ in denoiser(pipeline).named_modules()}
    encoders = tuple(f"{name}." for name in pipeline.components if name.startswith("text_encoder"))
    strange = sorted(name for name in targets if name not in layers and not name.startswith(encoders))
    if strange:
        raise ValueError(f"{len(strange)} of its {len(targets)} layers are not in this model ({strange[0]}, …)")


def tile_vae(pipeline: DiffusionPipeline) -> None:
    """Let the VAE decode in tiles, which bounds its memory. Raises ValueError where there is no VAE that can."""
    vae = getattr(pipeline, "vae", None)
    if not hasattr(vae, "enable_tiling"):
        what = "has no VAE" if vae is None else f"has a {type(vae).__name__}, which does not decode in tiles"
        raise ValueError(f"this {type(pipeline).__name__} {what}: leave VAE tiling out")
    vae.enable_tiling()


def place(pipeline: DiffusionPipeline, device: torch.device, offload: str | None = None) -> None:
    """Put a pipeline on a device, or let its weights come there only while they are used.

    offload: "model": one component at a time; "group": the layers of all of them, one at a time; "sequential": the same
    by accelerate, slower. None: all of it stays on the device.
    """
    if offload is None:
        pipeline.to(device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
