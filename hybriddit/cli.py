"""The command line: hybriddit demo | convert | distill | train | generate | cache | sample | evaluate | benchmark | info."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .benchmark.shapes import PARTS, VARIANTS

# of `hybriddit.pipelines.sit`, whose import would load torch (tests/test_sample.py holds them to be the same)
SAMPLERS = ("euler", "heun", "dopri5", "sde-euler", "sde-heun")
EPILOG = """exit codes:
  0    done
  1    something is wrong that you can put right: one line on stderr says what
  2    a wrong call
  130  Ctrl-C

shell completion:
  hybriddit --print-completion bash > ~/.local/share/bash-completion/completions/hybriddit
  hybriddit --print-completion zsh > ~/.zfunc/_hybriddit    (a folder of your $fpath)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for what went wrong, 2 for a wrong call, 130 for Ctrl-C."""
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    # argparse leaves the overrides that come after an option
    wrong = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides += rest
    try:
        options.command(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, NotImplementedError, FloatingPointError, ModuleNotFoundError) as error:
        # what the user can put right; anything else is ours, and keeps its traceback
        print(f"hybriddit: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hybriddit",
        description="Pretrained diffusion transformers, made linear in the number of image tokens.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hybriddit {__version__}")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        action=PrintCompletion,
        help="the completion script, to stdout",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command, about: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example: hybriddit {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        return sub

    sub = add("demo", demo, "convert, distill and compare on the small teacher of a checkout", "train.steps=100")
    sub.add_argument("--config", type=Path, default=Path("configs/distill/demo.yaml"), help="(default: %(default)s)")
    sub.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder (default: %(default)s)")
    _add_overrides(sub)

    sub = add(
        "convert",
        convert,
        "save a hybrid pipeline: a dense one converted, with the weights of an adapter if given",
        "--model base/ --adapter run/adapter --out hybrid/",
    )
    sub.add_argument("--model", required=True, help="repository id or folder of a dense diffusers pipeline")
    sub.add_argument("--out", required=True, type=Path, help="folder for the hybrid pipeline, new or empty")
    sub.add_argument("--adapter", help="folder or repository of a distilled adapter; without one the hybrid is fresh")
    sub.add_argument("--window", type=int, help="of a fresh hybrid, in tokens (default 16)")
    sub.add_argument("--plan", type=Path, help="of a fresh hybrid: a YAML or JSON file of HybridConfig's fields")
    _add_dtype(sub)
    sub.add_argument("--quiet", action="store_true", help="print errors only")

    sub = add(
        "distill",
        distill,
        "distill a hybrid from the teacher that a YAML file names",
        "configs/distill/demo.yaml optim.lr=1e-3 train.steps=200",
    )
    sub.add_argument("config", type=Path, help="a YAML file such as configs/distill/flux_dev.yaml")
    _add_overrides(sub)
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output.folder")
    how.add_argument("--dry-run", action="store_true", help="only say what the run would need; loads no weights")
    sub.add_argument("--json", action="store_true", help="with --dry-run: as JSON")

    sub = add(
        "train",
        train,
        "train a SiT from scratch on the images or latents that a YAML file names",
        "configs/sit/fashion_mnist_cpu.yaml train.steps=200",
    )
    sub.add_argument("config", type=Path, help="a YAML file such as configs/sit/xl_2_linfusion.yaml")
    _add_overrides(sub)
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output.folder")

    sub = add(
        "generate",
        generate,
        "make images from a prompt, or from a prompt and an image; or of classes, with a SiT",
        '--model base/ --adapter run/adapter --prompt "a red shoe" --seed 1 --out shoe.png',
    )
    sub.add_argument(
        "--model",
        required=True,
        help="repository id or folder of a diffusers pipeline, dense or hybrid, or of a SiTPipeline; or a SiT's run",
    )
    sub.add_argument("--adapter", help="folder or repository of a distilled adapter")
    subject = sub.add_mutually_exclusive_group(required=True)
    subject.add_argument("--prompt")
    subject.add_argument(
        "--class-label", action="append", metavar="NAME", help="SiT: name or index of a class; may be given repeatedly"
    )
    sub.add_argument("--negative-prompt", help="what to guide away from (FLUX: with --true-cfg)")
    sub.add_argument("--image", type=Path, help="image to start from (SD3, FLUX)")
    sub.add_argument("--mask", type=Path, help="of the image's size: white is painted anew, black is kept (SD3, FLUX)")
    sub.add_argument("--strength", type=float, help="how far from --image, above 0 to 1 (default: the pipeline's)")
    sub.add_argument("--height", type=int, help="in pixels (default: the image's, else the pipeline's)")
    sub.add_argument("--width", type=int, help="in pixels (default: the image's, else the pipeline's)")
    sub.add_argument("--steps", type=int, help="of the sampler (default: the pipeline's)")
    sub.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    sub.add_argument(
        "--true-cfg", type=float, help="FLUX: guidance away from --negative-prompt, above 1; twice the time"
    )
    sub.add_argument("--max-sequence-length", type=int, help="text tokens (default: the pipeline's)")
    sub.add_argument("--seed", type=int, default=0, help="of the first image; each further one adds 1 (default: 0)")
    sub.add_argument(
        "--sampler",
        help="SiT: euler, heun, dopri5, sde-euler or sde-heun (default: the pipeline's scheduler, or euler)",
    )
    sub.add_argument("--num-images", type=int, default=1, help="of the prompt, or of each class label (default: 1)")
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("image.png"),
        help="PNG file (default: image.png); several images are image-0001.png, image-0002.png, …. How each was made "
        'is in its text chunk "hybriddit", which `hybriddit info image.png` shows',
    )
    _add_dtype(sub)
    sub.add_argument("--quiet", action="store_true", help="print errors only")
    sub.add_argument("--json", action="store_true", help="print files, seeds, seconds and notes as one JSON object")

    _add_cache(add)
    _add_sample(add)

    sub = add(
        "evaluate",
        evaluate,
        "inception score, FID, sFID, precision and recall of samples, as the ADM suite computes them",
        "samples.npz VIRTUAL_imagenet256_labeled.npz --out scores.json",
    )
    sub.add_argument("samples", type=Path, help="npz file: arr_0, uint8 [N, H, W, 3]")
    sub.add_argument("reference", type=Path, help="npz file of the same kind; its mu, sigma, mu_s, sigma_s are used")
    sub.add_argument("--inception", type=Path, help="the weights' file (default: from torch.hub's cache)")
    sub.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    sub.add_argument(
        "--shuffle", type=int, metavar="SEED", help="deal the samples into the inception score's splits at random"
    )
    sub.add_argument(
        "--settings",
        type=Path,
        help="JSON file that says how the samples were made, kept with the scores (default: SAMPLES.json, if it is there)",
    )
    sub.add_argument("--out", type=Path, help="JSON file for scores, settings, files, weights and versions")
    sub.add_argument("--quiet", action="store_true", help="print errors only")
    sub.add_argument("--json", action="store_true", help="print what --out would hold")

    sub = add(
        "benchmark",
        benchmark,
        "time attention and transformers on this machine: hybrid against dense and circular windows",
        "--part attention --shapes flux --sizes 512 1024 --out outputs/benchmark",
    )
    sub.add_argument("--part", nargs="+", choices=PARTS, help="(default: all; generation on a GPU only)")
    sub.add_argument(
        "--shapes",
        nargs="+",
        metavar="NAME",
        help="pixart-sigma, sd3, sd3.5-medium, sd3.5-large, flux, sit-xl and those of families of your own "
        "(default: all; two of them on a CPU)",
    )
    sub.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        metavar="PX",
        help="sides of square images (default: 256 to 16384; CPU: to 2048)",
    )
    sub.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), help="(default: all that the device has)")
    sub.add_argument("--window", type=int, default=16, help="of hybrid and window, in tokens (default: %(default)s)")
    sub.add_argument("--radius", type=int, default=8, help="of circular, in tokens (default: %(default)s)")
    sub.add_argument("--backward", action="store_true", help="forward + backward of the transformer too")
    sub.add_argument("--compile", action="store_true", help="torch.compile the transformers' blocks")
    sub.add_argument("--layers", type=int, help="blocks of the transformers (default: all; 2 on a CPU)")
    sub.add_argument(
        "--repeats", type=int, help="samples of each case, fewer where they take long (default: 20; CPU: 5)"
    )
    sub.add_argument(
        "--max-seconds", type=float, help="for one case; longer ones are not measured (default: 10; CPU: 15)"
    )
    sub.add_argument("--out", type=Path, default=Path("outputs/benchmark"), help="folder (default: %(default)s)")
    _add_dtype(sub)
    sub.add_argument("--quiet", action="store_true", help="print errors only")
    sub.add_argument("--json", action="store_true", help="print the results as one JSON object")

    sub = add(
        "info",
        info,
        "versions, device and attention backends; or what a folder or an image holds",
        "outputs/demo/pipeline",
    )
    sub.add_argument("path", nargs="?", type=Path, help="folder of a pipeline, model or adapter, or a PNG file")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_cache(add) -> None:
    sub = add(
        "cache",
        cache,
        "cache a folder of images for `hybriddit train`: their latents, plain and mirrored, or their pixels",
        "imagenet/train --vae stabilityai/sd-vae-ft-ema --size 256 --out outputs/cache/imagenet256",
    )
    sub.description += (
        ". The subfolders are the classes. Every image is cropped as ADM crops it; one that cannot be read is left "
        "out, counted, and listed in index.json. A run that was stopped or killed goes on when it is started again; "
        "several processes of torchrun share the work."
    )
    sub.add_argument("folder", type=Path, help="of images; its subfolders are the classes")
    sub.add_argument("--out", type=Path, required=True, help="folder of the cache")
    sub.add_argument("--vae", help="folder or repository of an AutoencoderKL; without one, pixels are kept")
    sub.add_argument("--size", type=int, default=256, help="of the square images, in pixels (default: %(default)s)")
    sub.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: grey (default: %(default)s)")
    sub.add_argument("--batch-size", type=int, default=64, help="of the VAE (default: %(default)s)")
    sub.add_argument("--shard-size", type=int, default=4096, help="images of one file (default: %(default)s)")
    sub.add_argument("--quiet", action="store_true", help="print errors only")


def _add_sample(add) -> None:
    sub = add(
        "sample",
        sample,
        "sample a SiTPipeline for an evaluation: an npz file that `hybriddit evaluate` and the ADM suite read",
        "outputs/pipeline --num 50000 --class-balanced --sampler sde-euler --out samples.npz",
    )
    sub.description += (
        ". Image i has a label, and noise of seed + i, that depend on nothing but the settings: several processes of "
        "torchrun make the same images as one, and a run that was killed goes on. A JSON file beside the npz says how "
        "they were made."
    )
    sub.add_argument("model", help="folder or hub repository of a SiTPipeline")
    sub.add_argument("--out", type=Path, required=True, help="npz file")
    sub.add_argument("--num", type=int, default=50000, help="images (default: %(default)s)")
    balance = sub.add_mutually_exclusive_group(required=True)
    balance.add_argument("--class-balanced", action="store_true", help="every class in turn")
    balance.add_argument("--random", action="store_true", help="labels drawn at random, as SiT's and DiT's authors did")
    sub.add_argument("--batch-size", type=int, default=32, help="of each process (default: %(default)s)")
    sub.add_argument("--sampler", choices=SAMPLERS, default="sde-euler", help="(default: %(default)s)")
    sub.add_argument("--steps", type=int, default=250, help="(default: %(default)s)")
    sub.add_argument("--shift", type=float, default=1.0, help="of times, towards noise (default: none)")
    sub.add_argument("--guidance", type=float, default=1.0, help="guidance scale (default: 1, none)")
    sub.add_argument("--guidance-channels", type=int, help="guide the first ones only; published numbers: 3")
    sub.add_argument("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"))
    for name in ("atol", "rtol"):
        sub.add_argument(f"--{name}", type=float, help="of dopri5")
    sub.add_argument("--diffusion", help="of an SDE, as sample_sde's (default: sigma)")
    sub.add_argument("--diffusion-norm", type=float)
    sub.add_argument("--last-step", help="of an SDE: mean, euler or tweedie (default: mean)")
    sub.add_argument("--last-step-size", type=float, help="(default: 0.04)")
    sub.add_argument("--seed", type=int, default=0, help="image i is of seed + i (default: %(default)s)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


class PrintCompletion(argparse.Action):
    """Prints a shell's completion script for the parser, and exits."""

    def __call__(self, parser, namespace, values, option_string=None):
        import shtab

        subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        for sub in subparsers.choices.values():
            for action in sub._actions:
                if action.type is Path or action.dest in ("model", "adapter"):
                    action.complete = shtab.FILE
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the config file")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: bfloat16 on a GPU)")


