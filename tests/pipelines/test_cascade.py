"""Stages of a large image: their sizes, the noise they start from, the enlarged image in tiles, guides, and positions."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from family_calls import latents_of
from PIL import Image
from tiny_pipelines import FAMILIES, TEXT_LENGTH, hybrid_pipeline, of_prompt, tiny_pipeline
from tiny_vae import without_norms

from hybriddit import SiTPipeline, SiTTransformer2DModel
from hybriddit.models import family_of, in_strips, scaled_positions
from hybriddit.models.peak import forward_peak
from hybriddit.models.positions import rotary_frequencies, rotary_tables
from hybriddit.pipelines.cascade import (
    SCHEDULES,
    Schedule,
    encode_enlarged,
    first_size,
    native_size,
    repainting,
    stage_sizes,
)
from hybriddit.pipelines.memory import plan_memory

PROMPT = "a red shoe"
CPU = torch.device("cpu")


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def arguments(pipeline):
    given = {"guidance_scale": 1.0, **of_prompt(pipeline, PROMPT)}
    return given | ({"use_resolution_binning": False} if "PixArt" in type(pipeline).__name__ else {})


@pytest.mark.parametrize(
    ("size", "first", "scale", "expected"),
    [
        ((16384, 16384), (1024, 1024), 2, [(2048,) * 2, (4096,) * 2, (8192,) * 2, (16384,) * 2]),
        ((16384, 16384), (1024, 1024), 4, [(4096,) * 2, (16384,) * 2]),
        ((4096, 1024), (2048, 512), 2, [(4096, 1024)]),
        ((3000, 1999), (1248, 832), 2, [(1936, 1296), (3000, 1999)]),
        ((1030, 1030), (1024, 1024), 2, [(1030, 1030)]),
        ((1024, 1024), (1024, 1024), 2, []),
        ((512, 512), (1024, 1024), 2, []),
    ],
)
def test_sizes_of_stages(size, first, scale, expected):
    sizes = stage_sizes(size, first, 16, scale=scale)
    assert sizes == expected
    for (width, height), (wider, higher) in zip([first, *sizes], sizes, strict=False):
        assert wider <= scale * width * 1.02 and higher <= scale * height * 1.02
    for wrong in (1.19, 1, 0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="at least 1.2 times"):
            stage_sizes(size, first, 16, scale=wrong)


def test_the_first_stage_has_the_model_s_area_in_the_asked_shape():
    for size in ((16384, 16384), (5000, 2000), (1000, 4000)):
        width, height = first_size(size, 1024, 16)
        assert width % 16 == height % 16 == 0
        assert width * height == pytest.approx(1024**2, rel=0.03)
        assert width / height == pytest.approx(size[0] / size[1], rel=0.03)
    assert native_size(tiny_pipeline("sd3")) == native_size(tiny_pipeline("pixart_sigma")) == 64
    assert native_size(tiny_pipeline("z_image")) == 1024  # which its pipeline's call alone says


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_stage_without_noise_to_speak_of_gives_the_enlarged_image(kind):
    """The noise is nearly none, so that what the model says hardly counts: what is left is Lanczos and the VAE."""
    pipeline, image = tiny_pipeline(kind), picture(64, 48)
    with repainting(pipeline, image, (128, 96), Schedule(1e-3, 1), torch.Generator().manual_seed(0)) as given:
        made = pipeline(**arguments(pipeline), **given, output_type="latent").images
    made = family_of(pipeline.transformer).sampled_latents(pipeline.vae, made)
    pixels = torch.from_numpy(np.asarray(image.resize((128, 96), Image.Resampling.LANCZOS)).copy()).permute(2, 0, 1)
    expected = latents_of(kind, pipeline.vae, pixels[None] / 127.5 - 1)
    # DDPM has no step as near to the image as that: its first has a hundredth of noise, of latents that are small here
    most = {"pixart_sigma": 0.15, "longcat_image": 0.02, "fibo": 0.02}.get(kind, 0.01)
    assert (made - expected).square().mean().sqrt() < most * expected.std()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("sigma", [0.15, 0.5, 0.9])
def test_noise_and_image_are_in_the_asked_proportion(kind, sigma):
    """The start is a image + b noise; b / a is sigma / (1 - sigma), and in a DDPM a^2 + b^2 = 1."""
    pipeline = tiny_pipeline(kind)
    with repainting(
        pipeline, picture(64, 64), (128, 128), Schedule(sigma, 3), torch.Generator().manual_seed(0)
    ) as given:
        x = given["latents"].double()
        if kind.startswith("flux2"):  # which takes them before they are tokens
            x = x.flatten(2).transpose(1, 2)
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(**{name: given[name] for name in ("sigmas", "timesteps") if name in given})
        levels = scheduler.sigmas.tolist()
    family = family_of(pipeline.transformer)
    image = family.model_latents(
        pipeline.vae, encode_enlarged(pipeline, picture(64, 64), (128, 128), (128, 128), False)
    ).double()
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).double()
    basis = torch.stack((image.flatten(), noise.flatten()), 1)
    (signal, strength), *_ = torch.linalg.lstsq(basis, x.flatten()[:, None]).solution.T.tolist()
    assert strength / signal == pytest.approx(sigma / (1 - sigma), rel=0.01)
    if kind == "pixart_sigma":
        assert signal**2 + strength**2 == pytest.approx(1, abs=1e-3)
        expected = [level / (1 - level) for level in (sigma, 2 * sigma / 3, sigma / 3)]
    else:
        assert signal + strength == pytest.approx(1, abs=1e-3)
        expected = [sigma, 2 * sigma / 3, sigma / 3]
    assert levels == pytest.approx([*expected, 0], rel=0.02)


@pytest.mark.parametrize("kind", ["pixart_sigma", "sd3", "flux_dev"])
def test_the_pipeline_s_own_scheduler_is_as_it_was(kind):
    pipeline = tiny_pipeline(kind)
    before, config = pipeline.scheduler, dict(pipeline.scheduler.config)
    for schedule in SCHEDULES.values():
        with repainting(pipeline, picture(64, 64), (96, 96), schedule, torch.Generator()):
            assert pipeline.scheduler is not before
        assert pipeline.scheduler is before and dict(before.config) == config
        assert "step" not in vars(before)
    with pytest.raises(KeyError), repainting(pipeline, picture(64, 64), (96, 96), schedule, torch.Generator()):
        raise KeyError
    assert pipeline.scheduler is before


def test_an_image_is_encoded_in_tiles_as_diffusers_does():
    pipeline = tiny_pipeline("flux_dev")
    vae = pipeline.vae
    without_norms(vae)  # tiles' own, which diffusers' have: see test_tile_norms
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 8
    image = picture(56, 40)
    for size in ((112, 80), (128, 96), (40, 100)):
        pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS)).copy()
        expected = vae._tiled_encode(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
        found = encode_enlarged(pipeline, image, size, size, True)
        # a tile's levels are rounded by themselves: one level of 255 may differ
        assert (found - expected.chunk(2, 1)[0]).abs().max() < 0.05 * found.std()
        assert found.shape[2:] == (size[1] // 4, size[0] // 4)


def test_what_is_beyond_the_image_is_its_edge_again():
    pipeline, image = tiny_pipeline("flux_dev"), Image.new("RGB", (24, 24), "red")
    whole = encode_enlarged(pipeline, Image.new("RGB", (64, 64), "red"), (64, 64), (64, 64), False)
    assert (encode_enlarged(pipeline, image, (50, 58), (64, 64), False) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["sd3", "flux_dev"])
@pytest.mark.parametrize("guide", ["residual", "low-frequency"])
def test_a_guide_by_its_formula(kind, guide):
    """A model that says nothing leaves the latents of a flow as they are: what changes them after a step is the guide."""
    pipeline, image = tiny_pipeline(kind), picture(64, 64)
    packs = kind == "flux_dev"
    with repainting(pipeline, image, (128, 96), Schedule(0.8, 4, guide), torch.Generator().manual_seed(0)) as given:
        start, scheduler = given["latents"], pipeline.scheduler
        scheduler.set_timesteps(sigmas=given["sigmas"])
        found = scheduler.step(torch.zeros_like(start), scheduler.timesteps[0], start, return_dict=False)[0]
        for step in (1, 2, 3):  # the last one goes to the image itself, where no guide is left
            last = scheduler.step(torch.zeros_like(start), scheduler.timesteps[step], start, return_dict=False)[0]
    assert torch.equal(last, start)
    clean = family_of(pipeline.transformer).model_latents(
        pipeline.vae, encode_enlarged(pipeline, image, (128, 96), (128, 96), False)
    )
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    wanted = 0.4 * clean + 0.6 * noise  # after one of four steps from 0.8
    change = (wanted - start).double()
    if guide == "low-frequency":
        if packs:
            change = pipeline._unpack_latents(change, 96, 128, pipeline.vae_scale_factor)
        batch, channels, rows, columns = change.shape
        low = change.view(batch, channels, rows // 2, 2, columns // 2, 2).mean((3, 5))
        change = torch.nn.functional.interpolate(low, scale_factor=2, mode="bilinear")
        if packs:
            change = pipeline._pack_latents(change, *change.shape)
    part = (0.5 - 0.5 * math.cos(math.pi * 0.6 / 0.8)) ** 3
    assert torch.allclose(found.double(), start + part * change, atol=1e-5)


@pytest.mark.parametrize("guide", ["residual", "low-frequency"])
def test_a_guide_keeps_the_image(guide):
    """From nearly pure noise an untrained model gives anything; the guided one stays nearer to the image."""
    pipeline, image = tiny_pipeline("pixart_sigma"), picture(64, 64)
    latents = family_of(pipeline.transformer).model_latents(
        pipeline.vae, encode_enlarged(pipeline, image, (128, 128), (128, 128), False)
    )

    def distance(schedule):
        with repainting(pipeline, image, (128, 128), schedule, torch.Generator().manual_seed(0)) as given:
            made = pipeline(**arguments(pipeline), **given, output_type="latent").images
        return (made - latents).square().mean().item()

    assert distance(Schedule(0.95, 8, guide)) < 0.9 * distance(Schedule(0.95, 8))


def test_latents_are_enlarged_instead():
    pipeline, image = tiny_pipeline("sd3"), picture(64, 64)
    schedule = Schedule(1e-4, 1, enlarged_in="latents")
    with repainting(pipeline, image, (128, 128), schedule, torch.Generator().manual_seed(0)) as given:
        start = given["latents"]
    small = encode_enlarged(pipeline, image, (64, 64), (64, 64), False)
    expected = torch.nn.functional.interpolate(small, size=(32, 32), mode="bicubic")
    expected = (expected - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    assert (start - expected).abs().max() < 1e-3


def sit_pipeline(path="linear", with_vae=False, channels=3):
    torch.manual_seed(0)
    vae = tiny_pipeline("flux_dev").vae if with_vae else None
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "sample_size": 16, "num_classes": 3}
    model = SiTTransformer2DModel(**sizes, in_channels=4 if with_vae else channels)
    pipeline = SiTPipeline(model, vae, path=path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("sigma", [0.1, 0.6])
def test_a_sit_s_stage_starts_on_its_path(path, sigma):
    pipeline, image = sit_pipeline(path), picture(16, 16)
    with repainting(pipeline, image, (40, 30), Schedule(sigma, 2), torch.Generator().manual_seed(0)) as given:
        pass
    assert (given["width"], given["height"]) == (40, 30) and given["num_inference_steps"] == 2
    pixels = np.asarray(image.resize((40, 30), Image.Resampling.LANCZOS)).copy()
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 127.5 - 1
    noise = torch.randn((1, 3, 30, 40), generator=torch.Generator().manual_seed(0)).double()
    basis = torch.stack((pixels.flatten(), noise.flatten()), 1)
    (signal, strength), *_ = torch.linalg.lstsq(basis, given["latents"].double().flatten()[:, None]).solution.T.tolist()
    assert strength / signal == pytest.approx(sigma / (1 - sigma), rel=1e-3)
    start = given["sampler_options"]["interval"][0]
    alpha = {"linear": start, "gvp": math.sin(math.pi * start / 2), "vp": signal}[path]
    assert signal == pytest.approx(alpha, rel=1e-4)
    assert native_size(pipeline) == 16


@pytest.mark.parametrize(("with_vae", "channels"), [(True, 3), (False, 3), (False, 1)])
def test_a_sit_s_stage_without_noise_to_speak_of(with_vae, channels):
    pipeline = sit_pipeline(with_vae=with_vae, channels=channels)
    image = picture(16, 16)
    with repainting(pipeline, image, (32, 24), Schedule(1e-4, 1), torch.Generator().manual_seed(0)) as given:
        made = pipeline(0, **given, output_type="latent").images
    pixels = np.asarray(
        image.convert("L" if channels == 1 else "RGB").resize((32, 24), Image.Resampling.LANCZOS)
    ).copy()
    expected = torch.from_numpy(pixels).view(24, 32, -1).permute(2, 0, 1)[None] / 127.5 - 1
    if with_vae:
        vae = pipeline.vae
        expected = (vae.encode(expected).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    assert (made - expected).abs().max() < 0.02 * expected.std()


def test_wrong_schedules_and_schedulers():
    for wrong, words in {
        (0, 1): "above 0", (1, 1): "below 1", (math.nan, 1): "above 0", (0.5, 0): "1 step or more",
        (0.5, 1, "both"): "guide is one of", (0.5, 1, None, "words"): "enlarged_in is one of pixels, latents",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Schedule(*wrong)
    with (
        pytest.raises(ValueError, match="the guide 'residual' is for text-to-image"),
        repainting(sit_pipeline(), picture(16, 16), (32, 32), SCHEDULES["residual"], torch.Generator()),
    ):
        pass
    pipeline = tiny_pipeline("flux_dev")
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    with (
        pytest.raises(
            ValueError, match="needs a FlowMatchEulerDiscreteScheduler, and this pipeline has a FlowMatchHeun"
        ),
        repainting(pipeline, picture(64, 64), (96, 96), SCHEDULES["refine"], torch.Generator()),
    ):
        pass


def test_frequencies_against_diffusers_and_by_hand():
    dim, theta, native, length = 56, 10000.0, 64, 256
    base = theta ** (-np.arange(0, dim, 2) / dim)

    def found(positions, length=length):
        return rotary_frequencies(dim, theta, positions, native, length).numpy()

    for positions in ("plain", "interpolated", "ntk", "yarn", "dominant", "clear"):
        np.testing.assert_allclose(found(positions, length=native), base, rtol=1e-12)
        np.testing.assert_allclose(found(positions, length=native // 2), base, rtol=1e-12)
    np.testing.assert_allclose(found("plain"), base)
    place = torch.arange(length, dtype=torch.float64)
    for positions, options in {
        "interpolated": {"linear_factor": 4.0},
        "ntk": {"ntk_factor": 4.0 ** (56 / 54)},
        "clear": {"ntk_factor": 10.0},
    }.items():
        cos, _ = get_1d_rotary_pos_embed(dim, place, theta, use_real=True, freqs_dtype=torch.float64, **options)
        np.testing.assert_allclose(np.cos(np.outer(place, found(positions))).repeat(2, 1), cos, atol=1e-6)
    np.testing.assert_allclose(found("ntk")[-1], base[-1] / 4)  # the lowest is spread as far as the image grew
    yarn, turns = found("yarn"), native * base / (2 * math.pi)
    np.testing.assert_allclose(yarn[turns < 1], base[turns < 1] / 4)
    assert ((yarn >= base / 4 - 1e-12) & (yarn <= base)).all() and (np.diff(yarn / base) <= 1e-12).all()
    changed = found("dominant") / base
    assert sorted(changed)[:2] == pytest.approx([0.25, 1])
    period = 2 * math.pi / base[changed.argmin()]
    assert abs(math.log(period / native)) == min(abs(np.log(2 * math.pi / base / native)))


def test_clear_scales_the_scores_as_its_authors_do():
    """scale = sqrt(log_4608(tokens) / D), of 64 x 64 image tokens and 512 of text, in their processors."""
    ids = torch.tensor([[0, 5, 7], [0, 90, 3]])
    tables = rotary_tables(ids, (16, 56, 56), 10000, "clear", (64, 64), (128, 96))
    factor = tables[0].square() + tables[1].square()  # of every product of a query and a key
    torch.testing.assert_close(factor, torch.full_like(factor, math.sqrt(math.log(128 * 96 + 512, 4608))))


@pytest.mark.parametrize(
    ("kind", "positions"),
    [
        ("flux_dev", "interpolated"),
        ("flux_dev", "yarn"),
        ("flux_dev", "clear"),
        ("chroma", "dominant"),
        ("qwen_image", "interpolated"),
        ("sd3", "interpolated"),
        ("flux2_dev", "yarn"),
        ("z_image", "dominant"),
        ("longcat_image", "interpolated"),
    ],
)
def test_positions_change_larger_images_alone(kind, positions):
    pipeline = hybrid_pipeline(kind)

    def image(side):
        generator = torch.Generator().manual_seed(0)
        sizes = {"height": side, "width": side, "num_inference_steps": 2, "output_type": "latent"}
        return pipeline(**arguments(pipeline), **sizes, generator=generator).images

    plain = {side: image(side) for side in (64, 96)}
    model = pipeline.transformer
    with scaled_positions(model, positions, (8, 8), (8, 8)):
        assert torch.allclose(image(64), plain[64], atol=1e-5)
    with scaled_positions(model, positions, (8, 8), (12, 12)):
        stretched = image(96)
        assert not torch.allclose(stretched, plain[96], atol=1e-3)
        with in_strips(model, 4):
            assert torch.allclose(image(96), stretched, atol=1e-4)
    assert torch.equal(image(96), plain[96])
    with (
        pytest.raises(ValueError, match="positions of .* are plain or"),
        scaled_positions(model, "far", (8, 8), (8, 8)),
    ):
        pass


def test_longcat_image_s_image_is_spread_from_where_its_text_ends():
    model, grid = hybrid_pipeline("longcat_image").transformer, (16, 12)
    ids = [(0, place, place) for place in range(TEXT_LENGTH)]
    ids += [(1, TEXT_LENGTH + row, TEXT_LENGTH + column) for row in range(grid[0]) for column in range(grid[1])]
    ids = torch.tensor(ids)
    spread = ids.double()
    spread[TEXT_LENGTH:, 1:] = TEXT_LENGTH + (spread[TEXT_LENGTH:, 1:] - TEXT_LENGTH) * torch.tensor([8 / 16, 8 / 12])
    expected = model.pos_embed(spread)
    with scaled_positions(model, "interpolated", (8, 8), grid):
        torch.testing.assert_close(model.pos_embed(ids), expected, rtol=0, atol=1e-5)
        text, where = {"prompt_embeds": torch.zeros(1, TEXT_LENGTH, 16)}, {"device": CPU, "dtype": torch.bfloat16}
        assert forward_peak(model, grid, text, **where) > 0, "counted without the ids' values, which tell the grid"


@pytest.mark.parametrize(("kind", "positions"), [("flux_dev", "yarn"), ("chroma", "plain"), ("sd3", "interpolated")])
def test_memory_is_planned_with_these_positions(kind, positions):
    """SD3's own table ends at 16 x 16 tokens."""
    pipeline = hybrid_pipeline(kind)
    with scaled_positions(pipeline.transformer, positions, (8, 8), (128, 128)):
        plan = plan_memory(pipeline, 1024, 1024, available=2**30)
        assert plan_memory(pipeline, 1024, 1024, available=plan.transformer - 1).rows == 64
    if kind == "sd3":
        with pytest.raises(ValueError, match="16"):
            plan_memory(pipeline, 1024, 1024, available=2**30)


