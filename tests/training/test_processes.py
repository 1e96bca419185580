"""How a run may be distributed: what the loop does not support is refused in one line, before anything is read."""

from types import SimpleNamespace

import pytest
from accelerate import DistributedType

from hybriddit.cli import main
from hybriddit.training import loop

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


def refused(arguments, message, tmp_path, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_deepspeed_is_refused_before_any_work(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as `accelerate launch --use_deepspeed` sets it
    message = "hybriddit: training runs on one process, by DDP or by FSDP2, not by DEEPSPEED"
    refused(arguments, message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("kind", "version", "checkpointing", "message"),
    [
        ("FSDP", 1, False, "training shards by FSDP2: give accelerate --fsdp_version 2"),
        ("FSDP", 2, True, "take train.gradient_checkpointing=true in place of fsdp_activation_checkpointing"),
        ("MEGATRON_LM", 0, False, "by DDP or by FSDP2, not by MEGATRON_LM"),
    ],
)
def test_other_ways_are_refused(kind, version, checkpointing, message, arguments, tmp_path, monkeypatch, capsys):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(activation_checkpointing=checkpointing))
    accelerator = SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=version == 2, state=state)
    monkeypatch.setattr(loop, "make_accelerator", lambda config: accelerator)
    refused(arguments, message, tmp_path, capsys)
