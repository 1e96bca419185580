"""Run `hybriddit evaluate`, in one process or in each of torchrun's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..files import make_folder, write_json
from ..machine import gpu_name
from .adm import evaluate, read_reference
from .features import load_features
from .images import Images, read_images
from .inception import find_inception, load_inception
from .perceptual import ClipText
from .processes import process_group, share, total


def run(
    samples: Path,
    reference: Path,
    *,
    open_folder: Callable[[Path], Images] | None = None,
    inception: Path | None = None,
    features: str | None = None,
    clip: str | None = None,
    batch_size: int = 64,
    shuffle: int | None = None,
    settings: Path | None = None,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Evaluate with Inception's features, or others, and write the report to `out`, if given.

    Returns the report, or None in all processes but the first.

    samples, reference: npz files, or folders of images, which `open_folder` makes `Images` of.
    features: a function "package.module:function", uint8 [B, 3, H, W] -> [B, F], in place of Inception: the scores are
    then the Fréchet distance, precision and recall by these features.
    clip: a folder or repository of transformers' CLIP: the scores get clip_text, the mean cosine of its embeddings of the
    samples and of their prompts, which the folder's `Images` tell.
    settings: a JSON file that says how the samples were made; by default samples.json beside samples.npz or the folder
    samples, if it exists. All files are checked before the first image goes through the network.
    """
    made = read_settings(settings, samples)
    if out is not None:
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a folder: give a file for the scores")
        make_folder(out.parent)
    if features is None:
        inception = find_inception(inception)
    else:
        load_features(features, torch.device("cpu"), "--features")
    measure = None if clip is None else ClipText(clip)
    sources = [open_folder(path) if open_folder and path.is_dir() else path for path in (samples, reference)]
    read_images(sources[0], check=False)
    read_reference(sources[1], check=False)
    prompts = sources[0].prompts() if measure is not None and isinstance(sources[0], Images) else None
    if measure is not None and prompts is None:
        raise ValueError(f"--clip: {samples} does not tell prompts: give the folder of PNG files that `generate` wrote")
    if int(os.environ.get("RANK", "0")) == 0:  # of torchrun's processes the first checks for all
        for source in sources:
            if isinstance(source, Images):
                source.check(progress)
    with process_group() as (rank, distributed, device):
        extractor = load_inception(inception, device) if features is None else OwnFeatures(features, device)
        options = {"batch_size": batch_size, "shuffle": shuffle, "distributed": distributed, "progress": progress}
        options["precomputed"] = features is None
        report = evaluate(*sources, extractor, settings=made, **options)
        if measure is not None:
            measure.model.to(device)
            report["metrics"]["clip_text"] = mean_clip_text(
                sources[0], prompts, measure, batch_size, distributed, progress
            )
            report["clip"] = clip
    if rank:
        return None
    if features is not None:  # FID is a name for Inception's
        report["metrics"] = {"frechet_distance": report["metrics"].pop("fid"), **report["metrics"]}
    report["device"] = gpu_name(device) or device.type
    if out is not None:
        try:
            write_json(out, report)
        except OSError as error:  # a full disk must not lose a result that took minutes
            raise OSError(f"could not write {out} ({error}); the scores are {json.dumps(report['metrics'])}") from error
    return report


def mean_clip_text(
    images: Images, prompts: list[str], measure: ClipText, batch_size: int, distributed: bool, progress: bool
) -> float:
    """The mean of CLIP-T over all images, of which every process takes a share."""
    rows, summed = share(len(images), distributed), torch.zeros((), dtype=torch.float64)
    for start in tqdm(range(rows.start, rows.stop, batch_size), desc="CLIP", unit="batch", disable=not progress):
        part = slice(start, min(start + batch_size, rows.stop))
        summed += measure(images[part], prompts[part]).sum().cpu()
    return total(summed, distributed).item() / len(images)


class OwnFeatures:
    """An extractor for `evaluate` by a feature function of the user's own."""

    def __init__(self, name: str, device: torch.device):
        self.features = load_features(name, device, "--features")
        self.description = {"name": name}

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"pooled": self.features(batch)}


def scores_text(report: dict[str, Any], out: Path | None) -> str:
    """The scores of a report for a terminal, one a line, and the file `out` that they were saved to, if any."""
    lines = [f"{name:15}  {value:.4f}" for name, value in report["metrics"].items()]
    return "\n".join([*lines, f"saved to {out}"] if out else lines)


def read_settings(path: Path | None, samples: Path) -> dict[str, Any]:
    """Read the settings file, else the samples' JSON file, else {}.

    Raises FileNotFoundError, and ValueError if the file does not hold a JSON object.
    """
    if path is None:
        path = samples.with_name(samples.name + ".json") if samples.is_dir() else samples.with_suffix(".json")
        if not path.is_file():
            return {}
    elif not path.is_file():
        raise FileNotFoundError(f"no settings file at {path}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(settings).__name__}")
    return settings
