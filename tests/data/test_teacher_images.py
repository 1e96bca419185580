import copy

import pytest
import torch
from tiny_pipelines import PROMPTS, TEXT_LENGTH, tiny_data, tiny_pipeline

from hybriddit import HybridConfig, hybridize
from hybriddit.data import latents
from hybriddit.data import teacher_images as module
from hybriddit.data.latents import LatentData, LatentInfo
from hybriddit.data.shards import save_shard
from hybriddit.pipelines.loading import load_pipeline


@pytest.fixture(scope="module")
def flux():
    return tiny_pipeline("flux_dev")


@pytest.mark.parametrize("family", ["pixart_sigma", "sd35", "flux_dev", "flux_schnell"])
def test_latents_are_what_the_pipeline_itself_makes_of_the_prompt(family):
    pipeline = tiny_pipeline(family)
    data = tiny_data(pipeline, images=6, seed=100)
    assert len(data) == 6
    rows = data.rows([5, 1])
    binning = {"use_resolution_binning": False, "clean_caption": False} if family == "pixart_sigma" else {}
    for row, index in enumerate((5, 1)):
        expected = pipeline(
            PROMPTS[index % 4],
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=3.5,
            max_sequence_length=TEXT_LENGTH,
            generator=torch.Generator().manual_seed(100 + index),
            output_type="latent",
            **binning,
        ).images[0]
        torch.testing.assert_close(rows["latents"][row], expected, rtol=1e-3, atol=1e-4)


def test_a_converted_pipeline_makes_its_teachers_images(flux):
    hybrid = copy.copy(flux)
    hybrid.transformer = hybridize(copy.deepcopy(flux.transformer), HybridConfig(window=3))
    for parameter in (p for name, p in hybrid.transformer.named_parameters() if "hybrid.gate" in name):
        torch.nn.init.ones_(parameter)
    assert torch.equal(tiny_data(hybrid).rows([0])["latents"], tiny_data(flux).rows([0])["latents"])


def test_a_cache_is_made_once_and_gives_the_same(flux, tmp_path, monkeypatch):
    memory = tiny_data(flux, images=6)
    monkeypatch.setattr(flux, "vae", None)  # not needed
    tiny_data(flux, images=6, cache=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "data.json",
        "empty.safetensors",
        "latents-00000.safetensors",
        "latents-00001.safetensors",
    ]

    def unexpected(*arguments, **kwargs):
        raise AssertionError("the cache is whole")

    for user in (module, latents):
        monkeypatch.setattr(user, "encode_prompts", unexpected)
    monkeypatch.setattr(module, "sample", unexpected)
    cached = tiny_data(flux, images=6, cache=tmp_path)
    order = [5, 0, 3, 4]
    assert memory.rows(order).keys() == cached.rows(order).keys()
    for key, value in memory.rows(order).items():
        assert torch.equal(value, cached.rows(order)[key])
    for key, value in memory.empty.items():
        assert torch.equal(value, cached.empty[key])


def test_an_interrupted_cache_is_continued(flux, tmp_path, monkeypatch):
    calls = []

    def stop_at_second(*arguments, sample=module.sample, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*arguments, **kwargs)

    monkeypatch.setattr(module, "sample", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        tiny_data(flux, images=12, cache=tmp_path)
    data = tiny_data(flux, images=12, cache=tmp_path)
    assert len(calls) == 4 and len(data) == 12
    assert torch.equal(data.rows([9])["latents"], tiny_data(flux, images=12).rows([9])["latents"])


def test_a_cache_made_otherwise_or_damaged_is_refused(flux, tmp_path):
    tiny_data(flux, images=4, cache=tmp_path)
    with pytest.raises(ValueError, match="other values of guidance_scale, seed"):
        tiny_data(flux, images=4, cache=tmp_path, seed=1, guidance_scale=2.0)
    shard = tmp_path / "latents-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="latents-00000.safetensors is damaged"):
        tiny_data(flux, images=4, cache=tmp_path)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"steps": 3}, "steps"),
        ({"max_sequence_length": 5}, "max_sequence_length"),
        ({"states": 1}, "states"),
        ({"height": 32}, "height"),
        ({"images": 3}, "images, prompts"),
        ({"dtype": torch.bfloat16}, "dtype"),
    ],
)
def test_all_that_the_rows_depend_on_is_part_of_a_caches_identity(flux, tmp_path, changed, named):
    tiny_data(flux, images=4, cache=tmp_path)
    other, changed = copy.copy(flux), dict(changed)
    other.transformer = copy.deepcopy(flux.transformer).to(changed.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=f"other values of {named}:"):
        tiny_data(other, **{"images": 4, **changed}, cache=tmp_path)


def test_a_table_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "table.safetensors"
    save_shard(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def half(partial, tensors):
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("hybriddit.data.shards.write_tensors", half)
    with pytest.raises(OSError, match="no space"):
        save_shard(path, {"a": torch.zeros(2)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_empty_set_and_a_missing_pipeline(tmp_path):
    with pytest.raises(ValueError, match="at least one image"):
        LatentData([], {}, LatentInfo(64, 64, 2, 1.0))
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        load_pipeline(str(tmp_path), torch.float32)
    with pytest.raises(ValueError, match="could not be fetched"):
        load_pipeline("no-such/repository", torch.float32)
