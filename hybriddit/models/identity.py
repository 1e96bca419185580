"""Tell models apart by their content: a digest of the weights, wherever their files are and whatever their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .wrapping import is_plain, plain_name

BLOCK = 1024  # words of 8 bytes that are summed into one on the weights' device
PART = 2**25  # bytes of a tensor at a time
TOLD = (torch.float32, torch.bfloat16)  # types in which a base's weights round to the same bfloat16


def weights_digest(model: nn.Module, *, added: bool = False) -> str:
    """SHA-256 that says which weights a model has: of all their bits, dtypes and shapes, without their names.

    added: whether what `hybridize` adds counts too; without it, a converted transformer is still its teacher. Each block of 8 KiB is
    reduced on the weights' device to a sum that any one changed word changes, so that this takes about as long as
    reading the weights once: no file has to be read, and a model that was changed in memory is another one.
    """
    return _of_all(tensor_digest(weight) for name, weight in _weights(model) if added or ".hybrid." not in name)


def base_digest(model: nn.Module) -> str | None:
    """`weights_digest` by which an adapter knows its base: without LoRAs, rounded to bfloat16 as it may be loaded.

    None where the weights are of other types than float32 and bfloat16 (float16, quantised) or not there, so that it
    cannot be told.
    """
    found = []
    for name, weight in _weights(model):
        if ".hybrid." in name or plain_name(model, name)[0] is None:
            continue
        if not is_plain(weight) or weight.dtype not in TOLD:
            return None
        found.append(tensor_digest(weight.to(torch.bfloat16)))
    return _of_all(found)


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of all parameters, where they are."""
    for prefix, module in model.named_modules():
        with align_module_device(module):  # the weights may be offloaded
            for part, weight in module.named_parameters(recurse=False):
                yield f"{prefix}.{part}" if prefix else part, weight.detach()


def _of_all(digests: Iterable[str]) -> str:
    # one of each: weights that are tied count once
    return hashlib.sha256("\n".join(sorted(set(digests))).encode()).hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256, in hexadecimal digits, that says a tensor's dtype, shape and bits; see `weights_digest`.

    Of a tensor that wraps others (torchao's quantised weights) it says theirs.
    """
    if is_traceable_wrapper_subclass(tensor):
        parts, _ = tensor.__tensor_flatten__()
        return _of_all(f"{part} {tensor_digest(getattr(tensor, part))}" for part in parts)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    factors = _factors().to(tensor.device)
    flat = tensor.contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))  # one value is contiguous at any stride, of which bytes have no view
    for part in flat.view(torch.uint8).split(PART):
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
