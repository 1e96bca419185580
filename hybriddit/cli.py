"""The command line: hybriddit demo, convert, distill, push, train, generate, upscale, compare and others.

Every subcommand has two functions: `add_<name>` declares its options, and `<name>` calls a function elsewhere in the
package. That function is imported only then, so that --help and wrong calls do not wait for torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import __version__
from .analyze.candidates import COSTS, WINDOWS
from .benchmark.shapes import PARTS, VARIANTS
from .machine import MENDABLE, OFFLOADS

# a copy of `hybriddit.pipelines.sit`'s, whose import would load torch (tests/test_sample_command.py compares them)
SAMPLERS = ("euler", "heun", "dopri5", "sde-euler", "sde-heun")
# a copy of the keys of `generate.export.BENCHMARKS`, whose import would load numpy (tests/test_export.py compares them)
EXPORTS = ("geneval", "t2i-compbench", "hpsv2", "dpg-bench")
# a copy of `hybriddit.pipelines.cascade`'s, whose import would load torch (tests/test_stages_command.py compares them)
ENLARGED_IN = ("pixels", "latents")
DTYPES = ("float32", "bfloat16", "float16")
# options of images in stages, and what StageSettings calls them
STAGES = {
    "schedule": "schedule",
    "positions": "positions",
    "stage_strength": "strength",
    "stage_steps": "steps",
    "stage_enlarge": "enlarged_in",
    "stage_scale": "scale",
    "upscaler": "upscaler",
}
ADAPTER_HELP = (
    "folder or repository of a distilled adapter; or the folder of a distillation, or of one of its checkpoints"
)
EPILOG = """exit codes:
  0    done
  1    something is wrong that you can put right: one line on stderr says what
  2    a wrong call
  130  Ctrl-C

shell completion:
  hybriddit --print-completion bash > ~/.local/share/bash-completion/completions/hybriddit
  hybriddit --print-completion zsh > ~/.zfunc/_hybriddit    (a folder of your $fpath)
"""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps names such as sit-xl in one piece."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0; 1: an error that the user can fix, 2: a wrong call, 130: Ctrl-C."""
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    # argparse does not parse overrides that come after an option
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
    except MENDABLE as error:
        print(f"hybriddit: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hybriddit",
        description="Pretrained diffusion transformers, made linear in the number of image tokens.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hybriddit {__version__}")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        action=PrintCompletion,
        default=argparse.SUPPRESS,
        help="the completion script, to stdout",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in (
        add_demo,
        add_convert,
        add_distill,
        add_push,
        add_train,
        add_generate,
        add_upscale,
        add_compare,
        add_export,
        add_app,
        add_analyze,
        add_cache,
        add_sample,
        add_evaluate,
        add_benchmark,
        add_info,
    ):
        add(commands)
    return parser


class PrintCompletion(argparse.Action):
    """Print a shell's completion script for the whole parser, and exit."""

    def __call__(self, parser, namespace, values, option_string=None):
        import shtab

        subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        for sub in subparsers.choices.values():
            for action in sub._actions:
                if action.type is Path or action.dest in ("model", "adapter", "config", "lora"):
                    action.complete = shtab.FILE
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _add_command(commands, name: str, command, about: str, example: str) -> argparse.ArgumentParser:
    """Add the parser of one subcommand, which calls `command(options)`."""
    sub = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"example: hybriddit {name} {example}",
        formatter_class=HelpFormatter,
    )
    sub.set_defaults(command=command)
    return sub


def _given(options: argparse.Namespace, *without: str) -> dict[str, Any]:
    """The options as keyword arguments of a subcommand's function, without `--json` and those in `without`."""
    return {name: value for name, value in vars(options).items() if name not in ("command", "json", *without)}


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides the config file")


def _add_dtype(parser: argparse.ArgumentParser, default: str = "bfloat16 on a GPU") -> None:
    parser.add_argument("--dtype", choices=DTYPES, help=f"(default: {default})")


def _add_any_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="take an adapter that was distilled from other weights: --model is a finetune of them, say",
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    """The options that say which of a pipeline's files are read."""
    parser.add_argument(
        "--variant", help="of the weights' files, such as fp16 (default: those without a variant's name)"
    )
    parser.add_argument(
        "--config",
        help="where --model is a single .safetensors file: folder or repository of the same kind of model in "
        "diffusers' layout, which has its other parts",
    )


