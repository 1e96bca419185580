"""A VAE's tiles that several processes decode together, against one process."""

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from runs import in_processes

from hybriddit.parallel import decoding_together, spread_tiles
from hybriddit.pipelines.memory import decode_in_strips


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
    found = list(decode_in_strips(vae, z, decoding_together(vae, dist.group.WORLD)))
    assert len(found) == len(wanted) == 4 and all(map(np.array_equal, found, wanted))
    assert len(calls) == 1 + 4  # crops for the norms; and of the three tiles in each of four rows, one each


def test_several_processes_share_each_row_of_tiles(tmp_path):
    codes = in_processes(3, decode_strips_together, output=tmp_path / "said")
    assert codes == [0] * 3, (tmp_path / "said.0").read_text()
