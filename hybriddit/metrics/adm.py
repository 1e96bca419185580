"""The ADM evaluation suite (Dhariwal and Nichol, arXiv 2105.05233): five scores of samples against reference images."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..machine import versions
from .images import Images, as_array, npz_entries, read_entry, read_images
from .processes import gather, rank_and_size, share, total
from .statistics import (
    Moments,
    frechet_distance,
    merge,
    merge_processes,
    moments,
    precision_recall,
    score_of_splits,
    split_sums,
)

Source = str | os.PathLike | np.ndarray | torch.Tensor | Images
Extractor = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
# names of mean and covariance in ADM's reference files
PRECOMPUTED = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class FeatureStatistics(NamedTuple):
    """The statistics of a set of images from which the scores are computed."""

    moments: dict[str, Moments]  # of "pooled" and "spatial", those that the extractor gives
    pooled: torch.Tensor | None  # [N, F] of all images, in order
    inception_score: float | None


class Reference(NamedTuple):
    """A set of reference images, their precomputed statistics, or both."""

    images: np.ndarray | Images | None
    precomputed: dict[str, tuple[torch.Tensor, torch.Tensor]]  # mean and covariance of "pooled", of "spatial"


def adm_metrics(
    samples: Source,
    reference: Source,
    extractor: Extractor,
    *,
    batch_size: int = 64,
    split_size: int = 5000,
    neighbours: int = 3,
    shuffle: int | None = None,
    precomputed: bool = True,
    distributed: bool = False,
    progress: bool = True,
) -> dict[str, float]:
    """Inception score, FID, sFID, precision and recall, as the ADM suite computes them.

    samples, reference: paths of npz files with uint8 images [N, H, W, 3] as `arr_0`, such arrays, or `Images` (see
    `hybriddit.metrics.images`). A reference file may hold the statistics `mu`, `sigma` (pooled) and `mu_s`, `sigma_s`
    (spatial) with images, as ADM's do, or without: then FID and sFID compare with these, and the images are used for
    precision and recall only.
    extractor: uint8 [B, 3, H, W], B up to batch_size, on the CPU -> {"pooled": [B, F], "spatial": [B, S], "logits":
    [B, C]}, on any device (`load_inception` makes the real one). Scores whose features the extractor or the reference
    lacks are left out.

    shuffle: a seed to draw the inception score's splits at random. None: they follow the order of the samples, which
    must then not be sorted by class.
    precomputed: use a reference's statistics, which are Inception's; False: its images alone, for another extractor.
    distributed: every process of torch.distributed calls this with the same arguments, takes a share of the images and
    gets the result for the whole set, which equals a single process's up to rounding.

    Returns {"inception_score", "fid", "sfid", "precision", "recall"}; see `inception_score` and `precision_recall`.
    Raises FileNotFoundError and ValueError for files, arrays and features that are not as above.
    """
    if split_size < 1:
        raise ValueError(f"split size must be at least 1, not {split_size}")
    samples = read_images(samples)
    reference = read_reference(reference) if precomputed else Reference(read_images(reference), {})
    options = {"batch_size": batch_size, "distributed": distributed, "progress": progress}
    of_samples = collect_statistics(samples, extractor, "samples", split_size=split_size, shuffle=shuffle, **options)
    needed = {"pooled", *of_samples.moments} if of_samples.pooled is not None else set(of_samples.moments)
    if reference.images is not None and (of_samples.pooled is not None or needed - set(reference.precomputed)):
        of_reference = collect_statistics(reference.images, extractor, "reference", **options)
    else:
        of_reference = FeatureStatistics({}, None, None)

    scores = {}
    if of_samples.inception_score is not None:
        scores["inception_score"] = of_samples.inception_score
    for name, kind in (("fid", "pooled"), ("sfid", "spatial")):
        if kind not in of_samples.moments:
            continue
        own = of_samples.moments[kind]
        if kind in reference.precomputed:
            mean, covariance = reference.precomputed[kind]
            if len(mean) != len(own.mean):
                raise ValueError(
                    f"the reference's {' and '.join(PRECOMPUTED[kind])} are {len(mean)} wide, the extractor's "
                    f"{kind!r} features {len(own.mean)}: they are of another extractor"
                )
        elif kind in of_reference.moments:
            mean, covariance = of_reference.moments[kind].mean, of_reference.moments[kind].covariance
        else:
            continue
        scores[name] = frechet_distance(own.mean, own.covariance, mean, covariance)
    if of_samples.pooled is not None and of_reference.pooled is not None:
        scores["precision"], scores["recall"] = precision_recall(
            of_reference.pooled, of_samples.pooled, neighbours, distributed=distributed
        )
    return scores


def frechet_distance_of(
    samples: Source,
    reference: Source,
    features: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_size: int = 64,
    distributed: bool = False,
    progress: bool = True,
) -> float:
    """The Fréchet distance of two sets of images with any features: uint8 [B, 3, H, W] -> [B, F].

    Samples and reference are npz files or arrays as for `adm_metrics`. A reference's precomputed statistics are
    Inception's, so they are not used. The distance is FID only with Inception's features: report which were used.
    """
    options = {"batch_size": batch_size, "distributed": distributed, "progress": progress, "keep": False}
    sets = {"samples": read_images(samples), "reference": read_images(reference)}
    one, other = (
        collect_statistics(images, lambda batch: {"pooled": features(batch)}, name, **options).moments["pooled"]
        for name, images in sets.items()
    )
    return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)


def evaluate(
    samples: Source,
    reference: Source,
    extractor: Extractor,
    *,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    split_size: int = 5000,
    neighbours: int = 3,
    shuffle: int | None = None,
    precomputed: bool = True,
    distributed: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Compute `adm_metrics`, and record all that the scores depend on, in one dictionary for a JSON file.

    settings: how the samples were made (sampler, steps, guidance, label balance, VAE, EMA, ...), kept as given. Files
    are recorded by name and SHA-256, the extractor by its `description` if it has one, else by its name.
    """
    started = time.monotonic()
    rules = {"split_size": split_size, "neighbours": neighbours, "shuffle": shuffle}
    options = {"batch_size": batch_size, "distributed": distributed, "progress": progress}
    scores = adm_metrics(samples, reference, extractor, precomputed=precomputed, **rules, **options)
    described = getattr(extractor, "description", None)
    name = getattr(extractor, "__qualname__", None) or type(extractor).__qualname__
    packages = ("hybriddit", "torch", "numpy", "torch-fidelity")
    return {
        "metrics": scores,
        "settings": dict(settings or {}),
        "samples": describe_source(samples),
        "reference": describe_source(reference),
        "extractor": dict(described) if described else {"name": name},
        "rules": {
            **rules,
            "covariance": "unbiased, float64",
            "distances": "squared, float64",
            "precomputed_reference": sorted(read_reference(reference, check=False).precomputed) if precomputed else [],
        },
        "batch_size": batch_size,
        "processes": rank_and_size(distributed)[1],
        "versions": {package: found for package, found in versions(packages).items() if found},
        "seconds": round(time.monotonic() - started, 1),
    }


