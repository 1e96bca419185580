"""Tell the components of a pipeline apart by their content: by digests of their weights, and their configs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..models.identity import weights_digest


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
