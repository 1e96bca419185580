"""What version 0.1.0 saved still loads, and computes what it computed then (tests/saved/make_fixtures.py made it)."""

import contextlib
import json
import runpy
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import hybriddit
from hybriddit.cli import main
from hybriddit.data.teacher_images import teacher_images
from hybriddit.pipelines.loading import load_pipeline

ROOT = Path(__file__).parents[2]
SAVED = ROOT / "tests" / "saved" / "v0.1.0"
ADAPTERS, PIPELINES, SITS = (sorted(path.name for path in (SAVED / kind).iterdir()) for kind in
                             ("adapters", "pipelines", "sit"))  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"
TIMINGS = ("images_per_second", "mfu")


def assert_same(found, expected):
    """To the rounding of float32: 1e-5 of the largest value."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    error, size = (found - expected).abs().max(), expected.abs().max()
    assert error <= 1e-5 * size, f"off by {error / size:.2g} of the largest value"


def assert_same_weights(found, expected):
    """Of two models, each tensor to 1e-5 of its length.

    Not of each number: Adam divides by the gradient's size, and with it multiplies the rounding of the smallest.
    """
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        error, length = (found[name] - wanted).norm(), wanted.norm()
        assert error <= 1e-5 * length, f"{name} is off by {error / length:.2g} of its length"


def read_dense(base):
    """The dense transformer in a folder, by its own class.

    The file is in half precision, for its size. As float32 it is what adapters were made for, to the last bit.
    """
    class_name = json.loads((base / "config.json").read_text())["_class_name"]
    return getattr(diffusers, class_name).from_pretrained(base, dtype=torch.float32)


def read_expected(folder):
    """(inputs, outputs) of expected.safetensors."""
    tensors = load_file(folder / "expected.safetensors")
    return tuple(
        {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
        for part in ("input/", "output/")
    )


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_of(folder):
    """{name: (time of the last change, size)} of all files in a folder."""
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


def is_gate(name):
    return any(part.startswith("gate") for part in name.split("."))


def sorted_values(tensors):
    """All their numbers, the smallest first."""
    return torch.cat([torch.empty(0), *(tensor.flatten().float() for tensor in tensors)]).sort().values


@contextlib.contextmanager
def left_alone(*folders):
    """Within it, no file of the folders is written, made or removed."""
    before = [files_of(folder) for folder in folders]
    assert all(before)
    yield
    assert [files_of(folder) for folder in folders] == before


@pytest.fixture(autouse=True, scope="module")
def fixtures_are_only_read():
    with left_alone(SAVED):
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """here(name): a copy of that part of the saved files, which is the working directory: their paths are relative."""

    def copy(name):
        shutil.copytree(SAVED / name, tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        return tmp_path / name

    return copy


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_adapter(name):
    folder = SAVED / "adapters" / name
    model = read_dense(SAVED / (folder / "base.txt").read_text().strip())
    inputs, outputs = read_expected(folder)
    assert_same(model(**inputs).sample, outputs["dense"])
    assert hybriddit.load_adapter(model, folder / "adapter") is model
    assert_same(model(**inputs).sample, outputs["sample"])
    with hybriddit.dense_mode(model):
        assert_same(model(**inputs).sample, outputs["dense"])
    hybriddit.restore_dense(model)
    assert_same(model(**inputs).sample, outputs["dense"])


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_hybrid_pipeline(name):
    folder = SAVED / "pipelines" / name
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    inputs, outputs = read_expected(folder)
    image = {key.removeprefix("image/"): inputs.pop(key) for key in list(inputs) if key.startswith("image/")}
    assert_same(pipeline.transformer(**inputs).sample, outputs["sample"])
    arguments = {} if name == "flux" else {"use_resolution_binning": False, "prompt": None, "negative_prompt": None}
    images = pipeline(
        **image,
        **arguments,
        height=16,
        width=24,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert_same(images, outputs["image"])


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_hybrid_pipeline_in_bfloat16(name):
    folder = SAVED / "pipelines" / name
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline", dtype=torch.bfloat16)
    inputs, outputs = read_expected(folder)
    inputs = {key: value for key, value in inputs.items() if not key.startswith("image/")}
    check_bfloat16(pipeline.transformer, folder / "pipeline" / "transformer" / WEIGHTS, inputs, outputs["sample"])


def check_bfloat16(model, weights, inputs, expected):
    """Gates are the saved ones, in float32; the other weights are the saved ones, rounded; and it runs."""
    saved, held = load_file(weights), model.state_dict()
    for gates, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        assert all(value.dtype == dtype for name, value in held.items() if is_gate(name) is gates)
        # by value: a later version may call a weight otherwise, or hold several as one
        rounded = (value.to(dtype) for name, value in saved.items() if is_gate(name) is gates)
        assert torch.equal(
            sorted_values(v for name, v in held.items() if is_gate(name) is gates), sorted_values(rounded)
        )
    inputs = {key: value.bfloat16() if value.dtype == torch.float32 else value for key, value in inputs.items()}
    found = model(**inputs).sample
    # a sanity check alone: bfloat16 keeps two digits, and a few layers lose some of them
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", SITS)
@torch.no_grad()
def test_sit(name):
    folder = SAVED / "sit" / name
    inputs, outputs = read_expected(folder)
    pipeline = hybriddit.SiTPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    model = hybriddit.SiTTransformer2DModel.from_pretrained(folder / "pipeline" / "transformer")
    arguments = {key: inputs[key] for key in ("timestep", "class_labels")}
    for transformer in (pipeline.transformer, model):
        assert_same(transformer(inputs["hidden_states"], **arguments).sample, outputs["sample"])
        assert_same(transformer(inputs["wide"], **arguments).sample, outputs["wide"])
    assert pipeline.labels == {"bag": 0, "shoe": 1, "shoe, sneaker": 1, "sneaker": 1, "hat": 2}
    assert pipeline.config.weights == "random"
    images = pipeline(
        ["shoe", 2], latents=inputs["latents"], num_inference_steps=2, guidance_scale=2.0, output_type="pt"
    ).images
    assert_same(images, outputs["image"])


@pytest.mark.parametrize("name", SITS)
@torch.no_grad()
def test_sit_in_bfloat16(name):
    folder = SAVED / "sit" / name
    inputs, outputs = read_expected(folder)
    inputs = {key: inputs[key] for key in ("hidden_states", "timestep", "class_labels")}
    weights = folder / "pipeline" / "transformer" / WEIGHTS
    pipeline = hybriddit.SiTPipeline.from_pretrained(folder / "pipeline", dtype=torch.bfloat16)
    check_bfloat16(pipeline.transformer, weights, inputs, outputs["sample"])
    model = hybriddit.SiTTransformer2DModel.from_pretrained(weights.parent, dtype=torch.bfloat16)
    check_bfloat16(model, weights, inputs, outputs["sample"])


def assert_same_log(path, expected):
    found, expected = read_lines(path), read_lines(expected)
    assert len(found) == len(expected)
    for line, wanted in zip(found, expected, strict=True):
        wanted = {key: value for key, value in wanted.items() if key not in TIMINGS}
        assert {key: line.get(key) for key in wanted} == pytest.approx(wanted, rel=1e-5)


def test_distillation_goes_on_from_its_checkpoint(here, capsys):
    folder = here("distill")
    first = ["hybrid.mixer=linfusion", "hybrid.gate=head"]
    assert hybriddit.load_config("run/config.yaml", first) == hybriddit.load_config("run.yaml", first)
    with left_alone(folder / "cache", folder / "teacher"):
        # a config that does not name the gate and the far branch has today's, which the run did not begin with
        assert main(["distill", "run.yaml", "--resume"]) == 1
        wrong = [f"hybrid.{name}" for name in ("gate", "feature_map", "projection", "rotary", "join")]
        assert f"other values of {', '.join(wrong)}:" in capsys.readouterr().err
        assert main(["distill", "run.yaml", *first, "--resume"]) == 0
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    found, expected = (
        hybriddit.load_adapter(read_dense(folder / "teacher" / "transformer"), run / "adapter")
        for run in (folder / "run", folder / "resumed")
    )
    assert_same_weights(found, expected)
    assert_same_log(folder / "run" / "log.jsonl", SAVED / "distill" / "resumed" / "log.jsonl")
    assert [start["from_step"] for start in json.loads((folder / "run" / "run.json").read_text())] == [0, 2]


def test_cache_of_trajectories_is_opened(here):
    folder = here("distill")
    with left_alone(folder / "trajectories", folder / "teacher"):
        assert main(["distill", "trajectories.yaml", "hybrid.mixer=linfusion", "hybrid.gate=head"]) == 0
    assert_same_log(folder / "run-trajectories" / "log.jsonl", SAVED / "distill" / "trajectories.jsonl")


def test_unfinished_cache_is_continued_with_another_batch_size(here, tmp_path):
    folder = here("distill")
    (folder / "cache" / "latents-00001.safetensors").rename(tmp_path / "expected.safetensors")
    with left_alone(folder / "teacher"):
        pipeline = load_pipeline("teacher")
        settings = {"images": 6, "height": 48, "width": 64, "steps": 2, "guidance_scale": 3.5, "max_sequence_length": 6}
        prompts = Path("prompts.txt").read_text().splitlines()
        data = teacher_images(pipeline, prompts, **settings, cache="cache", batch_size=1, progress=False)
    assert sorted(path.name for path in (folder / "cache").glob("latents-*")) == [
        "latents-00000.safetensors",
        "latents-00004-00005.safetensors",
        "latents-00005-00006.safetensors",
    ]
    for key, value in load_file(tmp_path / "expected.safetensors").items():
        torch.testing.assert_close(data.rows([4, 5])[key], value, rtol=1e-4, atol=1e-5)
    shutil.move("teacher", "moved")
    with pytest.raises(ValueError, match=r"made by version 0.1 with other values of model \('teacher', now 'moved'\)"):
        teacher_images(load_pipeline("moved"), prompts, **settings, cache="cache", progress=False)


def test_training_goes_on_from_its_checkpoint(here):
    folder = here("train")
    assert hybriddit.load_config("run/config.yaml") == hybriddit.load_config("run.yaml")
    with left_alone(folder / "latents", folder / "vae"):
        assert main(["train", "run.yaml", "--resume"]) == 0
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    found, expected = (
        hybriddit.SiTTransformer2DModel.from_pretrained(run / "pipeline" / "transformer")
        for run in (folder / "run", folder / "resumed")
    )
    assert_same_weights(found, expected)
    assert_same_log(folder / "run" / "log.jsonl", SAVED / "train" / "resumed" / "log.jsonl")
    assert [start["from_step"] for start in json.loads((folder / "run" / "run.json").read_text())] == [0, 2]


def test_cache_of_pixels_is_opened(here):
    folder = here("train")
    with left_alone(folder / "pixels"):
        assert main(["train", "pixels.yaml"]) == 0
    assert_same_log(folder / "run-pixels" / "log.jsonl", SAVED / "train" / "pixels.jsonl")


def test_record_of_an_image(capsys):
    assert main(["info", str(SAVED / "image" / "shoe.png"), "--json"]) == 0
    expected = json.loads((SAVED / "image" / "shoe.json").read_text())
    found = json.loads(capsys.readouterr().out)
    assert {key: found.get(key) for key in expected} == expected


def test_results_of_a_benchmark(capsys, monkeypatch):
    """Read by the script that holds them against the targets; the shares are ours, worked out from the file."""
    monkeypatch.setattr("sys.argv", ["gpu_targets.py", str(SAVED / "benchmark")])
    runpy.run_path(str(ROOT / "scripts" / "gpu_targets.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((SAVED / "benchmark" / "benchmark.json").read_text())
    checked = 0
    for case in report["cases"]:
        if case["variant"] == "linear" and case["direction"] in ("forward", "backward") and "seconds" in case:
            what = f"linear {case['direction']}, {case['shape']}, {case['image_tokens']} tokens"
            rate = case["floor"]["bytes"] / case["seconds"]["median"] / report["rates"]["bytes_per_second"]
            found = [line for line in lines if what in line and line.endswith(f": {rate:.0%}")]
            checked += len(found)
    assert checked == 4
    assert not any("benchmark.json is not there" in line for line in lines)
