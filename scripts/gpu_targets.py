"""What the attention on a GPU is to reach, against what `scripts/gpu_check.sh` measured.

    python scripts/gpu_targets.py benchmarks/results/<device>

Prints a line for each target: ok, MISSED, or not measured and why.
"""

import sys
from pathlib import Path

from hybriddit.benchmark.report import fastest_dense, read

# of the measured copy bandwidth, from this many tokens on
BANDWIDTH = {"forward": 0.70, "backward": 0.55}
FROM_TOKENS = 16384
# fastest dense time over the hybrid layer's, FLUX, forward, by the side of the grid in tokens
SPEEDUP = {64: 0.95, 128: 2.0, 256: 8.0, 512: 30.0}
# compiled hybrid over compiled dense time, one step
STEP = 1.05


def attention_targets(report):
    """Yields (target, reached or None, what was found)."""
    for case in report["cases"]:
        if case["variant"] == "linear" and case["image_tokens"] >= FROM_TOKENS and case["direction"] in BANDWIDTH:
            wanted = BANDWIDTH[case["direction"]]
            name = f"linear {case['direction']}, {case['shape']}, {case['image_tokens']} tokens"
            name += f": at least {wanted:.0%} of the copy bandwidth"
            if "seconds" not in case:
                yield name, None, case["not_measured"]
                continue
            rate = case["floor"]["bytes"] / case["seconds"]["median"] / report["rates"]["bytes_per_second"]
            yield name, rate >= wanted, f"{rate:.0%}"
    for side, wanted in SPEEDUP.items():
        name = f"hybrid layer, flux, {side} x {side} tokens: at least {wanted:g} times dense"
        found = [
            case
            for case in report["cases"]
            if (case["shape"], case["variant"], case["direction"]) == ("flux", "hybrid", "forward")
            and case["image_tokens"] == side * side
        ]
        if not found or "seconds" not in found[0]:
            yield name, None, found[0]["not_measured"] if found else "not in the results"
            continue
        dense = fastest_dense(report, found[0])
        ratio = dense and dense / found[0]["seconds"]["median"]
        yield name, ratio and ratio >= wanted, f"{ratio:.2f}" if ratio else "dense was not measured"


def step_targets(report):
    """The same, of compiled transformers."""
    for case in report["cases"]:
        if case["variant"] == "hybrid" and case["direction"] == "forward" and case["px"] <= 1024:
            name = f"compiled step, {case['shape']}, {case['px']} px: at most {STEP:g} of dense"
            dense = fastest_dense(report, case)
            if "seconds" not in case or dense is None:
                yield name, None, case.get("not_measured", "dense was not measured")
                continue
            ratio = case["seconds"]["median"] / dense
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
