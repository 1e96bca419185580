"""Embeddings of prompts, each made and kept once; and what of a teacher is in memory while a set is made."""

import gc
import hashlib
import json
import weakref

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_teacher_images import assert_same_rows, files_of
from tiny_pipelines import PROMPTS, TEXT_LENGTH, tiny_data, tiny_pipeline

from hybriddit.data.identity import describe_components
from hybriddit.data.image_folder import image_folder
from hybriddit.data.teacher import PromptEmbeddings
from hybriddit.models import family_of
from hybriddit.training import distill as distill_module
from hybriddit.training.run_config import load_config


@pytest.fixture
def encoded(monkeypatch):
    """The prompts that are encoded from now on, in their order."""
    prompts = []
    encode = PromptEmbeddings._encode
    monkeypatch.setattr(
        PromptEmbeddings, "_encode", lambda self, texts: (prompts.extend(texts), encode(self, texts))[1]
    )
    return prompts


def kept_prompts(cache):
    """(prompts, bytes of their tensors) in a cache's text folders."""
    tables = [load_file(path) for path in cache.glob("text-*/prompts-*.safetensors")]
    names = [row.tobytes() for table in tables for row in table.pop("sha256").numpy()]
    return names, sum(tensor.nbytes for table in tables for tensor in table.values())


@pytest.mark.parametrize("family", ["pixart_sigma", "sd3", "flux_dev"])
def test_a_prompt_s_tensors_are_made_and_kept_once(family, pipelines, encoded, tmp_path):
    pipeline = pipelines(family)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]  # one is there twice
    data = tiny_data(pipeline, images=12, prompts=prompts, cache=tmp_path, batch_size=5)
    assert encoded == ["", PROMPTS[0], PROMPTS[1]]
    names, size = kept_prompts(tmp_path)
    row = {key: value for key, value in data.rows([0]).items() if key != "latents"}
    assert len(set(names)) == len(names) == 3 and size == 3 * sum(value.nbytes for value in row.values())
    assert all(set(load_file(path)) == {"latents"} for path in tmp_path.glob("latents-*"))
    in_memory = tiny_data(pipeline, images=12, prompts=prompts, batch_size=5)
    assert_same_rows(data, in_memory, 12)
    for number in range(12):
        text = family_of(pipeline.transformer).encode_prompts(
            pipeline, [prompts[number % 3]], max_sequence_length=TEXT_LENGTH
        )
        for key, value in text.items():
            torch.testing.assert_close(data.rows([number])[key], value, rtol=1e-4, atol=1e-5)


