"""The settings of training runs: dataclasses, read from YAML with dotted overrides; an unknown key is an error."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import re
import textwrap
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import HybridConfig, read_plan
from ..data.buckets import ASPECT
from ..data.sources import SOURCES, sources_of
from ..machine import OFFLOADS

HYBRID = HybridConfig()  # the `hybrid` of a config without that section, told apart by its identity
MAX_SEED = 2**43  # times a million, by which steps' seeds are told apart, it fits into the generator's 64 bits


@dataclass
class ModelConfig:
    """The teacher.

    path: repository id or folder of its diffusers pipeline; or a single-file checkpoint, in safetensors.
    variant: of the weights' files, such as "fp16"; None: those without a variant's name, where there are such.
    config: for a single file, repository or folder of the same kind of model in diffusers' layout, for its other parts.
    recipe: a name in the `recipes` of its family (`hybriddit.models.family.Family`); None: the one that fits the model.
    """

    path: str = ""
    recipe: str | None = None
    variant: str | None = None
    config: str | None = None


@dataclass
class DataConfig:
    """The training images of a distillation.

    source: "teacher" (images that the teacher makes from the prompts), "folder" (images of your own with captions) or
        "trajectories" (intermediate states of the teacher's sampling, which needs no VAE).
    folder: for "folder", the folder of images; captions are in metadata.jsonl, metadata.csv, <image>.txt, .caption
        or .json; tars are read too.
    states: for "trajectories", how many of the transformer's inputs are kept while each image is sampled.
    prompts: a .txt with one prompt a line, a .jsonl, .json, .csv or .tsv with a column "prompt", "text" or "caption", or
        the prompts themselves; repeated with new seeds up to `images`.
    images: how many the teacher makes.
    cache: folder for the latents and prompt embeddings, reused and added to if it holds some of them already; None keeps
        them in memory.
    height, width: in pixels. steps: of the teacher's sampler.
    guidance_scale: the pipeline's argument of that name (Qwen-Image: true_cfg_scale); Z-Image's and Krea 2's guide above
        0, others above 1.
    max_sequence_length: text tokens; None is the pipeline's default.
    batch_size: images made, or images or prompts encoded, at a time in each process.
    seed: image i is made from seed + i; for "folder", it draws the caption of an image that has several.
    max_images: for "folder", take the first so many images with captions, by path; None: all of them.
    buckets: for "folder", the sizes that images are scaled and cropped to, each to the one that fits it best: "aspect"
        (sizes from 1:4 to 4:1 of about height x width pixels), or a list of [height, width]. A step's images are of one
        size. None: all images are of height x width, which samples always are.
    offload: while the set is made, weights come to the device only when they are used: "model", "group" or
        "sequential", as `hybriddit generate --offload`; None: all of them stay there.
    """

    source: str = "teacher"
    folder: str | None = None
    states: int = 4
    prompts: str | list[str] = ""
    images: int = 1024
    cache: str | None = None
    height: int = 1024
    width: int = 1024
    steps: int = 28
    guidance_scale: float = 3.5
    max_sequence_length: int | None = None
    batch_size: int = 4
    seed: int = 0
    max_images: int | None = None
    buckets: str | list[list[int]] | None = None
    offload: str | None = None


@dataclass
class LossConfig:
    """Weights of the losses, shares of the samples, and the stages of a run; None is the recipe's value.

    task: weight of the error against the noise or velocity that was drawn. output: against the teacher's output. layer:
        against the outputs of its attention layers.
    distribution: weight of distribution matching: each step also makes one step of the student's sampling, and where it
        arrives it is drawn to what the teacher finds likelier than the student does. It takes one more pass of each,
        without gradients. Not for few-step teachers.
    prompt_dropout: share of the samples whose prompt is empty.
    window_dropout: share of the samples for which all hybrid layers of the student use the far branch alone.
    layer_steps: the first so many of train.steps train every layer by itself, all at once: each towards the output of
        the teacher's layer on the teacher's own input. They take one pass of the model, and none of the losses above
        but the layers' errors. Not with FSDP.
    progressive_steps: in the first so many of train.steps every second layer of those to be converted, the second, the
        fourth and so on, still runs the teacher's attention and does not learn; then all are converted.
    """

    task: float | None = None
    output: float | None = None
    layer: float | None = None
    prompt_dropout: float | None = None
    window_dropout: float = 0.0
    layer_steps: int = 0
    distribution: float = 0.0
    progressive_steps: int = 0


@dataclass
class OptimConfig:
    """AdamW. Gates have their own group, without warm-up and weight decay.

    lr: the learning rate. gate_lr_factor: the gates' rate, as a multiple of lr. weight_decay: of all but the gates.
    warmup_steps: steps in which the rate rises from 0.
    schedule: "constant" or "cosine" (to zero at the last step). clip: largest gradient norm; None: no clipping.
    ema_decay: of the weights' moving average in fp32, which is used for samples and results; it warms up over the first
    steps. use_8bit_adam: keep AdamW's moments in 8 bits, by bitsandbytes; not with FSDP.
    """

    lr: float = 1e-4
    gate_lr_factor: float = 100.0
    weight_decay: float = 0.0
    warmup_steps: int = 100
    schedule: str = "constant"
    clip: float | None = 1.0
    ema_decay: float = 0.999
    use_8bit_adam: bool = False


@dataclass
class TrainConfig:
    """The training loop.

    steps: optimizer steps to run. batch_size: samples of one step, over all processes and accumulation steps.
    accumulation: parts of a step that run one after another, to hold fewer samples at a time.
    gradient_checkpointing: compute blocks a second time in the backward pass, in place of keeping all they made.
    precision: "no" (fp32) or "bf16" (autocast; frozen weights in bf16, trained weights in fp32).
    compile: torch.compile the model's blocks.
    peak_tflops: the device's dense peak, for the log's `mfu` (share of the peak in use); None: looked up by GPU name.
    seed: of new weights, and of all that is drawn. progress: show progress bars.
    """

    steps: int = 10_000
    batch_size: int = 8
    accumulation: int = 1
    gradient_checkpointing: bool = False
    precision: str = "no"
    compile: bool = False
    peak_tflops: float | None = None
    seed: int = 0
    progress: bool = True


@dataclass
class OutputConfig:
    """The files that a run writes, and how often.

    folder: for checkpoints, samples, the tracker's events and the result; None writes nothing.
    log_every, checkpoint_every, sample_every: in optimizer steps; 0 is never.
    keep: number of checkpoints to keep. samples: number of images in the sample grid.
    tracker: "tensorboard" or "wandb". project, run_name: what the tracker calls them. For W&B they go before the
        environment's WANDB_PROJECT and WANDB_NAME; None: those, or else "hybriddit" and the folder's name. For
        TensorBoard they name folders of the events.
    """

    folder: str | None = None
    log_every: int = 10
    checkpoint_every: int = 1000
    keep: int = 2
    sample_every: int = 0
    samples: int = 4
    tracker: str = "tensorboard"
    project: str | None = None
    run_name: str | None = None


@dataclass
class MetricsConfig:
    """A Fréchet distance of the averaged model's samples to reference images, logged as `fd` while it trains.

    every: optimizer steps from one measurement to the next; 0 is never.
    samples: number of samples, which the distance depends on. They are always from the same noise, with prompts or
        classes in turn, and sampled like the images of the sample grid.
    features: "inception" (FID, if `samples` is 50,000), or "package.module:function", a function of your own from
        uint8 [B, 3, H, W] to [B, F]; grey images come as three equal channels.
    reference: an npz file in ADM's layout; or a folder of images, cropped to the model's size as ADM does, which must be
        square. None: for a distillation, the teacher's images of the same prompts and noise; for training from scratch,
        the training set, if it holds images.
    batch_size: images at a time in each process.
    """

    every: int = 0
    samples: int = 10_000
    features: str = "inception"
    reference: str | None = None
    batch_size: int = 64


@dataclass
class DistillConfig:
    """Everything about one distillation run.

    hybrid: the fields of `hybriddit.HybridConfig`. Left out, they are the teacher's if that is hybrid already, else the
        defaults; a hybrid teacher with another config is refused. The section may also have `plan`: the path of a file
        of such fields, as `hybriddit analyze` writes it, of which those take part that the section itself lacks.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    hybrid: HybridConfig = field(default_factory=lambda: HYBRID)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self):
        _check_shared(self)
        data = self.data
        sources = sources_of("distill")
        _require(data.source in sources, "data.source", data.source, f"one of {', '.join(sources)}")
        _require(
            (data.folder is not None) == (SOURCES[data.source].reads == "folder"),
            "data.folder",
            data.folder,
            'a folder of images with data.source "folder", and left out with another',
        )
        for name in ("max_images", "buckets"):
            value = getattr(data, name)
            wanted = 'left out but with data.source "folder"'
            _require(value is None or data.folder is not None, f"data.{name}", value, wanted)
        if data.max_images is not None:
            _require_positive(data, "data", "max_images")
        if data.buckets is not None:
            _require(_are_buckets(data.buckets), "data.buckets", data.buckets, BUCKETS)
        _require(
            data.offload in (None, *OFFLOADS), "data.offload", data.offload, f"null or one of {', '.join(OFFLOADS)}"
        )
        _require_positive(data, "data", "images states height width steps batch_size")
        if data.max_sequence_length is not None:
            _require_positive(data, "data", "max_sequence_length")
        _require(data.guidance_scale >= 0, "data.guidance_scale", data.guidance_scale, "0 or more")
        _require(abs(data.seed) < MAX_SEED, "data.seed", data.seed, f"between -{MAX_SEED} and {MAX_SEED}")
        for name in ("task", "output", "layer", "distribution"):
            weight = getattr(self.loss, name)
            _require(weight is None or weight >= 0, f"loss.{name}", weight, "0 or more")
        steps = self.loss.layer_steps
        _require(
            0 <= steps <= self.train.steps, "loss.layer_steps", steps, f"from 0 to train.steps ({self.train.steps})"
        )
        steps = self.loss.progressive_steps
        wanted = f"from 0 to below train.steps ({self.train.steps}), in the last of which all layers learn"
        _require(0 <= steps < self.train.steps, "loss.progressive_steps", steps, wanted)
        if steps and self.loss.layer_steps:
            raise ValueError("loss.layer_steps and loss.progressive_steps are two ways to begin: set one of them to 0")
        for name in ("prompt_dropout", "window_dropout"):
            dropout = getattr(self.loss, name)
            _require(dropout is None or 0 <= dropout <= 1, f"loss.{name}", dropout, "in [0, 1]")


