"""Distill a hybrid from its own dense teacher: one copy of the model is both."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from omegaconf import OmegaConf
from torch import nn
from tqdm import tqdm

from ..data.latents import LatentData
from ..data.sources import SOURCES, make_data
from ..data.teacher_images import sample
from ..files import replacing
from ..images import save_grid
from ..models import dense_mode, hybridize, is_hybrid, save_adapter
from ..pipelines.loading import load_pipeline, quiet
from .checkpoint import checkpoints, load_checkpoint, save_checkpoint
from .config import DistillConfig, to_dict
from .loop import (
    check_processes,
    claim_run,
    epoch_order,
    is_gate,
    learning_rates,
    make_accelerator,
    make_optimizer,
    mean_metrics,
    stop_signals,
)
from .losses import captured_outputs, converted_layers, layer_loss
from .recipes import Recipe, add_noise, draw_times, model_inputs, prediction, recipe_of
from .record import log, plot_log, record_start, start_log

METRICS = ("loss", "task", "output", "layer", "grad_norm")


def run(config: DistillConfig, *, resume: bool = False) -> nn.Module:
    """The whole job of a config file: load the teacher, let it make its images, distill, save the adapter."""
    check_settings(config)
    claim_run(Path(config.output.folder), resume_settings(config), "adapter", resume)
    accelerator = make_accelerator(config)
    check_processes(config, accelerator.num_processes)
    if accelerator.num_processes > 1 and not config.data.cache:
        raise ValueError("several processes need data.cache: the first makes the images, the others read them there")
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    pipeline = load_pipeline(config.model.path, dtype).to(accelerator.device)
    # what can be told before the images are made, which may take days
    source = SOURCES[config.data.source]
    loss_settings(recipe_of(pipeline, config.model.recipe), config, source.teacher_made, source.trajectories)
    planned_grid(config, pipeline.transformer, pipeline.vae_scale_factor)
    make_student(pipeline.transformer, config)
    with accelerator.main_process_first():
        data = make_data(pipeline, config.data, progress=config.train.progress and accelerator.is_main_process)
    for name in list(pipeline.components):  # prompts are encoded: free the encoders' memory
        if name.startswith("text_encoder"):
            setattr(pipeline, name, None)
    return distill(pipeline, data, config, resume=resume)


def check_settings(config: DistillConfig) -> None:
    """Raise ValueError or FileNotFoundError for what is missing from a run's settings, told without the model."""
    if not config.model.path:
        raise ValueError("model.path is empty: give the repository id or the folder of the teacher's pipeline")
    if not config.output.folder:
        raise ValueError("output.folder is empty: the distilled adapter would be lost")
    SOURCES[config.data.source].count(config.data)


