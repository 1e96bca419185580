"""The captions of a folder of images: the places they are in, and what is left out or passed over."""

import json
import os

import pytest
from PIL import Image

from hybriddit.data.captions import read_captions
from hybriddit.data.image_folder import captioned_images


@pytest.fixture
def images(tmp_path):
    """Writes images under a folder; returns the folder."""

    def write(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        return tmp_path

    return write


def captions_of(folder):
    return {path.relative_to(folder).as_posix(): caption for path, caption in captioned_images(folder).items()}


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


LAYOUTS = {
    "beside, .txt": ({"train/a.txt": " a cat,\r\nasleep\n"}, "a cat, asleep"),
    "beside, .TXT": ({"train/a.TXT": "a cat"}, "a cat"),
    "beside, .caption": ({"train/a.caption": "a cat"}, "a cat"),
    "beside, .json": ({"train/a.json": '{"caption": ["a cat", null]}'}, "a cat"),
    "a text beside comes before a .json": ({"train/a.json": '{"text": "a dog"}', "train/a.txt": "a cat"}, "a cat"),
    "a .json without": ({"train/a.json": '{"width": 8}'}, None),
    "a table at the root": ({"metadata.jsonl": jsonl({"file_name": "train/a.png", "text": "a cat"})}, "a cat"),
    "a split's own table": ({"train/metadata.jsonl": jsonl({"file_name": "a.png", "caption": "a cat"})}, "a cat"),
    "a table beside": ({"tables/metadata.jsonl": jsonl({"file_name": "../train/a.png", "text": "a cat"})}, "a cat"),
    "csv": ({"metadata.csv": 'file_name,text\r\ntrain/a.png,"a cat, asleep"\r\n'}, "a cat, asleep"),
    "csv of Excel": ({"train/metadata.csv": "\ufeffFile_Name,Prompt\na.png,a cat\n\n"}, "a cat"),
    "written on Windows": ({"metadata.csv": "file_name,text\ntrain\\a.png,a cat\n"}, "a cat"),
    "dots in the name": ({"metadata.csv": "file_name,text\n./train/./a.png,a cat\n"}, "a cat"),
    "other separators": (
        {"metadata.jsonl": '{"file_name": "train/a.png", "text": "x\u2028y\x85z"}\n\n'},
        "x\u2028y\x85z",
    ),
    "other separators beside": ({"train/a.txt": "\ufeffx\u2028y\x0cz\n"}, "x\u2028y\x0cz"),
    "the table comes first": (
        {"metadata.csv": "file_name,text\ntrain/a.png,a cat\n", "train/a.txt": "a dog", "train/a.caption": "a hen"},
        "a cat",
    ),
    "the nearest table comes first": (
        {
            "metadata.jsonl": jsonl({"file_name": "train/a.png", "text": "a dog"}),
            "train/metadata.csv": "file_name,text\na.png,a cat\n",
        },
        "a cat",
    ),
    "metadata.jsonl comes before metadata.csv": (
        {
            "metadata.csv": "file_name,text\ntrain/a.png,a dog\n",
            "metadata.jsonl": jsonl({"file_name": "train/a.png", "text": "a cat"}),
        },
        "a cat",
    ),
    ".txt comes before .caption": ({"train/a.caption": "a dog", "train/a.txt": "a cat"}, "a cat"),
    "null, then beside": (
        {"metadata.jsonl": jsonl({"file_name": "train/a.png", "text": None}), "train/a.txt": "a cat"},
        "a cat",
    ),
    "null": ({"metadata.jsonl": jsonl({"file_name": "train/a.png", "text": None})}, None),
    "blank": ({"metadata.jsonl": jsonl({"file_name": "train/a.png", "text": " \u3000"})}, None),
    "blank in csv": ({"metadata.csv": "file_name,text\ntrain/a.png,\n"}, None),
    "blank beside": ({"train/a.txt": "\n"}, None),
    "NaN": ({"metadata.jsonl": '{"file_name": "train/a.png", "text": NaN}'}, None),
    "null as pandas writes it": ({"metadata.csv": "file_name,text\ntrain/a.png,None\n"}, None),
    "a short row": ({"metadata.csv": "file_name,text\ntrain/a.png\n"}, None),
    "null beside a caption": (
        {"metadata.jsonl": jsonl({"file_name": "train/a.png", "text": None, "caption": "a cat"})},
        "a cat",
    ),
    "a list of JSON in csv": ({"metadata.csv": 'file_name,text\ntrain/a.png,"[""a cat"", null]"\n'}, "a cat"),
    "a list of Python in csv": ({"metadata.csv": "file_name,text\ntrain/a.png,['a cat']\n"}, "a cat"),
    "a list of NumPy in csv": ({"metadata.csv": "file_name,text\ntrain/a.png,\"['a cat'\n 'a cat']\"\n"}, "a cat"),
    "an empty list in csv": ({"metadata.csv": "file_name,text\ntrain/a.png,[]\n"}, None),
    "a list of nothing in csv": ({"metadata.csv": "file_name,text\ntrain/a.png,[None]\n"}, None),
    "an escape that is none": ({"metadata.csv": "file_name,text\ntrain/a.png,['\\x' 'y']\n"}, "['\\x' 'y']"),
    "brackets alone": ({"metadata.csv": "file_name,text\ntrain/a.png,[a cat] [asleep]\n"}, "[a cat] [asleep]"),
    "a table in upper case": ({"METADATA.CSV": "file_name,text\ntrain/a.png,a cat\n"}, "a cat"),
    "an empty list": ({"metadata.jsonl": jsonl({"file_name": "train/a.png", "text": []})}, None),
    "a list of nothing": ({"metadata.jsonl": jsonl({"file_name": "train/a.png", "text": [None, " "]})}, None),
    "a list with one": ({"metadata.jsonl": jsonl({"file_name": "train/a.png", "text": [None, "a cat", ""]})}, "a cat"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_captions_are(layout, images):
    folder, (files, caption) = images("train/a.png"), LAYOUTS[layout]
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="")
    assert captions_of(folder) == {"train/a.png": caption}


def test_paths_are_the_same_through_any_name_of_the_folder(images, monkeypatch):
    folder = images("train/a.png", "b.png")
    names = ("train/a.png", folder / "b.png")  # absolute, as some tools write them
    (folder / "metadata.jsonl").write_text(jsonl(*({"file_name": str(name), "text": "a cat"} for name in names)))
    monkeypatch.chdir(folder.parent)
    for name in (folder, folder.name, f"../{folder.parent.name}/{folder.name}", f"{folder.name}/train/.."):
        assert list(captioned_images(name).values()) == ["a cat", "a cat"]


@pytest.mark.parametrize(("here", "listed"), [("caf\u00e9.png", "cafe\u0301.png"), ("cafe\u0301.png", "caf\u00e9.png")])
def test_accents_are_spelled_in_two_ways(here, listed, images):
    """As macOS writes them, and as others do."""
    folder = images(here)
    (folder / "metadata.jsonl").write_text(jsonl({"file_name": listed, "text": "a cat"}))
    found = read_captions(folder)
    assert list(found.captions.values()) == ["a cat"] and not found.notes


def test_one_of_several_captions_is_drawn(images):
    """By the image's path and the seed: whatever else is there, whether in a list or in rows of their own."""
    names = [f"{i:02d}.png" for i in range(40)]
    folder, texts = images(*names), ["a cat", None, "a tabby", "", "an animal"]
    table = folder / "metadata.jsonl"
    table.write_text(jsonl(*({"file_name": name, "text": texts} for name in names)))
    first = captions_of(folder)
    assert set(first.values()) == {"a cat", "a tabby", "an animal"}
    assert (
        captions_of(folder)
        == first
        != {path.name: caption for path, caption in captioned_images(folder, seed=1).items()}
    )
    table.write_text(jsonl(*({"file_name": name, "text": text} for text in texts for name in reversed(names[7:]))))
    for name in names[:7]:
        (folder / name).unlink()
    assert captions_of(folder) == {name: first[name] for name in names[7:]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metadata.jsonl",
            jsonl({"file_name": "a.png", "text": "x"}, {"file_name": "a.png"}),
            "line 2: it has no text or",
        ),
        ("metadata.jsonl", '\n{"file_name": "a.png", "text": "x"', "metadata.jsonl, line 2: no JSON"),
        ("metadata.jsonl", jsonl({"file_name": "a.png", "text": 3}), "line 1: a caption must be text, not 3"),
        ("metadata.jsonl", jsonl({"file_name": "a.png", "text": {"en": "x"}}), 'must be text, not {"en": "x"}'),
        ("metadata.jsonl", jsonl({"file_name": "a.png", "text": ["x", ["y"]]}), r'must be text, not \["y"\]'),
        ("metadata.jsonl", jsonl({"file_name": "a.png", "text": "\ud83d"}), "half of a character"),
        ("metadata.jsonl", jsonl({"file_name": 3, "text": "x"}), "line 1: a file_name must be text, not 3"),
        ("metadata.jsonl", jsonl(["a.png", "x"]), "line 1: not of the form"),
        ("metadata.csv", "file_name,text\na.png,a cat, asleep\n", "metadata.csv, line 2: it has more columns"),
        (
            "metadata.csv",
            "file_name;text\na.png;a cat\n",
            "metadata.csv, line 2: it has no file_name, only file_name;text",
        ),
        (
            "metadata.csv",
            "file_name,words\na.png,a cat\n",
            "line 2: it has no text or caption or prompt, only file_name, words",
        ),
        ("train/metadata.jsonl", "\ufeff\ufeff{}", "metadata.jsonl, line 1: no JSON"),
    ],
)
def test_a_table_that_cannot_be_used_is_told_in_a_line(name, text, message, images):
    folder = images("a.png", "train/b.png")
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_captions(folder)
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "cp1252"])
def test_other_encodings(encoding, images):
    """A table is refused, the image of a caption file is left out."""
    folder = images("a.png", "b.png")
    (folder / "a.txt").write_bytes("un café".encode(encoding))
    (folder / "b.txt").write_text("a cat")
    found = read_captions(folder)
    assert list(found.captions.values()) == [None, "a cat"]
    assert "a.txt is no UTF-8 text" in found.reasons[folder / "a.png"] and len(found.reasons) == 1
    (folder / "metadata.csv").write_bytes("file_name,text\nb.png,un café\n".encode(encoding))
    with pytest.raises(ValueError, match=r"metadata.csv is no UTF-8 text"):
        read_captions(folder)


