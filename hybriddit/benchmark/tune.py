"""`hybriddit benchmark --tune`: try the launch options of the attention kernels on this GPU, and write the fastest down.

A kernel is swept in two rounds: every combination of the choices that depend on each other, then the remaining choices
with the fastest of those. Options that do not compile, do not fit or give wrong values are left out, with the reason.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention import neighborhood_attention
from ..attention.linear import FEATURE_MAPS
from ..attention.linear import torch as torch_passes
from ..attention.trial import TOLERANCE, triton_requirements
from ..attention.tuned import FORMAT, options_by_kernel
from ..files import make_folder, read_json, replacing
from ..machine import git_state
from ..models.family import AttentionShape
from .measure import Case, first_line, machine, sample
from .subjects import find_subject

NAME = "tuned.json"
SHAPES = ("flux", "sd3", "pixart-sigma")  # 24 x 128, 24 x 64, 16 x 72
# Sides of the grids, in tokens: as long as memory, not launches, decides; and with more than a few windows.
LINEAR_SIDE, WINDOW_SIDE = 256, 128
# Options of the first round, and of the second.
CHOICES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
    "linear": (
        {"BLOCK_N": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
        {"PROGRAMS_PER_SM": (1, 2, 4, 8)},
    ),
    "window": (
        {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8)},
        {"num_stages": (1, 2, 3)},
    ),
}
KEPT = 3  # options of the first round with which the second is made
CALLS, SAMPLES = 4, 9  # calls in a CUDA graph, and replays of it


@dataclass(frozen=True)
class Job:
    """A kernel to sweep.

    part: "linear" or "window". shape: of the layer. overrides: where the kernel's module reads options that replace its
    own. default: the options it has without. run: calls the kernel, and those that the same pass needs, and returns the
    results. expected: these in float32, by plain torch.
    """

    part: str
    kernel: str
    shape: AttentionShape
    tokens: int
    dtype: torch.dtype
    overrides: dict[str, dict]
    default: dict[str, int]
    run: Callable[[], Sequence[Tensor | None]]
    expected: Callable[[], Sequence[Tensor | None]]

    @property
    def attempts(self) -> int:
        """The most options that are tried."""
        first, second = (math.prod(map(len, choices.values())) for choices in CHOICES[self.part])
        return 1 + first + KEPT * second

    def title(self) -> str:
        return f"{self.part} {self.kernel}, {self.shape.heads} x {self.shape.head_dim}"


def run(shapes: Sequence[str] | None, window: int, dtype: str | None, out: Path | None, quiet: bool) -> dict[str, Any]:
    """Sweep all kernels for these shapes, and write `out`/tuned.json after each. Returns the table.

    shapes: names of `subjects`; None: SHAPES. window: its side in tokens. dtype: None: bfloat16. out: None is
    benchmarks/results/<device>. A table of the same device, versions and commit that is there already keeps its other
    rows. Raises ValueError without a GPU and for what cannot be tuned, before anything is written.
    """
    if not torch.cuda.is_available() or torch.version.hip:
        raise ValueError("--tune measures kernels on an NVIDIA GPU, and torch sees none here")
    if missing := triton_requirements():
        raise ValueError(f"--tune needs {' and '.join(missing)}")
    device = torch.device("cuda", torch.cuda.current_device())
    shapes, dtype = tuple(dict.fromkeys(shapes or SHAPES)), dtype or "bfloat16"
    layers = layers_of(shapes)
    if window < 1:
        raise ValueError(f"--window must be above 0, not {window}")
    here = machine(device)
    folder = Path("benchmarks/results", slug(here["device"]["name"])) if out is None else out
    git = git_state()
    words = ["hybriddit", "benchmark", "--tune", "--shapes", *shapes, "--window", str(window), "--dtype", dtype]
    table = {
        "format": FORMAT,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(words),
        "git": git and {"commit": git["commit"], "changed": len(git["changed"])},
        "machine": here,
        "kernels": [],
    }
    make_folder(folder)
    table["kernels"] = kept_rows(folder / NAME, table)
    major, minor = torch.cuda.get_device_capability(device)
    made = jobs(layers, window, getattr(torch, dtype), device, 10 * major + minor, LINEAR_SIDE, WINDOW_SIDE)
    tune(made, table, folder / NAME, graph_seconds, quiet)
    _say(f"table saved to {folder / NAME}", quiet)
    return table


def layers_of(names: Sequence[str]) -> list[AttentionShape]:
    """The attention layers of these subjects. Raises ValueError for two of one head width, of which a table has one."""
    by_width: dict[int, str] = {}
    layers = [find_subject(name).shape for name in names]
    for name, layer in zip(names, layers, strict=True):
        other = by_width.setdefault(layer.head_dim, name)
        if other != name:
            raise ValueError(f"--shapes {other} {name}: both have heads of width {layer.head_dim}; tune one of them")
    return layers


def slug(device: str) -> str:
    """A device's name as that of a folder."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


