"""`hybriddit compare --lpips --clip --dino`, with tiny networks of the real classes and random weights."""

import csv
import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from standins import extractor, images
from test_compare import command, saved  # noqa: F401
from tiny_clip import SIZES, save_tiny_clip
from tiny_pipelines import PROMPTS
from transformers import (
    CLIPModel,
    CLIPProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from hybriddit.cli import main
from hybriddit.images import open_image, save_png
from hybriddit.metrics.perceptual import load_perceptual

ALEXNET = torchvision.models.alexnet


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of a CLIP, whose vocabulary is letters, and of a DINO."""
    folder = tmp_path_factory.mktemp("networks")
    save_tiny_clip(folder / "clip")
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    ViTModel(ViTConfig(**vision), add_pooling_layer=False).save_pretrained(folder / "dino")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "dino")
    return folder


@pytest.fixture
def alexnet(monkeypatch):
    """AlexNet with random weights in place of downloaded ones."""

    def random(*args, **kwargs):
        torch.manual_seed(0)
        return ALEXNET()

    monkeypatch.setattr(torchvision.models, "alexnet", random)
    return random


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def lpips_formula(network, one, other):
    """The formula of arXiv 1801.03924: weighted squared distances of unit features, averaged over places, layer by layer."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    torch.manual_seed(0)
    layers = ALEXNET().features.eval()
    features = []
    for image in (one, other):
        x = (torch.from_numpy(image).double() / 127.5 - 1 - shift) / scale
        x, found = x.permute(2, 0, 1)[None], []
        for i, layer in enumerate(layers.double()):
            x = layer(x)
            if i in (1, 4, 7, 9, 11):
                found.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        features.append(found)
    weights = [linear.model[-1].weight.double() for linear in network.lins]
    pairs = zip(weights, *features, strict=True)
    return float(sum((weight * (a - b) ** 2).sum(1).mean() for weight, a, b in pairs))


def test_figures(saved, networks, alexnet, command, tmp_path):  # noqa: F811
    clip, dino = networks / "clip", networks / "dino"
    code, printed, error = command("--adapter", "adapter", "--lpips", "--clip", clip, "--dino", dino)
    assert code == 0, error
    out = tmp_path / "out"
    rows, report = list(csv.DictReader((out / "images.csv").open())), json.loads((out / "compare.json").read_text())
    from lpips import LPIPS

    network, clip_model, dino_model = (
        LPIPS(verbose=False),
        CLIPModel.from_pretrained(clip),
        ViTModel.from_pretrained(dino),
    )
    processor, squares = CLIPProcessor.from_pretrained(clip), ViTImageProcessor.from_pretrained(dino)
    with torch.no_grad():
        for row, prompt in zip(rows, PROMPTS[:2], strict=True):
            images = [open_image(out / name / f"{int(row['image']):05d}.png") for name in ("hybrid", "teacher")]
            expected = {"lpips": lpips_formula(network, *map(np.asarray, images))}
            ids = processor.tokenizer(prompt, return_tensors="pt", truncation=True).input_ids[:, :77]
            text = clip_model.text_projection(clip_model.text_model(ids).pooler_output)[0]
            pixels = processor.image_processor(images, return_tensors="pt").pixel_values
            one, other = clip_model.visual_projection(clip_model.vision_model(pixels).pooler_output)
            expected |= {"clip_image": cosine(one, other), "clip_text": cosine(one, text)}
            expected["clip_text_teacher"] = cosine(other, text)
            one, other = dino_model(squares(images, return_tensors="pt").pixel_values).last_hidden_state[:, 0]
            expected["dino"] = cosine(one, other)
            for name, value in expected.items():
                assert float(row[name]) == pytest.approx(value, abs=2e-3), name
    assert report["lpips"]["mean"] == pytest.approx(np.mean([float(row["lpips"]) for row in rows]), abs=1e-4)
    assert report["clip_model"] == str(clip) and report["lpips_network"] == "alex"
    assert f"DINO to the teacher   {report['dino']['mean']:.3f}, from" in printed
    assert f"lpips {float(rows[0]['lpips']):.3f}" in (out / "index.html").read_text()


def test_equal_images_are_alike(networks, alexnet):
    image = np.asarray(Image.effect_noise((64, 48), 80).convert("RGB"))
    found = {}
    for measure in load_perceptual(
        torch.device("cpu"), lpips=True, clip=str(networks / "clip"), dino=str(networks / "dino")
    ):
        found |= measure(image, image, "a cup, " * 100)  # more than CLIP's 77 tokens
    assert found["lpips"] == pytest.approx(0, abs=1e-6) and found["clip_text"] == found["clip_text_teacher"]
    assert found["clip_image"] == pytest.approx(1, abs=1e-5) and found["dino"] == pytest.approx(1, abs=1e-5)


def test_networks_that_are_not_there_are_refused_first(saved, networks, command, monkeypatch):  # noqa: F811
    for options, message in [
        (["--clip", networks / "none"], f"--clip: no folder {networks / 'none'}"),
        (["--clip", networks / "dino"], "it has no weights for logit_scale of a CLIPModel"),
        (["--dino", networks / "clip"], "is a CLIPModel, and no vision transformer"),
    ]:
        code, _, error = command("--adapter", "adapter", *options)
        assert code == 1 and message in error, error

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models, "alexnet", offline)
    code, _, error = command("--adapter", "adapter", "--lpips")
    assert code == 1 and error == "hybriddit: --lpips: AlexNet's weights cannot be loaded (no network)"
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    code, _, error = command("--adapter", "adapter", "--lpips")
    assert code == 1 and "--lpips needs the package lpips: pip install lpips" in error


def test_clip_t_of_a_folder_that_generate_wrote(networks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hybriddit.metrics.run.load_inception", lambda path, device: extractor)
    (tmp_path / "weights.pth").write_bytes(b"")
    made, other = tmp_path / "made", tmp_path / "other"
    for folder in (made, other):
        folder.mkdir()
    prompts = ["a red shoe", "bags, and bags, and more bags", "a", "a bag", "shoes, " * 50]
    for number, (prompt, pixels) in enumerate(zip(prompts, images(5), strict=True)):
        save_png(Image.fromarray(pixels), made / f"{number}.png", {"prompt": prompt})
        Image.fromarray(pixels).save(other / f"{number}.png")

    def evaluate(samples, *more):
        words = [samples, other, "--inception", tmp_path / "weights.pth", "--clip", networks / "clip", "--quiet", *more]
        code = main(["evaluate", *map(str, words)])
        return code, capsys.readouterr()

    model, processor = (made_by.from_pretrained(networks / "clip") for made_by in (CLIPModel, CLIPProcessor))
    expected = []
    for number, prompt in enumerate(prompts):
        ids = processor.tokenizer(prompt, return_tensors="pt", truncation=True, max_length=77).input_ids
        pixels = processor.image_processor(open_image(made / f"{number}.png"), return_tensors="pt").pixel_values
        with torch.no_grad():
            text = model.text_projection(model.text_model(ids).pooler_output)[0]
            image = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
        expected.append(cosine(text, image))
    code, said = evaluate(made, "--batch-size", "2", "--json")
    assert code == 0, said.err
    report = json.loads(said.out)
    assert report["metrics"]["clip_text"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert report["clip"] == str(networks / "clip")

    for samples, why in ((other, "has no record of its prompt"), (tmp_path / "some.npz", "does not tell prompts")):
        np.savez(tmp_path / "some.npz", images(5))
        code, said = evaluate(samples)
        assert code == 1 and why in said.err and len(said.err.splitlines()) == 1
