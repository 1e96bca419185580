"""What `hybriddit generate` adds to the pipeline's call: LoRA files, offload, prompt files, several processes."""

import functools
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from runs import finish_together
from safetensors.torch import load_file, save_file
from tiny_pipelines import TEXT_LENGTH, tiny_pipeline

import hybriddit
from hybriddit import HybridConfig, SiTPipeline, SiTTransformer2DModel, hybridize, save_adapter, strips_file
from hybriddit.cli import main
from hybriddit.generate import generate, parse_lora
from hybriddit.images import read_record
from hybriddit.machine import find_device
from hybriddit.pipelines import prepare

ROOT = Path(__file__).parents[1]
SIZE = {"height": 64, "width": 64, "steps": 2, "max_sequence_length": TEXT_LENGTH}
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "add_k_proj", "proj_mlp"], init_lora_weights=False)


def flags(**settings):
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of FLUX, its adapter and a LoRA of its dense transformer; of PixArt and SD3 pipelines; prompts."""
    folder = tmp_path_factory.mktemp("saved")
    for family in ("pixart_sigma", "sd3"):
        tiny_pipeline(family).save_pretrained(folder / family)
    pipeline = tiny_pipeline("flux_dev")
    pipeline.save_pretrained(folder / "flux")
    for number in (1, 2):
        with_lora = tiny_pipeline("flux_dev")
        torch.manual_seed(number)
        with_lora.transformer.add_adapter(LORA)
        layers = get_peft_model_state_dict(with_lora.transformer)
        type(with_lora).save_lora_weights(folder, layers, weight_name=f"lora{number}.safetensors")
    hybridize(pipeline.transformer, HybridConfig(window=3))
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if ".hybrid." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_adapter(pipeline.transformer, folder / "adapter")
    (folder / "prompts.txt").write_text("a red shoe\na blue bag\n\na red bag\n")
    return folder


@pytest.fixture
def command(saved, tmp_path, capsys, monkeypatch):
    """(exit code, stdout, what is said to the user) of a call in the folder of what was saved."""
    monkeypatch.chdir(saved)

    def run(*more, model="flux", out="a.png", **settings):
        subject = [] if {"--prompt", "--prompts", "--class-label"} & set(more) else ["--prompt", "a red shoe"]
        given = flags(**{"model": model, "out": tmp_path / out, **({} if "sit" in str(model) else SIZE), **settings})
        code = main(["generate", *given, *subject, *(str(word) for word in more)])
        printed = capsys.readouterr()
        said = [line for line in printed.err.splitlines() if line.startswith(("hybriddit: ", "note: "))]
        return code, printed.out, "\n".join(said)

    return run


def pixels(path):
    return np.asarray(Image.open(path), int)


def of_python(saved, loras, adapter=True):
    """The image by diffusers' own calls: load the LoRAs, set their weights, run."""
    adapter = saved / "adapter" if adapter else None
    pipeline = hybriddit.HybridFluxPipeline.from_pretrained(saved / "flux", adapter=adapter)
    for name, _ in loras:
        pipeline.load_lora_weights(saved, weight_name=f"{name}.safetensors", adapter_name=name)
    if loras:
        pipeline.set_adapters([name for name, _ in loras], [weight for _, weight in loras])
    pipeline.set_progress_bar_config(disable=True)
    [(image, _)] = generate(pipeline, "a red shoe", **SIZE)
    return np.asarray(image, int)


@pytest.mark.parametrize("hybrid", [True, False])
def test_loras(hybrid, saved, command, tmp_path):
    adapter = ["--adapter", "adapter"] if hybrid else []
    loras = ["--lora", "lora1.safetensors", "--lora", saved / "lora2.safetensors:0.5"]
    assert command(*adapter, *loras)[0] == 0
    made = pixels(tmp_path / "a.png")
    np.testing.assert_array_equal(made, of_python(saved, [("lora1", 1.0), ("lora2", 0.5)], hybrid))
    for other in ([], [("lora1", 1.0)], [("lora1", 1.0), ("lora2", 1.0)]):
        assert abs(made - of_python(saved, other, hybrid)).max() > 2
    record = read_record(tmp_path / "a.png")
    assert record["lora"] == [["lora1.safetensors", 1.0], [str(saved / "lora2.safetensors"), 0.5]]
    assert (record["hybrid_config"] is not None) == hybrid


