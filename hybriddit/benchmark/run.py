"""`hybriddit benchmark`: plan the rows of a report, measure those that can be measured here, write the results.

Rows are measured in groups of one part, subject and size, whose variants take turns.
"""

from __future__ import annotations

import gc
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from ..attention.rates import Rates, measure_rates
from ..attention.work import Work
from ..machine import free_bytes, git_state
from . import model
from . import report as reports
from .layer import device_variants, input_bytes, layer_cases, layer_work
from .measure import (
    MIN_REPEATS,
    OUT_OF_MEMORY,
    Limits,
    Outcome,
    device_to_measure,
    machine,
    measure,
)
from .shapes import MODEL_VARIANTS, PARTS, SIZES
from .subjects import Subject, find_subject, subjects

MEMORY_SHARE = 0.9  # the largest share of the free memory that a case may be expected to take
CPU_LAYERS = 2  # default number of a transformer's blocks on a CPU
# A case is tried unless its guessed time is this many times the limit: a guess may be wrong, and `measure` stops a case
# by the time of its second call.
SURELY = 1.5
NOT_REACHED = "not reached yet"


class Group(NamedTuple):
    """A group that is measured together: all variants of one part of a subject, for square images of side `px`."""

    part: str
    subject: Subject
    px: int


@dataclass(frozen=True)
class Settings:
    """The command's options for one run, defaults filled in.

    shapes: names of subjects. left_out: default parts that have nothing to measure with these options, and why.
    """

    parts: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: tuple[int, ...]
    variants: tuple[str, ...]
    window: int
    radius: int
    dtype: str
    layers: int | None
    backward: bool
    compile: bool
    repeats: int
    max_seconds: float
    left_out: tuple[str, ...] = ()

    def command(self) -> str:
        """The command that measures the same on any device, defaults written out."""
        words = ["hybriddit", "benchmark", "--part", *self.parts, "--shapes", *self.shapes]
        words += ["--sizes", *map(str, self.sizes), "--variants", *self.variants]
        for name in ("window", "radius", "dtype", "repeats"):
            words += [f"--{name}", str(getattr(self, name))]
        words += ["--max-seconds", f"{self.max_seconds:g}"]
        if self.layers is not None:
            words += ["--layers", str(self.layers)]
        words += [f"--{name}" for name in ("backward", "compile") if getattr(self, name)]
        return shlex.join(words)


def settings(device: torch.device, **given: Any) -> Settings:
    """Fill in this device's defaults for options that are None. Raises ValueError for what cannot be measured."""
    gpu = device.type == "cuda"
    shapes = given["shapes"] or (tuple(subjects()) if gpu else ("pixart-sigma", "sd3"))
    few = CPU_LAYERS if all(find_subject(name).blocks >= CPU_LAYERS for name in shapes) else None
    defaults = {
        "parts": PARTS if gpu else ("attention", "transformer"),
        "shapes": shapes,
        "sizes": SIZES if gpu else (256, 512, 1024, 2048),
        "variants": device_variants(device),
        "radius": 8,
        "dtype": "bfloat16" if gpu else "float32",
        "layers": None if gpu else few,
        "repeats": 20 if gpu else 5,
        "max_seconds": 10.0 if gpu else 15.0,
    }
    every_part = given["parts"] is None
    given = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    for name in ("parts", "shapes", "variants"):
        given[name] = tuple(dict.fromkeys(given[name]))
    given["sizes"] = tuple(sorted(set(given["sizes"])))
    left_out = []
    if every_part:
        reasons = {part: _part_refusal(part, given["variants"]) for part in given["parts"]}
        left_out = [f"{part}: {reason}" for part, reason in reasons.items() if reason]
        given["parts"] = tuple(part for part, reason in reasons.items() if not reason)
    if given["parts"] == ("attention",):
        given["layers"] = None
    chosen = Settings(**given, left_out=tuple(left_out))
    _check(chosen, device)
    return chosen


def _part_refusal(part: str, variants: tuple[str, ...]) -> str | None:
    """Why a part cannot be measured, or None."""
    return None if part_variants(part, variants) else f"--variants {' '.join(variants)} has none of it"


