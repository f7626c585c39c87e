"""How much there is to read: files, their size, functions and constants, folder by folder.

    python benchmarks/house.py           # in brackets: the change since the last note
    python benchmarks/house.py --note    # the same; then house.json has these numbers

Files are of Python, in docs also of Markdown, and KB are 1,000 bytes of them, docstrings included.
Functions are counted at any depth, and constants are the names in capitals at the top of a file.
The spine is the list of files that docs/tour.md says to read first. Fields are those of
configurations and requests, and the options of commands, each in the class that adds it.

None of these numbers is a limit. One that has changed much is worth a look.
"""

import argparse
import ast
import datetime
import json
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTE = Path(__file__).with_suffix(".json")
CORE = ROOT / "src" / "tarflowlm"
APPLICATIONS = ROOT / "src" / "tarflowlm_apps"
BESIDE = ("tests", "benchmarks", "reproduction", "examples", "docs")
"""The folders beside the packages."""
SETTINGS = ("config.py", "model_config.py", "requests.py", "options.py", "cli/options.py")
"""The files of the core whose classes users set; the arguments of commands are in `Args`."""
FIELDS = "fields and options"

Counts = dict[str, float]
"""A number for every column of a row."""


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.Module) -> int:
    """The functions and methods of a file, at any depth."""
    return sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree))


def constants(tree: ast.Module) -> int:
    """The names in capitals that a file assigns at its top, also several at once."""
    found = 0
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        names = [one for target in targets for one in ast.walk(target)]
        found += sum(isinstance(one, ast.Name) and one.id.isupper() for one in names)
    return found


def fields(tree: ast.Module, ending: str = "") -> int:
    """The fields that a file's dataclasses with this `ending` of their names add to their bases."""
    found = 0
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith(ending):
            continue
        if any("dataclass" in ast.unparse(one) for one in node.decorator_list):
            hints = [one.annotation for one in node.body if isinstance(one, ast.AnnAssign)]
            found += sum("ClassVar" not in ast.unparse(hint) for hint in hints)
    return found


def files_below(folder: Path) -> list[Path]:
    """The files of a folder, and of the folders in it, that are counted."""
    suffixes = (".py", ".md") if folder.name == "docs" else (".py",)
    return [path for path in folder.rglob("*") if path.suffix in suffixes]


def spine() -> list[Path]:
    """The files that docs/tour.md says to read first."""
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    section = text.partition("## The spine\n")[2].partition("\n## ")[0]
    links = re.findall(r"^\d+\. \[.*?\]\((.*?)\)", section, re.MULTILINE)
    return [ROOT / "docs" / link for link in links]


def row(paths: Iterable[Path]) -> Counts:
    """The row of some files."""
    paths = list(paths)
    trees = [parsed(path) for path in paths if path.suffix == ".py"]
    return {
        "files": len(paths),
        "KB": round(sum(path.stat().st_size for path in paths) / 1000, 1),
        "functions": sum(map(functions, trees)),
        "constants": sum(map(constants, trees)),
    }


def house() -> dict[str, Counts]:
    """All rows by their names."""
    rows = {"core": row(files_below(CORE)), "  top level": row(CORE.glob("*.py"))}
    for folder in sorted(path for path in CORE.iterdir() if (path / "__init__.py").exists()):
        rows[f"  {folder.name}"] = row(files_below(folder))
    rows["applications"] = row(files_below(APPLICATIONS))
    rows |= {name: row(files_below(ROOT / name)) for name in BESIDE}
    rows["spine"] = row(spine())
    commands = [*(CORE / "cli").glob("*.py"), *APPLICATIONS.rglob("command.py")]
    found = sum(fields(parsed(CORE / name)) for name in SETTINGS)
    found += sum(fields(parsed(path), "Args") for path in commands)
    rows[FIELDS] = {"number": found}
    return rows


def shown(name: str, counts: Counts, noted: Counts) -> str:
    """A line of the table."""
    cells = []
    for column, number in counts.items():
        change = round(number - noted.get(column, 0), 1)
        cells.append(f"{number:10,}{f' ({change:+,})' if change else '':<9}")
    return f"{name:20}{''.join(cells)}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--note", action="store_true", help="keep these numbers in house.json")
    args = parser.parse_args()
    rows = house()
    note = json.loads(NOTE.read_text(encoding="utf-8")) if NOTE.exists() else {"rows": {}}
    print(f"in brackets: the change since {note.get('date', 'never')}")
    print(" " * 20 + "".join(f"{column:>10}{'':9}" for column in rows["core"]).rstrip())
    for name, counts in rows.items():
        print(shown(name, counts, note["rows"].get(name.strip(), {})))
    if args.note:
        lines = [f"    {json.dumps(name.strip())}: {json.dumps(one)}" for name, one in rows.items()]
        date = datetime.date.today().isoformat()
        text = f'{{\n  "date": "{date}",\n  "rows": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
        NOTE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