def test_a_lora_acts_on_the_hybrids_projections_as_on_the_dense_ones(saved):
    """The maths: W x + scale B A x in every module that both have, the added ones untouched."""
    dense, hybrid = tiny_pipeline("flux_dev"), tiny_pipeline("flux_dev")
    hybridize(hybrid.transformer, HybridConfig(window=3, delta_rank=2))
    plain = hybrid.transformer.state_dict()
    for pipeline in (dense, hybrid):
        prepare.add_loras(pipeline, [(saved / "lora1.safetensors", 0.5)])
    file = load_file(saved / "lora1.safetensors")
    name = "single_transformer_blocks.0.attn.to_q"
    x = torch.randn(3, 16)
    update = file[f"transformer.{name}.lora_B.weight"] @ file[f"transformer.{name}.lora_A.weight"]
    for pipeline in (dense, hybrid):
        module = pipeline.transformer.get_submodule(name)
        expected = module.base_layer(x) + 0.5 * x @ update.T  # a file without alpha: its rank
        torch.testing.assert_close(module(x), expected)
    left = hybrid.transformer.state_dict()
    assert all(torch.equal(left[key], value) for key, value in plain.items() if ".hybrid." in key)
    assert not any("lora" in key and ".hybrid." in key for key in left)


def test_paths_and_weights_of_loras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("a.safetensors", "b:0.5.safetensors", r"C:\loras\a.safetensors", "C:a.safetensors", "odd:1")
    for name in names[:-1]:
        save_file({"x": torch.zeros(1)}, name)
    assert parse_lora("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert parse_lora("a.safetensors:-0.25") == (Path("a.safetensors"), -0.25)
    assert parse_lora(f"{tmp_path}/a.safetensors:2") == (tmp_path / "a.safetensors", 2.0)
    for name in names[1:-1]:
        assert parse_lora(name) == (Path(name), 1.0)
        assert parse_lora(f"{name}:0.5") == (Path(name), 0.5)
    for text, message in (
        ("a.safetensors:half", "the weight of the LoRA a.safetensors must be a number, not 'half'"),
        ("a.safetensors:nan", "must be a number, not 'nan'"),
        ("a.safetensors:", "must be a number, not ''"),
        ("lora.bin", "the LoRA lora.bin is no .safetensors file"),
        ("lora.bin:0.5", "the LoRA lora.bin is no .safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_lora(text)
    with pytest.raises(FileNotFoundError, match=r"no LoRA file none.safetensors"):
        parse_lora("none.safetensors:0.5")


def test_loras_of_other_models_are_refused(saved, command, tmp_path):
    tensors = load_file(saved / "lora1.safetensors")
    extra = {"transformer.other_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 16)}
    extra["transformer.other_blocks.0.attn.to_q.lora_B.weight"] = torch.zeros(16, 2)
    for name, changed in (
        ("foreign", {key.replace("transformer.", "unet.", 1): value for key, value in tensors.items()}),
        ("part", {**tensors, **extra}),
        ("wide", {key: torch.cat((value, value), 1) for key, value in tensors.items()}),
        ("none", {"a": torch.zeros(2)}),
        ("half", dict(list(tensors.items())[1:])),
    ):
        save_file(changed, tmp_path / f"{name}.safetensors")
        code, _, said = command("--lora", tmp_path / f"{name}.safetensors")
        assert code == 1 and f"{name}.safetensors does not fit this FluxPipeline" in said, said
        assert "\n" not in said and not (tmp_path / "a.png").exists()
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    assert "broken.safetensors" in command("--lora", tmp_path / "broken.safetensors")[2]
    code, _, said = command("--lora", "lora1.safetensors", model="sd3")
    assert code == 1 and "layers are not in this model (transformer.single_transformer_blocks.0" in said
    code, _, said = command("--lora", "lora1.safetensors", model="pixart_sigma")
    assert code == 1 and "diffusers loads no LoRA into the transformer of a PixArtSigmaPipeline" in said


def test_an_image_that_is_not_finite_is_not_saved(saved, command, tmp_path):
    tensors = {key: value.fill_(torch.nan) for key, value in load_file(saved / "lora1.safetensors").items()}
    save_file(tensors, tmp_path / "nan.safetensors")
    code, _, said = command("--lora", tmp_path / "nan.safetensors", seed=3)
    assert code == 1 and "the image of seed 3 is not finite" in said
    assert not (tmp_path / "a.png").exists()


def test_an_empty_prompt(command, tmp_path):
    assert command("--prompt", "")[0] == 0
    assert read_record(tmp_path / "a.png")["prompt"] == ""


def test_a_limit_of_memory(command, tmp_path, monkeypatch):
    tall = {"height": 768, "adapter": "adapter"}
    plans = []
    monkeypatch.setattr(
        "hybriddit.generate.files.print", lambda *words, **where: plans.append(str(words[0])), raising=False
    )
    for limit in (1, 0.005):
        assert command(**tall, max_memory=limit, out=f"{limit}.png")[0] == 0
    assert "transformer" in plans[0] and "the whole image at once" in plans[0] and "in strips of" in plans[2]
    assert abs(pixels(tmp_path / "1.png") - pixels(tmp_path / "0.005.png")).max() <= 1
    code, _, said = command(**tall, max_memory=0.0001)
    assert code == 1 and "64 x 768 pixels need" in said and "should fit" in said
    assert read_record(tmp_path / "1.png")["tiles"] is False
    code, _, said = command("--image", tmp_path / "1.png", max_memory=1)
    assert code == 1 and "--max-memory is for images" in said and "not for a FluxImg2ImgPipeline" in said
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        code, _, said = command("--parallel", **tall, max_memory=0.001)
    assert code == 1 and "64 x 768 pixels need" in said and said.endswith("should fit; or start more processes")
    code, _, said = command(max_memory=0)
    assert code == 1 and "--max-memory must be a number of GiB above 0, not 0.0" in said


def test_a_limit_of_memory_of_a_dense_pipeline(command, tmp_path):
    assert command(out="usual.png")[0] == command(out="a.png", max_memory=1)[0] == 0
    assert abs(pixels(tmp_path / "usual.png") - pixels(tmp_path / "a.png")).max() <= 1
    code, _, said = command(height=768, max_memory=0.0004, out="b.png")
    assert code == 1 and "64 x 768 pixels need" in said and "a hybrid of this model could make them in strips" in said
    assert "\n" not in said and not (tmp_path / "b.png").exists()


def test_a_limit_of_memory_of_a_sit(command, tmp_path):
    model = SiTTransformer2DModel(2, 12, in_channels=3, num_layers=1, sample_size=8, num_classes=2)
    SiTPipeline(model).save_pretrained(tmp_path / "sit")
    given = {"model": tmp_path / "sit", "height": 64, "width": 64, "steps": 1}
    assert command("--class-label", 1, **given, max_memory=1)[0] == 0
    code, _, said = command("--class-label", 1, **given, max_memory=0.001, out="b.png")
    assert code == 1 and "64 x 64 pixels need" in said and said.endswith("should fit") and "\n" not in said


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_large_image_is_written_while_it_is_decoded(name, command, tmp_path, monkeypatch):
    """Of many strips, two are there at a time."""
    for setting, value in {"BAND": 2**12, "PREVIEW_FROM": 100, "PREVIEW_SIDE": 96}.items():
        monkeypatch.setattr(strips_file, setting, value)
    monkeypatch.setattr(AutoencoderKL, "__init__", with_small_tiles(AutoencoderKL.__init__))
    strips, there = [], []

    def noted(path, given, *more):
        def each():
            for strip in given:
                strips.append(weakref.ref(strip))
                there.append(sum(kept() is not None for kept in strips))
                yield strip

        return strips_file.write_strips(path, each(), *more)

    monkeypatch.setattr("hybriddit.generate.files.write_strips", noted)
    code, out, _ = command("--adapter", "adapter", "--vae-tiling", height=768, width=256, steps=1, out=name)
    small = tmp_path / "a.preview.jpg"
    assert code == 0 and f"256 x 768 image saved to {tmp_path / name}, a small copy to {small}" in out
    assert len(strips) > 20 and max(there) == 2
    assert pixels(tmp_path / name).shape == (768, 256, 3) and pixels(tmp_path / name).std() > 1
    assert read_record(tmp_path / name)["vae_tiling"] is True and Image.open(small).size == (32, 96)


def with_small_tiles(init):
    @functools.wraps(init)
    def made(vae, *args, **kwargs):
        init(vae, *args, **kwargs)
        vae.tile_latent_min_size = 8
        vae.tile_sample_min_size = 8 * 2 ** (len(vae.config.block_out_channels) - 1)

    return made


def test_a_tiff_of_a_dense_pipeline(command, tmp_path):
    assert command(out="a.png")[0] == command(out="a.tif")[0] == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif"), pixels(tmp_path / "a.png"))
    assert read_record(tmp_path / "a.tif") == read_record(tmp_path / "a.png")


def test_offload_needs_an_accelerator(command):
    for kind in ("model", "group", "sequential"):
        code, _, said = command("--offload", kind)
        assert code == 1 and f"--offload {kind} spares the memory of an accelerator, and the device is the CPU" in said


@pytest.mark.parametrize("kind", ["model", "group"])
def test_offload_of_a_hybrid_gives_the_same_image(kind, saved):
    """With the CPU for the accelerator, which the third kind does not take for text encoders (tests/compat has it)."""
    images = []
    for offload in (None, kind):
        pipeline = hybriddit.HybridFluxPipeline.from_pretrained(saved / "flux", adapter=saved / "adapter")
        pipeline.set_progress_bar_config(disable=True)
        prepare.place(pipeline, torch.device("cpu"), offload)
        hooked = [module for module in pipeline.transformer.modules() if hasattr(module, "_hf_hook")]
        hooked += [module for module in pipeline.transformer.modules() if getattr(module, "_diffusers_hook", None)]
        assert bool(hooked) == (offload is not None)
        [(image, _)] = generate(pipeline, "a red shoe", **SIZE)
        images.append(np.asarray(image, int))
    np.testing.assert_array_equal(*images)


def test_sequential_offload_is_diffusers_own(monkeypatch):
    pipeline, calls = tiny_pipeline("flux_dev"), []
    monkeypatch.setattr(pipeline, "enable_sequential_cpu_offload", lambda **given: calls.append(given))
    prepare.place(pipeline, torch.device("cpu"), "sequential")
    assert calls == [{"device": torch.device("cpu")}]


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="no device is called 'gpu0'"):
        find_device("gpu0")
    if not torch.accelerator.is_available():
        for name in ("cuda", "cuda:1", "mps"):
            with pytest.raises(ValueError, match=f"no device {name} on this machine: torch sees only a CPU"):
                find_device(name)


def test_the_device_and_the_dtype_are_chosen(command, tmp_path):
    assert command("--device", "cpu", "--dtype", "bfloat16")[0] == 0
    record = read_record(tmp_path / "a.png")
    assert (record["device"], record["dtype"]) == ("cpu", "bfloat16")
    code, _, said = command("--device", "gpu")
    assert code == 1 and "no device is called 'gpu'" in said


def test_vae_tiling(saved, command, tmp_path):
    """On an image of several tiles, which the tiny VAE's are not: it is switched on, and recorded."""
    assert command("--vae-tiling")[0] == 0
    assert read_record(tmp_path / "a.png")["vae_tiling"] is True
    pipeline = tiny_pipeline("flux_dev")
    prepare.tile_vae(pipeline)
    assert pipeline.vae.use_tiling
    model = SiTTransformer2DModel(2, 8, in_channels=3, num_layers=1, sample_size=8, num_classes=2)
    SiTPipeline(model).save_pretrained(tmp_path / "sit")
    code, _, said = command("--class-label", "1", "--vae-tiling", model=tmp_path / "sit")
    assert code == 1 and "this SiTPipeline has no VAE: leave VAE tiling out" in said
    for option in (["--lora", "lora1.safetensors"], ["--config", "flux"]):
        code, _, said = command("--class-label", "1", *option, model=tmp_path / "sit")
        assert code == 1 and "has no meaning with a class label" in said


PROMPTS = ["a red shoe", "a blue bag", "a red bag"]


def test_prompts_from_a_file_and_their_seeds(command, tmp_path):
    assert command("--prompts", "prompts.txt", out="x.png", seed=5, num_images=2)[0] == 0
    records = [read_record(tmp_path / f"x-000{number}.png") for number in range(1, 7)]
    assert [record["prompt"] for record in records] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [record["seed"] for record in records] == [5, 6, 7, 8, 9, 10]
    assert command("--prompts", "prompts.txt", "--seed-per-prompt", out="y.png", seed=5, num_images=2)[0] == 0
    records = [read_record(tmp_path / f"y-000{number}.png") for number in range(1, 7)]
    assert [record["seed"] for record in records] == [5, 8, 6, 9, 7, 10], "the first of prompt i has seed + i"
    np.testing.assert_array_equal(pixels(tmp_path / "x-0001.png"), pixels(tmp_path / "y-0001.png"))
    code, _, said = command("--seed-per-prompt")
    assert code == 1 and "--seed-per-prompt is for prompts from a file" in said
    code, _, said = command("--prompts", "none.txt")
    assert code == 1 and "none.txt" in said


def test_what_is_there_is_kept_and_what_was_made_otherwise_is_not_touched(saved, command, tmp_path):
    assert command("--prompts", "prompts.txt", seed=5)[0] == 0
    files = [tmp_path / f"a-000{number}.png" for number in (1, 2, 3)]
    before = [path.read_bytes() for path in files]
    files[1].unlink()
    times = [files[0].stat().st_mtime_ns, files[2].stat().st_mtime_ns]
    code, out, _ = command("--prompts", "prompts.txt", seed=5)
    assert code == 0 and "2 of 3 images are there already, made with these settings: they are kept" in out
    assert [path.read_bytes() for path in files] == before
    assert [files[0].stat().st_mtime_ns, files[2].stat().st_mtime_ns] == times
    report = json.loads(command("--prompts", "prompts.txt", "--json", seed=5)[1])
    assert (report["kept"], report["files"], report["seeds"]) == (3, [str(path) for path in files], [5, 6, 7])
    for more, what in (({"seed": 6}, "seed 5, not 6"), ({"guidance": 2}, "guidance 3.5, not 2.0")):
        code, _, said = command("--prompts", "prompts.txt", **{"seed": 5, **more})
        assert code == 1 and f"a-0001.png is there already, made with {what}: give another --out" in said
    code, _, said = command("--prompts", "prompts.txt", "--lora", "lora1.safetensors", seed=5)
    assert code == 1 and "made with lora" in said
    Image.new("RGB", (64, 64)).save(files[2])
    code, _, said = command("--prompts", "prompts.txt", seed=5)
    assert code == 1 and "a-0003.png is there already" in said
    assert [path.read_bytes() for path in files[:2]] == before[:2]


def test_other_weights_under_the_same_name_are_noticed(saved, command, tmp_path):
    """An adapter that was distilled anew is another one."""
    pipeline = tiny_pipeline("flux_dev")
    hybridize(pipeline.transformer, HybridConfig(window=3))
    save_adapter(pipeline.transformer, tmp_path / "adapter")
    assert command("--prompts", "prompts.txt", "--adapter", tmp_path / "adapter")[0] == 0
    next(p for name, p in pipeline.transformer.named_parameters() if ".hybrid." in name).data.add_(0.5)
    save_adapter(pipeline.transformer, tmp_path / "adapter")
    code, _, said = command("--prompts", "prompts.txt", "--adapter", tmp_path / "adapter")
    assert code == 1 and "made with weights_sha256" in said


def test_the_adapter_of_a_run_and_of_another_base(saved, command, tmp_path):
    run = tmp_path / "run" / "checkpoints" / "step-00000003"
    shutil.copytree(saved / "adapter", run / "adapter")
    images = []
    for adapter in (saved / "adapter", tmp_path / "run", run):
        assert command("--adapter", adapter, out="one.png")[0] == 0
        images.append(np.array(Image.open(tmp_path / "one.png")))
    assert all(np.array_equal(image, images[0]) for image in images)
    finetune = tiny_pipeline("flux_dev", seed=1)
    finetune.save_pretrained(tmp_path / "finetune")
    here = ["--adapter", saved / "adapter"]
    code, _, said = command(*here, out="two.png", model=tmp_path / "finetune")
    assert code == 1 and "was made from other weights, a model without a name" in said and "--any-base" in said
    assert not (tmp_path / "two.png").exists()
    assert command(*here, "--any-base", out="two.png", model=tmp_path / "finetune")[0] == 0
    code, _, said = command("--any-base", out="three.png")
    assert code == 1 and "--any-base is for an adapter" in said


def test_several_processes_make_the_files_of_one(command, tmp_path, monkeypatch):
    assert command("--prompts", "prompts.txt", num_images=2, out="one.png")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        report = json.loads(command("--prompts", "prompts.txt", "--json", num_images=2, out="two.png")[1])
        assert (len(report["files"]), report["kept"]) == (3, 0)
    for number in range(1, 7):
        one, two = (tmp_path / f"{name}-000{number}.png" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_torchrun(saved, command, tmp_path):
    assert command("--prompts", "prompts.txt", out="one.png")[0] == 0
    given = ["generate", *flags(**SIZE, model="flux", prompts="prompts.txt", out=tmp_path / "two.png")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hybriddit", *given]
    subprocess.run(launched, cwd=saved, env=env, capture_output=True, check=True)
    for number in (1, 2, 3):
        one, two = (tmp_path / f"{name}-000{number}.png" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_several_processes_make_each_image_together(saved, command, tmp_path):
    """With guidance and the VAE's tiles, to a level of rounding; the second time, what is there is kept."""
    given = {"true_cfg": 2.0, "negative_prompt": "blue", "num_images": 2}
    one = ["--adapter", "adapter", "--prompts", "prompts.txt", "--vae-tiling"]
    assert command(*one, out="one.png", **given)[0] == 0
    command_line = flags(**SIZE, **given, model=saved / "flux", adapter=saved / "adapter", out=tmp_path / "two.png")
    command_line += ["--prompts", saved / "prompts.txt", "--parallel", "--vae-tiling", "--max-memory", 1]
    for kept in (0, 6):
        codes = finish_together(3, "generate", *command_line, output=tmp_path / "said")
        said = [(tmp_path / f"said.{rank}").read_text() for rank in range(3)]
        assert codes == [0, 0, 0], said
        assert said[0].count("image saved to") == 6 - kept and "image saved" not in said[1] + said[2]
        assert ("6 of 6 images are there already" in said[0]) == bool(kept)
    for number in range(1, 7):
        one, two = (pixels(tmp_path / f"{name}-000{number}.png") for name in ("one", "two"))
        assert abs(one - two).max() <= 1 and one.std() > 1


def test_a_sit_s_image_is_made_together(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "sample_size": 10, "num_classes": 3}
    model = SiTTransformer2DModel(**sizes, attention="hybrid", window=(4, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    SiTPipeline(model).save_pretrained(tmp_path / "sit")
    given = ["generate", *flags(model=tmp_path / "sit", steps=3, guidance=2, class_label=1, out=tmp_path / "one.png")]
    assert main(given) == 0
    given[-1] = tmp_path / "two.png"
    codes = finish_together(2, *given, "--parallel", "--json", output=tmp_path / "said")
    said = [(tmp_path / f"said.{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], said
    report = json.loads(said[0].splitlines()[-1])
    assert report["files"] == [str(tmp_path / "two.png")] and "files" not in said[1]
    assert abs(pixels(tmp_path / "one.png") - pixels(tmp_path / "two.png")).max() <= 1


def test_what_is_not_made_together(saved, command, monkeypatch, tmp_path):
    code, _, said = command("--parallel")
    assert code == 1 and "torchrun --nproc-per-node 2 -m hybriddit generate" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, said = command("--parallel", "--offload", "model")
    assert code == 1 and "leave --offload out" in said
    given = [*flags(**SIZE, model=saved / "flux", prompt="a red shoe", out=tmp_path / "a.png"), "--parallel"]
    assert finish_together(2, "generate", *given, output=tmp_path / "said") == [1, 1]
    assert "is not hybrid: hybridize it first" in (tmp_path / "said.1").read_text()


def test_one_prompt_is_not_shared(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, said = command()
    assert code == 1 and "2 processes can share the work on prompts from a file (--prompts) alone" in said
    assert "or share each image (--parallel)" in said
