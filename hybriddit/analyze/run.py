"""What the command `analyze` does: measure a teacher's attention layers, and plan what each becomes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import HybridConfig
from ..files import make_folder, read_json, read_tensors, replacing, write_json, write_tensors
from ..generate.files import open_to_measure, refuse_processes
from ..generate.images import Task, check_settings, make
from ..machine import find_device, gpu_name, running_versions
from .candidates import COSTS, WINDOWS, candidate_names
from .figures import draw_all
from .plan import choose, plan_config, write_plan

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn

    from ..attention import TokenLayout
    from ..models.family import Family
    from .probe import Probe

REPORT, PLAN, FITTED, MAPS = "analysis.json", "plan.yaml", "fitted.safetensors", "maps.safetensors"


def run(
    model: str,
    out: Path,
    prompts: Path,
    *,
    windows: Sequence[int] = WINDOWS,
    budget: float = 0.5,
    cost: str = "flops",
    fit_steps: int = 60,
    calls: int = 2,
    queries: int = 128,
    variant: str | None = None,
    config: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    num_images: int = 1,
    quiet: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Measure what becomes of a dense teacher where its attention layers are replaced, and choose for each layer.

    The teacher makes an image of every prompt, by its own pipeline; `calls` of the transformer's calls of each image are
    kept, evenly from the first to the last. On those of every other image, each layer's candidates, windows and hybrids
    of each of `windows` and linear attention, learn to give the layer's output (`fit_steps` steps of each, all at once;
    without maps). On those of the other images it is measured: the attention maps, of `queries` queries; the error of
    each candidate's output; and how much the transformer's prediction changes where one layer alone is a candidate.
    The plan is the choice with the least sum of these changes of which the attention costs at most `budget` times the
    dense attention.

    cost: "flops", by formula, with HybridConfig's maps; or "time", the median seconds of a layer on this device, without
    maps. model, variant, config, seed, num_images and settings are those of `generate.run`.

    Writes to the folder `out`: plan.yaml, which `HybridConfig.from_plan` reads, analysis.json, which is returned,
    figures, and what has been fitted. Stopped, it goes on by the same call; with another budget or cost only the new
    plan is measured. Raises ValueError or OSError, in one line, as far as possible before the model is loaded.
    """
    from ..data.prompts import read_prompts

    refuse_processes("analyze")
    _check(windows, budget, cost, fit_steps, calls, queries)
    subjects = read_prompts(prompts, says=not quiet)
    check_settings(subjects, seed=seed, num_images=num_images, **settings)
    if len(subjects) * num_images < 2:
        raise ValueError(
            "candidates are fitted on some images and measured on others: give two prompts, or --num-images 2"
        )
    where = find_device(device)
    asked = {"model": model, "variant": variant, "config": config, "prompts": list(subjects), "windows": list(windows),
             "fit_steps": fit_steps, "calls": calls, "queries": queries, "dtype": dtype, "seed": seed,
             "num_images": num_images, **{name: value for name, value in settings.items() if value is not None}}  # fmt: skip
    report = _open_report(out, asked)
    maps = _measure(report, out, where, quiet, settings, budget, cost)
    write_plan(plan_config(report["plan"]["layers"]), out / PLAN, _notes(report))
    draw_all(report, maps, out)
    return report


def _check(windows, budget, cost, fit_steps, calls, queries) -> None:
    if not windows or len(set(windows)) < len(windows) or min(windows) < 1:
        raise ValueError(
            f"windows are different sides in tokens, 1 or more, not {' '.join(map(str, windows)) or 'none'}"
        )
    if not 0 < budget <= 1:
        raise ValueError(f"the budget is a share of the dense attention's cost, above 0 and at most 1, not {budget}")
    if cost not in COSTS:
        raise ValueError(f"unknown cost {cost!r}: use one of {', '.join(COSTS)}")
    for name, value in {"fit_steps": fit_steps, "calls": calls, "queries": queries}.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")


