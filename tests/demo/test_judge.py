"""The demo's canvases and judges, on images whose right answer is known."""

import pytest
import torch
from torch import nn

from hybriddit.demo.canvas import (
    CANVAS,
    DIFFERENT_SCENES,
    GARMENT,
    NAMES,
    SAME_SCENES,
    SCENES,
    Scene,
    compose,
    crops,
    scene_of,
)
from hybriddit.demo.judge import GarmentClassifier, Judge, match_score, untint


def test_every_prompt_names_one_scene():
    assert len({scene.prompt for scene in SCENES}) == len(SCENES) == len(SAME_SCENES) + len(DIFFERENT_SCENES)
    assert all(scene_of(scene.prompt) == scene for scene in SCENES)
    with pytest.raises(ValueError, match="knows no prompt 'a hat'"):
        scene_of("a hat")


def test_crops_undo_compose():
    left, right = torch.rand(2, 3, 3, GARMENT, GARMENT)
    canvas = compose(left, right)
    assert canvas.shape == (3, 3, CANVAS, CANVAS)
    assert torch.equal(crops(canvas), torch.stack([left, right], dim=1))
    assert canvas.sum() == pytest.approx((left.sum() + right.sum()).item(), rel=1e-5), "nothing outside the garments"


def test_match_score_is_one_for_twins_and_zero_for_what_shares_nothing():
    red = torch.zeros(1, 3, GARMENT, GARMENT)
    red[:, 0] = torch.rand(GARMENT, GARMENT)
    blue = red.flip(1)
    assert match_score(compose(red, red)).item() == pytest.approx(1)
    assert match_score(compose(red, blue)).item() == pytest.approx(0, abs=1e-6)
    half = match_score(compose(red, red / 2)).item()
    assert half == pytest.approx(1 - 0.25 / 1.25, rel=1e-5)


def test_untint_undoes_a_tint_with_a_full_channel():
    grey = torch.rand(2, 1, GARMENT, GARMENT)
    tint = torch.tensor([1.0, 0.3, 0.6]).view(1, 3, 1, 1)
    assert torch.equal(untint(grey * tint), grey)


class _Brightness(nn.Module):
    """Names a garment by its mean brightness in tenths."""

    def forward(self, garments):
        tenth = (garments.mean((1, 2, 3)) * 10).round().long()
        return nn.functional.one_hot(tenth, len(NAMES)).float()


def test_judge_counts_garments_and_pairs():
    judge = Judge(_Brightness(), threshold=0.8)

    def garment(index):
        return torch.full((1, 3, GARMENT, GARMENT), index / 10)

    scenes = [Scene(NAMES[3], NAMES[3], same=True), Scene(NAMES[3], NAMES[3], same=True), Scene(NAMES[1], NAMES[4])]
    images = torch.cat(
        [compose(garment(3), garment(3)), compose(garment(3), garment(1)), compose(garment(2), garment(4))]
    )
    assert judge.names(images) == [(NAMES[3], NAMES[3]), (NAMES[3], NAMES[1]), (NAMES[2], NAMES[4])]
    # scores are 1, 0.6 and 0.8: the first pair matches as asked, the second should and does not, the third is right
    assert judge(images, scenes) == {"prompt_agreement": 4 / 6, "pair_match": 2 / 3}


def test_judge_survives_save_and_load(tmp_path):
    torch.manual_seed(0)
    judge = Judge(GarmentClassifier(), threshold=0.625)
    judge.save(tmp_path / "judge.safetensors")
    loaded = Judge.load(tmp_path / "judge.safetensors")
    images = torch.rand(4, 3, CANVAS, CANVAS)
    assert loaded.threshold == 0.625
    assert loaded.names(images) == judge.names(images)
