"""Positions of images larger than those a model was trained on: tables and rotations, stretched."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .family import family_of
from .wrapping import unwrapped, with_forward

TEXT = 512  # tokens that CLEAR counts besides the image's


@contextlib.contextmanager
def scaled_positions(
    model: nn.Module, positions: str | None, native: tuple[int, int], grid: tuple[int, int]
) -> Iterator[None]:
    """Within the block, an image larger than native gets its positions in another way. For dense and hybrid models.

    positions: one of the family's `positions`; None or the first of them: the model's own. native, grid: (rows, columns)
    of tokens in images of the size that the model was trained on, and in the image. In a hybrid the far branch, where it
    rotates, follows.

    Raises ValueError for a way that the family does not have.
    """
    model = unwrapped(model)
    family = family_of(model)
    if positions not in (None, *family.positions):
        raise ValueError(f"positions of {family.name} are {' or '.join(family.positions)}, not {positions!r}")
    if positions in (None, family.positions[0]):
        yield
        return
    before, model._scaling = scaling_of(model), Scaling(positions, native, grid)
    try:
        with contextlib.ExitStack() as undo:
            for module, forward in family.position_forwards(model, positions, native, grid).items():
                undo.enter_context(with_forward(module, forward))
            yield
    finally:
        model._scaling = before


class Scaling(NamedTuple):
    """The arguments of `scaled_positions`."""

    positions: str
    native: tuple[int, int]
    grid: tuple[int, int]


def scaling_of(model: nn.Module) -> Scaling | None:
    """How the positions of a model are scaled at the moment."""
    return getattr(unwrapped(model), "_scaling", None)


def rotary_frequencies(dim: int, theta: float, positions: str, native: int, length: int) -> torch.Tensor:
    """Angles per token, float64 [dim / 2], of a rotary embedding over `length` tokens along an axis.

    dim: channels of the axis. native: tokens along it where the model was trained; not beyond it nothing changes.
    positions: "plain": theta^(-2j / dim). "interpolated": the native angles are spread over the length (arXiv 2306.15595).
    "ntk": a larger theta, by which the lowest frequency alone is spread as far. "yarn": frequencies that turn less than
    once in the native length are spread, those that turn more than 32 times are not, in between in proportion (arXiv
    2309.00071). "dominant": the one whose period is nearest to the native length, by which images repeat, is slowed until
    it turns as often in the whole length as in the native one (as UltraImage does, arXiv 2512.04504). "clear": ten times
    theta, as CLEAR's authors sample larger images (arXiv 2412.16112).
    """
    ratio = max(1.0, length / native)
    if positions == "ntk" and dim > 2:  # one frequency alone is 1 by any theta
        theta = theta * ratio ** (dim / (dim - 2))
    if positions == "clear" and ratio > 1:
        theta = 10 * theta
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if positions == "interpolated":
        return frequencies / ratio
    if positions == "yarn":
        turns = native * frequencies / (2 * math.pi)
        kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / ratio)
    if positions == "dominant":
        frequencies[(2 * math.pi / frequencies / native).log().abs().argmin()] /= ratio
    return frequencies


def rotary_tables(
    ids: torch.Tensor,
    dims: tuple[int, ...],
    theta: float,
    positions: str,
    native: tuple[int, int],
    grid: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), float32 [S, sum of dims] each, as FluxPosEmbed gives them, for `ids` [S, 3]: (index, row, column), or
    more numbers behind these.

    dims, theta: the embedding's. native, grid: see `scaled_positions`. Some make queries and keys longer, each
    by the same factor: "yarn" by 1 + 0.1 ln(ratio of the sides), "clear" by (ln N / ln native N)^(1/4), with N the tokens of
    the image and of a text of 512, as CLEAR has it: attention to more tokens then has the entropy that it had (arXiv
    2306.08645).
    """
    others = [1] * (len(dims) - 3)  # which do not grow with the image
    sizes = zip(ids.double().unbind(1), dims, (1, *native, *others), (1, *grid, *others), strict=True)
    angles = [
        torch.outer(place, rotary_frequencies(dim, theta, positions, own, length).to(ids.device))
        for place, dim, own, length in sizes
    ]
    angle = torch.cat([part.repeat_interleave(2, 1) for part in angles], 1)
    longer = 1.0
    if positions == "yarn":
        ratio = math.sqrt(math.prod(max(1.0, length / own) for length, own in zip(grid, native, strict=True)))
        longer = 1 + 0.1 * math.log(ratio)
    if positions == "clear":
        longer = max(1.0, math.log(math.prod(grid) + TEXT, math.prod(native) + TEXT)) ** (1 / 4)
    return (angle.cos() * longer).float(), (angle.sin() * longer).float()


def stretched_rows(table: torch.Tensor, size: tuple[int, int], rows: tuple[int, int]) -> torch.Tensor:
    """Some rows of a table [h, w, C] stretched bilinearly to a size: [rows[1] - rows[0], size[1], C]."""
    height, device = table.shape[0], table.device
    place = ((torch.arange(*rows, device=device) + 0.5) * height / size[0] - 0.5).clamp(0, height - 1)
    above = place.floor().long()
    below, part = (above + 1).clamp_max(height - 1), (place - above)[:, None, None]
    found = table[above] * (1 - part) + table[below] * part
    return F.interpolate(found.transpose(1, 2), size=size[1], mode="linear").transpose(1, 2)
