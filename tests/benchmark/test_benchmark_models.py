import pytest
import torch
from small_benchmarks import CPU

from hybriddit.benchmark import report as reports
from hybriddit.benchmark.shapes import PIXELS_PER_TOKEN, SHAPES
from hybriddit.cli import main


@pytest.fixture
def tiny(monkeypatch):
    """The three families at a width and depth that a test can run, under the names of the full-size ones."""
    pytest.importorskip("diffusers")
    import tiny_models

    from hybriddit.benchmark import model

    kinds = {"pixart-sigma": "pixart", "sd3.5-medium": "sd35-medium", "flux": "flux-dev"}
    for shape, kind in kinds.items():
        made = tiny_models.KINDS[kind]()
        values = {key: value for key, value in made.config.items() if not key.startswith("_")}
        monkeypatch.setitem(model.REPOSITORIES, SHAPES[shape].model, (type(made).__name__, values))
        small = SHAPES[shape]._replace(heads=2, head_dim=16, text=SHAPES[shape].text and 5, prompt=5)
        monkeypatch.setitem(SHAPES, shape, small)
    monkeypatch.setitem(SHAPES, "sit-xl", SHAPES["sit-xl"]._replace(heads=6, head_dim=64, model="SiT-S/2"))
    return model


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


@pytest.mark.parametrize("name", ["pixart-sigma", "sd3.5-medium", "flux", "sit-xl"])
def test_variants_share_weights_and_their_flops_are_torchs(tiny, name):
    from torch.utils.flop_counter import FlopCounterMode

    shape = SHAPES[name]
    works = tiny.model_work("transformer", shape, 64, ("dense", "hybrid", "linear"), 16, 2, torch.float32)
    cases = tiny.model_cases(
        "transformer", shape, 64, ("dense", "hybrid", "linear"), 16, 2, False, torch.float32, CPU, True
    )
    for case in cases:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            out = case.forward()
        # the window of 16 covers the grid of 4 x 4; sums of the linear branch may be counted otherwise
        assert counter.get_total_flops() == pytest.approx(works[case.name]["forward"].flops, rel=0.02), case.name
        assert out.isfinite().all() and out.std() > 0
        assert (len(case.inputs) > 2) == (case.name != "dense")
    dense = tiny.random_model(*tiny.plan(shape, 64, 2)[:2], torch.float32, CPU)
    twin = tiny.variant_model(dense, "hybrid", 3)
    shared = {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert len(shared) == len(list(dense.parameters()))
    if name == "sit-xl":
        assert {block.attn.kind for block in twin.transformer_blocks} == {"hybrid"}
    else:
        assert type(dense) is not type(twin)
    weights = sum(p.numel() for p in dense.parameters()) * 4
    assert weights == works["dense"]["forward"].bytes == tiny.weight_bytes(shape, 64, 2, torch.float32)
    guided = tiny.model_work("generation", shape, 64, ("dense",), 16, 2, torch.float32)["dense"]["step"]
    assert guided.flops == works["dense"]["forward"].flops * (2 if shape.guided else 1)


def test_blocks_of_a_part_of_the_model():
    pytest.importorskip("diffusers")
    from hybriddit.benchmark.model import plan

    def blocks(name, layers):
        _, values, counts = plan(SHAPES[name], 1024, layers)
        return values["num_layers"], values.get("num_single_layers"), counts

    assert blocks("flux", None) == (19, 38, (57, 57))
    assert blocks("flux", 6) == (2, 4, (6, 57)) and blocks("flux", 1) == (1, 0, (1, 57))
    assert blocks("pixart-sigma", 2) == (2, None, (2, 28)) and blocks("sd3.5-large", None) == (38, None, (38, 38))
    assert plan(SHAPES["sd3.5-medium"], 1024, 3)[1]["dual_attention_layers"] == (0, 1, 2)
    assert plan(SHAPES["sd3"], 16384, 1)[1]["pos_embed_max_size"] == 16384 // PIXELS_PER_TOKEN


def test_the_shapes_are_those_of_the_models():
    pytest.importorskip("diffusers")
    from hybriddit.benchmark.model import plan

    for shape in SHAPES.values():
        model_class, values, _ = plan(shape, 1024, None)
        with torch.device("meta"):
            config = model_class.from_config({**values, "num_layers": 1}).config
        assert (shape.heads, shape.head_dim) == (config.num_attention_heads, config.attention_head_dim)
        assert shape.text in (0, shape.prompt)
