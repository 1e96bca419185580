"""`hybriddit analyze`: statistics against a plain computation, planted layers recovered, the knapsack, resume, refusals."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES, PROMPTS, TEXT_LENGTH, of_prompt, tiny_pipeline

from hybriddit import HybridConfig, hybridize
from hybriddit.analyze import run as run_module
from hybriddit.analyze.plan import choose, plan_config
from hybriddit.analyze.probe import RADII, map_statistics, probed
from hybriddit.analyze.run import record_calls
from hybriddit.attention import TokenLayout
from hybriddit.cli import main
from hybriddit.generate.images import Task
from hybriddit.models.branches import relative_error

FLAGS = ["--height", "64", "--width", "64", "--steps", "2", "--max-sequence-length", str(TEXT_LENGTH)]
FAST = ["--windows", "3", "--fit-steps", "30", "--calls", "1"]


@pytest.mark.parametrize(("text_first", "masked"), [(True, False), (False, True)])
def test_statistics_of_a_map_are_those_of_a_plain_computation(text_first, masked):
    torch.manual_seed(0)
    rows, columns, text, heads, width = 4, 5, 3, 2, 8
    layout = TokenLayout(text, ((rows, columns),), text_first)
    query, key = torch.randn(2, 2, text + rows * columns, heads, width)
    text_mask = torch.tensor([[True] * 3, [True, False, False]]) if masked else None
    found = map_statistics(query, key, layout, (3, 3), 100, scale=0.7, text_mask=text_mask)
    first_text, first_image = (0, text) if text_first else (rows * columns, 0)
    expected = {name: torch.zeros(heads) for name in ("text", "window", "entropy", "rest_rank")}
    radius = torch.zeros(heads, len(RADII))
    for item, head in itertools.product(range(2), range(heads)):
        rest = torch.zeros(rows * columns, rows * columns, dtype=torch.float64)
        for i, j in itertools.product(range(rows), range(columns)):
            n = first_image + i * columns + j
            scores = 0.7 * (key[item, :, head].double() @ query[item, n, head].double())
            if masked:
                for t in range(text):
                    if not text_mask[item, t]:
                        scores[first_text + t] = -math.inf
            weight = scores.exp() / scores.exp().sum()
            top, left = min(max(i - 1, 0), rows - 3), min(max(j - 1, 0), columns - 3)  # of the window, shifted inwards
            expected["text"][head] += weight[first_text : first_text + text].sum()
            expected["entropy"][head] -= sum(w * w.log() for w in weight if w > 0)
            for k, m in itertools.product(range(rows), range(columns)):
                w = weight[first_image + k * columns + m]
                radius[head] += w * torch.tensor([float(max(abs(k - i), abs(m - j)) <= r) for r in RADII])
                inside = top <= k < top + 3 and left <= m < left + 3
                expected["window"][head] += w * inside
                rest[i * columns + j, k * columns + m] = 0.0 if inside else w
        values = torch.linalg.svdvals(rest)
        expected["rest_rank"][head] += rows * columns * values.square().sum() / values[0].square()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value / (2 * rows * columns), rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(found["radius"], radius / (2 * rows * columns), rtol=1e-5, atol=1e-6)
    assert found["map"].shape == (heads, rows, columns)


def test_heads_are_taken_a_few_at_once(monkeypatch):
    torch.manual_seed(0)
    layout, (query, key) = TokenLayout(2, ((4, 4),), True), torch.randn(2, 1, 18, 5, 4)
    whole = map_statistics(query, key, layout, (3, 3), 7)
    monkeypatch.setattr("hybriddit.analyze.probe.MAP_ELEMENTS", 2 * 7 * 18)
    parts = map_statistics(query, key, layout, (3, 3), 7)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probed_model_is_its_teacher_and_its_window_candidate_is_the_window(family):
    pipeline = tiny_pipeline(family)
    model = pipeline.transformer
    arguments = {"height": 64, "width": 64, "num_inference_steps": 2}
    if family == "pixart_sigma":
        arguments["use_resolution_binning"] = False
    [call] = record_calls(pipeline, Task({**of_prompt(pipeline, PROMPTS[0]), **arguments}, 0, {}), 1)

    def output():
        found = model(**call)[0]
        return torch.stack(found) if isinstance(found, list) else found  # Z-Image's, of each image

    with torch.no_grad():
        dense = output()
        with probed(model, [3]) as probes:
            torch.testing.assert_close(output(), dense, rtol=1e-5, atol=1e-5)
            for probe in probes.values():
                probe.replaced = "window:3"
            windows = output()
            for probe in probes.values():
                probe.replaced = "hybrid:3"  # fresh: its gate is zero
            fresh = output()
        torch.testing.assert_close(output(), dense, rtol=0, atol=0)
        hybridize(model, HybridConfig(window=3, linear=False))
        oracle = output()
    torch.testing.assert_close(windows, oracle, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fresh, oracle, rtol=1e-5, atol=1e-5)
    assert (windows - dense).abs().max() > 1e-3


def test_the_knapsack_finds_what_trying_all_finds():
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        names = ["dense", "a", "b", "c"]
        errors = {
            f"layer{i}": dict(zip(names, torch.rand(4, generator=generator).tolist(), strict=True)) for i in range(5)
        }
        costs = {
            layer: {name: float(torch.randint(1, 9, (1,), generator=generator)) for name in names} for layer in errors
        }
        limit = 16.0
        choices = [dict(zip(errors, choice, strict=True)) for choice in itertools.product(names, repeat=5)]
        kept = [c for c in choices if sum(costs[layer][name] for layer, name in c.items()) <= limit]
        if not kept:
            with pytest.raises(ValueError, match="above the limit"):
                choose(errors, costs, limit)
            continue
        best = min(kept, key=lambda c: sum(errors[layer][name] for layer, name in c.items()))
        assert choose(errors, costs, limit) == best, trial


def test_the_knapsack_never_goes_beyond_its_limit_by_rounding():
    costs = {name: {"dense": 3.334, "a": 3.3} for name in "xyz"}
    errors = {name: {"dense": 0.0, "a": 1.0} for name in "xyz"}
    assert sorted(choose(errors, costs, 10.0).values()) == ["a", "dense", "dense"]
    assert set(choose(errors, costs, sum(layer["a"] for layer in costs.values())).values()) == {"a"}  # at the limit


def test_relative_error_is_one_for_the_mean():
    dense = torch.randn(3, 50, 2, 4, generator=torch.Generator().manual_seed(0))
    mean = dense.mean((1, 3), keepdim=True).expand_as(dense)
    torch.testing.assert_close(relative_error(mean, dense), torch.ones(2))
    torch.testing.assert_close(relative_error(dense, dense), torch.zeros(2))


def plant(model):
    """Make a FLUX's first layer local, its second look everywhere alike, and its third find single far tokens."""
    first, second, third = [
        model.transformer_blocks[0].attn,
        *(block.attn for block in model.single_transformer_blocks),
    ]
    with torch.no_grad():
        for projection in (first.to_q, first.to_k):  # one vector for all tokens: the rotary embedding makes it local
            projection.weight.zero_()
            projection.bias.fill_(1.0)
        for norm in (first.norm_q, first.norm_k):
            norm.weight.fill_(30.0)
        for norm in (second.norm_q, second.norm_k):
            norm.weight.zero_()
        for projection in (third.to_q, third.to_k):
            torch.nn.init.normal_(projection.weight, std=1.0)
        for norm in (third.norm_q, third.norm_k):
            norm.weight.fill_(5.0)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    pipeline = tiny_pipeline("flux_dev")
    plant(pipeline.transformer)
    pipeline.save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    return folder


