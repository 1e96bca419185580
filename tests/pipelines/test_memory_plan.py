"""Large images within a limit of memory: the plan, the decoder in strips, and what the pipeline then gives."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from tiny_memory import allocated
from tiny_pipelines import TEXT_LENGTH, hybrid_pipeline, tiny_pipeline
from tiny_vae import without_norms

from hybriddit import HybridConfig, SiTPipeline, SiTTransformer2DModel, hybridize
from hybriddit.attention.rates import Rates
from hybriddit.machine import free_bytes
from hybriddit.models import family_of
from hybriddit.models.peak import decoder_peak, forward_peak
from hybriddit.pipelines import memory
from hybriddit.pipelines.cascade import encode_enlarged
from hybriddit.pipelines.memory import (
    MemoryPlan,
    decode_in_strips,
    free_beside_weights,
    make_within,
    plan_memory,
    strips_within,
)
from hybriddit.pipelines.prepare import place

CPU = torch.device("cpu")
VAE = {
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}


def peak_of(pipeline, width, height, rows, images=1):
    family, model = family_of(pipeline.transformer), pipeline.transformer
    side = family.token_pixels(model.config, pipeline.vae_scale_factor)
    text = family.example_text(model.config, images, family.text_length(), torch.zeros)
    grid = height // side, width // side
    return forward_peak(model, grid, text, device=CPU, dtype=model.dtype, rows=rows)


@pytest.mark.parametrize("kind", ["pixart_sigma", "flux_dev"])
def test_the_largest_strips_that_fit_are_taken(kind):
    pipeline = hybrid_pipeline(kind)
    side = family_of(pipeline.transformer).token_pixels(pipeline.transformer.config, pipeline.vae_scale_factor)
    width, height = 24 * side, 64 * side
    whole, half, quarter = (peak_of(pipeline, width, height, rows) for rows in (None, 32, 16))
    assert whole > half > quarter
    free = plan_memory(pipeline, width, height, available=2**40)
    assert (free.rows, free.tiles) == (None, False) and free.transformer == pytest.approx(1.1 * whole, rel=1e-3)
    tight = plan_memory(pipeline, width, height, available=int(1.1 * whole) - 1)
    assert tight.rows == 32 and tight.transformer == pytest.approx(1.1 * half, rel=1e-3)
    assert plan_memory(pipeline, width, height, available=int(1.1 * half) - 1).rows == 16
    with pytest.raises(ValueError, match=rf"{width} x {height} pixels need .* are there$"):  # none would
        plan_memory(pipeline, width, height, available=100)
    least = peak_of(pipeline, width, height, 8)
    with pytest.raises(ValueError, match="should fit") as told:  # of the same shape, and it does
        plan_memory(pipeline, width, height, available=least)
    fits = [int(word) for word in str(told.value).split(": ")[-1].split() if word.isdigit()]
    assert 0.8 < fits[0] / width <= 1 and 0.8 < fits[1] / height <= 1
    plan_memory(pipeline, *fits, available=least)


@pytest.mark.parametrize("size, available", [((1024, 128), 2**21), ((8192, 1024), 2**20)])
def test_a_size_that_should_fit_does(size, available):
    """From far beyond and from near, whatever part of the memory does not shrink with the image."""
    pipeline = hybrid_pipeline("flux_dev")
    with pytest.raises(ValueError, match="should fit") as told:
        plan_memory(pipeline, *size, available=available)
    fits = [int(word) for word in str(told.value).split(": ")[-1].split() if word.isdigit()]
    plan_memory(pipeline, *fits, available=available)


def test_a_plan_says_how_long_each_stage_takes_at_least():
    pipeline, rates = hybrid_pipeline("flux_dev"), Rates(1e9, 1e10)
    plan = plan_memory(pipeline, 96, 256, available=2**40)
    assert plan.times is None and "time" not in str(plan)
    once, often = (plan_memory(pipeline, 96, 256, available=2**40, passes=n, rates=rates) for n in (1, 20))
    assert (once.times.passes, often.times.passes) == (1, 20) and once.times.forward == often.times.forward
    seconds = 20 * once.times.forward
    said = str(often)
    assert f"{seconds:.2g} s, 20 x {once.times.forward:.2g} s" in said and "1 GB/s and 0.01 TFLOP/s" in said
    slower = plan_memory(pipeline, 96, 256, available=2**40, rates=Rates(1e8, 1e9))
    assert slower.times.forward == pytest.approx(10 * once.times.forward)
    assert slower.times.decoder == pytest.approx(10 * once.times.decoder)
    pipeline.vae.tile_latent_min_size = 16
    pipeline.vae.enable_tiling()  # tiles overlap
    tiled = plan_memory(pipeline, 96, 256, available=2**40, rates=rates)
    assert tiled.tiles and 1.2 < tiled.times.decoder / once.times.decoder < 2.5
    assert tiled.times.file > 0


def test_two_images_of_guidance_count_where_they_go_together():
    pipeline = hybrid_pipeline("sd3")
    one, two = (plan_memory(pipeline, 128, 128, images=images, available=2**40) for images in (1, 2))
    assert two.transformer > 1.2 * one.transformer


@pytest.mark.parametrize(("height", "width"), [(24, 24), (40, 24), (33, 41), (16, 8)])
def test_strips_of_the_decoder_are_diffusers_tiles(height, width):
    """But for group norms, which here have the whole image's statistics: see test_tile_norms."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    without_norms(vae)
    latents = torch.randn(1, 4, height, width)
    with torch.no_grad():
        expected = vae.tiled_decode(latents).sample
    expected = (expected / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    strips = list(decode_in_strips(vae, latents))
    assert np.array_equal(np.concatenate(strips), (expected * 255).round().astype(np.uint8))
    assert max(len(strip) for strip in strips) <= vae.tile_sample_min_size


@pytest.mark.parametrize("kind", ["pixart_sigma", "sd3", "flux_dev", "flux2_dev", "flux2_klein"])
def test_an_image_in_strips_is_the_pipelines(kind, monkeypatch):
    monkeypatch.setattr(memory, "BAND_ROWS", 20)
    pipeline = hybrid_pipeline(kind)
    side = family_of(pipeline.transformer).token_pixels(pipeline.transformer.config, pipeline.vae_scale_factor)
    width, height = 6 * side, 16 * side
    call = {
        "max_sequence_length": TEXT_LENGTH,
        "width": width,
        "height": height,
        "num_inference_steps": 2,
        "prompt": "a red shoe",
    }
    if kind == "pixart_sigma":
        call["use_resolution_binning"] = False

    def made(rows, tiles):
        pipeline.vae.disable_tiling()
        plan = MemoryPlan(width, height, rows, tiles, transformer=0, decoder=0, available=0)
        strips = list(strips_within(pipeline, plan, **call, generator=torch.Generator().manual_seed(1)))
        assert tiles or len(strips) == -(-height // 20)
        image = np.concatenate(strips).astype(int)
        assert image.shape == (height, width, 3)
        return image

    whole = made(None, False)
    assert whole.std() > 1
    assert abs(made(5, False) - whole).max() <= 1
    without_norms(pipeline.vae)  # tiles' own, which diffusers' have
    pipeline.vae.enable_tiling()
    tiled = np.asarray(pipeline(**call, generator=torch.Generator().manual_seed(1)).images[0]).astype(int)
    assert abs(made(None, True) - tiled).max() <= 1
    assert abs(made(5, True) - tiled).max() <= 1


@pytest.mark.parametrize("tiles", [False, True])
def test_strips_come_one_by_one(tiles, monkeypatch):
    monkeypatch.setattr(memory, "BAND_ROWS", 20)
    pipeline = hybrid_pipeline("flux_dev")
    pipeline.vae.tile_latent_min_size, pipeline.vae.tile_sample_min_size = 8, 8 * pipeline.vae_scale_factor
    call = {"width": 48, "height": 128, "num_inference_steps": 1, "prompt": "a red shoe", "max_sequence_length": 6}
    plan = MemoryPlan(48, 128, None, tiles, transformer=0, decoder=0, available=0)
    strips = list(strips_within(pipeline, plan, **call, generator=torch.Generator().manual_seed(1)))
    assert len(strips) > 4 and all(strip.dtype == np.uint8 and strip.shape[1:] == (48, 3) for strip in strips)
    image = make_within(pipeline, plan, **call, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(np.concatenate(strips), np.asarray(image)) and image.size == (48, 128)
    if not tiles:
        usual = pipeline(**call, generator=torch.Generator().manual_seed(1)).images[0]
        assert abs(np.asarray(usual, int) - np.asarray(image)).max() <= 1
    pipeline.vae.decoder.conv_out.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="the image is not finite: the model, a LoRA or the VAE overflowed"):
        next(strips_within(pipeline, plan, **call))


def test_the_decoders_peak_grows_with_the_image():
    vae = tiny_pipeline("sd3").vae
    channels, where = vae.config.latent_channels, {"device": CPU, "dtype": torch.float32}
    small, large = (decoder_peak(vae.decoder, (channels, side, side), **where) for side in (16, 64))
    assert 8 < large / small < 20


@pytest.mark.parametrize("offload", ["model", "group"])
def test_strips_of_an_offloaded_model(offload):
    """With the CPU for the accelerator."""
    images = []
    for kind in (None, offload):
        pipeline = hybrid_pipeline("flux_dev")
        place(pipeline, CPU, kind)
        plan = MemoryPlan(48, 128, 5, False, transformer=0, decoder=0, available=0)
        call = {"width": 48, "height": 128, "num_inference_steps": 1, "prompt": "a red shoe", "max_sequence_length": 6}
        images.append(np.asarray(make_within(pipeline, plan, **call, generator=torch.Generator().manual_seed(1))))
    assert np.array_equal(*images)


def test_what_cannot_fit_is_refused_in_one_line():
    pipeline = hybrid_pipeline("flux_dev")
    for available in (0, -1):
        with pytest.raises(ValueError, match="48 x 128 pixels: no memory is left on the device beside the weights"):
            plan_memory(pipeline, 48, 128, available=available)
    with pytest.raises(ValueError, match="are there$"):  # no size that is none
        plan_memory(pipeline, 48, 128, available=1)
    transformer = plan_memory(pipeline, 48, 128, available=2**40).transformer
    pipeline.vae = AutoencoderKL(block_out_channels=(64, 64, 64), **VAE)
    for processes in (1, 2):
        with pytest.raises(ValueError, match="GiB where the VAE decodes them in tiles"):
            plan_memory(pipeline, 48, 128, available=transformer, processes=processes)


def test_a_far_branch_that_cannot_be_shown_strips_is_named():
    pipeline = tiny_pipeline("flux_dev")
    hybridize(pipeline.transformer, HybridConfig(window=3, center_keys=True))
    whole = plan_memory(pipeline, 48, 512, available=2**40).transformer
    with pytest.raises(ValueError, match=r"48 x 512 pixels do not fit .* at once, and in strips: .*centred keys"):
        plan_memory(pipeline, 48, 512, available=whole - 1)


def test_a_vae_of_another_kind_is_not_counted():
    pipeline = hybrid_pipeline("sd3")
    pipeline.vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    plan = plan_memory(pipeline, 64, 64, available=2**40)
    assert (plan.decoder, plan.tiles) == (None, False) and "VAE          not counted" in str(plan)
    call = {"width": 64, "height": 64, "num_inference_steps": 1, "prompt": "a red shoe", "max_sequence_length": 6}
    pipeline.vae.register_to_config(shift_factor=0.0)
    [image] = strips_within(pipeline, plan, **call, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(image, pipeline(**call, generator=torch.Generator().manual_seed(1)).images[0])


def test_processes_that_share_an_image_share_its_rows_and_tiles():
    pipeline = hybrid_pipeline("flux_dev")
    model, text = pipeline.transformer, {}
    text = family_of(model).example_text(model.config, 1, family_of(model).text_length(), torch.zeros)
    where = {"device": CPU, "dtype": torch.float32}
    alone, shared = (forward_peak(model, (64, 24), text, **where, processes=count) for count in (1, 3))
    assert shared < 0.7 * alone
    plan = plan_memory(pipeline, 192, 512, available=2**40, processes=3)
    assert (plan.rows, plan.tiles) == (None, True) and plan.transformer == pytest.approx(1.1 * shared, rel=1e-3)
    said = str(plan)
    assert "besides the weights in each of 3 processes" in said and "GiB, the rows of one process" in said
    least = int(0.8 * plan.transformer)
    with pytest.raises(ValueError, match="in each of 3 processes.* should fit; or start more processes$") as told:
        plan_memory(pipeline, 192, 512, available=least, processes=3)
    plan_memory(pipeline, *sizes_in(told), available=least, processes=3)
    with pytest.raises(ValueError, match="5 processes cannot share an image of 4 rows of tokens"):
        plan_memory(pipeline, 48, 32, available=2**40, processes=5)
    with pytest.raises(ValueError, match="is not hybrid: hybridize it first"):
        plan_memory(tiny_pipeline("flux_dev"), 48, 128, available=2**40, processes=2)


def sizes_in(told):
    """The (width, height) that a refusal names in place of the one that was asked for."""
    words = str(told.value).split(": ")[1].split()
    return int(words[0]), int(words[2])


@pytest.mark.parametrize("kind", ["flux_dev", "sd15"])
def test_a_dense_pipeline_is_planned_as_a_whole(kind):
    pipeline = tiny_pipeline(kind)
    plan = plan_memory(pipeline, 256, 256, available=2**40)
    assert (plan.rows, plan.tiles) == (None, False) and 0 < plan.transformer < 2**30
    hint = "; a hybrid of this model could make them in strips .*" if kind == "flux_dev" else ""
    tight = int(0.8 * plan.transformer)
    with pytest.raises(ValueError, match=rf"256 x 256 pixels need .*: \d+ x \d+ should fit{hint}$") as told:
        plan_memory(pipeline, 256, 256, available=tight)
    plan_memory(pipeline, *sizes_in(told), available=tight)


def test_what_the_pipeline_does_with_its_vae_is_left_to_it():
    """SDXL's VAE in float16 is made float32 to decode, and a safety checker looks at the image."""
    pipeline = tiny_pipeline("sdxl")
    assert plan_memory(pipeline, 64, 64, available=2**40).decoder > 0
    pipeline.vae.half()
    assert plan_memory(pipeline, 64, 64, available=2**40).decoder is None
    call = {"prompt": "a red shoe", "width": 64, "height": 64, "num_inference_steps": 1}
    plan = MemoryPlan(64, 64, None, False, transformer=0, decoder=None, available=0)
    [image] = strips_within(pipeline, plan, **call, generator=torch.Generator().manual_seed(1))
    usual = pipeline(**call, generator=torch.Generator().manual_seed(1)).images[0]
    assert np.array_equal(image, np.asarray(usual))
    pipeline = tiny_pipeline("sd15")
    vars(pipeline)["safety_checker"] = object()
    pipeline.run_safety_checker = lambda image, *_: (image.fill_(-1), None)
    [image] = strips_within(pipeline, plan, **call, generator=torch.Generator().manual_seed(1))
    assert not image.any()


SIT = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "num_classes": 3, "in_channels": 4}


def test_a_sit_is_planned_and_made_in_tiles():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8), **VAE).eval()
    pipeline = SiTPipeline(SiTTransformer2DModel(**SIT, sample_size=8, attention="hybrid", window=3), vae)
    pipeline.set_progress_bar_config(disable=True)
    whole = plan_memory(pipeline, 256, 256, available=2**40, images=2, rates=Rates(1e9, 1e10))
    labels = {"class_labels": torch.zeros(2, dtype=torch.long)}
    counted = forward_peak(pipeline.transformer, (32, 32), labels, device=CPU, dtype=torch.float32)
    assert whole.transformer == pytest.approx(1.1 * counted, rel=1e-3) and whole.times.forward > 0
    with pytest.raises(ValueError, match=r"256 x 256 pixels need .*: \d+ x \d+ should fit$") as told:
        plan_memory(pipeline, 256, 256, available=whole.transformer - 1, images=2)
    plan_memory(pipeline, *sizes_in(told), available=whole.transformer - 1, images=2)
    call = {"class_labels": 1, "width": 64, "height": 96, "num_inference_steps": 2}
    made = [np.asarray(pipeline(**call, generator=torch.Generator().manual_seed(1)).images[0], int)]
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 32
    for tiles in (False, True):
        if tiles:
            without_norms(vae)
            vae.enable_tiling()
            made = [np.asarray(pipeline(**call, generator=torch.Generator().manual_seed(1)).images[0], int)]
        plan = MemoryPlan(64, 96, None, tiles, transformer=0, decoder=0, available=0)
        strips = list(strips_within(pipeline, plan, **call, generator=torch.Generator().manual_seed(1)))
        assert abs(np.concatenate(strips) - made[0]).max() <= 1 and (not tiles or len(strips) > 3)
    plan = plan_memory(pipeline, 256, 256, available=2**40)
    assert plan.tiles and plan.decoder > 0


