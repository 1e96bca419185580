"""Images in tars, as of WebDataset, are those of the unpacked files."""

import os
import tarfile
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import TEXT_LENGTH, tiny_pipeline

from hybriddit.data.captions import read_captions
from hybriddit.data.image_files import files_under, open_tars, passed_over
from hybriddit.data.image_folder import image_folder
from hybriddit.data.tars import tar_members
from hybriddit.images import open_image


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 64, 3), np.uint8)
    Image.fromarray(pixels).save(file := BytesIO(), format="PNG")
    return file.getvalue()


FILES = {
    "000/a.png": picture(0),
    "000/a.txt": b"a red shoe\n",
    "000/a.cls": b"7",
    "./b.png": picture(1),
    "./b.json": b'{"caption": "a blue bag", "width": 64}',
    "/c.png": picture(2),
    "d.png": picture(3)[:100],
    "d.txt": b"a bag",
    "._a.png": b"of a Mac",
    "../../e.png": picture(4),
}


def write_tar(path, files=FILES, **kwargs):
    with tarfile.open(path, **{"mode": "w", **kwargs}) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, BytesIO(data))
        entry = tarfile.TarInfo("link.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    return path


def test_members_are_read_in_place(tmp_path):
    members = {member.name: member for member in tar_members(write_tar(tmp_path / "0.tar"))}
    assert {name: member.read_bytes() for name, member in members.items()} == FILES
    assert all(member.stat().st_size == len(FILES[name]) for name, member in members.items())


def test_of_two_members_with_one_name_the_last_is_read(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.txt": b"old"})
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        entry = tarfile.TarInfo("a.txt")
        entry.size = 3
        tar.addfile(entry, BytesIO(b"new"))
    assert [member.read_bytes() for member in tar_members(tmp_path / "0.tar")] == [b"new"]


def test_a_hard_link_is_its_file(tmp_path):
    """As GNU tar keeps the second name of a file."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_text("a shoe")
    os.link(tmp_path / "files" / "a.txt", tmp_path / "files" / "b.txt")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "files", ".")
    passed = Counter()
    members = {member.name: member for member in tar_members(tmp_path / "0.tar", passed)}
    assert {name: member.read_bytes() for name, member in members.items()} == {
        "./a.txt": b"a shoe",
        "./b.txt": b"a shoe",
    }
    assert not passed


def test_the_end_of_a_tar(tmp_path):
    """One that is cut between two files looks like a whole one, and so does the first of several that are joined."""
    path = write_tar(tmp_path / "0.tar", {"a.png": picture(0), "b.png": picture(1)})
    whole, second = path.read_bytes(), tar_members(path)[1]
    for data, count, note in (
        (whole, 2, None),
        (whole[: second.start - 512], 1, "tars without an end mark, which may be cut (1)"),
        (whole + whole, 2, "tars that go on after their end mark (1)"),
    ):
        path.write_bytes(data)
        found = open_tars(files_under(tmp_path))
        said = passed_over(found.others, found.passed, tmp_path)
        assert len(found.images) == count and said.endswith(note or "sparse files in tars (1)")


def test_captions_are_beside_in_the_tar(tmp_path):
    write_tar(tmp_path / "0.tar")
    write_tar(tmp_path / "1.tar.gz", mode="w:gz")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "c.txt").write_text("not of the tar's c.png")
    found = read_captions(tmp_path)
    assert {path.relative_to(tmp_path).as_posix(): caption for path, caption in found.captions.items()} == {
        "a.png": None,
        "0.tar/b.png": "a blue bag",
        "0.tar/000/a.png": "a red shoe",
        "0.tar/c.png": None,
        "0.tar/d.png": "a bag",
    }
    assert found.notes == [
        f"passed over in {tmp_path}: hidden (2), .cls (1), .txt (1), compressed tars, which unpacked to .tar are read (1), "
        "links, devices and sparse files in tars (1)"
    ]


def test_a_tar_gives_what_its_files_give(tmp_path, capsys):
    for name, data in list(FILES.items())[:-2]:
        path = tmp_path / "files" / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "0.tar")
    size = {"height": 64, "width": 64, "steps": 1, "guidance_scale": 1.0, "max_sequence_length": TEXT_LENGTH}
    pipeline, sets = tiny_pipeline("sd3"), []
    for name in ("files", "tars"):
        cache = tmp_path / f"cache of {name}"
        sets.append(image_folder(pipeline, tmp_path / name, batch_size=1, progress=False, cache=cache, **size))
        again = image_folder(pipeline, tmp_path / name, batch_size=1, progress=False, cache=cache, **size)
        assert torch.equal(again.rows([0, 1])["latents"], sets[-1].rows([0, 1])["latents"])
    assert f"2 of 4 images in {tmp_path / 'tars'} are left out: " in capsys.readouterr().out
    rows = [data.rows(range(len(data))) for data in sets]
    order = [[int(row["latents"][i].sum() * 1000) for i in range(2)] for row in rows]
    assert sorted(order[0]) == sorted(order[1]) and len(sets[1]) == 2
    for name, values in rows[0].items():
        swapped = [order[1].index(number) for number in order[0]]
        assert torch.equal(values, rows[1][name][swapped])


@pytest.mark.parametrize("damage", ["cut in data", "cut in a header", "a broken header", "no tar", "empty"])
def test_a_damaged_tar_is_told_in_a_line(damage, tmp_path):
    path = write_tar(tmp_path / "0.tar")
    data, last = bytearray(path.read_bytes()), tar_members(path)[-1]
    if damage == "a broken header":
        data[last.start - 512 : last.start] = b"x" * 512
    end = {"cut in data": last.start + 10, "cut in a header": last.start - 100, "empty": 0}.get(damage, len(data))
    path.write_bytes(b"text" * 1000 if damage == "no tar" else data[:end])
    with pytest.raises(ValueError, match="0.tar is damaged or no tar: ") as caught:
        read_captions(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tar_that_is_gone_is_told_in_a_line(tmp_path):
    [member] = tar_members(write_tar(tmp_path / "0.tar", {"a.png": picture(0)}))
    assert open_image(member).size == (64, 70)
    (tmp_path / "0.tar").unlink()
    with pytest.raises(FileNotFoundError, match="no image file .*0.tar/a.png"):
        open_image(member)