def _check(chosen: Settings, device: torch.device) -> None:
    """Raise ValueError, naming the option, for what cannot be measured on this device."""
    chosen_subjects = [find_subject(name) for name in chosen.shapes]
    for pixels in dict.fromkeys(subject.shape.pixels for subject in chosen_subjects):
        for px in chosen.sizes:
            if px < pixels or px % pixels:
                raise ValueError(
                    f"--sizes {px}: an image side is a positive multiple of {pixels} px, the size of a token"
                )
    for name in ("window", "radius", "repeats", "max_seconds"):
        if not 0 < getattr(chosen, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(chosen, name)}")
    if chosen.layers is not None and chosen.layers < 1:
        raise ValueError(f"--layers must be above 0, not {chosen.layers}")
    here = {*device_variants(device), "dense"}
    for variant in chosen.variants:
        if variant not in here:
            wanted = "needs an NVIDIA GPU, and there is none here"
            raise ValueError(f"--variants {variant}: {wanted}; this machine runs {', '.join(sorted(here))}")
    refusals = [f"{part}: {reason}" for part in chosen.parts if (reason := _part_refusal(part, chosen.variants))]
    if refusals or not chosen.parts:
        raise ValueError(f"--part {'; '.join(refusals or chosen.left_out)}")
    if chosen.layers is not None and chosen.parts != ("attention",):
        for subject in chosen_subjects:
            subject.check_layers(chosen.layers)
    dtype = getattr(torch, chosen.dtype)
    if (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bfloat16: use --dtype float16")
    try:
        one = torch.ones(1, 1, 16, 16, dtype=dtype, device=device)
        torch.nn.functional.scaled_dot_product_attention(one, one, one @ one)
    except RuntimeError as error:
        raise ValueError(f"--dtype {chosen.dtype} does not run on this device: {error}") from error


def part_variants(part: str, variants: tuple[str, ...]) -> tuple[str, ...]:
    """The variants that the part has, of those given; a whole transformer leaves its dense kernel to torch's choice."""
    if part == "attention":
        return variants
    plain = ("dense" if reports.is_dense(variant) else variant for variant in variants)
    return tuple(dict.fromkeys(variant for variant in plain if variant in MODEL_VARIANTS))


def run(chosen: Settings, folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Measure, and write `folder`/benchmark.{json,md,png} after every size. Returns the report.

    On Ctrl-C it keeps what was measured, marks the rest as interrupted, and raises KeyboardInterrupt. Raises ValueError
    for a folder with another device's results, and OSError for one that cannot be written to.
    """
    device = device_to_measure()
    there = folder.exists()
    here = machine(device)
    reports.check_folder(folder, here["device"])
    progress = Progress(chosen, quiet)
    started = time.perf_counter()
    for note in chosen.left_out:
        progress.say(f"left out: {note}")
    load = psutil.getloadavg()[0]
    if reports.busy(here, load):
        progress.say(f"note: other programs keep this machine busy (load {load:.1f}): times will scatter")
    progress.say(f"measuring this device: {here['device']['name']}")
    rates = _rates(device, getattr(torch, chosen.dtype))
    report = {
        "format": reports.FORMAT,
        "machine": here,
        "settings": {name: getattr(chosen, name) for name in ("dtype", "window", "radius", "repeats", "max_seconds")}
        | {"compile": chosen.compile, "left_out": list(chosen.left_out)},
        "command": chosen.command(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": load,
        "git": _git(),
        "rates": rates._asdict(),
        "elapsed_seconds": 0.0,
        "complete": False,
        "cases": _planned(chosen),
    }
    waiting = {reports.identity(row): row for row in report["cases"]}

    def save() -> list[str]:
        report["elapsed_seconds"] = time.perf_counter() - started
        return reports.save(report, folder)

    try:
        for group in groups(chosen):
            with progress.group(group):
                for row in _measure_group(chosen, group, rates, device, report["cases"]):
                    planned = waiting[reports.identity(row)]
                    planned.clear()
                    planned.update(row)
            save()
        report["complete"] = True
        written = save()
        if reports.NAMES[2] not in written:
            progress.say("no plot: it needs matplotlib, and a case that was measured")
        progress.say(f"written to {folder}: {', '.join(written)}")
    except KeyboardInterrupt:
        for row in report["cases"]:
            if row.get("not_measured") == NOT_REACHED:
                row["not_measured"] = "interrupted"
        if any("seconds" in row for row in report["cases"]):
            save()
            progress.say(f"stopped: what was measured is in {folder}")
        elif not there and next(folder.iterdir(), None) is None:
            folder.rmdir()
        raise
    return report


def groups(chosen: Settings) -> Iterator[Group]:
    """The groups of a run, in the order in which they are measured."""
    for part in chosen.parts:
        for name in chosen.shapes:
            subject = find_subject(name)
            yield from (Group(part, subject, px) for px in chosen.sizes)


def _planned(chosen: Settings) -> list[dict[str, Any]]:
    """All rows of the report, none measured, in the order of its tables; sizes in order within each."""
    rows = [
        _row(chosen, group, variant, direction) | {"not_measured": NOT_REACHED}
        for group in groups(chosen)
        for direction in _directions(chosen, group.part)
        for variant in part_variants(group.part, chosen.variants)
    ]
    tables: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault((row["part"], row["shape"], row["direction"]), []).append(row)
    return [row for table in tables.values() for row in table]


def _directions(chosen: Settings, part: str) -> tuple[str, ...]:
    if part == "generation":
        return ("step",)
    both = part == "attention" or chosen.backward
    return ("forward", "backward", "forward + backward") if both else ("forward",)


def _row(chosen: Settings, group: Group, variant: str, direction: str) -> dict[str, Any]:
    """A row of the report without its result."""
    part, subject, px = group
    grid = subject.shape.grid(px)
    row = {"part": part, "shape": subject.name, "px": px, "image_tokens": grid[0] * grid[1]}
    row["text_tokens"] = subject.shape.text if part == "attention" else subject.prompt
    row |= {"variant": variant, "direction": direction}
    if part == "attention":
        return row
    if subject.blocks:
        row["layers"] = [chosen.layers or subject.blocks, subject.blocks]
    return row | {"batch": model.batch_of(part, subject)}


def _measure_group(
    chosen: Settings, group: Group, rates: Rates, device: torch.device, known: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure one group: its rows, each with times or with the reason why not. known: the report's rows so far."""
    found = []
    all_directions = _directions(chosen, group.part)
    for backward in (False, True) if "backward" in all_directions else (False,):
        directions = [direction for direction in all_directions if ("backward" in direction) == backward]
        outcomes, works = _outcomes(chosen, group, backward, directions[-1], rates, device, known)
        for direction in directions:
            for variant in part_variants(group.part, chosen.variants):
                row, outcome = _row(chosen, group, variant, direction), outcomes[variant]
                if isinstance(outcome, str):
                    found.append(row | {"not_measured": outcome})
                    continue
                work = works[variant][direction]
                result = {
                    "seconds": reports.summary(outcome.samples[direction], outcome.calls),
                    "peak_bytes": outcome.peak_bytes,
                    "floor": {**work._asdict(), "seconds": rates.floor(work)},
                }
                found.append(row | result)
        _tidy(device)
    return found


def _outcomes(
    chosen: Settings,
    group: Group,
    backward: bool,
    direction: str,
    rates: Rates,
    device: torch.device,
    known: list[dict[str, Any]],
) -> tuple[dict[str, Outcome | str], dict[str, dict[str, Work]]]:
    """Each variant's outcome or reason, and its work by direction. direction: the longest one that is measured."""
    part, subject, px = group
    shape, dtype = subject.shape, getattr(torch, chosen.dtype)
    variants = part_variants(part, chosen.variants)
    if part == "generation" and not subject.samples:
        return dict.fromkeys(variants, "diffusers has no ordinary pipeline for it"), {}
    limits = Limits(chosen.repeats, chosen.max_seconds)
    free = MEMORY_SHARE * free_bytes(device)
    if part == "attention":
        needed, what = input_bytes(shape, px, dtype, backward), "the inputs and an output do"
    else:
        needed, what = model.weight_bytes(subject, px, chosen.layers, dtype), "the weights do"
    if needed > free:
        hint = "; --layers takes fewer blocks" if part != "attention" else ""
        return dict.fromkeys(variants, f"{what} not fit into the {_gib(free)} that are free{hint}"), {}
    if part == "attention":
        sizes = (shape, shape.grid(px), chosen.window, chosen.radius, dtype.itemsize)
        works = {variant: layer_work(variant, *sizes) for variant in variants}
    else:
        works = model.model_work(part, subject, px, variants, chosen.window, chosen.layers, dtype)
    outcomes: dict[str, Outcome | str] = {}
    for variant in variants:
        steps = model.SAMPLER_STEPS if part == "generation" else 1
        floor = rates.floor(works[variant][direction])
        smaller = _smaller(known, _row(chosen, group, variant, direction))
        reason = _too_much(smaller, px, floor, steps, needed, free, limits)
        if reason:
            outcomes[variant] = reason
    left = [variant for variant in variants if variant not in outcomes]
    if not left:
        return outcomes, works
    try:
        if part == "attention":
            cases = layer_cases(shape, px, left, chosen.window, chosen.radius, dtype, device, backward)
        else:
            cases = model.model_cases(
                part, subject, px, left, chosen.window, chosen.layers, chosen.compile, dtype, device, backward
            )
    except torch.OutOfMemoryError:
        return outcomes | dict.fromkeys(left, OUT_OF_MEMORY), works
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of kernels that it cannot use; the table has the reason
        return outcomes | measure(cases, backward, device, limits), works


def _smaller(known: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that differ from this one only by a smaller size, in the order of sizes."""
    keys = ("part", "shape", "variant", "direction")
    smaller = [other for other in known if all(other[k] == row[k] for k in keys) and other["px"] < row["px"]]
    return sorted(smaller, key=lambda other: other["px"])


def _guess(smaller: list[dict[str, Any]], floor: float) -> float:
    """The seconds that a case of this floor may take, by the measured rows of smaller sizes, of which there is one.

    By one row, in proportion to the floor. By two, along the line through them: a small size's time is mostly that of
    starting kernels, which does not grow. The line is no flatter than the floor, and no steeper than the proportion.
    """
    last, taken = smaller[-1]["floor"]["seconds"], smaller[-1]["seconds"]["median"]
    slope = taken / last
    if len(smaller) > 1 and "seconds" in smaller[-2]:
        other = smaller[-2]
        measured = (taken - other["seconds"]["median"]) / (last - other["floor"]["seconds"])
        slope = min(slope, max(measured, 1.0))
    return taken + slope * (floor - last)


def _too_much(
    smaller: list[dict[str, Any]], px: int, floor: float, steps: int, needed: int, free: float, limits: Limits
) -> str | None:
    """Why a case is not tried, judging by its floor in seconds and by the rows of smaller sizes; None if it is tried.

    Memory is assumed to grow like the number of tokens.
    """
    least = steps * (2 + min(MIN_REPEATS, limits.repeats))  # two calls before the samples, and the samples
    limit = f"--max-seconds {limits.max_seconds:g}"
    if least * floor > limits.max_seconds:
        return f"by its floor alone it would take longer than {limit}"
    if not smaller:
        return None
    before = smaller[-1]
    if "not_measured" in before:
        reason = before["not_measured"]
        inherent = reason.startswith(("FlexAttention", "failed")) or reason.endswith("already")
        return reason if inherent else f"{before['px']} px was too much already"
    if least * _guess(smaller, floor) > SURELY * limits.max_seconds:
        return f"going by {before['px']} px it would take longer than {limit}"
    if needed + before["peak_bytes"] * (px / before["px"]) ** 2 > free:
        return f"going by {before['px']} px it would not fit into the {_gib(free)} that are free"
    return None


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _rates(device: torch.device, dtype: torch.dtype) -> Rates:
    gpu = device.type == "cuda"
    return measure_rates(device, dtype, copy_bytes=2**30 if gpu else 2**28, matrix=8192 if gpu else 2048)


def _tidy(device: torch.device) -> None:
    gc.collect()
    if "torch._dynamo" in sys.modules:  # else torch's limit on recompilations would run later sizes uncompiled
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _git() -> dict[str, Any] | None:
    state = git_state()
    return state and {"commit": state["commit"], "changed": len(state["changed"])}


class Progress:
    """Prints to stderr which group is being measured, and about how long the rest will take."""

    def __init__(self, chosen: Settings, quiet: bool):
        self.groups, self.quiet = [_key(group) for group in groups(chosen)], quiet
        self.taken: dict[tuple[str, str, int], float] = {}  # seconds, by group
        directions = {part: 1 + ("backward" in _directions(chosen, part)) for part in chosen.parts}
        self.most = {
            part: chosen.max_seconds * count * len(part_variants(part, chosen.variants))
            for part, count in directions.items()
        }

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def group(self, group: Group) -> Iterator[None]:
        """Report one group while it is measured within the block, and note how long it took."""
        key = _key(group)
        at = self.groups.index(key)
        left = self.seconds_left(at)
        time_left = "" if left is None else f", about {_duration(left)} left"
        self.say(f"[{at + 1}/{len(self.groups)}] {key[0]}, {key[1]}, {key[2]} px{time_left}")
        begin = time.perf_counter()
        yield
        self.taken[key] = time.perf_counter() - begin

    def seconds_left(self, at: int) -> float | None:
        """Estimated seconds for the groups from this one on; None where they cannot be estimated."""
        expected = [self.expected(key) for key in self.groups[at:]]
        return None if None in expected else sum(expected)

    def expected(self, key: tuple[str, str, int]) -> float | None:
        """Estimated seconds of a group, by other shapes of this size, else by the size before; None at the start."""
        part, name, px = key
        same = [seconds for (p, _, size), seconds in self.taken.items() if (p, size) == (part, px)]
        if same:
            return sum(same) / len(same)
        sizes = [size for p, n, size in self.groups if (p, n) == (part, name)]
        at = sizes.index(px)
        if at == 0:
            return sum(self.taken.values()) / len(self.taken) if self.taken else None
        before = self.expected((part, name, sizes[at - 1]))
        return None if before is None else min(2 * before, self.most[part])


def _key(group: Group) -> tuple[str, str, int]:
    return group.part, group.subject.name, group.px


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
