#!/usr/bin/env bash
# Test and measure on a GPU, in parts that each end within eight minutes on an H100:
#     scripts/gpu_check.sh [--again] [--wheels FOLDER] [PART ...]        (default: all parts, one after the other)
#       tests         the attention's and the benchmark's tests
#       attention     benchmark of the attention layer, and its speed targets
#       transformer   benchmark of compiled denoising steps
#       generation    benchmark of sampler steps
#       training      benchmark of steps with gradients
#       highres-passes, highres-image, highres-low-memory; all three: highres
#                     PixArt-Sigma of full size at 8192 and 16384 pixels: what is held against the plan; an image of
#                     16384 x 16384 from the prompt to the file, at once and within 20 GiB (scripts/highres.py)
# A part that is done on this commit (parts.txt, in the results) is not repeated, unless --again is given; one that was
# killed or failed is, and one whose time ran out counts as done, with what it measured. The results of all parts are in
# benchmarks/results/<device>/, and are copied to $OUT if that is set.
# It needs a GPU, and Python with torch and triton ($PYTHON, default python3), but no network: missing packages (pytest,
# matplotlib, diffusers and its requirements, natten) are installed from the folder of wheels, if one is given. Parts for
# which something is still missing are left out, with a note. It exits with 1 if there is no GPU, a test fails or a
# measurement breaks; a missed target is not an error.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
highres="highres-passes highres-image highres-low-memory"
every_part="tests attention transformer generation training $highres"
wheels= again= parts=

stop() {
    echo "gpu_check: $1" >&2
    exit "${2:-1}"
}
while [ $# -gt 0 ]; do
    case $1 in
        --again) again=yes ;;
        --wheels) [ $# -gt 1 ] || stop "--wheels needs a folder" 2; wheels=$2; shift ;;
        highres) parts="$parts $highres" ;;
        *) [[ " $every_part " == *" $1 "* ]] || stop "no part $1: the parts are $every_part" 2; parts="$parts $1" ;;
    esac
    shift
done

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    stop "no GPU that torch of $python can use: nothing was measured"
fi
if [ -n "$wheels" ] && ! compgen -G "$wheels/*.whl" >/dev/null; then
    stop "no wheels in $wheels"
fi

work=$(mktemp -d)
device=$("$python" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
results=benchmarks/results/$device
mkdir -p "$results"
# shellcheck disable=SC2329 # the trap calls it
finish() {
    if [ -n "${OUT:-}" ]; then
        mkdir -p "$OUT"
        cp -r "$results" "$OUT/"
    fi
    rm -rf "$work"
}
trap finish EXIT

if [ -n "$wheels" ]; then
    "$python" -m venv --system-site-packages --without-pip "$work/venv"
    # if $python is itself in a virtual environment, --system-site-packages leaves out that environment's packages
    "$python" -c 'import site; print("\n".join(site.getsitepackages()))' > "$work/outer"
    cp "$work/outer" "$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    for wheel in "$wheels"/*.whl; do
        "$python" -m pip --python "$work/venv/bin/python" install --quiet --disable-pip-version-check --no-index \
            --no-deps "$wheel" || echo "left out: $(basename "$wheel") does not install here"
    done
    python=$work/venv/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1

# what the results are of; where git does not know, a part counts as done until --again
commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
record=$results/parts.txt

forget() {
    { grep -v "^$1 " "$record" 2>/dev/null || true; } > "$work/parts"
    mv "$work/parts" "$record"
}

has() {
    "$python" -c "import $1" 2>/dev/null
}

# stopped by SIGINT (Ctrl-C): the benchmark then keeps what it has measured
bench() {
    local limit=$1 code=0
    shift
    has diffusers && has accelerate || { echo "left out: the benchmark needs diffusers and accelerate"; return 3; }
    timeout --signal INT --kill-after 30 "$limit" "$python" -m hybriddit benchmark "$@" || code=$?
    if [ "$code" = 124 ]; then
        echo "stopped after $limit s: what was measured up to then is kept"
    elif [ "$code" != 0 ]; then
        return 1
    fi
}

# keeps the JSON and the small copies, not the images themselves
highres() {
    has diffusers && has accelerate || { echo "left out: it needs diffusers and accelerate"; return 3; }
    local code=0
    timeout --kill-after 30 450 "$python" scripts/highres.py "$@" --out "$work/highres" || code=$?
    mkdir -p "$work/highres" "$results/highres"
    find "$work/highres" \( -name "*.json" -o -name "*.preview.jpg" \) -exec cp {} "$results/highres/" \;
    [ "$code" != 124 ] || echo "stopped after 450 s"
    return $((code > 0))
}

# each returns 0: done, 1: failed, 3: left out
run_part() {
    case $1 in
        tests)
            has pytest || { echo "left out: the tests need pytest"; return 3; }
            local code=0
            # compiling for other chips needs no GPU, and takes longer than all the rest
            timeout 450 "$python" -m pytest tests/attention tests/benchmark -m "not slow" \
                --ignore tests/attention/linear/test_compile.py --ignore tests/attention/window/test_window_compile.py \
                2>&1 | tee "$work/tests" || code=1
            tail -n 1 "$work/tests" > "$results/tests.txt"
            return "$code"
            ;;
        attention)
            bench 450 --part attention --shapes flux pixart-sigma sd3 --sizes 512 1024 2048 4096 8192 \
                --variants hybrid window linear dense-cudnn dense-flash circular --max-seconds 8 --out "$results" || return
            "$python" scripts/gpu_targets.py "$results" 2>&1 | tee "$results/targets.txt"
            ;;
        transformer)
            bench 450 --part transformer --shapes flux pixart-sigma --sizes 512 1024 2048 4096 --compile \
                --max-seconds 15 --out "$results/transformer" || return
            "$python" scripts/gpu_targets.py "$results" 2>&1 | tee "$results/targets.txt"
            ;;
        generation)
            bench 450 --part generation --shapes flux pixart-sigma --sizes 1024 2048 4096 --max-seconds 60 \
                --out "$results/generation"
            ;;
        training)
            bench 450 --part transformer --backward --shapes pixart-sigma flux --sizes 512 1024 2048 --layers 4 \
                --compile --max-seconds 15 --out "$results/training"
            ;;
        highres-passes) highres passes ;;
        highres-image) highres image ;;
        highres-low-memory) highres image --memory 20 ;;
    esac
}

{
    date -u +%F
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
    "$python" -m hybriddit info || "$python" -c 'import torch; print("torch", torch.__version__)'
} > "$results/environment.txt" 2>&1
cat "$results/environment.txt"

failed=0
for part in ${parts:-$every_part}; do
    if [ -z "$again" ] && grep -qx "$part $commit" "$record" 2>/dev/null; then
        echo "== $part: done already (--again repeats it)"
        continue
    fi
    forget "$part"
    echo "== $part"
    code=0
    run_part "$part" || code=$?
    case $code in
        0) echo "$part $commit" >> "$record" ;;
        3) ;;
        *) failed=1; echo "== $part failed" ;;
    esac
done
echo "results: $results"
exit $failed
