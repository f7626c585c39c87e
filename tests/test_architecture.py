"""Imports point one way, and optional packages are imported where used."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tarflowlm"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

LAYERS = """
    errors progress chunks | checks files parts schema | locks model_config | config | presets |
    flow data | language_model device | model baseline | objective | runs |
    generation | evaluation editing options | texts | card | sharing causal_lm | training | views |
    terminal |
    pretrained | __init__ | reproduce harness | studio | cli | __main__
"""
"""Bottom to top. A folder or file imports from itself and from lower layers, never from a neighbour
in its layer.
"""
LAYER_OF = {unit: level for level, layer in enumerate(LAYERS.split("|")) for unit in layer.split()}


def imports(path: Path, *, at_top: bool = False) -> Iterator[str]:
    """Dotted names of what a file imports, inside functions as well unless `at_top`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_top else ast.walk(tree):
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


def neighbours(module: str) -> set[str]:
    """The other files of its folder that a file imports."""
    folder = module.rpartition(".")[0]
    found = set()
    for name in imports(MODULES[module]):
        for other in (name, name.rpartition(".")[0]):
            other = other.removeprefix("tarflowlm.")
            is_neighbour = other in MODULES and other.rpartition(".")[0] == folder
            if is_neighbour and other != module:
                found.add(other)
    return found


def test_files_of_a_folder_do_not_import_in_circles():
    graph = {module: neighbours(module) for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def test_optional_packages_are_imported_where_used():
    """At the top of a file stand the standard library and the core dependencies, in the studio
    gradio as well.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = (
        {name.split(">")[0] for name in project["dependencies"]}
        | set(sys.stdlib_module_names)
        | {"tarflowlm"}
    )
    for module, path in MODULES.items():
        allowed = core | ({"gradio"} if module.startswith("studio") else set())
        assert {name.split(".")[0] for name in imports(path, at_top=True)} <= allowed, module


def test_git_keeps_the_whole_package():
    """A pattern of .gitignore that matches a folder of the package would leave it out of the
    wheel.
    """
    assert all((path.parent / "__init__.py").exists() for path in MODULES.values())
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    files = [
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if "__pycache__" not in path.parts
    ]
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    done = subprocess.run(command, input="\n".join(files), capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == ""


LARGEST_TEXT = 873_500
"""Characters of all Python files of the package."""
MOST_ANY = 40
"""Lines of the package with the word Any, which no type checker looks into."""


def test_the_package_stays_within_its_budget():
    texts = [path.read_text(encoding="utf-8") for path in MODULES.values()]
    lines = [line for text in texts for line in text.splitlines()]
    assert sum(map(len, texts)) <= LARGEST_TEXT
    assert sum(bool(re.search(r"\bAny\b", line)) for line in lines) <= MOST_ANY
    assert not [line for line in lines if "fmt: skip" in line]
