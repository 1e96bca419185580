"""Every fenced block of README.md, CONTRIBUTING.md and docs/ is run, or checked as far as that goes without running.

The blocks of one page run in order in a folder of their own, which has the repository's assets, configs and scripts:

- ```python: executed, one namespace a page
- ```bash: `hybriddit` commands by the command line's own main, in this process (each would spend seconds importing
  torch), anything else by bash
- ```diff: applied to a copy of the package, which later blocks of the page import, in a process of their own
- ```text: shown only; after <!-- output -->, what the block before has printed

A comment on the line before a block says otherwise: <!-- file: PATH --> writes the block to that file, and
<!-- needs: gpu | weights | network --> has it checked alone: syntax, arguments, and that what it names exists.
"""

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from accelerate.state import AcceleratorState

import hybriddit
from hybriddit.cli import build_parser, main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
NEEDS = ("gpu", "weights", "network")
# the command that each script for accelerate is
LAUNCHED = {"train/distill.py": "distill", "train/train_sit.py": "train"}
# not run from here, and why
MAKE = {
    "make demo": "minutes; tests/demo runs it on fewer steps",
    "make test": "is what runs this",
    "make lint": "run by .ci/run",
    "make dist": "run by .ci/run",
    "make docs": "test_the_api_page_is_up_to_date",
}


class Block(NamedTuple):
    page: str
    line: int  # of its first line of code
    language: str
    text: str
    key: str | None = None  # of the comment before it
    value: str | None = None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> list[Block]:
    found, before, lines = [], "", iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if line.lstrip().startswith("```"):
            inside = []
            for _, code in lines:
                if code.strip() == "```":
                    break
                inside.append(code)
            else:
                raise ValueError(f"{page}:{number}: the block has no end")
            comment = re.fullmatch(r"<!-- (\w+)(?:: (.+?))? -->", before.strip())
            key, value = comment.groups() if comment else (None, None)
            body = "\n".join(inside) + "\n"
            found.append(Block(page, number + 1, line.strip().removeprefix("```").strip(), body, key, value))
        before = line
    return found


def page_blocks(page: str) -> list[Block]:
    return blocks(page, (ROOT / page).read_text(encoding="utf-8"))


def check_marks(block: Block) -> None:
    """Every block is of a kind that is run, written or checked here; none is left out unsaid."""
    assert block.language in ("python", "bash", "diff", "yaml", "json", "text"), f"{block.where}: what is this?"
    assert block.key in (None, "file", "needs", "output"), f"{block.where}: unknown mark {block.key}"
    if block.key == "needs":
        assert block.value in NEEDS and block.language in ("python", "bash"), block.where
    if block.language in ("yaml", "json"):
        assert block.key == "file", f"{block.where}: nothing reads this; name a file that the page's commands read"


def commands(block: Block) -> list[list[str]]:
    """The words of every command of a bash block."""
    joined = block.text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def check_only(block: Block) -> None:
    """A block that cannot run here: its syntax, and what can be told of its names and arguments."""
    if block.language == "python":
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hybriddit":
                assert hasattr(hybriddit, node.attr), f"{block.where}: hybriddit has no {node.attr}"
        return
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    for words in commands(block):
        # alone, or as -m hybriddit of torchrun
        called = [i for i, word in enumerate(words) if word == "hybriddit" and (i == 0 or words[i - 1] == "-m")]
        if called:
            check_arguments(words[called[0] + 1 :])
        elif words[:2] == ["accelerate", "launch"]:
            (at,) = [i for i, word in enumerate(words) if word in LAUNCHED]
            assert (ROOT / words[at]).is_file()
            check_arguments([LAUNCHED[words[at]], *words[at + 1 :]])
        else:
            known = ("pip", "python", "bash", "torchrun", "sudo", "git", "cd", "make", "source")
            assert words[0] in known, f"{block.where}: cannot check {words[0]}"
            assert all((ROOT / word).is_file() for word in words if word.startswith("scripts/")), block.where


def check_arguments(arguments: list[str]) -> None:
    options = build_parser().parse_args(arguments)
    if arguments[0] in LAUNCHED.values():
        hybriddit.load_config(ROOT / options.config, options.overrides)


class Page:
    """A folder to run one page's blocks in."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.printed = folder, ""
        self.namespace: dict = {"__name__": "__main__"}
        self.copied = False
        for name in ("assets", "configs", "train", "scripts"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "outputs").mkdir()
        monkeypatch.chdir(folder)
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def do(self, block: Block) -> None:
        if block.key == "needs":
            check_only(block)
        elif block.key == "output":
            assert self.printed.strip() == block.text.strip(), f"{block.where}: it prints\n{self.printed}"
        elif block.key == "file":
            self.copy_package(block.value)
            path = self.folder / block.value
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            self.python(block)
        elif block.language == "bash":
            self.bash(block)
        elif block.language == "diff":
            self.copy_package("hybriddit/")
            subprocess.run(["git", "apply", "-"], input=block.text, text=True, check=True)

    def copy_package(self, path: str) -> None:
        """Before the first edit of the package: a copy, so that the page edits that."""
        if path.startswith("hybriddit/") and not self.copied:
            shutil.copytree(ROOT / "hybriddit", self.folder / "hybriddit", ignore=shutil.ignore_patterns("__pycache__"))
            self.environment["PYTHONPATH"] = str(self.folder)
            self.copied = True

    def python(self, block: Block) -> None:
        if self.copied:
            self.printed = self.run([sys.executable, "-c", block.text])
            return
        code = compile("\n" * (block.line - 1) + block.text, str(ROOT / block.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, self.namespace)
        self.printed = printed.getvalue()

    def bash(self, block: Block) -> None:
        words = commands(block)
        if [" ".join(command) for command in words if " ".join(command) not in MAKE] == []:
            return
        if any(command[0] != "hybriddit" for command in words) or re.search(r"[|<>;&$`]", block.text):
            self.printed = self.run(["bash", "-euo", "pipefail", "-c", block.text])
            return
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            for command in words:
                assert main(command[1:]) == 0, f"{block.where}: {shlex.join(command)} failed"
                AcceleratorState._reset_state(reset_partial_state=True)
        self.printed = printed.getvalue()

    def run(self, command: list[str]) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """diffusers' progress bars and accelerate's state stay inside this file."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run(name, tmp_path, monkeypatch):
    found = page_blocks(name)
    for block in found:
        check_marks(block)
    page = Page(tmp_path, monkeypatch)
    if any("outputs/demo/pipeline" in block.text for block in found):
        # what `make demo` leaves there is distilled; a fresh hybrid loads and runs the same way
        convert = ["convert", "--model", "assets/demo-teacher", "--window", "5", "--out", "outputs/demo/pipeline"]
        assert main([*convert, "--quiet"]) == 0
    for block in found:
        page.do(block)


