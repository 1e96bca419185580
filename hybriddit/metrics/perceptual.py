"""How alike networks find two images, and how well an image fits its prompt: LPIPS, CLIP and DINO.

The networks are published ones: CLIP (arXiv 2103.00020) and DINO (arXiv 2104.14294 and 2304.07193) as transformers reads
them, LPIPS (arXiv 1801.03924) as its authors' package does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

# of an image and its reference, uint8 [H, W, 3] both, and of the image's prompt: figures by name
Measure = Callable[[np.ndarray, np.ndarray, str], dict[str, float]]


def load_perceptual(
    device: torch.device, *, lpips: bool = False, clip: str | None = None, dino: str | None = None
) -> list[Measure]:
    """The measures that are asked for.

    lpips: LPIPS with AlexNet, 0 for equal images. clip, dino: folders or repositories of transformers' models. CLIP
    gives clip_image, the cosine of the embeddings of an image and its reference, in [-1, 1], and clip_text and
    clip_text_teacher, those of the prompt (of which CLIP reads 77 tokens) with either of them; DINO gives dino, the
    cosine of the two images' class tokens in the last layer.

    Raises ModuleNotFoundError without the package lpips, and ValueError for a model that is not there or of another kind.
    """
    measures: list[Measure] = []
    if lpips:
        measures.append(partial(_lpips, _lpips_network(device)))
    if clip:
        measures.append(partial(_clip, *_pretrained("--clip", "CLIPModel", "CLIPProcessor", clip, device)))
    if dino:
        model, processor = _pretrained("--dino", "AutoModel", "AutoImageProcessor", dino, device)
        if model.main_input_name != "pixel_values" or not hasattr(model.config, "hidden_size"):
            raise ValueError(f"--dino: {dino} is a {type(model).__name__}, and no vision transformer")
        measures.append(partial(_dino, model, processor))
    return measures


class ClipText:
    """CLIP-T: of uint8 [N, H, W, 3] and a prompt each, the cosines of CLIP's embeddings [N], in [-1, 1], float64.

    name: as `load_perceptual`'s clip. Of a prompt CLIP reads 77 tokens. Raises ValueError as that does.
    """

    def __init__(self, name: str):
        self.model, self.processor = _pretrained("--clip", "CLIPModel", "CLIPProcessor", name, torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        found = _clip_embeddings(self.model, self.processor, images, prompts)
        return cosine_similarity(found.image_embeds.double(), found.text_embeds.double())


def _lpips_network(device: torch.device) -> torch.nn.Module:
    try:
        from lpips import LPIPS
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--lpips needs the package lpips: pip install lpips") from error
    try:
        return LPIPS(net="alex", verbose=False).to(device)
    except OSError as error:  # torchvision loads AlexNet's weights
        raise ValueError(f"--lpips: AlexNet's weights cannot be loaded ({error})") from error


def _pretrained(
    option: str, model_class: str, processor_class: str, name: str, device: torch.device
) -> tuple[Any, Any]:
    """(model, processor) of transformers, by the names of their classes. Raises ValueError, naming the option."""
    import transformers
    from transformers.utils import logging

    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():  # which transformers would take for a repository
        raise ValueError(f"{option}: no folder {name}")
    told, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # else a long table of missing weights precedes the line below
    try:
        load = getattr(transformers, model_class).from_pretrained
        model, loading = load(name, use_safetensors=True, output_loading_info=True)
        # a pooler is not used here, and published models lack it; for others transformers goes on with random weights
        if missing := sorted(key for key in loading["missing_keys"] if not key.startswith("pooler.")):
            raise ValueError(f"it has no weights for {missing[0]} of a {type(model).__name__}")
        processor = getattr(transformers, processor_class).from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{option}: no such model of transformers at {name!r}: {reason}") from error
    finally:
        logging.set_verbosity(told)
        if shown:
            logging.enable_progress_bar()
    return model.to(device), processor


@torch.no_grad()
def _lpips(network, image: np.ndarray, reference: np.ndarray, prompt: str) -> dict[str, float]:
    device = next(network.parameters()).device
    pair = [torch.from_numpy(x).to(device).permute(2, 0, 1)[None] / 127.5 - 1 for x in (image, reference)]
    return {"lpips": network(*pair).item()}


def _clip_embeddings(model, processor, images, prompts: list[str]) -> Any:
    """CLIP's text_embeds and image_embeds."""
    text = {"text": prompts, "truncation": True, "max_length": model.config.text_config.max_position_embeddings}
    inputs = processor(images=list(images), return_tensors="pt", padding=True, **text)
    return model(**inputs.to(model.device))


@torch.no_grad()
def _clip(model, processor, image: np.ndarray, reference: np.ndarray, prompt: str) -> dict[str, float]:
    found = _clip_embeddings(model, processor, (image, reference), [prompt])
    text, (of_image, of_reference) = found.text_embeds[0], found.image_embeds
    pairs = {"clip_image": (of_image, of_reference), "clip_text": (of_image, text)}
    pairs["clip_text_teacher"] = of_reference, text
    return {name: cosine_similarity(*pair, dim=0).item() for name, pair in pairs.items()}


@torch.no_grad()
def _dino(model, processor, image: np.ndarray, reference: np.ndarray, prompt: str) -> dict[str, float]:
    inputs = processor(images=[image, reference], return_tensors="pt").to(model.device)
    tokens = model(**inputs).last_hidden_state[:, 0]
    return {"dino": cosine_similarity(*tokens, dim=0).item()}
