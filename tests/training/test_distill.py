"""The loop, run for real on a tiny pipeline of every family's own classes."""

import copy
import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from family_calls import call
from peft import LoraConfig
from runs import noted_grids
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_pipelines import FAMILIES, PROMPTS, TEXT_LENGTH, recipe_of, tiny_data, tiny_pipeline

from hybriddit import HybridConfig, hybridize, load_adapter
from hybriddit.attention import HybridAttention
from hybriddit.cli import main
from hybriddit.data.latents import LatentData
from hybriddit.data.teacher_images import sample
from hybriddit.models.identity import base_digest
from hybriddit.pipelines.loading import find_base
from hybriddit.stored import find_adapter
from hybriddit.training import checkpoint as checkpoint_module
from hybriddit.training import distill as distill_module
from hybriddit.training.batches import epoch_order
from hybriddit.training.distill import distill, draw_batches
from hybriddit.training.optimizer import learning_rates
from hybriddit.training.run_config import DataConfig, DistillConfig, load_config

GRIDS = {(64, 64): (8, 8)}  # of the tiny pipelines: (height, width) in pixels, and in tokens


def tiny_config(folder=None, hybrid=None, **overrides):
    config = DistillConfig(hybrid=hybrid or HybridConfig(window=3, map_rank=4))
    config.optim.lr, config.optim.gate_lr_factor, config.optim.warmup_steps = 1e-2, 5.0, 3
    config.train.batch_size, config.train.steps, config.train.progress = 4, 4, False
    config.output.folder = None if folder is None else str(folder)
    config.output.checkpoint_every, config.output.log_every = 0, 1
    for key, value in overrides.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    return config


def attention_outputs(family, transformer, *arguments):
    """Output of the model, and of every attention layer over image tokens, by hooks of our own."""
    outputs, handles = [], []
    for name, module in transformer.named_modules():
        if name.startswith(("context_refiner.", "text_fusion.")):  # of the text alone
            continue
        if name.split(".")[-1] in (("attn1",) if family == "pixart_sigma" else ("attn", "attn2", "attention")):
            last = name == {"qwen_image": "transformer_blocks.1.attn"}.get(family, "transformer_blocks.2.attn")
            handles.append(
                module.register_forward_hook(
                    lambda m, i, out, last=last: outputs.append(
                        (out[:1] if last else out) if isinstance(out, tuple) else (out,)
                    )
                )
            )
    with torch.no_grad():
        prediction = call(family, transformer, *arguments)
    for handle in handles:
        handle.remove()
    return prediction, outputs


def independent_losses(family, dense, student, scheduler, latents, noise, times, text, guidance=3.5):
    """(task, output, layer) by formulas written out again."""
    if family == "pixart_sigma":
        keep = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
        noisy, target = keep.sqrt() * latents + (1 - keep).sqrt() * noise, noise
    else:
        sigma = times.view(-1, *[1] * (latents.ndim - 1))
        noisy, target = latents + sigma * (noise - latents), noise - latents
    teacher, teacher_layers = attention_outputs(family, dense, noisy, times, text, guidance)
    predicted, student_layers = attention_outputs(family, student, noisy, times, text, guidance)
    layers = {"pixart_sigma": 2, "sd35": 5, "qwen_image": 2, "krea2": 1, "longcat_image": 2}
    assert len(teacher_layers) == layers.get(family, 3)
    errors = [
        sum(
            (((s - t) ** 2).flatten(1).mean(1) / t.flatten(1).var(1, correction=0)).mean()
            for s, t in zip(ss, ts, strict=True)
        )
        / len(ts)
        for ss, ts in zip(student_layers, teacher_layers, strict=True)
    ]
    return ((predicted - target) ** 2).mean(), ((predicted - teacher) ** 2).mean(), sum(errors) / len(errors)


