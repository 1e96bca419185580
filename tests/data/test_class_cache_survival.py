"""`hybriddit cache`: killed anywhere, alone or beside another process, it ends with the cache of an unbroken run."""

import functools
import os
import random
import signal
import time

import numpy as np
import pytest
from PIL import Image
from runs import finish, start, wait_for
from tiny_vae import tiny_vae

from hybriddit.data import class_cache
from hybriddit.files import temporary_path

SHARDS = 12


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Of the command, without --out: twenty-four images, two to a shard."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(2 * SHARDS):
        (folder / f"class-{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"class-{i % 3}" / f"{i}.png")
    vae = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(vae)
    return ["cache", folder, "--vae", vae, "--size", "8", "--shard-size", "2"]


@pytest.fixture(scope="module")
def unbroken(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "cache"
    assert finish(*arguments, "--out", out) == 0
    return files_of(out)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def slowly():
    """A tenth of a second to write half of each shard, that there is something to kill."""
    write = class_cache.save_shard

    def slow(path, tensors):
        partial = temporary_path(path)
        partial.write_bytes(b"half")
        time.sleep(0.1)
        write(path, tensors)

    class_cache.save_shard = slow


def slow_share(rank):
    """As one of torchrun's two."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    slowly()


def done(out):
    return len(list(out.glob("shard-*.json")))


@pytest.mark.slow
def test_killed_at_random_moments(arguments, unbroken, tmp_path):
    out, chance = tmp_path / "cache", random.Random(0)
    for _ in range(3):
        goal = done(out) + 1
        process = start(*arguments, "--out", out, output=tmp_path / "out.txt", before=slowly)
        wait_for(lambda process=process, goal=goal: done(out) >= goal or not process.is_alive(), 300)
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "out.txt").read_text()
        assert 0 < done(out) < SHARDS and not (out / "index.json").exists()
    assert list(out.glob(".shard-*.tmp")), "a kill in the middle of a shard"
    assert finish(*arguments, "--out", out, output=tmp_path / "out.txt") == 0
    assert files_of(out) == unbroken
    assert "24 images in" in (tmp_path / "out.txt").read_text().splitlines()[-1]


def test_one_of_two_processes_is_killed(arguments, unbroken, tmp_path):
    out = tmp_path / "cache"

    def both():
        return [
            start(
                *arguments,
                "--out",
                out,
                output=tmp_path / f"out.{rank}",
                before=functools.partial(slow_share, rank),
            )
            for rank in range(2)
        ]

    processes = both()
    wait_for(lambda: done(out) >= 3, 300)
    processes[1].kill()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    assert done(out) < SHARDS and not (out / "index.json").exists()
    processes = both()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "out.0").read_text()
    assert files_of(out) == unbroken
