#!/usr/bin/env python
"""Measure large images on a GPU: what one pass holds against what was planned, and an image from the prompt to its file.

    python scripts/highres.py passes --out FOLDER         forward passes at 8192 and 16384 pixels, at once and in strips
    python scripts/highres.py image --out FOLDER          an image of 16384 x 16384 pixels, in stages (`generate --size`)
    python scripts/highres.py image --memory 20 --out …   the same within 20 GiB besides the weights

PixArt-Sigma's transformer (window 16) and VAE, of full size and with random weights; the prompt's embeddings are random
too, and T5 is not run. Each prints a JSON object, and writes it to FOLDER/highres-*.json: seconds and the most bytes held,
of each pass or stage, beside the plan's. `passes` exits with 1 where the plan is more than 10 % off. --tiny tries all this
with a small model, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from hybriddit import HybridConfig, hybridize, in_strips
from hybriddit.attention.rates import fastest, probe_rates
from hybriddit.benchmark.measure import device_to_measure, peak_bytes
from hybriddit.benchmark.model import random_model
from hybriddit.benchmark.subjects import find_subject
from hybriddit.files import write_json
from hybriddit.generate.cascade import find_schedule, make_in_stages, plan_cascade
from hybriddit.generate.images import Task
from hybriddit.machine import device_details, git_state
from hybriddit.models import family_of
from hybriddit.models.peak import forward_cost, forward_peak
from hybriddit.pipelines.memory import free_beside_weights, plan_memory

WITHIN = 0.1
GUIDANCE, STEPS = 4.5, 20
VAE = {
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "sample_size": 16,
    "use_additional_conditions": False,
}


def make_pipeline(tiny: bool, device: torch.device, dtype: torch.dtype) -> PixArtSigmaPipeline:
    """A hybrid PixArt-Sigma without text encoder, its own size 1024 pixels; tiny: 128."""
    torch.manual_seed(0)
    if tiny:
        transformer = PixArtTransformer2DModel(**TINY)
        vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, sample_size=64, **VAE)
    else:
        transformer = random_model(find_subject("pixart-sigma"), 1024, None, dtype, device)
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), sample_size=1024, **VAE)
    hybridize(transformer, HybridConfig(window=4 if tiny else 16))
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear")
    # not diffusers' `to`: the gates stay in float32
    vae = torch.nn.Module.to(vae.eval(), device=device, dtype=dtype)
    pipeline = PixArtSigmaPipeline(None, None, vae, transformer.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def passes(pipeline: PixArtSigmaPipeline, sizes: list[int], rows: int) -> dict:
    """Of one image at each size, at once and in strips of `rows` rows of tokens."""
    model, device, dtype = pipeline.transformer, pipeline.device, pipeline.dtype
    family, found = family_of(model), []
    rates = probe_rates(device, dtype)
    text = family.example_text(model.config, 1, 300, lambda *shape: torch.randn(shape, dtype=dtype, device=device))
    for size in sizes:
        side = size // family.token_pixels(model.config, pipeline.vae_scale_factor)
        latents = torch.randn(1, *family.latents_shape(model.config, (side, side)), dtype=dtype, device=device)
        times = torch.full((1,), family.middle_time, device=device)
        inputs = family.model_inputs(latents, times, text, (side, side), None)
        given = sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
        for strip in (None, rows):
            with torch.no_grad(), nullcontext() if strip is None else in_strips(model, strip):
                call = lambda inputs=inputs: model(**inputs, return_dict=False)  # noqa: E731
                call()  # compiles, and makes what is kept
                held = peak_bytes(call, device) + given
                seconds = fastest(call, device, 0, least=2)
            options = {"device": device, "dtype": dtype, "rows": strip}
            planned = forward_peak(model, (side, side), text, **options)
            least = forward_cost(model, (side, side), text, rates, **options).seconds
            found.append(
                {
                    "pixels": size,
                    "rows": strip,
                    "seconds": seconds,
                    "least_seconds": least,
                    "peak_bytes": held,
                    "planned_bytes": planned,
                    "planned_over_measured": planned / held,
                }
            )
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return {"rates": rates._asdict(), "passes": found}


def image(pipeline: PixArtSigmaPipeline, size: int, gib: float | None, folder: Path) -> dict:
    """An image in stages from the model's own size on, with guidance, and what each stage took."""
    model, device = pipeline.transformer, pipeline.device
    family, gpu = family_of(model), device.type == "cuda"
    rates = probe_rates(device, pipeline.dtype)
    cascade = plan_cascade(pipeline, (size, size), find_schedule(None, None, None))
    available = free_beside_weights(pipeline, device) if gib is None else int(gib * 2**30)
    plans = []
    for number, stage in enumerate(cascade.stages):
        with cascade.positions_of(model, number):
            options = {"passes": stage.schedule.steps if stage.schedule else STEPS, "rates": rates}
            plans.append(plan_memory(pipeline, *cascade.padded(number), images=2, available=available, **options))
    cascade = cascade.within(plans)
    weights = torch.cuda.memory_allocated(device) if gpu else 0
    stages, began = [], time.monotonic()

    def note(text: str) -> None:
        nonlocal began
        plan = plans[len(stages)]
        stages.append(
            {
                "pixels": plan.width,
                "rows": plan.rows,
                "tiles": plan.tiles,
                "seconds": time.monotonic() - began,
                "least_seconds": plan.times.passes * plan.times.forward + plan.times.decoder,
                "peak_bytes_besides_weights": torch.cuda.max_memory_allocated(device) - weights if gpu else None,
                "planned_bytes": max(plan.transformer, plan.decoder),
            }
        )
        print(text, json.dumps(stages[-1]), file=sys.stderr, flush=True)
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        began = time.monotonic()

    text = family.example_text(
        model.config, 1, 300, lambda *shape: torch.randn(shape, dtype=pipeline.dtype, device=device)
    )
    width, height = cascade.padded(0)
    arguments = {
        "prompt": None,
        "negative_prompt": None,
        **text,
        **{f"negative_{name}": value for name, value in text.items()},
        "width": width,
        "height": height,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "use_resolution_binning": False,
    }
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    began = begin = time.monotonic()
    path = folder / f"highres-{size}.png"
    record = {"steps": STEPS, "guidance": GUIDANCE, "weights": "random"}
    make_in_stages(pipeline, Task(arguments, 0, record), path, cascade, 0, image=None, source={}, says=note)
    return {
        "pixels": size,
        "memory_gib": gib,
        "seconds": time.monotonic() - begin,
        "weights_bytes": weights or None,
        "file_bytes": path.stat().st_size,
        "rates": rates._asdict(),
        "stages": stages,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("passes", "image"))
    parser.add_argument("--memory", type=float, help="GiB besides the weights (default: what is free)")
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels (default: 8192 16384; of an image: 16384)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="a small model, and small images")
    chosen = parser.parse_args()
    device = torch.device("cpu") if chosen.tiny else device_to_measure()
    if device.type == "cpu" and not chosen.tiny:
        print("highres: no GPU: nothing was measured (--tiny tries a small model)", file=sys.stderr)
        return 1
    chosen.out.mkdir(parents=True, exist_ok=True)
    pipeline = make_pipeline(chosen.tiny, device, torch.float32 if chosen.tiny else torch.bfloat16)
    if chosen.part == "passes":
        sizes = chosen.sizes or ([1536, 2048] if chosen.tiny else [8192, 16384])
        found = passes(pipeline, sizes, rows=8 if chosen.tiny else 64)
        name = "highres-passes.json"
    else:
        [size] = chosen.sizes or [512 if chosen.tiny else 16384]
        found = image(pipeline, size, chosen.memory, chosen.out)
        name = "highres-image.json" if chosen.memory is None else "highres-low-memory.json"
    state = git_state() or {}
    found = {"device": device_details(device), "torch": torch.__version__, "commit": state.get("commit"), **found}
    write_json(chosen.out / name, found)
    print(json.dumps(found))
    return int(any(abs(row["planned_over_measured"] - 1) > WITHIN for row in found.get("passes", ())))


if __name__ == "__main__":
    sys.exit(main())