@pytest.fixture
def command(planted, capsys, monkeypatch):
    """(exit code, stdout, stderr's last line) of `hybriddit analyze` in the folder of the planted teacher."""
    monkeypatch.chdir(planted)

    def run(*more):
        code = main(["analyze", "--model", "base", "--prompts", "prompts.txt", *FLAGS, *FAST, *map(str, more)])
        printed = capsys.readouterr()
        return code, printed.out, (printed.err.splitlines() or [""])[-1]

    return run


def test_planted_layers_are_recovered_and_the_plan_is_taken(command, planted, tmp_path):
    code, printed, _ = command("--out", tmp_path / "plan", "--budget", 0.75, "--json")
    report = json.loads(printed)
    local, uniform, sharp = report["layers"]
    assert code == 0
    taken = report["plan"]["layers"]
    assert taken[local] == "window:3" and taken[uniform] == "linear" and taken[sharp] == "dense", taken
    layers = report["layers"]
    assert min(layers[local]["window"]) > 0.95 and max(layers[uniform]["window"]) < 0.2
    assert max(layers[uniform]["rest_rank"]) < 1.5 < min(layers[sharp]["rest_rank"])
    assert report["plan"]["share"] <= 0.75 and report["plan"]["change"] < min(report["uniform"].values())
    for name in ("mass_by_radius.png", "heads.png", "maps.png", "plan.png"):
        assert (tmp_path / "plan" / name).stat().st_size > 1000

    config = HybridConfig.from_plan(tmp_path / "plan" / "plan.yaml")
    assert [config.kind(layer) for layer in layers] == ["window", "linear", "dense"]
    model = hybridize(tiny_pipeline("flux_dev").transformer, config)
    kinds = [getattr(model.get_submodule(layer), "hybrid", None) for layer in layers]
    assert kinds[0].kind == "window" and kinds[0].window == (3, 3) and kinds[1].kind == "linear" and kinds[2] is None
    with pytest.raises(ValueError, match="made for another model"):
        hybridize(larger_flux(), config)


