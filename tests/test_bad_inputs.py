"""What users get wrong, through the public functions and the command line: one clear line each, and no file harmed.

Each row prepares its mistake in a copy of a small world (pipelines, an adapter, a run, a cache, images) and returns what
a user would then do; the files that are there at that moment must be there, the same, afterwards.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import PROMPTS, TEXT_LENGTH, tiny_pipeline

from hybriddit import HybridConfig, SiTPipeline, SiTTransformer2DModel, hybridize, load_adapter, save_adapter
from hybriddit.attention import linear_attention, neighborhood_attention
from hybriddit.cli import main
from hybriddit.training.run_config import load_config

ROWS = {}


def bad(match):
    """A row of the table: its message must match."""

    def add(function):
        ROWS[function.__name__.replace("_", " ")] = (function, match)
        return function

    return add


def cli(*arguments):
    """The command line in this process; what it says at the end is raised, as a function's error would be."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(argument) for argument in arguments])
    lines = [line for line in said.getvalue().splitlines() if line.startswith("hybriddit: ")]
    assert code == 1 and len(lines) == 1, said.getvalue()
    raise ValueError(lines[0].removeprefix("hybriddit: "))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for family in ("flux_dev", "sd3", "pixart_sigma"):
        tiny_pipeline(family).save_pretrained(folder / family)
    model = hybridize(tiny_pipeline("flux_dev").transformer, HybridConfig(window=3, map_rank=4))
    save_adapter(model, folder / "adapter")
    sit = SiTTransformer2DModel(2, 8, in_channels=3, num_layers=1, sample_size=8, num_classes=2)
    SiTPipeline(sit, id2label={0: "bag", 1: "shoe"}).save_pretrained(folder / "sit" / "pipeline")
    (folder / "images").mkdir()
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(folder / "images" / "a.png")
    (folder / "images" / "a.txt").write_text("a red shoe")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    write_config(folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(folder):
        assert main(["distill", "run.yaml", *folders()]) == 0
    return folder


def write_config(folder):
    (folder / "run.yaml").write_text(f"""
hybrid: {{window: 3, map_rank: 4}}
data: {{images: 2, height: 64, width: 64, steps: 1, max_sequence_length: {TEXT_LENGTH}}}
train: {{steps: 2, batch_size: 2, progress: false}}
output: {{checkpoint_every: 1}}
""")


def folders(run="run"):
    """The config's paths, relative."""
    return ["model.path=flux_dev", "data.prompts=prompts.txt", "data.cache=cache", f"output.folder={run}"]


@pytest.fixture
def world(original, tmp_path, monkeypatch):
    folder = tmp_path / "world"
    shutil.copytree(original, folder)
    monkeypatch.chdir(folder)
    return SimpleNamespace(
        folder=folder,
        config=folder / "run.yaml",
        distill=lambda *more, run="new": lambda: cli("distill", folder / "run.yaml", *folders(run), *more),
        generate=lambda *more: (
            lambda: cli(
                "generate", "--model", folder / "flux_dev", "--prompt", "a shoe", "--out", folder / "out.png", *more
            )
        ),
        generate_class=lambda label, *more: (
            lambda: cli(
                "generate", "--model", folder / "sit", "--class-label", label, "--out", folder / "out.png", *more
            )
        ),
    )


def contents(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).rglob("*") if path.is_file()}


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncate":
        data = data[: len(data) * 2 // 3]
    elif how == "flip":
        data[-5] ^= 4
    path.write_bytes(data)


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flux(**config):
    return hybridize(tiny_pipeline("flux_dev").transformer, HybridConfig(**{"window": 3, **config}))


def qkv(*shape, dtype=torch.float32):
    return [torch.randn(*shape, dtype=dtype) for _ in range(3)]


# attention


@bad(r"share one shape")
def attention_of_other_shapes(w):
    q, k, v = qkv(1, 4, 4, 2, 8)
    return lambda: neighborhood_attention(q, k[:, :3], v, window=3)


@bad(r"\[B, H, W, heads, D\]")
def attention_without_a_grid(w):
    return lambda: neighborhood_attention(*qkv(1, 16, 2, 8), window=3)


@bad(r"one dtype")
def attention_of_mixed_dtypes(w):
    q, k, v = qkv(1, 4, 4, 2, 8)
    return lambda: neighborhood_attention(q, k.double(), v, window=3)


@bad(r"floating-point")
def attention_of_integers(w):
    return lambda: neighborhood_attention(*(x.int() for x in qkv(1, 4, 4, 2, 8)), window=3)


@bad(r"window must be an int of at least 1")
def attention_window_0(w):
    return lambda: neighborhood_attention(*qkv(1, 4, 4, 2, 8), window=0)


@bad(r"window must be an int")
def attention_window_of_three_sides(w):
    return lambda: neighborhood_attention(*qkv(1, 4, 4, 2, 8), window=(3, 3, 3))


@bad(r"stride \(4, 4\) is larger than window")
def attention_stride_above_window(w):
    return lambda: neighborhood_attention(*qkv(1, 4, 4, 2, 8), window=3, stride=4)


@bad(r"dilation must be an int of at least 1")
def attention_dilation_negative(w):
    return lambda: neighborhood_attention(*qkv(1, 4, 4, 2, 8), window=3, dilation=-1)


@bad(r"come together")
def attention_text_key_alone(w):
    return lambda: neighborhood_attention(*qkv(1, 4, 4, 2, 8), window=3, text_key=torch.randn(1, 2, 2, 8))


@bad(r"text_key and text_value must be \[1, S, 2, 8\]")
def attention_text_of_other_heads(w):
    text = torch.randn(1, 2, 3, 8)
    return lambda: neighborhood_attention(*qkv(1, 4, 4, 2, 8), window=3, text_key=text, text_value=text)


@bad(r"unknown window attention backend 'cudnn'")
def attention_backend_unknown(w):
    return lambda: neighborhood_attention(*qkv(1, 4, 4, 2, 8), window=3, backend="cudnn")


@bad(r"natten.* cannot run this")
def attention_backend_that_is_not_here(w):
    return lambda: neighborhood_attention(*qkv(1, 4, 4, 2, 8), window=3, backend="natten")


@bad(r"unknown linear attention backend .fast.: use")
def linear_backend_unknown(w):
    return lambda: linear_attention(*qkv(1, 16, 2, 8), backend="fast")


@bad(r"must agree in batch, heads and width")
def linear_attention_of_other_heads(w):
    q, k, v = qkv(1, 16, 2, 8)
    return lambda: linear_attention(q, k[:, :, :1], v)


# conversion


@bad(r"is not supported")
def a_model_of_no_family(w):
    return lambda: hybridize(torch.nn.Linear(2, 2), HybridConfig())


@bad(r"pass its \.transformer")
def a_pipeline_instead_of_its_transformer(w):
    return lambda: hybridize(tiny_pipeline("sd3"), HybridConfig())


@bad(r"hybrid already")
def a_model_converted_twice(w):
    return lambda: hybridize(flux(), HybridConfig(window=3))


@bad(r"window must be a positive integer")
def a_config_window_of_0(w):
    return lambda: HybridConfig(window=0)


@bad(r"stride 5 is larger than window 3")
def a_config_stride_above_its_window(w):
    return lambda: HybridConfig(window=3, stride=5)


@bad(r"unknown gate 'tokens'")
def a_config_gate_that_is_none(w):
    return lambda: HybridConfig(gate="tokens")


@bad(r"leaves no attention")
def a_config_without_attention(w):
    return lambda: HybridConfig(window=None, linear=False)


@bad(r"unknown layer kind 'sparse'")
def a_config_layer_kind_unknown(w):
    return lambda: HybridConfig(layers={"*": "sparse"})


@bad(r"transfomer_blocks")
def a_layer_pattern_that_matches_nothing(w):
    return lambda: flux(layers={"transfomer_blocks.*": "dense"})


@bad(r"map_rank must be a positive integer")
def a_rank_of_half(w):
    return lambda: HybridConfig(map_rank=0.5)


@bad(r"no plan file")
def a_plan_that_is_not_there(w):
    return lambda: HybridConfig.from_plan(w.folder / "plan.yaml")


@bad(r"did you mean 'window'")
def a_plan_with_a_misspelt_field(w):
    (w.folder / "plan.yaml").write_text("windw: 3\n")
    return lambda: HybridConfig.from_plan(w.folder / "plan.yaml")


@bad(r"img_ids do not describe whole image grids")
def ids_that_are_no_grid(w):
    model = flux()
    ids = torch.zeros(7, 3)
    ids[:, 1] = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    call = {"timestep": torch.ones(1), "guidance": torch.ones(1), "pooled_projections": torch.randn(1, 8)}
    call |= {"img_ids": ids, "txt_ids": torch.zeros(2, 3), "encoder_hidden_states": torch.randn(1, 2, 16)}
    return lambda: model(torch.randn(1, 7, 16), **call)


@bad(r"not hybrid")
def saving_an_adapter_of_a_dense_model(w):
    return lambda: save_adapter(tiny_pipeline("sd3").transformer, w.folder / "adapter")


# adapters


@bad(r"no adapter folder")
def an_adapter_that_is_not_there(w):
    return lambda: load_adapter(tiny_pipeline("flux_dev"), w.folder / "none")


@bad(r"has no hybrid_adapter.safetensors")
def an_adapter_without_weights(w):
    (w.folder / "adapter" / "hybrid_adapter.safetensors").unlink()
    return lambda: load_adapter(tiny_pipeline("flux_dev"), w.folder / "adapter")


@bad(r"damaged or no safetensors file.*save or fetch it anew")
def an_adapter_cut_short(w):
    damage(w.folder / "adapter" / "hybrid_adapter.safetensors", "truncate")
    return lambda: load_adapter(tiny_pipeline("flux_dev"), w.folder / "adapter")


@bad(r"damaged \(its checksum does not match\): save or fetch it anew")
def an_adapter_with_a_flipped_bit(w):
    damage(w.folder / "adapter" / "hybrid_adapter.safetensors", "flip")
    return lambda: load_adapter(tiny_pipeline("flux_dev"), w.folder / "adapter")


@bad(r"damaged or no safetensors file")
def an_adapter_that_is_a_pickle(w):
    path = w.folder / "adapter" / "hybrid_adapter.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not the mapped file itself
    torch.save(tensors, path)
    return lambda: load_adapter(tiny_pipeline("flux_dev"), w.folder / "adapter")


@bad(r"is for FluxTransformer2DModel, the model is a SD3Transformer2DModel")
def an_adapter_of_another_family(w):
    return lambda: load_adapter(tiny_pipeline("sd3"), w.folder / "adapter")


@bad(r"does not fit this model")
def an_adapter_of_another_size(w):
    small = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    return lambda: load_adapter(small, w.folder / "adapter")


@bad(r"hybrid with another config")
def an_adapter_of_another_config(w):
    return lambda: load_adapter(flux(window=5), w.folder / "adapter")


@bad(r"hybrid with another config than")
def an_adapter_of_another_feature_map(w):
    return lambda: load_adapter(flux(feature_map="elu"), w.folder / "adapter")


@bad(r"does not fit this model: .*projection_k is \(.*\), the model's is \(")
def an_adapter_whose_config_names_another_feature_map(w):
    change_json(w.folder / "adapter" / "hybrid_config.json", feature_map="hedgehog")
    return lambda: load_adapter(tiny_pipeline("flux_dev"), w.folder / "adapter")


@bad(r"no adapter config: unknown feature map 'exp': use one of elu, hedgehog, polynomial")
def an_adapter_config_with_a_feature_map_that_is_none(w):
    change_json(w.folder / "adapter" / "hybrid_config.json", feature_map="exp")
    return lambda: load_adapter(tiny_pipeline("flux_dev"), w.folder / "adapter")


@bad(r"no adapter config")
def an_adapter_config_that_is_no_json(w):
    (w.folder / "adapter" / "hybrid_config.json").write_text("{window: 3")
    return lambda: load_adapter(tiny_pipeline("flux_dev"), w.folder / "adapter")


@bad(r"unknown field 'dilations'")
def an_adapter_config_of_a_newer_version(w):
    path = w.folder / "adapter" / "hybrid_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dilations": 3}))
    return lambda: load_adapter(tiny_pipeline("flux_dev"), w.folder / "adapter")


