"""Files and folders are whole or as they were, whatever interrupts the writing."""

import errno
import fcntl
import os
import subprocess
import time

import pytest
import torch
from safetensors.torch import save_file

from hybriddit import files
from hybriddit.files import (
    filling,
    read_json,
    read_tensors,
    remove_left,
    replacing,
    replacing_folder,
    temporary_path,
    write_json,
    write_tensors,
)
from hybriddit.training.checkpoint import checkpoints, saving_checkpoint


def tree(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_replaced_file_is_the_new_one_or_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("old", "new"):
        with replacing(path) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "old", "nothing changes before the block has ended"
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"a.txt": "new"}


def test_what_others_still_write_is_left(tmp_path):
    """Of this machine what a process that is alive writes; of others, whose processes cannot be seen, for a day."""
    path, ended = tmp_path / "a.b.png", subprocess.Popen(["true"])
    ended.wait()
    own = temporary_path(path).name
    machine = own.split(".")[4]
    assert own == f".a.b.png.{machine}.{os.getpid()}.tmp" and len(machine) == 8
    other = "0" * 8
    kept = [own, f".a.b.png.{machine}.1.tmp", f".a.b.png.{other}.{ended.pid}.tmp", f".b.png.{machine}.{ended.pid}.tmp"]
    kept += ["a.b.png", ".a.b.png.tmp", f".a.b.png.{ended.pid}.tmp", f"a.b.png.{machine}.{ended.pid}.tmp"]
    left = [f".a.b.png.{machine}.{ended.pid}.tmp", f".a.b.png.{other}.{os.getpid()}.tmp"]
    for name in kept + left:
        (tmp_path / name).touch()
    yesterday = time.time() - 25 * 3600
    for name in (own, left[1]):
        os.utime(tmp_path / name, (yesterday, yesterday))
    remove_left([path, path.with_name("a.png"), tmp_path / "new" / "c.png"])
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    remove_left([])


def test_containers_do_not_take_their_processes_for_each_other_s(monkeypatch, tmp_path):
    """They may have the host's name, and number their processes alike."""
    names = {temporary_path(tmp_path / "a").name}
    monkeypatch.setattr(files.platform, "node", lambda: "other")
    names.add(temporary_path(tmp_path / "a").name)
    stat = os.stat
    space = os.stat_result([0, 7, *[0] * 8])
    monkeypatch.setattr(files.os, "stat", lambda path, **more: space if "/ns/" in str(path) else stat(path, **more))
    names.add(temporary_path(tmp_path / "a").name)
    assert len(names) == 3


def test_tensors_may_be_read_by_those_who_may_read_other_files(tmp_path):
    """safetensors makes files of mode 0600, which a group's other members or a server cannot read."""
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
        for writing, folder in ((replacing_folder, tmp_path / "b"), (filling, tmp_path / "c")):
            with writing(folder) as partial:
                (partial / "part").mkdir()
                save_file({"a": torch.zeros(1)}, partial / "part" / "a.safetensors")
    finally:
        os.umask(before)
    for path in ("a.safetensors", "b/part/a.safetensors", "c/part/a.safetensors"):
        assert (tmp_path / path).stat().st_mode & 0o777 == 0o640, path
    assert not list(tmp_path.rglob(".*"))


def test_a_replaced_folder_is_the_new_one_or_the_old_one(tmp_path):
    folder = tmp_path / "run" / "pipeline"
    for text in ("old", "new"):
        with replacing_folder(folder) as partial:
            (partial / "part").mkdir()
            (partial / "part" / f"{text}.txt").write_text(text)
            assert not (folder / "part" / "new.txt").exists()
    assert tree(tmp_path) == {"run/pipeline/part/new.txt": "new"}
    with pytest.raises(OSError, match="full"), replacing_folder(folder) as partial:
        (partial / "half.txt").write_text("half")
        raise OSError("the disk is full")
    assert tree(tmp_path) == {"run/pipeline/part/new.txt": "new"}
    assert [path.name for path in folder.parent.iterdir()] == ["pipeline"]


def test_what_a_killed_process_left_is_not_part_of_the_next_folder(tmp_path):
    for left in (".pipeline.partial", ".pipeline.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half.txt").write_text("half")
    with replacing_folder(tmp_path / "pipeline") as partial:
        (partial / "whole.txt").write_text("whole")
    assert tree(tmp_path) == {"pipeline/whole.txt": "whole"}
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_json_comes_back_and_damage_is_named(tmp_path):
    values = {"name": "赤い靴", "sizes": [1, 2.5, None]}
    write_json(tmp_path / "a.json", values)
    assert read_json(tmp_path / "a.json") == values
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"path": tmp_path})
    assert read_json(tmp_path / "a.json") == values, "what cannot be written leaves the old file"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    for text, message in (("{", "a.json is damaged or no JSON"), ("[1]", "a.json is damaged: it holds no JSON object")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / "a.json")


def test_tensors_come_back_and_a_changed_byte_is_seen(tmp_path):
    tensors = {"a": torch.randn(3, 2).T, "b": torch.arange(4, dtype=torch.int8), "c": torch.tensor(1.5).bfloat16()}
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors)
    found = read_tensors(path)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its checksum does not match"):
        read_tensors(path)


class Windows:
    """The `os` of a system where folders cannot be opened, and only files open for writing are flushed (simulated)."""

    name = "nt"

    def __init__(self):
        self.flushed = []

    def __getattr__(self, key):
        return getattr(os, key)

    def open(self, path, flags, *more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os.open(path, flags, *more)

    def fsync(self, descriptor):
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        self.flushed.append(os.fstat(descriptor).st_size)


def test_files_are_written_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    windows = Windows()
    monkeypatch.setattr(files, "os", windows)
    write_json(tmp_path / "a.json", {"a": 1})
    with replacing_folder(tmp_path / "folder") as partial:
        (partial / "part").mkdir()
        (partial / "part" / "b.txt").write_text("b")
    with filling(tmp_path / "filled") as partial:
        (partial / "c.txt").write_text("c")
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert tree(tmp_path) == {"a.json": '{\n  "a": 1\n}\n', "folder/part/b.txt": "b", "filled/c.txt": "c"}
    assert len(windows.flushed) == 2, "files are flushed there too"
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    with saving_checkpoint(
        tmp_path / "checkpoints", 1, {"w": parameter}, [torch.zeros(2)], optimizer, {}, 2
    ) as partial:
        (partial / "d.txt").write_text("d")
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_for_folders_is_written_to(number, tmp_path, monkeypatch):
    """As network shares on macOS."""

    def refused(descriptor, fsync=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_disk_that_fails_is_told(tmp_path, monkeypatch):
    """What a file's fsync says is never passed over, nor that a folder's has failed."""

    def failed(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failed)
    for path in (tmp_path, tmp_path / "a.txt"):
        (tmp_path / "a.txt").touch()
        with pytest.raises(OSError, match="Input/output error"):
            files.flush(path)


@pytest.mark.parametrize("writing", [replacing, replacing_folder, filling])
def test_a_full_disk_is_named_by_the_path(writing, tmp_path):
    """An error of a write, unlike one of opening, does not tell the file by itself."""
    target = tmp_path / "result"
    told = pytest.raises(OSError, match="No space left on device: .*/result")
    with told as found, writing(target), open("/dev/full", "w") as file:
        file.write("x" * 10_000)
    assert found.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="other") as found, writing(target):
        (tmp_path / "other").read_bytes()
    assert found.value.filename == str(tmp_path / "other")
