"""What a saved pipeline holds, by the names and headers of its files: components, variants, dtypes; adapters."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from .files import read_json

# model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, and diffusers' older
# model-00001-of-00002.fp16.safetensors
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.([^.]+?))?(?:-\d{5}-of-\d{5})?(?:\.([^.]+?))?\.safetensors"
)
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
ADAPTER_FILES = ("hybrid_config.json", "hybrid_adapter.safetensors")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


MODULAR_INDEX = "modular_model_index.json"  # of diffusers' modular pipelines, whose parts may be anywhere


def component_classes(index: Mapping[str, Any]) -> dict[str, str | None]:
    """The class of each component by its name, from a model_index.json; None for one that the pipeline does without."""
    # [library, class], both of them null where there is none; pipelines have settings that are lists, too
    pairs = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    names = {name: entry for name, entry in pairs.items() if all(isinstance(part, str | None) for part in entry)}
    return {name: entry[1] for name, entry in names.items() if not name.startswith("_")}


def model_folders(folder: Path, index: Mapping[str, Any]) -> dict[str, Path]:
    """The folders of a pipeline's components that have weights, by name. index: its model_index.json.

    Raises ValueError where a component's folder is missing.
    """
    found = {}
    for name in (name for name, kind in component_classes(index).items() if kind is not None):
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} lacks the folder of its {name}")
        if (folder / name / "config.json").is_file():  # a tokenizer or a scheduler has none
            found[name] = folder / name
    return found


def variants_of(names: Iterable[str]) -> set[str | None]:
    """The variants of weights, such as "fp16", among the names of one component's files; None: those without a name."""
    matches = (WEIGHTS.fullmatch(name) for name in names)
    return {match[1] or match[2] for match in matches if match}


def choose_variant(
    components: Mapping[str, Iterable[str]], wanted: str | None, where: str
) -> tuple[str | None, str | None]:
    """Choose the variant to load. Returns it (None: the files without a name), and a note if there are others.

    components: the names of each component's files. A component without files of the chosen variant takes its files
    without a name. wanted: the variant that was asked for; None: the files without a name where every component has
    them, else the first variant, in the order of names, with which every component has weights.

    Raises ValueError, in one line, where no choice gives every component its weights in safetensors.
    """
    have = {name: variants_of(files) for name, files in components.items()}
    for name, variants in have.items():
        if not variants:
            pickled = sorted(file for file in components[name] if file.endswith(PICKLED))
            hint = f": {pickled[0]} is pickled and is not loaded" if pickled else ""
            raise ValueError(f"{where}: its {name} has no weights in safetensors{hint}")
    named = sorted({variant for variants in have.values() for variant in variants if variant})
    whole = [variant for variant in (None, *named) if all({variant, None} & variants for variants in have.values())]
    if wanted is not None:
        if wanted not in named:
            there = f"it has {', '.join(named)}" if named else "it has none"
            raise ValueError(f"{where} has no variant {wanted!r}: {there}")
        if wanted not in whole:
            lacks = next(name for name, variants in have.items() if not {wanted, None} & variants)
            raise ValueError(
                f"{where}: its {lacks} has neither weights of the variant {wanted!r} nor without a variant"
            )
        return wanted, None
    if not whole:
        raise ValueError(f"no variant gives every component of {where} its weights: there are {', '.join(named)}")
    chosen = whole[0]
    others = [variant for variant in named if variant != chosen]
    if not others:
        return chosen, None
    taken = "the files without a variant's name were" if chosen is None else f"the variant {chosen} was"
    return chosen, f"{where} also has the variant {' and '.join(others)}: {taken} chosen (see --variant)"


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that loading a component's folder would read.

    variant: files without a name are taken where the folder has none of it. Raises ValueError where files are missing.
    """
    names = [path.name for path in folder.iterdir()]
    chosen = variant if variant in variants_of(names) else None
    for stem in ("diffusion_pytorch_model", "model"):
        point = f".{chosen}" if chosen else ""
        index = next(
            (
                folder / name
                for name in (f"{stem}.safetensors.index{point}.json", f"{stem}.safetensors{point}.index.json")
                if name in names
            ),
            None,
        )
        if index is not None:
            parts = read_json(index).get("weight_map")
            if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
                raise ValueError(f"{index} is damaged: it says of no weights which file holds them")
            files = sorted({folder / name for name in parts.values()})
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ValueError(f"{folder} lacks {len(missing)} of its {len(files)} weight files ({missing[0]}, …)")
            return files
        if f"{stem}{point}.safetensors" in names:
            return [folder / f"{stem}{point}.safetensors"]
    raise ValueError(f"{folder} has no weights in safetensors")


def tensor_headers(path: str | os.PathLike) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each tensor, from a safetensors file's header; dtypes as "F32", "BF16".

    Raises ValueError if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error


def stored_dtype(files: Iterable[Path]) -> str:
    """The dtype of most weights in safetensors files, such as "bfloat16"; "float32" where there are none.

    Raises ValueError for dtypes that models do not compute in, such as fp8.
    """
    elements = Counter()
    for file in files:
        for dtype, shape in tensor_headers(file).values():
            if dtype.startswith(("F", "BF")):
                elements[dtype] += prod(shape)
    if not elements:
        return "float32"
    [(dtype, _)] = elements.most_common(1)
    if dtype not in DTYPES:
        raise ValueError(f"{file} is stored as {dtype}, which models do not compute in: choose a --dtype")
    return DTYPES[dtype]


def check_any_base(any_base: bool, adapter: str | None) -> None:
    """Raise ValueError where an adapter may be of any base and there is none."""
    if any_base and adapter is None:
        raise ValueError("--any-base is for an adapter: give --adapter too")


def find_adapter(folder: Path) -> Path:
    """The folder of an adapter: `folder` itself, or in the folder of a distillation or of one of its checkpoints.

    Of a distillation's result and its checkpoints' adapters that of most steps is taken. Raises FileNotFoundError where
    there is none, or where it is not whole.
    """
    config, weights = ADAPTER_FILES
    places = [folder, folder / "adapter", *sorted(folder.glob("checkpoints/step-*/adapter"))]
    found = [place for place in places if (place / config).is_file()]
    if not found:
        raise FileNotFoundError(f"no adapter in {folder}: it has no {config}, nor has adapter/ or a checkpoint in it")
    chosen = folder if folder in found else max(found, key=_steps)
    if not (chosen / weights).is_file():
        raise FileNotFoundError(f"{chosen} has no {weights}: its adapter is not whole")
    return chosen


def checkpoint_hint(folder: Path) -> str:
    """Where a SiT's model is, to end a message with, if `folder` is one of its run's checkpoints; else nothing."""
    run = folder.resolve().parent.parent
    if not (folder / "state.safetensors").is_file() or not (run / "pipeline" / "model_index.json").is_file():
        return ""
    return f"; it is a checkpoint, to resume from: the newest model of its run is {run / 'pipeline'}"


def _steps(adapter: Path) -> int:
    """The steps that an adapter was distilled for; 0 where it does not tell them."""
    base = read_json(adapter / ADAPTER_FILES[0]).get("_base")
    steps = base.get("steps") if isinstance(base, dict) else None
    return steps if isinstance(steps, int) else 0


def public_name(path: str) -> str:
    """The name of a model by where it was loaded from: "owner/name" of the hub; of a path its last part alone."""
    of_hub = path.count("/") == 1 and not path.startswith(("/", ".")) and not Path(path).exists()
    return path if of_hub else Path(path).name
