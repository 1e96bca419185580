"""What W&B (a stand-in: it is not installed here) and TensorBoard are given, and that a resumed run goes on in its own."""

import json
import sys
from types import SimpleNamespace

import accelerate.tracking
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybriddit.data.class_data import ClassData, ClassInfo
from hybriddit.training import loop
from hybriddit.training.run_config import SiTConfig, load_config
from hybriddit.training.train_sit import make_model, train

MODEL = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "sample_size": 8,
    "in_channels": 1,
    "num_classes": 2,
}


def run(folder, resume=False, **settings):
    """A run of two steps on random images, with `settings`: output__run_name and so on."""
    images = torch.randint(0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = ClassData([{"images": images, "labels": torch.arange(8) % 2}], ClassInfo((1, 8, 8)))
    config = SiTConfig(model=dict(MODEL))
    common = {"train__batch_size": 4, "train__progress": False, "output__folder": str(folder), "output__log_every": 1}
    common |= {"train__steps": 2, "output__checkpoint_every": 2, "output__sample_every": 2}
    common |= {"output__samples": 2, "output__sample_steps": 1}
    for key, value in {**common, **settings}.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    return train(make_model(config), data, config, resume=resume)


class Wandb(SimpleNamespace):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__(inits=[], settings={}, lines=[], Image=lambda pixels: pixels)
        self.config = SimpleNamespace(update=lambda values, **_: self.settings.update(values))

    def init(self, **arguments):
        self.inits.append(arguments)
        return self

    def log(self, values, step=None):
        self.lines.append((step, values))

    def finish(self):
        pass


@pytest.fixture
def wandb(monkeypatch):
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr(loop, "is_wandb_available", lambda: True)
    available = [*accelerate.tracking._available_trackers, accelerate.tracking.LoggerType.WANDB]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", available)
    for name in ("PROJECT", "NAME", "RUN_ID", "ENTITY", "DIR", "RESUME"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    return stand_in


def test_wandb_is_given_names_settings_metrics_and_images(wandb, tmp_path):
    run(tmp_path / "shoes", output__tracker="wandb")
    (begun,) = wandb.inits
    assert begun["project"] == "hybriddit" and begun["name"] == "shoes" and begun["dir"] == str(tmp_path / "shoes")
    assert begun["id"] and begun["resume"] == "allow"
    assert wandb.settings["train"]["batch_size"] == 4 and wandb.settings["model"] == MODEL
    metrics = [(step, values["loss"]) for step, values in wandb.lines if "loss" in values]
    logged = [json.loads(line) for line in (tmp_path / "shoes" / "log.jsonl").read_text().splitlines()]
    assert metrics == [(line["step"], line["loss"]) for line in logged]
    ((step, (grid,)),) = [(step, values["samples"]) for step, values in wandb.lines if "samples" in values]
    assert step == 2 and grid.dtype == "uint8" and grid.shape[2] == 3


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(tmp_path / "run", output__tracker="wandb")
    monkeypatch.delenv("WANDB_PROJECT")  # the resuming shell may lack it
    run(tmp_path / "run", resume=True, output__tracker="wandb", train__steps=3)
    first, second = wandb.inits
    assert first["project"] == second["project"] == "mine" and first["id"] == second["id"]
    assert [step for step, values in wandb.lines if "loss" in values] == [1, 2, 3]
    run(tmp_path / "other", output__tracker="wandb")
    assert wandb.inits[2]["id"] != first["id"]


def test_names_of_the_environment_are_used_and_the_config_s_go_before_them(wandb, tmp_path, monkeypatch):
    names = {"PROJECT": "shoes", "NAME": "first", "RUN_ID": "abc", "ENTITY": "us", "DIR": "/there", "RESUME": "must"}
    for name, value in names.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run(tmp_path / "run", output__tracker="wandb")
    (begun,) = wandb.inits
    assert begun == {"project": "shoes", "name": "first", "id": "abc", "entity": "us"}  # W&B reads the others itself
    run(tmp_path / "other", output__tracker="wandb", output__project="bags", output__run_name="second")
    assert (wandb.inits[1]["project"], wandb.inits[1]["name"]) == ("bags", "second")


def test_what_wandb_refuses_is_one_line(wandb, tmp_path, monkeypatch):
    refusal = type("UsageError", (Exception,), {"__module__": "wandb.errors"})

    def refused(**arguments):
        raise refusal("no API key configured")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(ValueError, match="output.tracker: wandb did not start the run: no API key configured"):
        run(tmp_path / "run", output__tracker="wandb")


def events(folder):
    """tag -> steps of the scalars and images that TensorBoard shows for a folder of events."""
    found = EventAccumulator(str(folder)).Reload()
    tags = found.Tags()
    scalars = {tag: [event.step for event in found.Scalars(tag)] for tag in tags["scalars"]}
    return scalars | {tag: [event.step for event in found.Images(tag)] for tag in tags["images"]}


def test_tensorboard_is_given_names_settings_metrics_and_images(tmp_path):
    run(tmp_path / "run", output__project="shoes", output__run_name="first")
    folder = tmp_path / "run" / "tensorboard" / "shoes" / "first"
    found = events(folder)
    assert found["loss"] == [1, 2] and found["samples"] == [2]
    (settings,) = folder.glob("*/hparams.yml")
    settings = yaml.safe_load(settings.read_text())
    assert settings["train.batch_size"] == 4 and settings["model.num_classes"] == 2


def test_a_resumed_run_goes_on_in_the_same_events_without_a_step_twice(tmp_path, monkeypatch):
    run(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():  # a run that was killed after step 2, before it was saved
        path.rename(path.with_name("step-00000001"))
        state = path.with_name("step-00000001") / "state.json"
        state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 1}))
    run(tmp_path / "run", resume=True, train__steps=3)
    found = events(tmp_path / "run" / "tensorboard")
    assert found["loss"] == [1, 2, 3] and found["samples"] == [2, 3]
    assert len(list((tmp_path / "run" / "tensorboard").glob("*/hparams.yml"))) == 1


