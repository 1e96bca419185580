"""Far branches: modules that attend to the whole image at a cost linear in its tokens. One file each, and one row here.

A mixer is made by Mixer(heads, head_dim, feature_map=..., projection=..., temperature=..., center_keys=...) and has the
methods of LinearMixer: `forward`, `flops` and `work`; and its `states`. One whose sums over parts of the keys add up to
those over all of them says so by `sums_add_up`: its layers can be shown an image in strips; and one that runs on an
image spread over processes by `spreads`. The others run on whole images alone.
"""

from __future__ import annotations

import torch

from .blocks import BlockMixer
from .linear import LinearMixer
from .multiscale import MultiscaleMixer
from .pooled import PooledMixer
from .scan import ScanMixer

MIXERS = {
    "linear": LinearMixer,
    "blocks": BlockMixer,
    "multiscale": MultiscaleMixer,
    "pooled": PooledMixer,
    "scan": ScanMixer,
}


def check_mixer(mixer: str, **settings) -> None:
    """Raise ValueError for an unknown mixer, or settings that it does not take at any width of the heads."""
    if mixer not in MIXERS:
        raise ValueError(f"unknown mixer {mixer!r}: use one of {', '.join(MIXERS)}")
    with torch.device("meta"):
        MIXERS[mixer](1, 1, **settings)
