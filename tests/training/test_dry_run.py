"""What a dry run tells, against the run itself and against published sizes; that it needs no weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_pipelines import FAMILIES, TEXT_LENGTH, tiny_data, tiny_pipeline
from torch.utils.flop_counter import FlopCounterMode

from hybriddit.attention import TokenLayout
from hybriddit.cli import main
from hybriddit.data.teacher_images import sample
from hybriddit.models import families
from hybriddit.models.flops import attention_flops
from hybriddit.models.peak import _Held
from hybriddit.training.distill import distill
from hybriddit.training.dry_run import dry_run, plan_model, report
from hybriddit.training.estimates import THROUGHPUT
from hybriddit.training.run_config import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config_of(tmp_path):
    """family -> the config of a run on a tiny pipeline, saved beside it."""

    def write(family):
        pipeline = tiny_pipeline(family)
        pipeline.save_pretrained(tmp_path / "teacher")
        path = tmp_path / "run.yaml"
        path.write_text(f"""
model: {{path: {tmp_path / "teacher"}}}
hybrid: {{window: 3, map_rank: 4, delta_rank: 2}}
data: {{prompts: [a shoe], images: 3, height: 64, width: 64, steps: 5, max_sequence_length: {TEXT_LENGTH}}}
train: {{steps: 1, batch_size: 4, accumulation: 2, progress: false}}
output: {{folder: {tmp_path / "run"}, checkpoint_every: 0}}
""")
        return path, pipeline

    return write


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        *((family, False) for family in FAMILIES if family not in ("longcat_image", "fibo")),
        ("sd35", True),
        ("flux_dev", True),
    ],
)
def test_figures_are_those_of_the_run(family, checkpointing, config_of):
    path, pipeline = config_of(family)
    for weights in path.parent.rglob("*.safetensors"):
        weights.unlink()
    more = [f"data.cache={path.parent / 'cache'}", "output.checkpoint_every=1", "output.keep=4"]
    config = load_config(path, [f"train.gradient_checkpointing={checkpointing}", *more])
    figures = dry_run(config)
    config.output.checkpoint_every = 0

    data = tiny_data(pipeline, images=4)
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    weights = sum(tensor.numel() for tensor in pipeline.transformer.state_dict().values())
    with FlopCounterMode(display=False) as counter:
        student = distill(pipeline, data, config)
    # recomputing a block stops at the last tensor that its gradients ask for
    spared = 0.02 if checkpointing else 0
    assert (1 - spared) * figures["step_flops"] <= counter.get_total_flops() <= figures["step_flops"]
    added = sum(p.numel() for name, p in student.named_parameters() if ".hybrid." in name)
    assert (figures["parameters"], figures["trained_parameters"]) == (parameters, added)
    text = {"pixart_sigma": 0, "sd3": TEXT_LENGTH + 16, "sd35": TEXT_LENGTH + 16, "z_image": 32}.get(
        family, TEXT_LENGTH
    )
    layout = TokenLayout(text, ((8, 8),), "flux" in family)
    assert figures["attention_flops"] == attention_flops(student, layout)
    assert figures["tokens"] == {"grid": [8, 8], "image": 64, "text": text or TEXT_LENGTH}
    guided = 1 if "flux" in family and family != "flux2_klein_base" else 2
    assert figures["data_flops"] == 3 * 5 * guided * figures["forward_flops"]["teacher"]
    kept = 3 * data.rows([0])["latents"].nbytes + 2 * sum(tensor.nbytes for tensor in data.empty.values())
    # a prompt's mask is of integers
    assert figures["disk_bytes"] == {"cache": pytest.approx(kept, rel=0.01), "checkpoints": 5 * 20 * added}
    assert (figures["prompts"], figures["epochs"]) == (1, 4 / 3)
    few_steps = family in ("flux_schnell", "z_image")  # as the transformer's config tells
    assert figures["loss"]["task"] == (0 if few_steps else 1) and figures["loss"]["layer"] == 0.5
    memory = figures["memory_bytes"]
    assert (memory["frozen"], memory["trained"]) == (4 * weights, 20 * added)
    assert memory["total"] == memory["frozen"] + memory["trained"] + memory["activations"]
    kept = figures["activation_bytes"]
    assert memory["activations"] == kept["with_checkpointing" if checkpointing else "without_checkpointing"]


def test_half_converted_steps_and_the_passes_of_distribution_matching_are_counted(config_of):
    path, pipeline = config_of("sd3")
    data = tiny_data(pipeline, images=4)
    plain = dry_run(load_config(path, ["train.steps=3"]))
    config = load_config(path, ["train.steps=3", "loss.progressive_steps=2"])
    half, more = dry_run(config), dry_run(load_config(path, ["loss.distribution=1"]))
    with FlopCounterMode(display=False) as counter:
        distill(pipeline, data, config)
    assert half["hours"]["training"] * 3600 * THROUGHPUT == pytest.approx(counter.get_total_flops(), rel=1e-6)
    assert half["hours"]["training"] < plain["hours"]["training"], "windows are dearer on 8 x 8"
    # without gradients the student's pass may take less
    assert more["step_flops"] == plain["step_flops"] + 4 * sum(plain["forward_flops"].values())
    assert more["activation_bytes"]["without_checkpointing"] > plain["activation_bytes"]["without_checkpointing"]
    assert "a forward of both for loss.distribution" in report(more)
    assert "in the first 2 half of the layers are the teacher's" in report(half)


def test_what_a_run_would_regret_is_told(config_of):
    """Few prompts, a hybrid that costs more than its teacher."""
    path, _ = config_of("flux_dev")
    figures = dry_run(load_config(path, ["data.images=10"]))
    told = report({**figures, "forward_flops": {"teacher": 3, "student": 2}})
    assert "MORE" not in told and "with more prompts" not in told and "images     10 of 1 prompts" in told
    assert "losses     task 1, output 0.5, layer 0.5, prompt_dropout 0" in told
    figures = dry_run(load_config(path, ["hybrid.window=8", "data.images=11"]))
    assert figures["forward_flops"]["student"] > figures["forward_flops"]["teacher"]
    assert "MORE than the teacher's" in report(figures)
    assert "data.prompts holds 1 prompts for 11 images, 11 images of each: with more prompts" in report(figures)


@pytest.mark.parametrize("family", ["pixart_sigma", "sd3", "flux_dev"])
def test_the_memory_of_images_is_that_of_the_pipeline_s_call(family, config_of):
    """Counted while a real call runs; on shapes alone, one block of each kind stands for all."""
    path, pipeline = config_of(family)
    figures = dry_run(load_config(path, ["data.batch_size=3", "output.sample_every=1", "output.samples=2"]))
    memory, stages = figures["memory_bytes"], figures["stage_bytes"]
    count = {
        name: 4 * sum(p.numel() for p in part.parameters())
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    assert stages["prompts"] == sum(size for name, size in count.items() if name.startswith("text_encoder"))
    data = tiny_data(pipeline, images=3)
    weights = [weight for part in (pipeline.transformer, pipeline.vae) for weight in part.state_dict().values()]

    def held(images, output_type):
        text = data.rows(range(images), data.empty)
        with _Held(weights, ()) as noted:
            sample(pipeline, text, data.empty, data.info, range(images), output_type)
        return noted.peak

    made = stages["images"] - memory["frozen"] - count["vae"]
    assert 0.7 * held(3, "latent") < made < 1.1 * held(3, "latent")
    drawn = stages["samples"] - memory["frozen"] - memory["trained"] - count["vae"]
    assert 0.7 * held(2, "pil") < drawn, "the hybrid's tiles may take more than the teacher"
    more = dry_run(load_config(path, ["data.batch_size=6", "output.sample_every=0"]))["stage_bytes"]
    assert 1.8 * made < more["images"] - memory["frozen"] - count["vae"] < 2.2 * made
    assert more["samples"] is None and more["training"] == memory["total"]
    metrics = dry_run(load_config(path, ["metrics.every=1", "metrics.samples=8"]))
    assert metrics["at_once"]["samples"] == 8 and metrics["stage_bytes"]["samples"] > stages["samples"]


def test_the_largest_stage_is_the_memory(config_of):
    path, _ = config_of("flux_dev")
    figures = dry_run(load_config(path, ["data.offload=group"]))
    told = report(figures)
    assert f"memory     {figures['memory_bytes']['total'] / 1e6:.3g} MB on one GPU" in told
    assert "made, data.batch_size=4 at a time, by the dense teacher, without data.offload=group" in told
    stages = {**figures["stage_bytes"], "prompts": 5 * 10**9, "samples": None}
    told = report({**figures, "stage_bytes": stages})
    assert "memory     5 GB on one GPU" in told and "sample grids or metrics" not in told


def test_memory_on_several_gpus(config_of):
    path, _ = config_of("flux_dev")
    alone = dry_run(load_config(path, ["train.batch_size=16", "train.accumulation=4"]))
    memory, several = alone["memory_bytes"], alone["several"]
    assert (several["gpus"], several["accumulation"], several["images_per_pass"]) == (8, 1, 2)
    trained = memory["trained"] * 6 // 5  # and the gradients' buckets
    assert several["ddp"] == memory["frozen"] + trained + memory["activations"] // 2
    assert (memory["frozen"] + memory["trained"]) // 8 < several["fsdp2"] < several["ddp"]
    assert dry_run(load_config(path, ["train.batch_size=6", "train.accumulation=3"]))["several"]["gpus"] == 2
    assert "GPUs       one: train.batch_size" in report(
        dry_run(load_config(path, ["train.batch_size=3", "train.accumulation=1"]))
    )


@pytest.mark.parametrize("family", ["pixart_sigma", "flux_dev"])
def test_activations_grow_with_what_is_kept(family, config_of):
    path, _ = config_of(family)

    def activations(*overrides):
        kept = dry_run(load_config(path, overrides))["activation_bytes"]
        return kept["with_checkpointing"], kept["without_checkpointing"]

    few, many = activations(), activations("train.batch_size=8")
    # but for what does not depend on the batch, such as the weights' bf16 copies
    assert all(1.6 * a < b <= 2 * a for a, b in zip(few, many, strict=True))
    assert activations("train.batch_size=8", "train.accumulation=4") == few
    assert few[0] < 0.8 * few[1]
    assert all(0.4 * a < b < 0.8 * a for a, b in zip(few, activations("train.precision=bf16"), strict=True))


@pytest.mark.parametrize(
    ("repository", "billions", "with_positions"),
    [
        ("PixArt-alpha/PixArt-Sigma-XL-2-512-MS", 0.611, None),
        ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 0.611, None),
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2.028, None),
        ("stabilityai/stable-diffusion-3.5-medium", 2.243, 2.47),  # published with its table of positions
        ("stabilityai/stable-diffusion-3.5-large", 8.057, None),
        ("black-forest-labs/FLUX.1-dev", 11.90, None),
        ("black-forest-labs/FLUX.1-schnell", 11.89, None),
        ("lodestones/Chroma1-HD", 8.90, None),
        ("Qwen/Qwen-Image", 20.43, None),
        ("black-forest-labs/FLUX.2-dev", 32.22, None),
        ("black-forest-labs/FLUX.2-klein-4B", 3.876, None),
        ("black-forest-labs/FLUX.2-klein-9B", 9.079, None),
    ],
)
def test_the_known_models_have_their_published_size(repository, billions, with_positions):
    model = plan_model(repository).transformer
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
    if with_positions:
        assert sum(t.numel() for t in model.state_dict().values()) / 1e9 == pytest.approx(with_positions, rel=1e-3)


def test_every_known_repository_is_a_shipped_config():
    shipped = {load_config(path).model.path for path in ROOT.glob("configs/distill/*.yaml")}
    # sd15.yaml's weights under their first name; and the third model that LinFusion's files are for
    shipped |= {"runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1"}
    # the same models, for which krea2.yaml and longcat_image.yaml take another path and few other settings
    shipped |= {"krea/Krea-2-Turbo", "meituan-longcat/LongCat-Image-Dev"}
    assert {repository for family in families() if family.pipelines for repository in family.published} <= shipped


@pytest.mark.slow
def test_a_full_size_model_takes_little_memory_and_no_network():
    code = """