# configs


@bad(r"no config file at")
def a_config_file_that_is_not_there(w):
    return lambda: load_config(w.folder / "none.yaml")


@bad(r"not valid YAML")
def a_config_file_that_is_no_yaml(w):
    w.config.write_text("model: [a\n")
    return lambda: load_config(w.config)


@bad(r"unknown key optim.learning_rate|unknown key optim.l_r")
def a_misspelt_key(w):
    return lambda: load_config(w.config, ["optim.l_r=1"])


@bad(r"train.steps")
def a_value_of_another_type(w):
    return lambda: load_config(w.config, ["train.steps=many"])


@bad(r"train.steps.*at least 1")
def no_steps(w):
    return lambda: load_config(w.config, ["train.steps=0"])


@bad(r"optim.ema_decay")
def an_average_that_never_moves(w):
    return lambda: load_config(w.config, ["optim.ema_decay=1"])


@bad(r"optim.lr must be a finite number, got inf")
def an_endless_learning_rate(w):
    return lambda: load_config(w.config, ["optim.lr=.inf"])


@bad(r"data.guidance_scale must be a finite number, got nan")
def guidance_that_is_no_number(w):
    return lambda: load_config(w.config, ["data.guidance_scale=.nan"])


@bad(r"optim.warmup_steps must be 0 or more, got -5")
def a_negative_warm_up(w):
    return lambda: load_config(w.config, ["optim.warmup_steps=-5"])


