#!/usr/bin/env python
"""Distill a demo teacher with one setting changed at a time, several seeds each, and compare the students.

    python scripts/ablation.py                                    # every row, seeds 0 to 2
    python scripts/ablation.py --rows default "elu + 1" --seeds 0
    python scripts/ablation.py --config configs/distill/demo_sd3.yaml --out outputs/ablation/sd3
    python scripts/ablation.py --row "wide window" hybrid.window=9
    python scripts/ablation.py --times                            # of the same rows: a pass of each model, in turns
    python scripts/ablation.py --report outputs/ablation/flux outputs/ablation/sd3

Finished runs are not repeated, and the same command may run several times at once: each process takes runs that no
other has, so start one per core with OMP_NUM_THREADS=1. Every student sees the same images, noise and order of a seed;
it is judged on other prompts' seeds, as a whole and with its near or far branch switched off. At the end it prints a
table, and leaves pictures in the folder of --out. --report writes the tables of benchmarks/results/ablation.md, whose
other text stays, and its pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import json
import platform
import re
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hybriddit.benchmark.measure import Case, Limits, measure
from hybriddit.data.sources import make_data
from hybriddit.demo.judge import Judge
from hybriddit.demo.run import SHOWN, compare, generate, judged, layout_of, sampling_of
from hybriddit.files import read_json, replacing, write_json
from hybriddit.images import contact_sheet
from hybriddit.machine import git_state
from hybriddit.models import family_of, hybridize
from hybriddit.models.branches import one_branch
from hybriddit.models.flops import attention_flops
from hybriddit.pipelines.loading import load_pipeline
from hybriddit.training.distill import distill
from hybriddit.training.run_config import load_config, to_dict

# What each row changes of the config, as on the command line of `hybriddit distill`.
ROWS: dict[str, list[str]] = {
    "default": [],
    # the branches
    "window only": ["hybrid.linear=false"],
    "linear only": ["hybrid.window=null"],
    "LinFusion's far branch": ["hybrid.mixer=linfusion"],
    # how they are joined
    "gate join": ["hybrid.join=gate"],
    "gate per head": ["hybrid.gate=head"],
    "gate per channel": ["hybrid.gate=channel"],
    # feature map, position and projection
    "hedgehog": ["hybrid.feature_map=hedgehog"],
    "elu + 1": ["hybrid.feature_map=elu"],
    "m = 4": ["hybrid.projection=4"],
    "m = 8": ["hybrid.projection=8"],
    "m = 16": ["hybrid.projection=16"],
    "no rotary embedding": ["hybrid.rotary=none"],
    "axial rotary embedding": ["hybrid.rotary=axial"],
    # maps
    "no maps": ["hybrid.map_rank=0"],
    "no maps, m = 8": ["hybrid.map_rank=0", "hybrid.projection=8"],
    "maps of rank 6": ["hybrid.map_rank=6"],
    "maps of rank 12": ["hybrid.map_rank=12"],
    # other papers' far branches
    "block states": ["hybrid.mixer=blocks"],
    "multi-scale": ["hybrid.mixer=multiscale"],
    "pooled keys": ["hybrid.mixer=pooled"],
    "scans": ["hybrid.mixer=scan"],
    # smaller parts
    "temperature": ["hybrid.temperature=true"],
    "keys centred": ["hybrid.center_keys=true"],
    "convolution of v, 3 x 3": ["hybrid.value_conv=3"],
    # window
    "window 3": ["hybrid.window=3"],
    "window 7": ["hybrid.window=7"],
    "window 6, stride 2": ["hybrid.window=6", "hybrid.stride=2"],
    "window 3, dilation 2": ["hybrid.window=3", "hybrid.dilation=2"],
    # what learns
    "no low-rank deltas": ["hybrid.delta_rank=null"],
    "deltas of rank 8": ["hybrid.delta_rank=8"],
    "blocks 0 and 3 of each kind dense": ["hybrid.layers={'*blocks.0.*': dense, '*blocks.3.*': dense}"],
    # losses
    "task loss 1": ["loss.task=1"],
    "layer loss 0.5": ["loss.layer=0.5"],
    "task 1, output 0.5, layer 0.5": ["loss.task=1", "loss.output=0.5", "loss.layer=0.5"],
    "window dropout": ["loss.window_dropout=0.1"],
    "task loss alone": ["loss.task=1", "loss.output=0"],
    "distribution matching 2": ["loss.distribution=2"],
    # the unconverted model: the same updates of the same layers' projections, and attention over the whole grid
    "dense control": ["hybrid.linear=false", "hybrid.window=1024"],
    "dense control, task loss alone": ["hybrid.linear=false", "hybrid.window=1024", "loss.task=1", "loss.output=0"],
    # stages
    "every second layer first": ["loss.progressive_steps=270"],
    # training
    "300 steps": ["train.steps=300"],
    "1300 steps": ["train.steps=1300"],
    "4000 steps": ["train.steps=4000"],
    "rate 6e-3": ["optim.lr=6e-3"],
    "rate 1.5e-3": ["optim.lr=1.5e-3"],
}
# The far branch once more, joined by a gate.
GATE_JOIN: dict[str, list[str]] = {
    "gate per channel": ["hybrid.gate=channel"],
    "hedgehog": ["hybrid.feature_map=hedgehog"],
    "hedgehog, m = 32": ["hybrid.feature_map=hedgehog", "hybrid.projection=32"],
    "hedgehog, no maps, m = 32": ["hybrid.feature_map=hedgehog", "hybrid.map_rank=0", "hybrid.projection=32"],
    "elu + 1": ["hybrid.feature_map=elu"],
    "no maps": ["hybrid.map_rank=0"],
    "maps of rank 6": ["hybrid.map_rank=6"],
    "axial rotary embedding": ["hybrid.rotary=axial"],
}
ROWS |= {f"gate join, {name}": ["hybrid.join=gate", *changes] for name, changes in GATE_JOIN.items()}
PAGE = Path("benchmarks/results/ablation.md")
IMAGE_SEEDS = tuple(range(1001, 1009))
MOST_SHOWN = 45  # dB in a plot: a model that is nearly the teacher would press all others together
BRANCH_SEEDS = 3  # of these, for the students with a branch switched off
COLUMNS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "pair_match": "pairs right",
    "far_off": "far off, dB",
    "near_off": "near off, dB",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/distill/demo.yaml")
    parser.add_argument("--out", type=Path, default=Path("outputs/ablation/flux"))
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"of {', '.join(ROWS)}; all if left out")
    parser.add_argument("--row", nargs="+", action="append", default=[], metavar=("NAME", "section.key=value"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="for all rows")
    parser.add_argument("--times", action="store_true", help="time the rows' models instead of distilling them")
    parser.add_argument("--report", type=Path, nargs="+", metavar="OUT", help="write the tables and the plots")
    args = parser.parse_args()
    if args.report:
        report(args.report)
        return
    rows = {name: overrides for name, *overrides in args.row}
    for name in args.rows or ([] if rows else ROWS):
        if name not in ROWS:
            parser.error(f"unknown row {name!r}: the rows are {', '.join(ROWS)}")
        rows[name] = ROWS[name]
    for overrides in rows.values():  # what is wrong is said before the teacher draws
        load_config(args.config, [*args.set, *overrides])
    args.out.mkdir(parents=True, exist_ok=True)
    ablation = Ablation(args.config, args.set, args.out)
    if args.times:
        ablation.measure_times({"default": [], **rows})
        return
    for seed in args.seeds:
        for name, overrides in rows.items():
            ablation.run(name, overrides, seed)
    runs = read_runs(args.out)
    if not runs:  # another process has them all
        return
    rows, images, every = table_rows(args.out, runs), args.out / "images.png", args.out / "rows.png"
    show(args.out, runs, images)
    plot(rows, every)
    print(table(rows), f"the images: {images}; every row: {every}", sep="\n\n")


class Ablation:
    """One teacher, its images to learn from and to be compared with, and the folder of the runs' records."""

    def __init__(self, config_path: str, overrides: list[str], out: Path):
        self.config_path, self.overrides, self.out = config_path, overrides, out
        config = self.config([])
        folder = Path(config.model.path)
        self.judge = Judge.load(folder.parent / "demo-judge.safetensors")
        self.pipeline = load_pipeline(str(folder))
        self.dense = self.pipeline.transformer
        self.sampling = sampling_of(config)
        self.prompts = [scene.prompt for scene in SHOWN]
        with locked(out / "teacher.lock", wait=True):
            path = out / "teacher.npy"
            if not path.exists():
                images = generate(self.pipeline, self.prompts, IMAGE_SEEDS, self.sampling, "teacher")
                with replacing(path) as new, open(new, "wb") as file:
                    np.save(file, images)
            self.data = make_data(self.pipeline, config.data)
        self.teacher = np.load(path)

    def config(self, overrides: list[str], seed: int = 0):
        given = [f"data.cache={self.out / 'latents'}", *self.overrides, *overrides]
        config = load_config(self.config_path, [*given, f"train.seed={seed}"])
        config.output.folder = None
        return config

    def run(self, name: str, overrides: list[str], seed: int) -> None:
        """Distill and judge one student, unless that is done or another process does it."""
        config = self.config(overrides, seed)
        settings = json.loads(json.dumps(to_dict(config)))
        del settings["train"]["progress"]  # a run is the same without it
        path = record_path(self.out, name, seed)
        with locked(path.with_suffix(".lock")) as mine:
            if not mine or (path.exists() and read_json(path)["settings"] == settings):
                return
            print(f"{name}, seed {seed}:", *overrides, flush=True)
            model = copy.deepcopy(self.dense)
            torch.manual_seed(seed)
            hybridize(model, config.hybrid)
            self.pipeline.transformer = model
            started = time.monotonic()
            distill(self.pipeline, self.data, config)
            seconds = time.monotonic() - started
            images, found = self.measure(model, len(IMAGE_SEEDS), name)
            for off, left in (("near_off", "far"), ("far_off", "near")):
                if config.hybrid.linear and config.hybrid.window is not None:
                    with one_branch(model, left):
                        found[off] = self.measure(model, BRANCH_SEEDS, f"{name}, {off}")[1]["psnr"]
            found |= {
                "name": name,
                "seed": seed,
                "overrides": overrides,
                "config": self.config_path,
                "common": self.overrides,
                "parameters": sum(p.numel() for key, p in model.named_parameters() if ".hybrid." in key),
                "attention_flops": attention_flops(model, layout_of(self.pipeline, config)),
                "seconds": round(seconds),
                "threads": torch.get_num_threads(),
                "git": git_state(),
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
                "machine": platform.machine(),
                "settings": settings,
            }
            with replacing(path.with_suffix(".npy")) as new, open(new, "wb") as file:
                np.save(file, images)
            write_json(path, found)
            print(json.dumps({key: found[key] for key in ("name", "seed", "seconds", *COLUMNS) if key in found}))

    def measure_times(self, rows: dict[str, list[str]]) -> None:
        """Write times.json: seconds of a batch, forward and backward, of each row's model, all in turns."""
        configs = {name: self.config(overrides) for name, overrides in rows.items()}
        cases = {}  # rows with one model share a case
        for config in configs.values():
            if (key := str(config.hybrid)) in cases:
                continue
            model = hybridize(copy.deepcopy(self.dense), config.hybrid)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".hybrid." in name)
            family, data = family_of(model), self.data.rows(range(config.train.batch_size))
            text = {name: data[name] for name in self.data.empty}
            latents, grid = data["latents"].float(), layout_of(self.pipeline, config).grids[0]
            times = torch.full((len(latents),), family.middle_time)
            inputs = family.model_inputs(latents, times, text, grid, None)
            forward = partial(lambda model, inputs: model(**inputs, return_dict=False)[0], model, inputs)
            cases[key] = Case(key, forward, [p for p in model.parameters() if p.requires_grad])
        outcomes = measure(cases.values(), True, torch.device("cpu"), Limits(repeats=15, max_seconds=60))
        seconds = {key: float(np.median(outcome.samples["forward + backward"])) for key, outcome in outcomes.items()}
        write_json(self.out / "times.json", {name: seconds[str(config.hybrid)] for name, config in configs.items()})

    def measure(self, model: nn.Module, seeds: int, name: str) -> tuple[np.ndarray, dict[str, float]]:
        """The images of a student for the first so many seeds, and how near they are to the teacher's."""
        self.pipeline.transformer = model
        images = generate(self.pipeline, self.prompts, IMAGE_SEEDS[:seeds], self.sampling, name)
        teacher = self.teacher.reshape(len(self.prompts), len(IMAGE_SEEDS), *images.shape[1:])[:, :seeds]
        scenes = [scene for scene in SHOWN for _ in range(seeds)]
        return images, compare(images, teacher.reshape(images.shape)) | judged(images, scenes, self.judge)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock that ends with the process; yields whether it was free, which it always is after waiting."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def read_runs(out: Path) -> dict[str, list[dict]]:
    """The records of a folder by row, in the order of ROWS."""
    runs: dict[str, list[dict]] = {}
    for path in sorted(out.glob("*-[0-9]*.json")):
        record = read_json(path)
        runs.setdefault(record["name"], []).append(record)
    known = list(ROWS)
    return dict(sorted(runs.items(), key=lambda row: known.index(row[0]) if row[0] in known else len(known)))


