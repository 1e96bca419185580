"""SiTPipeline on tiny random models, against loops written out here; saved, and loaded in a new process."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from hybriddit import SiTPipeline, SiTTransformer2DModel
from hybriddit.info import describe
from hybriddit.metrics import to_uint8
from hybriddit.pipelines import sit as module
from hybriddit.pipelines.loading import load_sit_pipeline

NAMES = {0: "tabby, tabby cat", 1: "golden retriever", 2: "crane", 3: "crane"}


def tiny(*, vae=False, in_channels=3, classes=5, dtype=torch.float32, attention="linear", **options):
    torch.manual_seed(0)
    model = SiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=8,
        in_channels=in_channels,
        num_classes=classes,
        attention=attention,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    if vae:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            layers_per_block=1,
            latent_channels=in_channels,
            norm_num_groups=2,
            scaling_factor=0.18215,
            mid_block_add_attention=False,
        )
    pipeline = SiTPipeline(model.to(dtype), vae or None, **options)  # in training, as a trainer has it
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(pipeline, labels=(1, 2), **options):
    options = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent", **options}
    return pipeline(list(labels), **options).images


def by_hand(pipeline, labels, scale, steps, channels=None, interval=(0, 1), size=(8, 8)):
    """Euler's method from noise at 0 to the image at 1, one label at a time."""
    model, found = pipeline.transformer.eval(), []
    dtype = model.dtype
    noise = torch.randn(len(labels), model.config.in_channels, *size, generator=seeded(), dtype=dtype)
    for x, label in zip(noise.split(1), labels, strict=True):
        for step in range(steps):
            t = torch.full((1,), step / steps, dtype=dtype)
            with torch.no_grad():
                labelled, null = (model(x, t, torch.tensor([y])).sample for y in (label, model.config.num_classes))
            velocity = labelled
            if interval[0] <= step / steps <= interval[1]:
                velocity = labelled.clone()
                guided = slice(0, channels)
                velocity[:, guided] = null[:, guided] + scale * (labelled - null)[:, guided]
            x = x + velocity / steps
        found.append(x)
    return torch.cat(found)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"guidance_scale": 4.0},
        {"guidance_scale": 4.0, "guidance_channels": 3},
        {"guidance_scale": 4.0, "guidance_interval": (0.3, 0.7)},
        {"guidance_scale": 4.0, "height": 4, "width": 16},
    ],
)
def test_euler_is_eulers_method(options):
    pipeline = tiny(in_channels=4, dtype=torch.float64)
    expected = by_hand(
        pipeline,
        (1, 2),
        options["guidance_scale"],
        4,
        options.get("guidance_channels"),
        options.get("guidance_interval", (0, 1)),
        (options.get("height", 8), options.get("width", 8)),
    )
    pipeline.transformer.train()
    torch.testing.assert_close(latents(pipeline, **options), expected, rtol=0, atol=1e-10)
    assert pipeline.transformer.training, "as it was"
    if len(options) > 1 and "height" not in options:
        plain = latents(pipeline, guidance_scale=4.0)
        assert (plain - expected).abs().max() > 1e-3, "the option matters"


def test_diffusers_schedulers_give_our_samplers_images():
    ours = tiny(dtype=torch.float64)
    exact = latents(ours, sampler="dopri5")
    for scheduler, sampler, shift in (
        (FlowMatchEulerDiscreteScheduler(), "euler", 1.0),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "euler", 3.0),
    ):
        theirs = tiny(dtype=torch.float64, scheduler=scheduler)
        expected = latents(ours, sampler=sampler, shift=shift)
        torch.testing.assert_close(latents(theirs), expected, rtol=0, atol=2e-5)  # sigmas are of float32
        assert (expected - exact).abs().max() > 1e-3
        # a sampler that is named is taken
        assert torch.equal(latents(theirs, sampler="heun"), latents(ours, sampler="heun"))
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    for scheduler in (FlowMatchHeunDiscreteScheduler(), UniPCMultistepScheduler(**flow)):
        theirs = tiny(dtype=torch.float64, scheduler=scheduler)
        # of higher order; the times of both end at a sigma of 0.001, not quite as ours
        assert (latents(theirs, num_inference_steps=40) - exact).abs().mean() < 2e-3
    by_noise = tiny(dtype=torch.float64, scheduler=FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    assert torch.equal(latents(by_noise), latents(by_noise)), "its noise is the generator's"


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde-euler", "sde-heun"])
def test_each_generator_makes_its_image(sampler):
    pipeline, labels = tiny(), [0, 1, 1, 4]
    together = latents(pipeline, labels, sampler=sampler, generator=[seeded(i) for i in range(4)])
    for index, label in enumerate(labels):
        alone = latents(pipeline, [label], sampler=sampler, generator=seeded(index))
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-5)
    assert (together[1] - together[2]).abs().max() > 0.1, "another seed"
    assert torch.equal(latents(pipeline, sampler=sampler), latents(pipeline, sampler=sampler))


