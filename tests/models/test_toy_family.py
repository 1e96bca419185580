"""A made-up family, in this file alone and registered by one call, that does what none of the supported ones does.

Its text lies before the image and is padded, with a mask of its keys; queries share heads of keys and values; the
attention's output has a gate; one kind of block has q, k, v and the MLP in one projection; a reference image may lie
behind the image; layers and arguments are not named as diffusers names them; its velocity and its times run the other
way; and nothing but the model's own arguments reaches its attention processors. All that hybriddit does with a family
has to work on it.
"""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from runs import in_processes
from tiny_models import perturb_hybrid, run, window_mask
from torch import nn

import hybriddit
from hybriddit import HybridConfig, dense_mode, hybridize, load_adapter, restore_dense, save_adapter
from hybriddit.attention import TokenLayout
from hybriddit.cli import main
from hybriddit.data.shards import ALONE
from hybriddit.data.sources import captioned_folder, teacher, trajectories
from hybriddit.generate import generate
from hybriddit.info import describe, description_text, environment
from hybriddit.models.family import (
    Family,
    LayerShape,
    Processors,
    Published,
    families,
    family_of,
    register,
    unregister,
)
from hybriddit.models.hybrid_model import hybrid_class
from hybriddit.models.processing import check_call, far_inputs, project
from hybriddit.models.recipe import Recipe, shifted_logit_normal
from hybriddit.parallel import shard
from hybriddit.pipelines.loading import load_pipeline
from hybriddit.training.distill import distill
from hybriddit.training.dry_run import dry_run, report
from hybriddit.training.run_config import DataConfig, DistillConfig, OptimConfig, TrainConfig

# The model, its processors and its pipeline, as a library might have them


class ToyAttention(nn.Module, AttentionModuleMixin):
    """Grouped-query attention with a gate on its output."""

    def __init__(self, width, heads, kv_heads, head_dim):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.query = nn.Linear(width, heads * head_dim)
        self.key_value = nn.Linear(width, 2 * kv_heads * head_dim)
        self.query_norm, self.key_norm = nn.RMSNorm(head_dim), nn.RMSNorm(head_dim)
        self.gate = nn.Linear(width, heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)
        self.set_processor(ToyProcessor())

    def forward(self, tokens, text_mask):
        return self.processor(self, tokens, text_mask)


class ToyFusedAttention(nn.Module, AttentionModuleMixin):
    """Attention and MLP side by side: one projection into both, one out of both."""

    def __init__(self, width, heads, kv_heads, head_dim):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.hidden = heads, kv_heads, head_dim, 2 * width
        self.qkv_mlp = nn.Linear(width, (heads + 2 * kv_heads) * head_dim + self.hidden)
        self.query_norm, self.key_norm = nn.RMSNorm(head_dim), nn.RMSNorm(head_dim)
        self.out_mlp = nn.Linear(heads * head_dim + self.hidden, width)
        self.set_processor(ToyFusedProcessor())

    def forward(self, tokens, text_mask):
        return self.processor(self, tokens, text_mask)

    def parts(self, fused):
        """The fused projection's output, as query, key, value [B, S, heads, D] and the MLP's hidden layer."""
        sizes = (self.heads * self.head_dim, *2 * (self.kv_heads * self.head_dim,), self.hidden)
        *qkv, hidden = fused.split(sizes, dim=-1)
        return *(part.unflatten(-1, (-1, self.head_dim)) for part in qkv), hidden


def toy_softmax(query, key, value, text_mask, pairs=None):
    """Softmax attention by its formula; pairs: bool [S, S], which keys (columns) a query sees."""
    query = query.unflatten(2, (key.shape[2], -1))  # [B, S, kv_heads, group, D]
    scores = torch.einsum("bikgd,bjkd->bkgij", query, key) / math.sqrt(query.shape[-1])
    if text_mask is not None:
        seen = F.pad(text_mask, (0, key.shape[1] - text_mask.shape[1]), value=True)
        scores = scores.masked_fill(~seen[:, None, None, None], -math.inf)
    if pairs is not None:
        scores = scores.masked_fill(~pairs, -math.inf)
    return torch.einsum("bkgij,bjkd->bikgd", scores.softmax(-1), value).flatten(2)


class ToyProcessor:
    pairs = None

    def __call__(self, attn, tokens, text_mask):
        query = attn.query_norm(attn.query(tokens).unflatten(-1, (attn.heads, -1)))
        key, value = attn.key_value(tokens).unflatten(-1, (2, attn.kv_heads, -1)).unbind(-3)
        out = toy_softmax(query, attn.key_norm(key), value, text_mask, self.pairs)
        return attn.out(out * attn.gate(tokens).sigmoid())


class ToyFusedProcessor:
    pairs = None

    def __call__(self, attn, tokens, text_mask):
        query, key, value, hidden = attn.parts(attn.qkv_mlp(tokens))
        out = toy_softmax(attn.query_norm(query), attn.key_norm(key), value, text_mask, self.pairs)
        return attn.out_mlp(torch.cat([out, F.gelu(hidden)], dim=-1))


class ToyBlock(nn.Module):
    def __init__(self, attention, width, *sizes):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = attention(width, *sizes)

    def forward(self, tokens, time, text_mask):
        return tokens + self.attention(self.norm(tokens) + time, text_mask)


