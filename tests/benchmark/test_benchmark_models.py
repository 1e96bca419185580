from typing import ClassVar

import pytest
import torch
from diffusers import SD3Transformer2DModel
from small_benchmarks import CPU

from hybriddit import benchmark
from hybriddit.attention import HybridAttention
from hybriddit.benchmark import model
from hybriddit.benchmark import report as reports
from hybriddit.benchmark.subjects import find_subject, subjects
from hybriddit.cli import main
from hybriddit.models.family import Published, register, unregister
from hybriddit.models.hybrid_model import hybrid_class
from hybriddit.models.sd3 import StableDiffusion3


@pytest.fixture
def tiny(monkeypatch):
    """Some of the families at a width and depth that a test can run, under the names of the full-size ones."""
    import tiny_models

    kinds = {
        "pixart-sigma": "pixart",
        "sd3.5-medium": "sd35-medium",
        "flux": "flux-dev",
        "qwen-image": "qwen-image",
        "flux2": "flux2",
        "z-image": "z-image",
        "flux3": "flux3",
        "krea2": "krea2",
        "fibo": "fibo",
    }
    for name, kind in kinds.items():
        subject = find_subject(name)
        made = tiny_models.KINDS[kind]()
        values = {key: value for key, value in made.config.items() if not key.startswith("_")}
        family = type(subject.family)
        monkeypatch.setattr(family, "published", {subject.source: Published(values, shape=name)})
        monkeypatch.setattr(family, "text_length", lambda self, *lengths: 5)
    monkeypatch.setattr(benchmark.subjects, "SIT_PRESETS", {"sit-xl": "S/2"})


@pytest.mark.parametrize(
    "name, dtype",
    [("pixart-sigma", "bfloat16"), ("sd3.5-medium", "float32"), ("flux", "bfloat16"), ("sit-xl", "bfloat16")],
)
def test_transformers_and_samplers_are_timed(tiny, name, dtype, tmp_path):
    arguments = ["--part", "transformer", "generation", "--shapes", name, "--sizes", "64", "--window", "3"]
    arguments += ["--layers", "2", "--backward", "--repeats", "1", "--quiet", "--out", str(tmp_path)]
    assert main(["benchmark", *arguments, "--dtype", dtype]) == 0
    report = reports.read(tmp_path / "benchmark.json")
    assert {case.get("not_measured") for case in report["cases"]} == {None}
    assert {(case["variant"], case["part"]) for case in report["cases"]} == {
        (variant, part) for variant in ("hybrid", "linear", "dense") for part in ("transformer", "generation")
    }
    of = 12 if name == "sit-xl" else 2
    assert all(case["layers"] == [2, of] for case in report["cases"])
    steps = [case for case in report["cases"] if case["direction"] == "step"]
    assert {case["batch"] for case in steps} == {1 if name == "flux" else 2} and len(steps) == 3
    assert f"2 of {of} blocks" in (tmp_path / "benchmark.md").read_text()


