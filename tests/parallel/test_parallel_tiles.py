"""The tiles of a VAE, decoded and encoded, and of an upscaler, that several processes share: against one process."""

from functools import partial
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from PIL import Image
from runs import in_processes
from tiny_pipelines import tiny_pipeline
from tqdm import tqdm

from hybriddit.parallel import shared_tiles, spread_tiles
from hybriddit.pipelines.cascade import Schedule, encode_enlarged, repainting
from hybriddit.pipelines.memory import decode_in_strips
from hybriddit.pipelines.upscaler import TILE, Upscaler


def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def decode_together(rank):
    vae = tiny_vae()
    vae.enable_tiling()
    calls = []
    vae.decoder.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[-2:]))
    for shape, tiles in (((2, 4, 21, 15), 12), ((1, 4, 9, 9), 4), ((1, 4, 8, 8), 1)):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            wanted = AutoencoderKL.tiled_decode(vae, z).sample if tiles > 1 else vae.decode(z).sample
            assert len(calls) == tiles
            spread_tiles(vae, dist.group.WORLD)
            calls.clear()
            found = vae.decode(z).sample
        assert torch.equal(found, wanted) and "forward" not in vars(vae.decoder)
        # both of diffusers' own calls, and the tiles that this process has decoded
        own = len(range(rank, tiles, dist.get_world_size()))
        assert len(calls) == (2 * tiles + own if tiles > 1 else 1)
        del vae.tiled_decode
        calls.clear()


def test_several_processes_decode_the_tiles_of_one(tmp_path):
    codes = in_processes(3, decode_together, output=tmp_path / "said")
    assert codes == [0] * 3, (tmp_path / "said.0").read_text()


def decode_strips_together(rank):
    vae, calls = tiny_vae(), []
    z = torch.randn(1, 4, 21, 15, generator=torch.Generator().manual_seed(1))
    wanted = list(decode_in_strips(vae, z))
    vae.decoder.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[-2:]))
    found = list(decode_in_strips(vae, z, partial(shared_tiles, group=dist.group.WORLD)))
    assert len(found) == len(wanted) == 4 and all(map(np.array_equal, found, wanted))
    assert len(calls) == 1 + 4  # crops for the norms; and of the three tiles in each of four rows, one each


def test_several_processes_share_the_tiles_of_strips(tmp_path):
    codes = in_processes(3, decode_strips_together, output=tmp_path / "said")
    assert codes == [0] * 3, (tmp_path / "said.0").read_text()


def note(found, name):
    """A hook that notes the sizes that a module is called with."""
    return lambda module, args: found.setdefault(name, []).append(tuple(args[0].shape))


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


class Nearest(torch.nn.Module):
    """Each pixel becomes 2 x 2 of it."""

    def forward(self, images):
        return images.repeat_interleave(2, 2).repeat_interleave(2, 3)


def encode_and_enlarge_together(rank):
    """Of numbers of tiles that the processes do not divide, and of fewer tiles than processes."""
    calls, world = {}, dist.get_world_size()
    share = partial(shared_tiles, group=dist.group.WORLD)
    pipeline = tiny_pipeline("flux_dev")
    vae = pipeline.vae
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 8
    vae.encoder.register_forward_pre_hook(note(calls, "encoder"))
    resize = Image.Image.resize
    image = picture(56, 40)

    def resized(self, size, *rest):
        calls.setdefault("resize", []).append(size)
        return resize(self, size, *rest)

    for size, padded, tiles in (((112, 80), (112, 80), 20), ((40, 24), (40, 24), 2), ((90, 150), (96, 152), 28)):
        arguments = (pipeline, image, size, padded, True)
        wanted = encode_enlarged(*arguments)
        crops = len(calls["encoder"]) - tiles
        assert crops == 1, calls
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image.Image, "resize", resized)
            found = encode_enlarged(*arguments, share)
        assert torch.equal(found, wanted) and found.std() > 0.01
        own, places = len(range(rank, tiles, world)), calls["encoder"][0][0]
        assert len(calls["encoder"]) == 1 + own and len(calls["resize"]) == places + own
        calls.clear()

    upscaler = Upscaler(Nearest(), 2)
    upscaler.module.register_forward_pre_hook(note(calls, "upscaler"))
    for shape, tiles in (
        ((2 * TILE + 17, TILE + 90), 6),
        ((TILE + 1, 3 * TILE + 1), 8),
        ((TILE + 5, 24), 2),
        ((9, 8), 1),
    ):
        arguments = (picture(*shape), (shape[0] * 2, shape[1] * 2 - 1), "cpu")
        wanted = upscaler.enlarge(*arguments, tqdm)
        assert len(calls.pop("upscaler")) == tiles
        bar = MagicMock()  # what a pipeline's progress_bar gives
        found = upscaler.enlarge(*arguments, bar, share)
        assert np.array_equal(found, wanted)
        assert bar.return_value.__enter__.return_value.update.call_count == tiles
        assert len(calls.pop("upscaler", [])) == len(range(rank, tiles, world))

    image, schedule = picture(64, 64), Schedule(0.3, 2, "residual")
    starts = []
    for given in ({}, {"share": share}):
        generator = torch.Generator().manual_seed(0)
        given |= {"tiles": True, "upscaler": upscaler}
        with repainting(pipeline, image, (120, 118), schedule, generator, **given) as arguments:
            starts.append(arguments["latents"])
    assert torch.equal(*starts)


def test_several_processes_share_what_an_enlarged_image_takes(tmp_path):
    codes = in_processes(3, encode_and_enlarge_together, output=tmp_path / "said")
    assert codes == [0] * 3, "".join((tmp_path / f"said.{rank}").read_text() for rank in range(3))
