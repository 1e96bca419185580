"""Old names of SiT's weights, from before it used timm's layers and HybridAttention, and today's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

# part of an old name -> part of today's name; no name of today contains an old part
RENAMED = {
    "patch_embed.weight": "patch_embed.proj.weight",
    "patch_embed.bias": "patch_embed.proj.bias",
    ".ff.net.0.proj.": ".ff.fc1.",
    ".ff.net.2.": ".ff.fc2.",
    ".attn.map_q.": ".attn.hybrid.map_q.",
    ".attn.map_k.": ".attn.hybrid.map_k.",
    ".attn.gate": ".attn.hybrid.gate",
}
T = TypeVar("T")


def renamed(tensors: Mapping[str, T]) -> dict[str, T]:
    """Replace old names of a SiTTransformer2DModel's weights by today's; other names stay. Returns a new dict.

    Names may have a prefix, such as "average/" in a training checkpoint. If a weight exists under both names, the old
    name stays, so that loading fails with an unknown weight.
    """
    found = {}
    for name, value in tensors.items():
        today = name
        for old, new in RENAMED.items():
            today = today.replace(old, new)
        found[name if today in tensors else today] = value
    return found