def add_demo(commands) -> None:
    sub = _add_command(
        commands,
        "demo",
        demo,
        "convert, distill and compare on the small teacher of a checkout",
        "train.steps=100",
    )
    sub.add_argument("--config", type=Path, default=Path("configs/distill/demo.yaml"), help="(default: %(default)s)")
    sub.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder (default: %(default)s)")
    _add_overrides(sub)


def demo(options: argparse.Namespace) -> None:
    if not options.config.is_file():
        raise FileNotFoundError(f"no {options.config}: run the demo from a checkout of hybriddit")
    from .demo.run import run

    run(options.config, options.out, options.overrides)


def add_convert(commands) -> None:
    sub = _add_command(
        commands,
        "convert",
        convert,
        "save a hybrid pipeline: a dense one converted, with the weights of an adapter if given",
        "--model base/ --adapter run/adapter --out hybrid/",
    )
    sub.add_argument(
        "--model", required=True, help="repository id or folder of a dense diffusers pipeline, or a single file"
    )
    sub.add_argument("--out", required=True, type=Path, help="folder for the hybrid pipeline, new or empty")
    sub.add_argument("--adapter", help=f"{ADAPTER_HELP}; without one the hybrid is fresh")
    _add_any_base(sub)
    sub.add_argument("--window", type=int, help="window of a fresh hybrid, in tokens (default 16)")
    sub.add_argument("--plan", type=Path, help="YAML or JSON file of HybridConfig's fields, for a fresh hybrid")
    _add_files(sub)
    _add_dtype(sub, "each component's, as it is stored")
    sub.add_argument("--quiet", action="store_true", help="print errors only")


def convert(options: argparse.Namespace) -> None:
    from .convert import run

    run(**_given(options))
    if not options.quiet:
        print(f"hybrid pipeline saved to {options.out}")


def add_distill(commands) -> None:
    sub = _add_command(
        commands,
        "distill",
        distill,
        "distill a hybrid from the teacher that a YAML file names",
        "configs/distill/demo.yaml optim.lr=1e-3 train.steps=200",
    )
    sub.add_argument("config", type=Path, help="a YAML file such as configs/distill/flux_dev.yaml")
    _add_overrides(sub)
    _add_run_options(sub, "distill")


def _add_run_options(sub: argparse.ArgumentParser, job: str) -> None:
    """The options of distill and train; their help also lists the keys of the job's config."""
    format_help = sub.format_help

    def with_keys() -> str:
        from .training.run_config import describe_keys

        return f"{format_help()}\n{describe_keys(job)}\n"

    sub.format_help = with_keys
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output.folder")
    how.add_argument("--dry-run", action="store_true", help="only say what the run would need; loads no weights")
    sub.add_argument("--json", action="store_true", help="with --dry-run: as JSON")


def _load_run_config(options: argparse.Namespace, job: str):
    from .training.run_config import load_config

    if options.json and not options.dry_run:
        raise ValueError("--json is for --dry-run")
    return load_config(options.config, options.overrides, job)


def distill(options: argparse.Namespace) -> None:
    config = _load_run_config(options, "distill")
    if options.dry_run:
        from .training.dry_run import dry_run, report

        figures = dry_run(config)
        print(json.dumps(figures, indent=2) if options.json else report(figures))
        return
    from .training.distill import run  # imports torch and diffusers: only once the config is known to be right

    _run_training(run, config, options.resume, "adapter")
    print(f"adapter saved to {Path(config.output.folder) / 'adapter'}")


def add_push(commands) -> None:
    sub = _add_command(
        commands,
        "push",
        push,
        "upload an adapter to the hub, with a card that says what it was distilled from and how",
        "outputs/distill/adapter owner/name --private",
    )
    sub.add_argument("folder", type=Path, help="folder of an adapter, or of the distillation that made it")
    sub.add_argument("repo_id", metavar="owner/name", help="model repository; it is made if it is not there")
    sub.add_argument("--private", action="store_true", default=None, help="of a repository that is made")
    sub.add_argument("--base", help="repository of what it was distilled from (default: what the run's config says)")
    sub.add_argument("--license", default="unknown", help="of the base, such as apache-2.0 (default: %(default)s)")


def push(options: argparse.Namespace) -> None:
    from .push import push_adapter

    print(f"adapter uploaded to {push_adapter(**_given(options))}")