def test_what_tables_list_elsewhere_is_said(images):
    folder = images("a.png")
    names = ("a.png", "b.png", "photo.heic", "../a.png", "/etc/passwd", "..\\x.png", "C:\\a.png", "x/../../a.png")
    (folder / "metadata.jsonl").write_text(jsonl(*({"file_name": name, "text": "a cat"} for name in names)))
    found = read_captions(folder)
    assert found.captions == {folder / "a.png": "a cat"}
    table = folder / "metadata.jsonl"
    assert found.notes == [
        f"listed in {table}, but not there or not read as an image (3): b.png, photo.heic, C:\\a.png",
        f"listed in {table}, but outside of {folder} (4): ../a.png, /etc/passwd, ..\\x.png, ...",
    ]


def test_captions_that_differ_are_said(images):
    folder = images("a.png", "b.png")
    for name, text in {"a.txt": "a cat", "a.caption": "a dog", "b.txt": "a cat", "b.caption": "a  cat\n"}.items():
        (folder / name).write_text(text)
    assert read_captions(folder).notes == [
        f"captions in several places that differ, of which the first is taken (1): {folder / 'a.png'}"
    ]


def test_what_is_passed_over_is_said(images):
    folder = images("a.png", "more/b.TIF", ".hidden.png", ".cache/c.png")
    (folder / "link").symlink_to(folder / "nowhere")
    (folder / "up").symlink_to(folder)
    for name in ("a.txt", "more/b.caption", "c.heic", "more/d.HEIC", "readme.txt", "LICENSE"):
        (folder / name).write_text("text")
    found = read_captions(folder)
    assert captions_of(folder) == {"a.png": "text", "more/b.TIF": "text"}
    assert found.notes == [
        f"passed over in {folder}: .heic (2), hidden (2), .txt (1), broken links (1), "
        "links back up (1), without an ending (1)"
    ]
    for name in ("a.png", "more/b.TIF"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"no images in .*: .png, .* are read; passed over in .*: .heic \(2\), .txt"):
        captioned_images(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_not_waited_for(images):
    folder = images("a.png")
    os.mkfifo(folder / "a.txt")
    found = read_captions(folder)
    assert "a.txt is no file" in found.reasons[folder / "a.png"]
    os.mkfifo(folder / "more.tar")
    with pytest.raises(ValueError, match="more.tar is damaged or no tar: it is no file"):
        read_captions(folder)