def larger_flux():
    from diffusers import FluxTransformer2DModel
    from tiny_pipelines import FLUX_SIZES

    return FluxTransformer2DModel(**{**FLUX_SIZES, "num_single_layers": 3}, in_channels=16, pooled_projection_dim=8)


def test_a_stopped_analysis_goes_on_and_another_budget_measures_only_its_plan(command, tmp_path, monkeypatch):
    whole = json.loads(command("--out", tmp_path / "whole", "--json")[1])
    written = run_module.write_json

    def stop_after_a_layer(path, report):
        written(path, report)
        if any("effect" in layer for layer in report.get("layers", {}).values()):
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "write_json", stop_after_a_layer)
    assert command("--out", tmp_path / "stopped")[0] == 130
    monkeypatch.setattr(run_module, "write_json", written)
    half = json.loads((tmp_path / "stopped" / "analysis.json").read_text())
    assert sum("effect" in layer for layer in half["layers"].values()) == 1
    resumed = json.loads(command("--out", tmp_path / "stopped", "--json")[1])
    for name in whole["layers"]:
        for part in ("effect", "errors", "radius"):
            assert resumed["layers"][name][part] == whole["layers"][name][part], (name, part)
    assert resumed["plan"] == whole["plan"]
    again = json.loads(command("--out", tmp_path / "stopped", "--json", "--budget", 1)[1])
    assert again["plan"]["change"] == pytest.approx(0, abs=1e-9)
    local, uniform, sharp = again["plan"]["layers"].values()
    assert (local, sharp) == ("window:3", "dense")  # of equal errors, the cheaper
    assert uniform in ("linear", "dense")  # whose errors differ by rounding, if at all
    assert again["layers"] == resumed["layers"]


