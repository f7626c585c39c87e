"""Do the places that name a version agree? Prints what the changelog says about it.

    python .ci/release.py vVERSION

pyproject.toml has the version, CITATION.cff repeats it with its date, and CHANGELOG.md describes it
under a heading with both.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str, root: Path = ROOT) -> str:
    """The section of the changelog for a tag. ValueError where the version or the date differs."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = project["version"]
    if tag != f"v{version}":
        raise ValueError(f"the tag {tag} is not v and the version of pyproject.toml, {version}")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    cited = re.search(r"(?m)^version: (\S+)\ndate-released: (\S+)$", citation)
    if cited is None or cited[1] != version:
        raise ValueError(f"CITATION.cff does not say version: {version}, date-released: ...")
    date = cited[2]
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = f"## [{version}] - {date}\n"
    _, found, rest = changelog.partition(heading)
    if not found:
        raise ValueError(f"CHANGELOG.md has no heading {heading.strip()!r}")
    return rest.partition("\n## ")[0].strip() + "\n"


if __name__ == "__main__":
    try:
        print(notes(sys.argv[1]), end="")
    except ValueError as error:
        sys.exit(f"release.py: {error}")
