"""Distill a hybrid from its own dense teacher; both run on one copy of the model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_map

from ..attention.mixers import check_mixer
from ..config import HybridConfig
from ..data.buckets import Size, bucket_sizes
from ..data.image_files import say
from ..data.latents import LatentData
from ..data.prompts import few_prompts, read_prompts
from ..data.shards import Processes
from ..data.sources import SOURCES, make_data
from ..data.teacher import PromptEmbeddings, Teacher, encoder_names
from ..data.teacher_images import sample
from ..images import Grid
from ..machine import check_offload, fits_memory
from ..metrics.images import Images
from ..models import dense_mode, family_of, hybridize, is_hybrid, save_adapter
from ..models.adapters import describe_base
from ..models.family import Family, denoiser, unsharded_class
from ..models.identity import weights_digest
from ..models.recipe import Recipe
from ..models.surgery import keep_dense
from ..models.wrapping import check_unwrapped, has_lora, is_plain
from ..pipelines.loading import Base, check_parts, find_base, load_base, quiet, text_to_image
from ..pipelines.prepare import place
from ..stored import component_classes
from .batches import bucket_turn, epoch_order, step_generator, step_of_turn
from .checkpoint import KEPT, checkpoints, gather, read_state
from .frechet import FrechetDistance, as_rgb, check_samples
from .loop import Job, fit, start_run
from .losses import captured_outputs, converted_layers, distribution_loss, layer_loss, layers_alone
from .optimizer import is_gate
from .processes import check_launcher
from .run_config import HYBRID, DistillConfig, LossConfig, to_dict
from .run_log import flat
from .step_cost import mean_step_cost, step_flops

Tokens = tuple[int, int]  # (rows, columns) of an image

TOO_LARGE = (
    "the teacher, or what it makes at once, does not fit the device's memory: lower data.batch_size, or set data.offload to "
    "model, group or sequential; --dry-run counts what is needed"
)
# settings that a config may leave to the teacher's recipe
OF_RECIPE = ("model.recipe", "loss.task", "loss.output", "loss.layer", "loss.prompt_dropout")


def run(config: DistillConfig, *, resume: bool = False) -> nn.Module:
    """Run a config from start to end: load the teacher, let it make its images, distill, save the adapter."""
    check_settings(config)
    check_launcher(config)  # before a base is fetched
    base = text_to_image(find_base(config.model.path, variant=config.model.variant, config=config.model.config))
    if base.file is None:  # of a single file's parts, some are in the file
        components = component_classes(base.index)
        base.family.check_encoders(components)
        needs_vae = base.family.samples_with_vae or not SOURCES[config.data.source].teacher_made
        check_parts(base.pipeline_class, components, ("scheduler", "vae") if needs_vae else ("scheduler",))
    config = with_hybrid_of(config, base.hybrid_config())
    # errors are found on shapes, before anything is loaded and before the images are made, which may take days
    source, (model, vae_scale_factor) = SOURCES[config.data.source], base.shapes()
    config = with_recipe_of(config, family_of(model), base.index)
    config = with_text_length(config, family_of(model).usual_sequence_length())
    family_of(model).text_length(config.data.max_sequence_length)  # refuses those that it does not take
    images = (source.teacher_made, source.trajectories)
    planned_grids(config, model, vae_scale_factor)
    usual, settings = recipe_settings(config, model, *images), resume_settings(with_recipe(config, model, *images))
    with torch.device("meta"):
        make_student(model, config)
    accelerator = start_run(config, "adapter", settings, usual, resume=resume)
    check_layer_steps(config, accelerator)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    if processes.count > 1 and not config.data.cache:
        raise ValueError("several processes need data.cache: each makes a part of the images, and all read them there")
    check_offload("data.offload=", config.data.offload, accelerator.device)
    if config.metrics.every:
        check_samples(config.metrics, accelerator.num_processes)
    few = source.reads == "prompts" and few_prompts(len(read_prompts(config.data.prompts)), config.data.images)
    for note in (base.note, few):
        if note and accelerator.is_main_process:
            print(f"note: {note}", file=sys.stderr)
    with fits_memory(TOO_LARGE):
        texts = prompt_embeddings(base, config, accelerator.device, processes)
        teacher = load_teacher(base, config, accelerator.device, config.data.offload, texts)
        if resume:
            settings = {**settings, "model.weights": teacher.describe([base.component])[base.component]["weights"]}
            read_state(checkpoints(Path(config.output.folder) / "checkpoints")[-1], settings, usual)
        progress = config.train.progress and accelerator.is_main_process
        data = make_data(teacher, config.data, progress=progress, processes=processes)
        digest = teacher.describe([base.component])[base.component]["weights"]
        if config.data.offload:  # to train, its weights stay on the device
            teacher.free()
            teacher = load_teacher(base, config, accelerator.device, None, teacher.texts)
        pipeline = teacher.pipeline
    return distill(pipeline, data, config, resume=resume, digest=digest)


def load_teacher(
    base: Base, config: DistillConfig, device: torch.device, offload: str | None, texts: PromptEmbeddings
) -> Teacher:
    """The teacher but for its text encoders, which `texts` has; it is loaded when it is needed. offload: see `place`."""
    encoders = encoder_names(texts.family, component_classes(base.index))
    return Teacher(lambda: load_part(base, config, device, offload, encoders), texts)


def prompt_embeddings(
    base: Base, config: DistillConfig, device: torch.device, processes: Processes
) -> PromptEmbeddings:
    """The embeddings of prompts, by the base's text encoders alone."""
    data = config.data

    def load() -> Any:
        pipeline = load_part(base, config, device, data.offload, (base.component, "vae"))
        # all that pipelines read of it to encode prompts, such as SD3's without T5
        model = SimpleNamespace(config=base.shapes()[0].config, dtype=weights_dtype(config))
        setattr(pipeline, base.component, model)
        return pipeline

    return PromptEmbeddings(base.family, load, data.max_sequence_length, data.cache, processes)


