"""Images from the command line and from Python: the same ones, with a record; from an image, and under a mask."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import TEXT_LENGTH, of_prompt, tiny_pipeline

import hybriddit
from hybriddit import HybridConfig, SiTPipeline, SiTTransformer2DModel, hybridize, save_adapter
from hybriddit.cli import build_parser, main
from hybriddit.generate import NoEffectWarning, check_settings, generate, output_paths
from hybriddit.generate.images import for_task
from hybriddit.images import read_record, save_png
from hybriddit.pipelines.sit import SAMPLERS

FAMILIES = {
    "flux_dev": hybriddit.HybridFluxPipeline,
    "sd3": hybriddit.HybridStableDiffusion3Pipeline,
    "pixart_sigma": hybriddit.HybridPixArtSigmaPipeline,
    "qwen_image": hybriddit.HybridQwenImagePipeline,
    "z_image": hybriddit.HybridZImagePipeline,
}
SIZE = {"height": 64, "width": 96, "max_sequence_length": TEXT_LENGTH}
SETTINGS = {**SIZE, "steps": 2, "guidance": 3.0}


def guided(family):
    """(settings, the pipeline's arguments) of a guidance of 3."""
    if family == "qwen_image":
        return {**SIZE, "steps": 2, "true_cfg": 3.0}, {"negative_prompt": " ", "true_cfg_scale": 3.0}
    return SETTINGS, {"guidance_scale": 3.0}


def flags(**settings):
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def opened(pipeline, window=3):
    """Hybrid, with gates that let the far branch in."""
    hybridize(pipeline.transformer, HybridConfig(window=window))
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if ".hybrid." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return pipeline


def one(pipeline, prompt="a red shoe", **settings):
    [(image, record)] = generate(pipeline, prompt, **{**SETTINGS, **settings})
    return np.asarray(image, int), record


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> (base pipeline, adapter, by which the base becomes an open hybrid): folders."""
    folders = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        pipeline = tiny_pipeline(family)
        pipeline.save_pretrained(folder / "base")
        save_adapter(opened(pipeline).transformer, folder / "adapter")
        folders[family] = folder / "base", folder / "adapter"
    return folders


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_image_from_both(family, saved, tmp_path, capsys):
    base, adapter = saved[family]
    source, (settings, arguments) = flags(model=base, adapter=adapter, prompt="a red shoe"), guided(family)
    out = tmp_path / "new" / "shoe.png"
    assert main(["generate", *source, *flags(**settings, seed=3, num_images=2, out=out), "--json", "--quiet"]) == 0
    printed, files = capsys.readouterr(), [str(out.with_name(f"shoe-000{i}.png")) for i in (1, 2)]
    report = json.loads(printed.out)
    assert (report["files"], report["seeds"], report["notes"]) == (files, [3, 4], [])
    assert report["seconds"] > 0
    assert printed.err == "", "quiet"

    pipeline = FAMILIES[family].from_pretrained(base, adapter=adapter)
    pipeline.set_progress_bar_config(disable=True)
    extra = arguments | ({"use_resolution_binning": False} if family == "pixart_sigma" else {})
    for file, seed in zip(files, (3, 4), strict=True):
        expected = pipeline(
            "a red shoe",
            **SIZE,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(seed),
            **extra,
        ).images[0]
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(expected))
        record = read_record(file)
        assert record | {"seed": seed, "prompt": "a red shoe", **settings} == record
        assert (record["model"], record["adapter"]) == (str(base), str(adapter))
        assert record["hybrid_config"]["window"] == 3
        assert record["versions"]["torch"] == torch.__version__
    first, second = (np.asarray(Image.open(file), int) for file in files)
    assert abs(first - second).max() > 8, "another seed, another image"
    np.testing.assert_array_equal(one(pipeline, seed=4, **{"guidance": None, **settings})[0], second)


def test_the_record_holds_the_defaults_and_survives_any_prompt(tmp_path):
    pipeline = tiny_pipeline("sd3")
    prompt = 'a "red"\nshoe, 赤い靴'
    [(image, record)] = generate(pipeline, prompt, height=64, width=64, steps=1)
    assert (record["guidance"], record["max_sequence_length"], record["strength"]) == (7.0, 256, None)
    assert (record["width"], record["height"], record["seed"], record["hybrid_config"]) == (64, 64, 0, None)
    save_png(image, tmp_path / "a.png", record)
    assert read_record(tmp_path / "a.png") == record and record["prompt"] == prompt
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_negative_prompts():
    for family in ("sd3", "pixart_sigma"):
        pipeline = tiny_pipeline(family)
        plain, _ = one(pipeline)
        away, record = one(pipeline, negative_prompt="a blue bag")
        assert abs(away - plain).max() > 2, family
        assert record["negative_prompt"] == "a blue bag"
    with pytest.warns(NoEffectWarning, match="negative_prompt has no effect: guidance works only above 1"):
        assert one(pipeline, negative_prompt="a blue bag", guidance=1.0)[1]["negative_prompt"] is None


def test_longcat_image_makes_images_of_the_prompt_as_it_is():
    """Its pipeline would have the text encoder write another."""
    pipeline = tiny_pipeline("longcat_image")
    image, _ = one(pipeline, max_sequence_length=None)
    call = {"height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 3.0}
    call |= of_prompt(pipeline, "a red shoe")
    expected = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    np.testing.assert_array_equal(image, np.asarray(expected[0]))
    with pytest.raises(ValueError, match="takes no max_sequence_length"):
        one(pipeline, max_sequence_length=8)


def test_flux_heeds_a_negative_prompt_under_true_guidance_alone():
    pipeline = tiny_pipeline("flux_dev")
    plain, record = one(pipeline)
    assert record["true_cfg"] is None
    with pytest.warns(NoEffectWarning, match="heeds it only with a true_cfg above 1"):
        image, record = one(pipeline, negative_prompt="a blue bag")
    np.testing.assert_array_equal(image, plain)
    assert record["negative_prompt"] is None
    image, record = one(pipeline, negative_prompt="a blue bag", true_cfg=4.0)
    assert abs(image - plain).max() > 2
    assert (record["negative_prompt"], record["true_cfg"]) == ("a blue bag", 4.0)
    with pytest.warns(NoEffectWarning, match="true_cfg has no effect"):
        one(pipeline, true_cfg=4.0)
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline takes no true_cfg_scale"):
        one(tiny_pipeline("sd3"), true_cfg=4.0)


def test_qwen_image_guides_unless_it_is_told_not_to():
    """Its pipeline guides by true_cfg_scale, 4 by default, and only where it has a negative prompt."""
    pipeline, size = tiny_pipeline("qwen_image"), {"guidance": None}
    for block in pipeline.transformer.transformer_blocks:
        block.attn.add_v_proj.weight.data *= 30  # what is said matters
    guided, record = one(pipeline, **size)
    assert (record["negative_prompt"], record["true_cfg"], record["guidance"]) == (" ", 4.0, None)
    call = {"height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": TEXT_LENGTH}
    call |= {"generator": torch.Generator().manual_seed(0)}
    expected = pipeline("a red shoe", negative_prompt=" ", true_cfg_scale=4.0, **call).images[0]
    np.testing.assert_array_equal(guided, np.asarray(expected, int))
    plain, record = one(pipeline, **size, true_cfg=1.0)
    assert (record["negative_prompt"], record["true_cfg"]) == (None, 1.0) and abs(guided - plain).max() > 2
    away, record = one(pipeline, **size, negative_prompt="a blue bag")
    assert record["negative_prompt"] == "a blue bag" and abs(away - guided).max() > 2
    with pytest.warns(NoEffectWarning, match="guidance has no effect: a QwenImagePipeline is guided by true_cfg"):
        one(pipeline)


def test_the_command_says_what_has_no_effect(tmp_path, capsys):
    tiny_pipeline("flux_schnell").save_pretrained(tmp_path / "base")
    arguments = ["generate", *flags(model=tmp_path / "base", prompt="a", **SETTINGS, out=tmp_path / "a.png")]
    assert main(arguments) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == ["note: guidance has no effect: this model was distilled to need none"]
    assert read_record(tmp_path / "a.png")["guidance"] is None


def picture(seed, size=(96, 64)):
    grey = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    return Image.fromarray(grey).resize(size, Image.Resampling.NEAREST)


@pytest.mark.parametrize("family", ["flux_dev", "sd3", "qwen_image", "z_image"])
def test_image_to_image_and_inpainting(family):
    """Of a hybrid pipeline: what diffusers' own class makes of its components, and each argument matters."""
    pipeline = FAMILIES[family](**opened(tiny_pipeline(family, latent_channels=16)).components)
    pipeline.set_progress_bar_config(disable=True)
    given, arguments = guided(family)
    start, settings = picture(0), {"guidance": None, **given, "steps": 4, "height": None, "width": None}
    image, record = one(pipeline, image=start, strength=0.5, **settings)
    task = type(pipeline).__mro__[2].__name__.replace("Pipeline", "Img2ImgPipeline")
    assert (record["pipeline"], record["strength"], record["width"], record["height"]) == (task, 0.5, 96, 64)
    theirs = getattr(diffusers, task)(**pipeline.components)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a red shoe",
        image=start,
        strength=0.5,
        **SIZE,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        **arguments,
    ).images[0]
    np.testing.assert_array_equal(image, np.asarray(expected))
    others = {
        "another image": one(pipeline, image=picture(1), strength=0.5, **settings)[0],
        "another strength": one(pipeline, image=start, strength=0.75, **settings)[0],
        "another prompt": one(pipeline, "a blue bag", image=start, strength=0.5, **settings)[0],
    }
    hybriddit.restore_dense(pipeline.transformer)
    others["dense"] = one(pipeline, image=start, strength=0.5, **settings)[0]
    for what, other in others.items():
        assert abs(other - image).max() > 2, what
    opened(pipeline)

    left = Image.new("L", start.size)
    left.paste(255, (0, 0, 48, 64))
    one_prompt, other_prompt = (
        one(pipeline, prompt, image=start, mask=left, strength=1.0, **settings)
        for prompt in ("a red shoe", "a blue bag")
    )
    assert one_prompt[1]["pipeline"] == task.replace("Img2Img", "Inpaint")
    change = abs(one_prompt[0] - other_prompt[0]).mean(axis=(0, 2))
    # the kept half comes from the image; the decoder mixes a few pixels at the border, and its norms a little
    assert change[:48].mean() > (5 if family == "qwen_image" else 10) * change[64:].mean()
    # an image that is no multiple of a token is cut to the next smaller size
    assert one(pipeline, image=picture(0, (100, 70)), **settings)[1]["width"] == 96


