"""A benchmark that a test can run (one shape, four variants, two samples), and a clock that tests can set."""

import torch

from hybriddit.cli import main
from hybriddit.models.family import AttentionShape

CPU = torch.device("cpu")
SMALL = AttentionShape(heads=2, head_dim=8, text=3, text_first=True, pixels=16)
QUICK = ["--shapes", "sit-xl", "--dtype", "float32", "--repeats", "2", "--quiet"]
QUICK += ["--variants", "hybrid", "window", "linear", "dense"]


def run(folder, *arguments):
    return main(["benchmark", *QUICK, "--part", "attention", "--sizes", "32", "64", "--out", str(folder), *arguments])


class Clock:
    """Stands in for the time module: it moves when a case says that it took time, and a little at every look."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-9
        return self.now

    def sleep(self, seconds):
        self.now += seconds