@bad(r"optim.weight_decay must be 0 or more, got -1.0")
def weights_that_grow_by_themselves(w):
    return lambda: load_config(w.config, ["optim.weight_decay=-1"])


@bad(r"train.seed must be between")
def a_seed_that_no_generator_takes(w):
    return lambda: load_config(w.config, ["train.seed=99999999999999999999"])


@bad(r"data.max_sequence_length must be at least 1, got -4")
def a_text_of_less_than_nothing(w):
    return lambda: load_config(w.config, ["data.max_sequence_length=-4"])


@bad(r"flow.time_mean must be a finite number, got nan")
def times_that_are_no_numbers(w):
    w.config.write_text("job: train\n")
    return lambda: load_config(w.config, ["flow.time_mean=.nan"])


@bad(r"output.guidance must be 0 or more, got -2.0")
def a_sample_grid_with_negative_guidance(w):
    w.config.write_text("job: train\n")
    return lambda: load_config(w.config, ["output.guidance=-2"])


@bad(r"not of the form section.key=value")
def an_override_without_a_value(w):
    return lambda: load_config(w.config, ["optim.lr"])


@bad(r"data.source")
def a_source_that_is_none(w):
    return lambda: load_config(w.config, ["data.source=web"])


@bad(r"data.folder")
def a_folder_source_without_a_folder(w):
    return lambda: load_config(w.config, ["data.source=folder"])