def _open_report(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The report of an earlier call with the same settings, or a new one. Raises where the folder holds other things."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: give a folder that is new, empty, or of the same analysis")
    if (out / REPORT).is_file():
        report = read_json(out / REPORT)
        before = report.get("settings", {})
        other = [name for name in {**before, **asked} if before.get(name) != asked.get(name)]
        if other:
            raise ValueError(f"{out} holds an analysis with another {other[0]}: give another folder")
        return report
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty and holds no {REPORT}: give a folder that is new or empty")
    return {"settings": asked}


def _measure(
    report: dict[str, Any],
    out: Path,
    where: torch.device,
    quiet: bool,
    settings: dict[str, Any],
    budget: float,
    cost: str,
) -> dict[str, np.ndarray]:
    """Fill in what the report lacks, its plan too; returns the example maps. What is done is written at once."""
    import torch
    from accelerate.utils import send_to_device
    from tqdm import tqdm

    from ..models.family import denoiser, family_of
    from ..models.identity import weights_digest
    from ..pipelines.loading import check_convertible, find_base, silence_libraries
    from .probe import RADII, probed

    if quiet:
        silence_libraries()
    asked = report["settings"]
    windows, files = asked["windows"], {"variant": asked["variant"], "config": asked["config"]}
    check_convertible(find_base(asked["model"], **files), HybridConfig())
    given = {name: asked[name] for name in ("model", "dtype", "seed", "num_images")}
    pipeline, tasks = open_to_measure(
        device=where, subjects=asked["prompts"], quiet=quiet, **given, **files, **settings
    )
    transformer = denoiser(pipeline)
    digest = weights_digest(transformer)
    if report.setdefault("weights", digest) != digest:
        raise ValueError(f"{out} holds an analysis of other weights than {asked['model']} has now: give another folder")
    family = family_of(transformer)
    transformer.requires_grad_(False)
    shown = partial(tqdm, disable=quiet)
    images = [record_calls(pipeline, task, asked["calls"]) for task in shown(tasks, "images", unit="image")]
    fitting, measuring = ([call for image in images[first::2] for call in image] for first in (0, 1))

    def predict(call: dict[str, Any]) -> torch.Tensor:
        call = send_to_device(call, where)
        latents, _ = family.latents_and_times(call)
        return family.prediction(transformer(**{**call, "return_dict": False})[0], latents).float()

    layout = family.token_layout(transformer, measuring[0])
    if len(layout.grids) > 1:
        raise ValueError("analyze takes pipelines that see no other image than the one they make")
    largest = [side for side in windows if side > max(layout.grids[0])]
    if largest:
        sides = " x ".join(map(str, layout.grids[0]))
        raise ValueError(
            f"a window of {largest[0]} is larger than the grid of {sides} tokens: leave it out, or raise --height"
        )
    flops = layer_flops(family, transformer, layout, windows)
    if cost == "flops":  # what cannot be kept is refused before anything is measured
        choose_within({name: dict.fromkeys(options, 0.0) for name, options in flops.items()}, flops, budget, cost)
    make_folder(out)
    write_json(out / REPORT, report)  # says what the folder is of, for a run that is stopped before the maps
    with torch.no_grad(), probed(transformer, windows, asked["seed"]) as probes:
        if not (out / FITTED).is_file():
            with _tasked(probes, "fit"):
                for step in shown(range(asked["fit_steps"]), "fit", unit="step"):
                    predict(fitting[step % len(fitting)])
            weights = {f"{name}|{key}": x for name, probe in probes.items() for key, x in _fitted(probe).items()}
            with replacing(out / FITTED) as new:
                write_tensors(new, weights)
        _load(probes, read_tensors(out / FITTED), out)
        if "layers" not in report:
            with _tasked(probes, "measure", asked["queries"]):
                for call in shown(measuring, "maps", unit="call"):
                    predict(call)
            with _tasked(probes, "time"):
                predict(measuring[0])
            with replacing(out / MAPS) as new:
                write_tensors(new, {name: probe.found[0]["map"] for name, probe in probes.items()})
            report |= {"radii": list(RADII), "grid": list(layout.grids[0]), "text_tokens": layout.text_length}
            report |= {"device": gpu_name(where) or where.type, "versions": running_versions()}
            report["layers"] = {name: {**_record(probe), "flops": flops[name]} for name, probe in probes.items()}
            write_json(out / REPORT, report)

        dense = [predict(call) for call in measuring]
        if not all(prediction.isfinite().all() for prediction in dense):
            raise ValueError("the teacher's prediction is not finite: try another --dtype")

        def change(replaced: Mapping[str, str]) -> float:
            """The squared change of the prediction over its variance, with these layers replaced; the mean of calls."""
            for layer, name in replaced.items():
                probes[layer].replaced = None if name == "dense" else name
            pairs = zip(map(predict, measuring), dense, strict=True)
            found = [((x - y).square().flatten(1).mean(1) / y.flatten(1).var(1, correction=0)).mean() for x, y in pairs]
            for layer in replaced:
                probes[layer].replaced = None
            return float(torch.stack(found).mean())

        names = candidate_names(windows)
        for layer, record in shown(report["layers"].items(), "layers", unit="layer"):
            if "effect" not in record:
                record["effect"] = {name: change({layer: name}) for name in names}
                write_json(out / REPORT, report)
        if "uniform" not in report:
            report["uniform"] = {name: change(dict.fromkeys(report["layers"], name)) for name in names}
        report["plan"] = make_plan(report, budget, cost)
        report["plan"]["change"] = change(report["plan"]["layers"])
        write_json(out / REPORT, report)
    return {name: x.numpy() for name, x in read_tensors(out / MAPS).items()}


