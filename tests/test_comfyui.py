"""ComfyUI's nodes in a stand-in of ComfyUI: files loaded, graphs checked and run by its rules.

They are those of ComfyUI's nodes.py (load_custom_node) and execution.py: a file of custom_nodes is executed under a
module name that is its path, widgets' values are checked against INPUT_TYPES, wires by their types, and a node's
FUNCTION is called by name, in inference mode.
"""

import importlib.util
import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from hybriddit import HybridConfig, hybridize, load_adapter, save_adapter
from hybriddit.generate import generate

ROOT = Path(__file__).parents[1]
TEACHER = str(ROOT / "assets/demo-teacher")
PROMPT = "a bag left, a boot right"
SIZE = {"height": 64, "width": 64, "steps": 2, "max_sequence_length": 24}
INSTALLED = "from hybriddit.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: F401\n"


class InterruptProcessingException(Exception):
    pass


class ComfyUI:
    """Loads files of nodes, and runs prompts: {id: {"class_type", "inputs": a value, or [id, number of the output]}}."""

    def __init__(self, monkeypatch):
        self.nodes, self.names, self.bars, self.calls = {}, {}, [], []
        self.interrupted_at = None
        comfy, utils, management = (types.ModuleType(n) for n in ("comfy", "comfy.utils", "comfy.model_management"))
        comfy.utils, comfy.model_management = utils, management
        own = self

        class ProgressBar:
            def __init__(self, total):
                self.seen = []
                own.bars.append(self)

            def update_absolute(self, value, total=None, preview=None):
                self.seen.append((value, total))

        def throw():
            own.calls.append("throw")
            if own.calls.count("throw") == own.interrupted_at:
                raise InterruptProcessingException

        utils.ProgressBar = ProgressBar
        management.get_torch_device = lambda: torch.device("cpu")
        management.unload_all_models = lambda: own.calls.append("unload")
        management.throw_exception_if_processing_interrupted = throw
        for module in (comfy, utils, management):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        self.monkeypatch = monkeypatch

    def load(self, path):
        name = os.path.splitext(path)[0]
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        self.monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        self.nodes.update(module.NODE_CLASS_MAPPINGS)
        self.names.update(module.NODE_DISPLAY_NAME_MAPPINGS)

    def check(self, prompt, node):
        """The node's class and its inputs, of which those by wire are None."""
        kind = self.nodes[node["class_type"]]
        asked, values = kind.INPUT_TYPES(), node["inputs"]
        inputs = {**asked["required"], **asked.get("optional", {})}
        assert set(asked["required"]) <= set(values) <= set(inputs)
        for name, value in values.items():
            type_, limits = (*inputs[name], {})[:2]
            if isinstance(value, list):
                source, output = value
                assert self.nodes[prompt[source]["class_type"]].RETURN_TYPES[output] == type_
            elif isinstance(type_, list):
                assert value in type_
            else:
                assert isinstance(value, {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}[type_])
                assert (
                    limits.get("min", -1e30) <= (value if type_ in ("INT", "FLOAT") else 0) <= limits.get("max", 1e30)
                )
        return kind, {name: None if isinstance(value, list) else value for name, value in values.items()}

    def changed(self, prompt, id):
        kind, values = self.check(prompt, prompt[id])
        return kind.IS_CHANGED(**values)

    def run(self, prompt, id, done):
        """The outputs of a node. done: those of nodes that ran before."""
        if id not in done:
            kind, values = self.check(prompt, prompt[id])
            for name, value in prompt[id]["inputs"].items():
                if isinstance(value, list):
                    values[name] = self.run(prompt, value[0], done)[value[1]]
            with torch.inference_mode():
                done[id] = getattr(kind(), kind.FUNCTION)(**values)
            assert isinstance(done[id], tuple) and len(done[id]) == len(kind.RETURN_TYPES)
        return done[id]


@pytest.fixture
def comfy(monkeypatch):
    return ComfyUI(monkeypatch)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = hybridize(FluxPipeline.from_pretrained(TEACHER).transformer, HybridConfig(window=3, map_rank=4))
    save_adapter(model, folder)
    return str(folder)


def installed(comfy, folder, how):
    path = folder / "custom_nodes" / "hybriddit_nodes.py"
    path.parent.mkdir()
    own = ROOT / "hybriddit" / "comfyui.py"
    if how == "one line":
        path.write_text(INSTALLED)
    elif how == "link":
        path.symlink_to(own)
    else:
        shutil.copy(own, path)
    comfy.load(str(path))


