"""Training a SiT from scratch: what is learned, resuming, stopping, several processes, and settings that cannot work."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import finish, start, wait_for
from safetensors.torch import load_file
from tiny_vae import tiny_vae

import hybriddit
from hybriddit.data.class_images import ClassData, ClassInfo, make_cache
from hybriddit.models.flops import sit_flops
from hybriddit.training import train_sit as module
from hybriddit.training.config import SiTConfig, load_config, to_dict
from hybriddit.training.train_sit import draw_batches, make_model, run, train

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(ROOT.glob("configs/sit/*.yaml"))
STEPS = 12
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
    for name in ("model/diffusion_pytorch_model.safetensors", f"checkpoints/step-{STEPS:08d}/state.safetensors"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert log_of(folder) == log_of(other)
    assert [line["step"] for line in log_of(folder)] == list(range(1, STEPS + 1))


def test_a_run_leaves_a_model_and_tells_how_it_was_made(unbroken):
    model = hybriddit.SiTTransformer2DModel.from_pretrained(unbroken / "model")
    state = load_file(unbroken / "checkpoints" / f"step-{STEPS:08d}" / "state.safetensors")
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            assert torch.equal(parameter, state[f"average/{name}"]), "the averaged weights"
    assert any(
        not torch.equal(state[key], state[key.replace("weight/", "average/")]) for key in state if "weight/" in key
    )
    assert json.loads((unbroken / "data.json").read_text())["classes"] == ["dark", "light"]
    assert load_config(unbroken / "config.yaml").model == TINY
    assert (unbroken / "loss.png").is_file() and list(unbroken.rglob("events.out*"))
    line = json.loads((unbroken / "log.jsonl").read_text().splitlines()[0])
    assert set(line) == {"step", "loss", "grad_norm", "lr", "images_per_second"}
    assert not list(unbroken.glob(".*")), "nothing half-written is left"


def slowly():
    draw = module.draw_batches

    def slow(*arguments):
        time.sleep(0.05)
        return draw(*arguments)

    module.draw_batches = slow


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
    process = start(*arguments, output=tmp_path / "out.txt", before=slowly)
    wait_for(lambda: (where / "log.jsonl").exists() and len(log_of(where)) >= 2, 300)
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 130 and 2 <= steps_done(where) < STEPS
    assert "--resume" in (tmp_path / "out.txt").read_text()
    assert finish(*arguments, "--resume", output=tmp_path / "out.txt") == 0
    assert_same_run(where, unbroken)


def test_two_processes_give_the_result_of_one(config, unbroken, tmp_path):
    where = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "train" / "train_sit.py", config, f"output.folder={where}", "train.accumulation=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((where / "run.json").read_text())[0]["processes"] == 2
    one, other = (load_file(path / "model" / "diffusion_pytorch_model.safetensors") for path in (unbroken, where))
    for name in one:  # sums of gradients in another order
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: n + text)
    for line, expected in zip(log_of(where), log_of(unbroken), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)


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


def test_two_classes_are_learned(images, tmp_path):
    """The samples of the grid are of their classes."""
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
    with Image.open(tmp_path / "run" / "samples" / "step-00000150.png") as grid:
        pixels = np.array(grid).astype(float)
    assert grid.mode == "L" and pixels.shape == (16, 16)
    means = pixels.reshape(2, 8, 2, 8).mean((1, 3))
    assert (means[:, 0] < 110).all() and (means[:, 1] > 150).all(), means


def test_bf16_checkpointing_and_a_vae(images, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    make_cache(images, tmp_path / "cache", size=8, vae=tiny_vae(), vae_name=str(tmp_path / "vae"), progress=False)
    path = write_config(
        tmp_path / "cache",
        tmp_path,
        model={**TINY, "in_channels": 2, "sample_size": 4},
        train={"steps": 2, "batch_size": 4, "precision": "bf16", "gradient_checkpointing": True, "progress": False},
        output={"folder": str(tmp_path / "run"), "sample_every": 1, "sample_steps": 1, "samples": 4},
    )
    model = run(load_config(path, ["data.memory=true"]))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    with Image.open(tmp_path / "run" / "samples" / "step-00000002.png") as grid:
        assert grid.size == (16, 16) and grid.mode == "RGB"
    tiny_vae(1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the cache was made by another VAE than"):
        run(load_config(path, [f"data.vae={tmp_path / 'other'}", f"output.folder={tmp_path / 'again'}"]))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(config, tmp_path, monkeypatch):
    draw = module.draw_batches

    def poisoned(data, model, config, step, *own):
        for images, *rest in draw(data, model, config, step, *own):
            yield images * (float("nan") if step == 4 else 1), *rest

    monkeypatch.setattr(module, "draw_batches", poisoned)
    with pytest.raises(FloatingPointError, match=r"not finite at step 5 .*earlier checkpoints are kept"):
        run(load_config(config, [f"output.folder={tmp_path / 'run'}", "output.checkpoint_every=2"]))
    assert steps_done(tmp_path / "run") == 4
    saved = hybriddit.SiTTransformer2DModel.from_pretrained(tmp_path / "run" / "model")
    assert all(p.isfinite().all() for p in saved.parameters())


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.path=/nowhere"], "no folder at '/nowhere' (data.path)"),
        (["model.num_classes=1"], "labels from 0 to 1, and the model's 1 classes are 0 to 0: set model.num_classes"),
        (["model.attention=dense"], "model: unknown attention 'dense'"),
        (["model.windw=3"], "unknown key model.windw: did you mean model.window?"),
        (["model.num_layers=two"], "model: num_layers must be a positive integer, not 'two'"),
        (["model.in_channels=4"], "images have 1 or 3 channels, and the model takes 4"),
        (["data.vae=somewhere", "output.sample_every=1"], "data.vae is for latents"),
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
    assert not (tmp_path / "run" / "checkpoints").exists()


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
    assert module.known_peak(torch.device("cpu")) is None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    config = hybriddit.load_config(path)
    assert isinstance(config, SiTConfig) and config.data.path and config.output.folder
    assert f"configs/sit/{path.name}" in path.read_text()  # the command in its head
    if path.stem == "fashion_mnist_cpu":
        return
    size, patch, kind = path.stem.split("_")
    preset = hybriddit.SiTTransformer2DModel.preset(f"{size.upper()}/{patch}")
    assert {name: config.model[name] for name in preset} == preset
    assert config.model["attention"] == {"linfusion": "linear"}.get(kind, kind)
    recipe = (config.train.batch_size, config.optim.lr, config.optim.weight_decay, config.optim.ema_decay)
    assert recipe == (256, 1e-4, 0, 0.9999) and config.model["class_dropout_prob"] == 0.1
    assert config.flow.path == "linear" and config.flow.times == "uniform" and config.data.flip


def test_every_size_and_attention_has_a_config():
    kinds = ("softmax", "linfusion", "hybrid")
    assert {path.stem for path in SHIPPED} == {f"{s}_2_{k}" for s in ("s", "b", "l", "xl") for k in kinds} | {
        "fashion_mnist_cpu"
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_runs_on_a_tiny_stand_in(path, tmp_path):
    small = "train.steps=2 train.batch_size=2 train.compile=false train.progress=false model.num_layers=2"
    small += " model.num_attention_heads=2 model.attention_head_dim=8 output.sample_every=2 output.sample_steps=1"
    small += f" output.samples=1 output.folder={tmp_path / 'run'} output.guidance=1.0"
    config = load_config(path, small.split())
    own = config.model
    images = torch.randint(0, 256, (4, own["in_channels"], own["sample_size"], own["sample_size"]), dtype=torch.uint8)
    data = ClassData([{"images": images, "labels": torch.arange(4)}], ClassInfo(tuple(images.shape[1:])))
    if own["in_channels"] == 4:
        config.output.sample_every = 0  # what would be drawn needs the VAE
    model = train(make_model(config), data, config)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert hybriddit.SiTTransformer2DModel.from_pretrained(tmp_path / "run" / "model").config.num_layers == 2