def record_calls(pipeline: DiffusionPipeline, task: Task, count: int) -> list[dict[str, Any]]:
    """Make an image; returns `count` of the transformer's calls, evenly from the first to the last, on the CPU.

    Of a pipeline that calls it less often, all. A call is the arguments of forward by name.
    """
    from accelerate.utils import send_to_device

    from ..models.family import denoiser
    from ..models.surgery import arguments_of

    calls: list[dict[str, Any]] = []

    def keep(module, args, kwargs):
        calls.append(send_to_device(arguments_of(module, args, kwargs), "cpu"))

    hook = denoiser(pipeline).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        make(pipeline, task)
    finally:
        hook.remove()
    return [calls[i] for i in sorted({round(float(i)) for i in np.linspace(0, len(calls) - 1, count)})]


def make_plan(report: Mapping[str, Any], budget: float, cost: str) -> dict[str, Any]:
    """The plan of a report's measured layers: what each becomes, what that costs, and the sum of its errors.

    Raises ValueError where not even the cheapest layers keep the budget.
    """
    layers = report["layers"]
    costs = {name: layer["flops" if cost == "flops" else "seconds"] for name, layer in layers.items()}
    errors = {name: {"dense": 0.0, **layer["effect"]} for name, layer in layers.items()}
    for name, layer in errors.items():
        if not all(math.isfinite(error) for error in layer.values()):
            raise ValueError(f"{name}: a replacement gives predictions that are not finite: try another --dtype")
    chosen = choose_within(errors, costs, budget, cost)
    dense = sum(options["dense"] for options in costs.values())
    spent = sum(costs[name][option] for name, option in chosen.items())
    return {
        "budget": budget,
        "cost": cost,
        "share": spent / dense,
        "layers": chosen,
        "sum_of_changes": sum(errors[name][option] for name, option in chosen.items()),
    }


def choose_within(
    errors: Mapping[str, Mapping[str, float]], costs: Mapping[str, Mapping[str, float]], budget: float, cost: str
) -> dict[str, str]:
    """`choose` within a share of what the dense layers cost. Raises ValueError where that cannot be kept."""
    dense = sum(options["dense"] for options in costs.values())
    try:
        return choose(errors, costs, budget * dense)
    except ValueError:
        least = sum(min(options.values()) for options in costs.values()) / dense
        raise ValueError(
            f"the budget of {budget:g} cannot be kept: the cheapest layers take {least:.3g} of the dense attention's "
            f"{'FLOPs' if cost == 'flops' else 'time'}; raise --budget, or give smaller --windows"
        ) from None