@pytest.mark.parametrize("family", ["flux2_dev", "flux2_klein"])
def test_flux2_edits_an_image_and_klein_paints(family):
    """An image to start from is a reference; klein's inpainting pipeline knows that the model is distilled."""
    pipeline = opened(tiny_pipeline(family))
    start, settings = picture(0), {"steps": 2, "height": None, "width": None, "guidance": None}
    image, record = one(pipeline, image=start, **settings)
    call = {"height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": TEXT_LENGTH}
    call |= {"generator": torch.Generator().manual_seed(0)}
    expected = pipeline(prompt="a red shoe", image=start, **call).images[0]
    np.testing.assert_array_equal(image, np.asarray(expected, int))
    assert abs(one(pipeline, image=picture(1), **settings)[0] - image).max() > 2
    with pytest.raises(ValueError, match="takes no strength"):
        one(pipeline, image=start, strength=0.5, **settings)
    left = Image.new("L", start.size)
    left.paste(255, (0, 0, 48, 64))
    if family == "flux2_dev":
        assert record["guidance"] == 4.0
        with pytest.raises(ValueError, match="diffusers has no inpainting for a Flux2Pipeline"):
            one(pipeline, image=start, mask=left, **settings)
        return
    assert record["guidance"] is None
    painting = for_task(pipeline, True, True)
    assert type(painting) is diffusers.Flux2KleinInpaintPipeline and painting.config.is_distilled
    prompts = ("a red shoe", "a blue bag")
    painted = [one(pipeline, prompt, image=start, mask=left, strength=1.0, **settings)[0] for prompt in prompts]
    change = abs(painted[0] - painted[1]).mean(axis=(0, 2))
    assert change[:48].mean() > 2 * change[64:].mean()  # the decoder's norms mix a little
    with pytest.warns(NoEffectWarning, match="guidance has no effect: this model was distilled to need none"):
        one(pipeline, **settings | {"guidance": 3.0})