def test_sd3_s_table_is_stretched_from_its_middle():
    """An image twice as large as native: each position is between the two that a bilinear enlargement puts it between."""
    pipeline = tiny_pipeline("sd3")
    model = pipeline.transformer
    embed, config = model.pos_embed, model.config
    most, native, grid = config.pos_embed_max_size, (6, 8), (12, 24)
    latents = torch.zeros(1, config.in_channels, 2 * grid[0], 2 * grid[1])
    with scaled_positions(model, "interpolated", native, grid):
        found = embed(latents) - embed.proj.bias
    table = embed.pos_embed.view(most, most, -1)
    top, left = (most - 6) // 2, (most - 8) // 2
    table = table[top : top + 6, left : left + 8].double().numpy()
    rows = np.clip((np.arange(12) + 0.5) / 2 - 0.5, 0, 5)
    columns = np.clip((np.arange(24) + 0.5) / 3 - 0.5, 0, 7)

    def between(table, places, axis):
        low = np.floor(places).astype(int)
        high, part = np.minimum(low + 1, table.shape[axis] - 1), places - low
        part = part.reshape(-1, *[1] * (table.ndim - axis - 1))
        return table.take(low, axis) * (1 - part) + table.take(high, axis) * part

    expected = between(between(table, rows, 0), columns, 1).reshape(-1, table.shape[-1])
    np.testing.assert_allclose(found[0].detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_and_columns_that_a_dtype_cannot_tell_apart_are_given_exactly(dtype):
    """bfloat16 counts to 256: diffusers' pipelines hand over ids in which column 257 is 256."""
    pipeline = hybrid_pipeline("flux_dev")
    model, seen = pipeline.transformer, []
    model.pos_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    rows, columns = 2, 300
    ids = pipeline._prepare_latent_image_ids(1, rows, columns, "cpu", dtype)
    text = family_of(model).example_text(model.config, 1, 3, torch.zeros)
    with torch.no_grad():
        model(
            hidden_states=torch.zeros(1, rows * columns, model.config.in_channels),
            encoder_hidden_states=text["prompt_embeds"],
            pooled_projections=text["pooled_prompt_embeds"],
            timestep=torch.ones(1),
            img_ids=ids,
            txt_ids=torch.zeros(3, 3, dtype=dtype),
            guidance=torch.ones(1),
        )
    expected = [(0, row, column) for row in range(rows) for column in range(columns)]
    assert seen[0][3:].tolist() == [list(map(float, place)) for place in expected]
    assert (seen[0][:3] == 0).all()
