import json
import math
from pathlib import Path

import pytest

from hybriddit.benchmark import report as reports

ROOT = Path(__file__).parents[2]

# A speed stands where it was measured, and nowhere else.


def no_samples(report):
    report["cases"][0]["seconds"]["samples"] = []


def zero_seconds(report):
    report["cases"][0]["seconds"]["samples"][0] = 0.0


def nan_seconds(report):
    report["cases"][0]["seconds"]["samples"][0] = math.nan


def times_without_samples(report):
    del report["cases"][0]["seconds"]["samples"]


def tell_a_speed_and_why_there_is_none(report):
    report["cases"][0]["not_measured"] = "out of memory"


def give_no_reason(report):
    case = report["cases"][0]
    for key in ("seconds", "peak_bytes", "floor"):
        del case[key]
    case["not_measured"] = ""


def forget_the_floor(report):
    del report["cases"][0]["floor"]


def forget_the_device(report):
    del report["machine"]


def forget_the_variant(report):
    del report["cases"][0]["variant"]


def another_format(report):
    report["format"] = 2


IN_THE_SAMPLES = [no_samples, zero_seconds, nan_seconds, times_without_samples]
IN_THE_FORM = [
    tell_a_speed_and_why_there_is_none,
    give_no_reason,
    forget_the_floor,
    forget_the_device,
    forget_the_variant,
    another_format,
]


@pytest.mark.parametrize("damage", IN_THE_SAMPLES + IN_THE_FORM, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_refused(damage, report, tmp_path):
    damage(report)
    (tmp_path / "benchmark.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="is no benchmark result"):
        reports.read(tmp_path / "benchmark.json")


@pytest.mark.parametrize("damage", IN_THE_FORM, ids=lambda damage: damage.__name__)
def test_a_damaged_report_is_not_written(damage, report, tmp_path):
    reports.check(report)
    damage(report)
    with pytest.raises(ValueError):
        reports.save(report, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_invented_median_is_not_shown(report, tmp_path):
    table = reports.table(report)
    for case in report["cases"]:
        case["seconds"] |= {"median": 1e-9, "p10": 1e-9, "p90": 1e-9}
    assert reports.table(report) != table
    (tmp_path / "benchmark.json").write_text(json.dumps(report))
    assert reports.table(reports.read(tmp_path / "benchmark.json")) == table


def test_without_samples_there_is_no_summary():
    for samples in ([], [0.0], [1.0, math.nan], [math.inf], [-1.0]):
        with pytest.raises(ValueError, match="no speed without a measurement"):
            reports.summary(samples, 1)
    times = reports.summary([4.0, 1.0, 2.0, 3.0, 5.0], 7)
    assert (times["median"], times["calls_per_sample"]) == (3.0, 7)
    assert times["p10"] == pytest.approx(1.4) and times["p90"] == pytest.approx(4.6)


def test_a_busy_machine_is_told(report):
    for load, said in ((0.1, False), (3.0, True)):
        report["load_average"] = load
        reports.check(report)
        assert ("busy with other programs" in reports.table(report)) == (
            said and report["machine"]["device"]["type"] == "cpu"
        )


def invented(median, floor, variant="hybrid", direction="forward", part="attention", shape="flux", **kwargs):
    """One entry of a report's cases, of 64 x 64 px."""
    text = 512 if shape == "flux" else 0
    case = {"part": part, "shape": shape, "px": 64, "image_tokens": 16, "text_tokens": text, "variant": variant}
    seconds = reports.summary([median], 1)
    floor = {"bytes": 0, "flops": 0, "seconds": floor}
    return case | {"direction": direction, "seconds": seconds, "peak_bytes": 3 * 2**19, "floor": floor, **kwargs}


def test_the_table_by_hand(report):
    report["cases"] = [
        invented(0.004, 0.001),
        invented(0.001, 0.0005, "window"),
        invented(0.0005, 0.0002, "linear"),
        invented(0.012, 0.01, "dense-flash"),
        invented(0.02, 0.01, "dense-efficient"),
        invented(0.5, 0.1, direction="backward"),
        invented(0.002, 0.001, "window", shape="sit-xl"),
        invented(0.003, 0.001, "dense", shape="sit-xl"),
        invented(0.25, 0.1, "linear", part="transformer", layers=[2, 57], batch=1),
        invented(1.0, 0.5, "dense", part="transformer", layers=[2, 57], batch=1),
    ]
    start = "| 64 | 16 |"
    assert [line for line in reports.table(report).splitlines() if line.startswith(start)] == [
        f"{start} hybrid | 4.00 (4.00 to 4.00) ms | 3.00 | 1.00 ms | 4.0 | 1.5 MiB |",
        # branches of a layer with text: alone they are no layer
        f"{start} window | 1.00 (1.00 to 1.00) ms |  | 0.500 ms | 2.0 | 1.5 MiB |",
        f"{start} linear | 0.500 (0.500 to 0.500) ms |  | 0.200 ms | 2.5 | 1.5 MiB |",
        f"{start} dense-flash | 12.0 (12.0 to 12.0) ms | 1.00 | 10.0 ms | 1.2 | 1.5 MiB |",
        f"{start} dense-efficient | 20.0 (20.0 to 20.0) ms | 0.60 | 10.0 ms | 2.0 | 1.5 MiB |",
        # nothing dense was measured backward
        f"{start} hybrid | 500 (500 to 500) ms |  | 100 ms | 5.0 | 1.5 MiB |",
        # without text a window is a layer, and so is a transformer of linear attention
        f"{start} window | 2.00 (2.00 to 2.00) ms | 1.50 | 1.00 ms | 2.0 | 1.5 MiB |",
        f"{start} dense | 3.00 (3.00 to 3.00) ms | 1.00 | 1.00 ms | 3.0 | 1.5 MiB |",
        f"{start} linear | 250 (250 to 250) ms | 4.00 | 100 ms | 2.5 | 1.5 MiB |",
        f"{start} dense | 1000 (1000 to 1000) ms | 1.00 | 500 ms | 2.0 | 1.5 MiB |",
    ]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/results").rglob("benchmark.json")), ids=lambda p: p.parent.name
)
def test_committed_results_are_what_their_json_says(path):
    report = reports.read(path)
    assert reports.to_json(report) == path.read_text()
    assert reports.table(report) == path.with_suffix(".md").read_text()
