"""The hybrid layer: near (window and text, softmax) and far (the whole image, linear), joined by a learned gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import GATES, JOINS, LAYER_KINDS, ROTARY, WINDOW_SHAPES
from .layout import TokenLayout
from .linear.features import LARGEST_SHARE
from .linear.formula import joint_gate
from .mixers import MIXERS, check_mixer
from .rows import Reach, RowShard
from .spread import spread_attention
from .strips import WholeImage, strip_attention
from .window import PooledKeys, attention_over_grids, joined_attention, key_rows, seen_over_grids
from .work import Work, attention_work, dense_flops, softmax_flops

MAPS = ("after", "before")
GATE_WIDTH = 96  # the width of the layers with which gates per token, joined "joint", have been tried


class HybridAttention(nn.Module):
    """One attention layer over text and image tokens; the caller projects queries, keys and values.

    For an image token i with window W(i), text T and all image tokens X (of reference images too, if there are any,
    with a window of each: see `window.grids`),

        near_i = softmax attention of q_i over W(i) and T
        far_i  = linear attention of q'_i over X, with keys k' and the same values
        out_i  = one average of the values under both, with weights as `join` says

    and text queries attend to everything by softmax. Before the layer's own norms and rotary embedding, q' is

        maps "after":  q + up(act(LN(down(x))))             k' likewise; x is the layer's input
        maps "before": to_q(x + up(act(LN(down(x)))))       LinFusion's own form (arXiv 2409.02097)
        map_rank 0:    q

    "after" folds the projection into `up`, so that the projection runs only once. The far branch projects q' and k' once
    more, per head, before its feature map: see the mixer. In a pretrained model this module is `<attention>.hybrid`;
    projections, norms and rotary embedding stay the model's own.

    Args:
        width: channels of the layer's input x.
        heads, head_dim: number and width of the query heads.
        kind: "hybrid", as above; "window", near alone; "linear", far alone, over text and image; "dense", softmax over
            all tokens. Only hybrid and linear layers have weights.
        kv_heads: number of key and value heads, a divisor of `heads` (grouped-query attention); None: as many.
        window, stride, dilation: (rows, columns) in tokens, for hybrid and window layers.
        window_shape: "square", or "circle": W(i) is the tokens nearer than `window`, twice the radius, without stride and
            dilation.
        pooled_keys: side in tokens of blocks of the image whose pooled keys and values hybrid and window layers have in
            near's softmax besides (see `window.PooledKeys`): of all blocks, for every image token. None: none.
        map_rank: width of the maps' hidden layer; None is a sixteenth of `width`; 0: no maps.
        maps: "after" or "before" the projection. Both start at zero.
        mixer: the far branch, a key of `mixers.MIXERS`. feature_map, projection, temperature, center_keys: its settings.
        rotary: positions of q' and k': "model", which the caller rotates; "axial", rotated here by row and column; or
            "none".
        value_conv: side, an odd number, of a depthwise convolution of the image's values over each grid, zero at the
            start, which is added to the output of hybrid and linear layers. None: no convolution.
        join: "joint": values of the window and the text have weight exp(q . k scale), and those of the whole image
            sinh(gate) / 10 phi(q') . phi(k'), over one sum of weights. The hyperbolic sine is 0 at 0 with a slope, so
            that learning can start there, and soon multiplies the weights as an exponential does; below 0, the layer
            takes away from near what it would add above. "gate": near + gate * (far - near).
        gate: "head", "channel" (one value each) or "token" (a value per head, linear in x; with "joint" in x times
            96 / width, where the layer is wider than that).
        gate_init: the gate's value at the start: 0 is near alone, 1 (with "joint" inf) is far alone.

    A training loop may set `far_only`, bool [B]: the images to which a hybrid layer gives the far branch alone, so that
    it learns to carry them. It is None at the start, and outside of training. `whole_image` is None, too, but while
    `models.strips.in_strips` shows the layer strips of an image's rows.

    Raises ValueError for an unknown name or an impossible combination.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        kind: str = "hybrid",
        kv_heads: int | None = None,
        window: tuple[int, int] | None = None,
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        window_shape: str = "square",
        pooled_keys: int | None = None,
        map_rank: int | None = None,
        maps: str = "after",
        mixer: str = "linear",
        feature_map: str = "polynomial",
        projection: int | None = None,
        temperature: bool = False,
        center_keys: bool = False,
        rotary: str = "none",
        value_conv: int | None = None,
        join: str = "joint",
        gate: str = "head",
        gate_init: float = 0.0,
    ):
        super().__init__()
        names = {
            "layer kind": (kind, LAYER_KINDS),
            "gate": (gate, GATES),
            "maps": (maps, MAPS),
            "rotary": (rotary, ROTARY),
            "join": (join, JOINS),
            "window shape": (window_shape, WINDOW_SHAPES),
        }
        for name, (value, known) in names.items():
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
        settings = {
            "feature_map": feature_map,
            "projection": projection,
            "temperature": temperature,
            "center_keys": center_keys,
        }
        has_near, has_far = kind in ("hybrid", "window"), kind in ("hybrid", "linear")
        check_mixer(mixer, **settings)
        self.kind, self.heads, self.head_dim = kind, heads, head_dim
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"{heads} heads cannot share {kv_heads} heads of keys and values: use a divisor")
        if has_near and window is None:
            raise ValueError(f"a layer of kind {kind!r} needs a window")
        self.window, self.stride, self.dilation = window if has_near else None, stride, dilation
        self.circle = window_shape == "circle"
        self.maps, self.rotary, self.join = maps, rotary, join
        self.far_only: torch.Tensor | None = None
        self.whole_image: WholeImage | None = None
        self.far = self.map_q = self.map_k = self.value_conv = None
        self.pooled = PooledKeys(pooled_keys) if has_near and pooled_keys is not None else None
        if not has_far:
            return
        if rotary == "axial" and head_dim % 4:
            raise ValueError(f"rotary 'axial' needs a head width that is a multiple of 4, not {head_dim}")
        if map_rank != 0:
            map_rank = map_rank or max(1, width // 16)
            widths = (width, width) if maps == "before" else (heads * head_dim, self.kv_heads * head_dim)
            self.map_q = QueryKeyMap(width, widths[0], map_rank)
            self.map_k = QueryKeyMap(width, widths[1], map_rank)
        self.far = MIXERS[mixer](heads, head_dim, **settings)
        if value_conv is not None:
            self.value_conv = ValueConv(heads * head_dim, value_conv)
        if not has_near:
            return
        self.gate_init = float(gate_init)
        if gate == "token":
            self.gate = TokenGate(width, heads, min(1.0, GATE_WIDTH / width) if join == "joint" else 1.0)
        else:
            self.gate = nn.Parameter(torch.empty(heads, head_dim if gate == "channel" else 1))
        self.init_gate()

    def init_gate(self) -> None:
        """Give the gate, where there is one, its value at the start, whatever the token."""
        gate = getattr(self, "gate", None)
        if isinstance(gate, TokenGate):
            nn.init.zeros_(gate.weight)
            nn.init.constant_(gate.bias, self.gate_init)
        elif gate is not None:
            nn.init.constant_(gate, self.gate_init)

    def cast(self, dtype: torch.dtype) -> HybridAttention:
        """Cast the weights, but for the gate, which stays in float32; in place. Returns the layer."""
        for name, parameter in self.named_parameters():
            if not name.startswith("gate"):
                parameter.data = parameter.data.to(dtype)
        return self

    def far_inputs(
        self,
        hidden_states: torch.Tensor,
        query: torch.Tensor | None,
        key: torch.Tensor | None,
        *,
        to_q: Callable[[torch.Tensor], torch.Tensor] | None = None,
        to_k: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Compute the far branch's query and key, before the layer's norms, and the gate of every token.

        The caller applies the norms.

        hidden_states: [B, N, width], the image part of the layer's input.
        query, key: [B, N, heads, D], its projections before norm and rotary embedding; used by maps "after".
        to_q, to_k: the projections themselves, [B, N, width] -> [B, N, heads * D]; used by maps "before".

        Returns query [B, N, heads, D], key [B, N, kv_heads, D] and gate [B, N, heads, 1]. The gate is None unless it
        depends on the token: a gate that is a parameter is read in `forward`, once an offloading hook has loaded it.
        Query and key are None for a layer without maps; all three are for one without a far branch.
        """
        if self.far is None:
            return None, None, None
        gate = None
        if self.kind == "hybrid" and isinstance(self.gate, nn.Module):
            # the gate stays in fp32, whatever the layer's dtype
            gate = self.gate(hidden_states.to(self.gate.weight.dtype)).unsqueeze(-1)
        if self.map_q is None:
            return None, None, gate
        if self.maps == "after":
            return query + self.map_q(hidden_states).view_as(query), key + self.map_k(hidden_states).view_as(key), gate
        far_query = to_q(hidden_states + self.map_q(hidden_states)).unflatten(-1, (self.heads, self.head_dim))
        far_key = to_k(hidden_states + self.map_k(hidden_states)).unflatten(-1, (self.kv_heads, self.head_dim))
        return far_query, far_key, gate

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_layout: TokenLayout,
        *,
        far_query: torch.Tensor | None = None,
        far_key: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        scale: float | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute attention over the joined sequence of text and image.

        query [B, S, heads, D], key and value [B, S, kv_heads, D]: text and image in `token_layout`'s order, after norm
            and rotary embedding.
        far_query [B, N, heads, D], far_key [B, N, kv_heads, D]: of the image, after norm, and after rotary embedding
            if `rotary` is "model". None: the image's part of query and key.
        gate: as `far_inputs` gives it.
        scale: factor on the scores of softmax attention; None is D ** -0.5.
        text_mask: bool [B, T], False for padded text, which no query sees; None sees all of it.

        Returns [B, S, heads, D] in the same order; the rows of padded text are meaningless.
        """
        if token_layout.text_length == 0:
            text_mask = None
        far_key = self.for_every_head(far_key)
        if token_layout.rows is not None or self.whole_image is not None:
            attend = strip_attention if token_layout.rows is None else spread_attention
            far = {"far_query": far_query, "far_key": far_key, "gate": gate}
            return attend(self, query, key, value, token_layout, scale=scale, text_mask=text_mask, **far)
        key, value = self.for_every_head(key), self.for_every_head(value)
        grids = token_layout.grids
        if self.kind == "dense":
            return self.softmax(query, key, value, token_layout, scale, text_mask)
        (text_query, image_query), (text_key, image_key), (text_value, image_value) = (
            token_layout.split(tokens) for tokens in (query, key, value)
        )
        in_place = False  # whether `image` has rows for the text
        if self.far is not None:
            far_query, far_key = self.far_tokens(far_query, far_key, image_query, image_key, token_layout)
        if self.kind == "linear":
            # text keys are the layer's own projections: the maps are for image tokens only
            keys = key if far_key is image_key else token_layout.join(text_key, far_key)
            seen = None
            if text_mask is not None:
                seen = token_layout.join(text_mask, text_mask.new_ones(len(text_mask), token_layout.image_length))
            image = self.far(far_query, keys, value, key_mask=seen, layout=token_layout)
        else:
            images = image_query, image_key, image_value
            beside = text_key, text_value, text_mask
            if self.pooled is not None:
                beside = self._with_pooled(*beside, image_key, image_value, grids)
            settings = self.near_settings(scale, *beside)
            if self.far is None:
                image = attention_over_grids(*images, grids, **settings)
            else:
                far = far_query, far_key, self.gate if gate is None else gate
                image_layout = token_layout._replace(text_length=0)
                text_rows = (0, 0) if self.value_conv is not None else token_layout.text_rows
                image = self._joined_at_once(images, image_layout, settings, *far, text_rows)
                in_place = image is not None
                if image is None:
                    image = self._joined(images, image_layout, settings, *far)
        if self.value_conv is not None:
            image, in_place = image + self.value_conv(image_value, grids), False
        if token_layout.text_length == 0:
            return image
        text = self.softmax(text_query, key, value, token_layout, scale, text_mask)
        if not in_place:
            return token_layout.join(text, image)
        token_layout.split(image)[0].copy_(text)
        return image

    def _with_pooled(self, text_key, text_value, text_mask, image_key, image_value, grids):
        """What every image token sees: the text and its mask, and after it the image's pooled keys and values."""
        key, value = self.pooled(image_key, image_value, grids=grids)
        if text_mask is not None:
            text_mask = torch.cat((text_mask, text_mask.new_ones(key.shape[:2])), 1)
        return torch.cat((text_key, key), 1), torch.cat((text_value, value), 1), text_mask

    def near_settings(self, scale, text_key, text_value, text_mask) -> dict[str, Any]:
        """The arguments of `neighborhood_attention` besides the image's query, key and value."""
        settings = {"window": self.window, "stride": self.stride, "dilation": self.dilation, "scale": scale}
        if self.circle:
            settings["circle"] = True
        if text_key.shape[1] == 0:
            return settings
        return {**settings, "text_key": text_key, "text_value": text_value, "text_mask": text_mask}

    def near_reach(self, height: int) -> Reach:
        """For (first, count) rows of an image of this height: the (first row, end) that their windows reach."""
        rows = {"window": self.window[0], "stride": self.stride[0], "dilation": self.dilation[0], "circle": self.circle}
        return partial(key_rows, height=height, **rows)

    def far_tokens(self, far_query, far_key, image_query, image_key, token_layout):
        """The far branch's queries and keys, which are the image's own where there are no others, by position."""
        far = image_query if far_query is None else far_query, image_key if far_key is None else far_key
        if self.rotary != "axial":
            return far
        return tuple(rotate_by_position(x, token_layout.grids, first=token_layout.place[0]) for x in far)

    def for_every_head(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """Repeat key or value heads for the query heads that share them: [B, S, kv_heads, D] -> [B, S, heads, D]."""
        if x is None or self.kv_heads == self.heads:
            return x
        return x.repeat_interleave(self.heads // self.kv_heads, dim=2)

    @staticmethod
    def softmax(query, key, value, token_layout, scale, text_mask):
        """Softmax attention of these queries over all tokens of the sequence."""
        mask = None
        if text_mask is not None:
            image_mask = text_mask.new_ones(len(text_mask), token_layout.image_length)
            mask = token_layout.join(text_mask, image_mask)[:, None, None]  # [B, 1, 1, S], for all heads and queries
        query, key, value = (tokens.transpose(1, 2) for tokens in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)

    def _joined_at_once(self, images, layout, settings, far_query, far_key, gate, text_rows):
        """Near and far as `_joined` gives them, with text_rows before and after the image's that are left to be written.

        None where they are joined one after another.
        """
        value, grids = images[2], layout.grids
        if len(grids) > 1 or self.far_only is not None or torch.is_grad_enabled():
            return None
        sums = self.far(far_query, far_key, value, only_sums=True, layout=layout)
        if sums is None:
            return None
        batch, _, *sizes = value.shape
        images = (tokens.view(batch, *grids[0], *sizes) for tokens in images)
        return joined_attention(*images, sums, gate, self.join == "joint", text_rows=text_rows, **settings)

    def _joined(self, images, layout, settings, far_query, far_key, gate):
        """Near and far, [B, N, heads, D], as `join` says. images: query, key and value; layout: of the image alone."""
        value, joint, lse, grids = images[2], self.join == "joint", None, layout.grids
        near = attention_over_grids(*images, grids, return_lse=joint, **settings)
        if joint:
            near, lse = near
        gate, lse = self.opened(gate, lse)
        return self.far(far_query, far_key, value, near=near, gate=gate, joint=joint, lse=lse, layout=layout)

    def opened(self, gate: torch.Tensor, lse: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gate, wide open for the images of `far_only`, and near's log-sum-exp where the gate still needs it."""
        if self.far_only is None:
            return gate, lse
        joint = self.join == "joint"
        if joint:
            gate, lse = joint_gate(gate, lse), None
        return torch.where(self.far_only.view(-1, 1, 1, 1), LARGEST_SHARE if joint else 1.0, gate), lse

    def flops(self, token_layout: TokenLayout) -> int:
        """FLOPs (two per multiply-add) of one image's forward pass, without projections: `flops_by_part`'s sum."""
        return sum(self.flops_by_part(token_layout).values())

    def flops_by_part(self, token_layout: TokenLayout) -> dict[str, int]:
        """FLOPs of each part, by formula. A backend may do more, such as scores of keys that its mask then hides.

        "text": text queries over everything. "dense", "near": softmax of image queries over everything, or over their
        window, the text and pooled keys. "pooling": of these. "far": the mixer's matrix products. "normalization": the
        mixer's denominator. "maps": the query and key maps; with maps "before" in a hybrid layer also the second
        projection by to_q and to_k. "value_conv": the convolution. Parts that the layer does not have are missing.
        """
        text, image = token_layout.text_length, token_layout.image_length
        width = self.heads * self.head_dim
        if self.kind == "dense":
            return {"dense": dense_flops(text + image, width)}
        parts = {"text": softmax_flops(text * (text + image), width)}
        if self.window is not None:
            parts["near"] = softmax_flops(self._near_pairs(token_layout), width)
        if self.pooled is not None:
            parts["pooling"] = self.pooled.flops(image, self.kv_heads * self.head_dim)
        if self.far is not None:
            far = self.far.flops(image, image + (text if self.kind == "linear" else 0))
            parts |= {"far": far["products"], "normalization": far["normalization"]}
        if self.map_q is not None:
            weights = sum(
                layer.weight.numel() for map in (self.map_q, self.map_k) for layer in (map.down, map.up)
            )  # fmt: skip
            if self.maps == "before" and self.kind == "hybrid":
                weights += self.map_q.down.in_features * (self.heads + self.kv_heads) * self.head_dim
            parts["maps"] = 2 * image * weights
        if self.value_conv is not None:
            parts["value_conv"] = 2 * image * self.value_conv.weight.numel()
        return parts

    def _near_pairs(self, token_layout: TokenLayout) -> int:
        """Number of pairs of an image query and a key in its window, the text or the pooled keys."""
        windows = seen_over_grids(token_layout.grids, self.window, self.dilation, self.circle)
        pooled = 0 if self.pooled is None else self.pooled.count(token_layout.grids)
        return windows + token_layout.image_length * (token_layout.text_length + pooled)

    def work(self, token_layout: TokenLayout, element_size: int) -> dict[str, Work]:
        """The work of one image, given q, k, v, q' and k', by direction (see `attention_work`).

        Every tensor is read or written once. FLOPs are those of the matrix products; the maps, which run before, and
        the mixer's normalization are left out.
        """
        text, image = token_layout.text_length, token_layout.image_length
        whole, width, kv_width = text + image, self.heads * self.head_dim, self.kv_heads * self.head_dim
        parts = self.flops_by_part(token_layout)
        flops = sum(parts.get(name, 0) for name in ("text", "dense", "near", "far"))
        inputs, softmax_outputs = whole * (width + 2 * kv_width), whole * width
        if self.kind == "linear":
            # with maps, only the text queries use q and k themselves
            if self.map_q is not None:
                inputs = text * width + (whole if text else 0) * kv_width + whole * kv_width
            softmax_outputs = text * width
        if self.map_q is not None:
            inputs += image * (width + kv_width)
        return attention_work(inputs, whole * width, flops, element_size, softmax_outputs=softmax_outputs)

    def near_work(self, token_layout: TokenLayout, element_size: int) -> dict[str, Work]:
        """The work of the window branch alone, by direction: image queries over their windows and the text."""
        text, image = token_layout.text_length, token_layout.image_length
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inputs, outputs = image * width + 2 * (text + image) * kv_width, image * width
        flops = softmax_flops(self._near_pairs(token_layout), width)
        return attention_work(inputs, outputs, flops, element_size, softmax_outputs=outputs)


class TokenGate(nn.Linear):
    """A gate of each head, linear in the token with the weights times `scale`: [B, N, width] -> [B, N, heads].

    By the scale, a step of the optimizer moves the gates of a wide layer no further than those of a narrow one.
    """

    def __init__(self, width: int, heads: int, scale: float):
        super().__init__(width, heads)
        self.scale = scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight * self.scale, self.bias)


class ValueConv(nn.Conv2d):
    """Depthwise convolution of an image's values over its grid, zero at the start (LiT, arXiv 2501.12976)."""

    def __init__(self, width: int, side: int):
        super().__init__(width, width, side, padding=side // 2, groups=width)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self, value: torch.Tensor, grids: tuple[tuple[int, int], ...], rows: RowShard | None = None
    ) -> torch.Tensor:
        """[B, N, heads, D] -> [B, N, heads, D], each grid by itself.

        rows: of one image that is spread over processes, which rows these are.
        """
        if rows is not None:
            (grid,), margin = grids, self.kernel_size[0] // 2
            reach = rows.near(margin)
            (value,) = rows.extended([value.unflatten(1, grid)], reach)()
            above = rows.first - reach(rows.first, rows.count)[0]
            out = self(value.flatten(1, 2), (tuple(value.shape[1:3]),)).unflatten(1, value.shape[1:3])
            return out[:, above : above + rows.count].flatten(1, 2)
        images = value.flatten(2).transpose(1, 2).split([rows * columns for rows, columns in grids], dim=2)
        images = [super(ValueConv, self).forward(x.unflatten(2, grid)) for x, grid in zip(images, grids, strict=True)]
        return torch.cat([x.flatten(2) for x in images], dim=2).transpose(1, 2).view_as(value)


def rotate_by_position(
    x: torch.Tensor, grids: tuple[tuple[int, int], ...], theta: float = 10000.0, first: int = 0
) -> torch.Tensor:
    """Rotate the first half of the channels by each token's row, the second half by its column: [B, N, heads, D].

    Neighbouring channels are pairs, as in FLUX; pair i of d / 2 turns by theta ** (-2 i / d) a token, where d is half
    of D. first: the position of the first row.
    """
    width, rotated = x.shape[-1] // 2, []
    rates = theta ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    for image, (rows, columns) in zip(x.split([rows * columns for rows, columns in grids], dim=1), grids, strict=True):
        image, parts = image.unflatten(1, (rows, columns)), []
        places = torch.arange(first, first + rows, device=x.device), torch.arange(columns, device=x.device)
        for part, place, shape in zip(image.chunk(2, -1), places, ((-1, 1, 1), (1, -1, 1)), strict=True):
            angles = (place[:, None] * rates).unflatten(0, shape)  # [rows, 1, 1, d / 2]
            cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
            a, b = part.unflatten(-1, (-1, 2)).unbind(-1)
            parts.append(torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2))
        rotated.append(torch.cat(parts, dim=-1).flatten(1, 2))
    return torch.cat(rotated, dim=1)


class QueryKeyMap(nn.Module):
    """x -> up(act(LN(down(x)))), zero at the start. [B, N, width] -> [B, N, out_width]."""

    def __init__(self, width: int, out_width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.norm = nn.LayerNorm(rank)
        self.up = nn.Linear(rank, out_width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.up(F.leaky_relu(self.norm(self.down(hidden_states))))
