"""`hybriddit demo`: convert a teacher, distill, save, load again and compare, on a laptop's processor."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..attention import TokenLayout
from ..data.sources import make_data
from ..files import replacing_folder, write_json
from ..images import contact_sheet
from ..metrics.nearness import nearness
from ..models import family_of
from ..models.family import denoiser
from ..models.flops import attention_flops
from ..pipelines.loading import load_pipeline
from ..training.distill import distill, make_student
from ..training.run_config import DistillConfig, load_config
from .canvas import Scene
from .judge import Judge, match_score

# half ask for the same garment twice; of the other half, half ask for two garments of one kind
SHOWN: tuple[Scene, ...] = (
    *(Scene(name, name, same=True) for name in ("t-shirt", "trouser", "pullover", "sneaker", "bag", "boot")),
    *(Scene(name, name) for name in ("dress", "sneaker", "bag")),
    *(Scene(left, right) for left, right in (("trouser", "bag"), ("pullover", "sandal"), ("boot", "t-shirt"))),
)
SEEDS = (1001, 1002, 1003)  # far from those of the images that the hybrid is distilled on
BATCH = 12


def generate(pipeline, prompts: list[str], seeds: list[int], sampling: dict, desc: str) -> np.ndarray:
    """Make an image of every prompt with every seed, prompt by prompt: uint8 [prompts * seeds, H, W, 3].

    sampling: arguments of the pipeline's call.
    """
    pipeline.set_progress_bar_config(disable=True)
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    images = []
    for start in tqdm(range(0, len(jobs), BATCH), desc=desc, unit="batch", leave=False):
        part = jobs[start : start + BATCH]
        images += pipeline(
            [prompt for prompt, _ in part],
            generator=[torch.Generator().manual_seed(seed) for _, seed in part],
            **sampling,
        ).images
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


def compare(images: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """Mean PSNR in dB and mean SSIM of images to the teacher's, uint8 [N, H, W, 3] both."""
    psnr, ssim = zip(*(nearness(image, own) for image, own in zip(images, teacher, strict=True)), strict=True)
    return {"psnr": round(float(np.mean(psnr)), 3), "ssim": round(float(np.mean(ssim)), 4)}


def judged(images: np.ndarray, scenes: list[Scene], judge: Judge) -> dict[str, float]:
    """The judge's two scores, and the mean match score where the prompt says "same" and where it does not."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    score, same = match_score(tensor), torch.tensor([scene.same for scene in scenes])
    return {
        **{key: round(value, 4) for key, value in judge(tensor, scenes).items()},
        "match_score_same": round(score[same].mean().item(), 4),
        "match_score_different": round(score[~same].mean().item(), 4),
    }


def sampling_of(config: DistillConfig) -> dict:
    """The arguments of the demo's pipeline calls: the same as for the training images."""
    data = config.data
    return {
        "height": data.height,
        "width": data.width,
        "num_inference_steps": data.steps,
        "guidance_scale": data.guidance_scale,
        "max_sequence_length": data.max_sequence_length,
    }


