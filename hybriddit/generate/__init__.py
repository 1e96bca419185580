"""`hybriddit generate`: images from prompts or of classes, in Python and as PNG files. Imports no torch."""

from .files import output_paths, parse_lora, run
from .images import NoEffectWarning, check_settings, generate

__all__ = ["NoEffectWarning", "check_settings", "generate", "output_paths", "parse_lora", "run"]
