"""Train a SiT from scratch by flow matching."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from omegaconf import OmegaConf
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from tqdm import tqdm

from ..data.class_cache import load_vae
from ..data.class_data import ClassData, ClassInfo
from ..data.sources import SOURCES
from ..files import checksum, read_json, replacing, replacing_folder
from ..flow import draw_times, flow_loss, guided, interpolate, sample_ode, training_interval
from ..images import save_grid
from ..models.flops import sit_flops
from ..models.sit import SiTTransformer2DModel
from ..models.sit_names import renamed
from ..pipelines.sit import SiTPipeline, id2label_of
from .checkpoint import checkpoints, gather, load_checkpoint, save_checkpoint
from .config import SiTConfig, to_dict
from .loop import (
    check_processes,
    claim_run,
    epoch_order,
    learning_rates,
    make_accelerator,
    make_optimizer,
    mean_metrics,
    stop_signals,
)
from .record import log, plot_log, record_start, start_log
from .watch import FrechetDistance

METRICS = ("loss", "grad_norm")
PLOTTED = (*METRICS, "fd")
# dense bf16 TFLOP/s, by words of the device's name
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}


def run(config: SiTConfig, *, resume: bool = False) -> SiTTransformer2DModel:
    """The whole job of a config file: read the images or latents, train, save the pipeline."""
    if not config.output.folder:
        raise ValueError("output.folder is empty: the trained model would be lost")
    claim_run(Path(config.output.folder), resume_settings(config), "pipeline", resume)
    accelerator = make_accelerator(config)  # what is wrong with it is told before a large set is read
    check_distribution(accelerator)
    check_processes(config, accelerator.num_processes)
    model = make_model(config)
    data = SOURCES["classes"].make(model, config.data, config.train.progress)
    return train(model, data, config, resume=resume)


def make_model(config: SiTConfig) -> SiTTransformer2DModel:
    """The model of `config.model`, its weights drawn from `train.seed`. ValueError for fields that cannot work."""
    with torch.random.fork_rng():
        torch.manual_seed(config.train.seed)
        try:
            return SiTTransformer2DModel(**config.model)
        except (ValueError, TypeError) as error:
            raise ValueError(f"model: {' '.join(str(error).split())}") from error


def train(
    base: SiTTransformer2DModel, data: ClassData, config: SiTConfig, *, resume: bool = False
) -> SiTTransformer2DModel:
    """Train `base` on `data`; `config.model` and `config.data.path` are not used here.

    With `config.output.folder` set, the folder receives config.yaml, data.json (what the rows of the set are: classes,
    VAE and scale), run.json (versions, git state, device of every start), log.jsonl, loss.png, checkpoints/, samples/,
    a tracker's events, and with every checkpoint and at the end pipeline/: a SiTPipeline of the averaged weights, with
    the set's classes, and of a set of latents with its VAE, without which such a run does not start. `resume` goes on
    from the newest checkpoint, and gives what an unbroken run gives. Ctrl-C and SIGTERM let the step end, write a
    checkpoint and raise KeyboardInterrupt; a second one stops at once.

    Several processes of `accelerate launch`, by DDP or by FSDP2 (--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy
    TRANSFORMER_BASED_WRAP), give what one gives, to rounding, and go on from each other's checkpoints.

    Returns the model, holding the averaged weights (by FSDP a copy of it, on the CPU). Raises ValueError on settings
    that cannot work, and FloatingPointError, naming the step, when the loss stops being finite; checkpoints written
    before stay.
    """
    flow = config.flow
    accelerator = make_accelerator(config)
    sharded = accelerator.is_fsdp2  # each process has a part of every weight, and all must take part in every call
    check_distribution(accelerator)
    check_processes(config, accelerator.num_processes)
    check_set(data, base)
    folder = Path(config.output.folder) if config.output.folder else None
    if folder is not None:
        claim_run(folder, resume_settings(config), "pipeline", resume)
        if resume:
            check_same_set(data, folder / "data.json")
    writes = folder is not None and accelerator.is_main_process
    measures = config.metrics.every > 0
    pipeline = make_pipeline(base, data.info, config) if writes or measures else None
    distance = None
    if measures:
        distance = FrechetDistance(
            config.metrics,
            data,
            lambda made: decode(made, pipeline.vae),
            accelerator.device,
            accelerator.num_processes,
            progress=config.train.progress,
        )

    # labels are dropped here, by the step's own random numbers, and not by the model
    base.requires_grad_(True).eval()
    base.pos_embed.requires_grad_(False)
    if config.train.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    if config.train.compile:
        base.compile_repeated_blocks()
    if sharded:
        plugin = accelerator.state.fsdp_plugin
        plugin.cpu_ram_efficient_loading = False  # every process has drawn the same weights
        # accelerate's policy would round the times to bf16; under autocast the arithmetic is that of DDP
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        base.forward = accelerator.autocast()(base.forward)
    optimizer = make_optimizer(trained_of(base), config, fused=accelerator.device.type in ("cpu", "cuda"))
    model, _ = accelerator.prepare(base, optimizer)  # FSDP has to give the optimizer other parameters
    trained = trained_of(base)
    parameters = list(trained.values())
    average = EMAModel(parameters, decay=config.optim.ema_decay, foreach=not sharded)  # shards have no _foreach_copy_

    first = 0
    settings = resume_settings(config)
    if resume:
        newest = checkpoints(folder / "checkpoints")[-1]
        first = load_checkpoint(newest, trained, average.shadow_params, optimizer, settings, rename=renamed)
        average.optimization_step = first
    elif writes:
        with replacing(folder / "config.yaml") as partial:
            OmegaConf.save(OmegaConf.create(to_dict(config)), partial)
        with replacing(folder / "data.json") as partial:
            partial.write_text(json.dumps(described(data), indent=1) + "\n")

    def make_batch(step: int) -> list[tuple[torch.Tensor, ...]]:
        own = (accelerator.process_index, accelerator.num_processes)
        return list(draw_batches(data, base.config, config, step, *own))

    side = base.config.sample_size // base.config.patch_size
    flops = 3 * sit_flops(base, (side, side))  # of one image, forward and backward
    peak = config.train.peak_tflops or known_peak(accelerator.device)
    if writes:
        loader = loader_rate(make_batch, first, config.train.batch_size // accelerator.num_processes)
        notes = {"parameters": sum(map(torch.numel, parameters)), "loader_images_per_second": round(loader)}
        record_start(folder, first, accelerator.num_processes, accelerator.device, **notes)
        start_log(folder, first)
        if config.train.progress:
            print(f"{notes['parameters']:,} parameters; the loader alone makes {loader:,.0f} images/s a process")
    if folder is not None:
        accelerator.init_trackers(config.output.tracker)
    bar = tqdm(
        initial=first,
        total=config.train.steps,
        desc="train",
        unit="step",
        disable=not (config.train.progress and accelerator.is_main_process),
    )
    # on a CPU the batch's own thread would take the cores from the model's: half its speed on two of them
    made = in_turn if accelerator.device.type == "cpu" else one_ahead
    pending: list[torch.Tensor] = []  # metrics of the steps since the last look, still on the device
    since = time.perf_counter()
    # with several processes the launcher stops them all: one alone would leave the others waiting
    with stop_signals() if writes and accelerator.num_processes == 1 else nullcontext([]) as stopped, bar:
        for step, batches in made(make_batch, range(first, config.train.steps)):
            for group, rate in zip(optimizer.param_groups, learning_rates(step, config), strict=True):
                group["lr"] = rate
            metrics = torch.zeros(len(METRICS), device=accelerator.device)
            for index, batch in enumerate(batches):
                images, labels, noise, times = (x.to(accelerator.device, non_blocking=True) for x in batch)
                last = index == config.train.accumulation - 1
                with nullcontext() if last else accelerator.no_sync(model):
                    noisy = interpolate(images, noise, times, flow.path)
                    output = model(noisy, times, labels, return_dict=False)[0].float()
                    loss = flow_loss(
                        output, images, noise, times, flow.path, prediction=flow.prediction, weighting=flow.weighting
                    ).mean()
                    accelerator.backward(loss / config.train.accumulation)
                metrics[0] += loss.detach() / config.train.accumulation
            norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip or float("inf"), foreach=True)
            metrics[1] = norm.full_tensor() if sharded else norm
            optimizer.step()
            optimizer.zero_grad()
            average.step(parameters)
            pending.append(metrics)
            bar.update()

            done = step + 1
            every = {name: getattr(config.output, f"{name}_every") for name in ("log", "checkpoint", "sample")}
            every["metrics"] = config.metrics.every
            due = {name: n > 0 and (done % n == 0 or done == config.train.steps) for name, n in every.items()}
            due["checkpoint"] |= bool(stopped)
            if any(due.values()):
                steps = len(pending)
                values = mean_metrics(METRICS, accelerator.reduce(torch.stack(pending), "mean").cpu(), done)
                pending.clear()
                # the metrics have arrived, so the steps are done
                rate = steps * config.train.batch_size / (time.perf_counter() - since)
                values |= {"lr": optimizer.param_groups[0]["lr"], "images_per_second": rate}
                if peak:
                    values["mfu"] = rate * flops / (peak * 1e12 * accelerator.num_processes)
                if due["metrics"]:
                    with averaged(base, average, parameters):
                        values["fd"] = distance(lambda rows: draw_rows(base, config, accelerator.device, rows))
                bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
                if folder is not None:
                    accelerator.log(values, step=done)
                if writes:
                    log(folder, {"step": done, **values})
            if (writes or (sharded and folder is not None)) and due["checkpoint"]:
                save_checkpoint(
                    folder / "checkpoints",
                    done,
                    trained,
                    average.shadow_params,
                    optimizer,
                    settings,
                    config.output.keep,
                    write=writes,
                )
                with averaged(base, average, parameters):
                    whole = whole_model(base)
                    if writes:
                        pipeline.transformer = whole
                        save_pipeline(pipeline, folder / "pipeline", config, done)
            if writes and stopped:
                raise KeyboardInterrupt
            if (writes or (sharded and folder is not None)) and due["sample"]:
                with averaged(base, average, parameters):
                    samples = draw_samples(base, config, accelerator.device)
                if writes:
                    images = to_images(decode(samples, pipeline.vae))
                    columns = grid_columns(len(images), base.config.num_classes)
                    save_grid(folder / "samples" / f"step-{done:08d}.png", [images[i::columns] for i in range(columns)])
                    plot_log(folder, PLOTTED)
            if any(due.values()):
                since = time.perf_counter()  # saving and sampling are no part of the throughput

    average.copy_to(parameters)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    base = whole_model(base)
    if folder is not None:
        if writes:
            pipeline.transformer = base
            save_pipeline(pipeline, folder / "pipeline", config, config.train.steps)
            plot_log(folder, PLOTTED)
        accelerator.end_training()
    if config.train.gradient_checkpointing:
        base.disable_gradient_checkpointing()
    return base


def check_distribution(accelerator: Accelerator) -> None:
    """NotImplementedError for the ways of several processes that nothing here is made for."""
    kind = accelerator.distributed_type
    if kind is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise NotImplementedError("training from scratch shards by FSDP2: give accelerate --fsdp_version 2")
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise NotImplementedError("take train.gradient_checkpointing=true in place of fsdp_activation_checkpointing")
    by_ddp = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if kind not in by_ddp and not accelerator.is_fsdp2:
        raise NotImplementedError(f"training from scratch runs on one process, by DDP or by FSDP2, not by {kind.value}")


def trained_of(model: SiTTransformer2DModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole_model(model: SiTTransformer2DModel) -> SiTTransformer2DModel:
    """`model`, or where every process has a shard of it, and must call this, a copy on the CPU with all of its weights."""
    if not isinstance(model, FSDPModule):
        return model
    copy = SiTTransformer2DModel.from_config(model.config).eval()
    copy.load_state_dict(gather(model.state_dict().items()))
    return copy


def check_set(data: ClassData, model: SiTTransformer2DModel) -> None:
    """ValueError where the set's labels are not the model's."""
    labels, classes = data.labels(), model.config.num_classes
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"the set has labels from {low} to {high}, and the model's {classes} classes are 0 to {classes - 1}: "
            "set model.num_classes"
        )


def described(data: ClassData) -> dict:
    """What data.json says of a run's set."""
    return json.loads(json.dumps({"images": len(data), **asdict(data.info)}))


