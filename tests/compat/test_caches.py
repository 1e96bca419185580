"""First-block cache and TaylorSeer: steps that are skipped are skipped as on the dense model."""

import pytest
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from oracle import COVERS, assert_same, check, converted, differs, generate, pipelines
from tiny_models import make
from tiny_pipelines import tiny_pipeline

from hybriddit import HybridConfig, hybridize


@pytest.mark.parametrize("config", [
    FirstBlockCacheConfig(threshold=0.9),
    TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=None),
    TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, use_lite_mode=True),
], ids=["first-block", "taylorseer", "taylorseer-lite"])  # fmt: skip
@pytest.mark.parametrize(("kind", "before_converting"), [("flux_schnell", False), ("flux_dev", True)])
def test_caches(kind, config, before_converting):
    trio = pipelines(kind)
    plain = check(lambda p: generate(p, num_inference_steps=6), trio)
    if before_converting:
        trio = [tiny_pipeline(kind) for _ in range(3)]
    for pipeline in trio:
        pipeline.transformer.enable_cache(config)
    if before_converting:
        hybridize(trio[1].transformer, COVERS)
        converted(trio[2].transformer)
    cached = check(lambda p: generate(p, num_inference_steps=6), trio)
    assert all(differs(*images) for images in zip(plain, cached, strict=True))
    for pipeline in trio:
        pipeline.transformer.disable_cache()
    for found, expected in zip(check(lambda p: generate(p, num_inference_steps=6), trio), plain, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("kind", ["pixart", "sd3"])
def test_others_have_no_caches(kind):
    """diffusers gives them no `enable_cache`: the table says so."""
    assert not hasattr(make(kind), "enable_cache")
    assert not hasattr(hybridize(make(kind), HybridConfig(window=3)), "enable_cache")
