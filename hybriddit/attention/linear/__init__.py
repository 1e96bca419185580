"""Linear attention: every query sees all keys, at a cost linear in both."""

from .dispatch import KeySums, begin_sum_keys, linear_attention, sum_keys, triton_refusal
from .features import FEATURE_MAPS, FeatureMap
from .formula import linear_attention_formula

__all__ = [
    "FEATURE_MAPS",
    "FeatureMap",
    "KeySums",
    "begin_sum_keys",
    "linear_attention",
    "linear_attention_formula",
    "sum_keys",
    "triton_refusal",
]