def table_rows(out: Path, runs: dict[str, list[dict]]) -> dict[str, list[str]]:
    """The cells of each row of a folder: means and, from two seeds on, standard deviations."""
    times = read_json(out / "times.json") if (out / "times.json").exists() else {}
    rows = {}
    for name, records in runs.items():
        cells = [name, " ".join(f"`{x}`" for x in records[0]["overrides"]), str(len(records))]
        for column in COLUMNS:
            values = [record[column] for record in records if column in record]
            digits = {"ssim": 3, "pair_match": 3}.get(column, 2)
            spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}" if values else "")
        flops = records[0]["attention_flops"]
        cells.append(f"{flops['hybrid'] / flops['dense']:.2f} of dense")
        cells.append(f"{times[name] / times['default']:.2f}" if name in times else "")
        rows[name] = cells
    return rows


def with_page(rows: dict[str, list[str]], section: str) -> dict[str, list[str]]:
    """These rows, and those of the page's table that were measured elsewhere or with more seeds, in the order of ROWS."""
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    there = {
        cells[0]: cells
        for line in lines
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] != "---"
    }
    for name, cells in there.items():
        if name not in rows or int(rows[name][2]) < int(cells[2]):
            print(f"{name}: as the page has it, of {cells[2]} seeds")
            rows[name] = cells
        elif not rows[name][-1]:
            rows[name][-1] = cells[-1]
    known = list(ROWS)
    return dict(sorted(rows.items(), key=lambda row: known.index(row[0]) if row[0] in known else len(known)))


