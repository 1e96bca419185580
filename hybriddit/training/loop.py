"""The training loop that distillation and training from scratch share; they differ in batches and losses (see Job)."""

from __future__ import annotations

import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import is_wandb_available
from diffusers.training_utils import EMAModel
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..files import replacing
from ..images import Grid, open_image, save_grid
from ..machine import fits_memory
from ..models.wrapping import is_plain
from .batches import batches
from .checkpoint import checkpoints, load_checkpoint, saving_checkpoint
from .optimizer import check_8bit, make_optimizer, set_learning_rates
from .processes import check_distribution, check_processes, claim_folder, make_accelerator
from .run_config import to_dict
from .run_log import changed_settings, log, plot_log, read_starts, record_start, start_log
from .tracker import start_tracker, track_image, tracked_run

# dense bf16 TFLOP/s, by a part of the device's name
TOO_LARGE = (
    "a step does not fit the device's memory: set train.gradient_checkpointing=true, or raise train.accumulation, so that "
    "it holds fewer images at once; --dry-run counts what is needed, and --resume goes on from the newest checkpoint"
)
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}


class Job(ABC):
    """What one kind of training adds to the loop: batches, losses, samples and results.

    name: shown on the progress bar. metrics: names of the values that `losses` returns. logged: which of "lr",
    "gate_lr" and "images_per_second" to log. fused: whether AdamW runs as one kernel, which is worth it if many weights
    are trained.

    model: its parameters with requires_grad are trained, in place. settings: the settings that must not change when a
    run is resumed; usual: see `read_state`.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    logged: ClassVar[tuple[str, ...]]
    fused: ClassVar[bool]
    model: nn.Module
    settings: dict[str, Any]
    usual: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def make_batch(self, step: int) -> list:
        """This process's samples of one step, on the CPU, in `train.accumulation` parts. May run in another thread."""

    @abstractmethod
    def losses(self, model: nn.Module, part: Any) -> torch.Tensor:
        """The metrics of one part of a batch, as means, [metrics]; the first is minimised.

        model: `self.model`, as accelerate has wrapped it.
        """

    @abstractmethod
    def samples(self) -> Grid | None:
        """The sample grid, made with the model's current weights; None if no image can be made."""

    @abstractmethod
    def distance(self) -> float:
        """The Fréchet distance that `config.metrics` asks for, with the model's current weights."""

    @abstractmethod
    def flops(self) -> float:
        """FLOPs of one image in one step, forward and backward. Called before accelerate wraps the model."""

    @abstractmethod
    def finish(self, folder: Path | None, step: int) -> nn.Module:
        """Write the result of the run, if there is a folder, and return the model. Every process calls this."""

    def add_to_checkpoint(self, folder: Path, step: int) -> None:  # noqa: B027
        """Write other files into a checkpoint before it gets its name, while the model has the averaged weights.

        The main process calls this; if the model is sharded, every process.
        """

    def checkpointed(self, folder: Path, step: int) -> None:  # noqa: B027
        """Write other files with a checkpoint, while the model has the averaged weights.

        The main process calls this; if the model is sharded, every process.
        """

    def notes(self, first: int) -> dict[str, Any]:
        """Further entries for this start in run.json. first: the first step."""
        return {}

    def renamed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename the tensors of an older version's checkpoint to today's names."""
        return tensors


def start_run(config, result: str, settings: dict, usual: dict | None = None, *, resume: bool) -> Accelerator:
    """Set up the processes and claim `config.output.folder`, if one is given, before anything is loaded.

    result: the name of the run's result in the folder, "adapter" or "pipeline". settings: the settings that must not
    change when a run is resumed; usual: see `read_state`. Raises ValueError, NotImplementedError or
    ModuleNotFoundError, in one line, for settings, launchers and folders that cannot work.
    """
    if config.output.folder and config.output.tracker == "wandb" and not is_wandb_available():
        raise ModuleNotFoundError("output.tracker is wandb, which is not installed: pip install wandb")
    accelerator = make_accelerator(config)
    check_distribution(accelerator)
    check_8bit(config, sharded=accelerator.is_fsdp2)
    check_processes(config, accelerator.num_processes)
    if config.output.folder:
        claim_folder(Path(config.output.folder), result, settings, usual or {}, config.train.steps, resume)
    return accelerator


def fit(job: Job, config, accelerator: Accelerator, *, resume: bool = False) -> nn.Module:
    """Train `job.model` up to `config.train.steps` steps; returns what `job.finish` makes of the averaged weights.

    For the run's folder, resuming, signals and errors see `distill` and `train`, which call this.
    """
    folder = Path(config.output.folder) if config.output.folder else None
    writes = folder is not None and accelerator.is_main_process
    gathers = writes or (folder is not None and accelerator.is_fsdp2)  # sharded weights need all processes
    peak = config.train.peak_tflops or known_peak(accelerator.device)
    flops = job.flops() if peak else 0.0

    model, optimizer = prepare(job, config, accelerator)
    trained = trained_parameters(job.model)
    parameters = list(trained.values())
    # EMAModel's foreach does not take shards
    average = EMAModel(parameters, decay=config.optim.ema_decay, foreach=not accelerator.is_fsdp2)
    first = 0
    if resume:
        newest = checkpoints(folder / "checkpoints")[-1]
        shadow = average.shadow_params
        first = load_checkpoint(newest, trained, shadow, optimizer, job.settings, job.usual, rename=job.renamed)
        average.optimization_step = first
    if writes:
        start_folder(folder, first, job, config, accelerator)

    names = (*job.metrics, "grad_norm")
    pending: list[torch.Tensor] = []  # metrics of the steps since the last log line, still on the device
    since = time.perf_counter()
    # not with several processes: the launcher stops them all, and one that goes on would wait for the others
    signals = stop_signals() if writes and accelerator.num_processes == 1 else nullcontext([])
    with fits_memory(TOO_LARGE), signals as stopped, progress_bar(job.name, first, config, accelerator) as bar:
        for step, parts in batches(job.make_batch, range(first, config.train.steps), accelerator.device):
            set_learning_rates(optimizer, step, config)
            metrics = torch.zeros(len(names), device=accelerator.device)
            for index, part in enumerate(parts):
                with nullcontext() if index == len(parts) - 1 else accelerator.no_sync(model):
                    losses = job.losses(model, part) / len(parts)
                    accelerator.backward(losses[0])
                metrics[:-1] += losses.detach()
            norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip or float("inf"), foreach=True)
            metrics[-1] = norm.full_tensor() if accelerator.is_fsdp2 else norm
            optimizer.step()
            optimizer.zero_grad()
            average.step(parameters)
            pending.append(metrics)
            bar.update()

            done = step + 1
            due = due_after(done, config)
            due["checkpoint"] |= bool(stopped)
            if not any(due.values()):
                continue
            values = mean_metrics(names, accelerator.reduce(torch.stack(pending), "mean").cpu(), done)
            # the metrics are on the CPU, so the steps are done
            rate = len(pending) * config.train.batch_size / (time.perf_counter() - since)
            pending.clear()
            lr, gate_lr = (group["lr"] for group in optimizer.param_groups)
            more = {"lr": lr, "gate_lr": gate_lr, "images_per_second": rate}
            values |= {name: more[name] for name in job.logged}
            if peak:
                values["mfu"] = rate * flops / (peak * 1e12 * accelerator.num_processes)
            if due["metrics"]:
                with averaged(job.model, average, parameters):
                    values["fd"] = job.distance()
            bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
            if writes:
                accelerator.log(values, step=done)
                log(folder, {"step": done, **values})
            if gathers and due["checkpoint"]:
                state = (trained, average.shadow_params, optimizer, job.settings)
                with (
                    saving_checkpoint(folder / "checkpoints", done, *state, config.output.keep, write=writes) as files,
                    averaged(job.model, average, parameters),
                ):
                    job.add_to_checkpoint(files, done)
                with averaged(job.model, average, parameters):
                    job.checkpointed(folder, done)
            if writes and stopped:
                raise KeyboardInterrupt
            if gathers and due["sample"]:
                with averaged(job.model, average, parameters):
                    grid = job.samples()
                if writes and grid is not None:
                    path = folder / "samples" / f"step-{done:08d}.png"
                    save_grid(path, grid, f"step {done:,}")
                    track_image(accelerator, "samples", open_image(path), done)
                    plot_log(folder, (*names, "fd"))
            since = time.perf_counter()  # throughput leaves out saving and sampling

    average.copy_to(parameters)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    result = job.finish(folder, config.train.steps)
    if writes:
        plot_log(folder, (*names, "fd"))
    if folder is not None:
        accelerator.end_training()
    if config.train.gradient_checkpointing:
        job.model.disable_gradient_checkpointing()
    return result


def prepare(job: Job, config, accelerator: Accelerator) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap the model with accelerate, and make the optimizer of its trained weights."""
    base = job.model
    if config.train.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    if config.train.compile:
        base.compile_repeated_blocks()
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        plugin.cpu_ram_efficient_loading = False  # every process has the same weights already
        # accelerate's policy would round the times to bf16; autocast alone computes as with DDP
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        base.forward = accelerator.autocast()(base.forward)
    else:  # DDP sends all weights to the other processes at the start, which these types do not take
        others = [name for name, weight in base.named_parameters() if not is_plain(weight)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(base, others)
    fused = job.fused and accelerator.device.type in ("cpu", "cuda")
    optimizer = make_optimizer(trained_parameters(base), config, fused=fused)
    model, _ = accelerator.prepare(base, optimizer)  # together: FSDP gives the optimizer other parameters
    return model, optimizer


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with requires_grad, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def start_folder(folder: Path, first: int, job: Job, config, accelerator: Accelerator) -> None:
    """Make the run's folder ready and start its tracker, before step `first`.

    Writes config.yaml if the run is new, adds this start to run.json, and cuts the log after step `first`. Says which
    settings a resumed run was given other values of.
    """
    settings = to_dict(config)
    starts = read_starts(folder) if first else []
    changed = changed_settings(starts, settings)
    of_job = job.notes(first)
    if first == 0:
        ours = [f"# {name} of this model: {value}\n" for name, value in of_job.get("in_force", {}).items()]
        with replacing(folder / "config.yaml") as partial:
            partial.write_text("".join(ours) + OmegaConf.to_yaml(OmegaConf.create(settings)), encoding="utf-8")
    run = tracked_run(config, starts)
    notes = {**of_job, "config": settings, "changed": changed, "tracker": run}
    record_start(folder, first, accelerator.num_processes, accelerator.device, **notes)
    for name, (before, now) in changed.items():
        print(f"resumed: {name} {before} -> {now} from step {first + 1}", flush=True)
    start_log(folder, first)
    start_tracker(accelerator, run, settings, first)


def progress_bar(name: str, first: int, config, accelerator: Accelerator) -> tqdm:
    """A progress bar over the run's steps, shown by the main process."""
    shown = config.train.progress and accelerator.is_main_process
    return tqdm(initial=first, total=config.train.steps, desc=name, unit="step", disable=not shown)


def due_after(done: int, config) -> dict[str, bool]:
    """Whether to log, write a checkpoint, draw samples and measure the metrics after `done` steps.

    Everything that is enabled is also done after the last step.
    """
    every = {name: getattr(config.output, f"{name}_every") for name in ("log", "checkpoint", "sample")}
    every["metrics"] = config.metrics.every
    return {name: n > 0 and (done % n == 0 or done == config.train.steps) for name, n in every.items()}


def mean_metrics(names: Sequence[str], values: torch.Tensor, done: int) -> dict[str, float]:
    """Means of the last steps' metrics [steps, metrics]. Raises FloatingPointError, naming the step, at NaN or inf."""
    bad = (~values.isfinite()).any(dim=1).nonzero()
    if len(bad):
        step = done - len(values) + int(bad[0]) + 1
        shown = ", ".join(
            f"{name} {value:.4g}" for name, value in zip(names, values[int(bad[0])].tolist(), strict=True)
        )
        raise FloatingPointError(f"training stopped: not finite at step {step} ({shown}); earlier checkpoints are kept")
    return dict(zip(names, values.mean(dim=0).tolist(), strict=True))


def known_peak(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of a device listed in PEAK_TFLOPS; None for other devices."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak for name, peak in PEAK_TFLOPS.items() if set(name.split()) <= set(words)), None)


@contextmanager
def averaged(model: nn.Module, average: EMAModel, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Give `model` the averaged weights within the block."""
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # drop the gathered averaged weights, or FSDP would reuse them


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that receives the first SIGINT or SIGTERM; a second one has its usual effect.

    Only the main thread can catch signals: elsewhere the list stays empty.
    """
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before: dict[int, Callable | int | None] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, frame) -> None:
        stopped.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield stopped
    finally:
        restore()
