"""Image files are opened as they were meant, and damaged ones are told in one line."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from hybriddit.images import Grid, flatten, open_image, read_record, save_grid, save_png


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


def png_chunk(name, data, sum_is_right=True):
    checksum = zlib.crc32(name + data) ^ (not sum_is_right)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def png(width, depth, colour, row, *chunks):
    """A PNG file of one row, with `chunks` before its pixels."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    return b"".join((start, *chunks, pixels, png_chunk(b"IEND", b"")))


def shape_on_nothing(hidden):
    """An opaque brown square on what is transparent, under which `hidden` (R, G, B) lies; and how it looks."""
    pixels = np.full((32, 32, 4), (*hidden, 0), np.uint8)
    pixels[8:24, 8:24] = (200, 100, 0, 255)
    seen = np.full((32, 32, 3), 255, np.uint8)
    seen[8:24, 8:24] = (200, 100, 0)
    return Image.fromarray(pixels), seen


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 0, 255)])
@pytest.mark.parametrize("ending", ["png", "webp", "tif", "gif"])
def test_what_is_transparent_is_white(ending, hidden, tmp_path):
    image, seen = shape_on_nothing(hidden)
    image.save(tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / f"a.{ending}")), seen)
    mask = open_image(tmp_path / f"a.{ending}", "L", "black")
    assert mask.getpixel((0, 0)) == 0 and mask.getpixel((16, 16)) == 118


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P"])
def test_every_mode_with_transparency(mode):
    """Grey 100 under full, no and half cover."""
    image = Image.fromarray(np.array([[[100, 255], [100, 0], [100, 128]]], np.uint8), "LA")
    if mode == "PA":
        alpha, image = image.getchannel("A"), image.convert("L").convert("P")
        image.putalpha(alpha)
    elif mode == "P":
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
        image.putpalette([100] * 9)
        image.info["transparency"] = bytes([255, 0, 128])
    else:
        image = image.convert("RGBA" if mode.startswith("R") else "LA").convert(mode)
    assert image.mode == mode
    np.testing.assert_allclose(np.asarray(flatten(image), int), [[[100] * 3, [255] * 3, [177] * 3]], atol=1)
    np.testing.assert_allclose(np.asarray(flatten(image, "L", "black"), int), [[100, 0, 50]], atol=1)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "seen"),
    [
        (1, 0, bytes([0b01000000]), [1], [0, 255]),  # 0 and 1, of which 1 is transparent
        (2, 0, bytes([0b01100000]), [1], [255, 170]),  # 1 and 2
        (4, 0, bytes([0x5A]), [5], [255, 170]),
        (8, 0, bytes([5, 85]), [5], [255, 85]),
        (16, 0, struct.pack(">HH", 300, 0x5500), [300], [255, 0x55]),
        (8, 2, bytes([1, 2, 3, 7, 7, 7]), [1, 2, 3], [255, 7]),
        (16, 2, struct.pack(">6H", 300, 500, 700, 0x700, 0x700, 0x700), [300, 500, 700], [255, 7]),
    ],
)
def test_a_png_with_one_transparent_colour(depth, colour, row, key, seen, tmp_path):
    """The colour is named in the levels of the file, whatever their depth."""
    chunk = png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    (tmp_path / "a.png").write_bytes(png(2, depth, colour, row, chunk))
    assert np.asarray(open_image(tmp_path / "a.png"))[0].tolist() == [[level] * 3 for level in seen]


def test_an_animation_is_its_first_frame_and_print_colours_are_converted(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for ending in ("gif", "png", "webp", "tif"):
        path = tmp_path / f"a.{ending}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert open_image(path).getpixel((4, 4))[2] < 5, ending
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert np.abs(np.array(open_image(tmp_path / "a.jpg"), int)[4, 4] - (255, 0, 0)).max() < 5


def test_levels_of_a_grey_map_are_scaled_to_its_range(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 1023\n" + struct.pack(">2H", 1023, 512))
    assert open_image(tmp_path / "a.pgm", "L").getdata()[0] == 255
    assert open_image(tmp_path / "a.pgm", "L").getdata()[1] in (127, 128)


@pytest.mark.parametrize(
    "levels",
    [np.full((2, 2), 0.5, np.float32), *(np.full((2, 2), level, np.int32) for level in (70000, 200, -1))],
)
def test_levels_of_no_known_range_are_refused(levels, tmp_path):
    Image.fromarray(levels).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif is damaged or no image: its levels are .* of no known range"):
        open_image(tmp_path / "a.tif")


BROKEN_EXIF = b"Exif\0\0\0\x08\0\2\1\x12\0\3"


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"eXIf", BROKEN_EXIF[6:]),
        png_chunk(b"eXIf", b"MM\0*", sum_is_right=False),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2 << 20))),  # more than PIL unpacks
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20))),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
        png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n8\nno hex"),
        png_chunk(b"tEXt", b"Comment\0text", sum_is_right=False),
        png_chunk(b"pHYs", b"\0"),
        png_chunk(b"gAMA", b""),
    ],
    ids=lambda chunk: chunk[4:8].decode(),
)
def test_broken_metadata_of_a_sound_png_is_ignored(chunk, tmp_path):
    (tmp_path / "a.png").write_bytes(png(2, 8, 0, bytes([5, 85]), chunk))
    assert np.asarray(open_image(tmp_path / "a.png", "L")).tolist() == [[5, 85]]
    assert read_record(tmp_path / "a.png") is None
    data = png(2, 8, 0, bytes([5]), chunk)  # a pixel is missing
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="a.png is damaged"):
        open_image(tmp_path / "a.png")


