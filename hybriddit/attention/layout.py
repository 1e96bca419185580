"""Where the text and the image grids lie in a transformer's token sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .rows import RowShard


def room_for(image: torch.Tensor, text_rows: Sequence[int]) -> torch.Tensor:
    """A new tensor for an image's tokens [B, H, W, heads, D] one after another, and rows of text before and after them."""
    batch, height, width, heads, head_dim = image.shape
    return image.new_empty(batch, text_rows[0] + height * width + text_rows[1], heads, head_dim)


class TokenLayout(NamedTuple):
    """The layout of one token sequence; processors receive it as the keyword `token_layout`.

    text_length: number of text tokens in the sequence (0 where the layer sees the image alone).
    grids: (height, width) in tokens of every image grid, in the order they lie in the sequence, row by row.
    text_first: whether the text comes before the image (FLUX) or after it (Stable Diffusion 3).
    rows: where the one image is spread over processes, which of its rows these are; the grid is then of this process's.
    strip: where a layer is shown a strip of the one image, (the first of its rows, the rows of the image); the grid is
        then of the strip.
    """

    text_length: int
    grids: tuple[tuple[int, int], ...]
    text_first: bool
    rows: RowShard | None = None
    strip: tuple[int, int] | None = None

    @property
    def image_length(self) -> int:
        """Image tokens in the sequence, of all grids together."""
        length = 0
        for height, width in self.grids:
            length += height * width
        return length

    @property
    def text_rows(self) -> tuple[int, int]:
        """Tokens of text before and after the image."""
        return (self.text_length, 0) if self.text_first else (0, self.text_length)

    @property
    def place(self) -> tuple[int, int]:
        """(the first of the first grid's rows, the rows of the image that it is of); (0, its height) for a whole image."""
        if self.rows is not None:
            return self.rows.first, self.rows.height
        return self.strip or (0, self.grids[0][0])

    def own(self, image: torch.Tensor) -> torch.Tensor:
        """This process's rows of a whole image's tokens, [..., N, C] -> [..., n, C]; a view."""
        if self.rows is None:
            return image
        width = self.grids[0][1]
        return image.narrow(-2, self.rows.first * width, self.rows.count * width)

    def own_joint(self, tokens: torch.Tensor) -> torch.Tensor:
        """The text's tokens and this process's rows of the image's: [..., T + N, C] -> [..., T + n, C]."""
        if self.rows is None:
            return tokens
        lengths = (self.text_length, tokens.shape[-2] - self.text_length)
        if self.text_first:
            text, image = tokens.split(lengths, dim=-2)
            return torch.cat((text, self.own(image)), dim=-2)
        image, text = tokens.split(lengths[::-1], dim=-2)
        return torch.cat((self.own(image), text), dim=-2)

    def split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, ...] -> text [B, T, ...], image [B, N, ...]; views. Raises ValueError where S is not T + N."""
        text_length, image_length = self.text_length, self.image_length
        if tokens.shape[1] != text_length + image_length:
            raise ValueError(
                f"the layer received {tokens.shape[1]} tokens, but its layout has {text_length} of text and "
                f"{image_length} of image (grids {self.grids}): pass the right `token_layout`"
            )
        if text_length == 0:
            return tokens[:, :0], tokens  # no split, whose gradient would be a copy
        # a small call waits for the host, and Tensor.split takes twice as long
        if self.text_first:
            text, image = torch.split_with_sizes(tokens, (text_length, image_length), 1)
        else:
            image, text = torch.split_with_sizes(tokens, (image_length, text_length), 1)
        return text, image

    def join(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`."""
        if self.text_length == 0:
            return image
        return torch.cat((text, image) if self.text_first else (image, text), dim=1)