def demo(options: argparse.Namespace) -> None:
    if not options.config.is_file():
        raise FileNotFoundError(f"no {options.config}: run the demo from a checkout of hybriddit")
    from .demo.run import run

    run(options.config, options.out, options.overrides)


def convert(options: argparse.Namespace) -> None:
    from .config import HybridConfig
    from .files import filling

    if sum(option is not None for option in (options.adapter, options.window, options.plan)) > 1:
        raise ValueError("give one of --window and --plan, for a fresh hybrid, or --adapter, which brings its own")
    if options.plan:
        config = HybridConfig.from_plan(options.plan)
    else:
        config = HybridConfig() if options.window is None else HybridConfig(window=options.window)
    with filling(options.out) as folder:
        pipeline = _load_pipeline(options)
        if getattr(pipeline, "transformer", None) is None:
            raise ValueError(
                f"{options.model} is a {type(pipeline).__name__}, which has no diffusion transformer to convert"
            )
        from .models import hybridize, load_adapter

        if options.adapter:
            load_adapter(pipeline, options.adapter)
        else:
            hybridize(pipeline.transformer, config)
        pipeline.save_pretrained(folder)
    if not options.quiet:
        print(f"hybrid pipeline saved to {options.out}")


def distill(options: argparse.Namespace) -> None:
    from .training.config import load_config

    if options.json and not options.dry_run:
        raise ValueError("--json is for --dry-run")
    config = load_config(options.config, options.overrides, "distill")
    if options.dry_run:
        from .training.dry_run import dry_run, report

        figures = dry_run(config)
        print(json.dumps(figures, indent=2) if options.json else report(figures))
        return
    from .training.distill import run  # torch and diffusers, once the config is known to be right

    _run_training(run, config, options.resume)
    print(f"adapter saved to {Path(config.output.folder) / 'adapter'}")


