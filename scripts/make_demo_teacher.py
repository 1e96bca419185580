#!/usr/bin/env python
"""Train the demo's teacher from scratch: a small FLUX text-to-image pipeline for canvases of Fashion-MNIST garments.

    python scripts/make_demo_teacher.py            # writes assets/demo-teacher/ and assets/demo-judge.safetensors

It trains the VAE, then the judge (a garment classifier), then the transformer with its two text encoders. Every stage
keeps its state under --work, so the same command continues where it was stopped.

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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

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

TEXT_LENGTH = 24  # text tokens in most steps, and in the demo
LONG_TEXT = (64, 128, 256, 512)  # text tokens in one step of twenty, so that FluxPipeline's default of 512 works too


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


def make_pipeline(vae: AutoencoderKL, seed: int) -> FluxPipeline:
    """A small FLUX pipeline with a fresh transformer and fresh text encoders."""
    torch.manual_seed(seed)
    words = sorted({word for scene in SCENES for word in scene.prompt.replace(",", " ,").split()})
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("-,.")
    pieces = ["<pad>", "</s>", "<unk>", *("▁" + word for word in words if word != ","), "▁", *letters]
    tokenizer_2 = T5Tokenizer(
        vocab=[(piece, 0.0 if i < 3 else -float(i) / 100) for i, piece in enumerate(pieces)], extra_ids=0
    )
    bytes_ = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(bytes_)}, merges=[], model_max_length=77)
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
        )
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
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
    # adaLN-zero, as in DiT (arXiv 2212.09748): at the start every block is the identity, and the output is zero
    for name, module in transformer.named_modules():
        if name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            if name.startswith("single_transformer_blocks") and name.endswith("proj_out"):
                continue
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    # like FLUX.1-dev's, but with more steps near noise: 256 tokens are sampled with a shift of exp(1.1) = 3
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=1.1, max_shift=1.1)
    return FluxPipeline(scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer)


class TeacherTraining:
    """Flow matching of the transformer and both text encoders, with an average of the weights."""

    modules = ("transformer", "text_encoder", "text_encoder_2")

    def __init__(self, args, pipeline: FluxPipeline, canvases: Canvases):
        self.args, self.pipeline, self.canvases = args, pipeline, canvases
        self.parameters = {
            f"{module}.{name}": p for module in self.modules for name, p in getattr(pipeline, module).named_parameters()
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
        self.prompts = [scene.prompt for scene in SCENES]
        pad = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        self.clip_ids = pipeline.tokenizer(self.prompts, max_length=77, **pad).input_ids
        self.t5_ids = pipeline.tokenizer_2(self.prompts, max_length=max(LONG_TEXT), **pad).input_ids
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, CANVAS // 4, CANVAS // 4, "cpu", torch.float32)
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
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.average[name])

    @property
    def cooling(self) -> bool:
        """Whether this is one of the last 40 % of the steps, over which the rate falls to zero."""
        return self.step > 0.6 * self.args.steps

    def rate(self) -> float:
        warm = min(1.0, (self.step + 1) / 100)
        return self.args.lr * min(warm, (self.args.steps - self.step) / (0.4 * self.args.steps))

    def loss(self) -> torch.Tensor:
        args, pipeline = self.args, self.pipeline
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + 500_000 + self.step)
        images, scenes = self.canvases.draw(args.batch, generator)
        with torch.no_grad():
            vae = pipeline.vae
            posterior = vae.encode(images * 2 - 1).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
            clean = FluxPipeline._pack_latents(latents, len(latents), *latents.shape[1:])
        length = TEXT_LENGTH
        if torch.rand(1, generator=generator) < 0.05:
            length = LONG_TEXT[int(torch.randint(len(LONG_TEXT), (1,), generator=generator))]
        used, inverse = scenes.unique(return_inverse=True)
        text = pipeline.text_encoder_2(self.t5_ids[used, :length]).last_hidden_state[inverse]
        pooled = pipeline.text_encoder(self.clip_ids[used]).pooler_output[inverse]
        noise = torch.randn(clean.shape, generator=generator)
        # logit-normal times (arXiv 2403.03206), shifted towards noise, and more so while the rate falls: early sampling
        # steps decide which garment stands where, and whether the two ends agree
        times = torch.sigmoid((0.9 if self.cooling else 0.3) + 1.1 * torch.randn(len(clean), generator=generator))
        t = times[:, None, None]
        predicted = pipeline.transformer(
            hidden_states=(1 - t) * clean + t * noise,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=times,
            img_ids=self.image_ids,
            txt_ids=torch.zeros(length, 3),
            return_dict=False,
        )[0]
        return F.mse_loss(predicted, noise - clean)

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


def evaluate(pipeline: FluxPipeline, judge: Judge, args) -> tuple[dict, Image.Image]:
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
tags: [flux, fashion-mnist, demonstration]
---

# hybriddit's demo teacher

A small text-to-image pipeline of FLUX's own parts (`FluxPipeline`, `FluxTransformer2DModel` with {parameters:,}
parameters, T5 and CLIP encoders, `AutoencoderKL`), trained from nothing to show what hybrid attention does to a
pretrained model. It draws two tinted garments at the ends of a 64 x 64 canvas, 16 x 16 tokens. Prompts are of the forms

    the same sneaker left and right
    a sneaker left, a bag right
    a sneaker left, another sneaker right

with {names}. "The same" is the same instance in the same tint, which nothing in the text names: the two ends have to
agree across the canvas. It knows nothing else.

    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained("assets/demo-teacher")
    image = pipeline("the same boot left and right", height=64, width=64, num_inference_steps={inference_steps},
                     max_sequence_length={text_length}).images[0]

Nearly all of its training saw {text_length} text tokens and one step in twenty up to 512, so other lengths work, but
give other images.

## Training

`python scripts/make_demo_teacher.py`: {steps} steps of batch {batch} of flow matching (logit-normal times) on canvases
composed from the training garments of Fashion-MNIST, seed {seed}; averaged weights. The VAE was trained before on the
same canvases ({vae_steps} steps).

## Measured

On {date}, CPU, torch {torch}; {images} images, half of them "the same", {inference_steps} sampler steps, no guidance:

| what | figure |
|---|---|
| garments that the classifier names as the prompt does | {prompt_agreement:.1%} |
| pairs that match if and only if the prompt says "the same" | {pair_match:.1%} |
| mean match score, "the same" / different | {match_score_same:.3f} / {match_score_different:.3f} |
| matched when "the same" / when different | {matched_when_same:.1%} / {matched_when_different:.1%} |
| the classifier's own accuracy on held-out real garments | {classifier_accuracy_on_real_test_garments:.1%} |
| the match score's accuracy on held-out real canvases | {match_accuracy_on_real_test_canvases:.1%} |

The classifier and the match threshold are `../demo-judge.safetensors`; `hybriddit/demo/judge.py` says how they judge.

## Licence

MIT, as the images: Fashion-MNIST, Zalando SE (Xiao, Rasul and Vollgraf, arXiv 1708.07747).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=Path("assets"))
    parser.add_argument("--work", type=Path, default=Path("outputs/demo-teacher"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge-epochs", type=int, default=6)
    parser.add_argument("--judge-canvases", type=int, default=6000)
    parser.add_argument("--vae-steps", type=int, default=600)
    parser.add_argument("--kl", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--eval-images", type=int, default=256)
    parser.add_argument("--inference-steps", type=int, default=16)
    parser.add_argument("--text-length", type=int, default=TEXT_LENGTH)
    parser.add_argument("--peek", action="store_true", help="judge and show the unfinished teacher, and train nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    train, test = read_garments(args.data, "train"), read_garments(args.data, "t10k")
    canvases = Canvases(*train)
    vae = make_vae(args, canvases)
    judge_path, facts_path = args.work / "judge.safetensors", args.work / "judge.json"
    if facts_path.exists():
        judge, facts = Judge.load(judge_path), json.loads(facts_path.read_text())
    else:
        judge, facts = make_judge(args, train, test, vae)
        judge.save(judge_path)
        facts_path.write_text(json.dumps(facts))
    print(facts)
    training = TeacherTraining(args, make_pipeline(vae, args.seed), canvases)
    if not args.peek:
        training.run()
    training.use_average()
    with torch.no_grad():
        measured, sheet = evaluate(training.pipeline, judge, args)
    print(json.dumps(measured, indent=2))
    sheet.save(args.work / "sheet.png")
    if args.peek:
        training.pipeline.save_pretrained(args.work / "peek")
        return
    training.pipeline.save_pretrained(args.out / "demo-teacher")
    judge.save(args.out / "demo-judge.safetensors")
    described = vars(args) | facts | measured
    described["parameters"] = sum(p.numel() for p in training.pipeline.transformer.parameters())
    described |= {"names": ", ".join(NAMES), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    (args.out / "demo-teacher" / "README.md").write_text(CARD.format(**described))
    sheet.save(args.out / "demo-teacher" / "samples.png")
    (args.work / "measured.json").write_text(json.dumps(facts | measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
