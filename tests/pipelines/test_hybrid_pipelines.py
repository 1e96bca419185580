"""Whole tiny pipelines of every family: converted, saved, loaded by diffusers' own classes in a new process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_pipelines import FAMILIES, PROMPTS, of_prompt, tiny_pipeline

import hybriddit
from hybriddit import HybridConfig, hybridize, load_adapter, restore_dense, save_adapter
from hybriddit.models import family_of

CONFIG = HybridConfig(window=3)
PIPELINES = {
    "flux_dev": "FluxPipeline",
    "sd35": "StableDiffusion3Pipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
    "chroma": "ChromaPipeline",
    "qwen_image": "QwenImagePipeline",
    "flux2_dev": "Flux2Pipeline",
    "flux2_klein_base": "Flux2KleinPipeline",
    "z_image": "ZImagePipeline",
    "ovis_image": "OvisImagePipeline",
    "krea2": "Krea2Pipeline",
    "longcat_image": "LongCatImagePipeline",
    "fibo_16": "BriaFiboPipeline",
}


def generate(pipeline):
    """One picture under classifier-free guidance (FLUX: guidance-distilled), 8 × 12 tokens."""
    extra = {"use_resolution_binning": False, "clean_caption": False} if "PixArt" in type(pipeline).__name__ else {}
    extra["true_cfg_scale" if "Qwen" in type(pipeline).__name__ else "guidance_scale"] = 3.0
    return pipeline(
        **of_prompt(pipeline, "a red shoe", 8),
        height=64,
        width=96,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **extra,
    ).images


def open_gates(pipeline):
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if ".hybrid." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return pipeline


def same(pipeline, weights, images):
    """The same weights, bit for bit, and pictures (torch rounds differently over weights mapped from a file)."""
    state = pipeline.transformer.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)
    torch.testing.assert_close(generate(pipeline), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_texts_are_as_long_as_the_pipelines_take(kind):
    """A length that distillation takes is one that the pipeline's own check takes, which it makes before all else."""
    pipeline = tiny_pipeline(kind)
    family = family_of(pipeline.transformer)
    if kind == "longcat_image":  # which takes none at all
        return
    longest = family.longest_text or 5000
    sizes = {"height": 64, "width": 64} | ({"use_resolution_binning": False} if kind == "pixart_sigma" else {})
    assert family.text_length(longest) >= longest
    pipeline.encode_prompt = lambda *args, **kwargs: 1 / 0  # what comes after the check
    with pytest.raises(ZeroDivisionError):
        pipeline(prompt=PROMPTS[0], **sizes, max_sequence_length=longest)
    if family.longest_text:
        with pytest.raises(ValueError, match="max_sequence_length"):
            pipeline(prompt=PROMPTS[0], **sizes, max_sequence_length=longest + 1)
        with pytest.raises(ValueError, match=rf"max_sequence_length of .* is at most {longest}, not {longest + 1}"):
            family.text_length(longest + 1)


@pytest.mark.parametrize("kind", PIPELINES)
def test_generation_under_guidance(kind):
    pipeline = tiny_pipeline(kind)
    dense = generate(pipeline)
    hybridize(pipeline.transformer, HybridConfig(window=12))
    torch.testing.assert_close(generate(pipeline), dense, rtol=0, atol=1e-4)
    open_gates(pipeline)
    assert (generate(pipeline) - dense).abs().max() > 1e-4
    restore_dense(pipeline.transformer)
    assert torch.equal(generate(pipeline), dense)


LOAD = """
import sys, torch
from pathlib import Path
import hybriddit
import diffusers
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/pipelines"]
from test_hybrid_pipelines import PIPELINES, same
torch.set_num_threads(int(sys.argv[3]))
for kind, name in PIPELINES.items():
    folder = Path(sys.argv[2]) / kind
    weights, expected = torch.load(folder / "images.pt", weights_only=True)
    known = name not in ("LongCatImagePipeline", "BriaFiboPipeline")  # to diffusers' AutoPipeline
    for loader in (DiffusionPipeline, AutoPipelineForText2Image if known else getattr(diffusers, name)):
        pipeline = loader.from_pretrained(folder / "pipeline")
        assert type(pipeline).__name__ == name, type(pipeline)
        assert type(pipeline.transformer).__module__ == "hybriddit"
        same(pipeline, weights, expected)
    print("same")
"""


def test_saved_pipelines_load_in_a_new_process(tmp_path):
    """Saved after an in-place conversion that the pipeline was not told of."""
    for kind in PIPELINES:
        pipeline = tiny_pipeline(kind)
        hybridize(pipeline.transformer, CONFIG)
        open_gates(pipeline)
        pipeline.save_pretrained(tmp_path / kind / "pipeline")
        index = json.loads((tmp_path / kind / "pipeline/model_index.json").read_text())
        assert index["transformer"] == ["hybriddit", type(pipeline.transformer).__name__]
        torch.save((pipeline.transformer.state_dict(), generate(pipeline)), tmp_path / kind / "images.pt")
    arguments = [str(Path(__file__).parents[1]), str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"] * len(PIPELINES)


@pytest.mark.parametrize("kind", PIPELINES)
def test_hybrid_pipeline_loads_base_and_adapter_in_one_call(kind, tmp_path):
    pipeline = tiny_pipeline(kind)
    pipeline.save_pretrained(tmp_path / "base")
    hybridize(pipeline.transformer, CONFIG)
    open_gates(pipeline)
    weights, expected = pipeline.transformer.state_dict(), generate(pipeline)
    save_adapter(pipeline.transformer, tmp_path / "adapter")

    name = PIPELINES[kind]
    hybrid_class = getattr(hybriddit, f"Hybrid{name}")
    loaded = hybrid_class.from_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
    assert type(loaded) is hybrid_class
    same(loaded, weights, expected)
    assert type(loaded.transformer) is type(pipeline.transformer)
    # saved whole, under the name that diffusers knows
    loaded.save_pretrained(tmp_path / "whole")
    index = json.loads((tmp_path / "whole/model_index.json").read_text())
    assert index["_class_name"] == name
    assert index["transformer"] == ["hybriddit", type(pipeline.transformer).__name__]
    again = hybrid_class.from_pretrained(tmp_path / "whole")
    same(again, weights, expected)
    # without an adapter it is the base
    base = hybrid_class.from_pretrained(tmp_path / "base")
    assert type(base.transformer) is type(tiny_pipeline(kind).transformer)
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        hybrid_class.from_pretrained(tmp_path / "base", adapter=tmp_path / "nowhere")


def test_load_adapter_converts_a_pipeline(tmp_path):
    pipeline = tiny_pipeline("flux_dev")
    hybridize(pipeline.transformer, CONFIG)
    save_adapter(open_gates(pipeline).transformer, tmp_path)
    other = tiny_pipeline("flux_dev")
    assert load_adapter(other, tmp_path) is other
    assert torch.equal(generate(other), generate(pipeline))
    assert list(other.config["transformer"]) == ["hybriddit", "HybridFluxTransformer2DModel"]
    restore_dense(other.transformer)
    assert list(other.config["transformer"]) == ["diffusers", "FluxTransformer2DModel"]