def test_what_is_transparent_is_white_and_in_a_mask_black(tmp_path):
    """From Python and from files; the colour under it does not count."""
    pipeline, settings = tiny_pipeline("sd3", latent_channels=16), {"steps": 2, "height": None, "width": None}
    start, mask = picture(0), Image.new("L", (96, 64), 255)
    start.paste((255, 255, 255), (0, 0, 48, 64))
    mask.paste(0, (0, 0, 48, 64))
    expected, _ = one(pipeline, image=start, mask=mask, strength=1.0, **settings)
    alpha = Image.new("L", (96, 64), 255)
    alpha.paste(0, (0, 0, 48, 64))
    start.paste((255, 0, 255), (0, 0, 48, 64))
    start.putalpha(alpha)
    mask = Image.merge("LA", (Image.new("L", (96, 64), 255), alpha))
    np.testing.assert_array_equal(one(pipeline, image=start, mask=mask, strength=1.0, **settings)[0], expected)
    pipeline.save_pretrained(tmp_path / "model")
    start.save(tmp_path / "start.png")
    mask.save(tmp_path / "mask.png")
    files = flags(image=tmp_path / "start.png", mask=tmp_path / "mask.png", out=tmp_path / "out.png")
    more = flags(strength=1.0, steps=2, guidance=3.0, max_sequence_length=TEXT_LENGTH, prompt="a red shoe")
    assert main(["generate", "--model", str(tmp_path / "model"), *files, *more, "--quiet"]) == 0
    assert abs(np.asarray(Image.open(tmp_path / "out.png"), int) - expected).max() <= 1


