"""The configuration of a distillation run: dataclasses; YAML plus dotted overrides; an unknown key is an error."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import HybridConfig


@dataclass
class ModelConfig:
    """path: repository id or folder of the diffusers pipeline that is the teacher.

    recipe: a row of `hybriddit.training.recipes.RECIPES`; None tells it from the transformer.
    """

    path: str = ""
    recipe: str | None = None


@dataclass
class DataConfig:
    """What is learned from.

    source: "teacher" (images that the teacher makes of the prompts), "folder" (images of your own with captions) or
        "trajectories" (the teacher's way from noise to its images of the prompts, which needs no VAE).
    folder: of images, for "folder"; captions in <image>.txt or in metadata.jsonl.
    states: for "trajectories", how many inputs of the transformer are kept of each.
    prompts: a text file with one prompt a line, or the prompts themselves; repeated with new seeds up to `images`.
    cache: folder to keep the latents and prompt embeddings in, reused if it holds them already; None keeps them in
        memory.
    height, width: in pixels. steps: of the teacher's sampler. guidance_scale: as the pipeline's own argument.
    max_sequence_length: text tokens; None is the pipeline's default.
    batch_size: images the teacher makes at a time. seed: image i is made from seed + i.
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


@dataclass
class LossConfig:
    """Weights of the three losses, and how often the prompt is dropped; None is the recipe's own value."""

    task: float | None = None
    output: float | None = None
    layer: float | None = None
    prompt_dropout: float | None = None


@dataclass
class OptimConfig:
    """AdamW. Gates have their own group: gate_lr_factor times the rate, no warm-up, no decay.

    schedule: "constant" or "cosine" (to zero at the last step). clip: largest gradient norm.
    ema_decay: of the fp32 average that is sampled and saved; warmed up over the first steps.
    """

    lr: float = 1e-4
    gate_lr_factor: float = 100.0
    weight_decay: float = 0.0
    warmup_steps: int = 100
    schedule: str = "constant"
    clip: float = 1.0
    ema_decay: float = 0.999


@dataclass
class TrainConfig:
    """batch_size: samples of one optimizer step, over all processes and accumulation steps.

    precision: "no" (fp32) or "bf16" (frozen weights in bf16, trained weights in fp32, autocast).
    """

    steps: int = 10_000
    batch_size: int = 8
    accumulation: int = 1
    gradient_checkpointing: bool = False
    precision: str = "no"
    seed: int = 0
    progress: bool = True


@dataclass
class OutputConfig:
    """folder: where checkpoints, samples, TensorBoard events and the adapter go; None writes nothing.

    Every `*_every` counts optimizer steps; 0 is never. keep: checkpoints kept. samples: prompts of the sample grid.
    """

    folder: str | None = None
    log_every: int = 10
    checkpoint_every: int = 1000
    keep: int = 2
    sample_every: int = 0
    samples: int = 4


@dataclass
class DistillConfig:
    """Everything about one distillation run. `hybrid` takes the fields of `hybriddit.HybridConfig`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    hybrid: HybridConfig = field(default_factory=HybridConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self):
        train, optim, data, output = self.train, self.optim, self.data, self.output
        _require(train.precision in ("no", "bf16"), "train.precision", train.precision, "'no' or 'bf16'")
        _require(optim.schedule in ("constant", "cosine"), "optim.schedule", optim.schedule, "'constant' or 'cosine'")
        sources = ("teacher", "folder", "trajectories")
        _require(data.source in sources, "data.source", data.source, f"one of {', '.join(sources)}")
        _require(
            (data.folder is not None) == (data.source == "folder"),
            "data.folder",
            data.folder,
            'a folder of images with data.source "folder", and left out with another',
        )
        for section, names in (
            (train, "train.steps train.batch_size train.accumulation"),
            (data, "data.images data.states data.height data.width data.steps data.batch_size"),
            (output, "output.log_every output.keep output.samples"),
        ):
            for name in names.split():
                value = getattr(section, name.split(".")[1])
                _require(value >= 1, name, value, "at least 1")
        for name in ("checkpoint_every", "sample_every"):
            _require(getattr(output, name) >= 0, f"output.{name}", getattr(output, name), "0 (never) or more")
        for name in ("task", "output", "layer"):
            weight = getattr(self.loss, name)
            _require(weight is None or weight >= 0, f"loss.{name}", weight, "0 or more")
        dropout = self.loss.prompt_dropout
        _require(dropout is None or 0 <= dropout <= 1, "loss.prompt_dropout", dropout, "in [0, 1]")
        _require(optim.lr > 0, "optim.lr", optim.lr, "above 0")
        _require(optim.clip > 0, "optim.clip", optim.clip, "above 0")
        _require(0 <= optim.ema_decay < 1, "optim.ema_decay", optim.ema_decay, "in [0, 1)")
        _require(
            train.batch_size % train.accumulation == 0,
            "train.batch_size",
            train.batch_size,
            f"a multiple of train.accumulation ({train.accumulation})",
        )


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> DistillConfig:
    """Read a run's YAML file and lay dotted overrides ("optim.lr=1e-4") over it.

    Raises FileNotFoundError, or ValueError with one line that names the key: unknown (and the nearest right one), of
    the wrong type, or with an impossible value.
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
    return _build(DistillConfig, values, "")


def to_dict(config: DistillConfig) -> dict:
    """Plain values, as `load_config` reads them."""
    return dataclasses.asdict(config)


def _build(cls: type, values, prefix: str):
    """A dataclass from a mapping, its keys and types checked."""
    _require(isinstance(values, dict), prefix.rstrip(".") or "the config", values, "a mapping of keys")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    built = {}
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"unknown key {prefix}{key}: {_nearest(prefix + str(key), names)}")
        built[key] = _convert(value, hints[key], prefix + key)
    return cls(**built)


def _convert(value, hint, key: str):
    """`value` as the annotated type; only lossless conversions (int to float, list to tuple)."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key + ".")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin, arguments = typing.get_origin(option) or option, typing.get_args(option)
        if origin is float and type(value) in (int, float):
            return float(value)
        if origin is tuple and isinstance(value, (list, tuple)) and [type(v) for v in value] == list(arguments):
            return tuple(value)
        if origin is list and isinstance(value, list) and all(isinstance(v, arguments[0]) for v in value):
            return value
        if origin in (int, str, bool, dict, types.NoneType) and type(value) is origin:
            return value
    expected = " or ".join("null" if o is types.NoneType else getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{key} must be {expected}, got {value!r}")


def _nearest(key: str, siblings: list[str]) -> str:
    """Advice on an unknown dotted key."""
    *section, name = key.split(".")
    close = difflib.get_close_matches(name, siblings, n=1)
    if close:
        return f"did you mean {'.'.join([*section, close[0]])}?"
    hints = typing.get_type_hints(DistillConfig)
    every = [f"{part}.{f.name}" for part, hint in hints.items() for f in dataclasses.fields(hint)]
    elsewhere = [known for known in every if known.split(".")[1] == name] or difflib.get_close_matches(key, every, n=1)
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"known here are {', '.join(siblings)}"


def _require(holds: bool, key: str, value, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{key} must be {wanted}, got {value!r}")
