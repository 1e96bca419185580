"""What the command `compare` does: a hybrid's images beside its dense teacher's, and how near they are."""

from __future__ import annotations

import csv
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import filling, make_folder, write_json
from ..images import contact_sheet, open_image, save_png
from ..machine import find_device, gpu_name
from ..stored import check_any_base
from .files import open_pipeline, plan_with_notes
from .images import Task, check_settings, make

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SHOWN = 12  # columns of the contact sheet
COLUMNS = ("image", "prompt", "seed", "psnr", "ssim", "teacher_seconds", "hybrid_seconds")


def run(
    model: str,
    out: Path,
    prompts: Path,
    *,
    adapter: str | None = None,
    any_base: bool = False,
    features: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    num_images: int = 1,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Make every image twice, by the hybrid and by its dense teacher, which are one model; compare them in pairs.

    The new or empty folder `out` gets, whole or not at all, teacher/ and hybrid/ with the images and their records,
    images.csv with a line an image, sheet.png, and compare.json, which is returned.

    model, adapter: a dense pipeline with an adapter, or a hybrid pipeline alone. features: also the Fréchet distance of
    the two sets by these features, see `metrics.features.load_features`; it is small only for large sets. The other
    arguments are those of `generate.run`. Raises ValueError or OSError, in one line, as far as possible before the
    model is loaded.
    """
    from ..data.prompts import read_prompts

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("hybriddit compare works in one process: start one, whose times nothing else disturbs")
    check_any_base(any_base, adapter)
    subjects = read_prompts(prompts, says=not quiet)
    check_settings(subjects, seed=seed, num_images=num_images, **settings)
    where = find_device(device)
    if features and len(subjects) * num_images < 2:
        raise ValueError("--features compares sets of images: give more than one")
    with filling(out) as folder:
        import torch

        from ..metrics import frechet_distance_of
        from ..metrics.features import load_features
        from ..metrics.nearness import nearness
        from ..models import dense_mode
        from ..pipelines.loading import find_base, silence_libraries
        from ..pipelines.prepare import place

        nearness(*[np.zeros((8, 8, 3), np.uint8)] * 2)  # a missing package is told before all else
        extractor = load_features(features, where, "--features") if features else None
        if quiet:
            silence_libraries()
        if adapter is None and not find_base(model, variant=variant, config=config).is_hybrid:
            raise ValueError(f"{model} is dense: give the --adapter of a hybrid to compare it with")
        kind = getattr(torch, dtype or ("float32" if where.type == "cpu" else "bfloat16"))
        pipeline, notes = open_pipeline(model, kind, adapter, any_base, variant=variant, config=config)
        place(pipeline, where)
        pipeline.set_progress_bar_config(disable=True)
        pipeline, tasks, more = plan_with_notes(pipeline, subjects, seed=seed, num_images=num_images, **settings)
        for note in [] if quiet else notes + more:
            print(f"note: {note}", file=sys.stderr)

        rows = []
        source = {"model": model, "adapter": adapter, "variant": variant, "config": config}
        for number, task in enumerate(_shown(tasks, quiet), 1):
            images, seconds = {}, {}
            for name in ("teacher", "hybrid"):
                with dense_mode(pipeline.transformer) if name == "teacher" else nullcontext():
                    images[name], seconds[name] = _timed(pipeline, task, folder / name / f"{number:05d}.png", source)
            psnr, ssim = nearness(images["hybrid"], images["teacher"])
            values = (number, task.record["prompt"], task.seed, round(psnr, 3), round(ssim, 4))
            rows.append(dict(zip(COLUMNS, (*values, seconds["teacher"], seconds["hybrid"]), strict=True)))

        with open(folder / "images.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(rows)
        chosen = range(0, len(rows), -(-len(rows) // SHOWN))
        contact_sheet(
            {name: [_read(folder, name, row) for row in chosen] for name in ("teacher", "hybrid")},
            [rows[row]["prompt"] for row in chosen],
            folder / "sheet.png",
            width=192,
        )
        report = {**summary(rows), "features": None}
        if extractor is not None:
            sets = [_all_images(folder, name, len(rows)) for name in ("hybrid", "teacher")]
            with torch.no_grad():
                distance = frechet_distance_of(*sets, extractor, progress=not quiet)
            report["features"] = {"name": features, "frechet_distance": distance}
        made_by = {key: value for key, value in tasks[0].record.items() if key not in ("prompt", "seed")}
        report |= {**source, "prompts": str(prompts), "seed": seed, "num_images": num_images, **made_by}
        report["device"] = gpu_name(where) or where.type
        write_json(folder / "compare.json", report)
    return report


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all images: means and extremes of PSNR and SSIM, and the median seconds of an image."""
    figures: dict[str, Any] = {"images": len(rows)}
    for name, digits in (("psnr", 3), ("ssim", 4)):
        values = [row[name] for row in rows]
        figures[name] = {"mean": round(float(np.mean(values)), digits), "lowest": min(values), "highest": max(values)}
    names = ("teacher", "hybrid")
    medians = {name: round(float(np.median([row[f"{name}_seconds"] for row in rows])), 3) for name in names}
    return {**figures, "seconds_per_image": medians}


def report_text(report: dict[str, Any], out: Path) -> str:
    """The figures of a report for a terminal."""
    psnr, ssim, seconds = report["psnr"], report["ssim"], report["seconds_per_image"]
    lines = [
        f"{report['images']} images, each by the hybrid and by its dense teacher",
        f"PSNR to the teacher   {psnr['mean']:.2f} dB, from {psnr['lowest']:.2f} to {psnr['highest']:.2f}",
        f"SSIM to the teacher   {ssim['mean']:.3f}, from {ssim['lowest']:.3f} to {ssim['highest']:.3f}",
        f"seconds per image     {seconds['hybrid']:g} hybrid, {seconds['teacher']:g} teacher "
        f"(median, {report['device']})",
    ]
    if report["features"]:
        lines.append(
            f"Fréchet distance      {report['features']['frechet_distance']:.4f} by {report['features']['name']}"
        )
    return "\n".join([*lines, f"saved to {out}: images.csv, sheet.png, compare.json, teacher/ and hybrid/"])


def _timed(pipeline: DiffusionPipeline, task: Task, path: Path, source: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Make one image and save it with its record. Returns its pixels, uint8 [H, W, 3], and the seconds it took."""
    started = time.perf_counter()
    image, record = make(pipeline, task)
    seconds = round(time.perf_counter() - started, 3)
    make_folder(path.parent)
    save_png(image, path, {**source, "by": path.parent.name, **record})
    return np.asarray(image.convert("RGB")), seconds


def _shown(tasks: list[Task], quiet: bool):
    from tqdm import tqdm

    return tqdm(tasks, desc="compare", unit="pair", disable=quiet)


def _read(folder: Path, name: str, row: int) -> np.ndarray:
    return np.asarray(open_image(folder / name / f"{row + 1:05d}.png"))


def _all_images(folder: Path, name: str, count: int):
    from ..metrics.images import Images

    return Images(count, lambda rows: np.stack([_read(folder, name, row) for row in rows]))
