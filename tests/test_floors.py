"""The order of the package's floors: a module imports from lower ones alone, and nothing outside `models` knows a family.

Read from the source: every import counts, those inside functions and under TYPE_CHECKING too.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from hybriddit.models import families

PACKAGE = Path(__file__).parents[1] / "hybriddit"
# from the ground up; modules of one floor that are not in one folder do not import each other, but for the ground's
FLOORS = (
    ("config", "files", "images", "machine", "stored", "strips_file"),
    ("attention",),
    ("models", "flow", "metrics"),
    ("parallel",),
    ("pipelines",),
    ("data",),
    ("training",),
    ("convert", "generate", "sample", "push", "benchmark", "info", "demo"),
    ("analyze", "app", "comfyui"),
    ("cli",),
    ("__main__",),
)
GROUND = FLOORS[0]
LEVELS = {name: level for level, names in enumerate(FLOORS) for name in names}
# the package itself: its version is asked for on every floor, its public names are imported on first use from all of them
ROOT = "__init__"


def module_names():
    """Every module of the package as its parts, such as ("attention", "window", "rule"); a package's own is without."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts, path


MODULES = dict(module_names())


def imports(source, module, is_package):
    """(module, name or None, line) of every import of one source; modules of the package as parts, others as text.

    A relative import's module and a name in it that is itself a module are both told apart by `resolve`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                here = ("hybriddit", *module) if module != (ROOT,) else ("hybriddit",)
                base = here if is_package else here[:-1]
                base = base[: len(base) - node.level + 1]
                origin = ".".join((*base, *(node.module.split(".") if node.module else ())))
            else:
                origin = node.module
            for alias in node.names:
                yield origin, alias.name, node.lineno


def resolve(origin, name):
    """The module of the package that an import reads, as its parts; None for one of another package."""
    parts = origin.split(".")
    if parts[0] != "hybriddit":
        return None
    parts = tuple(parts[1:])
    if name is not None and (*parts, name) in MODULES:
        return (*parts, name)
    return parts or (ROOT,)


def arrows():
    """(from, to, where) of every import of one module of the package by another."""
    for module, path in MODULES.items():
        for origin, name, line in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            target = resolve(origin, name)
            if target is not None and target != module:
                yield module, target, f"{path.relative_to(PACKAGE.parent)}:{line}"


ARROWS = list(arrows())


def upstairs(arrows):
    """Those that do not go down."""
    for module, target, where in arrows:
        if ROOT in (module[0], target[0]) or module[0] == target[0]:
            continue
        ground = module[0] in GROUND and target[0] in GROUND
        if not ground and LEVELS[module[0]] <= LEVELS[target[0]]:
            yield f"{where}: {module[0]} imports {'.'.join(target)}"


def circle(arrows):
    """The modules of one circle of imports, or None."""
    graph = {}
    for module, target, _ in arrows:
        graph.setdefault(module, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [".".join(module) for module in error.args[1]]
    return None


def test_every_module_has_a_floor():
    assert {module[0] for module in MODULES} - {ROOT} == set(LEVELS)


def test_imports_go_down():
    assert not list(upstairs(ARROWS))


def test_no_circles():
    found = [(module, target, where) for module, target, where in ARROWS if ROOT not in (module[0], target[0])]
    assert circle(found) is None


def test_attention_knows_nothing_of_diffusers():
    for module, path in MODULES.items():
        if module[0] == "attention":
            for origin, _, line in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
                assert origin.partition(".")[0] != "diffusers", f"{path}:{line}"


# No module outside `models` names a family


def family_names():
    """The names of families' classes and what they begin with, by which code would tell families apart."""
    names = set()
    for family in families():
        classes = [family.dense_class, family.hybrid_class, family.scheduler, *family.pipelines.values()]
        classes += [c for row in family.processors for c in row[:3] if c is not None]
        # schedulers are shared with SiT and others: a scheduler's name tells no family
        names |= {c.__name__ for c in classes if c is not family.scheduler}
        names |= {f"Hybrid{family.pipeline_name}"}
    return names


def stems():
    """What a test such as `"Flux" in name` would look for: the families' pipelines' names, and their parts."""
    found = {family.pipeline_name.removesuffix("Pipeline") for family in families()}
    found |= {family.dense_class.__name__.removesuffix("Transformer2DModel") for family in families()}
    return found | {family.name for family in families()}


def docstrings(tree):
    """The constants that are docstrings: text for readers, which may name a model."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield first.value


def namings(source):
    """(what, line) of every family that a source names: identifiers, imports, texts that are a class's name or a stem."""
    tree, classes, starts = ast.parse(source), family_names(), stems()
    skipped = {id(node) for node in docstrings(tree)}
    registered = {name for name, value in vars(models_package()).items() if value in families()}
    for node in ast.walk(tree):
        found = None
        if isinstance(node, ast.Name):
            found = node.id
        elif isinstance(node, ast.Attribute):
            found = node.attr
        elif isinstance(node, ast.alias):
            found = node.name.rpartition(".")[2]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            if node.value in classes | starts or any(name in node.value for name in classes):
                yield node.value, node.lineno
            continue
        if found in classes | registered:
            yield found, node.lineno


def models_package():
    import hybriddit.models

    return hybriddit.models


def test_nothing_outside_models_names_a_family():
    found = []
    for module, path in MODULES.items():
        if module[0] != "models":
            for name, line in namings(path.read_text(encoding="utf-8")):
                found.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {name!r}")
    assert not found, "\n".join(found)


# The rules themselves


@pytest.mark.parametrize(
    ("module", "line", "refused"),
    [
        (("models", "new"), "from ..training import fit", True),
        (("attention", "new"), "def f():\n    from ..models.family import Family", True),
        (("flow", "new"), "if TYPE_CHECKING:\n    from ..pipelines import sit", True),
        (("flow", "new"), "from ..metrics import adm", True),
        (("info", "new"), "import hybriddit.benchmark.measure", True),
        (("models", "new"), "from .. import data", True),
        (("models", "new"), "from .. import __version__", False),
        (("training", "new"), "from ..models import hybridize\nfrom ..attention.layout import TokenLayout", False),
        (("files",), "from .config import HybridConfig", False),
        (("files",), "from .attention import TokenLayout", True),
    ],
)
def test_the_rule_of_floors(module, line, refused):
    found = [(module, resolve(origin, name), "here") for origin, name, _ in imports(line, module, False)]
    assert bool(list(upstairs([arrow for arrow in found if arrow[1] is not None]))) == refused


def test_the_rule_of_circles():
    assert circle([(("a",), ("b",), ""), (("b",), ("c",), "")]) is None
    assert set(circle([(("a",), ("b",), ""), (("b",), ("c",), ""), (("c",), ("a",), "")])) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("from diffusers import FluxPipeline", True),
        ("if isinstance(model, diffusers.SD3Transformer2DModel): pass", True),
        ('if name == "FluxPipeline": pass', True),
        ('if "Flux" in type(pipeline).__name__: pass', True),
        ('TABLE = {"HybridFluxTransformer2DModel": 1}', True),
        ("from ..models import FLUX", True),
        ("from ..models.families import PIXART_SIGMA as pixart", True),
        ('"""FluxPipeline and others."""', False),
        ("from ..models import families", False),
        ('shape = "flux"', False),
    ],
)
def test_the_rule_of_names(line, named):
    assert bool(list(namings(line))) == named
