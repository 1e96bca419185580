"""Write docs/api.md from the docstrings: python scripts/make_api_docs.py, or `make docs`."""

import importlib
import inspect
from dataclasses import is_dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "api.md"

# the public names, by the module to import them from
NAMES = {
    "hybriddit": (
        "HybridConfig hybridize restore_dense dense_mode in_strips save_adapter load_adapter load_clear load_linfusion "
        "HeldAdapters "
        "push_adapter load_config "
        "HybridPixArtTransformer2DModel HybridSD3Transformer2DModel HybridFluxTransformer2DModel "
        "HybridChromaTransformer2DModel HybridQwenImageTransformer2DModel HybridFlux2Transformer2DModel "
        "HybridZImageTransformer2DModel HybridUNet2DConditionModel SiTTransformer2DModel SiTPipeline "
        "HybridPixArtSigmaPipeline HybridStableDiffusion3Pipeline HybridFluxPipeline HybridChromaPipeline "
        "HybridQwenImagePipeline HybridFlux2Pipeline HybridFlux2KleinPipeline HybridZImagePipeline "
        "HybridStableDiffusionPipeline HybridStableDiffusionXLPipeline"
    ),
    "hybriddit.attention": "linear_attention neighborhood_attention aligned_window TokenLayout HybridAttention",
    "hybriddit.flow": (
        "coefficients interpolate target convert shift_times draw_times flow_loss training_interval "
        "sample_ode sample_sde sampling_interval guided log_likelihood"
    ),
    "hybriddit.models.family": "Family Published LayerShape Part register unregister families family_of is_hybrid",
    "hybriddit.models.positions": "scaled_positions rotary_frequencies",
    "hybriddit.models.recipe": "Recipe",
    "hybriddit.models.flops": "attention_flops",
    "hybriddit.models.peak": "Cost forward_cost decoder_cost forward_peak decoder_peak",
    "hybriddit.models.sit_convert": "load_original read_original from_original to_original",
    "hybriddit.metrics": (
        "adm_metrics evaluate frechet_distance_of load_inception to_uint8 read_images spatial_features "
        "frechet_distance inception_score precision_recall Moments moments merge"
    ),
    "hybriddit.parallel": "shard spread_tiles shared_tiles",
    "hybriddit.pipelines.memory": "MemoryPlan StageTimes plan_memory make_within strips_within decode_in_strips",
    "hybriddit.pipelines.cascade": "Schedule repainting stage_sizes first_size",
    "hybriddit.pipelines.upscaler": "Upscaler load_upscaler",
    "hybriddit.pipelines.loading": "Base find_base load_base load_pipeline load_sit_pipeline",
    "hybriddit.generate": "generate check_settings",
    "hybriddit.images": "open_image read_record save_png",
    "hybriddit.strips_file": "write_strips save_image preview_path",
    "hybriddit.info": "environment describe",
    "hybriddit.training.run_config": (
        "DistillConfig ModelConfig DataConfig LossConfig OptimConfig TrainConfig MetricsConfig OutputConfig "
        "SiTConfig ClassDataConfig FlowConfig SiTOptimConfig SiTTrainConfig SiTMetricsConfig SiTOutputConfig"
    ),
    "hybriddit.training.distill": "run distill",
    "hybriddit.training.train_sit": "run train",
    "hybriddit.training.dry_run": "dry_run",
    "hybriddit.training.dry_run_sit": "dry_run",
    "hybriddit.data.sources": "Source open_class_data look_at_classes",
    "hybriddit.data.teacher": "Teacher PromptEmbeddings",
    "hybriddit.data.teacher_images": "teacher_images",
    "hybriddit.data.prompts": "read_prompts",
    "hybriddit.data.image_folder": "image_folder captioned_images",
    "hybriddit.data.captions": "read_captions CaptionedFolder",
    "hybriddit.data.class_data": "ClassData ClassInfo",
    "hybriddit.data.class_images": "class_images find_classes ClassFolder",
    "hybriddit.data.class_cache": "make_cache",
}
HEAD = """# API reference

Made from the docstrings by `make docs`; a test keeps it up to date. The names of `hybriddit` and `hybriddit.attention`
are meant to last; the others may move before 1.0.
"""


def render() -> str:
    parts = [HEAD]
    for module, names in NAMES.items():
        parts.append(f"## {module}\n")
        home = importlib.import_module(module)
        for name in names.split():
            parts.append(entry(name, getattr(home, name)))
            for method, function in methods(getattr(home, name)):
                parts.append(entry(f"{name}.{method}", function))
    return "\n".join(parts)


def methods(thing) -> list[tuple[str, object]]:
    """The public methods that one of our classes or its mixins document."""
    found = {}
    for base in reversed(thing.__mro__ if inspect.isclass(thing) else ()):
        if base.__module__.startswith("hybriddit."):
            public = {name: value for name, value in vars(base).items() if not name.startswith("_")}
            found |= {
                name: getattr(thing, name)
                for name, value in public.items()
                if (inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod))) and own_doc(value)
            }
    return list(found.items())


def own_doc(function) -> str | None:
    return getattr(function, "__func__", function).__doc__


def entry(name: str, thing) -> str:
    # models and pipelines take diffusers' arguments, which are documented there
    diffusers = inspect.isclass(thing) and any(base.__module__.startswith("diffusers.") for base in thing.__mro__)
    call = name if diffusers else f"{name}{signature(thing, len(name))}"
    doc = inspect.cleandoc(thing.__doc__) if thing.__doc__ else ""
    return f"### {name}\n\n```text\n{call}\n\n{doc}\n```\n"


def signature(thing, indent: int) -> str:
    found = inspect.signature(thing)
    parts, starred = [], False
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = stars + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {'…' if is_factory(parameter.default) else repr(parameter.default)}"
        parts.append(text)
    returns = "" if found.return_annotation is found.empty or inspect.isclass(thing) else (
        f" -> {annotation(found.return_annotation)}"
    )  # fmt: skip
    line = f"({', '.join(parts)}){returns}"
    if indent + len(line) <= 100:
        return line
    return "(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def is_factory(default) -> bool:
    """Whether a dataclass field's default is made by a factory, and so has no readable form."""
    return type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS" or is_dataclass(default)


def annotation(value) -> str:
    return value if isinstance(value, str) else inspect.formatannotation(value)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
