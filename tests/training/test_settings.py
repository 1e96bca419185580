"""Every setting reaches the training step: for each, a value under which a run that ignored it would end differently."""

import copy
import dataclasses
import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from runs import noted_grids
from safetensors.torch import load_file
from tiny_pipelines import PROMPTS, TEXT_LENGTH, recipe_of, tiny_data, tiny_pipeline
from torch.utils.flop_counter import FlopCounterMode

from hybriddit import HybridConfig, hybridize
from hybriddit.data.class_data import ClassData, ClassInfo
from hybriddit.data.teacher_images import teacher_images
from hybriddit.models.flops import sit_flops
from hybriddit.training import distill as distilling
from hybriddit.training import loop as fitting
from hybriddit.training import train_sit as training
from hybriddit.training.optimizer import make_optimizer
from hybriddit.training.run_config import DistillConfig, SiTConfig

SIT = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "patch_size": 2,
    "sample_size": 8,
    "in_channels": 1,
    "num_classes": 2,
    "attention": "hybrid",
    "window": 3,
}
# of other models than those above: other names of weights, and the same names with other shapes
OTHER_SITS = ({"num_layers": 2}, {"map_rank": 3})
OTHER_HYBRIDS = (HybridConfig(window=3, map_rank=4, delta_rank=2), HybridConfig(window=3, map_rank=3))


def set_all(config, folder, settings):
    """`settings`: {"section.name": value}, laid over what all runs here have in common."""
    common = {
        "train.steps": 1,
        "train.batch_size": 4,
        "train.progress": False,
        "optim.lr": 1e-2,
        "optim.gate_lr_factor": 1.0,
        "optim.warmup_steps": 0,
        "output.folder": str(folder),
        "output.checkpoint_every": 1,
        "output.keep": 100,
        "output.log_every": 1,
    }
    for key, value in {**common, **settings}.items():
        section, name = key.split(".")
        assert hasattr(getattr(config, section), name), key
        setattr(getattr(config, section), name, value)
    return config


class Distilling:
    """Runs of `distill` on a tiny pipeline."""

    family = "sd3"

    def __init__(self):
        self.pipeline = tiny_pipeline(self.family)
        self.data = tiny_data(self.pipeline)

    def config(self, folder, **settings):
        return set_all(DistillConfig(hybrid=HybridConfig(window=3, map_rank=4)), folder, settings)

    def model(self):
        """Converted, its gates open."""
        model = copy.deepcopy(self.pipeline.transformer)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            hybridize(model, HybridConfig(window=3, map_rank=4))
        return opened(model)

    def run(self, folder, settings, model=None, resume=False):
        pipeline = copy.copy(self.pipeline)
        pipeline.transformer = model or self.model()
        return distilling.distill(pipeline, self.data, self.config(folder, **settings), resume=resume)

    def step_flops(self, counted):
        """FLOPs of an image in a step, of those counted in two steps of four images, and in one on fake tensors."""
        return counted / 9

    def draw(self, config, step):
        """(noise, times) of a step."""
        recipe = recipe_of(self.pipeline)
        (batch,) = distilling.draw_batches(
            self.data, recipe, config, step, 0.0, {(64, 64): (8, 8)}, self.pipeline.scheduler
        )
        return batch[1], batch[2]


