"""Training a SiT from scratch: what is learned, resuming, stopping, several processes, and settings that cannot work."""

import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from PIL import Image
from runs import finish, finish_sharded, limit_files, noted_grids, small_disk, start, wait_for
from safetensors.torch import load_file
from tiny_vae import tiny_vae

import hybriddit
from hybriddit.cli import main
from hybriddit.data import class_images
from hybriddit.data.class_cache import make_cache
from hybriddit.data.class_data import ClassData, ClassInfo
from hybriddit.data.sources import open_class_data
from hybriddit.images import read_record
from hybriddit.models.flops import sit_flops
from hybriddit.models.sit import SIT_FAR_BRANCH
from hybriddit.pipelines import sit as sit_pipeline
from hybriddit.pipelines.loading import load_sit_pipeline
from hybriddit.training import dry_run_sit, loop
from hybriddit.training import train_sit as module
from hybriddit.training.batches import batches, in_turn, one_ahead
from hybriddit.training.loop import known_peak
from hybriddit.training.run_config import SiTConfig, load_config, to_dict
from hybriddit.training.train_sit import draw_batches, make_model, run, train

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(ROOT.glob("configs/sit/*.yaml"))
SMALL = [
    ROOT / f"configs/sit/{name}.yaml"
    for name in ("fashion_mnist_cpu", "images_64", "ladder_cifar10", "ladder_tiny_imagenet")
]
STEPS = 12
WEIGHTS = "pipeline/transformer/diffusion_pytorch_model.safetensors"
TIMINGS = ("images_per_second", "mfu")
TINY = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "patch_size": 2,
    "sample_size": 8,
    "in_channels": 1,
    "num_classes": 2,
    "attention": "hybrid",
    "window": 3,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of grey squares: dark and light."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label, level in (("dark", 50), ("light", 200)):
        (folder / label).mkdir()
        for i in range(5):
            Image.fromarray(generator.normal(level, 20, (8, 8)).clip(0, 255).astype(np.uint8)).save(
                folder / label / f"{i}.png"
            )
    return folder


def write_config(images, folder, **changes):
    path = folder / "run.yaml"
    values = {
        "job": "train",
        "model": TINY,
        "data": {"path": str(images)},
        "optim": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 3, "ema_decay": 0.9, "gate_lr_factor": 2.0},
        "train": {"steps": STEPS, "batch_size": 4, "progress": False},
        "metrics": {"every": 5, "samples": 6, "features": "runs:quarters", "batch_size": 2},
        "output": {"checkpoint_every": 1, "log_every": 1, "keep": 2, "sample_steps": 2},
    }
    path.write_text(json.dumps({**values, **changes}))  # which is YAML too
    return path


@pytest.fixture
def config(images, tmp_path):
    return write_config(images, tmp_path)


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    path = write_config(images, folder)
    assert finish("train", path, f"output.folder={folder / 'run'}", output=folder / "out.txt") == 0, (
        folder / "out.txt"
    ).read_text()
    return folder / "run"