@dataclass
class ClassDataConfig:
    """The labelled images that a SiT is trained on.

    path: a cache that `hybriddit cache` made; or a folder of images, whose subfolders are the classes; or a folder of
        tars with images and their labels (`.cls`); or a folder of MNIST's files (train-images-idx3-ubyte.gz and so on,
        as torchvision and Debian have them). Images of a folder or tars are cropped to the model's sample_size as ADM
        does, and kept in memory; for larger sets make a cache.
    flip: mirror each image with probability one half.
    memory: read a cache into memory at the start; else its rows are read when they are needed.
    vae: folder or repository of the AutoencoderKL that made a cache of latents; it decodes the sample grids and is
        saved with the pipeline. None: the place that the cache records.
    """

    path: str = ""
    flip: bool = True
    memory: bool = False
    vae: str | None = None


@dataclass
class FlowConfig:
    """Flow matching, see `hybriddit.flow`.

    path: from noise to images: "linear", "gvp" or "vp". prediction: what the model gives: "velocity", "score", "noise" or
        "data".
    weighting: of the loss over times: "none", "velocity" or "likelihood".
    times: their distribution: "uniform" or "logit_normal". time_mean, time_std: of the logit of times that are
        "logit_normal". time_shift: above 1, it moves times towards noise.
    """

    path: str = "linear"
    prediction: str = "velocity"
    weighting: str = "none"
    times: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float = 1.0


