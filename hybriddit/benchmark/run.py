"""What `hybriddit benchmark` does: plans the cases, measures what can be measured here, writes what was measured."""

from __future__ import annotations

import gc
import importlib.util
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import report as reports
from .layer import device_variants, input_bytes, layer_cases, layer_work
from .measure import (
    MIN_REPEATS,
    OUT_OF_MEMORY,
    Limits,
    Rates,
    device_of_this_machine,
    free_bytes,
    machine,
    measure,
    measure_rates,
)
from .shapes import MODEL_VARIANTS, PARTS, PIXELS_PER_TOKEN, SHAPES, SIZES, tokens

# share of the free memory that a case may be expected to take
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Settings:
    """One run, everything decided."""

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
    left_out: tuple[str, ...] = ()  # what the defaults would measure and this machine or project cannot

    def command(self) -> str:
        """The command that measures the same, whatever the defaults of the device."""
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
    """Settings with this device's defaults where an option is None. Raises ValueError for what cannot be measured."""
    gpu = device.type == "cuda"
    defaults = {
        "parts": PARTS if gpu else ("attention", "transformer"),
        "shapes": tuple(SHAPES) if gpu else ("pixart-sigma", "sd3"),
        "sizes": SIZES if gpu else (256, 512, 1024, 2048),
        "variants": device_variants(device),
        "dtype": "bfloat16" if gpu else "float32",
        "layers": None if gpu else 2,
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
    if not part_variants(part, variants):
        return f"--variants {' '.join(variants)} has none of it"
    if part == "attention":
        return None
    missing = [name for name in ("diffusers", "accelerate") if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(missing)}, not installed here" if missing else None


def _check(chosen: Settings, device: torch.device) -> None:
    for px in chosen.sizes:
        if px < PIXELS_PER_TOKEN or px % PIXELS_PER_TOKEN:
            raise ValueError(
                f"--sizes {px}: an image side is a positive multiple of {PIXELS_PER_TOKEN} px, the size of a token"
            )
    for name in ("window", "radius", "repeats", "max_seconds"):
        if not 0 < getattr(chosen, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(chosen, name)}")
    here = {*device_variants(device), "dense"}
    for variant in chosen.variants:
        if variant not in here:
            wanted = "needs an NVIDIA GPU, and there is none here"
            raise ValueError(f"--variants {variant}: {wanted}; this machine runs {', '.join(sorted(here))}")
    refusals = [f"{part}: {reason}" for part in chosen.parts if (reason := _part_refusal(part, chosen.variants))]
    if refusals or not chosen.parts:
        raise ValueError(f"--part {'; '.join(refusals or chosen.left_out)}")
    if chosen.layers is not None and chosen.parts != ("attention",):
        from .model import plan

        for name in chosen.shapes:
            plan(SHAPES[name], chosen.sizes[0], chosen.layers)
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
    """Those that the part has; a whole transformer's dense one is torch's own choice."""
    if part == "attention":
        return variants
    plain = ("dense" if reports.is_dense(variant) else variant for variant in variants)
    return tuple(dict.fromkeys(variant for variant in plain if variant in MODEL_VARIANTS))


def run(chosen: Settings, folder: Path, quiet: bool = False) -> dict[str, Any]:
    """Measure, and write `folder`/benchmark.{json,md,png} after every size; the report.

    Ctrl-C keeps what was measured up to then, the rest marked as interrupted, and is raised again. Raises ValueError
    for a folder with another device's results, OSError for one that cannot be written.
    """
    device = device_of_this_machine()
    there = folder.exists()
    here = machine(device)
    reports.check_folder(folder, here["device"])
    progress = Progress(chosen, quiet)
    started = time.perf_counter()
    for note in chosen.left_out:
        progress.say(f"left out: {note}")
    load = os.getloadavg()[0]
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
    waiting = {reports.identity(case): case for case in report["cases"]}

    def save() -> list[str]:
        report["elapsed_seconds"] = time.perf_counter() - started
        return reports.save(report, folder)

    try:
        for part, name, px in groups(chosen):
            with progress.group(part, name, px):
                for case in _measure_group(chosen, part, name, px, rates, device, report["cases"]):
                    planned = waiting[reports.identity(case)]
                    planned.clear()
                    planned.update(case)
            save()
        report["complete"] = True
        written = save()
        if reports.NAMES[2] not in written:
            progress.say("no plot: it needs matplotlib, and a case that was measured")
        progress.say(f"written to {folder}: {', '.join(written)}")
    except KeyboardInterrupt:
        for case in report["cases"]:
            if case.get("not_measured") == NOT_REACHED:
                case["not_measured"] = "interrupted"
        if any("seconds" in case for case in report["cases"]):
            save()
            progress.say(f"stopped: what was measured is in {folder}")
        elif not there and next(folder.iterdir(), None) is None:
            folder.rmdir()
        raise
    return report


NOT_REACHED = "not reached yet"


def groups(chosen: Settings) -> Iterator[tuple[str, str, int]]:
    for part in chosen.parts:
        for name in chosen.shapes:
            yield from ((part, name, px) for px in chosen.sizes)


def _planned(chosen: Settings) -> list[dict[str, Any]]:
    cases = []
    for part, name, px in groups(chosen):
        for direction in _directions(chosen, part):
            for variant in part_variants(part, chosen.variants):
                cases.append(_case(chosen, part, name, px, variant, direction) | {"not_measured": NOT_REACHED})
    # of one table after the other, sizes within it
    order = [(case["part"], case["shape"], case["direction"]) for case in cases]
    firsts = {key: i for i, key in reversed(list(enumerate(order)))}
    return [cases[i] for i in sorted(range(len(cases)), key=lambda i: (firsts[order[i]], i))]


def _directions(chosen: Settings, part: str) -> tuple[str, ...]:
    if part == "generation":
        return ("step",)
    both = part == "attention" or chosen.backward
    return ("forward", "backward", "forward + backward") if both else ("forward",)


def _case(chosen: Settings, part: str, name: str, px: int, variant: str, direction: str) -> dict[str, Any]:
    shape = SHAPES[name]
    case = {"part": part, "shape": name, "px": px, "image_tokens": tokens(px)}
    case["text_tokens"] = shape.text if part == "attention" else shape.prompt
    case |= {"variant": variant, "direction": direction}
    if part != "attention":
        from .model import batch_of, plan

        case["layers"] = list(plan(shape, px, chosen.layers)[2])
        case["batch"] = batch_of(part, shape)
    return case


def _measure_group(chosen, part, name, px, rates: Rates, device, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases of one part, shape and size, measured or with the reason why not."""
    found = []
    for backward in (False, True) if "backward" in _directions(chosen, part) else (False,):
        directions = [d for d in _directions(chosen, part) if ("backward" in d) == backward]
        outcomes, works = _outcomes(chosen, part, name, px, backward, directions[-1], rates, device, known)
        for direction in directions:
            for variant in part_variants(part, chosen.variants):
                case = _case(chosen, part, name, px, variant, direction)
                outcome = outcomes[variant]
                if isinstance(outcome, str):
                    found.append(case | {"not_measured": outcome})
                    continue
                work = works[variant][direction]
                found.append(
                    case
                    | {
                        "seconds": reports.summary(outcome.samples[direction], outcome.calls),
                        "peak_bytes": outcome.peak_bytes,
                        "floor": {**work._asdict(), "seconds": rates.floor(work)},
                    }
                )
        _tidy(device)
    return found


def _outcomes(chosen, part, name, px, backward, direction, rates, device, known):
    """Outcome or reason by variant, and the work of each by direction."""
    shape, dtype = SHAPES[name], getattr(torch, chosen.dtype)
    variants = part_variants(part, chosen.variants)
    limits = Limits(chosen.repeats, chosen.max_seconds)
    free = MEMORY_SHARE * free_bytes(device)
    if part == "attention":
        needed, what = input_bytes(shape, px, dtype, backward), "the inputs and an output do"
    else:
        from . import model

        needed, what = model.weight_bytes(shape, px, chosen.layers, dtype), "the weights do"
    if needed > free:
        hint = "; --layers takes fewer blocks" if part != "attention" else ""
        return dict.fromkeys(variants, f"{what} not fit into the {_gib(free)} that are free{hint}"), {}
    grid = (px // PIXELS_PER_TOKEN,) * 2
    if part == "attention":
        sizes = (shape, grid, chosen.window, chosen.radius, dtype.itemsize)
        works = {variant: layer_work(variant, *sizes) for variant in variants}
    else:
        works = model.model_work(part, shape, px, variants, chosen.window, chosen.layers, dtype)
    outcomes = {}
    for variant in variants:
        steps = model.SAMPLER_STEPS if part == "generation" else 1
        floor = rates.floor(works[variant][direction])
        before = _before(known, part, name, px, variant, direction)
        reason = _too_much(before, px, floor, steps, needed, free, limits)
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
                part, shape, px, left, chosen.window, chosen.layers, chosen.compile, dtype, device, backward
            )
    except torch.OutOfMemoryError:
        return outcomes | dict.fromkeys(left, OUT_OF_MEMORY), works
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that torch leaves out: their reason is in the table
        return outcomes | measure(cases, backward, device, limits), works


def _before(known, part, name, px, variant, direction) -> dict[str, Any] | None:
    """The same case at the largest smaller size."""
    same = [
        case
        for case in known
        if (case["part"], case["shape"], case["variant"], case["direction"]) == (part, name, variant, direction)
        and case["px"] < px
    ]
    return max(same, key=lambda case: case["px"], default=None)


def _too_much(before, px: int, floor: float, steps: int, needed: int, free: float, limits: Limits) -> str | None:
    """Why a case is not tried, by its floor and by the size before; None where it is.

    Time is taken to grow as the floor does, memory as the tokens do.
    """
    least = steps * (2 + min(MIN_REPEATS, limits.repeats))  # the two calls before the samples, and those
    limit = f"--max-seconds {limits.max_seconds:g}"
    if least * floor > limits.max_seconds:
        return f"by its floor alone it would take longer than {limit}"
    if before is None:
        return None
    if "not_measured" in before:
        reason = before["not_measured"]
        inherent = reason.startswith(("FlexAttention", "failed")) or reason.endswith("already")
        return reason if inherent else f"{before['px']} px was too much already"
    if least * before["seconds"]["median"] * floor / before["floor"]["seconds"] > limits.max_seconds:
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
    if "torch._dynamo" in sys.modules:  # a limit on recompilations would send later sizes to uncompiled kernels
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _git() -> dict[str, Any] | None:
    try:
        from ..training.record import git_state
    except ModuleNotFoundError:  # a machine of only torch and triton
        return None
    state = git_state(Path(__file__).parent)
    return state and {"commit": state["commit"], "changed": len(state["changed"])}


class Progress:
    """Tells stderr what is being measured, and about how long the rest takes."""

    def __init__(self, chosen: Settings, quiet: bool):
        self.groups, self.quiet, self.taken = list(groups(chosen)), quiet, {}
        directions = {part: 1 + ("backward" in _directions(chosen, part)) for part in chosen.parts}
        self.most = {
            part: chosen.max_seconds * count * len(part_variants(part, chosen.variants))
            for part, count in directions.items()
        }

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def group(self, part: str, name: str, px: int) -> Progress:
        at = self.groups.index((part, name, px))
        left = self.seconds_left(at)
        time_left = "" if left is None else f", about {_duration(left)} left"
        self.say(f"[{at + 1}/{len(self.groups)}] {part}, {name}, {px} px{time_left}")
        self.now = (part, name, px)
        return self

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *error) -> None:
        self.taken[self.now] = time.perf_counter() - self.begin

    def seconds_left(self, at: int) -> float | None:
        expected = [self.expected(group) for group in self.groups[at:]]
        return None if None in expected else sum(expected)

    def expected(self, group: tuple[str, str, int]) -> float | None:
        """Seconds: as other shapes took at this size, else by what the size before took; None at the very start."""
        part, name, px = group
        same = [seconds for (p, _, size), seconds in self.taken.items() if (p, size) == (part, px)]
        if same:
            return sum(same) / len(same)
        sizes = [size for p, n, size in self.groups if (p, n) == (part, name)]
        at = sizes.index(px)
        if at == 0:
            return sum(self.taken.values()) / len(self.taken) if self.taken else None
        before = self.expected((part, name, sizes[at - 1]))
        return None if before is None else min(2 * before, self.most[part])


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