def load_part(
    base: Base, config: DistillConfig, device: torch.device, offload: str | None, without: Sequence[str]
) -> Any:
    """Load a base without some of its components, and put it on a device."""
    pipeline = load_base(base, weights_dtype(config), without=without)
    place(pipeline, device, offload)
    return pipeline


def weights_dtype(config: DistillConfig) -> torch.dtype:
    """The type of the weights that are not trained."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def check_settings(config: DistillConfig) -> None:
    """Raise ValueError or FileNotFoundError for what is missing from a run's settings, without loading the model."""
    if not config.model.path:
        raise ValueError("model.path is empty: give the repository id or the folder of the teacher's pipeline")
    if not config.output.folder:
        raise ValueError("output.folder is empty: the distilled adapter would be lost")
    check_mixer(config.hybrid.mixer, **config.hybrid.mixer_settings)
    SOURCES[config.data.source].count(config.data)


def with_hybrid_of(config: DistillConfig, own: HybridConfig | None) -> DistillConfig:
    """The config of a run from a model that is hybrid already, with the config `own`: None if it is dense.

    Raises ValueError if the run's own `hybrid` section says something else.
    """
    if own in (None, config.hybrid):
        return config
    if config.hybrid is not HYBRID:
        ours, theirs = config.hybrid.to_dict(), own.to_dict()
        name = next(name for name in theirs if ours[name] != theirs[name])
        raise ValueError(
            f"the teacher is hybrid already, with hybrid.{name} {theirs[name]}, not {ours[name]}: leave the section "
            "hybrid out to go on from it, or give model.path the dense pipeline that it was made from"
        )
    return replace(config, hybrid=own)


