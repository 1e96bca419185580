"""SiT weights were saved under other names before they were timm's and HybridAttention's: old names, and today's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

# part of an old name -> the part of today's; no name of today holds an old part
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
    """The mapping with every old name of a SiTTransformer2DModel's weights replaced by today's; others stay.

    Names may have something in front ("average/transformer_blocks.0…" in a training checkpoint). An old name whose new
    name is there too stays as it is, so that whoever loads the mapping still finds one weight too many.
    """
    found = {}
    for name, value in tensors.items():
        today = name
        for old, new in RENAMED.items():
            today = today.replace(old, new)
        found[name if today in tensors else today] = value
    return found
