"""The parts of Triton kernels that form phi, its derivative and the join: the kernels of linear attention are made of them,
and so is the window's that joins.

Triton's functions, to be called within a kernel; sizes and options are its constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import features as maps

LARGEST = tl.constexpr(maps.LARGEST)
LARGEST_FACTOR = tl.constexpr(maps.LARGEST_FACTOR)
LARGEST_SHARE = tl.constexpr(maps.LARGEST_SHARE)
LARGEST_GATE = tl.constexpr(maps.LARGEST_GATE)


@triton.jit
def load_matrix(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Elements [row, column] of a contiguous matrix [ROWS, COLUMNS], zero beyond; transposed if the column is first."""
    return tl.load(matrix + row * COLUMNS + column, mask=(row < ROWS) & (column < COLUMNS), other=0.0)


@triton.jit
def columns(x, DOT: tl.constexpr):
    """Lay out x [n] as [n, 16] for a dot: column 0 is x rounded to DOT, column 1 the rounding error, the rest zero.

    The tensor cores then compute sums over rows or channels with the products, without a reduction across warps.
    """
    column = tl.arange(0, 16)[None, :]
    rounded = x.to(DOT).to(tl.float32)
    return tl.where(column == 0, rounded[:, None], tl.where(column == 1, (x - rounded)[:, None], 0.0)).to(DOT)


@triton.jit
def clamp(x, bound: tl.constexpr):
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))  # NaN stays NaN


@triton.jit
def channels(x, matrix, MAP: tl.constexpr, PROJECTED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """What phi is of, in float32: the rows x [n, D], or x P where PROJECTED; matrix is P, zero beyond its size."""
    x = x.to(tl.float32)
    if PROJECTED:
        x = tl.dot(clamp(x, LARGEST).to(DOT), matrix, input_precision=PRECISION)
    elif MAP == "hedgehog":
        x = clamp(x, LARGEST)  # the other maps clamp the channels
    return x


@triton.jit
def sinh(x):
    # near 0 the difference would be rounding alone
    return tl.where(tl.abs(x) < 0.05, x + x * x * x * (1 / 6), (tl.exp(x) - tl.exp(-x)) * 0.5)


@triton.jit
def elu(x):
    x = tl.where(x > LARGEST, LARGEST, x)
    return tl.where(x > 0, x + 1, tl.exp(x))  # NaN takes the second branch, and stays NaN


@triton.jit
def elu_backward(grad, x, features, PROJECTED: tl.constexpr):
    """phi' is 1 above zero and phi below; at zero both are 1.

    Without a projection it stays 1 beyond LARGEST, as in `torch.py`: to look for such values would cost registers.
    """
    grad = tl.where(x > 0, grad, grad * features)
    if PROJECTED:
        grad = tl.where(x > LARGEST, 0.0, grad)
    return grad


@triton.jit
def softmax(x, CHANNELS: tl.constexpr):
    """Half of hedgehog's features: softmax(x) over the first CHANNELS of x [n, BLOCK_M], zero beyond."""
    if x.shape[1] != CHANNELS:
        x = tl.where(tl.arange(0, x.shape[1])[None, :] < CHANNELS, x, float("-inf"))
    x = tl.exp(x - tl.max(x, axis=1)[:, None])
    return x * (1 / tl.sum(x, axis=1))[:, None]


@triton.jit
def softmax_backward(grad, features):
    return features * (grad - tl.sum(features * grad, axis=1)[:, None])


@triton.jit
def pairs(f, CHANNELS: tl.constexpr):
    """The two factors of the polynomial's features f, and their scales; see `features.product_pairs`.

    Factor 0 is the constant 1, factor i > 0 channel i - 1. Those of one left factor i begin at i (2 CHANNELS + 3 - i) / 2.
    """
    size: tl.constexpr = 2 * CHANNELS + 3
    # what is added makes up for rounding: a step of f changes the root's half by at least 2 / size
    root = tl.sqrt(tl.maximum(size * size - 8 * f, 1).to(tl.float32))
    left = ((size - root) * 0.5 + 0.4 / size).to(tl.int32)
    right = f - left * (size - left) // 2 + left
    return left, right, tl.where((left == right) & (left > 0), 0.5**0.5, 1.0)


@triton.jit
def factor(x, index, SELECT: tl.constexpr):
    """The factors of these indices, [n, F]: columns of (1, x), chosen by a product with ones and zeros."""
    ones = (tl.arange(0, x.shape[1])[:, None] + 1 == index[None, :]).to(tl.float32)
    return tl.dot(x, ones, input_precision=SELECT) + (index == 0).to(tl.float32)[None, :]


@triton.jit
def factor_backward(grad, index, total, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Add the gradient of x, given that of `factor`'s result, to total."""
    ones = (tl.arange(0, total.shape[1])[None, :] + 1 == index[:, None]).to(DOT)
    return tl.dot(grad.to(DOT), ones, total, input_precision=PRECISION)


@triton.jit
def factors(x, f, CHANNELS: tl.constexpr, SELECT: tl.constexpr):
    """Of each of the polynomial's features f: left, and right times its scale; x as from `scaled`."""
    left, right, scale = pairs(f, CHANNELS)
    return factor(x, left, SELECT), factor(x, right, SELECT) * scale[None, :]


@triton.jit
def products_backward(grad, left, right, f, total, CHANNELS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Add the gradient of x, given that of the polynomial's features f and `factors`, to total."""
    left_index, right_index, scale = pairs(f, CHANNELS)
    total = factor_backward(grad * right, left_index, total, DOT, PRECISION)
    return factor_backward(grad * left * scale[None, :], right_index, total, DOT, PRECISION)


@triton.jit
def scaled(x, CHANNELS: tl.constexpr):
    """The polynomial's channels, each bounded and over CHANNELS^(1/4)."""
    return clamp(x, LARGEST_FACTOR) * (CHANNELS**-0.25)


@triton.jit
def features(x, f, HALF: tl.constexpr, MAP: tl.constexpr, CHANNELS: tl.constexpr, SELECT: tl.constexpr):
    """phi of what `channels` gives, in float32: the polynomial's features f, elu's, or a half (0 or 1) of hedgehog's."""
    if MAP == "polynomial":
        left, right = factors(scaled(x, CHANNELS), f, CHANNELS, SELECT)
        x = left * right
    elif MAP == "hedgehog":
        x = softmax(-x if HALF else x, CHANNELS)
    else:
        x = elu(x)
    return x


@triton.jit
def beside_softmax(gate, lse):
    """As `formula.joint_gate`."""
    return sinh(clamp(gate, LARGEST_GATE)) * 0.1 * tl.exp(tl.minimum(-lse, LARGEST_GATE))


@triton.jit
def joint_share(gate, denominator, count):
    """As `formula.joint_share` of gate * count."""
    x = clamp(gate * count * denominator, LARGEST_SHARE)
    return x / (1 + tl.abs(x))


@triton.jit
def scaled_backward(grad, x, CHANNELS: tl.constexpr):
    return tl.where(tl.abs(x) > LARGEST_FACTOR, 0.0, grad * (CHANNELS**-0.25))


@triton.jit
def rows_backward(grad, x, matrix, PROJECTED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of the rows x, given that of `channels`."""
    if PROJECTED:
        grad = tl.dot(grad.to(DOT), tl.trans(matrix), input_precision=PRECISION)
        grad = tl.where(tl.abs(x.to(tl.float32)) > LARGEST, 0.0, grad)
    return grad
