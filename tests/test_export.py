"""`hybriddit export`: generated images in the folders that published benchmarks read."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_clip import save_tiny_clip

from hybriddit.cli import EXPORTS, build_parser, main
from hybriddit.data.prompts import read_prompts
from hybriddit.generate.export import BENCHMARKS
from hybriddit.images import save_png
from hybriddit.metrics.inception import FILES

ROOT = Path(__file__).parents[1]


def made(folder, prompts, each, size=(8, 8)):
    """Images as `generate --out images/image.png` numbers them; each is of one grey level, its number."""
    for number in range(len(prompts) * each):
        record = {"prompt": prompts[number // each], "seed": number}
        folder.mkdir(exist_ok=True)
        save_png(Image.new("RGB", size, (number + 1,) * 3), folder / f"image-{number + 1:04d}.png", record)


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(benchmark, prompts, *more):
        code = main(["export", benchmark, "--prompts", prompts, "--image", "images/image.png", "--out", "out", *more])
        return code, capsys.readouterr().err.strip()

    return run


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def level(path):
    return int(np.asarray(Image.open(path)).mean().round())


def test_geneval(tmp_path, export):
    rows = [
        {"tag": "single_object", "include": [{"class": "cup", "count": 1}], "prompt": f"a photo of {x}"} for x in "ab"
    ]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    made(tmp_path / "images", [row["prompt"] for row in rows], 4)
    assert export("geneval", "metadata.jsonl") == (0, "")
    images = [f"samples/000{i}.png" for i in range(4)]
    assert tree(tmp_path / "out") == [f"0000{row}/{name}" for row in (0, 1) for name in ["metadata.jsonl", *images]]
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text()) == rows[1]
    assert [level(tmp_path / "out/00001" / image) for image in images] == [5, 6, 7, 8]


def test_t2i_compbench(tmp_path, export):
    (tmp_path / "color_val.txt").write_text("a green bench and a blue bowl\na red car\n")
    made(tmp_path / "images", ["a green bench and a blue bowl", "a red car"], 2)
    assert export("t2i-compbench", "color_val.txt", "--num-images", "2") == (0, "")
    names = ["a green bench and a blue bowl_000000", "a green bench and a blue bowl_000001", "a red car_000002"]
    assert tree(tmp_path / "out") == [f"samples/{name}.png" for name in [*names, "a red car_000003"]]
    assert level(tmp_path / "out/samples/a red car_000003.png") == 4


def test_hpsv2(tmp_path, export):
    (tmp_path / "prompts").mkdir()
    styles = {"photo": ["a dog", "a cat"], "anime": ["a robot"], "concept-art": ["a ship"]}
    for style, prompts in styles.items():
        (tmp_path / "prompts" / f"{style}.json").write_text(json.dumps(prompts))
    assert read_prompts(tmp_path / "prompts") == ["a robot", "a ship", "a dog", "a cat"]
    made(tmp_path / "images", ["a robot", "a ship", "a dog", "a cat"], 1)
    assert export("hpsv2", "prompts") == (0, "")
    assert tree(tmp_path / "out") == ["anime/00000.jpg", "concept-art/00000.jpg", "photo/00000.jpg", "photo/00001.jpg"]
    assert (
        level(tmp_path / "out/photo/00001.jpg") == 4 and Image.open(tmp_path / "out/photo/00001.jpg").format == "JPEG"
    )


def test_dpg_bench(tmp_path, export):
    (tmp_path / "prompts").mkdir()
    for name, prompt in {"10": "ten cups", "2": "two cups"}.items():
        (tmp_path / "prompts" / f"{name}.txt").write_text(prompt + "\n")
    made(tmp_path / "images", ["ten cups", "two cups"], 4)
    assert export("dpg-bench", "prompts") == (0, "")
    assert tree(tmp_path / "out") == ["10.png", "2.png"]
    sheet = np.asarray(Image.open(tmp_path / "out/2.png"))
    assert sheet.shape == (16, 16, 3) and sheet[::8, ::8, 0].tolist() == [[5, 6], [7, 8]]


def rename(tmp_path):
    (tmp_path / "images/image-0003.png").rename(tmp_path / "images/image-0009.png")


def bare(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "images/image-0003.png")


def swap(tmp_path):
    shutil.copy(tmp_path / "images/image-0001.png", tmp_path / "images/image-0003.png")


def full(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/note.txt").write_text("mine")


@pytest.mark.parametrize(
    "benchmark, change, more, message",
    [
        (
            "t2i-compbench",
            rename,
            ["--num-images", "2"],
            "images/image-0003.png is missing: hybriddit generate --prompts",
        ),
        ("t2i-compbench", bare, ["--num-images", "2"], "images/image-0003.png has no record"),
        ("t2i-compbench", swap, ["--num-images", "2"], "image-0003.png was made of the prompt 'a_b', and prompt 2 of"),
        ("t2i-compbench", None, ["--num-images", "2"], "names of files, which cannot hold '_': 'a_b'"),
        ("t2i-compbench", None, ["--num-images", "0"], "--num-images must be at least 1, not 0"),
        ("hpsv2", None, ["--num-images", "2"], "HPSv2 takes one image of each prompt"),
        (
            "geneval",
            None,
            ["--num-images", "2"],
            "p.txt is not GenEval's list of prompts with tags: take prompts/evaluation_metadata.jsonl",
        ),
        (
            "dpg-bench",
            None,
            ["--num-images", "2"],
            "four square images of one size, or one, of each prompt, not 8 x 8, 8 x 8",
        ),
        ("dpg-bench", full, ["--num-images", "2"], "out holds note.txt already: give a folder that is new or empty"),
    ],
)
def test_refused_in_a_line(tmp_path, export, benchmark, change, more, message):
    (tmp_path / "p.txt").write_text("a_b\na cup\n")
    made(tmp_path / "images", ["a_b", "a cup"], 2)
    if change:
        change(tmp_path)
    before = tree(tmp_path)
    code, error = export(benchmark, "p.txt", *more)
    assert code == 1 and message in error and "\n" not in error
    assert tree(tmp_path) == before, "nothing is left behind"


def test_prompts_of_several_lines_and_a_folder_without_any(tmp_path, export):
    (tmp_path / "prompts").mkdir()
    assert export("dpg-bench", "prompts")[1].startswith(
        "hybriddit: no prompt file in prompts: it holds none that ends in"
    )
    (tmp_path / "prompts/1.txt").write_text("one\ntwo")
    made(tmp_path / "images", ["one", "two"], 4)
    assert "holds several prompts, and DPG-Bench has a file for each" in export("dpg-bench", "prompts")[1]


def test_the_command_offers_all_of_them():
    assert tuple(BENCHMARKS) == EXPORTS


def test_prompts_of_coco(tmp_path):
    annotations = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(9)],
        "annotations": [
            {"image_id": i, "id": 5 * i + j, "caption": f" caption {j}\nof {i} "} for i in range(8) for j in (0, 1)
        ]
        + [{"image_id": i, "id": 100 + i, "caption": " \n"} for i in range(9)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(annotations))

    def draw(*more):
        command = [sys.executable, ROOT / "scripts/coco_prompts.py", "captions.json", "--out", "p.jsonl", *more]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )

    assert draw("--count", "8").returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert sorted(row["image_id"] for row in rows) == list(range(8)) and rows[0]["image_id"] != 0
    assert all(row["prompt"] in [f"caption {j} of {row['image_id']}" for j in (0, 1)] for row in rows)
    assert rows[0]["file_name"] == f"{rows[0]['image_id']:012d}.jpg"
    assert read_prompts(tmp_path / "p.jsonl") == [row["prompt"] for row in rows]
    done = draw("--count", "9")
    assert done.stderr == "coco_prompts.py: captions.json has captions of 8 images: draw at most as many (--count)\n"
    assert draw("--count", "0").stderr == "coco_prompts.py: --count must be at least 1, not 0\n"


def test_the_protocol_on_coco_is_the_papers(tmp_path):
    """Its commands, by our own parser; the captions are drawn."""
    captions = [{"image_id": number, "caption": f"a shoe {number}"} for number in range(6)]
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(6)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions, "images": images}))
    script, python = ROOT / "scripts/coco_protocol.sh", sys.executable
    environment = {**os.environ, "PYTHON": python, "LAUNCH": "echo", "COUNT": "5", "PYTHONPATH": str(ROOT)}
    environment["TORCH_HOME"] = str(tmp_path)
    words = ["captions.json", "val2014", "out", "512", "base", "run/adapter"]
    environment["CLIP"] = "./clip"
    run = partial(subprocess.run, capture_output=True, text=True, cwd=tmp_path, env=environment)
    done = run([script, *words])
    assert done.returncode == 1 and done.stderr == "coco_protocol.sh: no folder of images at val2014\n"
    (tmp_path / "val2014").mkdir()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / FILES[0]).touch()
    done = run([script, *words], env=environment | {"CLIP": "./none"})
    assert done.returncode == 1 and "generate" not in done.stdout, "before images are made"
    assert done.stderr == "coco_protocol.sh: --clip: no folder ./none\n"
    save_tiny_clip(tmp_path / "clip")
    done = run([script, *words])
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out/prompts.jsonl").read_text().splitlines()) == 5
    told = [build_parser().parse_args(line.split()[1:]) for line in done.stdout.splitlines() if "hybriddit" in line]
    for made, scored, adapter in ((*told[:2], None), (*told[2:], "run/adapter")):
        assert (made.model, made.adapter, made.steps, made.guidance) == ("base", adapter, 25, 7.5)
        assert (made.height, made.width, made.out.parent) == (512, 512, scored.samples)
        assert (scored.size, str(scored.reference)) == (256, "val2014") and scored.clip == "./clip"
    assert "clip=${CLIP:-laion/CLIP-ViT-g-14-laion2B-s12B-b42K}" in script.read_text()
    done = run([script, *words], env=environment | {"COUNT": "6"})
    assert done.returncode == 1 and "has 5 prompts, not 6: give another OUT, or COUNT=5" in done.stderr
    done = run([script, *words[:4]])
    assert done.returncode == 2 and "ANNOTATIONS VAL2014 OUT SIZE MODEL [ADAPTER]" in done.stderr
