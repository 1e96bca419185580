#!/usr/bin/env python
"""Compare hybrid, window-only and linear-only students on the demo's teacher: is near plus far better than either?

    python scripts/demo_full.py            # writes outputs/demo-full/table.md, compare.png and one JSON per run

The students are distilled equally long from the same images, once per seed. The distilled hybrids are judged again with
the near and then the far branch switched off. Finished runs are not repeated: the same command continues where it was
stopped.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

from hybriddit.data.sources import make_data
from hybriddit.demo.judge import Judge
from hybriddit.demo.run import (
    SEEDS,
    SHOWN,
    compare,
    contact_sheet,
    generate,
    judged,
    sampling_of,
    set_gates,
)
from hybriddit.models import hybridize
from hybriddit.pipelines.loading import load_pipeline
from hybriddit.training.distill import distill
from hybriddit.training.run_config import load_config, to_dict

VARIANTS = {
    "hybrid": {},
    "window only": {"linear": False},
    "linear only": {"window": None},
}
COLUMNS = ("psnr", "ssim", "prompt_agreement", "pair_match", "match_score_same", "match_score_different")


def settings(run) -> dict:
    """The settings of a recorded run, in the form that JSON gives back."""
    return json.loads(json.dumps(to_dict(run)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/distill/demo.yaml")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo-full"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides the config")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = load_config(args.config, args.overrides)
    config.output.folder = None
    folder = Path(config.model.path)
    judge, sampling = Judge.load(folder.parent / "demo-judge.safetensors"), sampling_of(config)
    prompts, image_seeds = [scene.prompt for scene in SHOWN], list(SEEDS)
    scenes = [scene for scene in SHOWN for _ in image_seeds]

    pipeline = load_pipeline(str(folder))
    teacher = generate(pipeline, prompts, image_seeds, sampling, "teacher")
    data = None
    results: dict[str, list[dict]] = {"teacher": [judged(teacher, scenes, judge)]}
    shown = {"teacher": teacher}

    def finished(name: str, seed: int, run) -> bool:
        path = record(name, seed, "json")
        return path.exists() and json.loads(path.read_text())["settings"] == settings(run)

    def measure(name: str, seed: int, transformer, run) -> None:
        pipeline.transformer = transformer
        images = generate(pipeline, prompts, image_seeds, sampling, name)
        np.save(record(name, seed, "npy"), images)
        values = compare(images, teacher) | judged(images, scenes, judge)
        values |= {"settings": settings(run)}
        record(name, seed, "json").write_text(json.dumps(values, indent=2) + "\n")
        print(f"{name}, seed {seed}: {values}", flush=True)

    def record(name: str, seed: int, ending: str) -> Path:
        return args.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.{ending}"

    started = time.monotonic()
    dense = pipeline.transformer
    for seed in args.seeds:
        for variant, changes in VARIANTS.items():
            names = [variant] + ([f"{variant}, near off", f"{variant}, far off"] if not changes else [])
            fresh = ["hybrid, undistilled"] if not changes and seed == args.seeds[0] else []
            hybrid = dataclasses.replace(config.hybrid, **changes)
            run = dataclasses.replace(config, hybrid=hybrid, train=dataclasses.replace(config.train, seed=seed))
            if all(finished(name, seed, run) for name in (*names, *fresh)):
                continue
            pipeline.transformer = copy.deepcopy(dense)
            if data is None:
                data = make_data(pipeline, config.data)
            hybridize(pipeline.transformer, hybrid)
            for name in fresh:
                measure(name, seed, pipeline.transformer, run)
            transformer = distill(pipeline, data, run)
            measure(variant, seed, transformer, run)
            for name, value in zip(names[1:], (1.0, 0.0), strict=False):
                off = copy.deepcopy(transformer)
                set_gates(off, value)
                measure(name, seed, off, run)

    every = ["hybrid, undistilled", "hybrid", "hybrid, near off", "hybrid, far off", "window only", "linear only"]
    for name in every:
        files = [record(name, seed, "json") for seed in args.seeds if record(name, seed, "json").exists()]
        results[name] = [json.loads(file.read_text()) for file in files]
        shown[name] = np.load(record(name, args.seeds[0], "npy"))
    first = slice(None, None, len(image_seeds))
    contact_sheet(
        {name.replace(", ", ",\n"): images[first] for name, images in shown.items()}, prompts, args.out / "compare.png"
    )
    (args.out / "table.md").write_text(table(results, config))
    print((args.out / "table.md").read_text(), f"\n{time.monotonic() - started:.0f} s", sep="")


def table(results: dict[str, list[dict]], config) -> str:
    """A table of means and standard deviations over the seeds, as Markdown."""
    lines = [
        f"| student | seeds | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    for name, runs in results.items():
        cells = []
        for column in COLUMNS:
            values = [run[column] for run in runs if column in run]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}" if values else "-")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"- Command: `{' '.join(['python scripts/demo_full.py', *sys.argv[1:]])}`, {time.strftime('%Y-%m-%d')}.",
            f"- {config.train.steps} steps of batch {config.train.batch_size} each; {config.data.images} images made by "
            f"the teacher; window {config.hybrid.window}, map rank {config.hybrid.map_rank}, delta rank "
            f"{config.hybrid.delta_rank}, gate per {config.hybrid.gate}.",
            f"- {len(SHOWN)} prompts x {len(SEEDS)} seeds, {config.data.steps} sampler steps.",
            f"- {os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
