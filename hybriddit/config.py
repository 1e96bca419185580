"""HybridConfig: what each attention layer of a transformer is converted to. Imports neither torch nor diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

LAYER_KINDS = ("hybrid", "window", "linear", "dense")
GATES = ("head", "channel", "token")
ROTARY = ("model", "axial", "none")
JOINS = ("gate", "joint")
WINDOW_SHAPES = ("square", "circle")
FULL = "full"  # in place of a rank
# What the far branch's fields are where they are left out: of today's mixers, and of LinFusion's (arXiv 2409.02097).
FAR_BRANCH = {"feature_map": "polynomial", "projection": None, "rotary": "auto", "join": "joint"}
LINFUSION = {"feature_map": "elu", "projection": 0, "rotary": "none", "join": "gate"}
# The fields that the first version had; and what those added since were then, for the files that it wrote.
FIRST_FIELDS = {"window", "stride", "dilation", "linear", "map_rank", "gate", "layers", "delta_rank"}
ADDED_FIELDS = {
    "mixer": "linear",
    **LINFUSION,
    "temperature": False,
    "center_keys": False,
    "value_conv": None,
    "windows": {},
    "strict_layers": False,
    "window_shape": "square",
    "pooled_keys": None,
    "delta_projections": None,
}
MAX_BLOCKS = 128  # every_nth_dense writes patterns for so many blocks of a stack; the longest today has 38
BLOCK = "*blocks.{}.*"  # the pattern of one block of every stack, by its index


@dataclass(frozen=True)
class HybridConfig:
    """How the attention layers of a diffusion transformer are replaced.

    Raises ValueError (TypeError if layers is not a mapping), in one line, where a field cannot work.

    window, stride, dilation: int or (rows, columns), in tokens; window=None: linear attention alone.
    window_shape: "square"; or "circle": the tokens nearer than `window`, an int that is then a radius, with neither stride
        nor dilation; at borders it is cut off, where a square window shifts inwards.
    pooled_keys: side in tokens of blocks of the image, whose keys and values are pooled by a learned weight of each
        place in a block; every image token sees those of all blocks, in one softmax with its window and the text (the
        mixer "pooled" is a far branch, which the gate joins). The cost grows with the square of the image's tokens,
        divided by side². None: no pooled keys.
    linear: False leaves the far branch out of "hybrid" layers (window attention alone).
    map_rank: hidden width of the far branch's query and key maps; None is a sixteenth of the layer's width; "full": its
        width; 0: no maps, the far branch takes the layer's own queries and keys.
    gate: "token", a value per head that is linear in the token (the default); "head" or "channel": one value each.
    mixer: the far branch's attention over the whole image: "linear"; "blocks", "scan", "multiscale" or "pooled", after
        other papers (the keys of `attention.mixers.MIXERS`); or "linfusion", which is "linear" with LinFusion's
        settings: feature_map "elu", projection 0, rotary "none", join "gate".
    feature_map: the function phi of the mixer's queries and keys: "polynomial" (of degree 2, the default), "hedgehog"
        or "elu". It and the mixer are checked when a model is converted (`attention.mixers`).
    projection: channels m of the learned projection [heads, D, m] before phi, up to 128; 0: none; None: as many as give
        phi at most D features, so that the mixer's state is D x D: 14 of 128 (hedgehog: 64).
    rotary: positions of the far branch's queries and keys: "model", the model's own rotary embedding; "axial", a rotary
        embedding of rows and columns; "none"; or "auto", the model's own if it has one, else "none".
    temperature: whether each head of the far branch learns a temperature of its queries, and one of its keys.
    center_keys: whether the mean over the image is subtracted from the far branch's keys.
    value_conv: side, an odd number, of a depthwise convolution of the values over the grid, which is added to the
        output of hybrid and linear layers and is zero at the start; None: no convolution.
    join: "joint" (the default): one softmax-like average of all values, in which those of the window and the text have
        weight exp(q . k), and the whole image's sinh(gate) / 10 times the far branch's weight; or "gate": near +
        gate * (far - near). With both, a gate of 0 is near alone.
    layers: {fnmatch pattern on module names: "hybrid" | "window" | "linear" | "dense"}; the first match wins, and a
        layer that no pattern matches is "hybrid". Or (pattern, kind) pairs.
    windows: {fnmatch pattern on module names: window} of the layers whose window is not `window`, likewise; it takes
        part only where `window` is not None.
    strict_layers: True refuses a model that has an attention layer which no pattern of `layers` matches. The plans of
        `hybriddit analyze` name every layer and have it, so that a plan of another model is refused.
    delta_rank: rank of low-rank updates of the layer's projections; "full": updates of their whole matrices and biases;
        None: the projections stay the teacher's.
    delta_projections: fnmatch patterns of the names of the projections that get updates, such as "to_q"; None: all.
    """

    window: int | tuple[int, int] | None = 16
    stride: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    linear: bool = True
    map_rank: int | str | None = None
    gate: str = "token"
    layers: dict[str, str] = field(default_factory=dict)
    delta_rank: int | str | None = None
    mixer: str = "linear"
    feature_map: str | None = None
    projection: int | None = None
    rotary: str | None = None
    temperature: bool = False
    center_keys: bool = False
    value_conv: int | None = None
    join: str | None = None
    windows: dict[str, int | tuple[int, int]] = field(default_factory=dict)
    strict_layers: bool = False
    window_shape: str = "square"
    pooled_keys: int | None = None
    delta_projections: list[str] | None = None

    def __post_init__(self):
        for name in ("window", "stride", "dilation"):
            value = getattr(self, name)
            if name != "window" or value is not None:
                object.__setattr__(self, name, _checked_sides(name, value))
        if self.delta_rank not in (None, FULL) and not _is_count(self.delta_rank):
            raise ValueError(f'delta_rank must be a positive integer, "{FULL}" or None, not {self.delta_rank!r}')
        self._check_delta_projections()
        if self.pooled_keys is not None and (not _is_count(self.pooled_keys) or self.pooled_keys < 2):
            raise ValueError(f"pooled_keys must be an integer of 2 or more, or None, not {self.pooled_keys!r}")
        for name, words in (("map_rank", (None, FULL)), ("projection", (None,))):
            value = getattr(self, name)
            if value not in words and not _is_count(value) and (value != 0 or value is False):
                full = f', "{FULL}"' if FULL in words else ""
                raise ValueError(f"{name} must be a positive integer, 0 for none{full}, or None, not {value!r}")
        for name in ("linear", "temperature", "center_keys", "strict_layers"):
            if getattr(self, name) not in (True, False):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        side = self.value_conv
        if side is not None and (not _is_count(side) or side % 2 == 0):
            raise ValueError(f"value_conv must be an odd integer above 0, or None, not {side!r}")
        self._complete_far_branch()
        for name, known in (("gate", GATES), ("join", JOINS), ("window_shape", WINDOW_SHAPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: use one of {', '.join(known)}")
        for name, values in (("layers", "layer kinds"), ("windows", "windows")):
            given = getattr(self, name)
            pairs = list(given.items()) if isinstance(given, Mapping) else given  # pairs are what `to_dict` gives
            if not isinstance(pairs, (list, tuple)) or not all(map(_is_layer_pair, pairs)):
                raise TypeError(f"{name} must map name patterns to {values}, not {given!r}")
            object.__setattr__(self, name, dict(pairs))
        for pattern, window in self.windows.items():
            self.windows[pattern] = _checked_sides(f"the window of {pattern!r}", window)
        for pattern, kind in self.layers.items():
            if kind not in LAYER_KINDS:
                raise ValueError(f"unknown layer kind {kind!r} for {pattern!r}: use one of {', '.join(LAYER_KINDS)}")
        if self.window is None:
            if not self.linear:
                raise ValueError("window=None with linear=False leaves no attention: give a window or linear=True")
            if "window" in self.layers.values():
                raise ValueError('a layer of kind "window" needs a window: window is None')
            if self.windows:
                raise ValueError("windows of layers need a window for the others: window is None")
            for name in ("window_shape", "pooled_keys"):
                if getattr(self, name) != ADDED_FIELDS[name]:
                    raise ValueError(f"{name} is of layers with a window, and window is None: leave it out")
            return
        if self.window_shape == "circle":
            self._check_circle()
        for window in (self.window, *self.windows.values()):
            if any(stride > side for stride, side in zip(self.pair("stride"), _pair(window), strict=True)):
                raise ValueError(f"stride {self.stride} is larger than window {window}: use a stride up to the window")

    def _check_circle(self) -> None:
        for window in (self.window, *self.windows.values()):
            if not isinstance(window, int):
                raise ValueError(f'the window of window_shape "circle" is its radius, one integer, not {window!r}')
        for name in ("stride", "dilation"):
            if self.pair(name) != (1, 1):
                raise ValueError(f'window_shape "circle" has no {name}: leave it out')

    def _check_delta_projections(self) -> None:
        patterns = self.delta_projections
        if patterns is None:
            return
        if not isinstance(patterns, (list, tuple)) or not patterns or not all(isinstance(p, str) for p in patterns):
            raise ValueError(f"delta_projections must be a list of names of projections, or None, not {patterns!r}")
        if self.delta_rank is None:
            raise ValueError("delta_projections says which projections get updates, and delta_rank is None: set it too")
        object.__setattr__(self, "delta_projections", list(patterns))

    def updates(self, projection: str) -> bool:
        """Whether a projection of this name gets an update."""
        if self.delta_rank is None:
            return False
        patterns = self.delta_projections
        return patterns is None or any(fnmatchcase(projection, pattern) for pattern in patterns)

    def _complete_far_branch(self) -> None:
        """Give the far branch's fields that were left out their values; "linfusion" stands for several."""
        linfusion = self.mixer == "linfusion"
        if linfusion and self.map_rank == 0:
            raise ValueError('mixer "linfusion" has query and key maps: leave map_rank out, or use mixer "linear"')
        for name, value in (LINFUSION if linfusion else FAR_BRANCH).items():
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, value)
            elif linfusion and given != value:
                raise ValueError(
                    f'mixer "linfusion" has {name} {value!r}, not {given!r}: leave {name} out, or use mixer "linear"'
                )
        if linfusion:
            object.__setattr__(self, "mixer", "linear")
        for name in ("mixer", "feature_map"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a name, not {getattr(self, name)!r}")
        if self.rotary not in ("auto", *ROTARY):
            raise ValueError(f"unknown rotary {self.rotary!r}: use one of auto, {', '.join(ROTARY)}")

    def pair(self, name: str) -> tuple[int, int] | None:
        """`window`, `stride` or `dilation` as (rows, columns); None where the window is None."""
        return _pair(getattr(self, name))

    @property
    def mixer_settings(self) -> dict[str, Any]:
        """The fields that the mixer is made with."""
        return {name: getattr(self, name) for name in ("feature_map", "projection", "temperature", "center_keys")}

    def kind(self, layer: str) -> str:
        """The kind that the attention layer of this name gets: one of LAYER_KINDS, with window and linear applied."""
        kind = _first_match(self.layers, layer) or "hybrid"
        if kind == "hybrid" and self.window is None:
            return "linear"
        if kind == "hybrid" and not self.linear:
            return "window"
        return kind

    def window_of(self, layer: str) -> tuple[int, int] | None:
        """The window that the attention layer of this name gets, as (rows, columns)."""
        return _pair(_first_match(self.windows, layer) or self.window)

    def check_layers(self, names: Iterable[str]) -> None:
        """Raise ValueError if a pattern of `layers` or `windows` matches none of a model's attention layers.

        With `strict_layers`, also if a layer is matched by no pattern of `layers`.

        Patterns such as `every_nth_dense` writes (`*blocks.40.*`) may point past the last block, because they are
        written without knowing the model.
        """
        names = list(names)
        written = {BLOCK.format(index) for index in range(MAX_BLOCKS)}
        for field_name in ("layers", "windows"):
            for pattern in match_layers(getattr(self, field_name), names).unmatched:
                if pattern not in written:
                    raise ValueError(
                        f"hybrid.{field_name}: {pattern!r} matches no attention layer of this model; they are named "
                        f"like {names[0]!r} or {names[-1]!r}"
                    )
        if self.strict_layers:
            others = [name for name in names if _first_match(self.layers, name) is None]
            if others:
                raise ValueError(
                    f"hybrid.layers names {len(names) - len(others)} of this model's {len(names)} attention layers, "
                    f"{others[0]!r} not: it was made for another model (strict_layers=false makes the others hybrid)"
                )

    @classmethod
    def every_nth_dense(cls, n: int, **kwargs: Any) -> HybridConfig:
        """A config that keeps the teacher's attention in every n-th block (blocks 0, n, 2n, … of each stack).

        kwargs: other fields.
        """
        if not _is_count(n) or n < 2:
            raise ValueError(f"every_nth_dense needs an n of 2 or more, not {n!r}")
        dense = {BLOCK.format(index): "dense" for index in range(0, MAX_BLOCKS, n)}
        return cls(**{**kwargs, "layers": {**dense, **kwargs.get("layers", {})}})

    @classmethod
    def from_plan(cls, path: str | Path) -> HybridConfig:
        """Read a YAML or JSON file of these fields. Raises FileNotFoundError, or ValueError naming the file."""
        try:
            return cls.from_dict(read_plan(path))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HybridConfig:
        """The inverse of `to_dict`; fields may be missing. Keys with an underscore first are notes and are ignored."""
        if not isinstance(values, Mapping):
            raise TypeError(f"a HybridConfig is made from field names and their values, not from {values!r}")
        known = [f.name for f in fields(cls)]
        values = {name: value for name, value in values.items() if not str(name).startswith("_")}
        for name in values:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
                raise ValueError(f"unknown field {name!r} of HybridConfig: {hint}")
        return cls(**values)

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> HybridConfig:
        """`from_dict` for saved models and adapters, which hold all fields that their version had.

        What an older version did not have yet means what it did then, and not today's defaults.
        """
        if isinstance(values, Mapping) and values.keys() >= FIRST_FIELDS:
            values = {**ADDED_FIELDS, **values}
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON would give them back (pairs as lists).

        `layers` and `windows` are lists of pairs: diffusers sorts the keys of a saved config, and here their order
        counts.
        """
        ordered = {"layers": list(self.layers.items()), "windows": list(self.windows.items())}
        return json.loads(json.dumps({**asdict(self), **ordered}))


def read_plan(path: str | Path) -> Any:
    """What a YAML or JSON file of HybridConfig's fields holds, unchecked. Raises FileNotFoundError, or ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no plan file {path}")
    import yaml  # imported here: the config itself needs only the standard library

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{' '.join(str(error).split())}") from error


class LayerMatch(NamedTuple):
    """The kind of each layer (None if no pattern matches it), and the patterns that match no layer."""

    kinds: list[str | None]
    unmatched: list[str]


def match_layers(patterns: Mapping[str, str], names: Sequence[str]) -> LayerMatch:
    """Apply {fnmatch pattern: kind} to layers of these names, in order; the first pattern that matches wins."""
    return LayerMatch(
        [_first_match(patterns, name) for name in names],
        [p for p in patterns if not any(fnmatchcase(name, p) for name in names)],
    )


def _first_match(patterns: Mapping[str, Any], layer: str) -> Any:
    """What the first pattern that matches the layer's name is mapped to, or None."""
    return next((value for pattern, value in patterns.items() if fnmatchcase(layer, pattern)), None)


def _pair(sides: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return sides if sides is None or isinstance(sides, tuple) else (sides, sides)


def _checked_sides(name: str, value: Any) -> int | tuple[int, int]:
    """A positive int, or a pair of them as a tuple: JSON and YAML give lists. Raises ValueError for anything else."""
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2 or not all(_is_count(side) for side in sides):
        raise ValueError(f"{name} must be a positive integer or a pair of them (rows, columns), not {value!r}")
    return sides if isinstance(value, (tuple, list)) else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_layer_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], str)