@pytest.mark.parametrize("name", ["a/b", "..", "a:b", ""])
@pytest.mark.parametrize("setting", ["project", "run_name"])
def test_names_that_wandb_or_a_file_system_refuses_are_told(setting, name, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("job: train")
    with pytest.raises(ValueError, match=f"output.{setting} must be a name without"):
        load_config(tmp_path / "run.yaml", [f"output.{setting}='{name}'"])


def test_a_changed_learning_rate_is_said_and_used_from_the_step_it_is_resumed_at(tmp_path, monkeypatch, capsys):
    """Also of the gates, and with more steps; in run.json as in the log."""
    rates, make = [], loop.make_optimizer

    def watched(*arguments, **keywords):
        optimizer = make(*arguments, **keywords)
        optimizer.register_step_pre_hook(lambda opt, *_: rates.append([group["lr"] for group in opt.param_groups]))
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", watched)
    run(tmp_path / "run", optim__lr=1e-3, optim__gate_lr_factor=10.0)
    assert rates == [[1e-3, 1e-2]] * 2
    capsys.readouterr()
    rates.clear()
    changed = {"optim__lr": 5e-4, "optim__gate_lr_factor": 4.0, "train__steps": 4}
    run(tmp_path / "run", resume=True, **changed)
    assert rates == [[5e-4, 2e-3]] * 2
    said = capsys.readouterr().out
    assert "resumed: optim.lr 0.001 -> 0.0005 from step 3" in said
    first, second = json.loads((tmp_path / "run" / "run.json").read_text())
    assert first["changed"] == {}
    expected = {"optim.lr": [1e-3, 5e-4], "optim.gate_lr_factor": [10.0, 4.0], "train.steps": [2, 4]}
    assert second["changed"] == expected
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [1e-3, 1e-3, 5e-4, 5e-4]
    run(tmp_path / "run", resume=True, **{**changed, "train__steps": 5})
    assert json.loads((tmp_path / "run" / "run.json").read_text())[2]["changed"] == {"train.steps": [4, 5]}
    with pytest.raises(ValueError, match="other values of train.seed"):
        run(tmp_path / "run", resume=True, train__seed=1)


def test_a_damaged_record_of_the_starts_is_one_line(tmp_path, capsys):
    run(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("[{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        run(tmp_path / "run", resume=True, train__steps=3)
