"""What the command `compare` does: a hybrid's images beside its dense teacher's, and how near they are."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from ..files import filling, make_folder, write_json
from ..images import contact_sheet, open_image, save_png
from ..machine import find_device, gpu_name
from ..stored import check_any_base
from .files import open_to_measure, refuse_processes
from .images import Task, check_settings, make

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

UNUSED = 1e-4  # below this change of its output, a layer does without a branch
SHOWN = 12  # columns of the contact sheet
COLUMNS = ("image", "prompt", "seed", "psnr", "ssim", "teacher_seconds", "hybrid_seconds")
FIGURES = {  # of `metrics.perceptual`, in words
    "lpips": "LPIPS to the teacher",
    "clip_image": "CLIP-I to the teacher",
    "clip_text": "CLIP-T of the hybrid",
    "clip_text_teacher": "CLIP-T of the teacher",
    "dino": "DINO to the teacher",
}
ALONE = {"near": "near alone", "far": "far alone"}  # columns and folders of images with one branch


def run(
    model: str,
    out: Path,
    prompts: Path,
    *,
    adapter: str | None = None,
    any_base: bool = False,
    features: str | None = None,
    lpips: bool = False,
    clip: str | None = None,
    dino: str | None = None,
    branches: bool = False,
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
    images.csv with a line an image, sheet.png, index.html with all pairs, the worst first, and compare.json, which is
    returned.

    model, adapter: a dense pipeline with an adapter, or a hybrid pipeline alone. features: also the Fréchet distance of
    the two sets by these features, see `metrics.features.load_features`; it is small only for large sets. lpips, clip,
    dino: further measures of every pair, see `metrics.perceptual.load_perceptual`. branches: also make every image with
    one branch of the hybrid's layers alone, the near and the far one, and measure, on the first image, how much each
    layer's output changes without either (see `models.branches`). The other arguments are those of `generate.run`. Raises
    ValueError or OSError, in one line, as far as possible before the model is loaded.
    """
    from ..data.prompts import read_prompts

    refuse_processes("compare")
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
        from ..metrics.perceptual import load_perceptual
        from ..models import dense_mode
        from ..models.branches import branch_changes, hybrid_layers, one_branch
        from ..models.family import denoiser
        from ..pipelines.loading import find_base, silence_libraries

        nearness(*[np.zeros((8, 8, 3), np.uint8)] * 2)  # a missing package is told before all else
        if quiet:
            silence_libraries()
        extractor = load_features(features, where, "--features") if features else None
        measures = load_perceptual(where, lpips=lpips, clip=clip, dino=dino)
        if adapter is None and not find_base(model, variant=variant, config=config).is_hybrid:
            raise ValueError(f"{model} is dense: give the --adapter of a hybrid to compare it with")
        source = {"model": model, "adapter": adapter, "variant": variant, "config": config}
        settings |= {"seed": seed, "num_images": num_images}
        pipeline, tasks = open_to_measure(
            device=where, dtype=dtype, subjects=subjects, any_base=any_base, quiet=quiet, **source, **settings
        )

        transformer = denoiser(pipeline)
        if branches:
            hybrid_layers(transformer)  # a model without such is refused before images are made
        ways: dict[str, Callable[[], Any]] = {
            "teacher": lambda: dense_mode(transformer),
            "hybrid": nullcontext,
        }
        for branch, name in ALONE.items() if branches else ():
            ways[name] = partial(one_branch, transformer, branch)
        rows = []
        for number, task in enumerate(_shown(tasks, quiet), 1):
            images, seconds = {}, {}
            for name, way in ways.items():
                with way():
                    images[name], seconds[name] = _timed(pipeline, task, folder / name / f"{number:05d}.png", source)
            psnr, ssim = nearness(images["hybrid"], images["teacher"])
            values = (number, task.record["prompt"], task.seed, round(psnr, 3), round(ssim, 4))
            row = dict(zip(COLUMNS, (*values, seconds["teacher"], seconds["hybrid"]), strict=True))
            for measure in measures:
                found = measure(images["hybrid"], images["teacher"], task.record["prompt"])
                row |= {name: round(value, 4) for name, value in found.items()}
            for branch, name in ALONE.items() if branches else ():
                row[f"{branch}_alone_psnr"] = round(nearness(images[name], images["teacher"])[0], 3)
            rows.append(row)
        layers = None
        if branches:
            with branch_changes(transformer) as found:
                make(pipeline, tasks[0])
            layers = {
                layer: {f"without_{branch}": float(torch.stack(of).mean()) for branch, of in changes.items()}
                for layer, changes in found.items()
            }

        with open(folder / "images.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        chosen = range(0, len(rows), -(-len(rows) // SHOWN))
        contact_sheet(
            {name: [_read(folder, name, row) for row in chosen] for name in ways},
            [rows[row]["prompt"] for row in chosen],
            folder / "sheet.png",
            width=192,
        )
        report = {**summary(rows), "features": None, "layers": layers}
        if extractor is not None:
            sets = [_all_images(folder, name, len(rows)) for name in ("hybrid", "teacher")]
            with torch.no_grad():
                distance = frechet_distance_of(*sets, extractor, progress=not quiet)
            report["features"] = {"name": features, "frechet_distance": distance}
        report |= {"lpips_network": "alex" if lpips else None, "clip_model": clip, "dino_model": dino}
        made_by = {key: value for key, value in tasks[0].record.items() if key not in ("prompt", "seed")}
        report |= {**source, "prompts": str(prompts), "seed": seed, "num_images": num_images, **made_by}
        report["device"] = gpu_name(where) or where.type
        write_json(folder / "compare.json", report)
        write_page(folder / "index.html", report, rows, list(ways))
    return report


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all images: means and extremes of PSNR, SSIM and the like, and the median seconds of an image."""
    figures: dict[str, Any] = {"images": len(rows)}
    for name in (name for name in rows[0] if name in ("psnr", "ssim", *FIGURES) or name.endswith("_alone_psnr")):
        digits = 3 if name.endswith("psnr") else 4
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
    for name, about in FIGURES.items():
        if name in report:
            lines.append("{:21} {mean:.3f}, from {lowest:.3f} to {highest:.3f}".format(about, **report[name]))
    for branch in ALONE if report["layers"] else ():
        figures = report[f"{branch}_alone_psnr"]
        lines.append(
            f"{f'{branch} branch alone':21} {figures['mean']:.2f} dB, from {figures['lowest']:.2f} to {figures['highest']:.2f}"
        )
    if report["layers"]:
        unused = [name for name, changes in report["layers"].items() if changes["without_far"] < UNUSED]
        lines.append(
            f"layers without far      {len(unused)} of {len(report['layers'])} change by less than {UNUSED:g} of the "
            f"output's variance{': ' + unused[0] + (', …' if len(unused) > 1 else '') if unused else ''}"
        )
    if report["features"]:
        lines.append(
            f"Fréchet distance      {report['features']['frechet_distance']:.4f} by {report['features']['name']}"
        )
    return "\n".join([*lines, f"saved to {out}: index.html, images.csv, sheet.png, compare.json, and the images"])


def write_page(path: Path, report: dict[str, Any], rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Write a page for a browser, beside the folders of images: all pairs, the worst first, and the layers' branches.

    It is one file that needs no network and no script.
    """
    text = "".join(f"<p>{escape(line)}</p>\n" for line in report_text(report, path.parent).splitlines()[:-1])
    pairs = []
    for row in sorted(rows, key=lambda row: row["psnr"]):
        more = "".join(f", {name.replace('_', ' ')} {row[name]:.3f}" for name in FIGURES if name in row)
        figures = {"teacher": "", "hybrid": f" {row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}{more}"}
        cells = []
        for name in columns:
            if name not in figures:
                figures[name] = f" {row[f'{name}_psnr'.replace(' ', '_')]:.2f} dB"
            source = f"{quote(name)}/{row['image']:05d}.png"
            cells.append(
                f'<figure><a href="{source}"><img loading="lazy" alt="" src="{source}"></a>'
                f"<figcaption>{name}{figures[name]}</figcaption></figure>"
            )
        pairs.append(
            f"<section><h2>{escape(row['prompt'])} <small>seed {row['seed']}</small></h2>{''.join(cells)}</section>\n"
        )
    layers = ""
    if report["layers"]:
        lines = "".join(
            f"<tr><td>{escape(name)}</td><td>{changes['without_near']:.2e}</td><td>{changes['without_far']:.2e}</td></tr>\n"
            for name, changes in report["layers"].items()
        )
        layers = (
            "<h1>Layers</h1><p>Squared change of a layer's output without a branch, over the output's variance "
            f"(first image).</p><table><tr><th>layer</th><th>without near</th><th>without far</th></tr>\n{lines}</table>\n"
        )
    title = f"{report['model']}: hybrid and teacher"
    page = PAGE.format(title=escape(title), text=text, pairs="".join(pairs), layers=layers)
    path.write_text(page, encoding="utf-8")


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5em; max-width: 90em; color: #222; background: #fff; }}
section {{ border-top: 1px solid #ccc; padding: .5em 0; }}
h1 {{ font-size: 1.3em; }} h2 {{ font-size: 1em; font-weight: 600; }} small {{ color: #666; font-weight: 400; }}
figure {{ display: inline-block; margin: 0 1em .5em 0; max-width: 23%; min-width: 8em; vertical-align: top; }}
img {{ width: 100%; image-rendering: auto; }} figcaption {{ font-size: .85em; color: #444; }}
td, th {{ padding: .1em .8em .1em 0; text-align: left; font-variant-numeric: tabular-nums; }} p {{ margin: .2em 0; }}
</style></head><body>
<h1>{title}</h1>
{text}<p>Sorted by PSNR, the worst first.</p>
{pairs}{layers}</body></html>
"""


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
