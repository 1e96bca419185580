"""`loss.progressive_steps`: every second layer first, against models in which the others were never converted."""

import copy

import pytest
import torch
from family_calls import call
from safetensors.torch import load_file
from test_distill import GRIDS, logged, tiny_config
from test_layer_steps import moved_hybrid
from tiny_pipelines import recipe_of, tiny_data, tiny_pipeline

from hybriddit import HybridConfig, dense_mode, hybridize, restore_dense
from hybriddit.models.surgery import keep_dense
from hybriddit.training import distill as distill_module
from hybriddit.training.distill import distill, draw_batches, make_student
from hybriddit.training.losses import converted_layers
from hybriddit.training.run_config import DistillConfig


@pytest.mark.parametrize("family", ("flux_dev", "qwen_image"))
def test_a_layer_that_is_kept_dense_is_exactly_the_teacher_s(family):
    pipeline = tiny_pipeline(family)
    dense, data = pipeline.transformer, tiny_data(pipeline)
    (batch,) = draw_batches(data, recipe_of(pipeline), tiny_config(), 0, 0.0, GRIDS, pipeline.scheduler)
    latents, noise, times, text = batch[:4]

    def run(model):
        with torch.no_grad():
            return call(family, model, latents + noise, times, text, 3.5)

    model = moved_hybrid(dense)
    names, whole = list(converted_layers(model)), run(model)
    never = copy.deepcopy(dense)
    hybridize(never, HybridConfig(window=3, map_rank=4, delta_rank=2, layers=dict.fromkeys(names[1::2], "dense")))
    state = model.state_dict()
    never.load_state_dict({name: state[name] for name in never.state_dict()})

    keep_dense(model, names[1::2])
    assert list(converted_layers(model)) == names[::2]
    half = run(model)
    assert torch.equal(half, run(never)) and (half - whole).abs().max() > 1e-3
    with dense_mode(model):
        assert torch.equal(run(model), run(dense))
    assert torch.equal(run(model), half)
    keep_dense(model, ())
    assert torch.equal(run(model), whole)
    with pytest.raises(ValueError, match="is not converted"):
        keep_dense(never, names[1::2])
    keep_dense(model, names[1::2])
    assert torch.equal(run(restore_dense(model)), run(dense)) and not hasattr(model, "_kept_dense")


def test_a_run_converts_half_the_layers_first_and_goes_on_from_the_middle(tmp_path, capsys, monkeypatch):
    made = tiny_pipeline("flux_dev")
    data = tiny_data(made)

    def run(folder, resume=False):
        pipeline = copy.copy(made)
        pipeline.transformer = copy.deepcopy(made.transformer)
        hybrid = HybridConfig(window=3, map_rank=4, delta_rank=2)
        stages = {"loss__progressive_steps": 3, "optim__weight_decay": 0.1, "output__keep": 9}
        config = tiny_config(tmp_path / folder, hybrid, train__steps=5, output__checkpoint_every=1, **stages)
        return distill(pipeline, data, config, resume=resume)

    def state(folder, step):
        return load_file(tmp_path / folder / "checkpoints" / f"step-{step:08d}" / "state.safetensors")

    whole = run("whole")
    said = capsys.readouterr().out
    assert "from step 1 on, 2 of 3 layers" in said and "from step 4 on, 3 of 3 layers are converted" in said
    assert logged(tmp_path / "whole")["converted_layers"] == [2.0] * 3 + [3.0] * 2
    names = list(converted_layers(whole))
    first, switch, after = (state("whole", step) for step in (1, 3, 4))

    def of(tensors, kind, layer):
        return {key: value for key, value in tensors.items() if key.startswith(f"{kind}/{layer}.")}

    for kind in ("weight", "average"):  # neither learning nor weight decay before their time
        late = of(first, kind, names[1])
        assert late and all(torch.equal(value, switch[key]) for key, value in late.items())
        assert any(not torch.equal(value, switch[key]) for key, value in of(first, kind, names[0]).items())
    assert not of(switch, "step", names[1]) and not of(switch, "exp_avg", names[1])
    assert {int(value) for value in of(after, "step", names[1]).values()} == {1}  # Adam begins with them
    assert {int(value) for value in of(after, "step", names[0]).values()} == {4}

    def killed(draw=distill_module.draw_batches, **settings):
        if settings["step"] == 2:  # in the middle of the first stage
            raise RuntimeError("killed")
        return draw(**settings)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(distill_module, "draw_batches", killed)
        run("broken")
    broken = run("broken", resume=True)
    weights = dict(whole.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in broken.named_parameters())
    assert list(converted_layers(broken)) == names


def test_what_cannot_begin_with_half_the_layers_is_refused():
    def config(**loss):
        given = DistillConfig()
        given.train.steps = 4
        for name, value in loss.items():
            setattr(given.loss, name, value)
        return type(given)(**{name: getattr(given, name) for name in vars(given)})

    for steps in (-1, 4):
        with pytest.raises(ValueError, match=r"loss.progressive_steps must be from 0 to below train.steps \(4\)"):
            config(progressive_steps=steps)
    with pytest.raises(ValueError, match="set one of them to 0"):
        config(progressive_steps=2, layer_steps=1)
    layers = {"transformer_blocks.*": "window"}  # without weights, and first of the three
    for dense in ({}, {"single_transformer_blocks.1.*": "dense"}):
        tiny = tiny_config(hybrid=HybridConfig(window=3, layers=layers | dense), loss__progressive_steps=1)
        model = tiny_pipeline("flux_dev").transformer
        if dense:
            with pytest.raises(ValueError, match="loss.progressive_steps converts every second layer first"):
                make_student(model, tiny)
        else:
            make_student(model, tiny)
