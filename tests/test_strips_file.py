"""Images that are written strip by strip: PIL reads what was given, and no one holds the whole."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybriddit import strips_file
from hybriddit.files import remove_left
from hybriddit.images import image_size, open_image, read_record
from hybriddit.info.contents import describe
from hybriddit.strips_file import add_preview, preview_path, write_strips

ROOT = Path(__file__).parents[1]
RECORD = {"prompt": 'a "red"\nshoe, 赤い靴', "seed": 3, "mask": None}


def picture(height, width):
    """Smooth, noisy and flat parts."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 256, (height, width))
    levels = np.stack([x * 255 // width, np.where(y % 20 < 10, noise, y), np.where(x < 9, 255, (x + y) % 256)], 2)
    return levels.astype(np.uint8)


def in_strips(pixels, rows):
    """Strips that are overwritten once the next is asked for."""
    for top in range(0, len(pixels), rows):
        strip = pixels[top : top + rows].copy()
        yield strip
        strip[:] = 0


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.TIFF"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (50, 37), (37, 50), (64, 1), (1, 64)])
def test_pil_reads_what_was_given_however_it_came(name, height, width, tmp_path, monkeypatch):
    monkeypatch.setattr(strips_file, "BAND", 2000)
    pixels, files = picture(height, width), []
    for rows in (1, 7, 13, height):
        assert write_strips(tmp_path / "new" / name, in_strips(pixels, rows), width, height, RECORD) is None
        files.append((tmp_path / "new" / name).read_bytes())
    assert len(set(files)) == 1 and os.listdir(tmp_path / "new") == [name]
    with Image.open(tmp_path / "new" / name) as image:
        assert (image.mode, image.size) == ("RGB", (width, height))
        np.testing.assert_array_equal(np.asarray(image), pixels)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "new" / name)), pixels)
    assert read_record(tmp_path / "new" / name) == RECORD
    wanted = {"kind": "image", "width": width, "height": height, "record": RECORD}
    assert describe(tmp_path / "new" / name) == wanted


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_without_a_record(name, tmp_path):
    pixels = picture(20, 30)
    write_strips(tmp_path / name, [pixels], 30, 20)
    assert read_record(tmp_path / name) is None
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), pixels)


