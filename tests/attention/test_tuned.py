"""The shipped tables of launch options, and who uses them."""

import re

import pytest
import torch

from hybriddit.attention import tuned
from hybriddit.attention.launch import in_force
from hybriddit.files import read_json

linear_triton = pytest.importorskip("hybriddit.attention.linear.triton", reason="triton is not installed")
window_kernels = pytest.importorskip("hybriddit.attention.window.kernels", reason="triton is not installed")

KERNELS = {
    "linear": ("sum", "output", "output_backward", "state_backward"),
    "window": ("forward", "query_gradient", "key_gradient", "text_gradient"),
}
OPTIONS = {
    "linear": {"BLOCK_N", "num_warps", "num_stages", "PROGRAMS_PER_SM"},
    "window": {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"},
}
TABLES = sorted(tuned.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_the_tables_are_of_the_format_and_say_where_they_come_from(path):
    table = read_json(path)
    major, minor = table["machine"]["device"]["capability"].split(".")
    assert path.name == f"sm_{major}{minor}.json"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", table["date"]) and table["git"]["commit"]
    assert table["machine"]["device"]["name"] and table["machine"]["versions"]["triton"]
    options = tuned.options_by_kernel(table)
    assert len(options) == len(table["kernels"]) > 0, "a kernel has two rows"
    for (part, kernel, _, _), found in options.items():
        assert kernel in KERNELS[part] and set(found) == OPTIONS[part]
    # None where the kernel's own options do not work
    assert all(0 < row["seconds"] <= (row["default_seconds"] or row["seconds"]) for row in table["kernels"])


def test_a_table_of_another_format_is_refused():
    with pytest.raises(ValueError, match="no table of launch options of format 1"):
        tuned.options_by_kernel({"format": 2, "kernels": []})


def linear_options(kernel="output", dtype=torch.bfloat16, width=128, out_width=None, target=90, **options):
    out_width = width if out_width is None else out_width
    found = linear_triton.launch_options(kernel, dtype, width, out_width, target, **options)
    return tuple(found[name] for name in ("BLOCK_N", "num_warps", "num_stages", "PROGRAMS_PER_SM"))


def test_linear_kernels_take_what_was_measured_on_their_chip():
    assert linear_options() == (64, 4, 2, 8)
    assert linear_options("sum") == (32, 8, 3, 2)
    assert linear_options("state_backward", width=64) == (128, 8, 3, 2)
    default = (64, 8, 2, 2)
    for case in ({"width": 96}, {"out_width": 64}, {"channels": 64}, {"feature_map": "hedgehog"}, {"target": 100}):
        assert linear_options(**case)[3] == 2 and linear_options(**case)[1] == 8, case
    assert linear_options(per_channel=True) == default
    assert linear_options(dtype=torch.float16)[1] == 8
    assert linear_options(target=80)[:2] == (32, 8)


def test_window_kernels_take_what_was_measured_on_their_chip(monkeypatch):
    measured = {("window", "forward", torch.bfloat16, 128): {"BLOCK_M": 64, "num_warps": 2}}
    monkeypatch.setattr(tuned, "_options_of", lambda target: measured if target == 90 else {})
    options = window_kernels.launch_options("forward", torch.bfloat16, 128, 90)
    assert (options["BLOCK_M"], options["num_warps"]) == (64, 2)
    for case in (("query_gradient", torch.bfloat16, 128, 90), ("forward", torch.bfloat16, 64, 90),
                 ("forward", torch.float16, 128, 90), ("forward", torch.bfloat16, 128, 100)):  # fmt: skip
        assert window_kernels.launch_options(*case)["num_warps"] == 8, case


def test_a_sweep_s_options_go_before_the_table_s(monkeypatch):
    monkeypatch.setitem(linear_triton.OVERRIDES, "output", {"num_warps": 2})
    assert linear_options() == (64, 2, 2, 8)


def test_what_is_kept_of_a_launch_follows_a_sweep_s_options(monkeypatch):
    """Else a sweep would time the same options again and again."""
    monkeypatch.setattr(linear_triton, "INTERPRETED", True)
    monkeypatch.setattr(window_kernels, "INTERPRETED", True)
    x = torch.empty(1, 20, 20, 2, 32)

    def rows():
        case = x.device, x.dtype, x.shape, (3, 3), (1, 1), (1, 1), 0, False
        launch = window_kernels._launch("forward", *case, in_force(window_kernels.OVERRIDES, "forward"))
        return linear_triton._options("output", x[0], 32, None, "elu")[0]["BLOCK_N"], launch.constants["BLOCK_N"]

    before = rows()
    monkeypatch.setitem(linear_triton.OVERRIDES, "output", {"BLOCK_N": 128})
    monkeypatch.setitem(window_kernels.OVERRIDES, "forward", {"BLOCK_N": 128})
    assert rows() == (128, 128) != before
    monkeypatch.delitem(linear_triton.OVERRIDES, "output")
    monkeypatch.delitem(window_kernels.OVERRIDES, "forward")
    assert rows() == before


def test_more_programs_only_while_each_has_enough_rows(monkeypatch):
    """Each reads the state anew: at 4096 tokens two programs per multiprocessor were faster than eight."""
    monkeypatch.setattr(linear_triton, "multiprocessors", lambda device, interpreted: 132)

    def splits(tokens, per_sm):
        return linear_triton._splits(torch.empty(1, tokens, 24, 0), 24, 64, per_sm)

    assert splits(4096, 2) == splits(4096, 8) == (11, 6 * 64)
    assert splits(65536, 2) == (11, 94 * 64) and splits(65536, 8) == (43, 24 * 64)
    assert splits(16384, 8) == (32, 8 * 64)
    assert splits(65536, 1) == (5, 205 * 64)
