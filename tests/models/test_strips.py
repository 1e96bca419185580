"""A model whose blocks run over strips of rows gives what it gives for the whole image, and holds less of it."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import FirstBlockCacheConfig
from tiny_models import KINDS, make, make_inputs, perturb_hybrid, run

from hybriddit import HybridConfig, dense_mode, hybridize, in_strips

# rotary embeddings and norms round to fp32 inside an fp64 model
CLOSE = {"rtol": 0, "atol": 5e-6}
CONFIGS = {
    "default": {"window": 3},
    "stride": {"window": (4, 5), "stride": (2, 3)},
    "dilation": {"window": (3, 2), "dilation": (2, 1)},
    "linear": {"window": None, "feature_map": "elu"},
    "window": {"window": 5, "linear": False},
    "convolution": {"window": 4, "value_conv": 5, "gate": "channel", "join": "gate"},
    "hedgehog without maps": {"window": 3, "feature_map": "hedgehog", "map_rank": 0, "gate": "token"},
    "block states": {"window": 3, "mixer": "blocks"},
    "block states alone": {"window": None, "mixer": "blocks", "feature_map": "elu"},
    "elu, joint": {"window": 3, "feature_map": "elu", "projection": 0},
}


def hybrid(kind, seed=0, **config):
    model = make(kind, seed)
    hybridize(model, HybridConfig(**config))
    return perturb_hybrid(model)


@pytest.mark.parametrize(
    ("kind", "config"),
    [(kind, "default") for kind in KINDS]
    + [
        (kind, config)
        for kind in ("pixart", "sd35-medium", "flux-dev", "chroma", "qwen-image")
        for config in CONFIGS
        if config != "default" and "block states" not in config
    ]
    + [("pixart", "block states"), ("sd35-medium", "block states alone"), ("flux-dev", "block states")],
)
def test_strips_give_the_whole_images_result(kind, config):
    model = hybrid(kind, **CONFIGS[config])
    for grid, rows in [((7, 6), 1), ((13, 5), 4), ((16, 16), 7)]:
        inputs = make_inputs(model, grid, batch=2)
        whole = run(model, inputs)
        with in_strips(model, rows):
            found = run(model, inputs)
        torch.testing.assert_close(found, whole, **CLOSE)
        assert torch.equal(run(model, inputs), whole)  # nothing is left behind


@pytest.mark.parametrize("kind", ["pixart", "sd3"])
def test_positions_that_the_layer_rotates_are_those_in_the_whole(kind):
    model = hybrid(kind, window=3, rotary="axial")
    inputs = make_inputs(model, (11, 5))
    whole = run(model, inputs)
    with in_strips(model, 3):
        torch.testing.assert_close(run(model, inputs), whole, **CLOSE)


@pytest.mark.parametrize("kind", ["pixart", "sd35-medium", "flux-dev", "chroma", "qwen-image"])
def test_layers_see_one_strip_of_one_image(kind):
    grid, rows, window, width = (24, 5), 4, 3, 5
    model = hybrid(kind, window=window)
    seen = []

    def note(module, args, kwargs):
        seen.append(args[0].shape if args else kwargs["hidden_states"].shape)

    for block in model.transformer_blocks:
        (block.img_mlp if kind == "qwen-image" else block.ff).register_forward_pre_hook(note, with_kwargs=True)
    with in_strips(model, rows):
        run(model, make_inputs(model, grid, batch=2))
    strips = grid[0] // rows
    assert len(seen) == 2 * len(model.transformer_blocks) * strips  # not in the pass that gathers
    assert {shape[0] for shape in seen} == {1}
    assert max(shape[1] for shape in seen) <= (rows + window + 1) * width < grid[0] * width / 2


def test_the_result_is_of_the_kind_asked_for():
    model = hybrid("sd3", window=3)
    inputs = make_inputs(model, (8, 5), batch=2)
    with in_strips(model, 3), torch.no_grad():
        (sample,) = model(**inputs, return_dict=False)
        torch.testing.assert_close(model(**inputs).sample, sample)


def test_dense_mode_stays_dense():
    model = hybrid("flux-dev", window=3)
    inputs = make_inputs(model, (8, 5))
    with dense_mode(model):
        teacher = run(model, inputs)
        with in_strips(model, 3):
            torch.testing.assert_close(run(model, inputs), teacher, rtol=0, atol=0)


def test_dense_layers_see_the_whole():
    model = hybrid("pixart", window=3, layers={"transformer_blocks.1.*": "dense"})
    inputs = make_inputs(model, (9, 5))
    whole = run(model, inputs)
    with in_strips(model, 3):
        torch.testing.assert_close(run(model, inputs), whole, **CLOSE)


def test_a_hook_on_a_block_stays_and_runs():
    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, hook = hybrid("pixart", window=3), Counts()
    block = model.transformer_blocks[0]
    add_hook_to_module(block, hook)
    hooked = block.forward
    inputs = make_inputs(model, (9, 5))
    whole = run(model, inputs)
    assert hook.calls == 1
    with pytest.raises(RuntimeError), in_strips(model, 3):
        torch.testing.assert_close(run(model, inputs), whole, **CLOSE)
        assert hook.calls == 1 + 2 * 3
        raise RuntimeError
    assert block.forward is hooked and "forward" not in vars(model.transformer_blocks[1])
    assert all(attn.hybrid.whole_image is None for attn in model.modules() if hasattr(attn, "hybrid"))


def test_bad_input():
    with (
        pytest.raises(ValueError, match="that were made hybrid, not for a SD3Transformer2DModel"),
        in_strips(make("sd3"), 4),
    ):
        pass
    model = hybrid("sd3", window=3)
    with pytest.raises(ValueError, match="1 row of tokens or more, not 0"), in_strips(model, 0):
        pass
    inputs = make_inputs(model, (8, 5))
    with pytest.raises(ValueError, match="without gradients"), in_strips(model, 4):
        model(**inputs)
    assert all(attn.hybrid.whole_image is None for attn in model.modules() if hasattr(attn, "hybrid"))
    cached = hybrid("flux-dev", window=3)
    cached.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="diffusers' caches keep what blocks gave"), in_strips(cached, 4):
        pass
    centred = hybrid("sd3", window=3, center_keys=True)
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn.hybrid: the sums"), in_strips(centred, 4):
        pass
    model.transformer_blocks[0].compile()
    with pytest.raises(ValueError, match="compiled"), in_strips(model, 4):
        pass
