"""Make the files that tests/compat/test_saved_files.py loads: what version 0.1.0 saved, with what it computed from them.

They were made at commit ca6db7a, with torch 2.15.0, diffusers 0.42.1 and transformers 5.23.0 on a CPU, by

    git worktree add ../at-ca6db7a ca6db7a
    at=$(realpath ../at-ca6db7a)
    PYTHONPATH=$at:$at/tests:$at/tests/models OMP_NUM_THREADS=1 python tests/saved/make_fixtures.py

The files are not to be made again: they stand for what users have. The script need not run on later versions; a later
format gets a folder and a script of its own. All weights and inputs come from fixed seeds.

Beside the files of each kind lies expected.safetensors: inputs, and the outputs that this version gave for them.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from tiny_models import make_inputs, perturb_hybrid
from tiny_pipelines import PROMPTS, TEXT_LENGTH, tiny_pipeline

import hybriddit
from hybriddit import HybridConfig, SiTPipeline, SiTTransformer2DModel
from hybriddit.cli import main
from hybriddit.data.class_images import make_cache

ROOT = Path(__file__).parents[2]
OUT = Path(__file__).parent / "v0.1.0"
GRID = (6, 5)  # tokens of the inputs: rows, columns

# name: folder of the dense transformer, hybrid config. Every kind of layer, gate and added weight is there.
ADAPTERS = {
    "pixart_sigma": (
        "dense/pixart_sigma",
        HybridConfig(
            window=3, gate="token", layers={"*.1.attn1": "window", "*.2.attn1": "linear", "*.3.attn1": "dense"}
        ),
    ),
    "sd3": ("dense/sd3", HybridConfig(window=4, stride=2, map_rank=3)),
    "sd3_window": ("dense/sd3", HybridConfig(window=3, linear=False, delta_rank=2)),
    "sd35": (
        "distill/teacher/transformer",
        HybridConfig(
            window=3, gate="channel", map_rank=4, delta_rank=2, layers={"*.0.attn2": "window", "*.1.attn": "linear"}
        ),
    ),
    "flux": (
        "dense/flux",
        HybridConfig(
            window=(3, 2),
            dilation=(2, 1),
            map_rank=4,
            delta_rank=3,
            layers={
                "transformer_blocks.1.*": "linear",
                "single_transformer_blocks.1.*": "window",
                "single_transformer_blocks.2.*": "dense",
            },
        ),
    ),
    "flux_nth_dense": ("dense/flux", HybridConfig.every_nth_dense(2, window=3, gate="token", delta_rank=2)),
    "flux_linear": ("dense/flux", HybridConfig(window=None, map_rank=2)),
}
# family, and changes of the tiny model's config, of the dense transformers that are not of a pipeline
DENSE = {
    "pixart_sigma": ("pixart_sigma", {"num_layers": 4}),
    "sd3": ("sd3", {"num_layers": 2}),
    "flux": ("flux_dev", {"num_layers": 2, "num_single_layers": 3}),
}

SIT = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "in_channels": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_classes": 3,
}
SITS = {
    "softmax": {"attention": "softmax"},
    "linear": {"attention": "linear", "map_rank": 4},
    "window": {"attention": "window", "window": 3, "stride": (1, 2)},
    "hybrid_head": {"attention": "hybrid", "window": 3},
    "hybrid_channel": {"attention": "hybrid", "window": 3, "gate": "channel", "map_rank": 4, "learn_sigma": False},
    "hybrid_token": {"attention": "hybrid", "window": (3, 2), "gate": "token", "map_rank": 4},
    "modern": {
        "num_layers": 4,
        "attention": {"*.0.attn": "softmax", "*.1.attn": "window", "*.2.attn": "linear", "*": "hybrid"},
        "window": 3,
        "map_rank": 4,
        "norm_type": "rms_norm",
        "activation_fn": "swiglu",
        "qk_norm": True,
        "rope": True,
        "value_conv": 3,
    },
}

DISTILL = {
    "model": {"path": "teacher"},
    "hybrid": {"window": 3, "map_rank": 4, "delta_rank": 2, "layers": {"*.0.attn2": "window"}},
    "data": {
        "prompts": "prompts.txt",
        "images": 6,
        "cache": "cache",
        "height": 48,
        "width": 64,
        "steps": 2,
        "max_sequence_length": TEXT_LENGTH,
        "batch_size": 4,
    },
    "optim": {"lr": 1e-2, "gate_lr_factor": 5.0, "schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.01},
    "train": {"steps": 4, "batch_size": 4, "accumulation": 2, "progress": False, "seed": 3},
    "output": {"folder": "run", "checkpoint_every": 2, "log_every": 1},
}
# one step on the cache of another kind of set
TRAJECTORIES = {
    **DISTILL,
    "data": {**DISTILL["data"], "source": "trajectories", "states": 2, "images": 2, "cache": "trajectories"},
    "train": {**DISTILL["train"], "steps": 1},
    "output": {**DISTILL["output"], "folder": "run-trajectories", "checkpoint_every": 0},
}
TRAIN = {
    "job": "train",
    "model": {**SIT, "num_layers": 1, "num_classes": 2, "attention": "hybrid", "window": 3, "gate": "token"},
    "data": {"path": "latents"},
    "flow": {"times": "logit_normal", "time_shift": 2.0},
    "optim": {
        "lr": 1e-2,
        "gate_lr_factor": 2.0,
        "schedule": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "clip": 0.5,
    },
    "train": {"steps": 4, "batch_size": 4, "accumulation": 2, "progress": False, "seed": 3},
    "output": {"folder": "run", "checkpoint_every": 2, "log_every": 1, "sample_steps": 2},
}
# one step on a cache of pixels
PIXELS = {
    **TRAIN,
    "model": {**TRAIN["model"], "in_channels": 1, "attention": "linear"},
    "data": {"path": "pixels"},
    "train": {**TRAIN["train"], "steps": 1},
    "output": {**TRAIN["output"], "folder": "run-pixels", "checkpoint_every": 0},
}


def randomise(model, seed=5):
    """Give every weight a value that matters; sharp attention, so that a wrong window shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "pos_embed":
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 or "norm" in name or "modulation" in name or not parameter.any():
                parameter.add_(0.2 * noise)
            if name.endswith(("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")):
                parameter.mul_(3)
    return model.eval()


