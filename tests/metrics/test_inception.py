"""The real extractor's loading and layout, with random weights; its weights, and so its numbers, cannot be had here."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from hybriddit.cli import main
from hybriddit.metrics import adm_metrics, inception, load_inception


def test_where_the_weights_are_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    folder = tmp_path / "checkpoints"
    with pytest.raises(
        FileNotFoundError, match=f"no Inception weights in {folder}: get https://.* put it into {folder}"
    ):
        load_inception()
    with pytest.raises(FileNotFoundError, match="no Inception weights at here.pth: get https://"):
        load_inception("here.pth")
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, np.zeros((5, 8, 8, 3), np.uint8))
    assert main(["evaluate", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]) == 1
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("hybriddit: no Inception weights in ")
    folder.mkdir()
    for name in inception.FILES[::-1]:
        (folder / name).touch()
        assert inception.find_inception() == folder / name
    assert inception.find_inception(str(folder / inception.FILES[1])) == folder / inception.FILES[1]


def test_without_torch_fidelity(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ModuleNotFoundError, match="pip install torch-fidelity"):
        load_inception(tmp_path / "weights.pth")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as the real one, of random weights."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *arguments, **options: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("inception", ["2048"])
    path = tmp_path_factory.mktemp("weights") / inception.FILES[1]
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)  # as the real one is
    return path


def test_what_is_extracted(weights):
    extractor = load_inception(weights, check=False)
    images = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = extractor(images)
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "pooled": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
    }
    assert all(part.dtype == torch.float32 for part in found.values())
    network, seen = extractor.network, {}
    network.Mixed_6d.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    plain = network(images)
    assert torch.equal(found["pooled"], plain[0])
    # without the bias, which is not zero
    torch.testing.assert_close(found["logits"], found["pooled"] @ network.fc.weight.T)
    assert network.fc.bias.abs().max() > 0.01
    expected = network.Mixed_6d.branch1x1(seen["x"])[:, :7].numpy()
    assert expected.shape == (2, 7, 17, 17) and expected.std() > 0
    np.testing.assert_array_equal(found["spatial"].numpy().reshape(2, 17, 17, 7), expected.transpose(0, 2, 3, 1))
    assert not network.Mixed_6d.branch1x1._forward_hooks
    # whatever the caller's precision is, and that is as it was
    flags = torch.backends.cudnn
    before = flags.enabled, flags.allow_tf32, flags.benchmark
    network.AvgPool.register_forward_hook(lambda *call: seen.update(flags=(flags.enabled, flags.allow_tf32)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = extractor(images)
    assert all(torch.equal(again[name], part) for name, part in found.items())
    assert seen["flags"] == (before[0], False) and (flags.enabled, flags.allow_tf32, flags.benchmark) == before
    assert extractor.description["weights_sha256"] == sha256(Path(weights).read_bytes()).hexdigest()


def test_the_whole_suite_with_it(weights):
    inception = load_inception(weights, check=False)
    inception.network.INPUT_IMAGE_SIZE = 75  # the least it takes: 299 takes seconds
    random = np.random.default_rng(0)
    samples, reference = (random.integers(low, 256, (4, 16, 16, 3), np.uint8) for low in (0, 100))

    def narrow(images):  # so do eigenvalues of 2048 x 2048
        return {name: part[:, ::16] for name, part in inception(images).items()}

    found = adm_metrics(samples, reference, narrow, batch_size=3, progress=False)
    assert list(found) == ["inception_score", "fid", "sfid", "precision", "recall"]
    assert found["inception_score"] >= 1 and found["fid"] > 0 and found["sfid"] > 0


def test_other_files_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="damaged or another file .its SHA-256 begins with .*, not 6726825d.: get"):
        load_inception(weights)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("weights")
    for name in ("other.pth", "text.pth"):
        with pytest.raises(ValueError, match="holds no Inception weights") as caught:
            load_inception(tmp_path / name, check=False)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_nothing_is_unpickled(weights, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").write_text, ("yes",))

    torch.save({"fc.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="holds no Inception weights"):
        load_inception(tmp_path / "trap.pth", check=False)
    assert not (tmp_path / "sprung").exists()