def logged(folder):
    """tag -> values by step, from the TensorBoard events under `folder`."""
    (events,) = {path.parent for path in (folder / "tensorboard").glob("events.out*")}
    accumulator = EventAccumulator(str(events)).Reload()
    return {tag: [event.value for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


@pytest.fixture(scope="module")
def prepared():
    """family -> (pipeline, data), made once; tests copy the pipeline before they convert it."""
    made = {}

    def get(family):
        if family not in made:
            pipeline = tiny_pipeline(family)
            made[family] = pipeline, tiny_data(pipeline)
        pipeline, data = made[family]
        fresh = copy.copy(pipeline)
        fresh.transformer = copy.deepcopy(pipeline.transformer)
        return fresh, data

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_and_its_losses_are_what_they_claim(family, prepared, tmp_path):
    pipeline, data = prepared(family)
    dense, fresh = copy.deepcopy(pipeline.transformer), copy.deepcopy(pipeline.transformer)
    hybridize(fresh, HybridConfig(window=3, map_rank=4))
    config = tiny_config(tmp_path, train__steps=30, train__batch_size=8, optim__ema_decay=0.8)

    student = distill(pipeline, data, config)

    recipe = recipe_of(pipeline)
    (first,) = draw_batches(data, recipe, config, 0, recipe.prompt_dropout, GRIDS, pipeline.scheduler)
    losses = independent_losses(family, dense, fresh, pipeline.scheduler, *first[:4])
    scalars = logged(tmp_path)
    for name, value in zip(("task", "output", "layer"), losses, strict=True):
        assert scalars[name][0] == pytest.approx(value.item(), rel=1e-4), name
    few_steps = ("flux_schnell", "z_image")  # as told by the config
    weights = (0, 1, 0.5) if family in few_steps else (1, 0.5, 0.5)
    total = sum(weight * value.item() for weight, value in zip(weights, losses, strict=True))
    assert scalars["loss"][0] == pytest.approx(total, rel=1e-4)

    # the student is nearer to its teacher on a batch with times and noise that it has not seen
    (batch,) = draw_batches(data, recipe, config, 10**6, 0.0, GRIDS, pipeline.scheduler)
    before = independent_losses(family, dense, fresh, pipeline.scheduler, *batch[:4])
    after = independent_losses(family, dense, student, pipeline.scheduler, *batch[:4])
    assert after[1] < 0.9 * before[1] and after[2] < 0.8 * before[2], (before, after)

    # nothing of the teacher has moved, and everything that was added has
    state = student.state_dict()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(state[name], tensor), name
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(state[name], tensor) == (".hybrid." not in name), name
    assert all(p.grad is None and not p.requires_grad for p in student.parameters())

    # what was saved is what was returned
    loaded = load_adapter(copy.deepcopy(dense), tmp_path / "adapter")
    saved, returned, arguments = loaded.state_dict(), student.state_dict(), (batch[0], batch[2], batch[3], 3.5)
    assert saved.keys() == returned.keys() and all(torch.equal(saved[name], returned[name]) for name in saved)
    with torch.no_grad():  # on some processors the last bits of a product depend on where in memory its factors are
        torch.testing.assert_close(call(family, loaded, *arguments), call(family, student, *arguments))


def test_attention_mode_trains_deltas_and_leaves_the_projections(prepared):
    pipeline, data = prepared("sd35")
    dense = copy.deepcopy(pipeline.transformer)
    student = distill(
        pipeline, data, tiny_config(hybrid=HybridConfig(window=3, map_rank=4, delta_rank=2), train__steps=6)
    )
    state = student.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())
    deltas = [name for name in state if ".hybrid.deltas." in name]
    fresh = copy.deepcopy(dense)
    torch.manual_seed(0)
    hybridize(fresh, HybridConfig(window=3, map_rank=4, delta_rank=2))
    moved = {name for name in deltas if not torch.equal(state[name], fresh.state_dict()[name])}
    assert moved >= set(deltas) and len(deltas) > 30


def test_gradient_checkpointing_changes_nothing(prepared):
    for family in ("sd35", "flux_dev"):
        results = []
        for on in (False, True):
            pipeline, data = prepared(family)
            model = distill(pipeline, data, tiny_config(train__gradient_checkpointing=on))
            results.append({name: t for name, t in model.state_dict().items() if ".hybrid." in name})
            assert not model.is_gradient_checkpointing
        for name, tensor in results[0].items():
            torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_accumulated_gradients_are_those_of_the_whole_batch(prepared):
    results = []
    for parts in (1, 4):
        pipeline, data = prepared("flux_dev")
        config = tiny_config(train__accumulation=parts, train__steps=2)
        model = distill(pipeline, data, config)
        results.append([p for name, p in model.named_parameters() if ".hybrid." in name])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_gates_step_at_their_own_rate_from_the_first_step(prepared, tmp_path):
    pipeline, data = prepared("flux_dev")
    config = tiny_config(
        tmp_path,
        HybridConfig(window=3, map_rank=4, delta_rank=2),
        train__steps=1,
        optim__lr=1e-4,
        optim__gate_lr_factor=100.0,
        optim__warmup_steps=10,
        output__checkpoint_every=1,
    )
    distill(pipeline, data, config)
    weights = load_file(tmp_path / "checkpoints" / "step-00000001" / "state.safetensors")
    # Adam's first step is the rate itself, whatever the gradient
    gates = torch.cat([t.flatten() for name, t in weights.items() if name.startswith("weight/") and ".gate" in name])
    assert gates.abs().median() == pytest.approx(1e-2, rel=0.02)
    ups = "deltas.to_q_delta.up.weight"
    deltas = [t for name, t in weights.items() if name.startswith("weight/") and name.endswith(ups)]
    assert deltas and torch.cat([t.flatten() for t in deltas]).abs().median() == pytest.approx(1e-5, rel=0.02)


def test_learning_rates():
    config = tiny_config(optim__warmup_steps=10, train__steps=100, optim__lr=1.0, optim__gate_lr_factor=100.0)
    assert learning_rates(0, config) == pytest.approx((0.1, 100.0))
    assert learning_rates(9, config) == learning_rates(99, config) == pytest.approx((1.0, 100.0))
    config.optim.schedule = "cosine"
    assert learning_rates(50, config) == pytest.approx((0.5, 50.0))
    assert learning_rates(99, config)[0] < 1e-3


def test_prompt_dropout_puts_the_empty_prompt_in_place(prepared):
    pipeline, data = prepared("pixart_sigma")
    config, recipe = tiny_config(train__batch_size=400), recipe_of(pipeline)

    def dropped(share):
        (batch,) = draw_batches(data, recipe, config, 0, share, GRIDS, pipeline.scheduler)
        text, indices = batch[3], epoch_order(len(data), 0, 0, 400)
        rows = data.rows(indices)
        empty = (text["prompt_embeds"] == data.empty["prompt_embeds"]).flatten(1).all(1)
        kept = (text["prompt_embeds"] == rows["prompt_embeds"]).flatten(1).all(1)
        assert (empty | kept).all()
        mask = torch.where(empty.view(-1, 1), data.empty["prompt_attention_mask"], rows["prompt_attention_mask"])
        assert torch.equal(text["prompt_attention_mask"], mask)
        return empty.float().mean().item()

    assert dropped(0.0) == 0 and dropped(1.0) == 1 and 0.06 < dropped(0.1) < 0.14


@pytest.mark.parametrize("family", ("sd3", "flux_dev"))
def test_window_dropout_gives_some_samples_the_far_branch_alone(family, prepared, tmp_path):
    """The losses of a step are those of gates at 1 for the chosen samples, and the student keeps no choice."""
    pipeline, data = prepared(family)
    config = tiny_config(tmp_path, train__steps=1, train__batch_size=12, loss__window_dropout=0.5, loss__task=0)
    dense, near = copy.deepcopy(pipeline.transformer), copy.deepcopy(pipeline.transformer)
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        hybridize(near, config.hybrid)
    far = copy.deepcopy(near)
    for layer in (module for module in far.modules() if isinstance(module, HybridAttention)):
        layer.gate_init = math.inf
        layer.init_gate()
    recipe = recipe_of(pipeline)
    (batch,) = draw_batches(data, recipe, config, 0, recipe.prompt_dropout, GRIDS, pipeline.scheduler)
    far_only = batch[4]
    assert 2 < far_only.sum() < 10
    wanted = 0
    for model, chosen in ((far, far_only), (near, ~far_only)):
        latents, noise, times = (x[chosen] for x in batch[:3])
        text = {name: value[chosen] for name, value in batch[3].items()}
        losses = independent_losses(family, dense, model, pipeline.scheduler, latents, noise, times, text)
        wanted += torch.stack(losses) * chosen.sum() / len(chosen)

    student = distill(pipeline, data, config)

    found = logged(tmp_path)
    assert [found["output"][0], found["layer"][0]] == pytest.approx(wanted[1:].tolist(), rel=1e-4)
    assert all(module.far_only is None for module in student.modules() if isinstance(module, HybridAttention))


def test_a_stopped_run_with_window_dropout_leaves_whole_layers(prepared, monkeypatch):
    pipeline, data = prepared("sd3")
    draw = distill_module.draw_batches

    def stopped(**arguments):
        if arguments["step"] == 2:
            raise KeyboardInterrupt
        return draw(**arguments)

    monkeypatch.setattr(distill_module, "draw_batches", stopped)
    with pytest.raises(KeyboardInterrupt):
        distill(pipeline, data, tiny_config(loss__window_dropout=0.5))
    layers = [module for module in pipeline.transformer.modules() if isinstance(module, HybridAttention)]
    assert layers and all(layer.far_only is None for layer in layers)


def test_the_batch_of_a_step_does_not_depend_on_how_it_is_divided(prepared):
    pipeline, data = prepared("sd3")
    recipe = recipe_of(pipeline)

    def draw(accumulation, processes):
        config = tiny_config(train__batch_size=8, train__accumulation=accumulation)
        parts = [
            part
            for rank in range(processes)
            for part in draw_batches(data, recipe, config, 3, 0.5, GRIDS, pipeline.scheduler, rank, processes)
        ]
        samples = [(t, n, x) for x, n, t, *_ in parts for t, n, x in zip(t.tolist(), n, x, strict=True)]
        return sorted(samples, key=lambda item: item[0])

    whole = draw(1, 1)
    for divided in (draw(4, 1), draw(1, 2), draw(2, 2)):
        for (t, n, x), (t2, n2, x2) in zip(whole, divided, strict=True):
            assert t == t2 and torch.equal(n, n2) and torch.equal(x, x2)


def test_every_epoch_is_a_new_shuffle_of_the_whole_set():
    stream = epoch_order(10, 0, 0, 30)
    epochs = [stream[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epoch_order(10, 0, 7, 9) == stream[7:16]
    assert epoch_order(10, 1, 0, 10) != epochs[0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate")])
def test_a_full_device_is_one_line(error, prepared, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise error

    pipeline, data = prepared("flux_dev")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="set train.gradient_checkpointing=true"):
        patch.setattr(distill_module.Distillation, "losses", full)
        distill(pipeline, data, tiny_config(None))
    pipeline.save_pretrained(tmp_path / "teacher")
    config = tiny_config(tmp_path / "run", data__prompts=["a"], data__images=4, data__height=64, data__width=64)
    config.model.path = str(tmp_path / "teacher")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="lower data.batch_size, or set data.offload"):
        patch.setattr(distill_module, "make_data", full)
        distill_module.run(config)


def test_resume_gives_what_an_unbroken_run_gives(prepared, tmp_path, monkeypatch):
    def settings(folder):
        return tiny_config(
            folder,
            HybridConfig(window=3, map_rank=4, delta_rank=2),
            train__steps=7,
            train__batch_size=3,
            optim__schedule="cosine",
            output__checkpoint_every=3,
        )

    pipeline, data = prepared("sd35")
    distill(pipeline, data, settings(tmp_path / "unbroken"))

    def interrupted(draw=distill_module.draw_batches, **arguments):
        if arguments["step"] == 4:
            raise KeyboardInterrupt
        return draw(**arguments)

    pipeline, data = prepared("sd35")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill_module, "draw_batches", interrupted)
        distill(pipeline, data, settings(tmp_path / "broken"))
    assert [p.name for p in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-00000003"]
    pipeline, data = prepared("sd35")
    distill(pipeline, data, settings(tmp_path / "broken"), resume=True)

    for name in ("adapter/hybrid_adapter.safetensors", "checkpoints/step-00000007/state.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("unbroken", "broken"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


def test_a_stopped_run_leaves_an_adapter(prepared, tmp_path, monkeypatch, capsys):
    """In every checkpoint: the averaged weights of its step. Commands take the run's folder, and find the newest."""

    def settings(steps):
        return tiny_config(tmp_path, train__steps=steps, output__checkpoint_every=1)

    def interrupted(draw=distill_module.draw_batches, **arguments):
        if arguments["step"] == 2:
            raise KeyboardInterrupt
        return draw(**arguments)

    pipeline, data = prepared("flux_dev")
    dense = copy.deepcopy(pipeline.transformer)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill_module, "draw_batches", interrupted)
        distill(pipeline, data, settings(4))
    checkpoints = [tmp_path / "checkpoints" / f"step-{step:08d}" for step in (1, 2)]
    for step, checkpoint in enumerate(checkpoints, 1):
        averages = load_file(checkpoint / "state.safetensors")
        adapter = load_file(checkpoint / "adapter" / "hybrid_adapter.safetensors")
        for name, value in adapter.items():
            assert torch.equal(value, averages[f"average/{name}"]), name
        base = {"name": None, "weights": base_digest(dense), "height": 64, "width": 64, "steps": step}
        assert json.loads((checkpoint / "adapter" / "hybrid_config.json").read_text())["_base"] == base
    assert find_adapter(tmp_path) == checkpoints[1] / "adapter"
    assert find_adapter(checkpoints[0]) == checkpoints[0] / "adapter"
    loaded = load_adapter(copy.deepcopy(dense), tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in adapter.items())
    assert main(["info", str(tmp_path)]) == 0
    assert f"folder  {checkpoints[1] / 'adapter'}\n" in (said := capsys.readouterr().out) and "steps 2" in said

    pipeline, data = prepared("flux_dev")
    with pytest.raises(ValueError, match="train.steps is 1, and .*step-00000002 has 2 already: give it 2 or more"):
        distill(pipeline, data, settings(1), resume=True)
    assert not (tmp_path / "adapter").exists()
    distill(pipeline, data, settings(3), resume=True)
    assert find_adapter(tmp_path) == tmp_path / "adapter", "the result, of a finished run"
    with pytest.raises(
        FileNotFoundError, match="no diffusers pipeline at .* it holds an adapter, which needs the model"
    ):
        find_base(str(tmp_path))
    pipeline, data = prepared("flux_dev")
    distill(pipeline, data, settings(4), resume=True)
    (tmp_path / "adapter" / "hybrid_config.json").unlink()
    assert find_adapter(tmp_path).parent.name == "step-00000004"


def test_what_the_recipe_says_is_kept_with_the_run(prepared, tmp_path):
    """Losses and recipe are written as they are in force. A run of version 0.1, which left them out, is resumed."""
    pipeline, data = prepared("flux_schnell")
    distill(pipeline, data, tiny_config(tmp_path, train__steps=1, output__checkpoint_every=1, loss__output=0.25))
    written, [begun] = load_config(tmp_path / "config.yaml"), json.loads((tmp_path / "run.json").read_text())
    in_force = {"task": 0.0, "output": 0.25, "layer": 0.5, "layer_steps": 0, "prompt_dropout": 0.0}
    in_force |= {"window_dropout": 0.0, "distribution": 0.0, "progressive_steps": 0}
    assert dataclasses.asdict(written.loss) == begun["config"]["loss"] == in_force
    assert written.model.recipe == begun["config"]["model"]["recipe"] == "flux_schnell"
    assert written.data.max_sequence_length == begun["config"]["data"]["max_sequence_length"] == TEXT_LENGTH
    assert begun["in_force"] == {"data.text_tokens": TEXT_LENGTH, "hybrid.map_rank": [4], "hybrid.projection": [2]}
    assert "# hybrid.projection of this model: [2]\n" in (tmp_path / "config.yaml").read_text()

    def resumed(steps, **loss):
        pipeline, data = prepared("flux_schnell")
        given = {f"loss__{name}": value for name, value in loss.items()}
        distill(
            pipeline, data, tiny_config(tmp_path, train__steps=steps, output__checkpoint_every=1, **given), resume=True
        )

    resumed(2, output=0.25, layer=0.5)
    with pytest.raises(ValueError, match="other values of loss.layer: resume with"):
        resumed(3, output=0.25, layer=0.75)
    state = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    old = json.loads(state.read_text())
    old["settings"] |= {f"loss.{name}": None for name in ("task", "output", "layer", "prompt_dropout")}
    old["settings"] |= {"model.recipe": None, "data.max_sequence_length": None}
    state.write_text(json.dumps(old))
    for changed in ({"output": 0.25}, {"task": 0.5}):
        with pytest.raises(ValueError, match=f"other values of loss.{next(iter(changed))}: resume with"):
            resumed(3, **changed)
    resumed(3)


def test_what_cannot_be_resumed_is_said(prepared, tmp_path):
    pipeline, data = prepared("flux_dev")
    with pytest.raises(ValueError, match="nothing to resume"):
        distill(pipeline, data, tiny_config(tmp_path), resume=True)
    distill(pipeline, data, tiny_config(tmp_path, train__steps=1, output__checkpoint_every=1))
    pipeline, data = prepared("flux_dev")
    with pytest.raises(ValueError, match="holds a run already"):
        distill(pipeline, data, tiny_config(tmp_path))
    with pytest.raises(ValueError, match=r"other values of hybrid.window: resume with"):
        distill(pipeline, data, tiny_config(tmp_path, HybridConfig(window=4, map_rank=4)), resume=True)
    pipeline, data = prepared("flux_dev")
    with pytest.raises(ValueError, match=r"other values of data.images: resume with"):
        distill(pipeline, data, tiny_config(tmp_path, data__images=5), resume=True)
    with pytest.raises(ValueError, match=r"other values of data.content \(what the images, captions or prompts are\):"):
        distill(pipeline, tiny_data(pipeline, prompts=PROMPTS[::-1]), tiny_config(tmp_path), resume=True)
    pipeline, _ = prepared("flux_dev")
    pipeline.transformer.proj_out.weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"other values of model.weights \(what is at model.path\): resume with"):
        distill(pipeline, data, tiny_config(tmp_path), resume=True)
    (state,) = tmp_path.glob("checkpoints/*/state.safetensors")
    state.write_bytes(state.read_bytes()[:-10])
    pipeline, data = prepared("flux_dev")
    with pytest.raises(ValueError, match="is damaged"):
        distill(pipeline, data, tiny_config(tmp_path), resume=True)


def test_what_changes_no_sample_may_change_when_a_run_is_resumed(tmp_path, monkeypatch):
    """The whole run: model, prompts, cache and output are moved, and images are made fewer at a time."""
    monkeypatch.chdir(tmp_path)
    tiny_pipeline("sd3").save_pretrained("teacher")
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    Path("run.yaml").write_text(f"""
model: {{path: teacher}}
hybrid: {{window: 3, map_rank: 4}}
data: {{prompts: prompts.txt, images: 4, height: 64, width: 64, steps: 2, max_sequence_length: {TEXT_LENGTH}}}
train: {{steps: 1, batch_size: 4, progress: false}}
output: {{checkpoint_every: 1, log_every: 1}}
""")
    distill_module.run(load_config("run.yaml", ["data.cache=cache", "output.folder=run"]))
    for name in ("teacher", "cache", "run"):
        Path(name).rename(f"moved-{name}")
    Path("prompts.txt").rename("moved.txt")
    moved = [f"model.path={tmp_path / 'moved-teacher'}", "data.prompts=moved.txt", "data.states=9"]
    moved += [f"data.cache={tmp_path / 'moved-cache'}", "output.folder=moved-run"]
    more = ["data.batch_size=1", "train.accumulation=4", "train.steps=2"]
    monkeypatch.setattr("hybriddit.data.teacher_images.sample", lambda *args, **kwargs: pytest.fail("images are made"))
    distill_module.run(load_config("run.yaml", [*moved, *more]), resume=True)
    assert (Path("moved-run") / "adapter").is_dir()
    with pytest.raises(
        ValueError, match="does not divide into 1 processes x 3 accumulation steps|multiple of train.acc"
    ):
        distill_module.run(load_config("run.yaml", [*moved, "train.accumulation=3"]), resume=True)

    tiny_pipeline("sd3", seed=1).save_pretrained("moved-teacher")
    monkeypatch.setattr(distill_module, "make_data", lambda *args, **kwargs: pytest.fail("images are made"))
    with pytest.raises(ValueError, match="other values of model.weights"):
        distill_module.run(load_config("run.yaml", [*moved, "train.steps=3"]), resume=True)


def test_all_processes_make_the_images(tmp_path, monkeypatch):
    tiny_pipeline("sd3").save_pretrained(tmp_path / "teacher")
    (tmp_path / "run.yaml").write_text(
        f"{{model: {{path: {tmp_path / 'teacher'}}}, data: {{prompts: [a], cache: {tmp_path / 'cache'}, height: 64, "
        f"width: 64}}, output: {{folder: {tmp_path / 'run'}}}}}"
    )
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "process_index", 1)
    monkeypatch.setattr(distill_module, "make_data", lambda *args, processes, **kwargs: pytest.fail(repr(processes)))
    with pytest.raises(pytest.fail.Exception, match=r"Processes\(rank=1, count=2\)"):
        distill_module.run(load_config(tmp_path / "run.yaml"))


def test_a_folder_s_set_does_not_depend_on_what_it_does_not_use():
    kept = distill_module.resume_settings(DistillConfig(data=DataConfig(source="folder", folder="x")))
    assert not {"data.prompts", "data.images", "data.seed", "data.states"} & kept.keys() and "data.folder" in kept


def test_a_checkpoint_that_does_not_tell_its_teacher_s_weights_goes_by_the_path(tmp_path):
    old = {"model.path": "teacher", "data.prompts": "a.txt", "train.accumulation": 2, "data.batch_size": 4}
    (tmp_path / "state.json").write_text(json.dumps({"step": 1, "settings": old}))
    now = {"model.path": "teacher", "data.prompts": "a.txt", "model.weights": "1", "data.content": "2"}
    assert checkpoint_module.read_state(tmp_path, now)["step"] == 1
    for name in ("model.path", "data.prompts"):
        with pytest.raises(ValueError, match=f"other values of {name}: resume with"):
            checkpoint_module.read_state(tmp_path, {**now, name: "other"})


def test_a_kill_during_a_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    parameters = {"attn.hybrid.gate": torch.nn.Parameter(torch.randn(3))}
    average = [torch.randn(3)]
    optimizer = torch.optim.AdamW(parameters.values())

    def save(step):
        state = (parameters, average, optimizer, {"a": 1})
        with checkpoint_module.saving_checkpoint(tmp_path, step, *state, keep=2) as partial:
            (partial / "adapter").mkdir()
            (partial / "adapter" / "b.txt").write_text("b")

    save(1)
    kept = parameters["attn.hybrid.gate"].detach().clone()
    for moment in ("in the state file", "before the rename"):
        child = os.fork()
        if child == 0:
            with torch.no_grad():
                parameters["attn.hybrid.gate"].zero_()

            def killed(*arguments, moment=moment):
                if moment == "in the state file":
                    (tmp_path / ".partial" / "state.safetensors").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)

            if moment == "in the state file":
                checkpoint_module.write_tensors = killed
            else:
                type(tmp_path).rename = killed
            save(2)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert [path.name for path in checkpoint_module.checkpoints(tmp_path)] == ["step-00000001"]
    step = checkpoint_module.load_checkpoint(
        checkpoint_module.checkpoints(tmp_path)[-1], parameters, average, optimizer, {"a": 1}
    )
    assert step == 1 and torch.equal(parameters["attn.hybrid.gate"], kept)
    for number in (2, 3):
        save(number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(log_every, prepared, tmp_path):
    pipeline, data = prepared("flux_dev")
    order = epoch_order(len(data), 0, 0, 8)
    poisoned = data.rows(range(8))
    poisoned["latents"][order[5]] = float("nan")  # two a step: the third
    data = LatentData([poisoned], data.empty, data.info)
    config = tiny_config(tmp_path, train__batch_size=2, output__log_every=log_every, output__checkpoint_every=1)
    with pytest.raises(FloatingPointError, match="not finite at step 3 "):
        distill(pipeline, data, config)
    found = checkpoint_module.checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in found] == ["step-00000001", "step-00000002"]
    assert all(tensor.isfinite().all() for tensor in load_file(found[-1] / "state.safetensors").values())


