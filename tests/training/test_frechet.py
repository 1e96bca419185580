"""The Fréchet distance that is measured while a model trains: its value, its references, and early errors."""

import copy
import json

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from runs import quarters
from tiny_pipelines import tiny_data, tiny_pipeline
from tiny_vae import tiny_vae
from torchvision.transforms.v2.functional import pil_to_tensor

from hybriddit import HybridConfig
from hybriddit.data.class_cache import make_cache
from hybriddit.data.class_images import adm_crop
from hybriddit.data.sources import open_class_data
from hybriddit.data.teacher_images import sample
from hybriddit.metrics import to_uint8
from hybriddit.training import frechet
from hybriddit.training.distill import distill
from hybriddit.training.run_config import DistillConfig, MetricsConfig, load_config
from hybriddit.training.train_sit import run

MODEL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "num_classes": 2}


@pytest.fixture
def images(tmp_path):
    random = np.random.default_rng(0)
    for label, level in (("dark", 50), ("light", 200)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(5):
            pixels = random.normal(level, 20, (8, 8)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path / "images"


def write_config(folder, data, *, channels=1, size=8, **metrics):
    path = folder / "run.yaml"
    values = {
        "job": "train",
        "model": {**MODEL, "in_channels": channels, "sample_size": size},
        "data": {"path": str(data)},
        "optim": {"lr": 5e-2, "ema_decay": 0.5},
        "train": {"steps": 4, "batch_size": 4, "progress": False},
        "output": {"folder": str(folder / "run"), "checkpoint_every": 2, "log_every": 1, "sample_steps": 2},
        "metrics": {"every": 2, "samples": 6, "features": "runs:quarters", "batch_size": 4, **metrics},
    }
    path.write_text(json.dumps(values))
    return path


def logged(folder):
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["fd"] for line in lines if "fd" in line}


def distance(one, other):
    """By numpy and scipy, of [N, F] features."""
    one, other = one.double().numpy(), other.double().numpy()
    covariances = [np.cov(x, rowvar=False) for x in (one, other)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root.real)


@torch.no_grad()
def by_hand(model, count, guidance=1.0):
    """Heun's method in two steps from row i's noise, of seed i, with label i modulo 2; one row at a time."""
    made = []
    for row in range(count):
        x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(row))

        def field(x, t, row=row):
            labelled, none = (
                model(x, torch.tensor([t]), torch.tensor([label]), return_dict=False)[0] for label in (row % 2, 2)
            )
            return none + guidance * (labelled - none)

        for t in (0.0, 0.5):
            first = field(x, t)
            x = x + 0.25 * (first + field(x + 0.5 * first, t + 0.5))
        made.append(to_uint8(x))
    return torch.cat(made)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_is_the_distance_of_the_averaged_model_s_samples_to_the_training_set(images, tmp_path, guidance):
    model = run(load_config(write_config(tmp_path, images, guidance=guidance)))
    reference = open_class_data(images, (1, 8, 8), progress=False).rows(range(10))["images"]
    expected = distance(quarters(by_hand(model, 6, guidance)), quarters(reference))
    found = logged(tmp_path)
    assert list(found) == [2, 4] and found[4] == pytest.approx(expected, rel=1e-4)
    with Image.open(tmp_path / "run" / "loss.png") as plot:
        assert plot.width > 3 * plot.height, "a panel for it, beside loss and gradient norm"


def test_training_does_not_feel_it_and_a_resumed_run_measures_the_same(images, tmp_path):
    def state(folder, step):
        return (folder / "run" / "checkpoints" / f"step-{step:08d}" / "state.safetensors").read_bytes()

    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    run(load_config(write_config(tmp_path / "without", images, every=0)))
    config = write_config(tmp_path / "with", images)
    run(load_config(config))
    assert state(tmp_path / "with", 4) == state(tmp_path / "without", 4)
    assert not logged(tmp_path / "without")
    first = logged(tmp_path / "with")
    last = tmp_path / "with" / "run" / "checkpoints" / "step-00000004"
    last.rename(tmp_path / "away")
    run(load_config(config), resume=True)
    assert logged(tmp_path / "with") == first and state(tmp_path / "with", 4) == state(tmp_path / "without", 4)


def inception(images):
    """Its kind of output, of quarters."""
    features = quarters(images)
    return {"pooled": features, "spatial": features[:, :2], "logits": features[:, :3]}


