"""Runs that are killed, interrupted, short of disk, or spread over processes, against one that nothing happened to."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil  # accelerate's own
import pytest
import torch
from PIL import Image
from runs import finish, finish_sharded, limit_files, small_disk, start, wait_for
from safetensors.torch import load_file
from tiny_pipelines import TEXT_LENGTH, tiny_pipeline

from hybriddit.training import distill as distill_module

STEPS = 40


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_pipeline("sd3").save_pretrained(folder)
    return folder


def write_config(teacher, folder):
    path = folder / "run.yaml"
    path.write_text(f"""
model: {{path: {teacher}}}
hybrid: {{window: 3, map_rank: 4, delta_rank: 2}}
data:
  prompts: [a red shoe, a blue bag]
  images: 6
  height: 64
  width: 64
  steps: 2
  max_sequence_length: {TEXT_LENGTH}
  batch_size: 2
optim: {{lr: 1e-2, schedule: cosine, warmup_steps: 3}}
train: {{steps: {STEPS}, batch_size: 4, progress: false}}
output: {{checkpoint_every: 1, log_every: 1, keep: 2}}
""")
    return path


@pytest.fixture
def config(teacher, tmp_path):
    return write_config(teacher, tmp_path)


def options(folder, *more):
    return [f"output.folder={folder}", f"data.cache={folder}-cache", *more]


@pytest.fixture(scope="module")
def unbroken(teacher, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    path = write_config(teacher, folder)
    assert finish("distill", path, *options(folder / "run"), output=folder / "out.txt") == 0
    return folder / "run"


def steps_done(folder):
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(folder, other):
    """To the last bit: the adapter, the last checkpoint with the optimizer's state, and every step's losses."""
    for name in ("adapter/hybrid_adapter.safetensors", f"checkpoints/step-{STEPS:08d}/state.safetensors"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert log_of(folder) == log_of(other)
    assert [line["step"] for line in log_of(folder)] == list(range(1, STEPS + 1))


def slowly():
    """Steps of at least 50 ms, that a fast machine is not done before it is killed."""
    draw = distill_module.draw_batches

    def slow(**arguments):
        time.sleep(0.05)
        return draw(**arguments)

    distill_module.draw_batches = slow


def held_at_the_fourth(released):
    """The fourth step waits for the file `released`."""
    draw = distill_module.draw_batches

    def held(**arguments):
        if arguments["step"] == 3:
            wait_for(released.exists)
        return draw(**arguments)

    distill_module.draw_batches = held


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(config, unbroken, tmp_path):
    run, cache, chance = tmp_path / "run", tmp_path / "run-cache", random.Random(0)

    def progress():
        return len(list(cache.glob("latents-*"))) + steps_done(run)

    # the first while the images are made, the others anywhere in a step or in a save
    for kill in range(5):
        resume = ["--resume"] if steps_done(run) else []
        process = start("distill", config, *options(run), *resume, output=tmp_path / "out.txt", before=slowly)
        goal = progress() + 1 + (kill > 0)
        wait_for(lambda process=process, goal=goal: progress() >= goal or not process.is_alive())
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "out.txt").read_text()
    assert 0 < steps_done(run) < STEPS
    assert finish("distill", config, *options(run), "--resume", output=tmp_path / "out.txt") == 0
    assert_same_run(run, unbroken)
    assert len(json.loads((run / "run.json").read_text())) >= 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_leaves_a_run_to_resume(number, config, unbroken, tmp_path):
    run, seldom = tmp_path / "run", "output.checkpoint_every=1000"
    hold = functools.partial(held_at_the_fourth, tmp_path / "released")
    process = start("distill", config, *options(run, seldom), output=tmp_path / "out.txt", before=hold)
    wait_for(lambda: (run / "log.jsonl").exists() and len(log_of(run)) == 3)
    os.kill(process.pid, number)
    (tmp_path / "released").touch()
    process.join(60)
    assert process.exitcode == 130
    assert steps_done(run) == 4, "a checkpoint of the step it was in, though none was due"
    assert "--resume" in (tmp_path / "out.txt").read_text()
    assert finish("distill", config, *options(run, seldom), "--resume", output=tmp_path / "out.txt") == 0
    assert_same_run(run, unbroken)


def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before(config, unbroken, tmp_path):
    run = tmp_path / "run"
    assert finish("distill", config, *options(run, "train.steps=3"), output=tmp_path / "out.txt") == 0
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    size = max(len(data) for data in before.values())
    limit = functools.partial(limit_files, size / 2 / 2**20)
    more = options(run, "optim.schedule=constant")  # changes nothing that must not change
    assert finish("distill", config, *more, "--resume", output=tmp_path / "out.txt", before=limit) == 1
    said = (tmp_path / "out.txt").read_text().splitlines()[-1]
    assert said.startswith("hybriddit: could not write") and "--resume" in said
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before


def test_a_full_disk_is_one_line_and_a_run_to_resume(config, unbroken, tmp_path):
    with small_disk(tmp_path / "disk", "400k") as resize:
        run = tmp_path / "disk" / "run"
        arguments = [f"output.folder={run}", f"data.cache={tmp_path / 'cache'}", "output.keep=100"]
        assert finish("distill", config, *arguments, output=tmp_path / "out.txt") == 1
        said = (tmp_path / "out.txt").read_text().splitlines()[-1]
        assert said.startswith("hybriddit: ") and "No space left" in said
        done = steps_done(run)
        assert 0 < done < STEPS
        resize("64m")
        assert finish("distill", config, *arguments, "--resume", output=tmp_path / "out.txt") == 0
        assert_same_run(run, unbroken)


def launch(*arguments):
    """Two processes of train/distill.py, over gloo."""
    script = Path(__file__).parents[2] / "train" / "distill.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(config, tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone"
    few = ("train.steps=12", "loss.layer_steps=4")  # rounding grows with the steps
    done = launch(config, *options(run, "train.accumulation=2", *few))
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output
    assert json.loads((run / "run.json").read_text())[0]["processes"] == 2
    assert finish("distill", config, *options(alone, *few), output=tmp_path / "out.txt") == 0
    one, other = (load_file(path / "adapter" / "hybrid_adapter.safetensors") for path in (alone, run))
    assert one.keys() == other.keys()
    for name in one:  # sums of gradients in another order
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text
        )
    for line, expected in zip(log_of(run), log_of(alone), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_two_processes_with_a_shard_each_give_the_result_of_one_and_resume_each_other_s_runs(config, tmp_path):
    """By FSDP2: teacher and student pass through the same shards, and samples and checkpoints are of both processes."""
    run, alone, out = tmp_path / "run", tmp_path / "alone", tmp_path / "out.txt"
    few = ["train.steps=8", "train.accumulation=2", "loss.progressive_steps=5", "loss.distribution=1"]
    seldom = [*few, "output.checkpoint_every=4", "output.sample_every=8", "output.samples=2"]
    assert finish_sharded("distill", config, *options(run, *seldom), output=out) == [0, 0], (
        tmp_path / "out.txt.0"
    ).read_text()
    assert json.loads((run / "run.json").read_text())[0]["processes"] == 2
    assert (
        finish("distill", config, *options(alone, *few, "output.sample_every=8", "output.samples=2"), output=out) == 0
    )
    assert_close_runs(run, alone)
    one, other = (np.array(Image.open(path / "samples" / "step-00000008.png")).astype(int) for path in (run, alone))
    assert np.abs(one - other).max() <= 2

    for folder, finishing, done in ((run, finish, [0]), (alone, finish_sharded, [0, 0])):
        shutil.rmtree(folder / "checkpoints" / "step-00000008")  # leaves step 4, and step 7
        (folder / "adapter" / "hybrid_adapter.safetensors").rename(tmp_path / f"{folder.name}.safetensors")
        codes = finishing("distill", config, *options(folder, *few), "--resume", output=out)
        assert codes in (done, done[0])
        assert [line["step"] for line in log_of(folder)] == list(range(1, 9))
    assert_close_runs(run, alone)


def assert_close_runs(folder, other):
    """To what sums of gradients in another order leave: the adapter, the last checkpoint and every step's metrics."""
    last = sorted((other / "checkpoints").iterdir())[-1].name
    for name in ("adapter/hybrid_adapter.safetensors", f"checkpoints/{last}/state.safetensors"):
        one, expected = load_file(folder / name), load_file(other / name)
        assert one.keys() == expected.keys()
        for key in one:
            assert one[key].dtype == expected[key].dtype
            torch.testing.assert_close(one[key], expected[key], rtol=1e-3, atol=1e-4, msg=lambda text, k=key: k + text)
    for line, expected in zip(log_of(folder), log_of(other), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_leaves_it_to_resume(config, tmp_path):
    run = tmp_path / "run"
    process = launch(config, *options(run, "train.steps=100000", "output.log_every=1"))
    try:
        wait_for(lambda: steps_done(run) >= 2, seconds=200)
        psutil.Process(process.pid).children()[-1].kill()
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode != 0 and "exitcode  : -9" in output, output
    done = steps_done(run)
    more = options(run, f"train.steps={done + 2}", "optim.schedule=constant")
    assert finish("distill", config, *more, "--resume", output=tmp_path / "out.txt") == 0
    assert [line["step"] for line in log_of(run)] == list(range(1, done + 3))


def test_the_run_folder_tells_how_it_was_made(unbroken):
    run = unbroken
    (begun,) = json.loads((run / "run.json").read_text())
    assert begun["versions"]["torch"] and begun["command"][1] == "distill" and begun["from_step"] == 0
    assert begun["git"] is None or len(begun["git"]["commit"]) == 40
    assert (run / "config.yaml").is_file() and list(run.rglob("events.out*"))
    with Image.open(run / "loss.png") as plot:
        assert plot.width > 4 * plot.height, "a panel for each of five metrics"
    assert set(log_of(run)[0]) == {"step", "loss", "task", "output", "layer", "grad_norm", "lr", "gate_lr"}