def test_the_step_is_named_though_nobody_looked_for_a_while(prepared):
    pipeline, data = prepared("flux_dev")
    order = epoch_order(len(data), 0, 0, 8)
    poisoned = data.rows(range(8))
    poisoned["latents"][order[3]] = float("nan")
    data = LatentData([poisoned], data.empty, data.info)
    with pytest.raises(FloatingPointError, match="not finite at step 2 "):
        distill(pipeline, data, tiny_config(train__batch_size=2, output__log_every=100))


def test_the_result_is_the_moving_average(prepared, tmp_path):
    pipeline, data = prepared("flux_dev")
    config = tiny_config(tmp_path, optim__ema_decay=0.25, output__checkpoint_every=1, output__keep=10)
    model = distill(pipeline, data, config)
    steps = [load_file(p / "state.safetensors") for p in checkpoint_module.checkpoints(tmp_path / "checkpoints")]
    assert len(steps) == 4
    for name, parameter in model.named_parameters():
        if ".hybrid." not in name:
            continue
        mean = steps[0][f"weight/{name}"]  # the first step counts whole, the start not at all
        for number, step in enumerate(steps[1:], 1):
            decay = min(0.25, (1 + number) / (10 + number))
            mean = decay * mean + (1 - decay) * step[f"weight/{name}"]
            assert step[f"average/{name}"].dtype == torch.float32
        torch.testing.assert_close(parameter.data, mean, rtol=1e-5, atol=1e-7)
    gate = next(name for name in steps[-1] if name.startswith("weight/") and ".hybrid.gate." in name)
    assert not torch.equal(steps[-1][gate], steps[-1][gate.replace("weight/", "average/")])


