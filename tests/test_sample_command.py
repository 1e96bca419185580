"""`hybriddit sample`: the npz, whole after kills and the same for any number of processes."""

import functools
import json
import os
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from runs import start, wait_for

from hybriddit import SiTPipeline, SiTTransformer2DModel, cli
from hybriddit import sample as module
from hybriddit.metrics import read_images
from hybriddit.pipelines.sit import SAMPLERS

COMMON = ["--class-balanced", "--steps", "3", "--guidance", "2", "--batch-size", "2", "--quiet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    transformer = SiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, in_channels=3, num_classes=3
    )
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("model")
    SiTPipeline(transformer, weights="EMA 0.9").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of four images."""
    monkeypatch.setattr(module, "PART", 4)


def arguments(model, out, *more, num=10):
    return [str(word) for word in ("sample", model, "--num", num, "--out", out, *COMMON, *more)]


def arrays(path):
    with np.load(path) as file:
        return file["arr_0"], file["arr_1"]


def test_every_image_is_the_pipelines_own(model, tmp_path):
    out = tmp_path / "new" / "samples.npz"
    assert cli.main(arguments(model, out, "--seed", 5)) == 0
    images, labels = arrays(out)
    assert images.shape == (10, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    np.testing.assert_array_equal(read_images(out), images)  # evaluate's reader, which maps the file
    pipeline = SiTPipeline.from_pretrained(model)
    for index in (0, 3, 9):
        options = {"guidance_scale": 2.0, "num_inference_steps": 3, "sampler": "sde-euler"}
        [image] = pipeline(int(labels[index]), generator=torch.Generator().manual_seed(5 + index), **options).images
        assert abs(np.asarray(image, int) - images[index]).max() <= 1, "to rounding: the batch is another"
    said = json.loads(out.with_suffix(".json").read_text())
    assert said["labels"] == "class-balanced" and said["images_of_a_class"] == {"smallest": 3, "largest": 4}
    assert (said["sampler"], said["steps"], said["guidance"], said["seed"]) == ("sde-euler", 3, 2.0, 5)
    assert (said["weights"], said["vae"], len(said["transformer_sha256"])) == ("EMA 0.9", None, 64)
    assert sorted(path.name for path in out.parent.iterdir()) == ["samples.json", "samples.npz"]


def test_the_command_knows_the_samplers(capsys):
    """The command line lists them without importing torch; another one is a wrong call."""
    assert cli.SAMPLERS == SAMPLERS
    with pytest.raises(SystemExit) as exit:
        cli.main(["sample", "model", "--out", "a.npz", "--random", "--sampler", "none"])
    assert exit.value.code == 2 and "invalid choice: 'none'" in capsys.readouterr().err


def test_random_labels_are_of_the_seed(model, tmp_path):
    labels = module.make_labels(3000, 3, False, 1)
    assert torch.equal(labels, module.make_labels(3000, 3, False, 1))
    assert not torch.equal(labels, module.make_labels(3000, 3, False, 2))
    assert torch.bincount(labels).min() > 900


def test_killed_and_resumed_is_unbroken(model, tmp_path, capsys, monkeypatch):
    assert cli.main(arguments(model, tmp_path / "whole.npz")) == 0
    sample, calls = module.sample, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(module, "sample", dies)
    out = tmp_path / "broken.npz"
    assert cli.main(arguments(model, out)) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not out.exists(), "whole or absent"
    folder = tmp_path / "broken.npz.parts"
    (folder / ".part-00001.safetensors.1.tmp").write_bytes(b"half")
    calls[:] = [1] * 10
    # other settings do not mix with what is there
    assert cli.main(arguments(model, out, "--seed", 1)) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"{folder} was made with seed 0, not 1: give another --out, or delete it" in error
    assert cli.main(arguments(model, out)) == 0
    assert len(calls) == 10 + 3, "the first part was kept"
    for ours, theirs in zip(arrays(out), arrays(tmp_path / "whole.npz"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not folder.exists()
    # once more: it is there already, and the parts of a run that was killed just before the end go
    folder.mkdir()
    capsys.readouterr()
    assert cli.main(arguments(model, out)) == 0
    assert "is there already, made with these settings" in capsys.readouterr().out and len(calls) == 13
    assert not folder.exists()
    assert cli.main(arguments(model, out, "--guidance", "3")) == 1
    assert "was made with guidance 2.0, not 3.0" in capsys.readouterr().err
    shutil.copytree(model, tmp_path / "moved")
    assert cli.main(arguments(tmp_path / "moved", out)) == 0 and len(calls) == 13
    other = SiTPipeline.from_pretrained(model)
    other.transformer.proj_out.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "moved")
    assert cli.main(arguments(tmp_path / "moved", out)) == 1
    assert "was made with transformer_sha256" in capsys.readouterr().err


def test_damaged_parts_are_made_again(model, tmp_path, capsys, monkeypatch):
    assert cli.main(arguments(model, tmp_path / "whole.npz")) == 0
    out = tmp_path / "damaged.npz"
    write = module.write_result
    monkeypatch.setattr(module, "write_result", lambda *args: None)
    assert cli.main(arguments(model, out)) == 0
    part = module.part_path(tmp_path / "damaged.npz.parts", 1)
    data = bytearray(part.read_bytes())
    data[-5] ^= 4
    part.write_bytes(data)
    monkeypatch.setattr(module, "write_result", write)
    capsys.readouterr()
    assert cli.main(arguments(model, out)) == 0
    assert capsys.readouterr().err.splitlines() == [f"{part} is damaged, and is made again"]
    np.testing.assert_array_equal(arrays(out)[0], arrays(tmp_path / "whole.npz")[0])


@pytest.mark.parametrize(
    "more, message",
    [
        (["--num", "0"], "--num must be 1 or more, not 0"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, not 0"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--out", "samples.npy"], "samples.npy must end in .npz"),
        (["--sampler", "euler", "--last-step", "mean"], "unknown option of sampler euler 'last_step'"),
        (["--diffusion", "none"], "unknown diffusion form 'none'"),
        (["--guidance-interval", "0.7", "0.2"], "a time interval is 0 <= start < end <= 1"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(more, message, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments(model, "samples.npz", *more)) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert cli.main(arguments("/nowhere", "samples.npz")) == 1
    assert "no SiTPipeline at '/nowhere'" in capsys.readouterr().err
    assert cli.main(arguments(model, "samples.npz", num=2)) == 0, "the mistake binds no later run"


def one_of(count, rank, port):
    """What torchrun sets for its processes; parts of four images, as here."""
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    module.PART = 4


def start_all(words, count, output):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(*words, output=output, before=functools.partial(one_of, count, rank, port)) for rank in range(count)]


def test_killed_by_the_system_and_resumed(model, tmp_path):
    out, said, words = tmp_path / "samples.npz", tmp_path / "out.txt", ["--steps", "30"]
    [process] = start_all(arguments(model, out, *words, num=120), 1, said)
    folder = tmp_path / "samples.npz.parts"
    wait_for(lambda: len(list(folder.glob("part-*"))) >= 2 or not process.is_alive(), 300)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not out.exists(), said.read_text()
    for path in (out, tmp_path / "whole.npz"):
        assert cli.main(arguments(model, path, *words, num=120)) == 0
    for ours, theirs in zip(arrays(out), arrays(tmp_path / "whole.npz"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_two_processes_make_what_one_makes(model, tmp_path):
    out, said = tmp_path / "two.npz", tmp_path / "out.txt"
    for process in start_all(arguments(model, out), 2, said):
        process.join(300)  # the first waits for the second
        assert process.exitcode == 0, said.read_text()
    assert cli.main(arguments(model, tmp_path / "one.npz")) == 0
    for ours, theirs in zip(arrays(out), arrays(tmp_path / "one.npz"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert json.loads(out.with_suffix(".json").read_text())["processes"] == 2