def test_captions_that_images_share_are_kept_once(pipelines, encoded, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text(PROMPTS[number % 2])
    settings = {"height": 64, "width": 64, "steps": 2, "guidance_scale": 3.5, "max_sequence_length": TEXT_LENGTH}
    image_folder(pipelines("sd3"), tmp_path / "images", **settings, cache=tmp_path / "cache", progress=False)
    assert sorted(encoded) == sorted(["", *PROMPTS[:2]]) and len(kept_prompts(tmp_path / "cache")[0]) == 3


def test_shards_of_which_no_row_is_left_are_passed_over(pipelines, tmp_path):
    """The first images of a folder are removed: the others stay their own, with their captions."""
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text(PROMPTS[number % 4])
    settings = {"height": 64, "width": 64, "steps": 2, "guidance_scale": 3.5, "max_sequence_length": TEXT_LENGTH}
    settings |= {"cache": tmp_path / "cache", "batch_size": 2, "progress": False}
    before = image_folder(pipelines("sd3"), tmp_path / "images", **settings)
    for number in (0, 1, 3):
        (tmp_path / "images" / f"{number}.png").unlink()
    data = image_folder(pipelines("sd3"), tmp_path / "images", **settings)
    assert data.prompts == [PROMPTS[number % 4] for number in (2, 4, 5)]
    for key, value in data.rows(range(3)).items():
        assert torch.equal(value, before.rows([2, 4, 5])[key]), key


def test_teachers_with_the_same_encoders_share_the_text(pipelines, encoded, tmp_path):
    pipeline = tiny_pipeline("flux_dev")
    tiny_data(pipeline, images=4, cache=tmp_path)
    encoded.clear()
    with torch.no_grad():
        pipeline.transformer.proj_out.weight[0, 0] += 1
    tiny_data(pipeline, images=4, cache=tmp_path)
    assert not encoded and len(list(tmp_path.glob("teacher-*"))) == len(list(tmp_path.glob("text-*"))) == 1
    with torch.no_grad():
        next(pipeline.text_encoder_2.parameters())[0, 0] += 1
    tiny_data(pipeline, images=4, cache=tmp_path)
    assert encoded == ["", *PROMPTS] and len(list(tmp_path.glob("text-*"))) == 2
    tiny_data(pipeline, images=4, cache=tmp_path / "long", max_sequence_length=TEXT_LENGTH + 1)
    assert len(encoded) == 10, "another length is another text"


@pytest.mark.parametrize("recorded", [256, None])
def test_no_length_is_the_pipeline_s_own(recorded, pipelines, encoded, tmp_path):
    """Left out and given are the same set, also where an earlier version recorded that it was left out."""
    pipeline = pipelines("sd3")
    tiny_data(pipeline, images=4, cache=tmp_path, max_sequence_length=None)
    record = json.loads((tmp_path / "data.json").read_text())
    assert record["max_sequence_length"] == 256
    if recorded is None:
        (tmp_path / "data.json").write_text(json.dumps(record | {"max_sequence_length": None}))
        [text] = tmp_path.glob("text-*")
        encoders = describe_components(pipeline, ["text_encoder", "text_encoder_2", "text_encoder_3"])
        made_by = [family_of(pipeline.transformer).name, None, encoders]
        text.rename(tmp_path / f"text-{hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:12]}")
    before = files_of(tmp_path)
    encoded.clear()
    for length in (256, None):
        tiny_data(pipeline, images=4, cache=tmp_path, max_sequence_length=length)
    assert not encoded and files_of(tmp_path) == before
    with pytest.raises(ValueError, match="other values of max_sequence_length"):
        tiny_data(pipeline, images=4, cache=tmp_path, max_sequence_length=TEXT_LENGTH)


def with_text_in_every_row(cache):
    """Make the cache what versions before wrote: each row has its prompt's tensors, and the empty prompt a file."""
    data = tiny_data(tiny_pipeline("flux_dev"), images=6, cache=cache)
    save_file(data.empty, cache / "empty.safetensors")
    start = 0
    for path in sorted(cache.glob("latents-*")):
        count = len(load_file(path)["latents"])
        save_file(data.rows(range(start, start + count)), path)
        start += count
    for path in sorted(cache.glob("text-*/*"), reverse=True):
        path.unlink()
    for folder in cache.glob("text-*"):
        folder.rmdir()


def test_a_cache_with_the_text_in_every_row_is_opened_and_extended(encoded, tmp_path):
    with_text_in_every_row(tmp_path)
    encoded.clear()
    before = files_of(tmp_path)
    flux = tiny_pipeline("flux_dev")
    expected = tiny_data(flux, images=6)
    encoded.clear()
    assert_same_rows(tiny_data(flux, images=6, cache=tmp_path), expected, 6)
    assert not encoded and files_of(tmp_path) == before, "it is only opened"
    data = tiny_data(flux, images=8, cache=tmp_path)
    assert encoded == [PROMPTS[2], PROMPTS[3]], "those of the new images alone"
    assert_same_rows(data, tiny_data(flux, images=8), 8, rtol=1e-4, atol=1e-5)
    after = files_of(tmp_path)
    assert all(after[path] == before[path] for path in before if path.suffix == ".safetensors")


def test_damaged_text_is_told(pipelines, tmp_path):
    tiny_data(pipelines("sd3"), images=4, cache=tmp_path)
    path = max(tmp_path.glob("text-*/*"), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + bytes(20))
    with pytest.raises(ValueError, match=f"{path.name} is damaged .its checksum does not match.: delete it and run"):
        tiny_data(pipelines("sd3"), images=4, cache=tmp_path).rows(range(4))
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        tiny_data(pipelines("sd3"), images=4, cache=tmp_path)


@pytest.fixture
def loads(monkeypatch):
    """What is loaded from now on, "encoders" or "transformer": never one while the other is there."""
    parts, alive = [], []
    load_base = distill_module.load_base

    def noted(base, dtype, *, without):
        gc.collect()
        held = [part() for part in alive if part() is not None]
        assert not held, f"{type(held[0]).__name__} is still there"
        pipeline = load_base(base, dtype, without=without)
        parts.append("transformer" if pipeline.transformer is not None else "encoders")
        alive.extend(weakref.ref(part) for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
        assert (pipeline.transformer is None) != (pipeline.text_encoder is None)
        return pipeline

    monkeypatch.setattr(distill_module, "load_base", noted)
    return parts


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Distills a tiny FLUX with these overrides."""
    monkeypatch.chdir(tmp_path)
    tiny_pipeline("flux_dev").save_pretrained("teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    (tmp_path / "run.yaml").write_text(f"""
model: {{path: teacher}}
hybrid: {{window: 3}}
data: {{prompts: prompts.txt, images: 2, height: 64, width: 64, steps: 2, max_sequence_length: {TEXT_LENGTH}}}
train: {{steps: 1, batch_size: 2, progress: false}}
output: {{folder: run, checkpoint_every: 1, log_every: 1}}
""")

    def call(*overrides, resume=False):
        return distill_module.run(load_config("run.yaml", overrides), resume=resume)

    return call


def test_encoders_and_transformer_are_not_in_memory_together(run, loads):
    run("data.cache=cache")
    assert loads == ["encoders", "transformer"]
    del loads[:]
    run("data.cache=cache", "train.steps=2", resume=True)
    assert loads == ["encoders", "transformer"], "the encoders are looked at: they are part of the teacher"
    del loads[:]
    run("data.cache=cache", f"data.prompts={PROMPTS[:4]}", "data.images=4", "output.folder=more")
    assert loads == ["encoders", "transformer"] * 2, "what is missing is known with the transformer"
    del loads[:]
    run("output.folder=in-memory")
    assert loads == ["encoders", "transformer"]


def test_a_teacher_is_looked_at_once(run, monkeypatch):
    """A digest takes as long as reading all weights."""
    digests = []

    def noted(model, digest=distill_module.weights_digest):
        digests.append(type(model).__name__)
        return digest(model)

    for place in ("hybriddit.data.identity", "hybriddit.training.distill"):
        monkeypatch.setattr(f"{place}.weights_digest", noted)
    run("data.cache=cache")
    run("data.cache=cache", "train.steps=2", resume=True)
    assert digests.count("FluxTransformer2DModel") == 2 and len(digests) == 6, "once each in each of two starts"


@pytest.mark.parametrize("kind", ["model", "group"])
def test_an_offloaded_teacher_makes_the_same_images_and_is_loaded_anew_to_train(kind, run, loads, monkeypatch):
    with pytest.raises(ValueError, match=f"data.offload={kind} spares the memory of an accelerator, and the device is"):
        run(f"data.offload={kind}", "output.folder=refused")
    expected = {name: weight.detach().clone() for name, weight in run().named_parameters()}
    del loads[:]
    monkeypatch.setattr(distill_module, "check_offload", lambda *arguments: None)
    placed, place = [], distill_module.place

    def noted(pipeline, device, offload):
        place(pipeline, device, offload)
        hooks = ("_hf_hook", "_diffusers_hook")
        parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        placed.append(any(hasattr(module, hook) for part in parts for module in part.modules() for hook in hooks))

    monkeypatch.setattr(distill_module, "place", noted)
    found = run(f"data.offload={kind}", "output.folder=offloaded")
    assert loads == ["encoders", "transformer", "transformer"] and placed == [True, True, False]
    for name, weight in found.named_parameters():
        assert torch.equal(weight, expected[name]), name