import resource, socket, sys
from hybriddit.training.run_config import load_config
from hybriddit.training.dry_run import dry_run
def refuse(*args, **kwargs):
    raise AssertionError("the network was used")
socket.socket.connect = refuse
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
figures = dry_run(load_config("configs/distill/pixart_sigma_512.yaml"))
print(figures["parameters"], (peak() - before) / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    parameters, gigabytes = done.stdout.split()
    assert int(parameters) == 610_856_096 and float(gigabytes) < 0.5, "its weights would take 2.4 GB"


def test_the_command_prints_words_or_json(config_of, capsys):
    path, _ = config_of("sd3")
    assert main(["distill", str(path), "--dry-run", "train.steps=7"]) == 0
    words = capsys.readouterr().out
    assert "Estimates" in words and "gradient checkpointing" in words and "40% of an H100's" in words
    assert main(["distill", str(path), "train.steps=7", "--dry-run", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["estimate"] is True and figures["steps"] == 7 and report(figures) == words.strip("\n")
    assert f"{figures['trained_parameters']:,} parameters" in words
    assert not (path.parent / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.path=someone/else"], "a dry run needs a local pipeline folder, or one of PixArt-alpha/"),
        (["model.path=''"], "model.path is empty"),
        (["data.prompts=none.txt"], "no prompt file at 'none.txt'"),
        (["loss.layer=-1"], "loss.layer must be 0 or more, got -1"),
        (["loss.prompt_dropout=2"], "loss.prompt_dropout must be in [0, 1]"),
        (["loss.task=0", "loss.output=0", "loss.layer=0"], "may not all be 0"),
        (["train.accumulation=3"], "train.batch_size must be a multiple of train.accumulation"),
        (["data.width=60"], "data.width must be a multiple of 8"),
        (["hybrid.layers={'*.attn1': dense}"], "'*.attn1' matches no attention layer of this model"),
        (["model.recipe=flux_dev"], "recipe 'flux_dev' is for a FluxPipeline"),
    ],
)
def test_what_a_run_would_refuse_is_refused_in_one_line(arguments, message, config_of, capsys):
    path, _ = config_of("sd3")
    assert main(["distill", str(path), "--dry-run", *arguments]) == 1
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("hybriddit: "))
    assert message in error


def test_images_of_your_own_are_not_made(config_of, tmp_path):
    path, _ = config_of("pixart_sigma")
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text("a shoe")
    config = load_config(path, ["data.source=folder", f"data.folder={tmp_path / 'images'}", f"data.cache={tmp_path}"])
    figures = dry_run(config)
    assert (figures["images"], figures["data_flops"], figures["prompts"]) == (2, 0, None)
    assert "while images are encoded, data.batch_size=4 at a time" in report(figures)
    of_prompt = figures["disk_bytes"]["cache"] - 2 * 4 * 4 * 16 * 16
    assert "without a caption" not in report(figures)
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "c.png")
    assert "and 1 without a caption, left out" in report(dry_run(config))
    (tmp_path / "images" / "b.txt").write_text("a bag")
    another = dry_run(config)["disk_bytes"]["cache"] - 2 * 4 * 4 * 16 * 16
    assert another == of_prompt * 3 // 2, "captions that images share are kept once, and the empty one is kept too"


