"""The passes of linear attention in plain torch: for CPUs, and for float64 on any device.

They compute the sums of `formula.py` in blocks of rows that stay in cache; sums over tokens are in at least float32.
Gradients are written by hand.

A block's channels and features are [group, channels, rows]; the group is heads of one image or of several. The rows are
last in memory, so that what is done per row is done for many at once; but elu without projection, which does nothing
per row, leaves the channels last, as they come.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import sum_dtype
from .features import FEATURE_MAPS, LARGEST, LARGEST_FACTOR
from .formula import joint_share

# A block has up to 2048 rows, of as many heads (then images) as fit in about 2 MB: it stays in cache between the steps.
CPU_ROWS, CPU_ELEMENTS = 2048, 2**19
# Elsewhere kernel launches cost more than cache misses; the bound only keeps temporaries small.
GPU_ROWS, GPU_ELEMENTS = 2**16, 2**26
# CPU instruction sets that multiply bfloat16 several times faster than float32.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def state(
    key: Tensor, value: Tensor, projection: Tensor | None, key_mask: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor]:
    """The sums over the keys: see `dispatch`'s operators of these names."""
    (batch, length, heads, width), dtype = key.shape, sum_dtype(key.dtype)
    features = FEATURE_MAPS[feature_map].features(width if projection is None else projection.shape[2])
    sums = key.new_zeros(batch, heads, features, value.shape[3], dtype=dtype)
    mean = key.new_zeros(batch, heads, features, 1, dtype=dtype)
    phi, weights = _PHI[feature_map], _weights(projection, key)
    with torch.autocast(key.device.type, enabled=False):
        for block in _blocks(key, features):
            k = _features(phi, block, key, weights, dtype)[1]
            if key_mask is not None:
                k *= block.of_mask(key_mask)
            block.of_sums(sums).baddbmm_(k, block.of(value).to(dtype), alpha=1 / length)
            block.of_sums(mean).add_(k.sum(2, keepdim=True), alpha=1 / length)
    return sums, mean


