import copy
import os
import signal
from pathlib import Path

import pytest
import torch
from runs import in_two_processes
from tiny_pipelines import PROMPTS, TEXT_LENGTH, tiny_data, tiny_pipeline

from hybriddit import HybridConfig, hybridize
from hybriddit.data import latents
from hybriddit.data import teacher as teacher_module
from hybriddit.data import teacher_images as module
from hybriddit.data.latents import LatentData, LatentInfo
from hybriddit.data.shards import Processes, save_shard
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
    (text,) = tmp_path.glob("text-*")
    names = ["data.json", "latents-00000-00004.safetensors", "latents-00004-00006.safetensors", text.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert [p.name[:8] for p in text.iterdir()] == ["prompts-", "prompts-"]

    def unexpected(*arguments, **kwargs):
        raise AssertionError("the cache is whole")

    monkeypatch.setattr(teacher_module.PromptEmbeddings, "_encode", unexpected)
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
    shard = tmp_path / "latents-00000-00004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="latents-00000-00004.safetensors is damaged"):
        tiny_data(flux, images=4, cache=tmp_path)
    shard.unlink()
    (tmp_path / "latents-00000-00005.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match="latents-00000-00005.safetensors is damaged .*not hold 5 rows"):
        tiny_data(flux, images=4, cache=tmp_path)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"steps": 3}, "steps"),
        ({"max_sequence_length": 5}, "max_sequence_length"),
        ({"states": 1}, "states"),
        ({"height": 32}, "height"),
        ({"seed": 1}, "seed"),
        ({"guidance_scale": 3.0}, "guidance_scale"),
        ({"dtype": torch.bfloat16}, "dtype"),
    ],
)
def test_all_that_the_rows_depend_on_is_part_of_a_caches_identity(flux, tmp_path, changed, named):
    tiny_data(flux, images=4, cache=tmp_path)
    other, changed = copy.copy(flux), dict(changed)
    other.transformer = copy.deepcopy(flux.transformer).to(changed.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=f"other values of {named}:"):
        tiny_data(other, **{"images": 4, **changed}, cache=tmp_path)


@pytest.fixture
def made(monkeypatch):
    """The seeds of the images that are made from now on, batch by batch."""
    batches = []

    def note(pipeline, text, empty, info, seeds, *arguments, sample=module.sample, **kwargs):
        batches.append(list(seeds))
        return sample(pipeline, text, empty, info, seeds, *arguments, **kwargs)

    monkeypatch.setattr(module, "sample", note)
    return batches


def files_of(folder):
    """Content and time of the last change of all files, and of the folders, in which a new file shows."""
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in [folder, *folder.rglob("*")]
    }


