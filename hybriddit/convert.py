"""Convert a dense pipeline to a hybrid one and save it. Importing this imports neither torch nor diffusers."""

from __future__ import annotations

import sys
from pathlib import Path

from .config import HybridConfig
from .files import filling
from .stored import check_any_base


def run(
    model: str,
    out: Path,
    *,
    adapter: str | None = None,
    any_base: bool = False,
    window: int | None = None,
    plan: Path | None = None,
    variant: str | None = None,
    config: str | None = None,
    dtype: str | None = None,
    quiet: bool = False,
) -> None:
    """Save the pipeline `model` with hybrid attention to the new or empty folder `out`, whole or not at all.

    adapter: provides config and weights; without it the hybrid's weights are fresh. any_base: take an adapter that was
    distilled from other weights. window (in tokens), or plan (a YAML or JSON file of HybridConfig's fields): the config
    of a fresh hybrid. model, variant, config: see
    `pipelines.loading.find_base`. dtype: such as "bfloat16"; None keeps each component's, as it is stored. quiet: hide
    progress bars, notes, and messages of the libraries except errors.

    Raises ValueError or OSError, in one line.
    """
    if sum(option is not None for option in (adapter, window, plan)) > 1:
        raise ValueError("give one of --window and --plan, for a fresh hybrid, or --adapter, which brings its own")
    check_any_base(any_base, adapter)
    fields = {} if window is None else {"window": window}
    chosen = HybridConfig.from_plan(plan) if plan else HybridConfig(**fields)
    from .attention.mixers import check_mixer

    check_mixer(chosen.mixer, **chosen.mixer_settings)
    with filling(out) as folder:
        import torch

        from .models import hybridize, load_adapter, read_adapter_config
        from .models.family import denoiser
        from .pipelines.loading import check_convertible, find_base, load_base, silence_libraries

        if quiet:
            silence_libraries()
        base_class = None
        if adapter:
            chosen, base_class = read_adapter_config(adapter)
        base = find_base(model, variant=variant, config=config)
        check_convertible(base, chosen, base_class, adapter)
        if base.note and not quiet:
            print(f"note: {base.note}", file=sys.stderr)
        pipeline = load_base(base, None if dtype is None else getattr(torch, dtype))
        if adapter:
            load_adapter(pipeline, adapter, check_base=not any_base)
        else:
            hybridize(denoiser(pipeline), chosen)
        pipeline.save_pretrained(folder)