def table(rows: dict[str, list[str]]) -> str:
    """The rows as Markdown."""
    head = ["row", "changes", "seeds", *COLUMNS.values(), "attention FLOPs", "time"]
    lines = [head, ["---"] * len(head), *rows.values()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(rows: dict[str, list[str]], path: Path) -> None:
    """PSNR and pairs of every row with their spread over the seeds, and lines at the default's means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (11, 1.2 + 0.26 * len(rows))
    figure, axes = pyplot.subplots(1, 2, figsize=size, sharey=True, width_ratios=(3, 2), layout="constrained")
    for axis, column, factor in zip(axes, ("psnr", "pair_match"), (1, 100), strict=True):
        place = 3 + list(COLUMNS).index(column)
        values = [[factor * float(x) for x in cells[place].split("±")] for cells in rows.values()]
        means, spreads = [x[0] for x in values], [x[1] if len(x) > 1 else 0 for x in values]
        axis.errorbar(means, range(len(rows)), xerr=spreads, fmt="o", color="C0", markersize=5, capsize=3)
        if "default" in rows:
            axis.axvline(means[list(rows).index("default")], color="C1", linewidth=1, zorder=0)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if column == "psnr" and max(means) > MOST_SHOWN:
            axis.set_xlim(right=MOST_SHOWN)
            for row, mean in enumerate(means):
                if mean > MOST_SHOWN:
                    axis.annotate(f"{mean:.1f} →", (MOST_SHOWN, row), ha="right", va="center", color="C0")
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].invert_yaxis()
    axes[0].set_xlabel("PSNR to the teacher, dB (means and spread over seeds; orange: default)")
    axes[1].set_xlabel("pairs right, %")
    figure.savefig(path, dpi=110)


def show(out: Path, runs: dict[str, list[dict]], images: Path) -> None:
    """Draw images of a folder's teacher and main students."""
    shown = {"teacher": np.load(out / "teacher.npy")}
    for name in ("default", "window only", "linear only", "LinFusion's far branch"):
        for record in runs.get(name, [])[:1]:
            shown[name] = np.load(record_path(out, name, record["seed"]).with_suffix(".npy"))
    first = slice(None, None, len(IMAGE_SEEDS))
    sheet = {name.replace(" only", ",\nalone").replace("'s far", "'s\nfar"): x[first] for name, x in shown.items()}
    contact_sheet(sheet, [scene.prompt for scene in SHOWN], images)


def record_path(out: Path, name: str, seed: int) -> Path:
    return out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{seed}.json"


def report(outs: list[Path]) -> None:
    """Write the tables between the page's marks, and each folder's pictures beside it.

    Rows of the page that a folder lacks stay; its picture of images is drawn where the folder has the default.
    """
    runs_of = {out: read_runs(out) for out in outs}
    for out, runs in runs_of.items():
        if not runs:
            raise SystemExit(f"{out} has no finished runs: give the folders that --out named")
    page = PAGE.read_text(encoding="utf-8")
    for out, runs in runs_of.items():
        last = max((record for records in runs.values() for record in records), key=lambda record: record["date"])
        common = " ".join(last["common"])
        command = f"python scripts/ablation.py --config {last['config']}" + (f" --set {common}" if common else "")
        start, end = f"<!-- {out.name} -->", f"<!-- end of {out.name} -->"
        if start not in page or end not in page:
            raise SystemExit(f"{PAGE} has no marks {start} and {end} to write between")
        rows = with_page(table_rows(out, runs), page[page.index(start) : page.index(end)])
        text = f"{table(rows)}\n\n`{command}`, {last['date']}, CPU ({last['machine']}), torch {last['torch']}."
        page = page[: page.index(start) + len(start)] + f"\n{text}\n" + page[page.index(end) :]
        plot(rows, PAGE.with_name(f"ablation_{out.name}_rows.png"))
        if "default" in runs:
            show(out, runs, PAGE.with_name(f"ablation_{out.name}.png"))
    with replacing(PAGE) as new:
        new.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"ablation: {error}")