def test_options_reach_the_sampler():
    pipeline = tiny()
    for sampler, options in (
        ("sde-euler", {"diffusion": "constant"}),
        ("sde-euler", {"diffusion_norm": 0.3}),
        ("sde-euler", {"last_step": None}),
        ("sde-euler", {"last_step_size": 0.3}),
        ("euler", {"interval": (0.0, 0.9)}),
        ("dopri5", {"rtol": 0.5, "atol": 0.5}),
    ):
        changed = latents(pipeline, sampler=sampler, sampler_options=options)
        assert not torch.equal(changed, latents(pipeline, sampler=sampler)), options


def test_other_paths_and_predictions():
    """The pipeline hands on what the transformer was trained for."""
    kinds = [{"path": path, "prediction": kind} for path in ("linear", "gvp") for kind in ("velocity", "noise")]
    found = [latents(tiny(**kind), sampler="sde-euler") for kind in kinds]
    assert all(torch.isfinite(one).all() for one in found)
    assert len({one.flatten()[0].item() for one in found}) == 4


def test_latents_are_decoded_and_rounded_as_the_metrics_do():
    pipeline = tiny(vae=True, in_channels=4)
    options = {"height": 8, "width": 24}
    z = latents(pipeline, **options)
    assert z.shape == (2, 4, 4, 12), "the VAE halves"
    with torch.no_grad():
        decoded = pipeline.vae.decode(z / 0.18215).sample
    for image, expected in zip(latents(pipeline, **options, output_type="pil"), to_uint8(decoded), strict=True):
        assert image.size == (24, 8)
        np.testing.assert_array_equal(np.asarray(image), expected.permute(1, 2, 0))
    as_tensor = latents(pipeline, **options, output_type="pt")
    torch.testing.assert_close(as_tensor, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(latents(pipeline, **options, output_type="np"), as_tensor.permute(0, 2, 3, 1))
    # the noise may be given, and the result is a tuple where asked for
    noise = torch.randn(2, 4, 4, 12, generator=seeded())
    given = pipeline([1, 2], latents=noise, num_inference_steps=4, output_type="latent", return_dict=False)
    assert isinstance(given, tuple) and torch.equal(given[0], z)
    grey = tiny(in_channels=1)
    assert latents(grey, output_type="pil")[0].mode == "L"


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_it_samples_a_model_in_training(scale):
    """From given noise by Heun's method; the run's random numbers, the model's mode and its weights are left alone."""
    pipeline, labels, steps = tiny(dtype=torch.float64), [1, 4], 3
    model = pipeline.transformer
    model.enable_gradient_checkpointing()
    noise = torch.randn(2, 3, 8, 8, generator=seeded(5), dtype=torch.float64)

    def velocity(x, time):
        def predict(y):
            return model(x, torch.full((2,), time, dtype=x.dtype), torch.tensor(y)).sample

        return predict([5, 5]) + scale * (predict(labels) - predict([5, 5]))

    model.eval()
    expected = noise
    with torch.no_grad():
        for step in range(steps):
            first = velocity(expected, step / steps)
            second = velocity(expected + first / steps, (step + 1) / steps)
            expected = expected + (first + second) / (2 * steps)
    model.train()
    before, weights, given = torch.get_rng_state(), [p.clone() for p in model.parameters()], noise.clone()
    options = {"latents": noise, "guidance_scale": scale, "num_inference_steps": steps, "sampler": "heun"}
    found = pipeline(labels, output_type="latent", **options).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert model.training and not found.requires_grad
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(noise, given)
    assert all(torch.equal(p, weight) and p.grad is None for p, weight in zip(model.parameters(), weights, strict=True))
    pixels = pipeline(labels, output_type="pt", **options).images
    torch.testing.assert_close(pixels, (expected.float() / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)


def test_latents_are_made_where_the_transformer_is_whatever_holds_the_vae():
    pipeline = tiny(vae=True, in_channels=4, attention="softmax")
    pipeline.transformer.to("meta")
    assert next(pipeline.vae.parameters()).device.type == "cpu"
    assert latents(pipeline, generator=None, sampler="heun").device.type == "meta"


def test_decoding_is_that_of_the_images_in_slices_too():
    pipeline = tiny(vae=True, in_channels=4)
    z = latents(pipeline)
    pixels = pipeline.decode(z)
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), latents(pipeline, output_type="pt"), rtol=0, atol=1e-6)
    calls = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    pipeline.vae.enable_slicing()
    torch.testing.assert_close(pipeline.decode(z), pixels, rtol=0, atol=1e-5)
    assert calls == [1, 1] and not pixels.requires_grad
    assert tiny().decode(z) is z, "pixels already"