def layer_flops(
    family: Family, model: nn.Module, layout: TokenLayout, windows: Sequence[int]
) -> dict[str, dict[str, int]]:
    """FLOPs of one image in each layer as it is, "dense", and as each candidate, with HybridConfig's maps."""
    import torch

    from ..attention.work import dense_flops
    from .probe import make_candidate

    found, rotary = {}, "model" if family.rotary else "none"
    for name, attn in family.attentions(model).items():
        if family.converts(name):
            own, shape = family.layer_layout(model, name, layout), family.layer_shape(attn)
            found[name] = {"dense": dense_flops(own.text_length + own.image_length, shape.heads * shape.head_dim)}
            with torch.device("meta"):
                for candidate in candidate_names(windows):
                    found[name][candidate] = make_candidate(shape, candidate, rotary=rotary).flops(own)
    return found


def report_text(report: Mapping[str, Any], out: Path) -> str:
    """The figures of a report for a terminal."""
    plan, layers = report["plan"], report["layers"]
    what = "FLOPs" if plan["cost"] == "flops" else "time"
    width = max(map(len, layers))
    lines = [f"{'layer':{width}}  becomes     text  window  change of the prediction: {' '.join(report['uniform'])}"]
    for name, layer in layers.items():
        effects = " ".join(f"{error:9.2e}" for error in layer["effect"].values())
        text, near = np.mean(layer["text"]), np.mean(layer["window"])
        lines.append(f"{name:{width}}  {plan['layers'][name]:10}  {text:4.0%}  {near:6.0%}  {effects}")
    lines += [
        f"all layers alike: {', '.join(f'{name} {error:.2e}' for name, error in report['uniform'].items())}",
        f"the plan: {plan['change']:.2e} at {plan['share']:.3f} of the dense attention's {what} (budget "
        f"{plan['budget']:g}); the layers' own changes are {plan['sum_of_changes']:.2e} in sum",
        f"saved to {out}: plan.yaml, {REPORT}, mass_by_radius.png, heads.png, maps.png, plan.png",
    ]
    return "\n".join(lines)


def _notes(report: Mapping[str, Any]) -> list[str]:
    """What a plan's file says of how it was made."""
    plan, asked = report["plan"], report["settings"]
    return [
        f"Made by hybriddit analyze of {asked['model']}, {' x '.join(map(str, report['grid']))} tokens, "
        f"{len(asked['prompts'])} prompts.",
        f"Attention: {plan['share']:.3f} of the dense layers' {plan['cost']} (budget {plan['budget']:g}).",
        f"Before distillation the prediction changes by {plan['change']:.3e} of its variance.",
    ]


def _record(probe: Probe) -> dict[str, Any]:
    """What the report says of one layer: the means of what its probe found, lists by head, and seconds."""
    import torch

    record: dict[str, Any] = {
        name: torch.stack([found[name] for found in probe.found]).mean(0).tolist()
        for name in ("radius", "text", "window", "entropy", "rest_rank")
    }
    errors = {name: torch.stack([found["errors"][name] for found in probe.found]).mean(0) for name in probe.candidates}
    return {**record, "errors": {name: error.tolist() for name, error in errors.items()}, "seconds": probe.seconds}


def _fitted(probe: Probe) -> dict[str, torch.Tensor]:
    return {key: x.detach().cpu().contiguous() for key, x in probe.candidates.state_dict().items()}


def _load(probes: Mapping[str, Probe], weights: Mapping[str, torch.Tensor], out: Path) -> None:
    own = {f"{name}|{key}": x for name, probe in probes.items() for key, x in probe.candidates.state_dict().items()}
    if own.keys() != weights.keys() or any(own[key].shape != x.shape for key, x in weights.items()):
        raise ValueError(f"{out / FITTED} is of another analysis: give another folder")
    for key, x in weights.items():
        own[key].copy_(x)


@contextmanager
def _tasked(probes: Mapping[str, Probe], task: str, queries: int = 0) -> Iterator[None]:
    for probe in probes.values():
        probe.task, probe.queries = task, queries
    try:
        yield
    finally:
        for probe in probes.values():
            probe.task = None
