"""Load pipelines from folders and hub repositories, from safetensors only, with every failure told in one line."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate.utils import compare_versions
from diffusers import DiffusionPipeline
from diffusers.pipelines.pag.pag_utils import PAGMixin
from huggingface_hub import hf_hub_download, model_info
from safetensors import SafetensorError

from ..config import HybridConfig
from ..files import read_json
from ..models import SiTTransformer2DModel, families
from ..models.adapters import check_adapter_fits
from ..models.family import Family, component_names, family_of_class, find_published
from ..stored import (
    MODULAR_INDEX,
    PICKLED,
    checkpoint_hint,
    choose_variant,
    component_classes,
    find_adapter,
    model_folders,
    stored_dtype,
    tensor_headers,
    variants_of,
    weight_files,
)
from .sit import SiTPipeline

DAMAGE = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, SafetensorError)
# components that may be missing from a pipeline's model_index.json; whether it works without is checked when it is used
OPTIONAL = tuple(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))


@dataclass(frozen=True)
class Base:
    """A text-to-image pipeline that was found and checked, but not loaded.

    path: as it was given. folder: the folder or hub repository of the pipeline; for a single file, of its other parts.
    file: a single-file checkpoint, or None. index: the content of model_index.json.
    variant: of the weights' files, such as "fp16"; None: those without a variant's name.
    note: what there was to choose from, if there was a choice.
    """

    path: str
    folder: str
    file: Path | None
    index: dict[str, Any]
    variant: str | None
    note: str | None

    @property
    def pipeline_class(self) -> type[DiffusionPipeline]:
        """The class that model_index.json names. Raises ValueError where neither diffusers nor a family has it."""
        name = self.index.get("_class_name")
        known = {made.__name__: made for family in families() for made in family.pipeline_classes()}
        found = known.get(str(name)) or getattr(diffusers, str(name), None)
        if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
            raise ValueError(f"{self.path} is a {name}, which diffusers {diffusers.__version__} does not have")
        return found

    @property
    def component(self) -> str:
        """What the pipeline calls its transformer or UNet."""
        kinds = component_classes(self.index)
        return next((name for name in component_names() if name in kinds), "transformer")

    @property
    def transformer_class(self) -> str | None:
        """The name of the transformer's class; None for a pipeline without a transformer."""
        return component_classes(self.index).get(self.component)

    @property
    def is_hybrid(self) -> bool:
        """Whether the pipeline was saved with a hybrid transformer."""
        family = family_of_class(self.transformer_class)
        return family is not None and self.transformer_class == family.hybrid_class.__name__

    @property
    def family(self) -> Family | None:
        """The family of its transformer. Raises what `read_part` does where it has to read the transformer's config."""
        return family_of_class(self.transformer_class, lambda: self.read_part(self.component))

    def hybrid_config(self) -> HybridConfig | None:
        """The config of a pipeline that is hybrid already; None for a dense one."""
        if not self.is_hybrid:
            return None
        return HybridConfig.from_saved(self.read_part(self.component).get("hybrid_config") or {})

    def read_part(self, name: str, file: str = "config.json") -> dict[str, Any]:
        """What a component's JSON file holds. Raises FileNotFoundError where the folder does not have it."""
        path = Path(self.folder, name, file)
        if not Path(self.folder).is_dir():
            path = Path(hf_hub_download(self.folder, f"{name}/{file}"))
        elif not path.is_file():
            raise FileNotFoundError(f"no {path}: the pipeline folder is not whole")
        return read_json(path)

    def shapes(self) -> tuple[torch.nn.Module, int]:
        """The transformer on the meta device, without weights, and the pixels per latent.

        Raises ValueError for a transformer of no family, and where its config is damaged.
        """
        family, values = _family(self), self.read_part(self.component)
        made = family.hybrid_class if self.is_hybrid else family.dense_class
        pixels = 8  # what diffusers' pipelines go by without a VAE
        if component_classes(self.index).get("vae"):
            pixels = family.latent_pixels(self.read_part("vae"))
        try:
            with torch.device("meta"):
                return made.from_config(values), pixels
        except DAMAGE as error:
            raise ValueError(f"the pipeline at {self.path!r} does not load: its transformer: {error}") from error


