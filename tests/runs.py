"""Runs of the command line in processes of their own, forked from one that has imported everything already."""

import datetime
import functools
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
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


def finish_sharded(*arguments, output=None, timeout=300):
    """As `finish`, by FSDP2 in two processes; the exit codes of both."""
    port = free_port()
    processes = [
        start(*arguments, output=f"{output}.{rank}", before=functools.partial(_shard, rank, port)) for rank in range(2)
    ]
    for process in processes:
        process.join(timeout)
        process.kill()
    return [process.exitcode for process in processes]


def finish_together(count, *arguments, output, before=None, timeout=300):
    """As `finish`, in processes as torchrun starts them; the exit codes of all. before: gets the rank."""
    port = free_port()
    processes = [
        start(*arguments, output=f"{output}.{rank}", before=functools.partial(_launched, rank, count, port, before))
        for rank in range(count)
    ]
    for process in processes:
        process.join(timeout)
        process.kill()
    return [process.exitcode for process in processes]


def _launched(rank, count, port, before):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    if before:
        before(rank)


def in_two_processes(function, *arguments, output, timeout=120):
    """`in_processes` of two."""
    return in_processes(2, function, *arguments, output=output, timeout=timeout)


def in_processes(count, function, *arguments, output, timeout=120, limit=60):
    """Call function(rank, *arguments) in processes over gloo, each waiting for the others for `limit` seconds at most.

    Returns their exit codes. output: as above.
    """
    context.set_forkserver_preload(["runs", "hybriddit.training.distill", "accelerate"])
    port = free_port()
    processes = [
        context.Process(target=_join, args=(rank, count, port, limit, f"{output}.{rank}", function, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"a process took longer than {timeout} s")
    return [process.exitcode for process in processes]


def _join(rank, count, port, limit, output, function, arguments):
    _redirect(output)
    torch.set_num_threads(1)
    store = f"tcp://localhost:{port}"
    torch.distributed.init_process_group(
        "gloo", store, rank=rank, world_size=count, timeout=datetime.timedelta(seconds=limit)
    )
    function(rank, *arguments)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _redirect(output):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _shard(rank, port):
    """What `accelerate launch --use_fsdp --fsdp_version 2` does on GPUs: torch shards on a CPU too, accelerate refuses."""
    import accelerate

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    state = accelerate.Accelerator().state
    kind = accelerate.DistributedType.FSDP
    accelerate.PartialState._shared_state["distributed_type"] = state._shared_state["distributed_type"] = kind
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.cpu_ram_efficient_loading = True  # the launcher's default
    state._shared_state["fsdp_plugin"] = plugin


def noted_grids(monkeypatch):
    """The sample grids that are written from now on, by their files' names."""
    from hybriddit.training import loop

    grids, save = {}, loop.save_grid

    def note(path, grid, title):
        grids[path.name] = grid
        save(path, grid, title)

    monkeypatch.setattr(loop, "save_grid", note)
    return grids


def quarters(images):
    """Features for a Fréchet distance of tiny images: the mean of each quarter, [B, 4]."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1), 2).flatten(1)


def limit_files(megabytes):
    """Writing beyond this fails as on a full disk, with another number."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 2**20), resource.RLIM_INFINITY))


@contextmanager
def small_disk(folder, size):
    """A disk of `size` at `folder`; yields a function that gives it another. Skips the test where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    mount = subprocess.run(command, capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no small disk can be mounted here: {mount.stderr.strip()}")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder])


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.01)


def _run(arguments, output, before):
    torch.set_num_threads(1)
    if output is not None:
        _redirect(output)
    if before is not None:
        before()
    sys.argv = ["hybriddit", *arguments]
    sys.exit(main(arguments))