def layout_of(pipeline, config: DistillConfig) -> TokenLayout:
    """The tokens of one image of the demo's size and its prompt, in the layers that hybrid attention replaces."""
    family, data = family_of(denoiser(pipeline)), config.data
    pixels = family.token_pixels(denoiser(pipeline).config, pipeline.vae_scale_factor)
    text_length = family.text_length(data.max_sequence_length, pipeline.tokenizer.model_max_length)
    return TokenLayout(text_length, ((data.height // pixels, data.width // pixels),), family.text_first)


def run(config_path: str | Path, out: str | Path, overrides: Sequence[str] = ()) -> dict:
    """Run the whole demo: write compare.png, pipeline/ and metrics.json under `out`, and return the metrics."""
    started, out = time.monotonic(), Path(out)
    config = load_config(config_path, overrides)
    config.output.folder = None  # write only the files listed above
    if config.data.max_sequence_length is None:
        raise ValueError("the demo needs data.max_sequence_length, the text tokens that it counts FLOPs for: 24, say")
    folder = Path(config.model.path)
    judge_path = folder.parent / "demo-judge.safetensors"
    if not folder.is_dir() or not judge_path.is_file():
        raise FileNotFoundError(f"no demo teacher at {folder} and {judge_path}: run it from a checkout of hybriddit")
    out.mkdir(parents=True, exist_ok=True)
    judge, sampling = Judge.load(judge_path), sampling_of(config)
    prompts, seeds = [scene.prompt for scene in SHOWN], list(SEEDS)
    scenes = [scene for scene in SHOWN for _ in seeds]

    say(1, f"the teacher, {folder}, makes {len(scenes)} images to compare with and {config.data.images} to learn from")
    pipeline = load_pipeline(str(folder))
    teacher = generate(pipeline, prompts, seeds, sampling, "teacher")
    data = make_data(pipeline, config.data)

    layout = layout_of(pipeline, config)
    (grid,) = layout.grids
    say(
        2, f"its attention becomes hybrid: a window of {config.hybrid.window} on a grid of {grid[0]} x {grid[1]} tokens"
    )
    added = sum(p.numel() for p in make_student(denoiser(pipeline), config).values())
    undistilled = generate(pipeline, prompts, seeds, sampling, "undistilled")

    say(3, f"{config.train.steps} steps of distillation: {added:,} added parameters learn, the teacher's stay")
    distill(pipeline, data, config)

    say(
        4,
        f"the whole pipeline is saved to {out / 'pipeline'}, loaded by diffusers in a new process, and makes its images",
    )
    with replacing_folder(out / "pipeline") as folder:
        pipeline.save_pretrained(folder)
    distilled = generate_in_new_process(out / "pipeline", prompts, seeds, sampling)

    metrics = {
        "window": config.hybrid.window,
        "grid": list(grid),
        "prompts": prompts,
        "seeds": seeds,
        "images": "every prompt with every seed, a generator of that seed per image",
        **{key: sampling[key] for key in ("num_inference_steps", "guidance_scale", "max_sequence_length")},
        "height": config.data.height,
        "width": config.data.width,
        "added_parameters": added,
        "attention_flops": attention_flops(denoiser(pipeline), layout),
        "undistilled": compare(undistilled, teacher) | judged(undistilled, scenes, judge),
        "distilled": compare(distilled, teacher) | judged(distilled, scenes, judge),
        "teacher": judged(teacher, scenes, judge),
        "seconds": round(time.monotonic() - started),
    }
    write_json(out / "metrics.json", metrics)
    first = slice(None, None, len(seeds))
    rows = {
        "teacher": teacher[first],
        "hybrid,\nundistilled": undistilled[first],
        "hybrid,\ndistilled": distilled[first],
    }
    contact_sheet(rows, prompts, out / "compare.png")
    print(summary(metrics, out))
    for warning in warnings_of(metrics):
        print(f"warning: {warning}", file=sys.stderr)
    return metrics


def generate_in_new_process(folder: Path, prompts: list[str], seeds: list[int], sampling: dict) -> np.ndarray:
    """Run `generate` in a new Python process, which gets only the saved folder."""
    job = {"folder": str(folder), "prompts": prompts, "seeds": seeds, "sampling": sampling}
    result = folder.parent / "distilled.npy"
    command = [sys.executable, "-m", __spec__.name, str(result)]
    if subprocess.run(command, input=json.dumps(job), text=True).returncode:
        raise OSError(f"the saved pipeline {folder} failed in a new process: see above")
    images = np.load(result, allow_pickle=False)
    result.unlink()
    return images


def say(number: int, what: str) -> None:
    print(f"[{number}/4] {what}", flush=True)


def summary(metrics: dict, out: Path) -> str:
    """The table that the demo ends with."""
    lines = [f"{'':14}{'PSNR (dB)':>10}{'SSIM':>8}{'garments right':>16}{'pairs right':>13}"]
    for name in ("teacher", "undistilled", "distilled"):
        row = metrics[name]
        nearness = f"{row['psnr']:10.2f}{row['ssim']:8.3f}" if "psnr" in row else f"{'-':>10}{'-':>8}"
        lines.append(f"{name:14}{nearness}{row['prompt_agreement']:16.1%}{row['pair_match']:13.1%}")
    flops = metrics["attention_flops"]
    gained = metrics["distilled"]["psnr"] - metrics["undistilled"]["psnr"]
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"PSNR and SSIM are to the teacher's images; distilling brought the hybrid {gained:+.2f} dB nearer.",
            f"Attention FLOPs of one forward pass: {flops['dense']:,} dense, {flops['hybrid']:,} hybrid.",
            f"Made in {metrics['seconds']} s, under {out}/:",
            "  compare.png   the same prompts and seeds: teacher, hybrid before, hybrid after",
            "  pipeline/     the distilled pipeline; after `import hybriddit`, DiffusionPipeline.from_pretrained loads it",
            "  metrics.json  every figure above, and what made the images",
        ]
    )


def warnings_of(metrics: dict) -> list[str]:
    """What in the demo's figures says that the distillation did harm."""
    before, after = metrics["undistilled"], metrics["distilled"]
    worse = [
        f"{name} fell from {before[key]:g} to {after[key]:g}"
        for key, name in (("psnr", "PSNR"), ("ssim", "SSIM"), ("prompt_agreement", "garments right"))
        if after[key] < before[key]
    ]
    advice = "these settings do not teach: see hybrid.delta_rank, optim and train.steps"
    return [f"distilling made the hybrid worse ({', '.join(worse)}): {advice}"] if worse else []


def _in_new_process() -> None:
    from diffusers import DiffusionPipeline

    job = json.load(sys.stdin)
    pipeline = DiffusionPipeline.from_pretrained(job["folder"], use_safetensors=True)
    np.save(sys.argv[1], generate(pipeline, job["prompts"], job["seeds"], job["sampling"], "distilled"))


if __name__ == "__main__":
    _in_new_process()