def distill(
    pipeline, data: LatentData, config: DistillConfig, *, resume: bool = False, digest: str | None = None
) -> nn.Module:
    """Train the hybrid layers of a pipeline's transformer towards the dense model it was converted from.

    The transformer is converted in place with `config.hybrid` unless it is converted already, which must be with the
    same config; its dense weights are never changed. `config.model.path` and `config.data` are not used here: `data` is
    the training set.

    With `config.output.folder` set, the folder receives config.yaml, run.json (versions, git state, device of every
    start), log.jsonl, loss.png, checkpoints/, samples/, a tracker's events and at the end adapter/. `resume` continues
    from its newest checkpoint, with the same result as an uninterrupted run. Ctrl-C and SIGTERM let the step end, write
    a checkpoint and raise KeyboardInterrupt; a second signal stops at once.

    Several processes of `accelerate launch`, with DDP or FSDP2 (--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy
    TRANSFORMER_BASED_WRAP), give the same result as one, up to rounding, and can resume each other's checkpoints.

    digest: the transformer's `models.identity.weights_digest`; None: it is computed.

    Returns the transformer with the averaged weights; with FSDP it stays sharded, with trained weights in fp32. Raises
    ValueError for settings that cannot work, and FloatingPointError, naming the step, when the loss stops being finite;
    earlier checkpoints are kept.
    """
    base = denoiser(pipeline)
    check_unwrapped(base)
    config = with_hybrid_of(config, HybridConfig.from_saved(base.config.hybrid_config) if is_hybrid(base) else None)
    config = with_recipe_of(config, family_of(base), pipeline.config)
    recipe = recipe_for(base, config)
    images = (data.info.teacher_made, bool(data.info.states))
    weights, dropout = loss_settings(recipe, config, *images)
    length = data.info.max_sequence_length or family_of(base).usual_sequence_length()
    config = with_text_length(config, length)
    usual, config = recipe_settings(config, base, *images), with_recipe(config, base, *images)
    usual["data.max_sequence_length"] = length
    grids = token_grids(pipeline, data)
    accelerator = start_run(config, "adapter", resume_settings(config), usual, resume=resume)
    check_layer_steps(config, accelerator)
    check_quantised(base, accelerator, config.train.compile)
    trained = make_student(base, config)
    dtype = base.dtype
    if dtype != torch.float32 and config.train.precision == "no":
        raise ValueError(f"the transformer's weights are {dtype}: set train.precision=bf16, or load it in float32")
    pipeline.to(accelerator.device)
    if getattr(pipeline, "vae", None) is not None:
        pipeline.vae.to("cpu")  # until samples are drawn
    base.requires_grad_(False).eval()
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)

    digest = weights_digest(base) if digest is None else digest
    job = Distillation(pipeline, data, config, accelerator, recipe, weights, dropout, grids, usual, digest)
    if accelerator.is_main_process:
        for note in bucket_notes([len(rows) for rows in data.buckets.values()], config):
            say(note)
        if config.output.sample_every and getattr(pipeline, "vae", None) is None:
            say("output.sample_every: the teacher's pipeline has no VAE, so no sample grids are drawn")
    compiled = nullcontext()
    if config.train.compile:  # beyond the limit, torch runs a block uncompiled; teacher and student compile it for each
        limit = max(torch._dynamo.config.recompile_limit, 4 * len(grids))
        compiled = torch._dynamo.config.patch(recompile_limit=limit)
    try:
        with compiled:
            fit(job, config, accelerator, resume=resume)
    finally:  # a run that is stopped leaves the model as it is to be used
        job.give_far_alone(None)
        keep_dense(base, ())

    if accelerator.is_fsdp2:
        return base
    for name, parameter in trained.items():
        parameter.requires_grad_(False)
        if not is_gate(name):  # gates stay fp32, as hybridize makes them
            parameter.data = parameter.data.to(dtype)
    pipeline.to(accelerator.device)
    return base


