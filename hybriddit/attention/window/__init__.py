"""Softmax attention over a window around each token and over text, by one of several backends."""

from .case import WindowCase
from .dispatch import BACKENDS, choose_backend, joined_attention, neighborhood_attention
from .flex import aligned_window
from .grids import attention_over_grids, seen_over_grids
from .pooled import PooledKeys
from .rule import key_rows, seen_pairs

__all__ = [
    "BACKENDS",
    "PooledKeys",
    "WindowCase",
    "aligned_window",
    "attention_over_grids",
    "choose_backend",
    "joined_attention",
    "key_rows",
    "neighborhood_attention",
    "seen_over_grids",
    "seen_pairs",
]
