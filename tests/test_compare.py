"""`hybriddit compare`: a hybrid's images beside its teacher's."""

import csv
import json
import math
import re
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import PROMPTS, TEXT_LENGTH, tiny_pipeline

from hybriddit import HybridConfig, hybridize, load_adapter, save_adapter
from hybriddit.attention import HybridAttention
from hybriddit.cli import main
from hybriddit.generate import generate
from hybriddit.images import open_image, read_record

SIZE = {"height": 64, "width": 64, "steps": 2, "max_sequence_length": TEXT_LENGTH}
FLAGS = ["--height", "64", "--width", "64", "--steps", "2", "--max-sequence-length", str(TEXT_LENGTH)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A FLUX pipeline, an adapter of it, and prompts."""
    folder = tmp_path_factory.mktemp("saved")
    pipeline = tiny_pipeline("flux_dev")
    pipeline.save_pretrained(folder / "base")
    hybridize(pipeline.transformer, HybridConfig(window=3, map_rank=4))
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if ".hybrid." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    save_adapter(pipeline.transformer, folder / "adapter")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    return folder


@pytest.fixture
def command(saved, tmp_path, capsys, monkeypatch):
    """(exit code, stdout, stderr's last line) of `hybriddit compare` in the folder of what was saved."""
    monkeypatch.chdir(saved)

    def run(*more):
        given = ["--model", "base", "--prompts", "prompts.txt", *FLAGS, "--out", str(tmp_path / "out")]
        code = main(["compare", *given, *map(str, more)])
        printed = capsys.readouterr()
        return code, printed.out, (printed.err.splitlines() or [""])[-1]

    return run


def shades(images):
    """Features of one's own: the mean of each channel."""
    return images.float().mean((2, 3))


def test_images_and_figures(saved, command, tmp_path):
    code, printed, _ = command("--adapter", "adapter", "--num-images", 2, "--seed", 5)
    out = tmp_path / "out"
    assert code == 0
    dense, hybrid = tiny_pipeline("flux_dev"), load_adapter(tiny_pipeline("flux_dev"), saved / "adapter")
    rows = list(csv.DictReader((out / "images.csv").open()))
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        (prompt, str(5 + 2 * i + j)) for i, prompt in enumerate(PROMPTS[:2]) for j in range(2)
    ]
    errors = []
    for row in rows:
        pair = {}
        for name, pipeline in (("teacher", dense), ("hybrid", hybrid)):
            path = out / name / f"{int(row['image']):05d}.png"
            [(image, _)] = generate(pipeline, row["prompt"], seed=int(row["seed"]), **SIZE)
            pair[name] = np.asarray(open_image(path), float)
            assert np.array_equal(pair[name], np.asarray(image)), path
            record = read_record(path)
            assert (record["by"], record["seed"], record["steps"]) == (name, int(row["seed"]), 2)
            assert float(row[f"{name}_seconds"]) > 0
        errors.append(10 * np.log10(255**2 / ((pair["teacher"] - pair["hybrid"]) ** 2).mean()))
        assert float(row["psnr"]) == pytest.approx(errors[-1], abs=2e-3) and 0 < float(row["ssim"]) < 1
    report = json.loads((out / "compare.json").read_text())
    assert report["images"] == 4 and report["psnr"]["mean"] == pytest.approx(np.mean(errors), abs=2e-3)
    assert report["psnr"]["lowest"] == pytest.approx(min(errors), abs=2e-3) and report["features"] is None
    assert report["hybrid_config"]["window"] == 3 and report["adapter"] == "adapter" and report["steps"] == 2
    assert f"PSNR to the teacher   {np.mean(errors):.2f} dB, from {min(errors):.2f}" in printed
    assert Image.open(out / "sheet.png").width > 4 * 192


def test_a_hybrid_that_is_its_teacher_and_features_of_one_s_own(saved, command, tmp_path):
    """A hybrid pipeline, fresh, whose window covers the grid."""
    code = main(
        ["convert", "--model", str(saved / "base"), "--window", "8", "--out", str(tmp_path / "whole"), "--quiet"]
    )
    assert code == 0
    code, printed, _ = command("--model", tmp_path / "whole", "--features", "test_compare:shades", "--json")
    report = json.loads(printed)
    assert code == 0 and report["psnr"]["lowest"] > 50 and report["ssim"]["lowest"] > 0.999
    assert report["features"]["name"] == "test_compare:shades" and report["features"]["frechet_distance"] < 1e-2
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == report


def test_branches_and_the_page(saved, command, tmp_path):
    code, printed, _ = command("--adapter", "adapter", "--branches")
    out, pipeline = tmp_path / "out", load_adapter(tiny_pipeline("flux_dev"), saved / "adapter")
    assert code == 0
    layers = [module for module in pipeline.transformer.modules() if isinstance(module, HybridAttention)]
    rows, report = list(csv.DictReader((out / "images.csv").open())), json.loads((out / "compare.json").read_text())
    for branch, gate in (("near", 0.0), ("far", math.inf)):
        for layer in layers:
            layer.gate_init = gate
            layer.init_gate()
        for row in rows:
            [(image, _)] = generate(pipeline, row["prompt"], seed=int(row["seed"]), **SIZE)
            images = {
                name: np.asarray(open_image(out / name / f"{int(row['image']):05d}.png"), float)
                for name in ("teacher", f"{branch} alone")
            }
            assert np.abs(images[f"{branch} alone"] - np.asarray(image)).max() <= 1
            psnr = 10 * np.log10(255**2 / ((images["teacher"] - images[f"{branch} alone"]) ** 2).mean())
            assert float(row[f"{branch}_alone_psnr"]) == pytest.approx(psnr, abs=2e-3)
        mean = np.mean([float(row[f"{branch}_alone_psnr"]) for row in rows])
        assert report[f"{branch}_alone_psnr"]["mean"] == pytest.approx(mean, abs=2e-3)
        assert f"{branch} branch alone {mean:.2f} dB" in " ".join(printed.split())
    assert len(report["layers"]) == len(layers) == 3
    assert all(0 < layer["without_far"] < 10 and layer["without_near"] > 0 for layer in report["layers"].values())
    assert "0 of 3 change by less" in printed

    page = (out / "index.html").read_text()
    worst = sorted(rows, key=lambda row: float(row["psnr"]))
    places = [page.index(f"{row['prompt']} <small>seed {row['seed']}<") for row in worst]
    assert places == sorted(places) and "http" not in page and "<script" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 8 and all((out / unquote(source)).is_file() for source in sources)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "base is dense: give the --adapter"),
        (("--any-base",), "--any-base is for an adapter"),
        (("--adapter", "none"), "no adapter folder none"),
        (("--adapter", "adapter", "--prompts", "none.txt"), "none.txt"),
        (("--adapter", "adapter", "--num-images", "0"), "num_images must be 1 or more"),
        (("--adapter", "adapter", "--features", "nowhere:shades"), "--features: No module named 'nowhere'"),
        (("--adapter", "adapter", "--features", "test_compare:none"), "--features: test_compare has no none"),
        (("--adapter", "adapter", "--out", "adapter"), "adapter holds"),
    ],
)
def test_what_cannot_be_compared(arguments, message, command, tmp_path, monkeypatch):
    monkeypatch.setattr("hybriddit.pipelines.loading.load_base", lambda *args: pytest.fail("a model is loaded"))
    code, _, said = command(*arguments)
    assert code == 1 and said.startswith("hybriddit: ") and message in said
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, said = command("--adapter", "adapter")
    assert code == 1 and "works in one process" in said
