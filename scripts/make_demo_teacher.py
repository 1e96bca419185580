#!/usr/bin/env python
"""Train a teacher of the demo from scratch: a small text-to-image pipeline for canvases of Fashion-MNIST garments.

    python scripts/make_demo_teacher.py                 # writes assets/demo-teacher/ and assets/demo-judge.safetensors
    python scripts/make_demo_teacher.py --family sd3    # writes assets/demo-teacher-sd3/, with the VAE of the first

The first, of FLUX's parts, comes with the VAE and the judge (a garment classifier), which are trained before it; the
second, of Stable Diffusion 3's parts, takes both from --out. Every stage keeps its state under --work, so the same
command continues where it was stopped.

The images are Fashion-MNIST's (MIT licence): Debian's package dataset-fashion-mnist, or the four .gz files as
torchvision downloads them, in the folder that --data names.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from hybriddit.demo.canvas import (
    CANVAS,
    DIFFERENT_SCENES,
    GARMENT,
    GARMENTS,
    NAMES,
    SAME_SCENES,
    SCENES,
    compose,
    crops,
)
from hybriddit.demo.judge import Judge, match_score, train_classifier, untint
from hybriddit.models import family_of

WORDS = sorted({word for scene in SCENES for word in scene.prompt.replace(",", " ,").split()})
GRID = (CANVAS // 4, CANVAS // 4)  # the teachers' image tokens: 2 x 2 latents of 2 x 2 pixels each
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("-,.")


def read_garments(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey garments [N, 1, GARMENT, GARMENT] in [0, 1] and their labels as indices into NAMES."""
    paths = [folder / f"{split}-{part}-ubyte.gz" for part in ("images-idx3", "labels-idx1")]
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"no {path}: install Debian's dataset-fashion-mnist, or name the folder with --data")
    images, labels = (np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths)
    images = torch.from_numpy(images[16:].copy()).view(-1, 1, 28, 28)
    labels = torch.from_numpy(labels[8:].copy()).long()
    index = torch.full((10,), -1)
    index[list(GARMENTS)] = torch.arange(len(GARMENTS))
    kept = index[labels] >= 0
    images = F.interpolate(images[kept].float() / 255, size=(GARMENT, GARMENT), mode="bilinear", antialias=True)
    return images.clamp_(0, 1), index[labels[kept]]