def test_far_branches_are_fitted_on_other_images_than_those_they_are_measured_on(command, planted, tmp_path):
    fitted, errors = [], []
    for number, second in enumerate(PROMPTS[1:3]):
        (planted / "two.txt").write_text(f"{PROMPTS[0]}\n{second}")
        code, printed, _ = command("--prompts", "two.txt", "--fit-steps", 3, "--out", tmp_path / str(number), "--json")
        assert code == 0
        fitted.append(load_file(tmp_path / str(number) / "fitted.safetensors"))
        errors.append([layer["errors"]["linear"] for layer in json.loads(printed)["layers"].values()])
    assert all(torch.equal(x, fitted[1][name]) for name, x in fitted[0].items()) and errors[0] != errors[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget", "1.5"], "the budget is a share of the dense attention's cost, above 0 and at most 1, not 1.5"),
        (["--windows", "3", "3"], "windows are different sides in tokens, 1 or more, not 3 3"),
        (["--windows", "9"], "a window of 9 is larger than the grid of 8 x 8 tokens"),
        (["--fit-steps", "0"], "fit_steps must be 1 or more, not 0"),
        (["--model", "nowhere"], "nowhere"),
        (["--steps", "0"], "steps must be 1 or more, not 0"),
    ],
)
def test_refused(command, tmp_path, more, said):
    code, _, error = command("--out", tmp_path / "out", *more)
    assert code == 1 and said in error
    assert not (tmp_path / "out").exists()


def test_refused_folders(command, planted, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_bytes(b"")
    assert "is not empty and holds no analysis.json" in command("--out", tmp_path / "full")[2]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "analysis.json").write_text('{"settings": {"model": "base", "seed": 3}}')
    assert "holds an analysis with another seed" in command("--out", tmp_path / "other")[2]
    (planted / "one.txt").write_text("a red shoe")
    assert "give two prompts, or --num-images 2" in command("--prompts", "one.txt", "--out", tmp_path / "one")[2]


def test_a_budget_that_cannot_be_kept_is_refused_with_what_can(command, tmp_path):
    """FLOPs are known before anything is fitted, seconds only when they have been measured."""
    code, _, error = command("--out", tmp_path / "out", "--budget", "0.01")
    assert code == 1 and "the budget of 0.01 cannot be kept: the cheapest layers take" in error
    assert not (tmp_path / "out").exists()
    code, _, error = command("--out", tmp_path / "out", "--budget", "1e-4", "--cost", "time")
    assert code == 1 and "of the dense attention's time; raise --budget" in error
    assert command("--out", tmp_path / "out", "--budget", "1", "--cost", "time")[0] == 0


def test_an_analysis_that_was_stopped_while_it_fitted_goes_on(command, tmp_path, monkeypatch):
    written = run_module.write_tensors

    def stop(path, tensors):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "write_tensors", stop)
    assert command("--out", tmp_path / "out")[0] == 130
    monkeypatch.setattr(run_module, "write_tensors", written)
    assert command("--out", tmp_path / "out", "--seed", 1)[2].endswith("give another folder")
    assert command("--out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [("analysis.json", "analysis.json is damaged"), ("fitted.safetensors", "fitted.safetensors is damaged")],
)
def test_a_damaged_file_of_an_analysis_is_named(command, tmp_path, name, said):
    assert command("--out", tmp_path / "out")[0] == 0
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:50])
    code, _, error = command("--out", tmp_path / "out")
    assert code == 1 and said in error


def test_plans_name_each_layer_and_its_window():
    config = plan_config({"a.0": "window:4", "a.1": "hybrid:8", "a.2": "hybrid:8", "a.3": "dense", "a.4": "linear"})
    assert [config.kind(f"a.{i}") for i in range(5)] == ["window", "hybrid", "hybrid", "dense", "linear"]
    assert [config.window_of(f"a.{i}") for i in range(3)] == [(4, 4), (8, 8), (8, 8)] and config.strict_layers
    assert HybridConfig.from_saved(config.to_dict()) == config