def add_train(commands) -> None:
    sub = _add_command(
        commands,
        "train",
        train,
        "train a SiT from scratch on the images or latents that a YAML file names",
        "configs/sit/fashion_mnist_cpu.yaml train.steps=200",
    )
    sub.add_argument("config", type=Path, help="a YAML file such as configs/sit/xl_2_linfusion.yaml")
    _add_overrides(sub)
    _add_run_options(sub, "train")


def train(options: argparse.Namespace) -> None:
    config = _load_run_config(options, "train")
    if options.dry_run:
        from .training.dry_run_sit import dry_run, report

        figures = dry_run(config)
        print(json.dumps(figures, indent=2) if options.json else report(figures))
        return
    from .training.train_sit import run

    _run_training(run, config, options.resume, "model")
    print(f"pipeline saved to {Path(config.output.folder) / 'pipeline'}")


def _run_training(run, config, resume: bool, option: str) -> None:
    """Call `run`; if Ctrl-C stops it and it has left a checkpoint, say how to resume or use it.

    option: of `hybriddit generate`, which takes the run's folder.
    """
    try:
        run(config, resume=resume)
    except KeyboardInterrupt:
        if any(Path(config.output.folder, "checkpoints").glob("step-*")):
            folder = config.output.folder
            print(
                f"stopped: add --resume to go on from the newest checkpoint in {folder}; "
                f"`hybriddit generate --{option} {folder}` uses it as it is",
                file=sys.stderr,
            )
        raise


def add_generate(commands) -> None:
    sub = _add_command(
        commands,
        "generate",
        generate,
        "make images from a prompt, or from a prompt and an image; or of classes, with a SiT",
        '--model base/ --adapter run/adapter --prompt "a red shoe" --seed 1 --out shoe.png',
    )
    sub.add_argument(
        "--model",
        required=True,
        help="repository id or folder of a diffusers pipeline, dense or hybrid, or of a SiTPipeline; or a SiT's run; "
        "or a single .safetensors file, with --config",
    )
    _add_weights(sub)
    subject = sub.add_mutually_exclusive_group(required=True)
    subject.add_argument("--prompt")
    subject.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="file of prompts (one a line, or a table); several processes of torchrun share them, and images that are "
        "there are kept",
    )
    subject.add_argument(
        "--class-label",
        dest="class_labels",
        action="append",
        metavar="NAME",
        help="SiT: name or index of a class; may be given repeatedly",
    )
    sub.add_argument(
        "--image",
        type=Path,
        help="image to start from (SD3, FLUX, Chroma, Qwen-Image, Z-Image), or to edit (FLUX.2, FLUX Kontext, Fibo-Edit, "
        "LongCat-Image-Edit)",
    )
    sub.add_argument(
        "--mask",
        type=Path,
        help="image of that size: white is painted anew, black is kept (SD3, FLUX, Chroma, Qwen-Image, Z-Image, FLUX.2 "
        "klein)",
    )
    sub.add_argument("--strength", type=float, help="how far from --image, above 0 to 1 (default: the pipeline's)")
    sub.add_argument("--height", type=int, help="in pixels (default: the image's, else the pipeline's)")
    sub.add_argument("--width", type=int, help="in pixels (default: the image's, else the pipeline's)")
    sub.add_argument(
        "--size",
        metavar="WIDTHxHEIGHT",
        help="make a larger image in stages: first at --width x --height (default: the model's own size in this shape), "
        "then enlarged and painted anew up to this size; each stage is kept as a file",
    )
    _add_stages(sub)
    sub.add_argument("--steps", type=int, help="steps of the sampler, in the first stage (default: the pipeline's)")
    _add_sampling(sub)
    sub.add_argument(
        "--seed-per-prompt",
        action="store_true",
        help="with --prompts and several images: count seeds by prompts, so that the first image of prompt i has the "
        "seed --seed + i whatever --num-images",
    )
    sub.add_argument(
        "--sampler",
        help="SiT: euler, heun, dopri5, sde-euler or sde-heun (default: the pipeline's scheduler, or euler)",
    )
    sub.add_argument("--num-images", type=int, default=1, help="images per prompt or class label (default: 1)")
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("image.png"),
        help="PNG or TIFF file (default: image.png); several images are image-0001.png, image-0002.png, …. How each was "
        "made is kept in it, and `hybriddit info image.png` shows it; one with a side above 4096 pixels gets a small copy "
        "beside it, image.preview.jpg",
    )
    _add_running(sub)