@pytest.mark.parametrize("how", ["one line", "link", "copy"])
def test_the_file_loads_as_comfyui_loads_it(how, comfy, tmp_path):
    installed(comfy, tmp_path, how)
    assert set(comfy.nodes) == set(comfy.names) and len(comfy.nodes) == 3
    for kind in comfy.nodes.values():
        assert callable(getattr(kind, kind.FUNCTION)) and kind.CATEGORY == "hybriddit"
        assert len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES)
        assert json.dumps(kind.INPUT_TYPES()), "the browser is told of it in JSON"
    assert INSTALLED.partition("  #")[0] in (ROOT / "docs/app.md").read_text(), "the docs say this line"


def test_teacher_and_hybrid_side_by_side(comfy, adapter, tmp_path):
    installed(comfy, tmp_path, "one line")
    numbers = {"seed": 5, "num_images": 2, "guidance": -1.0, **SIZE}
    prompt = {
        "load": {"class_type": "HybridditLoadPipeline", "inputs": {"model": TEACHER, "adapter": adapter}},
        "dense": {"class_type": "HybridditChooseAdapter", "inputs": {"pipeline": ["load", 0], "adapter": ""}},
        "again": {"class_type": "HybridditChooseAdapter", "inputs": {"pipeline": ["dense", 0], "adapter": adapter}},
    }
    for name in ("load", "dense", "again"):
        prompt[f"{name} images"] = {
            "class_type": "HybridditGenerate",
            "inputs": {"pipeline": [name, 0], "prompt": PROMPT, **numbers},
        }
    assert comfy.changed(prompt, "load") == comfy.changed(prompt, "again") != []
    done = {}
    for name, own in (("load", adapter), ("dense", None), ("again", adapter)):
        images, report = comfy.run(prompt, f"{name} images", done)
        pipeline = FluxPipeline.from_pretrained(TEACHER)
        if own:
            load_adapter(pipeline, own)
        expected = np.stack(
            [np.asarray(image) for image, _ in generate(pipeline, PROMPT, seed=5, num_images=2, **SIZE)]
        )
        assert images.dtype == torch.float32 and images.shape == (2, 64, 64, 3)
        assert torch.equal((images * 255).round().byte(), torch.from_numpy(expected))
        told = json.loads(report)["images"]
        assert [one["record"]["adapter"] for one in told] == [own] * 2 and all(one["seconds"] > 0 for one in told)
        assert comfy.bars[-1].seen == [(step, 4) for step in range(1, 5)]
    assert comfy.calls.count("unload") == 1, "one pipeline serves all"
    weights = done["load"][0].session.model.parameters()
    assert not any(weight.is_inference() for weight in weights)


def test_an_interruption_and_what_is_wrong(comfy, adapter, tmp_path):
    installed(comfy, tmp_path, "copy")
    prompt = {
        "load": {"class_type": "HybridditLoadPipeline", "inputs": {"model": TEACHER}},
        "images": {
            "class_type": "HybridditGenerate",
            "inputs": {"pipeline": ["load", 0], "prompt": PROMPT, "seed": 0, "num_images": 1, "guidance": -1.0, **SIZE},
        },
    }
    done, comfy.interrupted_at = {}, 2
    with pytest.raises(InterruptProcessingException):
        comfy.run(prompt, "images", done)
    assert comfy.bars[-1].seen == [(1, 2)]
    assert comfy.run(prompt, "images", done)[0].shape == (1, 64, 64, 3)
    prompt["images"]["inputs"]["width"] = 30
    with pytest.raises(ValueError, match="width 30 is no multiple of 4"):
        comfy.run(prompt, "images", {"load": done["load"]})
    for model, message in (("", "give a model"), ("/nowhere", "no diffusers pipeline at '/nowhere'")):
        prompt["load"]["inputs"]["model"] = model
        with pytest.raises((ValueError, OSError), match=message):
            comfy.run(prompt, "load", {})


def test_a_newer_adapter_in_the_folder_is_noticed(comfy, adapter, tmp_path):
    installed(comfy, tmp_path, "link")
    shutil.copytree(adapter, tmp_path / "run" / "checkpoints" / "step-00000001" / "adapter")
    prompt = {
        "load": {"class_type": "HybridditLoadPipeline", "inputs": {"model": TEACHER, "adapter": str(tmp_path / "run")}}
    }
    before = comfy.changed(prompt, "load")
    assert before == comfy.changed(prompt, "load") != []
    shutil.copytree(adapter, tmp_path / "run" / "checkpoints" / "step-00000002" / "adapter")
    for file in (tmp_path / "run" / "checkpoints" / "step-00000002" / "adapter").iterdir():
        os.utime(file, (1e9, 1e9))
    path = tmp_path / "run" / "checkpoints" / "step-00000002" / "adapter" / "hybrid_config.json"
    values = json.loads(path.read_text())
    values["_base"] = {**values["_base"], "steps": 2}
    path.write_text(json.dumps(values))
    assert comfy.changed(prompt, "load") != before
    assert comfy.nodes["HybridditChooseAdapter"].IS_CHANGED(pipeline=None, adapter=None) == []