def test_a_turned_picture_is_turned_whatever_else_is_broken(tmp_path):
    turned = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"  # and its end is missing
    comment = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20)))
    (tmp_path / "a.png").write_bytes(png(2, 8, 0, bytes([5, 85]), comment, png_chunk(b"eXIf", turned)))
    assert np.asarray(open_image(tmp_path / "a.png", "L")).tolist() == [[5], [85]]


@pytest.mark.parametrize(
    "segment",
    [b"\xff\xe1" + BROKEN_EXIF, b"\xff\xe0JFIF\0", b"\xff\xe2MPF\0II*\0", b"\xff\xeeAdobe", b"\xff\xe2ICC_PROFILE\0"],
    ids=["exif", "jfif", "mpf", "adobe", "icc"],
)
def test_broken_metadata_of_a_sound_jpeg_is_ignored(segment, tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    pixels, data = np.asarray(open_image(path)), path.read_bytes()
    path.write_bytes(data[:2] + segment[:2] + struct.pack(">H", len(segment)) + segment[2:] + data[2:])
    np.testing.assert_array_equal(np.asarray(open_image(path)), pixels)


def test_broken_metadata_of_a_sound_webp_or_tiff_is_ignored(tmp_path):
    Image.new("RGB", (16, 8), "red").save(tmp_path / "a.webp", exif=BROKEN_EXIF, icc_profile=b"no", xmp=b"<no")
    assert open_image(tmp_path / "a.webp").size == (16, 8)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700], tags[700] = TiffImagePlugin.TiffTags.LONG, 6  # XMP, which is text
    Image.new("RGB", (16, 8), "red").save(tmp_path / "a.tif", tiffinfo=tags)
    assert open_image(tmp_path / "a.tif").size == (16, 8)


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
    with pytest.raises(FileNotFoundError, match="no image file .*none.png"):
        open_image(tmp_path / "none.png")


def test_a_record_that_is_no_json_is_told_in_one_line(tmp_path):
    info = PngInfo()
    info.add_text("hybriddit", "{")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match="the record in .*a.png is damaged"):
        read_record(tmp_path / "a.png")


@pytest.mark.parametrize(("side", "shown"), [(4, 96), (200, 200)])
def test_a_grid_shows_its_pictures_with_what_they_are(side, shown, tmp_path):
    """In columns, small ones as whole multiples of their size; names, captions and a title are drawn beside them."""
    greys = np.arange(6, dtype=np.uint8).reshape(3, 2) * 40 + 20  # rows x columns
    columns = [[Image.new("L", (side, side), int(grey)) for grey in column] for column in greys.T]
    captions = [["a red shoe", "a blue bag, and words that need another line or two " * 4, ""]] * 2

    def drawn(**changes):
        grid = Grid(**{"columns": columns, "captions": captions, "heads": ["teacher", "student"], **changes})
        save_grid(tmp_path / "samples" / "grid.png", grid, changes.get("title", "step 20"))
        return np.asarray(Image.open(tmp_path / "samples" / "grid.png")).astype(int)

    seen = drawn()
    assert seen.shape[1] == 2 * shown + 4
    places = {}
    for (y, x), grey in np.ndenumerate(greys):
        rows = (seen[:, x * (shown + 4) :][:, :shown] == grey).all(1).nonzero()[0]
        top = rows[0]
        assert rows.tolist() == list(range(top, top + shown))
        places[y, x] = top
    assert places[0, 0] == places[0, 1] and places[1, 0] - places[0, 0] == places[2, 0] - places[1, 0] > shown + 20
    plain = drawn(captions=[[""] * 3] * 2, heads=["", ""])
    for y, words in ((0, True), (1, True), (2, False)):
        assert (seen[places[y, 0] + shown : places[y, 0] + shown + 12] < 128).any() == words, "the caption"
    assert (seen[: places[0, 0], shown + 4 :] < 128).any(), "the second column's name"
    assert (plain[: places[0, 0], :60] < 128).any() and not (plain[: places[0, 0], shown + 4 :] < 128).any(), (
        "the title"
    )


def test_it_needs_no_torch():
    code = "import sys, hybriddit.strips_file, hybriddit.machine, hybriddit.generate, hybriddit.convert; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers"} & set(done.stdout.split())


def test_postscript_is_not_run(tmp_path):
    for number, start in enumerate(
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"\xc5\xd0\xd3\xc6" + bytes(28))
    ):
        path = tmp_path / f"{number}.png"
        path.write_bytes(start)
        with pytest.raises(ValueError, match=f"{number}.png is damaged or no image: PostScript"):
            open_image(path)