def test_make_targets_exist():
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert {command.split()[1] for command in MAKE} <= set(targets)


def test_a_block_is_never_left_out(tmp_path, monkeypatch):
    """The test's own net: unknown languages, marks, make targets and failing blocks are all told."""

    def run(text, folder):
        folder.mkdir()
        found, page = blocks("page.md", text), Page(folder, monkeypatch)
        for block in found:
            check_marks(block)
            page.do(block)

    run(
        "```python\nprint(1)\n```\n<!-- output -->\n```text\n1\n```\n```bash\nmake test  # all\n```\n",
        tmp_path / "good",
    )
    for text in (
        "```\ncode\n```\n",
        "```rust\ncode\n```\n",
        "```yaml\na: 1\n```\n",
        "<!-- needs: patience -->\n```bash\ntrue\n```\n",
        "```python\nassert False\n```\n",
        "```bash\nfalse\n```\n",
        "```bash\nmake nonsense\n```\n",
        "```bash\nhybriddit info /nowhere\n```\n",
        "```python\nprint(1)\n```\n<!-- output -->\n```text\n2\n```\n",
        "<!-- needs: gpu -->\n```python\nhybriddit.nothing\n```\n",
        "<!-- needs: weights -->\n```bash\nhybriddit distill configs/distill/flux_dev.yaml optim.lrr=1\n```\n",
        "<!-- needs: weights -->\n```bash\nhybriddit distill configs/distill/none.yaml\n```\n",
    ):
        with pytest.raises((AssertionError, subprocess.CalledProcessError, ValueError, OSError)):
            run(text, tmp_path / str(len(list(tmp_path.iterdir()))))


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown page's headings get."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "name", [*PAGES, "CHANGELOG.md", "assets/demo-teacher/README.md", "assets/demo-teacher-sd3/README.md"]
)
def test_relative_links_resolve(name):
    path = ROOT / name
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists() and target.is_relative_to(ROOT), f"{name}: {link}"
        assert not anchor or anchor in anchors(target), f"{name}: {link}"


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page for page in PAGES if page != "README.md" and f"({page})" not in readme]


def test_the_api_page_is_up_to_date():
    import make_api_docs

    assert make_api_docs.PAGE.read_text(encoding="utf-8") == make_api_docs.render(), "run make docs"
    undocumented = set(hybriddit.__all__) - set(make_api_docs.NAMES["hybriddit"].split())
    assert undocumented == {"ModelMixin"}  # diffusers', there for loading


def test_the_diagram_is_what_its_script_draws(tmp_path):
    import draw_hybrid_layer

    draw_hybrid_layer.draw(tmp_path / "layer.svg")
    # matplotlib's version is in the file, and its rounding may change: the words and the number of shapes may not
    one, other = (
        (folder / name).read_text() for folder, name in ((tmp_path, "layer.svg"), (ROOT, "docs/hybrid-layer.svg"))
    )
    assert re.findall(r"<!-- (.+?) -->", one) == re.findall(r"<!-- (.+?) -->", other)
    assert one.count("<path") == other.count("<path")


def test_the_estimates_are_those_of_the_configs():
    """docs/distill.md repeats what the heads of the configs say."""
    text = (ROOT / "docs/distill.md").read_text(encoding="utf-8")
    rows = {
        row[0]: row[1:]
        for row in re.findall(r"^\| `(\w+)` \| (.+?) \((.+?)\) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.M)
    }
    assert set(rows) == {path.stem for path in ROOT.glob("configs/distill/*.yaml")} - {"demo", "demo_sd3"}
    for name, (trained, share, memory, making, training) in rows.items():
        head = (ROOT / f"configs/distill/{name}.yaml").read_text(encoding="utf-8")
        assert f"parameters trained: {trained} ({share} of" in head
        assert f"memory on one GPU: {memory} and more" in head
        assert f"{making} for the images, {training} for the training" in head


def test_a_family_takes_under_80_lines():
    lines = 0
    for block in page_blocks("docs/adding-a-family.md"):
        if block.key == "file":
            lines += block.text.count("\n")
        elif block.language == "diff":
            lines += len(re.findall(r"^\+(?!\+\+ )", block.text, re.M))
    assert 30 < lines < 80, lines


def test_the_citation_file_is_valid():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == hybriddit.__version__
    assert all({"type", "title", "authors"} <= set(reference) for reference in citation["references"])
