"""Labelled images: the crop, folders and their faults, caches of pixels and of latents."""

import gzip
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_vae import tiny_vae

from hybriddit.data import class_images as module
from hybriddit.data.class_images import (
    adm_crop,
    class_images,
    make_cache,
    open_cache,
    open_set,
    read_folder,
    read_index,
)


@pytest.fixture
def folder(tmp_path):
    """Two classes of five images of different sizes; one of them is cut short, and a file is no image."""
    random = np.random.default_rng(0)
    for name in ("apple", "pear"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            pixels = random.integers(0, 256, (8 + 3 * i, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    cut = tmp_path / "images" / "apple" / "1.png"
    cut.write_bytes(cut.read_bytes()[:150])
    (tmp_path / "images" / "pear" / "9.jpg").write_text("no image")
    return tmp_path / "images"


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
    assert "2 of 11 images are left out" in capsys.readouterr().out
    plain, labels = data.draw([0, 8], torch.tensor([False, False]), None)
    mirrored, _ = data.draw([0, 8], torch.tensor([False, True]), None)
    assert plain.shape == (2, 3, 8, 8) and plain.min() >= -1 and plain.max() <= 1 and labels.tolist() == [0, 1]
    assert torch.equal(mirrored[0], plain[0]) and torch.equal(mirrored[1], plain[1].flip(-1))


def test_a_cache_of_pixels_is_the_folder(folder, tmp_path):
    make_cache(folder, tmp_path / "cache", size=8, shard_size=4, progress=False)
    expected = read_folder(folder, (3, 8, 8), progress=False)
    for memory in (False, True):
        data = open_set(tmp_path / "cache", (3, 8, 8), memory=memory)
        chosen = [7, 0, 3, 3, 8]
        assert torch.equal(data.rows(chosen)["images"], expected.rows(chosen)["images"])
        assert torch.equal(data.labels(), expected.labels()) and data.info == expected.info
    index = read_index(tmp_path / "cache")
    assert index["images"] == 9 and set(index["skipped"]) == {"apple/1.png", "pear/9.jpg"}
    pixels = expected.rows(range(9))["images"].double() / 127.5 - 1
    assert index["mean"] == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert index["std"] == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


def test_a_cache_of_latents_is_drawn_anew_each_time(folder, tmp_path):
    vae = tiny_vae()
    make_cache(folder, tmp_path / "cache", size=8, vae=vae, vae_name="here", batch_size=3, progress=False)
    data = open_cache(tmp_path / "cache")
    assert data.info.shape == (2, 4, 4) and data.info.vae == "here" and data.info.scaling_factor == 0.5
    pixels = read_folder(folder, (3, 8, 8), progress=False)
    rows, noise, straight = [5, 2], torch.randn(2, 2, 4, 4), torch.tensor([False, True])
    images, _ = pixels.draw(rows, straight, None)  # the second mirrored
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    expected = (posterior.mean + posterior.std * noise - 0.25) * 0.5
    found, labels = data.draw(rows, straight, noise)
    assert found.dtype == torch.float32 and labels.tolist() == pixels.labels()[rows].tolist()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)  # kept in fp16
    index, many = read_index(tmp_path / "cache"), torch.randn(400, 2, 4, 4)
    drawn, _ = data.draw([i % 9 for i in range(396)], torch.zeros(396, dtype=torch.bool), many[:396])
    assert index["std"] == pytest.approx(drawn.std((0, 2, 3)).tolist(), rel=0.05)


def test_a_stopped_cache_goes_on_and_processes_share_it(folder, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make_cache(folder, whole, size=8, shard_size=2, progress=False)
    save, saved = module.save_table, []

    def stop(path, tensors):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, tensors)

    monkeypatch.setattr(module, "save_table", stop)
    with pytest.raises(KeyboardInterrupt):
        make_cache(folder, parts, size=8, shard_size=2, progress=False)
    with pytest.raises(ValueError, match="is not finished: run scripts/cache_latents.py again"):
        open_cache(parts)
    monkeypatch.setattr(module, "save_table", lambda path, tensors: (saved.append(path), save(path, tensors)))
    for rank in (1, 0):
        assert not (parts / "index.json").exists(), "the first has made its own shards alone"
        make_cache(folder, parts, size=8, shard_size=2, rank=rank, processes=2, progress=False)
    assert len(saved) == len(set(saved)) == 5, "no shard twice; the last has no image"
    for path in whole.iterdir():
        if path.suffix == ".safetensors":
            one, other = load_file(path), load_file(parts / path.name)
            assert all(torch.equal(one[key], other[key]) for key in one)
        else:
            assert path.read_text() == (parts / path.name).read_text()


def test_a_damaged_shard_is_told(folder, tmp_path):
    make_cache(folder, tmp_path / "cache", size=8, progress=False)
    shard = tmp_path / "cache" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for memory in (False, True):
        with pytest.raises(ValueError, match="is damaged"):
            open_cache(tmp_path / "cache", memory=memory).rows([0])
    shard.unlink()
    with pytest.raises(ValueError, match="lacks shard-00000.safetensors"):
        open_cache(tmp_path / "cache")
    make_cache(folder, tmp_path / "cache", size=8, progress=False)
    assert len(open_cache(tmp_path / "cache", memory=True)) == 9, "what was deleted is made again"


@pytest.mark.parametrize("memory", [False, True])
def test_an_intact_shard_of_another_cache_is_told(folder, tmp_path, memory):
    make_cache(folder, tmp_path / "cache", size=8, progress=False)
    for path in folder.rglob("*.png"):
        if path.name != "1.png":
            Image.new("RGB", (8, 8)).save(path)
    make_cache(folder, tmp_path / "other", size=8, progress=False)
    name = "shard-00000.safetensors"
    (tmp_path / "cache" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ValueError, match=f"{name} is not the one of index.json"):
        open_cache(tmp_path / "cache", memory=memory)


@pytest.mark.parametrize("name", ["data.json", "index.json"])
@pytest.mark.parametrize("text", ["{}", "[]", '{"shape": ', "\xff"])
def test_damaged_records_of_a_cache_are_told(folder, tmp_path, name, text):
    make_cache(folder, tmp_path / "cache", size=8, progress=False)
    (tmp_path / "cache" / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} is damaged") as error:
        open_cache(tmp_path / "cache")
    assert "\n" not in str(error.value)


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def test_mnists_files(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4), np.uint8)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.array([0, 1, 2, 0, 1, 2], np.uint8)))
    data = open_set(tmp_path, (1, 4, 4))
    assert data.info.classes == ["0", "1", "2"] and data.labels().tolist() == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(data.rows([4])["images"][0, 0].numpy(), images[4])
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is damaged"):
        open_set(tmp_path, (1, 4, 4))
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="no train-labels-idx1-ubyte"):
        open_set(tmp_path, (1, 4, 4))


