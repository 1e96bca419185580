#!/usr/bin/env python
"""Images of a demo teacher's students at 2 and 4 times the size that they were trained at: at once, and in stages.

    python scripts/cascade_quality.py --out outputs/cascade/flux
    python scripts/cascade_quality.py --config configs/distill/demo_sd3.yaml --out outputs/cascade/sd3
    python scripts/cascade_quality.py --report outputs/cascade/flux outputs/cascade/sd3
    python scripts/cascade_quality.py --seams

Rows are model (dense, hybrid, window only) x way (direct, each schedule of a cascade, Lanczos' enlargement alone) x
positions. Students are distilled once and kept; rows that are done are not repeated. Each image is judged as a whole,
scaled down to the size that the judge knows. --report writes the tables of benchmarks/results/cascade.md, whose other
text stays, and its pictures. --seams prints how far the tiles of the teacher's VAE show at 4 times the size.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from hybriddit import hybridize, load_adapter, save_adapter
from hybriddit.data.sources import make_data
from hybriddit.demo.canvas import CANVAS, GARMENT, LEFT, RIGHT, TOP
from hybriddit.demo.judge import Judge
from hybriddit.demo.run import SHOWN, judged, sampling_of
from hybriddit.files import read_json, replacing, write_json
from hybriddit.images import contact_sheet
from hybriddit.machine import git_state
from hybriddit.models import family_of, scaled_positions
from hybriddit.pipelines.cascade import SCHEDULES, Schedule, encode_enlarged, repainting, stage_sizes
from hybriddit.pipelines.loading import load_pipeline
from hybriddit.pipelines.memory import decode_in_strips
from hybriddit.training.distill import distill
from hybriddit.training.run_config import load_config

PAGE = Path("benchmarks/results/cascade.md")
STUDENTS = {"dense": None, "hybrid": [], "window only": ["hybrid.linear=false"]}
WAYS: dict[str, Schedule] = {
    **SCHEDULES,
    "refine, sigma 0.3, 2 steps": Schedule(0.3, 2),
    "sdedit, sigma 0.6, 9 steps": Schedule(0.6, 9),
    "sdedit, in latents": Schedule(0.4, 6, enlarged_in="latents"),
}
SEED = 1001
COLUMNS = {
    "prompt_agreement": "garments right, %",
    "pair_match": "pairs right, %",
    "astray": "light astray, %",
    "self_similarity": "self-similarity",
    "psnr": "PSNR to the first stage, dB",
    "sharpness": "sharpness",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Row:
    """scale: times the trained size. way: "direct", "Lanczos" or one of WAYS."""

    model: str
    scale: int
    way: str
    positions: str

    @property
    def name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.model} {self.scale} {self.way} {self.positions}".lower())


def rows_of(positions: tuple[str, ...]) -> Iterator[Row]:
    """What is tried: every way at twice the size; at 4 times the size what remains of interest."""
    first = positions[0]
    for model in STUDENTS:
        for how in positions:
            yield Row(model, 2, "direct", how)
            for way in ("refine", "sdedit", "residual", "low-frequency"):
                yield Row(model, 2, way, how)
        best = "interpolated" if "interpolated" in positions else first
        for way in WAYS:
            if way not in SCHEDULES:
                yield Row(model, 2, way, best)
        for how in [how for how in positions if how in (first, "interpolated", "yarn")]:
            for way in ("refine", "sdedit"):
                yield Row(model, 4, way, how)
    for model in STUDENTS:
        yield Row(model, 2, "Lanczos", first)
        yield Row(model, 4, "direct", best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/distill/demo.yaml")
    parser.add_argument("--out", type=Path, default=Path("outputs/cascade/flux"))
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="of the distillations")
    parser.add_argument("--images", type=int, default=len(SHOWN), help="of each row (default: %(default)s)")
    parser.add_argument("--report", type=Path, nargs="+", metavar="OUT", help="write the tables and the pictures")
    parser.add_argument("--seams", action="store_true", help="of the VAE's tiles, and no rows")
    args = parser.parse_args()
    if args.report:
        report(args.report)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    quality = Quality(args.config, args.set, args.out, args.images)
    if args.seams:
        print_seams(quality)
        return
    for row in rows_of(family_of(quality.dense).positions):
        quality.run(row)
    print(table(args.out))


class Quality:
    """One teacher, its students, and the images of the first stage."""

    def __init__(self, config_path: str, overrides: list[str], out: Path, images: int):
        self.config_path, self.overrides, self.out = config_path, overrides, out
        self.config = load_config(config_path, overrides)
        folder = Path(self.config.model.path)
        self.judge = Judge.load(folder.parent / "demo-judge.safetensors")
        self.pipeline = load_pipeline(str(folder))
        self.pipeline.set_progress_bar_config(disable=True)
        self.dense = self.pipeline.transformer
        self.scenes = list(SHOWN[:images])
        self.sampling = sampling_of(self.config)
        self.first: dict[str, list[Image.Image]] = {}

    def student(self, name: str) -> nn.Module:
        """The teacher, or its student of this name, distilled if that was not done."""
        if STUDENTS[name] is None:
            return self.dense
        folder = self.out / name.replace(" ", "-")
        if not folder.exists():
            config = load_config(self.config_path, [*self.overrides, *STUDENTS[name]])
            config.output.folder = None
            data = make_data(self.pipeline_of(self.dense), config.data)
            torch.manual_seed(config.train.seed)
            model = hybridize(copy.deepcopy(self.dense), config.hybrid)
            distill(self.pipeline_of(model), data, config)
            save_adapter(model, folder)
        return load_adapter(copy.deepcopy(self.dense), folder)

    def pipeline_of(self, model: nn.Module):
        self.pipeline.transformer = model
        return self.pipeline

    def run(self, row: Row) -> None:
        path = self.out / f"{row.name}.json"
        if path.exists():
            return
        self.pipeline_of(self.student(row.model))
        size = self.config.data.width, self.config.data.height
        if row.model not in self.first:
            self.first[row.model] = [self.direct(scene.prompt, size, "plain") for scene in self.scenes]
        wanted, images, started = (row.scale * size[0], row.scale * size[1]), [], time.monotonic()
        try:
            for scene, small in zip(self.scenes, self.first[row.model], strict=True):
                if row.way == "direct":
                    images.append(self.direct(scene.prompt, wanted, row.positions))
                elif row.way == "Lanczos":
                    images.append(small.resize(wanted, Image.Resampling.LANCZOS))
                else:
                    images.append(self.in_stages(scene.prompt, small, wanted, WAYS[row.way], row.positions))
        except ValueError as error:  # a table of positions that ends
            write_json(path, {**vars(row), "refused": str(error)})
            return
        seconds = (time.monotonic() - started) / len(images)
        pixels = np.stack([np.asarray(image) for image in images])
        enlarged = np.stack([np.asarray(s.resize(wanted, Image.Resampling.LANCZOS)) for s in self.first[row.model]])
        small = np.stack([np.asarray(image.resize((CANVAS, CANVAS), Image.Resampling.BOX)) for image in images])
        error = np.square(pixels.astype(float) - enlarged).mean((1, 2, 3))
        record = {
            **vars(row),
            **judged(small, self.scenes, self.judge),
            "astray": astray(small),
            "self_similarity": self_similarity(small),
            "psnr": float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-9)))),
            "sharpness": gradient(pixels) / gradient(enlarged),
            "seconds": seconds,
            "images": len(images),
            "config": self.config_path,
            "common": self.overrides,
            "git": git_state(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        with replacing(path.with_suffix(".npy")) as new, open(new, "wb") as file:
            np.save(file, pixels)
        write_json(path, record)
        print(row.name, {key: round(record[key], 3) for key in COLUMNS}, flush=True)

    def direct(self, prompt: str, size: tuple[int, int], positions: str) -> Image.Image:
        generator = torch.Generator().manual_seed(SEED)
        with self.positions(size, positions):
            sizes = {"width": size[0], "height": size[1]}
            return self.pipeline(prompt, **{**self.sampling, **sizes}, generator=generator).images[0]

    def in_stages(
        self, prompt: str, image: Image.Image, size: tuple[int, int], schedule: Schedule, positions: str
    ) -> Image.Image:
        for number, stage in enumerate(stage_sizes(size, image.size, 1)):
            generator = torch.Generator().manual_seed(SEED + number + 1)
            with (
                self.positions(stage, positions),
                repainting(self.pipeline, image, stage, schedule, generator) as arguments,
            ):
                image = self.pipeline(prompt, **{**self.sampling, **arguments}).images[0]
        return image

    def positions(self, size: tuple[int, int], positions: str):
        model = self.pipeline.transformer
        side = family_of(model).token_pixels(model.config, self.pipeline.vae_scale_factor)
        native = self.config.data.height // side, self.config.data.width // side
        return scaled_positions(model, positions, native, (size[1] // side, size[0] // side))


def astray(images: np.ndarray) -> float:
    """The share of light that is not where the two garments belong, of canvases uint8 [N, CANVAS, CANVAS, 3]; the mean.

    What a model repeats, or puts elsewhere, beyond the size that it knows is astray. 1 for a black image.
    """
    light = np.square(images.astype(float)).sum(3)
    inside = sum(light[:, TOP : TOP + GARMENT, x : x + GARMENT].sum((1, 2)) for x in (LEFT, RIGHT))
    return float(np.mean(1 - inside / np.maximum(light.sum((1, 2)), 1e-6)))


def self_similarity(images: np.ndarray, side: int = 12, step: int = 2) -> float:
    """How much images repeat themselves: of uint8 [N, H, W, 3], the mean over their patches that show something.

    Each patch, of side x side pixels, is compared with all that do not overlap it: the largest correlation, in [-1, 1], of
    the two in grey. Patches with less than a quarter of the contrast (standard deviation) of the image's strongest show
    nothing. 0 for images without any contrast.
    """
    found = []
    for image in torch.from_numpy(images.astype(np.float64)).mean(3):
        patches = image.unfold(0, side, step).unfold(1, side, step)
        places = torch.cartesian_prod(*(torch.arange(length) * step for length in patches.shape[:2]))
        patches = patches.reshape(len(places), -1)
        patches = patches - patches.mean(1, keepdim=True)
        contrast = patches.norm(dim=1)
        shown = contrast > contrast.max() / 4
        patches, places = patches[shown] / contrast[shown, None], places[shown]
        apart = (places[:, None] - places).abs().amax(2) >= side
        best = torch.where(apart, patches @ patches.T, -1.0).amax(1) if len(places) else torch.zeros(1)
        found.append(float(best.mean()))
    return float(np.mean(found))


def gradient(images: np.ndarray) -> float:
    """Mean difference of neighbouring pixels, of uint8 [N, H, W, 3]."""
    images = images.astype(float)
    return float(np.abs(np.diff(images, axis=1)).mean() + np.abs(np.diff(images, axis=2)).mean())


@torch.no_grad()
def print_seams(quality: Quality) -> None:
    """Encode and decode the teacher's images, enlarged 4 times, whole and in tiles: hybriddit's and diffusers'.

    The gradient at seams is the mean difference of neighbouring columns and rows where a tile is blended into the next, in
    proportion to that of the image's other places; and that in proportion to the whole's.
    """
    pipeline, size = quality.pipeline_of(quality.dense), (4 * quality.config.data.width, 4 * quality.config.data.height)
    vae, side = pipeline.vae, (quality.config.data.width, quality.config.data.height)
    images = [quality.direct(scene.prompt, side, "plain") for scene in quality.scenes]
    pixels = vae.tile_sample_min_size
    blended = int(pixels * vae.tile_overlap_factor)
    at_seam = np.arange(size[0] - 1) % (pixels - blended) < blended
    at_seam[: pixels - blended] = False  # the first tile has none at its beginning

    def share(image: np.ndarray) -> float:
        image = image.astype(float)
        across, down = np.abs(np.diff(image, axis=1)).mean((0, 2)), np.abs(np.diff(image, axis=0)).mean((1, 2))
        return float(np.mean([part[at_seam].mean() / part[~at_seam].mean() for part in (across, down)]))

    def decoded(image: Image.Image, encodes: bool) -> np.ndarray:
        return np.concatenate(list(decode_in_strips(vae, encode_enlarged(pipeline, image, size, size, encodes))))

    def decoded_by_diffusers(image: Image.Image, encodes: bool, decodes: bool = True) -> np.ndarray:
        enlarged = np.asarray(image.resize(size, Image.Resampling.LANCZOS)).copy()
        vae.use_tiling = encodes
        latents = vae.encode(torch.from_numpy(enlarged).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mode()
        vae.use_tiling = decodes
        image = vae.decode(latents).sample[0].permute(1, 2, 0) / 2 + 0.5
        vae.use_tiling = False
        return (image.clamp(0, 1) * 255).round().byte().numpy()

    whole = [decoded_by_diffusers(image, False, False) for image in images]
    ways = {"each tile's own norms, as in diffusers": decoded_by_diffusers, "norms of crops": decoded}
    for (norms, way), encodes in itertools.product(ways.items(), (False, True)):
        name = f"{norms}: {'encoded and ' if encodes else ''}decoded in tiles"
        tiled = [way(image, encodes) for image in images]
        error = [np.square(a.astype(float) - b).mean() for a, b in zip(tiled, whole, strict=True)]
        ratio = [share(a) / share(b) for a, b in zip(tiled, whole, strict=True)]
        psnr = np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-9)))
        print(f"{name}: {psnr:.1f} dB to the whole, gradient at seams {np.mean(ratio):.3f} of the whole's there")


def read_rows(out: Path) -> list[dict]:
    """The records of a folder, the best first in each group of model and size."""
    records = [read_json(path) for path in out.glob("*.json")]
    order = {name: number for number, name in enumerate(STUDENTS)}
    return sorted(
        records,
        key=lambda r: (
            r["scale"],
            order[r["model"]],
            list(("direct", "Lanczos", *WAYS)).index(r["way"]),
            r["positions"],
        ),
    )


def table(out: Path) -> str:
    head = ["size", "model", "way", "positions", *COLUMNS.values()]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for record in read_rows(out):
        cells = [f"{record['scale']} x", record["model"], record["way"], record["positions"]]
        if "refused" in record:
            cells += ["refused: the table of positions ends", *[""] * (len(COLUMNS) - 1)]
        else:
            for column in COLUMNS:
                if column == "psnr" and record["way"] == "Lanczos":  # to itself
                    cells.append("")
                    continue
                value = record[column] * (100 if column in ("prompt_agreement", "pair_match", "astray") else 1)
                cells.append(f"{value:.{2 if column in ('sharpness', 'seconds') else 1}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(folders: list[Path]) -> None:
    """Replace the tables between the page's markers, and draw a sheet of each folder's images at twice the size."""
    text = PAGE.read_text()
    for folder in folders:
        begin, end = f"<!-- table: {folder.name} -->", f"<!-- end: {folder.name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{table(folder)}\n\n{end}{rest.partition(end)[2]}"
        sheet(folder, PAGE.parent / f"cascade-{folder.name}.png")
    PAGE.write_text(text)


def sheet(out: Path, path: Path) -> None:
    """The hybrid's images at twice the size (or, as long as it has none, the teacher's): a row for each way."""
    shown = (0, 4, 6, 9, 11)
    rows, records = {}, [record for record in read_rows(out) if record["scale"] == 2 and "refused" not in record]
    model = "hybrid" if any(record["model"] == "hybrid" for record in records) else "dense"
    for record in records:
        told = (
            record["way"] == "direct" or record["way"] in SCHEDULES and record["positions"] in ("plain", "interpolated")
        )
        if record["model"] == model and told:
            images = np.load(out / f"{Row(*(record[key] for key in ('model', 'scale', 'way', 'positions'))).name}.npy")
            name = f"{record['way'].replace(', ', ',' + chr(10))},\n{record['positions']}"
            rows[name] = [images[number] for number in shown if number < len(images)]
    contact_sheet(rows, [SHOWN[number].prompt for number in shown][: len(next(iter(rows.values())))], path, width=128)


if __name__ == "__main__":
    main()
