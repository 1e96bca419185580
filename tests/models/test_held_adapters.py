"""Several adapters of one model, held in memory and switched."""

import pytest
import torch
from tiny_models import make, make_inputs, perturb_hybrid, run

from hybriddit import HeldAdapters, HybridConfig, hybridize, load_adapter, save_adapter

CONFIGS = {  # the first two are alike
    "one": HybridConfig(window=3, map_rank=4),
    "two": HybridConfig(window=3, map_rank=4),
    "blocks": HybridConfig(window=5, map_rank=0, mixer="blocks", delta_rank=2),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Adapters of one model, and what each gives on the same input; None for the dense model."""
    folder, expected = tmp_path_factory.mktemp("adapters"), {}
    inputs = make_inputs(make("flux-dev"), (6, 8))
    expected[None] = run(make("flux-dev"), inputs)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = hybridize(make("flux-dev"), config)
        perturb_hybrid(model, seed=seed)
        save_adapter(model, folder / name)
        expected[name] = run(load_adapter(make("flux-dev"), folder / name), inputs)
    assert len({value.sum().item() for value in expected.values()}) == 4
    return folder, inputs, expected


def test_every_switch_gives_what_loading_gives(saved):
    folder, inputs, expected = saved
    model = make("flux-dev")
    adapters = HeldAdapters(model)
    for name in CONFIGS:
        adapters.add(name, folder / name)
        assert adapters.active == name
        torch.testing.assert_close(run(model, inputs), expected[name])
    assert adapters.names == list(CONFIGS)
    for name in ("one", "two", "blocks", None, "two", "two", "one", None, None, "blocks"):
        adapters.use(name)
        assert adapters.active == name
        torch.testing.assert_close(run(model, inputs), expected[name])
    adapters.use("one")
    adapters.add("one", folder / "two")  # takes its place
    torch.testing.assert_close(run(model, inputs), expected["two"])
    assert adapters.names == list(CONFIGS)
    adapters.use(None)
    assert not any(".hybrid." in name for name, _ in model.named_parameters())


def test_what_cannot_work_leaves_the_model_as_it_was(saved, tmp_path):
    folder, inputs, expected = saved
    model = make("flux-dev")
    adapters = HeldAdapters(model)
    with pytest.raises(ValueError, match="no adapter 'one' is held, only none: add it first"):
        adapters.use("one")
    adapters.add("one", folder / "one")
    wider = hybridize(make("flux-dev", layers=2), CONFIGS["one"])
    save_adapter(wider, tmp_path / "wider")
    save_adapter(hybridize(make("sd3"), CONFIGS["one"]), tmp_path / "sd3")
    for name, message in (("wider", "does not fit this model"), ("sd3", "is for SD3Transformer2DModel")):
        with pytest.raises(ValueError, match=message):
            adapters.add("other", tmp_path / name)
        assert adapters.active == "one" and adapters.names == ["one"]
        torch.testing.assert_close(run(model, inputs), expected["one"])
    with pytest.raises(ValueError, match="the model is hybrid already"):
        HeldAdapters(model)
    save_adapter(hybridize(make("flux-dev", dtype=torch.float32), CONFIGS["one"]), tmp_path / "single")
    other = HeldAdapters(make("flux-dev", seed=5, dtype=torch.float32))
    with pytest.raises(ValueError, match="was made from other weights"):
        other.add("one", tmp_path / "single")
    other.add("one", tmp_path / "single", check_base=False)
