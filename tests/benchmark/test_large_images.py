"""The scripts that count large images give the rows of their pages."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIXART = ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",)


@pytest.mark.parametrize(
    ("script", "page", "count"),
    [("large_images", "benchmarks/results/large_images.md", 3), ("memory_by_size", "docs/generate.md", 1)],
)
def test_rows_of_1024_pixels_are_those_of_the_page(script, page, count, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = __import__(script)
    monkeypatch.setattr(module, "MODELS", PIXART)
    monkeypatch.setattr(module, "SIZES", (1024,))
    module.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "1024 |" in line]
    lines = (ROOT / page).read_text().splitlines()
    assert len(rows) == count and all(row in lines for row in rows)
