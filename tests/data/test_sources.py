"""Sets that are not the teacher's images: folders of images, and the teacher's way to its images."""

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from family_calls import call, latents_of
from PIL import Image
from runs import in_two_processes, noted_grids
from tiny_pipelines import FAMILIES, PROMPTS, TEXT_LENGTH, of_prompt, recipe_of, text_setting, tiny_data, tiny_pipeline

from hybriddit import HybridConfig
from hybriddit.data import image_folder as module
from hybriddit.data import pictures
from hybriddit.data.image_folder import captioned_images, image_folder, read_image
from hybriddit.data.shards import ALONE, Processes
from hybriddit.data.sources import SOURCES, Source, make_data, sources_of
from hybriddit.training.distill import check_settings, distill, draw_batches
from hybriddit.training.run_config import DataConfig, DistillConfig, ModelConfig, OutputConfig

GOOD = ["0.png", "1.png", "2.png", "4.webp", "3.jpg"]  # of the folder below, in its order


@pytest.fixture
def folder(tmp_path):
    """Five good images with captions in both layouts, and four that cannot be used."""
    folder, generator = tmp_path / "images", np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)

    def save(name, size=(80, 64)):
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)

    for number in range(3):
        save(f"{number}.png")
        (folder / f"{number}.txt").write_text(f" {PROMPTS[number]}\n")
    save("more/3.jpg", (64, 200))
    save("4.webp")
    (folder / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": name, "text": text}) + "\n"
            for name, text in (("more/3.jpg", "a blue shoe"), ("4.webp", "a red bag"))
        )
    )
    save("uncaptioned.png")
    for name in ("truncated.png", "text.jpg", "empty.png"):
        (folder / name).with_suffix(".txt").write_text("a shoe")
    save("truncated.png")
    whole = (folder / "truncated.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.png").touch()
    return folder


def encode(pipeline, folder, **kwargs):
    size = {"height": 64, "width": 64, "steps": 2, "guidance_scale": 3.5, **text_setting(pipeline)}
    return image_folder(pipeline, folder, **{**size, "batch_size": 2, "progress": False, **kwargs})


def test_a_source_is_a_function_and_a_row(monkeypatch):
    made = Source(lambda *arguments: arguments, lambda settings: 7, "distill", "folder")
    both = Processes(1, 2)
    with pytest.raises(ValueError, match="data.source must be one of teacher, folder, trajectories, got 'mine'"):
        DistillConfig(data=DataConfig(source="mine", folder="x"))
    monkeypatch.setitem(SOURCES, "mine", made)
    config = DistillConfig(data=DataConfig(source="mine", folder="x"))
    assert make_data("pipeline", config.data, progress=False) == ("pipeline", config.data, False, ALONE)
    assert make_data("pipeline", config.data, processes=both) == ("pipeline", config.data, True, both)
    check_settings(DistillConfig(ModelConfig("model"), data=config.data, output=OutputConfig(folder="out")))
    with pytest.raises(ValueError, match="data.folder must be a folder of images"):
        DistillConfig(data=DataConfig(source="mine"))


def test_what_a_row_says_of_its_images_is_so(folder):
    pipeline = tiny_pipeline("sd3")
    names = ("teacher", "folder", "trajectories")
    assert names == sources_of("distill") and sources_of("train") == ("classes",)
    for name in names:
        row = SOURCES[name]
        settings = DataConfig(name, str(folder), 2, PROMPTS, 3, None, 64, 64, 2, 3.5, TEXT_LENGTH)
        data = make_data(pipeline, settings, progress=False)
        assert data.info.teacher_made == row.teacher_made
        assert ("states" in data.rows([0])) == (data.info.states > 0) == row.trajectories
        assert row.count(settings) == {"folder": 8}.get(name, 3), "told without a model: nothing is opened yet"


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_of_a_folder_decode_to_its_images(family, pipelines, folder, capsys):
    pipeline = pipelines(family)
    data = encode(pipeline, folder)
    assert len(data) == 5 and not data.info.teacher_made
    assert "4 of 9 images" in capsys.readouterr().out

    # in the order of the names: 0.png, 1.png, 2.png, 4.webp, more/3.jpg
    pixels = read_image(folder / "more" / "3.jpg", 64, 64)
    pixels = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(
        data.rows([4])["latents"], latents_of(family, pipeline.vae, pixels), rtol=1e-4, atol=1e-5
    )
    embeds = data.rows([3, 4])["prompt_embeds"]
    expected = tiny_data(pipeline, images=4, steps=1).rows([2, 3])["prompt_embeds"]  # "a red bag", "a blue shoe"
    torch.testing.assert_close(embeds, expected)


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
@pytest.mark.parametrize("family", ["pixart_sigma", "sd3"])
def test_a_vae_scaled_per_channel_is_refused(name, family, folder):
    """The families' pipelines do not apply it, so the teacher does not know latents that have it."""
    pipeline = tiny_pipeline(family)
    pipeline.vae.register_to_config(**{name: [0.5] * 4})
    with pytest.raises(ValueError, match=f"the VAE has {name} per channel, which is not applied here"):
        encode(pipeline, folder)


