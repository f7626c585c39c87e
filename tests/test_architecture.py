"""Imports point one way, and optional packages are imported where used."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "src" / "tarflowlm"
APPS = ROOT / "src" / "tarflowlm_apps"


def modules_below(package: Path) -> dict[str, Path]:
    """The files of a package by their dotted names in it."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in sorted(package.rglob("*.py"))
    }


MODULES = modules_below(CORE)
APPLICATIONS = modules_below(APPS)

LAYERS = """
    errors chunks | registry | files schema | compiled | flow | model_config | config |
    options presets | data | device | processes | building | model | baseline | objective | runs |
    requests | generation | evaluation | editing | training |
    terminal | pretrained | __init__ | cli | __main__
"""
"""Bottom to top. A folder or file imports from itself and from lower layers, never from a neighbour
in its layer.
"""
LAYER_OF = {unit: level for level, layer in enumerate(LAYERS.split("|")) for unit in layer.split()}


@cache
def parsed(path: Path) -> tuple[list[ast.stmt], list[ast.AST]]:
    """The statements of a file at its top, and all its imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Import, ast.ImportFrom)
    return tree.body, [node for node in ast.walk(tree) if isinstance(node, kinds)]


def imports(path: Path, *, at_top: bool = False) -> Iterator[str]:
    """Dotted names of what a file imports, inside functions as well unless `at_top`."""
    top, every = parsed(path)
    for node in top if at_top else every:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides the layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_down():
    wrong = []
    for module, path in MODULES.items():
        unit = module.split(".")[0]
        for name in imports(path):
            # no __future__: deferred annotations would turn off the shape checks of the tests
            package, *parts = name.split(".")
            # a public name of the package itself has no unit of its own
            other = parts[0] if parts and parts[0] in LAYER_OF else "__init__"
            below = other == unit or LAYER_OF[other] < LAYER_OF[unit]
            if package == "__future__" or (package == "tarflowlm" and not below):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_the_core_imports_no_application():
    wrong = [
        module
        for module, path in MODULES.items()
        if any(name.startswith("tarflowlm_apps") for name in imports(path))
    ]
    assert not wrong


def neighbours(module: str, modules: dict[str, Path], package: str) -> set[str]:
    """The other files of its folder that a file imports."""
    folder = module.rpartition(".")[0]
    found = set()
    for name in imports(modules[module]):
        for other in (name, name.rpartition(".")[0]):
            other = other.removeprefix(f"{package}.")
            is_neighbour = other in modules and other.rpartition(".")[0] == folder
            if is_neighbour and other != module:
                found.add(other)
    return found


@pytest.mark.parametrize("package", [CORE, APPS], ids=["core", "applications"])
def test_files_of_a_folder_do_not_import_in_circles(package):
    modules = modules_below(package)
    graph = {module: neighbours(module, modules, package.name) for module in modules}
    graphlib.TopologicalSorter(graph).prepare()


OPTIONAL = {
    "studio": {"gradio", "starlette"},
    "serve": {"starlette", "uvicorn"},
    "compiled": {"numba"},
    "hub": {"huggingface_hub"},
    "llm_plugin": {"llm", "pydantic"},
}
"""Optional packages at the top of files of a folder, which is imported where used."""


def test_optional_packages_are_imported_where_used():
    """A file imports the standard library and the core dependencies at its top; what serves pages
    also its own package.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = (
        {name.split(">")[0].replace("-", "_") for name in project["dependencies"]}
        | set(sys.stdlib_module_names)
        | {"tarflowlm", "tarflowlm_apps"}
    )
    for module, path in (MODULES | APPLICATIONS).items():
        allowed = core | OPTIONAL.get(module.split(".")[0], set())
        assert {name.split(".")[0] for name in imports(path, at_top=True)} <= allowed, module


def test_git_keeps_the_whole_package():
    """A pattern of .gitignore that matches a folder of the package would leave it out of the
    wheel.
    """
    files = [*MODULES.values(), *APPLICATIONS.values()]
    assert all((path.parent / "__init__.py").exists() for path in files)
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    files = [
        path.relative_to(ROOT).as_posix()
        for path in (*CORE.rglob("*"), *APPS.rglob("*"))
        if "__pycache__" not in path.parts
    ]
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    done = subprocess.run(command, input="\n".join(files), capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == ""


SPINE = [
    "flow.numerics.reference",
    "flow.codebook",
    "flow.couplings",
    "flow.heads",
    "flow.channelwise",
    "flow.mixd",
    "flow.transformer",
    "flow.stack",
    "model",
    "objective",
    "generation.decoder",
    "training.train",
]
"""The files that docs/tour.md says to read first."""


def test_the_spine_names_no_fast_path():
    fast = re.compile(
        r"compiled|flow\.numerics\.(cpu|vocabulary_rosenblatt|nearby)\b|COMPILED|is_eager_cpu"
    )
    wrong = [
        f"{name} imports {other}"
        for name in SPINE
        for other in imports(MODULES[name])
        if fast.search(other)
    ]
    assert not wrong
