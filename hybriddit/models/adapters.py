"""Save and load adapters: what conversion and training added to a model, without the model."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..attention.mixers import check_mixer
from ..config import HybridConfig
from ..files import read_tensors, replacing, write_json, write_tensors
from ..stored import ADAPTER_FILES, find_adapter, public_name, tensor_headers
from .family import family_of, is_hybrid, model_of
from .identity import base_digest
from .surgery import hybrid_family, hybridize, restore_dense
from .wrapping import plain_state, unwrapped

CONFIG_NAME, WEIGHTS_NAME = ADAPTER_FILES
ANEW = "save or fetch it anew"


def save_adapter(model: nn.Module, folder: str | os.PathLike, *, base: Mapping[str, Any] | None = None) -> None:
    """Save the adapter of a hybrid model: what conversion and training added, its config and its `*.hybrid.*` weights.

    base: what the config tells of the model that it was made from, as plain values: its "name" and "weights" (see
    `describe_base`), and what else is to be known, such as a distillation's size in pixels and steps. None: the name
    and weights of the model itself.

    LoRAs are left out, and names are those of the model without them or torch.compile. Each file is replaced whole, so
    that an interrupted save leaves the old one. Raises ValueError, and then writes nothing, for a model that is not
    hybrid, and where the added weights themselves are fused with a LoRA, quantised, sharded or offloaded.
    """
    model = unwrapped(model)
    family = hybrid_family(model)
    weights = _hybrid_state(model)
    base = describe_base(model) if base is None else dict(base)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_NAME) as path:
        write_tensors(path, weights)
    values = {"_base_class": family.dense_class.__name__, "_base": base, **model.config.hybrid_config}
    write_json(folder / CONFIG_NAME, values)


def describe_base(model: nn.Module, path: str | None = None) -> dict[str, Any]:
    """What an adapter tells of its base: the repository or the name of the folder it is from, and its `base_digest`.

    path: where the pipeline was loaded from; None: where the model was.
    """
    path = model.config.get("_name_or_path") if path is None else path
    return {"name": public_name(path) if path else None, "weights": base_digest(model)}


def load_adapter(model_or_pipeline: Any, folder_or_repo_id: str | os.PathLike, *, check_base: bool = True) -> Any:
    """Load an adapter that `save_adapter` wrote, into a transformer or a pipeline's transformer, and return that.

    A dense model is converted first; a hybrid one must have the adapter's config. A folder may be the adapter's, or
    that of a distillation or one of its checkpoints, see `find_adapter`. From a hub repository only the two files are
    fetched.

    check_base: refuse a model whose weights are not those that the adapter was distilled from, if it tells them. False
    loads it into a finetune, a model with a LoRA fused in, or weights that were stored in float16. Warns where the model's
    weights are of a type (float16, quantised) in which that cannot be told.

    Raises FileNotFoundError for a missing file and ValueError for a damaged one or one that fits another model; the
    model is then as it was.
    """
    model = unwrapped(model_of(model_or_pipeline))
    _apply(model, _read(model, str(folder_or_repo_id)), check_base)
    return model_or_pipeline


class HeldAdapters:
    """Several adapters of one transformer, read once and held in memory, of which one at a time is in use.

        adapters = HeldAdapters(pipeline)
        adapters.add("wide", "outputs/window-16")
        adapters.add("fast", "outputs/window-8")  # which is in use now
        adapters.use("wide")
        adapters.use(None)  # the dense model

    names: of those that are held, in the order they came. active: the name of the one in use, None for the dense model.
    The adapters may differ in every setting. They are held as they were read: training does not change them.

    Raises ValueError for a model that is hybrid by something else.
    """

    def __init__(self, model_or_pipeline: Any):
        self._model = unwrapped(model_of(model_or_pipeline))
        if is_hybrid(self._model):
            raise ValueError("the model is hybrid already: give the dense one (restore_dense), and add its adapter")
        family_of(self._model)
        self._held: dict[str, _Read] = {}
        self.active: str | None = None

    @property
    def names(self) -> list[str]:
        return list(self._held)

    def add(self, name: str, folder_or_repo_id: str | os.PathLike, *, check_base: bool = True) -> None:
        """Read an adapter and use it; one that is held under this name goes. Arguments and errors are `load_adapter`'s.

        After an error the model is as it was.
        """
        read = _read(self._model, str(folder_or_repo_id))
        before = self.active
        self.use(None)
        try:
            _apply(self._model, read, check_base)
        except ValueError:
            self.use(before)
            raise
        self._held[name], self.active = read, name

    def use(self, name: str | None) -> None:
        """Switch to a held adapter, or with None to the dense model. Raises ValueError for an unknown name."""
        if name is not None and name not in self._held:
            raise ValueError(f"no adapter {name!r} is held, only {', '.join(self._held) or 'none'}: add it first")
        if name == self.active:
            return
        same = None not in (name, self.active) and self._held[name].config == self._held[self.active].config
        if self.active is not None and not same:
            restore_dense(self._model)
        if name is not None:
            _apply(self._model, self._held[name], check_base=False)
        self.active = name


class _Read(NamedTuple):
    """An adapter that was read: where from, its config, what it tells of its base, and its weights."""

    source: str
    config: HybridConfig
    base: Mapping[str, Any]
    weights: dict[str, torch.Tensor]


def _read(model: nn.Module, source: str) -> _Read:
    """Read an adapter for a model of its class. Raises as `load_adapter` does."""
    family = family_of(model)
    config, base_class, base = _read_config(source)
    if base_class != family.dense_class.__name__:
        raise ValueError(f"the adapter in {source} is for {base_class}, the model is a {family.dense_class.__name__}")
    weights_path = _adapter_file(source, WEIGHTS_NAME)
    try:
        return _Read(source, config, base, read_tensors(weights_path))
    except ValueError as error:
        raise ValueError(f"{error}: {ANEW}") from error


def _apply(model: nn.Module, adapter: _Read, check_base: bool) -> None:
    """Put an adapter's weights into a model, which is converted if it is dense. Raises as `load_adapter` does."""
    source, config, base, weights = adapter
    was_hybrid = is_hybrid(model)
    if not was_hybrid:
        hybridize(model, config)
    elif HybridConfig.from_saved(model.config.hybrid_config) != config:
        raise ValueError(f"the model is hybrid with another config than {source}: restore_dense(model) first")
    try:
        own = _hybrid_state(model)
        check_fit(shapes_of(weights), shapes_of(own), f"the adapter in {source}")
        if check_base:
            _check_base(model, base, source)
    except ValueError:
        if not was_hybrid:
            restore_dense(model)
        raise
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def check_adapter_fits(model: nn.Module, config: HybridConfig, source: str) -> None:
    """Raise as `load_adapter` does for an adapter of this config that does not fit a model on the meta device.

    The model becomes its hybrid. So it is told before weights, which may take minutes, are read; but not whether these
    are the adapter's base.
    """
    if not is_hybrid(model):
        with torch.device("meta"):
            hybridize(model, config)
    weights_path = _adapter_file(source, WEIGHTS_NAME)
    try:
        found = {name: shape for name, (_, shape) in tensor_headers(weights_path).items()}
    except ValueError as error:
        raise ValueError(f"{error}: {ANEW}") from error
    check_fit(found, shapes_of(plain_state(model, ".hybrid.")), f"the adapter in {source}")


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_base(model: nn.Module, base: Mapping[str, Any], source: str) -> None:
    """Raise ValueError for a model of other weights than those that the adapter was made from, if it tells them."""
    if base.get("weights") is None:
        return
    found, name = base_digest(model), base.get("name") or "a model without a name"
    if found is None:
        warnings.warn(
            f"whether the model is {name}, which the adapter in {source} was made from, cannot be told: its weights "
            "are neither float32 nor bfloat16",
            stacklevel=4,
        )
    elif found != base["weights"]:
        raise ValueError(
            f"the adapter in {source} was made from other weights, {name}: load it into those, or, for a finetune of "
            "them or their float16 variant, with check_base=False (--any-base)"
        )