def test_images_are_cut_at_the_centre_and_turned_upright(tmp_path):
    picture = np.zeros((64, 192, 3), np.uint8)
    picture[:, 64:128] = (255, 0, 0)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    assert np.array_equal(np.array(read_image(tmp_path / "wide.png", 64, 64)), picture[:, 64:128])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png", 192, 64).size == (64, 192)
    assert np.array(read_image(tmp_path / "turned.png", 192, 64))[96, 32].tolist() == [255, 0, 0]


def test_the_first_images_alone(pipelines, folder, tmp_path, capsys):
    """By path; an image that cannot be read counts, one without a caption does not."""
    assert sorted(path.name for path in folder.rglob("*.*g"))[:4] == ["0.png", "1.png", "2.png", "3.jpg"]
    whole = encode(pipelines("sd3"), folder, cache=tmp_path / "cache")
    capsys.readouterr()
    for count, usable in ((1, 1), (4, 4), (5, 4), (8, 5), (9, 5)):
        first = encode(pipelines("sd3"), folder, cache=tmp_path / "cache", max_images=count)
        assert len(first) == usable
        assert torch.equal(first.rows(range(usable))["latents"], whole.rows(range(usable))["latents"])
        assert ("(max_images " in capsys.readouterr().out) == (count < 9)


def test_a_folders_cache_lists_what_was_left_out_and_knows_its_files(pipelines, folder, tmp_path):
    cache = tmp_path / "cache"
    first = encode(pipelines("sd3"), folder, cache=cache)
    skipped = json.loads((cache / "skipped.json").read_text())
    names = {path.rsplit("/", 1)[1] for path in skipped}
    assert names == {"uncaptioned.png", "truncated.png", "text.jpg", "empty.png"}
    assert skipped[str(folder / "uncaptioned.png")] == "it has no caption"
    assert skipped[str(folder / "text.jpg")].startswith("it is damaged or no image: ")
    again = encode(pipelines("sd3"), folder, cache=cache)
    for one, other in zip(first.rows(range(5)).values(), again.rows(range(5)).values(), strict=True):
        assert torch.equal(one, other)
    (folder / "uncaptioned.png").unlink()
    encode(pipelines("sd3"), folder, cache=cache)
    assert len(json.loads((cache / "skipped.json").read_text())) == 3, "the list is that of the folder as it is"


@pytest.fixture
def work(monkeypatch):
    """What is read and encoded from now on: names of pictures that are opened, and that are encoded."""
    opened, encoded = [], []

    def note_opened(path, *arguments, read=pictures.open_image):
        opened.append(Path(str(path)).name)
        return read(path, *arguments)

    def note_encoded(path, *arguments, read=module.read_image):
        encoded.append(Path(str(path)).name)
        return read(path, *arguments)

    monkeypatch.setattr(pictures, "open_image", note_opened)
    monkeypatch.setattr(module, "read_image", note_encoded)
    return SimpleNamespace(opened=opened, encoded=encoded, clear=lambda: (opened.clear(), encoded.clear()))


def assert_same_rows(one, other):
    """To rounding: the images are encoded in other batches."""
    assert len(one) == len(other)
    for key, value in one.rows(range(len(one))).items():
        torch.testing.assert_close(value, other.rows(range(len(one)))[key], rtol=1e-4, atol=1e-5)


