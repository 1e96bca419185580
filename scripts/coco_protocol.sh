#!/usr/bin/env bash
# BK-SDM's protocol, which LinFusion's tables follow: 30,000 captions of MS-COCO's val2014, 25 steps, guidance 7.5; FID and
# CLIP-T at 256 x 256 pixels, of a model and, if there is an adapter, of its hybrid. It goes on where it was stopped.
#     scripts/coco_protocol.sh ANNOTATIONS VAL2014 OUT SIZE MODEL [ADAPTER]
# ANNOTATIONS: captions_val2014.json. VAL2014: the folder of its images. SIZE: of the images made, in pixels.
# COUNT, STEPS, GUIDANCE, CLIP: other values than the protocol's. LAUNCH="torchrun --nproc-per-node 8 -m" takes 8 GPUs.
set -euo pipefail
[ $# -ge 5 ] || { sed -n 2,6p "$0" >&2; exit 2; }
annotations=$1 val2014=$2 out=$3 size=$4 model=$5
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
launch=${LAUNCH:-$python -m}
count=${COUNT:-30000}
clip=${CLIP:-laion/CLIP-ViT-g-14-laion2B-s12B-b42K}

# told now, and not after 30,000 images: what the scores need, and a COUNT other than that of the prompts that are there
[ -d "$val2014" ] || { echo "coco_protocol.sh: no folder of images at $val2014" >&2; exit 1; }
mkdir -p "$out"
[ -f "$out/prompts.jsonl" ] || "$python" "$here/coco_prompts.py" "$annotations" --count "$count" --out "$out/prompts.jsonl"
drawn=$(wc -l <"$out/prompts.jsonl")
[ "$drawn" -eq "$count" ] || {
    echo "coco_protocol.sh: $out/prompts.jsonl has $drawn prompts, not $count: give another OUT, or COUNT=$drawn" >&2
    exit 1
}

"$python" - "$clip" <<'END'
import sys

from hybriddit.metrics.inception import find_inception
from hybriddit.metrics.perceptual import ClipText

try:
    find_inception()
    ClipText(sys.argv[1])
except (OSError, ValueError) as error:
    sys.exit(f"coco_protocol.sh: {error}")
END

score() { # name, options of generate
    local name=$1
    shift
    $launch hybriddit generate --model "$model" "$@" --prompts "$out/prompts.jsonl" --height "$size" --width "$size" \
        --steps "${STEPS:-25}" --guidance "${GUIDANCE:-7.5}" --out "$out/$name/image.png"
    $launch hybriddit evaluate "$out/$name" "$val2014" --size 256 --out "$out/$name.json" \
        --clip "$clip"
}

score teacher
[ $# -lt 6 ] || score hybrid --adapter "$6"