def find_base(path: str, *, variant: str | None = None, config: str | None = None) -> Base:
    """Find a text-to-image pipeline, dense or hybrid, without loading it.

    path: a folder or a hub repository of diffusers' layout, or a single-file checkpoint in safetensors.
    variant: the variant of the weights' files; None: see `stored.choose_variant`.
    config: for a single file, a folder or repository of the same kind of model in diffusers' layout, which has its
        other parts.

    Raises FileNotFoundError or ValueError, in one line, where there is none, or where its weights are not in
    safetensors.
    """
    refuse_sit(path)
    refuse_modular(path)
    file = Path(path) if Path(path).is_file() else None
    if file is not None:
        _check_single_file(file, config)
    elif config is not None:
        raise ValueError(f"a config is for a single-file checkpoint, and {path!r} is none: leave it out")
    folder = str(config if file else path)
    if _is_local(folder):
        if not Path(folder, "model_index.json").is_file():
            raise FileNotFoundError(f"no diffusers pipeline at {folder!r}: {_what_instead(Path(folder))}")
        index = read_json(Path(folder, "model_index.json"))
        parts = {name: os.listdir(part) for name, part in model_folders(Path(folder), index).items()}
    else:
        index, parts = _read_repository(folder)
    if file:  # what the folder lacks is in the file
        parts = {name: files for name, files in parts.items() if name not in component_names() and variants_of(files)}
    base = Base(path, folder, file, index, *choose_variant(parts, variant, folder))
    if file and base.is_hybrid:
        raise ValueError(f"{folder} is a hybrid pipeline, and the config of a single file is a dense one")
    return base


def load_base(
    base: Base, dtype: torch.dtype | None = torch.float32, *, without: Collection[str] = ()
) -> DiffusionPipeline:
    """Load what `find_base` found. dtype: None keeps each component's, as it is stored. without: components to leave out.

    Raises ValueError, in one line, where it does not load.
    """
    missing = f"the pipeline at {base.path!r} does not load"
    made = base.pipeline_class
    if base.component not in without:
        check_known(base)
    # diffusers wants to be told of the components that a pipeline does without, such as SD3's third text encoder
    absent = {name for name, kind in component_classes(base.index).items() if kind is None}
    absent |= {name for name in OPTIONAL if name not in base.index} | set(without)
    if base.file is None:  # a single file may have them
        absent |= {"vae", "scheduler"} - base.index.keys()
    parts = {name: None for name in inspect.signature(made.__init__).parameters if name in absent}
    options = {"use_safetensors": True, "variant": base.variant}
    try:
        folder = base.folder
        if dtype is None and not Path(folder).is_dir():
            folder = DiffusionPipeline.download(folder, **options)
        dtypes = dtype or _stored_dtypes(Path(folder), base)
        if base.file is None:
            pipeline = made.from_pretrained(base.folder, dtype=dtypes, **options, **parts)
        else:
            pipeline = _load_single_file(base, dtypes, parts, options)
            pipeline.register_to_config(_name_or_path=base.path)
    # a damaged config, or a package for a quantised model that is not there, shows in diffusers as any of these
    except (*DAMAGE, ImportError) as error:
        raise ValueError(f"{missing}: {error}") from error
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            check_whole(part, f"{missing}: its {name}")
    return pipeline


