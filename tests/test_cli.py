import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tiny_pipelines import TEXT_LENGTH, tiny_pipeline

from hybriddit.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_pipeline("flux_dev").save_pretrained(folder)
    return folder


@pytest.fixture
def config(teacher, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"""
model: {{path: {teacher}}}
hybrid: {{window: 3, map_rank: 4}}
data: {{prompts: [a red shoe], images: 2, height: 64, width: 64, steps: 1, max_sequence_length: {TEXT_LENGTH}}}
train: {{steps: 2, batch_size: 2, progress: false}}
output: {{folder: {tmp_path / "run"}, checkpoint_every: 1}}
""")
    return path


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_distill_then_generate_then_convert(teacher, config, tmp_path, capsys):
    assert main(["distill", str(config), "optim.lr=1e-2"]) == 0
    assert f"adapter saved to {tmp_path / 'run' / 'adapter'}" in capsys.readouterr().out
    assert main(["distill", str(config), "train.steps=3", "--resume"]) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()

    size = ["--height", "64", "--width", "64", "--steps", "2", "--max-sequence-length", str(TEXT_LENGTH)]
    prompt = ["--prompt", "a red shoe", "--seed", "3", *size]
    adapter = ["--adapter", str(tmp_path / "run" / "adapter")]
    assert main(["convert", "--model", str(teacher), *adapter, "--out", str(tmp_path / "hybrid")]) == 0
    assert main(["generate", "--model", str(teacher), *adapter, *prompt, "--out", str(tmp_path / "a.png")]) == 0
    assert main(["generate", "--model", str(tmp_path / "hybrid"), *prompt, "--out", str(tmp_path / "b.png")]) == 0
    assert "64 x 64 image saved" in capsys.readouterr().out
    assert main(["generate", "--model", str(teacher), *prompt, "--out", str(tmp_path / "dense.png")]) == 0
    one, other, dense = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("a", "b", "dense"))
    # a matrix product may round otherwise where the file lays a weight at another alignment: one grey level, no more
    assert one.shape == (64, 64, 3) and abs(one - other).max() <= 1
    assert abs(one - dense).max() > 8, "the adapter changes the image"


def test_convert_makes_a_fresh_hybrid(teacher, tmp_path):
    assert main(["convert", "--model", str(teacher), "--window", "5", "--out", str(tmp_path / "fresh")]) == 0
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "fresh")
    assert pipeline.transformer.config.hybrid_config["window"] == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["distill", "none.yaml"], "no config file at none.yaml"),
        (["distill", "CONFIG", "optim.lrr=1"], "unknown key optim.lrr: did you mean optim.lr?"),
        (["distill", "CONFIG", "model.path=/nowhere"], "no diffusers pipeline at '/nowhere'"),
        (["distill", "CONFIG", "model.path=''"], "model.path is empty"),
        (["distill", "CONFIG", "output.folder=null"], "output.folder is empty"),
        (["distill", "CONFIG", "data.prompts=none.txt"], "no prompt file at 'none.txt'"),
        (["distill", "CONFIG", "model.recipe=sd3"], "recipe 'sd3' is for a StableDiffusion3Pipeline"),
        (["distill", "CONFIG", "--resume"], "nothing to resume"),
        (["generate", "--model", "MODEL", "--prompt", "a", "--adapter", "/nowhere"], "no adapter folder /nowhere"),
        (["convert", "--model", "/nowhere", "--out", "x"], "no diffusers pipeline at '/nowhere'"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(arguments, message, teacher, config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"CONFIG": str(config), "MODEL": str(teacher)}
    assert main([names.get(argument, argument) for argument in arguments]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hybriddit: ")]
    assert len(error) == 1 and message in error[0]


def test_overrides_may_follow_an_option(config, monkeypatch):
    seen = []
    monkeypatch.setattr("hybriddit.training.distill.run", lambda config, resume: seen.append((config, resume)))
    assert main(["distill", str(config), "optim.lr=0.5", "--resume", "train.steps=7"]) == 0
    assert (seen[0][0].optim.lr, seen[0][0].train.steps, seen[0][1]) == (0.5, 7, True)


def test_a_wrong_call_exits_with_2(capsys):
    for arguments in (
        ["nonsense"],
        [],
        ["generate"],
        ["distill"],
        ["distill", "run.yaml", "--resume", "lr"],
        ["distill", "run.yaml", "--lr=1"],
    ):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2


@pytest.mark.parametrize("saved", [True, False])
def test_ctrl_c_says_how_to_go_on(config, tmp_path, capsys, monkeypatch, saved):
    def interrupted(*arguments, **kwargs):
        if saved:
            (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("hybriddit.training.distill.distill", interrupted)
    assert main(["distill", str(config)]) == 130
    assert ("--resume" in capsys.readouterr().err) == saved, "nothing is promised that --resume would refuse"


@pytest.mark.parametrize("arguments", [["--window", "0"], ["--window", "3", "--adapter", "somewhere"]])
def test_convert_takes_a_window_at_its_word(teacher, tmp_path, capsys, arguments):
    assert main(["convert", "--model", str(teacher), "--out", str(tmp_path / "out"), *arguments]) == 1
    assert "window" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_and_info(capsys):
    for command in ("convert", "distill", "generate", "info"):
        with pytest.raises(SystemExit) as exit:
            main([command, "--help"])
        assert exit.value.code == 0 and f"example: hybriddit {command}" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert f"torch         {torch.__version__.split('+')[0]}" in capsys.readouterr().out


def test_the_module_and_the_training_script_are_the_same_command(config, tmp_path):
    run = [str(config), "train.steps=1"]
    for number, command in enumerate(
        ([sys.executable, "-m", "hybriddit", "distill"], [sys.executable, "train/distill.py"])
    ):
        out = f"output.folder={tmp_path / str(number)}"
        subprocess.run(
            [*command, *run, out], cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    one, other = ((tmp_path / str(n) / "adapter" / "hybrid_adapter.safetensors").read_bytes() for n in (0, 1))
    assert one == other
