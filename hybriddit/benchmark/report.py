"""The results of a run: a JSON file, a table in Markdown and a plot.

A report is the JSON file's content, a dictionary. Its `cases` is a list of rows, one for each part, shape, size, variant
and direction: a row holds the times that `summary` makes of samples, or the reason why there are none.
"""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..files import make_folder, replacing
from .shapes import BRANCHES, MODEL_VARIANTS, VARIANTS, is_dense

FORMAT = 1
NAMES = ("benchmark.json", "benchmark.md", "benchmark.png")
REPORT_KEYS = {"machine", "settings", "command", "started", "git", "load_average", "rates", "elapsed_seconds"}
REPORT_KEYS |= {"complete", "cases"}
ROW_KEYS = {"part", "shape", "px", "image_tokens", "text_tokens", "variant", "direction"}
MEASURED_KEYS = {"seconds", "peak_bytes", "floor"}
TITLES = {"attention": "attention layer", "transformer": "transformer, one denoising step", "generation": "generation"}


def summary(samples: list[float], calls: int) -> dict[str, Any]:
    """The times of one row in seconds: the samples, each the mean of `calls` calls, with their median and spread.

    Every time in a report comes from here. Raises ValueError where there are no samples, or one is no positive time.
    """
    if not samples:
        raise ValueError("no speed without a measurement: there are no samples")
    if not all(0 < sample < math.inf for sample in samples):
        raise ValueError("no speed without a measurement: a sample is no positive number of seconds")
    quantiles = {name: _quantile(samples, q) for name, q in (("median", 0.5), ("p10", 0.1), ("p90", 0.9))}
    return {**quantiles, "calls_per_sample": calls, "samples": list(samples)}


def _quantile(samples: list[float], q: float) -> float:
    """By linear interpolation between neighbours."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def identity(row: dict[str, Any]) -> tuple:
    """What tells a row from the others of its report."""
    return tuple(row[key] for key in ("part", "shape", "px", "variant", "direction"))


def check(report: dict[str, Any]) -> None:
    """Raise ValueError for what is no report of this format: a key is missing, or a row has neither times nor reason."""
    if report.get("format") != FORMAT:
        raise ValueError(f"no benchmark result of format {FORMAT}")
    _need(report, REPORT_KEYS, "it")
    for row in report["cases"]:
        _need(row, ROW_KEYS, "a case")
        measured = not MEASURED_KEYS.isdisjoint(row)
        if measured:
            _need(row, MEASURED_KEYS, "a measured case")
        if measured == bool(row.get("not_measured")):
            name = ", ".join(map(str, identity(row)))
            raise ValueError(f"{name}: a case has its times or the reason why there are none")


def _need(values: dict[str, Any], keys: set[str], what: str) -> None:
    missing = keys - values.keys()
    if missing:
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")


def busy(machine: dict[str, Any], load: float) -> bool:
    """Whether other programs take a share of the processor that is measured."""
    return machine["device"]["type"] == "cpu" and load > 0.5


def check_folder(folder: Path, device: dict[str, Any]) -> None:
    """Make the folder. Raises OSError where nothing can be written, ValueError where another device's results lie."""
    make_folder(folder)
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
    """The report in a JSON file, its medians and spreads taken from its samples anew.

    Raises ValueError, naming the file, where `check` or `summary` does.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        check(report)
        for row in report["cases"]:
            if "seconds" in row:
                row["seconds"] = summary(row["seconds"]["samples"], row["seconds"]["calls_per_sample"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no benchmark result: {error}") from error
    return report


def save(report: dict[str, Any], folder: Path) -> list[str]:
    """Write the JSON, the table and the plot, all or none. Returns the names of the files written.

    The plot needs matplotlib, and a row that was measured. Raises ValueError where `check` does.
    """
    from .plot import draw

    check(report)
    folder.mkdir(parents=True, exist_ok=True)
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
    """The report as JSON, one row a line: people read result files, and compare them."""
    head = json.dumps({key: value for key, value in report.items() if key != "cases"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in report["cases"])
    return f'{head.removesuffix("}").rstrip()},\n "cases": [\n{rows}\n ]\n}}\n'


def fastest_dense(report: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Median time, in seconds, of the fastest dense variant of the row's part, shape, size and direction; None without."""
    keys = ("part", "shape", "px", "direction")
    medians = [
        other["seconds"]["median"]
        for other in report["cases"]
        if "seconds" in other and is_dense(other["variant"]) and all(other[key] == row[key] for key in keys)
    ]
    return min(medians, default=None)


def table(report: dict[str, Any]) -> str:
    """The report in Markdown: how it was measured, and a table for each part, shape and direction.

    Raises ValueError for a shape that no registered family has.
    """
    from .subjects import find_subject  # diffusers, which reading a report does not need

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
    for row in report["cases"]:
        groups.setdefault((row["part"], row["shape"], row["direction"]), []).append(row)
    for (part, shape, direction), rows in groups.items():
        layers = sorted({tuple(row["layers"]) for row in rows if "layers" in row})
        timed = "".join(f", {count} of {of} blocks" for count, of in layers)
        layer = find_subject(shape).shape
        what = f"{layer.heads} heads x {layer.head_dim}"
        lines += [
            f"## {shape}: {TITLES[part]}, {direction}{timed}",
            "",
            f"{what}, {rows[0]['text_tokens']} text tokens"
            + ("; seconds are per step of the sampler." if part == "generation" else "."),
            "",
            "| px | image tokens | variant | time | x dense | floor | time / floor | memory |",
            "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in rows:
            start = f"| {row['px']} | {row['image_tokens']} | {row['variant']} |"
            if "seconds" not in row:
                lines.append(f"{start} not measured: {row['not_measured'].replace('|', '/')} | | | | |")
                continue
            seconds, floor = row["seconds"], row["floor"]["seconds"]
            # a branch is a whole layer only where there is no text
            branch = part == "attention" and row["variant"] in BRANCHES and row["text_tokens"] > 0
            dense = None if branch else fastest_dense(report, row)
            ratio = "" if dense is None else f"{dense / seconds['median']:.2f}"
            lines.append(
                f"{start} {_ms(seconds['median'])} ({_ms(seconds['p10'])} to {_ms(seconds['p90'])}) ms | {ratio} | "
                f"{_ms(floor)} ms | {seconds['median'] / floor:.1f} | {row['peak_bytes'] / 2**20:.1f} MiB |"
            )
        lines.append("")
    shown = {row["variant"] for row in report["cases"] if row["part"] == "attention"}
    lines += [f"- {name}: {VARIANTS[name]}" for name in VARIANTS if name in shown]
    if any(row["part"] != "attention" for row in report["cases"]):
        lines += [f"- {name}, of a whole transformer: {about}" for name, about in MODEL_VARIANTS.items()]
    return "\n".join(lines).rstrip() + "\n"


def _ms(seconds: float) -> str:
    """Three digits, without an exponent."""
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.{max(0, 2 - math.floor(math.log10(milliseconds)))}f}"


def _si(value: float, unit: str) -> str:
    scale, prefix = next(((s, p) for s, p in ((1e12, "T"), (1e9, "G")) if value >= s), (1e6, "M"))
    return f"{value / scale:.3g} {prefix}{unit}"
