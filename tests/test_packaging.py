"""What pyproject.toml says, against the package; building and installing is scripts/smoke_wheel.sh (`make dist`)."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import hybriddit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# what the import is called where the package is called otherwise
IMPORTED_AS = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "huggingface-hub": "huggingface_hub",
    "scikit-image": "skimage",
    "torch-fidelity": "torch_fidelity",
}
# not imported by us, and what needs it
REASONS = {
    "protobuf": "transformers, to read T5's tokenizer file",
    "sentencepiece": "transformers, for T5's tokenizer",
    "tensorboard": "accelerate's tracker",
}
# ComfyUI, which loads the nodes into itself; and this package, by a name that holds in a copy of the nodes' file
HOSTS = {"comfy", "hybriddit"}
# taken where it is installed; without a GPU, which its kernels need, it is of no use
PRESENT = {"fla"}


def requirement(line: str) -> str:
    return re.match(r"[\w-]+", line)[0].lower()


def imports(folder: Path) -> set[str]:
    """Top-level names of every absolute import in the package, wherever in a file it stands."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


def test_every_dependency_has_a_reason_and_every_import_a_dependency():
    required = {requirement(line) for line in PROJECT["dependencies"]}
    optional = {
        requirement(line)
        for extra in ("natten", "gpu", "eval", "app", "8bit", "upscaler")
        for line in PROJECT["optional-dependencies"][extra]
    }
    imported = imports(ROOT / "hybriddit")
    names = {IMPORTED_AS.get(name, name): name for name in required | optional}
    assert imported - HOSTS - PRESENT <= set(names), "imported, but not in pyproject.toml"
    unused = {package for name, package in names.items() if name not in imported and package in required}
    assert unused == set(REASONS), "in pyproject.toml, but neither imported nor with a reason"


def test_extras_and_pythons():
    assert {"natten", "gpu", "eval", "app", "dev"} <= set(PROJECT["optional-dependencies"])
    assert PROJECT["requires-python"] == ">=3.11"
    pythons = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    assert pythons == {"3.11", "3.12", "3.13"}


def test_every_dependency_is_pinned_for_the_tests():
    pinned = {requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    every = PROJECT["dependencies"] + [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    assert {requirement(line) for line in every} - {"hybriddit"} <= pinned


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["dynamic"]
    assert re.search(rf"^## {re.escape(hybriddit.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


@pytest.mark.parametrize("name", PROJECT["license-files"] + ["CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"])
def test_the_files_are_there(name):
    assert (ROOT / name).read_text(encoding="utf-8").strip()


def test_syntax_is_of_the_oldest_python():
    for path in (ROOT / "hybriddit").rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 11))