def steps_done(folder):
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same_run(folder, other):
    """To the last bit: the model, the last checkpoint with the optimizer's state, and every step's loss."""
    for name in (WEIGHTS, f"checkpoints/step-{STEPS:08d}/state.safetensors"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert log_of(folder) == log_of(other)
    assert [line["step"] for line in log_of(folder)] == list(range(1, STEPS + 1))
    assert [line["step"] for line in log_of(folder) if "fd" in line] == [5, 10, STEPS]


def test_a_run_leaves_a_model_and_tells_how_it_was_made(unbroken):
    pipeline = load_sit_pipeline(unbroken)
    model = pipeline.transformer
    state = load_file(unbroken / "checkpoints" / f"step-{STEPS:08d}" / "state.safetensors")
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            assert torch.equal(parameter, state[f"average/{name}"]), "the averaged weights"
    assert any(
        not torch.equal(state[key], state[key.replace("weight/", "average/")]) for key in state if "weight/" in key
    )
    assert (pipeline.labels, pipeline.vae, pipeline.scheduler) == ({"dark": 0, "light": 1}, None, None)
    config = {"path": "linear", "prediction": "velocity", "weights": f"EMA 0.9, step {STEPS}"}
    assert {name: pipeline.config[name] for name in config} == config
    assert json.loads((unbroken / "data.json").read_text())["classes"] == ["dark", "light"]
    assert load_config(unbroken / "config.yaml").model == TINY
    assert (unbroken / "loss.png").is_file() and list(unbroken.rglob("events.out*"))
    line = json.loads((unbroken / "log.jsonl").read_text().splitlines()[0])
    assert set(line) == {"step", "loss", "grad_norm", "lr", "images_per_second"}
    assert not list(unbroken.glob(".*")), "nothing half-written is left"
    assert f"pipeline saved to {unbroken / 'pipeline'}" in (unbroken.parent / "out.txt").read_text()


def test_a_run_is_what_the_commands_open(unbroken, tmp_path):
    out = ["--steps", "2", "--out", str(tmp_path / "a.png"), "--json"]
    assert main(["generate", "--model", str(unbroken), "--class-label", "light", "--class-label", "0", *out]) == 0
    records = [read_record(tmp_path / f"a-000{i}.png") for i in (1, 2)]
    assert [(record["class_label"], record["class_name"]) for record in records] == [(1, "light"), (0, "dark")]
    assert records[0]["weights"] == f"EMA 0.9, step {STEPS}"
    sample = ["--num", "4", "--class-balanced", "--steps", "2", "--out", str(tmp_path / "a.npz"), "--quiet"]
    assert main(["sample", str(unbroken), *sample]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["weights"] == f"EMA 0.9, step {STEPS}"


def slowly():
    draw = module.draw_batches

    def slow(*arguments):
        time.sleep(0.05)
        return draw(*arguments)

    module.draw_batches = slow


def held_at_the_fourth(released):
    """The fourth step waits for the file `released`."""
    draw = module.draw_batches

    def held(data, model, config, step, *own):
        log = Path(config.output.folder) / "log.jsonl"  # which is not there while the loader is timed
        if step == 3 and log.exists():
            wait_for(released.exists)
        return draw(data, model, config, step, *own)

    module.draw_batches = held


def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(config, unbroken, tmp_path):
    where, chance = tmp_path / "run", random.Random(0)
    for _ in range(2):
        resume = ["--resume"] if steps_done(where) else []
        process = start("train", config, f"output.folder={where}", *resume, output=tmp_path / "out.txt", before=slowly)
        goal = steps_done(where) + 1
        wait_for(lambda process=process, goal=goal: steps_done(where) >= goal or not process.is_alive(), 300)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "out.txt").read_text()
    assert 0 < steps_done(where) < STEPS
    assert finish("train", config, f"output.folder={where}", "--resume", output=tmp_path / "out.txt") == 0
    assert_same_run(where, unbroken)


def test_a_signal_lets_the_step_end_and_leaves_a_run_to_resume(config, unbroken, tmp_path):
    where = tmp_path / "run"
    arguments = ["train", config, f"output.folder={where}", "output.checkpoint_every=1000"]
    hold = functools.partial(held_at_the_fourth, tmp_path / "released")
    process = start(*arguments, output=tmp_path / "out.txt", before=hold)
    wait_for(lambda: (where / "log.jsonl").exists() and len(log_of(where)) == 3, 300)
    os.kill(process.pid, signal.SIGTERM)
    (tmp_path / "released").touch()
    process.join(120)
    assert process.exitcode == 130 and steps_done(where) == 4
    assert "--resume" in (tmp_path / "out.txt").read_text()
    assert load_sit_pipeline(where).config.weights == "EMA 0.9, step 4", "opens meanwhile"
    assert finish(*arguments, "--resume", output=tmp_path / "out.txt") == 0
    assert_same_run(where, unbroken)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before(config, unbroken, tmp_path):
    where, out = tmp_path / "run", tmp_path / "out.txt"
    arguments = ["train", config, f"output.folder={where}", "optim.schedule=constant"]
    assert finish(*arguments, "train.steps=3", output=out) == 0
    before = files_of(where / "checkpoints"), files_of(where / "pipeline")
    size = max(map(len, before[0].values()))
    limit = functools.partial(limit_files, size / 2 / 2**20)
    assert finish(*arguments, "--resume", output=out, before=limit) == 1
    said = out.read_text().splitlines()[-1]
    assert said.startswith("hybriddit: could not write") and "no checkpoint of step 4" in said and "--resume" in said
    assert (files_of(where / "checkpoints"), files_of(where / "pipeline")) == before


def test_a_full_disk_is_one_line_and_a_run_to_resume(config, unbroken, tmp_path):
    with small_disk(tmp_path / "disk", "900k") as resize:
        where, out = tmp_path / "disk" / "run", tmp_path / "out.txt"
        arguments = ["train", config, f"output.folder={where}", "output.keep=100"]
        assert finish(*arguments, output=out) == 1
        said = out.read_text().splitlines()[-1]
        assert said.startswith("hybriddit: ") and "No space left" in said
        assert 0 < steps_done(where) < STEPS
        resize("64m")
        assert finish(*arguments, "--resume", output=out) == 0
        assert_same_run(where, unbroken)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(config, unbroken, tmp_path):
    where = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "train" / "train_sit.py", config, f"output.folder={where}", "train.accumulation=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((where / "run.json").read_text())[0]["processes"] == 2
    assert_close_runs(where, unbroken)


def assert_close_runs(folder, other):
    """To what sums of gradients in another order leave: the model, the last checkpoint, and every step's metrics."""
    for name in (WEIGHTS, f"checkpoints/step-{STEPS:08d}/state.safetensors"):
        one, expected = load_file(folder / name), load_file(other / name)
        assert one.keys() == expected.keys()
        for key in one:
            torch.testing.assert_close(
                one[key], expected[key], rtol=1e-3, atol=1e-4, msg=lambda text, k=key: f"{k}: {text}"
            )
    for line, expected in zip(log_of(folder), log_of(other), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_two_processes_with_a_shard_each_give_the_result_of_one_and_resume_each_other_s_runs(
    config, unbroken, tmp_path
):
    """By FSDP2: all that needs the whole model, checkpoints, samples and metrics, is of both processes."""
    where, out = tmp_path / "run", tmp_path / "out.txt"
    arguments = ["train", config, f"output.folder={where}"]
    more = ["train.accumulation=2", "output.sample_every=6", "output.samples=4", "output.checkpoint_every=6"]
    assert finish_sharded(*arguments, *more, output=out) == [0, 0], (tmp_path / "out.txt.0").read_text()
    assert json.loads((where / "run.json").read_text())[0]["processes"] == 2
    assert_close_runs(where, unbroken)
    assert (where / "samples" / f"step-{STEPS:08d}.png").is_file()
    shutil.rmtree(where / "checkpoints" / f"step-{STEPS:08d}")  # leaves that of step 6
    assert finish(*arguments, "--resume", output=out) == 0, out.read_text()
    assert_close_runs(where, unbroken)

    shutil.copytree(unbroken, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / f"step-{STEPS:08d}")
    arguments = ["train", config, f"output.folder={tmp_path / 'other'}", "--resume"]
    assert finish_sharded(*arguments, output=out) == [0, 0], (tmp_path / "out.txt.0").read_text()
    assert_close_runs(tmp_path / "other", unbroken)


def test_a_step_s_samples_depend_on_the_step_alone(config):
    configured, model = load_config(config), make_model(load_config(config)).config
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (10, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = ClassData([{"images": pixels, "labels": torch.arange(10) % 2}], ClassInfo((1, 8, 8)))
    whole = list(draw_batches(data, model, configured, 7))
    parts = [batch for rank in range(2) for batch in draw_batches(data, model, configured, 7, rank, 2)]
    for values, split in zip(whole[0], zip(*parts, strict=True), strict=True):
        assert torch.equal(values, torch.cat(split))
    configured.train.batch_size = 5
    seen = [batch[0] for step in range(2) for batch in draw_batches(data, model, configured, step)]
    plain = pixels.float() / 127.5 - 1
    found = {
        next(i for i in range(10) if torch.equal(x, plain[i]) or torch.equal(x, plain[i].flip(-1)))
        for x in torch.cat(seen)
    }
    assert found == set(range(10)), "an epoch has every image once"
    configured.train.batch_size = 2000
    images, labels, _, times = next(draw_batches(data, model, configured, 0))
    assert (labels == 2).float().mean() == pytest.approx(0.1, abs=0.03), "the null class"
    assert 0.45 < times.mean() < 0.55 and times.min() < 0.01 and times.max() > 0.99
    mirrored = [any(torch.equal(x, p.flip(-1)) for p in plain) for x in images[:300]]
    assert sum(mirrored) / 300 == pytest.approx(0.5, abs=0.1)


def test_two_classes_are_learned(images, tmp_path, monkeypatch):
    """The samples of the grid are of their classes."""
    grids = noted_grids(monkeypatch)
    output = {"folder": str(tmp_path / "run"), "sample_every": 150, "samples": 4, "sample_steps": 10, "guidance": 1.0}
    path = write_config(
        images,
        tmp_path,
        model={**TINY, "attention": "softmax"},
        optim={"lr": 1e-2, "ema_decay": 0.9},
        train={"steps": 150, "batch_size": 16, "progress": False},
        output=output,
    )
    model = run(load_config(path))
    assert not model.training
    grid = grids["step-00000150.png"]
    assert grid.captions == [["dark"] * 2, ["light"] * 2] and grid.columns[0][0].mode == "L"
    dark, light = ([np.mean(image) for image in column] for column in grid.columns)
    assert max(dark) < 110 and min(light) > 150, (dark, light)


@pytest.fixture
def latents(images, tmp_path):
    """A config for the images' latents, whose cache notes where its VAE is."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    make_cache(images, tmp_path / "cache", size=8, vae=tiny_vae(), vae_name=str(tmp_path / "vae"), progress=False)
    return write_config(
        tmp_path / "cache",
        tmp_path,
        model={**TINY, "in_channels": 2, "sample_size": 4},
        train={"steps": 2, "batch_size": 4, "progress": False},
        metrics={"every": 0},  # which would take a file of images
        output={"folder": str(tmp_path / "run")},
    )


def test_bf16_checkpointing_and_a_vae(latents, tmp_path, monkeypatch):
    """Each changes how a step is computed, and the result by no more than its rounding."""
    values = []  # of the first layer: rows and dtype of every pass

    def make_watched(config):
        model = make_model(config)
        layer = model.transformer_blocks[0].attn.to_v
        layer.register_forward_hook(lambda module, inputs, output: values.append((len(output), output.dtype)))
        return model

    monkeypatch.setattr(module, "make_model", make_watched)
    models, losses, passes, drawn, grids = {}, {}, {}, {}, noted_grids(monkeypatch)
    samples = ["output.sample_every=1", "output.sample_steps=1", "output.samples=3", "output.guidance=2"]
    for name, changes in (
        ("plain", []),
        ("checkpointed", ["train.gradient_checkpointing=true", "data.memory=true"]),
        ("bf16", ["train.precision=bf16", "train.gradient_checkpointing=true"]),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        values.clear()
        models[name] = run(load_config(latents, [*samples, *changes, f"output.folder={tmp_path / name}"]))
        drawn[name] = grids["step-00000002.png"]
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in models[name].parameters())
        assert not models[name].is_gradient_checkpointing
        losses[name] = [line["loss"] for line in log_of(tmp_path / name)]
        passes[name] = [dtype for rows, dtype in values if rows == 4]  # samples have two for each of three
    plain, checkpointed, bf16 = (dict(model.named_parameters()) for model in models.values())
    for key, value in plain.items():
        torch.testing.assert_close(checkpointed[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert any(not torch.equal(bf16[key], value) for key, value in plain.items())
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=5e-3)
    # of two steps, the second time to compute gradients
    assert passes == {
        "plain": [torch.float32] * 2,
        "checkpointed": [torch.float32] * 4,
        "bf16": [torch.bfloat16] * 4,
    }

    pipeline = load_sit_pipeline(tmp_path / "checkpointed")
    generator = torch.Generator().manual_seed(0)
    expected = pipeline([0, 1, 0], 2.0, generator, 1, sampler="heun").images
    for name, tolerance in (("checkpointed", 1), ("plain", 1), ("bf16", 8)):
        columns = drawn[name].columns
        assert [len(column) for column in columns] == [2, 1] and columns[0][0].mode == "RGB"
        found = [columns[i % 2][i // 2] for i in range(3)]
        for one, other in zip(found, expected, strict=True):
            assert np.abs(np.array(one).astype(int) - np.array(other)).max() <= tolerance, name


def test_the_pipeline_undoes_the_scale_of_the_set(latents, tmp_path):
    """Whatever the copy of the VAE that is given says of it, and whether or not the VAE shifts."""
    for name, vae in (("scaled", tiny_vae()), ("unshifted", tiny_vae())):
        shift = 0.25 if name == "scaled" else None
        vae.register_to_config(shift_factor=shift, scaling_factor=0.5)
        cache = tmp_path / name / "cache"
        pictures = tmp_path / name / "images" / "one"
        pictures.mkdir(parents=True)
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
        picture.save(pictures / "a.png")
        make_cache(pictures.parent, cache, size=8, vae=vae, progress=False)
        vae.register_to_config(shift_factor=7.0, scaling_factor=3.0)
        vae.save_pretrained(tmp_path / name / "vae")
        folder = tmp_path / name / "run"
        overrides = [f"data.path={cache}", f"data.vae={tmp_path / name / 'vae'}", "train.batch_size=1", "train.steps=1"]
        overrides.append("model.num_classes=1")
        run(load_config(latents, [*overrides, f"output.folder={folder}"]))

        pipeline = load_sit_pipeline(folder)
        assert (pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor) == (0.5, shift or 0.0)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            encoded = tiny_vae().encode(pixels).latent_dist.mean
            expected = tiny_vae().decode(encoded).sample
        data = open_class_data(cache, (2, 4, 4))
        seen, _ = data.draw([0], torch.tensor([False]), torch.zeros(1, 2, 4, 4))  # the mean, as the model sees it
        torch.testing.assert_close(seen, (encoded - (shift or 0)) * 0.5, rtol=0, atol=2e-3)  # the cache is of fp16
        found = pipeline._images(seen, "pt")
        torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=5e-3)
        # and as the sample grids show it
        torch.testing.assert_close(pipeline.decode(seen), expected, rtol=0, atol=1e-2)


def test_latents_are_not_trained_on_without_their_vae(latents, tmp_path):
    """Told at the start: what the run leaves could make no image."""
    tiny_vae(1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the one that made the cache"):
        run(load_config(latents, [f"data.vae={tmp_path / 'other'}"]))
    (tmp_path / "vae").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"saved with the pipeline: set data.vae to its place \(no AutoencoderKL at"):
        run(load_config(latents))
    path = tmp_path / "cache" / "data.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vae": None}))
    with pytest.raises(ValueError, match="data.vae is needed: the pipeline that is saved decodes its latents"):
        run(load_config(latents))
    assert not list(tmp_path.rglob("step-*"))
    run(load_config(latents, [f"data.vae={tmp_path / 'moved'}"]))
    assert load_sit_pipeline(tmp_path / "run").vae is not None


def test_a_pipeline_is_whole_or_the_one_before(config, tmp_path, monkeypatch):
    where = tmp_path / "run"
    run(load_config(config, [f"output.folder={where}", "train.steps=1"]))
    before = {path: path.read_bytes() for path in (where / "pipeline").rglob("*") if path.is_file()}
    save = hybriddit.SiTPipeline.save_pretrained

    def full(self, folder, **options):
        save(self, folder, **options)
        (folder / "model_index.json").unlink()
        raise OSError("No space left on device")

    monkeypatch.setattr(hybriddit.SiTPipeline, "save_pretrained", full)
    with pytest.raises(OSError, match="could not write .*pipeline: No space left"):
        run(load_config(config, [f"output.folder={where}", "train.steps=2"]), resume=True)
    assert {path: path.read_bytes() for path in (where / "pipeline").rglob("*") if path.is_file()} == before
    assert not list(where.glob(".*"))


@pytest.mark.parametrize(
    "samples, classes, columns",
    [(40, 10, 10), (10, 10, 10), (45, 10, 10), (16, 2, 4), (4, 2, 2), (16, 1, 4), (16, 1000, 4), (1, 10, 1), (7, 9, 3)],
)
def test_a_column_of_the_grid_is_a_class(samples, classes, columns):
    assert module.grid_columns(samples, classes) == columns
    labels = np.arange(samples) % classes
    if samples >= classes:
        assert all(len(set(labels[column::columns])) == 1 for column in range(columns))


def test_the_grid_s_file_has_the_classes_in_columns(images, tmp_path, monkeypatch):
    """Six samples of three classes, each drawn as a shade of its label."""
    grids = noted_grids(monkeypatch)
    monkeypatch.setattr(sit_pipeline, "guided", lambda predict, labels, *rest, **k: labels)
    monkeypatch.setattr(
        sit_pipeline,
        "sample_ode",
        lambda labels, noise, *rest, **k: labels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8) / 2 - 0.5,
    )
    three = shutil.copytree(images, tmp_path / "three")
    shutil.copytree(next(three.iterdir()), three / "another")
    changes = {"model": {**TINY, "num_classes": 3}, "train": {"steps": 1, "batch_size": 2, "progress": False}}
    output = {"folder": str(tmp_path / "run"), "sample_every": 1, "samples": 6}
    run(load_config(write_config(three, tmp_path, **changes, output=output)))
    grid = grids["step-00000001.png"]
    shades = [[image.getpixel((4, 4)) for image in column] for column in grid.columns]
    assert shades == [[64] * 2, [128] * 2, [191] * 2]
    assert grid.captions == [["another"] * 2, ["dark"] * 2, ["light"] * 2]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(config, tmp_path, monkeypatch):
    draw = module.draw_batches

    def poisoned(data, model, config, step, *own):
        for images, *rest in draw(data, model, config, step, *own):
            yield images * (float("nan") if step == 4 else 1), *rest

    monkeypatch.setattr(module, "draw_batches", poisoned)
    with pytest.raises(FloatingPointError, match=r"not finite at step 5 .*earlier checkpoints are kept"):
        run(load_config(config, [f"output.folder={tmp_path / 'run'}", "output.checkpoint_every=2"]))
    assert steps_done(tmp_path / "run") == 4
    saved = load_sit_pipeline(tmp_path / "run")
    assert all(p.isfinite().all() for p in saved.transformer.parameters())
    assert saved.config.weights == "EMA 0.9, step 4"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.path=/nowhere"], "no folder at '/nowhere' (data.path)"),
        (["model.num_classes=1"], "labels from 0 to 1, and the model's 1 classes are 0 to 0: set model.num_classes"),
        (["model.num_classes=3"], "the set has 2 classes, and the model 3: it would learn nothing of the others"),
        (["model.attention=dense"], "model: unknown attention 'dense'"),
        (["model.windw=3"], "unknown key model.windw: did you mean model.window?"),
        (["model.num_layers=two"], "model: num_layers must be a positive integer, not 'two'"),
        (["model.in_channels=4"], "images have 1 or 3 channels, and the model takes 4"),
        (["data.vae=somewhere"], "data.vae is for latents"),
        (["flow.path=straight"], "flow.path must be one of linear, gvp, vp, got 'straight'"),
        (["flow.tims=1"], "unknown key flow.tims: did you mean flow.times?"),
        (["optim.lrr=1"], "unknown key optim.lrr: did you mean optim.lr?"),
        (["train.batch_size=0"], "train.batch_size must be at least 1, got 0"),
        (["output.folder=null"], "output.folder is empty"),
        (["output.tracker=paper"], "output.tracker must be one of tensorboard, wandb"),
        (["job=dance"], "job must be one of distill, train, got 'dance'"),
    ],
)
def test_settings_that_cannot_work_are_told_in_a_line(config, tmp_path, overrides, message):
    with pytest.raises((ValueError, OSError)) as error:
        run(load_config(config, [f"output.folder={tmp_path / 'run'}", *overrides]))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_images_that_do_not_fit_the_model_are_refused_before_they_are_read(
    dry, config, images, tmp_path, capsys, monkeypatch
):
    """Colours that would be lost, sets made for another size, classes that are not there, in whatever class they are."""
    monkeypatch.setattr(class_images, "read_images", lambda *arguments: pytest.fail("the images are read"))
    sets = {}
    for name in ("grey", "coloured", "large", "mixed"):
        sets[name] = shutil.copytree(images, tmp_path / name)
    Image.new("RGB", (8, 8), "red").save(sets["coloured"] / "light" / "0.png")
    for path in sets["large"].rglob("*.png"):
        Image.new("L", (16, 16)).save(path)
    Image.new("L", (16, 16)).save(sets["mixed"] / "dark" / "0.png")

    def refused(name, *overrides):
        code = main(
            ["train", str(config), f"data.path={sets[name]}", f"output.folder={tmp_path / 'run'}", *overrides, *dry]
        )
        assert code == 1 and not (tmp_path / "run").exists()
        return capsys.readouterr().err

    assert "0.png is in colour, and the model takes grey images: set model.in_channels to 3" in refused("coloured")
    said = refused("large")
    assert "are 16 x 16 pixels, and the model takes 8 x 8: set model.sample_size=16, or scale them once" in said
    assert f"hybriddit cache {sets['large']} --size 8 --out FOLDER" in said
    assert "labels from 0 to 1, and the model's 1 classes are 0 to 0: set model.num_classes=2" in refused(
        "grey", "model.num_classes=1"
    )
    assert "set model.num_classes=2" in refused("grey", "model.num_classes=7")
    assert "data.vae is for latents" in refused("grey", "data.vae=somewhere")
    if dry:
        for name in ("grey", "mixed"):  # images of several sizes are scaled and cropped
            assert (
                main(["train", str(config), f"data.path={sets[name]}", f"output.folder={tmp_path / 'run'}", *dry]) == 0
            )
        assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_what_the_run_needs(config, tmp_path, capsys):
    folder = tmp_path / "run"
    overrides = [
        f"output.folder={folder}",
        "train.steps=3",
        "output.keep=1",
        "output.sample_every=1",
        "output.samples=4",
    ]
    assert main(["train", str(config), *overrides, "--dry-run", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["estimate"] is True and not folder.exists()
    run(load_config(config, overrides))
    notes = json.loads((folder / "run.json").read_text())[0]
    assert (figures["images"], figures["classes"], figures["epochs"]) == (10, 2, 12 / 10)
    assert notes["parameters"] == figures["parameters"]
    sizes = {
        name: sum(f.stat().st_size for f in (folder / name).rglob("*.safetensors"))
        for name in ("checkpoints", "pipeline")
    }
    disk = figures["disk_bytes"]
    assert disk["checkpoints"] == pytest.approx(2 * sizes["checkpoints"], rel=0.15), "one more while it is written"
    assert disk["pipeline"] == pytest.approx(2 * sizes["pipeline"], rel=0.1)
    assert figures["step_flops"] == 4 * 3 * sit_flops(make_model(load_config(config)), (4, 4))
    assert figures["memory_bytes"]["trained"] == 20 * figures["parameters"]
    assert figures["memory_bytes"]["total"] == figures["stage_bytes"]["training"] > figures["memory_bytes"]["trained"]
    assert main(["train", str(config), *overrides, "--dry-run"]) == 0
    words = capsys.readouterr().out
    assert "10 images of 1 x 8 x 8" in words and "attention: hybrid" in words
    assert "MORE than softmax" in words, "a window of 3 and the far branch, on a grid of 4 x 4"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_a_step_keeps(checkpointing, config):
    """Of a real forward pass, by the storages that autograd saves; with checkpointing those between the blocks too."""
    settings = load_config(config, ["output.folder=run", "train.batch_size=6", "train.accumulation=2"])
    settings.model["num_layers"] = 3
    settings.train.gradient_checkpointing = checkpointing
    found = dry_run_sit.dry_run(settings)["memory_bytes"]["activations"]
    model = make_model(settings).train()
    own = {weight.untyped_storage().data_ptr() for weight in model.state_dict().values()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(torch.randn(3, 1, 8, 8), torch.rand(3), torch.zeros(3, dtype=torch.long), return_dict=False)[0]
        torch.nn.functional.mse_loss(output, torch.randn(3, 1, 8, 8))
    size = sum(storage.nbytes() for storage in kept.values())
    assert found == pytest.approx(size, rel=0.05) if not checkpointing else 0.3 * size < found < 0.7 * size


def test_what_no_machine_here_can_do_is_told_before_the_images_are_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "is_wandb_available", lambda: False)
    monkeypatch.setattr(class_images, "read_images", lambda *arguments: pytest.fail("the images are read"))
    overrides = [f"output.folder={tmp_path / 'run'}"]
    with pytest.raises(
        ModuleNotFoundError, match="output.tracker is wandb, which is not installed: pip install wandb$"
    ):
        run(load_config(config, [*overrides, "output.tracker=wandb"]))
    kind = DistributedType.FSDP
    for plugin, is_fsdp2, message in (
        (SimpleNamespace(activation_checkpointing=False), False, "shards by FSDP2: give accelerate --fsdp_version 2"),
        (SimpleNamespace(activation_checkpointing=True), True, "train.gradient_checkpointing=true in place of"),
        (None, None, "by DDP or by FSDP2, not by DEEPSPEED"),
    ):
        if plugin is None:
            kind = DistributedType.DEEPSPEED
        state = SimpleNamespace(fsdp_plugin=plugin)
        accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=is_fsdp2, state=state)
        monkeypatch.setattr(loop, "make_accelerator", lambda config, accelerator=accelerator: accelerator)
        with pytest.raises(NotImplementedError, match=message):
            run(load_config(config, overrides))


def test_a_gpu_s_batches_are_made_one_ahead():
    for device, thread in (("cpu", True), ("cuda", False)):
        made = batches(
            lambda step: threading.current_thread() is threading.main_thread(), range(2), torch.device(device)
        )
        assert list(made) == [(0, thread), (1, thread)]


@pytest.mark.parametrize("made", [in_turn, one_ahead])
def test_batches_come_in_order_and_their_mistakes_with_them(made):
    """`one_ahead` is what a GPU trains from."""
    threads = []

    def make(step):
        threads.append(threading.current_thread() is threading.main_thread())
        if step == 7:
            raise OSError("the shard is damaged")
        return [step, -step]

    assert list(made(make, range(3, 6))) == [(step, [step, -step]) for step in (3, 4, 5)]
    assert set(threads) == {made is in_turn} and len(threads) == 3, "each once"
    assert list(made(make, range(3, 3))) == []
    seen = []
    with pytest.raises(OSError, match="the shard is damaged"):
        for step, _ in made(make, range(6, 9)):
            seen.append(step)
    assert seen == [6], "the one before is trained on"


def test_a_run_is_continued_as_it_began_or_not_at_all(config, unbroken):
    here = [f"output.folder={unbroken}"]
    before = {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()}
    for overrides, resume, message in (
        ([], False, "holds a run already (up to step-00000012): pass --resume"),
        (["model.num_layers=2"], True, "made with other values of model.num_layers"),
        (["flow.path=gvp"], True, "made with other values of flow.path"),
    ):
        with pytest.raises(ValueError) as error:
            run(load_config(config, here + overrides), resume=resume)
        assert message in str(error.value)
    assert {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()} == before


def test_a_run_is_not_continued_on_another_set(config, unbroken, images, tmp_path):
    shutil.copytree(images, tmp_path / "more")
    shutil.copy(images / "dark" / "0.png", tmp_path / "more" / "light" / "new.png")
    with pytest.raises(ValueError, match="was trained on another set, with other values of images: give its data.path"):
        run(load_config(config, [f"output.folder={unbroken}", f"data.path={tmp_path / 'more'}"]), resume=True)
    shutil.copytree(images, tmp_path / "edited")
    Image.new("L", (8, 8), 77).save(tmp_path / "edited" / "dark" / "0.png")
    with pytest.raises(
        ValueError, match="was trained on another set, with other values of content: give its data.path"
    ):
        run(load_config(config, [f"output.folder={unbroken}", f"data.path={tmp_path / 'edited'}"]), resume=True)


def test_a_run_is_continued_on_the_same_set_wherever_and_however_it_is_kept(config, images, tmp_path):
    """In a folder that was moved, or a cache of it in shards; and with other accumulation steps."""
    where = [f"output.folder={tmp_path / 'run'}", "output.checkpoint_every=1"]
    run(load_config(config, [*where, "train.steps=1"]))
    shutil.copytree(images, tmp_path / "moved")
    run(load_config(config, [*where, "train.steps=2", f"data.path={tmp_path / 'moved'}"]), resume=True)
    make_cache(images, tmp_path / "pixels", size=8, channels=1, shard_size=3, progress=False)
    more = ["train.accumulation=2", "train.steps=3", f"data.path={tmp_path / 'pixels'}"]
    run(load_config(config, [*where, *more]), resume=True)
    assert [line["step"] for line in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())] == [
        1,
        2,
        3,
    ]


def test_each_job_has_its_command(config):
    with pytest.raises(ValueError, match="is a config of `hybriddit train`, not of `hybriddit distill`"):
        load_config(config, job="distill")
    with pytest.raises(ValueError, match="is a config of `hybriddit distill`, not of `hybriddit train`"):
        load_config(ROOT / "configs/distill/demo.yaml", job="train")
    assert to_dict(load_config(config))["job"] == "train", "a run's config.yaml says what it is"


def test_flops_are_counted():
    """Of one layer, by hand: 16 tokens, width 16, MLP 64."""
    for kind, attention in (("softmax", 4 * 16 * 16 * 16), ("window", 4 * 16 * 9 * 16)):
        model = make_model(SiTConfig(model={**TINY, "attention": kind}))
        tokens = 2 * 16 * (4 * 16 * 16 + 2 * 16 * 64 + 4 * 16 + 16 * 8)  # projections, MLP, patches in and out
        once = 2 * (256 * 16 + 16 * 16 + 16 * 96 + 16 * 32)
        assert sit_flops(model, (4, 4)) == tokens + once + attention
    assert known_peak(torch.device("cpu")) is None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    config = hybriddit.load_config(path)
    assert isinstance(config, SiTConfig) and config.data.path and config.output.folder
    assert f"configs/sit/{path.name}" in path.read_text()  # the command in its head
    if path in SMALL:
        return
    size, patch, kind = path.stem.split("_")
    preset = hybriddit.SiTTransformer2DModel.preset(f"{size.upper()}/{patch}")
    assert {name: config.model[name] for name in preset} == preset
    assert config.model["attention"] == {"linfusion": "linear"}.get(kind, kind)
    given = {name: config.model[name] for name in SIT_FAR_BRANCH if name in config.model}
    assert given == (SIT_FAR_BRANCH if kind in ("linear", "hybrid") else {})
    recipe = (config.train.batch_size, config.optim.lr, config.optim.weight_decay, config.optim.ema_decay)
    assert recipe == (256, 1e-4, 0, 0.9999) and config.model["class_dropout_prob"] == 0.1
    assert config.flow.path == "linear" and config.flow.times == "uniform" and config.data.flip


def test_every_size_and_attention_has_a_config():
    kinds = ("softmax", "linfusion", "linear", "hybrid")
    assert {path.stem for path in SHIPPED if path not in SMALL} == {
        f"{s}_2_{k}" for s in ("s", "b", "l", "xl") for k in kinds
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_runs_on_a_tiny_stand_in(path, tmp_path):
    small = "train.steps=4 train.batch_size=2 train.compile=false train.progress=false model.num_layers=2"
    small += " model.num_attention_heads=2 model.attention_head_dim=8 output.sample_every=4 output.sample_steps=1"
    small += f" output.samples=1 output.folder={tmp_path / 'run'} output.guidance=1.0"
    config = load_config(path, small.split())
    own = config.model
    images = torch.randint(0, 256, (4, own["in_channels"], own["sample_size"], own["sample_size"]), dtype=torch.uint8)
    data = ClassData([{"images": images, "labels": torch.arange(4)}], ClassInfo(tuple(images.shape[1:])))
    if own["in_channels"] == 4:
        config.output.sample_every = 0  # what would be drawn needs the VAE
    fresh = make_model(config).state_dict()
    model = train(make_model(config), data, config)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = load_sit_pipeline(tmp_path / "run").transformer
    assert saved.config.num_layers == 2 and all(saved.config[key] == value for key, value in own.items())
    for name, value in saved.state_dict().items():
        assert value.isfinite().all() and torch.equal(value, model.state_dict()[name]), name
        if name not in trained:
            assert torch.equal(value, fresh[name]), name
    # the output, the modulation and the gates start at zero: each keeps what is before it in place for a step
    still = {name for name in trained if torch.equal(saved.state_dict()[name], fresh[name])}
    assert len(still) < 0.1 * len(trained), still  # by a rate that warms up some move less than they round
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert line["step"] == 4 and line["lr"] == pytest.approx(expected_rate(config, 3), rel=1e-6)
    drawn = [path.name for path in tmp_path.rglob("step-*.png")]
    assert drawn == (["step-00000004.png"] if own["in_channels"] < 4 else [])


def expected_rate(config, step):
    rate = config.optim.lr * min(1, (step + 1) / max(1, config.optim.warmup_steps))
    return rate * (0.5 + 0.5 * math.cos(math.pi * step / 4) if config.optim.schedule == "cosine" else 1)