def no_folder(folder, tmp_path):
    return open_set, (tmp_path / "none", (3, 8, 8)), "no folder at"


def empty_folder(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    return open_set, (tmp_path / "empty", (4, 8, 8)), "no images in"  # whatever the model takes


def nothing_readable(folder, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no image")
    return open_set, (tmp_path / "bad", (3, 8, 8)), "none of the 1 images in"


def image_beside_classes(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(folder / "stray.png")
    return class_images, (folder,), "stray.png belongs to no class"


def latents_from_images(folder, tmp_path):
    return open_set, (folder, (4, 8, 8)), "images have 1 or 3 channels, and the model takes 4"


def another_size(folder, tmp_path):
    make_cache(folder, tmp_path / "cache", size=8, progress=False)
    return open_set, (tmp_path / "cache", (3, 16, 16)), "holds images of 3 x 8 x 8, and the model takes 3 x 16 x 16"


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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 0}, "size must be 1 or more, not 0"),
        ({"shard_size": -3}, "shard size must be 1 or more, not -3"),
        ({"batch_size": 0}, "batch size must be 1 or more, not 0"),
        ({"channels": 1}, "takes images of 3 channels and a multiple of 2 pixels, not of 1 and 8"),
        ({"size": 9}, "takes images of 3 channels and a multiple of 2 pixels, not of 3 and 9"),
    ],
)
def test_numbers_that_no_cache_can_have(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_cache(folder, tmp_path / "cache", **{"size": 8, "vae": tiny_vae(), **options}, progress=False)
    assert not (tmp_path / "cache").exists()


def test_a_cache_is_never_continued_otherwise(folder, tmp_path):
    make_cache(folder, tmp_path / "cache", size=8, vae=tiny_vae(), vae_name="a", progress=False)
    before = json.loads((tmp_path / "cache" / "data.json").read_text())
    for changed, message in (({"vae": tiny_vae(1)}, "vae_sha256"), ({"size": 16}, "size"), ({"vae": None}, "shape")):
        with pytest.raises(ValueError, match=f"other values of .*{message}"):
            make_cache(
                folder, tmp_path / "cache", **{"size": 8, "vae": tiny_vae(), "vae_name": "a", **changed}, progress=False
            )
    Image.new("RGB", (30, 30)).save(folder / "pear" / "0.png")
    with pytest.raises(ValueError, match="other values of files: use another --out"):
        make_cache(folder, tmp_path / "cache", size=8, vae=tiny_vae(), vae_name="a", progress=False)
    assert json.loads((tmp_path / "cache" / "data.json").read_text()) == before


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path):
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert np.array_equal(module.read_pixels(tmp_path / "deep.png", 8, 1)[0], levels // 256)
