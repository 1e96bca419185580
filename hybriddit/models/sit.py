"""SiT, a class-conditional transformer trained from scratch, with softmax, linear, window or hybrid attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import (
    TimestepEmbedding,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
    get_1d_sincos_pos_embed_from_grid,
    get_timestep_embedding,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from timm.layers import GluMlp, LayerNorm, Mlp, PatchEmbed, RmsNorm
from torch import nn

from ..attention import TokenLayout
from ..attention.hybrid import HybridAttention, ValueConv
from ..config import HybridConfig, match_layers
from ..files import read_tensors
from .sit_names import renamed
from .wrapping import SavesPlain

# the published sizes; each of them with patches of 2, 4 or 8
SIT_SIZES = {
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
}
SIT_PATCHES = (2, 4, 8)
# What the recipes configs/sit/*_linear.yaml and *_hybrid.yaml add to a size: linear attention without maps, with positions.
SIT_FAR_BRANCH = {"feature_map": "hedgehog", "projection": None, "map_rank": 0, "rope": True, "far_rope": True}
ATTENTION_KINDS = ("softmax", "linear", "window", "hybrid")
NORMS = {"layer_norm": LayerNorm, "rms_norm": RmsNorm}
ACTIVATIONS = ("gelu-approximate", "swiglu")
TIME_CHANNELS = 256  # channels of the time's sinusoidal embedding, before its MLP
EPS = 1e-6


class SiTAttention(nn.Module):
    """Self-attention over a grid of tokens: projections, qk-norm and rope around one HybridAttention.

    The far branch has query and key maps before the projections, as in LinFusion (arXiv 2409.02097), or with map_rank 0
    the layer's own queries and keys; and rope only with far_rope.

    kind: "softmax", "linear", "window" or "hybrid"; a layer has only the weights that its kind needs. The other
    arguments are those of SiTTransformer2DModel.
    """

    def __init__(
        self,
        kind: str,
        heads: int,
        head_dim: int,
        *,
        window: tuple[int, int] | None,
        stride: tuple[int, int],
        map_rank: int | None,
        mixer: str,
        feature_map: str,
        projection: int | None,
        far_rope: bool,
        gate: str,
        gate_init: float,
        qk_norm: bool,
        value_conv: int | None,
    ):
        super().__init__()
        width = heads * head_dim
        self.kind, self.heads = kind, heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = (RmsNorm(head_dim, eps=EPS) if qk_norm else nn.Identity() for _ in range(2))
        self.hybrid = HybridAttention(
            width,
            heads,
            head_dim,
            kind="dense" if kind == "softmax" else kind,
            window=window,
            stride=stride,
            map_rank=width if map_rank is None else map_rank,
            maps="before",
            mixer=mixer,
            feature_map=feature_map,
            projection=projection,
            rotary="model" if far_rope else "none",
            join="gate",
            gate=gate,
            gate_init=gate_init,
        )
        # not HybridAttention's own: softmax and window layers have one too
        self.value_conv = None if value_conv is None else ValueConv(width, value_conv)

    def forward(
        self, hidden_states: torch.Tensor, token_layout: TokenLayout, rope: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """Attend over the layout's grid: [B, N, width] -> [B, N, width], N = rows x columns.

        rope: cosines and sines of the positions, [N, D] each, or None.
        """
        hybrid = self.hybrid
        far_rope = rope if hybrid.rotary == "model" else None
        query = key = None
        if self.kind != "linear" or hybrid.map_q is None:
            query, key = self._split(self.to_q(hidden_states)), self._split(self.to_k(hidden_states))
        value = self._split(self.to_v(hidden_states))  # [B, N, heads, D]
        far_query, far_key, gate = hybrid.far_inputs(hidden_states, query, key, to_q=self.to_q, to_k=self.to_k)
        if far_query is not None:
            far_query, far_key = self._place(far_query, far_key, far_rope)
        elif self.kind == "hybrid" and far_rope is not rope:
            far_query, far_key = self._place(query, key, far_rope)  # the near branch alone is rotated
        if query is None:
            query, key = far_query, far_key  # a linear layer with maps has no other queries and keys
        else:
            query, key = self._place(query, key, far_rope if self.kind == "linear" else rope)
        out = hybrid(query, key, value, token_layout, far_query=far_query, far_key=far_key, gate=gate)
        if self.value_conv is not None:
            out = out + self.value_conv(value, token_layout.grids, token_layout.rows)
        out = out.flatten(2)  # [B, N, width]
        return self.to_out(out)

    def _split(self, x):
        return x.unflatten(-1, (self.heads, -1))

    def _place(self, query, key, rope):
        """Norm queries and keys, [B, N, heads, D] each, and rotate them if there is a rope."""
        query, key = self.norm_q(query), self.norm_k(key)
        if rope is None:
            return query, key
        return tuple(apply_rotary_emb(tokens, rope, sequence_dim=1) for tokens in (query, key))


class SiTBlock(nn.Module):
    """A transformer block: attention and MLP, each modulated by the conditioning (adaLN-Zero)."""

    def __init__(self, attn: SiTAttention, width: int, ff_width: int, norm_type: str, activation_fn: str):
        super().__init__()
        self.norm1, self.norm2 = (NORMS[norm_type](width, eps=EPS, affine=False) for _ in range(2))
        self.attn = attn
        if activation_fn == "swiglu":  # fc1 outputs the values, then their gates
            self.ff = GluMlp(width, 2 * ff_width, act_layer=nn.SiLU, gate_last=True)
        else:
            self.ff = Mlp(width, ff_width, act_layer=partial(nn.GELU, approximate="tanh"))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        token_layout: TokenLayout,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Run the block: [B, N, width] -> [B, N, width]. conditioning: [B, width], after its SiLU."""
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = (
            self.modulation(conditioning).unsqueeze(1).chunk(6, dim=-1)  # [B, 1, width] each
        )
        attn = self.attn(modulate(self.norm1(hidden_states), shift_attn, scale_attn), token_layout, rope)
        hidden_states = hidden_states + gate_attn * attn
        return hidden_states + gate_ff * self.ff(modulate(self.norm2(hidden_states), shift_ff, scale_ff))