def test_a_file_is_as_small_as_pils(tmp_path):
    """Of what looks like a photograph: within a tenth."""
    small = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(small).resize((512, 512), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    image.save(tmp_path / "pil.png")
    write_strips(tmp_path / "a.png", in_strips(pixels, 100), 512, 512)
    assert (tmp_path / "a.png").stat().st_size < 1.1 * (tmp_path / "pil.png").stat().st_size


@pytest.mark.parametrize(
    ("strips", "told"),
    [
        ([(10, 30), (9, 30)], "the strips have 19 rows, and the image 20"),
        ([(10, 30), (11, 30)], "more than the 20 rows"),
        ([(10, 30), (10, 29)], r"a strip is uint8 \(10, 29, 3\): it must be uint8 \[rows, 30, 3\]"),
    ],
)
def test_strips_of_another_image_leave_the_old_file(strips, told, tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(ValueError, match=told):
        write_strips(tmp_path / "a.png", [np.zeros((*shape, 3), np.uint8) for shape in strips], 30, 20)
    assert (tmp_path / "a.png").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.png"]


def test_what_no_file_holds_is_told_before_anything_is_made(tmp_path):
    def strips():
        raise AssertionError("asked for")
        yield

    with pytest.raises(ValueError, match=r"a.jpg must end in .png, .tif or .tiff"):
        write_strips(tmp_path / "a.jpg", strips(), 30, 20)
    with pytest.raises(ValueError, match="a TIFF file holds 4 GiB, and 40000 x 40000 pixels are more: give a .png"):
        write_strips(tmp_path / "a.tif", strips(), 40000, 40000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_disk_that_fills_up_is_one_line_with_the_path(name, tmp_path):
    (tmp_path / name).write_bytes(b"old")
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{name}'$") as caught:
            write_strips(tmp_path / name, in_strips(noise, 50), 400, 300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert (tmp_path / name).read_bytes() == b"old" and os.listdir(tmp_path) == [name]


def python(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_a_killed_process_leaves_no_half_file(tmp_path):
    program = """
import os, signal, sys
from pathlib import Path
import numpy as np
from hybriddit.strips_file import write_strips
def strips():
    for _ in range(20):
        yield np.random.default_rng(0).integers(0, 256, (100, 1000, 3), np.uint8)
    os.kill(os.getpid(), signal.SIGKILL)
write_strips(Path(sys.argv[1]), strips(), 1000, 4000)
"""
    assert python(program, tmp_path / "a.png").returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.stat().st_size > 1_000_000
    remove_left([tmp_path / "b.png"])
    assert left.exists()
    remove_left([tmp_path / "b.png", tmp_path / "a.png"])
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux")
def test_the_image_is_never_in_memory(tmp_path):
    """8192 x 8192 pixels are 192 MiB."""
    program = """
import re, sys
from pathlib import Path
import numpy as np
from hybriddit.strips_file import write_strips
def peak():  # getrusage would count the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
size = 8192
row = np.arange(size * 3).reshape(size, 3)
def strips():
    for top in range(0, size, 128):
        yield (row + np.arange(top, top + 128)[:, None, None]).astype(np.uint8)
next(strips())
before = peak()
write_strips(Path(sys.argv[1]), strips(), size, size, {"seed": 1})
from hybriddit.info.contents import describe
assert describe(Path(sys.argv[1])) == {"kind": "image", "width": size, "height": size, "record": {"seed": 1}}
print(peak() - before)
"""
    run = python(program, tmp_path / "a.png")
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 96 * 1024  # KiB
    assert image_size(tmp_path / "a.png") == (8192, 8192)
    with Image.open(preview_path(tmp_path / "a.png")) as preview:
        assert preview.size == (1024, 1024)


def test_a_large_image_has_a_preview_of_averages(tmp_path, monkeypatch):
    monkeypatch.setattr(strips_file, "PREVIEW_FROM", 100)
    monkeypatch.setattr(strips_file, "PREVIEW_SIDE", 50)
    monkeypatch.setattr(strips_file, "BAND", 3000)
    for height, width in ((101, 77), (77, 101), (150, 3)):
        pixels = picture(height, width)
        found = write_strips(tmp_path / "a.b.png", in_strips(pixels, 13), width, height)
        assert found == preview_path(tmp_path / "a.b.png") == tmp_path / "a.b.preview.jpg"
        Image.fromarray(pixels).reduce(3).save(tmp_path / "wanted.jpg", quality=90)
        preview, wanted = (np.asarray(Image.open(path)) for path in (found, tmp_path / "wanted.jpg"))
        np.testing.assert_array_equal(preview, wanted)
        assert max(preview.shape) <= 50
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.b.png")), pixels)
    assert write_strips(tmp_path / "c.png", in_strips(picture(100, 100), 13), 100, 100) is None


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_preview_that_did_not_fit_is_made_later(name, tmp_path, monkeypatch):
    for setting, value in {"PREVIEW_FROM": 100, "PREVIEW_SIDE": 50, "BAND": 3000}.items():
        monkeypatch.setattr(strips_file, setting, value)
    path, pixels = tmp_path / name, picture(150, 101)
    small = write_strips(path, in_strips(pixels, 13), 101, 150, RECORD)
    assert add_preview(path) is None
    wanted = small.read_bytes()
    small.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # however large it is
        assert add_preview(path) == small and small.read_bytes() == wanted

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="a.preview.jpg'$"):
        patch.setattr(Image.Image, "save", full)
        write_strips(path, in_strips(pixels[::-1], 13), 101, 150, RECORD)
    assert os.listdir(tmp_path) == [name], "no preview of the old image beside the new one"
    assert add_preview(path) == small and small.read_bytes() != wanted
    write_strips(tmp_path / f"few-{name}", [picture(100, 100)], 100, 100)
    assert add_preview(tmp_path / f"few-{name}") is None


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_what_hybriddit_made_is_read_however_large(name, tmp_path, monkeypatch):
    """And a stranger's file of more pixels than PIL opens is not."""
    pixels = picture(40, 50)
    write_strips(tmp_path / name, [pixels], 50, 40, RECORD)
    write_strips(tmp_path / f"stranger-{name}", [pixels], 50, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / name)), pixels)
    assert read_record(tmp_path / name) == RECORD and describe(tmp_path / name)["width"] == 50
    with pytest.raises(ValueError, match="exceeds limit of 1800 pixels"):
        open_image(tmp_path / f"stranger-{name}")


def test_how_long_a_file_takes_is_found_on_a_small_part(monkeypatch):
    """2048 x 16 pixels, in half a second; ten times as many by two threads."""
    moments = iter((3.0, 3.5))
    monkeypatch.setattr(strips_file.time, "perf_counter", lambda: next(moments))
    monkeypatch.setattr(strips_file, "THREADS", 2)
    assert strips_file.seconds_of_file(2048, 160) == pytest.approx(2.5)
