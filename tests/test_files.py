"""Files and folders are whole or as they were, whatever interrupts the writing."""

import pytest
import torch

from hybriddit.files import read_json, read_tensors, replacing, replacing_folder, write_json, write_tensors


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
