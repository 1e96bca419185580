"""Group norms of a VAE's tiles by statistics of the whole image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from hybriddit.pipelines.memory import decode_in_strips
from hybriddit.pipelines.tile_norms import CROPS, crop_places, norms_of_crops


def tiny_vae(attention=False):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=attention,
    ).eval()  # fmt: skip
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return vae


def pixels(decoded):
    return ((decoded[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy().astype(int)


def psnr(one, other):
    return 10 * np.log10(255**2 / np.square(np.asarray(one, float) - other).mean())


@pytest.mark.parametrize("size", [(7, 100), (64, 64), (33, 500), (1, 1)])
def test_crops_are_spread_over_the_image(size):
    assert crop_places(size, 128)[1] == tuple(min(32, length) for length in size)
    few, crop = crop_places(size, 6)
    assert len(few) == 4 and crop == tuple(min(6, length) for length in size)
    assert len(crop_places(size, 16)[0]) == 9
    assert crop_places(size, 64, 4)[1] == tuple(min(32, length) for length in size)
    places, crop = crop_places(size, 32)
    assert len(places) == CROPS**2 and crop == tuple(min(8, length) for length in size)
    for axis in (0, 1):
        at = sorted({place[axis] for place in places})
        assert at[0] == 0 and at[-1] == size[axis] - crop[axis]
        assert max(np.diff(at), default=0) <= (size[axis] - crop[axis]) / (CROPS - 1) + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_have_the_statistics_of_the_inside_of_all_crops(dtype):
    """Against a mean and variance written out: of a batch's inner half, and for other tensors afterwards."""
    torch.manual_seed(0)
    part = nn.ModuleDict({"norm": nn.GroupNorm(3, 6), "rest": nn.Conv2d(6, 6, 1)}).to(dtype)
    norm = part["norm"]
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    crops, tile = torch.randn(5, 6, 8, 12).to(dtype) * 3 + 1, torch.randn(1, 6, 20, 20).to(dtype)
    vae = nn.Module()
    vae.use_slicing = True

    def run():
        assert not vae.use_slicing
        return norm(crops)

    inner = crops.double()[:, :, 2:6, 3:9].unflatten(1, (3, 2))
    mean, variance = inner.mean((0, 2, 3, 4)), inner.var((0, 2, 3, 4), correction=0)
    weight, bias = (x.double().view(3, 2, 1, 1) for x in (norm.weight, norm.bias))

    def expected(x):
        x = x.double().unflatten(1, (3, 2))
        return (((x - mean.view(3, 1, 1, 1)) / (variance.view(3, 1, 1, 1) + norm.eps).sqrt()) * weight + bias).flatten(
            1, 2
        )

    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    own, found = norm(tile), []
    with norms_of_crops(vae, part, lambda: found.append(run())):
        assert vae.use_slicing
        assert (found[0].double() - expected(crops)).abs().max() < tolerance * 4
        assert (norm(tile).double() - expected(tile)).abs().max() < tolerance * 4 and norm(tile).dtype == dtype
    assert torch.equal(norm(tile), own)
    with pytest.raises(KeyError), norms_of_crops(vae, part, run):
        raise KeyError
    assert torch.equal(norm(tile), own) and vae.use_slicing
    with pytest.raises(ZeroDivisionError), norms_of_crops(vae, part, lambda: 1 / 0):
        pass
    assert torch.equal(norm(tile), own) and vae.use_slicing


def test_weights_that_are_not_in_memory_leave_norms_as_they_are():
    part = nn.Sequential(nn.GroupNorm(2, 4))
    x = torch.randn(1, 4, 5, 5)
    offloaded = nn.GroupNorm(2, 4, device="meta")
    with norms_of_crops(nn.Module(), nn.ModuleList([part, offloaded]), lambda: 1 / 0):
        assert torch.allclose(part(x), F.group_norm(x, 2))


@pytest.mark.parametrize("attention", [False, True])
def test_an_image_of_one_tile_is_what_the_vae_makes(attention):
    vae, latents = tiny_vae(attention), torch.randn(1, 4, 12, 11)
    with torch.no_grad():
        assert np.array_equal(np.concatenate(list(decode_in_strips(vae, latents))), pixels(vae.decode(latents).sample))


@pytest.mark.parametrize("slices", [False, True])
def test_tiles_of_unlike_parts_come_near_the_whole(slices):
    """One half of the image is flat and the other is not: tiles' own statistics give them one contrast."""
    vae, latents = tiny_vae(), torch.randn(1, 4, 64, 64)
    latents[..., 32:] *= 0.02
    vae.use_slicing = slices
    with torch.no_grad():
        whole = pixels(vae.decode(latents).sample)
        own = pixels(vae.tiled_decode(latents).sample)
    assert psnr(np.concatenate(list(decode_in_strips(vae, latents))), whole) > psnr(own, whole) + 8


def test_the_demo_s_vae_shows_no_tiles():
    """On a picture of the kind it knows, at four times its size: 46 dB to the whole, where own statistics give 36."""
    vae = AutoencoderKL.from_pretrained("assets/demo-teacher/vae").eval()
    picture = np.zeros((256, 256, 3), np.uint8)
    picture[80:180, 20:90], picture[100:170, 180:230] = (30, 160, 70), (160, 120, 20)
    picture = np.asarray(Image.fromarray(picture).resize((128, 128)).resize((256, 256), Image.Resampling.LANCZOS))
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mode()
        whole, own = pixels(vae.decode(latents).sample), pixels(vae.tiled_decode(latents).sample)
    found = psnr(np.concatenate(list(decode_in_strips(vae, latents))), whole)
    assert found > 40 and found > psnr(own, whole) + 5
