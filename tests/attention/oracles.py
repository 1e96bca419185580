"""Dense float64 formulas the attention tests compare with, written from the definitions and sharing no code with them.

They compute on the device of their inputs; `window_mask` is on the CPU.
"""

import torch


def axis_neighbors(length, window, stride, dilation):
    """For every position of an axis, the set of positions it sees (natten's rules, one position at a time)."""
    neighbors = []
    for i in range(length):
        group = list(range(i % dilation, length, dilation))
        size = min(window, len(group))
        step = min(stride, size)
        j = group.index(i)
        leader = min((j // step) * step + step // 2, len(group) - 1)
        start = leader - size // 2
        start = max(0, min(start, len(group) - size))
        neighbors.append({group[t] for t in range(start, start + size)})
    return neighbors


def window_mask(grid, window, stride=(1, 1), dilation=(1, 1)):
    """[N, N] bool."""
    height, width = grid
    rows = axis_neighbors(height, window[0], stride[0], dilation[0])
    columns = axis_neighbors(width, window[1], stride[1], dilation[1])
    mask = torch.zeros(height * width, height * width, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            for ny in rows[y]:
                mask[y * width + x, [ny * width + nx for nx in columns[x]]] = True
    return mask


def place_on(i, length, other):
    """The position of the other axis in which the middle of position i falls: i covers [i, i + 1] / length."""
    return next(j for j in range(other) if (2 * i + 1) * other < 2 * length * (j + 1))


def mask_over_grids(grids, window, stride=(1, 1), dilation=(1, 1)):
    """[N, N] bool: the own window, and of each other grid that of its token at the query's relative position."""
    blocks = []
    for number, (height, width) in enumerate(grids):
        row = []
        for place, (other_height, other_width) in enumerate(grids):
            seen = window_mask((other_height, other_width), window, stride, dilation)
            if number != place:
                tokens = [
                    place_on(y, height, other_height) * other_width + place_on(x, width, other_width)
                    for y in range(height)
                    for x in range(width)
                ]
                seen = seen[tokens]
            row.append(seen)
        blocks.append(torch.cat(row, 1))
    return torch.cat(blocks)


def softmax_attention(query, key, value, mask=None, scale=None):
    """[B, N, heads, D] in float64; mask [N, M] bool."""
    query, key, value = (x.double() for x in (query, key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask.to(scores.device), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


def neighborhood(query, key, value, text_key, text_value, window, stride, dilation, scale=None):
    """[B, H, W, heads, D] in float64."""
    grid = query.shape[1:3]
    mask = window_mask(grid, window, stride, dilation)
    query, key, value = (x.flatten(1, 2) for x in (query, key, value))
    if text_key is not None:
        key, value = torch.cat((key, text_key), 1), torch.cat((value, text_value), 1)
        mask = torch.cat((mask, torch.ones(len(mask), text_key.shape[1], dtype=torch.bool)), 1)
    return softmax_attention(query, key, value, mask, scale).unflatten(1, grid)


def neighborhood_lse(query, key, text_key, window, stride, dilation, scale=None):
    """The log-sum-exp of `neighborhood`, [B, H, W, heads] in float64."""
    grid, scale = query.shape[1:3], query.shape[-1] ** -0.5 if scale is None else scale
    mask = window_mask(grid, window, stride, dilation)
    query, key = (x.double().flatten(1, 2) for x in (query, key))
    if text_key is not None:
        key = torch.cat((key, text_key.double()), 1)
        mask = torch.cat((mask, torch.ones(len(mask), text_key.shape[1], dtype=torch.bool)), 1)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key) * scale
    return scores.masked_fill(~mask[:, None].to(scores.device), -torch.inf).logsumexp(-1).unflatten(1, grid)


def linear(query, key, value, eps=1e-4):
    """[B, N, heads, D] in float64, by the N x N weights."""
    weighted, total = linear_parts(query, key, value, eps)
    return weighted / total


def linear_parts(query, key, value, eps=1e-4):
    """Numerator and denominator of `linear`."""
    phi = [torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in (query.double(), key.double())]
    weights = torch.einsum("bqhd,bkhd->bhqk", *phi) / key.shape[1]
    out = torch.einsum("bhqk,bkhd->bqhd", weights, value.double())
    return out, weights.sum(-1).transpose(1, 2).unsqueeze(-1) + eps


def joined(far, join):
    """near + gate (far - near), if there is a join: near and gate."""
    if not join:
        return far
    near, gate = (x.double() for x in join)
    return near + gate * (far - near)


def gradients(parts, join, leaves, weight):
    """Of sum(weight * result) in float64: a gradient for each leaf, and the size that its rounding errors have to do with.

    parts: numerator and denominator; their quotient is joined to (near, gate) if join is not empty. A gradient is a sum
    of up to three terms: through the numerator, the denominator, and near. Each is computed to the arithmetic's relative
    precision and then added, so that the error is in proportion to the sum of their norms, however they cancel: with
    one key the result does not depend on query and key but for eps, and what is left of their gradients is rounding.
    """
    weighted, total = parts
    terms = [weighted / total.detach(), weighted.detach() / total]
    if join:
        near, gate = (x.double() for x in join)
        terms = [gate * terms[0], gate.detach() * terms[1], (1 - gate) * near]
    found = [
        torch.autograd.grad(term, leaves, weight.double(), retain_graph=True, materialize_grads=True) for term in terms
    ]
    summed = [tuple(x.double() for x in grads) for grads in zip(*found, strict=True)]
    return [(sum(grads), sum(x.norm() for x in grads)) for grads in summed]


def mapped_linear(*args, **kwargs):
    """[B, N, heads, D] in float64, by the N x N weights of this feature map; key_mask bool [B, N]."""
    weighted, total = mapped_parts(*args, **kwargs)
    return weighted / total


def mapped_parts(feature_map, query, key, value, projections=None, key_mask=None, eps=None):
    """Numerator and denominator of `mapped_linear`."""
    query, key, value = (x.double() for x in (query, key, value))
    if projections is not None:
        query, key = ((x.unsqueeze(-1) * y.double()).sum(-2) for x, y in zip((query, key), projections, strict=True))
    weights = similarity(query, key, feature_map)
    count = key.shape[1]
    if key_mask is not None:
        weights = weights * key_mask[:, None, None, :]
        count = key_mask.sum(1)[:, None, None, None]
    weights = weights / count
    eps = (1e-4 if feature_map == "elu" else 1e-8) if eps is None else eps
    out = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    return out, weights.sum(-1).transpose(1, 2).unsqueeze(-1) + eps


def beside(weight):
    """Another branch's result, and a gate per token of either sign, to join with one like `weight`."""
    generator = torch.Generator().manual_seed(4)
    near = torch.randn(weight.shape, generator=generator).to(weight).requires_grad_()
    gate = torch.randn(*weight.shape[:3], 1, generator=generator).to(weight.device) / 30
    return near, gate.to(torch.promote_types(weight.dtype, torch.float32)).requires_grad_()


def beside_softmax(gate):
    """Gates from -6 to 6 in place of these, the log-sum-exp that they stand beside, and what both are worth together."""
    generator = torch.Generator().manual_seed(5)
    gate = (60 * gate.detach()).requires_grad_()
    lse = (2 * torch.randn(gate.shape[:3], generator=generator) + 3).to(gate).requires_grad_()
    return gate, lse, torch.sinh(gate.double()) / 10 * torch.exp(-lse.double()).unsqueeze(-1)


def joint(feature_map, query, key, value, near, gate, projections=None, key_mask=None):
    """`linear_attention(..., joint=True)` in float64, by the N x N weights: one average where the gate is above 0."""
    query, key, value, near, gate = (x.double() for x in (query, key, value, near, gate))
    if projections is not None:
        query, key = ((x.unsqueeze(-1) * y.double()).sum(-2) for x, y in zip((query, key), projections, strict=True))
    weights = similarity(query, key, feature_map)
    counted = torch.ones(query.shape[0], key.shape[1], device=key.device) if key_mask is None else key_mask
    eps = 1e-4 if feature_map == "elu" else 1e-8
    weights = weights * counted[:, None, None, :]
    total = weights.sum(-1).transpose(1, 2).unsqueeze(-1) + eps * counted.sum(1)[:, None, None, None]
    far = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    average = (near + gate.abs() * far) / (1 + gate.abs() * total)
    return torch.where(gate > 0, average, 2 * near - average)


def gradient_of_features(query, key, value, weight, which, eps=1e-4):
    """Of sum(weight * linear(...)) in float64: the gradient of the features of the query (which = 0) or the key (1)."""
    features = [torch.where(x > 0, x + 1, x.clamp(max=0).exp()).detach() for x in (query.double(), key.double())]
    features[which].requires_grad_()
    weights = torch.einsum("bqhd,bkhd->bhqk", *features) / key.shape[1]
    out = torch.einsum("bhqk,bkhd->bqhd", weights, value.double())
    out = out / (weights.sum(-1).transpose(1, 2).unsqueeze(-1) + eps)
    return torch.autograd.grad(out, features[which], weight.double())[0]


def similarity(query, key, feature_map):
    """phi(q) . phi(k) of all pairs of queries and keys, [B, heads, M, N] in float64, from each map's definition."""
    query, key = query.double(), key.double()
    if feature_map == "elu":
        phi = [torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in (query, key)]
        return torch.einsum("bqhd,bkhd->bhqk", *phi)
    if feature_map == "polynomial":
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        return 1 + scores + scores**2 / 2
    parts = []
    for sign in (1, -1):
        soft = [(sign * x - (sign * x).amax(-1, keepdim=True)).exp() for x in (query, key)]
        soft = [x / x.sum(-1, keepdim=True) for x in soft]
        parts.append(torch.einsum("bqhd,bkhd->bhqk", *soft))
    return parts[0] + parts[1]
