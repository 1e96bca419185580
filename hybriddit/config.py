"""HybridConfig and the run configs: dataclasses; YAML plus dotted overrides; an unknown key is an error."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase

LAYER_KINDS = ("hybrid", "window", "linear", "dense")
GATES = ("head", "channel", "token")


@dataclass(frozen=True)
class HybridConfig:
    """How the attention layers of a diffusion transformer are replaced.

    window, stride, dilation: int or (rows, columns), in tokens; a window of None is linear attention alone.
    linear: False leaves the far branch out (window attention alone).
    map_rank: hidden width of the query and key maps; None is a sixteenth of the layer's width.
    gate: "head", "channel" or "token".
    layers: {fnmatch pattern on module names: "hybrid" | "window" | "linear" | "dense"}; the first match wins, a layer
        that matches none is "hybrid".
    """

    window: int | tuple[int, int] | None = 16
    stride: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    linear: bool = True
    map_rank: int | None = None
    gate: str = "head"
    layers: dict[str, str] = field(default_factory=dict)
