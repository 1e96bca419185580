"""Which bucket an image goes to, and a folder of mixed sizes in a cache."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from family_calls import latents_of
from PIL import Image, ImageOps
from runs import in_two_processes
from tiny_pipelines import FAMILIES, PROMPTS, text_setting, tiny_pipeline

from hybriddit.data import image_folder as module
from hybriddit.data.buckets import aspect_sizes, bucket_sizes, choose_bucket
from hybriddit.data.image_folder import count_buckets, image_folder
from hybriddit.data.shards import Processes

SIZES = [(32, 128), (48, 80), (64, 64), (80, 48), (128, 128)]
# (height, width) of the pictures of the folder below, and the bucket of each; "d" would be enlarged 3.2 times
PICTURES = {
    "a.png": ((64, 64), (64, 64)),
    "b.jpg": ((96, 160), (48, 80)),
    "c.png": ((300, 310), (128, 128)),
    "d.png": ((20, 20), None),
    "e.png": ((33, 60), (48, 80)),
    "f.png": ((70, 66), (64, 64)),
    "g.webp": ((50, 190), (32, 128)),
    "h.png": ((200, 120), (80, 48)),
    "i.png": ((96, 160), (48, 80)),
}


@pytest.mark.parametrize(("height", "width", "side"), [(1024, 1024, 16), (512, 512, 16), (768, 1344, 16), (64, 64, 8)])
def test_aspect_sizes_are_whole_tokens_of_about_the_same_area(height, width, side):
    sizes = aspect_sizes(height, width, side)
    assert sizes == sorted(set(sizes)) and (height, width) in sizes
    assert all(rows % side == columns % side == 0 for rows, columns in sizes)
    assert all(0.8 <= rows * columns / (height * width) <= 1 for rows, columns in sizes)
    assert {(columns, rows) for rows, columns in sizes} - set(sizes) <= {(width, height)}
    ratios = sorted(rows / columns for rows, columns in sizes)
    assert 1 / 4 <= ratios[0] < 0.28 and 3.6 < ratios[-1] <= 4
    assert max(high / low for low, high in zip(ratios, ratios[1:], strict=False)) < 1.4


def test_aspect_sizes_have_those_that_models_were_trained_on():
    assert {(512, 2048), (768, 1344), (832, 1216), (896, 1152), (1024, 1024)} <= set(aspect_sizes(1024, 1024, 16))
    assert {(256, 1024), (416, 608), (512, 512)} <= set(aspect_sizes(512, 512, 16))


@pytest.mark.parametrize(
    ("width", "height", "sizes", "size", "scale"),
    [
        (4000, 3000, [(512, 512), (512, 768), (768, 512)], (512, 768), 768 / 4000),  # keeps 8/9 and not 3/4
        (3000, 4000, [(512, 512), (512, 768), (768, 512)], (768, 512), 768 / 4000),
        (1000, 1010, [(512, 512), (1024, 1024)], (512, 512), 0.512),  # the largest that does not enlarge it
        (1030, 1100, [(512, 512), (1024, 1024)], (1024, 1024), 1024 / 1030),
        (4000, 2667, [(512, 768), (1024, 1520)], (1024, 1520), 1024 / 2667),  # equally good but for 1 %
        (600, 400, [(512, 768), (1024, 1520)], (512, 768), 1.28),
        (1050, 600, [(512, 512), (768, 1344)], (768, 1344), 1.28),  # rather enlarged than cut by 43 %
        (300, 300, [(512, 512), (1024, 1024)], (512, 512), 512 / 300),
    ],
)
def test_an_image_goes_where_the_least_of_it_is_lost(width, height, sizes, size, scale):
    for order in (sizes, sizes[::-1]):
        assert choose_bucket(width, height, order) == (size, pytest.approx(scale))


def test_a_large_image_goes_to_the_nearest_aspect_ratio():
    sizes, generator = aspect_sizes(1024, 1024, 16), np.random.default_rng(0)
    for width, height in generator.integers(2100, 5000, (300, 2)).tolist():
        (rows, columns), _ = choose_bucket(width, height, sizes)
        distances = [abs(math.log(height / width) - math.log(h / w)) for h, w in sizes]
        assert abs(math.log(height / width) - math.log(rows / columns)) < min(distances) + 0.021


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[64, 60]], 64, 64, 8), r"data.buckets must be of multiples of 8, .* got \[64, 60\]"),
        (("aspect", 60, 64, 8), "data.height must be a multiple of 8"),
        ((None, 64, 60, 8), "data.width must be a multiple of 8"),
    ],
)
def test_a_size_that_is_no_whole_number_of_tokens_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bucket_sizes(*arguments)


@pytest.fixture
def folder(tmp_path):
    folder, generator = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number, (name, (size, _)) in enumerate(PICTURES.items()):
        image = Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).resize(size[::-1])
        exif = Image.Exif()
        if name == "h.png":  # lies on its side
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(folder / name, exif=exif)
        (folder / name).with_suffix(".txt").write_text(PROMPTS[number % 4])
    return folder


def encode(pipeline, folder, **kwargs):
    size = {"height": 64, "width": 64, "steps": 2, "guidance_scale": 3.5, **text_setting(pipeline)}
    size |= {"buckets": SIZES, "batch_size": 2, "progress": False}
    return image_folder(pipeline, folder, **{**size, **kwargs})


def assert_rows_are_of(data, pipeline, family, folder):
    """Every row is what the VAE makes of its picture, scaled to cover its bucket and cut at the centre."""
    names = [name for name, (_, bucket) in PICTURES.items() if bucket]
    assert len(data) == len(names)
    for size, rows in data.buckets.items():
        assert [names[row] for row in rows] == [name for name in names if PICTURES[name][1] == size]
        found = data.rows(rows)["latents"]
        for row, latents in zip(rows, found, strict=True):
            with Image.open(folder / names[row]) as image:
                fitted = ImageOps.fit(ImageOps.exif_transpose(image), size[::-1], Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(fitted.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
            wanted = latents_of(family, pipeline.vae, pixels)
            torch.testing.assert_close(latents, wanted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_picture_is_encoded_at_its_bucket_s_size(family, pipelines, folder, tmp_path, capsys):
    pipeline = pipelines(family)
    data = encode(pipeline, folder, cache=tmp_path / "cache")
    assert_rows_are_of(data, pipeline, family, folder)
    said = capsys.readouterr().out
    assert "32 x 128 (1), 48 x 80 (3), 64 x 64 (2), 80 x 48 (1), 128 x 128 (1)" in said
    assert "1 of 8 images are smaller than their bucket and are enlarged" in said and "e.png" in said
    skipped = json.loads((tmp_path / "cache" / "skipped.json").read_text())
    assert list(skipped) == [str(folder / "d.png")]
    assert skipped[str(folder / "d.png")].startswith("it is 20 x 20 pixels, and its bucket 64 x 64 would")
    assert encode(pipeline, folder).content == data.content
    counts = {size: len(rows) for size, rows in data.buckets.items()}
    assert count_buckets(folder, SIZES) == counts, "told without decoding a picture"


def test_a_bucket_without_images_is_left_out_and_too_small_ones_are_all_refused(pipelines, folder):
    assert list(encode(pipelines("sd3"), folder, buckets=[(64, 64), (128, 8)]).buckets) == [(64, 64)]
    for make in (lambda: encode(pipelines("sd3"), folder, buckets=[(512, 512)], max_images=1), None):
        with pytest.raises(ValueError, match="none of the .*images in .* can be used"):
            make() if make else count_buckets(folder, [(512, 512)], max_images=1)


@pytest.fixture
def encoded(monkeypatch):
    """(name, size) of the pictures that are encoded from now on."""
    seen, read = [], module.read_image
    monkeypatch.setattr(
        module, "read_image", lambda path, *size: (seen.append((path.name, size)), read(path, *size))[1]
    )
    return seen


def test_a_cache_is_extended_to_buckets_and_to_other_ones(pipelines, folder, tmp_path, encoded):
    """What is of the same content, caption and size is kept, also from a set without buckets."""
    cache, pipeline = tmp_path / "cache", pipelines("flux_dev")
    encode(pipeline, folder, cache=cache, buckets=None)
    assert len(encoded) == 9 and {size for _, size in encoded} == {(64, 64)}
    encoded.clear()
    data = encode(pipeline, folder, cache=cache)
    assert sorted(encoded) == sorted((n, size) for n, (_, size) in PICTURES.items() if size not in (None, (64, 64)))
    assert_rows_are_of(data, pipeline, "flux_dev", folder)

    encoded.clear()
    before = {path: path.stat().st_mtime_ns for path in [cache, *cache.iterdir()]}
    again = encode(pipeline, folder, cache=cache, batch_size=3)
    assert not encoded and {path: path.stat().st_mtime_ns for path in before} == before
    assert (again.content, again.buckets) == (data.content, data.buckets)

    other = encode(pipeline, folder, cache=cache, buckets=[*SIZES[:4], (96, 96)])
    assert encoded == [("c.png", (96, 96))] and other.content != data.content
    encoded.clear()
    Image.new("RGB", (160, 96), "red").save(folder / "i.png")  # of the same shape
    shutil.copy(folder / "g.webp", folder / "f.webp")  # another picture in the middle
    (folder / "f.txt").write_text("a bag")  # a new caption for f.png, and that of f.webp
    edited = encode(pipeline, folder, cache=cache)
    assert sorted(encoded) == [("f.png", (64, 64)), ("f.webp", (32, 128)), ("i.png", (48, 80))]
    assert [len(rows) for rows in edited.buckets.values()] == [2, 3, 2, 1, 1]
    encoded.clear()
    assert len(encode(pipeline, folder, cache=cache, buckets=None)) == 10
    assert sorted(name for name, _ in encoded) == ["f.webp", "i.png"], "the others were encoded at first"


def share_of(rank, folder, cache):
    encode(tiny_pipeline("sd3"), folder, cache=cache, processes=Processes(rank, 2))


def test_two_processes_make_the_cache_of_one(folder, tmp_path):
    assert in_two_processes(share_of, folder, tmp_path / "two", output=tmp_path / "out.txt") == [0, 0]
    encode(tiny_pipeline("sd3"), folder, cache=tmp_path / "one")
    one, two = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two and len([name for name in one if name.startswith("latents-")]) == 6
    assert any(name.startswith("text-") for name in one)