class ToyFusedBlock(ToyBlock):
    pass


class ToyTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin):
    """Text, then image, in one sequence; predicts the way from noise to image, at times from 0 (noise) to 1."""

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["ToyBlock", "ToyFusedBlock"]

    @register_to_config
    def __init__(
        self, in_channels=4, patch_size=2, heads=4, kv_heads=2, head_dim=8, text_width=12, layers=1, fused_layers=1
    ):
        super().__init__()
        width, sizes = heads * head_dim, (heads, kv_heads, head_dim)
        self.text_in = nn.Linear(text_width, width)
        self.image_in = nn.Linear(in_channels * patch_size**2, width)
        self.time_in = nn.Linear(8, width)
        self.blocks = nn.ModuleList(ToyBlock(ToyAttention, width, *sizes) for _ in range(layers))
        self.fused_blocks = nn.ModuleList(ToyFusedBlock(ToyFusedAttention, width, *sizes) for _ in range(fused_layers))
        self.placed = nn.Identity()  # the image's tokens with their places
        self.image_out = nn.Linear(width, in_channels * patch_size**2)
        self.gradient_checkpointing = False

    def embed(self, latents):
        """[B, C, h, w] -> [B, tokens, width], with the tokens' places."""
        patch = self.config.patch_size
        image = self.image_in(F.unfold(latents, patch, stride=patch).transpose(1, 2))
        rows, columns = torch.meshgrid(
            *(torch.arange(side // patch, device=image.device) for side in latents.shape[-2:]), indexing="ij"
        )
        waves = torch.arange(image.shape[-1], device=image.device)
        place = (rows.flatten()[:, None] * (waves + 1) / 7 + columns.flatten()[:, None] * (waves + 2) / 5).sin()
        return self.placed(image + place.to(image))

    def forward(self, x, text, text_mask=None, t=None, reference=None, return_dict=True):
        text, image = self.text_in(text), self.embed(x)
        tokens = torch.cat([text, image, *([] if reference is None else [self.embed(reference)])], dim=1)
        times = t[:, None, None] * torch.arange(1, 9, device=image.device)
        time = self.time_in(times.to(image).cos())
        for block in (*self.blocks, *self.fused_blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, time, text_mask)
            else:
                tokens = block(tokens, time, text_mask)
        image = self.image_out(tokens[:, text.shape[1] :][:, : image.shape[1]]).transpose(1, 2)
        sample = F.fold(image, x.shape[-2:], self.config.patch_size, stride=self.config.patch_size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class ToyTextEncoder(ModelMixin, ConfigMixin):
    """An embedding of the prompt's bytes."""

    @register_to_config
    def __init__(self, width=12):
        super().__init__()
        self.embed = nn.Embedding(256, width)

    def forward(self, ids):
        return self.embed(ids)


class ToyPipeline(DiffusionPipeline):
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, transformer, text_encoder, vae, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, vae=vae, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(self.vae_scale_factor)

    def encode_prompt(self, prompts, max_sequence_length=8):
        """Embeddings [B, length, width] and their mask [B, length]; the start of a text counts even if it is empty."""
        texts = [b"\0" + prompt.encode()[: max_sequence_length - 1] for prompt in prompts]
        ids = torch.tensor([list(text.ljust(max_sequence_length, b"\0")) for text in texts])
        mask = torch.tensor([[i < len(text) for i in range(max_sequence_length)] for text in texts])
        device = self.text_encoder.device
        return self.text_encoder(ids.to(device)).to(self.transformer.dtype), mask.to(device)

    @torch.no_grad()
    def __call__(
        self, prompt=None, negative_prompt=None, height=32, width=32, num_inference_steps=2, guidance_scale=2.0,
        max_sequence_length=8, generator=None, prompt_embeds=None, prompt_mask=None, negative_prompt_embeds=None,
        negative_prompt_mask=None, output_type="pil",
    ):  # fmt: skip
        if prompt is not None:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            negative = [negative_prompt or ""] * len(prompt)
            prompt_embeds, prompt_mask = self.encode_prompt(prompt, max_sequence_length)
            negative_prompt_embeds, negative_prompt_mask = self.encode_prompt(negative, max_sequence_length)
        guided = guidance_scale > 1
        embeds = torch.cat([negative_prompt_embeds, prompt_embeds]) if guided else prompt_embeds
        mask = torch.cat([negative_prompt_mask, prompt_mask]) if guided else prompt_mask
        config, scale = self.transformer.config, self.vae_scale_factor
        shape = (len(prompt_embeds), config.in_channels, height // scale, width // scale)
        device, dtype = prompt_embeds.device, prompt_embeds.dtype
        latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = torch.cat([latents, latents]) if guided else latents
            times = (1 - t / 1000).expand(len(inputs))
            velocity = -self.transformer(inputs, embeds, mask, times, return_dict=False)[0]
            if guided:
                without, with_prompt = velocity.chunk(2)
                velocity = without + guidance_scale * (with_prompt - without)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        pixels = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        return ImagePipelineOutput(images=self.image_processor.postprocess(pixels, output_type=output_type))


# The family: all that hybriddit has to be told


class HybridToyProcessor:
    def __call__(self, attn, tokens, text_mask):
        token_layout = self.layout_holder.token_layout
        check_call(token_layout)
        query = project(attn, "query", tokens).unflatten(-1, (attn.heads, -1))
        key, value = project(attn, "key_value", tokens).unflatten(-1, (2, attn.kv_heads, -1)).unbind(-3)
        norms = (attn.query_norm, attn.key_norm)
        far = far_inputs(attn, *(token_layout.split(x)[1] for x in (tokens, query, key)), norms)
        query, key = norms[0](query), norms[1](key)
        out = attn.hybrid(query, key, value, token_layout, text_mask=text_mask, **far).flatten(2)
        return project(attn, "out", out * project(attn, "gate", tokens).sigmoid())


class HybridToyFusedProcessor:
    def __call__(self, attn, tokens, text_mask):
        token_layout = self.layout_holder.token_layout
        check_call(token_layout)
        query, key, value, hidden = attn.parts(project(attn, "qkv_mlp", tokens))
        norms = (attn.query_norm, attn.key_norm)
        far = far_inputs(attn, *(token_layout.split(x)[1] for x in (tokens, query, key)), norms)
        query, key = norms[0](query), norms[1](key)
        out = attn.hybrid(query, key, value, token_layout, text_mask=text_mask, **far).flatten(2)
        return project(attn, "out_mlp", torch.cat([out, F.gelu(hidden)], dim=-1))


class Toy(Family):
    name = "Toy"
    dense_class = ToyTransformer2DModel
    hybrid_class = hybrid_class(ToyTransformer2DModel)
    layers = ("blocks.*.attention", "fused_blocks.*.attention")
    processors = (
        Processors(ToyProcessor, HybridToyProcessor),
        Processors(ToyFusedProcessor, HybridToyFusedProcessor),
    )
    attention_kwargs = None
    joint = True
    text_first = True
    image_entrance = "placed"
    image_exit = "image_out"
    pipelines = {"text-to-image": ToyPipeline}
    scheduler = FlowMatchEulerDiscreteScheduler
    recipes = {"toy": Recipe(shifted_logit_normal, 1.0, 0.5, 0.5, 0.1)}
    published = {"toys/toy-large": Published({"layers": 2, "fused_layers": 2}, shape="toy", vae_scale_factor=4)}

    def token_layout(self, model, inputs):
        images = [inputs["x"], *([] if inputs.get("reference") is None else [inputs["reference"]])]
        grids = (tuple(side // model.config.patch_size for side in image.shape[-2:]) for image in images)
        return TokenLayout(inputs["text"].shape[1], tuple(grids), text_first=True)

    def layer_shape(self, attn):
        width = (attn.query if isinstance(attn, ToyAttention) else attn.qkv_mlp).in_features
        return LayerShape(width, attn.heads, attn.kv_heads, attn.head_dim)

    def projections(self, attn):
        names = ("query", "key_value", "gate", "out", "qkv_mlp", "out_mlp")
        return {name: getattr(attn, name) for name in names if hasattr(attn, name)}

    def encode_prompts(self, pipeline, prompts, **length):
        embeds, mask = pipeline.encode_prompt(prompts, **length)
        return {"prompt_embeds": embeds, "prompt_mask": mask}

    def example_text(self, config, count, length, make):
        embeds = make(count, length, config["text_width"])
        return {"prompt_embeds": embeds, "prompt_mask": torch.ones(count, length, dtype=bool, device=embeds.device)}

    def model_inputs(self, noisy, times, text, grid, guidance):
        return {"x": noisy, "text": text["prompt_embeds"], "text_mask": text["prompt_mask"], "t": 1 - times}

    def latents_and_times(self, inputs):
        return inputs["x"], 1 - inputs["t"]

    def prediction(self, output, latents):
        return -output


@pytest.fixture(autouse=True)
def toy():
    """The family, registered for one test."""
    family = register(Toy)
    yield family
    unregister(family)
    with pytest.raises(ValueError, match="ToyTransformer2DModel is not supported"):
        family_of(make())
    assert not hasattr(hybriddit, "HybridToyTransformer2DModel")


# Tiny models and inputs

TEXT, GRID = 5, (6, 7)
CLOSE = {"rtol": 0, "atol": 1e-10}


def make(dtype=torch.float64, seed=0, **sizes):
    """A random toy in which every weight matters."""
    torch.manual_seed(seed)
    model = ToyTransformer2DModel(**sizes).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "attention" in name:
                parameter.mul_(3)  # sharp attention: a wrong mask shows
    return model


def make_inputs(model, grid=GRID, batch=2, seed=1, padded=True):
    """Arguments of forward; the first text ends after two tokens, the others are whole."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)

    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[0, 2:] = not padded
    return {
        "x": random(batch, 4, 2 * grid[0], 2 * grid[1]),
        "text": random(batch, TEXT, 12),
        "text_mask": mask,
        "t": torch.linspace(0.3, 0.8, batch, dtype=model.dtype),
    }


def added(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".hybrid." in name}


def masked_dense(model, inputs, grid, window):
    """The dense model's output with the window as a mask between image tokens, by the toy's own formula."""
    pairs = torch.ones(2 * (TEXT + grid[0] * grid[1],), dtype=torch.bool)
    pairs[TEXT:, TEXT:] = window_mask(grid, window)
    masked = copy.deepcopy(model)
    for module in masked.modules():
        if isinstance(module, AttentionModuleMixin):
            module.processor.pairs = pairs
    return run(masked, inputs)


# Conversion


def test_window_over_the_grid_is_the_dense_model():
    model = make()
    inputs = make_inputs(model)
    dense = run(model, inputs)
    hybridize(model, HybridConfig(window=7))
    torch.testing.assert_close(run(model, inputs), dense, **CLOSE)


def test_smaller_window_is_the_masked_dense_model():
    model = make(layers=2)
    inputs = make_inputs(model)
    expected = masked_dense(model, inputs, GRID, (3, 4))
    assert (expected - run(model, inputs)).abs().max() > 1e-2
    hybridize(model, HybridConfig(window=(3, 4)))
    torch.testing.assert_close(run(model, inputs), expected, **CLOSE)


def test_padded_text_is_not_seen():
    """By image tokens of hybrid and of linear layers: what stands there does not matter, what is text does."""
    for config in (HybridConfig(window=3), HybridConfig(window=None)):
        model = perturb_hybrid(hybridize(make(), config))
        inputs = make_inputs(model)
        out = run(model, inputs)
        for place, matters in ((3, False), (1, True)):
            text = inputs["text"].clone()
            text[0, place] += 1
            changed = (run(model, {**inputs, "text": text}) - out).abs().amax((1, 2, 3))
            assert (changed[0] > 1e-6) == matters and changed[1] == 0


@pytest.mark.parametrize("kind", ["blocks", "fused_blocks"])
@pytest.mark.parametrize("gate", ["head", "token"])
def test_an_open_layer_against_the_formulas(kind, gate):
    """One layer's image tokens, recomputed from its input: softmax in the window, linear attention, the gate."""
    grid = (4, 5)
    model = perturb_hybrid(hybridize(make(), HybridConfig(window=(3, 2), gate=gate, mixer="linfusion")))
    attn, seen = model.get_submodule(f"{kind}.0.attention"), {}
    attn.register_forward_hook(lambda module, args, out: seen.update(tokens=args[0], mask=args[1], out=out))
    run(model, make_inputs(model, grid))
    tokens, count = seen["tokens"], grid[0] * grid[1]
    with torch.no_grad():
        if kind == "blocks":
            query = attn.query(tokens).unflatten(-1, (4, 8))
            key, value = attn.key_value(tokens).unflatten(-1, (2, 2, 8)).unbind(2)
        else:
            query, key, value, hidden = attn.parts(attn.qkv_mlp(tokens))
        pairs = torch.ones(TEXT + count, TEXT + count, dtype=torch.bool)
        pairs[TEXT:, TEXT:] = window_mask(grid, (3, 2))
        expected = toy_softmax(attn.query_norm(query), attn.key_norm(key), value, seen["mask"], pairs)
        near = expected[:, TEXT:].unflatten(-1, (4, 8))
        x = tokens[:, TEXT:]
        far_query = F.elu(attn.query_norm(query[:, TEXT:] + attn.hybrid.map_q(x).unflatten(-1, (4, 8)))) + 1
        far_key = F.elu(attn.key_norm(key[:, TEXT:] + attn.hybrid.map_k(x).unflatten(-1, (2, 8)))) + 1
        weights = torch.einsum("bikgd,bjkd->bkgij", far_query.unflatten(2, (2, 2)), far_key)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-4 * count)
        far = torch.einsum("bkgij,bjkd->bikgd", weights, value[:, TEXT:]).flatten(2, 3)
        g = attn.hybrid.gate(x.float()).unsqueeze(-1) if gate == "token" else attn.hybrid.gate
        expected[:, TEXT:] = (near + g * (far - near)).flatten(2)
        if kind == "blocks":
            expected = attn.out(expected * attn.gate(tokens).sigmoid())
        else:
            expected = attn.out_mlp(torch.cat([expected, F.gelu(hidden)], -1))
    torch.testing.assert_close(seen["out"], expected, rtol=0, atol=2e-7)


def test_a_reference_image_is_a_second_grid():
    """Linear layers see it, windows what is at the same relative position."""
    model = perturb_hybrid(hybridize(make(), HybridConfig(window=None)))
    inputs, attn = make_inputs(model), model.blocks[0].attention
    layouts = []
    attn.hybrid.register_forward_pre_hook(lambda module, args: layouts.append(args[3]))
    reference = torch.randn(2, 4, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    alone, beside = run(model, inputs), run(model, {**inputs, "reference": reference})
    assert layouts == [TokenLayout(TEXT, (GRID,), True), TokenLayout(TEXT, (GRID, (3, 5)), True)]
    reference[0, :, 5, 9] += 1
    changed = run(model, {**inputs, "reference": reference}) - beside
    assert changed[0].abs().amax(0).min() > 0 and not changed[1].any() and (beside - alone).abs().max() > 1e-3
    restore_dense(model)
    dense = run(model, {**inputs, "reference": reference})
    hybridize(model, HybridConfig(window=99))
    torch.testing.assert_close(run(model, {**inputs, "reference": reference}), dense)
    restore_dense(model)
    hybridize(model, HybridConfig(window=3))
    with_window = run(model, {**inputs, "reference": reference})
    assert (with_window - dense).abs().max() > 1e-3


def test_layers_stay_dense_and_deltas_count():
    model = make()
    inputs = make_inputs(model)
    plain = run(hybridize(make(), HybridConfig(window=3, layers={"fused*": "dense"})), inputs)
    config = HybridConfig(window=3, layers={"fused*": "dense"}, delta_rank=2)
    hybridize(model, config)
    assert {name.split(".")[0] for name in added(model)} == {"blocks"}
    assert torch.equal(run(model, inputs), plain)
    model = hybridize(make(), HybridConfig(window=3, delta_rank=2))
    out = run(model, inputs)
    ups = {name: p for name, p in added(model).items() if name.endswith("_delta.up.weight")}
    assert len(ups) == 4 + 2
    with torch.no_grad():
        for name, parameter in ups.items():
            parameter.add_(1)
            assert (run(model, inputs) - out).abs().max() > 1e-6, name
            parameter.sub_(1)


def test_restore_dense_mode_and_deepcopy():
    model = make()
    inputs, attributes = make_inputs(model), set(vars(model))
    dense, processors = run(model, inputs), dict(model.attn_processors)
    perturb_hybrid(hybridize(model, HybridConfig(window=3, delta_rank=2)))
    student = run(model, inputs)
    with dense_mode(model):
        assert torch.equal(run(model, inputs), dense)
    twin = copy.deepcopy(model)
    run(model, make_inputs(model, (3, 4)))  # leaves its own layout behind, not the twin's
    assert torch.equal(run(twin, inputs), student)
    restore_dense(model)
    assert type(model) is ToyTransformer2DModel and set(vars(model)) == attributes
    assert model.attn_processors == processors and torch.equal(run(model, inputs), dense)
    assert torch.equal(run(twin, inputs), student)
    assert torch.equal(run(restore_dense(twin), inputs), dense)


def test_a_model_that_lost_a_processor_is_refused():
    model = hybridize(make(), HybridConfig(window=3, layers={"fused*": "dense"}))
    inputs = make_inputs(model)
    out = run(model, inputs)
    for block, other in ((model.blocks[0], ToyProcessor()), (model.fused_blocks[0], ToyProcessor())):
        block.attention.set_processor(other)
        with pytest.raises(ValueError, match="in place of"):
            run(model, inputs)
        model.set_default_attn_processor()
        assert torch.equal(run(model, inputs), out)
    with pytest.raises(ValueError, match="instead of ToyProcessor or ToyFusedProcessor"):
        dense = make()
        dense.blocks[0].attention.set_processor(HybridToyProcessor())
        hybridize(dense, HybridConfig(window=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded(dtype, tmp_path):
    """An adapter and a whole model. A gate of the model's own is in the model's precision, hybrid attention's in fp32."""
    model = make(torch.float32)
    model.save_pretrained(tmp_path / "dense")
    perturb_hybrid(hybridize(model, HybridConfig(window=3, gate="token", mixer="linfusion")))
    model.save_pretrained(tmp_path / "whole")
    save_adapter(model, tmp_path / "adapter")

    whole = hybriddit.HybridToyTransformer2DModel.from_pretrained(tmp_path / "whole", torch_dtype=dtype)
    adapted = ToyTransformer2DModel.from_pretrained(tmp_path / "dense", torch_dtype=dtype)
    assert load_adapter(adapted, tmp_path / "adapter") is adapted and type(adapted) is type(whole)
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in make_inputs(model).items()
    }
    for loaded in (whole, adapted):
        dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
        assert all(found is (torch.float32 if ".hybrid.gate" in name else dtype) for name, found in dtypes.items())
        out = run(copy.deepcopy(loaded), inputs)  # copied: mapped weights round differently
        torch.testing.assert_close(
            out, run(model, make_inputs(model)).to(dtype), rtol=0, atol=1e-5 if dtype is torch.float32 else 0.1
        )
    assert torch.equal(run(copy.deepcopy(whole), inputs), run(copy.deepcopy(adapted), inputs))


# Where the layout waits, as no argument brings it to the processors


def gradients(model, inputs, between=None):
    """Of what conversion added; `between` the forward and the backward pass, the model runs on those inputs."""
    model.zero_grad()
    loss = model(**inputs).sample.square().mean()
    if between is not None:
        run(model, between)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in added(model).items()}


def spread_over_processes(rank):
    """With a mask of the text, heads that share keys, and all arguments by their places."""
    register(Toy)
    model = perturb_hybrid(hybridize(make(layers=2), HybridConfig(window=3, layers={"blocks.0.*": "dense"}))).double()
    inputs = make_inputs(model)
    model.enable_gradient_checkpointing()
    wanted, out = gradients(model, inputs), run(model, inputs)
    shard(model, torch.distributed.group.WORLD)
    found = gradients(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs.values()).sample, out)
    torch.testing.assert_close(found, wanted)


def test_its_image_is_spread_over_processes(tmp_path):
    codes = in_processes(2, spread_over_processes, output=tmp_path / "said")
    assert codes == [0, 0], (tmp_path / "said.0").read_text()


@pytest.mark.parametrize("order", ["checkpointing first", "conversion first"])
def test_checkpointed_blocks_recompute_under_their_own_layout(order):
    model = make(layers=2)
    if order == "checkpointing first":
        model.enable_gradient_checkpointing()
    perturb_hybrid(hybridize(model, HybridConfig(window=3)))
    if order == "conversion first":
        model.enable_gradient_checkpointing()
    plain = perturb_hybrid(hybridize(make(layers=2), HybridConfig(window=3)))
    # as many tokens in another grid: a wrong layout would break nothing, and give other gradients
    inputs, other = make_inputs(model), make_inputs(model, (7, 6))
    expected = gradients(plain, inputs)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for candidate in (model, copy.deepcopy(model)):
        found = gradients(candidate, inputs, between=other)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(run(candidate, other), run(plain, other), **CLOSE)  # none is left behind


def test_checkpointing_is_diffusers_own_again():
    model = make()
    model.enable_gradient_checkpointing()
    own = model._gradient_checkpointing_func
    hybridize(model, HybridConfig(window=3))
    assert model._gradient_checkpointing_func is not own
    restore_dense(model)
    assert model._gradient_checkpointing_func is own
    hybridize(model, HybridConfig(window=3))
    model.disable_gradient_checkpointing()
    assert not model.gradient_checkpointing
    restore_dense(model)
    assert vars(model).keys() == vars(make()).keys() | {"_gradient_checkpointing_func"}
    model.disable_gradient_checkpointing()
    dense = make()
    dense.disable_gradient_checkpointing()
    assert model._gradient_checkpointing_func is dense._gradient_checkpointing_func


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_compiled(whole):
    """Without a break in the graph, the model at once or block by block, on two grids, checkpointed in training."""
    torch._dynamo.reset()
    model = perturb_hybrid(hybridize(make(torch.float32), HybridConfig(window=3)))
    sizes = [make_inputs(model, grid) for grid in [(4, 5), (5, 4)]]
    outputs, slope = [run(model, inputs) for inputs in sizes], gradients(model, sizes[0])
    model.enable_gradient_checkpointing()
    if whole:
        model.compile(backend="aot_eager", fullgraph=True)
    else:
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    for inputs, out in zip(sizes, outputs, strict=True):
        torch.testing.assert_close(run(model, inputs), out, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(model, sizes[0], between=sizes[1]).items():
        torch.testing.assert_close(gradient, slope[name], rtol=1e-3, atol=1e-4 * slope[name].abs().max().item())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


# Registering


def refused(family, match):
    before = families()
    with pytest.raises(ValueError, match=match) as caught:
        register(family)
    assert "\n" not in str(caught.value) and families() == before


def test_missing_parts_are_all_named():
    class Empty(Family):
        pass

    class Half(Toy):
        name, joint, encode_prompts = "Half", False, Family.encode_prompts

    parts = (
        "attention_kwargs, dense_class, encode_prompts, example_text, hybrid_class, joint, layers, model_inputs, name, "
        "pipelines, processors, recipes, scheduler"
    )
    refused(Empty, f"^the family Empty lacks {parts}: see ")
    refused(Half, "^the family Half lacks encode_prompts: see ")


def test_only_classes_of_families_are_registered(toy):
    for other in (toy, ToyTransformer2DModel, "Toy"):
        with pytest.raises(TypeError, match="a subclass of Family, not"):
            register(other)


def test_repeated_names_are_refused(toy):
    assert family_of(make()) is family_of(hybridize(make(), HybridConfig(window=3))) is toy
    names = "name Toy, model class ToyTransformer2DModel, recipe toy, repository toys/toy-large, "
    refused(Toy, f"^the family Toy repeats {names}shape toy of the family Toy$")

    class Other(Toy):
        name, dense_class, published = "Other", nn.Linear, {}
        hybrid_class = type("HybridLinear", (nn.Linear,), {})
        recipes = {"sd3": Toy.recipes["toy"], "other": Toy.recipes["toy"]}

    refused(Other, "^the family Other repeats recipe sd3 of the family Stable Diffusion 3$")


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("name", 3, "a text, not 3"),
        ("dense_class", "ToyTransformer2DModel", "the model's class"),
        ("hybrid_class", ToyTransformer2DModel, r"hybrid_class\(dense_class\)"),
        ("hybrid_class", nn.Linear, r"hybrid_class\(dense_class\)"),
        ("layers", "blocks.*.attention", "a tuple of patterns"),
        ("layers", (), "a tuple of patterns"),
        ("processors", (ToyProcessor, HybridToyProcessor), "a tuple of Processors"),
        ("processors", (Processors(ToyProcessor, HybridToyProcessor()),), "a tuple of Processors, each of classes"),
        ("joint", "text", "True or False, not 'text'"),
        ("guided", None, "True or False, not None"),
        ("attention_kwargs", "joint_attention_kwargs", "None or an argument of the model's forward"),
        (
            "pipelines",
            {"image-to-image": ToyPipeline},
            "text-to-image, and where they exist image-to-image and inpainting",
        ),
        ("pipelines", {"text-to-image": ToyPipeline, "text-to-video": ToyPipeline}, "text-to-image, and where"),
        ("pipelines", {"text-to-image": "ToyPipeline"}, "pipeline classes by task"),
        ("pipelines", {"text-to-image": ToyTransformer2DModel}, "pipeline classes by task"),
        ("scheduler", FlowMatchEulerDiscreteScheduler(), "a scheduler's class"),
        ("recipes", {}, "one Recipe or more"),
        ("recipes", {"toy": shifted_logit_normal}, "one Recipe or more"),
        ("published", {"toys/toy": {"layers": 2}}, "a mapping of repositories to Published"),
    ],
)
def test_parts_of_the_wrong_kind_are_named(part, value, match):
    refused(type("Wrong", (Toy,), {part: value}), f"^the family .*: {part} must be .*{match}")


def test_a_part_whose_default_does_not_fit_is_named():
    """Defaults read names that most models have: told at once, not where they are first called."""

    class Plain(Toy):
        name, published, recipes = "Plain", {}, {"plain": Toy.recipes["toy"]}
        dense_class = type("PlainTransformer2DModel", (ToyTransformer2DModel,), {})
        hybrid_class = type("HybridPlainTransformer2DModel", (dense_class,), {})
        pipelines = {"text-to-image": type("PlainPipeline", (ToyPipeline,), {})}

    for part, needs in (
        ("token_layout", "forward's hidden_states and forward's encoder_hidden_states"),
        ("latents_and_times", "forward's hidden_states and forward's timestep"),
    ):
        own = type("Lacking", (Plain,), {part: getattr(Family, part)})
        refused(own, rf"^the family Plain lacks {part} \(the default needs {needs}\): see ")
    short = type("ShortPipeline", (DiffusionPipeline,), {"__call__": lambda self, prompt: None})
    own = type("Lacking", (Plain,), {"pipelines": {"text-to-image": short}})
    refused(own, r"lacks text_length \(the default needs the pipeline's max_sequence_length\)")
    unregister(register(type("Whole", (own,), {"text_length": lambda self, *lengths: 8})))


def test_processors_that_do_not_take_the_layout_are_named():
    class TakesLayout:
        def __call__(self, attn, tokens, text_mask, token_layout=None): ...

    for rows, lacking in (
        ((Processors(ToyProcessor, HybridToyProcessor, TakesLayout),), "HybridToyProcessor"),
        ((Processors(ToyProcessor, TakesLayout),), "ToyProcessor"),
    ):
        own = type("Lacking", (Toy,), {"attention_kwargs": "reference", "processors": rows})
        refused(own, f"^the family Toy: {lacking} must take the keyword token_layout")


# What the rest of the package does with it


def tiny_vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )


@pytest.fixture
def pipeline():
    """Of 32 x 32 pixels: 8 x 8 tokens."""
    transformer = make(torch.float32)
    pipeline = ToyPipeline(transformer, ToyTextEncoder(), tiny_vae(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(pipeline, **settings):
    return [(np.asarray(image), record) for image, record in generate(pipeline, "a red shoe", **settings)]


def test_it_generates(pipeline):
    ((dense, record),) = pixels(pipeline, seed=3, height=24, width=40)
    expected = pipeline("a red shoe", generator=torch.Generator().manual_seed(3), height=24, width=40).images[0]
    assert np.array_equal(dense, np.asarray(expected)) and dense.shape == (24, 40, 3)
    with pytest.raises(ValueError, match="height 26 is no multiple of 4"):
        pixels(pipeline, height=26)
    with pytest.raises(ValueError, match="no image-to-image for a ToyPipeline"):
        pixels(pipeline, image=Image.new("RGB", (32, 32)))
    perturb_hybrid(hybridize(pipeline.transformer, HybridConfig(window=3)), scale=1.0)
    ((hybrid, record),) = pixels(pipeline, seed=3, height=24, width=40)
    assert not np.array_equal(hybrid, dense) and record["hybrid_config"]["window"] == 3


def test_this_machine_s_choices_name_it():
    choices = [choice for choice in environment()["window_choices"] if choice["family"] == "Toy"]
    expected = {"heads": 4, "head_dim": 8, "text_length": 8, "grid": [64, 64]}  # of 512 pixels, 8 a token
    assert expected in [{name: choice[name] for name in expected} for choice in choices]


def test_a_pipeline_is_saved_loaded_and_described(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "dense")
    perturb_hybrid(hybridize(pipeline.transformer, HybridConfig(window=3)))
    save_adapter(pipeline.transformer, tmp_path / "adapter")
    pipeline.save_pretrained(tmp_path / "hybrid")
    again = hybriddit.HybridToyPipeline.from_pretrained(tmp_path / "dense", adapter=tmp_path / "adapter")
    again.save_pretrained(tmp_path / "again")
    ((expected, _),) = pixels(pipeline, seed=1)
    for loaded in (again, load_pipeline(str(tmp_path / "hybrid")), load_pipeline(str(tmp_path / "again"))):
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded, ToyPipeline)
        assert type(loaded.transformer) is Toy.hybrid_class
        ((found, _),) = pixels(loaded, seed=1)
        assert abs(found.astype(int) - expected).max() <= 1  # mapped weights round differently
    for folder, name in (
        ("adapter", "adapter for ToyTransformer2DModel (Toy)"),
        ("dense", "ToyTransformer2DModel (Toy)"),
        ("hybrid", "HybridToyTransformer2DModel (Toy)"),
        ("hybrid/transformer", "HybridToyTransformer2DModel (Toy)"),
    ):
        found = description_text(describe(tmp_path / folder))
        assert name in found and ("2 hybrid" in found) == (folder != "dense"), found


PROMPTS = ["a red shoe", "a bag", "a blue bag that is far too long", "shoes"]


def distill_config(**train):
    return DistillConfig(
        hybrid=HybridConfig(window=3, gate="token", delta_rank=2),
        data=DataConfig(prompts=PROMPTS, images=4, height=32, width=24, steps=2, guidance_scale=2.0),
        optim=OptimConfig(lr=1e-2, warmup_steps=0, ema_decay=0.0),
        train=TrainConfig(**{"steps": 2, "batch_size": 2, "progress": False, **train}),
    )


def test_it_distils_two_steps(pipeline, tmp_path):
    """From its own images: only what conversion added moves, and comes nearer to the teacher on the batches it saw."""
    config = distill_config()
    config.output.folder, config.output.sample_every, config.output.log_every = str(tmp_path), 2, 1
    data = teacher(pipeline, config.data, False, ALONE)
    rows = data.rows(range(4))
    assert rows["prompt_mask"].sum(1).tolist() == [8, 6, 8, 6] and rows["latents"].shape == (4, 4, 16, 12)
    before = {name: weights.clone() for name, weights in pipeline.transformer.state_dict().items()}
    model = distill(pipeline, data, config)
    after = model.state_dict()
    assert all(torch.equal(after[name], weights) for name, weights in before.items())
    assert all(parameter.abs().max() > 0 for name, parameter in added(model).items() if "gate" in name)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2] and all(
        0 < line[name] < math.inf for line in steps for name in ("loss", "task", "output", "layer")
    )
    assert list((tmp_path / "samples").glob("*.png"))
    loaded = load_adapter(make(torch.float32), tmp_path / "adapter")
    assert all(torch.equal(loaded.state_dict()[name], weights) for name, weights in added(model).items())


def test_trajectories_hold_what_the_transformer_saw(pipeline):
    config = distill_config().data
    config.states = 2
    data = trajectories(pipeline, config, False, ALONE)
    rows = data.rows(range(4))
    assert rows["states"].shape == (4, 2, 4, 16, 12) and torch.allclose(rows["times"][:, 0], torch.ones(4))
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(config.seed + 3))
    assert torch.equal(rows["states"][3, 0], noise[0])


def test_images_of_your_own_are_encoded_as_it_says(pipeline, tmp_path, monkeypatch):
    Image.new("RGB", (24, 32), (255, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red")
    monkeypatch.setattr(Toy, "encode_images", lambda self, vae, pixels: pixels[:, [0, 0, 1, 1], ::2, ::2])
    config = distill_config().data
    config.folder = str(tmp_path)
    latents = captioned_folder(pipeline, config, False, ALONE).rows([0])["latents"]
    assert latents.shape == (1, 4, 16, 12) and latents.amax((0, 2, 3)).tolist() == [1, 1, -1, -1]


def test_distillation_hands_it_what_its_teacher_was_trained_on(pipeline):
    """Latents and times as the pipeline would give them, and the velocity the right way round: t is 1 at the image."""
    family, latents = family_of(pipeline.transformer), torch.randn(2, 4, 16, 12)
    noise, times = torch.randn_like(latents), torch.tensor([0.25, 1.0])
    noisy, target = family.add_noise(latents, noise, times, pipeline.scheduler)
    assert torch.equal(noisy[1], noise[1]) and torch.equal(target, noise - latents)
    text = family.encode_prompts(pipeline, PROMPTS[:2])
    inputs = family.model_inputs(noisy, times, text, (8, 6), None)
    assert inputs["t"].tolist() == [0.75, 0.0]
    assert all(map(torch.equal, family.latents_and_times(inputs), (noisy, times)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_planned_without_weights(checkpointing):
    config = distill_config(gradient_checkpointing=checkpointing)
    config.model.path, config.output.folder = "toys/toy-large", "unused"
    plan = dry_run(config)
    model = ToyTransformer2DModel(**Toy.published["toys/toy-large"].arguments)
    assert plan["class"] == "ToyTransformer2DModel"
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    hybridize(model, config.hybrid)
    assert plan["trained_parameters"] == sum(p.numel() for p in added(model).values())
    assert plan["tokens"] == {"grid": [4, 3], "image": 12, "text": 8}
    assert plan["attention_flops"]["dense"] == 4 * 4 * 20**2 * 32
    assert "toys/toy-large" in report(plan)


def test_it_is_benchmarked(tmp_path, capsys):
    arguments = ["--shapes", "toy", "--sizes", "32", "--part", "attention", "transformer", "generation"]
    arguments += ["--variants", "hybrid", "dense", "--window", "3", "--repeats", "1", "--quiet", "--out", str(tmp_path)]
    assert main(["benchmark", *arguments]) == 0, capsys.readouterr().err
    cases = json.loads((tmp_path / "benchmark.json").read_text())["cases"]
    measured = {(case["part"], case["variant"]) for case in cases if case.get("seconds")}
    assert measured == {
        (part, name) for part in ("attention", "transformer", "generation") for name in ("hybrid", "dense")
    }
