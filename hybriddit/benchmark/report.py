"""Results: what may be written, and how. A speed is there where samples of it were taken, on this machine, just now."""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..files import replacing
from .shapes import BRANCHES, DIRECTIONS, MODEL_VARIANTS, PARTS, SHAPES, VARIANTS, is_dense

FORMAT = 1
NAMES = ("benchmark.json", "benchmark.md", "benchmark.png")
KEYS = {"part", "shape", "px", "image_tokens", "text_tokens", "variant", "direction"}
MEASURED = {"seconds", "peak_bytes", "floor"}
OPTIONAL = {"layers", "batch"}
TITLES = {"attention": "attention layer", "transformer": "transformer, one denoising step", "generation": "generation"}


def summary(samples: list[float], calls: int) -> dict[str, Any]:
    """The times of one case in seconds: samples, each the mean of so many calls, and their quantiles."""
    quantiles = {name: quantile(samples, q) for name, q in (("median", 0.5), ("p10", 0.1), ("p90", 0.9))}
    return {**quantiles, "calls_per_sample": calls, "samples": list(samples)}


def quantile(samples: list[float], q: float) -> float:
    """By linear interpolation. Raises ValueError where there are no samples: then there is nothing to tell."""
    if not samples:
        raise ValueError("no speed without a measurement: there are no samples")
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def check(report: dict[str, Any]) -> None:
    """Raise ValueError for a report that tells a speed nobody measured, or is no report.

    A case has its samples, positive, and the quantiles that follow from them, or the reason why it was not measured,
    never both. All samples together took no longer than the run. There is no room for a speed elsewhere: an unknown
    key is refused.
    """
    if report.get("format") != FORMAT:
        raise ValueError(f"no benchmark result of format {FORMAT}")
    needed = {"format", "machine", "settings", "command", "started", "git", "rates", "elapsed_seconds", "complete"}
    _keys("the report", report, needed | {"cases", "load_average"}, set())
    total, seen = 0.0, set()
    for case in report["cases"]:
        name = case_name(case)
        identity = tuple(case.get(key) for key in ("part", "shape", "px", "variant", "direction"))
        if identity in seen:
            raise ValueError(f"{name} is there twice")
        seen.add(identity)
        for key, allowed in (
            ("part", PARTS),
            ("shape", SHAPES),
            ("variant", VARIANTS | MODEL_VARIANTS),
            ("direction", DIRECTIONS),
        ):
            if case.get(key) not in allowed:
                raise ValueError(f"{name}: unknown {key} {case.get(key)!r}")
        if "not_measured" in case:
            _keys(name, case, KEYS | {"not_measured"}, OPTIONAL)
            if not isinstance(case["not_measured"], str) or not case["not_measured"]:
                raise ValueError(f"{name} was not measured, and does not say why")
            continue
        _keys(name, case, KEYS | MEASURED, OPTIONAL)
        taken = _check_times(name, case["seconds"])
        total += taken if case["direction"] != "backward" else 0  # within forward + backward
        floor = case["floor"]
        _keys(f"{name}, floor", floor, {"bytes", "flops", "seconds"}, set())
        rates = report["rates"]
        bound = max(floor["bytes"] / rates["bytes_per_second"], floor["flops"] / rates["flops_per_second"])
        if not math.isclose(floor["seconds"], bound):
            raise ValueError(f"{name}: the floor does not follow from its bytes, its FLOPs and the measured rates")
    if total > report["elapsed_seconds"]:
        raise ValueError("the samples took longer than the run: they were not measured in it")