def test_sample_grids_show_the_teacher_beside_the_averaged_student(prepared, tmp_path, monkeypatch):
    grids = noted_grids(monkeypatch)
    pipeline, data = prepared("sd3")
    dense = copy.copy(pipeline)
    dense.transformer = copy.deepcopy(pipeline.transformer)
    config = tiny_config(tmp_path, train__steps=3, output__sample_every=2, output__samples=2)
    distill(pipeline, data, config)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-00000002.png", "step-00000003.png"]
    grid = grids["step-00000003.png"]
    assert grid.heads == ("teacher", "student") and grid.captions == [PROMPTS[:2]] * 2
    rows = data.rows([0, 1])
    rows.pop("latents")
    for column, made_by in zip(grid.columns, (dense, pipeline), strict=True):  # the last grid is the returned model's
        expected = sample(made_by, rows, data.empty, data.info, [0, 1])
        assert [image.tobytes() for image in column] == [image.tobytes() for image in expected]


def test_bf16_keeps_the_frozen_weights_and_trains_in_fp32(prepared, tmp_path):
    pipeline, data = prepared("flux_dev")
    pipeline.transformer.to(torch.bfloat16)
    with pytest.raises(ValueError, match="train.precision=bf16"):
        distill(pipeline, data, tiny_config())
    pipeline, data = prepared("flux_dev")
    pipeline.transformer.to(torch.bfloat16)
    config = tiny_config(tmp_path, train__precision="bf16", output__checkpoint_every=4, train__steps=4)
    AcceleratorState._reset_state(reset_partial_state=True)
    model = distill(pipeline, data, config)
    weights = load_file(tmp_path / "checkpoints" / "step-00000004" / "state.safetensors")
    assert all(t.dtype == torch.float32 for t in weights.values())
    assert {p.dtype for name, p in model.named_parameters() if ".hybrid.gate" not in name} == {torch.bfloat16}
    assert "autocast" not in getattr(model.forward, "__qualname__", "")


