"""Steps over images of several sizes: each of one bucket, all in proportion, the same however they are divided."""

import json
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from family_calls import call
from PIL import Image
from runs import finish, noted_grids
from safetensors.torch import load_file
from tiny_pipelines import PROMPTS, TEXT_LENGTH, recipe_of, tiny_pipeline

from hybriddit import HybridConfig, hybridize
from hybriddit.cli import main
from hybriddit.data.latents import LatentData, LatentInfo
from hybriddit.data.sources import make_data
from hybriddit.training import distill as distill_module
from hybriddit.training.batches import bucket_turn, epoch_order
from hybriddit.training.distill import bucket_notes, distill, draw_batches, token_grids
from hybriddit.training.dry_run import dry_run
from hybriddit.training.run_config import DistillConfig, load_config
from hybriddit.training.step_cost import step_cost

BUCKETS = [[32, 128], [64, 64], [96, 48]]


@pytest.mark.parametrize("counts", [[10], [3, 3], [1, 100], [7, 7, 7, 7], [5, 7, 11, 200, 1], [1] * 12 + [30]])
def test_buckets_take_turns_in_proportion(counts):
    total, steps = sum(counts), 3 * sum(counts)
    turns = [bucket_turn(counts, step) for step in range(steps)]
    for bucket, count in enumerate(counts):
        own = [step for step, (which, _) in enumerate(turns) if which == bucket]
        assert [turns[step][1] for step in own] == list(range(3 * count)), "every turn once, in order"
        for before, step in enumerate(own):  # its share of the steps, to within two turns
            assert abs(before - step * count / total) < 2
    if len(counts) == 1:
        assert turns == [(0, step) for step in range(steps)]


