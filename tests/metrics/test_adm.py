import json
import os
import socket
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from standins import SIDE, all_scores, extractor, features, fid, images, score

from hybriddit.cli import main
from hybriddit.metrics import adm_metrics, evaluate, frechet_distance_of

SAMPLES, REFERENCE = images(150), images(70, seed=1)
ROOT = Path(__file__).parents[2]


def close(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-8, abs=1e-10), name


def quiet(*arguments, **options):
    return adm_metrics(*arguments, progress=False, **options)


@pytest.fixture
def files(tmp_path):
    """Stored as ADM's, and compressed, which is read another way."""
    np.savez(tmp_path / "samples.npz", SAMPLES)
    np.savez_compressed(tmp_path / "reference.npz", REFERENCE)
    return tmp_path / "samples.npz", tmp_path / "reference.npz"


def test_the_suite_against_numpy_and_scipy(files):
    expected = all_scores(SAMPLES, REFERENCE)
    assert 0 < expected["recall"] < 1 and 0 < expected["precision"] < 1
    close(quiet(SAMPLES, REFERENCE, extractor), expected)
    for batch_size in (7, 150):
        close(quiet(*files, extractor, batch_size=batch_size), expected)
    close(quiet(str(files[0]), torch.from_numpy(REFERENCE), extractor), expected)
    exchanged = quiet(REFERENCE, SAMPLES, extractor)
    assert exchanged["fid"] == pytest.approx(expected["fid"], rel=1e-8)
    assert (exchanged["precision"], exchanged["recall"]) == (expected["recall"], expected["precision"])


def test_stored_headers_of_every_kind(files, tmp_path):
    with np.load(files[0]) as file:
        array = file["arr_0"]
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(array))
    np.savez(tmp_path / "labelled.npz", array, np.arange(150))  # as scripts of DiT's kind write it, labels beside
    for name in ("fortran.npz", "labelled.npz"):
        assert quiet(tmp_path / name, files[1], extractor) == quiet(*files, extractor)


def test_splits_follow_the_order_of_the_samples(files):
    logits = features(SAMPLES)["logits"]
    for split_size in (40, 150, 149):
        found = quiet(*files, extractor, split_size=split_size, batch_size=32)["inception_score"]
        assert found == pytest.approx(score(logits, split_size), rel=1e-10)
    shuffled = quiet(*files, extractor, split_size=40, shuffle=3)
    positions = torch.randperm(150, generator=torch.Generator().manual_seed(3)).numpy()
    reordered = np.empty_like(logits)
    reordered[positions] = logits
    assert shuffled["inception_score"] == pytest.approx(score(reordered, 40), rel=1e-10)
    assert shuffled["inception_score"] != pytest.approx(score(logits, 40), rel=1e-4)
    assert shuffled["fid"] == quiet(*files, extractor)["fid"], "only the splits go by the order"


def test_the_default_split_is_5000():
    many = images(10_400, seed=2)
    expected = score(features(many)["logits"])
    found = quiet(many, REFERENCE, lambda batch: {"logits": extractor(batch)["logits"]}, batch_size=512)
    assert found == {"inception_score": pytest.approx(expected, rel=1e-10)}


def test_a_references_own_statistics_come_first(tmp_path):
    """ADM's references: statistics of the whole training set, images of some of it, for precision and recall."""
    whole = images(400, seed=3)
    found = features(whole)
    stored = {}
    for kind, mean, covariance in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        stored |= {mean: found[kind].mean(0), covariance: np.cov(found[kind], rowvar=False)}
    np.savez(tmp_path / "both.npz", REFERENCE, **stored)
    np.savez(tmp_path / "statistics.npz", **stored)
    np.savez(tmp_path / "half.npz", REFERENCE, mu=stored["mu"], sigma=stored["sigma"])
    expected = all_scores(SAMPLES, REFERENCE)
    of_whole = all_scores(SAMPLES, whole)
    expected |= {name: of_whole[name] for name in ("fid", "sfid")}
    close(quiet(SAMPLES, tmp_path / "both.npz", extractor), expected)
    alone = {name: expected[name] for name in ("inception_score", "fid", "sfid")}
    close(quiet(SAMPLES, tmp_path / "statistics.npz", extractor), alone)
    expected["sfid"] = all_scores(SAMPLES, REFERENCE)["sfid"]
    close(quiet(SAMPLES, tmp_path / "half.npz", extractor), expected)
    # precomputed statistics spare the reference's images where nothing needs them
    seen = []

    def spatial(batch):
        seen.append(len(batch))
        return {"spatial": extractor(batch)["spatial"]}

    assert list(quiet(SAMPLES, tmp_path / "both.npz", spatial)) == ["sfid"] and sum(seen) == len(SAMPLES)


