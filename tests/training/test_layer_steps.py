"""`loss.layer_steps`: every layer by itself, against a model in which it is the only hybrid layer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from family_calls import call
from test_distill import GRIDS, logged, tiny_config
from tiny_pipelines import FAMILIES, recipe_of, tiny_data, tiny_pipeline

from hybriddit import HybridConfig, dense_mode, hybridize, restore_dense
from hybriddit.models import family_of
from hybriddit.training.distill import check_layer_steps, distill, draw_batches
from hybriddit.training.losses import converted_layers, layers_alone
from hybriddit.training.run_config import DistillConfig


def moved_hybrid(dense, **fields):
    """A hybrid of a dense model with random far branches, gates and deltas."""
    model = hybridize(copy.deepcopy(dense), HybridConfig(window=3, map_rank=4, delta_rank=2, **fields))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".hybrid." in name:
            parameter.data = parameter + 0.3 * torch.randn(parameter.shape, generator=generator)
        else:
            parameter.requires_grad_(False)
    return model


def output_of(model, name, run):
    """What a layer of a model gives in a call, as parts that the model uses."""
    kept = []
    attn = model.get_submodule(name)
    handle = attn.register_forward_hook(lambda module, args, out: kept.append(out))
    run(model)
    handle.remove()
    return family_of(model).layer_outputs(attn, kept[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_models_with_one_hybrid_layer(family):
    pipeline = tiny_pipeline(family)
    dense, data = pipeline.transformer, tiny_data(pipeline)
    (batch,) = draw_batches(data, recipe_of(pipeline), tiny_config(), 0, 0.0, GRIDS, pipeline.scheduler)
    latents, noise, times, text = batch[:4]
    if family == "chroma":  # what padded text gives is compared, too, and there the dense model gives something else
        text["prompt_attention_mask"] = torch.ones_like(text["prompt_attention_mask"])

    def run(model):
        return call(family, model, latents + noise, times, text, 3.5)

    model = moved_hybrid(dense)
    names, expected, gradients = list(converted_layers(model)), 0.0, {}
    for name in names:
        single = hybridize(
            copy.deepcopy(dense),
            HybridConfig(
                window=3, map_rank=4, delta_rank=2, layers={other: "dense" for other in names if other != name}
            ),
        )
        single.load_state_dict({key: x for key, x in model.state_dict().items() if key in single.state_dict()})
        with torch.no_grad(), dense_mode(single):
            wanted = output_of(single, name, run)
        found = output_of(single, name, run)
        loss = sum(
            ((s - t).square().flatten(1).mean(1) / t.flatten(1).var(1, correction=0)).mean()
            for s, t in zip(found, wanted, strict=True)
        ) / len(found)  # fmt: skip
        own = {key: p for key, p in single.named_parameters() if ".hybrid." in key}
        gradients |= zip(own, torch.autograd.grad(loss / len(names), own.values(), allow_unused=True), strict=True)
        expected += loss.detach() / len(names)

    loss = layers_alone(model, family_of(model), len(names), lambda: run(model))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys() and all(p.grad is not None for p in trained.values())
    assert sum(gradient is not None and bool(gradient.abs().max() > 1e-4) for gradient in gradients.values()) > 6
    for name, parameter in trained.items():
        wanted = torch.zeros_like(parameter) if gradients[name] is None else gradients[name]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-6, msg=name)
    restored, kept = restore_dense(model).state_dict(), dense.state_dict()
    assert restored.keys() == kept.keys() and all(torch.equal(restored[name], kept[name]) for name in kept)
    torch.testing.assert_close(run(model), run(dense))  # the last bits of products may depend on where factors lie


def test_a_run_learns_by_layer_first_and_then_as_a_whole(tmp_path):
    pipeline = tiny_pipeline("flux_dev")
    data = tiny_data(pipeline)
    config = tiny_config(tmp_path, train__steps=14, train__batch_size=8, loss__layer_steps=12)
    distill(pipeline, data, config)
    found = logged(tmp_path)
    assert found["output"][:12] == [0.0] * 12 == found["task"][:12] and min(found["output"][12:]) > 0
    assert found["loss"][:12] == found["layer"][:12] and found["layer"][11] < 0.8 * found["layer"][0]


def test_parts_and_checkpointing_change_nothing(tmp_path):
    weights = []
    for number, more in enumerate(({}, {"train__accumulation": 2, "train__gradient_checkpointing": True})):
        pipeline = tiny_pipeline("sd3")
        config = tiny_config(tmp_path / str(number), train__steps=3, loss__layer_steps=3, **more)
        student = distill(pipeline, tiny_data(pipeline), config)
        weights.append({name: p for name, p in student.named_parameters() if ".hybrid." in name})
    for name, parameter in weights[0].items():
        torch.testing.assert_close(weights[1][name], parameter, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("steps", (-1, 5))
def test_more_than_all_steps_is_refused(steps):
    config = DistillConfig()
    config.train.steps, config.loss.layer_steps = 4, steps
    with pytest.raises(ValueError, match=r"loss.layer_steps must be from 0 to train.steps \(4\)"):
        type(config)(**{name: getattr(config, name) for name in vars(config)})


def test_fsdp_is_refused():
    config = tiny_config(loss__layer_steps=1)
    with pytest.raises(ValueError, match="loss.layer_steps trains in one process or with DDP: with FSDP set it to 0"):
        check_layer_steps(config, SimpleNamespace(is_fsdp2=True))
    check_layer_steps(config, SimpleNamespace(is_fsdp2=False))
    check_layer_steps(tiny_config(), SimpleNamespace(is_fsdp2=True))
