"""Caches of class folders: pixels and latents, stopped, damaged, mixed up, and made otherwise."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_vae import tiny_vae

from hybriddit.data import class_cache as module
from hybriddit.data.class_cache import load_vae, make_cache, open_cache, read_index
from hybriddit.data.class_images import read_folder
from hybriddit.data.sources import open_class_data


def test_a_cache_of_pixels_is_the_folder(folder, tmp_path):
    make_cache(folder, tmp_path / "cache", size=8, shard_size=4, progress=False)
    expected = read_folder(folder, (3, 8, 8), progress=False)
    for memory in (False, True):
        data = open_class_data(tmp_path / "cache", (3, 8, 8), memory=memory)
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
    save, saved = module.save_shard, []

    def stop(path, tensors):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, tensors)

    monkeypatch.setattr(module, "save_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        make_cache(folder, parts, size=8, shard_size=2, progress=False)
    with pytest.raises(ValueError, match="is not finished: run `hybriddit cache` again"):
        open_cache(parts)
    monkeypatch.setattr(module, "save_shard", lambda path, tensors: (saved.append(path), save(path, tensors)))
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
    assert json.loads((tmp_path / "cache" / "data.json").read_text()) == before


def files_of(folder):
    """Content and time of the last change of all files, and of the folder, in which a new file shows."""
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in [folder, *folder.iterdir()]
    }


def test_a_finished_cache_is_left_alone(folder, tmp_path, monkeypatch, capsys):
    """With another batch size, another shard size, from another place, with a moved VAE: no image is opened."""
    make_cache(folder, tmp_path / "cache", size=8, vae=tiny_vae(), vae_name="a", shard_size=4, progress=False)
    before = files_of(tmp_path / "cache")
    monkeypatch.setattr(module, "read_images", lambda *arguments: pytest.fail("images are decoded"))
    monkeypatch.setattr(module.hashlib, "file_digest", lambda *arguments: pytest.fail("images are read"))
    folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    vae = {"vae": tiny_vae(), "vae_name": "b", "batch_size": 3}
    for rank in range(2):
        make_cache("moved", "cache", size=8, **vae, shard_size=5, rank=rank, processes=2, progress=rank == 0)
    assert files_of(tmp_path / "cache") == before
    assert "cache has shards of 4 images" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_not_waited_for(folder, tmp_path):
    os.mkfifo(folder / "apple" / "pipe.png")
    for _ in range(2):
        make_cache(folder, tmp_path / "cache", size=8, progress=False)
        assert "apple/pipe.png" in read_index(tmp_path / "cache")["skipped"]


def test_copied_images_are_known_by_their_content(folder, tmp_path, monkeypatch):
    make_cache(folder, tmp_path / "cache", size=8, progress=False)
    before = files_of(tmp_path / "cache")
    monkeypatch.setattr(module, "read_images", lambda *arguments: pytest.fail("images are decoded"))
    for path in folder.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    make_cache(folder, tmp_path / "cache", size=8, progress=False)
    assert files_of(tmp_path / "cache") == before


@pytest.mark.parametrize("memory", [False, True])
def test_the_shards_of_images_that_have_changed_are_made_again(folder, tmp_path, memory, capsys):
    cache = tmp_path / "cache"
    make_cache(folder, cache, size=8, shard_size=4, progress=False)
    before, path = files_of(cache), folder / "pear" / "2.png"  # of the third shard
    length = path.stat().st_size
    pixels = np.random.default_rng(5).integers(0, 256, (14, 12, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    assert path.stat().st_size == length
    make_cache(folder, cache, size=8, shard_size=4, progress=False)
    assert "pear/2.png has changed since" in capsys.readouterr().out
    data = open_cache(cache, memory=memory)
    expected = read_folder(folder, (3, 8, 8), progress=False)
    assert torch.equal(data.rows(range(9))["images"], expected.rows(range(9))["images"])
    now = files_of(cache)
    made = {path.name for path in before if now[path][1] != before[path][1]}
    assert made == {"index.json", "shard-00001.safetensors", "shard-00001.json"}


def test_a_stop_while_shards_are_made_again_leaves_an_unfinished_cache(folder, tmp_path, monkeypatch):
    make_cache(folder, tmp_path / "cache", size=8, shard_size=4, progress=False)
    Image.new("RGB", (8, 8)).save(folder / "apple" / "0.png")

    def stop(path, tensors):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "save_shard", stop)
        make_cache(folder, tmp_path / "cache", size=8, shard_size=4, progress=False)
    with pytest.raises(ValueError, match="is not finished"):
        open_cache(tmp_path / "cache")
    make_cache(folder, tmp_path / "cache", size=8, shard_size=4, progress=False)
    assert open_cache(tmp_path / "cache").rows([0])["images"].eq(0).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: shutil.copy(folder / "pear" / "0.png", folder / "apple" / "0a.png"), "apple/0a.png is new"),
        (lambda folder: (folder / "pear" / "3.png").unlink(), "pear/3.png is gone"),
        (lambda folder: (folder / "pear" / "3.png").rename(folder / "pear" / "z.png"), "pear/3.png is gone"),
    ],
    ids=["more", "fewer", "renamed"],
)
def test_a_folder_of_other_files_is_refused(change, named, folder, tmp_path):
    make_cache(folder, tmp_path / "cache", size=8, progress=False)
    before = files_of(tmp_path / "cache")
    change(folder)
    with pytest.raises(ValueError, match=f"other values of files .{named}.: use another --out"):
        make_cache(folder, tmp_path / "cache", size=8, progress=False)
    assert files_of(tmp_path / "cache") == before


def test_a_cache_of_version_0_1_is_known_by_names_and_lengths(folder, tmp_path, monkeypatch):
    """Its records do not have the images' digests."""
    cache = tmp_path / "cache"
    make_cache(folder, cache, size=8, progress=False)
    settings = json.loads((cache / "data.json").read_text())
    files = sorted((str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*.*"))
    settings["files"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    (cache / "data.json").write_text(json.dumps(settings))
    record = json.loads((cache / "shard-00000.json").read_text())
    del record["files"]
    (cache / "shard-00000.json").write_text(json.dumps(record))
    before = files_of(cache)
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_images", lambda *arguments: pytest.fail("images are decoded"))
        make_cache(folder, cache, size=8, progress=False)
    assert files_of(cache) == before
    Image.new("RGB", (30, 30)).save(folder / "pear" / "0.png")
    with pytest.raises(ValueError, match="other values of files: use another --out"):
        make_cache(folder, cache, size=8, progress=False)


def test_the_vae_may_be_a_variant_alone_and_must_not_be_scaled_per_channel(tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae", variant="fp16")
    assert torch.equal(next(load_vae(str(tmp_path / "vae")).parameters()), next(vae.parameters()))
    vae.register_to_config(latents_std=[0.5] * 4)
    vae.save_pretrained(tmp_path / "scaled")
    with pytest.raises(ValueError, match="scaled': the VAE has latents_std per channel"):
        load_vae(str(tmp_path / "scaled"))
