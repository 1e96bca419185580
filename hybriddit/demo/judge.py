"""The judge of the demo's images: a garment classifier, and a test whether two garments are the same instance."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .canvas import NAMES, Scene, crops


class GarmentClassifier(nn.Sequential):
    """Classifies grey garments: [B, 1, GARMENT, GARMENT] in [0, 1] -> logits [B, len(NAMES)]."""

    def __init__(self, width: int = 32):
        layers: list[nn.Module] = []
        channels = 1
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
            channels = out
        super().__init__(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels * 9, len(NAMES)))


def untint(garments: torch.Tensor) -> torch.Tensor:
    """Make tinted garments grey, [..., 3, H, W] -> [..., 1, H, W]: every tint has one channel at full strength."""
    return garments.amax(dim=-3, keepdim=True)


def match_score(images: torch.Tensor) -> torch.Tensor:
    """How alike the two garments of each canvas are, in [0, 1], [B]: 1 − |left − right|² / (|left|² + |right|²).

    1 is the same picture; two garments that do not overlap, or share no tint, score 0.
    """
    left, right = crops(images.float()).flatten(2).unbind(1)
    energy = left.square().sum(1) + right.square().sum(1)
    return 1 - (left - right).square().sum(1) / energy.clamp_min(1e-6)


class Judge:
    """The classifier and the match threshold, from `assets/demo-judge.safetensors`."""

    def __init__(self, classifier: GarmentClassifier, threshold: float):
        self.classifier, self.threshold = classifier.eval(), threshold

    @classmethod
    def load(cls, path: str | Path) -> Judge:
        classifier = GarmentClassifier()
        try:
            with safe_open(path, "pt") as file:
                threshold = float(file.metadata()["match_threshold"])
            classifier.load_state_dict(load_file(path))
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged or no judge ({error}): check it out anew") from error
        return cls(classifier, threshold)

    def save(self, path: str | Path) -> None:
        save_file(self.classifier.state_dict(), path, metadata={"match_threshold": str(self.threshold)})

    @torch.no_grad()
    def names(self, images: torch.Tensor) -> list[tuple[str, str]]:
        """The classifier's names of the left and right garments in canvases [B, 3, CANVAS, CANVAS] in [0, 1]."""
        seen = self.classifier(untint(crops(images.float())).flatten(0, 1)).argmax(1).view(-1, 2)
        return [(NAMES[left], NAMES[right]) for left, right in seen.tolist()]

    def __call__(self, images: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
        """Score canvases [B, 3, CANVAS, CANVAS] in [0, 1]; both scores are shares in [0, 1].

        prompt_agreement: the share of garments that the classifier names as the prompt does.
        pair_match: the share of canvases whose two garments match if and only if the prompt says "same". If half of the
            prompts do, a model whose garments never (or always) match scores 0.5.
        """
        right = [
            (seen == wanted)
            for names, scene in zip(self.names(images), scenes, strict=True)
            for seen, wanted in zip(names, (scene.left, scene.right), strict=True)
        ]
        matches = match_score(images) > self.threshold
        agree = [bool(match) == scene.same for match, scene in zip(matches, scenes, strict=True)]
        return {"prompt_agreement": sum(right) / len(right), "pair_match": sum(agree) / len(agree)}


def train_classifier(
    garments: torch.Tensor, labels: torch.Tensor, *, epochs: int = 4, seed: int = 0
) -> GarmentClassifier:
    """Train on real grey garments [N, 1, GARMENT, GARMENT] in [0, 1]; labels [N] are indices into NAMES."""
    torch.manual_seed(seed)
    model = GarmentClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    batch = 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (len(labels) // batch))
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels))[: len(labels) // batch * batch].split(batch):
            images = garments[chosen]
            # shifted by up to a pixel, as generated garments may be
            images = torch.roll(images, tuple(torch.randint(-1, 2, (2,)).tolist()), dims=(2, 3))
            loss = F.cross_entropy(model(images), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
