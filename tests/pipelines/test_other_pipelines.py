"""Other pipelines of a family's transformer through the commands: they work, or one line says why before any work."""

import inspect

import diffusers
import numpy as np
import pytest
from diffusers import FluxTransformer2DModel
from PIL import Image
from tiny_pipelines import TEXT_LENGTH, tiny_pipeline

from hybriddit import HybridConfig, hybridize, save_adapter
from hybriddit.cli import main
from hybriddit.images import read_record
from hybriddit.info import describe

SIZE = ["--height", "64", "--width", "64", "--steps", "2", "--max-sequence-length", str(TEXT_LENGTH)]


def widened(components, channels):
    """With a transformer that takes further channels beside the latents, as FLUX's tools do."""
    config = {key: value for key, value in components["transformer"].config.items() if not key.startswith("_")}
    latents = config["in_channels"]
    return {
        **components,
        "transformer": FluxTransformer2DModel(**{**config, "in_channels": channels, "out_channels": latents}),
    }


def make(name):
    """A tiny pipeline of diffusers' class of this name."""
    kind = getattr(diffusers, name)
    parts = tiny_pipeline("sd3" if "Diffusion3" in name else "flux_dev").components
    if "Fill" in name or "Control" in name:
        parts = widened(parts, 16 + 16 + 4 * 64 // 4 if "Fill" in name else 32)
    taken = inspect.signature(kind.__init__).parameters
    return kind(**{part: value for part, value in parts.items() if part in taken})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Saved pipelines, an adapter of each family, images; made when they are first asked for."""
    folder = tmp_path_factory.mktemp("world")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "image.png")
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(folder / "mask.png")
    for family in ("flux_dev", "sd3"):
        for name, window in (("window", 3), ("linear", None)):
            model = hybridize(tiny_pipeline(family).transformer, HybridConfig(window=window))
            save_adapter(model, folder / f"{family}-{name}")
    return folder


def saved(world, name):
    if not (world / name).is_dir():
        make(name).save_pretrained(world / name)
    return world / name


@pytest.fixture
def command(world, tmp_path, capsys, monkeypatch):
    """(exit code, the line said to the user) of a command with a pipeline, and whether its weights were read."""
    monkeypatch.chdir(world)
    loaded = []
    for kind in (diffusers.FluxTransformer2DModel, diffusers.SD3Transformer2DModel):
        load = kind.from_pretrained.__func__
        monkeypatch.setattr(
            kind, "from_pretrained", classmethod(lambda cls, *a, load=load, **k: loaded.append(a) or load(cls, *a, **k))
        )

    def run(what, name, *more):
        loaded.clear()
        arguments = ["--model", saved(world, name)]
        if what == "generate":
            arguments += ["--prompt", "a red shoe", "--out", tmp_path / "a.png", *SIZE]
        if what == "convert":
            arguments += ["--out", tmp_path / "hybrid"]
        if what == "distill":
            config = tmp_path / "run.yaml"
            config.write_text("data: {prompts: [a red shoe]}\noutput: {checkpoint_every: 1}\n")
            settings = ["data.images=2", "data.height=64", "data.width=64", "data.steps=1", "train.steps=1"]
            settings += [f"data.max_sequence_length={TEXT_LENGTH}", "train.batch_size=2", "train.progress=false"]
            arguments = [config, *settings, f"model.path={saved(world, name)}", f"output.folder={tmp_path / 'run'}"]
        code = main([what, *(str(argument) for argument in (*arguments, *more))])
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hybriddit: ")]
        return code, "".join(said), bool(loaded)

    return run


IMAGE = ("--image", "image.png")
MASK = (*IMAGE, "--mask", "mask.png")


@pytest.mark.parametrize(
    ("name", "options", "ran_by"),
    [
        ("FluxFillPipeline", MASK, "FluxFillPipeline"),
        ("FluxKontextPipeline", IMAGE, "FluxKontextPipeline"),
        ("FluxImg2ImgPipeline", (), "FluxPipeline"),
        ("FluxImg2ImgPipeline", IMAGE, "FluxImg2ImgPipeline"),
        ("StableDiffusion3InpaintPipeline", IMAGE, "StableDiffusion3Img2ImgPipeline"),
        ("StableDiffusion3PAGPipeline", (), "StableDiffusion3PAGPipeline"),
    ],
)
def test_generate_runs_the_pipeline_that_fits_what_is_given(name, options, ran_by, command, tmp_path):
    assert command("generate", name, *options)[:2] == (0, "")
    record = read_record(tmp_path / "a.png")
    assert (record["pipeline"], record["width"], record["height"]) == (ran_by, 64, 64)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FluxFillPipeline", (), "a FluxFillPipeline paints over a part of an image: give it an image and a mask"),
        ("FluxFillPipeline", IMAGE, "give it an image and a mask"),
        ("FluxKontextPipeline", (), "a FluxKontextPipeline needs an image"),
        ("FluxKontextPipeline", MASK, "a FluxKontextPipeline takes no mask"),
        ("FluxControlPipeline", IMAGE, "a FluxControlPipeline needs a control image, for which there is no option"),
        ("StableDiffusion3PAGPipeline", ("--adapter", "sd3-window"), "replaces attention processors"),
        (
            "FluxPipeline",
            ("--adapter", "sd3-window"),
            "is for SD3Transformer2DModel, the model is a FluxTransformer2DModel",
        ),
    ],
)
def test_generate_refuses_the_others_before_it_loads_them(name, options, message, command, tmp_path):
    code, said, loaded = command("generate", name, *options)
    assert code == 1 and message in said and not loaded, said
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(("adapter", "window"), [("linear", None), ("window", 3)])
def test_adapters_run_with_reference_images(adapter, window, command, tmp_path):
    assert command("generate", "FluxKontextPipeline", *IMAGE, "--adapter", f"flux_dev-{adapter}")[:2] == (0, "")
    assert read_record(tmp_path / "a.png")["hybrid_config"]["window"] == window


@pytest.mark.parametrize(
    "name", ["FluxFillPipeline", "FluxControlPipeline", "FluxImg2ImgPipeline", "FluxKontextPipeline"]
)
def test_convert_keeps_the_pipelines_class(name, command, tmp_path):
    assert command("convert", name, "--window", 3)[:2] == (0, "")
    found = describe(tmp_path / "hybrid")
    assert (found["class"], found["components"]["transformer"]["class"]) == (name, "HybridFluxTransformer2DModel")


def test_convert_of_pipelines_that_hybrids_do_not_run_in(command, tmp_path):
    code, said, loaded = command("convert", "StableDiffusion3PAGPipeline")
    assert code == 1 and "replaces attention processors" in said and not loaded
    assert not (tmp_path / "hybrid").exists()


def test_redux_makes_no_images_and_has_no_transformer(command, world):
    (world / "FluxPriorReduxPipeline").mkdir()
    (world / "FluxPriorReduxPipeline" / "model_index.json").write_text('{"_class_name": "FluxPriorReduxPipeline"}')
    for what, message in (
        ("convert", "is a FluxPriorReduxPipeline, which has no diffusion transformer to convert"),
        ("generate", "a FluxPriorReduxPipeline takes no prompt to make images of"),
        ("distill", "is a FluxPriorReduxPipeline, which has no diffusion transformer to distill"),
    ):
        code, said, _ = command(what, "FluxPriorReduxPipeline")
        assert code == 1 and message in said, said


@pytest.mark.parametrize(
    "name", ["FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline", "StableDiffusion3PAGPipeline"]
)
def test_distill_is_for_text_to_image(name, command, tmp_path):
    for more in ([], ["--dry-run"]):
        code, said, loaded = command("distill", name, *more)
        assert code == 1 and f"is a {name}: distillation is for the text-to-image pipeline of its transformer" in said
        assert not loaded and not (tmp_path / "run").exists()


def test_distill_takes_the_familys_other_tasks_as_text_to_image(command):
    assert command("distill", "StableDiffusion3Img2ImgPipeline")[:2] == (0, "")


def test_a_hybrid_base_is_told_before_it_is_loaded(world, command, tmp_path):
    pipeline = tiny_pipeline("flux_dev")
    hybridize(pipeline.transformer, HybridConfig(window=5))
    pipeline.save_pretrained(world / "hybrid")
    save_adapter(pipeline.transformer, world / "five")
    for what, more, message in (
        ("convert", ["--window", 3], "is hybrid already: give the dense pipeline"),
        ("convert", [], "is hybrid already"),
        ("convert", ["--adapter", "flux_dev-window"], "is hybrid with another config than flux_dev-window"),
        ("generate", ["--adapter", "flux_dev-window"], "is hybrid with another config than flux_dev-window"),
        ("distill", ["hybrid.window=3"], "the teacher is hybrid already, with hybrid.window 5, not 3"),
        ("distill", ["hybrid.window=16"], "the teacher is hybrid already, with hybrid.window 5, not 16"),
        ("distill", ["hybrid.window=3", "--dry-run"], "the teacher is hybrid already"),
    ):
        code, said, _ = command(what, "hybrid", *more)
        assert code == 1 and message in said, said
    assert command("generate", "hybrid", "--adapter", "five")[:2] == (0, "")
    assert command("distill", "hybrid")[:2] == (0, "")  # without the section: the base's
    assert describe(tmp_path / "run" / "adapter")["hybrid"]["config"]["window"] == 5
    assert command("distill", "hybrid", "hybrid.window=5", f"output.folder={tmp_path / 'same'}")[:2] == (0, "")
