"""The hybrid layer: near (window and text, softmax) and far (linear, whole image), joined by a learned gate."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import nn

from .layout import TokenLayout
from .linear import linear_attention
from .window import neighborhood_attention


class HybridAttention(nn.Module):
    """What a converted attention layer gains: low-rank query and key maps, a gate, and the join of near and far.

    It lives at `<attention>.hybrid`; the layer's own projections, norms and rotary embedding stay the teacher's. For
    an image token i with window W(i) and text T,

        near_i = softmax attention of q_i over W(i) and T
        far_i  = linear attention of q'_i over all image tokens, with k' and the same v
        q'     = norm_q(q + up(act(LN(down(x)))))        k' likewise
        out_i  = near_i + gate * (far_i - near_i)        gate zero at the start

    and text queries attend to everything by softmax. The maps are LinFusion's `to_q(x + f(x))` (arXiv 2409.02097)
    folded through the projection.

    Args:
        width: channels of the layer's input x.
        heads, head_dim: of the layer's queries and keys.
        map_rank: width of the maps' hidden layer.
        window, stride, dilation: (rows, columns) in tokens. A window of None is linear attention alone: far over text
            and image, gate 1 and no near.
        far: False is window attention alone, which adds no weights.
        gate: "head", "channel" (one value each) or "token" (a value per head, linear in x).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        map_rank: int,
        window: tuple[int, int] | None,
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        far: bool = True,
        gate: str = "head",
    ):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.window, self.stride, self.dilation, self.far = window, stride, dilation, far
        if not far:
            return
        self.map_q = QueryKeyMap(width, heads * head_dim, map_rank)
        self.map_k = QueryKeyMap(width, heads * head_dim, map_rank)
        if window is None:
            return
        if gate == "token":
            self.gate = nn.Linear(width, heads)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        else:
            self.gate = nn.Parameter(torch.zeros(heads, head_dim if gate == "channel" else 1))

    def maps(
        self, hidden_states: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The far branch's raw query and key (the caller applies the layer's own norms to them), and a token gate.

        hidden_states [B, N, width], the image part of the layer's input; query, key [B, N, heads, D], the teacher's
        projections of it before norm and rotary embedding. The gate is [B, N, heads, 1]; None where it is no function
        of the token (a parameter is read in `forward`, where an offloading hook has loaded it).
        """
        gate = None
        if self.window is not None and isinstance(self.gate, nn.Linear):
            # kept in fp32, whatever the layer runs in
            gate = self.gate(hidden_states.to(self.gate.weight.dtype)).unsqueeze(-1)
        return query + self.map_q(hidden_states).view_as(query), key + self.map_k(hidden_states).view_as(key), gate

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
    ) -> torch.Tensor:
        """Attention over the joined sequence.

        query, key, value: [B, S, heads, D], text and image in `token_layout`'s order, after norm and rotary embedding.
        far_query, far_key: [B, N, heads, D], image only, after norm, without rotary embedding; gate: as `maps` gives it.
        Returns [B, S, heads, D] in the same order.
        """
        (text_query, image_query), (text_key, image_key), (text_value, image_value) = (
            token_layout.split(tokens) for tokens in (query, key, value)
        )
        if self.window is None:
            # text keys enter as the teacher made them: the maps are the image's alone
            image = linear_attention(
                far_query, torch.cat((text_key, far_key), dim=1), torch.cat((text_value, image_value), dim=1)
            )
        else:
            image = self._near(image_query, image_key, image_value, text_key, text_value, token_layout, scale)
            if self.far:
                gate = self.gate if gate is None else gate
                image = linear_attention(far_query, far_key, image_value, near=image, gate=gate)
        if token_layout.text_length == 0:
            return image
        text = F.scaled_dot_product_attention(
            text_query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=scale
        ).transpose(1, 2)
        return token_layout.join(text, image)

    def _near(self, query, key, value, text_key, text_value, token_layout, scale):
        if len(token_layout.grids) != 1:
            raise NotImplementedError(
                f"window attention over several image grids {token_layout.grids} is not supported yet: "
                "pass one image (no reference images)"
            )
        # windows are laid out by plain integers: torch.compile makes those of a second size symbols
        grid = tuple(operator.index(side) for side in token_layout.grids[0])
        near = neighborhood_attention(
            *(tokens.unflatten(1, grid) for tokens in (query, key, value)),
            window=self.window,
            stride=self.stride,
            dilation=self.dilation,
            scale=scale,
            text_key=text_key if token_layout.text_length else None,
            text_value=text_value if token_layout.text_length else None,
        )
        return near.flatten(1, 2)


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