class SiTTransformer2DModel(SavesPlain, ModelMixin, ConfigMixin):
    """SiT (arXiv 2401.08740), with softmax, linear (LinFusion, arXiv 2409.02097), window or hybrid attention.

    `SiTTransformer2DModel(**SiTTransformer2DModel.preset("XL/2"), attention="linear")` makes one of a published size:
    S, B, L or XL with a patch of 2, 4 or 8. It is called like diffusers' DiTTransformer2DModel; time 0 is noise and
    time 1 the image. save_pretrained and from_pretrained save and load it; `hybriddit.models.sit_convert` reads the
    checkpoints of the SiT and DiT authors.

    Args:
        num_attention_heads, attention_head_dim, num_layers: the width is heads x head_dim, a multiple of 4.
        in_channels, sample_size, patch_size: the model is trained on latents [in_channels, sample_size, sample_size];
            patch_size divides sample_size. It also takes other sizes, square or not: their positions are scaled to the
            range of the training size.
        mlp_ratio: the MLP's hidden width divided by the model's width.
        num_classes: labels are 0 to num_classes - 1; num_classes itself means "no label".
        class_dropout_prob: in training mode, the probability that a label is replaced by "no label", for
            classifier-free guidance.
        learn_sigma: the last layer has 2 x in_channels outputs, as in the published checkpoints; the second half is not
            used. False: in_channels outputs.
        attention: "softmax", "linear", "window" or "hybrid" for all layers; or {fnmatch pattern on layer names: kind},
            where layers are named transformer_blocks.0.attn and so on, and the first match wins; or a list with the
            kind of every layer, which is how a dict is stored in the config.
        window, stride: int or (rows, columns), in tokens; for window and hybrid layers.
        map_rank: hidden width of the query and key maps in linear and hybrid layers; None is the model's width, as in
            LinFusion (22 % more parameters); 0: no maps, the far branch takes the layer's own queries and keys.
        gate: for hybrid layers: "head" or "channel" (one learned value each), or "token" (one value per head, linear in
            the token).
        gate_init: the gate's value at the start: 0 is the near branch alone, 1 the far branch alone. In between, both
            branches learn from the first step; from 0 the model would learn not to use the far branch.
        qk_norm: RMSNorm of each head's queries and keys.
        norm_type: the blocks' norms, "layer_norm" or "rms_norm", without weights.
        activation_fn: the MLP's, "gelu-approximate" or "swiglu" (with two thirds of the hidden width, which keeps the
            number of parameters).
        rope: 2-D rotary position embedding of queries and keys in softmax and window attention.
        value_conv: kernel size, an odd number, of a depthwise convolution of the values over the grid, which is added
            to the attention's output and is zero at the start. None: no convolution.
        feature_map: for linear and hybrid layers, the function phi that makes queries and keys positive: "elu", as in
            LinFusion, "hedgehog" or "polynomial".
        projection: for linear and hybrid layers, channels m of a learned projection [heads, D, m] of queries and one of
            keys before phi, up to 128; 0: none, as in LinFusion; None: as many as give phi at most D features.
        far_rope: whether rope also rotates the queries and keys of linear attention, before the projection and phi.
        mixer: for linear and hybrid layers, what attends to the whole image: "linear", or one of other papers' ("blocks",
            "scan", "multiscale", "pooled"; see HybridConfig), with the feature map and the projection above.

    The defaults of map_rank, feature_map, projection and far_rope are LinFusion's, and what models saved by older
    versions mean; the recipes in `configs/sit` named linear and hybrid have map_rank 0, "hedgehog", None and true.

    Raises ValueError, in one line, for values that are invalid or do not go together.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks: ClassVar[list[str]] = ["SiTBlock"]
    _no_split_modules: ClassVar[list[str]] = ["SiTBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm", "gate"]
    # gates learn in small steps, which bf16 would round away
    _keep_in_fp32_modules: ClassVar[list[str]] = ["gate"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        num_layers: int = 28,
        sample_size: int = 32,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        attention: str | dict[str, str] | list[str] = "softmax",
        window: int | tuple[int, int] = 8,
        stride: int | tuple[int, int] = 1,
        map_rank: int | None = None,
        gate: str = "head",
        gate_init: float = 0.5,
        qk_norm: bool = False,
        norm_type: str = "layer_norm",
        activation_fn: str = "gelu-approximate",
        rope: bool = False,
        value_conv: int | None = None,
        feature_map: str = "elu",
        projection: int | None = 0,
        far_rope: bool = False,
        mixer: str = "linear",
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        _check_fields(self.config)
        kinds = layer_kinds(attention, num_layers)
        if far_rope and not {"linear", "hybrid"} & set(kinds):
            raise ValueError("far_rope is for linear and hybrid layers, and there are none: leave it out")
        if mixer != "linear" and not {"linear", "hybrid"} & set(kinds):
            raise ValueError("mixer is for linear and hybrid layers, and there are none: leave it out")
        if rope and not far_rope and set(kinds) == {"linear"}:
            raise ValueError("rope does nothing in linear attention, and every layer is linear: leave it out")
        # HybridConfig checks window, stride, map_rank, gate and projection, as for a converted model
        settings = HybridConfig(window=window, stride=stride, map_rank=map_rank, gate=gate, projection=projection)
        if window is None and {"window", "hybrid"} & set(kinds):
            raise ValueError("window and hybrid layers need a window: window is None")
        if not isinstance(attention, str):
            # as a list: diffusers sorts the keys of a saved config, and the order of a dict's patterns counts
            self.register_to_config(attention=kinds)
        ff_width = int(width * mlp_ratio)
        if activation_fn == "swiglu":
            ff_width = max(8, 8 * round(ff_width * 2 / 3 / 8))
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.gradient_checkpointing = False

        self.patch_embed = PatchEmbed(sample_size, patch_size, in_channels, width, strict_img_size=False)
        self.grid = self.patch_embed.grid_size
        # never trained, but a parameter: published files contain it, and published parameter counts include it
        self.pos_embed = nn.Parameter(sincos_positions(self.grid, self.grid, width), requires_grad=False)
        self.time_embed = TimestepEmbedding(TIME_CHANNELS, width)
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.transformer_blocks = nn.ModuleList(
            SiTBlock(
                SiTAttention(
                    kind,
                    num_attention_heads,
                    attention_head_dim,
                    window=settings.pair("window"),
                    stride=settings.pair("stride"),
                    map_rank=map_rank,
                    mixer=mixer,
                    feature_map=feature_map,
                    projection=projection,
                    far_rope=far_rope,
                    gate=gate,
                    gate_init=gate_init,
                    qk_norm=qk_norm,
                    value_conv=value_conv,
                ),
                width,
                ff_width,
                norm_type,
                activation_fn,
            )
            for kind in kinds
        )
        self.norm_out = NORMS[norm_type](width, eps=EPS, affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, patch_size**2 * self.out_channels)
        self._init_weights()
        self.register_load_state_dict_pre_hook(_rename_on_load)

    def _init_weights(self) -> None:
        """Initialise as SiT does: Xavier, with zeros in each block's modulation and the last layer.

        Gates start as HybridAttention has them. One that is a layer is drawn with the others all the same, so that a
        seed gives the weights that it always gave.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.patch_embed.proj
        nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
        nn.init.zeros_(patches.bias)
        for table in (self.label_embed, self.time_embed.linear_1, self.time_embed.linear_2):
            nn.init.normal_(table.weight, std=0.02)
        for block in self.transformer_blocks:
            attn = block.attn
            for projection in (attn.to_q, attn.to_k, attn.to_v):
                # in SiT the three are one layer with three times the outputs, for which Xavier's weights are smaller
                nn.init.xavier_uniform_(projection.weight, gain=math.sqrt(1 / 2))
            attn.hybrid.init_gate()
        for last in (*(block.modulation for block in self.transformer_blocks), self.modulation_out, self.proj_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @staticmethod
    def preset(name: str) -> dict[str, int]:
        """Constructor arguments of a published size, "S/2" to "XL/8". Raises ValueError for an unknown one."""
        size, _, patch = name.partition("/")
        if size not in SIT_SIZES or patch not in map(str, SIT_PATCHES):
            raise ValueError(
                f"unknown SiT size {name!r}: use one of {', '.join(SIT_SIZES)} with a patch of "
                f"{', '.join(map(str, SIT_PATCHES))}, as in 'S/2'"
            )
        return {**SIT_SIZES[size], "patch_size": int(patch)}

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
        token_layout: TokenLayout | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity, or whatever the model was trained for, from noisy latents.

        hidden_states: [B, in_channels, H, W]; H and W are multiples of the patch, and need not be the training size.
        timestep: [B], or one value for all, in [0, 1] (DiT's checkpoints: 0 to 999).
        class_labels: [B] integers, 0 to num_classes; num_classes means "no label". On a GPU their range is not checked,
            because the host would have to wait for it.
        token_layout: set by `hybriddit.parallel`, where this process has some rows of tokens only.

        Returns Transformer2DModelOutput(sample), or (sample,): [B, in_channels, H, W]. Raises ValueError for inputs of
        another shape.
        """
        batch, dtype, patch = hidden_states.shape[0], hidden_states.dtype, self.config.patch_size
        self._check_inputs(hidden_states, timestep, class_labels)
        grid = self.patch_embed.dynamic_feat_size(hidden_states.shape[2:])

        # 1. patches and positions: [B, C, H, W] -> [B, N, width]
        hidden_states = self.patch_embed(hidden_states)
        pos_embed, rope = self.pos_embed, None
        if grid != self.grid:
            width = pos_embed.shape[2]
            pos_embed = sincos_positions(grid, self.grid, width, hidden_states.device).to(pos_embed.dtype)
        hidden_states = hidden_states + pos_embed
        if self.config.rope:
            rope = rotary_positions(grid, self.grid, self.config.attention_head_dim, hidden_states.device)
        if token_layout is None:
            token_layout = TokenLayout(0, (grid,), text_first=False)
        else:
            hidden_states = token_layout.own(hidden_states)
            rope = rope and tuple(map(token_layout.own, rope))

        # 2. conditioning: [B, width]
        if self.training and self.config.class_dropout_prob > 0:
            dropped = torch.rand(batch, device=class_labels.device) < self.config.class_dropout_prob
            class_labels = torch.where(dropped, self.config.num_classes, class_labels)
        waves = get_timestep_embedding(
            timestep.expand(batch), TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        conditioning = F.silu(self.time_embed(waves.to(dtype)) + self.label_embed(class_labels))

        # 3. blocks
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, conditioning, token_layout, rope
                )
            else:
                hidden_states = block(hidden_states, conditioning, token_layout, rope)

        # 4. [B, N, width] -> [B, rows, columns, patch, patch, C] -> [B, C, H, W]
        shift, scale = self.modulation_out(conditioning).unsqueeze(1).chunk(2, dim=-1)
        hidden_states = self.proj_out(modulate(self.norm_out(hidden_states), shift, scale))
        hidden_states = hidden_states.unflatten(2, (patch, patch, self.out_channels)).unflatten(1, grid)
        sample = hidden_states.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        sample = sample[:, : self.config.in_channels]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_inputs(self, hidden_states, timestep, class_labels):
        channels, patch, classes = self.config.in_channels, self.config.patch_size, self.config.num_classes
        if hidden_states.ndim != 4 or hidden_states.shape[1] != channels:
            raise ValueError(f"the model takes [B, {channels}, H, W] latents, got {tuple(hidden_states.shape)}")
        if any(side % patch or side == 0 for side in hidden_states.shape[2:]):
            raise ValueError(
                f"height and width must be multiples of the patch of {patch}, got {tuple(hidden_states.shape[2:])}"
            )
        batch = hidden_states.shape[0]
        if timestep.ndim > 1 or timestep.numel() not in (1, batch):
            raise ValueError(f"timestep must be one value or [{batch}], got {tuple(timestep.shape)}")
        if class_labels.shape != (batch,) or class_labels.is_floating_point():
            raise ValueError(
                f"class_labels must be [{batch}] integers, got {tuple(class_labels.shape)} of {class_labels.dtype}"
            )
        # not on a GPU, where reading the labels makes the host wait, nor in a compiled graph, which cannot read them
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling() and batch:
            low, high = class_labels.min().item(), class_labels.max().item()
            if low < 0 or high > classes:
                raise ValueError(
                    f"class labels must be 0 to {classes - 1}, or {classes} for none; got {low if low < 0 else high}"
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load as diffusers does, from safetensors only; also weights saved by older versions (`sit_names`).

        Raises ValueError if weights are missing, or if there are weights that the model has no place for.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(f"{cls.__name__} loads safetensors only: leave use_safetensors out")
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        model, info = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for problem, names in (("lacks", info["missing_keys"]), ("holds unknown", info["unexpected_keys"])):
            if names:
                raise ValueError(
                    f"{pretrained_model_name_or_path} {problem} weights for these fields: {len(names)}, "
                    f"{min(names)} the first; it was saved with another depth or attention"
                )
        return (model, info) if wants_info else model

    def _fix_state_dict_keys_on_load(self, state_dict):  # called by from_pretrained for a single file
        super()._fix_state_dict_keys_on_load(state_dict)
        _rename(state_dict)

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, name_or_path, loaded_keys, **kwargs):
        """The part of from_pretrained that reads the files. Shards with old names are read and renamed here."""
        if state_dict is None and loaded_keys != list(renamed(dict.fromkeys(loaded_keys))):
            state_dict = {}
            for path in resolved_model_file:
                state_dict |= read_tensors(Path(path))
            _rename(state_dict)
            loaded_keys = list(state_dict)
        return super()._load_pretrained_model(
            model, state_dict, resolved_model_file, name_or_path, loaded_keys, **kwargs
        )


def _rename(state_dict: dict[str, torch.Tensor]) -> None:
    """Replace old names of weights by today's, in place."""
    today = renamed(state_dict)
    state_dict.clear()
    state_dict.update(today)


def _rename_on_load(module, state_dict, *_) -> None:
    _rename(state_dict)


# saved pipelines find the class in this module, whatever the package's inner layout
SiTTransformer2DModel.__module__ = "hybriddit"


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


def sincos_positions(
    grid: tuple[int, int], base: tuple[int, int], width: int, device: torch.device | None = None
) -> torch.Tensor:
    """DiT's sinusoidal position embedding of a grid whose positions are scaled to the `base` grid: [1, N, width].

    The first half of the channels encodes the column, the second half the row.
    """
    rows, columns = (
        get_1d_sincos_pos_embed_from_grid(width // 2, _centres(length, over, device))  # [length, width / 2]
        for length, over in zip(grid, base, strict=True)
    )
    rows, columns = rows.unsqueeze(1).expand(*grid, -1), columns.unsqueeze(0).expand(*grid, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1).unsqueeze(0).float()


def rotary_positions(
    grid: tuple[int, int], base: tuple[int, int], head_dim: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of 2-D rotary positions, scaled as in `sincos_positions`: [N, head_dim] each.

    The first half of a head encodes the row, the second half the column.
    """
    rows, columns = (_centres(length, over, device) for length, over in zip(grid, base, strict=True))
    places = (rows.repeat_interleave(grid[1]), columns.repeat(grid[0]))  # of every token, row by row
    axes = [get_1d_rotary_pos_embed(head_dim // 2, place, use_real=True) for place in places]
    return tuple(torch.cat(parts, dim=-1) for parts in zip(*axes, strict=True))


def _centres(length, base, device):
    """Positions of `length` patch centres along an axis of `base` patches: 0, 1, 2, ... if length equals base."""
    return (torch.arange(length, device=device) + 0.5) * (base / length) - 0.5


def layer_kinds(attention: str | Mapping[str, str] | Sequence[str], num_layers: int) -> list[str]:
    """The attention kind of every layer, from SiTTransformer2DModel's `attention`. Raises ValueError, in one line."""
    names = [f"transformer_blocks.{index}.attn" for index in range(num_layers)]
    if isinstance(attention, str):
        kinds = [attention] * num_layers
    elif isinstance(attention, Mapping):
        kinds, unmatched = match_layers(attention, names)
        if unmatched:
            raise ValueError(
                f"attention: {unmatched[0]!r} matches no layer; they are named {names[0]!r} to {names[-1]!r}"
            )
        if None in kinds:
            raise ValueError(f"attention: no pattern matches {names[kinds.index(None)]!r}; end with '*' for the rest")
    else:
        kinds = list(attention)
        if len(kinds) != num_layers:
            raise ValueError(f"attention lists {len(kinds)} kinds for {num_layers} layers")
    for kind in kinds:
        if kind not in ATTENTION_KINDS:
            raise ValueError(f"unknown attention {kind!r}: use one of {', '.join(ATTENTION_KINDS)}")
    return kinds


def _check_fields(config):
    counts = ["num_attention_heads", "attention_head_dim", "in_channels", "num_layers"]
    for name in [*counts, "sample_size", "patch_size", "num_classes"]:
        if not isinstance(config[name], int) or isinstance(config[name], bool) or config[name] < 1:
            raise ValueError(f"{name} must be a positive integer, not {config[name]!r}")
    for name in ("mlp_ratio", "class_dropout_prob", "gate_init"):
        if not isinstance(config[name], int | float) or isinstance(config[name], bool):
            raise ValueError(f"{name} must be a number, not {config[name]!r}")
    for name in ("learn_sigma", "qk_norm", "rope", "far_rope"):
        if not isinstance(config[name], bool):
            raise ValueError(f"{name} must be true or false, not {config[name]!r}")
    width = config.num_attention_heads * config.attention_head_dim
    if width % 4:
        raise ValueError(f"heads x head_dim must be a multiple of 4 for the positions, not {width}")
    if config.sample_size % config.patch_size:
        raise ValueError(f"sample_size {config.sample_size} is not a multiple of patch_size {config.patch_size}")
    if not 1 / width <= config.mlp_ratio < math.inf:
        raise ValueError(f"mlp_ratio must be above 0, and enough for one channel, not {config.mlp_ratio!r}")
    if not 0 <= config.class_dropout_prob <= 1:
        raise ValueError(f"class_dropout_prob must be from 0 to 1, not {config.class_dropout_prob!r}")
    for name, known in (("norm_type", NORMS), ("activation_fn", ACTIVATIONS)):
        if config[name] not in known:
            raise ValueError(f"unknown {name} {config[name]!r}: use one of {', '.join(known)}")
    side = config.value_conv
    if side is not None and (not isinstance(side, int) or isinstance(side, bool) or side < 1 or side % 2 == 0):
        raise ValueError(f"value_conv must be an odd integer above 0, or None, not {side!r}")
    for name in ("feature_map", "mixer"):
        if not isinstance(config[name], str):
            raise ValueError(f"{name} must be a name, not {config[name]!r}")
    if config.far_rope and not config.rope:
        raise ValueError("far_rope rotates by rope, which is off: set rope too, or leave far_rope out")
    if config.rope and config.attention_head_dim % 4:
        raise ValueError(f"rope needs an attention_head_dim that is a multiple of 4, not {config.attention_head_dim}")
