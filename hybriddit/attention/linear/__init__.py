"""Linear attention: every query sees all keys, at a cost linear in both."""

from .dispatch import linear_attention, triton_refusal
from .features import FEATURE_MAPS, FeatureMap
from .formula import linear_attention_formula

__all__ = [
    "FEATURE_MAPS",
    "FeatureMap",
    "linear_attention",
    "linear_attention_formula",
    "triton_refusal",
]
