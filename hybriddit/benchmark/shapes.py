"""The parts, sizes, variants and directions that can be benchmarked. Imports no torch."""

from __future__ import annotations

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)  # sides of square images, in pixels
PARTS = ("attention", "transformer", "generation")

# the variants of the attention layer; a whole transformer has dense, hybrid and linear
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
# what is timed: a call without autograd; only the backward pass after a forward pass; both; one step of a sampler
DIRECTIONS = ("forward", "backward", "forward + backward", "step")


def is_dense(variant: str) -> bool:
    return variant.startswith("dense")
