"""Class sets in tars of WebDataset's layout: labels beside the images, read where they lie."""

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from test_tars import write_tar

from hybriddit.data.class_cache import make_cache, open_cache, read_index
from hybriddit.data.class_images import find_classes
from hybriddit.data.sources import open_class_data


def picture(seed, ending="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 9, 3), np.uint8)
    Image.fromarray(pixels).save(file := BytesIO(), format=ending)
    return file.getvalue()


FILES = {
    "n01/0001.jpg": picture(0, "JPEG"),
    "n01/0001.cls": b"2",
    "n01/0001.json": b'{"label": 7}',
    "0002.png": picture(1),
    "0002.cls": b"0\n",
    "0003.PNG": picture(2),
    "0003.json": b'{"label": 2, "name": "kite"}',
    "0004.png": picture(3),
    "0005.png": picture(4),
    "0005.json": b'{"caption": "a kite"}',
}


@pytest.fixture
def folder(tmp_path):
    """Two shards, one of them in a subfolder: labels 2, 0, 2 and then 1; two images have none."""
    folder = tmp_path / "set"
    (folder / "train").mkdir(parents=True)
    write_tar(folder / "0.tar", FILES)
    write_tar(
        folder / "train" / "1.tar", {"a.webp": picture(5, "WEBP"), "a.cls": b"1", "b.png": b"none", "b.cls": b"1"}
    )
    return folder


def test_labels_are_those_beside_the_images(folder, capsys):
    found = find_classes(folder)
    names = {path.relative_to(folder).as_posix(): label for path, label in zip(found.paths, found.labels, strict=True)}
    assert names == {
        "0.tar/0002.png": 0,
        "0.tar/0003.PNG": 2,
        "0.tar/n01/0001.jpg": 2,
        "train/1.tar/a.webp": 1,
        "train/1.tar/b.png": 1,
    }
    assert found.classes == ["0", "1", "2"]
    data = open_class_data(folder, (3, 9, 9), progress=False)
    assert data.info.classes == ["0", "1", "2"] and data.labels().tolist() == [0, 2, 2, 1]
    for row, name in enumerate(["0002.png", "0003.PNG"]):
        pixels = np.array(Image.open(BytesIO(FILES[name])))
        assert np.array_equal(data.rows([row])["images"][0].permute(1, 2, 0).numpy(), pixels[1:10])
    said = capsys.readouterr().out
    assert f"2 of 7 images have no label and are left out: {folder}/0.tar/0004.png, ..." in said
    assert ".json (2)" in said and "1 of 5 images are left out: " in said and "1.tar/b.png" in said


def test_a_cache_of_tars_knows_images_and_labels(folder, tmp_path, monkeypatch):
    make_cache(folder, tmp_path / "cache", size=9, shard_size=2, progress=False)
    index = read_index(tmp_path / "cache")
    assert index["images"] == 4 and list(index["skipped"]) == ["train/1.tar/b.png"]
    cached, loose = open_cache(tmp_path / "cache"), open_class_data(folder, (3, 9, 9), progress=False)
    for key, values in loose.rows(range(4)).items():
        assert torch.equal(values, cached.rows(range(4))[key])
    assert cached.info.classes == loose.info.classes

    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("hybriddit.data.class_cache.read_images", lambda *arguments: pytest.fail("images are read"))
        make_cache(folder, tmp_path / "cache", size=9, progress=False)
    assert {path: path.read_bytes() for path in before} == before
    write_tar(folder / "0.tar", {**FILES, "0003.PNG": picture(9)})
    make_cache(folder, tmp_path / "cache", size=9, progress=False)
    assert np.array_equal(
        open_cache(tmp_path / "cache").rows([1])["images"][0].permute(1, 2, 0),
        np.array(Image.open(BytesIO(picture(9))))[1:10],
    )
    write_tar(folder / "0.tar", {**FILES, "0002.cls": b"1"})
    with pytest.raises(ValueError, match="was made with other values of files"):
        make_cache(folder, tmp_path / "cache", size=9, progress=False)


@pytest.mark.parametrize("beside", ["images", "class folders"])
def test_two_layouts_in_one_folder_are_refused(beside, folder, tmp_path):
    (folder / "train" / "1.tar").unlink()
    place = folder if beside == "images" else folder / "train"
    Image.new("RGB", (9, 9)).save(place / "x.png")
    with pytest.raises(ValueError, match=rf"0.tar has labels of its own \(.cls\) and lies beside {beside}: "):
        find_classes(folder)
    write_tar(folder / "0.tar", {"a.txt": b"an archive without labels"})
    assert find_classes(folder).note == f"passed over in {folder}: .tar (1)"
    (folder / "0.tar").write_text("no tar")
    assert find_classes(folder).note == f"passed over in {folder}: .tar (1)"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.png": picture(0), "a.cls": b"kite"},
            "0.tar/a.cls: a label must be a whole number from 0 to 99999, not 'kite'",
        ),
        ({"a.png": picture(0), "a.cls": b"-1"}, "not '-1'"),
        ({"a.png": picture(0), "a.cls": b"9" * 30}, "from 0 to 99999"),
        ({"a.png": picture(0), "a.json": b'{"label": "kite"}'}, "not 'kite'"),
        ({"a.png": picture(0), "a.json": b'{"label": true}'}, "not 'True'"),
        ({"a.png": picture(0), "a.json": b"{"}, "0.tar/a.json: no JSON"),
        ({"a.png": picture(0), "a.cls": b"\xff\xfe1\0"}, "a.cls is no UTF-8 text"),
        ({"a.png": picture(0)}, "no image in the tars of .* has a label"),
        ({"a.txt": b"1"}, "no image in the tars of .* has a label"),
    ],
)
def test_labels_that_cannot_be_are_told_in_a_line(files, message, tmp_path):
    write_tar(tmp_path / "0.tar", files)
    with pytest.raises(ValueError, match=message) as error:
        open_class_data(tmp_path, (3, 9, 9), progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("mode", "ending"), [("w:gz", ".tar.gz"), ("w:gz", ".tgz"), ("w:xz", ".tar.xz")])
def test_a_compressed_tar_is_told_what_to_do_with(mode, ending, tmp_path):
    write_tar(tmp_path / f"0{ending}", FILES, mode=mode)
    with pytest.raises(
        ValueError, match=r"no images in .*; passed over in .*: compressed tars, which unpacked to .tar"
    ):
        find_classes(tmp_path)
    (tmp_path / f"0{ending}").rename(tmp_path / "0.tar")
    with pytest.raises(ValueError, match="0.tar is damaged or no tar: it is compressed: unpack it to a plain .tar"):
        find_classes(tmp_path)


def test_an_empty_json_or_another_type_is_no_label(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        {"a.png": picture(0), "a.json": json.dumps([3]).encode(), "b.png": picture(1), "b.cls": b"0"},
    )
    assert [path.name for path in find_classes(tmp_path).paths] == ["b.png"]