@dataclass
class SiTOptimConfig(OptimConfig):
    """OptimConfig with the defaults of SiT's recipe."""

    gate_lr_factor: float = 1.0
    warmup_steps: int = 0
    clip: float | None = None
    ema_decay: float = 0.9999


@dataclass
class SiTTrainConfig(TrainConfig):
    """TrainConfig with the defaults of SiT's recipe."""

    steps: int = 400_000
    batch_size: int = 256


@dataclass
class SiTOutputConfig(OutputConfig):
    """OutputConfig; sample grids are made by Heun's ODE sampler.

    sample_steps: steps of that sampler. guidance: guidance scale of the grids; 1 is none.
    """

    log_every: int = 100
    checkpoint_every: int = 5000
    samples: int = 16
    sample_steps: int = 50
    guidance: float = 4.0


@dataclass
class SiTMetricsConfig(MetricsConfig):
    """MetricsConfig.

    guidance: guidance scale of these samples; 1 is none, as in published training curves.
    """

    guidance: float = 1.0


@dataclass
class SiTConfig:
    """Everything about the training of one SiT.

    model: the arguments of `hybriddit.SiTTransformer2DModel`.
    """

    job: str = "train"
    model: dict = field(default_factory=dict)
    data: ClassDataConfig = field(default_factory=ClassDataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: SiTOptimConfig = field(default_factory=SiTOptimConfig)
    train: SiTTrainConfig = field(default_factory=SiTTrainConfig)
    metrics: SiTMetricsConfig = field(default_factory=SiTMetricsConfig)
    output: SiTOutputConfig = field(default_factory=SiTOutputConfig)

    def __post_init__(self):
        _check_shared(self)
        from .. import flow  # imports torch, which DistillConfig does not need
        from ..models.sit import SiTTransformer2DModel

        known = [name for name in inspect.signature(SiTTransformer2DModel.__init__).parameters if name != "self"]
        for key in self.model:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                advice = f"did you mean model.{close[0]}?" if close else f"known here are {', '.join(known)}"
                raise ValueError(f"unknown key model.{key}: {advice}")
        for name, names in (
            ("path", flow.PATHS),
            ("prediction", flow.PREDICTIONS),
            ("weighting", flow.WEIGHTINGS),
            ("times", flow.TIME_DISTRIBUTIONS),
        ):
            value = getattr(self.flow, name)
            _require(value in names, f"flow.{name}", value, f"one of {', '.join(names)}")
        for name in ("time_std", "time_shift"):
            _require(getattr(self.flow, name) > 0, f"flow.{name}", getattr(self.flow, name), "above 0")
        _require_positive(self.output, "output", "sample_steps")
        for section in ("output", "metrics"):
            guidance = getattr(self, section).guidance
            _require(guidance >= 0, f"{section}.guidance", guidance, "0 or more")


BUCKETS = f'"{ASPECT}", or different sizes in pixels as [[height, width], ...]'


def _are_buckets(value: str | list[list[int]]) -> bool:
    if isinstance(value, str):
        return value == ASPECT
    sizes = {tuple(size) for size in value}
    return 0 < len(sizes) == len(value) and all(len(size) == 2 and min(size) > 0 for size in sizes)


JOBS = {"distill": DistillConfig, "train": SiTConfig}


def _check_shared(config) -> None:
    """Raise ValueError for impossible values in the sections that both kinds of config have."""
    train, optim, output, metrics = config.train, config.optim, config.output, config.metrics
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for name, value in vars(values).items() if dataclasses.is_dataclass(values) else ():
            endless = (section.name, name) == ("optim", "clip")  # which clips nothing
            finite = not isinstance(value, float) or math.isfinite(value) or (endless and value > 0)
            _require(finite, f"{section.name}.{name}", value, "a finite number")
    _require(train.precision in ("no", "bf16"), "train.precision", train.precision, "'no' or 'bf16'")
    _require(optim.schedule in ("constant", "cosine"), "optim.schedule", optim.schedule, "'constant' or 'cosine'")
    _require_positive(train, "train", "steps batch_size accumulation")
    _require_positive(output, "output", "log_every keep samples")
    for name in ("checkpoint_every", "sample_every"):
        _require(getattr(output, name) >= 0, f"output.{name}", getattr(output, name), "0 (never) or more")
    trackers = ("tensorboard", "wandb")
    _require(output.tracker in trackers, "output.tracker", output.tracker, f"one of {', '.join(trackers)}")
    for name in ("project", "run_name"):
        value = getattr(output, name)
        # what W&B and file systems refuse in names
        fits = value is None or (re.fullmatch(r"[^/\\#?%:*\"<>|\x00-\x1f]{1,128}", value) and set(value) - {".", " "})
        _require(fits, f"output.{name}", value, """a name without / \\ # ? % : * " < > |""")
    _require(optim.lr > 0, "optim.lr", optim.lr, "above 0")
    for name in ("gate_lr_factor", "weight_decay", "warmup_steps"):
        _require(getattr(optim, name) >= 0, f"optim.{name}", getattr(optim, name), "0 or more")
    _require(abs(train.seed) < MAX_SEED, "train.seed", train.seed, f"between -{MAX_SEED} and {MAX_SEED}")
    _require(optim.clip is None or optim.clip > 0, "optim.clip", optim.clip, "above 0")
    _require(0 <= optim.ema_decay < 1, "optim.ema_decay", optim.ema_decay, "in [0, 1)")
    _require(
        train.batch_size % train.accumulation == 0,
        "train.batch_size",
        train.batch_size,
        f"a multiple of train.accumulation ({train.accumulation})",
    )
    _require(train.peak_tflops is None or train.peak_tflops > 0, "train.peak_tflops", train.peak_tflops, "above 0")
    _require(metrics.every >= 0, "metrics.every", metrics.every, "0 (never) or more")
    _require(metrics.samples >= 2, "metrics.samples", metrics.samples, "at least 2")
    _require_positive(metrics, "metrics", "batch_size")
    _require(
        metrics.features == "inception" or re.fullmatch(r"[\w.]+:\w+", metrics.features) is not None,
        "metrics.features",
        metrics.features,
        "'inception' or 'package.module:function'",
    )


def load_config(
    path: str | Path, overrides: typing.Sequence[str] = (), job: str | None = None
) -> DistillConfig | SiTConfig:
    """Read a run's YAML file and apply dotted overrides ("optim.lr=1e-4") to it.

    A file with `job: train` is a SiTConfig, any other a DistillConfig. job: "distill" or "train" accepts only that one.

    Raises FileNotFoundError; and ValueError, in one line that names the key, for an unknown key (suggesting the nearest
    one), a wrong type or an impossible value.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}")
    for override in overrides:
        if "=" not in override or override.startswith(("-", "=")):
            raise ValueError(f"override {override!r} is not of the form section.key=value")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not a readable config: {' '.join(str(error).split())}") from None
    except Exception as error:  # the YAML parser's own errors have no common public base
        if not type(error).__module__.startswith("yaml"):
            raise
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    found = values.get("job", "distill") if isinstance(values, dict) else "distill"
    _require(found in JOBS, "job", found, f"one of {', '.join(JOBS)}")
    if job not in (None, found):
        raise ValueError(f"{path} is a config of `hybriddit {found}`, not of `hybriddit {job}`")
    if found == "distill" and isinstance(values, dict):
        values.pop("job", None)
        if isinstance(section := values.get("hybrid"), dict) and "plan" in section:
            values["hybrid"] = _with_plan(section)
    return _build(JOBS[found], values, "")


def _with_plan(section: dict) -> dict:
    """The `hybrid` section with the fields of its plan's file, where it has none of its own. Raises as `load_config`."""
    fields = dict(section)
    plan = fields.pop("plan")
    _require(isinstance(plan, str), "hybrid.plan", plan, "the path of a plan's file")
    HybridConfig.from_plan(plan)  # what is wrong with it is said with its name; the fields that it lacks stay open
    planned = {name: value for name, value in read_plan(plan).items() if not name.startswith("_")}
    return {**planned, **fields}


def describe_keys(job: str) -> str:
    """The keys of a job's config with their defaults and what their classes' documentation says of them, a line each."""
    lines = ["keys of the config file, with their defaults (docs/api.md says more of each):"]
    for section, kind in typing.get_type_hints(JOBS[job]).items():
        if not dataclasses.is_dataclass(kind):
            if told := documented_fields(JOBS[job]).get(section):
                lines += ["", f"  {section}: {told}"]
            continue
        root = next(base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base))
        lines += ["", f"  {section}: {inspect.getdoc(root).splitlines()[0]}"]
        documented = documented_fields(kind)
        for name, default in dataclasses.asdict(kind()).items():
            told = textwrap.shorten(documented[name], 86, placeholder=" ...")
            lines.append(f"    {f'{name}={json.dumps(default)}':<29} {told}")
    return "\n".join(lines)


