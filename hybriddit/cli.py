"""The command line: hybriddit demo | convert | distill | generate | info."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path


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
        prog="hybriddit", description="Pretrained diffusion transformers, made linear in the number of image tokens."
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
    sub.add_argument("--out", required=True, type=Path, help="folder for the hybrid pipeline")
    sub.add_argument("--adapter", help="folder or repository of a distilled adapter; without one the hybrid is fresh")
    sub.add_argument("--window", type=int, help="of a fresh hybrid, in tokens (default 16)")
    _add_dtype(sub)

    sub = add(
        "distill",
        distill,
        "distill a hybrid from the teacher that a YAML file names",
        "configs/distill/demo.yaml optim.lr=1e-3 train.steps=200",
    )
    sub.add_argument("config", type=Path, help="a YAML file such as configs/distill/flux_dev.yaml")
    _add_overrides(sub)
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output.folder")

    sub = add(
        "generate",
        generate,
        "make an image",
        '--model base/ --adapter run/adapter --prompt "a red shoe" --seed 1 --out shoe.png',
    )
    sub.add_argument("--model", required=True, help="repository id or folder of a diffusers pipeline, dense or hybrid")
    sub.add_argument("--adapter", help="folder or repository of a distilled adapter")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--height", type=int, help="in pixels (default: the pipeline's)")
    sub.add_argument("--width", type=int, help="in pixels (default: the pipeline's)")
    sub.add_argument("--steps", type=int, help="of the sampler (default: the pipeline's)")
    sub.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    sub.add_argument("--max-sequence-length", type=int, help="text tokens (default: the pipeline's)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", type=Path, default=Path("image.png"), help="PNG file (default: image.png)")
    _add_dtype(sub)

    add("info", info, "versions, device, and which attention backends are there", "")
    return parser


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
    if options.adapter and options.window is not None:
        raise ValueError("--window is for a fresh hybrid: an adapter brings its own")
    from . import HybridConfig, hybridize, load_adapter

    pipeline = _load_pipeline(options)
    if getattr(pipeline, "transformer", None) is None:
        raise ValueError(
            f"{options.model} is a {type(pipeline).__name__}, which has no diffusion transformer to convert"
        )
    if options.adapter:
        load_adapter(pipeline, options.adapter)
    else:
        hybridize(pipeline.transformer, HybridConfig(**({} if options.window is None else {"window": options.window})))
    pipeline.save_pretrained(options.out)
    print(f"hybrid pipeline saved to {options.out}")


def distill(options: argparse.Namespace) -> None:
    from .training.config import load_config

    config = load_config(options.config, options.overrides)
    from .training.distill import run  # torch and diffusers, once the config is known to be right

    try:
        run(config, resume=options.resume)
    except KeyboardInterrupt:
        if any(Path(config.output.folder, "checkpoints").glob("step-*")):
            print(
                f"stopped: add --resume to go on from the newest checkpoint in {config.output.folder}", file=sys.stderr
            )
        raise
    print(f"adapter saved to {Path(config.output.folder) / 'adapter'}")


def generate(options: argparse.Namespace) -> None:
    import torch

    from . import load_adapter

    pipeline = _load_pipeline(options)
    if options.adapter:
        load_adapter(pipeline, options.adapter)
    chosen = {
        "height": options.height,
        "width": options.width,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "max_sequence_length": options.max_sequence_length,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if "PixArt" in type(pipeline).__name__ and ("height" in chosen or "width" in chosen):
        chosen["use_resolution_binning"] = False  # the size asked for, not the nearest of a list
    generator = torch.Generator("cpu").manual_seed(options.seed)
    image = pipeline(options.prompt, generator=generator, **chosen).images[0]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    image.save(options.out)
    print(f"{image.width} x {image.height} image saved to {options.out}")


def info(options: argparse.Namespace) -> None:
    import torch

    from . import __version__

    print(f"hybriddit     {__version__}")
    for package in ("torch", "diffusers", "transformers", "accelerate", "natten", "triton"):
        try:
            print(f"{package:13} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:13} not installed")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"device        {device}")
    try:
        kernels = import_module("natten").HAS_LIBNATTEN
    except ImportError:
        kernels = False
    print(f"natten        {'with kernels' if kernels else 'no kernels: window attention runs in plain torch'}")


def _load_pipeline(options: argparse.Namespace):
    import torch

    from .data.teacher_images import load_pipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = "bfloat16" if device == "cuda" else "float32"
    return load_pipeline(options.model, getattr(torch, options.dtype or default)).to(device)
