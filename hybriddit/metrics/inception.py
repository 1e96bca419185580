"""The ADM suite's feature extractor: the Inception of 2015, with the weights that published FIDs are measured with."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import torch

NAME = "Inception v3, TensorFlow 2015-12-05"
SHA256 = "6726825d"  # the first 8 digits, which torch.hub's convention puts into the file's name
# the same file under torch-fidelity's and pytorch-fid's name
FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


def spatial_features(activations: torch.Tensor) -> torch.Tensor:
    """sFID's features (arXiv 2103.03841) from Inception's Mixed_6d.branch1x1, [B, C, H, W] -> [B, H * W * 7].

    They are the first 7 channels, channels last, as TensorFlow lays them out: 17 x 17 x 7 = 2023. Precomputed
    statistics of a reference are in that order.
    """
    return activations[:, :7].permute(0, 2, 3, 1).flatten(1)


def find_inception(path: str | os.PathLike | None = None) -> Path:
    """Find the weights' file: `path`, else in torch.hub's cache, where torch-fidelity and pytorch-fid put it.

    Nothing is downloaded. Raises FileNotFoundError, saying where to get the file.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = (
        Path(path) if path is not None else next((folder / name for name in FILES if (folder / name).is_file()), None)
    )
    if found is None or not found.is_file():
        missing = f"no Inception weights in {folder}" if path is None else f"no Inception weights at {path}"
        raise FileNotFoundError(
            f"{missing}: get {URL} and put it into {folder} (`hybriddit evaluate` also takes its path, --inception)"
        )
    return found


class Inception(torch.nn.Module):
    """torch-fidelity's port of Inception.

    It takes uint8 [B, 3, H, W] of any size, resizes to 299 x 299 as TensorFlow 1 did, and returns {"pooled": [B, 2048],
    "spatial": [B, 2023], "logits": [B, 1008]}, float32. Logits are without bias, as in the ADM suite. `description`
    says which weights these are.
    """

    def __init__(self, network: torch.nn.Module, description: dict[str, str]):
        super().__init__()
        self.network, self.description = network, description

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        seen, device = [], self.network.fc.weight.device
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: seen.append(call[-1]))
        try:
            # the caller's autocast, or TensorFloat-32 convolutions (torch's default), would lose precision
            with torch.autocast(device.type, enabled=False), _float32_convolutions():
                pooled, logits = self.network(images.to(device))
        finally:
            hook.remove()
        return {"pooled": pooled, "spatial": spatial_features(seen[0]), "logits": logits}


def _float32_convolutions():
    cudnn = torch.backends.cudnn
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    return cudnn.flags(**kept, allow_tf32=False)


def load_inception(
    path: str | os.PathLike | None = None, device: str | torch.device = "cpu", *, check: bool = True
) -> Inception:
    """Load the extractor for `adm_metrics`. path: see `find_inception`. check: accept the published weights only.

    Only tensors in the file are unpickled. Raises FileNotFoundError if the weights are not found, ModuleNotFoundError
    without torch-fidelity, and ValueError for another file.
    """
    path = find_inception(path)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Inception needs torch-fidelity: pip install torch-fidelity") from error
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if check and not digest.startswith(SHA256):
        raise ValueError(
            f"{path} is damaged or another file (its SHA-256 begins with {digest[:8]}, not {SHA256}): get {URL} anew"
        )
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        plain = io.BytesIO()  # torch-fidelity unpickles the file it is given, so give it one that we have written
        torch.save(state, plain)
        plain.seek(0)
        features = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("inception", features, feature_extractor_weights_path=plain)
    except Exception as error:  # torch may raise anything on a wrong file, in many lines
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} holds no Inception weights ({type(error).__name__}: {said[:200]})") from error
    return Inception(network, {"name": NAME, "weights": path.name, "weights_sha256": digest}).to(device)