def test_a_sit_of_grey_pixels():
    pipeline = SiTPipeline(SiTTransformer2DModel(**{**SIT, "in_channels": 1}, sample_size=8))
    pipeline.set_progress_bar_config(disable=True)
    plan = plan_memory(pipeline, 16, 8, available=2**40, enlarges=True)
    assert (plan.decoder, plan.encoder, plan.tiles) == (None, None, False)
    call = {"class_labels": 1, "width": 16, "height": 8, "num_inference_steps": 1}
    [strip] = strips_within(pipeline, plan, **call, generator=torch.Generator().manual_seed(1))
    usual = pipeline(**call, generator=torch.Generator().manual_seed(1)).images[0]
    assert strip.shape == (8, 16, 3) and np.array_equal(strip[..., 0], np.asarray(usual))


@pytest.mark.parametrize("tiles", [False, True])
def test_the_peak_of_encoding_is_the_allocators(tiles):
    pipeline = tiny_pipeline("pixart_sigma")
    pipeline.vae = vae = AutoencoderKL(block_out_channels=(16, 32, 64), **VAE).eval()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 128, 32
    if tiles:
        vae.enable_tiling()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8))
    plan = plan_memory(pipeline, 256, 384, available=2**40, enlarges=True)
    held = allocated(lambda: encode_enlarged(pipeline, image, (256, 384), (256, 384), tiles))
    assert plan.tiles == tiles and plan.encoder / 1.1 == pytest.approx(held, rel=0.1)
    assert "GiB, encodes " + ("in tiles" if tiles else "the whole image at once") in str(plan)
    assert plan_memory(pipeline, 256, 384, available=2**40).encoder is None