def test_a_reference_file_with_and_without_statistics(images, tmp_path, monkeypatch):
    monkeypatch.setattr("hybriddit.metrics.features.load_inception", lambda device: inception)
    data = open_class_data(images, (1, 8, 8), progress=False)
    samples = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    others = samples.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    mean, covariance = np.full(4, 100.0), np.eye(4) * 50
    np.savez(tmp_path / "images.npz", others)
    np.savez(tmp_path / "both.npz", others, mu=mean, sigma=covariance)

    def measured(reference, features):
        config = MetricsConfig(1, 10, features=features, reference=str(tmp_path / reference))
        blank = np.zeros((2, 8, 8, 3), np.uint8)
        distance = frechet.FrechetDistance(config, None, blank, torch.device("cpu"), progress=False)
        return distance(lambda rows: data.rows(rows)["images"].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())

    own = quarters(data.rows(range(10))["images"])
    to_images = distance(own, quarters(samples))
    assert measured("images.npz", "inception") == pytest.approx(to_images)
    assert measured("both.npz", "runs:quarters") == pytest.approx(to_images), "the statistics are Inception's"
    moved = (own.double().mean(0).numpy() - mean) ** 2
    spread = np.cov(own.double().numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(spread @ covariance).real
    expected = moved.sum() + np.trace(spread + covariance - 2 * root)
    assert measured("both.npz", "inception") == pytest.approx(expected)


def test_a_reference_folder_is_the_file_of_its_cropped_images(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hybriddit.metrics.features.load_inception", lambda device: inception)
    folder, random, crops = tmp_path / "photos", np.random.default_rng(1), []
    folder.mkdir()
    for number in range(6):
        photo = Image.fromarray(random.integers(0, 256, (20 + number, 17, 3), np.uint8))
        photo.save(folder / f"{number}.png")
        crops.append(np.asarray(adm_crop(photo, 8)))
    (folder / "notes.md").touch()
    np.savez(tmp_path / "photos.npz", np.stack(crops))
    own = open_class_data(images, (1, 8, 8), progress=False)

    def measure(reference, features="inception", size=(8, 8), progress=False):
        config = MetricsConfig(1, 10, features=features, reference=str(reference), batch_size=4)
        blank = np.zeros((2, *size, 3), np.uint8)
        distance = frechet.FrechetDistance(config, None, blank, torch.device("cpu"), progress=progress)
        return distance(lambda rows: own.rows(rows)["images"].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())

    for features in ("inception", "runs:quarters"):
        assert measure(folder, features) == measure(tmp_path / "photos.npz", features)
    assert not capsys.readouterr().out
    measure(folder, progress=True)
    assert f"passed over in {folder}: .md (1)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cropped to squares, and the model's are 8 x 16: give an npz file"):
        measure(folder, size=(8, 16))
    (folder / "3.png").write_bytes(b"none")
    with pytest.raises(ValueError, match="3.png is damaged or no image"):
        measure(folder)


def test_latents_are_decoded(images, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    make_cache(images, tmp_path / "cache", size=8, vae=tiny_vae(), vae_name=str(tmp_path / "vae"), progress=False)
    np.savez(tmp_path / "reference.npz", np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8))
    config = write_config(tmp_path, tmp_path / "cache", channels=2, size=4, reference=str(tmp_path / "reference.npz"))
    run(load_config(config))
    assert all(np.isfinite(value) and value > 0 for value in logged(tmp_path).values())
    with pytest.raises(
        ValueError, match="metrics.reference is needed, an npz file or a folder: the training set holds latents"
    ):
        run(load_config(config, ["metrics.reference=null", f"output.folder={tmp_path / 'other'}"]))


def test_of_a_distillation_it_is_the_distance_to_the_teacher_s_images(tmp_path, capsys):
    pipeline = tiny_pipeline("flux_dev")
    data, dense = tiny_data(pipeline, images=4), copy.copy(pipeline)
    dense.transformer = copy.deepcopy(pipeline.transformer)
    config = DistillConfig(hybrid=HybridConfig(window=3, map_rank=4))
    config.metrics = MetricsConfig(2, 6, features="runs:quarters", batch_size=4)
    config.train.steps, config.train.batch_size, config.train.progress = 4, 4, False
    config.train.seed, config.optim.lr, config.output.folder = 7, 1e-2, str(tmp_path / "run")
    distill(pipeline, data, config)

    rows = data.rows([0, 1, 2, 3, 0, 1])
    rows.pop("latents")
    student, teacher = (
        torch.stack([pil_to_tensor(image) for image in sample(made_by, rows, data.empty, data.info, range(7, 13))])
        for made_by in (pipeline, dense)
    )
    expected = distance(quarters(student), quarters(teacher))
    found = logged(tmp_path)
    assert list(found) == [2, 4] and found[4] == pytest.approx(expected, rel=1e-3) and found[4] > 0
    pipeline.vae = None
    with pytest.raises(ValueError, match="metrics.every: the teacher's pipeline has no VAE"):
        config.output.folder = None
        distill(pipeline, data, config)
    config.metrics.every, config.train.steps, config.output.sample_every = 0, 1, 1
    distill(pipeline, data, config)
    assert "no VAE, so no sample grids are drawn" in capsys.readouterr().out


def pixels(images):
    """As wide as the images are large."""
    return images.float().flatten(1)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["metrics.features=inception"],
            "no Inception weights in /nowhere/checkpoints: get https://github.com/mseitzer",
        ),
        (["metrics.features=quarters"], "metrics.features must be 'inception' or 'package.module:function'"),
        (["metrics.features=nowhere.at_all:f"], "metrics.features: No module named 'nowhere'; PYTHONPATH says"),
        (["metrics.features=runs:halves"], "metrics.features: runs has no halves"),
        (["metrics.features=runs:context"], "metrics.features: runs:context is no function"),
        (
            ["metrics.features=test_frechet:pixels", "metrics.reference={large}"],
            "192 wide for the model's images and 768",
        ),
        (["metrics.reference={none}"], "no npz file at"),
        (["metrics.samples=1"], "metrics.samples must be at least 2, got 1"),
        (["metrics.every=-1"], "metrics.every must be 0 (never) or more, got -1"),
        (["metrics.evry=1"], "unknown key metrics.evry: did you mean metrics.every?"),
    ],
)
def test_what_cannot_work_is_told_before_the_first_step(images, tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nowhere")
    np.savez(tmp_path / "large.npz", np.zeros((2, 16, 16, 3), np.uint8))
    paths = {"large": tmp_path / "large.npz", "none": tmp_path / "none.npz"}
    with pytest.raises((ValueError, OSError, ModuleNotFoundError)) as error:
        run(load_config(write_config(tmp_path, images), [text.format(**paths) for text in overrides]))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_processes_make_equal_shares(images):
    data = frechet.Images(10, open_class_data(images, (1, 8, 8), progress=False).rows)
    with pytest.raises(ValueError, match="metrics.samples 6 does not divide into 4 processes"):
        frechet.FrechetDistance(MetricsConfig(1, 6), data, None, torch.device("cpu"), processes=4)