def test_an_extractor_without_some_of_the_features():
    expected = all_scores(SAMPLES, REFERENCE)
    for kinds, scores in (
        (["pooled"], ["fid", "precision", "recall"]),
        (["spatial"], ["sfid"]),
        (["spatial", "logits"], ["inception_score", "sfid"]),
    ):
        found = quiet(SAMPLES, REFERENCE, lambda batch, kinds=kinds: {kind: extractor(batch)[kind] for kind in kinds})
        close(found, {name: expected[name] for name in scores})


def test_frechet_distance_of_any_features():
    def channel_means(batch):
        return batch.double().mean((2, 3))

    means = [array.astype(float).mean((1, 2)) for array in (SAMPLES, REFERENCE)]
    found = frechet_distance_of(SAMPLES, REFERENCE, channel_means, batch_size=33, progress=False)
    assert found == pytest.approx(fid(*means), rel=1e-9)


def test_float32_and_half_features():
    def cast(dtype):
        return lambda batch: {kind: part.to(dtype) for kind, part in extractor(batch).items()}

    exact = quiet(SAMPLES, REFERENCE, extractor)
    for dtype, rel in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        found = quiet(SAMPLES, REFERENCE, cast(dtype))
        assert found["fid"] == pytest.approx(exact["fid"], rel=rel) and found["fid"] != exact["fid"]


def test_the_report_holds_what_the_numbers_depend_on(files):
    settings = {"sampler": "dopri5", "guidance": 1.5, "labels": "balanced", "vae": "ema", "ema": 0.9999}
    report = evaluate(*files, extractor, settings=settings, shuffle=1, progress=False, batch_size=50)
    assert json.loads(json.dumps(report)) == report
    close(report["metrics"], quiet(*files, extractor, shuffle=1))
    assert report["settings"] == settings
    for kind, path, array in zip(("samples", "reference"), files, (SAMPLES, REFERENCE), strict=True):
        digest = sha256(path.read_bytes()).hexdigest()
        expected = {"file": path.name, "sha256": digest, "images": len(array), "size": [SIDE, SIDE]}
        assert report[kind] == expected
    assert report["extractor"] == {"name": "extractor"}
    rules = report["rules"]
    assert (rules["split_size"], rules["neighbours"], rules["shuffle"], rules["precomputed_reference"]) == (
        5000,
        3,
        1,
        [],
    )
    assert report["processes"] == 1 and report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    in_memory = evaluate(SAMPLES, REFERENCE, extractor, progress=False)
    assert in_memory["samples"]["sha256"] == sha256(SAMPLES.tobytes()).hexdigest()


def test_progress_says_how_fast_and_how_long(files, capfd):
    adm_metrics(*files, extractor)
    said = capfd.readouterr().err
    assert "samples: 100%" in said and "reference: 100%" in said and "image/s" in said
    quiet(*files, extractor)
    assert capfd.readouterr() == ("", "")


PROCESS = """
import json, sys
sys.path.insert(0, {here!r})
import torch, standins, hybriddit.metrics.run
from hybriddit.cli import main
torch.set_num_threads(1)

def load(path, device):
    return standins.extractor

hybriddit.metrics.run.load_inception = load
code = main(sys.argv[1:])
assert not {{"diffusers", "transformers"}} & set(sys.modules), "a trainer of another kind must be able to use this"
sys.exit(code)
"""