class Distillation(Job):
    """Batch, losses and samples of a distillation. The transformer is the student, and in `dense_mode` the teacher."""

    name, metrics, logged, fused = "distill", ("loss", "task", "output", "layer"), ("lr", "gate_lr"), False

    def __init__(
        self,
        pipeline,
        data: LatentData,
        config: DistillConfig,
        accelerator: Accelerator,
        recipe: Recipe,
        weights: torch.Tensor,
        dropout: float,
        grids: dict[Size, Tokens],
        usual: dict[str, Any],
        digest: str,
    ):
        self.pipeline, self.data, self.config, self.accelerator = pipeline, data, config, accelerator
        self.recipe, self.weights, self.dropout, self.grids = recipe, weights, dropout, grids
        self.model = denoiser(pipeline)
        content = {"model.weights": digest, "data.content": data.content}
        self.settings, self.usual = {**resume_settings(config), **content}, usual
        self.family, self.dtype = family_of(self.model), self.model.dtype
        name = config.model.path or str(pipeline.config.get("_name_or_path") or "")
        self.base = {**describe_base(self.model, name), "height": data.info.height, "width": data.info.width}
        self.layers = self.converted = converted_layers(self.model)
        attentions = self.model._dense_processors if config.train.compile else ()  # see `captured_outputs`
        self.beside = {name: self.model.get_submodule(name) for name in attentions}
        self.later = list(self.layers)[1::2] if config.loss.progressive_steps else []
        stages = {"distribution": config.loss.distribution > 0, "converted_layers": bool(self.later)}
        self.metrics = (*Distillation.metrics, *(name for name, used in stages.items() if used))
        guided = self.family.takes_guidance(self.model.config)
        self.guidance = data.info.guidance_scale if guided else None
        self.teacher_samples = None
        self.frechet = self._frechet() if config.metrics.every else None

    def make_batch(self, step: int) -> list[tuple]:
        """Each part is told its step."""
        parts = draw_batches(
            data=self.data,
            recipe=self.recipe,
            config=self.config,
            step=step,
            dropout=self.dropout,
            grids=self.grids,
            scheduler=self.pipeline.scheduler,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        return [(step, *part) for part in parts]

    def losses(self, model: nn.Module, part: tuple) -> torch.Tensor:
        """The metrics [loss, task, output, layer, …] of one part of a batch, as `self.metrics` names them.

        The first is the weighted sum of the others: errors against the noise or velocity, against the teacher's output,
        and against the outputs of its attention layers. In the steps of `loss.layer_steps` it is the last one, of layers
        that see the teacher's own input; the others are 0. With `loss.distribution` there is one more, `distribution_loss`;
        with `loss.progressive_steps`, the number of layers that are converted in this step is logged.
        """
        step, *tensors, grid = part
        self._convert_for(step)
        latents, noise, times, text, far_only, earlier = self._to_device(*tensors)
        weight = self.config.loss.distribution
        # what is logged besides
        more = {"distribution": torch.zeros(()), "converted_layers": torch.tensor(float(len(self.converted)))}
        if self.data.info.states:
            noisy, target = latents, None
        else:
            noisy, target = self.family.add_noise(latents, noise, times, self.pipeline.scheduler)

        def predict(model: nn.Module, noisy: torch.Tensor = noisy, times: torch.Tensor = times) -> torch.Tensor:
            inputs = self.family.model_inputs(noisy.to(self.dtype), times, text, grid, self.guidance)
            return self.family.prediction(model(**inputs, return_dict=False)[0], latents).float()

        def teach(*state: torch.Tensor, **times: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), dense_mode(self.model):
                return predict(self.model, *state, **times)

        self.give_far_alone(far_only if self.config.loss.window_dropout else None)  # until the backward pass has ended
        if step < self.config.loss.layer_steps:
            loss = layers_alone(self.model, self.family, len(self.layers), partial(predict, model))
            losses = [loss.new_zeros(()), loss.new_zeros(()), loss.detach()]
        else:
            with captured_outputs(self.family, self.converted, self.beside) as teacher_layers:
                teacher = teach()
            with captured_outputs(self.family, self.converted, self.beside) as student_layers:
                student = predict(model)
            losses = [
                student.new_zeros(()) if target is None else F.mse_loss(student, target),
                F.mse_loss(student, teacher),
                layer_loss(student_layers, teacher_layers),
            ]
            loss = (torch.stack(losses) * self.weights.to(student)).sum()
            if weight:
                runs = partial(predict, self.model, times=earlier), partial(teach, times=earlier)
                states = noisy.float(), student, times, earlier
                more["distribution"] = distribution_loss(self.family, self.pipeline.scheduler, *states, *runs)
                loss = loss + weight * more["distribution"]
        own = [more[name].to(loss) for name in self.metrics if name in more]
        return torch.stack([loss, *losses, *own])

    def _convert_for(self, step: int) -> None:
        """Convert the layers that learn in this step, and let the others run as the teacher's."""
        kept = self.later if step < self.config.loss.progressive_steps else []
        if len(self.converted) + len(kept) == len(self.layers):
            return
        keep_dense(self.model, kept)
        self.converted = converted_layers(self.model)
        if self.accelerator.is_main_process:
            say(f"from step {step + 1:,} on, {len(self.converted)} of {len(self.layers)} layers are converted")

    def samples(self) -> Grid | None:
        """The teacher's images beside the student's."""
        if getattr(self.pipeline, "vae", None) is None:
            return None
        rows = range(min(self.config.output.samples, len(self.data)))
        if self.teacher_samples is None:
            with dense_mode(self.model):
                self.teacher_samples = self._images(rows)
        prompts = [self.data.prompts[row] if self.data.prompts else "" for row in rows]
        return Grid([self.teacher_samples, self._images(rows)], [prompts, prompts], ("teacher", "student"))

    def distance(self) -> float:
        return self.frechet(lambda rows: as_rgb(self._images(rows)))

    def notes(self, first: int) -> dict[str, Any]:
        """What this model has where a setting leaves it to the model: one value, or each that its layers have."""
        layers = [layer.hybrid for layer in self.layers.values()]
        ranks = {layer.map_q.down.out_features for layer in layers if layer.map_q is not None}
        projections = {getattr(layer.far, "projection_q", None) for layer in layers} - {None}
        return {
            "in_force": {
                "data.text_tokens": self.data.empty["prompt_embeds"].shape[1],
                "hybrid.map_rank": sorted(ranks),
                "hybrid.projection": sorted({projection.shape[-1] for projection in projections}),
            }
        }

    def flops(self) -> float:
        text = {name: _cast(value, self.dtype) for name, value in self.data.rows([0], self.data.empty).items()}
        images = {self.grids[size]: len(rows) for size, rows in self.data.buckets.items()}
        _, cost = mean_step_cost(self.model, images, text, 1, bf16=self.config.train.precision == "bf16")
        return step_flops(cost, distribution=self.config.loss.distribution > 0)

    def finish(self, folder: Path | None, step: int) -> nn.Module:
        if folder is not None:
            self._save_adapter(folder / "adapter", step)
        return self.model

    def add_to_checkpoint(self, folder: Path, step: int) -> None:
        self._save_adapter(folder / "adapter", step)

    def _save_adapter(self, folder: Path, step: int) -> None:
        """Save the adapter after `step` steps. Every process calls this if the model is sharded."""
        model = self.model
        if self.accelerator.is_fsdp2:  # the adapter's weights, in a copy
            added = gather((name, tensor) for name, tensor in model.state_dict().items() if ".hybrid." in name)
            with torch.device("meta"):
                model = unsharded_class(model).from_config(model.config)
            model.load_state_dict(added, strict=False, assign=True)
        if self.accelerator.is_main_process:
            save_adapter(model, folder, base={**self.base, "steps": step})

    def _frechet(self) -> FrechetDistance:
        """The distance to the config's reference, or else to the teacher's images of the same prompts and noise."""
        if getattr(self.pipeline, "vae", None) is None:
            raise ValueError("metrics.every: the teacher's pipeline has no VAE to make images with, set it to 0")

        def teacher(rows: range) -> np.ndarray:
            with dense_mode(self.model):
                return as_rgb(self._images(rows))

        info, metrics = self.data.info, self.config.metrics
        return FrechetDistance(
            metrics,
            Images(metrics.samples, teacher),
            np.zeros((2, info.height, info.width, 3), np.uint8),
            self.accelerator.device,
            self.accelerator.num_processes,
            progress=self.config.train.progress,
        )

    def _images(self, rows: range) -> list[Image.Image]:
        """The model's images of the set's prompts in turn; row i always from seed `train.seed` + i."""
        pipeline, dtype = self.pipeline, self.dtype
        self.give_far_alone(None)
        tensors = self.data.rows([row % len(self.data) for row in rows], self.data.empty)  # the prompts' alone
        text = {name: _cast(value, dtype) for name, value in tensors.items()}
        pipeline.vae.to(self.accelerator.device)
        # accelerate returns outputs in fp32, which the pipeline's bf16 decoder does not take
        cast = self.model.register_forward_hook(lambda module, args, output: tree_map(lambda x: x.to(dtype), output))
        try:
            with quiet(pipeline):
                seeds = [self.config.train.seed + row for row in rows]
                return sample(pipeline, text, self.data.empty, self.data.info, seeds)
        finally:
            cast.remove()
            pipeline.vae.to("cpu")

    def give_far_alone(self, images: torch.Tensor | None) -> None:
        """Let the student's hybrid layers use the far branch alone for these images, bool [B]; None: for none."""
        for layer in self.layers.values():
            layer.hybrid.far_only = images

    def _to_device(self, latents, noise, times, text: dict[str, torch.Tensor], far_only, earlier) -> tuple[Any, ...]:
        device = self.accelerator.device
        text = {name: _cast(value.to(device, non_blocking=True), self.dtype) for name, value in text.items()}
        tensors = (latents, noise, times, far_only, earlier)
        latents, noise, times, far_only, earlier = (value.to(device, non_blocking=True) for value in tensors)
        return latents.float(), noise, times, text, far_only, earlier


def check_quantised(model: nn.Module, accelerator: Accelerator, compiles: bool = False) -> None:
    """Raise ValueError where quantised weights do not train: sharded by FSDP, or compiled on a CPU."""
    if all(is_plain(weight) for weight in model.parameters()):
        return
    if accelerator.is_fsdp2:
        raise ValueError("FSDP does not shard quantised weights: train with DDP, where each process has all of them")
    if compiles and accelerator.device.type == "cpu":  # with torchao's, torch 2.15 ends by a segmentation fault
        raise ValueError("train.compile does not work with quantised weights on a CPU: set train.compile=false")


def check_layer_steps(config: DistillConfig, accelerator: Accelerator) -> None:
    """Raise ValueError where `loss.layer_steps` cannot work."""
    if config.loss.layer_steps and accelerator.is_fsdp2:
        raise ValueError("loss.layer_steps trains in one process or with DDP: with FSDP set it to 0")


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def make_student(transformer: nn.Module, config: DistillConfig) -> dict[str, nn.Parameter]:
    """Convert the transformer in place, unless it is hybrid already. Returns the parameters to train, by full name.

    Only the weights that hybridize adds are trained. Raises ValueError if it adds none, for window dropout where no layer
    has two branches to choose from, and for progressive steps in which nothing would be trained.
    """
    if not is_hybrid(transformer):
        with torch.random.fork_rng():
            torch.manual_seed(config.train.seed)
            hybridize(transformer, config.hybrid)
    if config.loss.window_dropout:
        layers = [layer.hybrid for layer in converted_layers(transformer).values()]
        if not any(layer.kind == "hybrid" for layer in layers):
            raise ValueError('loss.window_dropout needs layers of kind "hybrid": set it to 0')
    if config.loss.progressive_steps:
        names = list(converted_layers(transformer))
        learns = any(next(transformer.get_submodule(name).hybrid.parameters(), None) is not None for name in names[::2])
        if len(names) < 2 or not learns:
            raise ValueError(
                f"loss.progressive_steps converts every second layer first, which leaves nothing to train of the "
                f"{len(names)} to be converted: set it to 0"
            )
    if has_lora(transformer, ".hybrid."):
        raise ValueError("the hybrid layers have a LoRA, which a distillation does not train: unload it first")
    trained = {name: p for name, p in transformer.named_parameters() if ".hybrid." in name}
    if not trained:
        raise ValueError(
            "nothing to train: this hybrid config adds no weights (set hybrid.delta_rank, or hybrid.linear)"
        )
    return trained


def with_recipe_of(config: DistillConfig, family: Family, pipeline: Mapping[str, Any]) -> DistillConfig:
    """The config with the recipe that a pipeline's own config tells, if any, where it leaves that out."""
    name = config.model.recipe or family.pipeline_recipe(pipeline)
    return replace(config, model=replace(config.model, recipe=name))


def recipe_for(transformer: nn.Module, config: DistillConfig) -> Recipe:
    """The recipe that `config.model.recipe` names, or the one that fits the transformer. Raises as Family.recipe."""
    return family_of(transformer).recipe(transformer.config, config.model.recipe)


def loss_settings(
    recipe: Recipe, config: DistillConfig, teacher_made: bool = True, trajectories: bool = False
) -> tuple[torch.Tensor, float]:
    """The weights of (task, output, layer) and the prompt dropout: the config's, or else the recipe's.

    Takes and raises what `loss_in_force` does.
    """
    loss = loss_in_force(recipe, config, teacher_made, trajectories)
    return torch.tensor([loss.task, loss.output, loss.layer]), loss.prompt_dropout


def loss_in_force(
    recipe: Recipe, config: DistillConfig, teacher_made: bool = True, trajectories: bool = False
) -> LossConfig:
    """The losses' weights and the prompt dropout, the recipe's where the config leaves them out.

    teacher_made: whether the images are the teacher's own; trajectories: whether they are states of its sampling, for
    which there is no task target. Raises ValueError if all weights are 0, or for a task weight that cannot work.
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
    if chosen.distribution and recipe.few_steps:
        raise ValueError(
            "loss.distribution: a few-step teacher's output does not say how likely noisy images are: set it to 0"
        )
    if max(task, output, layer, chosen.distribution) == 0:
        raise ValueError("the weights loss.task, loss.output, loss.layer and loss.distribution may not all be 0")
    return replace(chosen, task=task, output=output, layer=layer, prompt_dropout=dropout)


def with_recipe(config: DistillConfig, transformer: nn.Module, *images: bool) -> DistillConfig:
    """The config with the recipe's name and what the recipe says of the losses. images: as in `loss_in_force`."""
    name = config.model.recipe or family_of(transformer).default_recipe(transformer.config)
    loss = loss_in_force(recipe_for(transformer, config), config, *images)
    return replace(config, model=replace(config.model, recipe=name), loss=loss)


def with_text_length(config: DistillConfig, length: int | None) -> DistillConfig:
    """The config with a number of text tokens where it leaves that out."""
    given = config.data.max_sequence_length
    return replace(config, data=replace(config.data, max_sequence_length=length if given is None else given))


def recipe_settings(config: DistillConfig, transformer: nn.Module, *images: bool) -> dict[str, Any]:
    """The settings OF_RECIPE, and the text's length, as they are where a config leaves them out. images: as above."""
    settings = resume_settings(with_recipe(replace(config, loss=LossConfig()), transformer, *images))
    family = family_of(transformer)
    usual = {
        "model.recipe": family.default_recipe(transformer.config),
        "data.max_sequence_length": family.usual_sequence_length(),
    }
    return {**{name: settings[name] for name in OF_RECIPE}, **usual}


def planned_grids(config: DistillConfig, transformer: nn.Module, vae_scale_factor: int) -> dict[Size, Tokens]:
    """(rows, columns) in tokens of the sizes of images that `config.data` asks for.

    Raises ValueError if a size, or that of the samples, is not a whole number of tokens, or too large for the model.
    """
    family, data = family_of(transformer), config.data
    side = family.token_pixels(transformer.config, vae_scale_factor)
    sizes = bucket_sizes(data.buckets, data.height, data.width, side)
    grids = {size: (size[0] // side, size[1] // side) for size in sizes}
    for grid in (*grids.values(), (data.height // side, data.width // side)):
        family.check_grid(transformer.config, grid)
    return grids


def token_grids(pipeline, data: LatentData) -> dict[Size, Tokens]:
    """(rows, columns) in tokens of each size of the set's images. Raises ValueError if its latents are not of that grid."""
    family, config = family_of(denoiser(pipeline)), denoiser(pipeline).config
    side = family.token_pixels(config, pipeline.vae_scale_factor)
    grids = {size: (size[0] // side, size[1] // side) for size in data.buckets}
    for size, grid in grids.items():
        if data.shapes[size] != family.latents_shape(config, grid):
            raise ValueError(f"latents {data.shapes[size]} are no {grid[0]} x {grid[1]} grid: made by another model?")
    return grids


def bucket_notes(counts: Sequence[int], config: DistillConfig) -> list[str]:
    """What is to be said of buckets with so many images, in one line each: those smaller than a step, or not reached."""
    if len(counts) == 1:
        return []
    steps, count = config.train.steps, config.train.batch_size
    few = [images for images in counts if images < count]
    late = [images for bucket, images in enumerate(counts) if step_of_turn(counts, bucket, 0) >= steps]
    notes = []
    if few:
        notes.append(
            f"{sum(few)} images are in {len(few)} buckets of fewer than train.batch_size ({count}): a step there has each "
            "several times, and comes as much more seldom; a shorter list of data.buckets puts them into others"
        )
    if late:
        notes.append(f"{sum(late)} images are in {len(late)} buckets that train.steps ({steps}) do not come to")
    return notes


def draw_batches(data, recipe, config, step, dropout, grids, scheduler, rank=0, processes=1):
    """This process's samples of one optimizer step, in `accumulation` parts.

    A part is (latents, noise, times, text, far_only, earlier, grid). All parts of a step are of one bucket, in which every image
    is drawn once before one is drawn again. For trajectories, latents and times are those of one state of each row.
    far_only, bool, is window dropout's choice; earlier are times between the image and `times`, for `distribution_loss`;
    grid is (rows, columns) in tokens. See `step_generator` for what the
    samples depend on.
    """
    count, parts = config.train.batch_size, config.train.accumulation * processes
    generator = step_generator(config.train.seed, step)
    bucket, turn = bucket_turn([len(rows) for rows in data.buckets.values()], step)
    size, of_bucket = list(data.buckets.items())[bucket]
    indices = [of_bucket[i] for i in epoch_order(len(of_bucket), config.train.seed, turn * count, count)]
    grid = grids[size]
    times = recipe.draw_times(count, grid[0] * grid[1], scheduler, generator)
    dropped = torch.rand(count, generator=generator) < dropout
    noise = torch.randn((count, *data.shapes[size]), generator=generator)
    chosen = torch.randint(data.info.states, (count,), generator=generator) if data.info.states else None
    far_only = torch.rand(count, generator=generator) < config.loss.window_dropout
    share = torch.rand(count, generator=generator)
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
        earlier = (part_times * share[own]).to(part_times.dtype)
        yield latents, noise[own], part_times, text, far_only[own], earlier, grid


def resume_settings(config: DistillConfig) -> dict:
    """The settings that must not change when a run is resumed.

    Left out are those that its kind of data does not use, and those that change no sample: where the cache is, how many
    images are made at a time and where the weights are then, and the accumulation steps.
    """
    values, source = to_dict(config), SOURCES[config.data.source]
    others = ("prompts", "images", "seed") if source.reads == "folder" else ("folder",)
    unused = {"cache", "batch_size", "offload", *others}
    if not source.trajectories:
        unused.add("states")
    values["data"] = {name: value for name, value in values["data"].items() if name not in unused}
    kept = {name: value for name, value in flat(values).items() if name in KEPT}
    for section in ("model", "hybrid", "data", "loss"):
        kept |= {f"{section}.{name}": value for name, value in values[section].items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}
