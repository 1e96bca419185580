"""A model is known by its weights: by every bit of them, and by nothing else."""

import copy
import hashlib
import math

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from torch import nn

from hybriddit import HybridConfig, hybridize
from hybriddit.models import identity
from hybriddit.models.identity import base_digest, weights_digest


def model(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ParameterDict({f"p{i}": nn.Parameter(torch.randn(shape).to(dtype)) for i, shape in enumerate(shapes)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1024,), (2049, 3)])
def test_any_bit_of_any_element_counts(shape, dtype):
    before = weights_digest(model(shape, dtype=dtype))
    count = math.prod(shape)
    for place in {0, count // 2, count - 1}:
        for bit in (0, 7):
            changed = model(shape, dtype=dtype)
            changed["p0"].data.view(-1)[place : place + 1].view(torch.uint8)[0] ^= 1 << bit
            assert weights_digest(changed) != before
    assert weights_digest(model(shape, dtype=dtype)) == before


def test_the_order_of_elements_counts_and_that_of_names_does_not():
    one = model((4000,), (3,))
    other = nn.ParameterDict({"b": one["p1"], "a": one["p0"]})
    assert weights_digest(one) == weights_digest(other)
    for count in (2, 1100, 4000):  # within a block of 1024 words, and beyond it
        changed = copy.deepcopy(one)
        changed["p0"].data[:count] = changed["p0"].data[:count].flip(0)
        assert weights_digest(changed) != weights_digest(one)
    for size in ((2000, 2), (1, 4000)):
        assert weights_digest(nn.ParameterDict({"p0": nn.Parameter(one["p0"].data.view(size)), "p1": one["p1"]})) != (
            weights_digest(one)
        )


def test_the_digest_by_hand(monkeypatch):
    """Sums of words times odd numbers, modulo 2 ** 64: what a GPU and another version have to find as well."""
    values = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1500, np.int64)
    factors = []
    for number in range(256):
        block = hashlib.sha256(number.to_bytes(4, "little")).digest()
        factors += [int.from_bytes(block[i : i + 8], "little") | 1 for i in range(0, 32, 8)]
    sums = b""
    for block in (values[:1024], values[1024:]):
        total = sum(int(word) * factor for word, factor in zip(block, factors, strict=False)) % 2**64
        sums += total.to_bytes(8, "little")
    tensor = torch.from_numpy(values).view(torch.float32)
    expected = hashlib.sha256(b"torch.float32 (3000,)" + sums).hexdigest()
    assert identity.tensor_digest(tensor) == expected
    words = torch.from_numpy(np.resize(values, (3, 1024)))
    assert torch.equal(words @ identity._factors(), (words * identity._factors()).sum(1)), "as a GPU computes it"
    monkeypatch.setattr(identity, "PART", 8192)
    assert identity.tensor_digest(tensor) == expected, "a part at a time"


def test_where_the_weights_are_does_not_count():
    expected = weights_digest(model((300, 7), (5,)))
    odd = torch.cat([torch.zeros(1), model((300, 7), (5,))["p0"].data.flatten()])[1:].view(300, 7)
    moved = nn.ParameterDict({"p0": nn.Parameter(odd), "p1": model((300, 7), (5,))["p1"]})
    assert weights_digest(moved) == expected
    strided = nn.ParameterDict({"p0": nn.Parameter(odd.t().contiguous().t()), "p1": moved["p1"]})
    assert weights_digest(strided) == expected
    value = torch.tensor(0.5)
    assert identity.tensor_digest(value.expand(1)) == identity.tensor_digest(value[None]), "as a pipeline's time is"
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    expected = weights_digest(layers)
    cpu_offload(layers, torch.device("cpu"))
    assert next(layers.parameters()).is_meta and weights_digest(layers) == expected


def test_a_converted_transformer_is_its_teacher():
    from tiny_pipelines import tiny_pipeline

    transformer = tiny_pipeline("sd3").transformer
    expected = weights_digest(transformer)
    hybridize(transformer, HybridConfig(window=3, map_rank=4, delta_rank=2))
    assert weights_digest(transformer) == expected
    whole = weights_digest(transformer, added=True)
    with torch.no_grad():
        next(p for name, p in transformer.named_parameters() if ".hybrid." in name).add_(1)
    assert len({expected, whole, weights_digest(transformer, added=True)}) == 3
    with torch.no_grad():
        next(p for name, p in transformer.named_parameters() if ".hybrid." not in name).flatten()[0].add_(1)
    assert weights_digest(transformer) != expected


def test_a_base_is_known_however_it_is_loaded():
    """In float32 or bfloat16, converted, with a LoRA; not of other weights, or of a type that tells less."""
    from tiny_pipelines import tiny_pipeline

    transformer = tiny_pipeline("flux_dev").transformer.to(torch.bfloat16)
    expected = base_digest(transformer)
    assert base_digest(transformer.float()) == expected
    hybridize(transformer, HybridConfig(window=3, map_rank=4))
    assert base_digest(transformer) == expected
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert base_digest(transformer) == expected != weights_digest(transformer)
    transformer.fuse_lora()
    assert base_digest(transformer) != expected
    assert base_digest(tiny_pipeline("flux_dev", seed=1).transformer) not in (expected, None)
    half, absent = (tiny_pipeline("flux_dev").transformer.to(dtype=torch.float16), model((3,)).to("meta"))
    assert base_digest(half) is None and base_digest(absent) is None