def read_reference(source: Source, check: bool = True) -> Reference:
    """Read a reference's images and precomputed statistics, whichever it has. check: as in `read_images`."""
    if not isinstance(source, str | os.PathLike):
        return Reference(read_images(source), {})
    path = Path(source)
    entries = npz_entries(path, check)
    found = {}
    for kind, (mean, covariance) in PRECOMPUTED.items():
        if mean in entries and covariance in entries:
            pair = [np.array(read_entry(path, name)) for name in (mean, covariance)]
            shapes = [list(part.shape) for part in pair]
            if any(part.dtype.kind != "f" or not np.isfinite(part).all() for part in pair):
                raise ValueError(f"{mean} and {covariance} of {path} are not finite floating-point numbers")
            if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2:
                raise ValueError(f"{mean} and {covariance} of {path} must be [F] and [F, F], not {shapes}")
            found[kind] = tuple(torch.from_numpy(part).double() for part in pair)
    if "arr_0" not in entries and found:
        return Reference(None, found)
    return Reference(read_images(source, check=False), found)  # checked above


def collect_statistics(
    images: np.ndarray,
    extractor: Extractor,
    name: str,
    *,
    batch_size: int,
    distributed: bool,
    progress: bool,
    split_size: int | None = None,
    shuffle: int | None = None,
    keep: bool = True,
) -> FeatureStatistics:
    """Run all images through the extractor, each process its share, and collect what the scores need.

    name: what messages call the set. split_size, shuffle: for the inception score; without a split size it is left out.
    keep: keep the pooled features, which precision and recall need.
    """
    rank, size = rank_and_size(distributed)
    count = len(images)
    if count < size:
        raise ValueError(f"{count} {name} for {size} processes: use fewer processes")
    found, pooled, sums = {}, [], None
    positions = torch.arange(count)
    if shuffle is not None:
        positions = torch.randperm(count, generator=torch.Generator().manual_seed(shuffle))
    shown = progress and rank == 0
    with tqdm(total=len(share(count, distributed)), desc=name, unit="image", disable=not shown) as bar:
        for rows in batches(share(count, distributed), batch_size):
            batch = torch.from_numpy(np.array(images[rows.start : rows.stop])).permute(0, 3, 1, 2).contiguous()
            features = check_features(extractor(batch), rows)
            for kind in set(features) & set(PRECOMPUTED):
                new = moments(features[kind])
                found[kind] = merge(found[kind], new) if kind in found else new
            if keep and "pooled" in features:
                pooled.append(
                    features["pooled"].to("cpu", torch.promote_types(features["pooled"].dtype, torch.float32))
                )
            if split_size and "logits" in features:
                new = split_sums(features["logits"], positions[rows.start : rows.stop], count, split_size)
                sums = new if sums is None else sums + new
            bar.update(len(rows))
    device = next((part.mean.device for part in found.values()), torch.device("cpu"))
    return FeatureStatistics(
        {kind: merge_processes(found[kind], count, distributed) for kind in PRECOMPUTED if kind in found},
        gather(torch.cat(pooled), count, distributed).to(device) if pooled else None,
        score_of_splits(total(sums, distributed), count, split_size) if sums is not None else None,
    )