def kept_rows(path: Path, table: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the file that was written before, if any. Raises ValueError for one that does not go with the table."""
    if not path.exists():
        return []
    before = read_json(path)
    options_by_kernel(before)

    def origin(of: dict[str, Any]) -> tuple:
        return of["machine"]["device"], of["machine"]["versions"], of["git"] and of["git"]["commit"]

    if origin(before) != origin(table):
        raise ValueError(f"{path} is of another device, other versions or another commit: give a folder by --out")
    return before["kernels"]


def tune(
    made: Sequence[Job],
    table: dict[str, Any],
    path: Path,
    measure: Callable[[Callable[[], Any]], float],
    quiet: bool = False,
) -> None:
    """Sweep the jobs one after the other, and write the table with the row of each to `path`, whole or not at all.

    measure: the seconds that a function takes.
    """
    began, done, total = time.perf_counter(), 0, sum(job.attempts for job in made)
    for i, job in enumerate(made):
        left = f", about {(time.perf_counter() - began) / done * (total - done) / 60:.0f} min left" if done else ""
        _say(f"[{i + 1}/{len(made)}] {job.title()}{left}", quiet)
        try:
            row = sweep(job, measure)
        except torch.OutOfMemoryError:
            row = None
            _say("  left out: out of memory", quiet)
        done += job.attempts
        if row is None:
            continue
        if row["options"] is None:
            _say(f"  left out: no options work, its own neither: {row['tried'][0][1]}", quiet)
            continue
        before = row["default_seconds"]
        ratio = f", {before / row['seconds']:.2f} times as fast as now" if before else ""
        options = ", ".join(f"{name} {value}" for name, value in row["options"].items())
        _say(f"  {1e3 * row['seconds']:.4f} ms with {options}{ratio}", quiet)
        keys = ("part", "kernel", "dtype", "width")
        others = [other for other in table["kernels"] if any(other[key] != row[key] for key in keys)]
        table["kernels"] = [*others, row]
        with replacing(path) as partial:
            partial.write_text(to_json(table), encoding="utf-8")


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def to_json(table: dict[str, Any]) -> str:
    """The table as JSON with one kernel per line, so that people can read and compare files."""
    head = json.dumps({key: value for key, value in table.items() if key != "kernels"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in table["kernels"])
    return f'{head.removesuffix("}").rstrip()},\n "kernels": [\n{rows}\n ]\n}}\n'


def sweep(job: Job, measure: Callable[[Callable[[], Any]], float]) -> dict[str, Any]:
    """Try a job's options. Returns its row of the table; its options and seconds are None where none work.

    Each option of "tried" is with its seconds, or with the reason why it has none.
    """
    expected = job.expected()
    tried: list[tuple[dict[str, int], float | str]] = []

    def attempt(options: dict[str, int]) -> None:
        if all(options != other for other, _ in tried):
            tried.append((options, _outcome(job, options, expected, measure)))

    def fastest() -> list[tuple[dict[str, int], float]]:
        return sorted((x for x in tried if not isinstance(x[1], str)), key=lambda x: x[1])

    first, second = CHOICES[job.part]
    attempt(job.default)
    for choice in _combinations(first):
        attempt(job.default | choice)
    for options, _ in fastest()[:KEPT]:
        for choice in _combinations(second):
            attempt(options | choice)
    default = tried[0][1]
    best = next(iter(fastest()), (None, None))
    return {
        "part": job.part,
        "kernel": job.kernel,
        "dtype": str(job.dtype).removeprefix("torch."),
        "heads": job.shape.heads,
        "width": job.shape.head_dim,
        "tokens": job.tokens,
        "text_tokens": job.shape.text if job.part == "window" else 0,
        "options": best[0],
        "seconds": best[1],
        "default_seconds": None if isinstance(default, str) else default,
        "tried": tried,
    }


def _combinations(choices: dict[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


@contextmanager
def _overriding(job: Job, options: dict[str, int]) -> Iterator[None]:
    before = job.overrides.get(job.kernel)
    job.overrides[job.kernel] = options
    try:
        yield
    finally:
        del job.overrides[job.kernel]
        if before is not None:
            job.overrides[job.kernel] = before


def _outcome(
    job: Job, options: dict[str, int], expected: Sequence[Tensor | None], measure: Callable[[Callable[[], Any]], float]
) -> float | str:
    """The seconds that a job takes with these options, or why they cannot be used."""
    with _overriding(job, options):
        try:
            if _differ(job.run(), expected, TOLERANCE[job.dtype]):
                return "wrong values"
            return measure(job.run)
        except Exception as error:  # compilers and drivers may raise anything
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # raises where the device is of no more use
            return f"{type(error).__name__}: {first_line(error)}"


def _differ(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float) -> bool:
    return any(
        # `not` catches NaN too
        not (x.float() - y).norm() <= tolerance * y.norm()
        for x, y in zip(found, expected, strict=True)
        if y is not None
    )


def graph_seconds(call: Callable[[], Any]) -> float:
    """Seconds of a call on the GPU alone: the median of several replays of a CUDA graph, in which Python has no part."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    case, device = Case("", graph.replay, []), torch.device("cuda")
    graph.replay()
    return statistics.median(sample(case, False, 1, device)["forward"] for _ in range(SAMPLES)) / CALLS


def jobs(
    layers: Sequence[AttentionShape],
    window: int,
    dtype: torch.dtype,
    device: torch.device,
    target: int | str,
    linear_side: int,
    window_side: int,
) -> list[Job]:
    """The kernels to sweep for each layer. target: as `launch_options` takes it. sides: of the grids, in tokens."""
    made: list[Job] = []
    for layer in layers:
        made += linear_jobs(layer, dtype, device, target, linear_side)
        made += window_jobs(layer, window, dtype, device, target, window_side)
    return made


def _chosen(options: dict[str, Any], part: str) -> dict[str, int]:
    names = [name for choices in CHOICES[part] for name in choices]
    return {name: options[name] for name in names if name in options}


def linear_jobs(
    layer: AttentionShape, dtype: torch.dtype, device: torch.device, target: int | str, side: int
) -> list[Job]:
    """The four passes of linear attention; the output joined to another branch by a gate per token, as in the layers."""
    from ..attention.linear import triton as kernels

    shape = 1, side * side, layer.heads, layer.head_dim

    @cache
    def inputs() -> dict[str, Tensor]:
        """In the dtype, on first use: layers whose turn comes later take no memory."""
        query, key, value, near, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(5))
        gate = torch.rand(*shape[:3], 1, device=device)
        state, mean = torch_passes.state(key.float(), value.float(), None, None, "elu")
        grads = {"grad_state": torch.randn_like(state), "grad_mean": torch.randn_like(mean)}
        return dict(query=query, key=key, value=value, near=near, grad=grad, gate=gate, state=state, mean=mean) | grads

    def passes(module, kernel: str, change: Callable[[Tensor], Tensor]) -> Sequence[Tensor | None]:
        x = {name: change(tensor) for name, tensor in inputs().items()}
        eps, sums = FEATURE_MAPS["elu"].eps, (x["state"], x["mean"])
        if kernel == "sum":
            return module.state(x["key"], x["value"], None, None, "elu")
        if kernel == "output":
            return [module.output(x["query"], *sums, x["near"], x["gate"], None, eps, "elu", True)]
        if kernel == "output_backward":
            return module.output_backward(x["grad"], x["query"], *sums, None, eps, "elu")
        return module.state_backward(x["grad_state"], x["grad_mean"], x["key"], x["value"], None, None, "elu")

    made = []
    for kernel in ("sum", "output", "output_backward", "state_backward"):
        options = kernels.launch_options(kernel, dtype, layer.head_dim, layer.head_dim, target)
        made.append(
            Job(
                "linear",
                kernel,
                layer,
                side * side,
                dtype,
                kernels.OVERRIDES,
                _chosen(options, "linear"),
                lambda kernel=kernel: passes(kernels, kernel, lambda x: x),
                lambda kernel=kernel: passes(torch_passes, kernel, Tensor.float),
            )
        )
    return made


