"""A teacher's attention layers under a probe: they compute what they always do, and are measured meanwhile.

A probe takes the place of a converted layer's HybridAttention, so that every family's own processor hands it queries,
keys and values. Its output is the dense layer's; beside that it fits candidates, which could replace the layer, and
measures them and the layer's attention map.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..attention import HybridAttention, TokenLayout
from ..attention.window.rule import axis_mask
from ..config import HybridConfig
from ..models import hybridize, restore_dense
from ..models.branches import relative_error
from ..models.family import Family, LayerShape, family_of
from .candidates import candidate_names, parse_candidate

RADII = (0, 1, 2, 4, 8, 16, 32, 64)  # in tokens: a window of 2 r + 1 centred on the query holds what is within r
MAP_ELEMENTS = 2**26  # of a map's part that is in memory at once: 256 MiB
RATE = 1e-2  # of Adam, for candidates' projections and gates
TIMED = 5


class Probe(HybridAttention):
    """Stands in for one converted layer of a model that runs as its dense teacher.

    Args:
        candidates: what could replace the layer, by name, in float32.
        window: (rows, columns), the window that the statistics of the attention map take for near.

    Set before a pass of the model: `task`, one of "fit" (one step of each candidate's own optimizer towards the dense
    output), "measure" (fills `found`), "time" (fills `seconds`), None; and `replaced`, the name of a candidate whose
    output the layer gives in place of its own, or None.
    """

    def __init__(self, shape: LayerShape, rotary: str, window: tuple[int, int], candidates: dict[str, HybridAttention]):
        super().__init__(
            shape.width,
            shape.heads,
            shape.head_dim,
            kv_heads=shape.kv_heads,
            window=window,
            map_rank=0,
            rotary=rotary,
            gate="token",
        )
        self.deltas = nn.ModuleDict()
        self.candidates = nn.ModuleDict(candidates)
        self.optimizers = {
            name: torch.optim.Adam(candidate.parameters(), lr=RATE)
            for name, candidate in candidates.items()
            if candidate.far is not None
        }
        self.task: str | None = None
        self.replaced: str | None = None
        self.queries = 0  # how many of the image's queries the statistics of the map are taken over
        self.found: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.hidden_states: torch.Tensor | None = None

    def far_inputs(self, hidden_states, query, key, **projections):
        """Keep the layer's input, from which candidates compute their gates; the candidates have no maps."""
        self.hidden_states = hidden_states
        return None, None, None

    def forward(self, query, key, value, token_layout, *, scale=None, text_mask=None, **far):
        """The dense layer's output, or that of the candidate `replaced`: see HybridAttention.forward."""
        given, self.hidden_states = self.hidden_states, None
        if token_layout.text_length == 0:
            text_mask = None
        settings = {"scale": scale, "text_mask": text_mask}
        inputs = [tokens.detach().float() for tokens in (query, key, value)]
        if self.replaced is not None:
            return self._of_candidate(self.replaced, given, inputs, token_layout, settings).to(query.dtype)
        dense = self.softmax(
            query, self.for_every_head(key), self.for_every_head(value), token_layout, scale, text_mask
        )
        if self.task == "fit":
            for name in self.optimizers:
                self._fit(name, given, inputs, token_layout, settings, dense)
        elif self.task == "measure":
            errors = {
                name: relative_error(
                    _image(self._of_candidate(name, given, inputs, token_layout, settings), token_layout),
                    _image(dense, token_layout),
                )
                for name in self.candidates
            }
            statistics = map_statistics(
                inputs[0], self.for_every_head(inputs[1]), token_layout, self.window, self.queries, **settings
            )
            self.found.append({**statistics, "errors": errors})
        elif self.task == "time":
            self._time(given, (query, key, value), token_layout, settings)
        return dense

    def _of_candidate(self, name, hidden_states, inputs, token_layout, settings) -> torch.Tensor:
        candidate = self.candidates[name]
        gate = candidate.far_inputs(hidden_states.detach(), None, None)[2]
        return candidate(*inputs, token_layout, gate=gate, **settings)

    def _fit(self, name, hidden_states, inputs, token_layout, settings, dense) -> None:
        optimizer = self.optimizers[name]
        with torch.enable_grad():
            out = self._of_candidate(name, hidden_states, inputs, token_layout, settings)
            loss = relative_error(_image(out, token_layout), _image(dense, token_layout)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def _time(self, hidden_states, inputs, token_layout, settings) -> None:
        """The median seconds of each candidate, and of the dense layer, in the model's own dtype, taking turns."""
        query, key, value = inputs
        calls = {"dense": lambda: self.softmax(query, self.for_every_head(key), self.for_every_head(value),
                                               token_layout, settings["scale"], settings["text_mask"])}  # fmt: skip
        copies = {}
        for name, candidate in self.candidates.items():
            copies[name] = copy.deepcopy(candidate).cast(query.dtype)
            calls[name] = lambda name=name: copies[name](
                *inputs, token_layout, gate=copies[name].far_inputs(hidden_states, None, None)[2], **settings
            )
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(TIMED + 1):
            for name, call in calls.items():
                _wait(query.device)
                started = time.perf_counter()
                call()
                _wait(query.device)
                if turn:  # the first is for trials and compilation
                    samples[name].append(time.perf_counter() - started)
        self.seconds = {name: sorted(values)[TIMED // 2] for name, values in samples.items()}


@contextlib.contextmanager
def probed(model: nn.Module, windows: list[int], seed: int = 0) -> Iterator[dict[str, Probe]]:
    """Within the block, a dense model's layers that hybrid attention can replace are probes, by name; then it is dense.

    windows: sides, in tokens, of the candidates "window:W" and "hybrid:W"; there is also "linear". The candidates' far
    branch is HybridConfig's default, but for the maps, which it has not; seed: of its projections. The statistics take
    the first window for near.
    """
    family = family_of(model)
    # a config that makes each layer hybrid, so that every family's own processors are in place
    hybridize(model, HybridConfig(window=windows[0], map_rank=0))
    try:
        probes, layers = {}, family.attentions(model)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for name in filter(family.converts, layers):
                device = next(layers[name].parameters()).device
                probes[name] = make_probe(family, layers[name], windows).to(device)
                probes[name].idle = layers[name].hybrid.idle
                layers[name].hybrid = probes[name]
        yield probes
    finally:
        restore_dense(model)


def make_probe(family: Family, attn: nn.Module, windows: list[int]) -> Probe:
    """The probe of one attention layer, with fresh candidates."""
    shape, rotary = family.layer_shape(attn), "model" if family.rotary else "none"
    candidates = {name: make_candidate(shape, name, rotary=rotary, map_rank=0) for name in candidate_names(windows)}
    return Probe(shape, rotary, (windows[0],) * 2, candidates)


def make_candidate(shape: LayerShape, name: str, **settings: Any) -> HybridAttention:
    """The HybridAttention of a candidate's name, such as "hybrid:16" or "linear"; settings: of the far branch."""
    kind, window = parse_candidate(name)
    return HybridAttention(
        shape.width,
        shape.heads,
        shape.head_dim,
        kind=kind,
        kv_heads=shape.kv_heads,
        window=window and (window, window),
        gate="token",
        **settings,
    )


@torch.no_grad()
def map_statistics(
    query: torch.Tensor,
    key: torch.Tensor,
    token_layout: TokenLayout,
    window: tuple[int, int],
    queries: int,
    *,
    scale: float | None = None,
    text_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What the softmax attention of some of an image's queries, spread evenly over it, looks like; means over B.

    query, key: [B, S, heads, D] of text and image. Only so many heads are in memory at once that their part of the map
    has at most MAP_ELEMENTS elements.

    Returns "radius" [heads, len(RADII)]: the mass on image tokens within each radius (the larger of the distances in
    rows and in columns), "text" and "window" [heads]: the mass on the text, and on the window; "entropy" [heads], in
    nats, of the whole map; "rest_rank" [heads]: the stable rank |A|_F^2 / |A|_2^2 of what is neither in the window nor
    text, over these queries; "map" [heads, rows, columns]: the attention of the middle one of them.
    """
    (grid,), (rows, columns) = token_layout.grids, token_layout.grids[0]
    image_query, image_key = token_layout.split(query)[1], token_layout.split(key)[1]
    text_key = token_layout.split(key)[0]
    count, device = rows * columns, query.device
    chosen = torch.linspace(0, count - 1, min(queries, count), device=device).round().long()
    row, column = torch.arange(count, device=device) // columns, torch.arange(count, device=device) % columns
    distance = torch.maximum((row[chosen, None] - row).abs(), (column[chosen, None] - column).abs())
    within = torch.bucketize(distance, torch.tensor(RADII, device=device))  # the first radius that holds the token
    sides = [min(side, length) for side, length in zip(window, grid, strict=True)]
    near_rows, near_columns = (axis_mask(n, w, 1, 1).to(device) for n, w in zip(grid, sides, strict=True))
    near = near_rows[row[chosen]][:, row] & near_columns[column[chosen]][:, column]  # [queries, N]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads, batch = query.shape[2], len(query)
    step = max(1, MAP_ELEMENTS // (len(chosen) * (count + token_layout.text_length)))
    parts: list[dict[str, torch.Tensor]] = []
    for item in range(batch):
        pieces = []
        for first in range(0, heads, step):
            some = slice(first, first + step)
            q = image_query[item, chosen, some].transpose(0, 1).float() * scale  # [h, queries, D]
            keys = torch.cat([text_key[item, :, some], image_key[item, :, some]]).transpose(0, 1).float()
            scores = q @ keys.transpose(1, 2)
            if text_mask is not None:
                scores[..., : token_layout.text_length].masked_fill_(~text_mask[item], float("-inf"))
            weights = scores.softmax(-1)
            text, image = weights.split([token_layout.text_length, count], dim=-1)
            buckets = torch.zeros(*image.shape[:2], len(RADII) + 1, device=device)
            buckets.scatter_add_(2, within.expand_as(image), image)
            rest = image.masked_fill(near, 0.0)
            squares = torch.linalg.eigvalsh(rest.double() @ rest.double().transpose(1, 2))  # of the singular values
            pieces.append(
                {
                    "radius": buckets.cumsum(-1)[..., :-1].mean(1),
                    "text": text.sum(-1).mean(1),
                    "window": (image * near).sum(-1).mean(1),
                    "entropy": torch.special.entr(weights).sum(-1).mean(1),
                    "rest_rank": (squares.sum(-1) / squares[:, -1].clamp_min(1e-30)).float(),
                    "map": image[:, len(chosen) // 2].unflatten(1, grid),
                }
            )
        parts.append({name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})
    return {name: torch.stack([part[name] for part in parts]).mean(0).cpu() for name in parts[0]}


def _image(tokens: torch.Tensor, token_layout: TokenLayout) -> torch.Tensor:
    return token_layout.split(tokens)[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