def test_a_finished_cache_is_opened_without_a_look_at_the_images(pipelines, folder, tmp_path, work, monkeypatch):
    first = encode(pipelines("sd3"), folder, cache=tmp_path / "cache")
    assert sorted(work.opened) == sorted([*GOOD, "empty.png", "text.jpg", "truncated.png"]) and work.encoded == GOOD
    work.clear()
    before = {path: path.stat().st_mtime_ns for path in [tmp_path / "cache", *(tmp_path / "cache").iterdir()]}
    monkeypatch.setattr("hybriddit.files.replacing", lambda path: pytest.fail(f"{path} is written"))
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: pytest.fail("an image's bytes are read"))
    for changed in ({}, {"batch_size": 1}, {"steps": 9, "guidance_scale": 1.0}, {"processes": Processes()}):
        assert_same_rows(encode(pipelines("sd3"), folder, cache=tmp_path / "cache", **changed), first)
    folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    moved = encode(pipelines("sd3"), "moved", cache=tmp_path / "cache")
    assert_same_rows(moved, first)
    assert moved.content == first.content
    assert not work.opened and not work.encoded
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_copied_images_are_read_again_but_not_decoded(pipelines, folder, tmp_path, work, monkeypatch):
    """They have other times; the cache may be in a folder that cannot be written."""
    first = encode(pipelines("sd3"), folder, cache=tmp_path / "cache")
    for path in folder.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    work.clear()
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "write_json", raise_read_only)
        assert_same_rows(encode(pipelines("sd3"), folder, cache=tmp_path / "cache"), first)
    assert not work.opened and not work.encoded
    encode(pipelines("sd3"), folder, cache=tmp_path / "cache")
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: pytest.fail("the new times are kept"))
    encode(pipelines("sd3"), folder, cache=tmp_path / "cache")


def raise_read_only(path, values):
    raise OSError(30, "Read-only file system", str(path))


def test_a_picture_that_could_not_be_opened_is_tried_again(pipelines, folder, tmp_path):
    link = folder / "3.png"
    link.symlink_to(tmp_path / "later.png")
    (folder / "3.txt").write_text("a bag")
    assert len(encode(pipelines("sd3"), folder, cache=tmp_path / "cache")) == 5
    assert "cannot be opened" in json.loads((tmp_path / "cache" / "skipped.json").read_text())[str(link)]
    shutil.copy(folder / "0.png", tmp_path / "later.png")
    assert len(encode(pipelines("sd3"), folder, cache=tmp_path / "cache")) == 6


def test_a_folder_s_cache_of_version_0_1_is_known_by_names_lengths_and_captions(
    pipelines, folder, tmp_path, work, monkeypatch
):
    cache, captions = tmp_path / "cache", captioned_images(folder)
    first = encode(pipelines("sd3"), folder, cache=cache)
    rows = first.rows(range(5))
    settings = json.loads((cache / "data.json").read_text())
    for name in ("rows", "teacher"):
        del settings[name]
    good = [path for path in captions if path.name in GOOD]
    files = [(str(path.relative_to(folder)), path.stat().st_size, captions[path]) for path in good]
    settings |= {"files": hashlib.sha256(json.dumps(files).encode()).hexdigest(), "batch_size": 2}
    (cache / "data.json").write_text(json.dumps(settings))
    (cache / "pictures.json").unlink()
    for number, path in enumerate(sorted(cache.glob("latents-*"))):
        path.rename(cache / f"latents-{number:05d}.safetensors")
    before = {path: path.stat().st_mtime_ns for path in [cache, *cache.iterdir()]}
    work.clear()
    folder.rename(tmp_path / "moved")
    for batch_size in (2, 5):
        data = encode(pipelines("sd3"), tmp_path / "moved", cache=cache, batch_size=batch_size)
        assert all(torch.equal(values, data.rows(range(5))[key]) for key, values in rows.items())
    assert not work.opened and {path: path.stat().st_mtime_ns for path in before} == before
    (tmp_path / "moved" / "0.txt").write_text("a bag")
    with pytest.raises(ValueError, match="made by version 0.1 with other values of files .it does not tell which"):
        encode(pipelines("sd3"), tmp_path / "moved", cache=cache)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_images_in_a_tar_are_known_by_their_content(pipelines, folder, tmp_path, work):
    """Packed, they are those of the folder; a tar that is packed anew is read, and what is new in it encoded."""
    loose = encode(pipelines("sd3"), folder, cache=tmp_path / "cache")
    (tmp_path / "packed").mkdir()

    def pack():
        with tarfile.open(tmp_path / "packed" / "0.tar", "w") as tar:
            for name in ("0.png", "0.txt", "1.png", "1.txt", "2.png", "2.txt"):
                tar.add(folder / name, name)

    pack()
    work.clear()
    packed = encode(pipelines("sd3"), tmp_path / "packed", cache=tmp_path / "cache")
    assert not work.opened and not work.encoded and len(packed) == 3
    assert torch.equal(packed.rows(range(3))["latents"], loose.rows(range(3))["latents"])
    edit(folder)
    pack()
    encode(pipelines("sd3"), tmp_path / "packed", cache=tmp_path / "cache")
    assert work.opened == work.encoded == ["0.png"]