@pytest.mark.parametrize("name", ["pixart-sigma", "sd3.5-medium", "flux", "z-image", "flux3", "sit-xl"])
def test_variants_share_weights_and_their_flops_are_torchs(tiny, name):
    from torch.utils.flop_counter import FlopCounterMode

    subject, variants = find_subject(name), ("dense", "hybrid", "linear")
    works = model.model_work("transformer", subject, 64, variants, 16, 2, torch.float32)
    cases = model.model_cases("transformer", subject, 64, variants, 16, 2, False, torch.float32, CPU, True)
    for case in cases:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            out = case.forward()
        # the window of 16 covers the grid of 4 x 4; sums of the linear branch may be counted otherwise
        assert counter.get_total_flops() == pytest.approx(works[case.name]["forward"].flops, rel=0.02), case.name
        assert out.isfinite().all() and out.std() > 0
        assert (len(case.inputs) > 2) == (case.name != "dense")
    dense = model.random_model(subject, 64, 2, torch.float32, CPU)
    twin, added = model.variant_model(subject, dense, "hybrid", 3)
    shared = {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert len(shared) == len(list(dense.parameters()))
    assert len(added) == len(list(twin.parameters())) - len(shared)
    if name == "sit-xl":
        assert {block.attn.kind for block in twin.transformer_blocks} == {"hybrid"}
    else:
        assert type(dense) is not type(twin)
    weights = sum(p.numel() for p in dense.parameters()) * 4
    assert weights == works["dense"]["forward"].bytes == model.weight_bytes(subject, 64, 2, torch.float32)
    guided = model.model_work("generation", subject, 64, ("dense",), 16, 2, torch.float32)["dense"]["step"]
    assert guided.flops == works["dense"]["forward"].flops * (2 if subject.guided else 1)


@pytest.mark.parametrize("name", ["pixart-sigma", "sd3.5-medium", "flux", "sit-xl"])
def test_variants_are_what_their_names_say(tiny, name):
    subject = find_subject(name)
    dense = model.random_model(subject, 64, 1, torch.float32, CPU)
    for variant, window in (("hybrid", (3, 3)), ("linear", None)):
        twin, _ = model.variant_model(subject, dense, variant, 3)
        layers = [layer for layer in twin.modules() if isinstance(layer, HybridAttention)]
        assert layers and {(layer.kind, layer.window) for layer in layers} == {(variant, window)}


@pytest.mark.parametrize(
    "name", ["pixart-sigma", "sd3.5-medium", "flux", "qwen-image", "flux2", "z-image", "krea2", "fibo", "sit-xl"]
)
def test_a_sampler_calls_the_transformer_as_often_as_is_counted(tiny, name):
    subject = find_subject(name)
    dense = model.random_model(subject, 64, 1, torch.float32, CPU)
    [latents, *_] = subject.example(dense, 64).inputs
    seen = []

    def see(module, args, kwargs):
        given = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(given, list):  # of films of one frame
            given = torch.stack(given)[:, :, 0]
        seen.append(given.shape)

    dense.register_forward_pre_hook(see, with_kwargs=True)
    image = subject.sampler(dense, 64, 4)()
    assert seen == [(model.batch_of("generation", subject), *latents.shape[1:])] * (
        4 * model.calls_of("generation", subject)
    )
    assert image.shape == latents.shape and image.isfinite().all()


def test_blocks_of_a_part_of_the_model():
    def blocks(name, layers):
        subject = find_subject(name)
        with torch.device("meta"):
            config = subject.make(1024, layers).config
        return config.num_layers, config.get("num_single_layers"), subject.blocks

    assert blocks("flux", None) == (19, 38, 57)
    assert blocks("flux", 6) == (2, 4, 57) and blocks("flux", 1) == (1, 0, 57)
    assert blocks("pixart-sigma", 2) == (2, None, 28) and blocks("sd3.5-large", None) == (38, None, 38)
    with torch.device("meta"):
        assert find_subject("sd3.5-medium").make(1024, 3).config.dual_attention_layers == (0, 1, 2)
        assert find_subject("sd3").make(16384, 1).config.pos_embed_max_size == 16384 // 16


def test_the_shapes_are_those_of_the_models():
    for subject in subjects().values():
        with torch.device("meta"):
            config = subject.make(1024, 1).config
        heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
        assert subject.shape[:2] == ((heads, width) if heads else (config.n_heads, config.dim // config.n_heads))
        assert subject.shape.text in (0, subject.prompt)


def test_the_published_shapes():
    """As the models' own pages have them: heads, their width, text tokens in the layer and before the image's."""
    assert {name: (*subject.shape, subject.prompt, subject.guided) for name, subject in subjects().items()} == {
        "pixart-sigma": (16, 72, 0, False, 16, 300, True),
        "sd3": (24, 64, 333, False, 16, 333, True),
        "sd3.5-medium": (24, 64, 333, False, 16, 333, True),
        "sd3.5-large": (38, 64, 333, False, 16, 333, True),
        "flux": (24, 128, 512, True, 16, 512, False),
        "chroma": (24, 128, 512, True, 16, 512, True),
        "qwen-image": (24, 128, 512, True, 16, 512, True),
        "flux2": (48, 128, 512, True, 16, 512, False),
        "flux2-klein": (24, 128, 512, True, 16, 512, True),
        "z-image": (30, 128, 512, False, 16, 512, True),
        "ovis-image": (24, 128, 256, True, 16, 256, True),
        "flux3": (24, 128, 640, True, 16, 640, True),
        "krea2": (48, 128, 512, True, 16, 512, True),
        "longcat-image": (24, 128, 512, True, 16, 512, True),
        "fibo": (24, 128, 3000, True, 16, 3000, True),
        "sit-xl": (16, 72, 0, False, 16, 0, True),
    }


class ToyTransformer2DModel(SD3Transformer2DModel):
    pass


class Toy(StableDiffusion3):
    """A family that hybriddit does not know: tokens of 8 px, 24 of text."""

    name = "Toy"
    dense_class = ToyTransformer2DModel
    hybrid_class = hybrid_class(ToyTransformer2DModel)
    recipes: ClassVar = {"toy": StableDiffusion3.recipes["sd3"]}
    published: ClassVar = {
        "toys/large": Published(
            {
                "num_layers": 1,
                "num_attention_heads": 4,
                "attention_head_dim": 8,
                "joint_attention_dim": 16,
                "caption_projection_dim": 32,
                "pooled_projection_dim": 16,
                "sample_size": 8,
                "pos_embed_max_size": 8,
            },
            shape="toy",
            vae_scale_factor=4,
        ),
        "toys/small": Published({}),
    }

    def text_length(self, max_sequence_length=None, tokenizer_length=77):
        return max_sequence_length or 24


def test_a_registered_family_can_be_benchmarked(tmp_path):
    toy = register(Toy)
    try:
        assert list(subjects())[-2:] == ["toy", "sit-xl"]
        words = "--part attention transformer generation --shapes toy --sizes 40 --window 3 --repeats 1 --quiet "
        words += "--variants hybrid window linear dense"
        assert main(["benchmark", *words.split(), "--out", str(tmp_path)]) == 0
        report = reports.read(tmp_path / "benchmark.json")
        text = reports.table(report)
    finally:
        unregister(toy)
    measured = report["cases"]
    assert {case.get("not_measured") for case in measured} == {None}
    assert {(case["image_tokens"], case["text_tokens"]) for case in measured} == {(25, 24)}
    assert {tuple(case["layers"]) for case in measured if case["part"] != "attention"} == {(1, 1)}
    assert "## toy: attention layer, forward\n\n4 heads x 8, 24 text tokens." in text
    with pytest.raises(ValueError, match="invalid choice: 'toy'"):
        reports.table(report)
