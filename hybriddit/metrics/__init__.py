"""The ADM evaluation suite in torch, and Fréchet distances with any features. Never imports diffusers."""

from .adm import adm_metrics, evaluate, frechet_distance_of
from .images import read_images, to_uint8
from .inception import load_inception, spatial_features
from .statistics import Moments, frechet_distance, inception_score, merge, moments, precision_recall

__all__ = [
    "Moments",
    "adm_metrics",
    "evaluate",
    "frechet_distance",
    "frechet_distance_of",
    "inception_score",
    "load_inception",
    "merge",
    "moments",
    "precision_recall",
    "read_images",
    "spatial_features",
    "to_uint8",
]