def train(options: argparse.Namespace) -> None:
    from .training.config import load_config

    config = load_config(options.config, options.overrides, "train")
    from .training.train_sit import run

    _run_training(run, config, options.resume)
    print(f"pipeline saved to {Path(config.output.folder) / 'pipeline'}")


def _run_training(run, config, resume: bool) -> None:
    try:
        run(config, resume=resume)
    except KeyboardInterrupt:
        if any(Path(config.output.folder, "checkpoints").glob("step-*")):
            print(
                f"stopped: add --resume to go on from the newest checkpoint in {config.output.folder}", file=sys.stderr
            )
        raise


def generate(options: argparse.Namespace) -> None:
    from .generate import NoEffectWarning, check_settings, generate, image_count, open_image, output_paths, save_png

    paths = output_paths(options.out, image_count(options.class_label, options.num_images))
    names = ("seed", "num_images", "negative_prompt", "height", "width", "steps", "guidance", "true_cfg")
    settings = {name: getattr(options, name) for name in (*names, "max_sequence_length", "strength", "sampler")}
    settings["class_labels"] = options.class_label
    settings["image"] = open_image(options.image) if options.image else None
    settings["mask"] = open_image(options.mask, "L") if options.mask else None
    check_settings(options.prompt, **settings)
    if options.class_label and options.adapter:
        raise ValueError("an adapter has no meaning with a class label: it is for text-to-image pipelines")

    pipeline = _load_pipeline(options, of_classes=bool(options.class_label))
    if options.adapter:
        from .models import load_adapter

        load_adapter(pipeline, options.adapter)
    pipeline.set_progress_bar_config(disable=options.quiet)
    source = {"model": options.model, "adapter": options.adapter}
    source |= {name: str(getattr(options, name)) if getattr(options, name) else None for name in ("image", "mask")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoEffectWarning)
        images = generate(pipeline, options.prompt, **settings)
    notes = [str(warning.message) for warning in caught if warning.category is NoEffectWarning]
    if not options.quiet:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    started, seeds = time.monotonic(), []
    for path, (image, record) in zip(paths, images, strict=True):
        save_png(image, path, {**source, **record})
        seeds.append(record["seed"])
        if not (options.quiet or options.json):
            print(f"{image.width} x {image.height} image saved to {path}")
    if options.json:
        seconds = round(time.monotonic() - started, 3)
        print(json.dumps({"files": [str(path) for path in paths], "seeds": seeds, "seconds": seconds, "notes": notes}))


