"""AdamW's moments in 8 bits: what a checkpoint keeps of them, what they take, and where they cannot be."""

import importlib.machinery
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from hybriddit.cli import main
from hybriddit.training import distill, train_sit
from hybriddit.training import optimizer as optimizers
from hybriddit.training.checkpoint import load_checkpoint, read_state, saving_checkpoint
from hybriddit.training.dry_run import dry_run, report
from hybriddit.training.optimizer import check_8bit, make_optimizer, moment_bytes
from hybriddit.training.run_config import DistillConfig, SiTConfig, load_config


class AdamW8bit(torch.optim.Optimizer):
    """A stand-in for bitsandbytes' class, with the states that it has: codes, factors and tables; no AdamW."""

    TABLE = torch.linspace(-1, 1, 256)  # one for all parameters

    def __init__(self, params, lr, min_8bit_size):
        super().__init__(params, {"lr": lr})
        self.smallest = min_8bit_size

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["step"] = 0
                    few = weight.numel() < self.smallest
                    dtype, blocks = (torch.float32 if few else torch.uint8), -(-weight.numel() // 256)
                    for part in "12":
                        state[f"state{part}"] = torch.zeros(weight.shape, dtype=dtype)
                        state |= {} if few else {f"absmax{part}": torch.zeros(blocks), f"qmap{part}": self.TABLE}
                state["step"] += 1
                for part in "12":
                    state[f"state{part}"].add_((weight.grad * 100).abs().clamp(0, 9).to(state[f"state{part}"].dtype))
                weight.sub_(group["lr"] * (state["state1"].float() + state["step"]) * weight.grad.sign())


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def library(request, monkeypatch):
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        return
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["bitsandbytes.optim"].AdamW8bit = AdamW8bit


def config_of(use_8bit_adam=True):
    config = DistillConfig()
    config.optim.use_8bit_adam = use_8bit_adam
    return config


def started():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.Linear(100, 8))  # of 6400 and fewer weights
    return model, make_optimizer(dict(model.named_parameters()), config_of())


def trained(model, optimizer, steps):
    for step in steps:
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def test_resumed_steps_are_those_of_an_unbroken_run(library, tmp_path):
    expected = trained(*started(), range(5))
    model, optimizer = started()
    trained(model, optimizer, range(3))
    named, average = dict(model.named_parameters()), [p.detach().clone() for p in model.parameters()]
    with saving_checkpoint(tmp_path, 3, named, average, optimizer, {}, 1):
        pass
    model, optimizer = started()
    named = dict(model.named_parameters())
    assert load_checkpoint(tmp_path / "step-00000003", named, average, optimizer, {}) == 3
    assert all(map(torch.equal, trained(model, optimizer, range(3, 5)), expected))
    assert optimizer.state[named["0.weight"]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("job, kind", [(distill, DistillConfig), (train_sit, SiTConfig)])
def test_a_run_does_not_go_on_with_moments_of_the_other_kind(job, kind, tmp_path):
    for first, then in ((False, True), (True, False)):
        config = kind()
        config.optim.use_8bit_adam = first
        settings = job.resume_settings(config)
        (tmp_path / "state.json").write_text(json.dumps({"step": 1, "settings": settings}))
        assert read_state(tmp_path, settings)["step"] == 1
        config.optim.use_8bit_adam = then
        with pytest.raises(ValueError, match=r"made with other values of optim\.use_8bit_adam: resume with"):
            read_state(tmp_path, job.resume_settings(config))


def test_the_moments_take_what_is_estimated(library):
    model, optimizer = started()
    trained(model, optimizer, range(1))
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name.startswith(("state", "absmax"))
    )
    assert held == moment_bytes(model.parameters(), config_of()) < moment_bytes(model.parameters(), config_of(False))


def test_where_it_cannot_run(library, monkeypatch):
    check_8bit(config_of())
    with pytest.raises(ValueError, match="use_8bit_adam does not run with FSDP"):
        check_8bit(config_of(), sharded=True)
    monkeypatch.setattr(optimizers, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    check_8bit(config_of(False))
    with pytest.raises(ModuleNotFoundError, match="needs bitsandbytes: pip install"):
        check_8bit(config_of())


def test_it_is_told_before_anything_is_made(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(optimizers, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    words = ["configs/distill/demo.yaml", "optim.use_8bit_adam=true", f"output.folder={tmp_path / 'run'}"]
    assert main(["distill", *words]) == 1
    assert capsys.readouterr().err.endswith('needs bitsandbytes: pip install "hybriddit[8bit]"\n')
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_it():
    # of a higher rank, else all of the demo's weights are small
    found = dry_run(load_config("configs/distill/demo.yaml", ["hybrid.delta_rank=48", "optim.use_8bit_adam=true"]))
    assert 14 < found["memory_bytes"]["trained"] / found["trained_parameters"] < 18  # 20 in fp32
    assert "fsdp2" not in found["several"]
    assert "Adam's moments in 8 bits" in report(found)
