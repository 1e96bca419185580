"""Folders of images, evaluated as the npz files with the same pixels are."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from standins import extractor, images

from hybriddit.cli import main
from hybriddit.data.image_set import FolderImages
from hybriddit.metrics import frechet_distance_of

SAMPLES, REFERENCE = images(40), images(25, seed=1)


def save(folder, array, ending="png"):
    folder.mkdir()
    for index, pixels in enumerate(array):
        path = folder / f"class-{index % 2}" / f"{index:03d}.{ending}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def in_order(array):
    """As `save`'s files are sorted: by path."""
    return np.concatenate((array[::2], array[1::2]))


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """What `hybriddit evaluate` with the stand-in extractor prints: the report, or its error."""
    monkeypatch.setattr("hybriddit.metrics.run.load_inception", lambda path, device: extractor)
    (tmp_path / "weights.pth").write_bytes(b"")

    def run(*arguments):
        code = main(["evaluate", *map(str, arguments), "--inception", str(tmp_path / "weights.pth"), "--json"])
        said = capsys.readouterr()
        if code == 0:
            return json.loads(said.out) | {"said": said.err}
        assert said.out == ""
        *_, line = said.err.splitlines()
        assert line.startswith("hybriddit: ")
        return line

    return run


@pytest.fixture
def sets(tmp_path):
    np.savez(tmp_path / "samples.npz", in_order(SAMPLES))
    np.savez(tmp_path / "reference.npz", in_order(REFERENCE))
    return save(tmp_path / "samples", SAMPLES), save(tmp_path / "reference", REFERENCE)


def test_the_scores_are_those_of_npz_files_with_the_same_pixels(evaluate, sets, tmp_path):
    files = [tmp_path / "samples.npz", tmp_path / "reference.npz"]
    expected = evaluate(*files)
    for pair in (sets, (sets[0], files[1]), (files[0], sets[1])):
        found = evaluate(*pair, "--batch-size", "7")
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-10)
        assert "checking" in found["said"] and "Traceback" not in found["said"]
    assert evaluate(*sets)["metrics"] == expected["metrics"]
    described = evaluate(*sets)["samples"]
    assert (described["folder"], described["images"], described["size"]) == ("samples", 40, [6, 6])
    again = FolderImages(save(tmp_path / "again", SAMPLES, "bmp"))
    again.check(progress=False)
    digest = hashlib.sha256(in_order(SAMPLES).tobytes()).hexdigest()
    assert again.sha256 == described["sha256"] == digest, "of the pixels, whatever the files are"
    assert np.array_equal(again[5:9], in_order(SAMPLES)[5:9])


def means(batch):
    """Features of one's own."""
    return batch.float().mean((2, 3)).double()


def test_features_of_one_s_own(sets, tmp_path, capsys):
    """In place of Inception's; the statistics in a reference file are Inception's, and are not used."""
    wrong = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "statistics.npz", in_order(REFERENCE), **wrong)
    expected = frechet_distance_of(in_order(SAMPLES), in_order(REFERENCE), means, progress=False)
    for reference in (sets[1], tmp_path / "statistics.npz"):
        command = ["evaluate", str(sets[0]), str(reference), "--features", "test_folders:means"]
        assert main([*command, "--json", "--quiet"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["metrics"].keys() == {"frechet_distance", "precision", "recall"}
        assert report["metrics"]["frechet_distance"] == pytest.approx(expected, rel=1e-6) and expected > 0
        assert report["extractor"] == {"name": "test_folders:means"}
    for name, message in (("nowhere:means", "--features: No module"), ("test_folders:no", "test_folders has no no")):
        assert main([*command[:3], "--features", name]) == 1
        assert message in capsys.readouterr().err


def test_settings_lie_beside_the_folder(evaluate, sets, tmp_path):
    (tmp_path / "samples.json").write_text('{"steps": 250}')
    assert evaluate(*sets)["settings"] == {"steps": 250}


def test_grey_and_transparent_images_are_seen_as_elsewhere(tmp_path):
    (tmp_path / "mixed").mkdir()
    Image.new("L", (6, 6), 100).save(tmp_path / "mixed" / "a.png")
    Image.new("RGBA", (6, 6), (255, 0, 0, 0)).save(tmp_path / "mixed" / "b.png")
    found = FolderImages(tmp_path / "mixed")
    found.check(progress=False)
    assert found[0:2].shape == (2, 6, 6, 3)
    assert (found[0:1] == 100).all() and (found[1:2] == 255).all()


def test_size_scales_and_crops_to_one_size(evaluate, sets, tmp_path):
    for index in range(3):
        Image.new("RGB", (20, 12), (index, 100, 0)).save(sets[0] / f"wide-{index}.png")
    found = evaluate(*sets, "--size", "6")
    assert found["samples"]["images"] == 43 and found["samples"]["size"] == [6, 6]
    assert found["samples"]["cropped"] == "to the centre, as ADM does"
    error = evaluate(*sets)
    assert "samples are of 2 sizes: 6 x 6 (40, such as " in error and "20 x 12 (3, such as " in error
    assert "wide-0.png" in error and "--size" in error


def test_what_the_user_can_put_right_is_one_line(evaluate, sets, tmp_path):
    files = [tmp_path / "samples.npz", tmp_path / "reference.npz"]
    assert "--size 6: a number of pixels, for folders" in evaluate(*files, "--size", "6")
    assert "--size 0" in evaluate(*sets, "--size", "0")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} has 0 image(s): statistics need at least 2" in evaluate(tmp_path / "empty", sets[1])
    (tmp_path / "empty" / "samples.npz").write_bytes(b"")
    assert "passed over in" in evaluate(sets[0], tmp_path / "empty") and ".npz (1)" in evaluate(
        tmp_path / "empty", sets[1]
    )
    Image.new("RGB", (6, 6)).save(tmp_path / "empty" / "a.png")
    assert "has 1 image(s)" in evaluate(tmp_path / "empty", sets[1])
    for name in ("broken.png", "cut.png"):
        (sets[1] / name).write_bytes(next(sets[1].rglob("*.png")).read_bytes()[:60])
    error = evaluate(*sets)
    assert f"2 of 27 images in {sets[1]} cannot be read" in error and "broken.png" in error and "cut.png" in error
    assert "no npz file or folder of images at" in evaluate(tmp_path / "none", sets[1])
