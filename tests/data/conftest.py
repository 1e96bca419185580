import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import tiny_pipeline


@pytest.fixture
def folder(tmp_path):
    """Two classes of five images of different sizes; one of them is cut short, and a file is no image."""
    random = np.random.default_rng(0)
    for name in ("apple", "pear"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            pixels = random.integers(0, 256, (8 + 3 * i, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    cut = tmp_path / "images" / "apple" / "1.png"
    cut.write_bytes(cut.read_bytes()[:150])
    (tmp_path / "images" / "pear" / "9.jpg").write_text("no image")
    return tmp_path / "images"


@pytest.fixture(scope="module")
def pipelines():
    """Tiny pipelines by family, which the tests of a module share."""
    made = {}
    return lambda family: made.setdefault(family, tiny_pipeline(family))