def test_callbacks_see_every_step_and_may_change_the_latents():
    for pipeline in (tiny(), tiny(scheduler=FlowMatchEulerDiscreteScheduler())):
        seen = []

        def look(pipe, step, time, values, seen=seen):
            seen.append((step, float(time), values["latents"].clone()))
            return values

        final = latents(pipeline, callback_on_step_end=look)
        assert [step for step, _, _ in seen] == [0, 1, 2, 3] and torch.equal(seen[-1][2], final)
        end = latents(pipeline, callback_on_step_end=lambda *a: {"latents": torch.full_like(a[3]["latents"], a[1])})
        assert (end == 3).all()
        middle = latents(
            pipeline, callback_on_step_end=lambda p, i, t, v: {"latents": v["latents"] + 1} if i == 1 else v
        )
        assert (middle - final).abs().max() > 0.1
    with pytest.raises(ValueError, match="dopri5 keeps what it has computed"):
        latents(tiny(), sampler="dopri5", callback_on_step_end=lambda *a: {"latents": a[3]["latents"] + 1})


def test_names():
    pipeline = tiny(id2label=NAMES)
    names = ["tabby", "Tabby Cat", "tabby, tabby cat", "golden retriever", 2, "4"]
    assert pipeline.get_label_ids(names) == [0, 0, 0, 1, 2, 4]
    assert pipeline.get_label_ids("golden retriever") == [1]
    assert torch.equal(latents(pipeline, ["golden retriever", "tabby"]), latents(pipeline, [1, 0]))
    assert tiny(classes=1000).get_label_ids("golden retriever") == [207], "ImageNet's"


def test_names_of_a_set():
    assert module.id2label_of(["bag", "", "shoe"]) == {0: "bag", 2: "shoe"}
    assert module.id2label_of([""]) is None and module.id2label_of([]) is None
    folders = ["n01440764", *(f"n{2_000_000 + i:08d}" for i in range(998)), "n15075141"]
    assert module.id2label_of(folders)[207] == "golden retriever"
    others = (folders[:-1] + ["n15102894"], [*folders, "n16000000"], folders[:500] + ["dog"] + folders[501:])
    for classes in others:  # not ImageNet's thousand
        assert module.id2label_of(classes) == dict(enumerate(classes))


def says(match, call, **options):
    return pytest.param(match, call, options, id=match[:40])