def test_what_encoding_takes_may_be_what_does_not_fit(monkeypatch):
    pipeline = hybrid_pipeline("flux_dev")
    usual = plan_memory(pipeline, 48, 128, available=2**40, enlarges=True)
    counted = memory.module_peak
    monkeypatch.setattr(memory, "module_peak", lambda *call: 100 * counted(*call))
    limit = 2 * max(usual.transformer, usual.decoder, usual.encoder)
    assert not plan_memory(pipeline, 48, 128, available=limit).tiles
    with pytest.raises(ValueError, match="48 x 128 pixels need .* where the VAE encodes them in tiles"):
        plan_memory(pipeline, 48, 128, available=limit, enlarges=True)


def test_weights_that_come_as_a_whole_need_room():
    pipeline = hybrid_pipeline("flux_dev")
    weights = {
        name: sum(weight.nbytes for weight in part.parameters())
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    assert abs(free_beside_weights(pipeline, CPU) - free_bytes(CPU)) < 2**30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_bytes", lambda device: 10**9)
        assert free_beside_weights(pipeline, CPU) == 10**9
        plan = plan_memory(pipeline, 48, 128, available=2**40)
        assert plan.weights == sum(weights.values()) and "GiB, on the device" in str(plan)
        place(pipeline, CPU, "model")
        assert free_beside_weights(pipeline, CPU) == 10**9 - max(weights.values())
        assert memory._weights_on(pipeline, CPU)[0] == max(weights.values())
