"""Draw the prompts of a COCO protocol: images of MS-COCO's annotations without repetition, one caption of each.

    python scripts/coco_prompts.py annotations/captions_val2014.json --out coco30k.jsonl
    hybriddit generate --model base/ --adapter run/ --prompts coco30k.jsonl --out outputs/coco/image.png
    hybriddit evaluate outputs/coco val2014 --size 256 --out scores.json

Zero-shot FID on COCO takes 30,000 captions of the 40,504 images of val2014 and compares with all of them. Published
lists of captions differ, and none is read here: figures are comparable for one list. Each row of the result has the
caption, "prompt", and where it is from, "image_id" and "file_name".
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from hybriddit.files import read_json, replacing


def rows(annotations: Path, count: int, seed: int) -> list[dict]:
    """The rows of `count` images. Raises ValueError for a file of another kind and for fewer images with captions."""
    found = read_json(annotations)
    try:
        names = {image["id"]: image["file_name"] for image in found["images"]}
        captions: dict[int, list[str]] = {}
        for one in found["annotations"]:
            if caption := " ".join(one["caption"].split()):
                captions.setdefault(one["image_id"], []).append(caption)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{annotations} has not the lists of a captions_*.json of MS-COCO ({error})") from None
    if count < 1:
        raise ValueError(f"--count must be at least 1, not {count}")
    if count > len(captions):
        raise ValueError(f"{annotations} has captions of {len(captions)} images: draw at most as many (--count)")
    draw = random.Random(seed)
    return [
        {"prompt": draw.choice(captions[image]), "image_id": image, "file_name": names.get(image)}
        for image in draw.sample(sorted(captions), count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--count", type=int, default=30_000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows(options.annotations, options.count, options.seed)]
        with replacing(options.out) as partial:
            partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        raise SystemExit(f"coco_prompts.py: {error}") from None
    print(f"{len(lines)} prompts are in {options.out}")


if __name__ == "__main__":
    main()
