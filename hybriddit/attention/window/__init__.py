"""Softmax attention over a window around each token and over text, by one of several backends."""

from .case import WindowCase
from .dispatch import BACKENDS, choose_backend, joined_attention, neighborhood_attention
from .flex import aligned_window
from .rule import seen_pairs

__all__ = [
    "BACKENDS",
    "WindowCase",
    "aligned_window",
    "choose_backend",
    "joined_attention",
    "neighborhood_attention",
    "seen_pairs",
]
