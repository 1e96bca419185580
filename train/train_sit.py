"""Run `hybriddit train` by accelerate, in one or several processes.

accelerate launch train/train_sit.py configs/sit/xl_2_linfusion.yaml [optim.lr=1e-4 ...] [--resume]
"""

import sys

from hybriddit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