def cache(options: argparse.Namespace) -> None:
    from .data.class_cache import run

    names = ("vae", "size", "channels", "batch_size", "shard_size", "quiet")
    run(options.folder, options.out, **{name: getattr(options, name) for name in names})


def sample(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from .sample import SampleSettings, run

    run(SampleSettings(**{field.name: getattr(options, field.name) for field in fields(SampleSettings)}))


def evaluate(options: argparse.Namespace) -> None:
    for path in (options.samples, options.reference):
        if not path.is_file():
            raise FileNotFoundError(f"no npz file at {path}")
    from .metrics.run import run

    names = ("inception", "batch_size", "shuffle", "settings", "out")
    given = {name: getattr(options, name) for name in names}
    report = run(options.samples, options.reference, **given, progress=not options.quiet)
    if report is None:  # another process's
        return
    if options.json:
        print(json.dumps(report))
    elif not options.quiet:
        for name, value in report["metrics"].items():
            print(f"{name:15}  {value:.4f}")
        if options.out:
            print(f"saved to {options.out}")


def benchmark(options: argparse.Namespace) -> None:
    # before torch starts: its profiler's and compiler's remarks about a missing GPU are nobody's concern
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from .benchmark.measure import device_of_this_machine
    from .benchmark.run import run, settings
    from .benchmark.subjects import find_subject

    for name in options.shapes or ():
        try:
            find_subject(name)
        except ValueError as error:
            build_parser().error(f"argument --shapes: {error}")
    names = ("shapes", "sizes", "variants", "window", "radius", "dtype", "layers", "backward", "compile", "repeats")
    given = {name: getattr(options, name) for name in (*names, "max_seconds")}
    report = run(settings(device_of_this_machine(), parts=options.part, **given), options.out, options.quiet)
    if options.json:
        print(json.dumps(report))
    elif not options.quiet:
        print(f"results saved to {options.out}")


def info(options: argparse.Namespace) -> None:
    from .info import describe, description_text, environment, environment_text

    if options.path is None:
        found, text = environment(), environment_text
    else:
        found, text = describe(options.path), description_text
    print(json.dumps(found, indent=2) if options.json else text(found))


def _load_pipeline(options: argparse.Namespace, of_classes: bool = False):
    if options.quiet:
        _silence()
    import torch

    from .models import read_adapter_config
    from .pipelines.loading import load_pipeline
    from .pipelines.sit import load_sit_pipeline

    if options.adapter:
        read_adapter_config(options.adapter)  # before the model, which may take minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = "bfloat16" if device == "cuda" else "float32"
    load = load_sit_pipeline if of_classes else load_pipeline
    return load(options.model, getattr(torch, options.dtype or default)).to(device)


def _silence() -> None:
    """No progress bars and no log lines, but errors, of the libraries that load models."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    disable_progress_bars()
