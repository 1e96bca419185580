"""Train a SiT from scratch by flow matching."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..data.class_cache import load_vae
from ..data.class_data import ClassData, ClassInfo
from ..data.shards import Processes
from ..data.sources import SOURCES, look_at_classes
from ..files import checksum, read_json, replacing_folder, write_json
from ..flow import draw_times, flow_loss, interpolate, training_interval
from ..images import Grid
from ..metrics.images import Images
from ..models.flops import sit_flops
from ..models.sit import SiTTransformer2DModel
from ..models.sit_names import renamed
from ..models.wrapping import check_unwrapped, has_lora
from ..pipelines.loading import quiet
from ..pipelines.sit import SiTPipeline, id2label_of
from .batches import epoch_order, loader_rate, step_generator
from .checkpoint import ADDED_SIT_FIELDS, KEPT, gather
from .frechet import FrechetDistance, as_rgb
from .loop import Job, fit, start_run, trained_parameters
from .processes import check_launcher
from .run_config import SiTConfig, to_dict
from .run_log import flat


def run(config: SiTConfig, *, resume: bool = False) -> SiTTransformer2DModel:
    """Run a config from start to end: read the images or latents, train, save the pipeline."""
    check_launcher(config)
    plan_training(config)  # finds errors before a model is made, or a large set read
    accelerator = start_run(config, "pipeline", resume_settings(config), resume=resume)
    model = make_model(config)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    data = SOURCES["classes"].make(model, config.data, config.train.progress, processes)
    return train(model, data, config, resume=resume)


def plan_training(config: SiTConfig) -> tuple[SiTTransformer2DModel, int, ClassInfo]:
    """The model on the meta device, the number of images and what they are, without reading them all.

    Raises FileNotFoundError or ValueError for settings that cannot work, and for a model that does not fit the set.
    """
    if not config.output.folder:
        raise ValueError("output.folder is empty: the trained model would be lost")
    with torch.device("meta"):
        model = make_model(config)
    images, info = look_at_classes(config.data.path, input_shape(model))
    vae_path(info, config.data.vae)
    if info.classes:
        check_classes(0, len(info.classes) - 1, info, model)
    return model, images, info


def make_model(config: SiTConfig) -> SiTTransformer2DModel:
    """Make the model of `config.model`, with weights from `train.seed`. Raises ValueError for impossible fields."""
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

    With `config.output.folder` set, the folder receives config.yaml, data.json (a description of the set: classes, VAE
    and scale), run.json (versions, git state, device of every start), log.jsonl, loss.png, checkpoints/, samples/ and a
    tracker's events. With every checkpoint and at the end it receives pipeline/: a SiTPipeline of the averaged weights
    with the set's class names. For a set of latents the pipeline includes the VAE, without which the run does not
    start. `resume` continues from the newest checkpoint, with the same result as an uninterrupted run. Ctrl-C and
    SIGTERM let the step end, write a checkpoint and raise KeyboardInterrupt; a second signal stops at once.

    Several processes of `accelerate launch`, with DDP or FSDP2 (--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy
    TRANSFORMER_BASED_WRAP), give the same result as one, up to rounding, and can resume each other's checkpoints.

    Returns the model with the averaged weights (with FSDP a copy of it, on the CPU). Raises ValueError for settings
    that cannot work, and FloatingPointError, naming the step, when the loss stops being finite; earlier checkpoints are
    kept.
    """
    check_unwrapped(base)
    if has_lora(base):
        raise ValueError("the model has a LoRA, which training from scratch does not train: unload it first")
    accelerator = start_run(config, "pipeline", resume_settings(config), resume=resume)
    check_set(data, base)
    folder = Path(config.output.folder) if config.output.folder else None
    if resume:
        check_same_set(data, folder / "data.json")
    base.requires_grad_(True).eval()  # eval: the step's random numbers decide which labels are dropped, not the model
    base.pos_embed.requires_grad_(False)
    job = SiTTraining(base, data, config, accelerator)
    if folder is not None and accelerator.is_main_process and not resume:
        write_json(folder / "data.json", described(data))
    return fit(job, config, accelerator, resume=resume)


