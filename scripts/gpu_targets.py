"""Compare the attention's speed targets on a GPU with what `scripts/gpu_check.sh` measured.

    python scripts/gpu_targets.py benchmarks/results/<device>

It prints a line for each target: ok, MISSED, or not measured and why.
"""

import sys
from pathlib import Path

from hybriddit.benchmark.report import fastest_dense, read

# share of the measured copy bandwidth, from this many tokens on
BANDWIDTH = {"forward": 0.70, "backward": 0.55}
FROM_TOKENS = 16384
# FLUX, forward: the fastest dense variant's time divided by the hybrid layer's, by the side of the grid in tokens
SPEEDUP = {64: 0.95, 128: 2.0, 256: 8.0, 512: 30.0}
# the largest ratio of a compiled hybrid step's time to a compiled dense step's
STEP = 1.05


def attention_targets(report):
    """Yield (target, reached or None, what was found) for the attention layer."""
    for row in report["cases"]:
        if row["variant"] == "linear" and row["image_tokens"] >= FROM_TOKENS and row["direction"] in BANDWIDTH:
            wanted = BANDWIDTH[row["direction"]]
            name = f"linear {row['direction']}, {row['shape']}, {row['image_tokens']} tokens"
            name += f": at least {wanted:.0%} of the copy bandwidth"
            if "seconds" not in row:
                yield name, None, row["not_measured"]
                continue
            rate = row["floor"]["bytes"] / row["seconds"]["median"] / report["rates"]["bytes_per_second"]
            yield name, rate >= wanted, f"{rate:.0%}"
    for side, wanted in SPEEDUP.items():
        name = f"hybrid layer, flux, {side} x {side} tokens: at least {wanted:g} times dense"
        found = [
            row
            for row in report["cases"]
            if (row["shape"], row["variant"], row["direction"]) == ("flux", "hybrid", "forward")
            and row["image_tokens"] == side * side
        ]
        if not found or "seconds" not in found[0]:
            yield name, None, found[0]["not_measured"] if found else "not in the results"
            continue
        dense = fastest_dense(report, found[0])
        ratio = dense and dense / found[0]["seconds"]["median"]
        yield name, ratio and ratio >= wanted, f"{ratio:.2f}" if ratio else "dense was not measured"


def step_targets(report):
    """Yield (target, reached or None, what was found) for compiled transformers."""
    for row in report["cases"]:
        if row["variant"] == "hybrid" and row["direction"] == "forward" and row["px"] <= 1024:
            name = f"compiled step, {row['shape']}, {row['px']} px: at most {STEP:g} of dense"
            dense = fastest_dense(report, row)
            if "seconds" not in row or dense is None:
                yield name, None, row.get("not_measured", "dense was not measured")
                continue
            ratio = row["seconds"]["median"] / dense
            yield name, ratio <= STEP, f"{ratio:.3f}"


def main():
    folder = Path(sys.argv[1])
    reached = []
    for part, targets in (("", attention_targets), ("transformer", step_targets)):
        path = folder / part / "benchmark.json"
        if not path.exists():
            print(f"not measured: {path.relative_to(folder)} is not there")
            continue
        for name, ok, found in targets(read(path)):
            reached.append(ok)
            print(f"{'ok' if ok else 'MISSED' if ok is not None else 'not measured'}: {name}: {found}")
    print(f"{reached.count(True)} of {len(reached)} targets reached")


if __name__ == "__main__":
    main()
