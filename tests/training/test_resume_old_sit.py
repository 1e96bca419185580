"""A run whose checkpoint holds the names that SiT's weights had before is resumed as if it held today's."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hybriddit import load_config
from hybriddit.training.checkpoint import read_state
from hybriddit.training.run_config import SiTConfig
from hybriddit.training.train_sit import resume_settings, run

BEFORE = {  # today's part of a name -> the part it had in version 0.1
    "patch_embed.proj.": "patch_embed.",
    ".ff.fc1.": ".ff.net.0.proj.",
    ".ff.fc2.": ".ff.net.2.",
    ".attn.hybrid.": ".attn.",
}


def test_a_run_of_the_names_before_goes_on(tmp_path):
    for label, level in (("dark", 50), ("light", 200)):
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(tmp_path / "images" / label / "0.png")
    model = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "sample_size": 8, "in_channels": 1}
    model |= {"num_classes": 2, "attention": ["hybrid", "linear"], "window": 3, "activation_fn": "swiglu"}
    values = {
        "job": "train",
        "model": model,
        "data": {"path": str(tmp_path / "images")},
        "train": {"steps": 2, "batch_size": 2, "progress": False},
        "output": {"folder": str(tmp_path / "run"), "checkpoint_every": 1, "keep": 2},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))  # which is YAML too
    config = load_config(tmp_path / "run.yaml")
    whole = run(config).state_dict()

    first, second = sorted((tmp_path / "run" / "checkpoints").iterdir())
    expected = load_file(second / "state.safetensors")
    for path in second.iterdir():
        path.unlink()
    second.rmdir()
    old = {}
    for name, tensor in load_file(first / "state.safetensors").items():
        for today, before in BEFORE.items():
            name = name.replace(today, before)
        old[name] = tensor
    assert not [name for name in old if "hybrid" in name or "fc1" in name]
    assert "exp_avg/transformer_blocks.0.attn.gate" in old and "average/transformer_blocks.1.ff.net.2.weight" in old
    save_file(old, first / "state.safetensors")
    state = json.loads((first / "state.json").read_text())
    for field in ("feature_map", "projection", "far_rope", "mixer"):  # which SiT did not have then
        del state["settings"][f"model.{field}"]
    (first / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"made with other values of model\.feature_map: resume with"):
        run(load_config(tmp_path / "run.yaml", ["model.feature_map=hedgehog"]), resume=True)
    said = ["model.feature_map=elu", "model.projection=0", "model.far_rope=false", "model.mixer=linear"]
    read_state(first, resume_settings(load_config(tmp_path / "run.yaml", said)))  # the same model: not refused

    resumed = run(config, resume=True).state_dict()
    found = load_file(second / "state.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("field", ["feature_map", "projection", "far_rope", "mixer"])
def test_a_run_does_not_go_on_where_a_field_of_its_far_branch_is_left_out(field, tmp_path):
    """The weights alone would not always tell."""
    far = {"feature_map": "hedgehog", "projection": None, "rope": True, "far_rope": True, "mixer": "pooled"}
    config = SiTConfig(model={"attention": "linear", **far})
    (tmp_path / "state.json").write_text(json.dumps({"step": 1, "settings": resume_settings(config)}))
    read_state(tmp_path, resume_settings(config))
    del config.model[field]
    with pytest.raises(ValueError, match=f"made with other values of model.{field}: resume with"):
        read_state(tmp_path, resume_settings(config))
