"""CLEAR's files load into FLUX: what the model then computes, against a plain processor on a model with their weights."""

import copy

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from safetensors.torch import load_file, save_file
from tiny_models import make, make_inputs, run
from tiny_pipelines import TEXT_LENGTH, tiny_pipeline

import hybriddit
from hybriddit import (
    HybridConfig,
    dense_mode,
    hybridize,
    in_strips,
    load_adapter,
    load_clear,
    restore_dense,
    save_adapter,
)

GRID, WINDOW = (8, 12), 4


def clear_weights(model, side=1, seed=5):
    """What a published file holds: the layers' own projections of image tokens, and one pooling weight a layer."""
    torch.manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        if any(f".attn.{part}." in name for part in ("to_q", "to_k", "to_v", "to_out")):
            weights[name] = parameter.detach() + 0.1 * torch.randn_like(parameter)
    for name, _ in model.named_modules():
        if name.endswith(".attn") and side > 1:
            mean = torch.full((1, 1, 1, side, 1, side, 1), side**-2, dtype=model.dtype)
            weights[f"{name}.processor.spatial_weight"] = mean + 0.1 * torch.randn_like(mean)
    return weights


def write(weights, folder, name):
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / name)
    return folder / name


class PlainClear:
    """Attention by CLEAR's formulas, score by score; `pooling`: [side, side] or None."""

    def __init__(self, grid, radius, pooling):
        self.grid, self.radius, self.pooling = grid, radius, pooling

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, mask=None, image_rotary_emb=None):
        def heads(tokens):
            return tokens.unflatten(-1, (-1, attn.head_dim))

        query, key, value = (heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            words = [heads(f(encoder_hidden_states)) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
            words[0], words[1] = attn.norm_added_q(words[0]), attn.norm_added_k(words[1])
            query, key, value = (torch.cat(pair, 1) for pair in zip(words, (query, key, value), strict=True))
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        (height, width), total = self.grid, query.shape[1]
        text = total - height * width
        seen = torch.ones(total, total, dtype=torch.bool)
        for i in range(height * width):
            for j in range(height * width):
                down, across = i // width - j // width, i % width - j % width
                seen[text + i, text + j] = down * down + across * across < self.radius**2
        if self.pooling is not None:
            side, pools = len(self.pooling), []
            for tokens in (key, value):
                image = tokens[:, text:].unflatten(1, self.grid)
                pools.append([
                    sum(self.pooling[a, b] * image[:, row + a, column + b] for a in range(side) for b in range(side))
                    for row in range(0, height, side) for column in range(0, width, side)
                ])  # fmt: skip
            key, value = (torch.cat((x, torch.stack(p, 1)), 1) for x, p in zip((key, value), pools, strict=True))
            of_image = torch.arange(total) >= text  # text does not see pooled keys
            seen = torch.cat((seen, of_image[:, None].expand(-1, len(pools[0]))), 1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / attn.head_dim**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
        if encoder_hidden_states is None:
            return out
        return attn.to_out[0](out[:, text:]), attn.to_add_out(out[:, :text])


def plain_model(model, weights, side):
    """A copy of the dense model with the file's weights in place of its own, and the plain processor."""
    plain = copy.deepcopy(model)
    pooling = {name: value for name, value in weights.items() if "spatial" in name}
    plain.load_state_dict({name: value for name, value in weights.items() if name not in pooling}, strict=False)
    for name, module in plain.named_modules():
        if name.endswith(".attn"):
            weight = pooling[f"{name}.processor.spatial_weight"].view(side, side) if side > 1 else None
            module.processor = PlainClear(GRID, WINDOW, weight)
    return plain


@pytest.mark.parametrize("side", [1, 4])
def test_a_file_against_the_formulas(side, tmp_path):
    model = make("flux-dev", single_layers=2)
    inputs, before, state = make_inputs(model, GRID, text=7), {}, copy.deepcopy(model.state_dict())
    before = run(model, inputs)
    weights = clear_weights(model, side)
    write(weights, tmp_path, f"clear_local_{WINDOW}{'_down_4' if side > 1 else ''}.safetensors")
    plain = plain_model(model, weights, side)
    expected = run(plain, inputs)

    assert load_clear(model, tmp_path, window=WINDOW, down_factor=side) is model
    torch.testing.assert_close(run(model, inputs), expected)
    assert (expected - before).abs().max() > 0.01
    with dense_mode(model):
        torch.testing.assert_close(run(model, inputs), before, rtol=0, atol=0)

    # gradients reach the file's weights as they would in its own model
    model(**inputs).sample.square().sum().backward()
    plain(**inputs).sample.square().sum().backward()
    for name in ("transformer_blocks.0.attn", "single_transformer_blocks.1.attn"):
        found, right = model.get_submodule(name), plain.get_submodule(name)
        for projection in ("to_q", "to_k", "to_v"):
            update = found.hybrid.deltas[f"{projection}_delta"]
            torch.testing.assert_close(update.weight.grad, right.get_submodule(projection).weight.grad)

    # other sizes than the grid's multiples, longer text, and back
    for grid, text in (((9, 5), 0), ((13, 14), 11)):
        assert run(model, make_inputs(model, grid, text=text)).isfinite().all()
    restore_dense(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(model, inputs), before)


def test_saved_and_loaded_again(tmp_path):
    model = make("flux-schnell", dtype=torch.float32)
    dense, inputs = copy.deepcopy(model), make_inputs(model, (9, 6))
    path = write(clear_weights(model, 2), tmp_path, "of_mine.safetensors")
    load_clear(model, path, window=3, down_factor=2)
    expected = run(model, inputs)
    save_adapter(model, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "hybrid_adapter.safetensors")
    assert not any("add_" in name for name in held)  # CLEAR does not train the text's projections
    assert torch.equal(run(load_adapter(dense, tmp_path / "adapter"), inputs), expected)
    model.save_pretrained(tmp_path / "model")
    again = hybriddit.HybridFluxTransformer2DModel.from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    torch.testing.assert_close(run(again, inputs), expected)
    with pytest.raises(ValueError, match="attn.hybrid has pooled keys"), in_strips(model, 3):
        pass


def test_a_pipeline_generates_in_strips_too(tmp_path):
    pipeline = tiny_pipeline("flux_dev")
    pipeline.set_progress_bar_config(disable=True)
    write(clear_weights(pipeline.transformer), tmp_path, "clear_local_3.safetensors")

    def image():
        generator, size = torch.Generator().manual_seed(0), {"height": 96, "width": 72}
        settings = {"num_inference_steps": 2, "max_sequence_length": TEXT_LENGTH, "output_type": "latent", **size}
        return pipeline("a red shoe", generator=generator, **settings).images

    before = image()
    assert load_clear(pipeline, tmp_path, window=3) is pipeline
    found = image()
    assert found.isfinite().all() and (found - before).abs().max() > 1e-3
    with in_strips(pipeline.transformer, 4), torch.no_grad():
        torch.testing.assert_close(image(), found, rtol=1e-3, atol=1e-4)
    config = HybridConfig.from_saved(pipeline.transformer.config.hybrid_config)
    assert config.window_shape == "circle" and config.window == 3 and not config.linear


def test_files_that_are_refused(tmp_path):
    model = make("flux-dev")
    state = copy.deepcopy(model.state_dict())
    good, pooled = clear_weights(model), clear_weights(model, 4)
    key = "transformer_blocks.0.attn.to_q.weight"

    def refused(message, source, error=ValueError, into=model, **settings):
        with pytest.raises(error, match=message) as raised:
            load_clear(into, source, **{"window": 8, **settings})
        assert "\n" not in str(raised.value)

    path = write(good, tmp_path, "clear_local_8.safetensors")
    refused("by its name for window=8 and down_factor=1, not 16", path, window=16)
    refused("has no clear_local_16_down_4.safetensors: it has clear_local_8.safetensors", tmp_path, FileNotFoundError,
            window=16, down_factor=4)  # fmt: skip
    refused("no file or folder of/no/repo", "of/no/repo", FileNotFoundError)
    refused("no file gone.safetensors", "gone.safetensors", FileNotFoundError)
    refused("is pickled and is not loaded", tmp_path / "clear.pt")
    refused("has no pooled keys, and down_factor is 4", write(good, tmp_path, "a.safetensors"), down_factor=4)
    refused(r"shape \(1, 1, 1, 4, 1, 4, 1\), and down_factor is 1", write(pooled, tmp_path, "b.safetensors"))
    refused("down_factor must be an integer of 1", path, down_factor=0)
    refused("window must be a positive integer", path, window=0)
    refused('the window of window_shape "circle" is its radius', path, window=(8, 4))
    without = {name: value for name, value in good.items() if name != key}
    refused(f"lacks 1 of its weights \\({key}", write(without, tmp_path, "c.safetensors"))
    refused(
        r"has 1 that it has no place for \(other", write({**good, "other": torch.ones(1)}, tmp_path, "d.safetensors")
    )
    wide = {**good, key: torch.ones(4, 4)}
    refused(f"{key} is \\(4, 4\\), the model's is", write(wide, tmp_path, "e.safetensors"))
    (tmp_path / "f.safetensors").write_bytes(b"no file")
    refused("is damaged or no safetensors file", tmp_path / "f.safetensors")
    refused("are for a FluxTransformer2DModel, not for a SD3", path, into=make("sd3"))
    assert type(model).__name__ == "FluxTransformer2DModel"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    hybridize(model, HybridConfig(window=3))
    refused("hybrid already", path)


def test_fields_of_a_config_that_cannot_work():
    def refused(message, **fields):
        with pytest.raises(ValueError, match=message):
            hybridize(make("sd3"), HybridConfig(**{"window": 4, **fields}))

    refused('window_shape "circle" has no stride', window_shape="circle", stride=2)
    refused("radius, one integer", window_shape="circle", windows={"*0*": (3, 4)})
    refused("unknown window_shape 'round'", window_shape="round")
    refused("pooled_keys must be an integer of 2", pooled_keys=1)
    refused("pooled_keys is of layers with a window", pooled_keys=2, window=None)
    refused('delta_rank must be a positive integer, "full" or None', delta_rank="all")
    refused("delta_rank is None", delta_projections=["to_q"])
    refused("'to_x' matches no projection of this model", delta_rank=2, delta_projections=["to_x"])
    config = HybridConfig(window_shape="circle", pooled_keys=2, delta_rank="full", delta_projections=["to_q"])
    assert HybridConfig.from_saved(config.to_dict()) == config