def generate(options: argparse.Namespace) -> None:
    from .generate import StageSettings, parse_size

    wanted = _stages(options)
    if options.size is None and wanted:
        raise ValueError("--schedule, --positions, --upscaler and --stage-… are for images in stages: give --size too")
    stages = None if options.size is None else StageSettings(parse_size(options.size), **wanted)
    _generate(options, "size", stages=stages)


def add_upscale(commands) -> None:
    sub = _add_command(
        commands,
        "upscale",
        upscale,
        "enlarge an image in stages, each painted anew in few steps by a model that has read what it shows",
        'shoe.png --model base/ --adapter run/adapter --prompt "a red shoe" --scale 4 --out large.png',
    )
    sub.add_argument("image", type=Path, metavar="IMAGE", help="image file")
    sub.add_argument(
        "--model",
        required=True,
        help="repository id or folder of a diffusers pipeline, dense or hybrid; or a single .safetensors file, with --config",
    )
    _add_weights(sub)
    sub.add_argument("--prompt", required=True, help="what the image shows")
    size = sub.add_mutually_exclusive_group(required=True)
    size.add_argument("--scale", type=float, help="how many times as large, on each side")
    size.add_argument("--size", metavar="WIDTHxHEIGHT", help="in pixels, instead of --scale")
    _add_stages(sub)
    _add_sampling(sub)
    sub.add_argument("--out", type=Path, default=Path("upscaled.png"), help="PNG file (default: %(default)s)")
    _add_running(sub)


def upscale(options: argparse.Namespace) -> None:
    from .generate import StageSettings, parse_size

    size = options.size and parse_size(options.size)
    stages = StageSettings(size, options.image, options.scale, **_stages(options))
    _generate(options, "image", "scale", "size", stages=stages)


def _generate(options: argparse.Namespace, *without: str, **more: Any) -> None:
    """Call `hybriddit.generate.run`, and print its report where it is asked for."""
    from .generate import run

    made = run(**_given(options, *STAGES, *without), **more, announce=not (options.quiet or options.json))
    if options.json and made is not None:  # of processes that make images together, the first has the report
        print(json.dumps(made))


def _add_weights(parser: argparse.ArgumentParser) -> None:
    """The options that say which weights of a pipeline are read."""
    _add_files(parser)
    parser.add_argument("--adapter", help=ADAPTER_HELP)
    _add_any_base(parser)
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="LoRA in a .safetensors file, and what it is multiplied by (default: 1); may be given repeatedly",
    )


def _add_stages(parser: argparse.ArgumentParser) -> None:
    """The options of images in stages."""
    parser.add_argument(
        "--schedule",
        help="how an enlarged image is painted anew: refine (default), sdedit, residual or low-frequency",
    )
    parser.add_argument(
        "--stage-strength", type=float, help="noise that a stage starts from, instead of the schedule's"
    )
    parser.add_argument("--stage-steps", type=int, help="steps of a stage, instead of the schedule's")
    parser.add_argument(
        "--stage-enlarge",
        choices=ENLARGED_IN,
        help="what of the stage before is enlarged: pixels, by Lanczos' filter or --upscaler, or the VAE's latents (default: "
        "the schedule's, which is pixels)",
    )
    parser.add_argument(
        "--stage-scale", type=float, help="how much larger a stage is than the one before, at most (default: 2)"
    )
    parser.add_argument(
        "--upscaler",
        type=Path,
        metavar="FILE",
        help="upscaler module, such as Real-ESRGAN's, that enlarges each stage instead of Lanczos' filter; it needs spandrel",
    )
    parser.add_argument(
        "--positions",
        help="of tokens in images larger than the model's own: interpolated (default), plain, ntk, yarn, dominant or clear; "
        "docs/generate.md says which models have which",
    )


