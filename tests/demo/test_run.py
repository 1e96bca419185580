"""The demo's figures and pictures, and the files it reads."""

import runpy

import numpy as np
import pytest
import torch
from PIL import Image

from hybriddit.demo import run
from hybriddit.demo.canvas import SCENES
from hybriddit.demo.run import SEEDS, SHOWN, compare, warnings_of
from hybriddit.images import contact_sheet
from hybriddit.training.run_config import load_config


def test_compare_against_formulas():
    rng = np.random.default_rng(0)
    teacher = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    images = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    error = ((teacher.astype(float) - images.astype(float)) ** 2).mean((1, 2, 3))
    measured = compare(images, teacher)
    assert measured["psnr"] == pytest.approx((10 * np.log10(255**2 / error)).mean(), abs=1e-3)
    assert measured["ssim"] < 0.1
    assert compare(teacher, teacher) == {"psnr": 100.0, "ssim": 1.0}


def test_the_demo_warns_where_distilling_made_it_worse():
    before = {"psnr": 18.3, "ssim": 0.71, "prompt_agreement": 0.04}
    after = {"psnr": 33.8, "ssim": 0.97, "prompt_agreement": 0.94}
    assert warnings_of({"undistilled": before, "distilled": after}) == []
    [warning] = warnings_of({"undistilled": before, "distilled": {**after, "psnr": 16.1, "ssim": 0.7}})
    assert "worse (PSNR fell from 18.3 to 16.1, SSIM fell from 0.71 to 0.7): " in warning


def test_the_seed_decides_how_the_student_begins(tmp_path, monkeypatch):
    """Whatever was drawn before from torch's generator, which is another number in each process."""
    begun = []

    def begin(pipeline, *_):
        begun.append({name: p for name, p in pipeline.transformer.named_parameters() if ".hybrid." in name})
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "distill", begin)
    monkeypatch.setattr(run, "generate", lambda *_: None)
    monkeypatch.setattr(run, "make_data", lambda *_: None)
    for drawn, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(drawn)
        with pytest.raises(KeyboardInterrupt):
            run.run("configs/distill/demo.yaml", tmp_path, [f"train.seed={seed}"])
    first, again, other = begun
    assert first and all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_contact_sheet_shows_every_image(tmp_path):
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], dtype=np.uint8)
    images = np.broadcast_to(colours[:, None, None], (3, 64, 64, 3))
    contact_sheet({"upper": images, "lower": images[::-1]}, ["one", "two", "three"], tmp_path / "sheet.png")
    seen = Image.open(tmp_path / "sheet.png").getcolors(1 << 20)
    area = {colour: count for count, colour in seen}
    assert all(area[tuple(colour)] == 2 * 128 * 128 for colour in colours.tolist())


@pytest.mark.parametrize("name", ["demo", "demo_sd3"])
def test_demo_prompts_are_ones_the_teacher_knows(name):
    config = load_config(f"configs/distill/{name}.yaml")
    with open(config.data.prompts) as file:
        prompts = set(file.read().splitlines())
    assert prompts == {scene.prompt for scene in SCENES}
    assert {scene.prompt for scene in SHOWN} <= prompts
    assert sum(scene.same for scene in SHOWN) == len(SHOWN) / 2, "half of the pairs match, so that chance is 0.5"
    learned = range(config.data.seed, config.data.seed + config.data.images)
    assert not set(SEEDS) & set(learned), "the images shown are not among those learned from"


@pytest.mark.parametrize("config", ["demo", "demo_sd3"])
def test_the_rows_of_the_ablation_are_settings(config):
    """Each row of scripts/ablation.py but the first changes the config, each in another way."""
    rows = runpy.run_path("scripts/ablation.py")["ROWS"]
    configs = {name: load_config(f"configs/distill/{config}.yaml", overrides) for name, overrides in rows.items()}
    assert configs["default"] == load_config(f"configs/distill/{config}.yaml")
    names = [name for name in configs if config == "demo" or name != "no rotary embedding"]  # SD3 has none
    assert all(configs[a] != configs[b] for i, a in enumerate(names) for b in names[:i])