# distillation


@bad(r"no diffusers pipeline at")
def a_teacher_that_is_not_there(w):
    return w.distill("model.path=/nowhere")


@bad(r"recipe 'sd3' is for a StableDiffusion3Pipeline")
def a_recipe_of_another_family(w):
    return w.distill("model.recipe=sd3")


@bad(r"unknown mixer 'mamba': use one of linear")
def a_mixer_that_is_none(w):
    return w.distill("hybrid.mixer=mamba", "model.path=/nowhere")  # told before the teacher is looked for


@bad(r"unknown feature map 'exp': use one of elu")
def a_feature_map_that_is_none(w):
    return w.distill("hybrid.feature_map=exp", "model.path=/nowhere")


@bad(r'loss.window_dropout needs layers of kind "hybrid": set it to 0')
def window_dropout_without_windows(w):
    return w.distill("loss.window_dropout=0.1", "hybrid.window=null")


@bad(r"feature map 'polynomial' does not take a projection of 22 channels: use a projection of at most 21")
def a_projection_too_wide_for_its_feature_map(w):
    return w.distill("hybrid.feature_map=polynomial", "hybrid.projection=22", "model.path=/nowhere")


@bad(r"mixer \"linfusion\" has projection 0, not 16: leave projection out, or use mixer \"linear\"")
def linfusion_with_a_projection(w):
    return w.distill("hybrid.mixer=linfusion", "hybrid.projection=16")


@bad(r"rotary 'model': Stable Diffusion 3 has no rotary embedding: use 'axial', 'none' or 'auto'")
def positions_of_a_model_that_has_none(w):
    return lambda: hybridize(tiny_pipeline("sd3").transformer, HybridConfig(window=3, rotary="model"))


@bad(r"feature map 'polynomial' does not take heads of 32 without projection: use a projection of at most 21")
def a_feature_map_too_wide_for_the_heads(w):
    config = HybridConfig(window=3, feature_map="polynomial", projection=0)
    sizes = {"num_layers": 1, "num_single_layers": 0, "attention_head_dim": 32, "num_attention_heads": 1}
    model = FluxTransformer2DModel(**sizes, joint_attention_dim=8, axes_dims_rope=(8, 12, 12))
    return lambda: hybridize(model, config)