def check_same_set(data: ClassData, path: Path) -> None:
    """ValueError where the run that noted its set in `path` was on another than `data`."""
    found, here = read_json(path), described(data)
    other = [name for name in here if name != "vae" and found.get(name) != here[name]]  # a VAE may have moved
    if other:
        raise ValueError(
            f"{path.parent} was trained on another set, with other values of {', '.join(other)}: give its data.path, or "
            "another output.folder for a new run"
        )


def resume_settings(config: SiTConfig) -> dict:
    """What must not change between a checkpoint and its continuation."""
    values = to_dict(config)
    names = ("batch_size", "precision", "seed")
    kept = {f"train.{name}": values["train"][name] for name in names}
    kept |= {"data.flip": values["data"]["flip"]}
    for section in ("model", "flow"):
        kept |= {f"{section}.{name}": value for name, value in values[section].items()}
    return kept


def draw_batches(
    data: ClassData, model, config: SiTConfig, step: int, rank: int = 0, processes: int = 1
) -> Iterator[tuple[torch.Tensor, ...]]:
    """This process's samples of one optimizer step, in `accumulation` parts of (images, labels, noise, times).

    model: the model's config, of which the number of classes and the share of labels to drop are used.

    Everything random is drawn for the whole batch from (seed, step) alone: a resumed run, and one on another number of
    processes, sees the same samples.
    """
    flow, count, parts = config.flow, config.train.batch_size, config.train.accumulation * processes
    generator = torch.Generator().manual_seed(config.train.seed * 1_000_003 + step)
    indices = epoch_order(len(data), config.train.seed, step * count, count)
    times = draw_times(
        count,
        flow.times,
        mean=flow.time_mean,
        std=flow.time_std,
        shift=flow.time_shift,
        interval=training_interval(flow.path, flow.prediction, flow.weighting),
        generator=generator,
    )
    dropped = torch.rand(count, generator=generator) < model.class_dropout_prob
    mirrored = torch.rand(count, generator=generator) < (0.5 if config.data.flip else 0.0)
    noise = torch.randn((count, *data.info.shape), generator=generator)
    posterior = torch.randn(noise.shape, generator=generator) if data.info.vae_sha256 else None
    size = count // parts
    for part in range(rank, parts, processes):
        own = slice(part * size, (part + 1) * size)
        images, labels = data.draw(indices[own], mirrored[own], None if posterior is None else posterior[own])
        yield images, torch.where(dropped[own], model.num_classes, labels), noise[own], times[own]


