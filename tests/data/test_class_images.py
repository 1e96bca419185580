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
    return open_set, (tmp_path / "empty", (3, 8, 8)), "no images in"


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


def test_a_cache_is_never_continued_otherwise(folder, tmp_path):
    make_cache(folder, tmp_path / "cache", size=8, vae=tiny_vae(), vae_name="a", progress=False)
    before = json.loads((tmp_path / "cache" / "data.json").read_text())
    for changed, message in (({"vae": tiny_vae(1)}, "vae_sha256"), ({"size": 16}, "size"), ({"vae": None}, "shape")):
        with pytest.raises(ValueError, match=f"other values of .*{message}"):
            make_cache(
                folder, tmp_path / "cache", **{"size": 8, "vae": tiny_vae(), "vae_name": "a", **changed}, progress=False
            )
    assert json.loads((tmp_path / "cache" / "data.json").read_text()) == before
