import copy
import json
import math

import pytest

from hybriddit.benchmark import report as reports

# What is written was measured, here and now.


def invent_a_median(report):
    report["cases"][0]["seconds"]["median"] /= 2


def drop_the_samples(report):
    report["cases"][0]["seconds"]["samples"] = []


def invent_a_sample(report):
    report["cases"][0]["seconds"] = reports.summary([3600.0], 1)


def zero_seconds(report):
    report["cases"][0]["seconds"] = reports.summary([0.0], 1)


def nan_seconds(report):
    report["cases"][0]["seconds"] = reports.summary([math.nan], 1)


def no_calls(report):
    report["cases"][0]["seconds"]["calls_per_sample"] = 0


def add_a_speed(report):
    report["cases"][0]["images_per_second"] = 5.0


def add_a_speed_to_the_times(report):
    report["cases"][0]["seconds"]["best"] = 1e-6


def add_a_speed_to_the_report(report):
    report["speedup"] = 30.0


def tell_a_speed_and_why_there_is_none(report):
    report["cases"][0]["not_measured"] = "out of memory"


def give_no_reason(report):
    case = report["cases"][0]
    for key in ("seconds", "peak_bytes", "floor"):
        del case[key]
    case["not_measured"] = ""


def lower_the_floor(report):
    report["cases"][0]["floor"]["seconds"] /= 2


def measure_a_case_twice(report):
    report["cases"].append(copy.deepcopy(report["cases"][0]))


def forget_the_device(report):
    del report["machine"]


def invent_a_variant(report):
    report["cases"][0]["variant"] = "magic"


TAMPERINGS = [
    invent_a_median,
    drop_the_samples,
    invent_a_sample,
    zero_seconds,
    nan_seconds,
    no_calls,
    add_a_speed,
    add_a_speed_to_the_times,
    add_a_speed_to_the_report,
    tell_a_speed_and_why_there_is_none,
    give_no_reason,
    lower_the_floor,
    measure_a_case_twice,
    forget_the_device,
    invent_a_variant,
]


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda tamper: tamper.__name__)
def test_a_speed_that_was_not_measured_is_refused(tamper, report, tmp_path):
    reports.check(report)
    tamper(report)
    with pytest.raises(ValueError):
        reports.save(report, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "benchmark.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="is no benchmark result"):
        reports.read(tmp_path / "benchmark.json")


@pytest.mark.parametrize("key, value", [("name", "NVIDIA H100 80GB HBM3"), ("versions", {"torch": "1.0"})])
def test_results_of_another_machine_are_not_written_here(report, tmp_path, key, value):
    part = report["machine"] if key in report["machine"] else report["machine"]["device"]
    part[key] = value
    reports.check(report)
    with pytest.raises(ValueError, match="measure here"):
        reports.save(report, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_samples_there_is_no_summary():
    with pytest.raises(ValueError, match="no speed without a measurement"):
        reports.summary([], 1)
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