def _stages(options: argparse.Namespace) -> dict[str, Any]:
    """The options of images in stages that were given, as StageSettings names them."""
    return {name: vars(options)[option] for option, name in STAGES.items() if vars(options)[option] is not None}


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of a sampler that is guided by text."""
    parser.add_argument("--negative-prompt", help="what to guide away from (FLUX: with --true-cfg)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    parser.add_argument(
        "--true-cfg", type=float, help="FLUX: guidance away from --negative-prompt, above 1; twice the time"
    )
    parser.add_argument("--max-sequence-length", type=int, help="text tokens (default: the pipeline's)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first image, one more for each next (default: 0)"
    )


def _add_measured_images(parser: argparse.ArgumentParser) -> None:
    """The options of commands that make images of a file's prompts and measure with them: compare and analyze."""
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one a line, or a table")
    parser.add_argument("--num-images", type=int, default=1, help="images per prompt (default: 1)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first image, one more for each next (default: 0)"
    )
    for side in ("height", "width"):
        parser.add_argument(f"--{side}", type=int, help="in pixels (default: the pipeline's)")
    parser.add_argument("--steps", type=int, help="steps of the sampler (default: the pipeline's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    parser.add_argument("--max-sequence-length", type=int, help="text tokens (default: the pipeline's)")
    parser.add_argument("--device", help="such as cpu, cuda:1 or mps (default: the accelerator, if there is one)")
    _add_dtype(parser)
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def _add_running(parser: argparse.ArgumentParser) -> None:
    """The options that say where and how images are made."""
    parser.add_argument("--device", help="such as cpu, cuda:1 or mps (default: the accelerator, if there is one)")
    _add_dtype(parser)
    parser.add_argument(
        "--offload",
        choices=OFFLOADS,
        help="keep weights off the GPU until they are used: whole models, or their layers one by one (group; "
        "sequential is the same by accelerate, slower)",
    )
    parser.add_argument("--vae-tiling", action="store_true", help="decode in tiles: large images in little memory")
    parser.add_argument(
        "--max-memory",
        type=float,
        metavar="GIB",
        help="memory that an image may take on the device besides the weights, of each process; a hybrid's blocks run over "
        "strips of the image, and the VAE works in tiles, where they have to (default: what is free, from 2048 x 2048 "
        "pixels on)",
    )
    parser.add_argument(
        "--parallel",
        action="store_true",
        help="all processes of torchrun make each image together, each some of its rows (hybrids and SiTs)",
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--json", action="store_true", help="print files, seeds, seconds and notes as one JSON object")


def add_compare(commands) -> None:
    sub = _add_command(
        commands,
        "compare",
        compare,
        "make images by a hybrid and by its dense teacher, and say how near they are: PSNR, SSIM, seconds",
        "--model base/ --adapter run/adapter --prompts prompts.txt --out outputs/compare",
    )
    sub.add_argument(
        "--model",
        required=True,
        help="repository id or folder of a diffusers pipeline, or a single .safetensors file, with --config",
    )
    _add_files(sub)
    sub.add_argument("--adapter", help=f"{ADAPTER_HELP}; left out where --model is hybrid")
    _add_any_base(sub)
    _add_measured_images(sub)
    sub.add_argument(
        "--features",
        metavar="NAME",
        help="also the Fréchet distance of the two sets by these features: inception, or package.module:function of "
        "your own, uint8 [B, 3, H, W] to [B, F]",
    )
    sub.add_argument("--lpips", action="store_true", help="also LPIPS (AlexNet), by the package lpips")
    sub.add_argument(
        "--clip",
        metavar="MODEL",
        help="also how alike CLIP finds the images, and how well each fits its prompt: folder or repository, such as "
        "openai/clip-vit-large-patch14",
    )
    sub.add_argument(
        "--dino", metavar="MODEL", help="also how alike DINO finds the images: such as facebook/dinov2-base"
    )
    sub.add_argument(
        "--branches",
        action="store_true",
        help="also with the near and the far branch alone, and what each layer is without them",
    )
    sub.add_argument("--out", type=Path, required=True, help="folder, new or empty, for the images and figures")


def compare(options: argparse.Namespace) -> None:
    from .generate.compare import report_text, run

    report = run(**{**_given(options), "quiet": options.quiet or options.json})
    if options.json:
        print(json.dumps(report))
    elif not options.quiet:
        print(report_text(report, options.out))


def add_export(commands) -> None:
    sub = _add_command(
        commands,
        "export",
        export,
        "lay out generated images in the folders that GenEval, T2I-CompBench, HPSv2 or DPG-Bench read",
        "geneval --prompts evaluation_metadata.jsonl --image outputs/image.png --out outputs/geneval",
    )
    sub.add_argument("benchmark", choices=EXPORTS)
    sub.add_argument(
        "--prompts", type=Path, required=True, help="the benchmark's file or folder, that the images were generated of"
    )
    sub.add_argument(
        "--image", type=Path, required=True, help="what `generate --out` got: its numbered images are read"
    )
    sub.add_argument("--num-images", type=int, help="images per prompt (default: what the benchmark's authors ask for)")
    sub.add_argument("--out", type=Path, required=True, help="folder, new or empty")


def export(options: argparse.Namespace) -> None:
    from .generate.export import run

    counts = run(**_given(options))
    print(f"{counts['images']} images of {counts['prompts']} prompts are in {options.out}")


def add_app(commands) -> None:
    sub = _add_command(
        commands,
        "app",
        app,
        "a page in your browser: make images by a hybrid and its teacher, side by side, with time and memory",
        "--model base/ --adapter run/adapter",
    )
    sub.add_argument(
        "--model",
        help="repository id or folder of a diffusers pipeline, dense or hybrid, or a single .safetensors file, with "
        "--config (default: the page asks for one)",
    )
    _add_files(sub)
    sub.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        default=[],
        metavar="ADAPTER",
        help=f"{ADAPTER_HELP}; may be given repeatedly, to choose from",
    )
    _add_any_base(sub)
    for side in ("width", "height"):
        sub.add_argument(f"--{side}", type=int, help="in pixels, that the page begins with (default: the pipeline's)")
    sub.add_argument("--steps", type=int, help="that the page begins with (default: the pipeline's)")
    sub.add_argument("--max-sequence-length", type=int, help="text tokens that the page begins with")
    sub.add_argument("--device", help="such as cpu, cuda:1 or mps (default: the accelerator, if there is one)")
    _add_dtype(sub)
    sub.add_argument(
        "--offload",
        choices=OFFLOADS,
        help="keep weights off the GPU until they are used, see generate; for one adapter",
    )
    sub.add_argument(
        "--host", default="127.0.0.1", help="address to serve at (default: 127.0.0.1, which only this machine reaches)"
    )
    sub.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")


def app(options: argparse.Namespace) -> None:
    from .app import run

    names = ("width", "height", "steps", "max_sequence_length")
    run(**_given(options, *names), settings={name: vars(options)[name] for name in names})


def add_analyze(commands) -> None:
    sub = _add_command(
        commands,
        "analyze",
        analyze,
        "measure what each attention layer of a dense teacher can become, and plan it within a budget",
        "--model base/ --prompts prompts.txt --budget 0.4 --out plan/",
    )
    sub.add_argument("--model", required=True, help="as for compare; dense")
    _add_files(sub)
    _add_measured_images(sub)
    sub.add_argument("--budget", type=float, default=0.5, help="share of the dense attention's cost (default: 0.5)")
    sub.add_argument(
        "--cost",
        choices=COSTS,
        default="flops",
        help="what the budget counts: FLOPs by formula, or seconds measured here (default: flops)",
    )
    sub.add_argument(
        "--windows",
        type=int,
        nargs="+",
        default=list(WINDOWS),
        metavar="SIDE",
        help=f"to choose from, in tokens (default: {' '.join(map(str, WINDOWS))})",
    )
    sub.add_argument("--fit-steps", type=int, default=60, help="steps in which far branches learn (default: 60)")
    sub.add_argument("--calls", type=int, default=2, help="of the transformer, taken of each image (default: 2)")
    sub.add_argument("--queries", type=int, default=128, help="whose attention maps are measured (default: 128)")
    sub.add_argument(
        "--out", type=Path, required=True, help="folder, new, empty, or of the same analysis, which goes on"
    )


def analyze(options: argparse.Namespace) -> None:
    from .analyze.run import report_text, run

    report = run(**{**_given(options), "quiet": options.quiet or options.json})
    if options.json:
        print(json.dumps(report))
    elif not options.quiet:
        print(report_text(report, options.out))


def add_cache(commands) -> None:
    sub = _add_command(
        commands,
        "cache",
        cache,
        "cache a folder of images for `hybriddit train`: their latents, plain and mirrored, or their pixels",
        "imagenet/train --vae stabilityai/sd-vae-ft-ema --size 256 --out outputs/cache/imagenet256",
    )
    sub.description += (
        ". The subfolders are the classes; or tars hold images with their labels (.cls). Every image is cropped as"
        " ADM crops it; one that cannot be read is left out, counted, and listed in index.json. A run that was "
        "stopped or killed goes on when it is started again; several processes of torchrun share the work."
    )
    sub.add_argument("folder", type=Path, help="folder of images, whose subfolders are the classes, or of tars")
    sub.add_argument("--out", type=Path, required=True, help="folder of the cache")
    sub.add_argument("--vae", help="folder or repository of an AutoencoderKL; without one, pixels are kept")
    sub.add_argument("--size", type=int, default=256, help="side of the images, in pixels (default: %(default)s)")
    sub.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: grey (default: %(default)s)")
    sub.add_argument("--batch-size", type=int, default=64, help="images in one call of the VAE (default: %(default)s)")
    sub.add_argument("--shard-size", type=int, default=4096, help="images per file (default: %(default)s)")
    sub.add_argument("--quiet", action="store_true", help="print errors only")


def cache(options: argparse.Namespace) -> None:
    from .data.class_cache import run

    run(**_given(options))


def add_sample(commands) -> None:
    sub = _add_command(
        commands,
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
    sub.add_argument("--batch-size", type=int, default=32, help="images at once in a process (default: %(default)s)")
    sub.add_argument("--sampler", choices=SAMPLERS, default="sde-euler", help="(default: %(default)s)")
    sub.add_argument("--steps", type=int, default=250, help="(default: %(default)s)")
    sub.add_argument("--shift", type=float, default=1.0, help="shift of times towards noise (default: 1, none)")
    sub.add_argument("--guidance", type=float, default=1.0, help="guidance scale (default: 1, none)")
    sub.add_argument("--guidance-channels", type=int, help="guide the first ones only; published numbers: 3")
    sub.add_argument("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"))
    for name in ("atol", "rtol"):
        sub.add_argument(f"--{name}", type=float, help="tolerance of dopri5")
    sub.add_argument("--diffusion", help="the SDE's g(t), see sample_sde (default: sigma)")
    sub.add_argument("--diffusion-norm", type=float)
    sub.add_argument("--last-step", help="the SDE's last step: mean, euler or tweedie (default: mean)")
    sub.add_argument("--last-step-size", type=float, help="(default: 0.04)")
    sub.add_argument("--seed", type=int, default=0, help="image i is made from seed + i (default: %(default)s)")
    sub.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


def sample(options: argparse.Namespace) -> None:
    from .sample import SampleSettings, run

    run(SampleSettings(**_given(options, "random")))


def add_evaluate(commands) -> None:
    sub = _add_command(
        commands,
        "evaluate",
        evaluate,
        "inception score, FID, sFID, precision and recall of samples, as the ADM suite computes them",
        "samples.npz VIRTUAL_imagenet256_labeled.npz --out scores.json",
    )
    sub.add_argument("samples", type=Path, help="npz file: arr_0, uint8 [N, H, W, 3]; or a folder of images")
    sub.add_argument("reference", type=Path, help="the same; of an npz file mu, sigma, mu_s, sigma_s are used")
    sub.add_argument("--size", type=int, help="scale and crop the images of folders to SIZE x SIZE, as ADM does")
    extractor = sub.add_mutually_exclusive_group()
    extractor.add_argument("--inception", type=Path, help="the weights' file (default: from torch.hub's cache)")
    extractor.add_argument(
        "--features",
        metavar="NAME",
        help="package.module:function of your own, uint8 [B, 3, H, W] to [B, F], in place of Inception: the scores are "
        "the Fréchet distance, precision and recall by these",
    )
    sub.add_argument(
        "--clip",
        metavar="MODEL",
        help="also CLIP-T, how well each image that `generate` wrote into the folder samples fits its prompt: folder or "
        "repository, such as openai/clip-vit-large-patch14",
    )
    sub.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    sub.add_argument(
        "--shuffle", type=int, metavar="SEED", help="assign the samples to the inception score's splits at random"
    )
    sub.add_argument(
        "--settings",
        type=Path,
        help="JSON file that says how the samples were made, kept with the scores (default: SAMPLES.json, if it is there)",
    )
    sub.add_argument("--out", type=Path, help="JSON file for scores, settings, files, weights and versions")
    sub.add_argument("--quiet", action="store_true", help="print errors only")
    sub.add_argument("--json", action="store_true", help="print what --out would hold")


def evaluate(options: argparse.Namespace) -> None:
    paths = (options.samples, options.reference)
    for path in paths:
        if not path.is_file() and not path.is_dir():  # before torch is imported
            raise FileNotFoundError(f"no npz file or folder of images at {path}")
    if options.size is not None and (options.size < 1 or not any(path.is_dir() for path in paths)):
        raise ValueError(f"--size {options.size}: a number of pixels, for folders of images")
    from .metrics.run import run, scores_text

    open_folder = None
    if any(path.is_dir() for path in paths):
        from .data.image_set import FolderImages

        open_folder = partial(FolderImages, size=options.size)
    report = run(**_given(options, "quiet", "size"), open_folder=open_folder, progress=not options.quiet)
    if report is None:  # only the first of several processes has a report
        return
    if options.json:
        print(json.dumps(report))
    elif not options.quiet:
        print(scores_text(report, options.out))


def add_benchmark(commands) -> None:
    sub = _add_command(
        commands,
        "benchmark",
        benchmark,
        "time attention and transformers on this machine: hybrid against dense and circular windows",
        "--part attention --shapes flux --sizes 512 1024 --out outputs/benchmark",
    )
    sub.add_argument("--part", dest="parts", nargs="+", choices=PARTS, help="(default: all; generation on a GPU only)")
    sub.add_argument(
        "--shapes",
        nargs="+",
        metavar="NAME",
        help="pixart-sigma, sd3, sd3.5-medium, sd3.5-large, flux, chroma, qwen-image, flux2, flux2-klein, z-image, ovis-image, "
        "flux3, krea2, longcat-image, fibo, sit-xl "
        "and those of families of your own (default: all; two of them on a CPU)",
    )
    sub.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        metavar="PX",
        help="sides of square images (default: 256 to 16384; CPU: to 2048)",
    )
    sub.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), help="(default: all that the device has)")
    sub.add_argument("--window", type=int, default=16, help="window side, in tokens (default: %(default)s)")
    sub.add_argument("--radius", type=int, help="radius of `circular`, in tokens (default: 8)")
    sub.add_argument("--backward", action="store_true", help="also measure forward + backward of the transformer")
    sub.add_argument("--compile", action="store_true", help="torch.compile the transformers' blocks")
    sub.add_argument("--layers", type=int, help="blocks of the transformers (default: all; 2 on a CPU)")
    sub.add_argument(
        "--repeats", type=int, help="samples of each case, fewer where they take long (default: 20; CPU: 5)"
    )
    sub.add_argument(
        "--max-seconds", type=float, help="for one case; longer ones are not measured (default: 10; CPU: 15)"
    )
    sub.add_argument(
        "--tune",
        action="store_true",
        help="instead find the fastest launch options of the attention kernels for --shapes (default: flux, sd3 and "
        "pixart-sigma), and write tuned.json",
    )
    sub.add_argument(
        "--out",
        type=Path,
        help="folder (default: outputs/benchmark; with --tune benchmarks/results/<device>)",
    )
    _add_dtype(sub)
    sub.add_argument("--quiet", action="store_true", help="print errors only")
    sub.add_argument("--json", action="store_true", help="print the results as one JSON object")


