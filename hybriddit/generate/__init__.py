"""`hybriddit generate`: images from prompts or of classes, in Python and as PNG files. Imports no torch."""

from ..images import open_image
from .cascade import StageSettings, parse_size
from .files import output_paths, parse_lora, run
from .images import NoEffectWarning, check_settings, generate

__all__ = [
    "NoEffectWarning",
    "StageSettings",
    "check_settings",
    "generate",
    "open_image",
    "output_paths",
    "parse_lora",
    "parse_size",
    "run",
]