def window_jobs(
    layer: AttentionShape, window: int, dtype: torch.dtype, device: torch.device, target: int | str, side: int
) -> list[Job]:
    """The kernels of window attention: forward, and the gradients of queries, of keys and values, and of text."""
    from ..attention.window import kernels

    image, text = (1, side, side, layer.heads, layer.head_dim), (1, layer.text, layer.heads, layer.head_dim)
    settings = (min(window, side),) * 2, (1, 1), (1, 1), layer.head_dim**-0.5

    @cache
    def inputs() -> tuple[list[Tensor | None], Tensor]:
        """query, key, value and text, and the result's gradient."""
        *tensors, grad = (torch.randn(image, device=device, dtype=dtype) for _ in range(4))
        prompt = [torch.randn(text, device=device, dtype=dtype) if layer.text else None for _ in range(2)]
        return [*tensors, *prompt], grad

    @cache
    def result() -> tuple[Tensor, Tensor]:
        return kernels.forward(*inputs()[0], None, *settings)

    @cache
    def expected() -> tuple[Tensor, list[Tensor | None]]:
        leaves = [None if x is None else x.float().requires_grad_() for x in inputs()[0]]
        query, key, value, text_key, text_value = leaves
        out = neighborhood_attention(
            query, key, value, window=settings[0], text_key=text_key, text_value=text_value, backend="tiled"
        )
        there = [x for x in leaves if x is not None]
        grads = iter(torch.autograd.grad(out, there, inputs()[1].float()))
        return out.detach(), [None if x is None else next(grads) for x in leaves]

    def forward() -> Sequence[Tensor]:
        return kernels.forward(*inputs()[0], None, *settings)[:1]

    def backward() -> Sequence[Tensor | None]:
        out, lse = result()
        return kernels.backward(inputs()[1], torch.zeros_like(lse), *inputs()[0], None, out, lse, *settings)

    made = []
    for kernel in ("forward", "query_gradient", "key_gradient", *(["text_gradient"] if layer.text else [])):
        options = kernels.launch_options(kernel, dtype, layer.head_dim, target)
        made.append(
            Job(
                "window",
                kernel,
                layer,
                side * side,
                dtype,
                kernels.OVERRIDES,
                _chosen(options, "window"),
                forward if kernel == "forward" else backward,
                (lambda: expected()[:1]) if kernel == "forward" else (lambda: expected()[1]),
            )
        )
    return made
