"""Estimate what training a SiT needs, in seconds, from shapes and from what the set's folder lists."""

from __future__ import annotations

from dataclasses import asdict
from math import prod
from pathlib import Path

import torch
from torch import nn

from ..attention import TokenLayout
from ..attention.work import dense_flops
from ..data.shards import SETTINGS
from ..models.flops import sit_flops
from ..models.peak import module_peak
from .estimates import (
    THROUGHPUT,
    Rows,
    assumption_row,
    checkpoint_bytes,
    duration,
    hours,
    memory_rows,
    number,
    on_several,
    several_rows,
    si,
    table,
    trained_bytes,
    trained_words,
)
from .run_config import SiTConfig
from .step_cost import sit_step_memory
from .train_sit import plan_training


def dry_run(config: SiTConfig) -> dict:
    """Estimate what a run of this config would train, compute and hold in memory, as plain numbers.

    The model is built on the meta device. Of a folder, the files are listed and a few images looked at. Bytes are for
    one GPU that does the whole batch; FLOPs count two per multiply-add. Raises what a real run would raise before it
    reads the set.
    """
    model, images, info = plan_training(config)
    own, train, output = model.config, config.train, config.output
    side = own.sample_size // own.patch_size
    bf16 = train.precision == "bf16"
    count = train.batch_size // train.accumulation
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() for p in trained)
    kept = sit_step_memory(model, count, bf16=bf16)
    activations = {"with_checkpointing": kept["checkpointed"], "without_checkpointing": kept["kept"]}
    memory = {
        "trained": trained_bytes(config, trained),
        "activations": activations["with_checkpointing" if train.gradient_checkpointing else "without_checkpointing"],
    }

    def drawn(images: int, guidance: float) -> int:
        """The bytes that a pass for so many samples takes besides the weights."""
        rows = images * (2 if guidance > 1 else 1)
        inputs = {
            "hidden_states": torch.zeros(()).expand(rows, own.in_channels, own.sample_size, own.sample_size),
            "timestep": torch.full((rows,), 0.5),
            "class_labels": torch.zeros(rows, dtype=torch.long),
            "return_dict": False,
        }
        dtype = torch.bfloat16 if bf16 else torch.float32
        return module_peak(model, inputs, torch.device("cpu"), dtype)

    samples = []
    if output.sample_every:
        samples.append(drawn(output.samples, output.guidance))
    if config.metrics.every:
        samples.append(drawn(min(config.metrics.batch_size, config.metrics.samples), config.metrics.guidance))
    forward = sit_flops(model, (side, side))
    recomputed = forward if train.gradient_checkpointing else 0
    step_flops = train.batch_size * (3 * forward + recomputed)
    return {
        "estimate": True,
        "parameters": weights,
        "attention": sorted({block.attn.kind for block in model.transformer_blocks}),
        "attention_flops": _attention_flops(model, side),
        "tokens": {"grid": [side, side], "image": side * side},
        "forward_flops": forward,
        "step_flops": step_flops,
        "images_per_pass": count,
        "gradient_checkpointing": train.gradient_checkpointing,
        "use_8bit_adam": config.optim.use_8bit_adam,
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "activation_bytes": activations,
        "stage_bytes": {
            "training": sum(memory.values()),
            "samples": memory["trained"] + max(samples) if samples else None,
        },
        "several": on_several(config, model, 2 if bf16 else 4, weights, frozen=0, **memory),
        "disk_bytes": {
            "checkpoints": checkpoint_bytes(memory["trained"] - 4 * weights, output),
            "pipeline": 2 * weights * 4,  # the one before is there until the next is whole
        },
        "images": images,
        "classes": len(info.classes),
        "shape": list(info.shape),
        "latents": info.vae_sha256 is not None,
        # images of a folder are kept in memory, as bytes
        "in_memory_bytes": 0 if (Path(config.data.path) / SETTINGS).exists() else images * prod(info.shape),
        "epochs": train.steps * train.batch_size / images,
        "flow": asdict(config.flow),
        "assumed_flops_per_second": THROUGHPUT,
        "hours": {"training": hours(train.steps * step_flops)},
        "steps": train.steps,
        "batch_size": train.batch_size,
    }


def _attention_flops(model: nn.Module, side: int) -> dict[str, int]:
    """FLOPs of the attention of all layers for one image, without projections: with softmax, and as the model has it."""
    layout = TokenLayout(0, ((side, side),), text_first=False)
    layers = [block.attn for block in model.transformer_blocks]
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return {
        "softmax": len(layers) * dense_flops(side * side, width),
        "own": sum(layer.hybrid.flops(layout) for layer in layers),
    }


def report(figures: dict) -> str:
    """Format `dry_run`'s figures for a terminal."""
    tokens, attention, activations = (figures[name] for name in ("tokens", "attention_flops", "activation_bytes"))
    memory, disk = figures["memory_bytes"], figures["disk_bytes"]
    recomputed = ", and forward again for gradient checkpointing" if figures["gradient_checkpointing"] else ""
    how, other = "without", f"with it {si(activations['with_checkpointing'], 'B')}"
    if figures["gradient_checkpointing"]:
        how, other = "with", f"without it {si(activations['without_checkpointing'], 'B')}"
    what = "latents" if figures["latents"] else "images"
    flow = ", ".join(f"{name} {value}" for name, value in figures["flow"].items())
    words = {
        "training": [
            ("", "while it trains:"),
            ("", f"    {si(memory['trained'], 'B')} weights, {trained_words(figures)}"),
            ("", f"    {si(memory['activations'], 'B')} activations: what autograd keeps, of"),
            ("", f"    {figures['images_per_pass']} images at a time, {how} gradient checkpointing ({other})"),
        ],
        "samples": [("", "while sample grids or metrics are drawn")],
    }
    vae = ", the set's VAE" if figures["latents"] else ""
    in_memory = f", {si(figures['in_memory_bytes'], 'B')} in memory" if figures["in_memory_bytes"] else ""
    rows: Rows = [
        ("", "Estimates, from shapes alone: nothing was measured."),
        ("model", f"a SiT of {figures['parameters']:,} parameters, attention: {', '.join(figures['attention'])}"),
        ("tokens", f"{tokens['grid'][0]} x {tokens['grid'][1]}"),
        ("set", f"{figures['images']:,} {what} of {' x '.join(map(str, figures['shape']))}{in_memory}"),
        ("", f"{figures['classes'] or 'no'} named classes; the steps see each image {number(figures['epochs'])} times"),
        ("flow", flow),
        ("attention", f"{si(attention['softmax'], 'FLOP')} with softmax, {si(attention['own'], 'FLOP')} here"),
        ("", "one forward pass of one image; projections apart"),
        *([("", "MORE than softmax: at this size it does not pay")] if attention["own"] > attention["softmax"] else []),
        ("forward", f"{si(figures['forward_flops'], 'FLOP')} for one image"),
        (
            "step",
            f"{si(figures['step_flops'], 'FLOP')} for {figures['batch_size']} images: forward, backward{recomputed}",
        ),
        *memory_rows(figures["stage_bytes"], words),
        ("", f"not in it: the kernels' workspaces, what the allocator wastes{vae}"),
        *several_rows(figures["several"]),
        ("disk", f"{si(disk['checkpoints'], 'B')} of checkpoints, {si(disk['pipeline'], 'B')} of pipeline/{vae}"),
        ("time", f"{duration(figures['hours']['training'])} for {figures['steps']:,} steps"),
        assumption_row(),
        ("", "not in it: reading the set, sample grids, checkpoints"),
    ]
    return table(rows)
