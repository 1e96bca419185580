"""An image that a layer is shown in strips of rows, one after another: what has to be known of the whole of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layout import TokenLayout
from .linear import KeySums
from .spread import merged, softmax_with_lse
from .window import joined_attention, neighborhood_attention


class Gathered(Exception):  # noqa: N818 (it is no error)
    """All layers of a block have gathered a strip: the rest of the block need not run."""


class WholeImage:
    """What one layer has to know of an image of which it is shown strips.

    While `gathering`, each strip is shown once, and `add_keys` and `add_text` take from it what depends on all rows: the
    sums over the far branch's keys, and the attention of text queries. Afterwards each strip is shown with the rows
    around it that its windows reach.

    waiting: the layers of the block, this one among them, that have not gathered the strip yet; they share the set.
    """

    def __init__(self, waiting: set[WholeImage]):
        self.gathering, self.waiting = True, waiting
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
        if self.text is not None:
            out, lse = merged(self.text, self.text_lse, out, lse)
        self.text, self.text_lse = out, lse

    def gathered(self) -> None:
        """Say that the layer has taken what it needs of this strip. Raises Gathered if it is the last to do so."""
        self.waiting.discard(self)
        if not self.waiting:
            raise Gathered

    def seen_from(self, sums: KeySums, keys: int) -> KeySums:
        """The sums over all keys, for the queries of a strip: in place of its own, over so many keys.

        The passes take means, and multiply them by the number of the strip's keys where they join.
        """
        return sums._replace(state=self.state / keys, mean=self.mean / keys, eps=sums.eps * self.keys / keys)


def strip_attention(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_layout: TokenLayout,
    *,
    far_query: Tensor | None,
    far_key: Tensor | None,
    gate: Tensor | None,
    scale: float | None,
    text_mask: Tensor | None,
) -> Tensor:
    """The forward of a HybridAttention, which has the arguments, of the text and a strip of rows: [B, S, heads, D].

    While its `whole_image` gathers, the result is zero. Raises Gathered in the last layer of a block to gather a strip, and
    ValueError for a layout that is not a strip's.
    """
    if token_layout.strip is None:
        raise ValueError("an attention processor has dropped its layout's strip: change layouts by their _replace")
    whole, (grid,) = layer.whole_image, token_layout.grids
    key, value = layer.for_every_head(key), layer.for_every_head(value)
    (text_query, image_query), (text_key, image_key), (text_value, image_value) = map(
        token_layout.split, (query, key, value)
    )
    sums = seen = None
    first = whole.gathering and token_layout.place[0] == 0  # the text's keys are counted once
    if first and text_mask is not None:
        seen = token_layout.join(text_mask, text_mask.new_ones(len(text_mask), image_key.shape[1]))
    if layer.far is not None:
        far_query, far_key = layer.far_tokens(far_query, far_key, image_query, image_key, token_layout)
        keys, values, far_seen, layout = far_key, image_value, None, token_layout._replace(text_length=0)
        if layer.kind == "linear" and first:
            keys, values = token_layout.join(text_key, far_key), token_layout.join(text_value, image_value)
            far_seen, layout = seen, token_layout
        sums = layer.far(far_query, keys, values, key_mask=far_seen, only_sums=True, layout=layout)
    if whole.gathering:
        if sums is not None:
            whole.add_keys(sums, keys.shape[1])
        if token_layout.text_length:
            keys, values = image_key, image_value
            if first:
                keys, values = token_layout.join(text_key, keys), token_layout.join(text_value, values)
            whole.add_text(text_query, keys, values, scale, seen)
        whole.gathered()
        return query.new_zeros(()).expand(query.shape)
    if sums is not None:
        sums = whole.seen_from(sums, far_key.shape[1])
    if layer.kind == "linear":
        image = sums.joined()
    else:
        images = (x.unflatten(1, grid) for x in (image_query, image_key, image_value))
        settings = layer.near_settings(scale, text_key, text_value, text_mask)
        if sums is None:
            image = neighborhood_attention(*images, **settings).flatten(1, 2)
        else:
            gate = layer.gate if gate is None else gate
            image = joined_attention(*images, sums, gate, layer.join == "joint", **settings)
    if layer.value_conv is not None:
        image = image + layer.value_conv(image_value, token_layout.grids)
    return token_layout.join(whole.text.to(image.dtype), image) if token_layout.text_length else image