def mixed_set(counts):
    """A set for SD3 in memory; every row's latents hold its number."""
    shards, sizes, row = [], [], 0
    for (height, width), count in counts.items():
        for _ in range(count):
            shards.append({"latents": torch.full((1, 4, height // 4, width // 4), float(row)), "x": torch.zeros(1, 1)})
            sizes.append((height, width))
            row += 1
    order = torch.randperm(row, generator=torch.Generator().manual_seed(0)).tolist()
    info = LatentInfo(64, 64, 2, 3.5, teacher_made=False)
    return LatentData(shards, {"x": torch.zeros(1, 1)}, info, order, sizes=[sizes[i] for i in order])


def batch_config(batch_size=4, accumulation=1, seed=0):
    config = DistillConfig()
    config.train.batch_size, config.train.accumulation, config.train.seed = batch_size, accumulation, seed
    return config


def test_every_image_is_used_once_before_one_of_its_bucket_is_used_again():
    """17 images, 4 a step: what a bucket's steps do not divide evenly goes on with the next epoch."""
    pipeline = tiny_pipeline("sd3")
    data = mixed_set({(32, 128): 5, (64, 64): 11, (96, 48): 1})
    grids = token_grids(pipeline, data)
    assert grids == {(32, 128): (4, 16), (64, 64): (8, 8), (96, 48): (12, 6)}
    seen, shapes = {grid: [] for grid in grids.values()}, []
    for step in range(4 * 17):
        (part,) = draw_batches(data, recipe_of(pipeline), batch_config(), step, 0.0, grids, pipeline.scheduler)
        latents, noise, *_, grid = part
        assert latents.shape == noise.shape == (4, 4, 2 * grid[0], 2 * grid[1])
        seen[grid] += latents[:, 0, 0, 0].tolist()
        shapes.append(grid)
    for size, rows in data.buckets.items():
        uses, count = seen[grids[size]], len(rows)
        assert len(uses) == 4 * 4 * count, "in proportion: 68 steps are sixteen epochs"
        for epoch in range(16):
            assert len(set(uses[epoch * count : (epoch + 1) * count])) == count
    assert Counter(shapes) == {(4, 16): 20, (8, 8): 44, (12, 6): 4}
    assert max(map(len, "".join("x" if shape == (8, 8) else " " for shape in shapes).split())) <= 4, "they mix"


def test_a_step_does_not_depend_on_how_it_is_divided():
    pipeline, data = tiny_pipeline("flux_dev"), mixed_set({(32, 128): 5, (64, 64): 11, (64, 32): 3})
    grids, recipe = {(32, 128): (4, 16), (64, 64): (8, 8), (64, 32): (8, 4)}, recipe_of(tiny_pipeline("flux_dev"))
    shifted = {}
    for step in range(8):
        whole = list(draw_batches(data, recipe, batch_config(8), step, 0.5, grids, pipeline.scheduler))
        shifted.setdefault(whole[0][-1], whole[0][2])
        for accumulation, processes in ((4, 1), (1, 2), (2, 2)):
            arguments = (data, recipe, batch_config(8, accumulation), step, 0.5, grids, pipeline.scheduler)
            parts = [part for rank in range(processes) for part in draw_batches(*arguments, rank, processes)]
            assert {part[-1] for part in parts} == {whole[0][-1]}, "of one shape in all processes"
            for index in (0, 1, 2, 4, 5):
                one = torch.cat([part[index] for part in parts])
                assert sorted(one.flatten(1).tolist() if one.ndim > 1 else one.tolist()) == sorted(
                    whole[0][index].flatten(1).tolist() if one.ndim > 1 else whole[0][index].tolist()
                )
    # the schedule moves times by the number of tokens of the step's own images
    assert len(shifted) == 3
    sigmas = recipe.draw_times(8, 32, pipeline.scheduler, torch.Generator().manual_seed(step))
    assert sigmas.mean() < recipe.draw_times(8, 64, pipeline.scheduler, torch.Generator().manual_seed(step)).mean()


def test_a_set_of_one_size_is_drawn_as_without_buckets():
    pipeline, data = tiny_pipeline("sd3"), mixed_set({(64, 64): 10})
    for step in range(6):
        (part,) = draw_batches(
            data, recipe_of(pipeline), batch_config(4), step, 0.0, {(64, 64): (8, 8)}, pipeline.scheduler
        )
        assert part[0][:, 0, 0, 0].tolist() == [data._order[i] for i in epoch_order(10, 0, 4 * step, 4)]


def test_small_buckets_are_told():
    config = batch_config(8)
    config.train.steps = 20
    assert bucket_notes([3], config) == [] == bucket_notes([10, 10], config)
    few, late = bucket_notes([100, 2, 1], config)
    assert "3 images are in 2 buckets of fewer than train.batch_size (8)" in few
    assert late == "3 images are in 2 buckets that train.steps (20) do not come to"
    config.train.steps = 1000
    assert len(bucket_notes([100, 2, 1], config)) == 1


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number, size in enumerate([(40, 170), (64, 64), (70, 80), (100, 50), (90, 100), (130, 64), (66, 64)]):
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(PROMPTS[number % 4])
    return folder


def run_config(images, **train):
    config = DistillConfig(hybrid=HybridConfig(window=7, map_rank=4))
    config.data.source, config.data.folder, config.data.buckets = "folder", str(images), BUCKETS
    config.data.height = config.data.width = 64
    config.data.max_sequence_length, config.data.steps, config.train.progress = TEXT_LENGTH, 2, False
    config.train.batch_size, config.train.steps, config.output.log_every = 2, 7, 1
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


@pytest.mark.parametrize("family", ["pixart_sigma", "sd3", "flux_dev"])
def test_the_losses_are_those_of_each_step_s_own_grid(family, images, tmp_path, monkeypatch):
    """As the family's pipeline calls its model for images of that size; the window is wider than two of the grids."""
    pipeline, dense, student = (tiny_pipeline(family) for _ in range(3))
    config = run_config(images)
    config.optim.lr = 1e-30  # the student stays what it is
    config.output.folder, config.output.sample_every, config.output.samples = str(tmp_path), 7, 5
    data, grids = make_data(pipeline, config.data, progress=False), noted_grids(monkeypatch)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hybridize(student.transformer, config.hybrid)
    distill(pipeline, data, config)
    recipe, tokens = recipe_of(dense), token_grids(dense, data)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for step in range(7):
        arguments = (data, recipe, config, step, recipe.prompt_dropout, tokens, dense.scheduler)
        ((latents, noise, times, text, _, _, grid),) = draw_batches(*arguments)
        if family == "pixart_sigma":
            keep = dense.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
            noisy = keep.sqrt() * latents + (1 - keep).sqrt() * noise
        else:
            noisy = latents + times.view(-1, *[1] * (latents.ndim - 1)) * (noise - latents)
        with torch.no_grad():
            one, other = (call(family, p.transformer, noisy, times, text, 3.5, grid) for p in (dense, student))
        assert logged[step]["output"] == pytest.approx((one - other).square().mean().item(), rel=1e-3), grid
    columns = grids["step-00000007.png"].columns
    assert [[image.size for image in column] for column in columns] == [[(64, 64)] * 5] * 2, "of height x width"


def test_a_killed_run_ends_as_an_unbroken_one(images, tmp_path, capsys):
    """From the command line, with a cache and accumulation."""
    tiny_pipeline("sd3").save_pretrained(tmp_path / "teacher")
    path = tmp_path / "run.yaml"
    path.write_text(f"""
model: {{path: {tmp_path / "teacher"}}}
hybrid: {{window: 3, map_rank: 4}}
data: {{source: folder, folder: {images}, height: 64, width: 64, steps: 2, max_sequence_length: {TEXT_LENGTH},
  buckets: {BUCKETS}, cache: {tmp_path / "cache"}}}
optim: {{lr: 1e-2, warmup_steps: 3}}
train: {{steps: 9, batch_size: 4, accumulation: 2, progress: false}}
output: {{checkpoint_every: 3, log_every: 1}}
""")
    assert main(["distill", str(path), f"output.folder={tmp_path / 'unbroken'}"]) == 0
    assert "3 images are in 2 buckets of fewer than train.batch_size (4)" in capsys.readouterr().out
    run = f"output.folder={tmp_path / 'broken'}"
    assert finish("distill", path, run, output=tmp_path / "out.txt", before=killed_at_the_sixth) == -9
    assert main(["distill", str(path), run, "data.batch_size=3", "--resume"]) == 0
    for name in ("adapter/hybrid_adapter.safetensors", "checkpoints/step-00000009/state.safetensors"):
        one, other = (load_file(tmp_path / folder / name) for folder in ("unbroken", "broken"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    capsys.readouterr()
    assert main(["distill", str(path), run, "data.buckets=[[64,64]]", "--resume"]) == 1
    assert "made with other values of data.buckets" in capsys.readouterr().err


def killed_at_the_sixth():
    draw = distill_module.draw_batches

    def kill(**arguments):
        if arguments["step"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(**arguments)

    distill_module.draw_batches = kill


def test_a_dry_run_tells_the_buckets_and_what_they_cost(images, tmp_path, capsys):
    pipeline = tiny_pipeline("sd3")
    pipeline.save_pretrained(tmp_path / "teacher")
    path = tmp_path / "run.yaml"
    path.write_text(f"""
model: {{path: {tmp_path / "teacher"}}}
hybrid: {{window: 3}}
data: {{source: folder, folder: {images}, height: 64, width: 64, max_sequence_length: {TEXT_LENGTH}}}
train: {{batch_size: 2}}
output: {{folder: {tmp_path / "run"}}}
""")
    figures = dry_run(load_config(path, ["data.buckets=[[64,64],[48,96],[128,64],[32,64]]"]))
    assert [(b["size"], b["grid"], b["images"]) for b in figures["buckets"]] == [
        ([32, 64], [4, 8], 1),
        ([64, 64], [8, 8], 4),
        ([128, 64], [16, 8], 2),
    ]
    assert figures["images"] == 7 and figures["tokens"]["grid"] == [16, 8]
    hybridize(pipeline.transformer, HybridConfig(window=3))
    text = {"prompt_embeds": torch.zeros(2, TEXT_LENGTH + 16, 16), "pooled_prompt_embeds": torch.zeros(2, 16)}
    costs = {grid: step_cost(pipeline.transformer, grid, text, 2, bf16=False) for grid in ((4, 8), (8, 8), (16, 8))}
    flops = {grid: cost["teacher"] + cost["student"] + cost["backward"] for grid, cost in costs.items()}
    mean = (flops[4, 8] + 4 * flops[8, 8] + 2 * flops[16, 8]) / 7
    assert mean <= figures["step_flops"] < 1.1 * mean, "interpolated; the teacher's attention grows faster"
    assert figures["activation_bytes"]["without_checkpointing"] == costs[16, 8]["kept"]
    assert main(["distill", str(path), "--dry-run", "data.buckets=aspect"]) == 0
    words = capsys.readouterr().out
    assert "height x width (images): 32 x 128 (1), " in words and "of the mean image" in words


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.buckets=[]"], 'data.buckets must be "aspect", or different sizes in pixels as [[height, width], ...]'),
        (["data.buckets=square"], "data.buckets must be"),
        (["data.buckets=[64,64]"], "data.buckets must be str or list[list[int]] or null, got [64, 64]"),
        (["data.buckets=[[64,64],[64,64]]"], "data.buckets must be"),
        (["data.buckets=[[64,64,64]]"], "data.buckets must be"),
        (["data.buckets=[[0,64]]"], "data.buckets must be"),
        (["data.buckets=[[64,60]]"], "data.buckets must be of multiples of 8"),
        (["data.buckets=[[64,256]]"], "an image of 8 x 32 tokens is too large: this model has positions for 16 x 16"),
        (["data.height=256"], "an image of 32 x 8 tokens is too large"),
        (["data.source=teacher", "data.folder=null", "data.prompts=[a]", "data.buckets=aspect"], "left out but with"),
    ],
)
def test_buckets_that_cannot_be_are_said_in_one_line(overrides, message, images, tmp_path, capsys):
    tiny_pipeline("sd3").save_pretrained(tmp_path / "teacher")
    path = tmp_path / "run.yaml"
    path.write_text(f"""
model: {{path: {tmp_path / "teacher"}}}
data: {{source: folder, folder: {images}, height: 64, width: 64, cache: {tmp_path / "cache"}}}
output: {{folder: {tmp_path / "run"}}}
""")
    for dry in ([], ["--dry-run"]):
        assert main(["distill", str(path), *overrides, *dry]) == 1
        (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("hybriddit: "))
        assert message in error
    assert not (tmp_path / "cache").exists()