def check_known(base: Base) -> None:
    """Raise ValueError for a transformer saved by a newer diffusers, of which this one would ignore settings or weights."""
    if base.file is not None or base.family is None:
        return
    values = base.read_part(base.component)
    saved = str(values.get("_diffusers_version"))
    try:
        if compare_versions("diffusers", ">=", saved):
            return
    except ValueError:  # no version
        return
    model, _ = base.shapes()
    known = {*inspect.signature(type(model).__init__).parameters, "hybrid_config", "quantization_config"}
    unknown = [f"setting {name}" for name in values if name not in known and not name.startswith("_")]
    folder = Path(base.folder, base.component)
    if folder.is_dir() and "quantization_config" not in values:  # which splits weights up
        weights = [name for file in weight_files(folder, base.variant) for name in tensor_headers(file)]
        known = model.state_dict().keys()
        unknown += [f"weight {name}" for name in weights if name not in known]
    if unknown:
        raise ValueError(
            f"the pipeline at {base.path!r} has what the {type(model).__name__} of diffusers {diffusers.__version__} does not "
            f"know ({', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''}): it was saved by diffusers {saved}; "
            "upgrade diffusers"
        )


def check_whole(model: torch.nn.Module, where: str) -> None:
    """Raise ValueError, naming one, where a model has weights that its files did not have."""
    lacking = [name for name, weight in model.named_parameters() if weight.is_meta]
    if lacking:
        raise ValueError(f"{where} lacks {len(lacking)} of its weights ({', '.join(lacking[:3])})")


def load_pipeline(
    path: str, dtype: torch.dtype | None = torch.float32, *, variant: str | None = None, config: str | None = None
) -> DiffusionPipeline:
    """Load a text-to-image pipeline, dense or hybrid, of diffusers or a registered family.

    Takes and raises what `find_base` and `load_base` do, and prints a note where there are variants to choose from.
    """
    base = find_base(path, variant=variant, config=config)
    if base.note:
        print(f"note: {base.note}", file=sys.stderr)
    return load_base(base, dtype)


def check_parts(
    kind: type[DiffusionPipeline],
    components: Mapping[str, Any],
    needed: Sequence[str] | None = None,
) -> None:
    """Raise ValueError for a pipeline without a component that is needed, of those that its class takes.

    components: by name; a missing one is None. needed: None: its model, VAE and scheduler.
    """
    for name in needed or (*component_names(), "vae", "scheduler"):
        if name in inspect.signature(kind.__init__).parameters and components.get(name) is None:
            raise ValueError(f"this pipeline has no {name}, which a {kind.__name__} needs")


def text_to_image(base: Base) -> Base:
    """The pipeline as the text-to-image pipeline of its family, which distillation trains for.

    Raises ValueError for a transformer of no family, and for pipelines that do something else with it.
    """
    family, kind = _family(base), base.pipeline_class
    if kind not in family.pipeline_classes():
        raise ValueError(
            f"{base.path} is a {kind.__name__}: distillation is for the text-to-image pipeline of its transformer, "
            f"{family.pipeline_name}"
        )
    made = family.pipelines_like(kind)["text-to-image"]
    return replace(base, index={**base.index, "_class_name": made.__name__})


def check_convertible(
    base: Base, config: HybridConfig, base_class: str | None = None, adapter: str | None = None
) -> None:
    """Raise ValueError for a pipeline that does not become, or already is, a hybrid of this config.

    adapter: whose config it is; its weights may go into a hybrid that has the same. base_class: the class it is for.
    """
    kind = base.pipeline_class
    if base.transformer_class is None:
        raise ValueError(f"{base.path} is a {kind.__name__}, which has no diffusion transformer to convert")
    family = _family(base)
    if adapter is not None and base_class != family.dense_class.__name__:
        raise ValueError(f"the adapter in {adapter} is for {base_class}, the model is a {family.dense_class.__name__}")
    check_takes_hybrid(kind)
    own = base.hybrid_config()
    if own is not None and adapter is None:
        raise ValueError(f"{base.path} is hybrid already: give the dense pipeline that it was made from")
    if own not in (None, config):
        raise ValueError(f"{base.path} is hybrid with another config than {adapter}: give the dense pipeline")
    if adapter is not None:
        check_adapter_fits(base.shapes()[0], config, adapter)