class Training:
    """Runs of `train` on random images of two classes."""

    def __init__(self):
        images = torch.randint(0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        self.data = ClassData([{"images": images, "labels": torch.arange(8) % 2}], ClassInfo((1, 8, 8)))

    def config(self, folder, **settings):
        return set_all(SiTConfig(model=dict(SIT)), folder, settings)

    def model(self):
        return opened(training.make_model(SiTConfig(model=dict(SIT))))

    def run(self, folder, settings, model=None, resume=False):
        return training.train(model or self.model(), self.data, self.config(folder, **settings), resume=resume)

    def step_flops(self, counted):
        return 3 * sit_flops(self.model(), (4, 4))  # by formula: what the windows' tiles compute beyond it is no use

    def draw(self, config, step):
        (batch,) = training.draw_batches(self.data, self.model().config, config, step)
        return batch[2], batch[3]


def opened(model):
    for name, parameter in model.named_parameters():
        if is_gate(name):
            torch.nn.init.constant_(parameter, 0.5)
    return model


@pytest.fixture(scope="module", params=[Distilling, Training], ids=["distill", "train"])
def job(request):
    return request.param()


@pytest.fixture(scope="module")
def sit():
    return Training()


def states(folder):
    """What every checkpoint of a run holds, by step."""
    return [load_file(path / "state.safetensors") for path in sorted((folder / "checkpoints").iterdir())]


def part(state, kind):
    return {key.removeprefix(kind + "/"): value for key, value in state.items() if key.startswith(kind + "/")}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def is_gate(name):
    return any(part.startswith("gate") for part in name.split("."))


def test_gradients_are_clipped_and_the_norm_before_it_is_logged(job, tmp_path):
    job.run(tmp_path, {"optim.clip": 1e-3})
    moments = part(states(tmp_path)[0], "exp_avg").values()
    norm = torch.cat([moment.flatten() for moment in moments]).norm()
    assert norm.item() == pytest.approx(0.1 * 1e-3, rel=1e-3), "Adam's first moment is a tenth of the gradient"
    assert log_of(tmp_path)[0]["grad_norm"] > 2e-3


def test_a_gradient_within_the_clip_is_left_as_it_is(job, tmp_path):
    for name, clip in (("large", 1e6), ("larger", 1e9)):
        job.run(tmp_path / name, {"optim.clip": clip})
    one, other = (states(tmp_path / name)[0] for name in ("large", "larger"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_gradient_is_of_the_weighted_losses_alone(tmp_path):
    """Twice the weight of the only loss is twice the gradient; a loss of weight 0 adds none."""
    job, norms = Distilling(), {}
    for weights in ((0, 1, 0), (0, 2, 0), (0, 0, 1), (0, 0, 2)):
        folder = tmp_path / "-".join(map(str, weights))
        job.run(folder, dict(zip(("loss.task", "loss.output", "loss.layer"), map(float, weights), strict=True)))
        norms[weights] = log_of(folder)[0]["grad_norm"]
    assert norms[0, 2, 0] == pytest.approx(2 * norms[0, 1, 0], rel=1e-4)
    assert norms[0, 0, 2] == pytest.approx(2 * norms[0, 0, 1], rel=1e-4)
    assert norms[0, 1, 0] != pytest.approx(norms[0, 0, 1], rel=0.05)


def test_times_are_drawn_for_the_image_s_tokens_and_the_teacher_s_scheduler(tmp_path, monkeypatch):
    """Large images are trained nearer to noise: a recipe has to know how large they are."""
    job, seen = Distilling(), []

    def draw_times(count, tokens, scheduler, generator):
        seen.append((count, tokens, scheduler))
        return torch.full((count,), 0.5)

    recipe = dataclasses.replace(recipe_of(job.pipeline), draw_times=draw_times)
    monkeypatch.setattr(distilling, "recipe_for", lambda *_: recipe)
    job.run(tmp_path, {})
    assert seen == [(4, 8 * 8, job.pipeline.scheduler)]


def test_a_step_in_parts_is_logged_as_one(job, tmp_path):
    for parts in (1, 2, 4):
        job.run(tmp_path / str(parts), {"train.accumulation": parts, "train.steps": 2})
    whole = [{k: v for k, v in line.items() if k != "images_per_second"} for line in log_of(tmp_path / "1")]
    for parts in (2, 4):
        for line, expected in zip(log_of(tmp_path / str(parts)), whole, strict=True):
            assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_every_step_draws_its_own_noise_and_times(job, tmp_path):
    config = job.config(tmp_path)
    (noise, times), (noise2, times2) = job.draw(config, 0), job.draw(config, 1)
    assert not (times == times2).any()
    assert abs(correlation(noise, noise2)) < 0.15
    config.train.seed = 1
    assert not (job.draw(config, 0)[1] == times).any(), "and so does every seed"


def correlation(x, y):
    return np.corrcoef(x.flatten().double().numpy(), y.flatten().double().numpy())[0, 1]


def test_samples_and_checkpoints_leave_no_trace_in_the_weights(job, tmp_path):
    """Both are made with the averaged weights, after which training goes on from its own."""
    ends = []
    for name, sample_every, checkpoint_every in (("neither", 0, 4), ("samples", 1, 4), ("checkpoints", 0, 1)):
        settings = {"output.sample_every": sample_every, "output.checkpoint_every": checkpoint_every}
        settings |= {"output.samples": 2, "train.steps": 4, "optim.ema_decay": 0.5}
        settings |= {"output.sample_steps": 2} if isinstance(job, Training) else {}
        job.run(tmp_path / name, settings)
        assert len(list((tmp_path / name).glob("samples/*.png"))) == 4 * sample_every
        assert len(states(tmp_path / name)) == 4 // checkpoint_every
        ends.append(states(tmp_path / name)[-1])
    for other in ends[1:]:
        assert ends[0].keys() == other.keys() and all(torch.equal(ends[0][key], other[key]) for key in other)


def test_the_result_is_the_moving_average_of_the_decay_that_is_set(job, tmp_path):
    model = job.run(tmp_path, {"optim.ema_decay": 0.25, "train.steps": 4})
    steps = [part(state, "weight") for state in states(tmp_path)]
    result = dict(model.named_parameters())
    assert len(steps) == 4
    for name, mean in steps[0].items():  # the first step counts whole, the start not at all
        for number, step in enumerate(steps[1:], 1):
            decay = min(0.25, (1 + number) / (10 + number))
            mean = decay * mean + (1 - decay) * step[name]
        torch.testing.assert_close(result[name].data, mean, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(result[name], value) for name, value in steps[-1].items())


def test_weights_decay_and_gates_do_not(job, tmp_path):
    """By AdamW's first step: what decays loses lr x decay of what it was, whatever its gradient."""
    before = dict(job.model().named_parameters())
    after = []
    for decay in (0.0, 0.3):
        job.run(tmp_path / str(decay), {"optim.weight_decay": decay})
        after.append(part(states(tmp_path / str(decay))[0], "weight"))
    decayed = set()
    for name, weight in after[0].items():
        if is_gate(name):
            assert before[name].any() and torch.equal(after[1][name], weight), name
            continue
        lost = weight - after[1][name]
        torch.testing.assert_close(lost, 1e-2 * 0.3 * before[name].detach(), rtol=1e-3, atol=1e-6, msg=name)
        decayed |= {name} if lost.any() else set()
    assert len(decayed) > 4


def test_the_optimizer_has_two_groups(job, tmp_path):
    trained = {"to_q.weight": torch.nn.Parameter(torch.ones(1)), "attn.gate": torch.nn.Parameter(torch.ones(2))}
    optimizer = make_optimizer(trained, job.config(tmp_path, **{"optim.weight_decay": 0.3}))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [[p.numel() for p in group["params"]] for group in optimizer.param_groups] == [[1], [2]]


def test_compiled_blocks_train_as_others_do(job, tmp_path, monkeypatch):
    """By a backend that runs what torch.compile captured as it is."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = functools.partialmethod(ModelMixin.compile_repeated_blocks, backend=backend)
    monkeypatch.setattr(ModelMixin, "compile_repeated_blocks", compiled)
    for name, on in (("plain", False), ("compiled", True)):
        job.run(tmp_path / name, {"train.compile": on, "train.steps": 3})
        assert bool(graphs) == on
    for one, other in zip(states(tmp_path / "plain"), states(tmp_path / "compiled"), strict=True):
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-7, msg=key)


def test_the_log_tells_the_share_of_the_device_s_peak(job, tmp_path, monkeypatch):
    """By a clock that ticks once a call: a step of four images takes a second."""
    seconds = itertools.count()
    monkeypatch.setattr(fitting.time, "perf_counter", lambda: next(seconds))
    with FlopCounterMode(display=False) as counter:
        job.run(tmp_path, {"train.peak_tflops": 1e-3, "train.steps": 2})
    flops = job.step_flops(counter.get_total_flops())
    lines = log_of(tmp_path)
    assert [line["mfu"] for line in lines] == pytest.approx([4 * flops / 1e9] * 2, rel=0.02)
    names = (
        {"loss", "task", "output", "layer", "gate_lr"} if isinstance(job, Distilling) else {"loss", "images_per_second"}
    )
    assert set(lines[0]) == {"step", "grad_norm", "lr", "mfu"} | names


def test_the_throughput_is_of_all_steps_since_the_last_line(job, tmp_path, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(fitting.time, "perf_counter", lambda: next(seconds))
    shares = []
    for every in (1, 3):
        settings = {"train.peak_tflops": 1e-3, "train.steps": 3, "output.checkpoint_every": 0}
        job.run(tmp_path / str(every), {**settings, "output.log_every": every})
        shares.append(log_of(tmp_path / str(every))[-1]["mfu"])
    assert shares[1] == pytest.approx(3 * shares[0]), "three times the images in the one second between two lines"


def test_a_checkpoint_of_another_model_is_refused(job, tmp_path):
    job.run(tmp_path, {})
    if isinstance(job, Training):
        others = [training.make_model(SiTConfig(model={**SIT, **change})) for change in OTHER_SITS]
        message = "with another model: its trained weights have other names or shapes"
    else:
        others = [hybridize(copy.deepcopy(job.pipeline.transformer), config) for config in OTHER_HYBRIDS]
        message = "the teacher is hybrid already, with hybrid"
    for other in others:
        with pytest.raises(ValueError, match=message):
            job.run(tmp_path, {"train.steps": 2}, model=other, resume=True)
    assert len(states(tmp_path)) == 1


def test_a_cache_of_another_dtype_is_refused(tmp_path):
    pipeline = tiny_pipeline("flux_schnell")
    settings = {"images": 2, "height": 64, "width": 64, "steps": 1, "guidance_scale": 1.0, "progress": False}
    settings |= {"max_sequence_length": TEXT_LENGTH, "cache": tmp_path / "cache"}
    teacher_images(pipeline, PROMPTS, **settings)
    pipeline.transformer.to(torch.bfloat16)
    with pytest.raises(ValueError, match="made with other values of dtype"):
        teacher_images(pipeline, PROMPTS, **settings)


@torch.no_grad()
def heun_by_hand(model, config, guidance, samples, steps):
    """uint8 [B, 8, 8] of classes in turn, one at a time, from the noise that the seed gives."""
    noise = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(config.train.seed))
    made = []
    for row, x in enumerate(noise.split(1)):

        def field(x, t, row=row):
            labelled, none = (
                model(x, torch.tensor([t]), torch.tensor([label]), return_dict=False)[0] for label in (row % 2, 2)
            )
            return none + guidance * (labelled - none)

        for i in range(steps):
            first = field(x, i / steps)
            x = x + (first + field(x + first / steps, (i + 1) / steps)) / (2 * steps)
        made.append((127.5 * x[0, 0] + 128).clamp(0, 255).byte().numpy())
    return np.stack(made)


def test_the_last_grid_is_the_returned_model_s_guided_samples(sit, tmp_path, monkeypatch):
    grids = noted_grids(monkeypatch)
    settings = {"train.steps": 30, "optim.ema_decay": 0.9, "optim.lr": 3e-2, "output.checkpoint_every": 0}
    settings |= {"output.sample_every": 30, "output.samples": 4, "output.sample_steps": 3, "train.seed": 5}
    model = sit.run(tmp_path, {**settings, "output.guidance": 3.0})
    columns = grids["step-00000030.png"].columns
    found = [np.array(columns[x][y]) for y in range(2) for x in range(2)]
    config = sit.config(tmp_path, **settings)
    expected = heun_by_hand(model, config, 3.0, 4, 3)
    assert np.abs(np.stack(found).astype(int) - expected).max() <= 1
    # neither of which an unguided grid would be
    assert np.abs(heun_by_hand(model, config, 1.0, 4, 3).astype(int) - expected).max() > 20


def test_times_are_shifted(sit, tmp_path):
    config = sit.config(tmp_path, **{"flow.time_shift": 3.0, "train.batch_size": 20_000})
    _, times = sit.draw(config, 0)
    # the mean of t / (3 - 2 t) over [0, 1]
    assert times.mean().item() == pytest.approx(-0.5 + 0.75 * math.log(3), abs=0.01)


def test_times_are_logit_normal(sit, tmp_path):
    settings = {"flow.times": "logit_normal", "flow.time_mean": -1.0, "flow.time_std": 0.5, "train.batch_size": 20_000}
    logits = sit.draw(sit.config(tmp_path, **settings), 0)[1].double().logit()
    assert (logits.mean().item(), logits.std().item()) == pytest.approx((-1.0, 0.5), abs=0.02)


@pytest.mark.parametrize(
    "flow, interval",
    [
        ({"flow.prediction": "noise", "flow.weighting": "velocity"}, (1e-3, 1)),
        ({"flow.prediction": "data", "flow.weighting": "velocity"}, (0, 1 - 1e-3)),
        ({"flow.path": "vp"}, (0, 1 - 1e-5)),
        ({}, (0, 1)),
    ],
)
def test_times_keep_away_from_the_ends_that_a_loss_has_none_at(sit, tmp_path, flow, interval):
    _, times = sit.draw(sit.config(tmp_path, **flow, **{"train.batch_size": 200_000}), 0)
    low, high = times.min().item(), times.max().item()
    assert interval[0] <= low < interval[0] + 1e-4 and interval[1] - 1e-4 < high <= interval[1] + 1e-7
    if interval == (0, 1):
        assert low < 1e-4 and high > 1 - 1e-4


@pytest.mark.parametrize(
    "path, prediction, weighting",
    [("gvp", "velocity", "none"), ("linear", "noise", "velocity"), ("gvp", "data", "none")],
)
def test_the_loss_is_of_the_path_prediction_and_weighting_that_are_set(sit, tmp_path, path, prediction, weighting):
    """Of a model that returns zeros, the loss is the mean square of the target, weighted."""
    settings = {"flow.path": path, "flow.prediction": prediction, "flow.weighting": weighting}
    model, seen = training.make_model(SiTConfig(model=dict(SIT))), []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[:2]))
    model.register_forward_hook(lambda module, arguments, output: tuple(0 * x for x in output))
    sit.run(tmp_path, settings, model=model)

    ((data, _, noise, t),) = training.draw_batches(sit.data, model.config, sit.config(tmp_path, **settings), 0)
    data, noise, t = data.double(), noise.double(), t.double().view(-1, 1, 1, 1)
    alpha, sigma = ((math.pi / 2 * t).sin(), (math.pi / 2 * t).cos()) if path == "gvp" else (t, 1 - t)
    if prediction == "velocity":
        target = math.pi / 2 * (sigma * data - alpha * noise)
    else:
        target = data if prediction == "data" else noise
    weight = 1 / t**2 if weighting == "velocity" else 1
    assert log_of(tmp_path)[0]["loss"] == pytest.approx((weight * target**2).mean().item(), rel=1e-4)
    torch.testing.assert_close(seen[0][0].double(), alpha * data + sigma * noise, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[0][1].double(), t.flatten())


def test_no_image_is_mirrored_where_flip_is_off(sit, tmp_path):
    plain = sit.data.shards[0]["images"].float() / 127.5 - 1
    for flip in (True, False):
        config = sit.config(tmp_path, **{"data.flip": flip, "train.batch_size": 64})
        images = next(training.draw_batches(sit.data, sit.model().config, config, 0))[0]
        as_they_are = [(image == plain).flatten(1).all(1).any().item() for image in images]
        assert all(as_they_are) is not flip
        assert 0.3 < np.mean(as_they_are) <= (0.7 if flip else 1)


def test_the_posterior_s_noise_is_not_the_training_noise(sit, tmp_path):
    """Moments of zeros are a normal distribution: what is drawn from it says nothing of the noise."""
    moments = torch.zeros(8, 4, 8, 8)
    tables = {"moments": moments, "flipped": moments, "labels": torch.arange(8) % 2}
    data = ClassData([tables], ClassInfo((2, 8, 8), vae_sha256="0" * 64))
    config = sit.config(tmp_path, **{"train.batch_size": 64})
    latents, _, noise, _ = next(training.draw_batches(data, sit.model().config, config, 0))
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    assert abs(correlation(latents, noise)) < 0.05
