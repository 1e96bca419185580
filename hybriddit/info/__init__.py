"""`hybriddit info`: what this machine has, and what a file or folder holds."""

from .contents import describe, description_text
from .machine import environment, environment_text

__all__ = ["describe", "description_text", "environment", "environment_text"]