def _family(base: Base) -> Family:
    family = base.family
    if base.transformer_class is None:
        raise ValueError(
            f"{base.path} is a {base.index.get('_class_name')}, which has no diffusion transformer to distill"
        )
    if family is None:
        supported = ", ".join(dict.fromkeys(family.dense_class.__name__ for family in families()))
        raise ValueError(
            f"{base.path}: its transformer is a {base.transformer_class}, which is not supported: {supported} are"
        )
    return family


def check_takes_hybrid(kind: type[DiffusionPipeline]) -> None:
    """Raise ValueError for a class of pipelines in which a hybrid transformer would be dense."""
    if issubclass(kind, PAGMixin):
        raise ValueError(
            f"a {kind.__name__} replaces attention processors, which takes hybrid attention out: use the pipeline "
            "without PAG"
        )


def _check_single_file(file: Path, config: str | None) -> None:
    if file.suffix in PICKLED:
        raise ValueError(f"{file} is pickled, and nothing pickled is loaded: convert it to safetensors")
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is no folder, repository or .safetensors file")
    if config is None:
        raise ValueError(
            f"{file} is a single file: give a config too, a folder or repository of the same kind of model in "
            "diffusers' layout, which has its other parts (generate and convert: --config, distill: model.config)"
        )
    tensor_headers(file)


def _load_single_file(
    base: Base, dtypes: torch.dtype | dict[str, torch.dtype], parts: dict[str, None], options: dict[str, Any]
) -> DiffusionPipeline:
    """Load a single-file checkpoint by diffusers' `from_single_file`; what is not in the file from its config."""
    whole = any(key.startswith(("first_stage_model.", "vae.")) for key in tensor_headers(base.file))
    kind = base.pipeline_class if whole else getattr(diffusers, str(base.transformer_class), None)
    if not hasattr(kind, "from_single_file"):
        name = base.pipeline_class.__name__ if whole else base.transformer_class
        raise ValueError(f"diffusers loads no {name} from a single file")
    if not whole and base.component in parts:  # left out: the file is not read
        return base.pipeline_class.from_pretrained(base.folder, dtype=dtypes, **options, **parts)
    dtype = dtypes[base.component] if isinstance(dtypes, dict) else dtypes
    local = {"config": base.folder, "local_files_only": Path(base.folder).is_dir()}
    try:
        if whole:
            return kind.from_single_file(str(base.file), dtype=dtype, **local, **parts)
        transformer = kind.from_single_file(str(base.file), dtype=dtype, subfolder=base.component, **local)
    except Exception as error:  # diffusers' conversion fails in any way on a file of another model
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no {kind.__name__} in it: {type(error).__name__}: {reason}") from error
    check_whole(transformer, f"a {kind.__name__} in it")
    parts = {**parts, base.component: transformer}
    return base.pipeline_class.from_pretrained(base.folder, dtype=dtypes, **options, **parts)


def _stored_dtypes(folder: Path, base: Base) -> dict[str, torch.dtype]:
    """The dtype of each component as it is stored, by name."""
    files = model_folders(folder, base.index)
    if base.file is not None:
        files = {name: part for name, part in files.items() if variants_of(os.listdir(part))}
    found = {name: stored_dtype(weight_files(part, base.variant)) for name, part in files.items()}
    if base.file is not None:
        found[base.component] = stored_dtype([base.file])
    return {name: getattr(torch, dtype) for name, dtype in found.items()}