def test_settings_that_cannot_work(prepared):
    pipeline, data = prepared("flux_dev")
    with pytest.raises(ValueError, match="nothing to train"):
        distill(pipeline, data, tiny_config(hybrid=HybridConfig(window=3, linear=False)))
    pipeline, data = prepared("flux_dev")
    with pytest.raises(ValueError, match="not all be 0"):
        distill(pipeline, data, tiny_config(loss__task=0.0, loss__output=0.0, loss__layer=0.0))
    with pytest.raises(ValueError, match="are no 4 x 8 grid"):
        distill(pipeline, LatentData(data.shards, data.empty, _info(data, height=32)), tiny_config())


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["loss.task=0", "loss.output=0", "loss.layer=0"], "may not all be 0"),
        (["data.height=100"], "data.height must be a multiple of 8, .* got 100"),
        (["hybrid.layers={'*.attn9': dense}"], r"'\*.attn9' matches no attention layer"),
        (["hybrid.linear=false"], "nothing to train"),
        (["train.batch_size=3"], "3 does not divide into 2 processes x 1"),
        (["data.cache=null"], "several processes need data.cache"),
    ],
)
def test_what_cannot_work_is_said_before_any_image_is_made(overrides, message, tmp_path, monkeypatch):
    tiny_pipeline("sd3").save_pretrained(tmp_path / "teacher")
    path = tmp_path / "run.yaml"
    path.write_text(f"""
model: {{path: {tmp_path / "teacher"}}}
data: {{prompts: [a shoe], height: 64, width: 64, cache: {tmp_path / "cache"}}}
output: {{folder: {tmp_path / "run"}}}
""")
    monkeypatch.setattr(distill_module, "make_data", lambda *args, **kwargs: pytest.fail("images were made"))
    if "processes" in message:
        monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match=message):
        distill_module.run(load_config(path, overrides))


