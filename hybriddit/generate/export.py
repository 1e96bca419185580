"""Images in the folders that published benchmarks of text-to-image models read: what the command `export` does.

Each layout is that of its authors' repository: djghosh13/geneval (README), Karine-Huang/T2I-CompBench (BLIP_vqa.py,
inference_eval.py), tgxs002/HPSv2 (README) and TencentQQGYLab/ELLA (dpg_bench/compute_dpg_bench.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..data.prompts import prompt_files, read_prompts
from ..data.text import lines_of, read_text
from ..files import filling
from ..images import open_image, read_record
from .files import output_paths


class Entry(NamedTuple):
    """One prompt of a benchmark: its text, the file that holds it, its rows in this file and in all; and its images."""

    prompt: str
    file: Path
    row: int
    number: int
    images: Sequence[Path]


class Benchmark(NamedTuple):
    """How a benchmark wants its images.

    images: of each prompt, as published. write: puts those of all prompts into the folder.
    prompts: what of the benchmark's repository --prompts takes.
    """

    images: int
    write: Callable[[Sequence[Entry], Path], None]
    prompts: str


def run(benchmark: str, image: Path, prompts: Path, out: Path, *, num_images: int | None = None) -> dict[str, Any]:
    """Lay out images that `generate` made of a benchmark's prompts in the new folder `out`, whole or not at all.

    benchmark: a key of BENCHMARKS. image: what `generate --out` got, whose numbered files are read. prompts: the
    benchmark's own file or folder, which `generate --prompts` got, too. num_images: of each prompt; None: as many as the
    benchmark's authors ask for.

    Returns {"prompts", "images"}, the numbers. Raises ValueError or OSError, in one line, for an image that is missing or
    was made of another prompt, and for what the layout cannot hold.
    """
    layout = BENCHMARKS[benchmark]
    many = layout.images if num_images is None else num_images
    if many < 1:
        raise ValueError(f"--num-images must be at least 1, not {many}")
    rows = [(prompt, file, row) for file in prompt_files(prompts) for row, prompt in enumerate(read_prompts(file))]
    paths = output_paths(image, len(rows) * many)
    entries = [Entry(*row, number, paths[number * many : (number + 1) * many]) for number, row in enumerate(rows)]
    for entry in entries:
        for path in entry.images:
            made = read_record(path) if path.is_file() else None
            if made is None:
                what = "has no record of how it was made" if path.exists() else "is missing"
                command = f"hybriddit generate --prompts {prompts} --num-images {many} --out {image}"
                raise ValueError(f"{path} {what}: {command} makes it")
            if made.get("prompt") != entry.prompt:
                raise ValueError(
                    f"{path} was made of the prompt {made.get('prompt')!r}, and prompt {entry.number + 1} of {prompts} is "
                    f"{entry.prompt!r}: take the file, and the --num-images, that it was made with"
                )
    with filling(out) as folder:
        layout.write(entries, folder)
    return {"prompts": len(entries), "images": len(paths)}


def _geneval(entries: Sequence[Entry], folder: Path) -> None:
    """00000/metadata.jsonl with the prompt's line, and 00000/samples/0000.png, …"""
    files = {entry.file for entry in entries}
    lines = {file: [line for line in lines_of(read_text(file)) if line.strip()] for file in files}
    for entry in entries:
        line = lines[entry.file][entry.row]
        row = json.loads(line) if entry.file.suffix == ".jsonl" else None
        if not isinstance(row, dict) or "tag" not in row or row.get("prompt") != entry.prompt:
            raise ValueError(
                f"{entry.file} is not GenEval's list of prompts with tags: take {BENCHMARKS['geneval'].prompts}"
            )
        samples = folder / f"{entry.number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
        for number, image in enumerate(entry.images):
            _copy(image, samples / f"{number:04d}.png")


def _t2i_compbench(entries: Sequence[Entry], folder: Path) -> None:
    """samples/PROMPT_000000.png, numbered through all prompts: the benchmark reads the prompt from the name."""
    for entry in entries:
        if bad := [letter for letter in "/\\_\0" if letter in entry.prompt]:
            raise ValueError(
                f"T2I-CompBench reads prompts from names of files, which cannot hold {bad[0]!r}: {entry.prompt!r}"
            )
    (folder / "samples").mkdir()
    named = ((entry.prompt, image) for entry in entries for image in entry.images)
    for number, (prompt, image) in enumerate(named):
        _copy(image, folder / "samples" / f"{prompt}_{number:06d}.png")


def _hpsv2(entries: Sequence[Entry], folder: Path) -> None:
    """STYLE/00000.jpg: a folder for each of the benchmark's files of prompts."""
    for entry in entries:
        if len(entry.images) > 1:
            raise ValueError("HPSv2 takes one image of each prompt: leave --num-images out")
        style = folder / entry.file.stem
        style.mkdir(exist_ok=True)
        # the least that JPEG changes
        open_image(entry.images[0]).save(style / f"{entry.row:05d}.jpg", quality=100, subsampling=0)


def _dpg_bench(entries: Sequence[Entry], folder: Path) -> None:
    """NAME.png, of the prompt's file: its four images in two rows."""
    for entry in entries:
        if entry.row:
            raise ValueError(f"{entry.file} holds several prompts, and DPG-Bench has a file for each")
        images = [open_image(path) for path in entry.images]
        side = images[0].width
        if len(images) not in (1, 4) or any(image.size != (side, side) for image in images):
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise ValueError(f"DPG-Bench takes four square images of one size, or one, of each prompt, not {sizes}")
        sheet = Image.new("RGB", (2 * side, 2 * side) if len(images) == 4 else (side, side))
        for i, image in enumerate(images):
            sheet.paste(image, (i % 2 * side, i // 2 * side))
        sheet.save(folder / f"{entry.file.stem}.png")


def _copy(image: Path, place: Path) -> None:
    if image.suffix.lower() == place.suffix:
        shutil.copyfile(image, place)
    else:
        open_image(image).save(place)


BENCHMARKS = {
    "geneval": Benchmark(4, _geneval, "prompts/evaluation_metadata.jsonl"),
    "t2i-compbench": Benchmark(10, _t2i_compbench, "a file of examples/dataset, such as color_val.txt"),
    "hpsv2": Benchmark(1, _hpsv2, "the folder of anime.json, concept-art.json, paintings.json and photo.json"),
    "dpg-bench": Benchmark(4, _dpg_bench, "the folder dpg_bench/prompts"),
}