def in_turn(make: Callable[[int], list], steps: range) -> Iterator[tuple[int, list]]:
    """(step, make(step)) for every step."""
    return ((step, make(step)) for step in steps)


def one_ahead(make: Callable[[int], list], steps: range) -> Iterator[tuple[int, list]]:
    """As `in_turn`; what comes next is made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(make, steps[0]) if steps else None
        for step in steps:
            made = following.result()
            following = thread.submit(make, step + 1) if step + 1 in steps else None
            yield step, made


def loader_rate(make: Callable[[int], list], step: int, count: int, seconds: float = 0.2) -> float:
    """Images a second of `make` alone, each of whose calls makes `count`; the first call, which opens files, apart."""
    make(step)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        calls += 1
        make(step + calls)
    return calls * count / (time.perf_counter() - start)


def known_peak(device: torch.device) -> float | None:
    """TFLOP/s of a GPU of PEAK_TFLOPS; None for others."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak for name, peak in PEAK_TFLOPS.items() if set(name.split()) <= set(words)), None)


@contextmanager
def averaged(model: SiTTransformer2DModel, average: EMAModel, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within it, the parameters of `model` are their averages."""
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what it gathered for a call without gradients, it would use in the next step


def make_pipeline(model: SiTTransformer2DModel, info: ClassInfo, config: SiTConfig) -> SiTPipeline:
    """What the run leaves: the model, with the names of the set's classes and the set's own VAE.

    Raises ValueError where the set is of latents and its VAE cannot be had, or is not the one that made it.
    """
    vae = set_vae(info, config.data.vae)
    id2label = id2label_of(info.classes[: model.config.num_classes])
    return SiTPipeline(model, vae, id2label=id2label, path=config.flow.path, prediction=config.flow.prediction)


def set_vae(info: ClassInfo, path: str | None) -> AutoencoderKL | None:
    """The VAE that made a set of latents, from `path` or the place that the set notes; None for a set of images."""
    if info.vae_sha256 is None:
        if path:
            raise ValueError("data.vae is for latents, and the set holds images: leave it out")
        return None
    path = path or info.vae
    if not path:
        raise ValueError("data.vae is needed: the pipeline that is saved decodes its latents with the VAE of the set")
    try:
        vae = load_vae(path)
    except ValueError as error:
        raise ValueError(
            f"the VAE of the set is saved with the pipeline: set data.vae to its place ({error})"
        ) from error
    if checksum({name: value.float() for name, value in vae.state_dict().items()}) != info.vae_sha256:
        raise ValueError(
            f"the VAE at {path!r} is not the one that made the cache, which then was at {info.vae!r}: set data.vae to it"
        )
    # the scale that the model is trained on is the set's, whatever this copy of the VAE says
    vae.register_to_config(scaling_factor=info.scaling_factor, shift_factor=info.shift_factor)
    return vae


def save_pipeline(pipeline: SiTPipeline, folder: Path, config: SiTConfig, step: int) -> None:
    """Write the pipeline so that `folder` is never half a pipeline; its note says which weights these are."""
    pipeline.register_to_config(weights=f"EMA {config.optim.ema_decay}, step {step}")
    try:
        with replacing_folder(folder) as partial:
            pipeline.save_pretrained(partial)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {folder}: {error}") from error


@torch.no_grad()
def draw_samples(model: SiTTransformer2DModel, config: SiTConfig, device: torch.device) -> torch.Tensor:
    """What the model makes of the first classes, one sample each, [samples, C, H, W]; always from the same noise."""
    own, output = model.config, config.output
    generator = torch.Generator().manual_seed(config.train.seed)
    noise = torch.randn(output.samples, own.in_channels, own.sample_size, own.sample_size, generator=generator)
    labels = torch.arange(output.samples, device=device) % own.num_classes
    return solve(model, config, noise.to(device), labels, output.guidance)


@torch.no_grad()
def draw_rows(model: SiTTransformer2DModel, config: SiTConfig, device: torch.device, rows: range) -> torch.Tensor:
    """Rows of the samples that metrics are measured on, [B, C, H, W]: classes in turn, each row of noise of its own."""
    own = model.config
    shape = (own.in_channels, own.sample_size, own.sample_size)
    seeds = [config.train.seed + row for row in rows]
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    labels = torch.tensor(rows, device=device) % own.num_classes
    return solve(model, config, noise.to(device), labels, config.metrics.guidance)


def solve(
    model: SiTTransformer2DModel, config: SiTConfig, noise: torch.Tensor, labels: torch.Tensor, guidance: float
) -> torch.Tensor:
    """From noise to what the model makes of it, by Heun's ODE sampler."""

    def predict(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model(x, t, labels, return_dict=False)[0].float()

    return sample_ode(
        guided(predict, labels, model.config.num_classes, guidance),
        noise,
        config.flow.path,
        prediction=config.flow.prediction,
        method="heun",
        steps=config.output.sample_steps,
    )


def grid_columns(samples: int, classes: int) -> int:
    """Columns of the sample grid: near square; where all classes are drawn, each column is of one class."""
    side = samples**0.5
    return min(range(classes, samples + 1, classes), key=lambda n: abs(n - side), default=max(1, round(side)))


def decode(latents: torch.Tensor, vae: AutoencoderKL | None) -> torch.Tensor:
    """From what the model makes to pixels in [-1, 1]."""
    if vae is None:
        return latents
    vae.to(latents.device)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    # one by one: a large grid then takes no more memory than an image
    images = torch.cat([vae.decode(z).sample for z in latents.split(1)])
    vae.to("cpu")
    return images


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """PIL images of [B, C, H, W] in [-1, 1]; of one channel, grey."""
    values = (127.5 * pixels.float() + 128).clamp(0, 255).byte().cpu().permute(0, 2, 3, 1)  # [B, H, W, C]
    return [Image.fromarray((image.squeeze(2) if image.shape[2] == 1 else image).numpy()) for image in values]