def distill(pipeline, data: LatentData, config: DistillConfig, *, resume: bool = False) -> nn.Module:
    """Train the hybrid layers of `pipeline.transformer` towards the dense model it was converted from.

    The transformer is converted in place with `config.hybrid` unless it is converted already; its dense weights are
    never touched. `config.model.path` and `config.data` are not used here: `data` is what it is trained on.

    With `config.output.folder` set, the folder receives config.yaml, run.json (versions, git state, device of every
    start), log.jsonl, loss.png, checkpoints/, samples/, TensorBoard events and at the end adapter/. `resume` goes on
    from its newest checkpoint, and gives what an unbroken run gives. Ctrl-C and SIGTERM let the step end, write a
    checkpoint and raise KeyboardInterrupt; a second one stops at once.

    Returns the transformer, holding the averaged weights. Raises ValueError on settings that cannot work, and
    FloatingPointError, naming the step, when the loss stops being finite; checkpoints written before stay.
    """
    recipe = recipe_of(pipeline, config.model.recipe)
    weights, dropout = loss_settings(recipe, config, data.info.teacher_made, bool(data.info.states))
    grid = token_grid(pipeline, data)
    accelerator = make_accelerator(config)
    check_processes(config, accelerator.num_processes)
    folder = Path(config.output.folder) if config.output.folder else None
    if folder is not None:
        claim_run(folder, resume_settings(config), "adapter", resume)

    base = pipeline.transformer
    trained = make_student(base, config)
    dtype = base.dtype
    if dtype != torch.float32 and config.train.precision == "no":
        raise ValueError(f"the transformer's weights are {dtype}: set train.precision=bf16, or load it in float32")
    pipeline.to(accelerator.device)
    if getattr(pipeline, "vae", None) is not None:
        pipeline.vae.to("cpu")  # where it waits until samples are drawn
    base.requires_grad_(False).eval()
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    parameters = list(trained.values())
    if config.train.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    layers = converted_layers(base)
    model = accelerator.prepare(base)
    optimizer = make_optimizer(trained, config)
    average = EMAModel(parameters, decay=config.optim.ema_decay, foreach=True)

    first = 0
    settings = resume_settings(config)
    if resume:
        first = load_checkpoint(
            checkpoints(folder / "checkpoints")[-1], trained, average.shadow_params, optimizer, settings
        )
        average.optimization_step = first
    elif folder is not None and accelerator.is_main_process:
        with replacing(folder / "config.yaml") as partial:
            OmegaConf.save(OmegaConf.create(to_dict(config)), partial)
    writes = folder is not None and accelerator.is_main_process
    if writes:
        record_start(folder, first, accelerator.num_processes, accelerator.device)
        start_log(folder, first)
    if folder is not None:
        accelerator.init_trackers(config.output.tracker)

    guidance = data.info.guidance_scale if getattr(base.config, "guidance_embeds", False) else None
    pending: list[torch.Tensor] = []  # metrics of the steps since the last look, still on the device
    teacher_samples = None
    bar = tqdm(
        initial=first,
        total=config.train.steps,
        desc="distill",
        unit="step",
        disable=not (config.train.progress and accelerator.is_main_process),
    )
    draw = {"data": data, "recipe": recipe, "config": config, "dropout": dropout, "grid": grid}
    draw |= {"scheduler": pipeline.scheduler, "rank": accelerator.process_index, "processes": accelerator.num_processes}
    # with several processes the launcher stops them all: one alone would leave the others waiting
    with stop_signals() if writes and accelerator.num_processes == 1 else nullcontext([]) as stopped, bar:
        for step in range(first, config.train.steps):
            for group, rate in zip(optimizer.param_groups, learning_rates(step, config), strict=True):
                group["lr"] = rate
            metrics = torch.zeros(len(METRICS), device=accelerator.device)
            for index, (latents, noise, times, text) in enumerate(draw_batches(step=step, **draw)):
                latents, noise, times, text = _to_device((latents, noise, times, text), accelerator.device, dtype)
                if data.info.states:
                    noisy, target = latents, None
                else:
                    noisy, target = add_noise(recipe, latents, noise, times, pipeline.scheduler)
                inputs = model_inputs(recipe, noisy.to(dtype), times, text, grid, guidance)

                with torch.no_grad(), dense_mode(base), captured_outputs(layers) as teacher_layers:
                    teacher = prediction(recipe, base(**inputs, return_dict=False)[0], latents).float()
                last = index == config.train.accumulation - 1
                with nullcontext() if last else accelerator.no_sync(model):
                    with captured_outputs(layers) as student_layers:
                        student = prediction(recipe, model(**inputs, return_dict=False)[0], latents).float()
                    losses = torch.stack(
                        [
                            student.new_zeros(()) if target is None else F.mse_loss(student, target),
                            F.mse_loss(student, teacher),
                            layer_loss(student_layers, teacher_layers),
                        ]
                    )
                    loss = (losses * weights.to(losses)).sum()
                    accelerator.backward(loss / config.train.accumulation)
                metrics[:4] += torch.stack((loss, *losses)).detach() / config.train.accumulation
            metrics[4] = nn.utils.clip_grad_norm_(parameters, config.optim.clip, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            average.step(parameters)
            pending.append(metrics)
            bar.update()

            done = step + 1
            every = {name: getattr(config.output, f"{name}_every") for name in ("log", "checkpoint", "sample")}
            due = {name: n > 0 and (done % n == 0 or done == config.train.steps) for name, n in every.items()}
            due["checkpoint"] |= bool(stopped)
            if any(due.values()):
                values = mean_metrics(METRICS, accelerator.reduce(torch.stack(pending), "mean").cpu(), done)
                pending.clear()
                bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
                values |= {"lr": optimizer.param_groups[0]["lr"], "gate_lr": optimizer.param_groups[1]["lr"]}
                if folder is not None:
                    accelerator.log(values, step=done)
                if writes:
                    log(folder, {"step": done, **values})
            if not writes:
                continue
            if due["checkpoint"]:
                save_checkpoint(
                    folder / "checkpoints",
                    done,
                    trained,
                    average.shadow_params,
                    optimizer,
                    settings,
                    config.output.keep,
                )
            if stopped:
                raise KeyboardInterrupt
            if due["sample"] and getattr(pipeline, "vae", None) is not None:
                if teacher_samples is None:
                    with dense_mode(base):
                        teacher_samples = draw_samples(pipeline, data, config)
                average.store(parameters)
                average.copy_to(parameters)
                samples = draw_samples(pipeline, data, config)
                average.restore(parameters)
                save_grid(folder / "samples" / f"step-{done:08d}.png", [teacher_samples, samples])
                plot_log(folder, METRICS)

    average.copy_to(parameters)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if folder is not None:
        if writes:
            save_adapter(base, folder / "adapter")
            plot_log(folder, METRICS)
        accelerator.end_training()
    if config.train.gradient_checkpointing:
        base.disable_gradient_checkpointing()
    for name, parameter in trained.items():
        parameter.requires_grad_(False)
        if not is_gate(name):  # which stay fp32, as hybridize makes them
            parameter.data = parameter.data.to(dtype)
    pipeline.to(accelerator.device)
    return base


def make_student(transformer: nn.Module, config: DistillConfig) -> dict[str, nn.Parameter]:
    """Convert the transformer, in place, unless it is hybrid already; returns what is to be trained, by full name.

    The student is the teacher plus what hybridize adds, and only that is trained. Raises ValueError where that is
    nothing.
    """
    if not is_hybrid(transformer):
        with torch.random.fork_rng():
            torch.manual_seed(config.train.seed)
            hybridize(transformer, config.hybrid)
    trained = {name: p for name, p in transformer.named_parameters() if ".hybrid." in name}
    if not trained:
        raise ValueError(
            "nothing to train: this hybrid config adds no weights (set hybrid.delta_rank, or hybrid.linear)"
        )
    return trained


def loss_settings(
    recipe: Recipe, config: DistillConfig, teacher_made: bool = True, trajectories: bool = False
) -> tuple[torch.Tensor, float]:
    """The weights of (task, output, layer) and the prompt dropout: the config's, else the recipe's.

    teacher_made: whether the images are the teacher's own; trajectories: whether they are its states on the way there,
    which have no target of the task's. Raises ValueError for weights that train nothing.
    """
    chosen = config.loss
    task = recipe.task if chosen.task is None else chosen.task
    if trajectories:
        if chosen.task:
            raise ValueError("loss.task: the states of a trajectory have no task target: leave it out, or set it to 0")
        task = 0.0
    if recipe.task_needs_teacher_images and task and not teacher_made:
        if chosen.task is not None:
            raise ValueError("loss.task: a guidance-distilled teacher's task loss needs images the teacher made itself")
        task = 0.0
    output = recipe.output if chosen.output is None else chosen.output
    layer = recipe.layer if chosen.layer is None else chosen.layer
    dropout = recipe.prompt_dropout if chosen.prompt_dropout is None else chosen.prompt_dropout
    if max(task, output, layer) == 0:
        raise ValueError("the weights loss.task, loss.output and loss.layer may not all be 0")
    return torch.tensor([task, output, layer]), dropout


def planned_grid(config: DistillConfig, transformer: nn.Module, vae_scale_factor: int) -> tuple[int, int]:
    """(height, width) in tokens of the images that `config.data` asks for. ValueError for parts of a token."""
    # FLUX's pipeline packs 2 x 2 latents into a token, the others' models cut patches themselves
    patch = 2 if "Flux" in type(transformer).__name__ else transformer.config.patch_size
    side = vae_scale_factor * patch
    for name in ("height", "width"):
        pixels = getattr(config.data, name)
        if pixels % side:
            raise ValueError(f"data.{name} must be a multiple of {side}, the pixels of one token's side, got {pixels}")
    return config.data.height // side, config.data.width // side


def token_grid(pipeline, data: LatentData) -> tuple[int, int]:
    """(height, width) in tokens of the set's latents."""
    latents = data.rows([0])["latents"]
    if latents.ndim == 4:
        patch = pipeline.transformer.config.patch_size
        return latents.shape[2] // patch, latents.shape[3] // patch
    scale = pipeline.vae_scale_factor * 2  # FLUX packs 2 x 2 latents into a token
    grid = (data.info.height // scale, data.info.width // scale)
    if grid[0] * grid[1] != latents.shape[1]:
        raise ValueError(
            f"latents of {latents.shape[1]} tokens are no {grid[0]} x {grid[1]} grid: made by another model?"
        )
    return grid


def draw_batches(data, recipe, config, step, dropout, grid, scheduler, rank=0, processes=1):
    """This process's samples of one optimizer step, in `accumulation` parts of (latents, noise, times, text).

    Of trajectories, latents and times are those of a state of each. Everything random is drawn for the whole batch from
    (seed, step) alone: a resumed run, and one on another number of processes, sees the same samples.
    """
    count, parts = config.train.batch_size, config.train.accumulation * processes
    generator = torch.Generator().manual_seed(config.train.seed * 1_000_003 + step)
    indices = epoch_order(len(data), config.train.seed, step * count, count)
    times = draw_times(recipe, count, grid[0] * grid[1], scheduler, generator)
    dropped = torch.rand(count, generator=generator) < dropout
    noise = torch.randn((count, *data.shape), generator=generator)
    chosen = torch.randint(data.info.states, (count,), generator=generator) if data.info.states else None
    size = count // parts
    for part in range(rank, parts, processes):
        own = slice(part * size, (part + 1) * size)
        rows = data.rows(indices[own])
        latents, part_times = rows.pop("latents"), times[own]
        if chosen is not None:
            picked = torch.arange(size), chosen[own]
            latents, part_times = rows.pop("states")[picked], rows.pop("times")[picked]
        text = {
            key: torch.where(dropped[own].view(-1, *[1] * (value.ndim - 1)), data.empty[key].to(value), value)
            for key, value in rows.items()
        }
        yield latents, noise[own], part_times, text


def draw_samples(pipeline, data: LatentData, config: DistillConfig) -> list:
    """One PIL image for each of the first prompts of the set; always from the same seeds."""
    rows = data.rows(range(min(config.output.samples, len(data))))
    count, dtype = len(rows["latents"]), pipeline.transformer.dtype
    text = {
        key: rows[key].to(dtype) if rows[key].is_floating_point() else rows[key]
        for key in data.empty  # the prompts' tensors alone
    }
    pipeline.vae.to(pipeline.transformer.device)
    # accelerate hands outputs back in fp32, which would reach the pipeline's bf16 decoder
    cast = pipeline.transformer.register_forward_hook(lambda module, args, output: tuple(x.to(dtype) for x in output))
    try:
        with quiet(pipeline):
            return sample(pipeline, text, data.empty, data.info, [config.train.seed + i for i in range(count)])
    finally:
        cast.remove()
        pipeline.vae.to("cpu")


def resume_settings(config: DistillConfig) -> dict:
    """What must not change between a checkpoint and its continuation."""
    values = to_dict(config)
    values["data"].pop("cache")
    names = ("batch_size", "accumulation", "precision", "seed")
    kept = {f"train.{name}": values["train"][name] for name in names}
    for section in ("model", "hybrid", "data", "loss"):
        kept |= {f"{section}.{name}": value for name, value in values[section].items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}


def _to_device(batch, device: torch.device, dtype: torch.dtype):
    latents, noise, times, text = batch
    text = {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in text.items()}
    return latents.to(device).float(), noise.to(device), times.to(device), text
