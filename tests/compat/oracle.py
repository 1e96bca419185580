"""The oracle of these tests: a fresh hybrid whose window covers the grid is the dense model, whatever else is on."""

import torch
from tiny_models import make, perturb_hybrid
from tiny_pipelines import tiny_pipeline

from hybriddit import HybridConfig, hybridize

GRID = (4, 5)
COVERS, SMALL = HybridConfig(window=16), HybridConfig(window=3, gate="head", delta_rank=2)


def converted(model):
    """As a hybrid with a small window, open gates and weights that matter, always the same."""
    torch.manual_seed(3)
    return perturb_hybrid(hybridize(model, SMALL))


def models(kind, **kwargs):
    """The same random transformer dense, as a hybrid that must equal it, and as one that must not."""
    dense, same = make(kind, **kwargs), hybridize(make(kind, **kwargs), COVERS)
    return dense, same, converted(make(kind, **kwargs))


def pipelines(kind, **kwargs):
    """The same random pipeline of 8 x 8 tokens dense, as a hybrid that must equal it, and as one that must not."""
    dense, same, other = (tiny_pipeline(kind, **kwargs) for _ in range(3))
    hybridize(same.transformer, COVERS)
    converted(other.transformer)
    return dense, same, other


def generate(pipeline, **kwargs):
    """An image under classifier-free guidance (FLUX: guidance-distilled), as a tensor."""
    if "PixArt" in type(pipeline).__name__:
        kwargs = {"use_resolution_binning": False, "clean_caption": False, **kwargs}
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0, "max_sequence_length": 8}
    torch.manual_seed(0)  # some pipelines encode images by the global generator
    return pipeline(
        prompt="a red shoe",
        **{**settings, "output_type": "pt", **kwargs},
        generator=torch.Generator().manual_seed(0),
    ).images


def assert_same(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def differs(one, other, by=1e-3):
    return (one - other).abs().max() > by


def check(use, subjects):
    """Use the feature on the dense model and both hybrids: as on the dense model, and not as if it were dense."""
    dense, same, other = (use(subject) for subject in subjects)
    assert_same(same, dense)
    assert differs(other, dense)
    return dense, same, other
