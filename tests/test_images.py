"""Image files are opened as they were meant, and damaged ones are told in one line."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hybriddit.images import open_image, opened, read_record, save_grid, save_png


def test_an_image_is_turned_upright(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row of the file is the right edge
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png")), np.rot90(pixels, -1))


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png", "L")), [[0, 0, 1, 128, 255]])
    assert open_image(tmp_path / "a.png").mode == "RGB"


def test_records_survive_and_an_image_without_one_has_none(tmp_path):
    image, record = Image.new("RGB", (8, 6), "red"), {"prompt": 'a "red"\nshoe, 赤い靴', "seed": 3, "mask": None}
    save_png(image, tmp_path / "new" / "a.png", record)
    save_png(image, tmp_path / "b.png")
    assert read_record(tmp_path / "new" / "a.png") == record
    assert read_record(tmp_path / "b.png") is None
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "b.png")), np.asarray(image))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_text("text"), lambda path: path.write_bytes(b"")])
def test_damage_is_one_line_with_the_file(damage, tmp_path):
    path = tmp_path / "a.png"
    save_png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), path, {"seed": 1})
    damage(path)
    for read in (open_image, read_record):
        with pytest.raises(ValueError, match="a.png is damaged or no image: ") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no image file .*none.png"), opened(tmp_path / "none.png"):
        pass


def test_a_grid_has_its_columns_side_by_side(tmp_path):
    greys = np.arange(6, dtype=np.uint8).reshape(3, 2) * 40  # rows x columns
    columns = [[Image.new("L", (4, 2), int(grey)) for grey in column] for column in greys.T]
    save_grid(tmp_path / "samples" / "grid.png", columns)
    seen = np.asarray(Image.open(tmp_path / "samples" / "grid.png"))
    np.testing.assert_array_equal(seen, greys.repeat(2, 0).repeat(4, 1))


def test_it_needs_no_torch():
    code = "import sys, hybriddit.images, hybriddit.machine, hybriddit.generate, hybriddit.convert; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers"} & set(done.stdout.split())
