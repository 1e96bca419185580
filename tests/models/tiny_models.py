"""Tiny random models of every supported kind, inputs for them, and the mask that a window stands for."""

import torch
import torch.nn.functional as F
from diffusers import (
    BriaFiboTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)

TEXT = 5
HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM


def pixart(layers=2, **kwargs):
    return PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=WIDTH,
        sample_size=32,
        caption_channels=12,
        use_additional_conditions=False,
        **kwargs,
    )


def sd3(layers=2, **kwargs):
    return SD3Transformer2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=12,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=8,
        pos_embed_max_size=128,
        **kwargs,
    )


FLUX_SIZES = {
    "in_channels": 8,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}


def flux(layers=1, single_layers=1, **kwargs):
    return FluxTransformer2DModel(
        **FLUX_SIZES,
        num_layers=layers,
        num_single_layers=single_layers,
        pooled_projection_dim=8,
        **kwargs,
    )


def flux2(layers=1, single_layers=1, **kwargs):
    return Flux2Transformer2DModel(
        **FLUX_SIZES | {"axes_dims_rope": (4, 4, 4, 4)},
        num_layers=layers,
        num_single_layers=single_layers,
        timestep_guidance_channels=8,
        **kwargs,
    )


def flux3(layers=1, single_layers=1, **kwargs):
    sizes = FLUX_SIZES | {"axes_dims_rope": (4, 4, 4, 4), "cond_in_channels": 8, "timestep_channels": 8}
    return Flux3Transformer2DModel(**sizes, num_layers=layers, num_single_layers=single_layers, **kwargs)


def chroma(layers=1, single_layers=1, **kwargs):
    return ChromaTransformer2DModel(
        **FLUX_SIZES,
        num_layers=layers,
        num_single_layers=single_layers,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **kwargs,
    )


def qwen_image(layers=2, **kwargs):
    return QwenImageTransformer2DModel(
        **FLUX_SIZES,
        out_channels=2,
        num_layers=layers,
        **kwargs,
    )


def ovis(layers=1, single_layers=1, **kwargs):
    return OvisImageTransformer2DModel(
        **FLUX_SIZES, out_channels=8, num_layers=layers, num_single_layers=single_layers, **kwargs
    )


def longcat(layers=1, single_layers=1, **kwargs):
    return LongCatImageTransformer2DModel(**FLUX_SIZES, num_layers=layers, num_single_layers=single_layers, **kwargs)


def fibo(layers=1, single_layers=1, **kwargs):
    return BriaFiboTransformer2DModel(
        **FLUX_SIZES, num_layers=layers, num_single_layers=single_layers, text_encoder_dim=10, **kwargs
    )


def z_image(layers=2, refiners=1, **kwargs):
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=layers,
        n_refiner_layers=refiners,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=12,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 256, 256],
        **kwargs,
    )


def krea2(layers=2, **kwargs):
    """Narrower heads of queries, of which each two share one of keys and values."""
    return Krea2Transformer2DModel(
        in_channels=8,
        num_layers=layers,
        attention_head_dim=HEAD_DIM // 2,
        num_attention_heads=2 * HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=WIDTH,
        timestep_embed_dim=8,
        text_hidden_dim=12,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=12,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(2, 2, 4),
        **kwargs,
    )


