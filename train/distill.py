"""Run `hybriddit distill` by accelerate, in one or several processes.

accelerate launch train/distill.py configs/distill/flux_dev.yaml [optim.lr=1e-4 ...] [--resume]
"""

import sys

from hybriddit.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
