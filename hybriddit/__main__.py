"""Run the command line: python -m hybriddit."""

import sys

from .cli import main

sys.exit(main())
