"""Upload an adapter to the hub, with a card that says what it was distilled from, and how.

Importing this imports neither torch nor diffusers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import HybridConfig
from .files import read_json, read_tensors, replacing
from .stored import ADAPTER_FILES, find_adapter, public_name

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

# what a card tells of a run's config, by section; no prompts and no paths, which may be private
SHOWN = {
    "data": "source images height width steps guidance_scale",
    "train": "steps batch_size precision seed",
    "optim": "lr schedule",
}
FIGURES = ("step", "loss", "task", "output", "layer", "fd")  # of the last lines of log.jsonl that have them


def push_adapter(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    base: str | None = None,
    license: str = "unknown",
    token: str | None = None,
) -> str:
    """Upload an adapter to a model repository of the hub, which is made if it is not there. Returns its address.

    folder: the adapter's, or a distillation's output.folder. A README.md in the adapter's folder is uploaded as it is;
    else a card is made and kept there (`make_card`, which takes base and license).
    repo_id: "owner/name". private: of a repository that is made. token: None is the one of `hf auth login` or HF_TOKEN.

    Raises FileNotFoundError or ValueError, in one line, for what is no adapter, and ConnectionError where the hub does
    not take it.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    folder = find_adapter(Path(folder))
    validate_repo_id(repo_id)
    card = folder / "README.md"
    if card.exists() and (base is not None or license != "unknown"):
        raise ValueError(
            f"{card} is there already, and is uploaded as it is: say the base and its licence in it, or delete it"
        )
    if (token or get_token()) is None:
        raise ValueError("there is no token for the hub: run `hf auth login`, or set HF_TOKEN")
    if not card.exists():
        with replacing(card) as partial:
            partial.write_text(str(make_card(folder, repo_id, base, license)), encoding="utf-8")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[*ADAPTER_FILES, "README.md"],
            commit_message="Upload the adapter",
        )
    except Exception as error:  # the hub's client and the HTTP library below it have no common class of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(f"the hub did not take {folder} as {repo_id}: {reason}") from error
    return f"https://huggingface.co/{repo_id}"


def make_card(folder: Path, repo_id: str, base: str | None = None, license: str = "unknown") -> ModelCard:
    """Make an adapter's card: base, settings, and the figures of its run where the folder is in one.

    base: repository of what it was distilled from; None: what the run's config or the adapter says. Of a folder only
        the name is told.
    license: of the base, whose licence the adapter's use falls under.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from .models.family import family_of_class

    values = read_json(folder / ADAPTER_FILES[0])
    try:
        hybrid = HybridConfig.from_saved(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / ADAPTER_FILES[0]} is no adapter config: {error}") from error
    added = sum(tensor.numel() for tensor in read_tensors(folder / ADAPTER_FILES[1]).values())
    config, figures = read_run(folder.parent)
    path = base or config.get("model", {}).get("path") or (values.get("_base") or {}).get("name") or ""
    name = public_name(path) or "an unknown checkpoint"
    repository = name if "/" in name else None
    facts = {"distilled_from": name, "base_class": values.get("_base_class"), "parameters": added, **figures}
    data = ModelCardData(
        base_model=repository,
        base_model_relation="adapter" if repository else None,
        license=license,
        library_name="hybriddit",
        pipeline_tag="text-to-image",
        tags=["hybriddit", "linear-attention", "distillation"],
        hybriddit=facts,
    )
    settings = {
        f"{section}.{key}": config[section][key]
        for section, keys in SHOWN.items()
        for key in keys.split()
        if key in config.get(section, {})
    }
    family = family_of_class(values.get("_base_class"))
    kind, load = "DiffusionPipeline", ""
    if family is not None and not family.pipelines:
        kind, load = "ModularPipeline", "pipeline.load_components()\n"
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {repo_id.rpartition('/')[2]}\n",
        f"An adapter of hybriddit: it turns the attention of {name} "
        f"({values.get('_base_class')}) into hybrid attention, a window and linear attention over the whole image. It "
        f"adds {added:,} parameters and does not hold the base.\n",
        f"Licence of the base: {license}.\n",
        f"```python\nimport hybriddit\nfrom diffusers import {kind}\n\n"
        f'pipeline = {kind}.from_pretrained("{repository or "path/to/the/base"}")\n{load}'
        f'hybriddit.load_adapter(pipeline, "{repo_id}")\n```\n',
        "## Settings\n\n" + _table({**hybrid.to_dict(), **settings}),
        "## Figures\n\n" + (_table(figures) if figures else "None were kept with the adapter.\n"),
    ]
    return ModelCard("\n".join(parts))


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """(config, the newest value of each figure) of the distillation in a folder; empty where there is none."""
    import yaml

    if not (folder / "config.yaml").is_file() or not (folder / "log.jsonl").is_file():
        return {}, {}
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines() if line]
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"the run in {folder} is damaged: {' '.join(str(error).split())}") from error
    newest = {name: value for line in lines for name, value in line.items() if name in FIGURES}
    return config, {name: newest[name] for name in FIGURES if name in newest}


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {name} | `{json.dumps(value, ensure_ascii=False)}` |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows]) + "\n"