def test_tasks_that_diffusers_lacks_and_sizes_that_do_not_fit():
    pixart = tiny_pipeline("pixart_sigma")
    for mask, task in ((None, "image-to-image"), (Image.new("L", (96, 64)), "inpainting")):
        with pytest.raises(ValueError, match=f"diffusers has no {task} for a PixArtSigmaPipeline"):
            generate(pixart, "a", image=picture(0), mask=mask)
    for family in ("pixart_sigma", "sd3", "flux_dev"):
        pipeline = pixart if family == "pixart_sigma" else tiny_pipeline(family)
        with pytest.raises(ValueError, match="height 68 is no multiple of 8, which this model needs"):
            generate(pipeline, "a", height=68)
    with pytest.raises(ValueError, match="the image is 96 x 4: this model needs 8 pixels or more"):
        generate(pipeline, "a", image=picture(0).crop((0, 0, 96, 4)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps must be 1 or more, not 0"),
        ({"prompt": "a\udcff"}, "the prompt: 'a\\udcff' holds half of a character"),
        ({"negative-prompt": "\udcff"}, "holds half of a character"),
        ({"num_images": 0}, "num_images must be 1 or more, not 0"),
        ({"height": -8}, "height must be 1 or more, not -8"),
        ({"guidance": -1}, "guidance must be 0 or more, not -1.0"),
        ({"guidance": "nan"}, "guidance must be 0 or more, not nan"),
        ({"seed": -1}, "seeds go from 0 to 2**63 - 1"),
        ({"seed": 2**63 - 1, "num_images": 2}, "seeds go from 0 to 2**63 - 1"),
        ({"strength": 0.5}, "a strength needs an image"),
        ({"mask": "image.png"}, "a mask needs an image"),
        ({"image": "image.png", "strength": 0}, "strength must be above 0"),
        ({"image": "image.png", "strength": 1.5}, "strength must be above 0"),
        ({"image": "none.png"}, "no image file none.png"),
        ({"image": "text"}, "is damaged or no image"),
        ({"image": "cut.png"}, "is damaged or no image"),
        ({"image": "image.png", "mask": "small.png"}, "must be of one size: they are 32 x 32 and 96 x 64"),
        ({"out": "text/a.png"}, "text is a file"),
        ({"out": "folder.png"}, "folder.png is a folder"),
        ({"out": "a.jpg"}, "a.jpg must end in .png"),
    ],
)
def test_what_is_wrong_by_itself_is_told_before_a_model_is_loaded(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(0).save(tmp_path / "image.png")
    picture(0, (32, 32)).save(tmp_path / "small.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "image.png").read_bytes()[:200])
    (tmp_path / "text").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    assert main(["generate", *flags(**{"model": "/nowhere", "prompt": "a", **arguments})]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_several_images_are_numbered(tmp_path):
    assert output_paths(tmp_path / "a.png", 1) == [tmp_path / "a.png"]
    assert output_paths(tmp_path / "a.b.png", 2) == [tmp_path / "a.b-0001.png", tmp_path / "a.b-0002.png"]


@pytest.fixture(scope="module")
def sit(tmp_path_factory):
    """A run's folder, with a SiTPipeline in it."""
    folder = tmp_path_factory.mktemp("sit")
    torch.manual_seed(0)
    model = SiTTransformer2DModel(2, 8, in_channels=3, num_layers=1, sample_size=8, num_classes=3)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    names = {0: "golden retriever", 2: "tabby, tabby cat"}
    SiTPipeline(model, id2label=names, weights="EMA 0.9, step 3").save_pretrained(folder / "pipeline")
    return folder


def test_classes_from_the_command_line_are_the_pipelines_images(sit, tmp_path, capsys):
    """Two of each label, label by label, and seeds that count on."""
    labels = ["--class-label", "Tabby Cat", "--class-label", "1"]
    settings = {"steps": 3, "guidance": 2.0, "height": 4, "width": 16, "sampler": "sde-euler"}
    more = flags(**settings, seed=5, num_images=2, out=tmp_path / "a.png", dtype="bfloat16")
    assert main(["generate", "--model", str(sit), *labels, *more, "--json", "--quiet"]) == 0
    printed, files = capsys.readouterr(), [str(tmp_path / f"a-000{i}.png") for i in (1, 2, 3, 4)]
    report = json.loads(printed.out)
    assert (report["files"], report["seeds"], report["notes"]) == (files, [5, 6, 7, 8], [])
    assert printed.err == "", "quiet"
    pipeline = SiTPipeline.from_pretrained(sit / "pipeline", dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    for file, label, seed in zip(files, (2, 2, 1, 1), (5, 6, 7, 8), strict=True):
        [expected] = pipeline(
            label,
            num_inference_steps=3,
            guidance_scale=2.0,
            height=4,
            width=16,
            sampler="sde-euler",
            generator=torch.Generator().manual_seed(seed),
        ).images
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(expected))
        record = read_record(file)
        said = {"class_label": label, "class_name": {2: "tabby, tabby cat"}.get(label), "seed": seed, **settings}
        said |= {"model": str(sit), "pipeline": "SiTPipeline", "weights": "EMA 0.9, step 3", "dtype": "bfloat16"}
        assert record | said == record and "prompt" not in record
        assert set(record["versions"]) == {"hybriddit", "diffusers", "torch"}
    shown = [np.asarray(Image.open(file), int) for file in files]
    assert all(abs(shown[0] - other).max() > 8 for other in shown[1:])
    assert main(["info", files[0]]) == 0
    assert "class_name           tabby, tabby cat" in capsys.readouterr().out


def test_classes_from_python_and_their_defaults(sit):
    pipeline = SiTPipeline.from_pretrained(sit / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    [(image, record)] = generate(pipeline, class_labels="golden retriever")
    [expected] = pipeline(0, generator=torch.Generator().manual_seed(0)).images
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    defaults = {"sampler": "euler", "steps": 50, "guidance": 4.0, "width": 8, "height": 8, "negative_prompt": None}
    assert record | defaults == record
    with pytest.warns(NoEffectWarning, match="steps has no effect: dopri5 chooses its own"):
        [(_, record)] = generate(pipeline, class_labels=[0], sampler="dopri5", steps=3)
    assert (record["sampler"], record["steps"]) == ("dopri5", None)
    pipeline.register_modules(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    [(_, record)] = generate(pipeline, class_labels=1, steps=1)
    assert (record["sampler"], record["class_name"]) == ("FlowMatchEulerDiscreteScheduler", None)
    with pytest.raises(ValueError, match=r"unknown class 'tabbi': did you mean 'tabby'"):
        generate(pipeline, class_labels=["tabbi"])
    with pytest.raises(ValueError, match="a SiTPipeline takes no prompt"):
        generate(pipeline, "a shoe")
    with pytest.raises(ValueError, match="a FluxPipeline takes no class labels: those are for a SiTPipeline"):
        generate(tiny_pipeline("flux_dev"), class_labels=1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "give one of a prompt and class labels"),
        ({"prompt": "a", "class_labels": 1}, "give one of a prompt and class labels"),
        ({"class_labels": []}, "class_labels holds no label"),
        ({"class_labels": [1, 2], "num_images": 2, "seed": 2**63 - 3}, "4 from 9223372036854775805 do not fit"),
        ({"class_labels": 1, "sampler": "ddim"}, "unknown sampler 'ddim': choose from euler"),
        ({"prompt": "a", "sampler": "euler"}, "sampler has no meaning with a prompt"),
        *(
            ({"class_labels": 1, name: value}, f"{name} has no meaning with a class label")
            for name, value in {
                "negative_prompt": "a",
                "true_cfg": 2.0,
                "max_sequence_length": 8,
                "strength": 0.5,
                "image": Image.new("RGB", (8, 8)),
                "mask": Image.new("L", (8, 8)),
            }.items()
        ),
    ],
)
def test_what_does_not_go_with_a_class_or_a_prompt(settings, message):
    with pytest.raises(ValueError, match=message):
        check_settings(**settings)


def test_the_help_names_every_sampler():
    generate_help = next(iter(build_parser()._subparsers._group_actions)).choices["generate"].format_help()
    assert all(name in generate_help for name in SAMPLERS)


def test_a_pipeline_of_no_family_is_taken_as_diffusers_knows_it():
    """A UNet of another class: no tokens, and sizes in multiples of a latent."""

    class UNet(diffusers.UNet2DConditionModel):
        pass

    flux = tiny_pipeline("flux_dev")
    unet = UNet(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = diffusers.StableDiffusionPipeline(
        flux.vae, flux.text_encoder, flux.tokenizer, unet, diffusers.DDIMScheduler(), **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    [(image, record)] = generate(pipeline, "a red shoe", steps=1, width=16, height=8)
    assert image.size == (16, 8) and record["hybrid_config"] is None
    with pytest.raises(ValueError, match="width 98 is no multiple of 4, which this model needs"):
        generate(pipeline, "a red shoe", width=98)
    for mask, task in ((None, "Img2Img"), (Image.new("L", (96, 64)), "Inpaint")):
        assert type(for_task(pipeline, True, mask is not None)).__name__ == f"StableDiffusion{task}Pipeline"
    with pytest.raises(ValueError, match="diffusers has no inpainting for a DDPMPipeline"):
        for_task(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()), True, mask is not None)


@pytest.mark.parametrize("family", ["z_image", "krea2", "krea2_turbo"])
def test_some_pipelines_guide_from_0_on(family):
    """They count from 0: a guidance of 0.5 heeds the negative prompt, and one of 0 does not."""
    pipeline = tiny_pipeline(family)
    guided, record = one(pipeline, guidance=0.5, negative_prompt="a blue bag")
    assert record["negative_prompt"] == "a blue bag" and abs(guided - one(pipeline, guidance=0.5)[0]).any()
    with pytest.warns(NoEffectWarning, match="negative_prompt has no effect: guidance works only above 0"):
        assert one(pipeline, guidance=0.0, negative_prompt="a blue bag")[1]["negative_prompt"] is None