def state_backward(
    grad_state: Tensor,
    grad_mean: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor | None,
    key_mask: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    length, dtype = max(key.shape[1], 1), grad_state.dtype
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    grad_state, grad_mean = (grad_state / length).contiguous(), (grad_mean / length).contiguous()
    read_state = grad_state.to(_product_dtype(value))
    phi, weights = _PHI[feature_map], _weights(projection, key)
    grad_weights = None if weights is None else torch.zeros_like(weights, dtype=dtype)
    with torch.autocast(key.device.type, enabled=False):
        for block in _blocks(key, grad_state.shape[2]):
            x, k = _features(phi, block, key, weights, dtype)
            v = block.of(value).to(dtype)
            if key_mask is not None:
                k *= block.of_mask(key_mask)
            block.write_product(grad_value, k.transpose(1, 2), block.of_sums(read_state))
            grad_k = _product_like(k, block.of_sums(grad_state), v.transpose(1, 2), block.of_sums(grad_mean))
            _features_backward(phi, block, grad_k, k, x, weights, grad_key, grad_weights)
    return grad_key, grad_value, _projection_gradient(grad_weights, projection)


def output(
    query: Tensor,
    state: Tensor,
    mean: Tensor,
    near: Tensor | None,
    gate: Tensor | None,
    projection: Tensor | None,
    eps: float,
    feature_map: str,
    joint: bool = False,
    wide: bool = False,
) -> Tensor:
    dtype = state.dtype
    out = query.new_empty(*query.shape[:3], state.shape[3], dtype=state.dtype if wide else query.dtype)
    gate = None if gate is None else gate.expand(out.shape)
    read_state = state if wide else state.to(_product_dtype(query))
    phi, weights = _PHI[feature_map], _weights(projection, query)
    with torch.autocast(query.device.type, enabled=False):
        for block in _blocks(query, state.shape[2]):
            q = _features(phi, block, query, weights, dtype)[1]
            denominator = torch.bmm(block.of_sums(mean).transpose(1, 2), q).add_(eps)
            q.div_(denominator)
            if near is None:
                block.write_product(out, q.transpose(1, 2), block.of_sums(read_state))
            else:
                far = torch.bmm(q.transpose(1, 2).to(read_state.dtype), block.of_sums(read_state))
                beside, far, opening = (x.to(dtype) for x in (block.of(near), far, block.of(gate)))
                if joint:
                    opening = joint_share(opening, denominator.transpose(1, 2))
                block.write(out, torch.lerp(beside, far, opening))
    return out


def output_backward(
    grad_out: Tensor,
    query: Tensor,
    state: Tensor,
    mean: Tensor,
    projection: Tensor | None,
    eps: float,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dtype = state.dtype
    grad_query = query.new_empty(query.shape)
    grad_state, grad_mean = torch.zeros_like(state), torch.zeros_like(mean)
    phi, weights = _PHI[feature_map], _weights(projection, query)
    grad_weights = None if weights is None else torch.zeros_like(weights, dtype=dtype)
    with torch.autocast(query.device.type, enabled=False):
        for block in _blocks(query, state.shape[2]):
            x, q = _features(phi, block, query, weights, dtype)
            g = block.of(grad_out).to(dtype)
            denominator = torch.bmm(block.of_sums(mean).transpose(1, 2), q).add_(eps)
            g = g / denominator.transpose(1, 2)
            grad_q = _product_like(q, block.of_sums(state), g.transpose(1, 2))
            # the output is not needed: grad_out . out = phi(q) . (state grad_out) / denominator
            grad_denominator = (grad_q * q).sum(1, keepdim=True).div_(denominator).neg_()
            block.of_sums(grad_state).baddbmm_(q, g)
            block.of_sums(grad_mean).transpose(1, 2).baddbmm_(grad_denominator, q.transpose(1, 2))
            grad_q.addcmul_(grad_denominator, block.of_sums(mean))
            _features_backward(phi, block, grad_q, q, x, weights, grad_query, grad_weights)
    return grad_query, grad_state, grad_mean, _projection_gradient(grad_weights, projection)


class _Phi(NamedTuple):
    """How the passes compute one feature map, on blocks of channels [group, m, rows].

    features: channels -> phi [group, F, rows], in memory of its own.
    times_slope: gradient of phi, phi, m, out -> gradient of the channels, in `out` unless that is None; it may overwrite
        the first two. It is zero for rows whose phi a mask has set to zero.
    """

    features: Callable[[Tensor], Tensor]
    times_slope: Callable[[Tensor, Tensor, int, Tensor | None], Tensor]


def _exp(x: Tensor, out: Tensor | None = None) -> Tensor:
    """exp(min(x, 0)); on a CPU it takes half of the time of torch.exp, and a third of that of clamp and exp."""
    one = x.new_ones(()).expand_as(x)
    if out is None:
        return torch.ops.aten.elu_backward(one, 1, 1, 1, False, x)
    return torch.ops.aten.elu_backward.grad_input(one, 1, 1, 1, False, x, grad_input=out)


def _elu(x: Tensor) -> Tensor:
    return _exp(x).add_(x.clamp(0, LARGEST))


def _elu_times_slope(grad: Tensor, phi: Tensor, channels: int, out: Tensor | None) -> Tensor:
    """phi' is 1 above zero and exp(x) = phi(x) below; at zero both are 1.

    Beyond LARGEST it stays 1, where the formula has 0: to look for such values would cost time.
    """
    return torch.mul(grad, phi.clamp_(max=1), out=out)


def _hedgehog(x: Tensor) -> Tensor:
    phi = x.new_empty(x.shape[0], 2, *x.shape[1:])
    torch.sub(x, x.amax(1, keepdim=True), out=phi[:, 0])
    torch.sub(x.amin(1, keepdim=True), x, out=phi[:, 1])
    _exp(phi, out=phi)
    return phi.div_(phi.sum(2, keepdim=True)).flatten(1, 2)


def _hedgehog_times_slope(grad: Tensor, phi: Tensor, channels: int, out: Tensor | None) -> Tensor:
    halves = (y.unflatten(1, (2, channels)) for y in (grad, phi))
    up, down = torch._softmax_backward_data(*halves, 2, grad.dtype).unbind(1)
    return torch.sub(up, down, out=out)


def _polynomial(x: Tensor) -> Tensor:
    group, channels, rows = x.shape
    slices = _product_slices(channels)
    phi = x.new_empty(group, slices[-1].stop, rows)
    factors = phi[:, slices[0]]  # the products of 1
    factors[:, 0] = 1
    torch.mul(x.clamp(-LARGEST_FACTOR, LARGEST_FACTOR), channels**-0.25, out=factors[:, 1:])
    for i in range(1, channels + 1):
        torch.mul(factors[:, i:], factors[:, i, None], out=phi[:, slices[i]])
        phi[:, slices[i].start] *= math.sqrt(0.5)
    return phi


def _polynomial_times_slope(grad: Tensor, phi: Tensor, channels: int, out: Tensor | None) -> Tensor:
    slices = _product_slices(channels)
    factors = phi[:, slices[0]]
    grad_factors = grad[:, slices[0]] * factors[:, :1]  # 1, or 0 where a mask has set it so
    for i in range(1, channels + 1):
        grad_products = grad[:, slices[i]]
        grad_products[:, 0] *= math.sqrt(0.5)
        grad_factors[:, i:].addcmul_(grad_products, factors[:, i, None])
        grad_factors[:, i].add_((grad_products * factors[:, i:]).sum(1))
    scale = channels**-0.25
    bound = LARGEST_FACTOR * scale
    grad = torch.ops.aten.hardtanh_backward(grad_factors[:, 1:], factors[:, 1:], -bound, bound)
    return torch.mul(grad, scale, out=out)


def _product_slices(channels: int) -> list[slice]:
    """Where phi has the products of each of (1, x_1, …, x_m) with itself and those that follow it."""
    ends = itertools.accumulate(range(channels + 1, 0, -1), initial=0)
    return [slice(*pair) for pair in itertools.pairwise(ends)]


_PHI = {
    "elu": _Phi(_elu, _elu_times_slope),
    "hedgehog": _Phi(_hedgehog, _hedgehog_times_slope),
    "polynomial": _Phi(_polynomial, _polynomial_times_slope),
}


class _Block(NamedTuple):
    """Rows of some heads of an image, or all rows and heads of several images."""

    images: slice
    heads: slice
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """[group, rows, D] of x [B, N, heads, D]: a view of it, if the block is of one image."""
        if self.images.stop - self.images.start == 1:  # the same, sooner
            return x[self.images.start, self.rows, self.heads].transpose(0, 1)
        return self._part(x).flatten(0, 1)

    def of_sums(self, x: Tensor) -> Tensor:
        """A view [group, F, E] of x [B, heads, F, E]."""
        return x[self.images, self.heads].view(-1, *x.shape[2:])

    def of_heads(self, x: Tensor) -> Tensor:
        """[group, m, D] of x [heads, m, D]: a view of it, if the block is of one image."""
        return x[None, self.heads].expand(self.images.stop - self.images.start, -1, -1, -1).flatten(0, 1)

    def of_mask(self, key_mask: Tensor) -> Tensor:
        """[group, 1, rows] of key_mask [B, N]."""
        heads = self.heads.stop - self.heads.start
        return key_mask[self.images, None, None, self.rows].expand(-1, heads, -1, -1).flatten(0, 1)

    def view(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The view [group, rows, D] of x [B, N, heads, D], where there is one and it has this dtype."""
        return self.of(x) if self.images.stop - self.images.start == 1 and x.dtype == dtype else None

    def write(self, x: Tensor, y: Tensor) -> None:
        part = self._part(x)
        part.copy_(y.unflatten(0, part.shape[:2]))

    def write_product(self, x: Tensor, y: Tensor, z: Tensor) -> None:
        """Write y z, with y in the dtype of z."""
        y, out = y.to(z.dtype), self.view(x, z.dtype)
        if out is not None:
            torch.bmm(y, z, out=out)
        else:
            self.write(x, torch.bmm(y, z))

    def _part(self, x: Tensor) -> Tensor:
        return x[self.images, self.rows, self.heads].transpose(1, 2)


def _blocks(x: Tensor, features: int) -> Iterator[_Block]:
    """Cut x [B, N, heads, D] so that a block of it and of its features fits the cache."""
    batch, length, heads, width = x.shape
    rows, elements = (CPU_ROWS, CPU_ELEMENTS) if x.device.type == "cpu" else (GPU_ROWS, GPU_ELEMENTS)
    group = max(1, elements // (min(rows, max(length, 1)) * max(width, features, 1)))
    images = max(1, group // max(heads, 1)) if length <= rows else 1
    steps = range(0, batch, images), range(0, heads, group), range(0, length, rows)
    for b, h, n in itertools.product(*steps):
        yield _Block(slice(b, min(b + images, batch)), slice(h, min(h + group, heads)), slice(n, n + rows))


def _weights(projection: Tensor | None, x: Tensor) -> Tensor | None:
    """The projection [heads, D, m], for tensors like x, as [heads, m, D]."""
    return None if projection is None else projection.transpose(1, 2).to(_product_dtype(x)).contiguous()


def _features(
    phi: _Phi, block: _Block, x: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Of the block: what the projection reads of x (None without one), and phi of the channels; in this dtype."""
    x = block.of(x).to(dtype)
    if weights is None:
        return None, phi.features(x.transpose(1, 2))
    x = torch.clamp(x, -LARGEST, LARGEST, out=x.new_empty(x.shape))  # contiguous: strided bfloat16 products are slow
    channels = torch.bmm(block.of_heads(weights), x.to(weights.dtype).transpose(1, 2))
    return x, phi.features(channels.to(dtype))


def _features_backward(
    phi: _Phi,
    block: _Block,
    grad: Tensor,
    features: Tensor,
    x: Tensor | None,
    weights: Tensor | None,
    grad_x: Tensor,
    grad_weights: Tensor | None,
) -> None:
    """Given the features' gradient, write the block of grad_x, and add to grad_weights."""
    if weights is None:
        out = block.view(grad_x, grad.dtype)
        grad = phi.times_slope(grad, features, grad_x.shape[3], None if out is None else out.transpose(1, 2))
        if out is None:
            block.write(grad_x, grad.transpose(1, 2))
        return
    grad = phi.times_slope(grad, features, weights.shape[1], None)
    block.write_product(grad_x, grad.transpose(1, 2), block.of_heads(weights))
    if _may_reach(x, LARGEST):
        block.write(grad_x, block.of(grad_x).masked_fill(x.abs() >= LARGEST, 0))
    grad_weights[block.heads] += torch.bmm(grad, x).view(-1, *grad_weights[block.heads].shape).sum(0)


def _may_reach(x: Tensor, bound: float) -> bool:
    """On a CPU, whether x does; elsewhere, where asking would wait for the device, True."""
    return x.device.type != "cpu" or bool(x.amax() >= bound) or bool(x.amin() <= -bound)


def _projection_gradient(grad_weights: Tensor | None, projection: Tensor | None) -> Tensor | None:
    return None if projection is None else grad_weights.transpose(1, 2).to(projection.dtype).contiguous()


def _product_like(phi: Tensor, x: Tensor, y: Tensor, added: Tensor | None = None) -> Tensor:
    """x y (+ added), in memory as phi is: steps that read both would be slow otherwise."""
    if phi.stride(2) != 1:
        return _product_like(phi.transpose(1, 2), y.transpose(1, 2), x.transpose(1, 2),
                             None if added is None else added.transpose(1, 2)).transpose(1, 2)  # fmt: skip
    return torch.bmm(x, y) if added is None else torch.baddbmm(added, x, y)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products that sum over channels, for tensors like x."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS):
            return torch.bfloat16
    return sum_dtype(x.dtype)
