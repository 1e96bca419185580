import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_pipelines import TEXT_LENGTH, tiny_pipeline

import hybriddit
from hybriddit.cli import main
from hybriddit.info import describe
from hybriddit.training.run_config import JOBS, to_dict

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


def test_distill_then_generate_then_convert(teacher, config, tmp_path, capsys):
    assert main(["distill", str(config), "optim.lr=3e-3"]) == 0
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
        (["generate", "--model", "/none", "--prompt", "a", "--adapter", "nowhere"], "no adapter folder nowhere"),
        (["convert", "--model", "/none", "--adapter", "MODEL", "--out", "x"], "has no hybrid_config.json"),
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
        ["generate", "--model", "x"],
        ["generate", "--model", "x", "--prompt", "a", "--class-label", "1"],
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


def test_convert_follows_a_plan_and_says_nothing_when_quiet(teacher, tmp_path, capfd):
    (tmp_path / "plan.yaml").write_text("window: 3\nlayers: {'single_*': dense}\n")
    arguments = ["--model", str(teacher), "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    assert main(["convert", *arguments, "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    layers = describe(tmp_path / "out")["components"]["transformer"]["hybrid"]["layers"]
    assert layers == {"hybrid": 1, "dense": 2}
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_convert_leaves_what_it_finds_and_nothing_half_done(teacher, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, message in (("mine", "mine holds notes.txt already"), ("file", "file is a file")):
        # before the model is looked at
        assert main(["convert", "--model", "/nowhere", "--out", str(tmp_path / out)]) == 1
        assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == (tmp_path / "mine" / "notes.txt").read_text() == "mine"

    def interrupted(self, folder, **kwargs):
        (folder / "model_index.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers.DiffusionPipeline.save_pretrained", interrupted)
    (tmp_path / "empty").mkdir()
    for out in ("new", "empty"):
        assert main(["convert", "--model", str(teacher), "--out", str(tmp_path / out)]) == 130
    assert not (tmp_path / "new").exists() and not list((tmp_path / "empty").iterdir())


def test_an_interrupted_generate_keeps_the_images_it_finished(teacher, tmp_path, capsys, monkeypatch):
    from diffusers import FluxPipeline

    call, made = FluxPipeline.__call__, []

    def second_is_interrupted(self, *arguments, **kwargs):
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return call(self, *arguments, **kwargs)

    second_is_interrupted.__signature__ = inspect.signature(call)
    monkeypatch.setattr(FluxPipeline, "__call__", second_is_interrupted)
    size = ["--height", "64", "--width", "64", "--steps", "1", "--max-sequence-length", str(TEXT_LENGTH)]
    out = ["--num-images", "3", "--out", str(tmp_path / "a.png")]
    assert main(["generate", "--model", str(teacher), "--prompt", "a", *size, *out]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a-0001.png"]
    assert describe(tmp_path / "a-0001.png")["record"]["seed"] == 0


def test_the_demo_says_that_it_needs_a_text_length(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert main(["demo", "data.max_sequence_length=null", "--out", str(tmp_path / "demo")]) == 1
    assert "the demo needs data.max_sequence_length" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_help_and_info(capsys):
    for command in ("demo", "convert", "distill", "train", "generate", "info"):
        with pytest.raises(SystemExit) as exit:
            main([command, "--help"])
        assert exit.value.code == 0 and f"example: hybriddit {command}" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert f"torch         {torch.__version__.split('+')[0]}" in capsys.readouterr().out


@pytest.mark.parametrize("job", ["distill", "train"])
def test_help_lists_the_keys_of_the_config(job, capsys):
    """All of them, with their defaults and the first words of their classes' documentation."""
    with pytest.raises(SystemExit):
        main([job, "--help"])
    lines = capsys.readouterr().out.splitlines()
    found = {}
    for line in lines[
        lines.index("keys of the config file, with their defaults (docs/api.md says more of each):") + 1 :
    ]:
        if section := re.match("  ([a-z]+): (.+)", line):
            name = section[1]
        elif key := re.match(r"    ([a-z0-9_]+)=(.+?) {2,}(\S.+)", line):
            found[f"{name}.{key[1]}"] = yaml.safe_load(key[2])
    assert max(map(len, lines)) <= 120
    sections = {name: values for name, values in to_dict(JOBS[job]()).items() if name != "job" and values}
    assert found == {f"{name}.{key}": value for name, values in sections.items() for key, value in values.items()}
    assert "    lr=0.0001                     the learning rate." in lines


def python(*arguments, **kwargs):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, **kwargs)


def test_help_is_there_at_once():
    """Neither `import hybriddit` nor --help waits for torch."""
    for command, said in ([], "exit codes:"), (["distill"], "keys of the config"), (["train"], "keys of the config"):
        words = [*command, "--help"]
        code = f"import sys, hybriddit.cli\ntry: hybriddit.cli.main({words})\nfinally: print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        modules = done.stdout.splitlines()[-1].split()
        assert said in done.stdout and "hybriddit.cli" in modules
        slow = {"torch", "diffusers", "transformers", *([] if command else ["numpy"])}
        assert not slow & set(modules), command
    times = python("-X", "importtime", "-c", "import hybriddit").stderr.splitlines()
    [microseconds] = [line.split("|")[1] for line in times if line.split("|")[-1].strip() == "hybriddit"]
    assert int(microseconds) < 500_000


def test_version_and_completion(tmp_path):
    assert python("-m", "hybriddit", "--version").stdout == f"hybriddit {hybriddit.__version__}\n"
    script = python("-m", "hybriddit", "--print-completion", "bash").stdout
    (tmp_path / "completion").write_text(script)
    line = "source $0; COMP_WORDS=(hybriddit generate --neg); COMP_CWORD=2; _shtab_hybriddit; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", line, tmp_path / "completion"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "--negative-prompt"
    for shell in ("zsh", "tcsh"):
        assert "generate" in python("-m", "hybriddit", "--print-completion", shell).stdout


@pytest.mark.slow
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
