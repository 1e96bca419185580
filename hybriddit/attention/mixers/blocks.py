"""Block states: every part of the image weighs the sums over the other parts by itself (after MHLA, arXiv 2601.07832)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import TokenLayout
from ..linear import FEATURE_MAPS, KeySums, sum_keys
from ..rows import RowShard
from .linear import LinearMixer

SIDE = 4  # parts of an image along each axis, whatever its size
PARTS = SIDE**2


class BlockMixer(LinearMixer):
    """Linear attention with a learned factor on the weights between any two of SIDE x SIDE parts of an image.

    For a query in part a, a key in part b has the weight exp(c[a, b]) phi(q) . phi(k), with c [heads, parts, parts] learned
    and 0 at the start, which is LinearMixer. Parts are equal fractions of a grid's sides, so that c is for any size; of
    several grids those at the same place are one part. Text keys have no factor.

    The passes are LinearMixer's, with the parts as images of a batch. Raises ValueError as LinearMixer does, and for a
    feature map that the backends of `linear_attention` lack.
    """

    states = PARTS + 1  # of the image's parts, and of text

    def __init__(self, heads: int, head_dim: int, **settings):
        super().__init__(heads, head_dim, **settings)
        if not FEATURE_MAPS[self.feature_map].fused:
            raise ValueError(f"mixer 'blocks' does not take feature map {self.feature_map!r}, which has no backend")
        self.log_factors = nn.Parameter(torch.zeros(heads, PARTS, PARTS))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        near: Tensor | None = None,
        gate: Tensor | None = None,
        key_mask: Tensor | None = None,
        joint: bool = False,
        lse: Tensor | None = None,
        only_sums: bool = False,
        rows: RowShard | None = None,
        layout: TokenLayout | None = None,
    ) -> Tensor | PartSums | Callable[[int], PartSums]:
        """As LinearMixer's, with the keys' layout; queries are of its image. only_sums gives PartSums, not KeySums."""
        query, key, phi = self.prepared(query, key, key_mask, rows)
        text, image = zip(*map(layout.split, (key, value)), strict=True)
        pieces, keys = Pieces.of(layout), layout.text_length + layout.image_length
        own = [sum_keys(*tokens, **phi) for tokens in zip(*map(pieces.apart, (query, *image)), strict=True)]
        words = []
        if layout.text_length:
            mask = None if key_mask is None else layout.split(key_mask)[0]
            words = [sum_keys(text[0], *text, key_mask=mask, **phi)]
        count = keys if rows is None else 1
        share = layout.text_length / count
        state = pieces.by_part([sums.state for sums in own], count, [sums.state * share for sums in words])
        mean = pieces.by_part([sums.mean for sums in own], count, [sums.mean * share for sums in words])
        factors = F.pad(self.log_factors.to(state.dtype), (0, 1)).exp()
        eps = FEATURE_MAPS[self.feature_map].eps
        if rows is None:
            sums = PartSums(own, pieces, state, mean, eps, count, factors)
            return sums if only_sums else sums.joined(near, gate, joint, lse)
        begun = rows.total(state, mean)
        eps = eps * (keys + (rows.height - rows.count) * layout.grids[0][1])

        def finish(queries: int) -> PartSums:  # of any number, as the passes are told that of each piece
            return PartSums(own, pieces, *begun(), eps, count, factors)

        return finish if only_sums else finish(query.shape[1]).joined(near, gate, joint, lse)

    def flops(self, queries: int, keys: int) -> dict[str, int]:
        """LinearMixer's, and the mixing of the parts' states."""
        found = super().flops(queries, keys)
        found["products"] += 2 * PARTS * self.states * self.heads * self.features * self.head_dim
        return found


class PartSums(NamedTuple):
    """The sums over the keys of each part and of text, for queries that weigh them; in place of `linear.KeySums`.

    own: for each batch of pieces KeySums with its queries; their sums, over the pieces' own keys, are not read.
    state [states, B, heads, F, E] and mean [states, B, heads, F, 1]: over the keys, as if there were `count`, as is eps.
    factors: [heads, parts, states], on the weights of a part's queries.
    """

    own: Sequence[KeySums]
    pieces: Pieces
    state: Tensor
    mean: Tensor
    eps: float
    count: int
    factors: Tensor

    def joined(
        self,
        near: Tensor | None = None,
        gate: Tensor | None = None,
        joint: bool = False,
        lse: Tensor | None = None,
    ) -> Tensor:
        """As `KeySums.joined`."""
        if gate is not None and gate.ndim == 4:  # one of all images too, as pieces are images of a batch
            gate = gate.expand(len(near), self.pieces.length, -1, -1)
        beside = [
            self.pieces.apart(x) if x is not None and x.ndim > 2 else itertools.repeat(x) for x in (near, gate, lse)
        ]
        found = []
        for own, members, near, gate, lse in zip(self.own, self.pieces.batches.values(), *beside, strict=False):
            # the passes take means over as many keys as a piece has tokens
            share = self.count / own.query.shape[1]
            factors = self.factors if members == list(range(PARTS)) else self.factors[:, [i % PARTS for i in members]]
            with torch.autocast(factors.device.type, enabled=False):
                state, mean = (
                    torch.einsum("kbhfe,hak->abhfe", x, factors * share).flatten(0, 1).contiguous()
                    for x in (self.state, self.mean)
                )
            found.append(own._replace(state=state, mean=mean, eps=self.eps * share).joined(near, gate, joint, lse))
        return self.pieces.together(found)


class Pieces(NamedTuple):
    """An image's tokens by its parts: what a grid, or the rows of it that are here, has of a part is a piece.

    lengths: for each grid the rows of its SIDE pieces down, and the columns of those across; some may be 0.
    batches: by their (rows, columns), the numbers of the pieces: SIDE x SIDE for each grid in order, row by row.
    """

    lengths: list[tuple[list[int], list[int]]]
    batches: dict[tuple[int, int], list[int]]

    @classmethod
    def of(cls, layout: TokenLayout) -> Pieces:
        """Of the image in this layout."""
        places = [layout.place, *((0, rows) for rows, _ in layout.grids[1:])]
        lengths = [
            (lengths_within(first, rows, height), lengths_within(0, columns, columns))
            for (rows, columns), (first, height) in zip(layout.grids, places, strict=True)
        ]
        batches: dict[tuple[int, int], list[int]] = {}
        shapes = [shape for down, across in lengths for shape in itertools.product(down, across)]
        for number, shape in enumerate(shapes):
            if all(shape):
                batches.setdefault(shape, []).append(number)
        return cls(lengths, batches)

    @property
    def length(self) -> int:
        """Tokens of the image."""
        return sum(sum(down) * sum(across) for down, across in self.lengths)

    @property
    def even(self) -> bool:
        """Whether all are of one grid and one size."""
        return len(self.lengths) == 1 and list(self.batches.values()) == [list(range(PARTS))]

    def apart(self, x: Tensor) -> list[Tensor]:
        """[B, N, ...] -> for each batch of pieces [pieces * B, tokens of a piece, ...]."""
        if self.even:  # as below, by one copy instead of several
            ((rows, columns),) = self.batches
            x = x.unflatten(1, (SIDE, rows, SIDE, columns))
            return [x.permute(1, 3, 0, 2, 4, *range(5, x.ndim)).flatten(0, 2).flatten(1, 2)]
        pieces = []
        images = x.split([sum(down) * sum(across) for down, across in self.lengths], dim=1)
        for image, (down, across) in zip(images, self.lengths, strict=True):
            for band in image.unflatten(1, (sum(down), sum(across))).split(down, dim=1):
                pieces += band.split(across, dim=2)
        return [torch.cat([pieces[i] for i in members]).flatten(1, 2) for members in self.batches.values()]

    def together(self, batches: Sequence[Tensor]) -> Tensor:
        """The inverse of `apart`."""
        if self.even:
            x = batches[0].unflatten(1, *self.batches).unflatten(0, (SIDE, SIDE, -1))
            return x.permute(2, 0, 3, 1, 4, *range(5, x.ndim)).flatten(1, 4)
        pieces, images = {}, []
        for batch, (shape, members) in zip(batches, self.batches.items(), strict=True):
            pieces |= zip(members, batch.unflatten(1, shape).chunk(len(members)), strict=True)
        for grid, (down, across) in enumerate(self.lengths):
            bands = [
                torch.cat([pieces[grid * PARTS + i * SIDE + j] for j in range(SIDE) if across[j]], dim=2)
                for i in range(SIDE)
                if down[i]
            ]
            images.append(torch.cat(bands, dim=1).flatten(1, 2))
        return images[0] if len(images) == 1 else torch.cat(images, dim=1)

    def by_part(self, means: Sequence[Tensor], count: int, text: Sequence[Tensor]) -> Tensor:
        """Sums over `count` by part, and text's: [PARTS + 1, B, ...].

        means: of each batch of pieces, [pieces * B, ...], over a piece's tokens. text: what is last, [B, ...], or nothing.
        """
        parts: dict[int, Tensor] = {}
        for mean, ((rows, columns), members) in zip(means, self.batches.items(), strict=True):
            for number, own in zip(members, (mean * (rows * columns / count)).chunk(len(members)), strict=True):
                part = number % PARTS
                parts[part] = parts[part] + own if part in parts else own
        absent = torch.zeros_like(own)
        return torch.stack([*(parts.get(part, absent) for part in range(PARTS)), *(text or [absent])])


def lengths_within(first: int, count: int, whole: int) -> list[int]:
    """How many of `count` places from the `first` on, of `whole` along an axis, are in each of its SIDE parts."""
    ends = [-(-whole * part // SIDE) for part in range(SIDE + 1)]
    ends = [min(max(end, first), first + count) for end in ends]
    return [end - begin for begin, end in itertools.pairwise(ends)]
