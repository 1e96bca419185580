"""The script that trains the demo's teachers, for a few steps each."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from hybriddit.demo.canvas import GARMENT, NAMES, SCENES
from hybriddit.models import family_of

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from make_demo_teacher import GRID, TEACHERS, Canvases, TeacherTraining  # noqa: E402


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(ROOT / "assets/demo-teacher/vae").requires_grad_(False)


@pytest.fixture
def training(vae, tmp_path):
    """The training of a family's teacher for four steps; it continues what another one saved in the same folder."""
    garments = torch.rand(2 * len(NAMES), 1, GARMENT, GARMENT, generator=torch.Generator().manual_seed(0))
    canvases = Canvases(garments, torch.arange(len(NAMES)).repeat(2))

    def make(family, folder="work"):
        (tmp_path / folder).mkdir(exist_ok=True)
        args = Namespace(seed=0, batch=2, steps=4, lr=2e-3, work=tmp_path / folder)
        return TeacherTraining(args, TEACHERS[family], vae, canvases)

    return make


@pytest.mark.parametrize("family", TEACHERS)
def test_every_prompt_is_read_whole(family, vae):
    teacher = TEACHERS[family]
    pipeline = teacher.make_pipeline(vae)
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer"):
            ids = tokenizer([scene.prompt for scene in SCENES]).input_ids
            assert tokenizer.unk_token_id not in [i for row in ids for i in row[:-1]], name
            assert len({tuple(row) for row in ids}) == len(SCENES), name
            longest = tokenizer.model_max_length if isinstance(tokenizer, CLIPTokenizer) else teacher.text_length
            assert max(map(len, ids)) <= longest, name


def test_clip_reads_whole_words_where_its_tokens_are_part_of_the_text(vae):
    tokenizer = TEACHERS["sd3"].make_pipeline(vae).tokenizer
    ids = tokenizer("a t-shirt left, another sandal right").input_ids
    assert tokenizer.decode(ids[1:-1]) == "a t - shirt left , another sandal right"


@pytest.mark.parametrize("family", TEACHERS)
def test_a_teacher_starts_at_zero_and_its_family_finds_its_tokens(family, training):
    start = training(family)
    transformer, found = start.pipeline.transformer, family_of(start.pipeline.transformer)
    length = start.teacher.text_length
    text = found.encode_prompts(start.pipeline, [SCENES[0].prompt], max_sequence_length=length)
    assert text["prompt_embeds"].shape[1] == found.text_length(length, start.pipeline.tokenizer.model_max_length)
    noise = torch.randn(1, *found.latents_shape(transformer.config, GRID))
    output = transformer(**found.model_inputs(noise, torch.tensor([0.5]), text, GRID, None), return_dict=False)[0]
    assert output.shape == noise.shape and not output.any()


@pytest.mark.parametrize("family", TEACHERS)
def test_a_stopped_training_continues_as_if_it_had_not_stopped(family, training):
    whole, stopped = training(family, "whole"), training(family)
    first = {name: p.detach().clone() for name, p in whole.parameters.items()}
    whole.run()
    assert sum(not torch.equal(p, first[name]) for name, p in whole.parameters.items()) > len(first) / 2

    loss = stopped.loss

    def loss_of_two_steps():
        if stopped.step == 2:
            stopped.save()
            raise KeyboardInterrupt
        return loss()

    stopped.loss = loss_of_two_steps
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    continued = training(family)
    assert continued.step == 2
    continued.run()
    assert continued.losses == whole.losses
    for name, p in whole.parameters.items():
        assert torch.equal(continued.parameters[name], p), name
        assert torch.equal(continued.average[name], whole.average[name]), name


@pytest.mark.parametrize("family", TEACHERS)
def test_the_shipped_teacher_is_of_the_scripts_sizes(family, vae):
    made = TEACHERS[family].make_pipeline(vae)
    shipped = type(made).from_pretrained(str(ROOT / "assets" / TEACHERS[family].folder))

    def sizes(model):
        return {name: (p.shape, p.dtype) for name, p in model.named_parameters()}

    assert sizes(shipped.transformer) == sizes(made.transformer)
    for name, p in vae.named_parameters():
        assert torch.equal(shipped.vae.get_parameter(name), p), name
