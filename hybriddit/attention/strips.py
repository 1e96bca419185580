"""An image that a layer is shown in strips of rows, one after another: what has to be known of the whole of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import KeySums
from .spread import softmax_with_lse


class Gathered(Exception):  # noqa: N818 (it is no error)
    """All layers of a block have gathered a strip: the rest of the block need not run."""


class WholeImage:
    """What one layer has to know of an image of which it is shown strips.

    While `gathering`, each strip is shown once, and `add_keys` and `add_text` take from it what depends on all rows: the
    sums over the far branch's keys, and the attention of text queries. Afterwards each strip is shown with the rows
    around it that its windows reach.

    first: of the image, that of the strip shown now. waiting: the layers of the block, this one among them, that
    have not gathered the strip yet; they share the set.
    """

    def __init__(self, waiting: set[WholeImage]):
        self.gathering, self.first, self.waiting = True, 0, waiting
        self.keys = 0
        self.state = self.mean = self.text = self.text_lse = None

    def add_keys(self, sums: KeySums, keys: int) -> None:
        """Take the sums over some more keys of the far branch, of which there are so many."""
        state, mean = sums.state * keys, sums.mean * keys  # they are means
        self.state, self.mean = (state, mean) if self.state is None else (self.state + state, self.mean + mean)
        self.keys += keys

    def add_text(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, key_mask: Tensor | None = None
    ) -> None:
        """Take the softmax attention of the text's queries [B, T, heads, D] to some more keys [B, N, heads, D].

        key_mask: bool [B, N], False for keys that are left out.
        """
        mask = None
        if key_mask is not None:
            mask = query.new_zeros(len(query), 1, 1, key.shape[1]).masked_fill_(~key_mask[:, None, None], -torch.inf)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, lse = softmax_with_lse(*(x.transpose(1, 2) for x in (query, key, value)), mask, scale)
        out, lse = out.transpose(1, 2), lse.transpose(1, 2)
        if self.text is None:
            self.text, self.text_lse = out, lse
            return
        both = torch.logaddexp(self.text_lse, lse)
        parts = (self.text, self.text_lse), (out, lse)
        self.text = sum((part_lse - both).exp().unsqueeze(-1) * part for part, part_lse in parts)
        self.text_lse = both

    def gathered(self) -> None:
        """Say that the layer has taken what it needs of this strip. Raises Gathered if it is the last to do so."""
        self.waiting.discard(self)
        if not self.waiting:
            raise Gathered

    def seen_from(self, sums: KeySums, keys: int) -> KeySums:
        """The sums over all keys, for the queries of a strip: in place of its own, over so many keys.

        The passes take means, and multiply them by the number of the strip's keys where they join.
        """
        return sums._replace(
            state=self.state / keys, mean=self.mean / keys, eps=sums.eps * self.keys / keys
        )  # fmt: skip