def _hybrid_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The added weights by their plain names, which share their memory with the model.

    Raises ValueError where a weight is not an ordinary tensor by then.
    """
    state = plain_state(model, ".hybrid.")
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise ValueError("the model is offloaded: save or load the adapter before enabling offload")
        if type(value) not in (torch.Tensor, nn.Parameter) or not value.is_floating_point() or "parametriz" in name:
            what = "a" if isinstance(value, torch.Tensor) else "no tensor but a"
            raise ValueError(
                f"{name} is {what} {type(value).__name__}, changed by another library (quantised, parametrized): save or "
                "load the adapter before that"
            )
    return state


def check_fit(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise ValueError where weights of these shapes are not those expected. what: they are, to begin the message with."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        how = f"lacks {len(missing)} of its weights ({missing[0]}, …)" if missing else ""
        how += " and " if missing and unknown else ""
        how += f"has {len(unknown)} that it has no place for ({unknown[0]}, …)" if unknown else ""
        raise ValueError(f"{what} does not fit this model: it {how}")
    for name, shape in found.items():
        if shape != expected[name]:
            raise ValueError(f"{what} does not fit this model: {name} is {shape}, the model's is {expected[name]}")


def read_adapter_config(folder_or_repo_id: str | os.PathLike) -> tuple[HybridConfig, str | None]:
    """Read an adapter's config and the name of the class it is for, but no weights. Raises as load_adapter does."""
    config, base_class, _ = _read_config(folder_or_repo_id)
    return config, base_class


def _read_config(source: str | os.PathLike) -> tuple[HybridConfig, str | None, dict[str, Any]]:
    """An adapter's config, the class it is for, and what it tells of its base: {} for one of version 0.1."""
    path = _adapter_file(str(source), CONFIG_NAME)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        config = HybridConfig.from_saved(values)
        check_mixer(config.mixer, **config.mixer_settings)
        base = values.get("_base", {})
        if not isinstance(base, dict):
            raise ValueError(f"its _base is {base!r}")
        return config, values.get("_base_class"), base
    except (TypeError, ValueError) as error:  # json's and unicode's decoding errors are ValueErrors too
        raise ValueError(f"{path} is no adapter config: {error}") from error


def _adapter_file(source: str, name: str) -> str:
    """The path of one of an adapter's files, fetched if `source` is not a folder but may be a hub repository."""
    if os.path.isdir(source):
        return str(find_adapter(Path(source)) / name)
    return hub_file(source, name, "adapter folder")


def hub_file(source: str, name: str, what: str) -> str:
    """The path of a file that is fetched from the hub repository `source`, "owner/name".

    Raises FileNotFoundError where it cannot be had, and where `source` cannot be a repository: then it is no `what`.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(f"no {what} {source}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return hf_hub_download(source, name)
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise FileNotFoundError(f"no folder {source}, and the hub gave no {name} for it: {reason}") from error