@pytest.mark.parametrize(
    "match, call, options",
    [
        says(r"class labels are 0 to 4, got 5", lambda p: p([5])),
        says(r"class labels are 0 to 4, got -1", lambda p: p(-1)),
        says(r"unknown class 'golden retreiver': did you mean 'golden retriever'\?", lambda p: p("golden retreiver")),
        says(r"'crane' is the name of classes 2, 3: give an index", lambda p: p("crane")),
        says(r"a class label is an index or a name, not 1.5", lambda p: p([1.5])),
        says(r"class_labels holds no label", lambda p: p([])),
        says(r"unknown sampler 'ddim': choose from euler, heun, dopri5, sde-euler", lambda p: p(1, sampler="ddim")),
        says(
            r"unknown option of sampler euler 'rtol': choose from interval",
            lambda p: p(1, sampler_options={"rtol": 1}),
        ),
        says(r"height must be a multiple of 2 pixels for this model, got 7", lambda p: p(1, height=7)),
        says(r"width must be a multiple of 2 pixels for this model, got 0", lambda p: p(1, width=0)),
        says(r"guidance_scale must be 0 or more, not nan", lambda p: p(1, guidance_scale=float("nan"))),
        says(r"num_inference_steps must be 1 or more, not 0", lambda p: p(1, num_inference_steps=0)),
        says(r"unknown output type 'jpg'", lambda p: p(1, output_type="jpg")),
        says(r"2 generators for 1 images", lambda p: p(1, generator=[seeded(), seeded()])),
        says(r"latents must be \[1, 3, 8, 8\], got \[2, 3, 8, 8\]", lambda p: p(1, latents=torch.zeros(2, 3, 8, 8))),
        says(r"DDIMScheduler is no flow-matching scheduler", lambda p: p(1), scheduler=DDIMScheduler()),
        says(
            r"schedulers are for the linear path, not 'gvp'",
            lambda p: p(1),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            path="gvp",
        ),
        says(
            r"shift and sampler_options are for samplers",
            lambda p: p(1, shift=2.0),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        ),
        says(
            r"has use_dynamic_shifting and invert_sigmas off",
            lambda p: p(1),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        ),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(match, call, options):
    pipeline = tiny(id2label=NAMES, **options)
    with pytest.raises(ValueError, match=match) as caught:
        call(pipeline)
    assert "\n" not in str(caught.value)


def test_what_the_pipeline_is_made_of_is_checked():
    with pytest.raises(ValueError, match="id2label names class 5: the transformer's are 0 to 4"):
        tiny(id2label={5: "bird"})
    with pytest.raises(ValueError, match="unknown path 'cosine'"):
        tiny(path="cosine")
    with pytest.raises(ValueError, match="this model's classes have no names, only 0 to 4"):
        tiny()("tabby")


LOAD = """
import sys, torch, hybriddit
torch.set_num_threads(1)
for kind in sys.argv[2:]:
    pipeline = hybriddit.SiTPipeline.from_pretrained(f"{sys.argv[1]}/{kind}")
    pipeline.set_progress_bar_config(disable=True)
    assert not pipeline.transformer.training
    expected = torch.load(f"{sys.argv[1]}/{kind}.pt", weights_only=True)
    images = pipeline(["golden retriever"], num_inference_steps=2, generator=torch.manual_seed(3), output_type="pt").images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    print(type(pipeline.vae).__name__, type(pipeline.scheduler).__name__, pipeline.config.path, pipeline.config.weights)
"""


def test_saved_and_loaded_in_a_new_process(tmp_path):
    whole = {"vae": True, "in_channels": 4, "scheduler": FlowMatchEulerDiscreteScheduler(), "weights": "EMA 0.9"}
    for kind, options in (("whole", whole), ("pixels", {"path": "gvp"})):
        pipeline = tiny(id2label=NAMES, **options)
        pipeline.save_pretrained(tmp_path / kind)
        images = latents(pipeline, ["golden retriever"], num_inference_steps=2, generator=seeded(3), output_type="pt")
        torch.save(images, tmp_path / f"{kind}.pt")
        again = SiTPipeline.from_pretrained(tmp_path / kind)
        assert all(again.config[name] == value for name, value in pipeline.config.items() if name[0] != "_")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(Path(tmp_path)), "whole", "pixels"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "AutoencoderKL FlowMatchEulerDiscreteScheduler linear EMA 0.9",
        "NoneType NoneType gvp None",
    ]


def test_what_is_no_sit_pipeline_is_told_in_one_line(tmp_path):
    tiny().transformer.save_pretrained(tmp_path / "bare")
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model_index.json").write_text("{")
    tiny().save_pretrained(tmp_path / "whole" / "pipeline")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.safetensors").touch()
    for folder, message in (
        ("bare", r"is a SiTTransformer2DModel, not a SiTPipeline: save one with SiTPipeline\(transformer, vae\)"),
        ("flux", "is a FluxPipeline, not a SiTPipeline: it takes no class labels, give generate a --prompt"),
        ("run", "no SiTPipeline at '.*run': neither the folder nor pipeline/ in it holds one"),
        ("damaged", "model_index.json is damaged or no JSON"),
        (checkpoint, "it is a checkpoint, to resume from: the newest model of its run is .*whole.pipeline"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load_sit_pipeline(tmp_path / folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no pipeline or model; .* the newest model of its run is .*whole.pipeline"):
        describe(checkpoint)