@pytest.mark.parametrize("of_folder", [False, True], ids=["npz", "folder"])
def test_two_processes_are_one(of_folder, files, tmp_path):
    """As torchrun starts them; the shares of both sets end in the middle of a batch and of a split."""
    (tmp_path / "weights.pth").write_bytes(b"")
    (tmp_path / "samples.json").write_text('{"sampler": "euler"}')
    sets = files
    if of_folder:
        sets = (tmp_path / "samples", files[1])
        sets[0].mkdir()
        for index, pixels in enumerate(SAMPLES):
            Image.fromarray(pixels).save(sets[0] / f"{index:03d}.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = PROCESS.format(here=str(Path(__file__).parent))
    command = ["evaluate", *map(str, sets), "--inception", str(tmp_path / "weights.pth"), "--batch-size", "8"]
    command += ["--shuffle", "5", "--json", "--out", str(tmp_path / "scores" / "scores.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *command],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    report = json.loads(said[0][0])
    assert said[1] == ("", ""), "the first process speaks for all"
    assert report == json.loads((tmp_path / "scores" / "scores.json").read_text())
    close(report["metrics"], quiet(*files, extractor, shuffle=5))
    assert report["processes"] == 2 and report["settings"] == {"sampler": "euler"} and report["device"] == "cpu"


def saved(path, *arrays, **named):
    np.savez(path, *arrays, **named)
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])
    return path


def flipped(path):
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    return path


def text(path):
    path.write_text("no zip")
    return path


BAD = {
    "not there": (lambda f: f / "none.npz", "no npz file at .*none.npz"),
    "a folder": (lambda f: f, "no npz file at"),
    "no npz": (lambda f: text(f / "bad.npz"), "bad.npz is damaged or no npz file"),
    "cut short": (lambda f: cut(saved(f / "bad.npz", SAMPLES)), "bad.npz is damaged or no npz file"),
    "a flipped bit": (lambda f: flipped(saved(f / "bad.npz", SAMPLES)), "the checksum of arr_0.npy does not match"),
    "pickled objects": (lambda f: saved(f / "bad.npz", np.array([{}, {}])), "no plain array .*allow_pickle=False"),
    "floats": (lambda f: saved(f / "bad.npz", SAMPLES / 255), r"must be uint8 \[N, H, W, 3\], not float64"),
    "channels first": (lambda f: SAMPLES.transpose(0, 3, 1, 2), r"uint8 \[N, H, W, 3\], not uint8 \[150, 3, 6, 6\]"),
    "one image": (lambda f: SAMPLES[:1], "has 1 image.*at least 2"),
    "none": (lambda f: saved(f / "bad.npz", SAMPLES[:0]), "has 0 image.*at least 2"),
    "other names": (lambda f: saved(f / "bad.npz", images=SAMPLES), "has no images .arr_0.*only images"),
}


@pytest.mark.parametrize("row", BAD)
@pytest.mark.parametrize("kind", ["samples", "reference"])
def test_bad_files_are_told_in_one_line(row, kind, tmp_path):
    make, message = BAD[row]
    bad = make(tmp_path)
    arguments = {"samples": SAMPLES, "reference": REFERENCE, kind: bad}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        quiet(**arguments, extractor=extractor)
    assert "\n" not in str(caught.value) and 20 < len(str(caught.value)) < 400


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").write_text, ("yes",))

    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "trap.npz", np.array([Trap(), Trap()], dtype=object))
        with pytest.raises(ValueError, match="no plain array"):
            quiet(tmp_path / "trap.npz", REFERENCE, extractor)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("stored, message", [
    ({"mu": np.zeros(5), "sigma": np.eye(5)}, "mu and sigma are 5 wide, .*'pooled' features 12"),
    ({"mu": np.zeros(12), "sigma": np.eye(5)}, r"must be \[F\] and \[F, F\]"),
    ({"mu": np.zeros(12), "sigma": np.full((12, 12), np.nan)}, "not finite"),
])  # fmt: skip
def test_statistics_that_do_not_fit(stored, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        quiet(SAMPLES, saved(tmp_path / "reference.npz", **stored), extractor)


def broken(kind, change):
    def broken_extractor(batch):
        found = extractor(batch)
        found[kind] = change(found[kind])
        return found

    return broken_extractor


@pytest.mark.parametrize("wrong, message", [
    (broken("pooled", lambda x: x / 0), "'pooled' of images 0 to 63 are not finite"),
    (broken("logits", lambda x: x * float("nan")), "'logits' of images 0 to 63 are not finite"),
    (broken("spatial", lambda x: x[:, :, None]), r"'spatial' must be floating-point \[64, width\], not .*\[64, 20, 1\]"),
    (broken("pooled", lambda x: x[1:]), r"'pooled' must be floating-point \[64, width\], not .*\[63, 12\]"),
    (lambda batch: {"2048": batch}, "none of pooled, spatial and logits, only 2048"),
])  # fmt: skip
def test_extractors_that_break_the_contract(wrong, message):
    with pytest.raises(ValueError, match=message):
        quiet(SAMPLES, REFERENCE, wrong)


def test_options_that_cannot_be():
    for options, message in (
        ({"batch_size": 0}, "batch size"),
        ({"split_size": 0}, "split size"),
        ({"distributed": True}, "init_process_group"),
        ({"neighbours": 70}, "at least 71 images"),
    ):
        with pytest.raises(ValueError, match=message):
            quiet(SAMPLES, REFERENCE, extractor, **options)


def test_the_command(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hybriddit.metrics.run.load_inception", lambda path, device: extractor)
    (tmp_path / "weights.pth").write_bytes(b"")
    command = ["evaluate", *map(str, files), "--inception", str(tmp_path / "weights.pth")]
    assert main([*command, "--out", str(tmp_path / "scores.json")]) == 0
    said = capsys.readouterr()
    scores = all_scores(SAMPLES, REFERENCE)
    assert f"fid              {scores['fid']:.4f}\n" in said.out and "samples: 100%" in said.err
    assert json.loads((tmp_path / "scores.json").read_text())["settings"] == {}
    (tmp_path / "made.json").write_text('{"steps": 250}')
    assert main([*command, "--quiet", "--json", "--settings", str(tmp_path / "made.json")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["settings"] == {"steps": 250} and said.err == ""
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "--help"])
    assert exit.value.code == 0 and "example: hybriddit evaluate" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    (["--inception", "none.pth"], "no Inception weights at none.pth: get https://"),
    (["--settings", "none.json"], "no settings file at none.json"),
    (["--settings", "samples.npz"], "samples.npz is no JSON file"),
    (["--settings", "list.json"], "must hold a JSON object"),
    (["--out", "."], "is a folder"),
    (["--batch-size", "0"], "batch size must be at least 1"),
])  # fmt: skip
def test_what_the_user_can_put_right_is_one_line(change, message, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hybriddit.metrics.run.load_inception", lambda path, device: extractor)
    Path("weights.pth").write_bytes(b"")
    Path("list.json").write_text("[]")
    command = ["evaluate", "samples.npz", "reference.npz", "--inception", "weights.pth", "--quiet", *change]
    assert main(command) == 1
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("hybriddit: ") and message in said


def test_a_full_disk_does_not_cost_the_scores(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hybriddit.metrics.run.load_inception", lambda path, device: extractor)
    (tmp_path / "weights.pth").write_bytes(b"")
    out = tmp_path / "scores.json"
    out.write_text("older")

    def full(self, *arguments, **options):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    command = ["evaluate", *map(str, files), "--inception", str(tmp_path / "weights.pth"), "--quiet"]
    assert main([*command, "--out", str(out)]) == 1
    [said] = capsys.readouterr().err.splitlines()
    assert "No space left on device" in said and '"fid": ' in said
    assert out.read_text() == "older" and not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_missing_files_are_told_before_torch_is_loaded(tmp_path):
    code = "import sys, hybriddit.cli; print(hybriddit.cli.main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "evaluate", "a.npz", "b.npz"], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "1 False\n" and done.stderr == "hybriddit: no npz file or folder of images at a.npz\n"
