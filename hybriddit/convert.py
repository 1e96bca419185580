"""Convert a dense pipeline to a hybrid one and save it. Importing this imports neither torch nor diffusers."""

from __future__ import annotations

from pathlib import Path

from .config import HybridConfig
from .files import filling


def run(
    model: str,
    out: Path,
    *,
    adapter: str | None = None,
    window: int | None = None,
    plan: Path | None = None,
    dtype: str | None = None,
    quiet: bool = False,
) -> None:
    """Save the pipeline `model` with hybrid attention to the new or empty folder `out`, whole or not at all.

    adapter: provides config and weights; without it the hybrid's weights are fresh. window (in tokens), or plan (a YAML
    or JSON file of HybridConfig's fields): the config of a fresh hybrid. model, dtype, quiet: see `load_for_use`.

    Raises ValueError or OSError, in one line.
    """
    if sum(option is not None for option in (adapter, window, plan)) > 1:
        raise ValueError("give one of --window and --plan, for a fresh hybrid, or --adapter, which brings its own")
    fields = {} if window is None else {"window": window}
    config = HybridConfig.from_plan(plan) if plan else HybridConfig(**fields)
    from .attention.mixers import check_mixer

    check_mixer(config.mixer, **config.mixer_settings)
    with filling(out) as folder:
        from .models import hybridize, load_adapter
        from .pipelines.loading import load_for_use

        pipeline = load_for_use(model, dtype=dtype, adapter=adapter, quiet=quiet)
        if getattr(pipeline, "transformer", None) is None:
            raise ValueError(f"{model} is a {type(pipeline).__name__}, which has no diffusion transformer to convert")
        if adapter:
            load_adapter(pipeline, adapter)
        else:
            hybridize(pipeline.transformer, config)
        pipeline.save_pretrained(folder)
