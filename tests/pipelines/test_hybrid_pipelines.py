"""Whole tiny pipelines of every family: converted, saved, loaded by diffusers' own classes in a new process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import hybriddit
from hybriddit import HybridConfig, hybridize, load_adapter, restore_dense, save_adapter

WORDS = ["a", "red", "blue", "dog", "cat"]
CONFIG = HybridConfig(window=3)


def t5():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    config = T5Config(vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config), T5Tokenizer(vocab=pieces, extra_ids=0)


def clip(model_class=CLIPTextModelWithProjection):
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, **{f"{word}</w>": i + 2 for i, word in enumerate(WORDS)}}
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return model_class(config), CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def vae(shift):
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, shift_factor=shift, scaling_factor=1.0
    )


def flux():
    text, tokenizer = clip(CLIPTextModel)
    text_2, tokenizer_2 = t5()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler, vae(0.0), text, tokenizer, text_2, tokenizer_2, transformer)


def sd3():
    (text, tokenizer), (text_2, tokenizer_2), (text_3, tokenizer_3) = clip(), clip(), t5()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    text_3 = T5EncoderModel(T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    scheduler = FlowMatchEulerDiscreteScheduler()
    return StableDiffusion3Pipeline(
        transformer, scheduler, vae(0.0), text, tokenizer, text_2, tokenizer_2, text_3, tokenizer_3
    )


def pixart():
    text, tokenizer = t5()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(tokenizer, text, vae(None), transformer, DPMSolverMultistepScheduler())


PIPELINES = {"flux": (flux, "Flux"), "sd3": (sd3, "StableDiffusion3"), "pixart": (pixart, "PixArtSigma")}


def build(kind):
    torch.manual_seed(0)
    pipeline = PIPELINES[kind][0]()
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipeline


def generate(pipeline):
    """One picture under classifier-free guidance (FLUX: guidance-distilled), 8 × 12 tokens."""
    extra = {"use_resolution_binning": False, "clean_caption": False} if "PixArt" in type(pipeline).__name__ else {}
    return pipeline(
        "a red dog",
        height=16,
        width=24,
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=8,
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


@pytest.mark.parametrize("kind", PIPELINES)
def test_generation_under_guidance(kind):
    pipeline = build(kind)
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
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
sys.path.insert(0, sys.argv[1])
from test_hybrid_pipelines import PIPELINES, same
torch.set_num_threads(int(sys.argv[3]))
for kind, (_, name) in PIPELINES.items():
    folder = Path(sys.argv[2]) / kind
    weights, expected = torch.load(folder / "images.pt", weights_only=True)
    for loader in (DiffusionPipeline, AutoPipelineForText2Image):
        pipeline = loader.from_pretrained(folder / "pipeline")
        assert type(pipeline).__name__ == name + "Pipeline", type(pipeline)
        assert type(pipeline.transformer).__module__ == "hybriddit"
        same(pipeline, weights, expected)
    print("same")
"""


def test_saved_pipelines_load_in_a_new_process(tmp_path):
    """Saved after an in-place conversion that the pipeline was not told of."""
    for kind in PIPELINES:
        pipeline = build(kind)
        hybridize(pipeline.transformer, CONFIG)
        open_gates(pipeline)
        pipeline.save_pretrained(tmp_path / kind / "pipeline")
        index = json.loads((tmp_path / kind / "pipeline/model_index.json").read_text())
        assert index["transformer"] == ["hybriddit", type(pipeline.transformer).__name__]
        torch.save((pipeline.transformer.state_dict(), generate(pipeline)), tmp_path / kind / "images.pt")
    arguments = [str(Path(__file__).parent), str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"] * 3


@pytest.mark.parametrize("kind", PIPELINES)
def test_hybrid_pipeline_loads_base_and_adapter_in_one_call(kind, tmp_path):
    pipeline = build(kind)
    pipeline.save_pretrained(tmp_path / "base")
    hybridize(pipeline.transformer, CONFIG)
    open_gates(pipeline)
    weights, expected = pipeline.transformer.state_dict(), generate(pipeline)
    save_adapter(pipeline.transformer, tmp_path / "adapter")

    name = PIPELINES[kind][1] + "Pipeline"
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
    assert type(base.transformer) is type(build(kind).transformer)
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        hybrid_class.from_pretrained(tmp_path / "base", adapter=tmp_path / "nowhere")


def test_load_adapter_converts_a_pipeline(tmp_path):
    pipeline = build("flux")
    hybridize(pipeline.transformer, CONFIG)
    save_adapter(open_gates(pipeline).transformer, tmp_path)
    other = build("flux")
    assert load_adapter(other, tmp_path) is other
    assert torch.equal(generate(other), generate(pipeline))
    assert list(other.config["transformer"]) == ["hybriddit", "HybridFluxTransformer2DModel"]
    restore_dense(other.transformer)
    assert list(other.config["transformer"]) == ["diffusers", "FluxTransformer2DModel"]