def test_an_interrupted_cache_goes_on_without_a_look_at_the_images_that_are_done(
    pipelines, folder, tmp_path, work, monkeypatch
):
    encode_images = module.encode_images

    def stop(pipeline, images):
        if len(work.encoded) > 2:
            raise KeyboardInterrupt
        return encode_images(pipeline, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "encode_images", stop)
        encode(pipelines("sd3"), folder, cache=tmp_path / "cache")
    work.clear()
    data = encode(pipelines("sd3"), folder, cache=tmp_path / "cache", batch_size=1)
    assert not work.opened and work.encoded == GOOD[2:]
    assert_same_rows(data, encode(pipelines("sd3"), folder))


def share_of(rank, folder, cache):
    """The part of the folder's set that one of two processes makes."""
    opened, save, saved = [], module.encode_images, []
    read = pictures.open_image
    pictures.open_image = lambda path: (opened.append(path), read(path))[1]
    module.encode_images = lambda pipeline, images: (saved.append(len(images)), save(pipeline, images))[1]
    data = encode(tiny_pipeline("sd3"), folder, cache=cache, processes=Processes(rank, 2))
    assert len(data) == 5 and len(opened) == 4 and saved == [[2, 1], [2]][rank]


def test_two_processes_encode_a_folder_as_one_does(folder, tmp_path):
    assert in_two_processes(share_of, folder, tmp_path / "two", output=tmp_path / "out.txt") == [0, 0], [
        (tmp_path / f"out.txt.{rank}").read_text() for rank in range(2)
    ]
    encode(tiny_pipeline("sd3"), folder, cache=tmp_path / "one")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("one", "two"))
    assert one == two and len(one) == 9


