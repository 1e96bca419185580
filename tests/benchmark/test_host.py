"""scripts/bench_host.py, which reaches into the layer to leave its kernels out, still finds what it looks for."""

import re
import subprocess
import sys

FEW = "import bench_host; bench_host.ROUNDS = bench_host.CALLS = 1; bench_host.main()"


def test_the_host_s_time_is_measured():
    done = subprocess.run([sys.executable, "-c", FEW], cwd="scripts", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\S.* +\d+\.\d us$", done.stdout, re.MULTILINE)) == 5
