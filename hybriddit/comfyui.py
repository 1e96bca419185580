"""Nodes for ComfyUI: load a pipeline of diffusers, choose an adapter or the dense teacher, and make images.

ComfyUI reads a file in its folder custom_nodes, which is this file itself, or one of one line:

    from hybriddit.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

Imports are absolute and inside functions, so that a copy or a link of this file works too, and ComfyUI's start does not
wait for diffusers.
"""

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from hybriddit.machine import OFFLOADS

CATEGORY = "hybriddit"
PIPELINE = "HYBRIDDIT_PIPELINE"  # the type of the wires between these nodes: a `Chosen`
MAX_SEED = 2**63 - 1
# ComfyUI's numbers are never empty: these stand for the pipeline's own
LEFT_OUT = {"width": 0, "height": 0, "steps": 0, "guidance": -1.0, "true_cfg": 0.0, "max_sequence_length": 0}


class Chosen(NamedTuple):
    """A loaded pipeline, and the name of the hybrid that makes images; None: the dense teacher."""

    session: Any
    hybrid: str | None


def adapter_state(adapter: str | None) -> list[float]:
    """What changes when the adapter in a folder is another; nothing for a repository, and for one that is not there.

    None: ComfyUI does not know it yet, because another node gives it.
    """
    from pathlib import Path

    from hybriddit.stored import ADAPTER_FILES, find_adapter

    if not adapter:
        return []
    try:
        return [os.stat(find_adapter(Path(adapter)) / name).st_mtime for name in ADAPTER_FILES]
    except (OSError, ValueError):
        return []  # what is wrong is told when the node runs


