"""Labelled images: the crop, folders and their faults, MNIST's files."""

import gzip
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from hybriddit.data.class_cache import make_cache, read_index
from hybriddit.data.class_images import adm_crop, class_images, read_folder, read_pixels
from hybriddit.data.sources import open_class_data


def test_the_crop_is_adms():
    """At the size itself nothing is scaled; twice the size is halved by boxes; the centre is kept."""
    pixels = np.arange(8 * 12, dtype=np.uint8).reshape(8, 12)
    assert np.array_equal(np.array(adm_crop(Image.fromarray(pixels), 8)), pixels[:, 2:10])
    boxes = pixels.reshape(4, 2, 6, 2).mean((1, 3))
    assert np.abs(np.array(adm_crop(Image.fromarray(pixels), 4)) - boxes[:, 1:5]).max() <= 0.5
    assert adm_crop(Image.new("RGB", (5, 31)), 8).size == (8, 8), "smaller ones are enlarged"


@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize("sides", [(1, 1), (4, 90), (33, 32), (47, 130), (300, 11)])
def test_the_crop_is_adms_own_code(sides, size):
    """guided_diffusion's center_crop_arr, as published."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*sides, 3), np.uint8))
    found = np.array(adm_crop(image, size))
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    assert np.array_equal(found, array[y : y + size, x : x + size])


def test_classes_are_those_of_torchvisions_image_folder(folder):
    """On plain folders, without links and hidden files: the same images, labels and names."""
    for name in ("10", "9", "Zebra"):
        (folder / "apple" / "more" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "apple" / "more" / name / "a.PNG")
        (folder / name).mkdir()
        Image.new("RGB", (4, 4)).save(folder / name / "b.jpeg")
    paths, labels, classes = class_images(folder)
    expected = ImageFolder(folder)
    found = sorted((str(path), label) for path, label in zip(paths, labels, strict=True))
    assert classes == expected.classes and found == sorted(expected.samples)


def test_links_that_lead_in_circles_end(folder):
    for name in ("a", "b"):
        (folder / "apple" / name).symlink_to(folder, target_is_directory=True)
    assert len(class_images(folder)[0]) == 11, "links back up are not followed"


def test_what_is_passed_over_is_said(folder, tmp_path, capsys):
    """Linked folders in a class are read; what is passed over is told wherever classes are read."""
    (tmp_path / "other").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "other" / "a.tiff")
    (folder / "apple" / "more").symlink_to(tmp_path / "other")
    (folder / "apple" / "up").symlink_to(folder)
    for name in ("readme.md", ".hidden.png", "pear/a.heic", "pear/.hidden"):
        (folder / name).write_text("text")
    assert folder / "apple" / "more" / "a.tiff" in class_images(folder)[0]
    note = f"passed over in {folder}: hidden (2), .heic (1), .md (1), links back up (1)"
    read_folder(folder, (3, 8, 8))
    assert note in capsys.readouterr().out.splitlines()
    make_cache(folder, tmp_path / "cache", size=8)
    assert note in capsys.readouterr().out.splitlines()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.heic").touch()
    with pytest.raises(ValueError, match=r"no images in .*; passed over in .*: .heic \(1\)"):
        class_images(tmp_path / "none")


def test_pictures_that_look_the_same_are_the_same(tmp_path):
    for name, hidden in {"a": (255, 0, 255, 0), "b": (0, 0, 0, 0)}.items():
        (tmp_path / name).mkdir()
        Image.new("RGBA", (8, 8), hidden).save(tmp_path / name / "0.png", exif=b"Exif\0\0no")
    assert (read_folder(tmp_path, (3, 8, 8), progress=False).rows([0, 1])["images"] == 255).all()
    assert (read_folder(tmp_path, (1, 8, 8), progress=False).rows([0, 1])["images"] == 255).all()


def test_what_is_a_class(folder, tmp_path):
    """Links to folders are classes, hidden files and folders are nothing, and no class is empty."""
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "a.png").symlink_to(folder / "pear")  # named like an image
    (linked / "b").symlink_to(folder / "apple")
    for hidden in (linked / ".cache" / "0.png", linked / "._0.png", folder / "apple" / ".thumbs" / "0.png"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_text("no image")
    paths, labels, classes = class_images(linked)
    assert classes == ["a.png", "b"] and labels == [0] * 6 + [1] * 5
    assert paths[0] == linked / "a.png" / "0.png" and paths[-1] == linked / "b" / "4.png"
    (linked / "aa").mkdir()
    with pytest.raises(ValueError, match=r"aa has no images, and every subfolder is a class \(1 of 3 are empty\)"):
        class_images(linked)


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    """A link to nothing, an image too long to scale, and a file of a kind that PIL reads in part only."""
    for i in range(2):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{i}.PNG")
    (tmp_path / "link.png").symlink_to(tmp_path / "none.png")
    Image.new("L", (1, 101)).save(tmp_path / "long.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "dds.png", format="dds")
    data = bytearray((tmp_path / "dds.png").read_bytes())
    data[80:84] = bytes(4)  # its pixel format's flags
    (tmp_path / "dds.png").write_bytes(data)
    make_cache(tmp_path, tmp_path / "cache", size=8, progress=False)
    index = read_index(tmp_path / "cache")
    assert index["images"] == 2 and set(index["skipped"]) == {"link.png", "long.png", "dds.png"}
    assert "it is 1 x 101 pixels" in index["skipped"]["long.png"]


def test_a_folder_in_memory(folder, capsys):
    data = read_folder(folder, (3, 8, 8))
    assert len(data) == 9 and data.info.classes == ["apple", "pear"] and data.labels().tolist() == [0] * 4 + [1] * 5
    said = capsys.readouterr().out
    assert re.search(r"2 of 11 images are left out: \S+ \(.+\); \S+ \(.+\)\n", said)
    for says in (True, False):  # whether there is a bar or not
        read_folder(folder, (3, 8, 8), progress=False, says=says)
        assert ("2 of 11 images are left out" in capsys.readouterr().out) == says
    plain, labels = data.draw([0, 8], torch.tensor([False, False]), None)
    mirrored, _ = data.draw([0, 8], torch.tensor([False, True]), None)
    assert plain.shape == (2, 3, 8, 8) and plain.min() >= -1 and plain.max() <= 1 and labels.tolist() == [0, 1]
    assert torch.equal(mirrored[0], plain[0]) and torch.equal(mirrored[1], plain[1].flip(-1))


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def test_mnists_files(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4), np.uint8)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.array([0, 1, 2, 0, 1, 2], np.uint8)))
    data = open_class_data(tmp_path, (1, 4, 4))
    assert data.info.classes == ["0", "1", "2"] and data.labels().tolist() == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(data.rows([4])["images"][0, 0].numpy(), images[4])
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is damaged"):
        open_class_data(tmp_path, (1, 4, 4))
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    for data, reason in (
        (packed.read_bytes()[:-20], "ended before the end-of-stream"),
        (packed.read_bytes()[:30] + bytes(40), ""),
        (gzip.compress(idx(images)[:-1]), "invalid for input of size 95"),
        (gzip.compress(b"RIFF" + bytes(30)), "its header is of another format"),
        (gzip.compress(b""), ""),
    ):
        packed.write_bytes(data)
        with pytest.raises(ValueError, match=f"ubyte.gz is damaged or none of MNIST's files: .*{reason}") as error:
            open_class_data(tmp_path, (1, 4, 4))
        assert "\n" not in str(error.value)
    packed.write_bytes(gzip.compress(idx(images)))
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="no train-labels-idx1-ubyte"):
        open_class_data(tmp_path, (1, 4, 4))


def no_folder(folder, tmp_path):
    return open_class_data, (tmp_path / "none", (3, 8, 8)), "no folder at"


def empty_folder(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    return open_class_data, (tmp_path / "empty", (4, 8, 8)), "no images in"  # whatever the model takes


def nothing_readable(folder, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no image")
    return open_class_data, (tmp_path / "bad", (3, 8, 8)), "none of the 1 images in"


def image_beside_classes(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(folder / "stray.png")
    return class_images, (folder,), "stray.png belongs to no class"


def latents_from_images(folder, tmp_path):
    return open_class_data, (folder, (4, 8, 8)), "images have 1 or 3 channels, and the model takes 4"


def another_size(folder, tmp_path):
    make_cache(folder, tmp_path / "cache", size=8, progress=False)
    return (
        open_class_data,
        (tmp_path / "cache", (3, 16, 16)),
        "holds images of 3 x 8 x 8, and the model takes 3 x 16 x 16",
    )


@pytest.mark.parametrize(
    "case",
    [no_folder, empty_folder, nothing_readable, image_beside_classes, latents_from_images, another_size],
    ids=lambda case: case.__name__,
)
def test_what_cannot_be_used_is_told_in_a_line(case, folder, tmp_path):
    function, arguments, message = case(folder, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        function(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path):
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert np.array_equal(read_pixels(tmp_path / "deep.png", 8, 1)[0], levels // 256)