class Canvases:
    """Draws canvases and their scenes from garments; `draw` is a function of the generator's state alone."""

    def __init__(self, garments: torch.Tensor, labels: torch.Tensor):
        self.garments = garments
        self.of_class = [torch.nonzero(labels == i).flatten() for i in range(len(NAMES))]

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Canvases [count, 3, CANVAS, CANVAS] in [0, 1], and their scenes as indices into SCENES."""

        def rand(*shape):
            return torch.rand(*shape, generator=generator)

        classes, same = len(NAMES), rand(count) < 0.45
        left = (rand(count) * classes).long()
        right = torch.where(rand(count) < 0.3, left, (rand(count) * classes).long())
        right = torch.where(same, left, right)
        scenes = torch.where(same, left, len(SAME_SCENES) + left * classes + right)

        def instances(names):
            members = [self.of_class[i] for i in names.tolist()]
            picks = [m[int(u * len(m))] for m, u in zip(members, rand(count).tolist(), strict=True)]
            hue = rand(count, 1) * 6
            # a pure hue, mixed with white by a random saturation; its largest channel stays 1
            pure = torch.cat([(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()], dim=1).clamp(0, 1)
            tint = 1 - (0.5 + 0.4 * rand(count, 1)) * (1 - pure)
            return self.garments[torch.stack(picks)] * tint[:, :, None, None]

        first, second = instances(left), instances(right)
        return compose(first, torch.where(same[:, None, None, None], first, second)), scenes


def atomic_save(state, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def as_rendered(vae: AutoencoderKL, canvases: Canvases, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey garments of `count` real canvases as the VAE's decoder renders them, and their labels."""
    garments, labels = [], []
    for start in tqdm(range(0, count, 100), desc="real garments through the VAE"):
        images, scenes = canvases.draw(100, torch.Generator().manual_seed(7_000_000 + start))
        with torch.no_grad():
            images = (vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
        garments.append(untint(crops(images)).flatten(0, 1))
        labels += [NAMES.index(name) for i in scenes.tolist() for name in (SCENES[i].left, SCENES[i].right)]
    return torch.cat(garments), torch.tensor(labels)


def make_judge(args, train, test, vae: AutoencoderKL) -> tuple[Judge, dict]:
    # train on real garments, both sharp and as the VAE's decoder renders them, so as not to judge the decoder
    rendered = as_rendered(vae, Canvases(*train), args.judge_canvases)
    both = [torch.cat(parts) for parts in zip(train, rendered, strict=True)]
    classifier = train_classifier(*both, epochs=args.judge_epochs, seed=args.seed)
    with torch.no_grad():
        accuracy = (classifier(test[0]).argmax(1) == test[1]).float().mean().item()
    # the threshold that best separates same from different pairs on canvases of held-out real garments
    images, scenes = Canvases(*test).draw(4000, torch.Generator().manual_seed(args.seed))
    # the two garments of a same pair are equal pixel for pixel; the noise imitates the decoder's errors
    noisy = (images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    same, score = scenes < len(SAME_SCENES), match_score(noisy)
    threshold = (score[same].quantile(0.01) + score[~same].quantile(0.95)).item() / 2
    facts = {
        "classifier_accuracy_on_real_test_garments": round(accuracy, 4),
        "match_threshold": round(threshold, 4),
        "match_accuracy_on_real_test_canvases": round(((score > threshold) == same).float().mean().item(), 4),
    }
    return Judge(classifier, threshold), facts


def make_vae(args, canvases: Canvases) -> AutoencoderKL:
    path, state = args.work / "vae.pt", {"step": 0}
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=CANVAS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.vae_steps, pct_start=0.1)
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    progress = tqdm(range(state["step"], args.vae_steps), desc="vae", initial=state["step"], total=args.vae_steps)
    for step in progress:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        images = canvases.draw(24, generator)[0] * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(
            posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        ).sample
        error = decoded - images
        loss = (
            error.abs().mean() + 2 * error.square().mean() + args.kl * posterior.kl().mean() / posterior.mean[0].numel()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(
                loss=f"{loss.item():.4f}", psnr=f"{10 * math.log10(4 / error.square().mean().item()):.1f}"
            )
        if step % 200 == 199 or step + 1 == args.vae_steps:
            parts = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            atomic_save({"step": step + 1, **parts}, path)
    vae.eval().requires_grad_(False)
    latents = vae.encode(canvases.draw(512, torch.Generator().manual_seed(2))[0] * 2 - 1).latent_dist.sample()
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def words_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with one token for each word of the prompts; other words fall into letters."""
    pieces = ["<pad>", "</s>", "<unk>", *("▁" + word for word in WORDS if word != ","), "▁", *LETTERS]
    return T5Tokenizer(
        vocab=[(piece, 0.0 if i < 3 else -float(i) / 100) for i, piece in enumerate(pieces)], extra_ids=0
    )


def words_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    )


def letters_tokenizer(length: int, merges: Sequence[tuple[str, str]] = ()) -> CLIPTokenizer:
    """CLIP's tokenizer, with a token for each letter and for each pair that `merges` joins."""
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=length)


def merges_of(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make one token of each word: from its end, for a merge that ends a word applies nowhere else."""
    pairs = ((word[i], word[i + 1 :] + "</w>") for word in words for i in reversed(range(len(word) - 1)))
    return list(dict.fromkeys(pairs))


def clip_encoder(kind: type, tokenizer: CLIPTokenizer, layers: int):
    """A small CLIP text encoder of this class."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def start_as_identity(transformer: torch.nn.Module) -> None:
    """adaLN-zero, as in DiT (arXiv 2212.09748): every block starts as the identity, and the output as zero."""
    for name, module in transformer.named_modules():
        if name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            if name.startswith("single_transformer_blocks") and name.endswith("proj_out"):
                continue
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


class Teacher(ABC):
    """What one family's teacher has of its own.

    folder: in --out. steps: of training. stored: the type of the transformer's weights in the folder.
    text_length: max_sequence_length of the pipeline in most steps, and in the demo. long_text: in one step of twenty,
        so that the pipeline's default works too.
    card: the model card's own parts, by their names in CARD.
    """

    folder: str
    steps: int
    stored = torch.float32
    text_length: int
    long_text: tuple[int, ...]
    card: dict[str, str]

    @abstractmethod
    def make_pipeline(self, vae: AutoencoderKL) -> DiffusionPipeline:
        """A small pipeline with a fresh transformer and fresh text encoders."""


class FluxTeacher(Teacher):
    folder = "demo-teacher"
    steps = 4000
    text_length = 24
    long_text = (64, 128, 256, 512)
    card = {
        "tag": "flux",
        "title": "hybriddit's demo teacher",
        "introduction": """\
A small text-to-image pipeline of FLUX's own parts (`FluxPipeline`, `FluxTransformer2DModel` with {parameters:,}
parameters, T5 and CLIP encoders, `AutoencoderKL`), trained from nothing to show what hybrid attention does to a
pretrained model.""",
        "pipeline": "FluxPipeline",
        "arguments": "max_sequence_length={text_length}",
        "tokens": "text tokens",
        "command": "python scripts/make_demo_teacher.py",
        "of_the_vae": "was trained before on the\nsame canvases ({vae_steps} steps)",
        "judge_rows": """
| the classifier's own accuracy on held-out real garments | {classifier_accuracy_on_real_test_garments:.1%} |
| the match score's accuracy on held-out real canvases | {match_accuracy_on_real_test_canvases:.1%} |""",
    }

    def make_pipeline(self, vae: AutoencoderKL) -> FluxPipeline:
        tokenizer, tokenizer_2 = letters_tokenizer(77), words_tokenizer()
        text_encoder_2 = words_encoder(tokenizer_2)
        text_encoder = clip_encoder(CLIPTextModel, tokenizer, layers=1)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )
        # like FLUX.1-dev's, but with more steps near noise: 256 tokens are sampled with a shift of exp(1.1) = 3
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=1.1, max_shift=1.1)
        return FluxPipeline(scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer)