class SiTTraining(Job):
    """Batch, loss and samples for training one SiT."""

    name, metrics, logged, fused = "train", ("loss",), ("lr", "images_per_second"), True

    def __init__(self, model: SiTTransformer2DModel, data: ClassData, config: SiTConfig, accelerator: Accelerator):
        self.model, self.data, self.config, self.accelerator = model, data, config, accelerator
        self.settings = resume_settings(config)
        shows = config.output.folder or config.metrics.every
        self.pipeline = make_pipeline(model, data.info, config) if shows else None
        self.frechet = self._frechet() if config.metrics.every else None

    def make_batch(self, step: int) -> list[tuple[torch.Tensor, ...]]:
        own = (self.accelerator.process_index, self.accelerator.num_processes)
        return list(draw_batches(self.data, self.model.config, self.config, step, *own))

    def losses(self, model: nn.Module, part: tuple[torch.Tensor, ...]) -> torch.Tensor:
        device, flow = self.accelerator.device, self.config.flow
        images, labels, noise, times = (x.to(device, non_blocking=True) for x in part)
        noisy = interpolate(images, noise, times, flow.path)
        output = model(noisy, times, labels, return_dict=False)[0].float()
        how = {"prediction": flow.prediction, "weighting": flow.weighting}
        return flow_loss(output, images, noise, times, flow.path, **how).mean().view(1)

    def samples(self) -> Grid:
        """Images of the first classes, always from the same noise."""
        own, output = self.model.config, self.config.output
        generator = torch.Generator().manual_seed(self.config.train.seed)
        noise = torch.randn(output.samples, *input_shape(self.model), generator=generator)
        labels = [row % own.num_classes for row in range(output.samples)]
        images = self._images(noise, labels, output.guidance)
        names = [self.pipeline.class_names.get(label) or f"class {label}" for label in labels]
        columns = grid_columns(len(images), own.num_classes)
        return Grid([images[i::columns] for i in range(columns)], [names[i::columns] for i in range(columns)])

    def distance(self) -> float:
        """The Fréchet distance of images of all classes in turn; image i is always from seed `train.seed` + i."""
        own, seed = self.model.config, self.config.train.seed

        def make(rows: range) -> np.ndarray:
            generators = [torch.Generator().manual_seed(seed + row) for row in rows]
            noise = torch.stack([torch.randn(input_shape(self.model), generator=g) for g in generators])
            return as_rgb(self._images(noise, [row % own.num_classes for row in rows], self.config.metrics.guidance))

        return self.frechet(make)

    def flops(self) -> float:
        side = self.model.config.sample_size // self.model.config.patch_size
        return 3 * sit_flops(self.model, (side, side))

    def notes(self, first: int) -> dict[str, float]:
        """The number of trained parameters, and the data-loading rate of one process."""
        count = self.config.train.batch_size // self.accelerator.num_processes
        loader = loader_rate(self.make_batch, first, count)
        parameters = sum(map(torch.numel, trained_parameters(self.model).values()))
        if self.config.train.progress:
            print(f"{parameters:,} parameters; the loader alone makes {loader:,.0f} images/s a process")
        return {"parameters": parameters, "loader_images_per_second": round(loader)}

    def renamed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return renamed(tensors)

    def checkpointed(self, folder: Path, step: int) -> None:
        self.finish(folder, step)

    def finish(self, folder: Path | None, step: int) -> SiTTransformer2DModel:
        whole = whole_model(self.model)
        if folder is not None and self.accelerator.is_main_process:
            self.pipeline.transformer = whole
            save_pipeline(self.pipeline, folder / "pipeline", self.config, step)
            self.pipeline.transformer = self.model
        return whole

    def _frechet(self) -> FrechetDistance:
        config, info = self.config, self.data.info
        if config.metrics.reference is None and info.vae_sha256 is not None:
            raise ValueError(
                "metrics.reference is needed, an npz file or a folder: the training set holds latents, not images"
            )

        def training_images(rows: range) -> np.ndarray:
            images = self.data.rows(rows)["images"]  # uint8 [B, 1 or 3, H, W]
            return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()

        side = info.shape[-1] * self.pipeline.vae_scale_factor
        return FrechetDistance(
            config.metrics,
            Images(len(self.data), training_images),
            np.zeros((2, side, side, 3), np.uint8),
            self.accelerator.device,
            self.accelerator.num_processes,
            progress=config.train.progress,
        )

    def _images(self, noise: torch.Tensor, labels: list[int], guidance: float) -> list[Image.Image]:
        """The pipeline's images from this noise [B, C, H, W], sampled by Heun's method."""
        pipeline, device = self.pipeline, self.accelerator.device
        if pipeline.vae is not None:
            pipeline.vae.to(device)
        steps = {"num_inference_steps": self.config.output.sample_steps, "sampler": "heun"}
        try:
            with quiet(pipeline):
                return pipeline(labels, guidance, latents=noise.to(device), **steps).images
        finally:
            if pipeline.vae is not None:
                pipeline.vae.to("cpu")


def input_shape(model: SiTTransformer2DModel) -> tuple[int, int, int]:
    """(C, H, W) of the model's inputs."""
    return (model.config.in_channels, model.config.sample_size, model.config.sample_size)


def whole_model(model: SiTTransformer2DModel) -> SiTTransformer2DModel:
    """The model itself; if it is sharded, a whole copy on the CPU, for which every process must call this."""
    if not isinstance(model, FSDPModule):
        return model
    copy = SiTTransformer2DModel.from_config(model.config).eval()
    copy.load_state_dict(gather(model.state_dict().items()))
    return copy