def _info(data, **changes):
    return dataclasses.replace(data.info, **changes)


def test_a_teacher_may_have_a_lora_and_the_hybrid_layers_may_not(prepared, tmp_path):
    """The teacher is the model with its LoRA; the adapter knows nothing of it, and the LoRA is not trained."""
    pipeline, data = prepared("flux_dev")
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    distill(pipeline, data, tiny_config(tmp_path / "run"))
    after = pipeline.transformer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    plain = load_adapter(prepared("flux_dev")[0], tmp_path / "run" / "adapter").transformer
    own = {name: value for name, value in plain.state_dict().items() if ".hybrid." in name}
    assert own and all(torch.equal(after[name], value) for name, value in own.items())

    pipeline, data = prepared("flux_dev")
    hybridize(pipeline.transformer, tiny_config(tmp_path / "other").hybrid)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="the hybrid layers have a LoRA"):
        distill(pipeline, data, tiny_config(tmp_path / "other"))
    pipeline, data = prepared("flux_dev")
    pipeline.transformer = torch.compile(pipeline.transformer)
    with pytest.raises(ValueError, match="the model is within OptimizedModule: give the model itself"):
        distill(pipeline, data, tiny_config(tmp_path / "other"))


def test_a_guidance_distilled_teacher_has_no_task_loss_on_others_images(prepared):
    pipeline, data = prepared("flux_dev")
    foreign = LatentData(data.shards, data.empty, _info(data, teacher_made=False))
    weights, _ = distill_module.loss_settings(recipe_of(pipeline), tiny_config(), teacher_made=False)
    assert weights.tolist() == [0.0, 0.5, 0.5]
    with pytest.raises(ValueError, match="images the teacher made itself"):
        distill(pipeline, foreign, tiny_config(loss__task=1.0))
    weights, _ = distill_module.loss_settings(recipe_of(prepared("sd3")[0]), tiny_config(), teacher_made=False)
    assert weights.tolist() == [1.0, 0.5, 0.5]


def test_a_checkpoint_from_before_a_setting_has_its_default(tmp_path):
    settings = {"hybrid.window": 3, "hybrid.mixer": "linear", "hybrid.feature_map": "elu"}
    (tmp_path / "state.json").write_text(json.dumps({"step": 1, "settings": {"hybrid.window": 3}}))
    assert checkpoint_module.read_state(tmp_path, settings)["step"] == 1
    with pytest.raises(ValueError, match="made with other values of hybrid.mixer: resume with"):
        checkpoint_module.read_state(tmp_path, settings | {"hybrid.mixer": "another"})
