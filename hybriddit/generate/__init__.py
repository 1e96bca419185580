"""`hybriddit generate`: images from prompts or of classes, in Python and as PNG files. Imports no torch."""

from ..images import open_image
from .files import output_paths, parse_lora, run
from .images import NoEffectWarning, check_settings, generate

__all__ = ["NoEffectWarning", "check_settings", "generate", "open_image", "output_paths", "parse_lora", "run"]