def benchmark(options: argparse.Namespace) -> None:
    # before torch is imported: its profiler and compiler would warn that there is no GPU
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from .benchmark.measure import device_to_measure
    from .benchmark.run import run, settings
    from .benchmark.subjects import find_subject

    for name in options.shapes or ():
        try:
            find_subject(name)
        except ValueError as error:
            build_parser().error(f"argument --shapes: {error}")
    if options.tune:
        from .benchmark import tune

        taken = _given(options, "tune", "shapes", "window", "dtype", "out", "quiet")
        if given := [name for name, value in taken.items() if value not in (None, False)]:
            option = given[0].replace("parts", "part").replace("_", "-")
            raise ValueError(f"--tune, which sweeps kernels of fixed sizes, does not take --{option}")
        report = tune.run(options.shapes, options.window, options.dtype, options.out, options.quiet)
    else:
        folder = options.out or Path("outputs/benchmark")
        chosen = settings(device_to_measure(), **_given(options, "out", "quiet", "tune"))
        report = run(chosen, folder, options.quiet)
        if not (options.json or options.quiet):
            print(f"results saved to {folder}")
    if options.json:
        print(json.dumps(report))


def add_info(commands) -> None:
    sub = _add_command(
        commands,
        "info",
        info,
        "versions, device and attention backends; or what a folder or an image holds",
        "outputs/demo/pipeline",
    )
    sub.add_argument("path", nargs="?", type=Path, help="folder of a pipeline, model or adapter, or a PNG file")
    sub.add_argument("--variant", help="of the weights' files, such as fp16 (default: those that would be loaded)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def info(options: argparse.Namespace) -> None:
    from .info import describe, description_text, environment, environment_text

    if options.path is None:
        if options.variant is not None:
            raise ValueError("--variant is for a folder")
        found, text = environment(), environment_text
    else:
        found, text = describe(options.path, options.variant), description_text
    print(json.dumps(found, indent=2) if options.json else text(found))