def unet(layers=1, **kwargs):
    """Two levels of other widths; "layers" of a level's blocks."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=layers,
        block_out_channels=(WIDTH // 2, WIDTH),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        norm_num_groups=4,
        cross_attention_dim=12,
        **{"attention_head_dim": HEADS, **kwargs},
    )


KINDS = {
    "pixart": pixart,
    "sd3": sd3,
    "sd35-large": lambda **kwargs: sd3(qk_norm="rms_norm", **kwargs),
    "sd35-medium": lambda **kwargs: sd3(qk_norm="rms_norm", dual_attention_layers=(0,), **kwargs),
    "flux-dev": lambda **kwargs: flux(guidance_embeds=True, **kwargs),
    "flux-schnell": lambda **kwargs: flux(guidance_embeds=False, **kwargs),
    "chroma": chroma,
    "qwen-image": qwen_image,
    "flux2": flux2,
    "z-image": z_image,
    "ovis": ovis,
    "flux3": flux3,
    "krea2": krea2,
    "longcat": longcat,
    "fibo": fibo,
}
PADDED = ("chroma", "qwen-image", "krea2", "fibo")  # a mask hides padded text
HELD = ("z-image", "flux3", "krea2", "longcat")  # no argument brings the layout to the layers
# packed latents, text first, single blocks
FLUX_LIKE = ("flux-dev", "flux-schnell", "chroma", "flux2", "ovis", "flux3", "longcat", "fibo")
# one block: image tokens reach each other by its attention alone
ONE_BLOCK = {kind: {"layers": 1, **({"single_layers": 0} if kind in FLUX_LIKE else {})} for kind in KINDS}
ONE_BLOCK["z-image"] = {"layers": 1, "refiners": 0}
FIRST_BLOCK = dict.fromkeys(KINDS, "transformer_blocks.0.*")
FIRST_BLOCK |= {"z-image": "noise_refiner.0.*", "flux3": "mode_blocks.image.0.*"}
# what a call needs for every layer to have a part in it
WHOLE = {"flux3": {"references": ((2, 3),)}}
DENSE_CLASS = {kind: type(build()) for kind, build in KINDS.items()}


def make(kind, seed=0, dtype=torch.float64, **kwargs):
    """A random model of this kind in which every weight matters."""
    torch.manual_seed(seed)
    model = KINDS[kind](**kwargs).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in name or "pad_token" in name:  # drop their zeros and ones
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith(("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")):
                parameter.mul_(3)  # sharp attention: a wrong mask shows
            if name.endswith("to_qkv_mlp_proj.weight"):
                parameter[: 2 * WIDTH].mul_(3)
    return model


def make_inputs(model, grid, batch=1, seed=1, text=TEXT, references=()):
    """Arguments of forward for a grid of tokens (height, width). references: grids of FLUX.3's reference images."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)

    (height, width), config = grid, model.config
    if isinstance(model, UNet2DConditionModel):
        inputs = {
            "sample": random(batch, config.in_channels, height, width),
            "timestep": torch.full((batch,), 600, dtype=torch.long),
            "encoder_hidden_states": random(batch, text, config.cross_attention_dim),
        }
        if config.addition_embed_type is not None:
            inputs["added_cond_kwargs"] = {"text_embeds": random(batch, 8), "time_ids": random(batch, 6)}
        return inputs
    if isinstance(model, ZImageTransformer2DModel):  # texts of different lengths, in 32s
        lengths = [text + 32 * ((seed + row + 1) % 2) for row in range(batch)]
        return {
            "x": list(random(batch, config.in_channels, 1, 2 * height, 2 * width)),
            "t": torch.full((batch,), 0.4, dtype=model.dtype),
            "cap_feats": [random(length, config.cap_feat_dim) for length in lengths],
        }
    if isinstance(model, Krea2Transformer2DModel):
        places = [(0, 0, 0)] * text + [(0, row, column) for row in range(height) for column in range(width)]
        return {
            "hidden_states": random(batch, height * width, config.in_channels),
            "encoder_hidden_states": random(batch, text, config.num_text_layers, config.text_hidden_dim),
            "encoder_attention_mask": padded(batch, text, seed),
            "timestep": torch.full((batch,), 0.6, dtype=model.dtype),
            "position_ids": torch.tensor(places, dtype=torch.float32),
        }
    if isinstance(model, QwenImageTransformer2DModel):
        return {
            "hidden_states": random(batch, height * width, config.in_channels),
            "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
            "encoder_hidden_states_mask": padded(batch, text, seed),
            "timestep": torch.full((batch,), 0.6, dtype=model.dtype),
            "img_shapes": [[(1, height, width)]] * batch,
        }
    if isinstance(model, Flux2Transformer2DModel):
        guidance = torch.full((batch,), 3.5, dtype=model.dtype) if config.guidance_embeds else None
        return {
            "hidden_states": random(batch, height * width, config.in_channels),
            "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
            "timestep": torch.full((batch,), 0.6, dtype=model.dtype),
            "img_ids": torch.tensor([(0, row, column, 0) for row in range(height) for column in range(width)]),
            "txt_ids": torch.tensor([(0, 0, 0, place) for place in range(text)]),
            "guidance": guidance,
        }
    if isinstance(model, Flux3Transformer2DModel):  # half a step for each token

        def places(*grids, first=0):
            grids = [torch.tensor([0.5, 0.5]) * torch.cartesian_prod(*map(torch.arange, grid)) for grid in grids]
            return torch.cat([F.pad(F.pad(grid, (1, 0)), (0, 1), value=first - i) for i, grid in enumerate(grids)])

        inputs = {
            "hidden_states": random(batch, height * width, config.in_channels),
            "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
            "timestep": torch.full((batch,), 0.6, dtype=model.dtype),
            "img_ids": places(grid),
            "txt_ids": torch.tensor([(0.0, 0.0, 0.0, place) for place in range(text)]),
        }
        if references:
            ids = places(*references, first=-1)
            inputs["image_cond_ids"] = ids
            inputs["image_cond_hidden_states"] = random(batch, len(ids), config.cond_in_channels)
        return inputs
    if is_packed(model):
        ids = torch.zeros(height, width, 3)
        ids[..., 1] += torch.arange(height)[:, None]
        ids[..., 2] += torch.arange(width)
        inputs = {
            "hidden_states": random(batch, height * width, config.in_channels),
            "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
            "timestep": torch.full((batch,), 0.6, dtype=model.dtype),
            "img_ids": ids.flatten(0, 1).to(model.dtype),
            "txt_ids": torch.zeros(text, 3, dtype=model.dtype),
        }
        if isinstance(model, OvisImageTransformer2DModel):
            inputs["txt_ids"][:, 1:] = torch.arange(text)[:, None]
            return inputs
        if isinstance(model, LongCatImageTransformer2DModel):
            inputs["txt_ids"] = torch.tensor([(0, place, place) for place in range(text)]).float()
            return {**inputs, "img_ids": ids.flatten(0, 1) + torch.tensor([1, text, text])}
        mask = torch.cat((padded(batch, text, seed), torch.ones(batch, height * width, dtype=torch.bool)), 1)
        if isinstance(model, BriaFiboTransformer2DModel):
            layers = [random(batch, text, config.text_encoder_dim) for _ in model.caption_projection]
            kwargs = {"joint_attention_kwargs": {"attention_mask": mask[:, None, None]}}
            return {**inputs, "timestep": 1000 * inputs["timestep"], "text_encoder_layers": layers, **kwargs}
        if isinstance(model, ChromaTransformer2DModel):
            return {**inputs, "attention_mask": mask}
        guidance = torch.full((batch,), 3.5, dtype=model.dtype) if config.guidance_embeds else None
        return {**inputs, "pooled_projections": random(batch, config.pooled_projection_dim), "guidance": guidance}
    inputs = {
        "hidden_states": random(batch, config.in_channels, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 600, dtype=torch.long),
    }
    if isinstance(model, SD3Transformer2DModel):
        inputs["encoder_hidden_states"] = random(batch, text, config.joint_attention_dim)
        inputs["pooled_projections"] = random(batch, config.pooled_projection_dim)
    else:
        inputs["encoder_hidden_states"] = random(batch, text, config.caption_channels)
    return inputs


