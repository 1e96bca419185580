"""`hybriddit push`: what is uploaded, and the card; the hub is a stand-in."""

import json

import pytest
from huggingface_hub import ModelCard
from tiny_pipelines import tiny_pipeline

import hybriddit
from hybriddit import HybridConfig, hybridize, push_adapter, save_adapter
from hybriddit.cli import main
from hybriddit.info import describe


@pytest.fixture
def run(tmp_path):
    """The folder of a distillation, as far as a card reads it."""
    model = hybridize(tiny_pipeline("flux_dev").transformer, HybridConfig(window=3, map_rank=4))
    save_adapter(model, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text("""
model: {path: owner/flux-base}
data: {source: teacher, prompts: [a secret shoe], images: 24, height: 64, width: 64, steps: 4, cache: /home/me/cache}
train: {steps: 20, batch_size: 4, precision: bf16}
optim: {lr: 0.001}
""")
    lines = [{"step": 10, "loss": 0.5, "fd": 7.0}, {"step": 20, "loss": 0.25, "lr": 1e-3}]
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "run"


@pytest.fixture
def hub(monkeypatch):
    """What the hub is asked for; `hub.error`, if set, is what it answers."""

    class Hub:
        error, calls = None, []

        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, **given):
            if Hub.error is not None:
                raise Hub.error
            Hub.calls.append(("create", repo_id, given))

        def upload_folder(self, *, folder_path, allow_patterns, **given):
            names = sorted(path.name for path in folder_path.iterdir() if path.name in allow_patterns)
            Hub.calls.append(("upload", given["repo_id"], names))

    Hub.error, Hub.calls = None, []
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    return Hub


FILES = ["README.md", "hybrid_adapter.safetensors", "hybrid_config.json"]


def test_an_adapter_of_a_run_is_uploaded_with_its_card(run, hub, capsys):
    (run / "adapter" / "notes.txt").write_text("not for others")
    assert main(["push", str(run), "me/hybrid-flux", "--private", "--license", "apache-2.0"]) == 0
    assert capsys.readouterr().out == "adapter uploaded to https://huggingface.co/me/hybrid-flux\n"
    assert hub.calls == [
        ("create", "me/hybrid-flux", {"private": True, "exist_ok": True}),
        ("upload", "me/hybrid-flux", FILES),
    ]
    card = ModelCard.load(run / "adapter" / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("owner/flux-base", "adapter")
    assert (data["license"], data["library_name"]) == ("apache-2.0", "hybriddit")
    adapter = describe(run / "adapter")
    facts = {"distilled_from": "owner/flux-base", "base_class": "FluxTransformer2DModel", "step": 20, "loss": 0.25}
    facts |= {"parameters": adapter["hybrid"]["added_parameters"], "fd": 7.0}
    assert data["hybriddit"] == facts
    for part in ("| window | `3` |", "| data.images | `24` |", "| train.batch_size | `4` |", "| optim.lr | `0.001` |",
                 'load_adapter(pipeline, "me/hybrid-flux")', "Licence of the base: apache-2.0."):  # fmt: skip
        assert part in card.text, part
    assert "secret" not in str(card) and "/home" not in str(card)
    assert adapter["card"] == {**facts, "license": "apache-2.0"}
    assert main(["info", str(run / "adapter")]) == 0
    assert "card    distilled_from owner/flux-base" in capsys.readouterr().out
    # what was made is an adapter like before
    hybriddit.load_adapter(tiny_pipeline("flux_dev"), run / "adapter")


def test_without_a_run_the_base_is_unknown_or_as_given(run, hub):
    for name in ("config.yaml", "log.jsonl"):
        (run / name).unlink()
    push_adapter(run / "adapter", "me/one")
    card = ModelCard.load(run / "adapter" / "README.md")
    assert "base_model" not in card.data.to_dict() and card.data.license == "unknown"
    assert "Licence of the base: unknown." in card.text and "None were kept" in card.text
    (run / "adapter" / "README.md").unlink()
    push_adapter(run / "adapter", "me/one", base="owner/other")
    assert ModelCard.load(run / "adapter" / "README.md").data.base_model == "owner/other"


def test_a_local_base_is_named_without_its_path(run, hub):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("owner/flux-base", "/home/me/models/my-flux"))
    push_adapter(run, "me/one")
    data = ModelCard.load(run / "adapter" / "README.md").data.to_dict()
    assert data["hybriddit"]["distilled_from"] == "my-flux" and "base_model" not in data
    assert "/home" not in (run / "adapter" / "README.md").read_text()


def test_a_card_of_the_users_is_kept(run, hub, capsys):
    card = run / "adapter" / "README.md"
    card.write_text("# mine")
    assert main(["push", str(run), "me/one"]) == 0
    assert card.read_text() == "# mine" and hub.calls[1] == ("upload", "me/one", FILES)
    assert "card" not in describe(run / "adapter")
    assert main(["push", str(run), "me/one", "--license", "mit"]) == 1
    assert "README.md is there already, and is uploaded as it is" in capsys.readouterr().err
    card.write_text("---\nfoo: [\n---\n")
    assert main(["info", str(run / "adapter")]) == 1
    assert "README.md is no model card" in capsys.readouterr().err


def test_what_cannot_be_uploaded(run, hub, tmp_path, capsys, monkeypatch):
    def said(*arguments):
        assert main(["push", *map(str, arguments)]) == 1
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert f"no adapter in {tmp_path}: it has no hybrid_config.json, nor has" in said(tmp_path, "me/one")
    assert "Repo id must" in said(run, "me/one/two")
    hub.error = OSError("You are not\nwelcome")
    assert f"the hub did not take {run / 'adapter'} as me/one: You are not welcome" in said(run, "me/one")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "there is no token for the hub: run `hf auth login`, or set HF_TOKEN" in said(run, "me/one")
    (run / "adapter" / "hybrid_adapter.safetensors").unlink()
    assert "has no hybrid_adapter.safetensors" in said(run, "me/one")
    assert hub.calls == []
