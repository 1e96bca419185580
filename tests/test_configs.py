import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tiny_pipelines import TEXT_LENGTH, tiny_pipeline

import hybriddit
from hybriddit.data.prompts import read_prompts
from hybriddit.models import families
from hybriddit.models.family import denoiser
from hybriddit.training.distill import make_student, run
from hybriddit.training.dry_run import plan_model
from hybriddit.training.run_config import DistillConfig, load_config, to_dict

ROOT = Path(__file__).parents[1]
RECIPES = {name for family in families() for name in family.recipes}
SHIPPED = sorted(ROOT.glob("configs/distill/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = hybriddit.load_config(path)
    assert isinstance(config.hybrid, hybriddit.HybridConfig)
    assert config.model.path and config.output.folder and config.model.recipe in RECIPES
    assert read_prompts(config.data.prompts)
    assert f"configs/distill/{path.name}" in path.read_text()  # the command in its head


def test_every_family_has_a_config():
    assert {
        "flux_dev",
        "flux_schnell",
        "sd3_medium",
        "sd35_medium",
        "sd35_large",
        "pixart_sigma_512",
        "pixart_sigma_1024",
        "chroma",
        "qwen_image",
        "flux2_dev",
        "flux2_klein",
        "flux2_klein_9b",
        "flux2_klein_base",
        "z_image",
        "z_image_turbo",
        "ovis_image",
        "krea2",
        "longcat_image",
        "fibo",
        "sd15",
        "sdxl",
        "demo",
        "demo_sd3",
    } <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_stated_number_of_trained_parameters_is_the_dry_runs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    (stated,) = re.findall(r"# - parameters trained: ([\d,]+) ", path.read_text())
    model = plan_model(config.model.path).transformer
    with torch.device("meta"):
        trained = make_student(model, config)
    assert int(stated.replace(",", "")) == sum(parameter.numel() for parameter in trained.values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_runs_on_a_tiny_stand_in(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    family = {
        "sd3_medium": "sd3",
        "sd35_medium": "sd35",
        "sd35_large": "sd35",
        "flux2_klein_9b": "flux2_klein",
        "flux_clear": "flux_dev",
        "demo": "flux_schnell",
        "fibo": "fibo_16",
        "demo_sd3": "sd35",
    }.get(path.stem)
    family = family or path.stem.removesuffix("_512").removesuffix("_1024")
    pipeline = tiny_pipeline(family)
    pipeline.save_pretrained(tmp_path / "teacher")
    sizes = f"""
        model.path={tmp_path / "teacher"} hybrid.window=3 data.prompts=[a_red_shoe] data.images=2 data.batch_size=2
        data.height=64 data.width=64 data.steps=2 data.cache={tmp_path / "cache"}
        train.steps=2 train.batch_size=2 train.accumulation=1 train.progress=false output.folder={tmp_path / "run"}
    """.split()
    if family not in ("sd15", "sdxl", "longcat_image"):  # those read as many tokens as their tokenizer gives
        sizes.append(f"data.max_sequence_length={TEXT_LENGTH}")
    config, teacher = load_config(path, sizes), denoiser(pipeline)
    student = run(config)
    written = load_config(tmp_path / "run" / "config.yaml")
    assert None not in (written.loss.task, written.loss.output, written.loss.layer, written.loss.prompt_dropout)
    assert replace(written, loss=config.loss) == config
    assert type(student).__name__ == f"Hybrid{type(teacher).__name__}"
    state, dtype = student.state_dict(), torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    for name, weight in teacher.state_dict().items():
        assert torch.equal(state[name], weight.to(dtype)), f"{name} is the teacher's"
    adapter = load_file(tmp_path / "run" / "adapter" / "hybrid_adapter.safetensors")
    assert adapter.keys() == {name for name in state if ".hybrid." in name}
    for name, value in adapter.items():
        assert value.isfinite().all() and torch.equal(value.to(state[name].dtype), state[name]), name
        if ".gate" in name:
            assert value.any(), "the gates start at zero"

    (line,) = (json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    step, optim = 1, config.optim
    decay = 0.5 + 0.5 * math.cos(math.pi * step / 2) if optim.schedule == "cosine" else 1
    rate = optim.lr * decay
    assert line["step"] == 2 and line["lr"] == pytest.approx(rate * min(1, 2 / max(1, optim.warmup_steps)), rel=1e-6)
    assert line["gate_lr"] == pytest.approx(rate * optim.gate_lr_factor, rel=1e-6)
    weights = dict.fromkeys(("flux_schnell", "flux2_klein", "flux2_klein_9b", "z_image_turbo"), (0, 1, 0.5))
    weights = (weights | {"demo": (0, 2, 0), "demo_sd3": (0, 2, 0)}).get(path.stem, (1, 0.5, 0.5))
    total = sum(weight * line[name] for weight, name in zip(weights, ("task", "output", "layer"), strict=True))
    assert line["loss"] == pytest.approx(total, rel=1e-5) and line["output"] > 0 and line["layer"] > 0
    grid = tmp_path / "run" / "samples" / "step-00000002.png"
    assert grid.exists() == (config.output.sample_every > 0)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(file):
    path = file("optim: {lr: 1e-3, clip: 2}\nhybrid: {window: [4, 6], layers: {'*.0.attn': dense}}\n")
    config = load_config(path, ["optim.lr=1e-4", "hybrid.delta_rank=8", "output.folder=null", "data.prompts=[a, b]"])
    assert config.optim.lr == 1e-4 and config.optim.clip == 2.0 and isinstance(config.optim.clip, float)
    assert config.hybrid == hybriddit.HybridConfig(window=(4, 6), layers={"*.0.attn": "dense"}, delta_rank=8)
    assert config.data.prompts == ["a", "b"] and config.output.folder is None
    assert config.train == DistillConfig().train


def test_a_precision_of_no_needs_no_quotes(file):
    """YAML reads a bare no as false."""
    assert load_config(file("train: {precision: no}\n")).train.precision == "no"
    assert load_config(file("train: {precision: bf16}\n"), ["train.precision=no"]).train.precision == "no"


def test_a_config_survives_writing(file, tmp_path):
    config = load_config(file("hybrid: {window: [4, 6]}\nmodel: {path: somewhere}\n"))
    OmegaConf.save(OmegaConf.create(to_dict(config)), tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.lrr=1", "unknown key optim.lrr: did you mean optim.lr?"),
        ("optim.warmup=1", "unknown key optim.warmup: did you mean optim.warmup_steps?"),
        ("lr=1", "unknown key lr: did you mean optim.lr?"),
        ("train.lr=1", "unknown key train.lr: did you mean optim.lr?"),
        ("hybird.window=3", "unknown key hybird: did you mean hybrid?"),
        ("hybrid.windw=3", "unknown key hybrid.windw: did you mean hybrid.window?"),
        ("optim.zzzzzzzzzzzzzzzzzzzz=1", "known here are lr, gate_lr_factor"),
        ("train.steps=many", "train.steps must be int, got 'many'"),
        ("train.steps=1.5", "train.steps must be int, got 1.5"),
        ("train.steps=true", "train.steps must be int, got True"),
        ("train.steps=0", "train.steps must be at least 1, got 0"),
        ("train.progress=1", "train.progress must be bool, got 1"),
        ("data.prompts=[null]", "data.prompts must be str or list[str], got [None]"),
        ("data.cache=3", "data.cache must be str or null, got 3"),
        ("train.accumulation=3", "train.batch_size must be a multiple of train.accumulation (3), got 8"),
        ("train.precision=fp8", "train.precision must be 'no' or 'bf16', got 'fp8'"),
        ("optim.schedule=step", "optim.schedule must be 'constant' or 'cosine'"),
        ("optim.lr=-1", "optim.lr must be above 0"),
        ("loss.task=-1", "loss.task must be 0 or more, got -1"),
        ("loss.prompt_dropout=1.5", "loss.prompt_dropout must be in [0, 1], got 1.5"),
        ("loss.window_dropout=-0.1", "loss.window_dropout must be in [0, 1], got -0.1"),
        ("hybrid.window=0", "window must be a positive integer"),
        ("hybrid.window=big", "hybrid.window must be int"),
        ("train=5", "train must be a mapping of keys, got 5"),
        ("optim.lr", "override 'optim.lr' is not of the form section.key=value"),
    ],
)
def test_a_wrong_key_or_value_is_named(file, override, message):
    with pytest.raises(ValueError) as error:
        load_config(file("optim: {lr: 1e-3}\n"), [override])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "just words", "train: {steps: ${nowhere}}"])
def test_a_file_that_is_no_config_is_named(file, text):
    with pytest.raises(ValueError) as error:
        load_config(file(text))
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config file at"):
        load_config(tmp_path / "none.yaml")