def batches(rows: range, batch_size: int) -> Iterator[range]:
    """Cut `rows` into batches of batch_size; the last may be smaller."""
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, not {batch_size}")
    return (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))


def check_features(features: Mapping[str, torch.Tensor], rows: range) -> dict[str, torch.Tensor]:
    """The features that the scores use, checked. Raises ValueError if there are none, for wrong shapes, NaN or inf."""
    known = {kind: torch.as_tensor(features[kind]) for kind in ("pooled", "spatial", "logits") if kind in features}
    if not known:
        raise ValueError(f"the extractor gives none of pooled, spatial and logits, only {', '.join(features)}")
    for kind, part in known.items():
        if part.ndim != 2 or len(part) != len(rows) or not part.is_floating_point():
            expected = f"floating-point [{len(rows)}, width]"
            raise ValueError(f"the extractor's {kind!r} must be {expected}, not {part.dtype} {list(part.shape)}")
        if not part.isfinite().all():
            raise ValueError(f"the extractor's {kind!r} of images {rows.start} to {rows.stop - 1} are not finite")
    # statistics are of float64, which Apple's GPUs do not have
    return {kind: part.cpu() if part.device.type == "mps" else part for kind, part in known.items()}


def describe_source(source: Source) -> dict[str, Any]:
    """The file's name (None for an array), the SHA-256 of its bytes, and the number and size of the images."""
    if isinstance(source, Images):
        return source.described()
    if isinstance(source, str | os.PathLike):
        with Path(source).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found = {"file": Path(source).name, "sha256": digest}
        source = read_reference(source, check=False).images
    else:
        source = as_array(source)
        found = {"file": None, "sha256": hashlib.sha256(np.ascontiguousarray(source)).hexdigest()}
    if source is not None:
        found |= {"images": len(source), "size": list(source.shape[1:3])}
    return found
