"""Tell models apart by their content: a digest of the weights, wherever their files are and whatever their names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import nn

BLOCK = 1024  # words of 8 bytes that are summed into one on the weights' device
PART = 2**25  # bytes of a tensor at a time


def weights_digest(model: nn.Module) -> str:
    """SHA-256 that says which weights a model has: of all their bits, dtypes and shapes, without their names.

    What `hybridize` adds is left out, so that a converted transformer is still its teacher. Each block of 8 KiB is
    reduced on the weights' device to a sum that any one changed word changes, so that this takes about as long as
    reading the weights once: no file has to be read, and a model that was changed in memory is another one.
    """
    found = set()  # one of each: weights that are tied count once
    for prefix, module in model.named_modules():
        with align_module_device(module):  # the weights may be offloaded
            for name, weight in module.named_parameters(recurse=False):
                if ".hybrid." not in f"{prefix}.{name}":
                    found.add(_digest(weight.detach()))
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    factors = _factors().to(tensor.device)
    for part in tensor.contiguous().reshape(-1).view(torch.uint8).split(PART):
        if len(part) % (8 * BLOCK) or part.storage_offset() % 8:
            part = F.pad(part, (0, -len(part) % (8 * BLOCK)))  # a copy, of whole blocks
        words = part.view(torch.int64).view(-1, BLOCK)
        # both modulo 2 ** 64; the product is five times as fast, and a GPU has none of integers
        sums = words @ factors if words.device.type == "cpu" else (words * factors).sum(1)
        digest.update(sums.cpu().numpy())
    return digest.hexdigest()


@cache
def _factors() -> torch.Tensor:
    """Odd numbers: a word's change, times an odd number, is never 0 modulo 2 ** 64."""
    text = b"".join(hashlib.sha256(number.to_bytes(4, "little")).digest() for number in range(BLOCK // 4))
    return torch.from_numpy(np.frombuffer(text, "<i8").copy()) | 1


def describe_components(pipeline, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the components of a pipeline are: the digest of each one's weights, and its diffusers config.

    Components that the pipeline does not have are left out; so is what converts a transformer.
    """
    described = {}
    for name in names:
        component = getattr(pipeline, name, None)
        if component is None:
            continue
        described[name] = {}
        if isinstance(component, nn.Module):
            described[name]["weights"] = weights_digest(component)
        if isinstance(getattr(component, "config", None), dict):  # diffusers' own; it matters for scheduler and VAE
            config = {key: value for key, value in component.config.items() if key[0] != "_" and key != "hybrid_config"}
            described[name]["config"] = json.loads(json.dumps(config, default=str))
    return described


def changed_components(found: dict[str, dict[str, Any]], here: dict[str, dict[str, Any]]) -> list[str]:
    """The names of the components that differ between two descriptions.

    Configs are compared in the fields that both have: another version of diffusers may know more of them.
    """
    return [name for name in here if name not in found or not _same(found[name], here[name])]


def _same(found: dict[str, Any], here: dict[str, Any]) -> bool:
    one, other = (description.get("config", {}) for description in (found, here))
    same = found.get("weights") == here.get("weights")
    return same and all(one[key] == other[key] for key in one.keys() & other.keys())