def padded(batch, text, seed):
    """A mask of texts of several lengths: bool [B, text]."""
    lengths = torch.tensor([text - (seed + row) % 3 for row in range(batch)])
    return torch.arange(text) < lengths[:, None]


def is_packed(model):
    """Whether the model takes latents packed to tokens."""
    packed = FluxTransformer2DModel, ChromaTransformer2DModel, QwenImageTransformer2DModel, Flux2Transformer2DModel
    packed = *packed, OvisImageTransformer2DModel, Flux3Transformer2DModel, Krea2Transformer2DModel
    return isinstance(model, (*packed, LongCatImageTransformer2DModel, BriaFiboTransformer2DModel))


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return together(model(**inputs, **kwargs).sample)


def together(sample):
    """A model's output as one tensor: Z-Image gives a list of films of one frame."""
    return torch.stack(list(sample))[:, :, 0] if isinstance(sample, list) else sample


def by_token(model, sample, grid):
    """A model's output as [B, height, width, channels] of tokens."""
    if is_packed(model):
        return sample.unflatten(1, grid)
    return sample.unflatten(3, (grid[1], 2)).unflatten(2, (grid[0], 2)).permute(0, 2, 4, 1, 3, 5).flatten(3)


def add_to_token(model, inputs, grid, row, column, amount=1.0):
    """The same inputs with one image token changed."""
    if isinstance(model, ZImageTransformer2DModel):
        images = [image.clone() for image in inputs["x"]]
        for image in images:
            image[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += amount
        return {**inputs, "x": images}
    latents = inputs["hidden_states"].clone()
    if is_packed(model):
        latents[:, row * grid[1] + column] += amount
    else:
        latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += amount
    return {**inputs, "hidden_states": latents}


def sees(query, key, length, window, stride, dilation):
    """Whether position `query` of one axis sees `key`: natten's rules, one pair at a time."""
    if query % dilation != key % dilation:
        return False
    members = [position for position in range(length) if position % dilation == query % dilation]
    window = min(window, len(members))
    stride = min(stride, window)
    rank = members.index(query)
    leader = min((rank // stride) * stride + stride // 2, len(members) - 1)
    first = leader - window // 2
    while first < 0:
        first += 1
    while first + window > len(members):
        first -= 1
    return key in members[first : first + window]


def window_mask(grid, window, stride=(1, 1), dilation=(1, 1)):
    """[N, N], True where a query (row) sees a key (column)."""
    height, width = grid
    places = [(row, column) for row in range(height) for column in range(width)]
    mask = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            mask[i, j] = all(
                sees(query[axis], key[axis], grid[axis], window[axis], stride[axis], dilation[axis]) for axis in (0, 1)
            )
    return mask


def joint_mask(image_mask, text, text_first):
    """The mask of a joint sequence: text sees all and is seen by all."""
    length = len(image_mask)
    mask = torch.ones(text + length, text + length, dtype=torch.bool)
    start = text if text_first else 0
    mask[start : start + length, start : start + length] = image_mask
    return mask


def perturb_hybrid(model, scale=0.3, seed=2):
    """Give the added weights values: open gates, maps and deltas that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hybrid." in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(scale * noise.to(parameter.dtype))
    return model
