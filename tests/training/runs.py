"""Runs of the command line in processes of their own, forked from one that has imported everything already."""

import multiprocessing
import os
import sys
import time

import torch

from hybriddit.cli import main

context = multiprocessing.get_context("forkserver")


def start(*arguments, output=None, before=None):
    """Begin `hybriddit <arguments>`; what it prints goes to the file `output`; `before` is called first."""
    context.set_forkserver_preload(["runs", "hybriddit.training.distill", "accelerate"])
    process = context.Process(target=_run, args=([str(a) for a in arguments], output, before))
    process.start()
    return process


def finish(*arguments, output=None, before=None, timeout=300):
    """As `start`, and wait; returns the exit code."""
    process = start(*arguments, output=output, before=before)
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{arguments} took longer than {timeout} s")
    return process.exitcode


def quarters(images):
    """Features for a Fréchet distance of tiny images: the mean of each quarter, [B, 4]."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1), 2).flatten(1)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.01)


def _run(arguments, output, before):
    torch.set_num_threads(1)
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
    if before is not None:
        before()
    sys.argv = ["hybriddit", *arguments]
    sys.exit(main(arguments))
