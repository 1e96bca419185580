"""The peak of a forward pass, counted on tensors without data, is what torch's allocator gives out in a real one."""

import contextlib

import pytest
import torch
from tiny_memory import allocated
from tiny_models import make, make_inputs, perturb_hybrid
from tiny_pipelines import tiny_pipeline
from tiny_vae import tiny_vae
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hybriddit import HybridConfig, SiTTransformer2DModel, hybridize, in_strips
from hybriddit.attention.rates import Rates
from hybriddit.models import family_of
from hybriddit.models.peak import decoder_cost, decoder_peak, forward_cost, forward_peak

# strips of fewer tokens have masks, which are kept after the first pass: some megabytes that are counted again
GRIDS = [(96, 128), (80, 160), (128, 128), (144, 136)]


@pytest.mark.parametrize(
    ("kind", "rows", "grids"),
    [
        ("pixart", None, GRIDS),
        ("pixart", 8, GRIDS),
        ("sd35-medium", 8, GRIDS[::2]),
        ("flux-dev", 8, GRIDS[1:3]),
        ("chroma", None, GRIDS[1:3]),
        ("qwen-image", None, GRIDS[1:3]),
        ("flux2", 8, GRIDS[1:2]),
        ("z-image", 8, GRIDS[1:2]),
    ],
)
def test_the_peak_that_is_counted_is_the_allocators(kind, rows, grids):
    model, text = make(kind, dtype=torch.float32), 24
    hybridize(model, HybridConfig(window=6))
    perturb_hybrid(model)
    example = family_of(model).example_text(model.config, 1, text, torch.zeros)
    for grid in grids:
        counted = forward_peak(model, grid, example, device=torch.device("cpu"), dtype=torch.float32, rows=rows)
        inputs = make_inputs(model, grid, text=text)
        given = sum(x.nbytes for x in tree_leaves(inputs) if isinstance(x, torch.Tensor))
        with in_strips(model, rows) if rows else contextlib.nullcontext():
            assert counted == pytest.approx(given + allocated(lambda inputs=inputs: model(**inputs)), rel=0.1), grid


@pytest.mark.parametrize("widths", [(32, 64), (16, 32, 64)], ids=str)
def test_the_peak_of_a_decoder_is_the_allocators(widths):
    """Convolutions on a CPU copy what they read and write; in bfloat16 each kind of CPU does so in its own way."""
    vae, cpu = tiny_vae(widths=widths, groups=8), torch.device("cpu")
    for latents in ((32, 32), (24, 56), (16, 80)):
        counted = decoder_peak(vae.decoder, (2, *latents), device=cpu, dtype=torch.float32)
        sample = torch.randn(1, 2, *latents)
        assert counted == pytest.approx(sample.nbytes + allocated(lambda x=sample: vae.decoder(x)), rel=0.02), latents
        half = decoder_peak(vae.decoder, (2, *latents), device=cpu, dtype=torch.bfloat16)
        assert half == pytest.approx(counted / 2, rel=0.02), latents


def test_the_peak_of_a_sit_is_the_allocators():
    """Its layers that are of no window, and have the same weights, see the whole image at once."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "sample_size": 8, "num_classes": 3}
    model = SiTTransformer2DModel(**sizes, in_channels=4, attention=["window", "softmax", "hybrid"], window=6).eval()
    labels, grid = {"class_labels": torch.tensor([1, 3])}, (64, 48)
    inputs = {"hidden_states": torch.randn(2, 4, 128, 96), "timestep": torch.ones(2), **labels}
    counted = forward_peak(model, grid, labels, device=torch.device("cpu"), dtype=torch.float32)
    given = sum(x.nbytes for x in inputs.values())
    assert counted == pytest.approx(given + allocated(lambda: model(**inputs)), rel=0.1)


@pytest.mark.parametrize("kind", ["pixart", "flux-dev"])
def test_a_gpu_s_softmax_attention_holds_no_scores(kind):
    """Whether the GPU is here or not; the CPU's, which is held to the allocator, is fused too."""
    model, counted = make(kind, dtype=torch.float32), {}
    example = family_of(model).example_text(model.config, 1, 24, torch.zeros)
    for device in ("cpu", "cuda"):
        counted[device] = forward_peak(model, (48, 48), example, device=torch.device(device), dtype=torch.bfloat16)
    assert counted["cuda"] == pytest.approx(counted["cpu"], rel=0.02)


