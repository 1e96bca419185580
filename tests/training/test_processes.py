"""How a run may be distributed: what the loop does not support is refused in one line, before anything is read."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_pipelines import tiny_pipeline

from hybriddit.cli import main
from hybriddit.training import distill, loop, train_sit
from hybriddit.training.processes import check_launcher

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "distill": "{job: distill, model: {path: /nowhere}, data: {prompts: [a shoe]}, output: {folder: FOLDER}}",
    "train": "{job: train, data: {path: /nowhere}, output: {folder: FOLDER}}",
}


@pytest.fixture(params=SETTINGS)
def arguments(request, tmp_path):
    """A command whose model or data are nowhere to be found."""
    path = tmp_path / "run.yaml"
    path.write_text(SETTINGS[request.param].replace("FOLDER", str(tmp_path / "run")))
    return [request.param, str(path)]


@pytest.fixture
def base_is_there(monkeypatch):
    """A distillation's base and a SiT's images are found, but not loaded."""
    shapes = tiny_pipeline("flux_dev").transformer.to("meta"), 8
    base = SimpleNamespace(hybrid_config=lambda: None, file="base.safetensors", shapes=lambda: shapes, index={})
    monkeypatch.setattr(distill, "find_base", lambda *_, **__: None)
    monkeypatch.setattr(distill, "text_to_image", lambda _: base)
    monkeypatch.setattr(train_sit, "plan_training", lambda config: None)
    monkeypatch.setattr(distill, "with_hybrid_of", lambda config, base: config)


def refused(arguments, message, tmp_path, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


OTHERS = "hybriddit: training runs on one process, by DDP or by FSDP2, not by "


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, f"{OTHERS}DEEPSPEED"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, f"{OTHERS}MEGATRON_LM"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            f"{OTHERS}accelerate's parallelism_config",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "give accelerate --fsdp_version 2"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "take train.compile=true in place of accelerate's dynamo_backend"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "take train.accumulation in place of accelerate's"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "accelerate's mixed_precision is fp16, train.precision no: "),
    ],
)
def test_what_the_launcher_is_given_and_the_loop_does_not_do_is_refused_before_any_work(
    environment, message, arguments, tmp_path, monkeypatch, capsys
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(arguments, message, tmp_path, capsys)


@pytest.mark.parametrize(
    "name, flags",
    [
        ("ddp", ["--multi_gpu"]),
        ("fsdp2", ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]),
    ],
)
def test_configs_of_accelerate_say_what_the_flags_say(name, flags, monkeypatch):
    """By accelerate's own parser; and the loop takes it."""

    def environment(*words):
        arguments = launch.launch_command_parser().parse_args([*words, "train/distill.py"])
        arguments, *_ = launch._validate_launch_command(arguments)
        assert arguments.num_processes == 8
        return prepare_multi_gpu_env(arguments)

    monkeypatch.setattr(os, "environ", dict(os.environ))  # accelerate puts the processes' into its own
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    before = dict(os.environ)
    by_file = environment("--config_file", str(ROOT / f"configs/accelerate/{name}.yaml"))
    os.environ.clear()
    os.environ.update(before)
    assert by_file == environment(*flags, "--num_processes", "8")
    monkeypatch.setattr(os, "environ", by_file)
    check_launcher(SimpleNamespace(train=SimpleNamespace(precision="bf16")))


def test_the_launcher_s_defaults_are_no_matter(arguments, monkeypatch, capsys):
    for name, value in (("MIXED_PRECISION", "no"), ("DYNAMO_BACKEND", "NO"), ("GRADIENT_ACCUMULATION_STEPS", "1")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert main(arguments) == 1
    assert "/nowhere" in capsys.readouterr().err, "it has gone on to the model or the data"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launcher(SimpleNamespace(train=SimpleNamespace(precision="bf16")))


def test_a_tpu_is_refused(arguments, base_is_there, tmp_path, monkeypatch, capsys):
    accelerator = SimpleNamespace(distributed_type=DistributedType.XLA, is_fsdp2=False)
    monkeypatch.setattr(loop, "make_accelerator", lambda config: accelerator)
    refused(arguments, f"{OTHERS}XLA", tmp_path, capsys)


@pytest.mark.parametrize(
    ("kind", "version", "checkpointing", "message"),
    [
        ("FSDP", 1, False, "training shards by FSDP2: give accelerate --fsdp_version 2"),
        ("FSDP", 2, True, "take train.gradient_checkpointing=true in place of fsdp_activation_checkpointing"),
        ("MEGATRON_LM", 0, False, "by DDP or by FSDP2, not by MEGATRON_LM"),
    ],
)
def test_other_ways_are_refused(
    kind, version, checkpointing, message, arguments, base_is_there, tmp_path, monkeypatch, capsys
):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(activation_checkpointing=checkpointing))
    accelerator = SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=version == 2, state=state)
    monkeypatch.setattr(loop, "make_accelerator", lambda config: accelerator)
    refused(arguments, message, tmp_path, capsys)


def test_processes_that_accelerate_does_not_join_do_not_do_one_run_each(
    arguments, base_is_there, tmp_path, monkeypatch, capsys
):
    """As of torchrun without a GPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("hybriddit.training.processes.device_of_this_machine", lambda: torch.device("cpu"))
    refused(arguments, "2 processes were launched, and without a GPU accelerate makes each", tmp_path, capsys)
