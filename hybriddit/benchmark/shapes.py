"""What can be measured, by name: shapes, parts and variants. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

PIXELS_PER_TOKEN = 16  # of every shape here: 8 pixels a latent, 2 latents a token, along each axis


class Shape(NamedTuple):
    """The attention layer of one model.

    text: text tokens in the layer's sequence; text_first: whether they precede the image's.
    model: what builds the whole transformer, a key of `training.dry_run.REPOSITORIES`, or "SiT-" and a preset.
    prompt: text tokens that the whole transformer receives (PixArt's cross-attention is not part of the layer).
    guided: whether a sampler runs the model twice a step, with the prompt and without.
    """

    heads: int
    head_dim: int
    text: int
    text_first: bool
    model: str
    prompt: int
    guided: bool


SHAPES = {
    "pixart-sigma": Shape(16, 72, 0, False, "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 300, True),
    "sd3": Shape(24, 64, 333, False, "stabilityai/stable-diffusion-3-medium-diffusers", 333, True),
    "sd3.5-medium": Shape(24, 64, 333, False, "stabilityai/stable-diffusion-3.5-medium", 333, True),
    "sd3.5-large": Shape(38, 64, 333, False, "stabilityai/stable-diffusion-3.5-large", 333, True),
    "flux": Shape(24, 128, 512, True, "black-forest-labs/FLUX.1-dev", 512, False),
    "sit-xl": Shape(16, 72, 0, False, "SiT-XL/2", 0, True),
}
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
PARTS = ("attention", "transformer", "generation")
DTYPES = ("float32", "bfloat16", "float16")

# of the attention layer; the whole transformer has dense, hybrid and linear
VARIANTS = {
    "hybrid": "hybrid layer: window and text (softmax), linear attention over the image, their join, text queries",
    "window": "its window branch alone: image queries, softmax over window and text",
    "linear": "its linear branch alone: generalized linear attention of the image tokens",
    "dense": "dense layer by scaled_dot_product_attention, as torch chooses its kernel",
    "dense-flash": "dense layer, torch's flash attention",
    "dense-cudnn": "dense layer, cuDNN's attention",
    "dense-efficient": "dense layer, torch's memory-efficient attention",
    "circular": "CLEAR-style layer: softmax over a circular window and text, by FlexAttention",
}
BRANCHES = ("window", "linear")
MODEL_VARIANTS = {
    "hybrid": "every attention layer hybrid",
    "linear": "every attention layer linear attention alone, over text and image",
    "dense": "as diffusers runs it; SiT's with softmax attention",
}
# what a call is: without autograd; the gradient alone, of a forward pass before it; both; one step of a sampler
DIRECTIONS = ("forward", "backward", "forward + backward", "step")


def is_dense(variant: str) -> bool:
    return variant.startswith("dense")


def tokens(px: int) -> int:
    """Image tokens of a square image."""
    return (px // PIXELS_PER_TOKEN) ** 2
