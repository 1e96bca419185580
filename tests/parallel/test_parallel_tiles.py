"""A VAE's tiles that several processes decode together, against one process."""

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from runs import in_processes

from hybriddit.parallel import spread_tiles


def decode_together(rank):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
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