class SD3Teacher(Teacher):
    folder = "demo-teacher-sd3"
    steps = 3200
    stored = torch.float16  # half the file
    text_length = 16  # T5's tokens; CLIP's, as many, go before them
    long_text = (32, 64, 128, 256)
    card = {
        "tag": "stable-diffusion-3",
        "title": "hybriddit's demo teacher without rotary embedding",
        "introduction": """\
A small text-to-image pipeline of Stable Diffusion 3's own parts (`StableDiffusion3Pipeline`, `SD3Transformer2DModel`
with {parameters:,} parameters and normed queries and keys as in 3.5, two CLIP encoders and T5, `AutoencoderKL`),
trained from nothing to show hybrid attention without rotary embedding. Unlike those of
[FLUX's teacher](../demo-teacher/README.md), its tokens know their places from a table of sines and cosines, added to
them once.""",
        "pipeline": "StableDiffusion3Pipeline",
        "arguments": "guidance_scale=1.0, max_sequence_length={text_length}",
        "tokens": "T5 tokens after CLIP's 16",
        "command": "scripts/make_demo_teacher.py --family sd3",
        "of_the_vae": "is that of FLUX's\ndemo teacher; the transformer's weights are stored in half precision",
        "judge_rows": "",
    }

    def make_pipeline(self, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
        # whole words, for CLIP's tokens are part of the text here, and letters would be many
        words = {part for word in WORDS for part in word.split("-")}
        tokenizers = [letters_tokenizer(16, merges_of(sorted(words - {","}))) for _ in range(2)]
        clips = [clip_encoder(CLIPTextModelWithProjection, tokenizer, layers=2) for tokenizer in tokenizers]
        tokenizer_3 = words_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=5,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=64,
            caption_projection_dim=96,
            pooled_projection_dim=64,
            pos_embed_max_size=24,
            qk_norm="rms_norm",
        )
        return StableDiffusion3Pipeline(
            transformer,
            FlowMatchEulerDiscreteScheduler(shift=3.0),  # as the FLUX teacher's
            vae,
            clips[0],
            tokenizers[0],
            clips[1],
            tokenizers[1],
            words_encoder(tokenizer_3),
            tokenizer_3,
        )