@bad(r"unknown feature map 'exp': use one of elu")
def a_plan_with_a_feature_map_that_is_none(w):
    (w.folder / "plan.yaml").write_text("feature_map: exp\n")
    return lambda: cli(
        "convert", "--model", "/nowhere", "--plan", w.folder / "plan.yaml", "--out", w.folder / "converted"
    )


@bad(r"no prompt file")
def a_prompt_file_that_is_not_there(w):
    return w.distill(f"data.prompts={w.folder / 'none.txt'}")


@bad(r"no prompt")
def a_prompt_file_of_blank_lines(w):
    (w.folder / "prompts.txt").write_text("\n  \n")
    return w.distill()


@bad(r"prompts.txt is no UTF-8 text.*save it as UTF-8")
def a_prompt_file_in_another_encoding(w):
    (w.folder / "prompts.txt").write_bytes("un sac bleu cassé".encode("latin-1"))
    return w.distill()


@bad(r"may not all be 0")
def weights_that_train_nothing(w):
    return w.distill("loss.task=0", "loss.output=0", "loss.layer=0")


@bad(r"nothing to train")
def a_student_without_weights(w):
    return w.distill("hybrid.linear=false")


@bad(r"height")
def a_height_of_half_a_token(w):
    return w.distill("data.height=60")


@bad(r"holds a run already")
def a_run_written_over(w):
    return w.distill(run="run")


@bad(r"nothing to resume")
def a_resume_of_nothing(w):
    return w.distill("--resume")


@bad(r"other values of hybrid.window")
def a_resume_with_another_window(w):
    return w.distill("hybrid.window=5", "train.steps=3", "--resume", run="run")


@bad(r"is damaged")
def a_checkpoint_cut_short(w):
    damage(w.folder / "run" / "checkpoints" / "step-00000002" / "state.safetensors", "truncate")
    return w.distill("train.steps=3", "--resume", run="run")


@bad(r"is damaged.*checksum")
def a_checkpoint_with_a_flipped_bit(w):
    damage(w.folder / "run" / "checkpoints" / "step-00000002" / "state.safetensors", "flip")
    return w.distill("train.steps=3", "--resume", run="run")


@bad(r"is damaged")
def a_checkpoint_without_its_state(w):
    (w.folder / "run" / "checkpoints" / "step-00000002" / "state.json").unlink()
    return w.distill("train.steps=3", "--resume", run="run")


@bad(r"damaged.*delete it and run again")
def cached_latents_with_a_flipped_bit(w):
    damage(w.folder / "cache" / "latents-00000-00002.safetensors", "flip")
    return w.distill()


@bad(r"damaged.*delete it and run again")
def cached_latents_cut_short(w):
    damage(w.folder / "cache" / "latents-00000-00002.safetensors", "truncate")
    return w.distill()


@bad(r"made with other values of seed")
def a_cache_made_with_another_seed(w):
    return w.distill("data.seed=7")


@bad(r"made with other values of prompts \(image 0 is of 'a red shoe', and would be of 'a bag'\)")
def a_cache_of_other_prompts(w):
    return w.distill("data.prompts=[a bag]")


@bad(r"pictures.json is damaged .*delete it and run again")
def a_cache_of_images_whose_list_is_damaged(w):
    (w.folder / "other").mkdir()
    (w.folder / "other" / "pictures.json").write_text('{"a.png": [1]}')
    return w.distill("data.source=folder", f"data.folder={w.folder / 'images'}", "data.cache=other")


@bad(r"data.json")
def a_cache_whose_description_is_damaged(w):
    (w.folder / "cache" / "data.json").write_text("{")
    return w.distill()


@bad(r"state-of-cache is a file: give a folder")
def a_cache_that_is_a_file(w):
    (w.folder / "state-of-cache").write_text("mine")
    return w.distill("data.cache=state-of-cache")


@bad(r"notes is a file: notes.run cannot be made in it")
def an_output_folder_inside_a_file(w):
    (w.folder / "notes").write_text("mine")
    return w.distill(run="notes/run")


@bad(r"is damaged \(state.json holds no step and settings\): delete it")
def a_checkpoint_whose_settings_are_a_list(w):
    path = w.folder / "run" / "checkpoints" / "step-00000002" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings": [1]}))
    return w.distill("train.steps=3", "--resume", run="run")