def _keys(name: str, values: dict[str, Any], needed: set[str], optional: set[str]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{name} is damaged: {values!r}")
    missing, unknown = needed - set(values), set(values) - needed - optional
    if missing:
        raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
    if unknown:
        raise ValueError(f"{name}: {', '.join(sorted(unknown))} was not measured here")


def _check_times(name: str, seconds: dict[str, Any]) -> float:
    """Returns the time that the samples stand for."""
    _keys(f"{name}, seconds", seconds, {"median", "p10", "p90", "calls_per_sample", "samples"}, set())
    samples, calls = seconds["samples"], seconds["calls_per_sample"]
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"{name} has a speed, but no samples: it was not measured")
    if not all(isinstance(s, float) and math.isfinite(s) and s > 0 for s in samples):
        raise ValueError(f"{name}: a sample is no positive number of seconds")
    if type(calls) is not int or calls < 1:
        raise ValueError(f"{name}: {calls!r} calls per sample")
    if seconds != summary(samples, calls):
        raise ValueError(f"{name}: the median or the spread is not that of its samples")
    return sum(samples) * calls


def busy(machine: dict[str, Any], load: float) -> bool:
    """Whether other programs take a share of the processor that is measured."""
    return machine["device"]["type"] == "cpu" and load > 0.5


def case_name(case: dict[str, Any]) -> str:
    words = [case.get(key) for key in ("part", "shape", "variant", "direction")]
    return f"{', '.join(map(str, words))}, {case.get('px')} px"


def check_folder(folder: Path, device: dict[str, Any]) -> None:
    """Make the folder. Raises OSError where nothing can be written, ValueError where another device's results lie."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    if not (folder / NAMES[0]).exists():
        return
    found = read(folder / NAMES[0])["machine"]["device"]
    if (found["type"], found["name"]) != (device["type"], device["name"]):
        raise ValueError(
            f"{folder} holds results of another device ({found['name']}; this is {device['name']}): "
            "give another folder by --out"
        )


def read(path: Path) -> dict[str, Any]:
    """A result file, checked. ValueError, naming the file, for what this command did not write."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        check(report)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no benchmark result: {error}") from error
    return report


def save(report: dict[str, Any], folder: Path) -> list[str]:
    """Write the JSON, the table and the plot, all or none; the names written.

    Raises ValueError for a report that `check` refuses or that another machine made: speeds are told where they were
    measured. The plot needs matplotlib, and a case that was measured.
    """
    from ..machine import device_of_this_machine
    from .measure import machine
    from .plot import draw

    check(report)
    here = machine(device_of_this_machine())
    if report["machine"] != here:
        raise ValueError(
            f"these results are of {report['machine']['device']['name']} or of other versions, not of this machine "
            f"({here['device']['name']}) as it is: measure here, or keep their own files"
        )
    check_folder(folder, here["device"])
    with ExitStack() as stack:
        paths = [stack.enter_context(replacing(folder / name)) for name in NAMES[:2]]
        paths[0].write_text(to_json(report), encoding="utf-8")
        paths[1].write_text(table(report), encoding="utf-8")
        figure = draw(report)
        if figure is None:
            return list(NAMES[:2])
        figure.savefig(stack.enter_context(replacing(folder / NAMES[2])), format="png", dpi=110)
    return list(NAMES)


def to_json(report: dict[str, Any]) -> str:
    """One case a line: a result file is read by people, and compared."""
    head = json.dumps({key: value for key, value in report.items() if key != "cases"}, indent=1)
    cases = ",\n".join(f"  {json.dumps(case)}" for case in report["cases"])
    return f'{head.removesuffix("}").rstrip()},\n "cases": [\n{cases}\n ]\n}}\n'