def _read_repository(name: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """model_index.json of a hub repository, and the names of its components' files; none where the hub is not there."""
    try:
        index = DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no folder {name!r}, and it could not be fetched from the hub: {error}") from error
    try:
        files = [file.rfilename for file in model_info(name).siblings or ()]
    except Exception:  # of any library below: the hub is not there, but diffusers may find the repository in its cache
        files = []
    parts: dict[str, list[str]] = {}
    for file in files:
        part, _, rest = file.partition("/")
        if f"{part}/config.json" in files and component_classes(index).get(part):
            parts.setdefault(part, []).append(rest)
    return index, parts


def load_sit_pipeline(
    path: str | os.PathLike, dtype: torch.dtype = torch.float32, *, variant: str | None = None
) -> SiTPipeline:
    """Load a SiTPipeline from its folder, from a training run's folder or from a hub repository.

    variant: of a folder's weights, see `stored.choose_variant`; of a repository's, as diffusers takes it.

    Raises FileNotFoundError or ValueError, in one line, where there is none.
    """
    folder = find_sit_pipeline(path)
    if folder is None and (name := saved_class(Path(path))):
        missing = "it takes no class labels, give generate a --prompt"
        if name == SiTTransformer2DModel.__name__:
            missing = "save one with SiTPipeline(transformer, vae).save_pretrained(folder)"
        raise ValueError(f"{str(path)!r} is a {name}, not a SiTPipeline: {missing}")
    if folder is None and _is_local(path):
        raise FileNotFoundError(
            f"no SiTPipeline at {str(path)!r}: neither the folder nor pipeline/ in it holds one{checkpoint_hint(Path(path))}"
        )
    if folder is not None:
        parts = model_folders(folder, read_json(folder / "model_index.json"))
        variant, _ = choose_variant({name: os.listdir(part) for name, part in parts.items()}, variant, str(folder))
    try:
        return SiTPipeline.from_pretrained(folder or path, dtype=dtype, variant=variant)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"the pipeline at {str(path)!r} does not load: {error}") from error


def silence_libraries() -> None:
    """Hide the libraries' progress bars, and their messages except errors."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    disable_progress_bars()


@contextmanager
def quiet(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Hide the pipeline's own progress bar within the block."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def find_sit_pipeline(path: str | os.PathLike) -> Path | None:
    """The folder of a saved SiTPipeline: `path`, or `path`/pipeline as in a training run's folder; None if neither."""
    folders = (Path(path), Path(path, "pipeline"))
    return next((folder for folder in folders if saved_class(folder) == SiTPipeline.__name__), None)


def saved_class(folder: Path) -> str | None:
    """The class name of the pipeline, or else of the model, that was saved to a folder; None if neither was."""
    found = (folder / name for name in ("model_index.json", "config.json"))
    return next((read_json(path).get("_class_name") for path in found if path.is_file()), None)


def refuse_sit(path: str | os.PathLike) -> None:
    """Raise ValueError if `path` holds a SiT, where a text-to-image pipeline is wanted."""
    name = saved_class(find_sit_pipeline(path) or Path(path))
    if name in (SiTPipeline.__name__, SiTTransformer2DModel.__name__):
        raise ValueError(
            f"{str(path)!r} is a {name}, which makes images of classes (hybriddit generate --class-label): prompts, "
            "convert and distill are for text-to-image pipelines"
        )


def refuse_modular(path: str) -> None:
    """Raise ValueError for a modular pipeline: a folder of one, or a repository of models that have no other."""
    family, _ = find_published(path) or (None, None)
    if Path(path).is_dir():
        modular = Path(path, MODULAR_INDEX).is_file() and not Path(path, "model_index.json").is_file()
    else:
        modular = family is not None and not family.pipelines
    if modular:
        raise ValueError(
            f"{path!r} is a modular pipeline of diffusers, which the commands do not load: in Python, hybridize and "
            "load_adapter take its transformer (docs/convert.md)"
        )


def _what_instead(folder: Path) -> str:
    """What a folder without a pipeline needs, or is."""
    try:
        find_adapter(folder)
    except (OSError, ValueError):
        return "it needs a model_index.json"
    return (
        "it holds an adapter, which needs the model that it was distilled from (generate and convert take both: --model "
        "MODEL --adapter FOLDER)"
    )


def _is_local(path: str | os.PathLike) -> bool:
    """Whether the path can only be a folder: it exists, or does not have the form "owner/name" of a repository."""
    return Path(path).exists() or Path(path).is_absolute() or str(path).count("/") != 1
