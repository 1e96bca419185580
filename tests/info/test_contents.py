"""What `hybriddit info` says of a pipeline, a model, an adapter and an image."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_pipeline

from hybriddit import HybridConfig, SiTPipeline, SiTTransformer2DModel, hybridize, save_adapter
from hybriddit.cli import main
from hybriddit.images import save_png
from hybriddit.info import describe

# of the three blocks one is dense, one is a window alone, which adds no weights
LAYERS = {"transformer_blocks.0.*": "dense", "single_transformer_blocks.0.*": "window"}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A hybrid pipeline's folder, its adapter's, and the number of weights that were added."""
    folder = tmp_path_factory.mktemp("hybrid")
    pipeline = tiny_pipeline("flux_dev")
    hybridize(pipeline.transformer, HybridConfig(window=3, map_rank=4, layers=LAYERS))
    pipeline.save_pretrained(folder / "pipeline")
    save_adapter(pipeline.transformer, folder / "adapter")
    added = sum(p.numel() for name, p in pipeline.transformer.named_parameters() if ".hybrid." in name)
    return folder / "pipeline", folder / "adapter", added, sum(p.numel() for p in pipeline.transformer.parameters())


def test_pipeline_and_model_folders(hybrid, capsys):
    folder, _, added, parameters = hybrid
    found = describe(folder)
    assert (found["kind"], found["class"]) == ("pipeline", "FluxPipeline")
    assert found["components"]["scheduler"] == {"class": "FlowMatchEulerDiscreteScheduler"}
    model = found["components"]["transformer"]
    assert (model["class"], model["family"]) == ("HybridFluxTransformer2DModel", "FLUX")
    assert model["parameters"] == parameters
    assert model["hybrid"]["config"] == HybridConfig(window=3, map_rank=4, layers=LAYERS).to_dict()
    assert model["hybrid"]["added_parameters"] == added
    assert model["hybrid"]["layers"] == {"dense": 1, "window": 1, "hybrid": 1}
    assert {"kind": "model", **model} == describe(folder / "transformer")
    assert "hybrid" not in found["components"]["vae"]
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    for part in (
        "pipeline, FluxPipeline",
        "HybridFluxTransformer2DModel (FLUX)",
        "window 3",
        "1 hybrid",
        f"{added:,} ",
    ):
        assert part in text


