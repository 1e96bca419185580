"""The demo's images: two tinted garments at the far ends of a canvas, named by a prompt.

A prompt says what is on the left and on the right, and whether the right garment is the left one again (the same
instance, in the same tint). The text does not say which instance or which tint. Only the other end of the canvas shows
that, so the two ends agree only if the model sees far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CANVAS = 64  # pixels a side
GARMENT = 24  # pixels a side
TOP = (CANVAS - GARMENT) // 2
LEFT, RIGHT = 0, CANVAS - GARMENT

# Fashion-MNIST's labels, without coats and shirts, which even people confuse with pullovers and T-shirts
GARMENTS = {0: "t-shirt", 1: "trouser", 2: "pullover", 3: "dress", 5: "sandal", 7: "sneaker", 8: "bag", 9: "boot"}
NAMES = tuple(GARMENTS.values())


@dataclass(frozen=True)
class Scene:
    """The scene that a prompt asks for; `left` and `right` are names in NAMES."""

    left: str
    right: str
    same: bool = False

    @property
    def prompt(self) -> str:
        if self.same:
            return f"the same {self.left} left and right"
        article = "another" if self.left == self.right else "a"
        return f"a {self.left} left, {article} {self.right} right"


SAME_SCENES = tuple(Scene(name, name, same=True) for name in NAMES)
DIFFERENT_SCENES = tuple(Scene(left, right) for left in NAMES for right in NAMES)
SCENES = SAME_SCENES + DIFFERENT_SCENES


def scene_of(prompt: str) -> Scene:
    """The scene of a prompt. Raises ValueError for a prompt that is not one of the demo's."""
    for scene in SCENES:
        if scene.prompt == prompt:
            return scene
    raise ValueError(f"the demo knows no prompt {prompt!r}; one that it knows: {SCENES[0].prompt!r}")


def crops(images: torch.Tensor) -> torch.Tensor:
    """The two garments of each canvas: [B, 3, CANVAS, CANVAS] -> [B, 2, 3, GARMENT, GARMENT], left first."""
    rows = images[:, :, TOP : TOP + GARMENT]
    return torch.stack([rows[..., x : x + GARMENT] for x in (LEFT, RIGHT)], dim=1)


def compose(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Put tinted garments, [B, 3, GARMENT, GARMENT] each, in [0, 1], on black canvases."""
    canvas = left.new_zeros(len(left), 3, CANVAS, CANVAS)
    canvas[:, :, TOP : TOP + GARMENT, LEFT : LEFT + GARMENT] = left
    canvas[:, :, TOP : TOP + GARMENT, RIGHT:] = right
    return canvas
