"""Bases as they are found: mixed dtypes, variants, without an encoder, in a single file; what is refused."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import TEXT_LENGTH, tiny_pipeline

import hybriddit
from hybriddit.cli import main
from hybriddit.info import describe
from hybriddit.pipelines.loading import find_base, load_base
from hybriddit.stored import choose_variant, stored_dtype

SIZE = ["--height", "64", "--width", "64", "--steps", "1", "--max-sequence-length", str(TEXT_LENGTH)]
MIXED = {"transformer": torch.bfloat16, "vae": torch.float32, "text_encoder": torch.float16}


def run(capsys, *arguments):
    """(exit code, what the command says on stderr for a reader)."""
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr().err.splitlines()
    return code, [line for line in said if line.startswith(("hybriddit: ", "note: "))]


def convert(capsys, model, out, *more):
    return run(capsys, "convert", "--model", model, "--window", 3, "--out", out, *more)


def generate(capsys, model, out, *more):
    return run(capsys, "generate", "--model", model, "--prompt", "a red shoe", "--out", out, *SIZE, *more)


def distill(capsys, model, folder, *more):
    settings = ["data.images=2", "data.height=64", "data.width=64", "data.steps=1", "train.steps=1"]
    settings += [f"data.max_sequence_length={TEXT_LENGTH}", "train.batch_size=2", "train.progress=false"]
    settings += ["output.checkpoint_every=1", f"model.path={model}", f"output.folder={folder}"]
    config = folder.with_suffix(".yaml")
    config.write_text("data: {prompts: [a red shoe]}\n")
    return run(capsys, "distill", config, *settings, *more)


def dtypes(folder):
    found = {}
    for name in MIXED:
        found[name] = getattr(torch, stored_dtype((folder / name).glob("*.safetensors")))
    return found


def mixed(folder, variant=None, **options):
    """A pipeline whose components have dtypes of their own."""
    pipeline = tiny_pipeline("flux_dev")
    for name, dtype in MIXED.items():
        getattr(pipeline, name).to(dtype)
    pipeline.save_pretrained(folder, variant=variant, **options)
    return folder


def test_convert_keeps_every_components_dtype(tmp_path, capsys):
    base = mixed(tmp_path / "base")
    assert convert(capsys, base, tmp_path / "hybrid") == (0, [])
    assert dtypes(tmp_path / "hybrid") == dtypes(base) == MIXED
    found = load_file(tmp_path / "hybrid" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(base / "transformer" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(found[name], tensor), name
    assert convert(capsys, base, tmp_path / "half", "--dtype", "float16") == (0, [])
    assert set(dtypes(tmp_path / "half").values()) == {torch.float16}
    # fp8 is for storage: nothing computes in it
    path = base / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)
    code, [line] = convert(capsys, base, tmp_path / "eight")
    assert code == 1 and "is stored as F8_E4M3, which models do not compute in: choose a --dtype" in line
    assert not (tmp_path / "eight").exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_variant_alone_is_found_by_every_command(sharded, tmp_path, capsys):
    base = mixed(tmp_path / "base", "fp16", **({"max_shard_size": "20KB"} if sharded else {}))
    plain = mixed(tmp_path / "plain")
    files = list((base / "transformer").glob("*.fp16*.safetensors"))
    assert len(files) > 1 if sharded else len(files) == 1
    assert convert(capsys, base, tmp_path / "hybrid") == (0, [])
    assert dtypes(tmp_path / "hybrid") == MIXED
    named, unnamed = describe(base, "fp16"), describe(base)
    assert named == unnamed and named["variant"] == "fp16"
    for name, part in describe(plain)["components"].items():
        assert named["components"][name].get("parameters") == part.get("parameters")
    assert describe(base / "transformer")["parameters"] == named["components"]["transformer"]["parameters"]
    for more in ([], ["--variant", "fp16"]):
        assert generate(capsys, base, tmp_path / "a.png", *more) == (0, [])
    assert generate(capsys, plain, tmp_path / "b.png") == (0, [])
    assert (tmp_path / "a.png").read_bytes()[-5000:] == (tmp_path / "b.png").read_bytes()[-5000:]
    assert distill(capsys, base, tmp_path / "run")[0] == 0
    code, [line] = generate(capsys, base, tmp_path / "c.png", "--variant", "bf16")
    assert code == 1 and "has no variant 'bf16': it has fp16" in line
    code, [line] = generate(capsys, plain, tmp_path / "c.png", "--variant", "bf16")
    assert code == 1 and "has no variant 'bf16': it has none" in line


def test_what_is_chosen_among_several_is_said(tmp_path, capsys):
    base = mixed(tmp_path / "base")
    tiny_pipeline("flux_dev", seed=1).to(torch.float16).save_pretrained(tmp_path / "other", variant="fp16")
    shutil.copytree(tmp_path / "other", base, dirs_exist_ok=True)
    code, [note] = convert(capsys, base, tmp_path / "hybrid")
    assert code == 0 and "also has the variant fp16: the files without a variant's name were chosen" in note
    assert dtypes(tmp_path / "hybrid") == MIXED
    assert convert(capsys, base, tmp_path / "named", "--variant", "fp16") == (0, [])
    assert set(dtypes(tmp_path / "named").values()) == {torch.float16}
    assert "fp16" in describe(base)["note"]
    assert run(capsys, "info", base)[0] == run(capsys, "info", base, "--variant", "fp16")[0] == 0
    code, [note] = generate(capsys, base, tmp_path / "a.png")
    assert code == 0 and "were chosen" in note


def test_the_choice_of_a_variant():
    model, other = "diffusion_pytorch_model{}.safetensors", "model{}.safetensors"

    def choose(first, second, wanted=None):
        files = {
            "transformer": [model.format(end) for end in first],
            "text_encoder": [other.format(end) for end in second],
        }
        return choose_variant(files, wanted, "base")

    assert choose(["", ".fp16"], ["", ".fp16"])[0] is None
    assert choose([".fp16", ".bf16"], [".fp16", ".bf16"])[0] == "bf16"
    assert choose([".fp16", ".bf16"], [".fp16"])[0] == "fp16"
    assert choose([""], ["", ".fp16"])[0] is None and choose([""], ["", ".fp16"], "fp16") == ("fp16", None)
    assert choose([".fp16-00001-of-00002"], ["-00001-of-00002.fp16"]) == ("fp16", None)
    assert choose(["-00001-of-00002"], [""]) == (None, None)
    with pytest.raises(ValueError, match="no variant gives every component of base its weights"):
        choose([".fp16"], [".bf16"])
    with pytest.raises(ValueError, match="its transformer has neither weights of the variant 'bf16' nor without"):
        choose([".fp16"], [".bf16"], "bf16")
    with pytest.raises(ValueError, match="its vae has no weights in safetensors: a.bin is pickled and is not loaded"):
        choose_variant({"vae": ["config.json", "a.bin"]}, None, "base")


def test_pickled_weights_are_not_read(tmp_path, capsys):
    base = mixed(tmp_path / "base")
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), base / "vae" / "diffusion_pytorch_model.bin")
    weights.unlink()
    for code, [line] in (convert(capsys, base, tmp_path / "h"), generate(capsys, base, tmp_path / "a.png")):
        assert code == 1 and "its vae has no weights in safetensors: diffusion_pytorch_model.bin is pickled" in line
    (tmp_path / "all.ckpt").write_bytes(b"pickled")
    code, [line] = convert(capsys, tmp_path / "all.ckpt", tmp_path / "h", "--config", base)
    assert code == 1 and "all.ckpt is pickled, and nothing pickled is loaded: convert it to safetensors" in line


def without(family, *names):
    pipeline = tiny_pipeline(family)
    for name in names:
        setattr(pipeline, name, None)
    return pipeline


@pytest.mark.parametrize("named", [True, False])
def test_sd3_without_t5(named, tmp_path, capsys):
    """As diffusers writes it, [null, null] in model_index.json, or not named there at all."""
    pipeline = without("sd3", "text_encoder_3", "tokenizer_3")
    pipeline.save_pretrained(tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    if not named:
        index = {name: entry for name, entry in index.items() if name not in ("text_encoder_3", "tokenizer_3")}
        (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    assert "text_encoder_3" not in describe(tmp_path / "base")["components"]
    assert convert(capsys, tmp_path / "base", tmp_path / "hybrid") == (0, [])
    for model in ("base", "hybrid") if named else ():
        assert generate(capsys, tmp_path / model, tmp_path / f"{model}.png") == (0, [])
    if named:
        assert distill(capsys, tmp_path / "base", tmp_path / "run")[0] == 0
    assert distill(capsys, tmp_path / "base", tmp_path / "dry", "--dry-run")[0] == 0


def test_a_damaged_index_is_one_line(tmp_path, capsys):
    base = mixed(tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    for name, value in (("scheduler", None), ("vae", ["diffusers", "NoSuchVAE"]), ("transformer", [])):
        (base / "model_index.json").write_text(json.dumps({**index, name: value}))
        code, [line] = generate(capsys, base, tmp_path / "a.png")
        assert code == 1 and line.startswith("hybriddit: "), name


@pytest.mark.parametrize("parts", [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")])
def test_flux_without_an_encoder_is_converted_but_reads_no_prompt(parts, tmp_path, capsys):
    without("flux_dev", *parts).save_pretrained(tmp_path / "base")
    assert convert(capsys, tmp_path / "base", tmp_path / "hybrid") == (0, [])
    assert describe(tmp_path / "hybrid")["components"]["transformer"]["hybrid"]
    code, [line] = generate(capsys, tmp_path / "hybrid", tmp_path / "a.png")
    assert code == 1 and f"has no {parts[0]}, without which a FluxPipeline reads no prompts" in line
    code, [line] = distill(capsys, tmp_path / "base", tmp_path / "run")
    assert code == 1 and f"has no {parts[0]}" in line


@pytest.mark.parametrize("part", ["vae", "scheduler", "tokenizer_3"])
def test_parts_that_are_needed(part, tmp_path, capsys):
    """They are told before the weights are read. Teacher-made latents alone need no VAE."""
    without("sd3", part).save_pretrained(tmp_path / "base")
    assert convert(capsys, tmp_path / "base", tmp_path / "hybrid") == (0, [])
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red shoe")
    folder = ["data.source=folder", f"data.folder={tmp_path}"]
    for code, [line] in (
        generate(capsys, tmp_path / "hybrid", tmp_path / "a.png"),
        distill(capsys, tmp_path / "base", tmp_path / "run", *folder),
    ):
        named = "has a text_encoder_3 and no tokenizer_3" if part == "tokenizer_3" else f"has no {part}"
        assert code == 1 and named in line
    assert distill(capsys, tmp_path / "base", tmp_path / "run")[0] == (0 if part == "vae" else 1)
    pipeline = without("sd3", part)
    with pytest.raises(ValueError, match=f"no {part}"):
        hybriddit.generate.generate(pipeline, "a red shoe", height=64, width=64, steps=1)


@pytest.mark.parametrize("part", ["vae", "scheduler", "transformer"])
def test_parts_that_an_index_does_not_name(part, tmp_path, capsys):
    """They are those that it names as null."""
    base = mixed(tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    del index[part]
    (base / "model_index.json").write_text(json.dumps(index))
    code, [line] = generate(capsys, base, tmp_path / "a.png")
    assert code == 1 and f"this pipeline has no {part}, which a" in line
    if part != "transformer":
        assert getattr(load_base(find_base(str(base))), part) is None


@pytest.mark.parametrize(("part", "name"), [("transformer", "proj_out.weight"), ("vae", "decoder.conv_out.bias")])
def test_weights_that_are_missing_from_a_file(part, name, tmp_path, capsys):
    base = mixed(tmp_path / "base")
    file = base / part / "diffusion_pytorch_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if key != name}, file)
    for code, [line] in (convert(capsys, base, tmp_path / "hybrid"), generate(capsys, base, tmp_path / "a.png")):
        assert code == 1 and f"its {part} lacks 1 of its weights ({name})" in line and str(base) in line
    assert not (tmp_path / "hybrid").exists()


def test_what_a_newer_diffusers_saved(tmp_path, capsys):
    """Is refused where this one would ignore some of it, with its names, and else is loaded."""
    folder = tmp_path / "newer"
    tiny_pipeline("flux_dev").save_pretrained(folder)
    config, weights = folder / "transformer" / "config.json", next((folder / "transformer").glob("*.safetensors"))
    for version, setting, weight, refused in (
        ("99.0.0", {}, False, None),
        ("0.30.0", {"num_gates": 3}, True, None),  # whose leftovers are known to diffusers
        ("99.0.0", {"num_gates": 3}, True, "setting num_gates, weight gates.0.weight"),
        ("99.0.0", {}, True, "weight gates.0.weight"),
    ):
        config.write_text(json.dumps({**json.loads(config.read_text()), "_diffusers_version": version, **setting}))
        tensors = {name: value for name, value in load_file(weights).items() if not name.startswith("gates")}
        save_file(tensors | ({"gates.0.weight": torch.zeros(2)} if weight else {}), weights, {"format": "pt"})
        code, said = generate(capsys, folder, tmp_path / "a.png")
        if refused is None:
            assert (code, said) == (0, [])
        else:
            assert code == 1 and len(said) == 1
            assert f"does not know ({refused}): it was saved by diffusers 99.0.0; upgrade diffusers" in said[0]
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "num_gates"}))


def test_a_quantised_base_without_its_package(tmp_path, capsys):
    base = mixed(tmp_path / "base")
    config = json.loads((base / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "transformer" / "config.json").write_text(json.dumps(config))
    code, [line] = convert(capsys, base, tmp_path / "hybrid")
    assert code == 1 and f"the pipeline at '{base}' does not load: " in line


@pytest.mark.parametrize("family", ["flux_dev", "sd3"])
def test_a_single_file_is_the_transformer_of_its_config(family, tmp_path, capsys, monkeypatch):
    """As most checkpoints of these families are published: the transformer alone."""
    pipeline = tiny_pipeline(family, seed=1)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in pipeline.transformer.state_dict().items()}, file)
    tiny_pipeline(family).save_pretrained(tmp_path / "config")
    assert convert(capsys, file, tmp_path / "hybrid", "--config", tmp_path / "config") == (0, [])
    found = load_file(tmp_path / "hybrid" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(file).items():
        assert torch.equal(found[name], tensor), name
    assert dtypes(tmp_path / "hybrid")["vae"] == torch.float32
    made = load_base(find_base(str(file), config=str(tmp_path / "config")))
    assert made.config._name_or_path == str(file) and made.transformer.dtype == torch.float32
    monkeypatch.setattr(type(pipeline.transformer), "from_single_file", lambda *a, **k: pytest.fail("it is read"))
    part = load_base(find_base(str(file), config=str(tmp_path / "config")), without=("transformer", "vae"))
    assert part.transformer is None and part.vae is None and part.text_encoder is not None
    monkeypatch.undo()
    assert generate(capsys, file, tmp_path / "a.png", "--config", tmp_path / "config") == (0, [])
    more = [f"model.config={tmp_path / 'config'}"]
    assert distill(capsys, file, tmp_path / "run", *more)[0] == 0
    assert distill(capsys, file, tmp_path / "dry", *more, "--dry-run")[0] == 0


def test_single_files_that_cannot_be_loaded(tmp_path, capsys):
    for family in ("flux_dev", "sd3", "pixart_sigma"):
        pipeline = tiny_pipeline(family)
        pipeline.save_pretrained(tmp_path / family)
        save_file(pipeline.transformer.state_dict(), tmp_path / f"{family}.safetensors")
    flux = tmp_path / "flux_dev"
    assert convert(capsys, flux, tmp_path / "made") == (0, [])
    for model, config, message in (
        ("flux_dev.safetensors", None, "is a single file: give a config too"),
        ("sd3.safetensors", flux, "no FluxTransformer2DModel in it"),
        (
            "pixart_sigma.safetensors",
            tmp_path / "pixart_sigma",
            "diffusers loads no PixArtTransformer2DModel from a single",
        ),
        ("flux_dev", flux, "a config is for a single-file checkpoint"),
        ("flux_dev.safetensors", tmp_path / "none", "no diffusers pipeline at"),
        (
            "flux_dev.safetensors",
            tmp_path / "made",
            "is a hybrid pipeline, and the config of a single file is a dense one",
        ),
    ):
        more = [] if config is None else ["--config", config]
        code, [line] = convert(capsys, tmp_path / model, tmp_path / "hybrid", *more)
        assert code == 1 and message in line, line
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "sd3.safetensors").read_bytes()[:500])
    code, [line] = convert(capsys, tmp_path / "cut.safetensors", tmp_path / "hybrid", "--config", flux)
    assert code == 1 and "is damaged or no safetensors file" in line


def test_a_class_that_diffusers_does_not_have(tmp_path, capsys):
    base = mixed(tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxDreamPipeline"}))
    for code, [line] in (convert(capsys, base, tmp_path / "h"), generate(capsys, base, tmp_path / "a.png")):
        assert code == 1 and "is a FluxDreamPipeline, which diffusers" in line


def test_a_repository_is_asked_for_its_variants(tmp_path, monkeypatch):
    """What the hub lists decides, as in a folder."""
    base = mixed(tmp_path / "base", "fp16")
    files = [str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()]

    class Info:
        siblings = [type("File", (), {"rfilename": file}) for file in files]

    index = json.loads((base / "model_index.json").read_text())
    monkeypatch.setattr("hybriddit.pipelines.loading.DiffusionPipeline.load_config", lambda name: index)
    monkeypatch.setattr("hybriddit.pipelines.loading.model_info", lambda name: Info)
    found = find_base("owner/name")
    assert (found.variant, found.folder, found.pipeline_class) == (
        "fp16",
        "owner/name",
        hybriddit.HybridFluxPipeline.__mro__[2],
    )
