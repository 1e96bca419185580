"""Whether all processes have the same model and the same inputs, told on each of them by numbers that travel."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..machine import running_versions
from ..models.identity import tensor_digest
from ..models.wrapping import is_plain
from .rows import gathered_numbers


def check_equal_models(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Raise ValueError, on every process, where one has other versions, another config or other weights."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    facts = {
        "versions": json.dumps(running_versions()),
        "model class": type(model).__name__,
        "model config": json.dumps(config, sort_keys=True, default=repr),
    }
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for names, values in (
        (list(facts), [_number(text) for text in facts.values()]),
        ([f"weights ({name})" for name in weights], [_number(_digest(x)) for x in weights.values()]),
    ):
        found = _difference(values, group)
        if found is not None:
            rank, place = found
            here = f": here {facts[names[place]]}" if names[place] == "versions" else ""
            raise ValueError(
                f"rank {rank} has other {names[place]} than rank 0{here}: give every process the same model"
            )


def check_equal_inputs(inputs: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Raise ValueError, on every process, where a process calls the model with other tensors than the first."""
    given = [(name, x) for name, value in sorted(inputs.items()) for x in _tensors(value)]
    told = [(name, tuple(x.shape), str(x.dtype), _digest(x)) for name, x in given]
    found = _difference([_number(repr(told))], group)
    if found is not None:
        raise ValueError(
            f"rank {found[0]} calls the model with other inputs than rank 0: every process needs the same prompt, "
            "settings and seed"
        )


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        yield from (x for x in value if isinstance(x, Tensor))


def _difference(values: Sequence[int], group: dist.ProcessGroup) -> tuple[int, int] | None:
    """The first rank whose values differ from rank 0's, and the place of the first that does; None if all are equal."""
    for rank, others in enumerate(rows := gathered_numbers(values, group)):
        for place, (own, first) in enumerate(zip(others, rows[0], strict=True)):
            if own != first:
                return rank, place
    return None


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _digest(x: Tensor) -> str:
    """The tensor's digest; nothing for what is kept in another form than plain numbers: quantised or offloaded weights."""
    return tensor_digest(x.detach()) if is_plain(x) else ""
