"""Published LinFusion files: synthetic ones of their layout, against their formula written out in float64."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import save_file
from tiny_models import make_inputs, run, unet

import hybriddit
from hybriddit.training.distill import make_student
from hybriddit.training.run_config import DistillConfig

GRID = (9, 6)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return unet().double().eval()


def self_attentions(model):
    """The layers in the order of a file's numbers."""
    return {name: module for name, module in model.named_modules() if name.endswith(".attn1")}


def published(model, rank=lambda width: width, change=0.3):
    """A file's tensors. rank: of the maps, by a layer's width. change: of the projections; 0: they are the UNet's."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for number, attn in enumerate(self_attentions(model).values()):
        width = attn.to_q.in_features
        for name in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"):
            own = attn.get_parameter(name).detach()
            tensors[f"{number}.{name}"] = own + change * torch.randn(own.shape, generator=generator, dtype=own.dtype)
        for name in ("to_q_", "to_k_"):
            hidden = rank(width)
            shapes = {"0": (hidden, width), "1": (hidden,), "3": (width, hidden)}
            for part, shape in shapes.items():
                for kind, size in (("weight", shape), ("bias", shape[:1])):
                    value = torch.randn(size, generator=generator, dtype=torch.float64)
                    tensors[f"{number}.{name}.{part}.{kind}"] = 0.5 * value + (part == "1" and kind == "weight")
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


class Theirs:
    """An attention processor: the formula of arXiv 2409.02097 with a file's tensors, one query at a time."""

    def __init__(self, tensors):
        self.of = tensors

    def mapped(self, name, x):
        w = self.of
        x = F.linear(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"])
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * w[f"{name}.1.weight"] + w[f"{name}.1.bias"]
        x = torch.where(x > 0, x, 0.01 * x)
        return F.linear(x, w[f"{name}.3.weight"], w[f"{name}.3.bias"])

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, heads, N, D]

        def positive(x):
            return torch.where(x > 0, x + 1, x.exp())

        x, w = hidden_states, self.of
        query = positive(heads((x + self.mapped("to_q_", x)) @ w["to_q.weight"].T))
        key = positive(heads((x + self.mapped("to_k_", x)) @ w["to_k.weight"].T))
        value = heads(x @ w["to_v.weight"].T)
        weights = query @ key.transpose(-1, -2) / key.shape[2]
        out = weights @ value / (weights.sum(-1, keepdim=True) + 1e-4)
        return F.linear(out.transpose(1, 2).flatten(2), w["to_out.0.weight"], w["to_out.0.bias"])


def by_formula(model, tensors, inputs):
    """The UNet's output with the file's layers in place of its own, and back."""
    layers, before = self_attentions(model), {}
    for number, (name, attn) in enumerate(layers.items()):
        before[name] = attn.processor
        own = {key.partition(".")[2]: value for key, value in tensors.items() if key.split(".")[0] == str(number)}
        attn.processor = Theirs(own)
    out = run(model, inputs)
    for name, attn in layers.items():
        attn.processor = before[name]
    return out


def write(tensors, folder, config=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "rank, change, config",
    [(lambda width: width, 0.3, ("full", "full")), (lambda width: width // 16, 0, (None, None)),
     (lambda width: 5, 0.3, (5, "full"))],
)  # fmt: skip
def test_it_is_their_formula(tmp_path, model, rank, change, config):
    """Maps as wide as the layers, SDXL's narrow ones, and others; projections of its own, or the UNet's."""
    inputs, tensors = make_inputs(model, GRID, batch=2), published(model, rank, change)
    dense, expected = run(model, inputs), by_formula(model, tensors, inputs)
    assert (expected - dense).abs().max() > 1e-3
    assert hybriddit.load_linfusion(model, write(tensors, tmp_path / "file")) is model
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-9, atol=1e-9)
    found = model.config.hybrid_config
    assert (found["map_rank"], found["delta_rank"]) == config
    hybriddit.save_adapter(model, tmp_path / "adapter")
    hybriddit.restore_dense(model)
    assert torch.equal(run(model, inputs), dense)
    hybriddit.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-9, atol=1e-9)
    assert make_student(model, DistillConfig(hybrid=hybriddit.HybridConfig.from_saved(found)))


def test_its_config_says_which_layer_has_which_number(tmp_path, model):
    """A file, in the pipeline of the UNet, whose layers are numbered the other way round."""
    tensors, names = published(model), [*self_attentions(model)]
    expected, last = by_formula(model, tensors, make_inputs(model, GRID)), len(names) - 1
    turned = {f"{last - int(key.split('.')[0])}.{key.partition('.')[2]}": value for key, value in tensors.items()}
    config = {"modules_list": [{"module_name": name, "projection_mid_dim": None} for name in reversed(names)]}
    folder = write(turned, tmp_path / "file", config)
    pipeline = StableDiffusionPipeline(None, None, None, model, None, None, None, requires_safety_checker=False)
    hybriddit.load_linfusion(pipeline, folder / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(run(model, make_inputs(model, GRID)), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="hybrid already"):
        hybriddit.load_linfusion(pipeline, folder)


def test_a_lora_stays_beside_it(tmp_path, model):
    tensors, inputs = published(model), make_inputs(model, GRID)
    expected = by_formula(model, tensors, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    hybriddit.load_linfusion(model, write(tensors, tmp_path / "file"))
    assert (run(model, inputs) - expected).abs().max() > 1e-4
    model.disable_adapters()
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-9, atol=1e-9)


def _without(key):
    return lambda tensors: tensors.pop(key)


BROKEN = {
    "an unknown key": (lambda t: t.update({"0.to_x.weight": torch.ones(1)}), "no LinFusion file: it has '0.to_x.weight'"),
    "a missing key": (_without("2.to_k_.3.bias"), "not whole: layer 2 lacks to_k_.3.bias"),
    "another width": (lambda t: t.update({"0.to_q.weight": torch.ones(24, 24)}), "another UNet: to_q.weight of down_blocks"),
    "too few layers": (lambda t: [t.pop(key) for key in [*t] if key.startswith("6.")], "6 layers, and the model has 7"),
    "a gap": (lambda t: [t.pop(key) for key in [*t] if key.startswith("3.")], "does not fit this model"),
    "odd ranks": (lambda t: t.update(published(unet().double(), lambda width: width // 2)), "must be as wide as"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_files_that_do_not_fit_are_refused(tmp_path, model, what):
    change, message = BROKEN[what]
    tensors, inputs = published(model), make_inputs(model, GRID)
    change(tensors)
    dense = run(model, inputs)
    with pytest.raises(ValueError, match=message) as error:
        hybriddit.load_linfusion(model, write(tensors, tmp_path / "file"))
    assert "\n" not in str(error.value) and torch.equal(run(model, inputs), dense)


def test_nothing_pickled_is_loaded(tmp_path, model):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled, and nothing pickled is loaded: convert it"):
        hybriddit.load_linfusion(model, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model.safetensors .* pickled and is not loaded"):
        hybriddit.load_linfusion(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="no LinFusion file"):
        hybriddit.load_linfusion(model, tmp_path / "nothing")


def test_an_offloaded_model_is_refused(tmp_path, model):
    folder = write(published(model), tmp_path / "file")
    with pytest.raises(ValueError, match="weight is quantised or offloaded: load the published file before that"):
        hybriddit.load_linfusion(model.to("meta"), folder)