def test_a_sit_its_pipeline_and_its_run(tmp_path, capsys):
    layers = {"*.0.attn": "window", "*.1.attn": "hybrid", "*": "linear"}
    shape = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3}
    model = SiTTransformer2DModel(
        **shape, num_classes=12, sample_size=16, patch_size=4, attention=layers, window=(3, 5)
    )
    names = {index: f"kind {index}" for index in range(12)}
    pipeline = SiTPipeline(model, id2label=names, path="gvp", prediction="noise", weights="EMA 0.9, step 3")
    pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    found = describe(tmp_path / "run")
    assert found == describe(tmp_path / "run" / "pipeline")
    assert (found["kind"], found["class"]) == ("pipeline", "SiTPipeline")
    assert [found[name] for name in ("path", "prediction", "weights")] == ["gvp", "noise", "EMA 0.9, step 3"]
    assert found["id2label"] == {str(index): name for index, name in names.items()}
    [(name, bare)] = found["components"].items()
    assert (name, bare["class"], bare["family"]) == ("transformer", "SiTTransformer2DModel", "SiT")
    assert bare["parameters"] == sum(p.numel() for p in model.parameters())
    fields = {"window": [3, 5], "stride": 1, "map_rank": None, "gate": "head"}
    fields |= {"feature_map": "elu", "projection": 0, "far_rope": False}
    size = {"size": None, **shape, "num_classes": 12, "sample_size": 16, "patch_size": 4}
    assert bare["sit"] == {**size, **fields, "layers": {"window": 1, "hybrid": 1, "linear": 2}}
    assert describe(tmp_path / "run" / "pipeline" / "transformer") == {"kind": "model", **bare}
    assert main(["info", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["info", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for part in (
        "pipeline, SiTPipeline",
        "size    of its own: 4 layers, 2 heads of 8, patch 4",
        "inputs  3 x 16 x 16, 12 classes",
        "layers  1 window, 1 hybrid, 2 linear; window [3, 5], stride 1, map_rank 16 (the width), gate head, "
        "feature_map elu, projection 0, far_rope false",
        "path gvp, prediction noise",
        "EMA 0.9, step 3",
        "12: 'kind 0', 'kind 1', 'kind 2', ",
        "'kind 9', …",
    ):
        assert part in text, part


def test_a_published_size_and_no_field_that_its_layers_lack(tmp_path, capsys):
    with torch.device("meta"):
        model = SiTTransformer2DModel(**SiTTransformer2DModel.preset("S/4"), attention="linear", map_rank=64)
    model.to_empty(device="cpu").save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "size    S/4: 12 layers, 6 heads of 64, patch 4" in text
    assert "layers  12 linear; map_rank 64, feature_map elu, projection 0, far_rope false\n" in text
    pipeline = SiTPipeline(model)
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert main(["info", str(tmp_path / "pipeline")]) == 0
    assert "class names      ImageNet's" in capsys.readouterr().out


def test_a_sit_of_the_recipes_far_branch(tmp_path, capsys):
    model = SiTTransformer2DModel(
        2, 8, num_layers=1, sample_size=8, attention="linear", map_rank=0, feature_map="hedgehog", projection=None,
        rope=True, far_rope=True,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    expected = "layers  1 linear; map_rank 0, feature_map hedgehog, projection auto, far_rope true\n"
    assert expected in capsys.readouterr().out


def test_adapter_folder(hybrid, capsys):
    _, folder, added, _ = hybrid
    assert main(["info", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["base_class"], found["family"]) == ("adapter", "FluxTransformer2DModel", "FLUX")
    assert found["hybrid"]["added_parameters"] == added
    assert found["hybrid"]["layers"] == {"hybrid": 1}
    assert main(["info", str(folder)]) == 0
    assert "adapter for FluxTransformer2DModel (FLUX)" in capsys.readouterr().out


def test_image(tmp_path, capsys):
    save_png(Image.new("RGB", (8, 6)), tmp_path / "a.png", {"prompt": "赤い靴", "seed": 3})
    assert describe(tmp_path / "a.png") == {
        "kind": "image",
        "width": 8,
        "height": 6,
        "record": {"prompt": "赤い靴", "seed": 3},
    }
    assert main(["info", str(tmp_path / "a.png")]) == 0
    assert "赤い靴" in capsys.readouterr().out
    Image.new("RGB", (8, 6)).save(tmp_path / "b.png")
    assert main(["info", str(tmp_path / "b.png")]) == 0
    assert "8 x 6, with no record" in capsys.readouterr().out


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "model_index.json": (cut, "model_index.json is damaged"),
    "transformer/config.json": (cut, "config.json is damaged"),
    "transformer/diffusion_pytorch_model.safetensors": (cut, "diffusion_pytorch_model.safetensors is damaged"),
    "vae/diffusion_pytorch_model.safetensors": (lambda path: path.unlink(), "vae has no weights in safetensors"),
    "adapter/hybrid_adapter.safetensors": (flip, "is damaged (its checksum does not match)"),
    "adapter/hybrid_config.json": (lambda path: path.write_text('{"windo": 3}'), "unknown field 'windo'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(name, hybrid, tmp_path, capsys):
    shutil.copytree(hybrid[0], tmp_path / "copy")
    shutil.copytree(hybrid[1], tmp_path / "copy" / "adapter")
    damage, message = DAMAGE[name]
    damage(tmp_path / "copy" / name)
    folder = tmp_path / "copy" / "adapter" if name.startswith("adapter") else tmp_path / "copy"
    assert main(["info", str(folder)]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_hybrid_without_its_weights_and_a_lost_shard(tmp_path):
    model = tiny_pipeline("flux_dev").transformer
    model.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    config |= {"_class_name": "HybridFluxTransformer2DModel", "hybrid_config": {"window": 3}}
    (tmp_path / "dense/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks the hybrid weights of 3 layers"):
        describe(tmp_path / "dense")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    parameters = sum(p.numel() for p in model.parameters())
    assert describe(tmp_path / "shards")["parameters"] == parameters
    next((tmp_path / "shards").glob("*00002-of*.safetensors")).unlink()
    with pytest.raises(ValueError, match="lacks 1 of its"):
        describe(tmp_path / "shards")


@pytest.mark.parametrize(
    "name, message", [("nowhere", "no file or folder"), (".", "no pipeline or model; no adapter in")]
)
def test_what_is_none_of_these(name, message, tmp_path, capsys):
    assert main(["info", str(tmp_path / name)]) == 1
    assert message in capsys.readouterr().err