def fastest_dense(report: dict[str, Any], case: dict[str, Any]) -> float | None:
    """The median of the fastest dense variant measured for the same part, shape, size and direction; None without."""
    keys = ("part", "shape", "px", "direction")
    medians = [
        other["seconds"]["median"]
        for other in report["cases"]
        if "seconds" in other and is_dense(other["variant"]) and all(other[key] == case[key] for key in keys)
    ]
    return min(medians, default=None)


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    machine, settings, rates = report["machine"], report["settings"], report["rates"]
    device = machine["device"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    threads = f", threads: {machine['threads']}" if device["type"] == "cpu" else ""
    driver = f", driver {device['driver']}, CUDA {device['cuda']}" if device["type"] == "cuda" else ""
    memory = "torch's profiler" if device["type"] == "cpu" else "`torch.cuda.max_memory_allocated`"
    lines = [
        f"# Benchmark: {device['name']}",
        "",
        f"`{report['command']}`",
        "",
        f"{report['started'][:10]}; {device['name']}{threads}{driver}; {versions}; {settings['dtype']}, batch 1 "
        f"(2 where a sampler guides); window {settings['window']} x {settings['window']} tokens, circular window of "
        f"radius {settings['radius']}.",
        "",
        f"Measured on this device before the cases: copies move {_si(rates['bytes_per_second'], 'B/s')} (read and "
        f"written), matrix products of this dtype do {_si(rates['flops_per_second'], 'FLOP/s')}. The floor of a case "
        "is the time these rates need for the bytes it must move or the FLOPs it must do, whichever is longer; what "
        "stays in a cache can beat it.",
        "",
        'Times are medians (10th to 90th percentile) of calls that took turns in one process. "x dense": the fastest '
        "dense variant's median over this one's, for whole layers. Memory is the most that a call held beyond its inputs "
        f"and weights, by {memory}. What was not measured says why; nothing is extrapolated.",
        "",
    ]
    if busy(machine, report["load_average"]):
        lines += [
            f"**The machine was busy with other programs when this began (load average {report['load_average']:.1f}): "
            "times and rates are worse than its own, and scatter.**",
            "",
        ]
    if not report["complete"]:
        lines += ["**Not complete: the run was stopped, or is still going.**", ""]
    lines += [f"Left out: {note}." for note in settings["left_out"]] + [""] * bool(settings["left_out"])
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for case in report["cases"]:
        groups.setdefault((case["part"], case["shape"], case["direction"]), []).append(case)
    for (part, shape, direction), cases in groups.items():
        layers = sorted({tuple(case["layers"]) for case in cases if "layers" in case})
        timed = "".join(f", {count} of {of} blocks" for count, of in layers)
        what = f"{SHAPES[shape].heads} heads x {SHAPES[shape].head_dim}"
        lines += [
            f"## {shape}: {TITLES[part]}, {direction}{timed}",
            "",
            f"{what}, {cases[0]['text_tokens']} text tokens"
            + ("; seconds are per step of the sampler." if part == "generation" else "."),
            "",
            "| px | image tokens | variant | time | x dense | floor | time / floor | memory |",
            "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for case in cases:
            start = f"| {case['px']} | {case['image_tokens']} | {case['variant']} |"
            if "not_measured" in case:
                lines.append(f"{start} not measured: {case['not_measured'].replace('|', '/')} | | | | |")
                continue
            seconds, floor = case["seconds"], case["floor"]["seconds"]
            # a branch is a whole layer only where there is no text
            branch = part == "attention" and case["variant"] in BRANCHES and case["text_tokens"] > 0
            dense = None if branch else fastest_dense(report, case)
            ratio = "" if dense is None else f"{dense / seconds['median']:.2f}"
            lines.append(
                f"{start} {_ms(seconds['median'])} ({_ms(seconds['p10'])} to {_ms(seconds['p90'])}) ms | {ratio} | "
                f"{_ms(floor)} ms | {seconds['median'] / floor:.1f} | {case['peak_bytes'] / 2**20:.1f} MiB |"
            )
        lines.append("")
    shown = {case["variant"] for case in report["cases"] if case["part"] == "attention"}
    lines += [f"- {name}: {VARIANTS[name]}" for name in VARIANTS if name in shown]
    if any(case["part"] != "attention" for case in report["cases"]):
        lines += [f"- {name}, of a whole transformer: {about}" for name, about in MODEL_VARIANTS.items()]
    return "\n".join(lines).rstrip() + "\n"


def _ms(seconds: float) -> str:
    """Three digits, without an exponent."""
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.{max(0, 2 - math.floor(math.log10(milliseconds)))}f}"


def _si(value: float, unit: str) -> str:
    scale, prefix = next(((s, p) for s, p in ((1e12, "T"), (1e9, "G")) if value >= s), (1e6, "M"))
    return f"{value / scale:.3g} {prefix}{unit}"