def edit(folder):
    """Another picture of the same length in bytes."""
    length = (folder / "0.png").stat().st_size
    pixels = np.random.default_rng(7).integers(0, 255, (80, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "0.png")
    assert (folder / "0.png").stat().st_size == length


@pytest.mark.parametrize(
    ("change", "named", "encoded"),
    [
        (edit, "0.png", ["0.png"]),
        (lambda folder: (folder / "1.txt").write_text("a blue shoe"), "1.png", ["1.png"]),
        (lambda folder: (folder / "uncaptioned.txt").write_text("a bag"), "uncaptioned.png", ["uncaptioned.png"]),
        (lambda folder: shutil.copy(folder / "1.png", folder / "00.png"), None, []),
        (lambda folder: (folder / "1.png").unlink(), None, []),
        (lambda folder: [(folder / f"0.{end}").rename(folder / f"z.{end}") for end in ("png", "txt")], None, []),
    ],
    ids=["edited", "recaptioned", "added", "without a caption", "removed", "renamed"],
)
def test_the_set_is_that_of_the_folder_as_it_is_and_only_what_is_new_is_encoded(
    change, named, encoded, pipelines, folder, tmp_path, work, capsys
):
    first = encode(pipelines("sd3"), folder, cache=tmp_path / "cache")
    again = encode(pipelines("sd3"), folder, cache=tmp_path / "cache")
    assert first.content == again.content
    work.clear(), capsys.readouterr()
    change(folder)
    data = encode(pipelines("sd3"), folder, cache=tmp_path / "cache")
    assert work.encoded == encoded
    said = [line for line in capsys.readouterr().out.splitlines() if "new or have changed since" in line]
    assert len(said) == len(encoded) and all(f"{named}, ..." in line for line in said)
    fresh = encode(pipelines("sd3"), folder)
    assert_same_rows(data, fresh)
    assert data.content == fresh.content
    assert (data.content == first.content) == (len(captioned_images(folder)) == 10), "an image without a caption"
    work.clear()
    encode(pipelines("sd3"), folder, cache=tmp_path / "cache")
    assert not work.opened and not work.encoded


def test_what_is_left_out_is_said_with_its_reason(pipelines, folder, tmp_path, capsys):
    (folder / "0.txt").write_bytes("un café".encode("cp1252"))
    (folder / "notes.md").write_text("notes")
    (folder / "1.png").unlink()
    Image.new("RGBA", (64, 64)).save(folder / "1.png", exif=b"Exif\0\0\0\x08\0\2\1\x12\0\3")
    os.mkfifo(folder / "2.jpg")  # to open a pipe would wait for ever; 2.txt is its caption, too
    assert len(encode(pipelines("sd3"), folder, cache=tmp_path / "cache")) == 4
    said = capsys.readouterr().out.splitlines()
    assert f"passed over in {folder}: .md (1)" in said
    skipped = json.loads((tmp_path / "cache" / "skipped.json").read_text())
    assert "0.txt is no UTF-8 text" in skipped[str(folder / "0.png")]


def test_the_seed_draws_the_captions(pipelines, tmp_path):
    for i in range(8):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{i}.png")
    rows = ({"file_name": f"{i}.png", "text": PROMPTS} for i in range(8))
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = []
    for seed in (0, 0, 1):
        settings = DataConfig("folder", str(tmp_path), 2, "", 3, None, 64, 64, 2, 3.5, TEXT_LENGTH, seed=seed)
        drawn.append(make_data(pipelines("sd3"), settings, progress=False).rows(range(8))["prompt_embeds"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_cache_that_does_not_say_what_it_is_of_is_not_gone_on_with(pipelines, folder, tmp_path, monkeypatch):
    """As where its copy was interrupted. An empty name is no cache, and nothing is written where the run is."""
    encode(pipelines("sd3"), folder, cache=tmp_path / "cache")
    (tmp_path / "cache" / "data.json").unlink()
    with pytest.raises(ValueError, match="cache has latents but no data.json, which says what they are of: delete it"):
        encode(pipelines("sd3"), folder, cache=tmp_path / "cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    encode(pipelines("sd3"), folder, cache="")
    assert not list((tmp_path / "here").iterdir())


def test_what_a_folder_cannot_be(pipelines, tmp_path):
    with pytest.raises(FileNotFoundError, match="no image folder"):
        captioned_images(tmp_path / "none")
    with pytest.raises(ValueError, match="no images in"):
        captioned_images(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images"):
        encode(pipelines("sd3"), tmp_path)
    with pytest.raises(ValueError, match="none of the 1 images in .* has a caption"):  # before a model is loaded
        SOURCES["folder"].count(DataConfig("folder", str(tmp_path)))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png"}\n')
    with pytest.raises(ValueError, match="metadata.jsonl, line 2"):
        captioned_images(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_what_the_sampler_passes_through(family, pipelines, tmp_path, monkeypatch):
    pipeline = pipelines(family)
    data = tiny_data(pipeline, images=3, steps=5, states=3, cache=tmp_path)
    rows = data.rows([2])
    assert rows["states"].shape[1] == 3 and rows["times"].shape == (1, 3)

    seen = []

    def note(pipeline, step, timestep, tensors):
        seen.append((tensors["latents"].clone(), float(timestep)))
        return {}

    called = {"height": 64, "width": 64, "num_inference_steps": 5}
    called["true_cfg_scale" if family == "qwen_image" else "guidance_scale"] = 3.5
    if family == "pixart_sigma":  # which has the older kind of callback
        called |= {"use_resolution_binning": False}
        called |= {"callback": lambda step, timestep, latents: seen.append((latents.clone(), float(timestep)))}
    elif family == "longcat_image":  # which has none
        step = pipeline.scheduler.step

        def noted(prediction, timestep, *others, **named):
            found = step(prediction, timestep, *others, **named)
            note(pipeline, None, timestep, {"latents": found[0]})
            return found

        monkeypatch.setattr(pipeline.scheduler, "step", noted)
    else:
        called |= {"callback_on_step_end": note}
    pipeline(
        **of_prompt(pipeline, PROMPTS[2]),
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
        **called,
    )
    torch.testing.assert_close(rows["latents"], seen[-1][0], rtol=1e-3, atol=1e-3)
    # inputs of steps 0, 2 and 4: noise, and what steps 1 and 3 left
    for state, (latents, _) in zip(rows["states"][0, 1:], (seen[1], seen[3]), strict=True):
        torch.testing.assert_close(state, latents[0], rtol=1e-4, atol=1e-4)
    unit = 1 if family == "pixart_sigma" else 1000
    expected = torch.tensor([seen[step][1] / unit for step in (0, 2, 4)])
    torch.testing.assert_close(rows["times"][0].float(), expected)


@pytest.mark.parametrize("family", ("pixart_sigma", "sd35", "flux_dev"))
def test_distilling_on_trajectories(family):
    pipeline = tiny_pipeline(family)
    config = DistillConfig(hybrid=HybridConfig(window=3, map_rank=4))
    config.data.prompts, config.data.images, config.data.steps, config.data.source = PROMPTS, 8, 4, "trajectories"
    config.data.height = config.data.width = 64
    config.data.max_sequence_length, config.train.progress = TEXT_LENGTH, False
    config.train.steps, config.train.batch_size, config.optim.lr = 30, 8, 1e-2
    config.optim.warmup_steps, config.optim.gate_lr_factor, config.optim.ema_decay = 3, 5.0, 0.8
    data = make_data(pipeline, config.data, progress=False)
    recipe = recipe_of(pipeline)
    (batch,) = draw_batches(data, recipe, config, 0, 0.0, {(64, 64): (8, 8)}, pipeline.scheduler)
    rows = data.rows(range(8))
    for state, time in zip(batch[0], batch[2], strict=True):
        match = (rows["states"] == state).flatten(2).all(2) & (rows["times"] == time)
        assert match.any(), "a state goes with its own time"
    losses = []
    for steps in (1, 30):
        fresh = tiny_pipeline(family)
        config.train.steps = steps
        student = distill(fresh, data, config)
        losses.append(distance(family, student, batch, pipeline.transformer))
    assert losses[1] < 0.8 * losses[0]


def distance(family, student, batch, teacher):
    states, _, times, text, *_ = batch
    with torch.no_grad():
        one, other = (call(family, model, states, times, text, 3.5) for model in (student, teacher))
    return (one - other).square().mean().item()


def test_a_trajectory_has_no_task_loss(pipelines):
    config = DistillConfig(hybrid=HybridConfig(window=3, map_rank=4))
    config.train.progress, config.loss.task = False, 1.0
    with pytest.raises(ValueError, match="loss.task: the states of a trajectory"):
        distill(tiny_pipeline("sd3"), tiny_data(pipelines("sd3"), states=2), config)
    with pytest.raises(ValueError, match=r"data.states must be in \[1, data.steps = 2\]"):
        tiny_data(pipelines("sd3"), states=3)


@pytest.mark.parametrize("source", ["folder", "trajectories"])
def test_samples_are_drawn_whatever_the_source(source, folder, tmp_path, monkeypatch):
    """The grid's first column is what the teacher's pipeline makes of the first prompts, the second the student's."""
    pipeline = tiny_pipeline("sd3")
    config = DistillConfig(hybrid=HybridConfig(window=3, map_rank=4))
    config.data.source = source
    if SOURCES[source].reads == "folder":
        config.data.folder = str(folder)
    config.data.prompts, config.data.images, config.data.steps, config.data.states = PROMPTS, 2, 2, 2
    config.data.height = config.data.width = 64
    config.data.max_sequence_length, config.train.progress = TEXT_LENGTH, False
    config.train.steps, config.train.batch_size = 1, 2
    config.output.folder, config.output.sample_every, config.output.samples = str(tmp_path / "run"), 1, 2
    config.optim.lr = 0.1  # one step then shows
    grids = noted_grids(monkeypatch)
    distill(pipeline, make_data(pipeline, config.data, progress=False), config)
    grid = grids["step-00000001.png"]
    assert grid.captions == [PROMPTS[:2]] * 2
    columns = [np.concatenate([np.asarray(image, int) for image in column]) for column in grid.columns]
    assert columns[0].shape == (128, 64, 3) and columns[0].std() > 1
    # the captions of 0.png and 1.png are the first two prompts
    called = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": TEXT_LENGTH}
    made = []
    for drawn in (tiny_pipeline("sd3"), pipeline):
        generators = [torch.Generator().manual_seed(config.train.seed + i) for i in range(2)]
        images = drawn(PROMPTS[:2], guidance_scale=config.data.guidance_scale, generator=generators, **called).images
        made.append(np.concatenate([np.asarray(image, int) for image in images]))
        assert abs(columns[len(made) - 1] - made[-1]).max() <= 1
    assert abs(made[0] - made[1]).max() > 8, "the student's are its own"
