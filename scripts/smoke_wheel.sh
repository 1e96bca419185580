#!/usr/bin/env bash
# Build the source distribution, and from it the wheel. Then install and try the wheel in a new environment for each
# given Python, and the source distribution for the first one.
#     scripts/smoke_wheel.sh [python version or path ...]     (default: the python3 on PATH)
# Needs uv, on PATH or in .venv; dist/ receives what was built.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .venv/bin/uv)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ $# -gt 0 ] || set -- "$(command -v python3)"

rm -rf dist
"$uv" build --quiet --out-dir dist .
wheel=$(echo dist/*.whl)
sdist=$(echo dist/*.tar.gz)
python3 - "$wheel" "$sdist" <<'PYTHON'
import sys, tarfile, zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
wrong = [name for name in names if not (name.startswith("hybriddit/") or ".dist-info/" in name)]
assert not wrong, f"the wheel holds more than the package: {wrong}"
assert any(name.endswith("licenses/LICENSE") for name in names), "the wheel lacks the licence"
assert "hybriddit/attention/tuned/sm_90.json" in names, "the wheel lacks the tables of launch options"
files = {name.partition("/")[2] for name in tarfile.open(sys.argv[2]).getnames()}
needed = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "Makefile", "constraints.txt",
          "configs/distill/demo.yaml", "assets/demo-teacher/model_index.json", "docs/concepts.md", "tests/test_docs.py"}  # fmt: skip
assert needed <= files, f"the source distribution lacks {sorted(needed - files)}"
PYTHON

for python in "$@"; do
    packages=("$wheel")
    [ "$python" = "$1" ] && packages+=("$sdist")
    for package in "${packages[@]}"; do
        environment=$work/environment
        "$uv" venv --quiet --python "$python" "$environment"
        "$uv" pip install --quiet --python "$environment/bin/python" --constraint constraints.txt "$package"
        # from a folder that holds no checkout, offline, without a hub
        (cd "$work" && HF_HUB_OFFLINE=1 PATH="$environment/bin:$PATH" bash -euo pipefail -c '
            hybriddit --version
            hybriddit info
            for command in cache sample; do hybriddit $command --help > help; done
            if hybriddit demo 2> error; then exit 1; fi
            grep -q "run the demo from a checkout" error
            python -P - <<PYTHON
import torch
from diffusers import FluxTransformer2DModel

import hybriddit

assert "site-packages" in hybriddit.__file__, hybriddit.__file__
model = FluxTransformer2DModel(in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
                               num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8,
                               axes_dims_rope=(4, 6, 6)).eval()
ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(5.0))
inputs = dict(hidden_states=torch.randn(1, 20, 8), encoder_hidden_states=torch.randn(1, 3, 12), img_ids=ids,
              pooled_projections=torch.randn(1, 8), timestep=torch.ones(1), txt_ids=torch.zeros(3, 3))
with torch.no_grad():
    dense = model(**inputs).sample
    hybriddit.hybridize(model, hybriddit.HybridConfig(window=5))
    torch.testing.assert_close(model(**inputs).sample, dense)
    hybriddit.save_adapter(model, "adapter")
    hybriddit.restore_dense(model)
    hybriddit.load_adapter(model, "adapter")
    torch.testing.assert_close(model(**inputs).sample, dense)
PYTHON
            hybriddit info adapter
        ' > "$work/log" 2>&1) || { cat "$work/log"; echo "FAILED: $package, Python $python"; exit 1; }
        rm -rf "$work/adapter" "$environment"
        echo "ok: $package, Python $python"
    done
done
