"""`hybriddit generate --size` and `hybriddit upscale`: files of stages, going on after a stop, and what is refused."""

import json
import os
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from runs import finish_together, in_two_processes
from spandrel.architectures.Compact import Compact
from tiny_pipelines import TEXT_LENGTH, tiny_pipeline

import hybriddit
from hybriddit import HybridConfig, SiTPipeline, SiTTransformer2DModel, cli, hybridize, save_adapter, strips_file
from hybriddit.cli import main
from hybriddit.files import temporary_path
from hybriddit.generate import cascade, parse_size
from hybriddit.images import read_record
from hybriddit.parallel import image_of_first
from hybriddit.pipelines.cascade import ENLARGED_IN, encode_enlarged

SMALL = ["--max-sequence-length", str(TEXT_LENGTH), "--seed", "3", "--quiet"]
FIRST = ["--height", "64", "--width", "64", "--steps", "2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of pipelines, of an adapter for FLUX, and an image."""
    folder = tmp_path_factory.mktemp("stages")
    for family in ("pixart_sigma", "sd3"):
        tiny_pipeline(family).save_pretrained(folder / family)
    pipeline = tiny_pipeline("flux_dev")
    pipeline.save_pretrained(folder / "flux")
    hybridize(pipeline.transformer, HybridConfig(window=3))
    torch.manual_seed(1)
    for name, parameter in pipeline.transformer.named_parameters():
        if ".hybrid." in name:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    save_adapter(pipeline.transformer, folder / "adapter")
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC).save(folder / "photo.png")
    return folder


@pytest.fixture
def command(saved, tmp_path, capsys, monkeypatch):
    """(exit code, stdout, stderr) of a call; files go to tmp_path."""
    monkeypatch.chdir(saved)

    def run(name, *words, out="a.png"):
        code = main([name, *map(str, words), "--prompt", "a red shoe", *SMALL, "--out", str(tmp_path / out)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def pixels(path):
    return np.asarray(Image.open(path), int)


@pytest.mark.parametrize("kind", ["pixart_sigma", "sd3", "flux"])
def test_stages_of_any_size_are_files_with_records(kind, command, tmp_path):
    more = ["--adapter", "adapter"] if kind == "flux" else []
    assert command("generate", "--model", kind, *FIRST, "--size", "201x198", "--stage-strength", 0.3, *more)[0] == 0
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["a-stage1.png", "a-stage2.png", "a.png"]
    sizes = [[64, 64], [112, 112], [201, 198]]
    for number, (name, size) in enumerate(zip(files, sizes, strict=True), 1):
        record = read_record(tmp_path / name)
        assert list(Image.open(tmp_path / name).size) == size == [record["width"], record["height"]]
        assert record["stages"] == sizes and record["stage"] == number and record["seed"] == 3
        assert record["schedule"] == {"sigma": 0.3, "steps": 1, "guide": None, "enlarged_in": "pixels"}
    small = Image.open(tmp_path / "a-stage2.png").resize((201, 198), Image.Resampling.LANCZOS)
    blurred = [np.asarray(image.resize((25, 25)), int) for image in (small, Image.open(tmp_path / "a.png"))]
    assert np.corrcoef(blurred[0].ravel(), blurred[1].ravel())[0, 1] > 0.5, "a stage shows what the one before does"


def test_a_killed_cascade_goes_on_from_its_last_stage(command, tmp_path, monkeypatch):
    words = ["--model", "flux", "--adapter", "adapter", *FIRST, "--size", "512x512"]
    assert command("generate", *words, out="whole.png")[0] == 0
    save, saves = cascade.save_image, []

    def stop(image, path, record):
        if path.name == "a-stage3.png":
            raise KeyboardInterrupt
        save(image, path, record)

    with monkeypatch.context() as patch:
        patch.setattr(cascade, "save_image", stop)
        assert command("generate", *words)[0] == 130
    assert sorted(path.name for path in tmp_path.glob("a*")) == ["a-stage1.png", "a-stage2.png"]
    monkeypatch.setattr(
        cascade, "save_image", lambda image, path, record: (saves.append(path.name), save(image, path, record))
    )
    assert command("generate", *words)[0] == 0
    assert saves == ["a-stage3.png", "a.png"]
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "whole.png"))
    (tmp_path / "a.png").unlink()
    (tmp_path / "a-stage1.png").unlink()  # the newest stage is enough
    saves.clear()
    assert command("generate", *words)[0] == 0
    assert saves == ["a.png"]
    saves.clear()
    assert command("generate", *words)[0] == 0
    assert saves == []
    assert command("generate", *words, "--stage-steps", 2)[0] == 0
    assert saves == ["a-stage1.png", "a-stage2.png", "a-stage3.png", "a.png"], "other settings, other stages"


