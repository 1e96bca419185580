"""Describe what this machine offers hybriddit: versions, device, attention backends and which of them is chosen."""

from __future__ import annotations

import importlib
import platform
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..machine import device_of_this_machine, gpu_name, versions

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "natten", "triton")
SIZES, WINDOW = (512, 1024, 4096), 16  # pixels, and tokens: the cases for which the choice of window attention is shown


def environment() -> dict[str, Any]:
    """Versions, the device, and the attention backends as {name: {"available": bool, "note": str}}.

    `window_choices` lists which window attention backend is chosen for each family at several image sizes, and why.
    `first_call`, on a GPU: what the kernels' compilation and trial cost, see `first_call`.
    """
    import torch

    from ..attention.linear import triton_refusal

    device = device_of_this_machine().type
    if device == "cuda":
        described = {"type": "cuda", "name": gpu_name(), "count": torch.cuda.device_count()}
    elif device == "mps":
        described = {"type": "mps", "name": gpu_name(), "count": 1}
    else:
        described = {"type": "cpu", "name": platform.processor() or platform.machine()}
    triton = triton_refusal(device, torch.bfloat16, 128)
    return {
        "hybriddit": __version__,
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
        "device": {**described, "threads": torch.get_num_threads()},
        "window_attention": {
            name: {"available": available, "note": note} for name, available, note in _window_backends(device)
        },
        "window_choices": list(_window_choices(device)),
        "linear_attention": {
            "triton": {"available": triton is None, "note": triton or ""},
            "torch": {"available": True, "note": ""},
        },
        "first_call": first_call(torch.device(device)) if device == "cuda" else None,
    }


def first_call(device: torch.device) -> dict[str, Any]:
    """How many seconds longer the first call of a hybrid layer of FLUX's shape, in bf16, takes than the second.

    The kernels are then compiled, unless Triton's cache has them, and tried. {"seconds": float, "note": ""}, or {"seconds":
    None, "note": why the layer does not run here}.
    """
    import torch

    from ..attention import HybridAttention, TokenLayout
    from ..config import HybridConfig

    config, heads, head_dim, layout = HybridConfig(), 24, 128, TokenLayout(512, ((32, 32),), True)
    seconds = []
    try:
        with torch.no_grad():
            layer = HybridAttention(
                heads * head_dim, heads, head_dim, window=(WINDOW, WINDOW), join=config.join, **config.mixer_settings
            ).to(device, torch.bfloat16)
            tokens = torch.randn(1, 1536, heads, head_dim, device=device, dtype=torch.bfloat16)
            for _ in range(2):
                start = time.perf_counter()
                layer(tokens, tokens, tokens, layout)
                torch.accelerator.synchronize()
                seconds.append(time.perf_counter() - start)
    except Exception as error:  # drivers and compilers may raise anything, and this is where one looks for the reason
        return {"seconds": None, "note": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"}
    return {"seconds": round(seconds[0] - seconds[1], 2), "note": ""}


def _window_backends(device: str) -> Iterator[tuple[str, bool, str]]:
    """(name, available, note) of every backend of window attention, fastest first; the note says what is missing."""
    from ..attention.trial import triton_requirements

    kernels = triton_requirements() if device == "cuda" else ["a GPU" if device == "cpu" else "an NVIDIA or AMD GPU"]
    note = f"needs {' and '.join(kernels)}" if kernels else "compiled and tried on first use"
    yield "triton", not kernels, note
    if device == "cpu":
        yield "flex", True, 'without gradients and not compiled; only by backend="flex"'
    else:
        yield "flex", not kernels, note
    missing = ["an NVIDIA GPU"] if device != "cuda" else []
    if not _natten_has_kernels():
        missing.append("natten with its compiled kernels (the NATTEN project's wheel for your torch and CUDA)")
    yield "natten", not missing, f"needs {' and '.join(missing)}" if missing else ""
    yield "tiled", True, ""
    yield "dense", True, "where the window covers most of the grid"


def _window_choices(device: str) -> Iterator[dict[str, Any]]:
    """The backend that `neighborhood_attention` chooses in generation, per family and image size; nothing is run."""
    import torch

    from ..attention.window import WindowCase, choose_backend

    try:
        from ..models import families
    except ModuleNotFoundError:  # without diffusers there are no models to choose for
        return
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # what `generate` takes
    for family in families():
        published = next((published for published in family.published.values() if published.shape), None)
        if published is None:
            continue
        shape = family.attention_shape(published)
        for size in SIZES:
            settings = (shape.heads, shape.head_dim, (WINDOW, WINDOW), (1, 1), (1, 1), shape.text)
            choice = choose_backend(WindowCase(torch.device(device), dtype, shape.grid(size), *settings))
            yield {
                "family": family.name,
                "pixels": size,
                "grid": list(shape.grid(size)),
                "window": WINDOW,
                "heads": shape.heads,
                "head_dim": shape.head_dim,
                "text_length": shape.text,
                "backend": choice.backend,
                "reason": choice.reason,
                "passed_over": dict(choice.passed_over),
            }


def _natten_has_kernels() -> bool:
    try:
        return bool(importlib.import_module("natten").HAS_LIBNATTEN)
    except (ImportError, OSError):  # built for another torch
        return False


def environment_text(found: dict[str, Any]) -> str:
    """Format what `environment` found for a terminal."""
    device = found["device"]
    where = f"CPU, {device['threads']} threads" if device["type"] == "cpu" else f"{device['count']} x {device['name']}"
    lines = [f"{'hybriddit':13} {found['hybriddit']}", f"{'python':13} {found['python']}"]
    for package, version in found["packages"].items():
        hint = ": pip install peft, to load LoRA files" if package == "peft" else ""
        lines.append(f"{package:13} {version or 'not installed' + hint}")
    lines.append(f"{'device':13} {where}")
    for kind in ("window_attention", "linear_attention"):
        lines.append(kind.replace("_", " "))
        for name, backend in found[kind].items():
            note = f": {backend['note']}" if backend["note"] else ""
            lines.append(f"  {name:11} {'yes' if backend['available'] else 'no'}{note}")
        if kind == "window_attention" and found["window_choices"]:
            lines += _choice_lines(found["window_choices"])
    if (first := found["first_call"]) is not None:
        took = (
            f"{first['seconds']} s more than the second: kernels are compiled, if Triton's cache lacks them, and tried"
        )
        lines.append(f"{'first call':13} {first['note'] or took}")
    return "\n".join(lines)


def _choice_lines(choices: list[dict[str, Any]]) -> list[str]:
    """One line per family with its backends by image size, then each backend's reason, once."""
    lines = [f"  taken for a window of {WINDOW} when generating, by size in pixels:"]
    for family in dict.fromkeys(choice["family"] for choice in choices):
        sizes = (f"{c['pixels']} {c['backend']}" for c in choices if c["family"] == family)
        lines.append(f"    {family:20} {', '.join(sizes)}")
    reasons = dict.fromkeys((choice["backend"], choice["reason"]) for choice in choices)
    return lines + [f"    {backend}: {reason}" for backend, reason in reasons]