class LoadPipeline:
    """A pipeline of diffusers, dense with an adapter or without, or saved as a hybrid."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("pipeline",)
    DESCRIPTION = "Load a diffusers pipeline (folder or repository), with a hybriddit adapter if one is given."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        path = {"tooltip": "folder or hub repository of a diffusers pipeline, dense or hybrid"}
        adapter = {"tooltip": "folder or repository of an adapter, or the folder of its distillation; empty: none"}
        any_base = {"default": False, "tooltip": "take an adapter of other weights: the model is a finetune of them"}
        offload = {"tooltip": "keep weights off the GPU until they are used"}
        return {
            "required": {"model": ("STRING", {"default": "", **path})},
            "optional": {
                "adapter": ("STRING", {"default": "", **adapter}),
                "dtype": (["auto", "bfloat16", "float16", "float32"],),
                "offload": (["none", *OFFLOADS], offload),
                "any_base": ("BOOLEAN", any_base),
            },
        }

    @classmethod
    def IS_CHANGED(cls, adapter: str | None = None, **others: Any) -> list[float]:
        return adapter_state(adapter)

    def load(
        self, model: str, adapter: str = "", dtype: str = "auto", offload: str = "none", any_base: bool = False
    ) -> tuple[Chosen]:
        import comfy.model_management

        from hybriddit.generate.session import Session, find_source

        if not model.strip():
            raise ValueError("give a model: the folder of a diffusers pipeline, or a repository's name")
        source = find_source(
            model.strip(),
            [adapter.strip()] if adapter.strip() else [],
            any_base=any_base and bool(adapter.strip()),
            device=str(comfy.model_management.get_torch_device()),
            dtype=None if dtype == "auto" else dtype,
            offload=None if offload == "none" else offload,
        )
        comfy.model_management.unload_all_models()  # ComfyUI's own make room, and come back when they are used
        session = outside_inference_mode(Session, source)
        return (Chosen(session, session.hybrids[-1] if session.hybrids else None),)


class ChooseAdapter:
    """The same pipeline, by another adapter, which is loaded if it is not yet; or dense."""

    CATEGORY = CATEGORY
    FUNCTION = "choose"
    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("pipeline",)
    DESCRIPTION = "Use another adapter of a loaded pipeline, or none: then the dense teacher makes the images."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        adapter = {"tooltip": "folder or repository of an adapter; empty: the dense teacher"}
        return {"required": {"pipeline": (PIPELINE,), "adapter": ("STRING", {"default": "", **adapter})}}

    @classmethod
    def IS_CHANGED(cls, adapter: str | None = None, **others: Any) -> list[float]:
        return adapter_state(adapter)

    def choose(self, pipeline: Chosen, adapter: str) -> tuple[Chosen]:
        adapter = adapter.strip()
        if adapter:
            outside_inference_mode(pipeline.session.add, adapter)
        return (Chosen(pipeline.session, adapter or None),)


class Generate:
    """Images of a prompt, image i of seed + i, as ComfyUI has them: [batch, height, width, 3], float32, from 0 to 1."""

    CATEGORY = CATEGORY
    FUNCTION = "generate"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "report")
    DESCRIPTION = "Make images of a prompt. The report has each image's seconds, peak memory and record, as JSON."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def number(name: str, most: float, about: str, step: float = 1) -> tuple[str, dict[str, Any]]:
            kind = "FLOAT" if isinstance(LEFT_OUT[name], float) else "INT"
            limits = {"default": LEFT_OUT[name], "min": LEFT_OUT[name], "max": most, "step": step}
            return kind, {**limits, "tooltip": f"{about}; {LEFT_OUT[name]:g}: the pipeline's own"}

        seed = {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}
        text = {"multiline": True, "dynamicPrompts": True, "default": ""}
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "prompt": ("STRING", text),
                "seed": ("INT", seed),
                "num_images": ("INT", {"default": 1, "min": 1, "max": 64}),
                "width": number("width", 16384, "pixels", 8),
                "height": number("height", 16384, "pixels", 8),
                "steps": number("steps", 1000, "of the sampler"),
                "guidance": number("guidance", 100.0, "guidance scale", 0.1),
            },
            "optional": {
                "negative_prompt": ("STRING", text),
                "true_cfg": number("true_cfg", 100.0, "FLUX, Qwen-Image: guidance away from the negative prompt", 0.1),
                "max_sequence_length": number("max_sequence_length", 4096, "text tokens"),
            },
        }

    def generate(
        self, pipeline: Chosen, prompt: str, seed: int, num_images: int, negative_prompt: str = "", **numbers: float
    ) -> tuple[Any, str]:
        import comfy.model_management
        import comfy.utils
        import numpy as np
        import torch

        settings = {name: value for name, value in numbers.items() if value != LEFT_OUT[name]}
        if negative_prompt.strip():
            settings["negative_prompt"] = negative_prompt
        bar = comfy.utils.ProgressBar(num_images)

        def tell(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        made, notes = outside_inference_mode(
            pipeline.session.make, pipeline.hybrid, prompt, tell=tell, seed=seed, num_images=num_images, **settings
        )
        pixels = np.stack([np.asarray(one.image.convert("RGB"), np.float32) / 255 for one in made])
        each = [{"seconds": one.seconds, "memory": one.memory, "record": one.record} for one in made]
        return torch.from_numpy(pixels), json.dumps({"notes": notes, "images": each}, indent=2, ensure_ascii=False)


def outside_inference_mode(function: Callable, *arguments: Any, **keywords: Any) -> Any:
    """Call a function without gradients, but not in inference mode, in which ComfyUI runs its nodes.

    What is made in that mode and kept (weights, tables of positions) would be of no use outside it.
    """
    import torch

    with torch.inference_mode(False), torch.no_grad():
        return function(*arguments, **keywords)


NODE_CLASS_MAPPINGS = {
    "HybridditLoadPipeline": LoadPipeline,
    "HybridditChooseAdapter": ChooseAdapter,
    "HybridditGenerate": Generate,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "HybridditLoadPipeline": "hybriddit: load pipeline",
    "HybridditChooseAdapter": "hybriddit: choose adapter",
    "HybridditGenerate": "hybriddit: generate",
}