def test_a_damaged_stage_is_told(command, tmp_path):
    words = ["--model", "flux", *FIRST, "--size", "256x256"]
    assert command("generate", *words)[0] == 0
    (tmp_path / "a.png").unlink()
    whole = (tmp_path / "a-stage2.png").read_bytes()
    (tmp_path / "a-stage2.png").write_bytes(whole[: len(whole) // 2])
    code, _, err = command("generate", *words)
    assert code == 1 and "a-stage2.png is damaged or no image: " in err and err.count("\n") == 1, err
    assert err.endswith(": delete it, or give another --out\n")
    (tmp_path / "a-stage2.png").unlink()
    assert command("generate", *words)[0] == 0 and (tmp_path / "a-stage2.png").read_bytes() == whole


def test_what_a_stopped_run_did_not_clear_up_is(command, tmp_path, monkeypatch):
    """A small copy that is missing is made, of a stage that is gone on from too, and a killed process's files removed."""
    monkeypatch.setattr(strips_file, "PREVIEW_FROM", 100)
    words = ["generate", "--model", "sd3", *FIRST, "--size", "256x256"]
    assert command(*words)[0] == 0
    names = {"a-stage1.png", "a-stage2.png", "a-stage2.preview.jpg", "a.png", "a.preview.jpg"}
    assert {path.name for path in tmp_path.iterdir()} == names
    small, ended = (tmp_path / "a.preview.jpg").read_bytes(), subprocess.Popen(["true"])
    ended.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: ended.pid)
        left = [temporary_path(tmp_path / name) for name in ("a-stage2.png", "a.preview.jpg", "b.png")]
    for path in left:
        path.touch()
    (tmp_path / "a.preview.jpg").unlink()
    assert command(*words)[0] == 0 and (tmp_path / "a.preview.jpg").read_bytes() == small
    assert {path.name for path in tmp_path.iterdir()} == names | {left[2].name}
    for name in ("a.png", "a-stage2.preview.jpg"):
        (tmp_path / name).unlink()
    assert command(*words)[0] == 0 and {path.name for path in tmp_path.iterdir()} == names | {left[2].name}


def test_an_image_is_upscaled(command, tmp_path):
    words = ["photo.png", "--model", "sd3", "--scale", 3, "--stage-strength", 0.01]
    code, out, _ = command("upscale", *words, "--json")
    assert code == 0 and json.loads(out)["files"] == [str(tmp_path / "a.png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-stage1.png", "a.png"]
    record = read_record(tmp_path / "a.png")
    assert record["stages"] == [[168, 128], [288, 216]] and record["enlarged"] == "photo.png"
    image = Image.open(tmp_path / "a.png")
    assert image.size == (288, 216)
    pipeline = hybriddit.HybridStableDiffusion3Pipeline.from_pretrained("sd3")
    vae, size = pipeline.vae, (168, 128)
    latents = encode_enlarged(pipeline, Image.open("photo.png"), size, size, False)
    with torch.no_grad():
        alone = vae.decode(latents).sample[0, :, ::8, ::8].flatten()  # what the untrained VAE makes of it
    stage = torch.from_numpy(pixels(tmp_path / "a-stage1.png")[::8, ::8]).permute(2, 0, 1).flatten()
    assert torch.corrcoef(torch.stack((alone, stage.float())))[0, 1] > 0.9
    before = pixels(tmp_path / "a.png")
    Image.open("photo.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("other.png")
    other = Path("other.png").read_bytes()
    kept = Path("photo.png").read_bytes()
    try:  # the same name, another picture
        Path("photo.png").write_bytes(other)
        assert command("upscale", *words)[0] == 0
    finally:
        Path("photo.png").write_bytes(kept)
    assert not np.array_equal(pixels(tmp_path / "a.png"), before)


def save_upscaler(path, scale, seed=0):
    """A file of Real-ESRGAN's small architecture, untrained: it enlarges like PIL's nearest, and adds a little."""
    torch.manual_seed(seed)
    module = Compact(num_feat=8, num_conv=1, upscale=scale)
    module.body[-1].weight.data *= 0.1
    torch.save({"params": module.state_dict()}, path)


def test_stages_are_enlarged_by_an_upscaler(command, tmp_path, capsys):
    save_upscaler(tmp_path / "up.pth", 4)
    words = ["--model", "flux", "--adapter", "adapter", *FIRST, "--size", "256x256", "--stage-strength", 0.01]
    with_it = [*words, "--upscaler", tmp_path / "up.pth"]
    assert command("generate", *words, out="plain.png")[0] == 0 and command("generate", *with_it)[0] == 0
    record = read_record(tmp_path / "a.png")
    assert record["upscaler"] == str(tmp_path / "up.pth") and len(record["upscaler_sha256"]) == 64
    assert np.array_equal(pixels(tmp_path / "a-stage1.png"), pixels(tmp_path / "plain-stage1.png"))
    for name in ("-stage2.png", ".png"):
        assert not np.array_equal(pixels(tmp_path / f"a{name}"), pixels(tmp_path / f"plain{name}"))
    before = (tmp_path / "a.png").stat().st_mtime_ns
    assert command("generate", *with_it)[0] == 0 and (tmp_path / "a.png").stat().st_mtime_ns == before
    save_upscaler(tmp_path / "up.pth", 4, seed=1)  # the same name, other weights
    assert command("generate", *with_it)[0] == 0 and (tmp_path / "a.png").stat().st_mtime_ns != before
    save_upscaler(tmp_path / "two.pth", 2)
    for more, said in (
        (
            ["--upscaler", tmp_path / "two.pth", "--stage-scale", 4],
            "the upscaler enlarges 2 times, and a stage from 64",
        ),
        (["--upscaler", tmp_path / "none.pth"], "no upscaler"),
        (["--upscaler", "photo.png"], "photo.png is damaged, or holds more than tensors"),
    ):
        code, _, err = command("generate", *words, *more, out="c.png")
        assert code == 1 and said in err and err.count("\n") == 1 and not list(tmp_path.glob("c*")), err


def test_latents_are_enlarged_where_they_are_asked_for(command, tmp_path):
    """The first stage is the same, the next is not; nor is one kept that was made otherwise."""
    assert cli.ENLARGED_IN == ENLARGED_IN
    words = ["generate", "--model", "sd3", *FIRST, "--size", "128x128", "--stage-strength", 0.001]
    assert command(*words)[0] == 0
    first, pixelwise = pixels(tmp_path / "a-stage1.png"), pixels(tmp_path / "a.png")
    assert command(*words, "--stage-enlarge", "pixels")[0] == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixelwise)
    assert command(*words, "--stage-enlarge", "latents")[0] == 0
    assert read_record(tmp_path / "a.png")["schedule"]["enlarged_in"] == "latents"
    assert np.array_equal(pixels(tmp_path / "a-stage1.png"), first)
    pipeline = hybriddit.HybridStableDiffusion3Pipeline.from_pretrained("sd3")
    small = encode_enlarged(pipeline, Image.open(tmp_path / "a-stage1.png"), (64, 64), (64, 64), False)
    latents = torch.nn.functional.interpolate(small, size=(32, 32), mode="bicubic")
    with torch.no_grad():
        alone = pipeline.vae.decode(latents).sample[0].clamp(-1, 1).permute(1, 2, 0).flatten()  # the start
    nearness = [np.corrcoef(alone, image.ravel())[0, 1] for image in (pixels(tmp_path / "a.png"), pixelwise)]
    assert nearness[0] > 0.95 > nearness[1], nearness
    code = command("upscale", "photo.png", "--model", "sd3", "--scale", 2, "--stage-enlarge", "latents", out="b.png")[0]
    assert code == 0 and read_record(tmp_path / "b.png")["schedule"]["enlarged_in"] == "latents"


def test_stages_of_a_class(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8, "num_classes": 3}
    SiTPipeline(SiTTransformer2DModel(**sizes, in_channels=1)).save_pretrained(tmp_path / "sit")
    words = ["generate", "--model", str(tmp_path / "sit"), "--class-label", "1", "--steps", "2", "--size", "30x30"]
    words += ["--out", str(tmp_path / "a.png")]
    assert main([*words, "--quiet"]) == 0
    assert [Image.open(tmp_path / f"a{name}.png").size for name in ("-stage1", "-stage2", "")] == [
        (8, 8),
        (16, 16),
        (30, 30),
    ]
    (tmp_path / "a.png").unlink()
    assert main(words) == 0
    assert "stage 2 of 3 is there" in capsys.readouterr().out
    save_upscaler(tmp_path / "up.pth", 2)
    assert main([*words[:-1], str(tmp_path / "up.png"), "--upscaler", str(tmp_path / "up.pth"), "--quiet"]) == 0
    assert Image.open(tmp_path / "up.png").size == (30, 30)
    assert not np.array_equal(pixels(tmp_path / "up.png"), pixels(tmp_path / "a.png"))
    for more, said in (
        (["--positions", "plain"], "a SiT spreads its own"),
        (["--schedule", "residual"], "not for a SiT"),
    ):
        assert main([*words, *more]) == 1 and said in capsys.readouterr().err


def test_stages_within_a_limit_of_memory(command, tmp_path):
    words = ["--model", "flux", "--adapter", "adapter", *FIRST, "--size", "512x496"]
    assert command("generate", *words, out="free.png")[0] == 0
    code, _, err = command("generate", *words, "--max-memory", 0.012)
    assert code == 0, err
    assert [read_record(tmp_path / name)["tiles"] for name in ("a-stage1.png", "a.png", "free.png")] == [
        False,
        True,
        False,
    ]
    before = (tmp_path / "a.png").stat().st_mtime_ns
    assert command("generate", *words)[0] == 0 and (tmp_path / "a.png").stat().st_mtime_ns == before, "kept, in tiles"
    free, tight = (np.asarray(Image.open(tmp_path / name).resize((64, 62)), float) for name in ("free.png", "a.png"))
    assert np.corrcoef(free.ravel(), tight.ravel())[0, 1] > 0.7, "tiles are encoded and decoded by themselves"
    code, _, err = command("generate", *words, "--max-memory", 0.001, out="b.png")
    assert code == 1 and "GiB" in err and not list(tmp_path.glob("b*")), "refused before the first stage"


def test_the_tiles_that_are_asked_for_are_those_of_encoding_too(command, tmp_path, monkeypatch):
    """By a dense model, of which no memory is planned: the enlarged image is never there as a whole."""
    monkeypatch.setattr(AutoencoderKL, "encode", AutoencoderKL.encode)
    note_encoded(tmp_path / "encoded", 0)
    assert command("generate", "--model", "sd3", *FIRST, "--size", "128x124", "--vae-tiling")[0] == 0
    sizes = [tuple(map(int, line.split()[2:])) for line in (tmp_path / "encoded.0").read_text().splitlines()]
    assert len(sizes) == 1 + 6 * 6 and max(max(size) for size in sizes) == 32


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_a_full_device_is_one_line(part, command, tmp_path, monkeypatch):
    """While the first stage is encoded, and while the last is decoded, strip by strip."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(f"diffusers.AutoencoderKL.{part}", full)
    words = ["--model", "flux", "--adapter", "adapter", *FIRST, "--size", "128x128"]
    code, _, err = command("generate", *words, *(["--max-memory", 0.1] if part == "decode" else []))
    assert code == 1 and err.splitlines()[-1].startswith("hybriddit: the image does not fit the device's memory"), err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "64x64"], "64 x 64 pixels are no larger than the first stage, 64 x 64"),
        (["--size", "512"], "a size is WIDTHxHEIGHT in pixels, such as 4096x2048, not '512'"),
        (["--size", "9" * 5000 + "x512"], "a size is WIDTHxHEIGHT in pixels, such as 4096x2048, not '9999"),
        (["--size", "0x512"], "a size is WIDTHxHEIGHT"),
        (["--size", "128x128", "--schedule", "fast"], "unknown schedule 'fast': choose from refine, sdedit"),
        (["--size", "128x128", "--stage-strength", "1.5"], "the noise of a stage is above 0"),
        (["--size", "128x128", "--stage-steps", "0"], "a stage takes 1 step or more"),
        (["--size", "128x128", "--stage-scale", "1.0001"], "at least 1.2 times as large"),
        (
            ["--size", "128x128", "--stage-enlarge", "latents", "--upscaler", __file__],
            "--upscaler enlarges pixels, not latents: leave it or --stage-enlarge out",
        ),
        (["--stage-enlarge", "pixels"], "are for images in stages: give --size too"),
        (["--size", "128x256"], "128 x 256 pixels are of another shape than 64 x 64, which would be stretched"),
        (["--size", "128x128", "--height", "63"], "height 63 of the first stage is no multiple of 8"),
        (["--size", "128x128", "--positions", "far"], "positions of FLUX are plain or interpolated or ntk"),
        (["--size", "128x128", "--image", "photo.png"], "--image has no meaning for an image in stages"),
        (["--schedule", "refine"], "are for images in stages: give --size too"),
        (["--positions", "yarn"], "are for images in stages: give --size too"),
        (["--size", "2000000x2000000", "--max-memory", "0.002"], "pixels need"),
    ],
)
def test_what_generate_refuses(words, said, command, tmp_path):
    code, _, err = command("generate", "--model", "flux", "--adapter", "adapter", *FIRST, *words)
    assert code == 1 and said in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["photo.png", "--scale", "1"], "enlarged more than 1 times, not 1.0"),
        (["photo.png", "--scale", "nan"], "enlarged more than 1 times"),
        (["photo.png", "--scale", "1e300"], "an image file has at most 2147483647 pixels a side"),
        (["photo.png", "--size", "96x72"], "96 x 72 pixels are no larger than the image, 96 x 72"),
        (["photo.png", "--size", "500x100"], "of another shape than 96 x 72"),
        (["nothing.png", "--scale", "2"], "no image file nothing.png"),
    ],
)
def test_what_upscale_refuses(words, said, command, tmp_path):
    code, _, err = command("upscale", *words, "--model", "flux")
    assert code == 1 and said in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.png", "a-stage1.png"])
def test_the_image_itself_is_not_overwritten(name, command, saved, tmp_path):
    (tmp_path / name).write_bytes((saved / "photo.png").read_bytes())
    code, _, err = command("upscale", tmp_path / name, "--scale", 4, "--model", "sd3")
    assert code == 1 and f"{name} is the image that is enlarged, and would be overwritten: give another --out" in err
    assert (tmp_path / name).read_bytes() == (saved / "photo.png").read_bytes()


def test_another_s_file_with_a_stage_s_name_is_kept(command, saved, tmp_path):
    (tmp_path / "a-stage1.png").write_bytes((saved / "photo.png").read_bytes())
    code, _, err = command("generate", "--model", "sd3", *FIRST, "--size", "128x128")
    assert code == 1 and "a-stage1.png is there already, and is no image of hybriddit's: move it" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a-stage1.png"]
    assert (tmp_path / "a-stage1.png").read_bytes() == (saved / "photo.png").read_bytes()


def test_a_size_beyond_the_table_of_positions(command, tmp_path):
    code, _, err = command("generate", "--model", "sd3", *FIRST, "--size", "512x512", "--positions", "plain")
    assert code == 1 and "an image of 32 x 32 tokens is too large: this model has positions for 16 x 16" in err
    assert not list(tmp_path.iterdir())
    code, _, err = command("generate", "--model", "sd3", "--size", "4096x16")
    assert code == 1 and "4096 x 16 pixels are too long a shape for this model, whose own size in it is 1024 x 8" in err
    assert not list(tmp_path.iterdir())
    assert command("generate", "--model", "sd3", *FIRST, "--size", "512x512")[0] == 0
    assert read_record(tmp_path / "a.png")["positions"] == "interpolated"


def test_sizes_are_read():
    assert parse_size("16384x8192") == (16384, 8192) and parse_size("640X480") == (640, 480)


def note_encoded(file, rank):
    """Write a line for each image or tile that the VAE encodes."""
    encode = AutoencoderKL.encode

    def noted(vae, pixels, *more, **options):
        with open(f"{file}.{rank}", "a") as lines:
            print(*pixels.shape, file=lines)
        return encode(vae, pixels, *more, **options)

    AutoencoderKL.encode = noted


def test_processes_make_each_stage_together(command, tmp_path):
    """Two processes, each some of the rows, of the VAE's tiles and the upscaler's: the images of one, up to a level."""
    save_upscaler(tmp_path / "up.pth", 4)
    words = ["generate", "--model", "flux", "--adapter", "adapter", *FIRST, "--size", "256x248", "--vae-tiling"]
    words += ["--stage-scale", "4", "--upscaler", str(tmp_path / "up.pth")]
    assert command(*words, out="one.png")[0] == 0
    given = [*words, "--prompt", "a red shoe", *SMALL, "--out", str(tmp_path / "two.png"), "--parallel"]
    before = partial(note_encoded, tmp_path / "encoded")
    assert finish_together(2, *given, output=tmp_path / "said", before=before) == [0, 0]
    for rank, tiles in enumerate((61, 60)):  # of 121, behind the crops for the norms
        encoded = (tmp_path / f"encoded.{rank}").read_text().splitlines()
        assert len(encoded) == 1 + tiles, encoded
    for name in ("one-stage1.png", "one.png"):
        assert np.abs(pixels(tmp_path / name) - pixels(tmp_path / name.replace("one", "two"))).max() <= 2
    (tmp_path / "two.png").unlink()
    assert finish_together(2, *given, output=tmp_path / "said") == [0, 0]
    assert np.abs(pixels(tmp_path / "one.png") - pixels(tmp_path / "two.png")).max() <= 2


def open_on_own_disk(rank, folder):
    os.chdir(folder / f"disk{rank}")
    found = image_of_first(Path("a.png"), torch.distributed.group.WORLD)
    assert np.array_equal(np.asarray(found), pixels(folder / "disk0" / "a.png"))


def test_a_stage_that_only_the_first_process_has_is_gone_on_from(saved, tmp_path):
    for rank in range(2):
        (tmp_path / f"disk{rank}").mkdir()
    (tmp_path / "disk0" / "a.png").write_bytes((saved / "photo.png").read_bytes())
    assert in_two_processes(open_on_own_disk, tmp_path, output=tmp_path / "said") == [0, 0]
