"""Describe what a file or folder holds: a pipeline, a model, an adapter or a generated image."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from ..config import HybridConfig
from ..files import read_json, read_tensors
from ..images import image_size, read_record
from ..stored import (
    MODULAR_INDEX,
    checkpoint_hint,
    choose_variant,
    component_classes,
    find_adapter,
    model_folders,
    tensor_headers,
    weight_files,
)

SHOWN_NAMES = 10  # how many of a pipeline's class names are shown


def describe(path: str | Path, variant: str | None = None) -> dict[str, Any]:
    """Describe a pipeline folder, a model folder, an adapter folder or an image file (PNG, TIFF); the entry `kind` says which it is.

    A SiT's training run is described by the pipeline in its folder `pipeline`; a distillation, or one of its
    checkpoints, by its newest adapter, whose `folder` is told. All bytes of an adapter are read and checked, but only
    the headers and lengths of a model's weight files. variant: which of the files of a pipeline's or a model's weights
    to describe, such as "fp16"; None: those that the commands would load.

    Raises FileNotFoundError where there is nothing, and ValueError for something damaged or of another kind.
    """
    path = Path(path)
    if variant is not None and (path.is_file() or (path / "hybrid_config.json").is_file()):
        raise ValueError(f"{path} has no variants: they are for a pipeline or a model")
    if path.is_file() and path.suffix.lower() in (".png", ".tif", ".tiff"):
        return {"kind": "image", **_image(path)}
    if path.is_file():
        raise ValueError(f"{path} is no PNG or TIFF: give that, or a folder with a pipeline, a model or an adapter")
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder {path}")
    for name, kind, read in (
        ("model_index.json", "pipeline", lambda folder: _pipeline(folder, variant)),
        ("hybrid_config.json", "adapter", _adapter),
        ("config.json", "model", lambda folder: _model_alone(folder, variant)),
        ("pipeline/model_index.json", "pipeline", lambda run: _pipeline(run / "pipeline", variant)),
    ):
        if (path / name).is_file():
            return {"kind": kind, **read(path)}
    if (path / MODULAR_INDEX).is_file():
        raise ValueError(f"{path} is a modular pipeline, whose parts may be anywhere: give the folder of one of them")
    try:
        found = find_adapter(path)
    except FileNotFoundError as error:
        hint = checkpoint_hint(path)
        raise ValueError(
            f"{path} has no model_index.json or config.json: no pipeline or model; {error}{hint}"
        ) from None
    return {"kind": "adapter", "folder": str(found), **_adapter(found)}


def _image(path: Path) -> dict[str, Any]:
    record = read_record(path)
    width, height = image_size(path)
    return {"width": width, "height": height, "record": record}


def _pipeline(folder: Path, variant: str | None) -> dict[str, Any]:
    index = read_json(folder / "model_index.json")
    models = model_folders(folder, index)
    variant, note = choose_variant({name: os.listdir(part) for name, part in models.items()}, variant, str(folder))
    components = {
        name: _model(models[name], variant) if name in models else {"class": kind}
        for name, kind in component_classes(index).items()
        if kind is not None
    }
    found = {"class": index.get("_class_name"), **_choice(variant, note), "components": components}
    if "sit" in components.get("transformer", {}):
        found |= {name: index.get(name) for name in ("path", "prediction", "weights", "id2label")}
    return found


def _model_alone(folder: Path, variant: str | None) -> dict[str, Any]:
    variant, note = choose_variant({"model": os.listdir(folder)}, variant, str(folder))
    return {**_model(folder, variant), **_choice(variant, note)}


def _choice(variant: str | None, note: str | None) -> dict[str, Any]:
    """The variant that is described, and what there is to choose from; nothing for weights that have no variants."""
    return {} if (variant, note) == (None, None) else {"variant": variant, "note": note}


def _model(folder: Path, variant: str | None) -> dict[str, Any]:
    values = read_json(folder / "config.json")
    name = values.get("_class_name") or next(iter(values.get("architectures") or []), None)
    files = weight_files(folder, variant)
    headers = {key: header for file in files for key, header in tensor_headers(file).items()}
    sizes = {key: prod(shape) for key, (_, shape) in headers.items()}
    model = {
        "class": name,
        "family": _family_name(name, values),
        "parameters": sum(sizes.values()),
        "bytes": sum(file.stat().st_size for file in files),
    }
    if "hybrid_config" in values:
        config = _hybrid_config(folder / "config.json", values["hybrid_config"] or {})
        layers = _converted_layers(name, sizes)
        bare = [layer for layer in layers if config.kind(layer) in ("hybrid", "linear")
                and not any(key.startswith(f"{layer}.hybrid.") for key in sizes)]  # fmt: skip
        if bare:
            raise ValueError(f"{folder} lacks the hybrid weights of {len(bare)} layers ({bare[0]}, …)")
        model["hybrid"] = _hybrid(config, sizes, layers)
    if model["family"] == "SiT":
        model["sit"] = _sit(folder / "config.json", values)
    return model


def _sit(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """A SiT's size, the number of its layers of each kind of attention, and the settings that these kinds use."""
    from ..models.sit import SIT_SIZES, SiTTransformer2DModel, layer_kinds  # torch

    parameters = inspect.signature(SiTTransformer2DModel.__init__).parameters.values()
    fields = {p.name: values.get(p.name, p.default) for p in parameters if p.name != "self"}
    try:
        kinds = Counter(layer_kinds(fields["attention"], fields["num_layers"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no config of a SiT: {error}") from error
    shape = ("num_layers", "num_attention_heads", "attention_head_dim")
    size = next((name for name, own in SIT_SIZES.items() if own == {key: fields[key] for key in shape}), None)
    near, far = bool({"window", "hybrid"} & set(kinds)), bool({"linear", "hybrid"} & set(kinds))
    used = {"window": near, "stride": near, "map_rank": far, "gate": "hybrid" in kinds}
    used |= dict.fromkeys(("feature_map", "projection", "far_rope"), far)
    names = ("sample_size", "in_channels", "patch_size", "num_classes")
    return {
        "size": size and f"{size}/{fields['patch_size']}",
        **{name: fields[name] for name in (*shape, *names)},
        "layers": dict(kinds),
        **{name: fields[name] for name, has in used.items() if has},
    }


def _adapter(folder: Path) -> dict[str, Any]:
    values = read_json(folder / "hybrid_config.json")
    config = _hybrid_config(folder / "hybrid_config.json", values)
    weights = folder / "hybrid_adapter.safetensors"
    if not weights.is_file():
        raise ValueError(f"{folder} has no {weights.name}")
    sizes = {key: tensor.numel() for key, tensor in read_tensors(weights).items()}
    layers = sorted({key.partition(".hybrid.")[0] for key in sizes})
    base = values.get("_base_class")
    return {
        "base_class": base,
        "base": values.get("_base"),
        "family": _family_name(base),
        "bytes": weights.stat().st_size,
        "hybrid": _hybrid(config, sizes, layers),
        **_card(folder / "README.md"),
    }


def _card(path: Path) -> dict[str, Any]:
    """{"card": what the card of `hybriddit push` says}; nothing where there is none. Raises ValueError if damaged."""
    if not path.is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        values = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # the YAML parser's errors among them
        raise ValueError(f"{path} is no model card: {' '.join(str(error).split())}") from error
    facts = values.get("hybriddit")
    return {"card": {**facts, "license": values.get("license")}} if isinstance(facts, dict) else {}


def _hybrid(config: HybridConfig, sizes: dict[str, int], layers: list[str]) -> dict[str, Any]:
    return {
        "config": config.to_dict(),
        "added_parameters": sum(size for key, size in sizes.items() if ".hybrid." in key),
        "layers": dict(Counter(config.kind(layer) for layer in layers)),
    }


def _converted_layers(model_class: str, sizes: dict[str, int]) -> list[str]:
    """The names of the attention layers that conversion replaces, those that the config keeps dense included."""
    from ..models.family import family_of_class

    family = family_of_class(model_class)
    if family is None or model_class != family.hybrid_class.__name__:
        raise ValueError(f"the model has a hybrid_config, but its class is {model_class}")
    modules = {key[: dot.start()] for key in sizes for dot in re.finditer(r"\.", key)}
    return sorted(name for name in modules if family.converts(name))


def _family_name(model_class: str | None, config: dict[str, Any] | None = None) -> str | None:
    """The name of the family of a model; "SiT" for a SiT; else None. config: None: the first that has the class."""
    from ..models import SiTTransformer2DModel
    from ..models.family import family_of_class

    if model_class == SiTTransformer2DModel.__name__:
        return "SiT"
    family = family_of_class(model_class, None if config is None else lambda: config)
    return family and family.name


def _hybrid_config(path: Path, values: Any) -> HybridConfig:
    try:
        return HybridConfig.from_saved(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no hybrid config: {error}") from error


def description_text(found: dict[str, Any]) -> str:
    """Format what `describe` found for a terminal."""
    if found["kind"] == "image":
        lines = [f"image, {found['width']} x {found['height']}"]
        if found["record"] is None:
            return f"{lines[0]}, with no record of how it was made"
        return "\n".join(lines + [f"  {key:20} {_value(value)}" for key, value in found["record"].items()])
    if found["kind"] == "adapter":
        lines = [f"adapter for {found['base_class']} ({found['family']}), {_megabytes(found['bytes'])}"]
        lines += [f"  folder  {found['folder']}"] if "folder" in found else []
        told = ", ".join(f"{name} {_value(value)}" for name, value in (found["base"] or {}).items())
        lines += [f"  base    {told}"] if told else []
        card = ", ".join(f"{name} {_value(value)}" for name, value in found.get("card", {}).items())
        return "\n".join([*lines, *_hybrid_lines(found["hybrid"]), *([f"  card    {card}"] if card else [])])
    if found["kind"] == "model":
        parts = (*_hybrid_lines(found.get("hybrid")), *_sit_lines(found.get("sit")))
        return "\n".join([_model_line(found), *_variant_lines(found), *parts])
    lines = [f"pipeline, {found['class']}", *_variant_lines(found)]
    for name, component in found["components"].items():
        lines.append(f"  {name:16} {_model_line(component) if 'parameters' in component else component['class']}")
        lines += ["  " + line for line in _hybrid_lines(component.get("hybrid")) + _sit_lines(component.get("sit"))]
    sit = found["components"].get("transformer", {}).get("sit")
    if sit is not None:
        lines.append(f"  {'trained for':16} path {found['path']}, prediction {found['prediction']}")
        lines.append(f"  {'weights':16} {found['weights'] or 'no note on them'}")
        lines.append(f"  {'class names':16} {_class_names(found['id2label'], sit['num_classes'])}")
    return "\n".join(lines)


def _model_line(model: dict[str, Any]) -> str:
    family = f" ({model['family']})" if model["family"] else ""
    return f"{model['class']}{family}, {model['parameters']:,} parameters, {_megabytes(model['bytes'])}"


def _variant_lines(found: dict[str, Any]) -> list[str]:
    variant, note = found.get("variant"), found.get("note")
    return [f"  variant {variant}"] * bool(variant) + [f"  note    {note}"] * bool(note)


def _hybrid_lines(hybrid: dict[str, Any] | None) -> list[str]:
    if hybrid is None:
        return []
    config = ", ".join(f"{key} {_value(value)}" for key, value in hybrid["config"].items())
    layers = ", ".join(f"{count} {kind}" for kind, count in hybrid["layers"].items())
    return [
        f"  config  {config}",
        f"  layers  {layers or 'none with weights'}; {hybrid['added_parameters']:,} parameters added",
    ]


def _sit_lines(sit: dict[str, Any] | None) -> list[str]:
    if sit is None:
        return []
    size = (
        f"{sit['size'] or 'of its own'}: {sit['num_layers']} layers, {sit['num_attention_heads']} heads of "
        f"{sit['attention_head_dim']}, patch {sit['patch_size']}"
    )
    inputs = f"{sit['in_channels']} x {sit['sample_size']} x {sit['sample_size']}, {sit['num_classes']} classes"
    names = ("window", "stride", "map_rank", "gate", "feature_map", "projection", "far_rope")
    settings = {name: sit[name] for name in names if name in sit}
    if settings.get("projection", 0) is None:
        settings["projection"] = "auto"
    if settings.get("map_rank", 0) is None:
        settings["map_rank"] = f"{sit['num_attention_heads'] * sit['attention_head_dim']} (the width)"
    described = ", ".join(f"{name} {_value(value)}" for name, value in settings.items())
    layers = ", ".join(f"{count} {kind}" for kind, count in sit["layers"].items())
    return [f"  size    {size}", f"  inputs  {inputs}", f"  layers  {layers}" + (f"; {described}" if described else "")]


def _class_names(id2label: dict[str, str] | None, classes: int) -> str:
    if not id2label:
        return "ImageNet's" if classes == 1000 else "none"
    names = [repr(id2label[index]) for index in sorted(id2label, key=int)]  # the file sorts them as text: 0, 1, 10, 2
    return f"{len(names)}: {', '.join(names[:SHOWN_NAMES])}" + (", …" if len(names) > SHOWN_NAMES else "")


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