@bad(r"metrics.features: os:getcwd fails on uint8 \[2, 3, 64, 64\] \(TypeError: .*takes no arguments")
def features_that_take_no_images(w):
    return w.distill("metrics.every=1", "metrics.samples=2", "metrics.features=os:getcwd")


@bad(r"metrics.features: builtins:len gives int for 2 images, and not \[B, F\]")
def features_that_are_no_tensor(w):
    return w.distill("metrics.every=1", "metrics.samples=2", "metrics.features=builtins:len")


@bad(r"no image folder")
def an_image_folder_that_is_not_there(w):
    return w.distill("data.source=folder", f"data.folder={w.folder / 'none'}")


@bad(r"none of the 1 images in images has a caption")
def a_folder_without_captions(w):
    (w.folder / "images" / "a.txt").unlink()
    return lambda: cli(
        "distill", "run.yaml", *folders(), "data.source=folder", "data.folder=images", "output.folder=new"
    )


@bad(r"none of the 1 images in images has a caption")
def a_folder_without_captions_in_a_dry_run(w):
    (w.folder / "images" / "a.txt").unlink()
    return lambda: cli("distill", "run.yaml", *folders(), "data.source=folder", "data.folder=images", "--dry-run")


@bad(r"no images in")
def an_image_folder_without_images(w):
    (w.folder / "images" / "a.png").unlink()
    return w.distill("data.source=folder", f"data.folder={w.folder / 'images'}")


@bad(r"none of the 1 images")
def an_image_folder_of_unreadable_images(w):
    damage(w.folder / "images" / "a.png", "truncate")
    return w.distill("data.source=folder", f"data.folder={w.folder / 'images'}", f"data.cache={w.folder / 'other'}")


@bad(r"output.folder|is a file|[Nn]ot a directory|[Ff]ile exists")
def an_output_folder_that_is_a_file(w):
    (w.folder / "new").write_text("mine")
    return w.distill()


