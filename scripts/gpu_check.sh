#!/usr/bin/env bash
# Run all checks on a GPU, in under 25 minutes on an H100: environment, tests, benchmark and speed targets.
#     scripts/gpu_check.sh [folder of wheels]
# It needs a GPU, and Python with torch and triton ($PYTHON, default python3), but no network: missing packages (pytest,
# matplotlib, diffusers and its requirements, natten) are installed from the folder of wheels, if one is given. Steps
# for which something is still missing are left out, with a note. Results go to benchmarks/results/<device>/, and are
# copied to $OUT if that is set. It exits with 1 if there is no GPU, a test fails or a measurement breaks; a missed
# target is not an error.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${1:-}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_check: no GPU that torch of $python can use: nothing was measured" >&2
    exit 1
fi
if [ -n "$wheels" ] && ! compgen -G "$wheels/*.whl" >/dev/null; then
    echo "gpu_check: no wheels in $wheels" >&2
    exit 1
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

has() {
    "$python" -c "import $1" 2>/dev/null
}
failed=0

echo "== environment"
{
    date -u +%F
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
    "$python" -m hybriddit info || "$python" -c 'import torch; print("torch", torch.__version__)'
} 2>&1 | tee "$results/environment.txt"

echo "== tests"
if has pytest; then
    timeout 480 "$python" -m pytest tests/attention tests/benchmark 2>&1 | tee "$work/tests" || failed=1
    tail -n 1 "$work/tests" > "$results/tests.txt"
else
    echo "left out: the tests need pytest"
fi

# stopped by SIGINT (Ctrl-C): the benchmark then keeps what it has measured
bench() {
    local limit=$1 code=0
    shift
    timeout --signal INT --kill-after 30 "$limit" "$python" -m hybriddit benchmark "$@" || code=$?
    if [ "$code" = 124 ]; then
        echo "stopped after $limit s: what was measured up to then is kept"
    elif [ "$code" != 0 ]; then
        failed=1
    fi
}

echo "== benchmark: attention layer, transformer, generation"
if has diffusers && has accelerate; then
    bench 660 --part attention --shapes flux pixart-sigma sd3 --sizes 512 1024 2048 4096 8192 16384 --max-seconds 12 \
        --out "$results"
    bench 200 --part transformer --shapes pixart-sigma flux --sizes 256 512 1024 --compile --out "$results/transformer"
    bench 120 --part generation --shapes flux pixart-sigma --sizes 1024 2048 4096 --max-seconds 15 \
        --out "$results/generation"
else
    echo "left out: the benchmark needs diffusers and accelerate"
fi

echo "== targets"
"$python" scripts/gpu_targets.py "$results" 2>&1 | tee "$results/targets.txt" || failed=1
echo "results: $results"
exit $failed