def documented_fields(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of its fields, in entries of the form "name, name: text"."""
    names = "|".join(f.name for f in dataclasses.fields(kind))
    entry = re.compile(rf"(?:^|(?<=\. )|(?<=\n)) *((?:{names})(?:, (?:{names}))*):\s")
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, kind.__mro__):
        for paragraph in inspect.getdoc(base).split("\n\n"):
            _, *parts = entry.split(paragraph)
            for keys, text in zip(parts[::2], parts[1::2], strict=True):
                found = {**dict.fromkeys(keys.split(", "), " ".join(text.split())), **found}
    return found


def to_dict(config: DistillConfig | SiTConfig) -> dict:
    """The config as plain values, which `load_config` can read."""
    return dataclasses.asdict(config)


def _build(cls: type, values, prefix: str, root: type | None = None):
    """Build a dataclass from a mapping, with keys and types checked. root: the whole config's class, for advice."""
    _require(isinstance(values, dict), prefix.rstrip(".") or "the config", values, "a mapping of keys")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    built = {}
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"unknown key {prefix}{key}: {_nearest(prefix + str(key), names, root or cls)}")
        if (key, value) == ("precision", False):
            value = "no"  # a bare no is false to YAML
        built[key] = _convert(value, hints[key], prefix + key, root or cls)
    return cls(**built)