def test_the_states_of_parts_count():
    """Of the mixer "blocks", in strips and alone; more of its states are held than of the default's one."""
    found = {}
    for mixer in ("blocks", "linear"):
        model = hybridize(make("pixart", dtype=torch.float32), HybridConfig(window=None, mixer=mixer))
        example = family_of(model).example_text(model.config, 1, 24, torch.zeros)
        settings = {"device": torch.device("cpu"), "dtype": torch.float32, "rows": 8}
        found[mixer] = forward_peak(model, (96, 128), example, **settings)
        inputs = make_inputs(model, (96, 128), text=24)
        given = sum(x.nbytes for x in tree_leaves(inputs) if isinstance(x, torch.Tensor))
        with in_strips(model, 8):
            real = given + allocated(lambda model=model, inputs=inputs: model(**inputs))
        assert found[mixer] == pytest.approx(real, rel=0.1)
    assert found["blocks"] > found["linear"]


def test_blocks_of_every_kind_count():
    """The few blocks that are run are those of each structure: here one with a dense layer, which sees the whole."""
    found = []
    for layers in ({}, {"transformer_blocks.2.*": "dense"}):
        model = make("pixart", dtype=torch.float32, layers=4)
        hybridize(model, HybridConfig(window=6, feature_map="elu", projection=0, layers=layers))
        example = family_of(model).example_text(model.config, 1, 24, torch.zeros)
        settings = {"device": torch.device("cpu"), "dtype": torch.float32, "rows": 8}
        found.append(forward_peak(model, (96, 96), example, **settings))
    assert found[0] < 0.7 * found[1]


def test_strips_and_fewer_bytes_an_element_lower_the_peak():
    model, grid = hybridize(make("flux-dev", dtype=torch.float32), HybridConfig(window=6)), (96, 96)
    example = family_of(model).example_text(model.config, 1, 24, torch.zeros)
    peaks = {
        (dtype, rows): forward_peak(model, grid, example, device=torch.device("cpu"), dtype=dtype, rows=rows)
        for dtype, rows in [(torch.float32, None), (torch.float32, 8), (torch.bfloat16, 8)]
    }
    assert peaks[torch.float32, 8] < 0.5 * peaks[torch.float32, None]
    assert peaks[torch.bfloat16, 8] < 0.8 * peaks[torch.float32, 8]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [("pixart", None), ("pixart", 8), ("sd35-medium", None), ("flux-dev", 8), ("qwen-image", None), ("z-image", 8)],
)
def test_the_flops_that_are_counted_are_those_of_all_blocks(kind, rows):
    model, text, grid = make(kind, dtype=torch.float32, layers=3), 24, (24, 32)
    hybridize(model, HybridConfig(window=6))
    example = family_of(model).example_text(model.config, 1, text, torch.zeros)
    given = {"device": torch.device("cpu"), "dtype": torch.float32, "rows": rows}
    cost = forward_cost(model, grid, example, Rates(1e9, 1e12), **given)
    inputs = make_inputs(model, grid, text=text)
    with in_strips(model, rows) if rows else contextlib.nullcontext(), torch.no_grad():
        model(**inputs)
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    assert cost.flops == counter.get_total_flops()


def test_each_operation_takes_the_longer_of_its_memory_and_its_arithmetic():
    """A 1 x 1 convolution: 2 channels in, 3 out, and a bias, on 10 x 10."""
    vae = tiny_pipeline("sd3").vae
    vae.decoder = torch.nn.Sequential(torch.nn.Conv2d(vae.config.latent_channels, 3, 1), torch.nn.ReLU())
    vae.decoder.forward = lambda sample: torch.nn.Sequential.forward(vae.decoder, sample)
    channels, device = vae.config.latent_channels, torch.device("cpu")
    moved = 4 * (100 * channels + 3 * channels + 3 + 300), 4 * (300 + 300)
    flops = 2 * 100 * channels * 3
    for rates, seconds in ((Rates(10.0, 1e9), sum(moved) / 10), (Rates(1e3, 2.0), flops / 2 + moved[1] / 1e3)):
        cost = decoder_cost(vae.decoder, (channels, 10, 10), rates, device=device, dtype=torch.float32)
        assert cost == (flops, sum(moved), pytest.approx(seconds))
