import pytest


@pytest.mark.parametrize("factor", [1.0, 1.02, 40.0])
def test_a_plot_keeps_its_labels_apart_and_inside(report, factor):
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    from hybriddit.benchmark.plot import draw as figure_of

    for i, case in enumerate(case for case in report["cases"] if "seconds" in case):  # ends together, close, far apart
        case["seconds"] |= dict.fromkeys(("median", "p10", "p90"), 1e-3 * factor ** (i % 4))
    figure = figure_of(report)
    figure.draw_without_rendering()
    for axis in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axis.texts]  # without the line that leads to the label
        assert len(boxes) == 4
        assert not [1 for i, one in enumerate(boxes) for other in boxes[i + 1 :] if one.overlaps(other)]
        assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
    report["cases"] = [case | {"not_measured": "no"} for case in report["cases"] if case.pop("seconds")]
    assert figure_of(report) is None
