"""Upscaler modules: their files, tiles, and what is refused. Oracles: PIL's filters, and the module on the whole image."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from spandrel.architectures.Compact import Compact
from spandrel.architectures.ESRGAN import ESRGAN
from tiny_pipelines import tiny_pipeline
from torch import nn

from hybriddit.pipelines.cascade import Schedule, repainting
from hybriddit.pipelines.upscaler import AROUND, TILE, Upscaler, load_upscaler


class Nearest(nn.Module):
    """Each pixel becomes scale x scale of it."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.seen = scale, []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return images.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


class Blurred(Nearest):
    """The same, of an image that is blurred over 9 x 9 pixels: what is around a tile counts."""

    def forward(self, images):
        return super().forward(nn.functional.avg_pool2d(images, 9, 1, 4, count_include_pad=False))


class Bar:
    """What a pipeline's progress_bar gives."""

    def __init__(self):
        self.total, self.done = None, 0

    def __call__(self, total):
        self.total = total
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def set_description(self, text):
        pass

    def update(self):
        self.done += 1


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def enlarged(upscaler, image, size):
    return np.asarray(upscaler.enlarge(image, size, "cpu", Bar()), int)


@pytest.mark.parametrize("shape", [(40, 24), (TILE, TILE), (2 * TILE + 17, TILE + 90)])
@pytest.mark.parametrize("scale", [2, 3])
def test_tiles_are_the_whole_image(shape, scale):
    image, size, bar = picture(*shape), (scale * shape[0], scale * shape[1]), Bar()
    module = Nearest(scale)
    found = Upscaler(module, scale).enlarge(image, size, "cpu", bar)
    assert found.size == size and np.array_equal(found, image.resize(size, Image.Resampling.NEAREST))
    assert bar.done == bar.total == len(module.seen) == -(-shape[0] // TILE) * -(-shape[1] // TILE)
    assert all(max(seen[2:]) <= TILE + 2 * AROUND for seen in module.seen)


def test_what_is_around_a_tile_is_seen():
    image = picture(2 * TILE, TILE)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    expected = (Blurred(2)(pixels)[0] * 255).round().permute(1, 2, 0).int().numpy()
    assert np.array_equal(enlarged(Upscaler(Blurred(2), 2), image, (4 * TILE, 2 * TILE)), expected)


@pytest.mark.parametrize("size", [(600, 450), (401, 301), (1610, 1204)])
def test_other_sizes_than_the_module_s_are_resampled(size):
    """Against PIL, of the whole image at four times its size. It rounds a box to float32: two levels, of noise."""
    image = picture(400, 300)
    expected = image.resize((1600, 1200), Image.Resampling.NEAREST).resize(size, Image.Resampling.LANCZOS)
    assert np.abs(enlarged(Upscaler(Nearest(4), 4), image, size) - np.asarray(expected, int)).max() <= 2


def test_any_image_becomes_rgb():
    image = picture(8, 8).convert("L")
    found = enlarged(Upscaler(Nearest(2), 2), image, (16, 16))
    assert np.array_equal(found, np.repeat(np.asarray(image.resize((16, 16), 0))[..., None], 3, 2))


def test_a_stage_is_enlarged_by_it():
    """Without noise to speak of, what is painted is the VAE's latents of what the module made."""
    for pipeline in (tiny_pipeline("flux_dev"), tiny_pipeline("sd3")):
        image, size = picture(32, 32), (64, 64)
        given = {"tiles": False, "upscaler": Upscaler(Nearest(2), 2)}
        starts = []
        for enlarge, more in ((image, given), (image.resize(size, Image.Resampling.NEAREST), {}), (image, {})):
            generator = torch.Generator().manual_seed(0)
            with repainting(pipeline, enlarge, size, Schedule(0.01, 1), generator, **more) as arguments:
                starts.append(arguments["latents"])
        assert torch.equal(starts[0], starts[1]) and not torch.allclose(starts[0], starts[2], atol=0.01)


def test_what_a_stage_refuses():
    pipeline, image, module = tiny_pipeline("flux_dev"), picture(32, 32), Nearest(2)
    schedule, latents = Schedule(0.1, 1), Schedule(0.1, 1, enlarged_in="latents")
    for size, how, upscaler, said in (
        (
            (96, 96),
            schedule,
            Upscaler(module, 2),
            r"enlarges 2 times, and a stage from 32 x 32 to 96 x 96 .* is 3 times",
        ),
        (
            (64, 64),
            schedule,
            Upscaler(module, 4),
            r"makes \(1, 3, 64, 64\) of \(1, 3, 32, 32\), not \(1, 3, 128, 128\)",
        ),
        ((64, 64), latents, Upscaler(module, 2), "enlarges pixels, and this schedule latents"),
        ((64, 64), schedule, Upscaler(Nan(2), 2), "not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            repainting(pipeline, image, size, how, torch.Generator(), upscaler=upscaler).__enter__()


class Nan(Nearest):
    def forward(self, images):
        return super().forward(images) * torch.nan


# a few channels of the architectures of Real-ESRGAN's files, which name their weights so
def modules():
    torch.manual_seed(0)
    return {
        "esrgan": (ESRGAN(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=4), 4),
        "compact": (Compact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=2, upscale=2), 2),
    }


@pytest.mark.parametrize("kind", ["esrgan", "compact"])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "params_ema.pth"])
def test_files_of_real_esrgan_s_architectures(kind, name, tmp_path):
    module, scale = modules()[kind]
    state = module.state_dict()
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"params_ema": state} if "ema" in name else state, path)
    upscaler = load_upscaler(path)
    assert upscaler.scale == scale
    image = picture(24, 20)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = (module.eval()(pixels)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).int().numpy()
    found = enlarged(upscaler, image, (24 * scale, 20 * scale))
    assert np.array_equal(found, expected) and found.std() > 1
    weights = {p.dtype for p in load_upscaler(path, torch.bfloat16).module.parameters()}
    assert weights == {torch.bfloat16}


def test_files_that_are_no_upscalers(tmp_path):
    path = tmp_path / "a.pth"
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.pth"):
        load_upscaler(path)
    for content, said in (
        ({"weight": torch.ones(2)}, "is no upscaler that spandrel .* knows"),
        ([torch.ones(2)], "it holds no state dict"),
        (ESRGAN(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=1).state_dict(), "is no upscaler of RGB"),
        (ESRGAN(in_nc=1, out_nc=1, num_filters=8, num_blocks=1, scale=2).state_dict(), "is no upscaler of RGB"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=said) as caught:
            load_upscaler(path)
        assert "\n" not in str(caught.value)
    state = modules()["esrgan"][0].state_dict()
    state[next(iter(state))] = torch.ones(5, 5)
    torch.save(state, path)
    with pytest.raises(ValueError, match="is no upscaler that spandrel"):
        load_upscaler(path)
    path.write_bytes(pickle.dumps(print, 2))  # nothing is called that a file names
    with pytest.raises(ValueError, match="is damaged, or holds more than tensors"):
        load_upscaler(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged, or holds more than tensors"):
        load_upscaler(path)