def assert_same_rows(one, other, count, **tolerance):
    assert len(one) == len(other) == count
    for key, value in one.rows(range(count)).items():
        torch.testing.assert_close(value, other.rows(range(count))[key], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_images_that_are_made_stay_whatever_the_batch_size(batch_size, flux, tmp_path, made, monkeypatch):
    """Out of memory after eight of twelve images: they are used, and the others made with another batch size."""
    tiny_data(flux, images=8, cache=tmp_path)
    made.clear()
    data = tiny_data(flux, images=12, cache=tmp_path, batch_size=batch_size)
    assert sum(made, []) == [8, 9, 10, 11] and max(map(len, made)) == min(batch_size, 4)
    assert_same_rows(data, tiny_data(flux, images=12), 12, rtol=1e-4, atol=1e-5)
    before = files_of(tmp_path)
    made.clear()
    tiny_data(flux, images=12, cache=tmp_path, batch_size=5)
    assert not made and files_of(tmp_path) == before, "a finished cache is only opened"


def test_a_gap_is_filled(flux, tmp_path, made):
    """As several processes leave it that were killed."""
    tiny_data(flux, images=12, cache=tmp_path)
    (tmp_path / "latents-00004-00008.safetensors").unlink()
    made.clear()
    data = tiny_data(flux, images=12, cache=tmp_path, batch_size=3)
    assert made == [[4, 5, 6], [7]]
    assert_same_rows(data, tiny_data(flux, images=12), 12, rtol=1e-4, atol=1e-5)


def test_more_images_are_added_and_fewer_are_the_first_ones(flux, tmp_path, made):
    few = tiny_data(flux, images=6, cache=tmp_path)
    made.clear()
    many = tiny_data(flux, images=10, cache=tmp_path)
    assert made == [[6, 7, 8, 9]] and len(many) == 10
    assert torch.equal(many.rows(range(6))["latents"], few.rows(range(6))["latents"])
    made.clear()
    before = files_of(tmp_path)
    assert_same_rows(tiny_data(flux, images=6, cache=tmp_path), few, 6)
    assert not made and files_of(tmp_path) == before
    assert tiny_data(flux, images=6).content == few.content != many.content


def test_prompts_may_be_added_where_no_image_repeats_one(flux, tmp_path, made):
    data = tiny_data(flux, images=3, prompts=PROMPTS[:3], cache=tmp_path / "a")
    made.clear()
    more = tiny_data(flux, images=6, prompts=PROMPTS, cache=tmp_path / "a")
    assert made == [[3, 4, 5]]
    assert_same_rows(more, tiny_data(flux, images=6), 6, rtol=1e-4, atol=1e-5)
    assert_same_rows(tiny_data(flux, images=3, prompts=PROMPTS[:3], cache=tmp_path / "a"), data, 3)
    tiny_data(flux, images=4, prompts=PROMPTS[:3], cache=tmp_path / "b")
    before = files_of(tmp_path)
    for prompts, images, where in ((PROMPTS, 4, "image 3 is of 'a red shoe', and would be of 'a blue shoe'"),
                                   (["a bag", *PROMPTS[1:]], 4, "image 0 is of 'a red shoe', and would be of 'a bag'"),
                                   (PROMPTS[::-1], 1, "image 0 is of")):  # fmt: skip
        with pytest.raises(ValueError, match=f"other values of prompts .{where}"):
            tiny_data(flux, images=images, prompts=prompts, cache=tmp_path / "b")
    assert files_of(tmp_path) == before


def test_a_teacher_is_known_by_its_weights_and_not_by_its_place(tmp_path, made, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline("flux_dev").save_pretrained("teacher")
    first = tiny_data(load_pipeline("teacher"), images=2, cache="cache")
    made.clear()
    Path("teacher").rename("moved")
    for place in ("moved", str(tmp_path / "moved"), "moved/../moved"):
        assert_same_rows(tiny_data(load_pipeline(place), images=2, cache="cache"), first, 2)
    assert not made and not capsys.readouterr().out

    tiny_pipeline("flux_dev", seed=1).save_pretrained("teacher")
    second = tiny_data(load_pipeline("teacher"), images=2, cache="cache")
    said = capsys.readouterr().out
    assert "cache holds the set of another teacher (transformer, text_encoder, text_encoder_2 differ)" in said
    assert_same_rows(second, tiny_data(load_pipeline("teacher"), images=2), 2)
    assert not torch.equal(first.rows([0])["latents"], second.rows([0])["latents"])
    made.clear()
    for place, expected in (("moved", first), ("teacher", second)):  # both are kept
        assert_same_rows(tiny_data(load_pipeline(place), images=2, cache="cache"), expected, 2)
    assert not made and len(list(Path("cache").glob("teacher-*"))) == 1
    with pytest.raises(ValueError, match="other values of seed"):
        tiny_data(load_pipeline("teacher"), images=2, cache="cache", seed=5)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2", "scheduler"])
def test_every_part_that_makes_the_images_tells_teachers_apart(part, flux, tmp_path, made):
    tiny_data(flux, images=1, cache=tmp_path)
    made.clear()
    other = copy.copy(flux)
    setattr(other, part, copy.deepcopy(getattr(flux, part)))
    if part == "scheduler":
        other.scheduler.register_to_config(max_shift=2.0)
    else:
        with torch.no_grad():
            list(getattr(other, part).parameters())[-1].flatten()[-1].mul_(1.5)
    tiny_data(other, images=1, cache=tmp_path)
    assert made == [[0]]


def test_what_makes_no_image_does_not(flux, tmp_path, made):
    tiny_data(flux, images=1, cache=tmp_path)
    made.clear()
    other = copy.copy(flux)
    other.vae = None
    other.scheduler = copy.deepcopy(flux.scheduler)
    other.scheduler.register_to_config(of_a_later_diffusers=True)
    tiny_data(other, images=1, cache=tmp_path)
    assert not made


def test_a_cache_is_that_of_the_dense_teacher_whatever_hybrid_it_is_for(flux, tmp_path, made):
    for window in (3, 5, None):
        hybrid = copy.copy(flux)
        hybrid.transformer = copy.deepcopy(flux.transformer)
        if window:
            hybridize(hybrid.transformer, HybridConfig(window=window, delta_rank=2))
        data = tiny_data(hybrid, images=2, cache=tmp_path)
    assert made == [[0, 1]] and data.content == tiny_data(flux, images=2).content


def share_of(rank, cache, killed):
    """The part of ten images that one of two processes makes. killed: how many files the second makes until then."""
    save, saved = latents.save_shard, []

    def counted(path, tensors):
        if rank == 1 and len(saved) == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        saved.append(path)
        save(path, tensors)

    latents.save_shard = counted
    teacher_module.save_shard = counted
    data = tiny_data(tiny_pipeline("flux_dev"), images=10, batch_size=2, cache=cache, processes=Processes(rank, 2))
    assert len(data) == 10 and len(saved) == [2 + 3, 1 + 2][rank], "of three parts of the prompts and five of images"


def test_two_processes_make_the_images_of_one(tmp_path):
    assert in_two_processes(share_of, tmp_path / "two", None, output=tmp_path / "out.txt") == [0, 0]
    tiny_data(tiny_pipeline("flux_dev"), images=10, batch_size=2, cache=tmp_path / "one")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("one", "two"))
    assert one == two and len(one) == 9


def test_a_killed_process_ends_the_other_and_nothing_is_lost(tmp_path, made):
    first, second = in_two_processes(share_of, tmp_path / "two", 2, output=tmp_path / "out.txt")
    assert first == 1 and second == -signal.SIGKILL
    said = (tmp_path / "out.txt.0").read_text().splitlines()[-1]
    assert said.startswith("ConnectionError: another process of this run has ended, see what it said: ")
    data = tiny_data(tiny_pipeline("flux_dev"), images=10, batch_size=2, cache=tmp_path / "two")
    assert sum(made, []) == [6, 7], "the second's second part"
    assert len(data) == 10


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