def check_set(data: ClassData, model: SiTTransformer2DModel) -> None:
    """Raise ValueError if the set has labels that the model does not have, or the model classes that it has not."""
    labels = data.labels()
    check_classes(int(labels.min()), int(labels.max()), data.info, model)


def check_classes(low: int, high: int, info: ClassInfo, model: SiTTransformer2DModel) -> None:
    """The same for labels from `low` to `high`."""
    classes, named = model.config.num_classes, len(info.classes)
    if low < 0 or high >= classes:
        raise ValueError(
            f"the set has labels from {low} to {high}, and the model's {classes} classes are 0 to {classes - 1}: "
            f"set model.num_classes={max(named, high + 1)}"
        )
    if named and classes > named:
        raise ValueError(
            f"the set has {named} classes, and the model {classes}: it would learn nothing of the others, set "
            f"model.num_classes={named}"
        )


def described(data: ClassData) -> dict:
    """The content of data.json, which describes a run's training set."""
    return json.loads(json.dumps({"images": len(data), **asdict(data.info), "content": data.content()}))


def check_same_set(data: ClassData, path: Path) -> None:
    """Raise ValueError if `path`, a run's data.json, describes another set."""
    found, here = read_json(path), described(data)
    found = {"content": here["content"], **found}  # which older runs do not have
    other = [name for name in here if name != "vae" and found.get(name) != here[name]]  # a VAE may have moved
    other = [name for name in other if name != "content" or len(other) == 1]  # which any other would change
    if other:
        raise ValueError(
            f"{path.parent} was trained on another set, with other values of {', '.join(other)}: give its data.path, or "
            "another output.folder for a new run"
        )


def resume_settings(config: SiTConfig) -> dict:
    """The settings that must not change when a run is resumed."""
    values = to_dict(config)
    kept = {name: value for name, value in flat(values).items() if name in KEPT}
    kept |= {"data.flip": values["data"]["flip"]}
    # a run that was given one of these must not go on, as another model, where it is left out
    values["model"] = ADDED_SIT_FIELDS | values["model"]
    for section in ("model", "flow"):
        kept |= {f"{section}.{name}": value for name, value in values[section].items()}
    return kept


def draw_batches(
    data: ClassData, model, config: SiTConfig, step: int, rank: int = 0, processes: int = 1
) -> Iterator[tuple[torch.Tensor, ...]]:
    """This process's samples of one optimizer step, in `accumulation` parts of (images, labels, noise, times).

    model: the model's config, for the number of classes and the share of labels to drop. See `step_generator` for what
    the samples depend on.
    """
    flow, count, parts = config.flow, config.train.batch_size, config.train.accumulation * processes
    generator = step_generator(config.train.seed, step)
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


def make_pipeline(model: SiTTransformer2DModel, info: ClassInfo, config: SiTConfig) -> SiTPipeline:
    """Make the pipeline that the run samples with and saves: the model, the set's class names and the set's VAE.

    Raises ValueError if the set holds latents and its VAE is not found, or is not the one that made the latents.
    """
    vae = set_vae(info, config.data.vae)
    if vae is not None:
        vae.enable_slicing()  # decode images one by one: a large grid then takes no more memory than one
    id2label = id2label_of(info.classes[: model.config.num_classes])
    return SiTPipeline(model, vae, id2label=id2label, path=config.flow.path, prediction=config.flow.prediction)


def vae_path(info: ClassInfo, path: str | None) -> str | None:
    """The place of the VAE that made a set of latents: `path`, or else what the set records; None for images.

    Raises ValueError where there is a place for images, or none for latents.
    """
    if info.vae_sha256 is None and path:
        raise ValueError("data.vae is for latents, and the set holds images: leave it out")
    if info.vae_sha256 is not None and not (path or info.vae):
        raise ValueError("data.vae is needed: the pipeline that is saved decodes its latents with the VAE of the set")
    return path or info.vae


def set_vae(info: ClassInfo, path: str | None) -> AutoencoderKL | None:
    """Load the VAE that made a set of latents, from `vae_path`; None for images."""
    path = vae_path(info, path)
    if path is None:
        return None
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
    # the model is trained on the set's scale, whatever this copy of the VAE says
    vae.register_to_config(scaling_factor=info.scaling_factor, shift_factor=info.shift_factor)
    return vae


def save_pipeline(pipeline: SiTPipeline, folder: Path, config: SiTConfig, step: int) -> None:
    """Save the pipeline so that `folder` never holds half of it, with a note that says which weights these are."""
    pipeline.register_to_config(weights=f"EMA {config.optim.ema_decay}, step {step}")
    try:
        with replacing_folder(folder) as partial:
            pipeline.save_pretrained(partial)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {folder}: {error}") from error


def grid_columns(samples: int, classes: int) -> int:
    """Number of columns for a nearly square sample grid; if all classes are drawn, each column shows one class."""
    side = samples**0.5
    return min(range(classes, samples + 1, classes), key=lambda n: abs(n - side), default=max(1, round(side)))
