import json
import subprocess
import sys

import pytest

from hybriddit import HybridConfig
from hybriddit.config import match_layers


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"window": 0}, "window must be a positive integer or a pair"),
        ({"window": (3, 0)}, "window must be"),
        ({"window": (3, 3, 3)}, "window must be"),
        ({"window": 2.5}, "window must be"),
        ({"window": True}, "window must be"),
        ({"stride": -1}, "stride must be"),
        ({"stride": None}, "stride must be"),
        ({"dilation": "2"}, "dilation must be"),
        ({"window": 4, "stride": 5}, "stride 5 is larger than window 4"),
        ({"window": (4, 8), "stride": (4, 9)}, "stride .* is larger than window"),
        ({"window": (8, 2), "stride": 3}, "stride 3 is larger"),
        ({"gate": "door"}, "unknown gate 'door': use one of head, channel, token"),
        ({"mixer": None}, "mixer must be a name, not None"),
        ({"feature_map": ["elu"]}, "feature_map must be a name, not .'elu'."),
        ({"layers": {"*": "sparse"}}, "unknown layer kind 'sparse' for '\\*': use one of hybrid, window"),
        ({"layers": {"*": []}}, "unknown layer kind"),
        ({"map_rank": -1}, "map_rank must be"),
        ({"map_rank": False}, "map_rank must be"),
        ({"projection": 1.5}, "projection must be"),
        ({"rotary": "yes"}, "unknown rotary 'yes': use one of auto, model, axial, none"),
        ({"feature_map": 3}, "feature_map must be a name"),
        ({"temperature": "hot"}, "temperature must be true or false"),
        ({"value_conv": 4}, "value_conv must be an odd integer"),
        ({"mixer": "linfusion", "feature_map": "hedgehog"}, "has feature_map 'elu', not 'hedgehog': leave feature_map"),
        ({"mixer": "linfusion", "projection": 8}, "has projection 0, not 8"),
        ({"mixer": "linfusion", "rotary": "model"}, "has rotary 'none', not 'model'"),
        ({"mixer": "linfusion", "map_rank": 0}, '"linfusion" has query and key maps'),
        ({"delta_rank": "4"}, "delta_rank must be"),
        ({"linear": "no"}, "linear must be true or false"),
        ({"window": None, "linear": False}, "leaves no attention"),
        ({"window": None, "layers": {"*": "window"}}, "needs a window"),
    ],
)
def test_faults(fields, match):
    with pytest.raises(ValueError, match=match) as caught:
        HybridConfig(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "layers", [["*"], [("*", "dense", 1)], (x for x in [("*", "dense")]), {3: "dense"}, [[["x"], "dense"]], "", None]
)
def test_layers_must_be_a_mapping(layers):
    with pytest.raises(TypeError, match="layers must map"):
        HybridConfig(layers=layers)


@pytest.mark.parametrize(
    "config",
    [
        HybridConfig(),
        HybridConfig(window=None),
        HybridConfig(window=(8, 4), stride=(2, 1), dilation=2, gate="token", map_rank=4, delta_rank=8),
        HybridConfig(linear=False, layers={"transformer_blocks.0*": "dense", "*": "linear"}),
        HybridConfig.every_nth_dense(4, window=7),
    ],
)
def test_json_round_trip(config):
    text = json.dumps(config.to_dict(), sort_keys=True)  # as diffusers writes a model's config
    again = HybridConfig.from_dict(json.loads(text))
    assert again == config and json.dumps(again.to_dict(), sort_keys=True) == text
    assert list(again.layers) == list(config.layers)  # the first match wins: order counts
    assert HybridConfig.from_dict({**config.to_dict(), "_note": 1}) == config


@pytest.mark.parametrize(("name", "hint"), [("windw", "'window'"), ("map_rnak", "'map_rank'"), ("zzz", "fields are")])
def test_unknown_field_names_the_nearest(name, hint):
    with pytest.raises(ValueError, match=f"unknown field '{name}'.*{hint}"):
        HybridConfig.from_dict({name: 1})


def test_first_matching_pattern_wins():
    config = HybridConfig(layers={"a.*": "dense", "*.attn": "window", "b.1.*": "linear"})
    kinds = {name: config.kind(name) for name in ("a.attn", "b.attn", "b.1.attn2", "c", "A.attn")}
    assert kinds == {"a.attn": "dense", "b.attn": "window", "b.1.attn2": "linear", "c": "hybrid", "A.attn": "window"}
    assert HybridConfig(window=None, layers={"a": "dense"}).kind("b") == "linear"
    assert HybridConfig(linear=False, layers={"a": "linear"}).kind("a") == "linear"
    assert HybridConfig(linear=False).kind("a") == "window"


def test_patterns_give_kinds_and_say_which_are_idle():
    patterns = {"a.*": "dense", "*.attn": "window", "z": "linear", "a.b": "linear"}
    kinds, unmatched = match_layers(patterns, ["a.b", "b.attn", "c", "a.attn"])
    assert kinds == ["dense", "window", None, "dense"]
    assert unmatched == ["z"]  # "a.b" matches a layer, which an earlier pattern takes
    assert match_layers({}, ["a"]) == ([None], [])


def test_every_nth_dense():
    config = HybridConfig.every_nth_dense(3, window=5, layers={"single*": "window"})
    kinds = [config.kind(f"transformer_blocks.{i}.attn") for i in range(40)]
    assert kinds == ["dense" if i % 3 == 0 else "hybrid" for i in range(40)]
    assert config.kind("single_transformer_blocks.4.attn") == "window"
    assert config.kind("single_transformer_blocks.30.attn") == "dense"
    assert config.window == 5
    for n in (0, 1, 2.0):
        with pytest.raises(ValueError, match="2 or more"):
            HybridConfig.every_nth_dense(n)


def test_imports_stay_light():
    code = """
import sys, time
start = time.process_time()
import hybriddit
assert time.process_time() - start < 0.5
assert not {"torch", "diffusers", "numpy"} & set(sys.modules)
hybriddit.HybridConfig(window=3)
assert hybriddit.__version__ == "0.1.0" and not hasattr(hybriddit, "nonsense")
assert set(hybriddit.__all__) <= set(dir(hybriddit))
assert not {"torch", "diffusers"} & set(sys.modules)
import hybriddit.attention
assert "torch" in sys.modules and "diffusers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    import hybriddit

    models = ("PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel")
    pipelines = ("PixArtSigmaPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
    for name in (*hybriddit.__all__, *(f"Hybrid{name}" for name in (*models, *pipelines))):
        assert getattr(hybriddit, name) is not None
        assert name in dir(hybriddit)