def test_a_folder_that_is_not_whole_is_named(config_of, capsys):
    path, _ = config_of("sd3")
    (path.parent / "teacher" / "transformer" / "config.json").write_text("{")
    assert main(["distill", str(path), "--dry-run"]) == 1
    assert "config.json is damaged" in capsys.readouterr().err
    (path.parent / "teacher" / "transformer" / "config.json").unlink()
    assert main(["distill", str(path), "--dry-run"]) == 1
    assert "the pipeline folder is not whole" in capsys.readouterr().err


def test_a_folder_without_a_vae_or_a_tokenizer_is_planned(config_of):
    """Trajectories need no VAE, and a family's pipeline may encode prompts by other means."""
    path, pipeline = config_of("flux_dev")
    teacher = path.parent / "teacher"
    whole = dry_run(load_config(path))
    for parts in (["tokenizer"], ["tokenizer", "vae"]):
        index = json.loads((teacher / "model_index.json").read_text())
        for part in parts:
            index[part] = [None, None]
            shutil.rmtree(teacher / part, ignore_errors=True)
        (teacher / "model_index.json").write_text(json.dumps(index))
        figures = dry_run(load_config(path, ["data.height=128", "data.width=128"] if "vae" in parts else []))
        assert figures["tokens"] == whole["tokens"]  # without a VAE, diffusers' pipelines take a latent for 8 pixels
        assert figures["step_flops"] == whole["step_flops"]


def test_a_vae_of_another_kind_is_named(config_of, capsys):
    path, _ = config_of("flux_dev")
    config = path.parent / "teacher" / "vae" / "config.json"
    config.write_text('{"_class_name": "AutoencoderDC", "encoder_block_out_channels": [4, 4]}')
    assert main(["distill", str(path), "--dry-run"]) == 1
    assert "a latent of AutoencoderDC covers is not known: FLUX needs latent_pixels" in capsys.readouterr().err


def test_flags_that_do_not_go_together(config_of, capsys):
    path, _ = config_of("sd3")
    assert main(["distill", str(path), "--json"]) == 1
    assert "--json is for --dry-run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["distill", str(path), "--dry-run", "--resume"])
    assert exit.value.code == 2
