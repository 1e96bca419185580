import torch
from diffusers import AutoencoderKL


def tiny_vae(seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=2,
        sample_size=8,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()