def _convert(value, hint, key: str, root: type):
    """Convert `value` to the annotated type, losslessly only (int to float, list to tuple)."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key + ".", root)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin, arguments = typing.get_origin(option) or option, typing.get_args(option)
        if origin is float and type(value) in (int, float):
            return float(value)
        if origin is tuple and isinstance(value, (list, tuple)) and [type(v) for v in value] == list(arguments):
            return tuple(value)
        if origin is list and isinstance(value, list) and all(_is_of(v, arguments[0]) for v in value):
            return value
        if origin in (int, str, bool, dict, types.NoneType) and type(value) is origin:
            return value
    names = ["null" if o is types.NoneType else str(o) if typing.get_args(o) else o.__name__ for o in options]
    expected = " or ".join(names)
    raise ValueError(f"{key} must be {expected}, got {value!r}")


def _is_of(value, hint) -> bool:
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_is_of(v, typing.get_args(hint)[0]) for v in value)
    return type(value) is hint


def _nearest(key: str, siblings: list[str], root: type) -> str:
    """Advice for the error about an unknown dotted key of `root`."""
    *section, name = key.split(".")
    close = difflib.get_close_matches(name, siblings, n=1)
    if close:
        return f"did you mean {'.'.join([*section, close[0]])}?"
    sections = {name: hint for name, hint in typing.get_type_hints(root).items() if dataclasses.is_dataclass(hint)}
    every = [f"{name}.{f.name}" for name, hint in sections.items() for f in dataclasses.fields(hint)]
    elsewhere = [known for known in every if known.split(".")[1] == name] or difflib.get_close_matches(key, every, n=1)
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"known here are {', '.join(siblings)}"


def _require_positive(section, name: str, fields: str) -> None:
    for field_name in fields.split():
        value = getattr(section, field_name)
        _require(value >= 1, f"{name}.{field_name}", value, "at least 1")


def _require(holds: bool, key: str, value, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{key} must be {wanted}, got {value!r}")