@bad(r"not finite")
def a_teacher_of_nans(w):
    path = next((w.folder / "flux_dev" / "transformer").glob("*.safetensors"))
    weights = load_file(path)
    weights["proj_out.weight"].fill_(float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    return w.distill(f"data.cache={w.folder / 'other'}")


# generation and the other commands


@bad(r"no diffusers pipeline at")
def generating_from_nothing(w):
    return lambda: cli("generate", "--model", w.folder / "none", "--prompt", "a", "--out", w.folder / "out.png")


@bad(r"does not load")
def a_pipeline_with_truncated_weights(w):
    damage(next((w.folder / "flux_dev" / "transformer").glob("*.safetensors")), "truncate")
    return w.generate()


@bad(r"lacks the folder of its text_encoder")
def a_pipeline_without_its_text_encoder(w):
    shutil.rmtree(w.folder / "flux_dev" / "text_encoder")
    return w.generate()


@bad(r"does not load|model_index.json")
def a_pipeline_whose_index_is_no_json(w):
    (w.folder / "flux_dev" / "model_index.json").write_text("{")
    return w.generate()


@bad(r"steps must be 1 or more")
def no_sampler_steps(w):
    return w.generate("--steps", "0")


@bad(r"height")
def a_height_the_model_cannot_take(w):
    return w.generate("--height", "50", "--width", "64")


@bad(r"num_images must be 1 or more")
def no_images(w):
    return w.generate("--num-images", "0")


@bad(r"seeds go from 0")
def a_negative_seed(w):
    return w.generate("--seed", "-1")


@bad(r"must end in .png")
def an_image_of_another_kind(w):
    return w.generate("--out", w.folder / "out.jpg")


@bad(r"is a folder")
def an_image_file_that_is_a_folder(w):
    (w.folder / "out.png").mkdir()
    return w.generate()


@bad(r"no image file")
def an_initial_image_that_is_not_there(w):
    return w.generate("--image", w.folder / "none.png")


@bad(r"damaged or no image")
def an_initial_image_that_is_unreadable(w):
    damage(w.folder / "images" / "a.png", "truncate")
    return w.generate("--image", w.folder / "images" / "a.png")


@bad(r"strength must be above 0")
def a_strength_above_1(w):
    return w.generate("--image", w.folder / "images" / "a.png", "--strength", "1.5")


@bad(r"diffusers has no image-to-image for a PixArtSigmaPipeline")
def an_initial_image_for_pixart(w):
    return w.generate("--model", w.folder / "pixart_sigma", "--image", w.folder / "images" / "a.png")


@bad(r"is for FluxTransformer2DModel")
def generating_with_a_foreign_adapter(w):
    return w.generate("--model", w.folder / "sd3", "--adapter", w.folder / "adapter")


@bad(r"empty|not empty|exists")
def converting_over_what_is_there(w):
    return lambda: cli("convert", "--model", w.folder / "flux_dev", "--out", w.folder / "adapter")


@bad(r"window must be a positive integer")
def converting_to_a_window_of_0(w):
    return lambda: cli("convert", "--model", w.folder / "flux_dev", "--window", "0", "--out", w.folder / "hybrid")


@bad(r"no .*none|there is no")
def info_about_nothing(w):
    return lambda: cli("info", w.folder / "none")


@bad(r"index.json is damaged: it says of no weights which file holds them")
def info_about_weights_whose_index_is_a_list(w):
    (w.folder / "sd3" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        '{"weight_map": ["a.safetensors"]}'
    )
    return lambda: cli("info", w.folder / "sd3")


@bad(r"notes is a file: .*notes/hybrid cannot be made in it")
def converting_into_a_file(w):
    (w.folder / "notes").write_text("mine")
    return lambda: cli("convert", "--model", w.folder / "flux_dev", "--out", w.folder / "notes" / "hybrid")


@bad(r"no AutoencoderKL at .*: it is a FluxTransformer2DModel")
def a_cache_by_what_is_no_vae(w):
    vae = w.folder / "flux_dev" / "transformer"
    return lambda: cli("cache", w.folder / "images", "--vae", vae, "--out", w.folder / "latents")


@bad(r"would be a class, as every subfolder of .* is: give another folder")
def a_cache_that_would_become_a_class(w):
    classes = w.folder / "classes"
    shutil.copytree(w.folder / "images", classes / "shoe")
    return lambda: cli("cache", classes, "--size", "8", "--out", classes / "cache")


@bad(r"rtol must be a number above 0, not -1.0")
def a_tolerance_below_0(w):
    how = ["--random", "--num", "1", "--sampler", "dopri5", "--rtol", "-1", "--quiet"]
    return lambda: cli("sample", w.folder / "sit", *how, "--out", w.folder / "samples.npz")


@bad(r"checksum")
def info_about_a_damaged_adapter(w):
    damage(w.folder / "adapter" / "hybrid_adapter.safetensors", "flip")
    return lambda: cli("info", w.folder / "adapter")


@bad(r"damaged")
def info_about_an_adapter_cut_short(w):
    damage(w.folder / "adapter" / "hybrid_adapter.safetensors", "truncate")
    return lambda: cli("info", w.folder / "adapter")


# SiT's folders, of a run (sit/) and of the model alone, where another kind is wanted, and the other way round

TEXT_TO_IMAGE = r"which makes images of classes \(hybriddit generate --class-label\).*for text-to-image pipelines"


@bad(r"sit' is a SiTPipeline, " + TEXT_TO_IMAGE)
def a_prompt_for_a_sit(w):
    return w.generate("--model", w.folder / "sit")


@bad(r"transformer' is a SiTTransformer2DModel, " + TEXT_TO_IMAGE)
def a_prompt_for_a_bare_sit(w):
    return w.generate("--model", w.folder / "sit" / "pipeline" / "transformer")


@bad(r"is a SiTPipeline, " + TEXT_TO_IMAGE)
def converting_a_sit(w):
    return lambda: cli("convert", "--model", w.folder / "sit" / "pipeline", "--out", w.folder / "hybrid")


@bad(r"is a SiTTransformer2DModel, " + TEXT_TO_IMAGE)
def converting_a_bare_sit(w):
    model = w.folder / "sit" / "pipeline" / "transformer"
    return lambda: cli("convert", "--model", model, "--out", w.folder / "hybrid")


@bad(r"is a SiTPipeline, " + TEXT_TO_IMAGE)
def distilling_a_sit(w):
    return w.distill("model.path=sit")


@bad(r"is a SiTTransformer2DModel, " + TEXT_TO_IMAGE)
def a_dry_run_of_a_bare_sit(w):
    return w.distill("model.path=sit/pipeline/transformer", "--dry-run")


@bad(r"is a SiTTransformer2DModel, not a SiTPipeline: save one with SiTPipeline")
def a_class_of_a_bare_sit(w):
    return w.generate_class("shoe", "--model", w.folder / "sit" / "pipeline" / "transformer")


@bad(r"is a FluxPipeline, not a SiTPipeline: it takes no class labels, give generate a --prompt")
def a_class_for_flux(w):
    return w.generate_class("shoe", "--model", w.folder / "flux_dev")


@bad(r"is a StableDiffusion3Pipeline, not a SiTPipeline")
def a_class_for_sd3(w):
    return w.generate_class("shoe", "--model", w.folder / "sd3")


@bad(r"is a PixArtSigmaPipeline, not a SiTPipeline")
def a_class_for_pixart(w):
    return w.generate_class("shoe", "--model", w.folder / "pixart_sigma")


@bad(r"unknown class 'shoo': did you mean 'shoe'")
def a_class_that_is_none(w):
    return w.generate_class("shoo")


@bad(r"class labels are 0 to 1, got 2")
def a_class_beyond_the_last(w):
    return w.generate_class("0", "--class-label", "2")


@bad(r"unknown sampler 'ddim': choose from euler, heun, dopri5, sde-euler, sde-heun")
def a_sampler_that_is_none(w):
    return w.generate_class("shoe", "--sampler", "ddim")


@bad(r"sampler has no meaning with a prompt")
def a_sampler_for_a_prompt(w):
    return w.generate("--sampler", "euler")


@bad(r"negative_prompt has no meaning with a class label")
def a_negative_prompt_for_a_class(w):
    return w.generate_class("shoe", "--negative-prompt", "a bag")


@bad(r"image has no meaning with a class label")
def an_initial_image_for_a_class(w):
    return w.generate_class("shoe", "--image", w.folder / "images" / "a.png")


@bad(r"an adapter has no meaning with a class label")
def an_adapter_for_a_class(w):
    return w.generate_class("shoe", "--adapter", w.folder / "adapter")


@bad(r"width 7 is no multiple of 2")
def a_width_the_sit_cannot_take(w):
    return w.generate_class("shoe", "--width", "7")


@bad(r"config.json holds no config of a SiT: unknown attention 'far'")
def info_about_a_sit_of_no_kind(w):
    path = w.folder / "sit" / "pipeline" / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention": "far"}))
    return lambda: cli("info", w.folder / "sit")


@bad(r"processor")
def a_processor_replaced_behind_our_back(w):
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    pipeline = load_adapter(DiffusionPipeline.from_pretrained(w.folder / "flux_dev"), w.folder / "adapter")
    for module in pipeline.transformer.modules():
        if hasattr(module, "processor"):
            module.processor = FluxAttnProcessor()
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline("a", height=64, width=64, num_inference_steps=1, max_sequence_length=TEXT_LENGTH)


def test_the_table_is_long_enough():
    assert len(ROWS) >= 60


@pytest.mark.parametrize("row", ROWS)
def test_one_clear_line_and_no_file_harmed(row, world):
    function, match = ROWS[row]
    act = function(world)
    before = contents(world.folder)
    kinds = (ValueError, TypeError, OSError, NotImplementedError, FloatingPointError)
    with pytest.raises(kinds) as caught:
        act()
    said = str(caught.value)
    assert "\n" not in said and 20 < len(said) < 600, said
    assert re.search(match, said), said
    after = contents(world.folder)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if path.name.endswith(".tmp")]


def test_the_world_itself_is_right(world):
    """The same calls without the mistakes go well: no row is refused for a reason of its own."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["distill", str(world.config), *folders("new")]) == 0
        assert main(["distill", str(world.config), *folders(), "train.steps=3", "--resume"]) == 0
        model = ["--model", str(world.folder / "flux_dev"), "--adapter", str(world.folder / "adapter")]
        size = ["--height", "64", "--width", "64", "--steps", "1", "--max-sequence-length", str(TEXT_LENGTH)]
        out = ["--prompt", "a red shoe", "--out", str(world.folder / "out.png")]
        assert main(["generate", *model, *size, *out]) == 0
        sit = ["--model", str(world.folder / "sit"), "--class-label", "shoe", "--out", str(world.folder / "shoe.png")]
        assert main(["generate", *sit, "--steps", "1"]) == 0