TEACHERS = {"flux": FluxTeacher(), "sd3": SD3Teacher()}


class TeacherTraining:
    """Flow matching of the transformer and the text encoders, with an average of the weights."""

    def __init__(self, args, teacher: Teacher, vae: AutoencoderKL, canvases: Canvases):
        torch.manual_seed(args.seed)
        pipeline = teacher.make_pipeline(vae)
        start_as_identity(pipeline.transformer)
        self.args, self.teacher, self.pipeline, self.canvases = args, teacher, pipeline, canvases
        self.family = family_of(pipeline.transformer)
        modules = ["transformer", *sorted(name for name in pipeline.components if name.startswith("text_encoder"))]
        self.parameters = {
            f"{module}.{name}": p for module in modules for name, p in getattr(pipeline, module).named_parameters()
        }
        for p in self.parameters.values():
            p.requires_grad_(True)
        # Muon for the blocks' matrices, which learn about twice as fast with it; AdamW for all other weights
        inner = [p for name, p in self.parameters.items() if "blocks." in name and p.ndim == 2]
        known = {id(p) for p in inner}
        rest = [p for p in self.parameters.values() if id(p) not in known]
        self.optimizers = [
            torch.optim.Muon(inner, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step, self.losses = 0, []
        self.path = args.work / "transformer.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.step, self.losses, self.average = state["step"], state["losses"], state["average"]
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(state["parameters"][name])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def save(self) -> None:
        state = {
            "step": self.step,
            "losses": self.losses,
            "average": self.average,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        atomic_save(state, self.path)

    def use_average(self) -> None:
        """Give the pipeline the averaged weights, rounded as they will be stored."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.average[name])
        self.pipeline.transformer.to(self.teacher.stored).float()

    @property
    def cooling(self) -> bool:
        """Whether this is one of the last 40 % of the steps, over which the rate falls to zero."""
        return self.step > 0.6 * self.args.steps

    def rate(self) -> float:
        warm = min(1.0, (self.step + 1) / 100)
        return self.args.lr * min(warm, (self.args.steps - self.step) / (0.4 * self.args.steps))

    def loss(self) -> torch.Tensor:
        args, pipeline, family = self.args, self.pipeline, self.family
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + 500_000 + self.step)
        images, scenes = self.canvases.draw(args.batch, generator)
        with torch.no_grad():
            vae = pipeline.vae
            posterior = vae.encode(images * 2 - 1).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            clean = family.pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)
        length, long_text = self.teacher.text_length, self.teacher.long_text
        if torch.rand(1, generator=generator) < 0.05:
            length = long_text[int(torch.randint(len(long_text), (1,), generator=generator))]
        used, inverse = scenes.unique(return_inverse=True)  # each prompt is encoded once
        text = family.encode_prompts(pipeline, [SCENES[i].prompt for i in used.tolist()], max_sequence_length=length)
        text = {name: value[inverse] for name, value in text.items()}
        noise = torch.randn(clean.shape, generator=generator)
        # logit-normal times (arXiv 2403.03206), shifted towards noise, and more so while the rate falls: early sampling
        # steps decide which garment stands where, and whether the two ends agree
        times = torch.sigmoid((0.9 if self.cooling else 0.3) + 1.1 * torch.randn(len(clean), generator=generator))
        noisy, target = family.add_noise(clean, noise, times, pipeline.scheduler)
        inputs = family.model_inputs(noisy, times, text, GRID, guidance=None)
        return F.mse_loss(pipeline.transformer(**inputs, return_dict=False)[0], target)

    def run(self) -> None:
        progress = tqdm(total=self.args.steps, initial=self.step, desc="transformer")
        saved = time.monotonic()
        while self.step < self.args.steps:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate()
            loss = self.loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            decay = min(0.998, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)
            self.step += 1
            self.losses.append(loss.item())
            progress.update()
            if self.step % 20 == 0:
                progress.set_postfix(loss=f"{np.mean(self.losses[-100:]):.4f}")
            if time.monotonic() - saved > 120 or self.step == self.args.steps:
                self.save()
                saved = time.monotonic()


def evaluate(pipeline: DiffusionPipeline, judge: Judge, args) -> tuple[dict, Image.Image]:
    """Judge new images: the shares of right garments and right pairs, and a sheet of the images to look at."""
    rng = np.random.default_rng(args.seed)
    count = args.eval_images // 2
    scenes = [SAME_SCENES[i % len(SAME_SCENES)] for i in range(count)]
    scenes += [DIFFERENT_SCENES[i] for i in rng.permutation(len(DIFFERENT_SCENES) * 4)[:count] % len(DIFFERENT_SCENES)]
    images = []
    pipeline.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(scenes), 16), desc="judging"):
        part = scenes[start : start + 16]
        images.append(
            pipeline(
                [scene.prompt for scene in part],
                height=CANVAS,
                width=CANVAS,
                num_inference_steps=args.inference_steps,
                guidance_scale=1.0,
                max_sequence_length=args.text_length,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
                output_type="pt",
            ).images
        )
    images = torch.cat(images)
    score, same = match_score(images), torch.tensor([scene.same for scene in scenes])
    facts = judge(images, scenes)
    facts |= {
        "images": len(scenes),
        "match_score_same": round(score[same].mean().item(), 4),
        "match_score_different": round(score[~same].mean().item(), 4),
        "matched_when_same": (score[same] > judge.threshold).float().mean().item(),
        "matched_when_different": (score[~same] > judge.threshold).float().mean().item(),
    }
    chosen = torch.cat([images[:24], images[count : count + 24]])
    sheet = (
        F.pad(chosen, (1, 1, 1, 1), value=0.35).unflatten(0, (-1, 8)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    )
    return facts, Image.fromarray((sheet * 255).round().to(torch.uint8).numpy()).resize((8 * 66 * 2, 6 * 66 * 2), 0)


CARD = """---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
tags: [{tag}, fashion-mnist, demonstration]
---

# {title}

{introduction} It draws two tinted garments at the ends of a 64 x 64 canvas, 16 x 16 tokens. Prompts are of the forms

    the same sneaker left and right
    a sneaker left, a bag right
    a sneaker left, another sneaker right

with {names}. "The same" is the same instance in the same tint, which nothing in the text names: the two ends have to
agree across the canvas. It knows nothing else.

    from diffusers import {pipeline}

    pipeline = {pipeline}.from_pretrained("assets/{folder}")
    image = pipeline("the same boot left and right", height=64, width=64, num_inference_steps={inference_steps},
                     {arguments}).images[0]

Nearly all of its training saw {text_length} {tokens} and one step in twenty up to {longest}, so other lengths work, but
give other images.

## Training

`{command}`: {steps} steps of batch {batch} of flow matching (logit-normal times) on canvases
composed from the training garments of Fashion-MNIST, seed {seed}; averaged weights. The VAE {of_the_vae}.

## Measured

On {date}, CPU, torch {torch}; {images} images, half of them "the same", {inference_steps} sampler steps, no guidance:

| what | figure |
|---|---|
| garments that the classifier names as the prompt does | {prompt_agreement:.1%} |
| pairs that match if and only if the prompt says "the same" | {pair_match:.1%} |
| mean match score, "the same" / different | {match_score_same:.3f} / {match_score_different:.3f} |
| matched when "the same" / when different | {matched_when_same:.1%} / {matched_when_different:.1%} |{judge_rows}

The classifier and the match threshold are `../demo-judge.safetensors`; `hybriddit/demo/judge.py` says how they judge.

## Licence

MIT, as the images: Fashion-MNIST, Zalando SE (Xiao, Rasul and Vollgraf, arXiv 1708.07747).
"""


def model_card(teacher: Teacher, values: Mapping[str, Any]) -> str:
    """The text of README.md; `values` are the arguments of the command, and what was measured."""
    values = {**values, "names": ", ".join(NAMES), "folder": teacher.folder, "longest": max(teacher.long_text)}
    return CARD.format(**values, **{name: part.format(**values) for name, part in teacher.card.items()})


def make_vae_and_judge(args, train, test, canvases: Canvases) -> tuple[AutoencoderKL, Judge, dict]:
    """The parts that the teachers share, and what was measured of the judge."""
    vae = make_vae(args, canvases)
    judge_path, facts_path = args.work / "judge.safetensors", args.work / "judge.json"
    if facts_path.exists():
        return vae, Judge.load(judge_path), json.loads(facts_path.read_text())
    judge, facts = make_judge(args, train, test, vae)
    judge.save(judge_path)
    facts_path.write_text(json.dumps(facts))
    return vae, judge, facts


def main() -> None:
    def per_family(name: str) -> str:
        return ", ".join(f"{getattr(teacher, name)} for {family}" for family, teacher in TEACHERS.items())

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--family",
        choices=TEACHERS,
        default="flux",
        help="whose parts the pipeline has; sd3 needs demo-teacher/vae and demo-judge.safetensors in --out, which flux "
        "makes",
    )
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=Path("assets"))
    parser.add_argument("--work", type=Path, help="default: the teacher's folder in outputs/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge-epochs", type=int, default=6)
    parser.add_argument("--judge-canvases", type=int, default=6000)
    parser.add_argument("--vae-steps", type=int, default=600)
    parser.add_argument("--kl", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, help=f"default: {per_family('steps')}")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--eval-images", type=int, default=256)
    parser.add_argument("--inference-steps", type=int, default=16)
    parser.add_argument("--text-length", type=int, help=f"default: {per_family('text_length')}")
    parser.add_argument("--peek", action="store_true", help="judge and show the unfinished teacher, and train nothing")
    args = parser.parse_args()
    teacher = TEACHERS[args.family]
    args.work = args.work or Path("outputs", teacher.folder)
    args.steps = args.steps or teacher.steps
    args.text_length = args.text_length or teacher.text_length
    args.work.mkdir(parents=True, exist_ok=True)

    train, test = read_garments(args.data, "train"), read_garments(args.data, "t10k")
    canvases = Canvases(*train)
    judge_path = args.out / "demo-judge.safetensors"
    if args.family == "flux":
        vae, judge, facts = make_vae_and_judge(args, train, test, canvases)
        print(facts)
    else:
        vae = AutoencoderKL.from_pretrained(args.out / FluxTeacher.folder / "vae").requires_grad_(False)
        judge, facts = Judge.load(judge_path), {}
    training = TeacherTraining(args, teacher, vae, canvases)
    if not args.peek:
        training.run()
    training.use_average()
    with torch.no_grad():
        measured, sheet = evaluate(training.pipeline, judge, args)
    print(json.dumps(measured, indent=2))
    sheet.save(args.work / "sheet.png")
    training.pipeline.transformer.to(teacher.stored)
    if args.peek:
        training.pipeline.save_pretrained(args.work / "peek")
        return
    folder = args.out / teacher.folder
    training.pipeline.save_pretrained(folder)
    if args.family == "flux":
        judge.save(judge_path)
    described = vars(args) | facts | measured | {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    described["parameters"] = sum(p.numel() for p in training.pipeline.transformer.parameters())
    (folder / "README.md").write_text(model_card(teacher, described))
    sheet.save(folder / "samples.png")
    (args.work / "measured.json").write_text(json.dumps(facts | measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
