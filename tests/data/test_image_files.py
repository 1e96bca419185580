"""Which files of a folder are found, through links and without end."""

from pathlib import Path

import pytest

from hybriddit.data.image_files import files_under, passed_over, reasons_named, say


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names_under(folder, **kwargs):
    found = files_under(folder, **kwargs)
    return [path.relative_to(folder).as_posix() for path in found.images], dict(+found.passed)


def test_endings(tmp_path):
    names = ["a.AVIF", "a.bmp", "a.gif", "a.jfif", "a.jpeg", "a.jpg", "a.png", "a.ppm", "a.tif", "a.tiff", "a.webp"]
    touch(*(tmp_path / name for name in (*names, "b.heic", "b", "b.png.txt")))
    found = files_under(tmp_path)
    assert [path.name for path in found.images] == names
    assert {path.name for path in found.others} == {"b.heic", "b", "b.png.txt"}


def test_linked_folders_are_followed(tmp_path):
    root, other, third = (tmp_path / name for name in ("root", "other", "third"))
    touch(root / "a.png", other / "b.png", other / "deep" / "c.png", third / "d.png")
    (root / "link").symlink_to(other)
    (other / "deep" / "link").symlink_to("../../third")  # relative
    (root / "file.png").symlink_to(other / "b.png")
    assert names_under(root) == (["a.png", "file.png", "link/b.png", "link/deep/c.png", "link/deep/link/d.png"], {})


def test_every_folder_is_entered_once(tmp_path):
    """A picture has its own path, not a link's; links that lead back up, or above the folder, are not followed."""
    root, other = tmp_path / "root", tmp_path / "elsewhere" / "other"
    touch(root / "z" / "a.png", root / "m" / "b.png", other / "c.png", other.parent / "d.png", tmp_path / "e.png")
    for link, target in {
        root / "a": root / "z",  # before what it leads to, by name
        root / "m" / "self": root / "m",
        root / "m" / "up": root,
        root / "m" / "above": tmp_path,
        root / "more": other,
        root / "more again": other,
        other / "up": other.parent,
        other / "back": root / "z",
    }.items():
        link.symlink_to(target)
    images, passed = names_under(root)
    assert images == ["m/b.png", "more/c.png", "z/a.png"]
    assert passed == {"links back up": 4, "links to folders that are read elsewhere": 3}


def test_a_class_does_not_reach_the_folder_of_its_classes(tmp_path):
    classes, other = tmp_path / "classes", tmp_path / "other"
    touch(classes / "shoe" / "a.png", classes / "bag" / "b.png", other / "c.png")
    (classes / "shoe" / "all").symlink_to(classes)
    (classes / "shoe" / "bags").symlink_to(classes / "bag")
    (classes / "shoe" / "more").symlink_to(other)
    (other / "all").symlink_to(classes)
    assert names_under(classes / "shoe", inside=classes) == (
        ["a.png", "bags/b.png", "more/c.png"],
        {"links back up": 1, "links to folders that are read elsewhere": 1},
    )


def test_a_link_in_circles_is_a_broken_link(tmp_path):
    touch(tmp_path / "a.png")
    (tmp_path / "x").symlink_to("y")
    (tmp_path / "y").symlink_to("x")
    found = files_under(tmp_path)
    assert passed_over(found.others, found.passed, Path("set")) == ("passed over in set: broken links (2)")
    assert passed_over([], found.passed, Path("set")) is None


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_that_the_screen_cannot_show(encoding, monkeypatch):
    from io import BytesIO, TextIOWrapper

    screen = TextIOWrapper(written := BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", screen)
    say("caf\udce9.png")  # a byte that is no UTF-8, as Python keeps it in names
    screen.flush()
    assert written.getvalue() == b"caf\\udce9.png\n"


def test_files_that_are_left_out_are_named():
    """Up to ten of them, each on the same line."""
    skipped = {f"{number}.png": f"{number}.png is no image" for number in range(12)}
    line = reasons_named(skipped)
    assert line.startswith("0.png (is no image); 1.png (is no image); ") and line.endswith(
        "9.png (is no image); and 2 more"
    )
    assert reasons_named({"a.png": "it has no caption"}) == "a.png (it has no caption)"


def test_a_name_of_two_lines_is_said_in_one(capsys):
    say("passed over: new\nline.png")
    assert capsys.readouterr().out == "passed over: new\\nline.png\n"