def shrink(pipeline, **changes):
    """Another random transformer, its config changed."""
    torch.manual_seed(19)
    transformer = pipeline.transformer
    pipeline.register_modules(transformer=type(transformer).from_config({**transformer.config, **changes}))


def tiny_vae(channels):
    """Two pixels to a latent."""
    torch.manual_seed(18)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        scaling_factor=0.5,
        shift_factor=0.25,
        mid_block_add_attention=False,
    ).eval()


def save_expected(folder, inputs, outputs):
    tensors = {f"input/{key}": value for key, value in inputs.items() if value is not None}
    tensors |= {f"output/{key}": value for key, value in outputs.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")


def dense():
    """In half precision: the files are half as large, and loaded as float32 they are the same numbers to the last bit."""
    for number, (name, (family, changes)) in enumerate(DENSE.items()):
        tiny = tiny_pipeline(family).transformer
        torch.manual_seed(number)
        model = randomise(type(tiny).from_config({**tiny.config, **changes}))
        model.half().save_pretrained(OUT / "dense" / name)


@torch.no_grad()
def adapters():
    for number, (name, (base, config)) in enumerate(ADAPTERS.items()):
        folder = OUT / "adapters" / name
        class_name = json.loads((OUT / base / "config.json").read_text())["_class_name"]
        model = getattr(diffusers, class_name).from_pretrained(OUT / base, dtype=torch.float32)
        inputs = make_inputs(model, GRID, batch=2)
        dense = model(**inputs).sample
        torch.manual_seed(10 + number)
        perturb_hybrid(hybriddit.hybridize(model, config), scale=0.5)
        hybriddit.save_adapter(model, folder / "adapter")
        save_expected(folder, inputs, {"sample": model(**inputs).sample, "dense": dense})
        (folder / "base.txt").write_text(base + "\n")


@torch.no_grad()
def pipelines():
    for name, family in (("flux", "flux_schnell"), ("pixart_sigma", "pixart_sigma")):
        folder = OUT / "pipelines" / name
        pipeline = tiny_pipeline(family)
        if name == "flux":
            shrink(pipeline, num_single_layers=1)
        pipeline = type(pipeline)(**{**pipeline.components, "vae": tiny_vae(4)})
        pipeline.set_progress_bar_config(disable=True)
        randomise(pipeline.transformer)
        torch.manual_seed(20)
        config = HybridConfig(window=3, gate="token" if name == "flux" else "head", delta_rank=2)
        perturb_hybrid(hybriddit.hybridize(pipeline.transformer, config), scale=0.5)
        pipeline.save_pretrained(folder / "pipeline")
        inputs = make_inputs(pipeline.transformer, GRID)
        outputs = {"sample": pipeline.transformer(**inputs).sample}
        call = image_inputs(name)
        inputs |= {f"image/{key}": value for key, value in call.items()}
        arguments = {} if name == "flux" else {"use_resolution_binning": False, "prompt": None, "negative_prompt": None}
        outputs["image"] = pipeline(
            **call,
            **arguments,
            height=16,
            width=24,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        save_expected(folder, inputs, outputs)


def image_inputs(name):
    """A pipeline's arguments for one image of 4 x 6 tokens: embeddings, and the noise to start from."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    if name == "flux":
        return {
            "prompt_embeds": random(1, TEXT_LENGTH, 16),
            "pooled_prompt_embeds": random(1, 8),
            "latents": random(1, 24, 16),
        }
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    return {
        "prompt_embeds": random(1, TEXT_LENGTH, 16),
        "negative_prompt_embeds": random(1, TEXT_LENGTH, 16),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask.flip(1),
        "latents": random(1, 4, 8, 12),
    }


@torch.no_grad()
def sits():
    for number, (name, changes) in enumerate(SITS.items()):
        folder = OUT / "sit" / name
        torch.manual_seed(30 + number)
        model = randomise(SiTTransformer2DModel(**{**SIT, **changes}))
        parts = {}
        if name == "modern":
            parts = {"vae": tiny_vae(2), "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0)}
        pipeline = SiTPipeline(model, **parts, id2label={0: "bag", 1: "shoe, sneaker", 2: "hat"}, weights="random")
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder / "pipeline")
        generator = torch.Generator().manual_seed(8)
        inputs = {
            "hidden_states": torch.randn(2, 2, 8, 8, generator=generator),
            "wide": torch.randn(2, 2, 8, 12, generator=generator),  # not the training size
            "timestep": torch.tensor([0.2, 0.7]),
            "class_labels": torch.tensor([1, 3]),
            "latents": torch.randn(2, 2, 8, 8, generator=generator),
        }
        labels = {key: inputs[key] for key in ("timestep", "class_labels")}
        outputs = {
            "sample": model(inputs["hidden_states"], **labels).sample,
            "wide": model(inputs["wide"], **labels).sample,
            "image": pipeline(
                ["shoe", 2], latents=inputs["latents"], num_inference_steps=2, guidance_scale=2.0, output_type="pt"
            ).images,
        }
        save_expected(folder, inputs, outputs)


def command(*arguments):
    """`hybriddit ...` in this process; what the run's folder notes of the command is this."""
    sys.argv = ["hybriddit", *arguments]
    assert main(list(arguments)) == 0


def stopped_run(job, result):
    """Run run.yaml to its end, make of `run` what a kill after the second step leaves, and keep what resuming gives.

    resumed/: the result and the log of a run that goes on from there; an unbroken one gives the same to the last bit.
    """
    command(job, "run.yaml")
    unbroken = Path("unbroken")
    shutil.copytree("run", unbroken)
    tidy(Path("run"))
    shutil.rmtree("run/checkpoints/step-00000004")
    shutil.rmtree(Path("run", result))
    if job == "train":  # the pipeline is saved with every checkpoint: the one of step 2 is not needed to go on
        shutil.rmtree("run/pipeline", ignore_errors=True)
    lines = Path("run/log.jsonl").read_text().splitlines(keepends=True)
    Path("run/log.jsonl").write_text("".join(lines[:3]))  # one line further than its checkpoint
    shutil.copytree("run", "stopped")
    command(job, "run.yaml", "--resume")
    for path in (unbroken / result).rglob("*.safetensors"):
        assert path.read_bytes() == (Path("run") / path.relative_to(unbroken)).read_bytes(), path
    Path("resumed").mkdir()
    shutil.copytree(Path("run", result), Path("resumed", result), ignore=shutil.ignore_patterns("vae"))
    shutil.copy("run/log.jsonl", "resumed/log.jsonl")
    shutil.rmtree("run")
    Path("stopped").rename("run")
    shutil.rmtree(unbroken)


def tidy(run):
    """Without what no later step reads: the tracker's events and the plot."""
    for path in run.rglob("events.out*"):
        path.unlink()
    for path in sorted(run.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    (run / "loss.png").unlink(missing_ok=True)


def one_step(job, config):
    """Keep the log of a run of one step, and its set's cache."""
    command(job, f"{config}.yaml")
    folder = Path(f"run-{config}")
    shutil.copy(folder / "log.jsonl", f"{config}.jsonl")
    shutil.rmtree(folder)


def write_configs(**configs):
    for name, values in configs.items():
        Path(f"{name}.yaml").write_text(json.dumps(values, indent=1) + "\n")  # which is YAML too


def distill_run():
    pipeline = tiny_pipeline("sd35")
    shrink(pipeline, num_layers=2, dual_attention_layers=(0,))
    randomise(pipeline.transformer)
    pipeline.to(torch.float16).save_pretrained("teacher")  # for its size, see `dense`
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    write_configs(run=DISTILL, trajectories=TRAJECTORIES)
    stopped_run("distill", "adapter")
    one_step("distill", "trajectories")


def train_run():
    random = np.random.default_rng(0)
    for number in range(7):
        folder = Path("images", ("dark", "light")[number % 2])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    Path("images/light/broken.png").write_bytes(b"no image")
    tiny_vae(2).save_pretrained("vae")
    vae = hybriddit.data.class_images.load_vae("vae")
    make_cache("images", "latents", size=16, vae=vae, vae_name="vae", shard_size=4, progress=False)
    make_cache("images", "pixels", size=8, channels=1, shard_size=4, progress=False)
    shutil.rmtree("images")
    write_configs(run=TRAIN, pixels=PIXELS)
    stopped_run("train", "pipeline")
    one_step("train", "pixels")


def image():
    command(
        *("generate", "--model", "../pipelines/flux/pipeline", "--prompt", "a red shoe", "--height", "16"),
        *("--width", "24", "--steps", "2", "--guidance", "3.0", "--seed", "5", "--max-sequence-length", "6"),
        *("--out", "shoe.png", "--quiet"),
    )
    record = json.loads(Image.open("shoe.png").info["hybriddit"])
    Path("shoe.json").write_text(json.dumps({"kind": "image", "width": 24, "height": 16, "record": record}, indent=1))


def benchmark():
    results = ROOT / "benchmarks" / "results" / "cpu"
    Path("transformer").mkdir()
    shutil.copy(results / "benchmark.json", "benchmark.json")
    shutil.copy(results / "step" / "benchmark.json", "transformer/benchmark.json")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    dense()
    pipelines()
    sits()
    for name, make in {
        "distill": distill_run,
        "train": train_run,
        "image": image,
        "benchmark": benchmark,
        "adapters": adapters,
    }.items():
        (OUT / name).mkdir()
        os.chdir(OUT / name)  # so that all paths in the files are relative
        make()
    for path in OUT.rglob("README.md"):
        path.unlink()
